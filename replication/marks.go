package replication

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"time"

	"github.com/trivet-csi/trivet"
)

// A mark is an entry of the log that changes nothing and has a name. A replica that awaits a mark of that name pins
// an image of its blocks and state right behind it, and takes the digest of that beside the I/O that goes on: so two
// replicas can be compared at one index without stopping either (I4, I14). One that awaits none only moves its
// applied index.

const (
	// marksMax is how many marks a replica awaits or takes the digest of at a time; one is enough for a leader, and a
	// few for those that asked last and are gone.
	marksMax = 4

	// markIdle is how long a mark is kept that nobody asks about: its image holds disk space.
	markIdle = time.Minute
)

// markState says how far a mark is. Values are part of the wire format.
type markState uint8

const (
	markUnknown markState = 0 // never heard of, or given up
	markAwaited markState = 1 // not met in the log yet
	markTaking  markState = 2 // the digest is being taken
	markTaken   markState = 3
	markDamaged markState = 4 // a block cannot be read; see reason
)

// markReport is what a replica says of a mark.
type markReport struct {
	state   markState
	applied uint64   // index that the replica has applied, read before the rest
	index   uint64   // of the mark; from markTaking on
	hashed  uint64   // bytes of blocks that the digest is done with
	digest  [32]byte // markTaken only
	reason  string   // markDamaged only
}

// markedImage is what is pinned at a mark: an engine.Image.
type markedImage interface {
	Digest(pace func(bytes int) error) ([32]byte, error)
	io.Closer
}

// mark is one that somebody asked for.
type mark struct {
	name   uint64
	report markReport    // but applied and hashed
	hashed atomic.Uint64 // bytes
	theirs uint64        // bytes that the replica which asks is done with itself
	cancel context.CancelFunc
	idle   *time.Timer
}

// marks are those of one replica.
type marks struct {
	id         trivet.VolumeID
	image      func() (markedImage, error)
	background func(ctx context.Context, bytes int) (release func(), err error) // nil: takes no turns

	jobs  sync.WaitGroup
	steps atomic.Uint64 // bytes, see moved

	mu     sync.Mutex
	closed bool
	open   map[uint64]*mark // by name
}

func newMarks(id trivet.VolumeID, image func() (markedImage, error)) *marks {
	return &marks{id: id, image: image, open: make(map[uint64]*mark)}
}

// moved is another number whenever a digest came further, here or where it is compared.
func (k *marks) moved() uint64 { return k.steps.Load() }

// await has the replica pin itself at the mark of that name, which must not be in the log yet. Idempotent.
// ErrPending: too many are awaited. ErrUnavailable: the replica closes.
func (k *marks) await(name uint64) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	switch {
	case k.closed:
		return fmt.Errorf("replica closes: %w", trivet.ErrUnavailable)
	case k.open[name] != nil:
		k.open[name].idle.Reset(markIdle)
		return nil
	case len(k.open) >= marksMax:
		return fmt.Errorf("%d marks are awaited: %w", len(k.open), trivet.ErrPending)
	}
	k.open[name] = &mark{
		name: name, report: markReport{state: markAwaited},
		idle: time.AfterFunc(markIdle, func() { k.drop(name) }),
	}
	return nil
}

// awaits reports whether the replica is to pin itself at that mark. It is asked by the applying goroutine.
func (k *marks) awaits(name uint64) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	m := k.open[name]
	return m != nil && m.report.state == markAwaited
}

// pin takes the image at a mark and begins its digest. REQUIRES: called by the applying goroutine, with all
// entries up to index committed to the engine and none beyond.
func (k *marks) pin(name, index uint64) {
	img, err := k.image()
	k.mu.Lock()
	defer k.mu.Unlock()
	m := k.open[name]
	if err != nil || m == nil || k.closed {
		if err == nil {
			_ = img.Close() // nobody wants it any more
		}
		k.dropLocked(name)
		return
	}
	m.report.state, m.report.index = markTaking, index
	//nolint:forbidigo // the life of the mark, which drop and close end
	ctx, cancel := context.WithCancel(context.Background())
	m.cancel = cancel
	k.jobs.Go(func() { k.take(ctx, m, img) })
}

// take takes the digest of an image. What ends it but damage is no answer, and the mark is forgotten.
func (k *marks) take(ctx context.Context, m *mark, img markedImage) {
	var release func()
	pace := func(n int) error {
		if release != nil {
			release()
			m.hashed.Add(uint64(n))
			k.steps.Add(uint64(n))
		}
		release = func() {}
		if k.background == nil {
			return ctx.Err()
		}
		done, err := k.background(ctx, n)
		if err == nil {
			release = done
		}
		return err
	}
	digest, err := img.Digest(pace)
	if release != nil {
		release()
	}
	_ = img.Close() // only read
	k.mu.Lock()
	defer k.mu.Unlock()
	switch {
	case k.open[m.name] != m:
	case err == nil:
		m.report.state, m.report.digest = markTaken, digest
	case errors.Is(err, trivet.ErrCorrupt):
		m.report.state, m.report.reason = markDamaged, err.Error()
	default:
		k.dropLocked(m.name)
	}
}

// ask tells how far a mark is. theirs is how many bytes the replica that asks is done with.
func (k *marks) ask(name, applied, theirs uint64) markReport {
	k.mu.Lock()
	defer k.mu.Unlock()
	m := k.open[name]
	if m == nil {
		return markReport{applied: applied}
	}
	m.idle.Reset(markIdle)
	if theirs > m.theirs {
		k.steps.Add(theirs - m.theirs)
		m.theirs = theirs
	}
	rep := m.report
	rep.applied, rep.hashed = applied, m.hashed.Load()
	return rep
}

// drop forgets a mark and ends what is done for it.
func (k *marks) drop(name uint64) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.dropLocked(name)
}

func (k *marks) dropLocked(name uint64) {
	m := k.open[name]
	if m == nil {
		return
	}
	delete(k.open, name)
	m.idle.Stop()
	if m.cancel != nil {
		m.cancel()
	}
}

// close ends all digests and waits.
func (k *marks) close() {
	k.mu.Lock()
	k.closed = true
	for name := range k.open {
		k.dropLocked(name)
	}
	k.mu.Unlock()
	k.jobs.Wait()
}
