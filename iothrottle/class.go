package iothrottle

import (
	"context"
	"time"
)

// diskBackgroundShare is that of a disk: little beside volumes, but something, in requests of 64 KiB a second. A
// rebuild that never ends leaves a volume without its third copy, and a disk that is never cleaned runs full.
var diskBackgroundShare = Share{Weight: 1, Reservation: 32}

// NewDiskScheduler returns a Scheduler for what one disk is asked to do: by the volumes whose replicas on it lead, and
// by background work (rebuild, scrub, cleaning), which has a small reservation here.
func NewDiskScheduler() *Scheduler {
	s := NewScheduler()
	s.core.set(s.background, 0, diskBackgroundShare)
	return s
}

// Class is a user of a Scheduler that is no Device: it asks for a turn for each request. It is safe for concurrent use.
type Class struct {
	scheduler *Scheduler
	class     *class
	meter     Meter
}

// Class adds a class. meter, unless nil, is told of what is held back. The caller closes it when it is no longer used.
func (s *Scheduler) Class(share Share, meter Meter) *Class {
	s.mu.Lock()
	defer s.mu.Unlock()
	return &Class{scheduler: s, class: s.core.add(share), meter: meter}
}

// Acquire waits for the turn of a request of n bytes. Release must follow, unless there is an error, which is that of
// ctx. The caller must not wait for another turn of the same Scheduler before.
func (c *Class) Acquire(ctx context.Context, n int) error {
	if c.meter == nil {
		return c.scheduler.acquire(ctx, c.class, costOf(int64(n)))
	}
	c.meter.Enter()
	came := time.Now()
	err := c.scheduler.acquire(ctx, c.class, costOf(int64(n)))
	c.meter.Leave(time.Since(came))
	return err
}

// Release ends a request of n bytes that took so long since its turn.
func (c *Class) Release(n int, took time.Duration) {
	c.scheduler.release(c.class, costOf(int64(n)), took)
}

// SetShare changes the share from the next request on.
func (c *Class) SetShare(share Share) {
	s := c.scheduler
	s.mu.Lock()
	defer s.mu.Unlock()
	if c.class.share != share {
		s.core.set(c.class, s.now(), share)
	}
}

// Share returns the share in force.
func (c *Class) Share() Share {
	c.scheduler.mu.Lock()
	defer c.scheduler.mu.Unlock()
	return c.class.share
}

// Close takes the class out, once the requests that wait or are under way have ended as usual. REQUIRES: none comes
// after.
func (c *Class) Close() {
	s := c.scheduler
	s.mu.Lock()
	defer s.mu.Unlock()
	if c.class.closed = true; c.class.inside == 0 && c.class.first == nil {
		s.core.remove(c.class)
	}
}
