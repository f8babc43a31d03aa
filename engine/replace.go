package engine

import (
	"bytes"
	"errors"
	"fmt"
	"slices"

	"github.com/cockroachdb/pebble/v2"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/engine/segment"
)

// BadBlock is a version of a block whose data are not what the map says: damaged, misplaced or gone.
type BadBlock struct {
	BlockVersion
	value []byte // of the map, so that nothing newer is replaced; nil: it has none, and the block shows through
	view  *View  // of one that shows through: it must not have been written since
}

func newBadBlock(bk blockKey, sum uint32, val []byte) BadBlock {
	return BadBlock{BlockVersion: BlockVersion{bk.lba, bk.gen, sum}, value: slices.Clone(val)}
}

// Repair is what Replace puts into the map.
type Repair struct {
	lba  trivet.LBA
	gen  trivet.Generation
	was  []byte // value that the map must still have; nil: none
	data []byte // nil: the block reads as zeroes
	// hides: something older, or beneath, may show through where the map has nothing.
	hides bool
	view  *View // nil, or in which the block must not have been written since
}

// With returns the repair that gives a damaged block its data back. ErrCorrupt: they are not its data. data must not
// change before Replace has returned.
func (b *BadBlock) With(id trivet.VolumeID, data []byte) (Repair, error) {
	if len(data) != trivet.BlockSize || isZero(data) {
		return Repair{}, fmt.Errorf("repair block %d of %s with %d bytes: %w", b.LBA, id, len(data), trivet.ErrCorrupt)
	}
	if got := BlockSum(id, b.LBA, data); got != b.Sum {
		return Repair{}, fmt.Errorf("repair block %d of %s: %w", b.LBA, id,
			&BlockError{Volume: id, LBA: b.LBA, Stored: b.Sum, Actual: got})
	}
	return Repair{lba: b.LBA, gen: b.Generation, was: b.value, data: data, view: b.view}, nil
}

// Repair returns what makes a block of the view what the other replicas say it is: data with the checksum that they
// have, or nil when it reads as zeroes there. It is as if that had been written in the newest generation, whatever
// generation theirs is of, and of no effect once the block has been written. ErrCorrupt: these are not those data.
func (w *View) Repair(want BlockVersion, data []byte) (Repair, error) {
	id := w.v.id
	if want.LBA < w.run.lba || want.LBA >= w.run.end() || data != nil && len(data) != trivet.BlockSize {
		return Repair{}, fmt.Errorf("repair block %d of %s: not of the view: %w", want.LBA, id, trivet.ErrInvalid)
	}
	if data != nil && BlockSum(id, want.LBA, data) != want.Sum {
		return Repair{}, fmt.Errorf("repair block %d of %s: %w", want.LBA, id,
			&BlockError{Volume: id, LBA: want.LBA, Stored: want.Sum, Actual: BlockSum(id, want.LBA, data)})
	}
	was, err := w.newest(want.LBA)
	if err != nil {
		return Repair{}, fmt.Errorf("repair block %d of %s: %w", want.LBA, id, err)
	}
	hides := w.state.Generation > 0 || len(w.layers) > 0
	return Repair{lba: want.LBA, gen: w.state.Generation, was: was, data: data, hides: hides, view: w}, nil
}

// newest returns the value that the view has of a block in the newest generation; nil: none.
func (w *View) newest(lba trivet.LBA) (val []byte, err error) {
	if err := w.v.e.enter(); err != nil {
		return nil, err
	}
	defer w.v.e.exit()
	w.mu.Lock()
	defer w.mu.Unlock()
	at, err := w.walk(lba)
	if err != nil {
		return nil, err
	}
	defer func() { err = at.close(err) }()
	ok, err := at.next()
	if err != nil || !ok || at.lba != lba || len(at.vs) == 0 || at.vs[0].gen != w.state.Generation {
		return nil, err
	}
	return slices.Clone(at.vs[0].val), nil
}

