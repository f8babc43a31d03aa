package engine

import (
	"errors"
	"fmt"
	"sync"

	"github.com/cockroachdb/pebble/v2"

	"github.com/trivet-csi/trivet"
)

const (
	// viewPieceN is how many versions of blocks a View reads at a time, before it lets others in: a close of the engine
	// waits for no more than that.
	viewPieceN = windowBlockN
	// viewTouchedMax is how many extents a View remembers of what was written since. Beyond it everything counts as
	// written, and nothing is repaired by this view.
	viewTouchedMax = 4096
)

// View is a run of blocks of a volume as of one applied index, for a scrub: every replica that takes a view of the same
// run at the same index must find the same in it (I4). It keeps what it refers to from being recycled, so it is to be
// closed soon. Its methods may be called concurrently.
type View struct {
	v      *Volume
	run    extent
	state  State
	layers []layer
	asked  []trivet.Generation // that somebody may look at, newest first: more than the volume shows, where clones are
	usable uint64              // of the volume, when it was taken

	mu   sync.Mutex       // held over the reading of a piece
	snap *pebble.Snapshot // nil once closed
	hold *hold

	since   sync.Mutex // of what follows; the applier takes it
	touched []extent   // written since
	all     bool       // so much was that it counts as all, or the view is closed
	moved   []extent   // put elsewhere by cleaning since, and not looked at there
}

// View pins a view of blockN blocks from lba on, all of them beyond the end of the volume included, as of the last
// committed batch. REQUIRES: no batch of the volume is committed meanwhile; the applier calls it. ErrUnavailable:
// Restoring. ErrNotFound: dropped.
func (v *Volume) View(lba trivet.LBA, blockN int64) (*View, error) {
	w, err := v.newView(lba, blockN)
	if err != nil {
		return nil, fmt.Errorf("view %d blocks at %d of %s: %w", blockN, lba, v.id, err)
	}
	return w, nil
}

func (v *Volume) newView(lba trivet.LBA, blockN int64) (*View, error) {
	if lba >= lbaMax || blockN <= 0 || blockN > lbaMax-int64(lba) {
		return nil, trivet.ErrOutOfRange
	}
	if err := v.e.enter(); err != nil {
		return nil, err
	}
	defer v.e.exit()
	w := &View{v: v, run: extent{lba, blockN}, usable: v.usable.Load(), hold: v.e.live.hold()} // before the snapshot
	w.snap = v.e.db.NewSnapshot()
	r, err := readRecord(w.snap, nil, v.id)
	if err == nil && (r.restoring || w.usable%2 != 0) {
		err = fmt.Errorf("restore is not complete: %w", trivet.ErrUnavailable)
	}
	if err != nil {
		v.e.live.end(w.hold)
		return nil, errors.Join(err, toErr(w.snap.Close()))
	}
	w.state, w.layers = r.state, r.layers
	w.asked = v.asked(&r) // no layer comes before it is looked up: the applier is here
	v.e.views.add(w)
	v.mu.Lock()
	v.views = append(v.views, w)
	v.mu.Unlock()
	return w, nil
}

// Index is the applied index that the view shows.
func (w *View) Index() uint64 { return w.state.AppliedIndex }

// Close lets go. Idempotent.
func (w *View) Close() error {
	w.v.mu.Lock()
	for i, x := range w.v.views {
		if x == w {
			w.v.views = append(w.v.views[:i:i], w.v.views[i+1:]...)
			break
		}
	}
	w.v.mu.Unlock()
	w.since.Lock()
	w.all = true // nobody tells it of writes any more
	w.since.Unlock()
	w.v.e.views.remove(w)
	return w.unpin()
}

func (w *View) unpin() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.snap == nil {
		return nil
	}
	err := toErr(w.snap.Close())
	w.snap = nil
	w.v.e.live.end(w.hold)
	return err
}

// views are those that are open, for Close of the engine.
type views struct {
	mu   sync.Mutex
	open map[*View]struct{}
}

func (s *views) add(w *View) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.open == nil {
		s.open = make(map[*View]struct{})
	}
	s.open[w] = struct{}{}
}

func (s *views) remove(w *View) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.open, w)
}

// closeAll unpins what is left. REQUIRES: the engine is closing.
func (s *views) closeAll() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	var err error
	for w := range s.open {
		err = errors.Join(err, w.unpin())
	}
	clear(s.open)
	return err
}

// noteTouched tells the open views of a volume what a batch has written. The caller holds applyMu.
func (v *Volume) noteTouched(xs []extent) {
	v.mu.Lock()
	defer v.mu.Unlock()
	for _, w := range v.views {
		w.since.Lock()
		if len(w.touched)+len(xs) > viewTouchedMax {
			w.all, w.touched = true, nil
		}
		for _, x := range xs {
			if !w.all && x.lba < w.run.end() && x.end() > w.run.lba {
				w.touched = append(w.touched, x)
			}
		}
		w.since.Unlock()
	}
}

// noteMoved tells the open views of a volume which blocks cleaning has just put elsewhere: a view reads them where
// they were.
func (v *Volume) noteMoved(moves []moving) {
	v.mu.Lock()
	defer v.mu.Unlock()
	for _, w := range v.views {
		w.since.Lock()
		for _, m := range moves {
			if m.bk.lba >= w.run.lba && m.bk.lba < w.run.end() {
				w.moved = append(w.moved, extent{m.bk.lba, 1})
			}
		}
		if len(w.moved) > viewTouchedMax {
			if w.moved = mergeExtents(w.moved); len(w.moved) > viewTouchedMax {
				w.moved = append(w.moved[:0], w.run) // a little more is looked at than was moved
			}
		}
		w.since.Unlock()
	}
}

// takeMoved returns the blocks of the run that cleaning has put elsewhere since it was asked last, in order.
func (w *View) takeMoved() []extent {
	w.since.Lock()
	defer w.since.Unlock()
	xs := mergeExtents(w.moved)
	w.moved = nil
	return xs
}

// IsWritten reports whether a block is known to have been written since the view was taken: then nothing is to be
// repaired of what the view has of it. Of a view that has lost count (viewTouchedMax) it says no, and nothing is
// repaired by it all the same.
func (w *View) IsWritten(lba trivet.LBA) bool {
	w.since.Lock()
	defer w.since.Unlock()
	return w.touchedLocked(lba)
}

// isTouched reports whether a block may have been written since the view was taken.
func (w *View) isTouched(lba trivet.LBA) bool {
	w.since.Lock()
	defer w.since.Unlock()
	return w.all || w.v.usable.Load() != w.usable || w.touchedLocked(lba)
}

func (w *View) touchedLocked(lba trivet.LBA) bool {
	for _, x := range w.touched {
		if x.lba <= lba && lba < x.end() {
			return true
		}
	}
	return false
}
