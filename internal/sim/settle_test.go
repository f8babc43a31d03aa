package sim

import (
	"testing"
	"testing/synctest"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/stretchr/testify/require"
)

// A machine that went down with a rotten disk just before the faults ended is refused when it is started for the
// liveness phase: another majority is drawn then.
func TestMajorityWithoutTheRefused(t *testing.T) {
	t.Parallel()
	for seed := range uint64(4) {
		synctest.Test(t, func(t *testing.T) {
			ctx := t.Context()
			s := newSim(Options{Seed: seed})
			require.NoError(t, s.open(ctx))
			defer func() { require.NoError(t, s.close()) }()
			require.NoError(t, s.takeOver(ctx, ClientNode))
			n := newNemesis(s)
			n.stop()
			core, err := n.core(newRand(seed, 7))
			require.NoError(t, err)
			bad := core[0]
			require.NoError(t, bad.Crash(ctx, CrashOptions{}))
			bad.swapDisk(vfs.NewCrashableMem())
			require.NoError(t, bad.format())
			n.rotten[bad] = true
			require.NoError(t, s.healMajority(ctx, n, newRand(seed, 7)))
			require.Equal(t, map[*Node]bool{bad: true}, n.lost)
		})
	}
}
