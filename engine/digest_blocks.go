package engine

import (
	"encoding/binary"

	"github.com/cockroachdb/pebble/v2"
)

// olderBlock marks, in what is hashed of a block, the content of older generations.
const olderBlock = 1 << 63

// next hashes, of the next block, what the generations show: LBA (8) and sum (4) of what the newest shows, if it shows
// anything; then, for each generation at which going back the block becomes another, LBA with the highest bit set (8),
// generation (4), 1 when it has content then, else 0 (1), and the sum of that (4). Two versions with one sum are one
// content, or replicas would differ on which they have kept. Without older generations this is what was hashed before
// there were snapshots. It verifies all that is shown, and reports whether there was a block.
func (d *digester) next(w *walker) (more bool, err error) {
	if more, err = w.next(); err != nil || !more {
		return false, err
	}
	be := binary.BigEndian
	d.shown, d.buf = w.contents(d.shown[:0], d.gens), d.buf[:0]
	var has bool // what the generation before has, and its sum
	var last uint32
	for i := range d.shown {
		c, sum := &d.shown[i], uint32(0)
		if c.x != nil {
			if _, sum, err = w.read(d.blocks, c.x); err != nil {
				return false, err
			}
		}
		switch {
		case i == 0 && c.x != nil:
			d.buf = be.AppendUint32(be.AppendUint64(d.buf, uint64(w.lba)), sum)
		case i > 0 && (has != (c.x != nil) || sum != last):
			d.buf = be.AppendUint32(be.AppendUint64(d.buf, olderBlock|uint64(w.lba)), uint32(c.newest))
			d.buf = be.AppendUint32(append(d.buf, oneIf(c.x != nil)), sum)
		}
		has, last = c.x != nil, sum
	}
	d.h.Write(d.buf) //nolint:errcheck // a hash never fails
	return true, nil
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
