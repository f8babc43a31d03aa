// Package iothrottle holds the requests of one volume back to a rate: requests per second and
// bytes per second, both at once.
//
// Reads and writes cost one request and their length; Discard and WriteZeroes cost one request,
// since they carry no data; Flush is free, because a late flush is felt by every write before
// it. Requests are let through in the order they came. Over 10 s the rate is met to within 3 %;
// an idle volume saves up at most 100 ms of budget, but always enough for one request, and a
// request of any size is served: those behind it wait until its cost is paid.
//
// A Throttle starts no goroutine and needs no Close.
package iothrottle

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/trivet-csi/trivet"
)

// Limits of one volume. Zero or less means unlimited.
type Limits struct {
	IOPS        int64 // requests per second
	BytesPerSec int64 // bytes read and written per second
}

func (l Limits) unlimited() bool { return l.IOPS <= 0 && l.BytesPerSec <= 0 }

var _ trivet.Device = (*Throttle)(nil)

// Throttle is a Device that holds requests back to Limits. It is safe for concurrent use.
type Throttle struct {
	next  trivet.Device
	start time.Time // the instant that durations count from

	// turn is the head of the queue: whoever has put a token in it is next to go. Senders on a
	// channel are served first come, first served, which makes the whole queue so.
	turn chan struct{}

	mu      sync.Mutex
	limits  Limits
	ops     bucket
	bytes   bucket
	changed chan struct{} // closed, and replaced, when limits change
}

// New returns a Throttle over next.
func New(next trivet.Device, l Limits) *Throttle {
	t := &Throttle{
		next: next, start: time.Now(), turn: make(chan struct{}, 1), changed: make(chan struct{}),
	}
	t.SetLimits(l)
	return t
}

// SetLimits changes the limits at once, also for requests that are waiting. Debt stays.
func (t *Throttle) SetLimits(l Limits) {
	t.mu.Lock()
	defer t.mu.Unlock()
	now := time.Since(t.start)
	t.limits = l
	t.ops.setRate(now, l.IOPS)
	t.bytes.setRate(now, l.BytesPerSec)
	close(t.changed)
	t.changed = make(chan struct{})
}

// Limits returns the limits in force.
func (t *Throttle) Limits() Limits {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.limits
}

// ReadAt implements trivet.Device.
func (t *Throttle) ReadAt(ctx context.Context, p []byte, off int64) error {
	if err := t.admit(ctx, len(p)); err != nil {
		return err
	}
	return t.next.ReadAt(ctx, p, off)
}

// WriteAt implements trivet.Device.
func (t *Throttle) WriteAt(ctx context.Context, p []byte, off int64) error {
	if err := t.admit(ctx, len(p)); err != nil {
		return err
	}
	return t.next.WriteAt(ctx, p, off)
}

// Discard implements trivet.Device.
func (t *Throttle) Discard(ctx context.Context, off, n int64) error {
	if err := t.admit(ctx, 0); err != nil {
		return err
	}
	return t.next.Discard(ctx, off, n)
}

// WriteZeroes implements trivet.Device.
func (t *Throttle) WriteZeroes(ctx context.Context, off, n int64) error {
	if err := t.admit(ctx, 0); err != nil {
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
func (t *Throttle) admit(ctx context.Context, n int) error {
	if t.Limits().unlimited() && len(t.turn) == 0 {
		return nil
	}
	select {
	case t.turn <- struct{}{}:
		defer func() { <-t.turn }()
	case <-ctx.Done():
		return t.ended(ctx)
	}
	for {
		wait, changed := t.tryTake(n)
		if wait == 0 {
			return nil
		}
		timer := time.NewTimer(wait)
		select {
		case <-timer.C:
		case <-changed:
		case <-ctx.Done():
			timer.Stop()
			return t.ended(ctx)
		}
		timer.Stop()
	}
}

// tryTake charges a request of n bytes if both buckets allow it. Otherwise it returns how long
// to wait and a channel that closes when the limits change.
func (t *Throttle) tryTake(n int) (time.Duration, <-chan struct{}) {
	t.mu.Lock()
	defer t.mu.Unlock()
	now := time.Since(t.start)
	wait := max(t.ops.wait(now, 1), t.bytes.wait(now, float64(n)))
	if wait == 0 {
		t.ops.take(1)
		t.bytes.take(float64(n))
	}
	return wait, t.changed
}

func (t *Throttle) ended(ctx context.Context) error {
	return fmt.Errorf("wait for the rate limit: %w", context.Cause(ctx))
}
