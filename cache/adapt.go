package cache

import (
	"time"

	"github.com/trivet-csi/trivet"
)

// adaptLocked makes what write-back and read-ahead work with follow d.set.
func (d *Device) adaptLocked() {
	if d.tune == nil && d.set.Adaptive {
		d.tune = newTuner(uint64(d.cfg.Volume))
	}
	if d.set.Adaptive { // again: it goes on with what it has found before
		d.mode = d.tune.mode()
	} else {
		d.mode = workMode{blocks: pieceBlocks, depth: d.cfg.Depth}
	}
	d.unparkLocked()
}

// learnLocked tells the tuner of a write-back of n blocks that ended.
func (d *Device) learnLocked(now, took time.Duration, n int) {
	if d.set.Adaptive && d.tune.landed(now, took, n, d.aloftN >= d.mode.depth) {
		d.mode = d.tune.mode()
		d.unparkLocked()
	}
}

// unparkLocked gives the flusher as many flights as may be under way.
func (d *Device) unparkLocked() {
	for n := len(d.parked); d.activeF < d.mode.depth && n > 0; n = len(d.parked) {
		f := d.parked[n-1]
		d.parked = d.parked[:n-1]
		d.activeF++
		d.idle <- f // has room for all
	}
}

// restLocked takes back a flight that has landed.
func (d *Device) restLocked(f *flight) {
	if f.short {
		d.shorts <- f // has room for all
		return
	}
	d.aloftN--
	if d.activeF > d.mode.depth {
		d.activeF--
		d.parked = append(d.parked, f)
		return
	}
	d.idle <- f // has room for all
}

// aheadBlocksLocked returns how far to read ahead at most, in blocks.
func (d *Device) aheadBlocksLocked() int {
	limit := int(d.set.ReadAheadBytes / trivet.BlockSize)
	if d.t != nil {
		limit = min(limit, d.t.m.slotN/4) // or it would push out what it has just brought
	}
	if d.set.Adaptive && limit > 0 {
		limit = d.ahead.limit(limit)
	}
	return limit
}
