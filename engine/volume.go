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

	// applyMu is held over each of the volume's commits, so that none slips behind a drop. It is
	// held while Pebble takes the batch, which may stall on the disk; no reader needs it.
	applyMu sync.Mutex

	mu      sync.Mutex
	rec     record
	applier bool // a Batch is open or a Restore runs
	dropped bool
	touched []extent // buffer of the one Batch
}

func newVolume(e *Engine, id trivet.VolumeID, r record) *Volume {
	v := &Volume{e: e, id: id, replica: r.replica, rec: r}
	v.size.Store(r.state.SizeBytes)
	if r.restoring {
		v.usable.Store(1)
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

// UsedBytes estimates the bytes that the volume takes on the disk, from the tables' indexes. Recent
// writes count once flushed, garbage until it is compacted away.
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
	return int64(n), toErr(err)
}

// readScratch are the buffers of one read.
type readScratch struct {
	opts         pebble.IterOptions
	lower, upper [blockKeyBytes]byte
}

var readPool = sync.Pool{New: func() any { return new(readScratch) }} //nolint:gochecknoglobals // buffers

// ReadAt fills p, whole blocks, from block lba on. ErrInvalid: p is no whole blocks. ErrOutOfRange:
// beyond the size. ErrCorrupt, as a *BlockError unless Pebble met the damage first: p must not be used.
// ErrUnavailable: Restoring. ErrNotFound: dropped.
func (v *Volume) ReadAt(p []byte, lba trivet.LBA) error {
	if err := v.readAt(p, lba); err != nil {
		v.e.health.corruptBlock(err)
		return fmt.Errorf("read %d blocks at %d of %s: %w", len(p)/trivet.BlockSize, lba, v.id, err)
	}
	return nil
}

func (v *Volume) readAt(p []byte, lba trivet.LBA) error {
	if lba >= lbaMax {
		return trivet.ErrOutOfRange
	}
	if err := trivet.CheckRange(int64(lba)*trivet.BlockSize, int64(len(p)), v.size.Load()); err != nil {
		return err
	}
	if len(p) == 0 {
		return nil
	}
	if err := v.e.enter(); err != nil {
		return err
	}
	defer v.e.exit()
	sc := readPool.Get().(*readScratch) //nolint:forcetypeassert // the pool holds nothing else
	defer readPool.Put(sc)
	n := trivet.LBA(len(p) / trivet.BlockSize)
	sc.opts = pebble.IterOptions{
		LowerBound:   appendBlockPrefix(sc.lower[:0], v.id, lba),
		UpperBound:   appendBlockPrefix(sc.upper[:0], v.id, lba+n),
		UseL6Filters: n == 1,
	}
	it, err := v.view(v.e.db, &sc.opts)
	if err != nil {
		return err
	}
	if n == 1 {
		it.SeekPrefixGE(sc.opts.LowerBound) // by the bloom filters
	} else {
		it.First()
	}
	return closeIter(it, fill(p, it, lba))
}

// closeIter closes an iterator after err. Close repeats the iterator's own error, so err goes first.
func closeIter(it *pebble.Iterator, err error) error {
	if cerr := it.Close(); err == nil {
		err = toErr(cerr)
	}
	return err
}

// view opens an iterator over the volume's blocks as of one moment at which they were whole.
func (v *Volume) view(src iterable, opts *pebble.IterOptions) (*pebble.Iterator, error) {
	before := v.usable.Load()
	it, err := src.NewIter(opts)
	if err != nil {
		return nil, toErr(err)
	}
	if before%2 != 0 || v.usable.Load() != before {
		return nil, closeIter(it, v.whyUnusable())
	}
	return it, nil
}

func (v *Volume) whyUnusable() error {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.dropped {
		return trivet.ErrNotFound
	}
	return fmt.Errorf("restore is not complete: %w", trivet.ErrUnavailable)
}

// fill copies the newest version of each block into p, zeroes where there is none. The iterator stands
// at the first key at or after block lba and is bounded by the end of p.
func fill(p []byte, it *pebble.Iterator, lba trivet.LBA) error {
	rest := p // not filled yet; its first block is lba
	for ok := it.Valid(); ok; ok = it.Next() {
		bk, err := decodeBlockKey(it.Key())
		if err != nil {
			return err
		}
		if bk.lba < lba {
			continue // an older generation of the block before
		}
		data, _, err := blockAt(it, bk)
		if err != nil {
			return err
		}
		gap := int(bk.lba-lba) * trivet.BlockSize
		clear(rest[:gap])
		rest = rest[gap:]
		if data == nil {
			clear(rest[:trivet.BlockSize])
		} else {
			copy(rest, data)
		}
		rest, lba = rest[trivet.BlockSize:], bk.lba+1
		if len(rest) == 0 {
			return nil
		}
	}
	clear(rest)
	return toErr(it.Error())
}

// blockAt verifies the block under the iterator, whose key is bk. data is valid until the iterator
// moves, and nil for a tombstone.
func blockAt(it *pebble.Iterator, bk blockKey) (data []byte, sum uint32, err error) {
	val, err := it.ValueAndErr()
	if err != nil {
		return nil, 0, toErr(err)
	}
	return decodeValue(val, it.Key(), bk)
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

// endApplier gives the volume free, and the buffer of a Batch back.
func (v *Volume) endApplier(touched []extent) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.applier = false
	if cap(touched) > 0 && cap(touched) <= touchedRetainedN {
		v.touched = touched
	}
}

// apply commits a batch of this volume, and sets its record when next is not nil.
// REQUIRES: entered; the caller is the applier.
func (v *Volume) apply(b *pebble.Batch, next *record) error {
	v.applyMu.Lock()
	defer v.applyMu.Unlock()
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
	if next != nil {
		v.setRecord(next)
	}
	return nil
}

// setRecord takes over next, but none of its memory.
func (v *Volume) setRecord(next *record) {
	v.mu.Lock()
	defer v.mu.Unlock()
	session, config := v.rec.state.Session[:0], v.rec.state.Config[:0]
	if next != &v.rec {
		v.rec = *next
		//nolint:gocritic // the buffers of the old state are used again
		v.rec.state.Session = append(session, next.state.Session...)
		//nolint:gocritic // as above
		v.rec.state.Config = append(config, next.state.Config...)
	}
	v.size.Store(v.rec.state.SizeBytes)
}

func (v *Volume) markDropped() {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.dropped = true
	v.usable.Store(v.usable.Load() | 1)
}
