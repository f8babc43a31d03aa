package engine

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/cockroachdb/pebble/v2"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/engine/segment"
)

// Restore brings blocks and State to those of an image: one made for what Want tells, or of everything, of this
// volume or of another; ID and Replica stay. r must end with the image. It is durable when Restore
// returns.
//
// First the mark that a restore is under way goes to disk, then blocks are replaced batch by batch. Whenever
// the image has a digest, which is each 32 MiB, what was replaced is made durable, read back and compared, and
// only then claimed by Want. The last batch, with the State, takes the mark off. After a crash or an error in
// between, the volume is Restoring until a Restore completes: with the same image or with one of any source
// that is not behind, made for the Want of then. Nothing of the old content comes back, and nothing
// that was replaced counts as it was (H5). The change journal begins anew at the restored index.
//
// ErrCorrupt: the stream is damaged, cut off or followed by something, or the volume does not hold what was
// written to it; the latter is transferred again by the next Restore. ErrNoSpace: it does not fit.
// ErrInvalid: the image builds on what the volume does not have, is older than it, by applied index or epoch, or,
// unless it is of everything, than what an interrupted Restore was moving to, or is of another format; ErrInUse: a
// batch is open.
// These two change nothing; so does ErrInUse because a clone on this disk needs the volume's generations.
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
	defer v.endApplier(nil, nil)
	ir, err := newImageReader(r)
	if err != nil {
		return err
	}
	if err := v.mayRestore(&ir.begin); err != nil {
		return err
	}
	if ir.begin.base.ceiling() > 0 { // what does not come must be here in a form that needs no layers
		if err := v.Flatten(context.Background()); err != nil { //nolint:forbidigo // it is short, and needs no data
			return err
		}
	}
	if err := v.beginRestore(&ir.begin); err != nil {
		return err
	}
	x := &restorer{v: v, begin: &ir.begin, received: newVersionHash()}
	if err := x.run(ir); err != nil {
		return errors.Join(err, x.settle())
	}
	return v.finishRestore(&ir.begin)
}

// mayRestore refuses an image before anything is touched.
func (v *Volume) mayRestore(b *imageBegin) error {
	v.mu.Lock()
	old, have, restoring := v.rec.state, v.rec.covers(), v.rec.restoring
	v.mu.Unlock()
	next := &b.record.state
	if b.startsOver(restoring) {
		// It replaces all that an interrupted Restore had brought, so it need not be as new as that. Without this two
		// of three replicas could wait for the third for ever: one half restored, the other a little behind.
	} else if next.AppliedIndex < old.AppliedIndex || next.Epoch < old.Epoch {
		return fmt.Errorf("image at index %d, epoch %d is older than the volume at %d, %d: %w", next.AppliedIndex,
			next.Epoch, old.AppliedIndex, old.Epoch, trivet.ErrInvalid)
	}
	if !have.covers(b.base) || b.base.ceiling() > 0 && b.volume != v.id {
		return fmt.Errorf("image of %s builds on %v, the volume has %v: %w", b.volume, b.base, have, trivet.ErrInvalid)
	}
	if err := v.e.enterWrite(); err != nil {
		return err
	}
	defer v.e.exit()
	need := int64(b.estimateBytes)
	if b.base.ceiling() == 0 {
		used, err := v.usedBytes() // comes back as the old content is replaced, and cleaned
		if err != nil {
			return err
		}
		need -= used
	}
	if need > 0 && !v.e.space.hasRoom(need) {
		return fmt.Errorf("image needs about %d bytes more: %w", need, trivet.ErrNoSpace)
	}
	return nil
}

// beginRestore makes the mark durable, with what the image moves to as the floor for any later one. From here
// on the blocks are unusable, though none has changed: what was claimed before still holds.
func (v *Volume) beginRestore(img *imageBegin) error {
	if err := v.e.enterWrite(); err != nil {
		return err
	}
	defer v.e.exit()
	v.applyMu.Lock()
	defer v.applyMu.Unlock()
	if gens := v.e.bases.of(nil, v.id); len(gens) > 0 {
		return fmt.Errorf("clones need its generations %v as they are: %w", gens, trivet.ErrInUse)
	}
	v.mu.Lock()
	layers := v.rec.layers
	next := record{replica: v.replica, restoring: true, state: v.rec.state.clone(), have: v.rec.covers()}
	v.usable.Store(v.usable.Load() | 1)
	if img.startsOver(v.rec.restoring) && img.record.state.AppliedIndex < next.state.AppliedIndex {
		next.have = wholly(0) // what is claimed may be newer than the image
	}
	if len(layers) > 0 { // the image replaces everything
		next.have = wholly(0)
	}
	v.mu.Unlock()
	next.state.AppliedIndex, next.state.Epoch = img.record.state.AppliedIndex, img.record.state.Epoch
	b := v.e.newBatch()
	defer func() { _ = b.Close() }() // memory only
	var err error
	if next.journal, err = v.journalAnew(b, next.state.AppliedIndex); err != nil {
		return err
	}
	if err := v.applyLocked(b, &next, func() { v.e.live.forgetPages(v.id) }); err != nil {
		return err
	}
	if len(layers) > 0 {
		v.layout.Add(1)
		v.flatAt = 0
		v.e.release(v.id, layers)
	}
	return v.e.flush()
}