// Damaged finds out which of blockN blocks from lba on are damaged, as the volume and its snapshots show them now; of
// those that show through from another volume, that one's scrub does. nil: none is. ErrCorrupt: the map is, and
// nobody can say. It may be called concurrently with everything.
func (v *Volume) Damaged(lba trivet.LBA, blockN int64) ([]BadBlock, error) {
	bad, err := v.damaged(lba, blockN)
	if err != nil {
		return nil, fmt.Errorf("look for damage in %s: %w", v.id, err)
	}
	return bad, nil
}

func (v *Volume) damaged(lba trivet.LBA, blockN int64) (bad []BadBlock, err error) {
	if err := v.e.enter(); err != nil {
		return nil, err
	}
	defer v.e.exit()
	hold := v.e.live.hold() // before the snapshot
	defer v.e.live.end(hold)
	snap := v.e.db.NewSnapshot()
	defer func() { err = errors.Join(err, toErr(snap.Close())) }()
	w, err := v.walkAt(snap, lba, lba+trivet.LBA(blockN))
	if err != nil {
		return nil, err
	}
	defer func() { err = w.close(err) }()
	st, blocks := v.State(), blockReader{e: v.e}
	gens, shown := st.shownGenerations(), []content(nil)
	for {
		ok, err := w.next()
		if err != nil || !ok {
			return bad, err
		}
		shown = w.contents(shown[:0], gens)
		for i := range shown {
			x := shown[i].x
			if x == nil || x == w.below {
				continue
			}
			sum, err := w.sumOf(x)
			if err != nil {
				return nil, err
			}
			if _, _, err := w.read(&blocks, x); errors.Is(err, trivet.ErrCorrupt) {
				bad = append(bad, newBadBlock(blockKey{v.id, w.lba, x.gen}, sum, x.val))
			} else if err != nil {
				return nil, err
			}
		}
	}
}

// ReadVersion fills p, one block, with the data of a version that has the checksum that is asked for. Which generation
// they are of does not matter, for replicas sweep and flatten each at its own pace, but the one that is asked for is
// looked at first. ErrNotFound: nothing that the volume has of the block, or shows of another one, has that
// checksum. ErrCorrupt: it has, and the data are damaged here.
func (v *Volume) ReadVersion(p []byte, want BlockVersion) error {
	if err := v.readVersion(p, want); err != nil {
		return fmt.Errorf("read block %d of %s at generation %d, checksum %08x: %w", want.LBA, v.id, want.Generation,
			want.Sum, err)
	}
	return nil
}

func (v *Volume) readVersion(p []byte, want BlockVersion) (err error) {
	if err := v.e.enter(); err != nil {
		return err
	}
	defer v.e.exit()
	hold := v.e.live.hold() // before the snapshot
	defer v.e.live.end(hold)
	snap := v.e.db.NewSnapshot()
	defer func() { err = errors.Join(err, toErr(snap.Close())) }()
	w, found, err := v.withSum(snap, want)
	if err != nil {
		return err
	}
	defer func() { err = w.close(err) }()
	r := blockReader{e: v.e}
	err = trivet.ErrNotFound
	for _, x := range found {
		data, _, rerr := w.read(&r, x)
		if rerr == nil {
			copy(p, data)
			return nil
		}
		if err = rerr; !errors.Is(err, trivet.ErrCorrupt) {
			return err
		}
	}
	return err
}

// withSum returns what the volume has of a block, or shows of another one, with a checksum, that of the generation that
// is asked for first. REQUIRES: entered. The caller closes the walker.
func (v *Volume) withSum(snap *pebble.Snapshot, want BlockVersion) (w *walker, found []*version, err error) {
	if w, err = v.walkAt(snap, want.LBA, want.LBA+1); err != nil {
		return nil, nil, err
	}
	ok, err := w.next()
	if err != nil {
		return nil, nil, w.close(err)
	}
	if !ok {
		return w, nil, nil
	}
	all := make([]*version, 0, len(w.vs)+1)
	for i := range w.vs {
		all = append(all, &w.vs[i])
	}
	if w.below != nil {
		all = append(all, w.below)
	}
	for _, x := range all {
		sum, isData, err := sumOf(x.val, blockKey{v.id, want.LBA, x.gen})
		if err != nil {
			return nil, nil, w.close(err)
		}
		if isData && sum == want.Sum {
			found = append(found, x)
		}
	}
	slices.SortStableFunc(found, func(a, b *version) int {
		return oneOf(b.gen == want.Generation) - oneOf(a.gen == want.Generation)
	})
	return w, found, nil
}

