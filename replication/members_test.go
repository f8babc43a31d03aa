package replication_test

import (
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/internal/sim"
	"github.com/trivet-csi/trivet/replication"
	"github.com/trivet-csi/trivet/replication/raftgroup"
	"github.com/trivet-csi/trivet/replication/transport"
)

// prefix remembers what any replica applied at each index: none may differ, ever (H33).
type prefix struct {
	mu   sync.Mutex
	seen map[uint64]string
	bad  []string
}

func (p *prefix) note(e raftgroup.Entry) {
	what := fmt.Sprintf("term %d members %v data %08x", e.Term, e.Members, crc32.ChecksumIEEE(e.Data))
	p.mu.Lock()
	defer p.mu.Unlock()
	if old, ok := p.seen[e.Index]; ok && old != what {
		p.bad = append(p.bad, fmt.Sprintf("entry %d: %s, then %s", e.Index, old, what))
	}
	p.seen[e.Index] = what
}

type prefixMachine struct {
	raftgroup.StateMachine
	p *prefix
}

func (m prefixMachine) Apply(entries []raftgroup.Entry) ([]any, error) {
	out, err := m.StateMachine.Apply(entries)
	if err == nil {
		for _, e := range entries {
			m.p.note(e)
		}
	}
	return out, err
}

// inGroup runs f in a bubble with a group of some machines, spare ones beside them, and the volume open on
// the client at epoch 1. At the end no two replicas may have applied different entries.
func inGroup(t *testing.T, cfg sim.ClusterConfig, f func(t *testing.T, c *sim.Cluster, v *replication.Volume)) {
	t.Helper()
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		p := &prefix{seen: map[uint64]string{}}
		wrap := cfg.WrapMachine
		cfg.WrapMachine = func(m raftgroup.StateMachine) raftgroup.StateMachine {
			if wrap != nil {
				m = wrap(m)
			}
			return prefixMachine{m, p}
		}
		cfg.SizeBytes, cfg.Heartbeat = sizeBytes, heartbeat
		c, err := sim.NewCluster(t.Context(), cfg)
		require.NoError(t, err)
		defer func() {
			assert.NoError(t, c.Close())
			assert.NoError(t, errors.Join(c.Failures()...))
			assert.Empty(t, p.bad)
		}()
		c.Net.SetDefaultFaults(transport.Faults{Delay: transport.Uniform(time.Millisecond, 3*time.Millisecond)})
		require.NoError(t, c.Fence(t.Context(), 1))
		v := mustOpen(t, c, sim.ClientNode, 1)
		defer func() { assert.NoError(t, v.Close()) }()
		f(t, c, v)
	})
}

// writers write their own blocks over and over and demand to read back what they wrote last: a write that
// is lost, applied twice or applied late is seen (H39).
func writers(t *testing.T, v *replication.Volume, n int) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	var done sync.WaitGroup
	var rounds atomic.Int64
	for i := range n {
		done.Go(func() {
			off := int64(i) * trivet.BlockSize
			for k := 1; ctx.Err() == nil; k++ {
				want := fill(1, byte(k))
				if err := v.WriteAt(ctx, want, off); err != nil {
					assert.ErrorIs(t, err, context.Canceled)
					return
				}
				got := make([]byte, trivet.BlockSize)
				if err := v.ReadAt(ctx, got, off); err != nil {
					assert.ErrorIs(t, err, context.Canceled)
					return
				}
				if !assert.Equal(t, want[0], got[0], "block %d after write %d", i, k) {
					return
				}
				rounds.Add(1)
			}
		})
	}
	return func() {
		before := rounds.Load() // there may be no leader yet
		for began := time.Now(); rounds.Load() == before && time.Since(began) < time.Minute; {
			if sim.Sleep(ctx, 2*time.Second) != nil {
				break // the test has ended
			}
		}
		assert.Greater(t, rounds.Load(), before, "writers got nowhere at the end")
		cancel()
		done.Wait()
	}
}

// change is what a test does to the members, with something after each of its steps.
type change struct {
	t     *testing.T
	c     *sim.Cluster
	after func()
}

func (g *change) ctx() context.Context {
	ctx, cancel := context.WithTimeout(g.t.Context(), time.Minute)
	g.t.Cleanup(cancel)
	return ctx
}

// grow adds a replica on a machine that has none.
func (g *change) grow() {
	g.t.Helper()
	i := slices.IndexFunc(g.c.Nodes(), func(n *sim.Node) bool { return n.ReplicaID() == "" && n.Up() })
	require.GreaterOrEqual(g.t, i, 0, "no spare machine")
	n := g.c.Nodes()[i]
	require.NoError(g.t, n.Join(g.ctx()))
	g.after()
	require.NoError(g.t, g.c.AddLearner(g.ctx(), n))
	g.after()
	require.NoError(g.t, g.c.Promote(g.ctx(), n))
	g.after()
}

