package replication_test

import (
	"context"
	"sync"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/internal/sim"
	"github.com/trivet-csi/trivet/replication"
	"github.com/trivet-csi/trivet/replication/raftgroup"
	"github.com/trivet-csi/trivet/replication/transport"
)

// grants is a catalogue of the sessions of one writer: the epochs at which it goes on.
type grants struct {
	mu      sync.Mutex
	epoch   trivet.Epoch // 0: the session is over
	changed chan struct{}
}

func newGrants(epoch trivet.Epoch) *grants {
	return &grants{epoch: epoch, changed: make(chan struct{})}
}

func (g *grants) set(epoch trivet.Epoch) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.epoch = epoch
	close(g.changed)
	g.changed = make(chan struct{})
}

func (g *grants) renew(ctx context.Context, fenced trivet.Epoch) (trivet.Epoch, error) {
	for {
		g.mu.Lock()
		epoch, changed := g.epoch, g.changed
		g.mu.Unlock()
		switch {
		case epoch == 0:
			return 0, trivet.ErrFenced
		case epoch > fenced:
			return epoch, nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return 0, ctx.Err()
		}
	}
}

// twoWriters opens the volume twice: writer 0 began at epoch 2, writer 1 joins at 3.
func twoWriters(t *testing.T, c *sim.Cluster) (v [2]*replication.Volume, g [2]*grants) {
	t.Helper()
	ctx := t.Context()
	require.NoError(t, c.Fence(ctx, 2))
	var err error
	for i := range v {
		g[i] = newGrants(trivet.Epoch(2 + i))
		node := []trivet.NodeID{sim.ClientNode, sim.ProbeNode}[i]
		v[i], err = c.OpenWriter(node, trivet.Epoch(2+i), i, g[i].renew)
		require.NoError(t, err)
		t.Cleanup(func() { assert.NoError(t, v[i].Close()) })
		if i == 0 {
			require.NoError(t, v[0].WriteAt(ctx, fill(1, 7), 15*trivet.BlockSize))
			require.NoError(t, c.FenceWriters(ctx, 3, replication.Writers{2, 3}))
			g[0].set(3)
		}
	}
	return v, g
}

// Two write and read what the other has written; one leaves, and nothing of it is accepted any more, while the other
// goes on.
func TestTwoWriters(t *testing.T) {
	inCluster(t, sim.ClusterConfig{}, func(t *testing.T, c *sim.Cluster, _ *replication.Volume) {
		ctx := t.Context()
		v, g := twoWriters(t, c)
		for i := range byte(20) {
			at := int64(i%3) * trivet.BlockSize
			require.NoError(t, v[i%2].WriteAt(ctx, fill(1, i+1), at))
			assert.Equal(t, fill(1, i+1), mustRead(t, v[1-i%2], at, 1))
		}
		require.NoError(t, v[1].Discard(ctx, 0, trivet.BlockSize))
		assert.Equal(t, fill(1, 0), mustRead(t, v[0], 0, 1))
		assert.Equal(t, fill(1, 7), mustRead(t, v[1], 15*trivet.BlockSize, 1))

		require.NoError(t, c.FenceWriters(ctx, 4, replication.Writers{2}))
		g[0].set(4)
		g[1].set(0)
		require.ErrorIs(t, v[1].WriteAt(ctx, fill(1, 99), 0), trivet.ErrFenced)
		require.ErrorIs(t, v[1].ReadAt(ctx, fill(1, 0), 0), trivet.ErrFenced)
		require.NoError(t, v[0].WriteAt(ctx, fill(1, 30), 0))
		assert.Equal(t, fill(1, 30), mustRead(t, v[0], 0, 1))

		again := newGrants(5) // and somebody comes in its place, and counts from one
		require.NoError(t, c.FenceWriters(ctx, 5, replication.Writers{2, 5}))
		g[0].set(5)
		next, err := c.OpenWriter(sim.ProbeNode, 5, 1, again.renew)
		require.NoError(t, err)
		defer func() { require.NoError(t, next.Close()) }()
		require.NoError(t, next.WriteAt(ctx, fill(1, 31), trivet.BlockSize))
		assert.Equal(t, fill(1, 31), mustRead(t, v[0], trivet.BlockSize, 1))
		_, err = v[0].Freeze(ctx, 5)
		require.NoError(t, err)
		requireEqualReplicas(t, c)
	})
}

