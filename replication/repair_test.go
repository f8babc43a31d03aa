package replication_test

import (
	"encoding/binary"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/engine"
	"github.com/trivet-csi/trivet/internal/sim"
	"github.com/trivet-csi/trivet/replication"
	"github.com/trivet-csi/trivet/replication/raftgroup"
	"github.com/trivet-csi/trivet/replication/transport"
)

// stamped is a block that no other block is like.
func stamped(lba trivet.LBA, x uint32) []byte {
	p := make([]byte, trivet.BlockSize)
	for i := 0; i < len(p); i += 16 {
		binary.BigEndian.PutUint32(p[i:], x+1)
		binary.BigEndian.PutUint32(p[i+4:], uint32(i))
		binary.BigEndian.PutUint64(p[i+8:], uint64(lba))
	}
	return p
}

// writeStamped writes n blocks from the first on, and waits until every replica has them.
func writeStamped(t *testing.T, c *sim.Cluster, v *replication.Volume, n int, x uint32) {
	t.Helper()
	var p []byte
	for lba := range trivet.LBA(n) {
		p = append(p, stamped(lba, x)...)
	}
	require.NoError(t, v.WriteAt(t.Context(), p, 0))
	require.NoError(t, c.Converge(t.Context()))
}

func requireStamped(t *testing.T, v *replication.Volume, n int, x uint32) {
	t.Helper()
	for lba := range trivet.LBA(n) {
		require.Equal(t, stamped(lba, x), mustRead(t, v, int64(lba)*trivet.BlockSize, 1), "block %d", lba)
	}
}

func mustRot(t *testing.T, n *sim.Node, lba trivet.LBA, x uint32) {
	t.Helper()
	hits, err := n.Rot(stamped(lba, x))
	require.NoError(t, err)
	require.Equal(t, 1, hits, "block %d on %s", lba, n.ID())
}

func mustReplica(t *testing.T, n *sim.Node) *replication.Replica {
	t.Helper()
	r, ok := n.Replica()
	require.True(t, ok)
	return r
}

// followersOf are the other nodes.
func followersOf(c *sim.Cluster, leader *sim.Node) (out []*sim.Node) {
	for _, n := range c.Nodes() {
		if n != leader {
			out = append(out, n)
		}
	}
	return out
}

// A read that meets a damaged block is answered with the right bytes, and the block is whole afterwards, on the leader
// itself. Nobody is told that a replica is lost.
func TestReadRepair(t *testing.T) {
	inCluster(t, sim.ClusterConfig{}, func(t *testing.T, c *sim.Cluster, v *replication.Volume) {
		writeStamped(t, c, v, 64, 1)
		leader, r := mustLeader(t, c)
		for _, lba := range []trivet.LBA{3, 4, 5, 40} {
			mustRot(t, leader, lba, 1)
		}
		mustRot(t, followersOf(c, leader)[0], 3, 1) // of two copies one is enough
		requireStamped(t, v, 64, 1)
		assert.EqualValues(t, 4, r.Integrity().Repaired)
		assert.EqualValues(t, 4, r.Integrity().Found)
		vol, err := leader.Blocks()
		require.NoError(t, err)
		bad, err := vol.Damaged(0, 64)
		require.NoError(t, err)
		assert.Empty(t, bad)
		bad, err = mustBlocks(t, followersOf(c, leader)[0]).Damaged(0, 64)
		require.NoError(t, err)
		assert.Len(t, bad, 1, "it was asked, and said so, and repairs what it reads itself")
	})
}

func mustBlocks(t *testing.T, n *sim.Node) *engine.Volume {
	t.Helper()
	vol, err := n.Blocks()
	require.NoError(t, err)
	return vol
}

// A block that is damaged everywhere is an error, loudly, and never wrong bytes. All other blocks are read, and the
// block is whole again once it is written.
func TestReadWithoutGoodCopy(t *testing.T) {
	inCluster(t, sim.ClusterConfig{}, func(t *testing.T, c *sim.Cluster, v *replication.Volume) {
		writeStamped(t, c, v, 64, 1)
		for _, n := range c.Nodes() {
			mustRot(t, n, 7, 1)
			n.Excuse()
		}
		p := make([]byte, trivet.BlockSize)
		require.ErrorIs(t, v.ReadAt(t.Context(), p, 7*trivet.BlockSize), trivet.ErrCorrupt)
		assert.Equal(t, make([]byte, trivet.BlockSize), p)
		_, r := mustLeader(t, c)
		assert.Positive(t, r.Integrity().Failed)
		for _, lba := range []trivet.LBA{6, 8, 63} {
			assert.Equal(t, stamped(lba, 1), mustRead(t, v, int64(lba)*trivet.BlockSize, 1))
		}
		require.NoError(t, v.WriteAt(t.Context(), stamped(7, 2), 7*trivet.BlockSize))
		assert.Equal(t, stamped(7, 2), mustRead(t, v, 7*trivet.BlockSize, 1))
	})
}