// shrink removes a replica, the leader's if self, and its data.
func (g *change) shrink(self bool) {
	g.t.Helper()
	leader, _ := mustLeader(g.t, g.c)
	gone := leader
	if !self {
		for _, m := range g.c.Members() {
			if m.Node != leader.ID() {
				gone = g.c.Node(m.Node)
			}
		}
	}
	require.NoError(g.t, g.c.Remove(g.ctx(), gone.ReplicaID()))
	g.after()
	require.NoError(g.t, gone.Discard(g.ctx()))
	g.after()
}

func (g *change) to(n int, self bool) {
	g.t.Helper()
	for len(g.c.Members()) < n {
		g.grow()
	}
	for len(g.c.Members()) > n {
		g.shrink(self)
	}
}

// requireMembers demands a group of n voters whose replicas are equal.
func requireMembers(t *testing.T, c *sim.Cluster, n int) {
	t.Helper()
	_, r := mustLeader(t, c)
	var voters []raftgroup.Member
	for _, m := range r.Status().Members {
		if !m.Learner {
			voters = append(voters, m)
		}
	}
	require.ElementsMatch(t, c.Members(), voters)
	require.Len(t, voters, n)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	require.NoError(t, c.Converge(ctx))
	digests, err := c.Digests()
	require.NoError(t, err)
	require.Len(t, digests, n)
	for id, d := range digests {
		require.Equal(t, digests[voters[0].Node], d, "replica on %s", id)
	}
}

// Groups grow and shrink under writers, in peace, with the leader killed after each step, and with leaders
// that remove themselves (H33, H39).
func TestMembersChangeUnderWriters(t *testing.T) {
	for _, path := range [][]int{{3, 5, 3}, {1, 3, 1}, {1, 2}, {2, 1}} {
		for _, self := range []bool{false, true} {
			for _, kill := range []bool{false, true} {
				t.Run(fmt.Sprintf("%v self=%v kill=%v", path, self, kill), func(t *testing.T) {
					cfg := sim.ClusterConfig{Seed: 7, Replicas: path[0], Spares: slices.Max(path) - path[0], SnapshotBytes: 1 << 20}
					inGroup(t, cfg, func(t *testing.T, c *sim.Cluster, v *replication.Volume) {
						stop := writers(t, v, 4)
						g := &change{t: t, c: c, after: func() {}}
						if kill {
							g.after = func() {
								leader, _ := mustLeader(t, c)
								require.NoError(t, leader.Crash(t.Context(), sim.CrashOptions{}))
								require.NoError(t, leader.Start(t.Context()))
							}
						}
						for _, n := range path[1:] {
							g.to(n, self)
						}
						stop()
						requireMembers(t, c, path[len(path)-1])
					})
				})
			}
		}
	}
}

// A volume stays in use while all its members change under it, one after the other.
func TestMembersAllReplaced(t *testing.T) {
	inGroup(t, sim.ClusterConfig{Replicas: 3, Spares: 3}, func(t *testing.T, c *sim.Cluster, v *replication.Volume) {
		stop := writers(t, v, 2)
		g := &change{t: t, c: c, after: func() {}}
		first := c.Members()
		for _, m := range first {
			g.grow()
			require.NoError(t, c.Remove(g.ctx(), m.Replica))
			require.NoError(t, c.Node(m.Node).Discard(g.ctx()))
			require.NoError(t, c.Node(m.Node).Stop())
		}
		stop()
		requireMembers(t, c, 3)
		// One that is opened by what was known long ago finds them too.
		require.NoError(t, c.Fence(t.Context(), 2))
		late, err := replication.OpenVolume(replication.VolumeConfig{
			ID: c.Volume(), SizeBytes: sizeBytes, Epoch: 2, Members: first, FindMembers: c.Members,
			Network: c.Net.Node(sim.ClientNode),
		})
		require.NoError(t, err)
		require.NoError(t, late.WriteAt(t.Context(), fill(1, 1), 0))
		require.NoError(t, late.Close())
		require.ErrorIs(t, v.WriteAt(t.Context(), fill(1, 9), 0), trivet.ErrFenced, "none of them met epoch 1")
	})
}