func oneOf(yes bool) int { return int(oneIf(yes)) }

// Replace carries out repairs and returns how many took effect; of no effect are those whose block has been written
// meanwhile, which is as good. New data go to the log's data lane, durably, before the map is changed, and the map is
// changed only where it still has what it had: so neither a crash nor a write at the same time can lose anything. What
// was changed is durable with the next Flush. ErrNoSpace: the log has no room. ErrUnavailable: Restoring.
func (v *Volume) Replace(repairs []Repair) (int, error) {
	n, err := v.replace(repairs)
	if err != nil {
		return n, fmt.Errorf("repair %d blocks of %s: %w", len(repairs), v.id, err)
	}
	return n, nil
}

func (v *Volume) replace(repairs []Repair) (done int, err error) {
	if err := v.e.enterWrite(); err != nil {
		return 0, err
	}
	defer v.e.exit()
	var here, stored []Repair
	for _, r := range repairs {
		if r.data != nil && v.e.log != nil && v.e.log.HasDataLane() {
			stored = append(stored, r)
		} else {
			here = append(here, r)
		}
	}
	if len(here) > 0 {
		n, err := v.exchange(here, nil, ref{})
		if done += n; err != nil {
			return done, err
		}
	}
	infos, payload := make([]segment.BlockInfo, len(stored)), make([]byte, 0, len(stored)*trivet.BlockSize)
	for i, r := range stored {
		infos[i] = segment.BlockInfo{LBA: r.lba, CRC: BlockSum(v.id, r.lba, r.data)}
		payload = append(payload, r.data...)
	}
	err = v.e.storeBlocks(v.id, infos, payload, func(first int, at segment.Place) error {
		s, err := v.e.live.claim(at.Segment)
		if err != nil {
			return err
		}
		defer v.e.live.unclaim([]*segLive{s})
		n, err := v.exchange(stored[first:first+int(at.Bytes/trivet.BlockSize)], s, refAt(at, 0))
		done += n
		return err
	})
	return done, err
}

// exchanged is a value of the map that was replaced, for live.
type exchanged struct {
	bk       blockKey
	old, new ref // the zero value: not in the log
}

// exchange replaces values of the map, each only where it is still what the repair says, in one batch. The data stand
// in segment s, one behind the other from at on; without one they become values. No other batch of the volume comes
// between the look and the change. REQUIRES: entered.
func (v *Volume) exchange(repairs []Repair, s *segLive, at ref) (int, error) {
	v.applyMu.Lock()
	defer v.applyMu.Unlock()
	v.mu.Lock()
	dropped, restoring := v.dropped, v.rec.restoring
	v.mu.Unlock()
	switch {
	case dropped:
		return 0, trivet.ErrNotFound
	case restoring:
		return 0, fmt.Errorf("restore is not complete: %w", trivet.ErrUnavailable)
	}
	b := v.e.newBatch()
	defer func() { _ = b.Close() }() // memory only
	var changes []exchanged
	var added []extent // what older versions of these show, nobody else may
	seen := map[blockKey]bool{}
	for i, r := range repairs {
		x := exchanged{bk: blockKey{v.id, r.lba, r.gen}}
		if seen[x.bk] {
			continue // the first one counts
		}
		seen[x.bk] = true
		key := appendBlockKey(nil, v.id, r.lba, r.gen)
		now, err := v.e.valueOrNone(key)
		if err != nil {
			return 0, err
		}
		// What others have decided on (View.Repair) holds wherever cleaning has put the block; what is damaged, at its place.
		same := sameValue(now, r.was) || r.view != nil && isMoved(r.was, now, x.bk)
		if !same || r.view != nil && r.view.isTouched(r.lba) {
			continue
		}
		if isRef(now) {
			if x.old, _, err = decodeRef(now, x.bk); err != nil {
				return 0, err
			}
		}
		if s != nil {
			x.new = at.then(i)
		}
		if err := putRepair(b, key, &r, x.new); err != nil {
			return 0, err
		}
		changes = append(changes, x)
		if r.was == nil && r.gen > 0 {
			added = append(added, extent{r.lba, 1})
		}
	}
	if len(changes) == 0 {
		return 0, nil
	}
	if err := v.e.apply(b); err != nil {
		return 0, err
	}
	if v.e.live != nil {
		v.e.live.exchanged(v.id, changes, s)
	}
	v.owe(false, added)
	return len(changes), nil
}

