package cache

import (
	"context"
	"errors"
	"fmt"

	"github.com/trivet-csi/trivet"
)

// span is a range of blocks that is in use below: being written back, or changed by an operation that goes through.
// Operations that go through exclude each other and every write-back of the same blocks, so what is below and what
// is in the table never disagree, and discards keep their place among the writes (H19).
type span struct {
	lba     trivet.LBA
	n       int64
	through bool
}

func (s span) overlaps(lba trivet.LBA, n int64) bool {
	return lba < s.lba+trivet.LBA(s.n) && s.lba < lba+trivet.LBA(n)
}

// inUseLocked reports whether a span overlaps the range.
func (d *Device) inUseLocked(lba trivet.LBA, n int64) bool {
	for _, s := range d.spans {
		if s.overlaps(lba, n) {
			return true
		}
	}
	return false
}

func (d *Device) dropSpanLocked(lba trivet.LBA, n int64, through bool) {
	for i, s := range d.spans {
		if s.lba == lba && s.n == n && s.through == through {
			last := len(d.spans) - 1
			d.spans[i] = d.spans[last]
			d.spans = d.spans[:last]
			return
		}
	}
	panic("cache: a range was released that was not in use")
}

// Discard implements trivet.Device. It goes through in every mode: when it returns, the blocks are given up below,
// and what the cache held of them is forgotten. Dirty blocks that a crash overtakes stay until then.
func (d *Device) Discard(ctx context.Context, off, n int64) error {
	size := d.next.Size()
	if off < 0 || n < 0 || off > size || n > size-off {
		return d.next.Discard(ctx, off, n) // it knows what to say
	}
	lba, blocks := trivet.AlignInwards(off, n)
	if blocks == 0 {
		return d.next.Discard(ctx, off, n)
	}
	if _, err := d.enter(ctx); err != nil {
		return err
	}
	defer d.leave()
	return d.through(ctx, lba, blocks, nil, func() error { return d.next.Discard(ctx, off, n) })
}

// WriteZeroes implements trivet.Device. It goes through, like Discard.
func (d *Device) WriteZeroes(ctx context.Context, off, n int64) error {
	if err := trivet.CheckRange(off, n, d.next.Size()); err != nil {
		return fmt.Errorf("write zeroes to %s: %w", d.cfg.Volume, err)
	}
	if n == 0 {
		return nil
	}
	if _, err := d.enter(ctx); err != nil {
		return err
	}
	defer d.leave()
	return d.through(ctx, trivet.LBA(off/trivet.BlockSize), n/trivet.BlockSize, nil, func() error {
		return d.next.WriteZeroes(ctx, off, n)
	})
}

func (d *Device) writeThrough(ctx context.Context, p []byte, off int64, mode Mode) error {
	if len(p) == 0 {
		return nil
	}
	keep := p
	if mode == WriteAround {
		keep = nil
	}
	return d.through(ctx, trivet.LBA(off/trivet.BlockSize), int64(len(p)/trivet.BlockSize), keep, func() error {
		return d.next.WriteAt(ctx, p, off)
	})
}

// through runs op, which changes the n blocks from lba on below, and forgets what it replaces. data, unless nil, is
// what the blocks hold then. A dirty block is forgotten only after op succeeded, for until then it is the only copy
// of an acknowledged write.
func (d *Device) through(ctx context.Context, lba trivet.LBA, n int64, data []byte, op func() error) error {
	d.mu.Lock()
	if d.t == nil {
		d.mu.Unlock()
		return d.noteFence(op())
	}
	if err := d.claimLocked(ctx, lba, n); err != nil {
		d.mu.Unlock()
		return err
	}
	before := d.seq
	d.mu.Unlock()

	err := op()

	d.mu.Lock()
	d.dropSpanLocked(lba, n, true)
	d.spoilFillsLocked(lba, n)
	if err == nil {
		d.t.each(lba, n, func(s int32) { d.t.forget(s, before) })
		if data != nil {
			d.keepLocked(lba, data)
		}
	} else {
		d.t.each(lba, n, func(s int32) {
			if d.t.state[s] == clean { // what is below now is not known
				d.t.dropClean(s)
			}
		})
	}
	d.changed.fire()
	d.wakeFlusherLocked()
	d.mu.Unlock()
	return d.noteFence(err)
}

// claimLocked makes the range this caller's: after those that went through before, and after write-backs of it that
// are under way; no others start meanwhile.
func (d *Device) claimLocked(ctx context.Context, lba trivet.LBA, n int64) error {
	claimed := false
	for {
		blocked := false
		for _, s := range d.spans {
			if s.overlaps(lba, n) && (!s.through || !claimed) {
				blocked = true
			}
		}
		switch {
		case !claimed && !d.overlapsThroughLocked(lba, n):
			d.spans = append(d.spans, span{lba, n, true})
			claimed = true
			continue
		case !blocked:
			return nil
		}
		err := d.err
		if err == nil {
			err = d.waitLocked(ctx)
		}
		if err != nil {
			if claimed {
				d.dropSpanLocked(lba, n, true)
				d.changed.fire()
			}
			return err
		}
	}
}

func (d *Device) overlapsThroughLocked(lba trivet.LBA, n int64) bool {
	for _, s := range d.spans {
		if s.through && s.overlaps(lba, n) {
			return true
		}
	}
	return false
}

// keepLocked keeps what was written through, as far as there is room without a wait.
func (d *Device) keepLocked(lba trivet.LBA, data []byte) {
	if d.set.NoClean {
		return
	}
	var one [1]int32
	for i := 0; i*trivet.BlockSize < len(data); i++ {
		at := lba + trivet.LBA(i)
		if d.t.index.get(at) != none {
			continue // written anew meanwhile
		}
		if !d.t.take(one[:]) {
			return
		}
		copy(d.t.m.block(one[0]), data[i*trivet.BlockSize:])
		d.t.addClean(one[0], at)
	}
}

// noteFence makes the whole Device fenced when something below is (H13).
func (d *Device) noteFence(err error) error {
	if err != nil && errors.Is(err, trivet.ErrFenced) {
		d.mu.Lock()
		d.fenceLocked(err)
		d.mu.Unlock()
	}
	return err
}

// fenceLocked drops what was not written back: another attachment owns the volume.
func (d *Device) fenceLocked(cause error) {
	if d.fenced || d.closed {
		return
	}
	d.fenced = true
	d.err = fmt.Errorf("%s at epoch %d: %w", d.cfg.Volume, d.cfg.Epoch, trivet.ErrFenced)
	lost := 0
	if d.t != nil {
		if d.lock != nil { // first, so that no successor takes up half of them
			d.lock.head.dropped = true
			d.putHeader()
		}
		lost = d.t.wipe()
		d.t.dropAllClean()
	}
	if lost > 0 {
		d.stats.LostBlocks += uint64(lost)
		d.log.Error("dropping acknowledged writes that were not flushed: another attachment owns the volume",
			"bytes", int64(lost)*trivet.BlockSize, "epoch", uint64(d.cfg.Epoch), "err", cause)
	}
	d.changed.fire()
}