// A write is in, its answer is on its way, when the other writer goes: it is refused as fenced at the old epoch, sent
// again at the new one, and known as a copy. Without its window it would be applied a second time, over what was
// written since (H39).
func TestWriterKeepsItsWindow(t *testing.T) {
	inCluster(t, sim.ClusterConfig{}, func(t *testing.T, c *sim.Cluster, _ *replication.Volume) {
		ctx := t.Context()
		v, g := twoWriters(t, c)
		require.NoError(t, v[0].WriteAt(ctx, fill(1, 1), 0))
		stop := c.Net.Lose(func(e transport.Envelope) bool {
			return e.Reply && e.To == sim.ClientNode && e.Message.Kind == transport.KindVolumeWrite
		})
		done := make(chan error, 1)
		go func() { done <- v[0].WriteAt(ctx, fill(1, 2), 0) }()
		for mustRead(t, v[1], 0, 1)[0] != 2 { // it is in, nobody was told
			require.NoError(t, sim.Sleep(ctx, heartbeat/100))
		}
		require.NoError(t, v[1].WriteAt(ctx, fill(1, 3), 0))
		require.NoError(t, c.FenceWriters(ctx, 4, replication.Writers{2, 3}))
		g[0].set(4)
		g[1].set(4)
		assert.Equal(t, fill(1, 3), mustRead(t, v[1], 0, 1))
		stop()
		require.NoError(t, <-done)
		assert.Equal(t, fill(1, 3), mustRead(t, v[1], 0, 1), "the first copy of it was before the third write")
		assert.Equal(t, fill(1, 3), mustRead(t, v[0], 0, 1))
	})
}

// A leader that was deposed and does not know it may believe in its lease for as long as clocks let it. A reader who
// was told of a write by the other writer, and has seen no newer term itself, must not be served by it.
func TestReadsOfTwoWritersAskAQuorum(t *testing.T) {
	inCluster(t, sim.ClusterConfig{}, func(t *testing.T, c *sim.Cluster, _ *replication.Volume) {
		ctx := t.Context()
		v, _ := twoWriters(t, c)
		require.NoError(t, v[0].WriteAt(ctx, fill(1, 1), 0))
		assert.Equal(t, fill(1, 1), mustRead(t, v[1], 0, 1))
		leader, _ := mustLeader(t, c)
		var others []trivet.NodeID
		for _, n := range c.Nodes() {
			if n != leader {
				others = append(others, n.ID())
			}
		}
		c.Net.Partition([]trivet.NodeID{leader.ID()}, others) // both writers reach it still
		within, cancel := context.WithTimeout(ctx, heartbeat/4)
		defer cancel()
		require.Error(t, v[1].ReadAt(within, fill(1, 0), 0), "its lease is fresh, and it needs a quorum")
	})
}

// Sessions that cannot be are refused before they reach the log.
func TestFenceWritersChecks(t *testing.T) {
	inCluster(t, sim.ClusterConfig{}, func(t *testing.T, c *sim.Cluster, v *replication.Volume) {
		_, r := mustLeader(t, c)
		require.ErrorIs(t, r.FenceWriters(t.Context(), 2, replication.Writers{}), trivet.ErrInvalid)
		require.ErrorIs(t, r.FenceWriters(t.Context(), 2, replication.Writers{1, 3}), trivet.ErrInvalid)
		require.NoError(t, v.WriteAt(t.Context(), fill(1, 1), 0))
		require.NoError(t, r.FenceWriters(t.Context(), 2, replication.Alone(2)))
		require.ErrorIs(t, r.FenceWriters(t.Context(), 1, replication.Writers{1}), trivet.ErrFenced)
		_, err := c.OpenWriter(sim.ClientNode, 2, 2, nil)
		require.ErrorIs(t, err, trivet.ErrInvalid)
	})
}

// One that another may write beside reads from leaders only: what a session remembers is its own.
func TestWriterConfig(t *testing.T) {
	t.Parallel()
	net := transport.NewMemory(1)
	defer net.Close()
	cfg := replication.VolumeConfig{
		ID: 7, SizeBytes: sizeBytes, Epoch: 1, Members: []raftgroup.Member{{Replica: "r1", Node: "n1"}},
		Network: net.Node("n1"), Renew: newGrants(1).renew, Writer: 1,
	}
	require.NoError(t, cfg.Validate())
	cfg.ReadConsistency = trivet.ReadSession
	require.ErrorIs(t, cfg.Validate(), trivet.ErrInvalid)
	cfg.Renew = nil
	require.NoError(t, cfg.Validate())
	cfg.Writer = replication.WritersMax
	require.ErrorIs(t, cfg.Validate(), trivet.ErrInvalid)
}
