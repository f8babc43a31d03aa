package stage_test

import (
	"math"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/internal/stage"
)

const vol = trivet.VolumeID(7)

// TestMeterAgainstTheDefinitions compares count, mean, variance, quantiles and cumulative counts of random
// times of six orders of magnitude with what their definitions give.
func TestMeterAgainstTheDefinitions(t *testing.T) {
	t.Parallel()
	for seed := range uint64(20) {
		rng := rand.New(rand.NewPCG(seed, 1))
		m := stage.NewRegistry().Open(vol).Meter(stage.Apply)
		times := make([]time.Duration, 1+rng.IntN(5000))
		var sum, squares float64
		for i := range times {
			times[i] = time.Duration(math.Exp(rng.Float64()*math.Log(20e9))) * 2 // 2 ns to 40 s
			m.Observe(times[i])
			sum += times[i].Seconds()
		}
		mean := sum / float64(len(times))
		for _, d := range times {
			squares += (d.Seconds() - mean) * (d.Seconds() - mean)
		}
		got := m.Totals()
		require.EqualValues(t, len(times), got.LeftN)
		require.EqualValues(t, len(times), got.ArrivedN)
		require.InDelta(t, mean, got.Mean().Seconds(), 1e-8, "seed %d", seed)
		require.InDelta(t, squares/float64(len(times)), got.Variance(), 1e-6*squares+1e-12, "seed %d", seed)
		slices.Sort(times)
		for _, q := range []float64{0, 0.5, 0.9, 0.99, 1} {
			want := times[max(int(math.Ceil(q*float64(len(times)))), 1)-1]
			is := got.Quantile(q)
			require.Greater(t, is, want, "seed %d, quantile %v", seed, q)
			require.LessOrEqual(t, is, want+want/8+64*time.Nanosecond, "seed %d, quantile %v", seed, q)
		}
		below, all := got.Cumulative()
		require.EqualValues(t, len(times), all)
		for i, bound := range stage.Bounds {
			n := 0
			for _, d := range times {
				if d < bound {
					n++
				}
			}
			require.EqualValues(t, n, below[i], "seed %d, below %v", seed, bound)
		}
	}
}

func TestMeterTakesAnything(t *testing.T) {
	t.Parallel()
	m := stage.NewRegistry().Open(vol).Meter(stage.Read)
	for _, d := range []time.Duration{-1, 0, 1, 63, 64, math.MaxInt64} {
		m.Observe(d)
	}
	got := m.Totals()
	assert.EqualValues(t, 6, got.LeftN)
	assert.Equal(t, 64*time.Nanosecond, got.Quantile(0.5))
	assert.Greater(t, got.Quantile(1), time.Minute)
	assert.Zero(t, new(stage.Totals).Quantile(1))
	assert.Zero(t, new(stage.Totals).Variance())
}

func TestTotalsSub(t *testing.T) {
	t.Parallel()
	m := stage.NewRegistry().Open(vol).Meter(stage.Read)
	m.Observe(time.Hour)
	m.AddBytes(5)
	before := m.Totals()
	m.Observe(time.Millisecond)
	m.Observe(3 * time.Millisecond)
	m.AddBytes(7)
	got := m.Totals()
	got.Sub(before)
	assert.EqualValues(t, 2, got.LeftN)
	assert.EqualValues(t, 7, got.Bytes)
	assert.Equal(t, 2*time.Millisecond, got.Mean())
	assert.InDelta(t, 1e-6, got.Variance(), 1e-9)
	assert.Less(t, got.Quantile(1), 4*time.Millisecond)
}

func TestRegistryForgetsWhatNobodyServes(t *testing.T) {
	t.Parallel()
	r := stage.NewRegistry()
	path, replica := r.Open(vol), r.Open(vol)
	require.Same(t, path, replica)
	path.Meter(stage.Throttle).Observe(1)
	path.Close()
	require.Len(t, r.Volumes(), 1, "the replica still serves it")
	replica.Close()
	require.Empty(t, r.Volumes())
	_, err := r.Watch(t.Context(), vol, time.Second)
	require.ErrorIs(t, err, trivet.ErrNotFound)
	again := r.Open(vol)
	stages, _ := again.Used()
	require.Empty(t, stages, "one that comes back begins anew")
}

