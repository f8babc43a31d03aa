package iothrottle_test

import (
	"context"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet/internal/faultdev"
	"github.com/trivet-csi/trivet/iothrottle"
)

// mixed keeps readersN readers and writersN writers of reqBytes busy until stop is called.
func mixed(t *testing.T, th *iothrottle.Throttle, readersN, writersN, reqBytes int) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	for i := range readersN + writersN {
		call := th.WriteAt
		if i < readersN {
			call = th.ReadAt
		}
		wg.Go(func() {
			p := make([]byte, reqBytes)
			for call(ctx, p, 0) == nil {
			}
		})
	}
	return func() { cancel(); wg.Wait() }
}

// TestSeparateAccuracy: each limit holds to within 3 % over 10 s beside the others, and what one
// direction is held back for does not hold back the other.
func TestSeparateAccuracy(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name                   string
		limits                 iothrottle.Limits
		reqBytes               int
		wantReadN, wantWritesN float64 // per second
	}{
		{"IOPS", iothrottle.Limits{ReadIOPS: 100, WriteIOPS: 10_000}, 4096, 100, 10_000},
		{"bytes", iothrottle.Limits{ReadBytesPerSec: 1 << 30, WriteBytesPerSec: 1 << 20}, 64 << 10, 16384, 16},
		{"one of each", iothrottle.Limits{ReadIOPS: 100, WriteBytesPerSec: 1 << 20}, 4096, 100, 256},
		{"total is shared", iothrottle.Limits{IOPS: 1000}, 4096, 500, 500},
		{"total is left by reads", iothrottle.Limits{IOPS: 1000, ReadIOPS: 100}, 4096, 100, 900},
		{
			"total bytes is left by writes",
			iothrottle.Limits{BytesPerSec: 10 << 20, WriteBytesPerSec: 1 << 20},
			4096, 9 * 256, 256,
		},
		{
			"the tightest holds",
			iothrottle.Limits{IOPS: 10_000, ReadIOPS: 500, ReadBytesPerSec: 4096 * 100, WriteIOPS: 300},
			4096, 100, 300,
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				th := iothrottle.New(&sink{}, c.limits)
				stop := mixed(t, th, 4, 8, c.reqBytes)
				var before iothrottle.Counts
				window := 10*time.Second - 1
				for range 3 {
					time.Sleep(window)
					synctest.Wait()
					now := th.Counts()
					assert.InEpsilon(t, 10*c.wantReadN, float64(now.ReadN-before.ReadN), 0.03, "reads")
					assert.InEpsilon(t, 10*c.wantWritesN, float64(now.WriteN-before.WriteN), 0.03, "writes")
					assert.Equal(t, now.ReadN*int64(c.reqBytes), now.ReadBytes)
					assert.Equal(t, now.WriteN*int64(c.reqBytes), now.WriteBytes)
					before, window = now, 10*time.Second
				}
				stop()
			})
		})
	}
}

// TestLargeIsNotStarvedBySmall: where both wait for a common budget, large reads have their turns among
// small writes.
func TestLargeIsNotStarvedBySmall(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		th := iothrottle.New(&sink{}, iothrottle.Limits{BytesPerSec: 10 << 20})
		stopSmall := mixed(t, th, 0, 8, 4096)
		p, start := make([]byte, 1<<20), time.Now()
		for range 10 {
			require.NoError(t, th.ReadAt(t.Context(), p, 0))
		}
		assert.Less(t, time.Since(start), 2*time.Second, "10 MiB at 10 MiB/s, with a small write between each two")
		stopSmall()
	})
}

// TestBurst: credit is earned while idle, up to what was asked for, spent at any speed, and never given.
func TestBurst(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := &sink{}
		th := iothrottle.New(s, iothrottle.Limits{IOPS: 100, Burst: 30 * time.Second})
		spend := func(during time.Duration) int64 {
			before := s.reqN.Load()
			stop := load(t, th, 8, 4096)
			time.Sleep(during)
			synctest.Wait()
			stop()
			return s.reqN.Load() - before
		}
		require.EqualValues(t, 10, spend(0), "a volume begins with 100 ms worth")
		time.Sleep(10 * time.Second)
		require.InDelta(t, 1000, spend(0), 10, "10 s saved up")
		time.Sleep(time.Hour)
		require.InDelta(t, 3010, spend(0), 10, "30 s at most, and the usual 100 ms")
		require.InDelta(t, 1000, spend(10*time.Second), 10, "then the rate, no more")

		time.Sleep(20 * time.Second)
		th.SetLimits(iothrottle.Limits{IOPS: 100, Burst: 5 * time.Second})
		require.InDelta(t, 510, spend(0), 10, "less may be kept from now on")
		th.SetLimits(iothrottle.Limits{IOPS: 100, Burst: 30 * time.Second})
		require.LessOrEqual(t, spend(0), int64(1), "a longer burst is no gift")
		th.SetLimits(iothrottle.Limits{})
		th.SetLimits(iothrottle.Limits{IOPS: 100, Burst: 30 * time.Second})
		require.LessOrEqual(t, spend(0), int64(10), "nor is a limit that was away")
	})
}

