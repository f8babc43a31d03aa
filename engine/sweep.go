package engine

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/cockroachdb/pebble/v2"

	"github.com/trivet-csi/trivet"
)

// A sweep removes the versions of blocks that no generation shows any more (DESIGN.md, generations). It is owed from
// the commit that deletes a snapshot, which sets a mark in the volume's record in the same batch, until a pass over
// the volume is done, which takes the mark off. In between it may be interrupted anywhere: what it has removed is
// gone, and the next pass begins anew.
const (
	// sweepChunkN is how many versions one step looks at, with the volume's applyMu held: about a millisecond.
	sweepChunkN = 1024

	// sweepRateDefault is how many versions a second are looked at in the background: a tenth of a core at most, and
	// a volume of 100 GiB in two minutes.
	sweepRateDefault = 200_000
)

// sweepDebt is what of a volume is to be swept, under its mu.
type sweepDebt struct {
	at    trivet.LBA // where the pass over all blocks goes on; it goes round
	left  int64      // blocks of that pass; 0: none is owed
	fresh BlockSet   // blocks that were written while an older version may have been shown by nothing but the live state
}

// owesAll has a pass begin anew where the one under way is.
func (d *sweepDebt) owesAll() { d.left = lbaMax }

func (d *sweepDebt) none() bool { return d.left == 0 && d.fresh.Len() == 0 }

// take returns the next blocks to sweep.
func (d *sweepDebt) take() (x extent, ok bool) {
	if d.left > 0 {
		return extent{d.at, min(d.left, int64(lbaMax-d.at))}, true
	}
	c := d.fresh.cursor()
	if x, ok = c.next(); !ok {
		return x, false
	}
	for { // what lies between is looked at in vain, which costs less than a step of its own
		y, more := c.next()
		if n := int64(y.end() - x.lba); more && n <= sweepChunkN {
			x.n = n
			continue
		}
		return x, true
	}
}

// done says that blocks of what take returned were swept.
func (d *sweepDebt) done(x extent) {
	if d.left > 0 {
		d.left -= x.n
		if d.at = x.end(); d.at == lbaMax {
			d.at = 0
		}
		return
	}
	d.fresh.remove(x)
}

// owe takes note of what a commit of the volume has left to sweep. REQUIRES: its applyMu.
func (v *Volume) owe(all bool, fresh []extent) {
	v.mu.Lock()
	if all {
		v.debt.owesAll()
	}
	for _, x := range fresh {
		v.debt.fresh.add(x)
	}
	owes := !v.debt.none()
	v.mu.Unlock()
	if owes {
		v.e.sweeper.owed(v.id)
	}
}

// leavesOlder reports whether a block that is written now may hide a version of an older generation that nothing else
// shows: when the newest generation that is kept is not the one before this.
func (r *record) leavesOlder() bool {
	first := trivet.Generation(0) // of those that the live state alone shows
	if n := len(r.state.Snapshots); n > 0 {
		first = r.state.Snapshots[n-1].Generation + 1
	}
	if n := len(r.layers); n > 0 {
		first = max(first, r.layers[n-1].from)
	}
	return first < r.state.Generation
}

// asked are the generations that somebody may look at, newest first: those that the volume shows, and those that lie
// beneath a layer, of it or of another volume. REQUIRES: applyMu, so that no layer comes meanwhile.
func (v *Volume) asked(r *record) []trivet.Generation {
	gens := r.state.shownGenerations()
	for _, l := range r.layers {
		if l.base.Volume == v.id {
			gens = append(gens, l.base.Generation)
		}
	}
	gens = v.e.bases.of(gens, v.id)
	slices.Sort(gens)
	slices.Reverse(gens)
	return slices.Compact(gens)
}

