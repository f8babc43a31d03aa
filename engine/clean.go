package engine

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/engine/segment"
)

const (
	cleanTargetDefault = 0.7
	cleanTargetMax     = 0.95

	// cleanPause is the least time between two rounds of the background that found nothing more to do.
	cleanPause = 500 * time.Millisecond

	// cleanBytesMin is what cleaning may copy in a second however idle the volumes are, and cleanShare times what was
	// written is what it may copy beside that. At 70 % utilisation of uniformly overwritten volumes, greedy cleaning
	// copies 0.9 bytes for each one written (design.md, section 8), so it keeps up, and is never much ahead.
	cleanBytesMin = 32 << 20
	cleanShare    = 2

	// cleanRoundSegments is how many segments' worth of live blocks one round copies, sorted, before it flushes.
	cleanRoundSegments = 2

	// cleanHeadBlocks is what the head of a batch takes at most, in blocks (segment, DESIGN.md).
	cleanHeadBlocks = 2

	// cleanTriesMax is how often a segment is chosen that then still has live blocks: damaged ones, most likely.
	cleanTriesMax = 3
)

// CleanStats says what a round of cleaning did.
type CleanStats struct {
	Segments    int   // that were emptied, or tried
	CopiedBytes int64 // of live blocks, to data segments
	Released    int   // segments given back to the log
}

// cleaner empties the segments of the log that have few live blocks left, so that they can be used again
// (DESIGN.md, cleaning).
type cleaner struct {
	e      *Engine
	target float64
	wake   chan struct{} // holds one token
	// background waits for a turn beside volumes (Config.Background); nil: none
	background func(ctx context.Context, bytes int) (release func(), err error)
	pressure   atomic.Bool // the disk is nearly full: clean whatever gives space

	turn   chan struct{} // one round at a time; no mutex, which must not be held over a wait (Engine.calls)
	mover  mover         // under turn
	life   context.Context
	cancel context.CancelFunc
	loop   sync.WaitGroup

	gaveAt time.Time // under turn: the last giveBack
	paceAt time.Time // under turn: until when what was copied is paid for
	wrote  int64     // of space, when that was reckoned
	copied atomic.Int64

	trimmedAt time.Time // of the loop: the last trim
	trimLeft  int64     // bytes of files that the next one may give back

	vainN      int   // under turn: rounds, the last ones, that won no segment
	vainWrote  int64 // of space, after them
	vainBlocks int64 // live, after them
}

func newCleaner(e *Engine, target float64) *cleaner {
	if target <= 0 {
		target = cleanTargetDefault
	}
	c := &cleaner{
		e: e, target: target, wake: make(chan struct{}, 1), turn: make(chan struct{}, 1), mover: mover{e: e},
		gaveAt: time.Now(), trimmedAt: time.Now(), trimLeft: 1, // what Open found is looked at once
	}
	c.life, c.cancel = context.WithCancel(context.Background()) //nolint:forbidigo // the engine's life, ended by stop
	return c
}

