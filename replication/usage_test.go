package replication_test

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/engine"
	"github.com/trivet-csi/trivet/internal/sim"
	"github.com/trivet-csi/trivet/replication"
)

// What a volume's blocks are there for adds up, is the same wherever it is asked, and is not counted again without
// need.
func TestUsage(t *testing.T) {
	inCluster(t, sim.ClusterConfig{}, func(t *testing.T, c *sim.Cluster, v *replication.Volume) {
		ctx := t.Context()
		ask := func(n *sim.Node, age time.Duration) replication.VolumeUsage {
			u, err := replication.QueryUsage(ctx, c.Net.Node(sim.ClientNode), n.ID(), c.Volume(), age)
			require.NoError(t, err)
			require.Equal(t, n.ID(), u.Node)
			require.Equal(t, u.LiveBytes+u.SnapshotBytes+u.OtherBytes, u.UniqueBytes()+u.SharedBytes)
			return u
		}
		require.NoError(t, v.WriteAt(ctx, fill(8, 1), 0))
		_, err := v.Freeze(ctx, 70)
		require.NoError(t, err)
		require.NoError(t, v.WriteAt(ctx, fill(6, 2), 0))
		_, err = v.Freeze(ctx, 71)
		require.NoError(t, err)
		require.NoError(t, v.WriteAt(ctx, fill(2, 3), 0))
		require.NoError(t, c.Converge(ctx))
		for _, n := range c.Nodes()[:3] {
			u := ask(n, 0)
			require.Equal(t, engine.VolumeUsage{
				LiveBytes: 8 * trivet.BlockSize, SnapshotBytes: 8 * trivet.BlockSize,
			}, u.VolumeUsage)
			require.Equal(t, map[trivet.SnapshotID]int64{70: 6 * trivet.BlockSize, 71: 2 * trivet.BlockSize}, u.Alone)
		}
		n := c.Nodes()[0]
		first := ask(n, 0)
		time.Sleep(time.Second)
		require.Equal(t, first, ask(n, time.Minute), "young enough")
		require.True(t, ask(n, 0).Counted.After(first.Counted))

		require.NoError(t, v.WriteAt(ctx, fill(1, 4), 30*trivet.BlockSize))
		require.NoError(t, c.Converge(ctx))
		require.EqualValues(t, 9*trivet.BlockSize, ask(n, 0).LiveBytes, "it was written since")
		n.Host().ForgetUsage(func(trivet.VolumeID) bool { return false })
		_, known := n.Host().KnownUsage(c.Volume())
		require.False(t, known)
		_, err = replication.QueryUsage(ctx, c.Net.Node("a stranger"), n.ID(), 99, 0)
		require.ErrorIs(t, err, trivet.ErrNotFound)
	})
}
