package replication_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/internal/sim"
	"github.com/trivet-csi/trivet/replication"
	"github.com/trivet-csi/trivet/replication/raftgroup"
	"github.com/trivet-csi/trivet/replication/transport"
)

const (
	sizeBytes = 256 * trivet.BlockSize
	heartbeat = 500 * time.Millisecond
)

func fill(n int, b byte) []byte { return bytes.Repeat([]byte{b}, n*trivet.BlockSize) }

// inCluster runs f in a bubble with three machines, with the volume open on the client at epoch 1.
func inCluster(t *testing.T, cfg sim.ClusterConfig, f func(t *testing.T, c *sim.Cluster, v *replication.Volume)) {
	t.Helper()
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		cfg.Replicas, cfg.SizeBytes, cfg.Heartbeat = 3, sizeBytes, heartbeat
		c, err := sim.NewCluster(t.Context(), cfg)
		require.NoError(t, err)
		defer func() {
			assert.NoError(t, c.Close())
			assert.NoError(t, errors.Join(c.Failures()...))
		}()
		c.Net.SetDefaultFaults(transport.Faults{Delay: transport.Uniform(time.Millisecond, 3*time.Millisecond)})
		require.NoError(t, c.Fence(t.Context(), 1))
		v := mustOpen(t, c, sim.ClientNode, 1)
		defer func() { assert.NoError(t, v.Close()) }()
		f(t, c, v)
	})
}

func mustOpen(t *testing.T, c *sim.Cluster, node trivet.NodeID, epoch trivet.Epoch) *replication.Volume {
	t.Helper()
	v, err := c.OpenVolume(node, epoch, 0)
	require.NoError(t, err)
	return v
}

func mustRead(t *testing.T, v *replication.Volume, off int64, n int) []byte {
	t.Helper()
	p := make([]byte, n*trivet.BlockSize)
	require.NoError(t, v.ReadAt(t.Context(), p, off))
	return p
}

func mustLeader(t *testing.T, c *sim.Cluster) (*sim.Node, *replication.Replica) {
	t.Helper()
	n, r, err := c.Leader(t.Context())
	require.NoError(t, err)
	return n, r
}

// requireEqualReplicas waits until all replicas have applied the same and compares their digests (I4).
func requireEqualReplicas(t *testing.T, c *sim.Cluster) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	require.NoError(t, c.Converge(ctx))
	digests, err := c.Digests()
	require.NoError(t, err)
	require.Len(t, digests, 3)
	require.Equal(t, digests["n1"], digests["n2"])
	require.Equal(t, digests["n1"], digests["n3"])
}

func TestClusterSurvivesItsLeader(t *testing.T) {
	inCluster(t, sim.ClusterConfig{}, func(t *testing.T, c *sim.Cluster, v *replication.Volume) {
		ctx := t.Context()
		require.NoError(t, v.WriteAt(ctx, fill(40, 1), 0))
		leader, _ := mustLeader(t, c)
		require.NoError(t, leader.Crash(ctx, sim.CrashOptions{}))
		require.NoError(t, v.WriteAt(ctx, fill(2, 2), 8*trivet.BlockSize))
		require.NoError(t, v.Discard(ctx, 20*trivet.BlockSize, 4*trivet.BlockSize))
		require.NoError(t, v.Flush(ctx))
		assert.Positive(t, v.Stats().LongestPause)
		want := fill(40, 1)
		copy(want[8*trivet.BlockSize:], fill(2, 2))
		copy(want[20*trivet.BlockSize:], fill(4, 0))
		assert.Equal(t, want, mustRead(t, v, 0, 40))
		require.NoError(t, leader.Start(ctx))
		requireEqualReplicas(t, c)
		for _, n := range c.Nodes() {
			vol, err := n.Blocks()
			require.NoError(t, err)
			p := make([]byte, len(want))
			require.NoError(t, vol.ReadAt(p, 0))
			assert.Equal(t, want, p, "on %s", n.ID())
		}
	})
}

