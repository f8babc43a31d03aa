package engine

import (
	"errors"
	"fmt"

	"github.com/cockroachdb/pebble/v2"

	"github.com/trivet-csi/trivet"
)

// CreateVolume makes an empty volume of sizeBytes for a replica; it is durable when it returns. The
// same replica again: nil, whatever the size has become. Another replica: ErrExists; drop that one first.
func (e *Engine) CreateVolume(id trivet.VolumeID, replica trivet.ReplicaID, sizeBytes int64) error {
	if err := e.createVolume(id, replica, sizeBytes, nil); err != nil {
		return fmt.Errorf("create %s for replica %s: %w", id, replica, err)
	}
	return nil
}

func (e *Engine) createVolume(id trivet.VolumeID, replica trivet.ReplicaID, sizeBytes int64, layers []layer) error {
	r := record{replica: replica, state: State{SizeBytes: sizeBytes}, layers: layers}
	if err := r.state.check(); err != nil {
		return err
	}
	if id == trivet.MetaGroup || replica == "" || len(replica) > replicaBytesMax {
		return fmt.Errorf("want a volume and a replica ID of 1 to %d bytes: %w", replicaBytesMax, trivet.ErrInvalid)
	}
	if err := e.enterWrite(); err != nil {
		return err
	}
	defer e.exit()
	e.mu.Lock()
	defer e.mu.Unlock()
	switch old, err := readRecord(e.db, nil, id); {
	case errors.Is(err, trivet.ErrNotFound):
	case err != nil:
		return err
	case old.replica != replica:
		return fmt.Errorf("held by replica %s: %w", old.replica, trivet.ErrExists)
	default:
		return e.flush() // an earlier call may have failed before its flush
	}
	if err := e.createLocked(id, &r); err != nil {
		return err
	}
	return e.flush()
}

// createLocked is createVolume of what is not there, but for the flush. REQUIRES: entered; mu.
func (e *Engine) createLocked(id trivet.VolumeID, r *record) error {
	for _, l := range r.layers {
		unlock, err := e.lockBase(id, l.base)
		if err != nil {
			return err
		}
		defer unlock() // what deletes the snapshot from then on finds it in use, and is on disk no earlier than this
	}
	b := e.db.NewBatch()
	defer func() { _ = b.Close() }() // memory only
	// Nothing should be there. If anything is, it is another volume's past, not this one's content.
	if err := deleteContent(b, id); err != nil {
		return err
	}
	if err := setRecord(b, id, r); err != nil {
		return err
	}
	if err := e.apply(b); err != nil {
		return err
	}
	e.live.create(id)
	e.bases.add(id, r.layers, 1)
	if len(r.layers) > 0 {
		e.sweeper.owed(id)
	}
	return nil
}

// OpenVolume returns the handle of a volume, one and the same for all callers. ErrNotFound: never
// created, or dropped. ErrCorrupt: its record is damaged. It need not be closed.
func (e *Engine) OpenVolume(id trivet.VolumeID) (*Volume, error) {
	if err := e.enter(); err != nil {
		return nil, fmt.Errorf("open %s: %w", id, err)
	}
	defer e.exit()
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.openVolumeLocked(id)
}

// openVolumeLocked is OpenVolume. REQUIRES: entered; mu.
func (e *Engine) openVolumeLocked(id trivet.VolumeID) (*Volume, error) {
	if v := e.open[id]; v != nil {
		return v, nil
	}
	r, err := readRecord(e.db, nil, id)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", id, err)
	}
	v := newVolume(e, id, r)
	e.open[id] = v
	return v, nil
}

// DropVolume removes a volume with all its blocks, durably. Its handle returns ErrNotFound from then
// on; images taken before go on. A volume that is not there is dropped already: nil. Space comes back
// in the background. ErrInUse: a clone on this disk still needs it; Flatten that, or wait until it is.
func (e *Engine) DropVolume(id trivet.VolumeID) error {
	if err := e.enterWrite(); err != nil {
		return fmt.Errorf("drop %s: %w", id, err)
	}
	defer e.exit()
	e.mu.Lock()
	defer e.mu.Unlock()
	if err := e.dropLocked(id); err != nil {
		return fmt.Errorf("drop %s: %w", id, err)
	}
	return nil
}

