package engine

import (
	"bytes"
	"errors"

	"github.com/cockroachdb/pebble/v2"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/engine/segment"
)

// moving is a block on its way: its key, and its value before and after.
type moving struct {
	key      []byte
	bk       blockKey
	sum      uint32
	old, new ref
}

// relocate copies blocks of a volume that stand in victims to a data segment. The copy is durable before the map is
// changed, and the map is changed only where it still says what was copied. It returns how many bytes were copied.
func (e *Engine) relocate(id trivet.VolumeID, blocks []victimBlock, victims map[uint32]*segLive) (int64, error) {
	v, err := e.OpenVolume(id)
	if err != nil { // dropped meanwhile, or its record is damaged
		if errIsGone(err) {
			return 0, nil
		}
		return 0, err
	}
	if err := e.enterWrite(); err != nil {
		return 0, err
	}
	defer e.exit()
	in := map[segment.ID]*segLive{}
	for _, s := range victims {
		in[s.id] = s
	}
	moves, payload, err := e.gather(id, blocks, in)
	if err != nil || len(moves) == 0 {
		return 0, err
	}
	infos := make([]segment.BlockInfo, len(moves))
	for i, m := range moves {
		infos[i] = segment.BlockInfo{LBA: m.bk.lba, CRC: m.sum}
	}
	err = e.storeBlocks(id, infos, payload, func(first int, at segment.Place) error {
		s, err := e.live.claim(at.Segment)
		if err != nil {
			return err
		}
		defer e.live.unclaim([]*segLive{s})
		part := moves[first : first+int(at.Bytes/trivet.BlockSize)]
		for i := range part {
			part[i].new = refAt(at, 0).then(i)
		}
		return v.redirect(part, s)
	})
	return int64(len(payload)), err
}

// gather reads those of blocks that the map still says are in victims. What is damaged is left where it is: copying it
// would spread nothing, but give its only trace away.
func (e *Engine) gather(id trivet.VolumeID, blocks []victimBlock, in map[segment.ID]*segLive) (
	moves []moving, payload []byte, err error,
) {
	hold := e.live.hold()
	defer e.live.end(hold)
	it, err := e.db.NewIter(&pebble.IterOptions{
		LowerBound: appendBlockPrefix(nil, id, blocks[0].lba),
		UpperBound: appendBlockPrefix(nil, id, blocks[len(blocks)-1].lba+1),
	})
	if err != nil {
		return nil, nil, toErr(err)
	}
	defer func() { err = closeIter(it, err) }()
	r := blockReader{e: e}
	for _, b := range blocks {
		key := appendBlockKey(nil, id, b.lba, b.gen)
		if !it.SeekGE(key) || !bytes.Equal(it.Key(), key) {
			continue // gone meanwhile
		}
		at, err := referredAt(it)
		if err != nil || in[at.seg] == nil {
			continue
		}
		bk := blockKey{id, b.lba, b.gen}
		data, sum, err := r.at(it, bk)
		if errors.Is(err, trivet.ErrCorrupt) {
			e.health.log.Error("cleaning found a damaged block", "volume", id, "lba", b.lba, "err", err)
			continue
		}
		if err != nil {
			return nil, nil, err
		}
		moves = append(moves, moving{key: key, bk: bk, sum: sum, old: at})
		payload = append(payload, data...)
	}
	return moves, payload, toErr(it.Error())
}

// redirect makes the map refer to the copies of blocks, all in segment s, in one batch. Only where it still refers to
// what was copied: a write that was applied meanwhile wins. No other batch of the volume comes between the look and
// the change. REQUIRES: entered.
func (v *Volume) redirect(moves []moving, s *segLive) error {
	v.applyMu.Lock()
	defer v.applyMu.Unlock()
	v.mu.Lock()
	busy := v.dropped || v.rec.restoring
	v.mu.Unlock()
	if busy {
		return nil
	}
	b := v.e.newBatch()
	defer func() { _ = b.Close() }() // memory only
	moved := moves[:0]
	want := make([]byte, refValueBytes)
	for _, m := range moves {
		putRef(want, m.sum, m.old)
		same, err := v.e.has(m.key, want)
		if err != nil {
			return err
		}
		if !same {
			continue
		}
		op := b.SetDeferred(blockKeyBytes, refValueBytes)
		copy(op.Key, m.key)
		putRef(op.Value, m.sum, m.new)
		if err := op.Finish(); err != nil {
			return err
		}
		moved = append(moved, m)
	}
	if len(moved) == 0 {
		return nil
	}
	if err := v.e.apply(b); err != nil {
		return err
	}
	v.e.live.redirected(v.id, moved, s)
	return nil
}

// has reports whether a key has a value.
func (e *Engine) has(key, want []byte) (bool, error) {
	got, closer, err := e.db.Get(key)
	if errors.Is(err, pebble.ErrNotFound) {
		return false, nil
	}
	if err != nil {
		return false, toErr(err)
	}
	same := bytes.Equal(got, want)
	return same, closer.Close()
}

// redirected counts blocks that stand in segment s from now on.
func (l *live) redirected(id trivet.VolumeID, moves []moving, s *segLive) {
	l.mu.Lock()
	defer l.mu.Unlock()
	v := l.volLocked(id)
	for _, m := range moves {
		l.countLocked(v, s, 1)
		old := l.segs[m.old.seg]
		if m.bk.gen == v.gen && v.at(m.bk.lba) == old.ord {
			v.swap(m.bk.lba, s.ord)
		}
		l.countLocked(v, old, -1)
	}
}
