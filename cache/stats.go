package cache

import (
	"time"

	"github.com/trivet-csi/trivet"
)

// HitRate counts blocks read under one eviction policy.
type HitRate struct{ Hits, Misses uint64 }

// Stats are counts since Open, and what is so now.
type Stats struct {
	Mode       Mode
	Bytes      int64 // of blocks that fit
	DirtyBytes int64 // acknowledged, not below yet
	CleanBytes int64

	Reads, Writes, Flushes uint64 // calls; writes in writeBack alone, in pieces of at most 64 KiB
	WrittenBytes           uint64 // by those writes
	WriteBacks             uint64 // writes to the device below
	WriteBackBytes         uint64
	Merged                 uint64 // writes that went along with a neighbour
	ReadAheadBlocks        uint64 // kept
	LostBlocks             uint64 // dropped at a fence
	Delayed, Stalled       uint64 // writes that the dirty limit slowed down, and that waited for room
	DelayedFor             time.Duration

	// What is in force at the moment; see Settings.Adaptive.
	Adaptive       bool
	FlushBytes     int64 // of the longest write-back
	FlushDepth     int   // write-backs under way
	ReadAheadBytes int64 // at most; of one sequential reader

	ByEviction [4]HitRate // in the order of Evictions
}

// timing is a request that a Meter measures. The zero value measures nothing.
type timing struct {
	meter Meter
	began time.Time
}

func begin(m Meter) timing {
	if m == nil {
		return timing{}
	}
	m.Enter()
	return timing{m, time.Now()}
}

// end may be called again, and does nothing then.
func (t *timing) end() {
	if t.meter != nil {
		t.meter.Leave(time.Since(t.began))
		t.meter = nil
	}
}

func place(e Eviction) int {
	switch e {
	case LFU:
		return 1
	case FIFO:
		return 2
	case Random:
		return 3
	case LRU:
	}
	return 0
}

func (s *Stats) hit(e Eviction, n int)  { s.ByEviction[place(e)].Hits += uint64(n) }
func (s *Stats) miss(e Eviction, n int) { s.ByEviction[place(e)].Misses += uint64(n) }

// Stats returns the counts.
func (d *Device) Stats() Stats {
	d.mu.Lock()
	defer d.mu.Unlock()
	s := d.stats
	s.Mode = d.modeLocked()
	s.Adaptive, s.FlushDepth = d.set.Adaptive, d.mode.depth
	s.FlushBytes = int64(d.mode.blocks) * trivet.BlockSize
	s.ReadAheadBytes = int64(d.aheadBlocksLocked()) * trivet.BlockSize
	if d.t != nil {
		s.Bytes = int64(d.t.m.slotN) * trivet.BlockSize
		s.DirtyBytes = int64(d.t.dirty.n+d.t.flyingN) * trivet.BlockSize
		s.CleanBytes = int64(d.t.cleanN) * trivet.BlockSize
	}
	return s
}
