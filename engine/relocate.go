package engine

import (
	"bytes"
	"cmp"
	"errors"
	"slices"

	"github.com/cockroachdb/pebble/v2"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/engine/segment"
	"github.com/trivet-csi/trivet/internal/procs"
)

// moving is a block on its way: its key, and its value before and after.
type moving struct {
	key      []byte
	bk       blockKey
	sum      uint32
	old, new ref
	damaged  bool
}

const (
	// moveBlocks is how many blocks are read before they are stored, in the order of their LBAs: 8 MiB.
	moveBlocks = 2048
	// moveReadBlocks bounds one read of them, and moveGapBlocks is what is read for nothing between two of them: a
	// read of its own costs more than 32 KiB do.
	moveReadBlocks = storeChunkBytes / trivet.BlockSize
	moveGapBlocks  = 8
	// redirectBlocks is how many blocks the map is told of at once, which keeps writes of the volume waiting: some 50 µs.
	redirectBlocks = 64
)

// mover copies blocks from segments that are to be emptied. It belongs to one goroutine.
type mover struct {
	e    *Engine
	turn func(bytes int) (done func(), err error) // waits until so many may be read or written

	read    []byte // aligned, as payload, and made when first used
	payload []byte
	order   []movePlace
	turns   procs.Turns
}

// relocate copies blocks of a volume that stand in victims to a data segment. The copy is durable before the map is
// changed, and the map is changed only where it still says what was copied. It returns how many bytes were copied.
// REQUIRES: at most moveBlocks, which are sorted anew.
func (m *mover) relocate(id trivet.VolumeID, blocks []moving, victims map[uint32]*segLive) (int64, error) {
	v, err := m.e.OpenVolume(id)
	if err != nil { // dropped meanwhile, or its record is damaged
		if errIsGone(err) {
			return 0, nil
		}
		return 0, err
	}
	if err := m.e.enterWrite(); err != nil {
		return 0, err
	}
	defer m.e.exit()
	moves, payload, err := m.gather(v, blocks, bySegment(victims))
	copied := int64(0)
	for chunk := range slices.Chunk(moves, moveReadBlocks) {
		n := len(chunk) * trivet.BlockSize
		if err == nil {
			err = m.store(v, chunk, payload[copied:copied+int64(n)])
		}
		if err != nil {
			return copied, err
		}
		copied += int64(n)
	}
	return copied, err
}

// store puts blocks into data segments and has the map refer to them there.
func (m *mover) store(v *Volume, moves []moving, payload []byte) error {
	done, err := m.turn(len(payload))
	if err != nil {
		return err
	}
	defer done()
	infos := make([]segment.BlockInfo, len(moves))
	for i, mv := range moves {
		infos[i] = segment.BlockInfo{LBA: mv.bk.lba, CRC: mv.sum}
	}
	return m.e.storeBlocks(v.id, infos, payload, func(first int, at segment.Place) error {
		s, err := m.e.live.claim(at.Segment)
		if err != nil {
			return err
		}
		defer m.e.live.unclaim([]*segLive{s})
		part := moves[first : first+int(at.Bytes/trivet.BlockSize)]
		for i := range part {
			part[i].new = refAt(at, 0).then(i)
		}
		for some := range slices.Chunk(part, redirectBlocks) {
			m.turns.Pass() // not in redirect, which keeps writes of the volume waiting
			if err := v.redirect(some, s); err != nil {
				return err
			}
		}
		return nil
	})
}

func bySegment(victims map[uint32]*segLive) map[segment.ID]*segLive {
	in := make(map[segment.ID]*segLive, len(victims))
	for _, s := range victims {
		in[s.id] = s
	}
	return in
}

// inPlace returns those of blocks, which are in order, that the map says are in victims, in the order in which they
// stand there.
func (m *mover) inPlace(id trivet.VolumeID, blocks []victimBlock, victims map[uint32]*segLive) ([]moving, error) {
	if err := m.e.enter(); err != nil {
		return nil, err
	}
	defer m.e.exit()
	found, err := m.lookUp(id, blocks, bySegment(victims))
	if err != nil {
		return nil, err
	}
	moves := make([]moving, 0, len(found))
	for _, p := range m.byPlace(found) {
		moves = append(moves, found[p.move])
	}
	return moves, nil
}

// movePlace is where one of some blocks stands: small, for a sort of the blocks themselves moves more than they weigh.
type movePlace struct {
	seg  segment.ID
	page uint32
	move uint32 // which one
}

// byPlace returns the order in which blocks stand on the disk, until the next call.
func (m *mover) byPlace(moves []moving) []movePlace {
	m.order = m.order[:0]
	for i, mv := range moves {
		m.order = append(m.order, movePlace{mv.old.seg, mv.old.page, uint32(i)})
	}
	slices.SortFunc(m.order, func(a, b movePlace) int {
		return cmp.Or(cmp.Compare(a.seg, b.seg), cmp.Compare(a.page, b.page))
	})
	return m.order
}