// While the one replica with a good copy is away, a read waits for it, and gets it.
func TestReadWaitsForTheGoodCopy(t *testing.T) {
	inCluster(t, sim.ClusterConfig{}, func(t *testing.T, c *sim.Cluster, v *replication.Volume) {
		ctx := t.Context()
		writeStamped(t, c, v, 64, 1)
		leader, _ := mustLeader(t, c)
		others := followersOf(c, leader)
		mustRot(t, leader, 9, 1)
		mustRot(t, others[0], 9, 1)
		require.NoError(t, others[1].Crash(ctx, sim.CrashOptions{}))
		done := make(chan error, 1)
		p := make([]byte, trivet.BlockSize)
		go func() { done <- v.ReadAt(ctx, p, 9*trivet.BlockSize) }()
		require.NoError(t, sim.Sleep(ctx, 5*time.Second))
		select {
		case err := <-done:
			t.Fatalf("the read has ended: %v", err)
		default:
		}
		require.NoError(t, others[1].Start(ctx))
		require.NoError(t, <-done)
		assert.Equal(t, stamped(9, 1), p)
	})
}

// A read that a follower may answer is left to the leader when the follower's block is damaged, and that is repaired
// in the background.
func TestSessionReadRepairsTheFollower(t *testing.T) {
	inCluster(t, sim.ClusterConfig{}, func(t *testing.T, c *sim.Cluster, v *replication.Volume) {
		ctx := t.Context()
		writeStamped(t, c, v, 64, 1)
		leader, _ := mustLeader(t, c)
		follower := followersOf(c, leader)[0]
		mustRot(t, follower, 11, 1)
		eventual, err := c.OpenVolumeWith(follower.ID(), 1, trivet.ReadEventual)
		require.NoError(t, err)
		defer func() { require.NoError(t, eventual.Close()) }()
		assert.Equal(t, stamped(11, 1), mustRead(t, eventual, 11*trivet.BlockSize, 1))
		require.NoError(t, sim.Sleep(ctx, time.Second))
		bad, err := mustBlocks(t, follower).Damaged(0, 64)
		require.NoError(t, err)
		assert.Empty(t, bad)
		assert.EqualValues(t, 1, mustReplica(t, follower).Integrity().Repaired)
	})
}

// When the repair cannot be written down, the read is answered from another replica all the same.
func TestReadFromAnotherReplica(t *testing.T) {
	inCluster(t, sim.ClusterConfig{}, func(t *testing.T, c *sim.Cluster, v *replication.Volume) {
		writeStamped(t, c, v, 64, 1)
		leader, r := mustLeader(t, c)
		mustRot(t, leader, 12, 1)
		defer c.Net.Lose(func(e transport.Envelope) bool { // whoever asks for the data of a version gets no answer
			return e.Message.Kind == transport.KindVolumeScrub && !e.Reply && len(e.Message.Body) > replication.ScrubRequestBytes
		})()
		assert.Equal(t, stamped(12, 1), mustRead(t, v, 12*trivet.BlockSize, 1))
		assert.Positive(t, r.Integrity().Elsewhere)
		assert.Zero(t, r.Integrity().Repaired)
	})
}

// A damaged block that nobody could help with is found once, however often its repair is tried.
func TestDamageIsFoundOnce(t *testing.T) {
	inCluster(t, sim.ClusterConfig{}, func(t *testing.T, c *sim.Cluster, v *replication.Volume) {
		writeStamped(t, c, v, 64, 1)
		leader, r := mustLeader(t, c)
		mustRot(t, leader, 12, 1)
		heal := c.Net.Lose(func(e transport.Envelope) bool { // whoever asks for the data of a version gets no answer
			return e.Message.Kind == transport.KindVolumeScrub && !e.Reply && len(e.Message.Body) > replication.ScrubRequestBytes
		})
		assert.Equal(t, stamped(12, 1), mustRead(t, v, 12*trivet.BlockSize, 1))
		require.NoError(t, sim.Sleep(t.Context(), 30*time.Second))
		assert.Zero(t, r.Integrity().Repaired)
		heal()
		requireEventually(t, "it is repaired", func() bool { return r.Integrity().Repaired > 0 })
		assert.Equal(t, replication.IntegrityStats{Found: 1, Repaired: 1, Elsewhere: 1}, r.Integrity())
	})
}

// gated is a state machine that can be held.
type gated struct {
	raftgroup.StateMachine
	mu   *sync.Mutex
	gate *chan struct{} // nil: open
}

