package engine

import (
	"errors"
	"fmt"
	"io"

	"github.com/cockroachdb/pebble/v2"

	"github.com/trivet-csi/trivet"
)

// restoreBatchBytes bounds one batch of a Restore, and with it memory.
const restoreBatchBytes = 1 << 20

// Restore replaces blocks and State by an image, of this volume or of another; ID and Replica stay. r
// must end with the image. It is durable when Restore returns.
//
// First the mark that a restore is under way goes to disk, then the content is replaced batch by batch,
// and the last batch, with the State, takes the mark off. After a crash or an error in between the
// volume is Restoring until a Restore completes; nothing of the old content comes back (H5).
//
// ErrCorrupt: the stream is damaged, cut off or followed by something. ErrInvalid: the image is older
// than the volume, by applied index or epoch, or of a newer format; ErrNoSpace: it does not fit;
// ErrInUse: a batch is open. These three change nothing.
func (v *Volume) Restore(r io.Reader) error {
	if err := v.restore(r); err != nil {
		return fmt.Errorf("restore %s: %w", v.id, err)
	}
	return nil
}

func (v *Volume) restore(r io.Reader) error {
	if err := v.becomeApplier(true); err != nil {
		return err
	}
	defer v.endApplier()
	ir, err := newImageReader(r)
	if err != nil {
		return err
	}
	if err := v.mayRestore(ir); err != nil {
		return err
	}
	if err := v.beginRestore(); err != nil {
		return err
	}
	b := v.e.newBatch()
	defer func() { _ = b.Close() }() // memory only
	lower, upper := volumeBlocks(v.id)
	if err := b.DeleteRange(lower, upper, nil); err != nil {
		return err
	}
	for {
		bk, data, err := ir.next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
		if err := v.restoreBlock(b, bk, data); err != nil {
			return err
		}
		if b.Len() < restoreBatchBytes {
			continue
		}
		if err := v.step(b, nil); err != nil {
			return err
		}
		if err := b.Close(); err != nil {
			return err
		}
		b = v.e.newBatch()
	}
	return v.finishRestore(b, &record{replica: v.replica, state: ir.record.state})
}

// mayRestore refuses an image before anything is touched.
func (v *Volume) mayRestore(ir *imageReader) error {
	v.mu.Lock()
	old, next := v.rec.state, ir.record.state
	v.mu.Unlock()
	if next.AppliedIndex < old.AppliedIndex || next.Epoch < old.Epoch {
		return fmt.Errorf("image at index %d, epoch %d is older than the volume at %d, %d: %w", next.AppliedIndex,
			next.Epoch, old.AppliedIndex, old.Epoch, trivet.ErrInvalid)
	}
	if err := v.e.enterWrite(); err != nil {
		return err
	}
	defer v.e.exit()
	used, err := v.usedBytes() // comes back once the old content is dropped
	if err != nil {
		return err
	}
	if need := ir.header.size() - used; need > 0 && !v.e.space.hasRoom(need) {
		return fmt.Errorf("image of %d bytes, %d in use by the old content: %w", ir.header.size(), used,
			trivet.ErrNoSpace)
	}
	return nil
}

// beginRestore makes the mark durable. From here on the blocks are unusable.
func (v *Volume) beginRestore() error {
	if err := v.e.enterWrite(); err != nil {
		return err
	}
	defer v.e.exit()
	v.mu.Lock()
	next := record{replica: v.replica, restoring: true, state: v.rec.state.clone()}
	v.usable.Store(v.usable.Load() | 1)
	v.mu.Unlock()
	b := v.e.newBatch()
	defer func() { _ = b.Close() }() // memory only
	if err := v.apply(b, &next); err != nil {
		return err
	}
	return v.e.flush()
}

// restoreBlock adds a block of the image to a batch. The checksum names volume and place, so it is made
// anew for this volume; imageReader has just verified the data under the old one.
func (v *Volume) restoreBlock(b *pebble.Batch, bk blockKey, data []byte) error {
	n := dataValueBytes
	if data == nil {
		n = valueHeadBytes
	}
	op := b.SetDeferred(blockKeyBytes, n)
	appendBlockKey(op.Key[:0], v.id, bk.lba, bk.gen)
	if data == nil {
		putTombstone(op.Value, place(op.Key))
	} else {
		putData(op.Value, data, place(op.Key))
	}
	return op.Finish()
}

// step commits one batch of a restore. The engine may close between two steps, never during one.
func (v *Volume) step(b *pebble.Batch, next *record) error {
	if err := v.e.enterWrite(); err != nil {
		return err
	}
	defer v.e.exit()
	return v.apply(b, next)
}

// finishRestore takes the mark off, with the new state, and makes it durable before anybody reads.
func (v *Volume) finishRestore(b *pebble.Batch, next *record) error {
	if err := v.e.enterWrite(); err != nil {
		return err
	}
	defer v.e.exit()
	if err := setRecord(b, v.id, next); err != nil {
		return err
	}
	if err := v.apply(b, nil); err != nil {
		return err
	}
	if err := v.e.flush(); err != nil {
		return err
	}
	v.setRecord(next)
	v.mu.Lock()
	defer v.mu.Unlock()
	if !v.dropped {
		v.usable.Store(v.usable.Load() + 1)
	}
	return nil
}