// A member that was away while all others changed takes its log from leaders that it has never heard of,
// because the catalogue knows them (H37).
func TestMemberReturnsToStrangers(t *testing.T) {
	inGroup(t, sim.ClusterConfig{Replicas: 3, Spares: 2}, func(t *testing.T, c *sim.Cluster, v *replication.Volume) {
		g := &change{t: t, c: c, after: func() {}}
		away := c.Nodes()[2]
		require.NoError(t, away.Stop())
		g.grow()
		g.grow()
		for _, n := range c.Nodes()[:2] {
			require.NoError(t, c.Remove(g.ctx(), n.ReplicaID()))
			require.NoError(t, n.Discard(g.ctx()))
		}
		require.NoError(t, v.WriteAt(t.Context(), fill(1, 1), 0))
		require.NoError(t, away.Start(t.Context()))
		requireMembers(t, c, 3)
	})
}

// A replica that was removed while its machine was cut off does not know it. When the machine is back, it
// raises no term, deposes nobody, and serves nothing (H37).
func TestRemovedReplicaDisturbsNobody(t *testing.T) {
	inGroup(t, sim.ClusterConfig{Replicas: 3, Spares: 1}, func(t *testing.T, c *sim.Cluster, v *replication.Volume) {
		g := &change{t: t, c: c, after: func() {}}
		for _, gone := range []string{"a follower", "the leader"} {
			g.to(4, false)
			leader, _ := mustLeader(t, c)
			node := leader
			if gone == "a follower" {
				node = c.Node(c.Members()[0].Node)
				if node == leader {
					node = c.Node(c.Members()[1].Node)
				}
			}
			c.Net.Isolate(node.ID())
			require.NoError(t, v.WriteAt(t.Context(), fill(1, 2), 0), "another leads by now")
			require.NoError(t, c.Remove(g.ctx(), node.ReplicaID()))
			require.NoError(t, sim.Sleep(t.Context(), 10*time.Second))
			_, r := mustLeader(t, c)
			before := r.Status()
			c.Net.HealAll()
			require.NoError(t, sim.Sleep(t.Context(), 20*time.Second))
			require.NoError(t, v.WriteAt(t.Context(), fill(1, 3), 0))
			assert.Equal(t, before.Term, r.Status().Term, "%s raised the term", gone)
			assert.Equal(t, before.Leader, r.Status().Leader)
			old, ok := node.Replica()
			require.True(t, ok, "it runs")
			assert.False(t, old.Status().IsLeader)
			alone, err := replication.OpenVolume(replication.VolumeConfig{
				ID: c.Volume(), SizeBytes: sizeBytes, Epoch: 1, IOTimeout: time.Second, Network: c.Net.Node(sim.ProbeNode),
				Members: []raftgroup.Member{{Replica: node.ReplicaID(), Node: node.ID()}},
			})
			require.NoError(t, err)
			assert.ErrorIs(t, alone.ReadAt(t.Context(), fill(1, 0), 0), trivet.ErrUnavailable)
			require.NoError(t, alone.Close())
			require.NoError(t, node.Discard(t.Context()))
			requireMembers(t, c, 3)
		}
	})
}

// A learner gets a vote only when it has what was committed and answers (I14): with two voters the group
// could not go on without it.
func TestPromoteWaitsForLearner(t *testing.T) {
	inGroup(t, sim.ClusterConfig{Replicas: 1, Spares: 1}, func(t *testing.T, c *sim.Cluster, v *replication.Volume) {
		ctx := t.Context()
		require.NoError(t, v.WriteAt(ctx, fill(64, 1), 0))
		n := c.Nodes()[1]
		require.NoError(t, n.Join(ctx))
		_, r := mustLeader(t, c)
		require.ErrorIs(t, r.Promote(ctx, n.ReplicaID()), trivet.ErrNotFound)
		c.Net.Isolate(n.ID())
		m := raftgroup.Member{Replica: n.ReplicaID(), Node: n.ID()}
		require.NoError(t, r.AddLearner(ctx, m))
		require.NoError(t, r.AddLearner(ctx, m), "again")
		require.ErrorIs(t, r.Promote(ctx, n.ReplicaID()), trivet.ErrPending, "it has nothing yet")
		assert.False(t, r.Status().CaughtUp(n.ReplicaID()))
		c.Net.HealAll()
		stop := c.Net.Lose(func(e transport.Envelope) bool {
			return e.To == n.ID() && !e.Reply && e.Message.Kind == transport.KindAppendEntries && len(e.Message.Body) > 4096
		})
		require.NoError(t, sim.Sleep(ctx, 2*heartbeat))
		require.ErrorIs(t, r.Promote(ctx, n.ReplicaID()), trivet.ErrPending, "it answers and has nothing yet")
		stop()
		for !r.Status().CaughtUp(n.ReplicaID()) {
			require.NoError(t, sim.Sleep(ctx, 10*time.Millisecond))
		}
		got, ok := r.Status().Member(n.ReplicaID())
		require.True(t, ok)
		assert.True(t, got.Learner)
		require.NoError(t, n.Stop())
		require.NoError(t, sim.Sleep(ctx, 2*heartbeat))
		assert.True(t, r.Status().CaughtUp(n.ReplicaID()), "nothing was written since")
		require.ErrorIs(t, r.Promote(ctx, n.ReplicaID()), trivet.ErrPending, "it is gone")
		require.NoError(t, v.WriteAt(ctx, fill(1, 2), 0), "the group goes on by itself")
		require.NoError(t, n.Start(ctx))
		require.NoError(t, c.Promote(ctx, n))
		require.NoError(t, r.Promote(ctx, n.ReplicaID()), "again")
	})
}