// needed says which versions of a block, newest first, the generations show that are asked for, newest first too. A
// tombstone counts only where it hides something: the data of the next older version that is needed, or what may lie
// beneath a layer.
func needed(vs []version, asked []trivet.Generation, layers []layer, out []bool) []bool {
	out = append(out[:0], make([]bool, len(vs))...)
	k := 0
	for _, gen := range asked {
		for k < len(vs) && vs[k].gen > gen {
			k++
		}
		if k == len(vs) {
			break
		}
		l, _ := layerOf(layers, gen)
		out[k] = out[k] || vs[k].gen >= l.from
	}
	hides := false
	for i := len(vs) - 1; i >= 0; i-- {
		_, layered := layerOf(layers, vs[i].gen)
		if out[i] && vs[i].isTombstone() && !hides && !layered {
			out[i] = false
		}
		if out[i] {
			hides = !vs[i].isTombstone()
		}
	}
	return out
}

// sweepSome looks at some of the blocks that are owed and removes what is garbage. done: nothing is owed any more, or
// nothing can be done about it now. n is the number of versions that it looked at.
func (v *Volume) sweepSome() (n int, done bool, err error) {
	if err := v.e.enterWrite(); err != nil {
		return 0, false, err
	}
	defer v.e.exit()
	v.applyMu.Lock()
	defer v.applyMu.Unlock()
	v.mu.Lock()
	r, usable := v.rec, !v.dropped && !v.rec.restoring
	x, owes := v.debt.take()
	v.mu.Unlock()
	if !usable {
		return 0, true, nil
	}
	if len(r.layers) > 0 {
		n, err := v.flattenSome(&r)
		return n, false, err
	}
	if !owes {
		return 0, true, v.sweepOver(&r)
	}
	swept, n, err := v.sweepBlocks(&r, x)
	if err != nil {
		return n, false, err
	}
	v.mu.Lock()
	v.debt.done(swept)
	v.mu.Unlock()
	return n, false, nil
}

// sweepOver takes the mark off, unless something is kept for others alone, that goes once they need it no more.
func (v *Volume) sweepOver(r *record) error {
	if !r.sweep {
		return nil
	}
	kept := r.state.shownGenerations()
	for _, gen := range v.e.bases.of(nil, v.id) {
		if !slices.Contains(kept, gen) {
			return nil
		}
	}
	next := *r
	next.sweep = false
	b := v.e.newBatch()
	defer func() { _ = b.Close() }() // memory only
	return v.applyLocked(b, &next, nil)
}

// sweepBlocks removes the garbage of the first blocks of x, in one batch, and says how far it came.
// REQUIRES: entered; applyMu.
func (v *Volume) sweepBlocks(r *record, x extent) (swept extent, n int, err error) {
	it, err := v.e.db.NewIter(&pebble.IterOptions{
		LowerBound: appendBlockPrefix(nil, v.id, x.lba), UpperBound: appendBlockPrefix(nil, v.id, x.end()),
	})
	if err != nil {
		return x, 0, toErr(err)
	}
	w, err := walk(nil, v.id, nil, x.lba, x.end(), it) // own versions only: what lies beneath is not swept here
	if err != nil {
		return x, 0, err
	}
	defer func() { err = w.close(err) }()
	b := v.e.newBatch()
	defer func() { _ = b.Close() }() // memory only
	asked := v.asked(r)
	var gone []ref
	var need []bool
	swept = x
	for n < sweepChunkN {
		ok, err := w.next()
		if err != nil {
			return x, n, err
		}
		if !ok {
			break
		}
		need = needed(w.vs, asked, r.layers, need)
		for i := range w.vs {
			if need[i] {
				continue
			}
			if gone, err = v.sweepVersion(b, w.lba, &w.vs[i], gone); err != nil {
				return x, n, err
			}
		}
		if n += len(w.vs); n >= sweepChunkN {
			swept.n = int64(w.lba+1) - int64(x.lba)
		}
	}
	if b.Empty() {
		return swept, n, nil
	}
	return swept, n, v.applyLocked(b, nil, func() {
		if v.e.live != nil {
			v.e.live.move(v.id, gone, nil)
		}
	})
}

