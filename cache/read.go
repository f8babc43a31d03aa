package cache

import (
	"context"
	"fmt"

	"github.com/trivet-csi/trivet"
)

const (
	// fillBlocks is the longest fill: 1 MiB.
	fillBlocks = 256
	// fillsMax is how many fills are under way at most; what is read beyond is not kept.
	fillsMax = 64
)

// fill is a read from below whose blocks are to be kept.
type fill struct {
	t     *slots
	lba   trivet.LBA
	n     int
	ahead bool // nobody asked for them yet
	// spoiled marks the blocks that were changed since the fill began: what it brings may be older.
	spoiled [fillBlocks / 64]uint64
}

func (f *fill) covers(lba trivet.LBA) bool { return lba >= f.lba && lba < f.lba+trivet.LBA(f.n) }

// ReadAt implements trivet.Device.
func (d *Device) ReadAt(ctx context.Context, p []byte, off int64) error {
	if err := trivet.CheckRange(off, int64(len(p)), d.next.Size()); err != nil {
		return fmt.Errorf("read %s: %w", d.cfg.Volume, err)
	}
	lba, n := trivet.LBA(off/trivet.BlockSize), len(p)/trivet.BlockSize
	own := begin(d.cfg.Meters.Own)
	defer own.end()
	d.mu.Lock()
	if d.t != nil && n > 0 {
		d.stats.Reads++
		d.readAheadLocked(lba, n)
	}
	for i := 0; ; {
		if d.fenced || d.closed {
			defer d.mu.Unlock()
			return d.err
		}
		if d.t == nil {
			d.mu.Unlock()
			own.end()
			return d.noteFence(d.next.ReadAt(ctx, p[i*trivet.BlockSize:], off+int64(i)*trivet.BlockSize))
		}
		i = d.copyHitsLocked(p, lba, i)
		if i == n {
			d.mu.Unlock()
			return nil
		}
		if d.comingLocked(lba + trivet.LBA(i)) {
			if err := d.waitLocked(ctx); err != nil {
				d.mu.Unlock()
				return err
			}
			continue
		}
		to := d.missesLocked(lba, i, n)
		f := d.beginFillLocked(lba+trivet.LBA(i), to-i, false)
		d.mu.Unlock()
		own.end()
		part := p[i*trivet.BlockSize : to*trivet.BlockSize]
		err := d.next.ReadAt(ctx, part, off+int64(i)*trivet.BlockSize)
		d.endFill(f, part, err)
		if err != nil {
			return d.noteFence(err)
		}
		i = to
		d.mu.Lock()
	}
}

// copyHitsLocked copies blocks from i on until one is not here, and returns its number.
func (d *Device) copyHitsLocked(p []byte, lba trivet.LBA, i int) int {
	t := d.t
	for ; i*trivet.BlockSize < len(p); i++ {
		s := t.index.get(lba + trivet.LBA(i))
		if s == none {
			break
		}
		copy(p[i*trivet.BlockSize:(i+1)*trivet.BlockSize], t.m.block(s))
		if t.state[s] == clean {
			t.policy.hit(s)
		}
		d.stats.hit(d.set.Eviction, 1)
	}
	return i
}

// missesLocked returns the end of the run of blocks from i on that are not here.
func (d *Device) missesLocked(lba trivet.LBA, i, n int) int {
	to := i
	for to < n && to-i < fillBlocks && d.t.index.get(lba+trivet.LBA(to)) == none {
		to++
	}
	d.stats.miss(d.set.Eviction, to-i)
	return to
}

// comingLocked reports whether a read-ahead that is under way brings the block.
func (d *Device) comingLocked(lba trivet.LBA) bool {
	for _, f := range d.fills {
		if f.ahead && f.covers(lba) {
			return true
		}
	}
	return false
}

// beginFillLocked registers a fill; nil if its blocks are not to be kept.
func (d *Device) beginFillLocked(lba trivet.LBA, n int, ahead bool) *fill {
	if d.set.NoClean || d.err != nil {
		return nil
	}
	var f *fill
	switch {
	case len(d.rest) > 0:
		f = d.rest[len(d.rest)-1]
		d.rest = d.rest[:len(d.rest)-1]
	case len(d.fills) < fillsMax:
		f = new(fill)
	default:
		return nil
	}
	*f = fill{t: d.t, lba: lba, n: n, ahead: ahead}
	d.fills = append(d.fills, f)
	return f
}

// endFill keeps what a fill brought, unless it failed.
func (d *Device) endFill(f *fill, p []byte, err error) {
	if f == nil {
		return
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	for i, g := range d.fills {
		if g == f {
			last := len(d.fills) - 1
			d.fills[i] = d.fills[last]
			d.fills = d.fills[:last]
			break
		}
	}
	if err == nil && d.t == f.t && d.t != nil && !d.set.NoClean && !d.fenced {
		d.keepFillLocked(f, p)
	}
	d.rest = append(d.rest, f)
	if f.ahead {
		d.changed.fire()
	}
}

func (d *Device) keepFillLocked(f *fill, p []byte) {
	var one [1]int32
	for i := range f.n {
		at := f.lba + trivet.LBA(i)
		if f.spoiled[i/64]&(1<<(i%64)) != 0 || d.t.index.get(at) != none {
			continue
		}
		if !d.t.take(one[:]) {
			return
		}
		copy(d.t.m.block(one[0]), p[i*trivet.BlockSize:])
		d.t.addClean(one[0], at)
		if f.ahead {
			d.stats.ReadAheadBlocks++
		}
	}
}

// spoilFillsLocked marks the blocks that have changed in every fill under way.
func (d *Device) spoilFillsLocked(lba trivet.LBA, n int64) {
	for _, f := range d.fills {
		from, to := max(lba, f.lba), min(lba+trivet.LBA(n), f.lba+trivet.LBA(f.n))
		for at := from; at < to; at++ {
			i := at - f.lba
			f.spoiled[i/64] |= 1 << (i % 64)
		}
	}
}
