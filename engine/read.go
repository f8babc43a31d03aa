package engine

import (
	"errors"
	"fmt"
	"sync"

	"github.com/cockroachdb/pebble/v2"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/engine/segment"
)

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
		v.metDamage(err)
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
	if n == 1 && gen == Live && v.gen.Load() == 0 && v.e.log != nil { // a table of values is read for nothing else
		if done, err := v.lookUpOne(p, lba, layout, sc); done {
			return err
		}
	}
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

// lookUpOne is lookUp of one block of a volume that has no layers and had no snapshot yet: each block has one version
// at most, whose key is known, and the newest table that has it ends the search. It is not done when the volume may
// have become another meanwhile.
func (v *Volume) lookUpOne(p []byte, lba trivet.LBA, layout uint64, sc *readScratch) (done bool, err error) {
	usable := v.usable.Load()
	if usable%2 != 0 {
		return false, nil
	}
	key := appendBlockKey(sc.lower[:0], v.id, lba, 0)
	val, closer, err := v.e.db.Get(key)
	if err == nil {
		defer func() { err = errors.Join(err, toErr(closer.Close())) }()
	} else if !errors.Is(err, pebble.ErrNotFound) {
		return true, toErr(err)
	}
	if v.gen.Load() != 0 || v.layout.Load() != layout || v.usable.Load() != usable {
		return false, nil
	}
	if err != nil {
		clear(p)
		return true, nil
	}
	return true, sc.block(p, 0, val, key, blockKey{v.id, lba, 0})
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
