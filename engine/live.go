package engine

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/engine/segment"
)

// live counts, for each segment of the log, how many values of the store refer to a block in it, and keeps
// the segments pinned that anybody may still look into (DESIGN.md, pins). It is rebuilt by Open from the store.
//
// To know which segment an overwritten block stood in, without a read before each write, it remembers for each block of
// the current generation the segment that has it: 4 bytes a block, in pages of 2 KiB that exist where a volume has
// any.
type live struct {
	log       *segment.Log
	committed *atomic.Uint64 // of the engine
	capacity  int64          // blocks of a segment
	target    float64        // share of it that should be live, or the cleaner is poked
	poke      func()         // there may be something to clean or to give back; called with mu held

	mu      sync.Mutex // held briefly; the log's locks come after it
	segs    map[segment.ID]*segLive
	byOrd   []*segLive // by ord; the first is nil
	freeOrd []uint32
	blockN  int64 // of all segments
	dead    map[*segLive]struct{}
	holds   map[*hold]struct{}
	vols    map[trivet.VolumeID]*volLive
}

// segLive is one segment of which something is known.
type segLive struct {
	id     segment.ID
	ord    uint32 // short name of it, never 0
	blockN int64  // values in the store, as it is in memory, that refer to it
	busy   int    // batches under way that are about to
	deadAt uint64 // batch that took the last one away; counts while blockN and busy are 0

	sealed bool // its lane has left it, and no entry stands there that may be applied yet

	kept  bool // for good: not everything that refers to it could be read
	lost  bool // the log has no such segment, so it is not pinned
	tries int  // rounds of cleaning that could not empty it
}

// volLive is what is known of one volume.
type volLive struct {
	gen    trivet.Generation
	whole  bool // pages has all there is: no block of another generation stands in the log
	blockN int64
	pages  map[uint32]*livePage // by LBA / livePageN
}

// livePageN is how many blocks have a page together, which costs 2 KiB: thousands of volumes with little in them are
// cheap by it, and a map entry for each page of a full one is not much.
const livePageN = 512

// livePage has the ord of the segment for each of so many blocks; 0 = the block stands nowhere in the log.
type livePage struct {
	n   int // that are not 0
	ord [livePageN]uint32
}

// hold keeps a view of the store: what it refers to is not given back before it ends.
type hold struct{ seq uint64 }

func newLive(log *segment.Log, committed *atomic.Uint64, poke func()) *live {
	return &live{
		log: log, committed: committed, capacity: log.SegmentBytes() / trivet.BlockSize, poke: poke,
		segs: map[segment.ID]*segLive{}, byOrd: []*segLive{nil}, dead: map[*segLive]struct{}{},
		holds: map[*hold]struct{}{}, vols: map[trivet.VolumeID]*volLive{},
	}
}

