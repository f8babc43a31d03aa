package iothrottle

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/trivet-csi/trivet"
)

// costUnit is how many bytes count as one request: what a log entry holds at least, below which the size of a
// request hardly matters.
const costUnit = 64 << 10

// Scheduler gives the volumes of a node fair shares of what the storage below can do, by their Share, and lets
// background work, such as rebuilding and scrubbing, have what they leave. It decides who goes next by mClock
// (mclock.go) whenever more is wanted than the storage should be given at a time (capacity.go).
//
// It is work-conserving: while anybody waits, the storage has as much to do as it should have. A volume that is
// alone is never held back. Flushes pass at once. A request counts as one, a large one as one for each 64 KiB.
//
// It starts no goroutine and needs no Close. It is safe for concurrent use; nothing is locked during I/O.
type Scheduler struct {
	start time.Time

	waiters sync.Pool // *waiter

	mu         sync.Mutex
	core       mclock
	window     window
	inside     float64 // cost of what was let go and is not finished
	waitingN   int
	busyN      int // classes that wait or have requests inside
	background *class
	timer      *time.Timer // for limits; nil = never needed
}

// SchedulerStats says how a Scheduler is doing.
type SchedulerStats struct {
	Window   float64 // requests that the storage is given at a time while somebody waits
	Inside   float64 // requests that it has now
	WaitingN int     // requests that wait
	Capacity float64 // requests per second that it did when somebody waited; 0 = nobody has yet
}

// backgroundShare is least of all: where others wait, background work gets one part beside the parts of each.
var backgroundShare = Share{Weight: 1}

// NewScheduler returns a Scheduler without volumes.
func NewScheduler() *Scheduler {
	s := &Scheduler{start: time.Now(), window: newWindow()}
	s.waiters.New = func() any { return &waiter{turn: make(chan struct{}, 1)} }
	s.background = s.core.add(backgroundShare)
	return s
}

// Stats returns how the Scheduler is doing now.
func (s *Scheduler) Stats() SchedulerStats {
	s.mu.Lock()
	defer s.mu.Unlock()
	return SchedulerStats{
		Window: s.window.size, Inside: s.inside, WaitingN: s.waitingN, Capacity: s.window.capacity,
	}
}

// Background waits for the turn of background work on n bytes. The caller calls release when that is done; it
// must not wait for a volume's request meanwhile. How long it takes says nothing about the storage, as what it
// waits for may be another node. An error is that of ctx.
func (s *Scheduler) Background(ctx context.Context, n int) (release func(), err error) {
	cost := costOf(int64(n))
	if err := s.acquire(ctx, s.background, cost); err != nil {
		return nil, err
	}
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.give(s.background, cost)
	}, nil
}

// Device returns next as one of the volumes. meter, unless nil, is told of what is held back. The caller closes
// it when it is no longer used.
func (s *Scheduler) Device(next trivet.Device, share Share, meter Meter) *Scheduled {
	s.mu.Lock()
	defer s.mu.Unlock()
	return &Scheduled{next: next, scheduler: s, class: s.core.add(share), meter: meter}
}

func costOf(n int64) float64 { return max(float64(n)/costUnit, 1) }

// acquire waits until a request of c may go.
func (s *Scheduler) acquire(ctx context.Context, c *class, cost float64) error {
	w, ok := s.waiters.Get().(*waiter)
	if !ok {
		w = &waiter{turn: make(chan struct{}, 1)}
	}
	defer s.waiters.Put(w)
	w.class, w.cost = c, cost
	s.mu.Lock()
	if c.inside == 0 && c.first == nil {
		s.busyN++
	}
	s.core.enqueue(s.now(), w)
	s.waitingN++
	s.letGo()
	gone := w.gone
	s.mu.Unlock()
	if gone {
		<-w.turn // is there already
		return nil
	}
	select {
	case <-w.turn:
		return nil
	case <-ctx.Done():
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.core.cancel(w) {
		s.waitingN--
		s.quiet(c)
		s.letGo() // who is left may be alone now
	} else {
		<-w.turn // it was let go at the same moment
		s.give(c, cost)
	}
	return fmt.Errorf("wait for other volumes: %w", context.Cause(ctx))
}

// release is told that a request has ended.
func (s *Scheduler) release(c *class, cost float64, latency time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.window.ended(s.now(), latency, cost, s.waitingN > 0)
	s.give(c, cost)
}

// give gives the place of a request back.
func (s *Scheduler) give(c *class, cost float64) {
	c.inside--
	s.inside -= cost
	s.quiet(c)
	s.letGo()
}

// quiet takes note of a class that has nothing to do any more.
func (s *Scheduler) quiet(c *class) {
	if c.inside == 0 && c.first == nil {
		s.busyN--
		if c.closed {
			s.core.remove(c)
		}
	}
	if s.inside < 0 || s.busyN == 0 {
		s.inside = 0 // what rounding left
	}
}

// letGo lets as many requests go as the storage should have. One may always be there, however large it is.
func (s *Scheduler) letGo() {
	for s.waitingN > 0 && (s.busyN <= 1 || s.inside < s.window.limit()) {
		w, wait := s.core.next(s.now())
		if w == nil {
			s.wakeAfter(wait)
			return
		}
		s.waitingN--
		s.inside += w.cost
		w.class.inside++
		w.turn <- struct{}{}
	}
}

// wakeAfter looks again when a limit lets a request go.
func (s *Scheduler) wakeAfter(d time.Duration) {
	if s.timer != nil {
		s.timer.Reset(d)
		return
	}
	s.timer = time.AfterFunc(d, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.letGo()
	})
}

