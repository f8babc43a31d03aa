package engine

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"sync"

	"github.com/cockroachdb/pebble/v2"

	"github.com/trivet-csi/trivet"
)

const (
	// viewPieceN is how many versions of blocks a View reads at a time, before it lets others in: a close of the engine
	// waits for no more than that.
	viewPieceN = windowBlockN
	// viewTouchedMax is how many extents a View remembers of what was written since. Beyond it everything counts as
	// written, and nothing is repaired by this view.
	viewTouchedMax = 4096
)

// View is a run of blocks of a volume as of one applied index, for a scrub: every replica that takes a view of the same
// run at the same index must find the same in it (I4). It keeps what it refers to from being recycled, so it is to be
// closed soon. Its methods may be called concurrently.
type View struct {
	v      *Volume
	run    extent
	state  State
	usable uint64 // of the volume, when it was taken

	mu   sync.Mutex       // held over the reading of a piece
	snap *pebble.Snapshot // nil once closed
	hold *hold

	since   sync.Mutex // of what follows; the applier takes it
	touched []extent   // written since
	all     bool       // so much was that it counts as all, or the view is closed
}

// View pins a view of blockN blocks from lba on, all of them beyond the end of the volume included, as of the last
// committed batch. REQUIRES: no batch of the volume is committed meanwhile; the applier calls it. ErrUnavailable:
// Restoring. ErrNotFound: dropped.
func (v *Volume) View(lba trivet.LBA, blockN int64) (*View, error) {
	w, err := v.newView(lba, blockN)
	if err != nil {
		return nil, fmt.Errorf("view %d blocks at %d of %s: %w", blockN, lba, v.id, err)
	}
	return w, nil
}

func (v *Volume) newView(lba trivet.LBA, blockN int64) (*View, error) {
	if lba >= lbaMax || blockN <= 0 || blockN > lbaMax-int64(lba) {
		return nil, trivet.ErrOutOfRange
	}
	if err := v.e.enter(); err != nil {
		return nil, err
	}
	defer v.e.exit()
	w := &View{v: v, run: extent{lba, blockN}, usable: v.usable.Load(), hold: v.e.live.hold()} // before the snapshot
	w.snap = v.e.db.NewSnapshot()
	r, err := readRecord(w.snap, nil, v.id)
	if err == nil && (r.restoring || w.usable%2 != 0) {
		err = fmt.Errorf("restore is not complete: %w", trivet.ErrUnavailable)
	}
	if err == nil && len(r.layers) > 0 {
		err = fmt.Errorf("volume is not flattened: %w", trivet.ErrUnavailable)
	}
	if err != nil {
		v.e.live.end(w.hold)
		return nil, errors.Join(err, toErr(w.snap.Close()))
	}
	w.state = r.state
	v.e.views.add(w)
	v.mu.Lock()
	v.views = append(v.views, w)
	v.mu.Unlock()
	return w, nil
}

// Index is the applied index that the view shows.
func (w *View) Index() uint64 { return w.state.AppliedIndex }

// Close lets go. Idempotent.
func (w *View) Close() error {
	w.v.mu.Lock()
	for i, x := range w.v.views {
		if x == w {
			w.v.views = append(w.v.views[:i:i], w.v.views[i+1:]...)
			break
		}
	}
	w.v.mu.Unlock()
	w.since.Lock()
	w.all = true // nobody tells it of writes any more
	w.since.Unlock()
	w.v.e.views.remove(w)
	return w.unpin()
}

func (w *View) unpin() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.snap == nil {
		return nil
	}
	err := toErr(w.snap.Close())
	w.snap = nil
	w.v.e.live.end(w.hold)
	return err
}

// views are those that are open, for Close of the engine.
type views struct {
	mu   sync.Mutex
	open map[*View]struct{}
}

func (s *views) add(w *View) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.open == nil {
		s.open = make(map[*View]struct{})
	}
	s.open[w] = struct{}{}
}

func (s *views) remove(w *View) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.open, w)
}

// closeAll unpins what is left. REQUIRES: the engine is closing.
func (s *views) closeAll() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	var err error
	for w := range s.open {
		err = errors.Join(err, w.unpin())
	}
	clear(s.open)
	return err
}

