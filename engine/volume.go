package engine

import (
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/cockroachdb/pebble/v2"

	"github.com/trivet-csi/trivet"
)

// Volume is one volume's blocks and state on one disk. Reads, State, DurableState, Digest and Image
// may be called concurrently with each other and with the one applier, which uses NewBatch or Restore.
type Volume struct {
	e       *Engine
	id      trivet.VolumeID
	replica trivet.ReplicaID

	// usable is even while the blocks may be read, odd while a Restore replaces them and after a
	// drop. A reader sees the same even number before and after it pins its view, or turns back.
	usable atomic.Uint64
	size   atomic.Int64 // bytes, as in rec

	// layout is odd while there are layers, and never the same again after they were there: then a read has to look
	// at the record too, at one moment with the blocks.
	layout atomic.Uint64

	// gen is the generation that is written in, as in rec, set before any batch of it begins: who finds it as it was after
	// a look has seen nothing of a newer one, and missed nothing that was swept.
	gen atomic.Uint64

	// applyMu is held over each of the volume's commits, so that none slips behind a drop. It is
	// held while Pebble takes the batch, which may stall on the disk; no reader needs it.
	applyMu sync.Mutex
	flatAt  trivet.LBA // under applyMu: where flattening the lowest layer goes on

	mu      sync.Mutex
	rec     record
	applier bool // a Batch is open or a Restore runs
	dropped bool
	touched []extent // buffer of the one Batch
	changes []change // and another
	views   []*View  // that are open
	watcher func(*BlockError)
	debt    sweepDebt
}

func newVolume(e *Engine, id trivet.VolumeID, r record) *Volume {
	v := &Volume{e: e, id: id, replica: r.replica, rec: r}
	v.size.Store(r.state.SizeBytes)
	v.gen.Store(uint64(r.state.Generation))
	if r.restoring {
		v.usable.Store(1)
	}
	if r.sweep {
		v.debt.owesAll()
	}
	if len(r.layers) > 0 {
		v.layout.Store(1)
	}
	return v
}

// ID of the volume.
func (v *Volume) ID() trivet.VolumeID { return v.id }

// Replica for which the volume was created.
func (v *Volume) Replica() trivet.ReplicaID { return v.replica }

// Restoring reports that a Restore runs or was interrupted: the content is unusable until a Restore
// completes (H5). Reads, batches, digests and images return ErrUnavailable.
func (v *Volume) Restoring() bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.rec.restoring
}

// State as of the last committed batch. While Restoring, nothing counts as applied: index, term,
// session and configuration are zero. The slices are the caller's.
func (v *Volume) State() State {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.rec.visible()
}

// visible is the state to show.
func (r *record) visible() State {
	s := r.state.clone()
	if r.restoring {
		s.AppliedIndex, s.AppliedTerm, s.Session, s.Config = 0, 0, nil, nil
	}
	return s
}

// DurableState reads back the state that a crash at this moment would leave (H1). The log may be cut
// up to its AppliedIndex, no further. ErrNotFound: the volume is dropped.
func (v *Volume) DurableState() (State, error) {
	if err := v.e.enterWrite(); err != nil {
		return State{}, fmt.Errorf("durable state of %s: %w", v.id, err)
	}
	defer v.e.exit()
	r, err := readRecord(v.e.db, &pebble.IterOptions{OnlyReadGuaranteedDurable: true}, v.id)
	if err != nil {
		return State{}, fmt.Errorf("durable state of %s: %w", v.id, err)
	}
	return r.visible(), nil
}

// UsedBytes estimates the bytes that the volume takes on the disk: its blocks in the log, all generations, and from the
// tables' indexes what it has in the store. Of the latter, recent writes count once flushed, garbage until it is
// compacted away.
func (v *Volume) UsedBytes() (int64, error) {
	if err := v.e.enter(); err != nil {
		return 0, fmt.Errorf("used bytes of %s: %w", v.id, err)
	}
	defer v.e.exit()
	n, err := v.usedBytes()
	if err != nil {
		return 0, fmt.Errorf("used bytes of %s: %w", v.id, err)
	}
	return n, nil
}

func (v *Volume) usedBytes() (int64, error) {
	n, err := v.e.db.EstimateDiskUsage(volumeBlocks(v.id))
	return int64(n) + v.e.live.blocks(v.id)*trivet.BlockSize, toErr(err)
}

// becomeApplier claims the volume for a Batch or a Restore.
func (v *Volume) becomeApplier(restore bool) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	switch {
	case v.dropped:
		return trivet.ErrNotFound
	case v.applier:
		return fmt.Errorf("another batch or restore is open: %w", trivet.ErrInUse)
	case v.rec.restoring && !restore:
		return fmt.Errorf("restore is not complete: %w", trivet.ErrUnavailable)
	}
	v.applier = true
	return nil
}

// endApplier gives the volume free, and the buffers of a Batch back.
func (v *Volume) endApplier(touched []extent, changes []change) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.applier = false
	if cap(touched) > 0 && cap(touched) <= touchedRetainedN {
		v.touched = touched
	}
	if cap(changes) > 0 && cap(changes) <= touchedRetainedN {
		v.changes = changes
	}
}

// apply commits a batch of this volume, and sets its record when next is not nil. then, when set, is called once the
// store has the batch, before any other of the volume.
// REQUIRES: entered; the caller is the applier.
func (v *Volume) apply(b *pebble.Batch, next *record, then func()) error {
	v.applyMu.Lock()
	defer v.applyMu.Unlock()
	return v.applyLocked(b, next, then)
}

// applyLocked is apply. REQUIRES: entered; applyMu.
func (v *Volume) applyLocked(b *pebble.Batch, next *record, then func()) error {
	v.mu.Lock()
	dropped := v.dropped
	v.mu.Unlock()
	if dropped {
		return trivet.ErrNotFound
	}
	if next != nil {
		if err := setRecord(b, v.id, next); err != nil {
			return err
		}
	}
	if err := v.e.apply(b); err != nil {
		return err
	}
	if then != nil {
		then()
	}
	if next != nil {
		v.setRecord(next)
	}
	return nil
}

// setRecord takes over next, but none of its memory.
func (v *Volume) setRecord(next *record) {
	v.mu.Lock()
	defer v.mu.Unlock()
	old := v.rec.state
	v.rec = *next
	v.rec.state.Session = takeOver(old.Session, next.state.Session)
	v.rec.state.Config = takeOver(old.Config, next.state.Config)
	v.rec.state.Snapshots = takeOver(old.Snapshots, next.state.Snapshots)
	v.size.Store(v.rec.state.SizeBytes)
	v.gen.Store(uint64(v.rec.state.Generation))
}

// takeOver copies next into the memory of old, unless it is there: the background changes a record but for its state,
// which a batch may be reading.
func takeOver[T any](old, next []T) []T {
	if len(old) > 0 && len(old) == len(next) && &old[0] == &next[0] {
		return old
	}
	return append(old[:0], next...)
}

func (v *Volume) markDropped() {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.dropped = true
	v.usable.Store(v.usable.Load() | 1)
}
