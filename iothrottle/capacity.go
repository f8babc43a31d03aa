package iothrottle

import (
	"math"
	"time"
)

// window estimates how many requests the storage below should be given at a time: enough to keep it busy, and no
// more, for whatever is beyond that waits in a queue down there, where shares mean nothing.
//
// It is the controller of PARDA (Gulati, Ahmad and Waldspurger, "PARDA: Proportional Allocation of Resources for
// Distributed Storage Access", FAST 2009, equation 1), applied at the end of each epoch in which requests had to
// wait for the window:
//
//	w' = (1 − γ) w + γ (w · target/latency + β)
//
// with γ = 0.2, β = √w as in Netflix's concurrency limits, and target/latency at most 2. PARDA's target is a
// constant for an array; ours follows the storage: four times the lowest latency of an epoch within the last
// half minute to minute, but at least 5 ms, so that a slow disk is not starved of work and a fast one is not
// buried in it. Under constant load the latency that is seen is one that the window itself has made, and a target
// that follows it would grow for ever; so, as BBR looks for the round trip time (Cardwell et al., ACM Queue
// 2016), the window is at its least for two epochs of each half minute. By Little's law the window over the
// latency is the capacity, which is what the shares divide.
//
// It is pure: time comes in as a duration since any instant.
type window struct {
	size float64 // requests at a time

	began     time.Duration // of the epoch
	n         float64       // requests that ended in it, by cost
	endedN    int
	latencies time.Duration // sum, of those
	tight     bool          // somebody waited for the window in it

	lowest      [2]time.Duration // mean latency of an epoch: in this half minute, in the one before; 0 = none
	lowestSince time.Duration

	probingN int // epochs left of a look at the latency with the least window

	capacity float64 // requests/s, smoothed over the epochs in which somebody waited; 0 = not known yet
}

const (
	windowMin   = 32   // a lone QD32 is never held up, and two volumes share at that
	windowMax   = 1024 // some 64 MiB of largest requests
	windowFirst = 128  // what a replication.Volume sends at a time

	epochMin     = 100 * time.Millisecond
	epochEndedN  = 16 // so many must have ended, for the mean to mean something
	latencyRatio = 4
	targetMin    = 5 * time.Millisecond
	lowestKept   = 30 * time.Second
	gainMax      = 2
	smoothing    = 0.2
	probeEpochs  = 2 // in the first of which what was sent before still ends
)

func newWindow() window { return window{size: windowFirst, probingN: probeEpochs} }

// limit returns how many requests the storage should have now.
func (w *window) limit() float64 {
	if w.probingN > 0 {
		return windowMin
	}
	return w.size
}

// ended takes note of a request that ended after latency, and of whether others wait for the window.
func (w *window) ended(now, latency time.Duration, cost float64, waiting bool) {
	w.n += cost
	w.endedN++
	w.latencies += latency
	w.tight = w.tight || waiting
	if now-w.began >= epochMin && w.endedN >= epochEndedN {
		w.close(now)
	}
}

// close ends an epoch.
func (w *window) close(now time.Duration) {
	mean := max(w.latencies/time.Duration(w.endedN), 1)
	if now-w.lowestSince >= lowestKept {
		w.lowest[1], w.lowest[0] = w.lowest[0], 0
		w.lowestSince = now
		w.probingN = probeEpochs + 1 // this one is over
	}
	if w.lowest[0] == 0 || mean < w.lowest[0] {
		w.lowest[0] = mean
	}
	if w.probingN > 0 {
		w.probingN--
	} else if w.tight {
		ratio := min(float64(w.target())/float64(mean), gainMax)
		size := (1-smoothing)*w.size + smoothing*(w.size*ratio+math.Sqrt(w.size))
		w.size = min(max(size, windowMin), windowMax)
		rate := w.n / (now - w.began).Seconds()
		if w.capacity == 0 {
			w.capacity = rate
		}
		w.capacity += smoothing * (rate - w.capacity)
	}
	w.began, w.n, w.endedN, w.latencies, w.tight = now, 0, 0, 0, false
}

// target returns the latency above which the window shrinks.
func (w *window) target() time.Duration {
	lowest := w.lowest[0]
	if w.lowest[1] > 0 && w.lowest[1] < lowest {
		lowest = w.lowest[1]
	}
	return max(latencyRatio*lowest, targetMin)
}