// A client beside a follower hears of the new leader from it, and does not wait for its own pauses.
func TestClusterShortPause(t *testing.T) {
	inCluster(t, sim.ClusterConfig{}, func(t *testing.T, c *sim.Cluster, _ *replication.Volume) {
		ctx := t.Context()
		leader, r := mustLeader(t, c)
		require.NoError(t, r.Fence(ctx, 2))
		v := mustOpen(t, c, other(c, leader).ID(), 2)
		defer func() { require.NoError(t, v.Close()) }()
		require.NoError(t, v.WriteAt(ctx, fill(1, 1), 0))
		require.NoError(t, leader.Crash(ctx, sim.CrashOptions{}))
		began := time.Now()
		require.NoError(t, v.WriteAt(ctx, fill(1, 2), 0))
		assert.Less(t, time.Since(began), heartbeat/8, "in the bubble's time")
		require.NoError(t, leader.Start(ctx))
		requireEqualReplicas(t, c)
	})
}

// A volume whose local replica leads is served without the network; everything else is as from afar.
func TestClusterLocalVolume(t *testing.T) {
	inCluster(t, sim.ClusterConfig{}, func(t *testing.T, c *sim.Cluster, _ *replication.Volume) {
		ctx := t.Context()
		leader, r := mustLeader(t, c)
		require.NoError(t, r.Fence(ctx, 2))
		v := mustOpen(t, c, leader.ID(), 2)
		defer func() { require.NoError(t, v.Close()) }()
		stop := c.Net.Lose(func(e transport.Envelope) bool { return e.Message.Kind >= transport.KindVolumeWrite })
		require.NoError(t, v.WriteAt(ctx, fill(16, 7), 0))
		assert.Equal(t, fill(16, 7), mustRead(t, v, 0, 16))
		stop()
		require.NoError(t, r.TransferTo(ctx, other(c, leader).ReplicaID()))
		require.NoError(t, v.WriteAt(ctx, fill(16, 8), 0))
		assert.Equal(t, fill(16, 8), mustRead(t, v, 0, 16))
	})
}

func other(c *sim.Cluster, n *sim.Node) *sim.Node {
	for _, o := range c.Nodes() {
		if o != n {
			return o
		}
	}
	return nil
}

// A holder that was replaced cannot write, read or discard any more, wherever it asks (H12, I6).
func TestClusterFence(t *testing.T) {
	inCluster(t, sim.ClusterConfig{}, func(t *testing.T, c *sim.Cluster, old *replication.Volume) {
		ctx := t.Context()
		require.NoError(t, old.WriteAt(ctx, fill(1, 1), 0))
		require.NoError(t, c.Fence(ctx, 3))
		next := mustOpen(t, c, sim.ClientNode, 3)
		defer func() { require.NoError(t, next.Close()) }()
		require.NoError(t, next.WriteAt(ctx, fill(1, 3), 0))

		require.ErrorIs(t, old.WriteAt(ctx, fill(1, 1), 0), trivet.ErrFenced)
		fresh := mustOpen(t, c, sim.ClientNode, 1) // without the memory of being fenced
		require.ErrorIs(t, fresh.ReadAt(ctx, fill(1, 0), 0), trivet.ErrFenced)
		require.NoError(t, fresh.Close())
		between := mustOpen(t, c, sim.ClientNode, 2) // an epoch that was skipped
		require.ErrorIs(t, between.Discard(ctx, 0, sizeBytes), trivet.ErrFenced)
		require.NoError(t, between.Close())
		early := mustOpen(t, c, sim.ClientNode, 4) // one that nobody has fenced in
		require.ErrorIs(t, early.WriteAt(ctx, fill(1, 4), 0), trivet.ErrInvalid)
		require.ErrorIs(t, early.ReadAt(ctx, fill(1, 4), 0), trivet.ErrInvalid)
		require.NoError(t, early.Close())

		assert.Equal(t, fill(1, 3), mustRead(t, next, 0, 1))
		_, r := mustLeader(t, c)
		require.NoError(t, r.Fence(ctx, 3), "the same again")
		require.ErrorIs(t, r.Fence(ctx, 2), trivet.ErrFenced)
		require.NoError(t, next.WriteAt(ctx, fill(1, 5), 0), "the repeated fence left the session alone")
		requireEqualReplicas(t, c)
	})
}

