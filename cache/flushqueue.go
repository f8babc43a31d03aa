package cache

import (
	"cmp"
	"fmt"
	"slices"
	"time"

	"github.com/trivet-csi/trivet"
)

// Order says which of the dirty blocks that are to be written back go first. Neighbours go along in every order.
type Order string

// The orders.
const (
	OrderNoop     Order = "noop"     // first written, first written back
	OrderDeadline Order = "deadline" // by place in one direction, but what is late goes first; the default
	OrderFair     Order = "fair"     // in turns between the regions of 64 MiB that are dirty
)

// Orders lists the orders.
func Orders() []Order { return []Order{OrderNoop, OrderDeadline, OrderFair} }

// check returns ErrInvalid for an unknown name.
func (o Order) check() error {
	if o == "" || slices.Contains(Orders(), o) {
		return nil
	}
	return fmt.Errorf("order of write-backs %q: want one of %v: %w", o, Orders(), trivet.ErrInvalid)
}

const (
	regionBlocks = 64 << 20 / trivet.BlockSize
	// quantumBlocks is a turn of a region: 1 MiB, sixteen of the longest write-backs.
	quantumBlocks = 16 * pieceBlocks
	// burstFlights is how many write-backs follow one that was late before another is looked for: seeks cost something
	// on every storage. Linux's mq-deadline has the same (fifo_batch, block/mq-deadline.c).
	burstFlights = 16
)

// due is a dirty block that is to be written back.
type due struct {
	lba   trivet.LBA
	slot  int32
	turn  int32 // OrderFair: of its region
	seq   uint64
	since time.Duration // when it became dirty
}

// flushQueue is what is to be written back of one collection, in its order. It is pure, and allocates nothing once it
// was made.
//
// Deadline is C-SCAN with deadlines, as mq-deadline of Linux: it goes through the volume in one direction, from where
// the last collection ended, and begins again in front; every burstFlights write-backs it looks for a block that is
// late, which is one that has been dirty for two deadlines (write-back begins at one), and goes on from there. Fair is
// round robin with a quantum in blocks, as the deficit round robin of Shreedhar and Varghese (SIGCOMM 1995) is for
// packets; the turns are taken by dirtySlots, which knows all regions.
type flushQueue struct {
	order Order
	late  time.Duration // age from which a block is late

	items   []due
	taken   []bool  // by place in items
	arrived []int32 // OrderDeadline: places in items, oldest first
	oldest  int     // in arrived; all before are taken
	at      int     // in items: the next, unless it is taken
	leftN   int

	head  trivet.LBA // OrderDeadline: where the sweep goes on
	burst int        // write-backs left before blocks that are late are looked for
}

func newFlushQueue(deadline time.Duration) *flushQueue {
	return &flushQueue{
		late: 2 * deadline, items: make([]due, 0, batchMax), taken: make([]bool, batchMax), arrived: make([]int32, batchMax),
	}
}

// begin empties the queue for a collection in an order.
func (q *flushQueue) begin(o Order) {
	q.order, q.items = o, q.items[:0]
}

// full reports whether no more may be added.
func (q *flushQueue) full() bool { return len(q.items) == batchMax }

// add puts a block in. REQUIRES: in the order in which they became dirty (OrderFair: within their turn); not full.
func (q *flushQueue) add(d due) { q.items = append(q.items, d) }

// arrange ends the collection.
func (q *flushQueue) arrange() {
	n := len(q.items)
	q.leftN, q.at, q.oldest = n, 0, 0
	clear(q.taken[:n])
	switch q.order {
	case OrderNoop:
	case OrderFair:
		slices.SortFunc(q.items, func(a, b due) int {
			return cmp.Or(cmp.Compare(a.turn, b.turn), cmp.Compare(a.lba, b.lba))
		})
	default: // OrderDeadline
		for i := range q.items {
			q.items[i].turn = int32(i) // the order of arrival
		}
		slices.SortFunc(q.items, func(a, b due) int { return cmp.Compare(a.lba, b.lba) })
		for i, d := range q.items {
			q.arrived[d.turn] = int32(i)
		}
		q.at, _ = slices.BinarySearchFunc(q.items, q.head, func(d due, at trivet.LBA) int { return cmp.Compare(d.lba, at) })
	}
}

