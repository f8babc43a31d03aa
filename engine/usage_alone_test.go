package engine_test

import (
	"math/rand"
	"testing"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
)

// What a snapshot has to itself is what comes back when it alone is deleted.
func TestUsageOfSnapshots(t *testing.T) {
	t.Parallel()
	for seed := range int64(8) {
		r := rand.New(rand.NewSource(seed))
		v := mustVolume(t, mustOpen(t, vfs.NewMem()), vol1, 64)
		for id := range uint64(6) {
			for range 1 + r.Intn(4) {
				mustCommit(t, v, op{trivet.LBA(r.Intn(32)), 1 + int64(r.Intn(20)), uint32(r.Intn(4))}) // 0 discards
			}
			require.NoError(t, freeze(v, 100+id))
			if r.Intn(3) == 0 {
				require.NoError(t, freeze(v, 200+id), "one that shows the same")
			}
		}
		mustCommit(t, v, op{3, 9, 9})
		for len(v.State().Snapshots) > 0 {
			before, alone, err := v.UsageOfSnapshots(t.Context())
			require.NoError(t, err)
			snaps := v.State().Snapshots
			require.Len(t, alone, len(snaps))
			i := r.Intn(len(snaps))
			require.NoError(t, thaw(v, i))
			after, err := v.Usage(t.Context())
			require.NoError(t, err)
			require.Equal(t, before.SnapshotBytes-after.SnapshotBytes, alone[snaps[i].Generation], "seed %d", seed)
			require.Equal(t, before.LiveBytes, after.LiveBytes)
		}
	}
}

// A block that a rollback shows again belongs to the live state too.
func TestUsageAfterARollback(t *testing.T) {
	t.Parallel()
	v := mustVolume(t, mustOpen(t, vfs.NewMem()), vol1, 64)
	mustCommit(t, v, op{0, 8, 1})
	require.NoError(t, freeze(v, 1))
	mustCommit(t, v, op{0, 4, 2})
	require.NoError(t, freeze(v, 2))
	mustCommit(t, v, op{0, 8, 3})
	_, alone, err := v.UsageOfSnapshots(t.Context())
	require.NoError(t, err)
	require.Equal(t, map[trivet.Generation]int64{0: 4 * bs, 1: 4 * bs}, alone, "blocks 4 to 8 both show")
	st := v.State()
	st.AppliedIndex++
	st.Generation++
	b := v.NewBatch()
	require.NoError(t, b.Rollback(0))
	require.NoError(t, b.Commit(st))
	_, alone, err = v.UsageOfSnapshots(t.Context())
	require.NoError(t, err)
	require.Equal(t, map[trivet.Generation]int64{0: 0, 1: 4 * bs}, alone)
}