// Once Fence is back, a leader that was cut off together with the old holder serves it no reads: its
// lease has run out (H8, H12, I15). Until it has, it may, and Fence must wait.
func TestClusterFenceOutlastsLeases(t *testing.T) {
	inCluster(t, sim.ClusterConfig{}, func(t *testing.T, c *sim.Cluster, v *replication.Volume) {
		ctx := t.Context()
		require.NoError(t, v.WriteAt(ctx, fill(1, 1), 0))
		leader, oldReplica := mustLeader(t, c)
		require.NoError(t, oldReplica.Fence(ctx, 2))
		old, err := c.OpenVolume(leader.ID(), 2, 10*time.Second)
		require.NoError(t, err)
		defer func() { require.NoError(t, old.Close()) }()
		assert.Equal(t, fill(1, 1), mustRead(t, old, 0, 1))

		// Leadership moves by the book, so that the next leader is there at once; the old one is cut off
		// with its holder just before it hears of it.
		target := other(c, leader)
		c.Net.Isolate(leader.ID())
		ctx, cancel := context.WithTimeout(ctx, time.Minute)
		defer cancel()
		for {
			r, ok := target.Replica()
			require.True(t, ok)
			st := r.Status()
			if st.LeaderNode != "" && st.LeaderNode != leader.ID() {
				break
			}
			require.NoError(t, sim.Sleep(ctx, 10*time.Millisecond))
		}
		began := time.Now()
		require.NoError(t, c.Fence(ctx, 3))
		assert.GreaterOrEqual(t, time.Since(began), heartbeat*3/4)
		next := mustOpen(t, c, sim.ClientNode, 3)
		defer func() { require.NoError(t, next.Close()) }()
		require.NoError(t, next.WriteAt(ctx, fill(1, 3), 0))
		fresh, err := c.OpenVolume(leader.ID(), 2, 2*time.Second) // which has seen no term, and no fence
		require.NoError(t, err)
		defer func() { require.NoError(t, fresh.Close()) }()
		require.ErrorIs(t, fresh.ReadAt(ctx, fill(1, 0), 0), trivet.ErrUnavailable)
		require.ErrorIs(t, fresh.WriteAt(ctx, fill(1, 0), 0), trivet.ErrUnavailable)
		require.ErrorIs(t, old.ReadAt(ctx, fill(1, 0), 0), trivet.ErrUnavailable)
		c.Net.HealAll()
		requireEqualReplicas(t, c)
	})
}

// countRestores counts installed snapshots.
type countRestores struct {
	raftgroup.StateMachine
	n *atomic.Int64
}

func (m countRestores) Restore(r io.Reader) error {
	m.n.Add(1)
	return m.StateMachine.Restore(r)
}

func TestClusterLaggardCatchesUpBySnapshot(t *testing.T) {
	var restores atomic.Int64
	cfg := sim.ClusterConfig{SnapshotBytes: 256 << 10, WrapMachine: func(m raftgroup.StateMachine) raftgroup.StateMachine {
		return countRestores{m, &restores}
	}}
	inCluster(t, cfg, func(t *testing.T, c *sim.Cluster, v *replication.Volume) {
		ctx := t.Context()
		leader, _ := mustLeader(t, c)
		laggard := other(c, leader)
		require.NoError(t, v.WriteAt(ctx, fill(256, 1), 0))
		require.NoError(t, laggard.Crash(ctx, sim.CrashOptions{}))
		for i := range 8 {
			require.NoError(t, v.WriteAt(ctx, fill(256, byte(i+2)), 0))
		}
		require.NoError(t, v.Discard(ctx, 0, 16*trivet.BlockSize))
		require.NoError(t, laggard.Start(ctx))
		requireEqualReplicas(t, c)
		assert.Positive(t, restores.Load(), "the log had what the laggard missed: the test shows nothing")
		require.NoError(t, laggard.Crash(ctx, sim.CrashOptions{}))
		require.NoError(t, laggard.Start(ctx))
		require.NoError(t, v.WriteAt(ctx, fill(1, 99), 0))
		requireEqualReplicas(t, c)
	})
}

