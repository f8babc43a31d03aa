package sim_test

import (
	"flag"
	"fmt"
	"log/slog"
	"os"
	"runtime"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet/internal/sim"
	"github.com/trivet-csi/trivet/replication/raftgroup"
)

// go test ./internal/sim -run 'TestSim$' -seeds 100 -first 1000 -v
//
//nolint:gochecknoglobals // flags of the test binary
var (
	firstSeed = flag.Uint64("first", 1, "first seed")
	_         = aliasSeed()
	seedN     = flag.Int("seeds", 0, "number of seeds; 0 means 2: the long run is make sim")
	duration  = flag.Duration("duration", 0, "how long faults last, simulated; 0 means 3 minutes, 20 s without -seeds")
	overlap   = flag.Bool("overlap", false, "log flushes overlap with sending in every seed, not in half of them")
	verbose   = flag.Bool("simlog", false, "write the log of all machines to standard error")
	writers   = flag.Bool("writers", false, "two write in every seed, not in some")
	only      = flag.String("only", "", "classes of faults to draw from, separated by commas; empty: as the seed says")
)

func aliasSeed() bool {
	flag.Uint64Var(firstSeed, "seed", 1, "the same as -first")
	return true
}

// longOnly skips what make test runs and make race, which takes five times as long for it, does not. What simulates for
// minutes is not for the race detector either: its runtime (Go 1.26) crashes once in some sixty runs of many timers in
// bubbles, in racereleaseacquireg.
func longOnly(t *testing.T) {
	t.Helper()
	if testing.Short() && *seedN == 0 {
		t.Skip("other tests run the same code under the race detector")
	}
}

// standstillMax is how long a seed may take in real time; it takes seconds, and a few minutes with -duration 10m.
const standstillMax = 10 * time.Minute

// noStandstill ends the program when a seed never ends: a goroutine that waits for a mutex holds the clock of its
// bubble, and whoever has the mutex may wait for that clock. It says who does not wait for the clock, which is whom to
// look at, as the last that is printed.
func noStandstill(seed uint64) (ended func() bool) {
	return time.AfterFunc(standstillMax, func() {
		all := make([]byte, 64<<20)
		all = all[:runtime.Stack(all, true)]
		for g := range strings.SplitSeq(string(all), "\n\n") {
			if head, _, _ := strings.Cut(g, "\n"); strings.Contains(head, "synctest bubble") &&
				!strings.Contains(head, "(durable)") {
				fmt.Fprintf(os.Stderr, "%s\n\n", g)
			}
		}
		fmt.Fprintf(os.Stderr, "seed %d stands still\n", seed)
		os.Exit(1)
	}).Stop
}

// checkMax bounds what porcupine may take for one block, in real time; it takes milliseconds.
const checkMax = 5 * time.Minute

func options(t testing.TB, seed uint64) sim.Options {
	t.Helper()
	o := sim.Options{Seed: seed, Duration: *duration, Overlap: *overlap, Writers: *writers}
	if o.Duration == 0 {
		o.Duration = 20 * time.Second
		if *seedN > 0 {
			o.Duration = 3 * time.Minute
		}
	}
	if *only != "" {
		for name := range strings.SplitSeq(*only, ",") {
			f, err := sim.ParseFault(name)
			require.NoError(t, err)
			o.Only = append(o.Only, f)
		}
	}
	if *verbose {
		o.Logger = slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug}))
	}
	return o
}

// run plays a seed in a bubble and judges its history outside, where clocks run.
func run(t *testing.T, o sim.Options) (r sim.Report, err error) {
	t.Helper()
	began := time.Now()
	defer noStandstill(o.Seed)()
	synctest.Test(t, func(t *testing.T) { r, err = sim.Run(t.Context(), o) })
	ran := time.Since(began)
	if err == nil {
		err = r.History.Check(checkMax)
	}
	t.Logf("seed %d: %v\n    porcupine: %d operations, %v; run %v, check %v", o.Seed, r,
		r.History.Len(), verdict(err), ran.Round(time.Millisecond), (time.Since(began) - ran).Round(time.Millisecond))
	return r, err
}

func verdict(err error) string {
	if err != nil {
		return "failed"
	}
	return "ok"
}

// TestSim is the simulator's main run: nothing acknowledged is lost, nothing fenced succeeds, what users
// saw is linearizable, replicas end up equal, and the volume serves once faults stop.
func TestSim(t *testing.T) {
	longOnly(t)
	n := *seedN
	if n == 0 {
		n = 2
	}
	var mu sync.Mutex
	var sum sim.Report
	t.Run("seeds", func(t *testing.T) {
		for seed := *firstSeed; seed < *firstSeed+uint64(n); seed++ {
			t.Run(fmt.Sprintf("seed=%d", seed), func(t *testing.T) {
				t.Parallel()
				r, err := run(t, options(t, seed))
				mu.Lock()
				sum.Add(r)
				mu.Unlock()
				require.NoError(t, err, "seed %d", seed)
			})
		}
	})
	t.Logf("all %d seeds from %d: %v", n, *firstSeed, sum)
	if t.Failed() || n < 6 || *only != "" {
		return
	}
	assert.Positive(t, sum.Crashes(), "crashes")
	assert.Positive(t, sum.TakeOvers, "take-overs")
	assert.Positive(t, sum.Leaders, "elections")
	assert.Positive(t, sum.Probes, "probes")
	assert.Positive(t, sum.Flushes, "logs compacted")
	if time.Duration(n)*options(t, 1).Duration < time.Hour {
		return
	}
	// A long run must have met every kind of fault, or its draw is wrong.
	for f, count := range sum.Faults {
		assert.Positive(t, count, "faults of class %v", sim.Fault(f))
	}
	assert.Positive(t, sum.StaleWrites, "writes of fenced epochs")
	assert.Positive(t, sum.Exits, "machines that stopped themselves")
	assert.Positive(t, sum.Restores, "snapshots installed")
	assert.Positive(t, sum.Changes, "changes of members")
	assert.Positive(t, sum.Clones, "clones")
	assert.Positive(t, sum.Repaired, "blocks repaired by scrubs")
}

