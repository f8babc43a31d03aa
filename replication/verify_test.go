package replication_test

import (
	"context"
	"errors"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/engine/segment"
	"github.com/trivet-csi/trivet/internal/sim"
	"github.com/trivet-csi/trivet/replication"
	"github.com/trivet-csi/trivet/replication/raftgroup"
	"github.com/trivet-csi/trivet/replication/transport"
)

// forgetful is a machine that loses a write and notices nothing: in place of an entry it applies the one before
// once more, which changes nothing. Its checksums are all good.
type forgetful struct {
	raftgroup.StateMachine
	at   int // number of the entry that is lost
	seen int
	last []byte
}

func (m *forgetful) Apply(entries []raftgroup.Entry) ([]any, error) {
	entries = slices.Clone(entries)
	for i := range entries {
		e := &entries[i]
		if e.Data == nil {
			continue
		}
		if m.seen++; m.seen == m.at {
			e.Data, e.Stored = m.last, segment.Place{}
		}
		m.last = append([]byte(nil), e.Data...)
	}
	return m.StateMachine.Apply(entries)
}

// A learner that has every entry and not the same blocks gets no vote, and says so at each call; the group goes on
// and one that is made anew is as good as any (I14, H21).
func TestPromoteComparesBlocks(t *testing.T) {
	var made atomic.Int64
	cfg := sim.ClusterConfig{Replicas: 3, Spares: 2, WrapMachine: func(m raftgroup.StateMachine) raftgroup.StateMachine {
		if made.Add(1) == 4 {
			return &forgetful{StateMachine: m, at: 3}
		}
		return m
	}}
	inGroup(t, cfg, func(t *testing.T, c *sim.Cluster, v *replication.Volume) {
		ctx := t.Context()
		for i := range 8 {
			require.NoError(t, v.WriteAt(ctx, fill(1, byte(i+1)), int64(i)*trivet.BlockSize))
		}
		bad, good := c.Nodes()[3], c.Nodes()[4]
		require.NoError(t, bad.Join(ctx))
		require.NoError(t, c.AddLearner(ctx, bad))
		require.ErrorIs(t, c.Promote(ctx, bad), trivet.ErrCorrupt)
		_, r := mustLeader(t, c)
		require.True(t, r.Status().CaughtUp(bad.ReplicaID()))
		before := r.Status().LastIndex
		require.ErrorIs(t, r.Promote(ctx, bad.ReplicaID()), trivet.ErrCorrupt, "again")
		require.Equal(t, before, r.Status().LastIndex, "a verdict is not sought twice")
		m, ok := r.Status().Member(bad.ReplicaID())
		require.True(t, ok)
		require.True(t, m.Learner)
		require.NoError(t, c.Remove(ctx, bad.ReplicaID()))
		require.NoError(t, v.WriteAt(ctx, fill(1, 9), 0))
		require.NoError(t, good.Join(ctx))
		require.NoError(t, c.AddLearner(ctx, good))
		require.NoError(t, c.Promote(ctx, good))
	})
}

// While the blocks are compared, reads and writes go on and the learner has no vote; it gets it at the end.
func TestCompareStopsNoIO(t *testing.T) {
	var open atomic.Bool
	var turns atomic.Int64
	cfg := sim.ClusterConfig{
		Replicas: 3, Spares: 1,
		Background: func(ctx context.Context, _ int) (func(), error) {
			turns.Add(1)
			for !open.Load() {
				if err := sim.Sleep(ctx, 10*time.Millisecond); err != nil {
					return nil, err
				}
			}
			return func() {}, nil
		},
	}
	inGroup(t, cfg, func(t *testing.T, c *sim.Cluster, v *replication.Volume) {
		ctx := t.Context()
		require.NoError(t, v.WriteAt(ctx, fill(64, 1), 0))
		n := c.Nodes()[3]
		require.NoError(t, n.Join(ctx))
		require.NoError(t, c.AddLearner(ctx, n))
		_, r := mustLeader(t, c)
		for turns.Load() < 2 { // leader and learner
			require.ErrorIs(t, r.Promote(ctx, n.ReplicaID()), trivet.ErrPending)
		}
		own, ok := n.Replica()
		require.True(t, ok)
		still := own.Status().Progress
		for i := range 100 {
			require.NoError(t, v.WriteAt(ctx, fill(1, byte(i)), int64(i)*trivet.BlockSize))
			require.Equal(t, fill(1, byte(i)), mustRead(t, v, int64(i)*trivet.BlockSize, 1))
		}
		assert.NotEqual(t, still, own.Status().Progress)
		require.ErrorIs(t, r.Promote(ctx, n.ReplicaID()), trivet.ErrPending)
		m, _ := r.Status().Member(n.ReplicaID())
		require.True(t, m.Learner)
		open.Store(true)
		require.NoError(t, c.Promote(ctx, n))
	})
}