func TestNilMeasuresNothing(t *testing.T) {
	t.Parallel()
	var r *stage.Registry
	v := r.Open(vol)
	m := v.Meter(stage.Read)
	m.Enter()
	m.Leave(1)
	m.Observe(1)
	m.AddBytes(1)
	m.Begin().End()
	v.Close()
	require.Empty(t, r.Volumes())
}

func TestObservingAllocatesNothing(t *testing.T) {
	v := stage.NewRegistry().Open(vol)
	assert.Zero(t, testing.AllocsPerRun(1000, func() {
		v.Meter(stage.Write).Begin().End()
		v.Meter(stage.Write).AddBytes(4096)
	}))
}

// TestWatchSeesWhatIsThere runs a stage of known behaviour: 40 requests a second, each of them 50 ms and 150 ms
// by turns, so that 4 are inside at a time, and checks every figure of the window; Little's law among them,
// whose two sides are counted apart.
func TestWatchSeesWhatIsThere(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := stage.NewRegistry()
		m := r.Open(vol).Meter(stage.Replication)
		m.Observe(time.Hour) // before the window
		var wg sync.WaitGroup
		wg.Go(func() {
			for i := range 600 {
				took := time.Duration(50+i%2*100) * time.Millisecond
				wg.Go(func() {
					span := m.Begin()
					time.Sleep(took)
					m.AddBytes(4096)
					span.End()
				})
				time.Sleep(25 * time.Millisecond)
			}
		})
		time.Sleep(time.Second + time.Microsecond)
		w, err := r.Watch(t.Context(), vol, 10*time.Second)
		require.NoError(t, err)
		assert.InDelta(t, 10, w.Seconds, 1e-6)
		require.Len(t, w.Stages, 1)
		s := w.Stages[0]
		assert.Equal(t, "replication", s.Stage)
		assert.EqualValues(t, 400, s.Count)
		assert.EqualValues(t, 400*4096, s.Bytes)
		assert.InDelta(t, 40, s.ArrivalRate, 0.2)
		assert.InDelta(t, 40, s.DepartureRate, 0.2)
		assert.InDelta(t, 0.1, s.Mean, 1e-6)
		assert.InDelta(t, 0.05, s.StdDev, 1e-6)
		assert.InDelta(t, 4, s.Little, 0.05)
		assert.InDelta(t, 4, s.Concurrency, 0.1, "sampled, not computed")
		assert.InDelta(t, 1, s.Utilisation, 0.01)
		assert.InDelta(t, 40, s.ServiceRate, 0.5)
		assert.Greater(t, s.Samples, int64(300))
		assert.InDelta(t, 0.15, s.P99, 0.02)
		wg.Wait()
	})
}

// TestWatchSeesAStuckRequest: one that never ends is in the concurrency, though it never left.
func TestWatchSeesAStuckRequest(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := stage.NewRegistry()
		r.Open(vol).Meter(stage.LeaderLog).Enter()
		w, err := r.Watch(t.Context(), vol, time.Second)
		require.NoError(t, err)
		s := w.Stages[0]
		assert.InDelta(t, 1, s.Concurrency, 1e-9)
		assert.InDelta(t, 1, s.Utilisation, 1e-9)
		assert.Zero(t, s.Count)
		assert.Zero(t, s.Little, "which Little's law cannot see: the two differ")
	})
}

func TestWatchRefusals(t *testing.T) {
	t.Parallel()
	r := stage.NewRegistry()
	r.Open(vol)
	for _, d := range []time.Duration{-1, 0, stage.WindowMax + 1} {
		_, err := r.Watch(t.Context(), vol, d)
		require.ErrorIs(t, err, trivet.ErrInvalid)
	}
}

func BenchmarkSpan(b *testing.B) {
	m := stage.NewRegistry().Open(vol).Meter(stage.Write)
	b.ReportAllocs()
	for b.Loop() {
		m.Begin().End()
	}
}
