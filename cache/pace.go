package cache

import (
	"context"
	"sync"
	"time"
)

// pacer slows writers down as the dirty limit comes near, so that they meet the speed of the device below smoothly
// instead of at a cliff (cf. balance_dirty_pages of Linux, mm/page-writeback.c). It is pure: times are arguments.
//
// Below half of the limit nobody waits. Above, writers are let in at the measured rate of write-backs divided by
// x/(1-x), where x is how much of the upper half is used: at three quarters they come as fast as blocks leave.
type pacer struct {
	perBlock float64 // ns that a write-back takes per block, running mean
	at       float64 // ns: when the next writer may go
	lastDone float64
}

const (
	paceMeans    = 16                     // weight of the past in the running mean
	paceSteepest = 64                     // bound of x/(1-x)
	delayMin     = 200 * time.Microsecond // shorter waits are saved up: timers are not that exact
	delayMax     = 250 * time.Millisecond
)

// done says that n blocks were written back, begun at began; flights do overlap.
func (p *pacer) done(began, now time.Duration, n int) {
	took := float64(now) - max(p.lastDone, float64(began))
	p.lastDone = float64(now)
	sample := max(took, 0) / float64(n)
	if p.perBlock == 0 {
		p.perBlock = sample
		return
	}
	p.perBlock += (sample - p.perBlock) / paceMeans
}

// delay returns how long a writer of n blocks waits when unwritten of limit blocks are dirty.
func (p *pacer) delay(now time.Duration, n, unwritten, limit int) time.Duration {
	x := (float64(unwritten) - float64(limit)/2) / (float64(limit) / 2)
	if x <= 0 {
		return 0
	}
	factor := float64(paceSteepest)
	if x < 1 {
		factor = min(x/(1-x), paceSteepest)
	}
	wait := p.at - float64(now)
	p.at = max(p.at, float64(now)) + float64(n)*p.perBlock*factor
	p.at = min(p.at, float64(now)+float64(delayMax))
	if wait < float64(delayMin) {
		return 0
	}
	return min(time.Duration(wait), delayMax)
}

// sleeper keeps timers for reuse.
type sleeper struct{ pool sync.Pool }

// sleep waits for d, or the end of ctx, without allocating.
func (s *sleeper) sleep(ctx context.Context, d time.Duration) error {
	if d <= 0 {
		return nil
	}
	t, ok := s.pool.Get().(*time.Timer)
	if ok {
		t.Reset(d)
	} else {
		t = time.NewTimer(d)
	}
	defer func() {
		t.Stop()
		s.pool.Put(t)
	}()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// signal wakes all who wait, and costs nothing while nobody does. Guarded by its owner's lock.
type signal struct{ ch chan struct{} }

func (s *signal) wait() <-chan struct{} {
	if s.ch == nil {
		s.ch = make(chan struct{})
	}
	return s.ch
}

func (s *signal) fire() {
	if s.ch != nil {
		close(s.ch)
		s.ch = nil
	}
}
