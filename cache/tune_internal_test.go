package cache

import (
	"math"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// modelDisk is a storage of which requests at the same time share the bandwidth, each with a latency of its own.
type modelDisk struct {
	latency  float64 // s, of a request that is alone
	perBlock float64 // s, of the bandwidth
	perReq   float64 // s, of the bandwidth
	noise    float64
}

// run drives the tuner for a time with the closed loop that write-back is, and returns when it ended. Each request
// takes what it takes alone, or what the bandwidth leaves, whichever is longer.
func (m *modelDisk) run(t *tuner, r *rand.Rand, now, until time.Duration, busy bool) time.Duration {
	for now < until {
		mode := t.mode()
		one := m.perReq + m.perBlock*float64(mode.blocks)
		took := max(m.latency, one*float64(mode.depth)) * (1 + m.noise*(2*r.Float64()-1))
		gap := took / float64(mode.depth)
		now += time.Duration(gap * float64(time.Second))
		t.landed(now, time.Duration(took*float64(time.Second)), mode.blocks, busy)
	}
	return now
}

// power returns that of a mode on the disk, without noise.
func (m *modelDisk) power(mode workMode) float64 {
	took := max(m.latency, (m.perReq+m.perBlock*float64(mode.blocks))*float64(mode.depth))
	return powerRate*math.Log(float64(mode.depth*mode.blocks)/took) - math.Log(took)
}

// TestTunerFindsTheBest: on storages of several kinds, and after a change from one to another, what is in force comes
// to within one noise margin of the best there is, and never leaves the bounds.
func TestTunerFindsTheBest(t *testing.T) {
	t.Parallel()
	disks := map[string]modelDisk{
		"far and wide":       {latency: 0.02, perBlock: 1e-6, perReq: 1e-6, noise: 0.02},    // more under way is more done
		"near and narrow":    {latency: 0.0005, perBlock: 20e-6, perReq: 1e-6, noise: 0.02}, // all the same at any depth
		"costly requests":    {latency: 0.001, perBlock: 1e-6, perReq: 200e-6, noise: 0.02}, // longer is better
		"with a knee at 16":  {latency: 0.0064, perBlock: 25e-6, perReq: 1e-6, noise: 0.02},
		"noisy, far":         {latency: 0.02, perBlock: 1e-6, perReq: 1e-6, noise: 0.1},
		"noisy, and limited": {latency: 0.001, perBlock: 10e-6, perReq: 100e-6, noise: 0.1},
	}
	for name, m := range disks {
		for other, n := range disks {
			t.Run(name+", then "+other, func(t *testing.T) {
				t.Parallel()
				seeds := uint64(5)
				if testing.Short() {
					seeds = 1
				}
				for seed := range seeds {
					r := rand.New(rand.NewPCG(seed, 4))
					tu := newTuner(seed)
					now := m.run(tu, r, 0, 60*time.Second, true)
					near(t, &m, tu)
					n.run(tu, r, now, now+200*time.Second, true)
					near(t, &n, tu)
				}
			})
		}
	}
}

func near(t *testing.T, m *modelDisk, tu *tuner) {
	t.Helper()
	best, where := math.Inf(-1), workMode{}
	for _, b := range sizeSteps {
		for _, d := range depthSteps {
			if p := m.power(workMode{b, d}); p > best {
				best, where = p, workMode{b, d}
			}
		}
	}
	is := workMode{sizeSteps[tu.at[0]], depthSteps[tu.at[1]]}
	require.Greater(t, m.power(is), best-3*powerRate*math.Log(betterBy), "%+v, best is %+v", is, where)
}

// TestTunerNeedsWork: intervals in which the storage had nothing to do decide nothing.
func TestTunerNeedsWork(t *testing.T) {
	t.Parallel()
	m := modelDisk{latency: 0.02, perBlock: 1e-6, perReq: 1e-6}
	tu := newTuner(1)
	before := tu.at
	m.run(tu, rand.New(rand.NewPCG(1, 1)), 0, time.Minute, false)
	require.Equal(t, before, tu.at)
	m.run(tu, rand.New(rand.NewPCG(1, 1)), time.Minute, 2*time.Minute, true)
	require.Equal(t, adaptiveDepthMax, depthSteps[tu.at[1]])
}

// TestTunerRests: where nothing can be gained, less and less of the time goes into trials.
func TestTunerRests(t *testing.T) {
	t.Parallel()
	tu := newTuner(1)
	now, trials, all := time.Duration(0), 0, 0
	for range 400_000 {
		mode := tu.mode()
		now += time.Millisecond
		// The same power whatever is tried: the rate as at the start, the latency too.
		tu.landed(now, time.Millisecond, mode.blocks*pieceBlocks/mode.blocks, true)
		if now > 200*time.Second {
			all++
			if tu.phase >= 0 {
				trials++
			}
		}
	}
	require.Less(t, trials*10, all*2, "%d of %d", trials, all)
}

// TestReadAheadFollowsTheProduct: a closed loop of a reader at a rate of its own and fetches with a latency comes to
// twice the product, from either side, and never above what is set.
func TestReadAheadFollowsTheProduct(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		name    string
		wants   float64 // blocks a second that the reader would take
		latency time.Duration
		most    int
		want    int // blocks
	}{
		{"near and slow", 5000, time.Millisecond, 256, aheadFirst},
		{"in between", 10000, 5 * time.Millisecond, 256, 100},
		{"far and fast", 100000, 20 * time.Millisecond, 256, 256},
		{"held by its setting", 10000, 5 * time.Millisecond, 64, 64},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			var a aheadTuner
			now := time.Duration(0)
			require.Equal(t, tc.most, a.limit(tc.most), "before anything is known")
			for now < 10*time.Second {
				rate := min(tc.wants, float64(a.limit(tc.most))/tc.latency.Seconds())
				n := 8
				now += time.Duration(float64(n) / rate * float64(time.Second))
				a.read(now, n)
				a.fetched(tc.latency)
				require.LessOrEqual(t, a.limit(tc.most), tc.most)
			}
			require.InDelta(t, tc.want, a.limit(tc.most), 0.1*float64(tc.want))
			a.fetched(10 * time.Second) // and grows again with the latency
			require.Equal(t, tc.most, a.limit(tc.most))
		})
	}
}
