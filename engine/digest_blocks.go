package engine

import (
	"encoding/binary"
	"hash"

	"github.com/cockroachdb/pebble/v2"

	"github.com/trivet-csi/trivet"
)

// olderBlock marks, in what is hashed of a block, the content of older generations.
const olderBlock = 1 << 63

// hashBlocks hashes, of each block, what generations show, given newest first: LBA (8) and sum (4) of what the first
// shows, if it shows anything; then, for each generation at which going back the block becomes another, LBA with the
// highest bit set (8), generation (4), 1 when it has content then, else 0 (1), and the sum of that (4). Two versions
// with one sum are one content, or replicas would differ on which they have kept. Without older generations this is
// what was hashed before there were snapshots. It verifies all that is shown.
func hashBlocks(h hash.Hash, w *walker, blocks *blockReader, gens []trivet.Generation) error {
	be := binary.BigEndian
	var shown []content
	var buf []byte
	for {
		ok, err := w.next()
		if err != nil || !ok {
			return err
		}
		shown, buf = w.contents(shown[:0], gens), buf[:0]
		var has bool // what the generation before has, and its sum
		var last uint32
		for i := range shown {
			c, sum := &shown[i], uint32(0)
			if c.x != nil {
				if _, sum, err = w.read(blocks, c.x); err != nil {
					return err
				}
			}
			switch {
			case i == 0 && c.x != nil:
				buf = be.AppendUint32(be.AppendUint64(buf, uint64(w.lba)), sum)
			case i > 0 && (has != (c.x != nil) || sum != last):
				buf = be.AppendUint32(be.AppendUint64(buf, olderBlock|uint64(w.lba)), uint32(c.newest))
				buf = be.AppendUint32(append(buf, oneIf(c.x != nil)), sum)
			}
			has, last = c.x != nil, sum
		}
		h.Write(buf) //nolint:errcheck // a hash never fails
	}
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