// lookUp finds the places of blocks, which are in order, and drops those that are not in victims. REQUIRES: entered.
func (m *mover) lookUp(id trivet.VolumeID, blocks []victimBlock, in map[segment.ID]*segLive) (
	moves []moving, err error,
) {
	if len(blocks) == 0 {
		return nil, nil
	}
	it, err := m.e.db.NewIter(&pebble.IterOptions{
		LowerBound: appendBlockPrefix(nil, id, blocks[0].lba),
		UpperBound: appendBlockPrefix(nil, id, blocks[len(blocks)-1].lba+1),
	})
	if err != nil {
		return nil, toErr(err)
	}
	defer func() { err = closeIter(it, err) }()
	moves = make([]moving, 0, len(blocks))
	keys := make([]byte, 0, len(blocks)*blockKeyBytes)
	for i, b := range blocks {
		if i%politeEvery == 0 {
			m.turns.Pass()
		}
		from := len(keys)
		keys = appendBlockKey(keys, id, b.lba, b.gen)
		key := keys[from:len(keys):len(keys)]
		if !it.SeekGE(key) || !bytes.Equal(it.Key(), key) {
			continue // gone meanwhile
		}
		val, err := it.ValueAndErr()
		if err != nil {
			return nil, toErr(err)
		}
		bk := blockKey{id, b.lba, b.gen}
		if !isRef(val) {
			continue
		}
		if at, sum, err := decodeRef(val, bk); err == nil && in[at.seg] != nil { // damage of the map is the scrub's
			moves = append(moves, moving{key: key, bk: bk, sum: sum, old: at})
		}
	}
	return moves, toErr(it.Error())
}

// gather reads those of blocks that still are where they were, into one payload in the order of LBAs. What is
// damaged is left where it is: copying it would spread nothing, but give its only trace away. REQUIRES: entered.
func (m *mover) gather(v *Volume, blocks []moving, in map[segment.ID]*segLive) (
	moves []moving, payload []byte, err error,
) {
	hold := m.e.live.hold()
	defer m.e.live.end(hold)
	if moves, err = m.still(v, blocks, in); err != nil || len(moves) == 0 {
		return nil, nil, err
	}
	if m.payload == nil {
		m.payload, m.read = segment.Buffer(moveBlocks*trivet.BlockSize), segment.Buffer(moveReadBlocks*trivet.BlockSize)
	}
	for order := m.byPlace(moves); len(order) > 0; {
		n := together(order)
		if err := m.fetch(moves, order[:n]); err != nil {
			return nil, nil, err
		}
		order = order[n:]
	}
	kept := moves[:0]
	for i, mv := range moves {
		if mv.damaged {
			continue
		}
		if len(kept) < i {
			copy(m.block(len(kept)), m.block(i))
		}
		kept = append(kept, mv)
	}
	return kept, m.payload[:len(kept)*trivet.BlockSize], nil
}

// still returns those of moves that are where they were, in the order of the map. What a hold that was taken before
// keeps is not given back while it lasts. REQUIRES: entered.
func (m *mover) still(v *Volume, moves []moving, in map[segment.ID]*segLive) ([]moving, error) {
	slices.SortFunc(moves, compareMoves)
	v.applyMu.Lock() // the map and the account say the same
	known := v.e.live.whereabouts(v.id, moves)
	v.applyMu.Unlock()
	var unsure []victimBlock
	sure := moves[:0]
	for i, mv := range moves {
		switch known[i] {
		case isThere:
			sure = append(sure, mv)
		case isUnsure:
			unsure = append(unsure, victimBlock{mv.bk.lba, mv.bk.gen})
		}
	}
	if len(unsure) == 0 {
		return sure, nil
	}
	found, err := m.lookUp(v.id, unsure, in)
	if err != nil {
		return nil, err
	}
	sure = append(sure, found...)
	slices.SortFunc(sure, compareMoves)
	return sure, nil
}

// compareMoves orders blocks of a volume as the map has them.
func compareMoves(a, b moving) int {
	return cmp.Or(cmp.Compare(a.bk.lba, b.bk.lba), cmp.Compare(b.bk.gen, a.bk.gen))
}

func (m *mover) block(i int) []byte { return m.payload[i*trivet.BlockSize:][:trivet.BlockSize] }

// together returns how many of the first blocks in order one read will get.
func together(order []movePlace) int {
	first := order[0]
	last := first
	for n, at := range order[1:] {
		if at.seg != first.seg || at.page-last.page > moveGapBlocks || at.page-first.page >= moveReadBlocks {
			return n + 1
		}
		last = at
	}
	return len(order)
}

