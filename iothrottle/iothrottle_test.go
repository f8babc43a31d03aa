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

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/internal/faultdev"
	"github.com/trivet-csi/trivet/internal/faultdev/devtest"
	"github.com/trivet-csi/trivet/iothrottle"
)

func TestConforms(t *testing.T) {
	t.Parallel()
	opts := devtest.Options{OpsN: 200}
	devtest.Run(t, throttled(iothrottle.Limits{}), opts)
	synctest.Test(t, func(t *testing.T) {
		devtest.Run(t, throttled(iothrottle.Limits{IOPS: 1000, BytesPerSec: 10 << 20}), opts)
	})
}

func throttled(l iothrottle.Limits) trivet.Device { return iothrottle.New(faultdev.NewMem(8<<20), l) }

// sink is a Device that only counts, so that a gigabyte costs nothing.
type sink struct {
	trivet.Device
	reqN, byteN, flushN atomic.Int64
}

func (s *sink) WriteAt(_ context.Context, p []byte, _ int64) error {
	s.reqN.Add(1)
	s.byteN.Add(int64(len(p)))
	return nil
}

func (s *sink) ReadAt(ctx context.Context, p []byte, off int64) error { return s.WriteAt(ctx, p, off) }
func (s *sink) Discard(context.Context, int64, int64) error           { s.reqN.Add(1); return nil }
func (s *sink) WriteZeroes(context.Context, int64, int64) error       { s.reqN.Add(1); return nil }
func (s *sink) Flush(context.Context) error                           { s.flushN.Add(1); return nil }

// load keeps workersN writers of reqBytes busy until the returned function is called.
func load(t *testing.T, dev trivet.Device, workersN, reqBytes int) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	for range workersN {
		wg.Go(func() {
			p := make([]byte, reqBytes)
			for dev.WriteAt(ctx, p, 0) == nil {
			}
		})
	}
	return func() { cancel(); wg.Wait() }
}

func TestAccuracy(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name     string
		limits   iothrottle.Limits
		reqBytes int
		wantReqN float64 // per second
	}{
		{"100 IOPS", iothrottle.Limits{IOPS: 100}, 4096, 100},
		{"10 000 IOPS", iothrottle.Limits{IOPS: 10_000}, 4096, 10_000},
		{"1 MiB/s in 4 KiB", iothrottle.Limits{BytesPerSec: 1 << 20}, 4096, 256},
		{"1 MiB/s in 1 MiB", iothrottle.Limits{BytesPerSec: 1 << 20}, 1 << 20, 1},
		{"1 GiB/s in 64 KiB", iothrottle.Limits{BytesPerSec: 1 << 30}, 64 << 10, 16384},
		{"1 GiB/s in 1 MiB", iothrottle.Limits{BytesPerSec: 1 << 30}, 1 << 20, 1024},
		{"both, requests bind", iothrottle.Limits{IOPS: 100, BytesPerSec: 1 << 30}, 4096, 100},
		{"both, bytes bind", iothrottle.Limits{IOPS: 10_000, BytesPerSec: 1 << 20}, 4096, 256},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := &sink{}
				stop := load(t, iothrottle.New(s, c.limits), 8, c.reqBytes)
				before, window := int64(0), 10*time.Second-1 // the instant 10 s belongs to the next window
				for range 3 {                                // the first holds the saved-up burst too
					time.Sleep(window)
					synctest.Wait()
					now := s.reqN.Load()
					assert.InEpsilon(t, 10*c.wantReqN, float64(now-before), 0.03)
					before, window = now, 10*time.Second
				}
				stop()
			})
		})
	}
}

func TestIdleSavesAtMostTheBurst(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := &sink{}
		th := iothrottle.New(s, iothrottle.Limits{IOPS: 1000})
		time.Sleep(time.Hour)
		stop := load(t, th, 4, 4096)
		synctest.Wait()
		require.EqualValues(t, 100, s.reqN.Load(), "100 ms worth, in one instant")
		stop()
	})
}

func TestRateBelowOneBurstStillServes(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := &sink{}
		th := iothrottle.New(s, iothrottle.Limits{IOPS: 1, BytesPerSec: 1})
		start := time.Now()
		require.NoError(t, th.WriteAt(t.Context(), make([]byte, 4096), 0), "the first request goes at once")
		require.Zero(t, time.Since(start))
		require.NoError(t, th.WriteAt(t.Context(), make([]byte, 4096), 0))
		require.Equal(t, 4096*time.Second, time.Since(start), "the second waits until the first is paid")
	})
}

