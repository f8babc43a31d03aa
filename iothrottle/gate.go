package iothrottle

import (
	"context"
	"fmt"
	"time"
)

// gate is one point that requests pass one at a time, in the order they came: a pair of buckets and the
// queue before them.
//
//	reads  ── gate of reads ──┐
//	                          ├── gate of all ── the Device below
//	writes ── gate of writes ─┘
//
// A request keeps the turn of its own gate until it has passed the gate of all, so there are at most two
// before that one: reads and writes take turns there. With one queue for both, reads would wait behind
// writes that only a limit of writes holds back; with no queue, small requests would take every token of
// the common bucket before a large one has its share.
type gate struct {
	// turn is the head of the queue: whoever has put a token in it is next to go. Senders on a
	// channel are served first come, first served, which makes the whole queue so.
	turn chan struct{}

	timer *time.Timer // of whoever has the turn

	// Guarded by Throttle.mu.
	ops   bucket
	bytes bucket
}

func newGate() gate { return gate{turn: make(chan struct{}, 1)} }

func (g *gate) setRates(now time.Duration, iops, bytesPerSec int64, credit time.Duration) {
	g.ops.setRate(now, iops, credit)
	g.bytes.setRate(now, bytesPerSec, credit)
}

// take charges a request of n bytes if both buckets allow it, else it returns how long to wait.
func (g *gate) take(now time.Duration, n int) time.Duration {
	wait := max(g.ops.wait(now, 1), g.bytes.wait(now, float64(n)))
	if wait == 0 {
		g.ops.take(1)
		g.bytes.take(float64(n))
	}
	return wait
}

func (g *gate) giveBack(n int) {
	g.ops.giveBack(1)
	g.bytes.giveBack(float64(n))
}

// enter takes the turn, or returns why ctx ended.
func (g *gate) enter(ctx context.Context) error {
	select {
	case g.turn <- struct{}{}:
		return nil
	default:
	}
	select {
	case g.turn <- struct{}{}:
		return nil
	case <-ctx.Done():
		return ended(ctx)
	}
}

func (g *gate) leave() { <-g.turn }

// pause waits, until d is over or changed is closed. REQUIRES: the caller has the turn.
func (g *gate) pause(ctx context.Context, d time.Duration, changed <-chan struct{}) error {
	if g.timer == nil {
		g.timer = time.NewTimer(d)
	} else {
		g.timer.Reset(d)
	}
	defer g.timer.Stop()
	select {
	case <-g.timer.C:
	case <-changed:
	case <-ctx.Done():
		return ended(ctx)
	}
	return nil
}

func ended(ctx context.Context) error {
	return fmt.Errorf("wait for the rate limit: %w", context.Cause(ctx))
}