// noteTouched tells the open views of a volume what a batch has written. The caller holds applyMu.
func (v *Volume) noteTouched(xs []extent) {
	v.mu.Lock()
	defer v.mu.Unlock()
	for _, w := range v.views {
		w.since.Lock()
		if len(w.touched)+len(xs) > viewTouchedMax {
			w.all, w.touched = true, nil
		}
		for _, x := range xs {
			if !w.all && x.lba < w.run.end() && x.end() > w.run.lba {
				w.touched = append(w.touched, x)
			}
		}
		w.since.Unlock()
	}
}

// isTouched reports whether a block may have been written since the view was taken.
func (w *View) isTouched(lba trivet.LBA) bool {
	w.since.Lock()
	defer w.since.Unlock()
	if w.all || w.v.usable.Load() != w.usable {
		return true
	}
	for _, x := range w.touched {
		if x.lba <= lba && lba < x.end() {
			return true
		}
	}
	return false
}

// Checked is what Check found.
type Checked struct {
	// State is SHA-256 over the volume's State, Blocks over LBA and checksum of each block of the run that reads as
	// other than never written. Both are the same on all replicas at the same index.
	State, Blocks [32]byte
	BlockN        int64      // versions of blocks, of all generations, whose data were read
	Bad           []BadBlock // of them, those that are not what the map says
}

// Check reads every version of every block of the run, whatever its generation, and compares it with the checksum that
// the map has for it: so bits that have flipped where nobody reads are found. Digests are made of the map's
// checksums: damaged data do not change them. turn, when not nil, is called before each piece is read, with its bytes
// at most; its error ends Check. ErrCorrupt: the map itself is damaged. ErrClosed: the view is.
func (w *View) Check(ctx context.Context, turn func(ctx context.Context, bytes int64) error) (Checked, error) {
	c := checker{w: w, blocks: blockReader{e: w.v.e}, sums: sha256.New()}
	for !c.done {
		if err := ctx.Err(); err != nil {
			return Checked{}, err
		}
		if turn != nil {
			if err := turn(ctx, viewPieceN*trivet.BlockSize); err != nil {
				return Checked{}, err
			}
		}
		if err := c.piece(); err != nil {
			return Checked{}, fmt.Errorf("check %d blocks at %d of %s: %w", w.run.n, w.run.lba, w.v.id, err)
		}
	}
	h := sha256.New()
	hashState(h, &w.state)
	c.out.State, c.out.Blocks = [32]byte(h.Sum(nil)), [32]byte(c.sums.Sum(nil))
	return c.out, nil
}

// checker is a Check under way.
type checker struct {
	w      *View
	blocks blockReader
	sums   hash.Hash
	out    Checked
	from   []byte     // key to go on at; nil = the beginning
	next   trivet.LBA // blocks below have had their newest version
	done   bool
}

// iterate opens an iterator over what is left of the run.
func (w *View) iterate(from []byte, first trivet.LBA) (*pebble.Iterator, error) {
	if w.snap == nil {
		return nil, trivet.ErrClosed
	}
	if from == nil {
		from = appendBlockPrefix(nil, w.v.id, first)
	}
	it, err := w.snap.NewIter(&pebble.IterOptions{
		LowerBound: from, UpperBound: appendBlockPrefix(nil, w.v.id, w.run.end()),
	})
	return it, toErr(err)
}

func (c *checker) piece() (err error) {
	if err := c.w.v.e.enter(); err != nil {
		return err
	}
	defer c.w.v.e.exit()
	c.w.mu.Lock() // the view stays open; others wait for a piece
	defer c.w.mu.Unlock()
	it, err := c.w.iterate(c.from, c.w.run.lba)
	if err != nil {
		return err
	}
	defer func() { err = closeIter(it, err) }()
	ok := it.First()
	for n := 0; ok && n < viewPieceN; n++ {
		if err := c.version(it); err != nil {
			return err
		}
		ok = it.Next()
	}
	if err := it.Error(); err != nil {
		return toErr(err)
	}
	c.done = !ok
	if ok {
		c.from = append(c.from[:0:0], it.Key()...)
	}
	return nil
}

