package engine

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"slices"
	"sort"

	"github.com/cockroachdb/pebble/v2"

	"github.com/trivet-csi/trivet"
)

// version is one version of a block: its generation and the value that the map has for it.
type version struct {
	gen trivet.Generation
	val []byte // of the walker, until its next block
}

func (x *version) isTombstone() bool { return len(x.val) > 0 && x.val[0] == kindTombstone }

// walker passes the blocks of a volume in order, each with all its versions, and knows which of them a generation
// shows, through all layers. It is to look at a snapshot of the store, so that all volumes that it meets are of one
// moment. It belongs to one goroutine.
type walker struct {
	id     trivet.VolumeID
	layers []layer
	it     *pebble.Iterator // at the first key after those of the block
	under  *under           // nil: no other volume lies beneath

	lba   trivet.LBA // of the block
	vs    []version  // of the block, newest first
	below *version   // what the volume beneath shows of it; nil: nothing
	arena []byte
	key   []byte // scratch
}

// under passes the blocks that one generation of the volume beneath shows, as values of the volume above.
type under struct {
	w     *walker
	gen   trivet.Generation
	end   trivet.LBA // blocks at and after it are not shown above
	delta uint32     // between the sums of the two volumes
	valid bool       // there is a block: w.lba
	val   []byte
}

// walk opens a walker over the blocks from lba up to end, which stands before the first. it may be an iterator that is
// open on those of the volume, or nil. The walker owns it, even when an error is returned. ErrCorrupt: the volume
// beneath is not there; ErrUnavailable: it is not whole.
func walk(src iterable, id trivet.VolumeID, layers []layer, lba, end trivet.LBA, it *pebble.Iterator) (*walker, error) {
	w := &walker{id: id, layers: layers, it: it}
	if w.it == nil {
		var err error
		if w.it, err = src.NewIter(&pebble.IterOptions{
			LowerBound: appendBlockPrefix(nil, id, lba), UpperBound: appendBlockPrefix(nil, id, end),
		}); err != nil {
			return nil, toErr(err)
		}
	}
	if len(layers) > 0 && layers[0].base.Volume != id {
		if err := w.openUnder(src, layers[0], lba, end); err != nil {
			return nil, w.close(err)
		}
	}
	return w, w.seekOr(lba)
}

// seekOr is seek, and closes the walker when that fails.
func (w *walker) seekOr(lba trivet.LBA) error {
	err := w.seek(lba)
	if err != nil {
		return w.close(err)
	}
	return nil
}

func (w *walker) openUnder(src iterable, l layer, lba, end trivet.LBA) error {
	r, err := readRecord(src, nil, l.base.Volume)
	if errors.Is(err, trivet.ErrNotFound) {
		err = fmt.Errorf("%w: %w", err, trivet.ErrCorrupt)
	}
	if err == nil && r.restoring {
		err = fmt.Errorf("restore is not complete: %w", trivet.ErrUnavailable)
	}
	if err != nil {
		return fmt.Errorf("%s beneath %s: %w", l.base.Volume, w.id, err)
	}
	u := &under{gen: l.base.Generation, delta: sumDelta(l.base.Volume, w.id)}
	u.end = min(end, trivet.LBA(l.blockN))
	u.w, err = walk(src, l.base.Volume, r.layers, min(lba, u.end), u.end, nil)
	if err == nil {
		w.under = u
	}
	return err
}

// close ends the walker after err.
func (w *walker) close(err error) error {
	if w.under != nil {
		err = w.under.w.close(err)
	}
	return closeIter(w.it, err)
}

// seek has next go on with the first block at or after one.
func (w *walker) seek(lba trivet.LBA) error {
	var key [blockKeyBytes]byte
	w.it.SeekGE(appendBlockPrefix(key[:0], w.id, lba))
	if w.under == nil {
		return nil
	}
	if err := w.under.w.seek(min(lba, w.under.end)); err != nil {
		return err
	}
	return w.under.next()
}

func (u *under) next() error {
	for {
		ok, err := u.w.next()
		u.valid = ok && u.w.lba < u.end
		if err != nil || !u.valid {
			return err
		}
		if x := u.w.shown(u.gen); x != nil && !x.isTombstone() {
			u.val = resum(append(u.val[:0], x.val...), u.delta)
			return nil
		}
	}
}

