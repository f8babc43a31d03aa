package iothrottle

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// drive runs a window before a storage that does rate requests a second and takes least for one that is alone:
// a queue with a fixed latency before it, so that n at a time take max(least, n/rate).
func drive(w *window, now time.Duration, d, least time.Duration, rate float64, waiting bool) time.Duration {
	for end := now + d; now < end; {
		n := w.limit()
		latency := max(least, time.Duration(n/rate*float64(time.Second)))
		now += time.Duration(float64(latency) / n) // Little: one ends every latency/n
		w.ended(now, latency, 1, waiting)
	}
	return now
}

// TestWindowFindsTheStorage: the window settles where the storage is busy and its latency is bounded, measures
// the capacity, and follows when the storage becomes slower or faster.
func TestWindowFindsTheStorage(t *testing.T) {
	t.Parallel()
	w := newWindow()
	now := drive(&w, 0, 20*time.Second, time.Millisecond, 40_000, true)
	require.Greater(t, w.size, 40.0, "it keeps the storage busy")
	latency := w.size / 40_000
	require.Less(t, latency, 0.010, "and does not bury it")
	require.InEpsilon(t, 40_000, w.capacity, 0.05)

	now = drive(&w, now, 20*time.Second, time.Millisecond, 10_000, true)
	require.GreaterOrEqual(t, w.size, 32.0)
	require.Less(t, w.size/10_000, 0.02)
	require.InEpsilon(t, 10_000, w.capacity, 0.05)

	// A slow disk: 20 ms at best. Twice the smallest window is what it takes to keep it busy.
	now = drive(&w, now, 2*time.Minute, 20*time.Millisecond, 3200, true)
	require.Greater(t, w.size, 64.0)
	require.Less(t, w.size/3200, 0.1)
	require.InEpsilon(t, 3200, w.capacity, 0.05)

	size := w.size
	now = drive(&w, now, 10*time.Minute, 20*time.Millisecond, 3200, true)
	require.InEpsilon(t, size, w.size, 0.1, "and it does not drift under constant load")

	drive(&w, now, 2*time.Minute, 200*time.Microsecond, 400_000, true)
	require.InEpsilon(t, windowMax, w.size, 0.01, "never more than that, however fast it is")
}

// TestWindowStaysWhereNobodyWaits: latencies of requests that were not held back say nothing about the window.
func TestWindowStaysWhereNobodyWaits(t *testing.T) {
	t.Parallel()
	w := newWindow()
	drive(&w, 0, 10*time.Second, 10*time.Millisecond, 1000, false)
	require.Zero(t, w.probingN, "epochs have passed")
	require.InDelta(t, windowFirst, w.size, 0)
	require.Zero(t, w.capacity)
}

// TestWindowIsBounded feeds it extremes.
func TestWindowIsBounded(t *testing.T) {
	t.Parallel()
	w, now := newWindow(), time.Duration(0)
	for i := range 100_000 {
		latency := []time.Duration{0, 1, time.Hour, time.Millisecond}[i/5000%4]
		now += 10 * time.Millisecond
		w.ended(now, latency, 1, true)
		require.GreaterOrEqual(t, w.size, float64(windowMin))
		require.LessOrEqual(t, w.size, float64(windowMax))
	}
}