// version checks the version under the iterator.
func (c *checker) version(it *pebble.Iterator) error {
	bk, err := decodeBlockKey(it.Key())
	if err != nil {
		return err
	}
	val, err := it.ValueAndErr()
	if err != nil {
		return toErr(err)
	}
	sum, isData, err := sumOf(val, bk)
	if err != nil {
		return err
	}
	if isData {
		c.out.BlockN++
		_, _, err := c.blocks.value(val, it.Key(), bk)
		switch {
		case err == nil:
		case errors.Is(err, trivet.ErrCorrupt):
			c.out.Bad = append(c.out.Bad, newBadBlock(bk, sum, val))
		default:
			return err
		}
	}
	if bk.lba < c.next {
		return nil // an older generation
	}
	c.next = bk.lba + 1
	if isData {
		var e [12]byte
		binary.BigEndian.PutUint64(e[:], uint64(bk.lba))
		binary.BigEndian.PutUint32(e[8:], sum)
		c.sums.Write(e[:]) //nolint:errcheck // a hash never fails
	}
	return nil
}

// BlockVersion is what the map says of a block.
type BlockVersion struct {
	LBA        trivet.LBA
	Generation trivet.Generation
	Sum        uint32 // BlockSum of its data
}

// Versions lists the newest version of up to blockN blocks of the run that read as other than never written, from lba
// on, and says where to go on; the end of the run when there is no more. Nothing of the data is read.
func (w *View) Versions(lba trivet.LBA, blockN int) (out []BlockVersion, next trivet.LBA, err error) {
	if err := w.v.e.enter(); err != nil {
		return nil, 0, fmt.Errorf("list blocks of %s: %w", w.v.id, err)
	}
	defer w.v.e.exit()
	w.mu.Lock()
	defer w.mu.Unlock()
	it, err := w.iterate(nil, max(lba, w.run.lba))
	if err != nil {
		return nil, 0, fmt.Errorf("list blocks of %s: %w", w.v.id, err)
	}
	defer func() { err = closeIter(it, err) }()
	next = max(lba, w.run.lba)
	for ok := it.First(); ok; ok = it.Next() {
		bk, err := decodeBlockKey(it.Key())
		if err != nil {
			return nil, 0, err
		}
		if bk.lba < next {
			continue // an older generation
		}
		if len(out) >= blockN {
			return out, bk.lba, nil
		}
		next = bk.lba + 1
		val, err := it.ValueAndErr()
		if err != nil {
			return nil, 0, toErr(err)
		}
		sum, isData, err := sumOf(val, bk)
		if err != nil {
			return nil, 0, err
		}
		if isData {
			out = append(out, BlockVersion{bk.lba, bk.gen, sum})
		}
	}
	return out, w.run.end(), toErr(it.Error())
}

// sumOf returns the checksum that a value says its block has, and whether it has data at all.
func sumOf(val []byte, bk blockKey) (sum uint32, isData bool, err error) {
	switch {
	case isRef(val):
		_, sum, err = decodeRef(val, bk)
		return sum, true, err
	case len(val) == dataValueBytes && val[0] == kindData:
		return binary.BigEndian.Uint32(val[1:]), true, nil
	}
	_, sum, err = decodeValue(val, appendBlockKey(nil, bk.volume, bk.lba, bk.gen), bk)
	return sum, false, err
}

// RunOf returns how many blocks from lba on hold up to versionN versions of blocks, and whether the run is the last:
// then it has everything there can be from lba on, and is as long. A run is of one block at least.
func (v *Volume) RunOf(lba trivet.LBA, versionN int) (blockN int64, last bool, err error) {
	if lba >= lbaMax {
		return 0, false, fmt.Errorf("run at %d of %s: %w", lba, v.id, trivet.ErrOutOfRange)
	}
	if err := v.e.enter(); err != nil {
		return 0, false, fmt.Errorf("run at %d of %s: %w", lba, v.id, err)
	}
	defer v.e.exit()
	it, err := v.view(v.e.db, &pebble.IterOptions{
		LowerBound: appendBlockPrefix(nil, v.id, lba), UpperBound: appendBlockPrefix(nil, v.id, lbaMax),
	})
	if err != nil {
		return 0, false, fmt.Errorf("run at %d of %s: %w", lba, v.id, err)
	}
	defer func() { err = closeIter(it, err) }()
	n := 0
	for ok := it.First(); ok; ok = it.Next() {
		bk, err := decodeBlockKey(it.Key())
		if err != nil {
			return 0, false, err
		}
		if n++; n > versionN && bk.lba > lba {
			return int64(bk.lba - lba), false, nil
		}
	}
	return int64(lbaMax - lba), true, toErr(it.Error())
}
