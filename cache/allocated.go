package cache

import (
	"context"
	"fmt"
	"slices"

	"github.com/trivet-csi/trivet"
)

// unwrittenMax bounds the blocks that one answer of Allocated looks at, and so its memory: a table with more that is
// not written back is asked piece by piece.
const unwrittenMax = 32 << 10

var _ trivet.Allocator = (*Device)(nil)

// Allocated implements trivet.Allocator. What was acknowledged and is not below yet is data; of the rest the device
// below knows.
func (d *Device) Allocated(ctx context.Context, off, n int64, runs []trivet.Run) (int, error) {
	if err := trivet.CheckRange(off, n, d.next.Size()); err != nil {
		return 0, fmt.Errorf("block status of %s: %w", d.cfg.Volume, err)
	}
	d.mu.Lock()
	if d.fenced || d.closed {
		defer d.mu.Unlock()
		return 0, d.err
	}
	// Before the device below is asked: what lands in between is in both answers, the other way round it were in none.
	blocks, n := d.unwrittenLocked(trivet.LBA(off/trivet.BlockSize), n)
	d.mu.Unlock()
	if len(blocks) == 0 {
		used, err := trivet.AllocatedOf(ctx, d.next, off, n, runs)
		return used, d.noteFence(err)
	}
	below := make([]trivet.Run, len(runs))
	used, err := trivet.AllocatedOf(ctx, d.next, off, n, below)
	if err != nil {
		return 0, d.noteFence(err)
	}
	return overlay(below[:used], off, blocks, runs), nil
}

// unwrittenLocked returns the blocks of the range that are not below yet, in order, and for how many bytes of it that
// is the answer.
func (d *Device) unwrittenLocked(lba trivet.LBA, n int64) ([]trivet.LBA, int64) {
	if d.t == nil || d.t.dirty.n+d.t.flyingN == 0 {
		return nil, n
	}
	var out []trivet.LBA
	t, end := d.t, lba+trivet.LBA(n/trivet.BlockSize)
	if t.dirty.n+t.flyingN > unwrittenMax {
		end = min(end, lba+unwrittenMax)
		for at := lba; at < end; at++ {
			if s := t.index.get(at); s != none && t.state[s] != clean {
				out = append(out, at)
			}
		}
		return out, int64(end-lba) * trivet.BlockSize
	}
	add := func(s int32) {
		if at := t.lba[s]; at >= lba && at < end {
			out = append(out, at)
		}
	}
	for s := t.dirty.head; s != none; s = t.dirty.next[s] {
		add(s)
	}
	for _, f := range d.all {
		if f.cover == noCover {
			continue // at rest
		}
		for _, s := range f.slots {
			add(s)
		}
	}
	slices.Sort(out)
	return out, n
}

// overlay writes to out the runs of below, which begin at off, with blocks as data, and returns how many it used. They
// end earlier than those of below if out has no room. It is pure.
func overlay(below []trivet.Run, off int64, blocks []trivet.LBA, out []trivet.Run) int {
	used := 0
	add := func(n int64, allocated bool) bool {
		switch {
		case n == 0:
		case used > 0 && out[used-1].Allocated == allocated:
			out[used-1].LenBytes += n
		case used == len(out):
			return false
		default:
			out[used] = trivet.Run{LenBytes: n, Allocated: allocated}
			used++
		}
		return true
	}
	for _, r := range below {
		end := off + r.LenBytes
		if r.Allocated {
			if !add(r.LenBytes, true) {
				return used
			}
			off = end
			continue
		}
		for len(blocks) > 0 && int64(blocks[0])*trivet.BlockSize < end {
			at := int64(blocks[0]) * trivet.BlockSize
			blocks = blocks[1:]
			if at < off {
				continue // in a run before, or twice
			}
			if !add(at-off, false) || !add(trivet.BlockSize, true) {
				return used
			}
			off = at + trivet.BlockSize
		}
		if !add(end-off, false) {
			return used
		}
		off = end
	}
	return used
}
