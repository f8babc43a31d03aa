package iothrottle

import (
	"fmt"
	"slices"
	"time"

	"github.com/trivet-csi/trivet"
)

// Extent is a run of dirty blocks that waits to be written back.
type Extent struct {
	LBA    trivet.LBA
	BlockN int
	Since  time.Duration // when it became dirty, on the caller's clock
}

// FlushOrder is a queue of dirty extents: what is to be written back next. It is pure, and not safe for
// concurrent use. The caller sees to it that extents do not overlap.
type FlushOrder interface {
	// Add puts an extent in.
	Add(e Extent)
	// Next takes out the extent to write next; false when there is none. now is on the clock of Extent.Since.
	Next(now time.Duration) (Extent, bool)
	// Len returns how many extents wait.
	Len() int
}

// The names of the orders, as the parameter ioScheduler has them.
const (
	OrderNoop     = "noop"
	OrderDeadline = "deadline"
	OrderFair     = "fair"
)

// NewFlushOrder returns an empty queue: noop, first in, first out; deadline, by place in one direction, but an
// extent that has waited for longer than deadline comes first, and the head goes on from there; fair, in turns
// between the regions of 64 MiB that are dirty, by place in each, so that a flood of writes to one place does not
// hold up the others. ErrInvalid: no such order, or deadline is not above zero where it is used.
func NewFlushOrder(name string, deadline time.Duration) (FlushOrder, error) {
	switch {
	case name == OrderNoop:
		return &fifoOrder{}, nil
	case name == OrderFair:
		return &fairOrder{}, nil
	case name == OrderDeadline && deadline > 0:
		return &deadlineOrder{deadline: deadline}, nil
	}
	return nil, fmt.Errorf("flush order %q with a deadline of %v: %w", name, deadline, trivet.ErrInvalid)
}

// fifoOrder is noop.
type fifoOrder struct {
	queue []Extent
	taken int // from the front of queue
}

func (o *fifoOrder) Add(e Extent) { o.queue = append(o.queue, e) }

func (o *fifoOrder) Len() int { return len(o.queue) - o.taken }

func (o *fifoOrder) Next(time.Duration) (Extent, bool) {
	if o.Len() == 0 {
		return Extent{}, false
	}
	e := o.queue[o.taken]
	if o.taken++; o.taken*2 > len(o.queue) { // each element is moved once on average
		o.queue = o.queue[:copy(o.queue, o.queue[o.taken:])]
		o.taken = 0
	}
	return e, true
}

const (
	regionBlocks = 64 << 20 / trivet.BlockSize

	// burstExtents is how many extents follow one that was late, or one turn of a region, before another is
	// looked for: seeks cost something on every storage. Linux's mq-deadline has the same (fifo_batch, 16).
	burstExtents = 16
)

// pendingExtent is in a region and, for deadlines, in the order of arrival as well.
type pendingExtent struct {
	Extent
	taken bool
}

// region is the extents that begin in one stretch of the volume, by place.
type region struct {
	number  uint64
	extents []*pendingExtent
}

func regionOf(lba trivet.LBA) uint64 { return uint64(lba) / regionBlocks }

// regions is an ordered set of extents: a sorted list of short sorted lists, in which to insert moves little.
type regions struct {
	list []*region
	n    int
}

func (r *regions) add(p *pendingExtent) {
	number := regionOf(p.LBA)
	i, ok := slices.BinarySearchFunc(r.list, number, func(x *region, n uint64) int { return cmpUint(x.number, n) })
	if !ok {
		r.list = slices.Insert(r.list, i, &region{number: number})
	}
	x := r.list[i]
	x.extents = slices.Insert(x.extents, x.search(p.LBA), p)
	r.n++
}

// search returns where an extent at lba is, or would be.
func (x *region) search(lba trivet.LBA) int {
	i, _ := slices.BinarySearchFunc(x.extents, lba, func(p *pendingExtent, at trivet.LBA) int {
		return cmpUint(uint64(p.LBA), uint64(at))
	})
	return i
}

func cmpUint(a, b uint64) int {
	switch {
	case a < b:
		return -1
	case a > b:
		return 1
	}
	return 0
}

// take removes the extent at position j of the region at position i.
func (r *regions) take(i, j int) *pendingExtent {
	x := r.list[i]
	p := x.extents[j]
	p.taken = true
	x.extents = slices.Delete(x.extents, j, j+1)
	if len(x.extents) == 0 {
		r.list = slices.Delete(r.list, i, i+1)
	}
	r.n--
	return p
}

// from returns the position of the first extent at or after lba, or of the very first when there is none.
// REQUIRES: r is not empty.
func (r *regions) from(lba trivet.LBA) (i, j int) {
	i, ok := slices.BinarySearchFunc(r.list, regionOf(lba), func(x *region, n uint64) int { return cmpUint(x.number, n) })
	if ok {
		if j = r.list[i].search(lba); j < len(r.list[i].extents) {
			return i, j
		}
		i++
	}
	if i == len(r.list) {
		return 0, 0
	}
	return i, 0
}

// deadlineOrder goes through the volume in one direction and begins again (C-SCAN), with deadlines.
type deadlineOrder struct {
	deadline time.Duration
	all      regions
	arrived  []*pendingExtent // oldest first; those taken are skipped
	head     trivet.LBA
	burst    int // extents left before deadlines are looked at again
}

func (o *deadlineOrder) Add(e Extent) {
	p := &pendingExtent{Extent: e}
	o.all.add(p)
	o.arrived = append(o.arrived, p)
}

func (o *deadlineOrder) Len() int { return o.all.n }

func (o *deadlineOrder) Next(now time.Duration) (Extent, bool) {
	for len(o.arrived) > 0 && o.arrived[0].taken {
		o.arrived[0] = nil
		o.arrived = o.arrived[1:]
	}
	if o.all.n == 0 {
		return Extent{}, false
	}
	if o.burst > 0 {
		o.burst--
	} else if oldest := o.arrived[0]; now-oldest.Since > o.deadline {
		o.head, o.burst = oldest.LBA, burstExtents-1
	}
	p := o.all.take(o.all.from(o.head))
	o.head = p.LBA + trivet.LBA(max(p.BlockN, 1))
	return p.Extent, true
}

// fairOrder takes turns between regions.
type fairOrder struct {
	all  regions
	turn uint64 // number of the region whose turn it is
	left int    // extents that it may still have
}

func (o *fairOrder) Add(e Extent) { o.all.add(&pendingExtent{Extent: e}) }

func (o *fairOrder) Len() int { return o.all.n }

func (o *fairOrder) Next(time.Duration) (Extent, bool) {
	if o.all.n == 0 {
		return Extent{}, false
	}
	if o.left == 0 {
		o.turn, o.left = o.turn+1, burstExtents
	}
	i, _ := o.all.from(trivet.LBA(o.turn * regionBlocks))
	x := o.all.list[i]
	if x.number != o.turn { // that one is empty: the next one after it
		o.turn, o.left = x.number, burstExtents
	}
	o.left--
	return o.all.take(i, 0).Extent, true
}
