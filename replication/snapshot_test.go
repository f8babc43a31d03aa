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

// requireSnapshot reads a snapshot on each replica.
func requireSnapshot(t *testing.T, c *sim.Cluster, gen trivet.Generation, lba trivet.LBA, want []byte) {
	t.Helper()
	for _, n := range c.Nodes() {
		vol, err := n.Blocks()
		require.NoError(t, err)
		p := make([]byte, len(want))
		require.NoError(t, vol.ReadAtGeneration(p, lba, gen), "on %s", n.ID())
		assert.Equal(t, want, p, "on %s", n.ID())
	}
}

// The holder freezes from any node, over a change of leader, once per ID, and every replica keeps the same.
func TestClusterFreeze(t *testing.T) {
	inCluster(t, sim.ClusterConfig{}, func(t *testing.T, c *sim.Cluster, v *replication.Volume) {
		ctx := t.Context()
		require.NoError(t, v.WriteAt(ctx, fill(40, 1), 0))
		first, err := v.Freeze(ctx, 70)
		require.NoError(t, err)
		require.Equal(t, replication.Frozen{Generation: 0, SizeBytes: sizeBytes}, first)
		require.NoError(t, v.WriteAt(ctx, fill(40, 2), 0))

		leader, _ := mustLeader(t, c)
		require.NoError(t, leader.Crash(ctx, sim.CrashOptions{}))
		second, err := v.Freeze(ctx, 71)
		require.NoError(t, err)
		require.Equal(t, trivet.Generation(1), second.Generation)
		again, err := v.Freeze(ctx, 70)
		require.NoError(t, err)
		require.Equal(t, first, again)
		require.NoError(t, v.WriteAt(ctx, fill(40, 3), 0))
		require.NoError(t, leader.Start(ctx))
		requireEqualReplicas(t, c)
		requireSnapshot(t, c, 0, 0, fill(40, 1))
		requireSnapshot(t, c, 1, 0, fill(40, 2))

		_, r := mustLeader(t, c)
		require.NoError(t, r.DropSnapshot(ctx, 70))
		require.NoError(t, r.DropSnapshot(ctx, 70))
		require.Equal(t, []engine.Snapshot{{ID: 71, Generation: 1}}, r.Status().Snapshots)
		requireEqualReplicas(t, c)
		requireSnapshot(t, c, 1, 0, fill(40, 2))
	})
}

// A holder that was replaced cannot freeze, through whichever node; nobody but a holder may send other requests that
// way.
func TestClusterFreezeIsFenced(t *testing.T) {
	inCluster(t, sim.ClusterConfig{}, func(t *testing.T, c *sim.Cluster, old *replication.Volume) {
		ctx := t.Context()
		require.NoError(t, c.Fence(ctx, 2))
		_, err := old.Freeze(ctx, 70)
		require.ErrorIs(t, err, trivet.ErrFenced)
		require.ErrorIs(t, old.Flush(ctx), trivet.ErrFenced, "it knows now")
		leader, r := mustLeader(t, c)
		beside := mustOpen(t, c, leader.ID(), 1)
		_, err = beside.Freeze(ctx, 70)
		require.ErrorIs(t, err, trivet.ErrFenced, "beside the leader")
		require.NoError(t, beside.Close())
		_, err = r.Freeze(ctx, 1, 70)
		require.ErrorIs(t, err, trivet.ErrFenced)
		_, err = r.Freeze(ctx, 2, 70)
		require.NoError(t, err)
		follower, ok := other(c, leader).Replica()
		require.True(t, ok)
		_, err = follower.Freeze(ctx, 2, 71)
		require.ErrorIs(t, err, trivet.ErrNotLeader)
		requireEqualReplicas(t, c)
	})
}

// A rollback needs an epoch of its own: one that comes late, after the next attachment, undoes nothing.
func TestClusterRollback(t *testing.T) {
	inCluster(t, sim.ClusterConfig{}, func(t *testing.T, c *sim.Cluster, v *replication.Volume) {
		ctx := t.Context()
		require.NoError(t, v.WriteAt(ctx, fill(40, 1), 0))
		_, err := v.Freeze(ctx, 70)
		require.NoError(t, err)
		require.NoError(t, v.WriteAt(ctx, fill(80, 2), 20*trivet.BlockSize))
		_, err = v.Freeze(ctx, 71)
		require.NoError(t, err)
		require.NoError(t, c.Fence(ctx, 2))
		_, r := mustLeader(t, c)
		require.ErrorIs(t, r.Rollback(ctx, 1, 70), trivet.ErrFenced)
		require.ErrorIs(t, r.Rollback(ctx, 2, 99), trivet.ErrNotFound)
		require.NoError(t, r.Rollback(ctx, 2, 70))
		require.NoError(t, r.Rollback(ctx, 2, 70), "a copy")
		require.NoError(t, c.Fence(ctx, 3))
		next := mustOpen(t, c, sim.ClientNode, 3)
		defer func() { require.NoError(t, next.Close()) }()
		assert.Equal(t, append(fill(40, 1), fill(60, 0)...), mustRead(t, next, 0, 100))
		require.NoError(t, next.WriteAt(ctx, fill(1, 5), 0))
		require.ErrorIs(t, r.Rollback(ctx, 2, 70), trivet.ErrFenced)
		assert.Equal(t, fill(1, 5), mustRead(t, next, 0, 1))
		requireEqualReplicas(t, c)
		requireSnapshot(t, c, 0, 0, fill(40, 1))
		requireSnapshot(t, c, 1, 20, fill(80, 2))
	})
}