func (s *Scheduler) now() time.Duration { return time.Since(s.start) }

// Scheduled is a volume of a Scheduler: a Device that lets each request wait for its turn.
type Scheduled struct {
	next      trivet.Device
	scheduler *Scheduler
	class     *class
	meter     Meter
}

var _ trivet.Device = (*Scheduled)(nil)

// SetShare changes the share from the next request on.
func (d *Scheduled) SetShare(share Share) {
	s := d.scheduler
	s.mu.Lock()
	defer s.mu.Unlock()
	s.core.set(d.class, s.now(), share)
}

// Share returns the share in force.
func (d *Scheduled) Share() Share {
	d.scheduler.mu.Lock()
	defer d.scheduler.mu.Unlock()
	return d.class.share
}

// Close takes the volume out, once the requests that wait or are under way have ended as usual. REQUIRES: none
// comes after.
func (d *Scheduled) Close() {
	d.scheduler.mu.Lock()
	defer d.scheduler.mu.Unlock()
	c := d.class
	if c.closed = true; c.inside == 0 && c.first == nil {
		d.scheduler.core.remove(c)
	}
}

// ReadAt implements trivet.Device.
func (d *Scheduled) ReadAt(ctx context.Context, p []byte, off int64) error {
	return d.do(ctx, int64(len(p)), func() error { return d.next.ReadAt(ctx, p, off) })
}

// WriteAt implements trivet.Device.
func (d *Scheduled) WriteAt(ctx context.Context, p []byte, off int64) error {
	return d.do(ctx, int64(len(p)), func() error { return d.next.WriteAt(ctx, p, off) })
}

// Discard implements trivet.Device. It carries no data, so its length costs nothing.
func (d *Scheduled) Discard(ctx context.Context, off, n int64) error {
	return d.do(ctx, 0, func() error { return d.next.Discard(ctx, off, n) })
}

// WriteZeroes implements trivet.Device. It carries no data, so its length costs nothing.
func (d *Scheduled) WriteZeroes(ctx context.Context, off, n int64) error {
	return d.do(ctx, 0, func() error { return d.next.WriteZeroes(ctx, off, n) })
}

// Flush implements trivet.Device. It is not held back: a late flush is felt by every write before it.
func (d *Scheduled) Flush(ctx context.Context) error { return d.next.Flush(ctx) }

// Size implements trivet.Device.
func (d *Scheduled) Size() int64 { return d.next.Size() }

func (d *Scheduled) do(ctx context.Context, n int64, request func() error) error {
	cost := costOf(n)
	if d.meter != nil {
		d.meter.Enter()
	}
	came := time.Now()
	err := d.scheduler.acquire(ctx, d.class, cost)
	began := time.Now()
	if d.meter != nil {
		d.meter.Leave(began.Sub(came))
	}
	if err != nil {
		return err
	}
	defer func() { d.scheduler.release(d.class, cost, time.Since(began)) }()
	return request()
}

// Allocated implements trivet.Allocator. It is not held back: it moves no data.
func (d *Scheduled) Allocated(ctx context.Context, off, n int64, runs []trivet.Run) (int, error) {
	return trivet.AllocatedOf(ctx, d.next, off, n, runs)
}
