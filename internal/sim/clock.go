package sim

import (
	"sync/atomic"
	"time"
)

// bootClock is a machine's clock that runs on while it is suspended, CLOCK_BOOTTIME. It never goes back, whatever is
// done to the time of day; forward it may jump by any amount, which is how long the machine was suspended.
// A bubble has one monotonic clock, so a jump here makes a machine look suspended that was not: the other way
// round than in life, where it is the monotonic clock that has stood still.
type bootClock struct {
	rate   float64 // 0 means 1
	jumped atomic.Int64
}

// bootEpoch is the origin of all boot clocks.
func bootEpoch() time.Time { return time.Unix(0, 0) }

// now returns the time since a moment before all runs.
func (c *bootClock) now() time.Duration {
	t := time.Since(bootEpoch())
	if c.rate > 0 {
		t = time.Duration(float64(t) * c.rate)
	}
	return t + time.Duration(c.jumped.Load())
}

// jump turns the clock forward.
func (c *bootClock) jump(d time.Duration) { c.jumped.Add(int64(d)) }