// sweepVersion adds the removal of a version to a batch, and where it stood to gone.
func (v *Volume) sweepVersion(b *pebble.Batch, lba trivet.LBA, x *version, gone []ref) ([]ref, error) {
	if isRef(x.val) {
		at, _, err := decodeRef(x.val, blockKey{v.id, lba, x.gen})
		if err != nil {
			return gone, err
		}
		gone = append(gone, at)
	}
	return gone, b.Delete(appendBlockKey(nil, v.id, lba, x.gen), nil)
}

// sweeper sweeps the volumes that owe it, in the background, one after the other.
type sweeper struct {
	e      *Engine
	rate   int // versions a second
	wake   chan struct{}
	life   context.Context
	cancel context.CancelFunc
	loop   sync.WaitGroup

	mu   sync.Mutex
	todo map[trivet.VolumeID]bool // to look at; true: at all of it
}

func newSweeper(e *Engine, rate int) *sweeper {
	s := &sweeper{e: e, rate: rate, wake: make(chan struct{}, 1), todo: map[trivet.VolumeID]bool{}}
	s.life, s.cancel = context.WithCancel(context.Background()) //nolint:forbidigo // the engine's life, ended by stop
	return s
}

// owed has a volume looked at, owedAll at all its blocks.
func (s *sweeper) owed(id trivet.VolumeID)    { s.add(id, false) }
func (s *sweeper) owedAll(id trivet.VolumeID) { s.add(id, true) }

func (s *sweeper) add(id trivet.VolumeID, all bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.todo[id] = s.todo[id] || all
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// next takes a volume to look at.
func (s *sweeper) next() (id trivet.VolumeID, all, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for id, all := range s.todo {
		delete(s.todo, id)
		return id, all, true
	}
	return 0, false, false
}

func (s *sweeper) start() {
	if s.rate > 0 {
		s.loop.Go(s.run)
	}
}

func (s *sweeper) stop() {
	s.cancel()
	s.loop.Wait()
}

func (s *sweeper) run() {
	for {
		select {
		case <-s.wake:
		case <-s.life.Done():
			return
		}
		if err := s.sweep(s.life, true); err != nil && s.life.Err() == nil {
			s.e.health.log.Warn("background work on generations", "err", err)
		}
	}
}

// Sweep does now, at full speed, what the background owes all volumes: it removes what deleted snapshots leave, and
// flattens clones and restored volumes. A volume that cannot be worked on does not keep the others from it, and is
// tried again when something changes it, or the engine is opened.
func (e *Engine) Sweep(ctx context.Context) error {
	if err := e.sweeper.sweep(ctx, false); err != nil {
		return fmt.Errorf("sweep: %w", err)
	}
	return nil
}

func (s *sweeper) sweep(ctx context.Context, paced bool) (err error) {
	for {
		id, all, ok := s.next()
		if !ok {
			return err
		}
		if verr := s.volume(ctx, id, all, paced); verr != nil {
			if ctx.Err() != nil || errors.Is(verr, trivet.ErrClosed) {
				s.add(id, all)
				return errors.Join(err, verr)
			}
			err = errors.Join(err, fmt.Errorf("%s: %w", id, verr))
		}
	}
}

// volume works on one volume until nothing is left to do.
func (s *sweeper) volume(ctx context.Context, id trivet.VolumeID, all, paced bool) error {
	v, err := s.e.OpenVolume(id)
	if errors.Is(err, trivet.ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	if all {
		v.owe(true, nil)
	}
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		n, done, err := v.sweepSome()
		if err != nil || done {
			return err
		}
		if err := s.pace(ctx, n, paced); err != nil {
			return err
		}
	}
}

// pace waits so that no more than the rate is looked at.
func (s *sweeper) pace(ctx context.Context, n int, paced bool) error {
	if !paced || n == 0 {
		return nil
	}
	wait := time.NewTimer(time.Duration(n) * time.Second / time.Duration(s.rate))
	defer wait.Stop()
	select {
	case <-wait.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