// next takes out the block to write back next; false when there is none.
func (q *flushQueue) next(now time.Duration) (due, bool) {
	if q.leftN == 0 {
		return due{}, false
	}
	if q.order != OrderNoop && q.order != OrderFair && q.burst <= 0 {
		for q.taken[q.arrived[q.oldest]] {
			q.oldest++
		}
		if i := q.arrived[q.oldest]; now-q.items[i].since > q.late {
			q.at, q.burst = int(i), burstFlights
		}
	}
	for q.at >= len(q.items) || q.taken[q.at] {
		if q.at++; q.at >= len(q.items) {
			q.at = 0
		}
	}
	d := q.items[q.at]
	q.taken[q.at] = true
	q.at++
	q.leftN--
	return d, true
}

// flew says that the block that next returned last went, in a write-back that ends before end.
func (q *flushQueue) flew(end trivet.LBA) {
	q.head = end
	q.burst--
}

// dirtySlots is the dirty slots in the order of their cover and, if regions is set, in a list of each region too.
type dirtySlots struct {
	list
	lba     []trivet.LBA // by slot
	regions *regions     // nil unless OrderFair
}

// regions keeps the dirty slots by region. Regions stand in a ring, in the order of their turns.
type regions struct {
	prev, next []int32 // of all lists
	at         map[uint64]*region
	first      *region
	rest       []*region // to be used again
}

type region struct {
	list
	number        uint64
	before, after *region // in the ring
}

func newDirtySlots(lba []trivet.LBA) *dirtySlots {
	return &dirtySlots{list: *newList(len(lba)), lba: lba}
}

// byRegion says whether there are to be lists by region.
func (d *dirtySlots) byRegion(want bool) {
	switch {
	case !want:
		d.regions = nil
	case d.regions == nil:
		n := len(d.lba)
		d.regions = &regions{prev: make([]int32, n), next: make([]int32, n), at: make(map[uint64]*region)}
		for s := d.head; s != none; s = d.next[s] {
			d.regions.of(d.lba[s]).pushBack(s)
		}
	}
}

func (d *dirtySlots) pushBack(s int32) {
	d.list.pushBack(s)
	if d.regions != nil {
		d.regions.of(d.lba[s]).pushBack(s)
	}
}

// insertAfter puts s behind at, and so in its region behind the last one of it that is not behind at.
func (d *dirtySlots) insertAfter(s, at int32) {
	d.list.insertAfter(s, at)
	if d.regions == nil {
		return
	}
	for at != none && d.lba[at]/regionBlocks != d.lba[s]/regionBlocks {
		at = d.prev[at]
	}
	d.regions.of(d.lba[s]).insertAfter(s, at)
}

func (d *dirtySlots) remove(s int32) {
	d.list.remove(s)
	if d.regions != nil {
		d.regions.remove(d.lba[s], s)
	}
}

// replace puts s in the place of old. REQUIRES: both are of the same block.
func (d *dirtySlots) replace(old, s int32) {
	d.list.replace(old, s)
	if d.regions != nil {
		d.regions.of(d.lba[s]).replace(old, s)
	}
}

// of returns the region of a block; a new one has its turn after all others.
func (r *regions) of(lba trivet.LBA) *region {
	number := uint64(lba / regionBlocks)
	if x := r.at[number]; x != nil {
		return x
	}
	var x *region
	if n := len(r.rest); n > 0 {
		x, r.rest = r.rest[n-1], r.rest[:n-1]
	} else {
		x = &region{list: list{prev: r.prev, next: r.next}}
	}
	x.number, x.head, x.tail, x.n = number, none, none, 0
	r.at[number] = x
	if r.first == nil {
		r.first, x.before, x.after = x, x, x
		return x
	}
	x.before, x.after = r.first.before, r.first
	x.before.after, x.after.before = x, x
	return x
}

func (r *regions) remove(lba trivet.LBA, s int32) {
	x := r.of(lba)
	if x.remove(s); x.n > 0 {
		return
	}
	delete(r.at, x.number)
	if r.rest = append(r.rest, x); x.after == x {
		r.first = nil
		return
	}
	if r.first == x {
		r.first = x.after
	}
	x.before.after, x.after.before = x.after, x.before
}
