package raftgroup

import (
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/cockroachdb/pebble/v2/vfs/errorfs"
	"github.com/stretchr/testify/require"
)

// crashAt is a filesystem that photographs its disk right before its nth change, as a crash there
// would leave it, and goes on.
type crashAt struct {
	vfs.FS
	mem *vfs.MemFS

	mu      sync.Mutex
	n       int
	count   int
	percent int
	rng     *rand.Rand
	photo   *vfs.MemFS
	onCrash func()
}

func newCrashAt(mem *vfs.MemFS, n, percent int, seed uint64) *crashAt {
	c := &crashAt{mem: mem, n: n, percent: percent, rng: rand.New(rand.NewPCG(seed, uint64(n)))}
	c.FS = errorfs.Wrap(mem, c)
	return c
}

func (c *crashAt) String() string { return "crash" }

func (c *crashAt) MaybeError(op errorfs.Op) error {
	if op.Kind.ReadOrWrite() != errorfs.OpIsWrite {
		return nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.count == c.n {
		c.photo = c.mem.CrashClone(vfs.CrashCloneCfg{UnsyncedDataPercent: c.percent, RNG: c.rng})
		if c.onCrash != nil {
			c.onCrash()
		}
	}
	c.count++
	return nil
}

// crashed returns the disk as the crash left it; nil when there were not so many changes.
func (c *crashAt) crashed() *vfs.MemFS {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.photo
}

// atEveryCrash calls run with crashes before change 0, 1, … until run makes no more changes, and
// each time with none, some and all of the unsynced data kept.
func atEveryCrash(t *testing.T, run func(t *testing.T, n, percent int) (again bool)) {
	t.Helper()
	for _, percent := range []int{0, 30, 100} {
		n := 0
		for run(t, n, percent) {
			n++
		}
		require.Positive(t, n, "no change was ever made")
	}
}

func memDir(t *testing.T) (*vfs.MemFS, string) {
	t.Helper()
	fs := vfs.NewCrashableMem()
	require.NoError(t, makeDir(fs, "/disk/v"))
	return fs, "/disk/v"
}

// elapse lets time pass in a bubble.
func elapse(d time.Duration) { <-time.After(d) }