// fetch reads blocks that stand near each other into their places in the payload.
func (m *mover) fetch(moves []moving, order []movePlace) error {
	first, last := moves[order[0].move].old, order[len(order)-1]
	b := m.read[:int(last.page-first.page+1)*trivet.BlockSize]
	done, err := m.turn(len(b))
	if err != nil {
		return err
	}
	defer done()
	failed := m.e.log.ReadAt(first.seg, b, first.off())
	alone := blockReader{e: m.e}
	for n, at := range order {
		if n%politeBlocks == 0 {
			m.turns.Pass()
		}
		mv := &moves[at.move]
		data := b[int(mv.old.page-first.page)*trivet.BlockSize:][:trivet.BlockSize]
		if failed != nil || sumAt(data, place(mv.key)) != mv.sum { // of this block, or of any of them
			data, err = alone.fetch(mv.old, mv.sum, mv.bk, place(mv.key))
			if mv.damaged = errors.Is(err, trivet.ErrCorrupt); mv.damaged {
				m.e.health.log.Error("cleaning found a damaged block", "volume", mv.bk.volume, "lba", mv.bk.lba, "err", err)
				continue
			}
			if err != nil {
				return err
			}
		}
		copy(m.block(int(at.move)), data)
	}
	return nil
}

// redirect makes the map refer to the copies of blocks, all in segment s, in one batch. Only where it still refers to
// what was copied: a write that was applied meanwhile wins. No other batch of the volume comes between the look and
// the change. REQUIRES: entered; moves are in the order of their keys, and there is one.
func (v *Volume) redirect(moves []moving, s *segLive) (err error) {
	v.applyMu.Lock()
	defer v.applyMu.Unlock()
	v.mu.Lock()
	busy := v.dropped || v.rec.restoring
	v.mu.Unlock()
	if busy {
		return nil
	}
	still := v.unchanged(moves)
	defer func() { err = still.close(err) }()
	b := v.e.newBatch()
	defer func() { _ = b.Close() }() // memory only
	moved := moves[:0]
	for i, m := range moves {
		if same, err := still.at(i, m); err != nil {
			return err
		} else if !same {
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
	v.noteMoved(moved)
	return nil
}

// unchangedMoves tells which blocks the map still refers to where they were: by the account, and of blocks that it does
// not know one by one by the map itself.
type unchangedMoves struct {
	known    []whereabout
	v        *Volume
	from, to []byte
	it       *pebble.Iterator // once it is needed
	want     [refValueBytes]byte
}

// unchanged asks about moves. REQUIRES: entered; applyMu, until close; moves are in the order of the map, and there is
// one.
func (v *Volume) unchanged(moves []moving) *unchangedMoves {
	return &unchangedMoves{
		known: v.e.live.whereabouts(v.id, moves), v: v,
		from: moves[0].key, to: appendBlockPrefix(nil, v.id, moves[len(moves)-1].bk.lba+1),
	}
}

func (u *unchangedMoves) at(i int, m moving) (bool, error) {
	if u.known[i] != isUnsure {
		return u.known[i] == isThere, nil
	}
	if u.it == nil {
		it, err := u.v.e.db.NewIter(&pebble.IterOptions{LowerBound: u.from, UpperBound: u.to})
		if err != nil {
			return false, toErr(err)
		}
		u.it = it
	}
	putRef(u.want[:], m.sum, m.old)
	return hasAt(u.it, m.key, u.want[:])
}

func (u *unchangedMoves) close(err error) error {
	if u.it == nil {
		return err
	}
	return closeIter(u.it, err)
}

// hasAt reports whether a key has a value. Keys that are asked for in order cost an iterator little.
func hasAt(it *pebble.Iterator, key, want []byte) (bool, error) {
	if !it.SeekGE(key) || !bytes.Equal(it.Key(), key) {
		return false, toErr(it.Error())
	}
	got, err := it.ValueAndErr()
	if err != nil {
		return false, toErr(err)
	}
	return bytes.Equal(got, want), nil
}

// whereabout is what the account knows of a block that stood in a segment.
type whereabout uint8

const (
	isUnsure whereabout = iota // it is of an older generation, say, or of a volume that is not known block by block
	isThere
	isGone
)

// whereabouts says of each block whether the volume's newest value of it is still the one that was seen. That it stands
// in the same segment says so where that one is sealed: nothing new can come to stand there, and its name is never
// used again. REQUIRES: the volume's applyMu.
func (l *live) whereabouts(id trivet.VolumeID, moves []moving) []whereabout {
	out := make([]whereabout, len(moves))
	l.mu.Lock()
	defer l.mu.Unlock()
	v := l.vols[id]
	for i, m := range moves {
		if v == nil || m.bk.gen != v.gen {
			continue
		}
		switch s := l.segs[m.old.seg]; {
		case s == nil || v.at(m.bk.lba) != s.ord:
			if v.whole {
				out[i] = isGone
			}
		case s.sealed:
			out[i] = isThere
		}
	}
	return out
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
