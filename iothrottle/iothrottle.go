// Package iothrottle holds the requests of volumes back: each volume to its limits (Throttle), and all
// volumes of a node to fair shares of what the storage can do.
//
// # Limits
//
// A Throttle holds one volume to requests per second and bytes per second, of reads, of writes and of
// both together, all at once (Limits). Reads and writes cost one request and their length; Discard and
// WriteZeroes cost one request of a write, since they carry no data; Flush is free, because a late flush is
// felt by every write before it. Reads are let through in the order they came, and so are writes; where a
// limit of both holds them back, they take turns. Over 10 s a rate is met to within 3 %; an idle volume
// saves up at most 100 ms of budget and Limits.Burst, but always enough for one request, and a request of
// any size is served: those behind it wait until its cost is paid.
//
// A Throttle starts no goroutine and needs no Close.
package iothrottle

import (
	"context"
	"sync"
	"sync/atomic"
	"time"

	"github.com/trivet-csi/trivet"
)

var _ trivet.Device = (*Throttle)(nil)

// Meter is told of each request that comes, and of each that goes on or gives up, for how long it was held
// back. It is called by many goroutines at once and must not block.
type Meter interface {
	Enter()
	Leave(held time.Duration)
}

// Options are what a Throttle may be given besides its limits.
type Options struct {
	Meter Meter // nil = none
}

// The gates that come before the one of all requests.
const (
	reads = iota
	writes
	directionN
)

// Throttle is a Device that holds requests back to Limits. It is safe for concurrent use.
type Throttle struct {
	next  trivet.Device
	opts  Options
	start time.Time // the instant that durations count from

	own [directionN]gate // of reads, of writes
	all gate

	passed [directionN]struct{ requestN, bytes atomic.Int64 }
	waited atomic.Int64
	idle   atomic.Bool // no limit is in force

	mu      sync.Mutex
	limits  Limits
	changed chan struct{} // closed, and replaced, when limits change
}

// New returns a Throttle over next.
func New(next trivet.Device, l Limits) *Throttle { return NewWith(next, l, Options{}) }

// NewWith returns a Throttle over next with options.
func NewWith(next trivet.Device, l Limits, o Options) *Throttle {
	t := &Throttle{
		next: next, opts: o, start: time.Now(), changed: make(chan struct{}),
		own: [directionN]gate{newGate(), newGate()}, all: newGate(),
	}
	t.SetLimits(l)
	return t
}

// SetLimits changes the limits at once, also for requests that are waiting. Debt stays, and so does what
// was saved up, as far as the new limits allow.
func (t *Throttle) SetLimits(l Limits) {
	t.mu.Lock()
	defer t.mu.Unlock()
	now, credit := time.Since(t.start), min(l.Burst, BurstMax)
	t.limits = l
	t.own[reads].setRates(now, l.ReadIOPS, l.ReadBytesPerSec, credit)
	t.own[writes].setRates(now, l.WriteIOPS, l.WriteBytesPerSec, credit)
	t.all.setRates(now, l.IOPS, l.BytesPerSec, credit)
	t.idle.Store(l.unlimited())
	close(t.changed)
	t.changed = make(chan struct{})
}

// Limits returns the limits in force.
func (t *Throttle) Limits() Limits {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.limits
}

// Counts returns what was let through so far.
func (t *Throttle) Counts() Counts {
	return Counts{
		ReadN: t.passed[reads].requestN.Load(), ReadBytes: t.passed[reads].bytes.Load(),
		WriteN: t.passed[writes].requestN.Load(), WriteBytes: t.passed[writes].bytes.Load(),
		WaitedN: t.waited.Load(),
	}
}

// ReadAt implements trivet.Device.
func (t *Throttle) ReadAt(ctx context.Context, p []byte, off int64) error {
	if err := t.admit(ctx, reads, len(p)); err != nil {
		return err
	}
	return t.next.ReadAt(ctx, p, off)
}

// WriteAt implements trivet.Device.
func (t *Throttle) WriteAt(ctx context.Context, p []byte, off int64) error {
	if err := t.admit(ctx, writes, len(p)); err != nil {
		return err
	}
	return t.next.WriteAt(ctx, p, off)
}

// Discard implements trivet.Device.
func (t *Throttle) Discard(ctx context.Context, off, n int64) error {
	if err := t.admit(ctx, writes, 0); err != nil {
		return err
	}
	return t.next.Discard(ctx, off, n)
}

// WriteZeroes implements trivet.Device.
func (t *Throttle) WriteZeroes(ctx context.Context, off, n int64) error {
	if err := t.admit(ctx, writes, 0); err != nil {
		return err
	}
	return t.next.WriteZeroes(ctx, off, n)
}

// Flush implements trivet.Device. It is not held back.
func (t *Throttle) Flush(ctx context.Context) error { return t.next.Flush(ctx) }

// Size implements trivet.Device.
func (t *Throttle) Size() int64 { return t.next.Size() }

// admit waits until a request of n bytes may go, or ctx ends; then nothing is charged. No mutex
// is held while it waits, and SetLimits, Limits and Flush never wait for it.
func (t *Throttle) admit(ctx context.Context, direction, n int) error {
	if t.opts.Meter != nil {
		t.opts.Meter.Enter()
	}
	held, err := t.hold(ctx, &t.own[direction], n)
	if t.opts.Meter != nil {
		t.opts.Meter.Leave(held)
	}
	if err != nil {
		return err
	}
	t.passed[direction].requestN.Add(1)
	t.passed[direction].bytes.Add(int64(n))
	return nil
}

// hold returns for how long it held a request back; the clock is read only where a limit is in force.
func (t *Throttle) hold(ctx context.Context, own *gate, n int) (time.Duration, error) {
	if t.idle.Load() && len(own.turn) == 0 {
		return 0, nil
	}
	began := time.Now()
	waited, err := t.queue(ctx, own, n)
	if err == nil && !waited {
		return 0, nil
	}
	if err == nil {
		t.waited.Add(1)
	}
	return time.Since(began), err
}

// queue takes a request through its own gate and the gate of all, and reports whether it waited for tokens
// or for its turn.
func (t *Throttle) queue(ctx context.Context, own *gate, n int) (waited bool, err error) {
	waited = len(own.turn) > 0
	if err := own.enter(ctx); err != nil {
		return false, err
	}
	defer own.leave()
	slow, err := t.pass(ctx, own, n)
	if err != nil {
		return false, err
	}
	waited = waited || slow
	if err = t.all.enter(ctx); err == nil {
		defer t.all.leave()
		slow, err = t.pass(ctx, &t.all, n)
	}
	if err != nil {
		t.mu.Lock()
		defer t.mu.Unlock()
		own.giveBack(n)
		return false, err
	}
	return waited || slow, nil
}

// pass waits for the tokens of g and takes them. REQUIRES: the caller has the turn of g.
func (t *Throttle) pass(ctx context.Context, g *gate, n int) (waited bool, err error) {
	for {
		t.mu.Lock()
		wait, changed := g.take(time.Since(t.start), n), t.changed
		t.mu.Unlock()
		if wait == 0 {
			return waited, nil
		}
		waited = true
		if err := g.pause(ctx, wait, changed); err != nil {
			return waited, err
		}
	}
}

// Allocated implements trivet.Allocator. It is not held back: it moves no data.
func (t *Throttle) Allocated(ctx context.Context, off, n int64, runs []trivet.Run) (int, error) {
	return trivet.AllocatedOf(ctx, t.next, off, n, runs)
}