// A follower of a busy leader always lags a little. A learner that keeps pace becomes a voter all the same, at
// the first call.
func TestPromoteUnderLoad(t *testing.T) {
	inGroup(t, sim.ClusterConfig{Replicas: 3, Spares: 1}, func(t *testing.T, c *sim.Cluster, v *replication.Volume) {
		n := c.Nodes()[3]
		for _, o := range c.Nodes()[:3] {
			c.Net.SetFaults(o.ID(), n.ID(), transport.Faults{Delay: transport.Uniform(10*time.Millisecond, 20*time.Millisecond)})
		}
		stop := writers(t, v, 4)
		defer stop()
		require.NoError(t, n.Join(t.Context()))
		require.NoError(t, c.AddLearner(t.Context(), n))
		require.NoError(t, sim.Sleep(t.Context(), 2*heartbeat))
		_, r := mustLeader(t, c)
		require.NoError(t, r.Promote(t.Context(), n.ReplicaID()))
	})
}

// A voter does not go while those that remain could not commit without a dead one (I11).
func TestRemoveKeepsAQuorum(t *testing.T) {
	inGroup(t, sim.ClusterConfig{Replicas: 3}, func(t *testing.T, c *sim.Cluster, v *replication.Volume) {
		ctx := t.Context()
		leader, r := mustLeader(t, c)
		dead := other(c, leader)
		var third *sim.Node
		for _, n := range c.Nodes() {
			if n != leader && n != dead {
				third = n
			}
		}
		require.NoError(t, dead.Stop())
		require.NoError(t, sim.Sleep(ctx, 2*heartbeat))
		require.ErrorIs(t, r.Remove(ctx, third.ReplicaID()), trivet.ErrUnavailable)
		require.NoError(t, v.WriteAt(ctx, fill(1, 1), 0), "nothing was done")
		require.Len(t, r.Status().Members, 3)
		require.NoError(t, r.Remove(ctx, dead.ReplicaID()), "the dead one may go")
		require.ErrorIs(t, third.Host().DestroyReplica(ctx, dead.Spec()), trivet.ErrInvalid, "it has no disk")
		require.NoError(t, r.Remove(ctx, dead.ReplicaID()), "again")
		follower, ok := third.Replica()
		require.True(t, ok)
		require.ErrorIs(t, follower.Remove(ctx, leader.ReplicaID()), trivet.ErrNotLeader)
	})
}

// A replica that joins a volume which has grown decides alike what fitted before (I13), whether it is given
// the log from its beginning or an image.
func TestJoinerOfResizedVolume(t *testing.T) {
	for _, image := range []bool{false, true} {
		var restores atomic.Int64
		cfg := sim.ClusterConfig{Replicas: 3, Spares: 1, WrapMachine: func(m raftgroup.StateMachine) raftgroup.StateMachine {
			return countRestores{m, &restores}
		}}
		if image {
			cfg.SnapshotBytes = 64 << 10
		}
		t.Run(fmt.Sprintf("image=%v", image), func(t *testing.T) {
			inGroup(t, cfg, func(t *testing.T, c *sim.Cluster, v *replication.Volume) {
				ctx := t.Context()
				require.NoError(t, v.SetSize(2*sizeBytes))
				require.ErrorIs(t, v.WriteAt(ctx, fill(1, 9), sizeBytes), trivet.ErrOutOfRange, "refused by the log")
				_, r := mustLeader(t, c)
				require.NoError(t, r.Resize(ctx, 2*sizeBytes))
				for i := range 300 {
					require.NoError(t, v.WriteAt(ctx, fill(2, byte(i)), sizeBytes+trivet.BlockSize))
				}
				(&change{t: t, c: c, after: func() {}}).grow()
				requireMembers(t, c, 4)
				assert.Equal(t, image, restores.Load() > 0)
				n, ok := c.Nodes()[3].Replica()
				require.True(t, ok)
				assert.Equal(t, int64(2*sizeBytes), n.Status().SizeBytes)
			})
		})
	}
}