// finishRestore takes the mark off, with the new state, and makes it durable before anybody reads.
func (v *Volume) finishRestore(img *imageBegin) error {
	if err := v.e.enterWrite(); err != nil {
		return err
	}
	defer v.e.exit()
	next := &record{replica: v.replica, state: img.record.state}
	next.journal.floor = next.state.AppliedIndex
	next.sweep = next.state.Generation > 0 // what did not come again may have versions of snapshots that are gone since
	b := v.e.newBatch()
	defer func() { _ = b.Close() }() // memory only
	if err := setRecord(b, v.id, next); err != nil {
		return err
	}
	if err := v.apply(b, nil, nil); err != nil {
		return err
	}
	if err := v.e.flush(); err != nil {
		return err
	}
	if err := v.e.countPages(v.id, next.state.Generation); err != nil {
		return err
	}
	v.setRecord(next)
	v.mu.Lock()
	if !v.dropped {
		v.usable.Store(v.usable.Load() + 1)
	}
	v.mu.Unlock()
	v.owe(next.sweep, nil)
	return nil
}

// restorer is a Restore after the mark. It works through the image in ranges, each up to a digest.
type restorer struct {
	v     *Volume
	begin *imageBegin

	claimed  trivet.LBA   // below it everything is verified, durable but for the record, and claimed
	written  trivet.LBA   // below it everything is in the store
	extents  []extent     // the blocks that the image has had items of since claimed
	received *versionHash // of their versions, as received
	payload  []byte       // scratch of putAll
	gone     []ref        // that the part under way takes away, and adds
	come     []ref
	inside   trivet.LBA // one past the last block that has had an item
}

// run works through all parts.
func (x *restorer) run(ir *imageReader) error {
	for {
		p, err := ir.next()
		switch {
		case errors.Is(err, io.EOF):
			return nil // complete: nothing is left unclaimed, see imageReader
		case err != nil:
			return err
		case p.kind == partDigest:
			err = x.verify(p.to, p.digest)
		default:
			err = x.write(&p)
		}
		if err != nil {
			return err
		}
	}
}

// write puts one part of blocks into the store. The engine may close between two, never during one.
func (x *restorer) write(p *imagePart) error {
	e := x.v.e
	if err := e.enterWrite(); err != nil {
		return err
	}
	defer e.exit()
	b := e.newBatch()
	defer func() { _ = b.Close() }() // memory only
	if err := x.deleteOld(b, p.items); err != nil {
		return err
	}
	if !e.space.hasRoom(int64(b.Len()) + int64(len(p.items))*dataValueBytes) {
		return fmt.Errorf("part of an image up to block %d: %w", p.to, trivet.ErrNoSpace)
	}
	claims, err := x.putAll(b, p.items)
	if e.live != nil {
		defer func() { e.live.unclaim(claims) }()
	}
	if err != nil {
		return err
	}
	err = x.v.apply(b, nil, func() {
		if e.live != nil {
			e.live.move(x.v.id, x.gone, x.come)
		}
	})
	if err != nil {
		return err
	}
	for i := range p.items {
		it := &p.items[i]
		x.note(extent{it.lba, it.blockN})
		if it.kind != itemAbsent {
			x.received.add(blockKey{lba: it.lba, gen: it.gen}, it.kind == kindTombstone, it.sum)
		}
	}
	x.written = p.to
	return nil
}

// note adds blocks that have had an item.
func (x *restorer) note(n extent) {
	x.inside = max(x.inside, n.end())
	if k := len(x.extents); k > 0 && n.lba <= x.extents[k-1].end() {
		x.extents[k-1].n = int64(max(x.extents[k-1].end(), n.end()) - x.extents[k-1].lba)
		return
	}
	x.extents = append(x.extents, n)
}

