package replication_test

import (
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/engine"
	"github.com/trivet-csi/trivet/internal/sim"
	"github.com/trivet-csi/trivet/replication"
)

// requireSnapshotEverywhere reads blocks of a snapshot on each machine behind Raft's back.
func requireSnapshotEverywhere(t *testing.T, c *sim.Cluster, gen trivet.Generation, n int, x uint32) {
	t.Helper()
	p := make([]byte, trivet.BlockSize)
	for _, node := range c.Nodes() {
		for lba := range trivet.LBA(n) {
			require.NoError(t, mustBlocks(t, node).ReadAtGeneration(p, lba, gen))
			require.Equal(t, stamped(lba, x), p, "block %d on %s", lba, node.ID())
		}
	}
}

// What a snapshot alone shows is scrubbed as well, and so it is repaired when somebody reads it.
func TestScrubRepairsSnapshots(t *testing.T) {
	inCluster(t, sim.ClusterConfig{}, func(t *testing.T, c *sim.Cluster, v *replication.Volume) {
		writeStamped(t, c, v, 64, 1)
		f, err := v.Freeze(t.Context(), 7)
		require.NoError(t, err)
		writeStamped(t, c, v, 64, 2)
		for lba := range trivet.LBA(9) {
			mustRot(t, c.Nodes()[lba%3], lba, 1)
		}
		mustRot(t, c.Nodes()[0], 20, 2)
		p := make([]byte, trivet.BlockSize)
		require.ErrorIs(t, mustBlocks(t, c.Nodes()[0]).ReadAtGeneration(p, 0, f.Generation), trivet.ErrCorrupt)
		requireEventually(t, "the read had it repaired", func() bool {
			return mustBlocks(t, c.Nodes()[0]).ReadAtGeneration(p, 0, f.Generation) == nil
		})
		sum := mustScrub(t, c, replication.ScrubOptions{})
		assert.EqualValues(t, 9, sum.Found)
		assert.EqualValues(t, 9, sum.Repaired)
		assert.Zero(t, sum.Left)
		assert.EqualValues(t, 3*128*trivet.BlockSize, sum.CheckedBytes)
		requireSnapshotEverywhere(t, c, f.Generation, 64, 1)
		requireStamped(t, v, 64, 2)
		requireEqualReplicas(t, c)
	})
}

// A volume that was set back, and is not flattened, is scrubbed and repaired like any other, whether its replicas are
// equally far or not.
func TestScrubOfRollback(t *testing.T) {
	inCluster(t, sim.ClusterConfig{SweepRate: -1}, func(t *testing.T, c *sim.Cluster, v *replication.Volume) {
		ctx := t.Context()
		writeStamped(t, c, v, 64, 1)
		f, err := v.Freeze(ctx, 7)
		require.NoError(t, err)
		writeStamped(t, c, v, 32, 2)
		require.NoError(t, c.Fence(ctx, 2))
		_, r := mustLeader(t, c)
		require.NoError(t, r.Rollback(ctx, 2, 7))
		require.NoError(t, c.Fence(ctx, 3))
		require.NoError(t, c.Converge(ctx))
		now := mustOpen(t, c, sim.ClientNode, 3)
		defer func() { require.NoError(t, now.Close()) }()
		flat := mustBlocks(t, c.Nodes()[2])
		require.NoError(t, flat.Flatten(ctx))
		require.NoError(t, c.Nodes()[2].Spec().Disk.Engine.Sweep(ctx))
		require.False(t, mustBlocks(t, c.Nodes()[0]).Flattened())
		for lba := range trivet.LBA(9) {
			mustRot(t, c.Nodes()[lba%3], lba, 1)
		}
		sum := mustScrub(t, c, replication.ScrubOptions{})
		assert.GreaterOrEqual(t, sum.Found, int64(9))
		assert.Equal(t, sum.Found, sum.Repaired)
		assert.Zero(t, sum.Left, "%v", sum.Findings)
		assert.Zero(t, mustScrub(t, c, replication.ScrubOptions{}).Found)
		requireStamped(t, now, 64, 1)
		requireSnapshotEverywhere(t, c, f.Generation, 64, 1)
		requireEqualReplicas(t, c)

		odd := c.Nodes()[1] // a block of one replica is another
		view, err := mustBlocks(t, odd).View(0, 64)
		require.NoError(t, err)
		fix, err := view.Repair(engine.BlockVersion{LBA: 40, Sum: engine.BlockSum(c.Volume(), 40, stamped(40, 9))},
			stamped(40, 9))
		require.NoError(t, err)
		n, err := mustBlocks(t, odd).Replace([]engine.Repair{fix})
		require.NoError(t, err)
		require.Equal(t, 1, n)
		require.NoError(t, view.Close())
		sum = mustScrub(t, c, replication.ScrubOptions{})
		assert.EqualValues(t, 1, sum.Repaired)
		assert.Contains(t, sum.Findings, "block 40 on "+string(odd.ID())+" is not what the majority has")
		requireEqualReplicas(t, c)
		requireStamped(t, now, 64, 1)
	})
}

// A replica whose snapshot shows something else than those of the others is reported as damaged, and so made anew,
// though what the volume shows is the same everywhere.
func TestScrubAccusesOtherSnapshots(t *testing.T) {
	inCluster(t, sim.ClusterConfig{}, func(t *testing.T, c *sim.Cluster, v *replication.Volume) {
		writeStamped(t, c, v, 16, 1)
		leader, _ := mustLeader(t, c)
		odd := followersOf(c, leader)[0]
		tamper(t, odd, func(b *engine.Batch) { require.NoError(t, b.Write(5, stamped(5, 9))) }, nil)
		_, err := v.Freeze(t.Context(), 7)
		require.NoError(t, err)
		writeStamped(t, c, v, 16, 2)
		odd.Excuse()
		sum := mustScrub(t, c, replication.ScrubOptions{Verify: true})
		assert.False(t, c.Damaged(), "a verify tells, and does nothing")
		assert.EqualValues(t, 1, sum.Left)
		sum = mustScrub(t, c, replication.ScrubOptions{})
		assert.EqualValues(t, 1, sum.Found)
		assert.Zero(t, sum.Repaired)
		assert.Contains(t, sum.Findings, "the content of snapshots of the replica on "+string(odd.ID())+
			" is not that of the majority")
		assert.True(t, c.Damaged())
		requireStamped(t, v, 16, 2)
	})
}