// TestBurstDoesNotHoldBackLargeRequests: they need not find what could be saved up.
func TestBurstDoesNotHoldBackLargeRequests(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		th := iothrottle.New(&sink{}, iothrottle.Limits{BytesPerSec: 1000, Burst: time.Hour})
		start := time.Now()
		require.NoError(t, th.WriteAt(t.Context(), make([]byte, 10_000), 0))
		require.Zero(t, time.Since(start))
		require.NoError(t, th.WriteAt(t.Context(), make([]byte, 10_000), 0))
		require.Equal(t, 10*time.Second, time.Since(start))
	})
}

// TestGivenUpInTheCommonQueueIsNotCharged: tokens of the own limit go back when the wait for the common
// one is given up.
func TestGivenUpInTheCommonQueueIsNotCharged(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := &sink{}
		th := iothrottle.New(s, iothrottle.Limits{IOPS: 2, WriteIOPS: 1, BytesPerSec: 1 << 20, WriteBytesPerSec: 4096})
		require.NoError(t, th.ReadAt(t.Context(), nil, 0)) // takes the common token
		ctx, cancel := context.WithTimeout(t.Context(), 250*time.Millisecond)
		defer cancel()
		require.ErrorIs(t, th.WriteAt(ctx, make([]byte, 409), 0), context.DeadlineExceeded)
		start := time.Now()
		require.NoError(t, th.WriteAt(t.Context(), make([]byte, 409), 0))
		require.Equal(t, 250*time.Millisecond, time.Since(start), "waits for the common token, not for its own as well")
		require.EqualValues(t, 1, th.Counts().WriteN)
		require.EqualValues(t, 1, th.Counts().WaitedN)
	})
}

// meter counts what it is told.
type meter struct{ entered, left, held atomic.Int64 }

func (m *meter) Enter() { m.entered.Add(1) }

func (m *meter) Leave(d time.Duration) { m.left.Add(1); m.held.Add(int64(d)) }

func TestMeterIsToldOfEachRequest(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := &meter{}
		th := iothrottle.NewWith(faultdev.NewMem(1<<20), iothrottle.Limits{WriteIOPS: 10}, iothrottle.Options{Meter: m})
		p := make([]byte, 4096)
		require.NoError(t, th.WriteAt(t.Context(), p, 0))
		require.NoError(t, th.ReadAt(t.Context(), p, 0))
		require.Zero(t, m.held.Load())
		require.NoError(t, th.WriteZeroes(t.Context(), 0, 4096))
		require.NoError(t, th.Discard(t.Context(), 0, 4096))
		require.EqualValues(t, 4, m.left.Load())
		require.Equal(t, 200*time.Millisecond, time.Duration(m.held.Load()))
		require.Equal(t, iothrottle.Counts{ReadN: 1, WriteN: 3, ReadBytes: 4096, WriteBytes: 4096, WaitedN: 2}, th.Counts())

		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Millisecond)
		defer cancel()
		require.Error(t, th.WriteAt(ctx, p, 0))
		require.EqualValues(t, 5, m.entered.Load())
		require.EqualValues(t, 5, m.left.Load(), "one that gives up leaves as well")
		require.Equal(t, 230*time.Millisecond, time.Duration(m.held.Load()))
	})
}

func TestWaitingAllocatesNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) { // so that no slack comes back while the machine has other things to do
		th := iothrottle.New(&sink{}, iothrottle.Limits{IOPS: 10_000})
		p, ctx := make([]byte, 4096), t.Context()
		assert.Zero(t, testing.AllocsPerRun(3000, func() { _ = th.WriteAt(ctx, p, 0) })) // more than the slack: it waits
		require.EqualValues(t, 2001, th.Counts().WaitedN)
	})
}

// BenchmarkRealTime runs a limit against the machine's own clock, for a look at the accuracy with late
// timers: reached/asked should be within 3 % of 1. It is a measurement and asserts nothing.
func BenchmarkRealTime(b *testing.B) {
	for _, c := range []struct {
		name     string
		limits   iothrottle.Limits
		reqBytes int
		asked    float64 // requests per second
	}{
		{"100 IOPS", iothrottle.Limits{IOPS: 100}, 4096, 100},
		{"10000 IOPS", iothrottle.Limits{IOPS: 10_000}, 4096, 10_000},
		{"1 MiB per s", iothrottle.Limits{BytesPerSec: 1 << 20}, 4096, 256},
		{"1 GiB per s", iothrottle.Limits{BytesPerSec: 1 << 30}, 64 << 10, 16384},
	} {
		b.Run(c.name, func(b *testing.B) {
			th := iothrottle.New(faultdev.NewMem(1<<20), c.limits)
			ctx, cancel := context.WithCancel(b.Context())
			defer cancel()
			var wg sync.WaitGroup
			for range 8 {
				wg.Go(func() {
					p := make([]byte, c.reqBytes)
					for th.WriteAt(ctx, p, 0) == nil {
					}
				})
			}
			for b.Loop() {
				began, before := time.Now(), th.Counts().WriteN
				<-time.After(10 * time.Second)
				n := th.Counts().WriteN - before
				b.ReportMetric(float64(n)/time.Since(began).Seconds()/c.asked, "reached/asked")
			}
			cancel()
			wg.Wait()
		})
	}
}