// deleteOld removes all versions of the blocks that items stand for, but for a block that the part before began.
func (x *restorer) deleteOld(b *pebble.Batch, items []imageItem) (err error) {
	x.gone = x.gone[:0] // before: what a part without items leaves here would be counted off twice
	if len(items) == 0 {
		return nil
	}
	last := items[len(items)-1]
	it, err := x.v.e.db.NewIter(&pebble.IterOptions{
		LowerBound: appendBlockPrefix(nil, x.v.id, items[0].lba),
		UpperBound: appendBlockPrefix(nil, x.v.id, last.lba+trivet.LBA(last.blockN)),
	})
	if err != nil {
		return toErr(err)
	}
	defer func() { err = closeIter(it, err) }()
	run := extent{lba: x.inside}
	for i := range items {
		next := extent{items[i].lba, items[i].blockN}
		switch {
		case next.end() <= run.end(): // another version, or of the part before
		case next.lba <= run.end():
			run.n = int64(next.end() - run.lba)
		default:
			if err := x.deleteRun(b, it, run); err != nil {
				return err
			}
			run = next
		}
	}
	return x.deleteRun(b, it, run)
}

// deleteRun removes all versions of a run of blocks. One range tombstone stands for many points, and none
// for none (deleteRangeFromN). What stood in the log is noted in any case.
func (x *restorer) deleteRun(b *pebble.Batch, it *pebble.Iterator, run extent) error {
	if run.n == 0 {
		return nil
	}
	start, end := appendBlockPrefix(nil, x.v.id, run.lba), appendBlockPrefix(nil, x.v.id, run.end())
	ok := it.SeekGE(start) && bytes.Compare(it.Key(), end) < 0
	whole := ok && run.n >= deleteRangeFromN
	if whole {
		x.v.e.flushSoon()
		if err := b.DeleteRange(start, end, nil); err != nil || x.v.e.live == nil {
			return err
		}
	}
	for ; ok; ok = it.Next() && bytes.Compare(it.Key(), end) < 0 {
		if err := x.noteGone(it); err != nil {
			return err
		}
		if whole {
			continue
		}
		if err := b.Delete(it.Key(), nil); err != nil {
			return err
		}
	}
	err := toErr(it.Error())
	if whole && errors.Is(err, trivet.ErrCorrupt) { // it is replaced; only what it referred to is not known
		x.v.e.live.keepAll()
		return nil
	}
	return err
}

// noteGone notes where the block under the iterator stands, which goes. Damage does not keep it from being replaced.
func (x *restorer) noteGone(it *pebble.Iterator) error {
	if x.v.e.live == nil {
		return nil
	}
	at, err := referredAt(it)
	switch {
	case errors.Is(err, trivet.ErrCorrupt):
		x.v.e.live.keepAll()
		return nil
	case err == nil && at != (ref{}):
		x.gone = append(x.gone, at)
	}
	return err
}

// putAll adds the versions of a part to a batch, their data to data segments of the log where there are such.
func (x *restorer) putAll(b *pebble.Batch, items []imageItem) (claims []*segLive, err error) {
	e := x.v.e
	x.come = x.come[:0]
	inLog := e.live != nil && e.log.HasDataLane()
	var infos []segment.BlockInfo
	payload := x.payload[:0] // nobody keeps it once it is stored
	var data []*imageItem
	for i := range items {
		it := &items[i]
		if !inLog || it.kind != kindData {
			if err := x.put(b, it); err != nil {
				return nil, err
			}
			continue
		}
		infos = append(infos, segment.BlockInfo{LBA: it.lba, CRC: BlockSum(x.v.id, it.lba, it.data)})
		payload = append(payload, it.data...)
		data = append(data, it)
	}
	x.payload = payload
	err = e.storeBlocks(x.v.id, infos, payload, func(first int, at segment.Place) error {
		s, err := e.live.claim(at.Segment)
		if err != nil {
			return err
		}
		claims = append(claims, s)
		for i := range int(at.Bytes / trivet.BlockSize) {
			it, r := data[first+i], refAt(at, 0).then(i)
			op := b.SetDeferred(blockKeyBytes, refValueBytes)
			appendBlockKey(op.Key[:0], x.v.id, it.lba, it.gen)
			putRef(op.Value, infos[first+i].CRC, r)
			x.come = append(x.come, r)
			if err := op.Finish(); err != nil {
				return err
			}
		}
		return nil
	})
	return claims, err
}

// put adds a version to a batch. The checksum names volume and place, so it is made anew for this
// volume; imageReader has just verified the data under the old one.
func (x *restorer) put(b *pebble.Batch, it *imageItem) error {
	switch it.kind {
	case kindData:
		op := b.SetDeferred(blockKeyBytes, dataValueBytes)
		appendBlockKey(op.Key[:0], x.v.id, it.lba, it.gen)
		putData(op.Value, it.data, place(op.Key))
		return op.Finish()
	case kindTombstone:
		op := b.SetDeferred(blockKeyBytes, valueHeadBytes)
		appendBlockKey(op.Key[:0], x.v.id, it.lba, it.gen)
		putTombstone(op.Value, place(op.Key))
		return op.Finish()
	}
	return nil
}
