package node

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller/meta"
	"github.com/trivet-csi/trivet/node/blockdev"
)

// A kernel device that outlived its process is resumed in this order (H13, H31):
//
//	registered        the catalogue knows this process as the node
//	still ours        a linearizable read: attached to this node, and without a break
//	TakeOver          an epoch of this process, the next one
//	fence             committed in the volume's group: nothing of the dead process is applied any more
//	data path         opened at that epoch
//	blockdev.Resume   the kernel's unanswered requests come again, and then new ones
//
// To resume before the fence would let a write of the dead process, still under way to a leader, be
// applied after the same write was repeated and another one to that place had followed.
//
// "Without a break" is told by epochs. The record holds the epoch E of the device. A take-over raises the
// epoch by one, a detach and a new attach raise it by two at least, and only the latter may have let
// another node write, upon which a filesystem that is still mounted here would be out of date. So
// the catalogue must say E, or E+1 after a take-over whose process died before it could record it;
// each process records what it found before it takes over.
//
// Where two nodes write, E is the epoch at which this node's session began, and the coming and going of the other one
// raises the volume's epoch, too. So the volume's epoch V is recorded beside E, and the session must have begun at E,
// or at V+1: the first epoch after V can be of a take-over, but not of a new attach.
const (
	resumeAttemptMax = 30 * time.Second // for a fence
	resumePause      = time.Second      // between attempts
	giveUpPause      = 10 * time.Second // between attempts to remove what cannot be resumed
	keeperAwayN      = 60               // attempts without an answer of the keeper: it is dead, and the device with it
	handOverGrace    = 5 * time.Second  // for requests under way, before they are left to the next process
)

// errInterrupted is why a device is not resumed: other holders may have had the volume since.
var errInterrupted = fmt.Errorf("the volume was detached since, and attached anew: %w", trivet.ErrFenced)

// leftovers is what resume needs of blockdev.Leftovers.
type leftovers interface {
	Check(ctx context.Context, name string) error
	Abort(ctx context.Context, name string) error
	CleanOne(ctx context.Context, name string) error
}

// leftover is a volume whose kernel device is to be resumed. Its operation lock is held until it is,
// so that every other call gets ErrPending.
type leftover struct {
	id     trivet.VolumeID
	all    leftovers
	unlock func()
	awayN  int // checks in a row that got no answer
}

// takeStock decides what the last process's devices are good for: it cleans up after those that are
// dead, and returns the others, locked.
func (m *mounts) takeStock(ctx context.Context, all blockdev.Leftovers) ([]leftover, error) {
	names, err := all.Resumable(ctx)
	if err != nil {
		return nil, err
	}
	var keep []string
	var left []leftover
	for _, name := range names {
		id, err := trivet.ParseVolumeID(name)
		if err != nil || m.records.get(id).Epoch == 0 {
			m.log.Warn("a kernel device without a record cannot be resumed", "volume", name)
			continue
		}
		unlock, err := m.ops.try(id)
		if err != nil {
			return nil, err
		}
		keep = append(keep, name)
		left = append(left, leftover{id: id, all: all, unlock: unlock})
	}
	return left, m.cleanUp(ctx, all, keep)
}

// resume resumes one device, patiently: the catalogue or the volume's group may be without a quorum. It
// gives up, and cleans up as after a death, when the volume is not this node's any more or the
// device is dead, which the keeper's watchdog sees to in the end. When ctx ends before, the device
// stays as it is.
func (m *mounts) resume(ctx context.Context, l leftover) {
	l.unlock = sync.OnceFunc(l.unlock)
	defer l.unlock()
	start := time.Now()
	for {
		err := m.resumeOnce(ctx, &l)
		if err == nil {
			m.log.Info("resumed", "volume", l.id, "took", time.Since(start))
			m.finishLeaving(ctx, l.id)
			return
		}
		if ctx.Err() != nil {
			return
		}
		if final := (finalError{}); errors.As(err, &final) {
			m.giveUp(ctx, l, err)
			return
		}
		m.log.Warn("a volume waits to be resumed", "volume", l.id, "err", err)
		select {
		case <-ctx.Done():
			return
		case <-time.After(resumePause):
		}
	}
}

// finishLeaving removes a device whose removal the last process had begun: its mounts are gone from the records, and
// whoever asks for the volume to be unstaged is told that it is not staged. What was written is committed by that.
func (m *mounts) finishLeaving(ctx context.Context, id trivet.VolumeID) {
	for m.records.get(id).Leaving {
		err := m.hide(ctx, id)
		if err == nil {
			return
		}
		m.log.Warn("a volume that the last process began to detach is still there", "volume", id, "err", err)
		select {
		case <-ctx.Done():
			return
		case <-time.After(giveUpPause):
		}
	}
}

// finalError is why another attempt would be in vain.
type finalError struct{ error }

func (e finalError) Unwrap() error { return e.error }

// finalIf marks err as final if it is one of those.
func finalIf(err error, those ...error) error {
	for _, e := range those {
		if errors.Is(err, e) {
			return finalError{err}
		}
	}
	return err
}

// check looks whether the device is still there to be resumed.
func (l *leftover) check(ctx context.Context) error {
	err := l.all.Check(ctx, l.id.String())
	if err == nil {
		l.awayN = 0
		return nil
	}
	if l.awayN++; l.awayN > keeperAwayN {
		return finalError{err}
	}
	return finalIf(err, trivet.ErrClosed, trivet.ErrNotFound)
}

