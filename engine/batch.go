package engine

import (
	"errors"
	"fmt"
	"slices"

	"github.com/cockroachdb/pebble/v2"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/engine/segment"
)

const (
	batchBytesMax = 256 << 20 // see Config.BatchBytesMax

	batchBytesInitial  = 64 << 10
	batchBytesRetained = 4 << 20 // larger buffers are not kept for the next batch

	// deleteRangeFromN is the number of blocks from which one range tombstone replaces point
	// tombstones. Pebble sorts all range tombstones of the memtable anew after each, so a trim of
	// many small extents is cheaper in points.
	deleteRangeFromN = 64
)

// Batch gathers the effects of applied log entries on the blocks of a volume; later effects win. It
// belongs to one goroutine. Nothing of it is visible before Commit. Blocks go to the generation of the
// volume's State when the batch began, so a commit that raises the generation ends what precedes it.
type Batch struct {
	v   *Volume
	b   *pebble.Batch // nil once committed or closed
	gen trivet.Generation
	end trivet.LBA // one past the highest block touched
	err error      // why NewBatch gave no real batch

	touched []extent // all of it, for the journal; the buffer is the volume's
	written []extent // only while older generations may exist: what Zero cannot find in the store yet

	changes []change    // for live, in order; the buffer is the volume's
	claims  []*segLive  // segments that the batch refers to
	claimed [2]*segLive // the memory of claims, while they are few
	refN    int64       // blocks that it does

	older bool               // something else than this generation may show through
	back  *trivet.Generation // of Rollback
}

// NewBatch starts a batch. One may be open at a time: while another batch is, or a Restore runs, all
// calls on the new one return ErrInUse; while Restoring, ErrUnavailable; after a drop, ErrNotFound.
// It must be committed or closed.
func (v *Volume) NewBatch() *Batch {
	if err := v.becomeApplier(false); err != nil {
		return &Batch{v: v, err: err}
	}
	v.mu.Lock()
	gen, touched, changes := v.rec.state.Generation, v.touched[:0], v.changes[:0]
	older := gen > 0 || len(v.rec.layers) > 0
	v.mu.Unlock()
	b := &Batch{v: v, gen: gen, older: older, b: v.e.newBatch(), touched: touched, changes: changes}
	b.claims = b.claimed[:0]
	return b
}

func (e *Engine) newBatch() *pebble.Batch {
	return e.db.NewBatch(pebble.WithInitialSizeBytes(batchBytesInitial),
		pebble.WithMaxRetainedSizeBytes(batchBytesRetained))
}

// Write puts whole blocks from lba on. p may be reused after the return; its checksums are taken here.
// Blocks of zeroes are stored as Zero would. ErrInvalid: no whole blocks, or the batch grows beyond
// BatchBytesMax. ErrOutOfRange: beyond the largest volume; the volume's size is checked by Commit, because
// an entry of the same batch may have raised it.
func (b *Batch) Write(lba trivet.LBA, p []byte) error {
	if err := b.write(lba, p, nil, ref{}); err != nil {
		return fmt.Errorf("write %d blocks at %d of %s: %w", len(p)/trivet.BlockSize, lba, b.v.id, err)
	}
	return nil
}

// Refer is Write of blocks that stand in Config.Log already, one behind the other from skip bytes into a place on,
// durably: they are not stored again, but referred to. The segment must be pinned until Refer returns; from then on
// the engine pins it for as long as it refers to it. An engine without a log, or a place without bytes, makes it Write.
func (b *Batch) Refer(lba trivet.LBA, p []byte, at segment.Place, skip int64) error {
	if b.err == nil && (b.v.e.live == nil || at.Bytes == 0) {
		return b.Write(lba, p)
	}
	err := b.refer(lba, p, at, skip)
	if err != nil {
		return fmt.Errorf("refer to %d blocks at %d of %s, %d bytes into %v: %w", len(p)/trivet.BlockSize, lba, b.v.id,
			skip, at.Segment, err)
	}
	return nil
}

