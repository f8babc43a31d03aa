package sim_test

import (
	"flag"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet/internal/sim"
	"github.com/trivet-csi/trivet/replication/raftgroup"
)

// go test ./internal/sim -run TestSim -seeds 100 -seed 1000 -v
//
//nolint:gochecknoglobals // flags of the test binary
var (
	firstSeed = flag.Uint64("seed", 1, "first seed")
	seedN     = flag.Int("seeds", 0, "number of seeds; 0 means 10, or 2 with -short")
	duration  = flag.Duration("duration", time.Minute, "how long faults last, in the simulator's time")
	verbose   = flag.Bool("simlog", false, "write the log of all machines to standard error")
)

func options(seed uint64) sim.Options {
	o := sim.Options{Seed: seed, Duration: *duration}
	if *verbose {
		o.Logger = slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug}))
	}
	return o
}

// TestSim is the simulator's main run: nothing acknowledged is lost, nothing fenced succeeds, replicas
// end up equal, and the volume serves once faults stop.
func TestSim(t *testing.T) {
	n := *seedN
	if n == 0 {
		n = 10
		if testing.Short() {
			n = 2
		}
	}
	var mu sync.Mutex
	var sum sim.Report
	t.Run("seeds", func(t *testing.T) {
		for seed := *firstSeed; seed < *firstSeed+uint64(n); seed++ {
			t.Run(fmt.Sprintf("seed=%d", seed), func(t *testing.T) {
				t.Parallel()
				synctest.Test(t, func(t *testing.T) {
					r, err := sim.Run(t.Context(), options(seed))
					t.Logf("seed %d: %v", seed, r)
					require.NoError(t, err, "seed %d", seed)
					mu.Lock()
					defer mu.Unlock()
					sum.Crashes += r.Crashes
					sum.TakeOvers += r.TakeOvers
					sum.Restores += r.Restores
					sum.Flushes += r.Flushes
					sum.Holds += r.Holds
				})
			})
		}
	})
	if t.Failed() || n < 10 {
		return
	}
	assert.Greater(t, sum.Crashes, n, "crashes")
	assert.Greater(t, sum.TakeOvers, n, "take-overs")
	assert.Positive(t, sum.Holds, "held messages")
	assert.Positive(t, sum.Restores, "snapshots installed")
	assert.Greater(t, sum.Flushes, n, "logs compacted")
}

// skipFlush claims that all is flushed and flushes nothing (H1).
type skipFlush struct{ raftgroup.StateMachine }

func (m skipFlush) Flush() (uint64, error) {
	index, _ := m.Applied()
	return index, nil
}

// A log that is cut before the engine's state is on disk must be noticed, or the simulator is worth
// nothing (H1).
func TestSimFindsLogCutWithoutFlush(t *testing.T) {
	requireFound(t, func(o *sim.Options) {
		o.WrapMachine = func(m raftgroup.StateMachine) raftgroup.StateMachine { return skipFlush{m} }
	})
}

// A Raft log that is not on disk when it says so loses acknowledged writes with the power.
func TestSimFindsLyingDisks(t *testing.T) {
	requireFound(t, func(o *sim.Options) { o.LyingDisks = true })
}

// requireFound breaks something and demands that the simulator sees it.
func requireFound(t *testing.T, spoil func(*sim.Options)) {
	t.Helper()
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		o := options(1)
		o.Duration = 20 * time.Second
		spoil(&o)
		r, err := sim.Run(t.Context(), o)
		t.Logf("%v: %v", r, err)
		require.Error(t, err)
	})
}