// poke has the background look whether there is something to do.
func (c *cleaner) poke() {
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

// setPressure says whether the disk runs full: then everything that gives space is cleaned, as fast as it goes.
func (c *cleaner) setPressure(on bool) {
	c.pressure.Store(on)
	if on {
		c.poke()
	}
}

func (c *cleaner) start() { c.loop.Go(c.run) }

func (c *cleaner) stop() {
	c.cancel()
	c.loop.Wait()
}

func (c *cleaner) run() {
	pause, later := time.NewTimer(0), time.NewTimer(0)
	defer pause.Stop()
	defer later.Stop()
	for {
		select {
		case <-c.wake:
		case <-later.C:
		case <-c.life.Done():
			return
		}
		for {
			stats, err := c.round(c.life, true)
			if err != nil && c.life.Err() == nil {
				c.e.health.log.Warn("cleaning the log", "err", err)
			}
			if err != nil || stats.CopiedBytes == 0 {
				break
			}
		}
		pause.Reset(cleanPause)
		select {
		case <-pause.C:
		case <-c.life.Done():
			return
		}
		if err := c.trim(); err != nil {
			c.e.health.log.Warn("giving back files of the log", "err", err)
		}
		later.Reset(c.lookIn())
	}
}

// Clean does one round of cleaning now, at full speed: it copies the live blocks of the emptiest segments, if the
// target calls for it, and gives back to the log all segments that nothing refers to any more, on disk either.
// Without a
// log it does nothing. ErrNoSpace: the log has no room to copy to.
func (e *Engine) Clean() (CleanStats, error) {
	if e.live == nil {
		return CleanStats{}, nil
	}
	var stats CleanStats
	var err error
	if e.clean != nil {
		stats, err = e.clean.round(context.Background(), false) //nolint:forbidigo // it does not wait
	} else {
		stats.Released, err = e.giveBack(true)
	}
	if err != nil {
		return stats, fmt.Errorf("clean log: %w", err)
	}
	return stats, nil
}

// round is one pass: choose, copy, flush, give back.
func (c *cleaner) round(ctx context.Context, paced bool) (stats CleanStats, err error) {
	select {
	case c.turn <- struct{}{}:
	case <-ctx.Done():
		return stats, ctx.Err()
	}
	defer func() { <-c.turn }()
	if err := c.e.enterWrite(); err != nil {
		return stats, err
	}
	victims := map[uint32]*segLive(nil)
	if !c.isInVain() {
		victims = c.victims()
	}
	c.e.exit()
	stats.Segments = len(victims)
	if len(victims) > 0 {
		before := c.e.live.usedN()
		if err = c.empty(ctx, victims, paced, &stats); err == nil {
			c.noteWon(c.e.live.usedN() < before)
		}
	}
	n, backErr := c.giveBack(paced)
	stats.Released = n
	return stats, errors.Join(err, backErr)
}

// noteWon takes note of whether a round has left fewer segments in use. REQUIRES: turn.
func (c *cleaner) noteWon(won bool) {
	if c.vainN++; won {
		c.vainN = 0
	}
	c.vainWrote, c.vainBlocks = c.e.space.total(), c.e.live.liveN()
}

// isInVain reports whether the last rounds have won nothing and nothing is otherwise since: the heads of many small
// batches, of many volumes, can take what there would be to win. REQUIRES: turn.
func (c *cleaner) isInVain() bool {
	if c.vainN < cleanTriesMax {
		return false
	}
	bytes := c.e.log.SegmentBytes()
	if c.e.space.total()-c.vainWrote < bytes && c.vainBlocks-c.e.live.liveN() < bytes/trivet.BlockSize {
		return true
	}
	c.vainN = 0
	return false
}

// victims chooses the emptiest segments that the log has no use for, until what is left reaches the target or a
// round is
// full. Segments that still have a few retained entries count too: once they are empty, the log carries those forward.
func (c *cleaner) victims() map[uint32]*segLive {
	l, capacity := c.e.live, c.e.log.SegmentBytes()/trivet.BlockSize
	infos := c.e.log.Segments()
	l.mu.Lock()
	defer l.mu.Unlock()
	var old []*segLive
	blockN, room := int64(0), int64(0)
	for _, x := range infos {
		if x.Data && x.Current {
			room = x.RoomBytes / trivet.BlockSize
		}
		s := l.segs[x.ID]
		idle := x.Entries == 0 || !x.Recent && x.EntryBytes <= c.e.log.SegmentBytes()/8
		if s == nil || s.blockN == 0 || s.kept || s.tries >= cleanTriesMax || s.busy > 0 || x.Current || !idle {
			continue
		}
		s.sealed = x.Entries == 0
		old = append(old, s)
		blockN += s.blockN
	}
	slices.SortFunc(old, func(a, b *segLive) int {
		return cmp.Or(cmp.Compare(a.blockN, b.blockN), cmp.Compare(a.id, b.id))
	})
	target := c.target
	if c.pressure.Load() {
		target = cleanTargetMax
	}
	chosen := map[uint32]*segLive{}
	segN, budget, freed := int64(len(old)), cleanRoundSegments*capacity, int64(0)
	for _, s := range old {
		if float64(blockN) >= target*float64(segN*capacity) || float64(s.blockN) >= cleanTargetMax*float64(capacity) {
			break
		}
		if budget -= s.blockN; budget < 0 && len(chosen) > 0 {
			break
		}
		chosen[s.ord] = s
		if freed += capacity - s.blockN; freed >= capacity { // what is copied fills one less than what is emptied
			segN, freed = segN-1, freed-capacity
		}
	}
	if segN < int64(len(old)) {
		return chosen
	}
	// What is emptied does not make up for what copying fills. A disk that runs full is glad of a segment whose blocks
	// fit where copies go already; to fill another one for it would win nothing, and could go on for ever.
	room -= int64(len(l.vols)+cleanRoundSegments) * cleanHeadBlocks
	for _, s := range old {
		if room -= s.blockN; room < 0 || !c.pressure.Load() {
			delete(chosen, s.ord)
		}
	}
	return chosen
}

// victimBlock is a block that seems to stand in a victim.
type victimBlock struct {
	lba trivet.LBA
	gen trivet.Generation
}

// empty copies what is live in the victims, volume by volume: read in the order in which it stands there, as whole
// stretches, and stored in the order of LBAs, a few MiB at a time.
func (c *cleaner) empty(ctx context.Context, victims map[uint32]*segLive, paced bool, stats *CleanStats) error {
	l := c.e.live
	l.mu.Lock()
	ids := slices.Sorted(maps.Keys(l.vols))
	l.mu.Unlock()
	for _, id := range ids {
		blocks, err := c.blocksOf(id, victims)
		if err != nil {
			return err
		}
		moves, err := c.mover.inPlace(id, blocks, victims)
		if err != nil {
			return err
		}
		for chunk := range slices.Chunk(moves, moveBlocks) {
			c.mover.turn = func(n int) (func(), error) { return c.turnOf(ctx, n, paced) }
			n, err := c.mover.relocate(id, chunk, victims)
			stats.CopiedBytes += n
			c.copied.Add(n)
			if err != nil {
				return fmt.Errorf("%s: %w", id, err)
			}
			if err := c.pace(ctx, n, paced); err != nil {
				return err
			}
		}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, s := range victims { // damaged blocks, or of volumes that cannot be opened, are left where they are
		if s.blockN > 0 {
			s.tries++
		}
	}
	return nil
}

// inPage appends the blocks of one page of a volume that stand in victims.
func (l *live) inPage(out []victimBlock, v *volLive, k uint32, victims map[uint32]*segLive) []victimBlock {
	l.mu.Lock()
	defer l.mu.Unlock()
	p := v.pages[k]
	if p == nil {
		return out
	}
	for i, ord := range p.ord {
		if ord != 0 && victims[ord] != nil {
			out = append(out, victimBlock{trivet.LBA(k)*livePageN + trivet.LBA(i), v.gen})
		}
	}
	return out
}

// blocksOf lists the blocks of a volume that stand in victims, in order: from memory, or, where older generations may
// have some, from the map.
func (c *cleaner) blocksOf(id trivet.VolumeID, victims map[uint32]*segLive) (out []victimBlock, err error) {
	l := c.e.live
	l.mu.Lock()
	v := l.vols[id]
	if v == nil || v.blockN == 0 {
		l.mu.Unlock()
		return nil, nil
	}
	whole, pages := v.whole, slices.Sorted(maps.Keys(v.pages))
	l.mu.Unlock()
	if whole {
		for _, k := range pages { // each under the lock by itself, so that no batch waits long
			out = l.inPage(out, v, k, victims)
			c.mover.turns.Pass()
		}
		return out, nil
	}
	in := map[segment.ID]bool{}
	for _, s := range victims {
		in[s.id] = true
	}
	if err := c.e.enter(); err != nil {
		return nil, err
	}
	defer c.e.exit()
	lower, upper := volumeBlocks(id)
	err = c.e.eachRef(lower, upper, func(bk blockKey, at ref) error {
		if in[at.seg] {
			out = append(out, victimBlock{bk.lba, bk.gen})
		}
		return nil
	})
	if errors.Is(err, trivet.ErrCorrupt) {
		err = nil // the scrub's business
	}
	return out, err
}

// turnOf waits for the turn of n bytes beside the requests of volumes, unless there is a hurry.
func (c *cleaner) turnOf(ctx context.Context, n int, paced bool) (done func(), err error) {
	if c.background == nil || !paced || c.pressure.Load() {
		return func() {}, nil
	}
	return c.background(ctx, n)
}

// pace waits so that cleaning copies no faster than it must to keep up with what is written.
func (c *cleaner) pace(ctx context.Context, n int64, paced bool) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	wrote := c.e.space.total()
	free := cleanShare * (wrote - c.wrote)
	c.wrote = wrote
	if n -= free; n <= 0 || !paced || c.pressure.Load() {
		return nil
	}
	now := time.Now()
	if c.paceAt.Before(now) {
		c.paceAt = now
	}
	c.paceAt = c.paceAt.Add(time.Duration(n) * time.Second / cleanBytesMin)
	wait := time.NewTimer(c.paceAt.Sub(now))
	defer wait.Stop()
	select {
	case <-wait.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