// next goes to the next block that has a version or that the volume beneath shows.
func (w *walker) next() (bool, error) {
	w.vs, w.arena, w.below = w.vs[:0], w.arena[:0], nil
	at := trivet.LBA(lbaMax)
	if w.under != nil && w.under.valid {
		at = w.under.w.lba
	}
	for ok := w.it.Valid(); ok; ok = w.it.Next() {
		bk, err := decodeBlockKey(w.it.Key())
		if err != nil {
			return false, err
		}
		if bk.lba > at {
			break
		}
		at = bk.lba
		val, err := w.it.ValueAndErr()
		if err != nil {
			return false, toErr(err)
		}
		w.vs = append(w.vs, version{bk.gen, w.keep(val)})
	}
	if err := w.it.Error(); err != nil {
		return false, toErr(err)
	}
	if w.lba = at; at == lbaMax {
		return false, nil
	}
	if w.under != nil && w.under.valid && w.under.w.lba == at {
		w.below = &version{val: w.keep(w.under.val)}
		if err := w.under.next(); err != nil {
			return false, err
		}
	}
	return true, nil
}

func (w *walker) keep(val []byte) []byte {
	n := len(w.arena)
	w.arena = append(w.arena, val...)
	return w.arena[n:len(w.arena):len(w.arena)]
}

// layerOf returns the layer that a generation looks at first; from 0 without a base when there is none.
func layerOf(layers []layer, gen trivet.Generation) (layer, bool) {
	i := sort.Search(len(layers), func(i int) bool { return layers[i].from > gen })
	if i == 0 {
		return layer{}, false
	}
	return layers[i-1], true
}

// shown returns the version of the block that a generation shows, which may be a tombstone; nil: none.
func (w *walker) shown(gen trivet.Generation) *version {
	for {
		l, ok := layerOf(w.layers, gen)
		for i := range w.vs {
			if x := &w.vs[i]; x.gen <= gen {
				if x.gen < l.from {
					break
				}
				return x
			}
		}
		switch {
		case !ok || l.base.Volume == w.id && int64(w.lba) >= l.blockN:
			return nil
		case l.base.Volume != w.id:
			return w.below
		}
		gen = l.base.Generation
	}
}

// content is what the generations from one down to before the next content show of a block.
type content struct {
	newest trivet.Generation
	oldest trivet.Generation // of those that were asked for
	x      *version          // nil: nothing; never a tombstone
}

// contents appends to out what generations, given newest first, show of the block, each content once.
func (w *walker) contents(out []content, gens []trivet.Generation) []content {
	k := 0 // without layers: versions that are newer than the generation
	for _, gen := range gens {
		var x *version
		if len(w.layers) > 0 {
			x = w.shown(gen)
		} else {
			for k < len(w.vs) && w.vs[k].gen > gen {
				k++
			}
			if k < len(w.vs) {
				x = &w.vs[k]
			}
		}
		if x != nil && x.isTombstone() {
			x = nil
		}
		if n := len(out); n > 0 && out[n-1].x == x {
			out[n-1].oldest = gen
			continue
		}
		out = append(out, content{gen, gen, x})
	}
	return out
}

// shownGenerations are the generations that a volume shows, newest first: the live one and those of its snapshots.
func (s *State) shownGenerations() []trivet.Generation {
	gens := []trivet.Generation{Live}
	for _, x := range slices.Backward(s.Snapshots) {
		gens = append(gens, x.Generation)
	}
	return gens
}

// sumDelta is the difference between the sums of a block in two volumes: data of the same length and the same LBA. CRC
// is linear: the sum of a is that of b, xored with what the bits in which a and b differ leave when nothing else is
// put in (Stigge et al., Reversing CRC, 2006); zeroes in front, which is where the data were the same, leave nothing.
func sumDelta(a, b trivet.VolumeID) uint32 {
	var diff, zero [16]byte // volume and LBA
	binary.BigEndian.PutUint64(diff[:], uint64(a^b))
	return crc32.Checksum(diff[:], castagnoli) ^ crc32.Checksum(zero[:], castagnoli)
}

// resum changes the sum in a value by a delta.
func resum(val []byte, delta uint32) []byte {
	if len(val) >= valueHeadBytes {
		binary.BigEndian.PutUint32(val[1:], binary.BigEndian.Uint32(val[1:])^delta)
	}
	return val
}