func TestClusterResize(t *testing.T) {
	inCluster(t, sim.ClusterConfig{}, func(t *testing.T, c *sim.Cluster, v *replication.Volume) {
		ctx := t.Context()
		require.NoError(t, v.WriteAt(ctx, fill(1, 1), sizeBytes-trivet.BlockSize))
		leader, r := mustLeader(t, c)
		require.NoError(t, v.SetSize(2*sizeBytes))
		require.ErrorIs(t, v.WriteAt(ctx, fill(1, 2), sizeBytes), trivet.ErrOutOfRange, "the log has not grown yet")
		require.ErrorIs(t, v.ReadAt(ctx, fill(1, 2), sizeBytes), trivet.ErrOutOfRange)
		require.NoError(t, r.Resize(ctx, 2*sizeBytes))
		require.NoError(t, r.Resize(ctx, 2*sizeBytes), "the same again")
		require.ErrorIs(t, r.Resize(ctx, sizeBytes), trivet.ErrOutOfRange)
		require.ErrorIs(t, r.Resize(ctx, 2*sizeBytes+1), trivet.ErrInvalid)
		follower, ok := other(c, leader).Replica()
		require.True(t, ok)
		require.ErrorIs(t, follower.Resize(ctx, 4*sizeBytes), trivet.ErrNotLeader)
		require.NoError(t, v.WriteAt(ctx, fill(1, 3), 2*sizeBytes-trivet.BlockSize))
		require.NoError(t, leader.Crash(ctx, sim.CrashOptions{}))
		assert.Equal(t, fill(1, 3), mustRead(t, v, 2*sizeBytes-trivet.BlockSize, 1))
		require.NoError(t, leader.Start(ctx))
		requireEqualReplicas(t, c)
		_, r = mustLeader(t, c)
		assert.Equal(t, int64(2*sizeBytes), r.Status().SizeBytes)
	})
}

func TestClusterWipe(t *testing.T) {
	inCluster(t, sim.ClusterConfig{}, func(t *testing.T, c *sim.Cluster, v *replication.Volume) {
		ctx := t.Context()
		require.NoError(t, v.WriteAt(ctx, fill(256, 1), 0))
		require.NoError(t, c.Fence(ctx, 2))
		_, r := mustLeader(t, c)
		require.ErrorIs(t, r.Wipe(ctx, 1), trivet.ErrFenced)
		require.ErrorIs(t, r.Wipe(ctx, 3), trivet.ErrInvalid)
		require.NoError(t, r.Wipe(ctx, 2))
		require.NoError(t, r.Wipe(ctx, 2))
		require.NoError(t, c.Fence(ctx, 3))
		next := mustOpen(t, c, sim.ClientNode, 3)
		defer func() { require.NoError(t, next.Close()) }()
		assert.Equal(t, fill(256, 0), mustRead(t, next, 0, 256))
		requireEqualReplicas(t, c)
	})
}

// A full disk under the leader refuses writes before it is full, and only writes; no restart (H26).
func TestClusterNoSpace(t *testing.T) {
	inCluster(t, sim.ClusterConfig{}, func(t *testing.T, c *sim.Cluster, v *replication.Volume) {
		ctx := t.Context()
		require.NoError(t, v.WriteAt(ctx, fill(4, 1), 0))
		for _, n := range c.Nodes() {
			n.SetDiskUsage(vfs.DiskUsage{TotalBytes: 100 << 30, AvailBytes: 1 << 20})
		}
		require.NoError(t, sim.Sleep(ctx, 2*time.Second)) // the engine looks once a second
		require.ErrorIs(t, v.WriteAt(ctx, fill(1, 2), 0), trivet.ErrNoSpace)
		require.NoError(t, v.Discard(ctx, 0, trivet.BlockSize))
		require.NoError(t, v.WriteZeroes(ctx, trivet.BlockSize, trivet.BlockSize))
		require.NoError(t, v.Flush(ctx))
		for _, n := range c.Nodes() {
			n.SetDiskUsage(vfs.DiskUsage{TotalBytes: 100 << 30, AvailBytes: 50 << 30})
		}
		require.NoError(t, sim.Sleep(ctx, 2*time.Second))
		require.NoError(t, v.WriteAt(ctx, fill(1, 3), 0))
		want := append(append(fill(1, 3), fill(1, 0)...), fill(2, 1)...)
		assert.Equal(t, want, mustRead(t, v, 0, 4))
	})
}

