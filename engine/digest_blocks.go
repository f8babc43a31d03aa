package engine

import (
	"encoding/binary"

	"github.com/cockroachdb/pebble/v2"

	"github.com/trivet-csi/trivet"
)

// olderBlock marks, in what is hashed of a block, the content of older generations.
const olderBlock = 1 << 63

// next hashes, of the next block, what the generations show (appendShown). It verifies all that is shown, and reports
// whether there was a block.
func (d *digester) next(w *walker) (more bool, err error) {
	if more, err = w.next(); err != nil || !more {
		return false, err
	}
	d.shown = w.contents(d.shown[:0], d.gens)
	d.buf, err = appendShown(d.buf[:0], w.lba, d.shown, func(x *version) (uint32, error) {
		_, sum, err := w.read(d.blocks, x)
		return sum, err
	})
	if err != nil {
		return false, err
	}
	d.h.Write(d.buf) //nolint:errcheck // a hash never fails
	return true, nil
}

// appendShown appends what is hashed of what generations show of a block: LBA (8) and sum (4) of what the newest shows,
// if it shows anything; then, from newest on, for each generation at which going back the block becomes another, LBA
// with the highest bit set (8), generation (4), 1 when it has content then, else 0 (1), and the sum of that (4). Two
// versions with one sum are one content, or replicas would differ on which they have kept. Without older generations
// this is what was hashed before there were snapshots.
func appendShown(b []byte, lba trivet.LBA, shown []content, sumOf func(x *version) (uint32, error)) ([]byte, error) {
	be := binary.BigEndian
	var has bool // what the generation before has, and its sum
	var last uint32
	for i := range shown {
		c, sum := &shown[i], uint32(0)
		if c.x != nil {
			var err error
			if sum, err = sumOf(c.x); err != nil {
				return b, err
			}
		}
		switch {
		case i == 0 && c.x != nil:
			b = be.AppendUint32(be.AppendUint64(b, uint64(lba)), sum)
		case i > 0 && (has != (c.x != nil) || sum != last):
			b = be.AppendUint32(be.AppendUint64(b, olderBlock|uint64(lba)), uint32(c.newest))
			b = be.AppendUint32(append(b, oneIf(c.x != nil)), sum)
		}
		has, last = c.x != nil, sum
	}
	return b, nil
}

func oneIf(yes bool) byte {
	if yes {
		return 1
	}
	return 0
}

// read returns a version of the block, verified, as blockReader does.
func (w *walker) read(blocks *blockReader, x *version) (data []byte, sum uint32, err error) {
	w.key = appendBlockKey(w.key[:0], w.id, w.lba, x.gen)
	return blocks.value(x.val, w.key, blockKey{w.id, w.lba, x.gen})
}

// pinnedWalk is pinned, with a walker over all blocks.
func (v *Volume) pinnedWalk(snap *pebble.Snapshot) (*walker, record, error) {
	it, r, err := v.pinned(snap)
	if err != nil {
		return nil, record{}, err
	}
	w, err := walk(snap, v.id, r.layers, 0, lbaMax, it)
	return w, r, err
}