// What interrupts a comparison is not held against the learner: its restart, another leader, a network that is gone.
func TestCompareIsBegunAnew(t *testing.T) {
	var gated atomic.Bool
	cfg := sim.ClusterConfig{
		Replicas: 3, Spares: 1,
		Background: func(ctx context.Context, _ int) (func(), error) {
			for gated.Load() {
				if err := sim.Sleep(ctx, 10*time.Millisecond); err != nil {
					return nil, err
				}
			}
			return func() {}, ctx.Err()
		},
	}
	inGroup(t, cfg, func(t *testing.T, c *sim.Cluster, v *replication.Volume) {
		ctx := t.Context()
		require.NoError(t, v.WriteAt(ctx, fill(64, 1), 0))
		n := c.Nodes()[3]
		require.NoError(t, n.Join(ctx))
		require.NoError(t, c.AddLearner(ctx, n))
		for name, trouble := range map[string]func(leader *sim.Node, r *replication.Replica){
			"restart": func(*sim.Node, *replication.Replica) {
				require.NoError(t, n.Stop())
				require.NoError(t, n.Start(ctx))
			},
			"other leader": func(leader *sim.Node, r *replication.Replica) {
				require.NoError(t, r.TransferTo(ctx, other(c, leader).ReplicaID()))
			},
			"cut off": func(*sim.Node, *replication.Replica) {
				stop := c.Net.Lose(transport.OfKind(transport.KindVolumeMark))
				require.NoError(t, sim.Sleep(ctx, 2*time.Minute)) // beyond all patience
				stop()
			},
		} {
			gated.Store(true)
			leader, r := mustLeader(t, c)
			err := r.Promote(ctx, n.ReplicaID())
			for !errors.Is(err, trivet.ErrPending) {
				require.ErrorIs(t, err, trivet.ErrNotLeader, name)
				leader, r = mustLeader(t, c)
				err = r.Promote(ctx, n.ReplicaID())
			}
			trouble(leader, r)
			err = r.Promote(ctx, n.ReplicaID())
			require.True(t, errors.Is(err, trivet.ErrPending) || errors.Is(err, trivet.ErrNotLeader), "%s: %v", name, err)
		}
		gated.Store(false)
		require.NoError(t, c.Promote(ctx, n))
	})
}

// Nobody but a voter of the group may have a replica read all of its blocks.
func TestMarksAreForVoters(t *testing.T) {
	inGroup(t, sim.ClusterConfig{Replicas: 3}, func(t *testing.T, c *sim.Cluster, _ *replication.Volume) {
		leader, _ := mustLeader(t, c)
		to := other(c, leader)
		body := append([]byte{2, 1, 0, 0, 0, 0, 0, 0}, make([]byte, 16)...)
		body[15] = 1
		ask := func(from trivet.NodeID, as trivet.ReplicaID) error {
			_, err := c.Net.Node(from).Call(t.Context(), to.ID(), transport.Message{
				Kind: transport.KindVolumeMark, Group: c.Volume(), From: as, To: to.ReplicaID(), Body: body,
			})
			return err
		}
		require.NoError(t, ask(leader.ID(), leader.ReplicaID()))
		require.ErrorIs(t, ask(sim.ClientNode, leader.ReplicaID()), trivet.ErrInvalid)
		require.ErrorIs(t, ask(sim.ClientNode, "stranger"), trivet.ErrInvalid)
	})
}