// The first copy of a write is held on the way, over two changes of leader; the client has its answer
// from the second copy and writes the block again. Then the first copy arrives at the leader (H39).
func TestClusterHeldCopyOfRetriedWrite(t *testing.T) {
	inCluster(t, sim.ClusterConfig{}, func(t *testing.T, c *sim.Cluster, v *replication.Volume) {
		ctx := t.Context()
		require.NoError(t, v.WriteAt(ctx, fill(1, 1), 0))
		leader, r := mustLeader(t, c)
		var seen atomic.Int64
		release := c.Net.Hold(func(e transport.Envelope) bool {
			return e.Message.Kind == transport.KindVolumeWrite && !e.Reply && seen.Add(1) == 1
		})
		require.NoError(t, v.WriteAt(ctx, fill(1, 2), 0))
		require.Equal(t, 1, c.Net.Held())
		require.NoError(t, v.WriteAt(ctx, fill(1, 3), 0))
		require.NoError(t, r.TransferTo(ctx, other(c, leader).ReplicaID()))
		require.NoError(t, v.WriteAt(ctx, fill(1, 4), trivet.BlockSize))
		_, r = mustLeader(t, c)
		require.NoError(t, r.TransferTo(ctx, leader.ReplicaID()))
		require.NoError(t, v.WriteAt(ctx, fill(1, 5), trivet.BlockSize))
		again, r := mustLeader(t, c)
		require.Equal(t, leader.ID(), again.ID())
		before := r.Status().Applied
		release()
		require.NoError(t, sim.Sleep(ctx, time.Second))
		assert.Greater(t, r.Status().Applied, before, "the held copy went through the log")
		assert.Equal(t, fill(1, 3), mustRead(t, v, 0, 1))
		requireEqualReplicas(t, c)
	})
}

// Many writers at once: entries gather, every write lands, replicas agree.
func TestClusterManyWriters(t *testing.T) {
	inCluster(t, sim.ClusterConfig{}, func(t *testing.T, c *sim.Cluster, v *replication.Volume) {
		errs := make(chan error, 256)
		for i := range 256 {
			go func() { errs <- v.WriteAt(t.Context(), fill(1, byte(i)|1), int64(i)*trivet.BlockSize) }()
		}
		for range 256 {
			require.NoError(t, <-errs)
		}
		for i := range 256 {
			assert.Equal(t, byte(i)|1, mustRead(t, v, int64(i)*trivet.BlockSize, 1)[9])
		}
		_, r := mustLeader(t, c)
		assert.Less(t, r.Status().LastIndex, uint64(100), "requests are gathered into entries")
		requireEqualReplicas(t, c)
	})
}

func TestClusterAuthorize(t *testing.T) {
	var allowed atomic.Bool
	allowed.Store(true)
	cfg := sim.ClusterConfig{Authorize: func(n trivet.NodeID, _ trivet.VolumeID, e trivet.Epoch) error {
		if n != sim.ClientNode || e != 1 || !allowed.Load() {
			return trivet.ErrFenced
		}
		return nil
	}}
	inCluster(t, cfg, func(t *testing.T, c *sim.Cluster, v *replication.Volume) {
		require.NoError(t, v.WriteAt(t.Context(), fill(1, 1), 0))
		allowed.Store(false)
		require.ErrorIs(t, v.ReadAt(t.Context(), fill(1, 1), 0), trivet.ErrFenced)
	})
}

func TestClusterStatus(t *testing.T) {
	inCluster(t, sim.ClusterConfig{}, func(t *testing.T, c *sim.Cluster, v *replication.Volume) {
		ctx := t.Context()
		leader, _ := mustLeader(t, c)
		for _, n := range c.Nodes() {
			st, err := replication.QueryStatus(ctx, c.Net.Node(sim.ClientNode), n.ID(), c.Volume())
			require.NoError(t, err)
			assert.Equal(t, n.ReplicaID(), st.Replica)
			assert.Equal(t, n == leader, st.IsLeader)
			assert.Equal(t, leader.ID(), st.LeaderNode)
			assert.Equal(t, int64(sizeBytes), st.SizeBytes)
		}
		_, err := replication.QueryStatus(ctx, c.Net.Node(sim.ClientNode), "n1", c.Volume()+1)
		require.ErrorIs(t, err, trivet.ErrNotFound)
	})
}