func TestLiveChangeReachesWaiters(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := &sink{}
		th := iothrottle.New(s, iothrottle.Limits{IOPS: 1})
		stop := load(t, th, 16, 4096)
		time.Sleep(10*time.Second + 500*time.Millisecond)
		synctest.Wait()
		require.EqualValues(t, 11, s.reqN.Load())

		for _, iops := range []int64{1000, 50, 10_000, 100} {
			before := s.reqN.Load()
			th.SetLimits(iothrottle.Limits{IOPS: iops})
			require.Equal(t, iops, th.Limits().IOPS)
			time.Sleep(10 * time.Second)
			synctest.Wait()
			require.InEpsilon(t, 10*iops, s.reqN.Load()-before, 0.03, "%d IOPS", iops)
		}
		stop()
		th.SetLimits(iothrottle.Limits{})
		start := time.Now()
		for range 1000 {
			require.NoError(t, th.WriteAt(t.Context(), nil, 0))
		}
		require.Zero(t, time.Since(start), "unlimited")
	})
}

func TestFirstComeFirstServed(t *testing.T) {
	t.Parallel()
	for _, limits := range []iothrottle.Limits{
		{IOPS: 10, BytesPerSec: 10 * 4096},
		{WriteIOPS: 10, WriteBytesPerSec: 10 * 4096},
	} {
		synctest.Test(t, func(t *testing.T) {
			dev := faultdev.Wrap(faultdev.NewMem(1 << 20))
			th := iothrottle.New(dev, limits)
			var wg sync.WaitGroup
			for i := range 20 { // large and small by turns: the small must not overtake
				n := 4096 * (1 + i%2*3)
				wg.Go(func() { assert.NoError(t, th.WriteAt(t.Context(), make([]byte, n), int64(i)*4096)) })
				synctest.Wait()
			}
			wg.Wait()
			for i, op := range dev.Ops() {
				require.EqualValues(t, i*4096, op.OffBytes)
			}
		})
	}
}

func TestContextEndsTheWaitAndIsNotCharged(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := &sink{}
		th := iothrottle.New(s, iothrottle.Limits{IOPS: 1})
		require.NoError(t, th.WriteAt(t.Context(), nil, 0))
		start := time.Now()
		var wg sync.WaitGroup
		for range 5 { // one waits at the head, the others behind it
			wg.Go(func() {
				ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
				defer cancel()
				assert.ErrorIs(t, th.WriteAt(ctx, nil, 0), context.DeadlineExceeded)
			})
		}
		wg.Wait()
		require.Equal(t, 500*time.Millisecond, time.Since(start))
		require.NoError(t, th.WriteAt(t.Context(), nil, 0))
		require.Equal(t, time.Second, time.Since(start), "those that gave up cost nothing")
		require.EqualValues(t, 2, s.reqN.Load())
	})
}

func TestWhatIsCharged(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := &sink{}
		th := iothrottle.New(s, iothrottle.Limits{IOPS: 10, BytesPerSec: 1 << 20})
		ctx, start := t.Context(), time.Now()
		step := func(want time.Duration, err error) {
			t.Helper()
			require.NoError(t, err)
			require.Equal(t, want, time.Since(start))
		}
		step(0, th.ReadAt(ctx, nil, 0))
		step(0, th.Flush(ctx)) // free, although the bucket is empty
		step(100*time.Millisecond, th.Discard(ctx, 0, 1<<40))
		step(200*time.Millisecond, th.WriteZeroes(ctx, 0, 1<<40)) // length is no data
		step(300*time.Millisecond, th.ReadAt(ctx, make([]byte, 1<<20), 0))
		step(1300*time.Millisecond, th.ReadAt(ctx, make([]byte, 1<<20), 0))
	})
}

// TestNothingIsLockedWhileARequestIsServed holds a request in the Device below: others pass.
func TestNothingIsLockedWhileARequestIsServed(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		dev := faultdev.Wrap(faultdev.NewMem(1 << 20))
		gate := dev.Hold(faultdev.OfKind(faultdev.Write))
		th := iothrottle.New(dev, iothrottle.Limits{IOPS: 10})
		done := make(chan error, 1)
		go func() { done <- th.WriteAt(t.Context(), make([]byte, 4096), 0) }()
		<-gate.Arrived()
		require.NoError(t, th.ReadAt(t.Context(), make([]byte, 4096), 0))
		th.SetLimits(iothrottle.Limits{IOPS: 20})
		gate.Open()
		require.NoError(t, <-done)
	})
}