func (g gated) Apply(es []raftgroup.Entry) ([]any, error) {
	g.mu.Lock()
	gate := *g.gate
	g.mu.Unlock()
	if gate != nil {
		<-gate
	}
	return g.StateMachine.Apply(es)
}

// A leader that has not applied yet what its followers have must not answer a read with their blocks: its own next
// answer would be older.
func TestReadFromAnotherReplicaNeverGoesBack(t *testing.T) {
	var mu sync.Mutex
	gates := []*chan struct{}{}
	cfg := sim.ClusterConfig{WrapMachine: func(m raftgroup.StateMachine) raftgroup.StateMachine {
		mu.Lock()
		defer mu.Unlock()
		gates = append(gates, new(chan struct{}))
		return gated{m, &mu, gates[len(gates)-1]}
	}}
	inCluster(t, cfg, func(t *testing.T, c *sim.Cluster, v *replication.Volume) {
		ctx := t.Context()
		writeStamped(t, c, v, 64, 1)
		leader, r := mustLeader(t, c)
		mustRot(t, leader, 12, 1)
		defer c.Net.Lose(func(e transport.Envelope) bool { // it cannot be repaired
			return e.Message.Kind == transport.KindVolumeScrub && !e.Reply && len(e.Message.Body) > replication.ScrubRequestBytes
		})()
		held := make(chan struct{})
		mu.Lock()
		*gates[slices.Index(c.Nodes(), leader)] = held
		mu.Unlock()
		wrote, read, p := make(chan error, 1), make(chan error, 1), make([]byte, trivet.BlockSize)
		go func() { wrote <- v.WriteAt(ctx, stamped(12, 2), 12*trivet.BlockSize) }()
		release := sync.OnceFunc(func() {
			mu.Lock()
			*gates[slices.Index(c.Nodes(), leader)] = nil
			mu.Unlock()
			close(held)
		})
		defer release() // or a cluster that fails never ends
		require.NoError(t, sim.Sleep(ctx, 2*time.Second))
		follower := mustReplica(t, followersOf(c, leader)[0])
		for range 600 { // it hears of the commit with the next message
			if r.Status().Applied < follower.Status().Applied {
				break
			}
			require.NoError(t, sim.Sleep(ctx, 100*time.Millisecond))
		}
		require.Less(t, r.Status().Applied, follower.Status().Applied)
		go func() { read <- v.ReadAt(ctx, p, 12*trivet.BlockSize) }()
		require.NoError(t, sim.Sleep(ctx, 5*time.Second))
		select {
		case err := <-read:
			t.Fatalf("the read has ended with %x: %v", p[:4], err)
		default:
		}
		release()
		require.NoError(t, <-wrote)
		require.NoError(t, <-read)
		assert.Equal(t, stamped(12, 2), p)
	})
}

// Blocks are given to replicas of the volume, not to whoever is in the cluster.
func TestScrubMessagesAreForMembers(t *testing.T) {
	inCluster(t, sim.ClusterConfig{}, func(t *testing.T, c *sim.Cluster, v *replication.Volume) {
		writeStamped(t, c, v, 4, 1)
		body := replication.EncodeReadAt(0, 0, 1)
		for from, want := range map[trivet.NodeID]error{sim.ClientNode: trivet.ErrInvalid, "n1": nil} {
			_, err := c.Net.Node(from).Call(t.Context(), "n2", transport.Message{
				Kind: transport.KindVolumeScrub, Group: c.Volume(), Body: body,
			})
			require.ErrorIs(t, err, want)
		}
	})
}

// A read that is under way while its replica is closed may meet damage. Whoever opens the replica again repairs that;
// it is not reported as damage that nobody can repair, for which the replica would be made anew.
func TestDamageMetAtTheEnd(t *testing.T) {
	inCluster(t, sim.ClusterConfig{}, func(t *testing.T, c *sim.Cluster, v *replication.Volume) {
		ctx := t.Context()
		writeStamped(t, c, v, 64, 1)
		leader, _ := mustLeader(t, c)
		node := followersOf(c, leader)[0]
		vol := mustBlocks(t, node)
		mustRot(t, node, 12, 1)
		require.NoError(t, node.Host().ParkReplica(ctx, node.Spec()))
		p := make([]byte, trivet.BlockSize)
		require.ErrorIs(t, vol.ReadAt(p, 12), trivet.ErrCorrupt)
		assert.False(t, c.Damaged())
		require.NoError(t, node.Host().OpenReplica(ctx, node.Spec()))
		sum := mustScrub(t, c, replication.ScrubOptions{})
		assert.EqualValues(t, 1, sum.Repaired)
		assert.Zero(t, sum.Left)
		requireEqualReplicas(t, c)
	})
}