func (b *Batch) refer(lba trivet.LBA, p []byte, at segment.Place, skip int64) error {
	if b.err != nil {
		return b.err
	}
	if b.b == nil {
		return fmt.Errorf("batch is over: %w", trivet.ErrClosed)
	}
	if skip < 0 || skip%trivet.BlockSize != 0 || at.Off%trivet.BlockSize != 0 || skip+int64(len(p)) > at.Bytes {
		return fmt.Errorf("place of %d bytes at %d: %w", at.Bytes, at.Off, trivet.ErrInvalid)
	}
	s, err := b.claim(at.Segment)
	if err != nil {
		return err
	}
	return b.write(lba, p, s, refAt(at, skip))
}

// claim keeps a segment until the batch is over.
func (b *Batch) claim(id segment.ID) (*segLive, error) {
	for _, s := range b.claims { // few: an entry stands in one segment
		if s.id == id {
			return s, nil
		}
	}
	s, err := b.v.e.live.claim(id)
	if err == nil {
		b.claims = append(b.claims, s)
	}
	return s, err
}

// write puts blocks by value, or, where s is set, by reference to that segment.
func (b *Batch) write(lba trivet.LBA, p []byte, s *segLive, at ref) error {
	if len(p)%trivet.BlockSize != 0 {
		return fmt.Errorf("%d bytes are not whole blocks: %w", len(p), trivet.ErrInvalid)
	}
	n := int64(len(p) / trivet.BlockSize)
	if err := b.touch(lba, n, len(p)); err != nil {
		return err
	}
	for i := int64(0); i < n; {
		zeroN := leadingZeroBlocks(p[i*trivet.BlockSize:])
		if zeroN > 0 {
			if err := b.zero(lba+trivet.LBA(i), zeroN); err != nil {
				return err
			}
			i += zeroN
			continue
		}
		data := p[i*trivet.BlockSize : (i+1)*trivet.BlockSize]
		if err := b.put(lba+trivet.LBA(i), data, s, at.then(int(i))); err != nil {
			return err
		}
		i++
	}
	if b.older {
		b.written = append(b.written, extent{lba, n})
	}
	return nil
}

// put puts one block.
func (b *Batch) put(lba trivet.LBA, data []byte, s *segLive, at ref) error {
	n := dataValueBytes
	if s != nil {
		n = refValueBytes
		b.refN++
	}
	op := b.b.SetDeferred(blockKeyBytes, n)
	appendBlockKey(op.Key[:0], b.v.id, lba, b.gen)
	if s != nil {
		putRef(op.Value, sumAt(data, place(op.Key)), at)
	} else {
		putData(op.Value, data, place(op.Key))
	}
	b.note(extent{lba, 1}, s)
	return op.Finish()
}

// note takes note of a change for live.
func (b *Batch) note(x extent, s *segLive) {
	if b.v.e.live == nil {
		return
	}
	if k := len(b.changes); k > 0 && b.changes[k-1].seg == s && b.changes[k-1].end() == x.lba {
		b.changes[k-1].n += x.n
		return
	}
	b.changes = append(b.changes, change{x, s})
}

// leadingZeroBlocks counts the blocks of zeroes that p begins with.
func leadingZeroBlocks(p []byte) (n int64) {
	for len(p) > 0 && isZero(p[:trivet.BlockSize]) {
		p, n = p[trivet.BlockSize:], n+1
	}
	return n
}

// BatchBytesMax is Config's.
func (e *Engine) BatchBytesMax() int { return e.batchBytes }

// Bytes is how large the batch is; at most BatchBytesMax.
func (b *Batch) Bytes() int {
	if b.b == nil {
		return 0
	}
	return b.b.Len()
}

// Zero makes n blocks from lba on read as zeroes and gives their space back; discard and write-zeroes
// are both this. It costs the same for any n while the volume has had one generation only, and grows
// with the blocks stored in the range later: a batch that may come to hold too many has to be committed in between,
// with the State that it began with. Errors as of Write.
func (b *Batch) Zero(lba trivet.LBA, blockN int64) error {
	err := b.touch(lba, blockN, 0)
	if err == nil && blockN > 0 {
		err = b.zero(lba, blockN)
	}
	if err != nil {
		return fmt.Errorf("zero %d blocks at %d of %s: %w", blockN, lba, b.v.id, err)
	}
	return nil
}