// TestSimGenerations makes snapshots, goes back to them, lets blocks rot and cleans, all the time, among crashes and
// take-overs: what a snapshot shows never changes, and what rots is repaired and never served.
func TestSimGenerations(t *testing.T) {
	longOnly(t)
	var mu sync.Mutex
	var sum sim.Report
	n := uint64(max(2, *seedN))
	t.Run("seeds", func(t *testing.T) {
		for seed := *firstSeed; seed < *firstSeed+n; seed++ {
			t.Run(fmt.Sprintf("seed=%d", seed), func(t *testing.T) {
				t.Parallel()
				o := options(t, seed)
				o.Only = []sim.Fault{
					sim.FaultSnapshot, sim.FaultRollback, sim.FaultFlip, sim.FaultClean, sim.FaultCrash, sim.FaultTransfer,
					sim.FaultTakeOver, sim.FaultMove,
				}
				r, err := run(t, o)
				mu.Lock()
				sum.Add(r)
				mu.Unlock()
				require.NoError(t, err, "seed %d", seed)
			})
		}
	})
	assert.Positive(t, sum.Snapshots, "snapshots")
	assert.Positive(t, sum.SnapReads, "reads of snapshots")
	assert.Positive(t, sum.Scrubs, "scrubs")
	assert.Positive(t, sum.Repaired, "blocks repaired")
}

// TestSimMembers changes the members all the time, among crashes and cuts: what is committed stays so, and
// the changes get done.
func TestSimMembers(t *testing.T) {
	longOnly(t)
	var mu sync.Mutex
	var sum sim.Report
	n := uint64(max(3, *seedN))
	t.Run("seeds", func(t *testing.T) {
		for seed := *firstSeed; seed < *firstSeed+n; seed++ {
			t.Run(fmt.Sprintf("seed=%d", seed), func(t *testing.T) {
				t.Parallel()
				o := options(t, seed)
				o.Only = []sim.Fault{
					sim.FaultMove, sim.FaultReplace, sim.FaultCrash, sim.FaultRestart, sim.FaultIsolate, sim.FaultOneWay,
					sim.FaultTransfer, sim.FaultTakeOver, sim.FaultPause, sim.FaultHoldLog,
				}
				r, err := run(t, o)
				mu.Lock()
				sum.Add(r)
				mu.Unlock()
				require.NoError(t, err, "seed %d", seed)
			})
		}
	})
	assert.Positive(t, sum.Changes, "changes of members")
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
	longOnly(t)
	requireFound(t, func(o *sim.Options) {
		o.WrapMachine = func(m raftgroup.StateMachine) raftgroup.StateMachine { return skipFlush{m} }
	})
}

// A Raft log that is not on disk when it says so loses acknowledged writes with the power.
func TestSimFindsLyingDisks(t *testing.T) {
	longOnly(t)
	requireFound(t, func(o *sim.Options) { o.LyingDisks = true })
}

// The holder of an attachment that reads by session sees what a linearizable volume would show it, whichever
// replica answers: judged by porcupine like everything else.
func TestSimSession(t *testing.T) {
	longOnly(t)
	for seed := range uint64(3) {
		t.Run(fmt.Sprintf("seed=%d", seed+1), func(t *testing.T) {
			t.Parallel()
			o := options(t, seed+1)
			o.Session = true
			_, err := run(t, o)
			require.NoError(t, err)
		})
	}
}

// Two writers that come and go, each with a window of its own, write to the same blocks: what all users see is one
// linearizable history, and nothing is applied twice, over what the other has written meanwhile (H39).
func TestSimWriters(t *testing.T) {
	longOnly(t)
	var mu sync.Mutex
	var sum sim.Report
	n := uint64(max(2, *seedN))
	t.Run("seeds", func(t *testing.T) {
		for seed := *firstSeed; seed < *firstSeed+n; seed++ {
			t.Run(fmt.Sprintf("seed=%d", seed), func(t *testing.T) {
				t.Parallel()
				o := options(t, seed)
				if o.Writers = true; *duration == 0 && *seedN == 0 {
					o.Duration = 10 * time.Second
				}
				r, err := run(t, o)
				mu.Lock()
				sum.Add(r)
				mu.Unlock()
				require.NoError(t, err, "seed %d", seed)
			})
		}
	})
	assert.Positive(t, sum.WriterChanges, "writers that come and go")
}

// requireFound breaks something and demands that one of a few seeds sees it.
func requireFound(t *testing.T, spoil func(*sim.Options)) {
	t.Helper()
	t.Parallel()
	for seed := uint64(1); seed <= 8; seed++ {
		o := options(t, seed)
		o.Duration = 20 * time.Second
		o.Only = []sim.Fault{sim.FaultCrash, sim.FaultCrashAll, sim.FaultTakeOver}
		spoil(&o)
		if _, err := run(t, o); err != nil {
			t.Logf("seed %d: %v", seed, err)
			return
		}
	}
	require.Fail(t, "no seed has found it")
}