func (m *mounts) resumeOnce(ctx context.Context, l *leftover) error {
	if err := l.check(ctx); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, resumeAttemptMax)
	defer cancel()
	if err := m.attacher.registered(ctx); err != nil {
		return err
	}
	v, err := m.attacher.holding(ctx, l.id)
	if err != nil {
		return finalIf(err, trivet.ErrInUse, trivet.ErrNotFound)
	}
	at, err := m.takeOverAgain(ctx, v)
	if err != nil {
		return finalIf(err, errInterrupted)
	}
	if at, err = m.attacher.openGranted(ctx, l.id, at); err != nil {
		return err
	}
	if err := m.attacher.resumeKernel(ctx, l.id, at, m.records.get(l.id).Overlay); err != nil {
		return finalIf(err, trivet.ErrClosed, trivet.ErrNotFound)
	}
	m.growing.add(l.id) // it has the size of the process before
	return nil
}

// takeOverAgain takes the volume over from the process whose device is to be resumed.
func (m *mounts) takeOverAgain(ctx context.Context, v *meta.Volume) (*attached, error) {
	if at := m.attacher.get(v.ID); at != nil { // of an earlier attempt
		if at.stale(v) {
			return nil, fmt.Errorf("resume %s at epoch %d, now %d: %w", v.ID, at.epoch, v.Attached.Epoch, errInterrupted)
		}
		return at, nil
	}
	rec := m.records.get(v.ID)
	found := v.Attached.Session()
	if found != rec.Epoch && found != max(rec.Epoch, rec.Seen)+1 {
		return nil, fmt.Errorf("resume %s of epoch %d, seen at %d, now %d: %w", v.ID, rec.Epoch, rec.Seen, found,
			errInterrupted)
	}
	rec.Epoch, rec.Seen = found, v.Attached.Epoch
	if err := m.records.put(rec); err != nil {
		return nil, fmt.Errorf("resume %s: %w", v.ID, err)
	}
	want := rec.Seen + 1
	if v.Attached.Mode == meta.MultiNodeReader || v.Attached.Incarnation == m.attacher.process {
		want = found // readers share an epoch, and keep it; or this is an attempt whose answer was lost
	}
	lock, err := m.attacher.caches.lock(v) // before the epoch rises (H13)
	if err != nil {
		return nil, fmt.Errorf("resume %s: %w", v.ID, err)
	}
	epoch, err := m.attacher.takeOver(ctx, v.ID, false)
	if err != nil {
		return nil, errors.Join(err, unlockCache(lock))
	}
	if epoch != want {
		err := fmt.Errorf("resume %s of epoch %d: took over epoch %d: %w", v.ID, found, epoch, errInterrupted)
		return nil, errors.Join(err, unlockCache(lock))
	}
	rec.Epoch = epoch
	if err := m.records.put(rec); err != nil {
		return nil, errors.Join(fmt.Errorf("resume %s: %w", v.ID, err), unlockCache(lock))
	}
	at := &attached{epoch: epoch, lock: lock, goesOn: true}
	m.attacher.set(v.ID, at)
	return at, nil
}

// giveUp removes a device that is not to be resumed, and tries again until that is done, the volume is attached anew,
// or ctx ends: what keeps it, a pod perhaps that still runs, may take its time, and nobody else would come back to it.
// Other calls, which end such pods, are not kept waiting by that.
func (m *mounts) giveUp(ctx context.Context, l leftover, why error) {
	m.log.Error("a volume cannot be resumed; its pods get I/O errors and have to be restarted",
		"volume", l.id, "err", why)
	was, epoch := m.attacher.get(l.id), m.records.get(l.id).Epoch
	for {
		err := m.remove(ctx, l)
		l.unlock()
		if err == nil {
			return
		}
		m.log.Error("what a dead process left is still there", "volume", l.id, "err", err)
		for err != nil {
			select {
			case <-ctx.Done():
				return
			case <-time.After(giveUpPause):
			}
			l.unlock, err = m.ops.try(l.id)
		}
		now, rec := m.attacher.get(l.id), m.records.get(l.id)
		if now != nil && now != was || rec.Epoch != 0 && rec.Epoch != epoch {
			l.unlock()
			return
		}
	}
}

// remove removes a device that is not to be resumed and its mounts: first its connection, or what is unmounted would
// wait for us.
func (m *mounts) remove(ctx context.Context, l leftover) error {
	rec := m.records.get(l.id)
	if err := l.all.Abort(ctx, l.id.String()); err != nil {
		return err
	}
	if err := m.abandon(&rec); err != nil {
		return err
	}
	if err := rec.dropDevice(); err != nil {
		return err
	}
	return errors.Join(m.records.put(rec), l.all.CleanOne(ctx, l.id.String()))
}

// handOver leaves a volume's device and mounts to the next process. It returns false, and has changed
// nothing, if the device would not survive.
func (m *mounts) handOver(ctx context.Context, id trivet.VolumeID) (bool, error) {
	ctx, cancel := context.WithTimeout(ctx, handOverGrace)
	defer cancel()
	if err := m.attacher.release(ctx, id); err != nil {
		if at := m.attacher.get(id); at != nil && at.kernel != nil {
			m.log.Warn("a device does not survive this process", "volume", id, "err", err)
		}
		return false, nil
	}
	return true, m.attacher.drop(id)
}