// touch checks a range and takes note of it.
func (b *Batch) touch(lba trivet.LBA, n int64, dataBytes int) error {
	switch {
	case b.err != nil:
		return b.err
	case b.b == nil:
		return fmt.Errorf("batch is over: %w", trivet.ErrClosed)
	case b.back != nil && n+int64(dataBytes) > 0:
		return fmt.Errorf("after a rollback: %w", trivet.ErrInvalid)
	case n < 0:
		return trivet.ErrInvalid
	case lba > lbaMax || n > lbaMax-int64(lba):
		return trivet.ErrOutOfRange
	case b.b.Len()+dataBytes > b.v.e.batchBytes:
		return fmt.Errorf("batch exceeds %d bytes: %w", b.v.e.batchBytes, trivet.ErrInvalid)
	}
	b.end = max(b.end, lba+trivet.LBA(n))
	switch k := len(b.touched); {
	case n == 0:
	case k > 0 && b.touched[k-1].end() == lba:
		b.touched[k-1].n += n
	default:
		b.touched = append(b.touched, extent{lba, n})
	}
	return nil
}

// zero hides or removes n blocks. In the first generation of a volume without layers nothing older can exist, and keys
// are deleted; else a tombstone is needed wherever the store, a volume beneath or this batch has a version of the
// block. Where a batch began, and what was flattened, decides at most whether a tombstone stands where nothing need be
// hidden, which neither reads nor digests see.
func (b *Batch) zero(lba trivet.LBA, n int64) error {
	b.note(extent{lba, n}, nil)
	if b.older {
		return b.zeroOverOlder(lba, n)
	}
	if n >= deleteRangeFromN {
		b.v.e.flushSoon()
		op := b.b.DeleteRangeDeferred(blockPrefixBytes, blockPrefixBytes)
		appendBlockPrefix(op.Key[:0], b.v.id, lba)
		appendBlockPrefix(op.Value[:0], b.v.id, lba+trivet.LBA(n))
		return op.Finish()
	}
	for i := range trivet.LBA(n) {
		op := b.b.DeleteDeferred(blockKeyBytes)
		appendBlockKey(op.Key[:0], b.v.id, lba+i, b.gen)
		if err := op.Finish(); err != nil {
			return err
		}
	}
	return nil
}

func (b *Batch) zeroOverOlder(lba trivet.LBA, n int64) (err error) {
	end := lba + trivet.LBA(n)
	for _, x := range b.written {
		for l := max(x.lba, lba); l < min(x.lba+trivet.LBA(x.n), end); l++ {
			if err := b.putTombstone(l); err != nil {
				return err
			}
		}
	}
	if err := b.v.e.enter(); err != nil {
		return err
	}
	defer b.v.e.exit()
	snap := b.v.e.db.NewSnapshot()
	defer func() { err = errors.Join(err, toErr(snap.Close())) }()
	w, err := b.v.walkAt(snap, lba, end)
	if err != nil {
		return err
	}
	defer func() { err = w.close(err) }()
	for {
		ok, err := w.next()
		if err != nil || !ok {
			return err
		}
		if b.b.Len() > b.v.e.batchBytes {
			return fmt.Errorf("batch exceeds %d bytes: %w", b.v.e.batchBytes, trivet.ErrInvalid)
		}
		if err := b.putTombstone(w.lba); err != nil {
			return err
		}
	}
}

func (b *Batch) putTombstone(lba trivet.LBA) error {
	op := b.b.SetDeferred(blockKeyBytes, valueHeadBytes)
	appendBlockKey(op.Key[:0], b.v.id, lba, b.gen)
	putTombstone(op.Value, place(op.Key))
	return op.Finish()
}

// Commit applies everything, with st, in one atomic step: readers and crashes see all of it or nothing.
// It does not wait for the disk (Flush does), but may wait while earlier batches go there. The batch is
// over, whatever the result; on an error nothing was applied, unless the engine failed. st is copied.
// ErrInvalid: st is malformed, goes back in index, term, epoch, generation or size, or has a snapshot of
// something else than the generation before, a programming error. ErrOutOfRange: a block beyond st.SizeBytes.
func (b *Batch) Commit(st State) error {
	if b.end > trivet.LBA(st.SizeBytes/trivet.BlockSize) {
		err := fmt.Errorf("commit index %d of %s: block %d of a volume of %d bytes: %w", st.AppliedIndex, b.v.id, b.end-1,
			st.SizeBytes, trivet.ErrOutOfRange)
		return errors.Join(err, b.Close())
	}
	return b.CommitPart(st)
}