// putRepair adds the new value of a block to a batch.
func putRepair(b *pebble.Batch, key []byte, r *Repair, at ref) error {
	switch {
	case r.data == nil && !r.hides:
		return b.Delete(key, nil)
	case r.data == nil:
		op := b.SetDeferred(len(key), valueHeadBytes)
		copy(op.Key, key)
		putTombstone(op.Value, place(key))
		return op.Finish()
	case at == ref{}:
		op := b.SetDeferred(len(key), dataValueBytes)
		copy(op.Key, key)
		putData(op.Value, r.data, place(key))
		return op.Finish()
	}
	op := b.SetDeferred(len(key), refValueBytes)
	copy(op.Key, key)
	putRef(op.Value, sumAt(r.data, place(key)), at)
	return op.Finish()
}

// valueOrNone returns the value that the map has for a key; nil: none.
func (e *Engine) valueOrNone(key []byte) ([]byte, error) {
	got, closer, err := e.db.Get(key)
	if errors.Is(err, pebble.ErrNotFound) {
		return nil, nil
	}
	if err != nil {
		return nil, toErr(err)
	}
	val := append(make([]byte, 0, len(got)), got...)
	return val, closer.Close()
}

// sameValue compares values of the map, of which nil is none.
func sameValue(a, b []byte) bool { return (a == nil) == (b == nil) && bytes.Equal(a, b) }

// exchanged counts values that were replaced by such as refer to segment s, or to none.
func (l *live) exchanged(id trivet.VolumeID, changes []exchanged, s *segLive) {
	l.mu.Lock()
	defer l.mu.Unlock()
	v := l.volLocked(id)
	for _, x := range changes {
		now, was := uint32(0), uint32(0)
		if x.new != (ref{}) {
			now = s.ord
			l.countLocked(v, s, 1)
		}
		old := l.segs[x.old.seg] // nil when it was not in the log
		if old != nil {
			was = old.ord
		}
		if x.bk.gen == v.gen && v.at(x.bk.lba) == was {
			v.swap(x.bk.lba, now)
		} else if now != 0 {
			v.whole = false // pages does not have it
		}
		if old != nil {
			l.countLocked(v, old, -1)
		}
	}
}

// WatchDamage has f called for every damaged block that a read of the volume meets, in place of Config.OnCorruption:
// whoever can repair it does, and calls ReportDamage when that fails. f must not block, nor call the volume; nil ends
// the watch.
func (v *Volume) WatchDamage(f func(*BlockError)) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.watcher = f
}

// metDamage tells the watcher of a damaged block, or else the owner of the engine.
func (v *Volume) metDamage(err error) {
	var b *BlockError
	if !errors.As(err, &b) {
		return
	}
	v.mu.Lock()
	f := v.watcher
	v.mu.Unlock()
	if f != nil {
		f(b)
		return
	}
	v.e.health.corruptBlock(err)
}

// noteDamage tells the watcher of a volume, if it has one, of a damaged block that was met otherwise than by a read.
// REQUIRES: entered.
func (e *Engine) noteDamage(err error) {
	var b *BlockError
	if !errors.As(err, &b) {
		return
	}
	e.mu.Lock()
	v := e.open[b.Volume]
	e.mu.Unlock()
	if v == nil {
		return
	}
	v.mu.Lock()
	f := v.watcher
	v.mu.Unlock()
	if f != nil {
		f(b)
	}
}

// ReportDamage tells the owner of the engine (Config.OnCorruption) that the volume has damage that nobody can repair:
// once for each volume.
func (v *Volume) ReportDamage(cause string) {
	v.e.health.corrupt(v.id.String(), &DamageError{First: v.id, Last: v.id, Cause: cause})
}
