package replication_test

import (
	"context"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/internal/sim"
	"github.com/trivet-csi/trivet/replication"
	"github.com/trivet-csi/trivet/replication/transport"
)

// relaxed opens the volume at a fresh epoch beside a follower.
func relaxed(t *testing.T, c *sim.Cluster, reads trivet.ReadConsistency) (
	v *replication.Volume, leader, beside *sim.Node,
) {
	t.Helper()
	leader, r := mustLeader(t, c)
	require.NoError(t, r.Fence(t.Context(), 2))
	require.NoError(t, c.Converge(t.Context())) // the follower knows the epoch
	beside = other(c, leader)
	v, err := c.OpenVolumeWith(beside.ID(), 2, reads)
	require.NoError(t, err)
	return v, leader, beside
}

// hold keeps Raft's messages from reaching a machine, volume I/O passes.
func hold(c *sim.Cluster, at *sim.Node) (release func()) {
	return c.Net.Lose(func(e transport.Envelope) bool {
		return e.To == at.ID() && e.Message.Kind < transport.KindVolumeWrite
	})
}

// loseReads keeps reads from leaving a machine.
func loseReads(c *sim.Cluster, from *sim.Node) (release func()) {
	return c.Net.Lose(func(e transport.Envelope) bool {
		return e.From == from.ID() && e.Message.Kind == transport.KindVolumeRead
	})
}

// A session reads beside a follower that has all that it wrote, and from the leader what the follower lacks.
func TestSessionReads(t *testing.T) {
	inCluster(t, sim.ClusterConfig{}, func(t *testing.T, c *sim.Cluster, _ *replication.Volume) {
		ctx := t.Context()
		v, _, beside := relaxed(t, c, trivet.ReadSession)
		defer func() { require.NoError(t, v.Close()) }()
		require.NoError(t, v.WriteAt(ctx, fill(4, 1), 0))
		require.NoError(t, c.Converge(ctx))
		pass := loseReads(c, beside)
		assert.Equal(t, fill(4, 1), mustRead(t, v, 0, 4), "no message is needed")
		pass()

		release := hold(c, beside)
		require.NoError(t, v.WriteAt(ctx, fill(4, 2), 0))
		assert.Equal(t, fill(4, 2), mustRead(t, v, 0, 4), "own write")
		release()
		requireEqualReplicas(t, c)
	})
}

// What a session has read it does not unread, whoever wrote it.
func TestSessionReadsForward(t *testing.T) {
	inCluster(t, sim.ClusterConfig{}, func(t *testing.T, c *sim.Cluster, _ *replication.Volume) {
		ctx := t.Context()
		v, _, beside := relaxed(t, c, trivet.ReadSession)
		defer func() { require.NoError(t, v.Close()) }()
		require.NoError(t, v.WriteAt(ctx, fill(1, 1), 0))
		require.NoError(t, c.Converge(ctx))
		release := hold(c, beside) // stays behind
		require.NoError(t, v.WriteAt(ctx, fill(1, 2), 0))

		reader, err := c.OpenVolumeWith(sim.ClientNode, 2, trivet.ReadSession)
		require.NoError(t, err)
		defer func() { require.NoError(t, reader.Close()) }()
		asks := func(e transport.Envelope) bool { return e.From == sim.ClientNode }
		pass := c.Net.Lose(func(e transport.Envelope) bool { return asks(e) && e.To == beside.ID() })
		assert.Equal(t, fill(1, 2), mustRead(t, reader, 0, 1))
		pass()
		pass = c.Net.Lose(func(e transport.Envelope) bool { return asks(e) && e.To != beside.ID() })
		short, cancel := context.WithTimeout(ctx, 3*time.Second)
		defer cancel()
		require.Error(t, reader.ReadAt(short, make([]byte, trivet.BlockSize), 0), "%s is behind", beside.ID())
		release()
		assert.Equal(t, fill(1, 2), mustRead(t, reader, 0, 1), "now it has caught up")
		pass()
	})
}

// A session's first read shows all that was written in earlier epochs, also beside a replica that has not
// heard of them.
func TestSessionBeginsAtItsFence(t *testing.T) {
	inCluster(t, sim.ClusterConfig{}, func(t *testing.T, c *sim.Cluster, v *replication.Volume) {
		ctx := t.Context()
		leader, r := mustLeader(t, c)
		beside := other(c, leader)
		require.NoError(t, v.WriteAt(ctx, fill(1, 1), 0))
		require.NoError(t, c.Converge(ctx))
		release := hold(c, beside)
		defer release()
		require.NoError(t, v.WriteAt(ctx, fill(1, 2), 0))
		require.NoError(t, r.Fence(ctx, 2))
		next, err := c.OpenVolumeWith(beside.ID(), 2, trivet.ReadSession)
		require.NoError(t, err)
		defer func() { require.NoError(t, next.Close()) }()
		assert.Equal(t, fill(1, 2), mustRead(t, next, 0, 1))
	})
}

// Eventual reads are answered beside the reader, however old; a fence that the replica knows ends them.
func TestEventualReads(t *testing.T) {
	inCluster(t, sim.ClusterConfig{}, func(t *testing.T, c *sim.Cluster, _ *replication.Volume) {
		ctx := t.Context()
		v, leader, beside := relaxed(t, c, trivet.ReadEventual)
		defer func() { require.NoError(t, v.Close()) }()
		require.NoError(t, v.WriteAt(ctx, fill(1, 1), 0))
		require.NoError(t, c.Converge(ctx))
		release, pass := hold(c, beside), loseReads(c, beside)
		require.NoError(t, v.WriteAt(ctx, fill(1, 2), 0))
		assert.Equal(t, fill(1, 1), mustRead(t, v, 0, 1), "the replica beside has not heard of the write")
		release()
		pass()
		require.NoError(t, c.Converge(ctx))
		assert.Equal(t, fill(1, 2), mustRead(t, v, 0, 1))

		_, r := mustLeader(t, c)
		require.NoError(t, r.Fence(ctx, 3), "on %s", leader.ID())
		require.NoError(t, c.Converge(ctx))
		defer loseReads(c, beside)() // the replica beside knows
		require.ErrorIs(t, v.ReadAt(ctx, make([]byte, trivet.BlockSize), 0), trivet.ErrFenced)
	})
}

func TestReadConsistencyIsChecked(t *testing.T) {
	inCluster(t, sim.ClusterConfig{}, func(t *testing.T, c *sim.Cluster, _ *replication.Volume) {
		_, err := c.OpenVolumeWith(sim.ClientNode, 1, "fresh")
		require.ErrorIs(t, err, trivet.ErrInvalid)
	})
}