// CommitPart is Commit for a part of what an entry does, with the state from before the entry: its blocks may lie
// beyond st.SizeBytes, for the entry may make the volume grow. Reads do not show these before the size is committed.
func (b *Batch) CommitPart(st State) error {
	err := b.commit(st)
	if err = errors.Join(err, b.Close()); err != nil {
		return fmt.Errorf("commit index %d of %s: %w", st.AppliedIndex, b.v.id, err)
	}
	return nil
}

func (b *Batch) commit(st State) error {
	if err := b.touch(0, 0, 0); err != nil {
		return err
	}
	if err := st.check(); err != nil {
		return err
	}
	v := b.v
	v.mu.Lock()
	old := v.rec // only the applier changes it
	v.mu.Unlock()
	if err := st.follows(&old.state); err != nil {
		return err
	}
	if b.back != nil && st.Generation <= old.state.Generation {
		return fmt.Errorf("rollback within generation %d: %w", st.Generation, trivet.ErrInvalid)
	}
	if err := v.e.enterWrite(); err != nil {
		return err
	}
	defer v.e.exit()
	j, err := b.journalNext(&old, st.AppliedIndex)
	if err != nil {
		return err
	}
	v.e.space.wrote(b.refN * trivet.BlockSize)
	v.applyMu.Lock()
	defer v.applyMu.Unlock()
	return b.applyLocked(&old, &record{replica: v.replica, state: st, journal: j})
}

// applyLocked applies the batch with the record next, to which it adds what is of this replica, as it is now: the
// background changes that under applyMu. REQUIRES: entered; applyMu.
func (b *Batch) applyLocked(old, next *record) error {
	v := b.v
	v.mu.Lock()
	next.layers, next.sweep = v.rec.layers, v.rec.sweep
	v.mu.Unlock()
	deleted := !next.state.keepsAllOf(&old.state)
	var fresh []extent
	var note func(extent)
	if len(b.touched) > 0 && (&record{state: old.state, layers: next.layers}).leavesOlder() {
		note = func(x extent) {
			if k := len(fresh); k > 0 && fresh[k-1].end() == x.lba {
				fresh[k-1].n += x.n
				return
			}
			fresh = append(fresh, x)
		}
	}
	next.sweep = next.sweep || deleted || note != nil || b.back != nil
	before := next.layers
	if b.back != nil {
		next.layers, deleted = v.rolledBack(next, *b.back), true
		v.layout.Store(v.layout.Load() | 1) // before: who looks at one version of a block now does not from then on
	}
	err := v.applyLocked(b.b, next, func() {
		if l := v.e.live; l != nil {
			l.commit(v.id, b.changes, next.state.Generation, note)
		} else if note != nil {
			fresh = b.touched
		}
		if deleted || len(fresh) > 0 {
			v.owe(deleted, fresh)
		}
		v.noteTouched(b.touched)
	})
	if err == nil && b.back != nil {
		v.flatAt = 0
		v.e.release(v.id, slices.DeleteFunc(slices.Clone(before), func(l layer) bool {
			return slices.Contains(next.layers, l)
		}))
	}
	return err
}

// follows returns ErrInvalid when s cannot come after old. An equal index is allowed: a commit may
// change no more than what an earlier one could not know.
func (s *State) follows(old *State) error {
	type step struct {
		what      string
		old, next uint64
	}
	for _, x := range []step{
		{"applied index", old.AppliedIndex, s.AppliedIndex},
		{"applied term", old.AppliedTerm, s.AppliedTerm},
		{"epoch", uint64(old.Epoch), uint64(s.Epoch)},
		{"generation", uint64(old.Generation), uint64(s.Generation)},
		{"size", uint64(old.SizeBytes), uint64(s.SizeBytes)},
	} {
		if x.next < x.old {
			return fmt.Errorf("%s goes back from %d to %d: %w", x.what, x.old, x.next, trivet.ErrInvalid)
		}
	}
	return s.snapshotsFollow(old)
}

// Close drops an uncommitted batch. Idempotent, and harmless after Commit.
func (b *Batch) Close() error {
	if b.b == nil {
		return nil
	}
	err := b.b.Close()
	b.b = nil
	if l := b.v.e.live; l != nil {
		l.unclaim(b.claims)
	}
	clear(b.changes)
	b.v.endApplier(b.touched, b.changes)
	b.touched, b.changes, b.claims = nil, nil, nil
	return err
}