func (e *Engine) dropLocked(id trivet.VolumeID) error {
	if gens := e.bases.of(nil, id); len(gens) > 0 {
		return fmt.Errorf("clones need its generations %v: %w", gens, trivet.ErrInUse)
	}
	// A record that cannot be read says nothing of what lies beneath: that stays until the engine is opened again.
	r, err := readRecord(e.db, nil, id)
	if err != nil && !errIsGone(err) && !errors.Is(err, trivet.ErrInvalid) {
		return err
	}
	b := e.db.NewBatch()
	defer func() { _ = b.Close() }() // memory only
	if err := deleteContent(b, id); err != nil {
		return err
	}
	if err := b.Delete(appendVolumeKey(nil, id), nil); err != nil {
		return err
	}
	if v := e.open[id]; v != nil {
		// No batch of this volume may follow, or it would bring the volume back.
		v.applyMu.Lock()
		defer v.applyMu.Unlock()
		v.markDropped()
		delete(e.open, id)
	}
	gone := e.references(id)
	if err := e.apply(b); err != nil {
		return err
	}
	if e.live != nil {
		e.live.drop(id, gone)
	}
	e.release(id, r.layers)
	return e.flush()
}

// Volumes lists the volumes that the disk has, in the order of their IDs. ErrCorrupt when the list
// itself is damaged; a damaged record is listed like any other.
func (e *Engine) Volumes() ([]trivet.VolumeID, error) {
	if err := e.enter(); err != nil {
		return nil, fmt.Errorf("list volumes: %w", err)
	}
	defer e.exit()
	ids, err := e.volumes()
	if err != nil {
		return nil, fmt.Errorf("list volumes: %w", err)
	}
	return ids, nil
}

func (e *Engine) volumes() (ids []trivet.VolumeID, err error) {
	it, err := e.db.NewIter(&pebble.IterOptions{LowerBound: []byte{tableVolume}, UpperBound: []byte{tableBlock}})
	if err != nil {
		return nil, toErr(err)
	}
	defer func() { err = closeIter(it, err) }()
	for ok := it.First(); ok; ok = it.Next() {
		id, err := decodeVolumeKey(it.Key())
		if err != nil {
			return nil, err
		}
		ids = append(ids, id)
	}
	return ids, nil
}

// deleteContent adds the removal of all blocks of a volume, and of its journal, to a batch.
func deleteContent(b *pebble.Batch, id trivet.VolumeID) error {
	for _, bounds := range []func(trivet.VolumeID) (lower, upper []byte){volumeBlocks, volumeJournal} {
		lower, upper := bounds(id)
		if err := b.DeleteRange(lower, upper, nil); err != nil {
			return err
		}
	}
	return nil
}

// setRecord adds the record of a volume to a batch.
func setRecord(b *pebble.Batch, id trivet.VolumeID, r *record) error {
	op := b.SetDeferred(volumeKeyBytes, r.encodedBytes())
	appendVolumeKey(op.Key[:0], id)
	appendRecord(op.Value[:0], id, r)
	return op.Finish()
}

// iterable is a pebble.DB or a pebble.Snapshot.
type iterable interface {
	NewIter(o *pebble.IterOptions) (*pebble.Iterator, error)
}

// readRecord reads the record of a volume; opts adds to the bounds, may be nil. ErrNotFound, ErrCorrupt.
func readRecord(src iterable, opts *pebble.IterOptions, id trivet.VolumeID) (r record, err error) {
	var o pebble.IterOptions
	if opts != nil {
		o = *opts
	}
	key := appendVolumeKey(nil, id)
	o.LowerBound, o.UpperBound = key, append(appendVolumeKey(nil, id), 0)
	it, err := src.NewIter(&o)
	if err != nil {
		return record{}, toErr(err)
	}
	defer func() { err = closeIter(it, err) }()
	if !it.First() {
		if err := it.Error(); err != nil {
			return record{}, toErr(err)
		}
		return record{}, trivet.ErrNotFound
	}
	v, err := it.ValueAndErr()
	if err != nil {
		return record{}, toErr(err)
	}
	return decodeRecord(id, v)
}
