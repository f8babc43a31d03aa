package engine

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/cockroachdb/pebble/v2"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/engine/segment"
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
	debt    sweepDebt
}

func newVolume(e *Engine, id trivet.VolumeID, r record) *Volume {
	v := &Volume{e: e, id: id, replica: r.replica, rec: r}
	v.size.Store(r.state.SizeBytes)
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

// readScratch are the buffers of one read.
type readScratch struct {
	opts         pebble.IterOptions
	lower, upper [blockKeyBytes]byte
	seek         [blockKeyBytes]byte
	wanted       []wanted
	buf          []byte // aligned
}

// wanted is a block that the map says stands in the log.
type wanted struct {
	i   int // which of the read
	at  ref
	sum uint32
}

// readTries bounds how often a read looks again where its blocks are. Each look finds another place than the one
// before,
// so somebody has cleaned meanwhile.
const readTries = 16

var readPool = sync.Pool{New: func() any { return new(readScratch) }} //nolint:gochecknoglobals // buffers

// ReadAt fills p, whole blocks, from block lba on. ErrInvalid: p is no whole blocks. ErrOutOfRange:
// beyond the size. ErrCorrupt, as a *BlockError unless Pebble met the damage first: p must not be used.
// ErrUnavailable: Restoring. ErrNotFound: dropped.
func (v *Volume) ReadAt(p []byte, lba trivet.LBA) error { return v.ReadAtGeneration(p, lba, Live) }

// ReadAtGeneration is ReadAt of what the volume showed when a snapshot was taken; Live is what it shows now.
// ErrNotFound: no snapshot of State holds that generation. Where the volume was smaller then, there are zeroes.
func (v *Volume) ReadAtGeneration(p []byte, lba trivet.LBA, gen trivet.Generation) error {
	if err := v.readAt(p, lba, gen); err != nil {
		v.e.health.corruptBlock(err)
		if gen != Live {
			err = fmt.Errorf("generation %d: %w", gen, err)
		}
		return fmt.Errorf("read %d blocks at %d of %s: %w", len(p)/trivet.BlockSize, lba, v.id, err)
	}
	return nil
}

func (v *Volume) readAt(p []byte, lba trivet.LBA, gen trivet.Generation) error {
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
	var before wanted
	for range readTries {
		if err := v.lookUp(p, lba, gen, sc); err != nil {
			return err
		}
		bad, err := v.fetch(p, lba, sc)
		if err == nil || !errIsGone(err) || bad == before {
			return err
		}
		before = bad // it may have moved, and its segment be gone, between the two looks
	}
	return fmt.Errorf("blocks moved %d times meanwhile: %w", readTries, trivet.ErrUnavailable)
}

// lookUp fills p with what the store has itself, and notes what stands in the log.
func (v *Volume) lookUp(p []byte, lba trivet.LBA, gen trivet.Generation, sc *readScratch) error {
	sc.wanted = sc.wanted[:0]
	layout := v.layout.Load()
	if layout%2 != 0 {
		return v.lookThrough(p, lba, gen, sc)
	}
	n := trivet.LBA(len(p) / trivet.BlockSize)
	sc.opts = pebble.IterOptions{
		LowerBound:   appendBlockKey(sc.lower[:0], v.id, lba, gen),
		UpperBound:   appendBlockPrefix(sc.upper[:0], v.id, lba+n),
		UseL6Filters: n == 1,
	}
	it, err := v.view(v.e.db, &sc.opts)
	if err != nil {
		return err
	}
	if v.layout.Load() != layout {
		if err := closeIter(it, nil); err != nil {
			return err
		}
		return v.lookThrough(p, lba, gen, sc)
	}
	v.mu.Lock()
	err = v.rec.state.mayLookAt(gen) // after the iterator was made: what is kept now was not swept before
	v.mu.Unlock()
	if err != nil {
		return closeIter(it, err)
	}
	if n == 1 {
		it.SeekPrefixGE(sc.opts.LowerBound) // by the bloom filters
	} else {
		it.First()
	}
	return closeIter(it, sc.fill(p, it, lba, gen))
}

// lookThrough is lookUp of a volume that has layers.
func (v *Volume) lookThrough(p []byte, lba trivet.LBA, gen trivet.Generation, sc *readScratch) (err error) {
	snap := v.e.db.NewSnapshot()
	defer func() { err = errors.Join(err, toErr(snap.Close())) }()
	w, err := v.walkAt(snap, lba, lba+trivet.LBA(len(p)/trivet.BlockSize), gen)
	if err != nil {
		return err
	}
	defer func() { err = w.close(err) }()
	rest := p // not filled yet; its first block is lba
	for {
		ok, err := w.next()
		if err != nil {
			return err
		}
		if !ok {
			clear(rest)
			return nil
		}
		x := w.content(gen)
		if x == nil {
			continue
		}
		gap := int(w.lba-lba) * trivet.BlockSize
		clear(rest[:gap])
		rest = rest[gap:]
		key := appendBlockKey(sc.seek[:0], v.id, w.lba, x.gen)
		i := (len(p) - len(rest)) / trivet.BlockSize
		if err := sc.block(rest[:trivet.BlockSize], i, x.val, key, blockKey{v.id, w.lba, x.gen}); err != nil {
			return err
		}
		rest, lba = rest[trivet.BlockSize:], w.lba+1
	}
}

// fetch reads what stands in the log into p, runs in one piece. On an error it says which block failed.
func (v *Volume) fetch(p []byte, lba trivet.LBA, sc *readScratch) (bad wanted, err error) {
	for rest := sc.wanted; len(rest) > 0; {
		w, n := rest[0], 1
		for n < min(len(rest), windowBlockN) && rest[n].i == w.i+n && rest[n].at == w.at.then(n) {
			n++
		}
		if sc.buf == nil {
			sc.buf = segment.Buffer(windowBlockN * trivet.BlockSize)
		}
		if v.e.log == nil {
			return w, blockErr(fmt.Errorf("the engine has no log: %w", trivet.ErrCorrupt), blockKey{v.id, lba, 0})
		}
		b := sc.buf[:n*trivet.BlockSize]
		if err := v.e.log.ReadAt(w.at.seg, b, w.at.off()); err != nil {
			return w, blockErr(err, blockKey{v.id, lba + trivet.LBA(w.i), 0})
		}
		for i, w := range rest[:n] {
			data, at := b[i*trivet.BlockSize:(i+1)*trivet.BlockSize], lba+trivet.LBA(w.i)
			if got := sumAt(data, place(appendBlockPrefix(sc.lower[:0], v.id, at))); got != w.sum {
				return w, &BlockError{Volume: v.id, LBA: at, Stored: w.sum, Actual: got}
			}
		}
		copy(p[w.i*trivet.BlockSize:], b)
		rest = rest[n:]
	}
	return wanted{}, nil
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

// fill copies the newest version of each block, up to a generation, into p, zeroes where there is none, and notes those
// that stand in the log. The iterator stands at the first such key of block lba, or after it, and is bounded by the end
// of p.
func (sc *readScratch) fill(p []byte, it *pebble.Iterator, lba trivet.LBA, gen trivet.Generation) error {
	rest := p // not filled yet; its first block is lba
	for ok := it.Valid(); ok; {
		bk, err := decodeBlockKey(it.Key())
		if err != nil {
			return err
		}
		if bk.lba < lba { // an older generation of the block before, and there may be hundreds
			ok = it.NextPrefix()
			continue
		}
		if bk.gen > gen {
			ok = it.SeekGE(appendBlockKey(sc.seek[:0], bk.volume, bk.lba, gen))
			continue
		}
		gap := int(bk.lba-lba) * trivet.BlockSize
		clear(rest[:gap])
		rest = rest[gap:]
		val, err := it.ValueAndErr()
		if err != nil {
			return toErr(err)
		}
		err = sc.block(rest[:trivet.BlockSize], (len(p)-len(rest))/trivet.BlockSize, val, it.Key(), bk)
		if err != nil {
			return err
		}
		if rest, lba = rest[trivet.BlockSize:], bk.lba+1; len(rest) == 0 {
			return nil
		}
		ok = it.Next()
	}
	clear(rest)
	return toErr(it.Error())
}

// block copies the block that key and value are of, key decoded is bk, which is the i-th of the read, or notes where it
// is.
func (sc *readScratch) block(p []byte, i int, val, key []byte, bk blockKey) error {
	if isRef(val) {
		at, sum, err := decodeRef(val, bk)
		if err == nil {
			sc.wanted = append(sc.wanted, wanted{i, at, sum})
		}
		return err
	}
	data, _, err := decodeValue(val, key, bk)
	if err != nil {
		return err
	}
	if data == nil {
		clear(p)
	} else {
		copy(p, data)
	}
	return nil
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