// hold is to be taken before a snapshot or an iterator whose references are followed later.
func (l *live) hold() *hold {
	if l == nil {
		return nil
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	h := &hold{l.committed.Load()}
	l.holds[h] = struct{}{}
	return h
}

// end gives a hold back. Idempotent; nil is no hold.
func (l *live) end(h *hold) {
	if h == nil {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.holds, h)
	if len(l.dead) > 0 {
		l.poke()
	}
}

// claim pins the segment for as long as the store refers to it, and until unclaim in any case.
// ErrNotFound: the log has no such segment.
func (l *live) claim(id segment.ID) (*segLive, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	s, err := l.segLocked(id)
	if err != nil {
		return nil, err
	}
	if s.lost {
		return nil, fmt.Errorf("%v: %w", id, trivet.ErrNotFound)
	}
	s.busy++
	delete(l.dead, s)
	return s, nil
}

// segLocked finds a segment, or begins to keep it.
func (l *live) segLocked(id segment.ID) (*segLive, error) {
	if s := l.segs[id]; s != nil {
		return s, nil
	}
	if err := l.log.Pin(id); err != nil {
		return nil, err
	}
	return l.addLocked(id), nil
}

func (l *live) addLocked(id segment.ID) *segLive {
	s := &segLive{id: id}
	if n := len(l.freeOrd); n > 0 {
		s.ord, l.freeOrd = l.freeOrd[n-1], l.freeOrd[:n-1]
		l.byOrd[s.ord] = s
	} else {
		s.ord = uint32(len(l.byOrd))
		l.byOrd = append(l.byOrd, s)
	}
	l.segs[id] = s
	return s
}

// unclaim ends claims, after what they were for was counted, or failed.
func (l *live) unclaim(ss []*segLive) {
	if len(ss) == 0 {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, s := range ss {
		s.busy--
		l.settleLocked(s)
	}
}

// settleLocked notes that nothing refers to a segment any more, if that is so.
func (l *live) settleLocked(s *segLive) {
	if s.blockN < 0 || s.busy < 0 {
		panic(fmt.Sprintf("engine: %v has %d live blocks, %d claims", s.id, s.blockN, s.busy))
	}
	if s.blockN == 0 && s.busy == 0 {
		s.deadAt = l.committed.Load()
		l.dead[s] = struct{}{}
		l.poke()
	}
}

// countLocked adds n references of a volume to a segment. Of a segment that is kept not all were ever counted.
func (l *live) countLocked(v *volLive, s *segLive, n int64) {
	if s.kept && s.blockN+n < 0 {
		return
	}
	s.blockN += n
	v.blockN += n
	l.blockN += n
	if n < 0 {
		l.settleLocked(s)
	}
}

func (l *live) volLocked(id trivet.VolumeID) *volLive {
	v := l.vols[id]
	if v == nil {
		v = &volLive{pages: map[uint32]*livePage{}}
		l.vols[id] = v
	}
	return v
}

// swap sets the ord of a block and returns the one before.
func (v *volLive) swap(lba trivet.LBA, ord uint32) (old uint32) {
	k := uint32(lba / livePageN)
	p := v.pages[k]
	if p == nil {
		if ord == 0 {
			return 0
		}
		p = &livePage{}
		v.pages[k] = p
	}
	at := &p.ord[lba%livePageN]
	old, *at = *at, ord
	switch {
	case old == 0 && ord != 0:
		p.n++
	case old != 0 && ord == 0:
		if p.n--; p.n == 0 {
			delete(v.pages, k)
		}
	}
	return old
}

// at returns the ord of a block.
func (v *volLive) at(lba trivet.LBA) uint32 {
	if p := v.pages[uint32(lba/livePageN)]; p != nil {
		return p.ord[lba%livePageN]
	}
	return 0
}

// change is what a batch did to a run of blocks: they stand in a segment now, or, nil, nowhere in the log.
type change struct {
	extent
	seg *segLive
}

// commit counts the changes of a batch of a volume, in their order, after the store has taken it. next is the volume's
// generation from now on. The caller holds the volume's applyMu, so counts and store go together. fresh, when set, is
// told of the blocks that had no block of this generation in the log before.
func (l *live) commit(id trivet.VolumeID, changes []change, next trivet.Generation, fresh func(extent)) {
	l.mu.Lock()
	defer l.mu.Unlock()
	v := l.volLocked(id)
	for _, c := range changes {
		if c.seg == nil {
			l.clearLocked(v, c.extent)
			if fresh != nil {
				fresh(c.extent)
			}
			continue
		}
		for lba := c.lba; lba < c.end(); lba++ {
			old := v.swap(lba, c.seg.ord)
			l.countLocked(v, c.seg, 1)
			if old != 0 {
				l.countLocked(v, l.byOrd[old], -1)
			} else if fresh != nil {
				fresh(extent{lba, 1})
			}
		}
	}
	if float64(l.blockN) < l.target*float64(int64(len(l.segs))*l.capacity) {
		l.poke()
	}
	if next != v.gen { // what pages had is of an older generation now, and stays
		v.gen, v.whole, v.pages = next, v.whole && v.blockN == 0, map[uint32]*livePage{}
	}
}

// clearLocked counts off what pages has of a run of blocks, however long it is.
func (l *live) clearLocked(v *volLive, x extent) {
	clearPage := func(k uint32, p *livePage) {
		first := trivet.LBA(k) * livePageN
		for lba := max(first, x.lba); lba < min(first+livePageN, x.end()) && p.n > 0; lba++ {
			if p.ord[lba-first] != 0 {
				l.countLocked(v, l.byOrd[v.swap(lba, 0)], -1)
			}
		}
	}
	if x.n/livePageN > int64(len(v.pages)) {
		for k, p := range v.pages {
			clearPage(k, p)
		}
		return
	}
	for k := uint32(x.lba / livePageN); trivet.LBA(k)*livePageN < x.end(); k++ {
		if p := v.pages[k]; p != nil {
			clearPage(k, p)
		}
	}
}

// move counts references that were taken away and added one by one, whatever their generation; pages are not touched.
func (l *live) move(id trivet.VolumeID, gone, come []ref) {
	l.mu.Lock()
	defer l.mu.Unlock()
	v := l.volLocked(id)
	for _, r := range come {
		l.countLocked(v, l.segs[r.seg], 1) // claimed
	}
	for _, r := range gone {
		if s := l.segs[r.seg]; s != nil {
			l.countLocked(v, s, -1)
		}
	}
}

// create begins the account of a new, empty volume.
func (l *live) create(id trivet.VolumeID) {
	if l == nil {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.vols[id] = &volLive{whole: true, pages: map[uint32]*livePage{}}
}

// forgetPages drops what is known of a volume block by block, before a Restore changes it.
func (l *live) forgetPages(id trivet.VolumeID) {
	if l == nil {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	v := l.volLocked(id)
	v.whole, v.pages = false, map[uint32]*livePage{}
}

// setPages sets anew what is known of a volume block by block.
func (l *live) setPages(id trivet.VolumeID, with *volLive) {
	l.mu.Lock()
	defer l.mu.Unlock()
	v := l.volLocked(id)
	v.gen, v.whole, v.pages = with.gen, with.whole, with.pages
}

// drop counts off a volume; gone are all its references, nil when pages has them.
func (l *live) drop(id trivet.VolumeID, gone []ref) {
	l.mu.Lock()
	defer l.mu.Unlock()
	v := l.volLocked(id)
	if gone == nil {
		l.clearLocked(v, extent{0, lbaMax})
	}
	for _, r := range gone {
		if s := l.segs[r.seg]; s != nil {
			l.countLocked(v, s, -1)
		}
	}
	delete(l.vols, id)
}

// isWhole reports whether pages has all references of a volume.
func (l *live) isWhole(id trivet.VolumeID) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	v := l.vols[id]
	return v != nil && v.whole
}

// usedN is how many segments something refers to.
func (l *live) usedN() (n int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, s := range l.segs {
		if s.blockN > 0 {
			n++
		}
	}
	return n
}

// liveN is how many blocks of all volumes stand in the log.
func (l *live) liveN() int64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.blockN
}

// blocks is how many blocks of a volume stand in the log, all generations together.
func (l *live) blocks(id trivet.VolumeID) int64 {
	if l == nil {
		return 0
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.blocksLocked(l.vols[id])
}

// blocksIn is how many blocks of a volume stand in the log between two, at most: where that is not known block by
// block, all that it has.
func (l *live) blocksIn(id trivet.VolumeID, start, end trivet.LBA) (n int64) {
	if l == nil {
		return 0
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	v := l.vols[id]
	if v == nil || !v.whole {
		return l.blocksLocked(v)
	}
	for k, p := range v.pages {
		if first := trivet.LBA(k) * livePageN; first < end && first+livePageN > start {
			n += int64(p.n)
		}
	}
	return n
}

func (l *live) blocksLocked(v *volLive) int64 {
	if v == nil {
		return 0
	}
	return v.blockN
}

// keepAll keeps all segments that there are for the life of the engine: something could not be read that may refer
// to them. Only a repair and a restart end that.
func (l *live) keepAll() {
	infos := l.log.Segments()
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, x := range infos {
		if s, err := l.segLocked(x.ID); err == nil { // else it was recycled meanwhile: nothing referred to it
			s.kept = true
			delete(l.dead, s)
		}
	}
	for s := range l.dead {
		s.kept = true
	}
	clear(l.dead)
}

// release unpins the segments that nothing refers to in memory, in the store as it is on disk (flushed is
// the last batch known durable), and in no view that is held. It returns how many.
func (l *live) release(flushed uint64) (n int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	oldest := flushed
	for h := range l.holds {
		oldest = min(oldest, h.seq)
	}
	for s := range l.dead {
		if s.kept || s.deadAt > oldest {
			continue
		}
		delete(l.dead, s)
		delete(l.segs, s.id)
		l.byOrd[s.ord] = nil
		l.freeOrd = append(l.freeOrd, s.ord)
		if !s.lost {
			l.log.Unpin(s.id)
			n++
		}
	}
	return n
}

// errIsGone reports whether an error of the log means that a block is not where it was said to be.
func errIsGone(err error) bool {
	return errors.Is(err, trivet.ErrNotFound) || errors.Is(err, trivet.ErrCorrupt)
}
