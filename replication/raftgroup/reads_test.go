package raftgroup_test

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/replication/raftgroup"
	"github.com/trivet-csi/trivet/replication/transport"
)

func shortLease(cfg *raftgroup.Config) { cfg.Timing.Lease = heartbeat / 5 }

// D3: a learner that answers is no quorum.
func TestGateCountsVotersOnly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t, "a", "b", "c", "d")
		c.configure = shortLease
		for _, name := range []string{"a", "b", "c", "d"} {
			boot := members("a", "b", "c")
			if name == "d" {
				boot = nil
			}
			require.NoError(t, raftgroup.Create(c.nodes[name].config(), boot))
			c.nodes[name].mustOpen()
		}
		l := c.leader()
		require.NoError(t, l.group.AddLearner(t.Context(), member("d")))
		c.converge()
		l = c.leader()
		for _, name := range c.others(l.name, "d") {
			c.net.Cut(trivet.NodeID(l.name), trivet.NodeID(name))
			c.net.Cut(trivet.NodeID(name), trivet.NodeID(l.name))
		}
		pass(heartbeat * 3 / 10)
		require.True(t, l.group.Status().IsLeader)
		require.NoError(t, raftgroup.VerifyLeader(l.group), "the library says yes")
		_, err := l.group.ReadGate()
		require.ErrorIs(t, err, trivet.ErrUnavailable)
	})
}

// D4: a reply that was made long ago proves nothing about now.
func TestGateMeasuresFromSending(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t, "a", "b", "c")
		c.configure = shortLease
		for _, n := range c.nodes {
			require.NoError(t, raftgroup.Create(n.config(), members("a", "b", "c")))
			n.mustOpen()
		}
		l := c.leader()
		release := c.net.Hold(func(e transport.Envelope) bool { return e.Reply && e.To == trivet.NodeID(l.name) })
		_ = raftgroup.StartVerify(l.group) // the library sends a heartbeat
		synctest.Wait()
		stop := c.net.Lose(func(e transport.Envelope) bool { return !e.Reply && e.From == trivet.NodeID(l.name) })
		pass(heartbeat * 2 / 5)
		verified := make(chan error, 1)
		wait := raftgroup.StartVerify(l.group)
		go func() { verified <- wait() }()
		synctest.Wait()
		release()
		defer stop()
		require.NoError(t, <-verified, "the library says yes")
		_, err := l.group.ReadGate()
		require.ErrorIs(t, err, trivet.ErrUnavailable)
		stop()
		c.leader() // and it comes back with the next round
	})
}

// A leader that was suspended with its machine has lost its lease, though its clock stood still.
func TestSuspendVoidsLease(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t, "a", "b", "c")
		var asleep time.Duration
		c.configure = func(cfg *raftgroup.Config) { cfg.BootTime = func() time.Duration { return asleep } }
		for _, n := range c.nodes {
			require.NoError(t, raftgroup.Create(n.config(), members("a", "b", "c")))
			n.mustOpen()
		}
		l := c.leader()
		synctest.Wait()
		asleep = time.Hour
		_, err := l.group.ReadGate()
		require.ErrorIs(t, err, trivet.ErrUnavailable)
	})
}

func gates(c *cluster) (open []string) {
	for name, n := range c.nodes {
		if n.group == nil {
			continue
		}
		if _, err := n.group.ReadGate(); err == nil {
			open = append(open, name)
		}
	}
	return open
}

// H8: a voter that restarts has forgotten its leader, but not what it promised it.
func TestRestartedVoterKeepsItsPromise(t *testing.T) {
	for _, after := range []time.Duration{1100, 1300, 1500, 1700, 1900} {
		synctest.Test(t, func(t *testing.T) {
			c := startCluster(t, "a", "b", "c")
			l := c.leader()
			others := c.others(l.name)
			voter, rival := c.nodes[others[0]], c.nodes[others[1]]
			c.net.Cut(trivet.NodeID(l.name), trivet.NodeID(rival.name))
			c.net.Cut(trivet.NodeID(rival.name), trivet.NodeID(l.name))
			pass(after * time.Millisecond) //nolint:durationcheck // a number of milliseconds
			for range 6 {
				voter.die()
				voter.mustOpen()
				for range 80 {
					pass(5 * time.Millisecond)
					require.LessOrEqual(t, len(gates(c)), 1, "two replicas serve reads")
				}
			}
		})
	}
}

// A replica that was never part of an election has promised nothing, so a new group starts at once;
// one that was gives no vote for one heartbeat after its start.
func TestQuarantine(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t, "a", "b", "c")
		a, b := c.nodes["a"], c.nodes["b"]
		require.NoError(t, raftgroup.Create(a.config(), members("a", "b", "c")))
		ask := func(term uint64) bool {
			reply, err := b.link.Call(t.Context(), "a", transport.Message{
				Kind: transport.KindRequestVote, Group: testGroup, From: replicaID("b"), To: replicaID("a"),
				Body: raftgroup.VoteBody(term, 1, 1, false),
			})
			require.NoError(t, err)
			_, yes, err := raftgroup.Granted(reply.Body)
			require.NoError(t, err)
			return yes
		}
		a.mustOpen()
		require.True(t, ask(2), "a new group must not be slowed")
		a.die()
		a.mustOpen()
		require.False(t, ask(3), "it may have promised a leader not to")
		pass(heartbeat * 9 / 10)
		require.False(t, ask(3))
		pass(heartbeat / 10)
		require.True(t, ask(3))
	})
}

// A transfer lets others vote against the lease, so the lease goes before the transfer begins and
// stays away until no copy of the request can have an effect any more.
func TestTransferVoidsLease(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := startCluster(t, "a", "b", "c")
		c.converge() // all have answered
		l := c.leader()
		target := c.nodes[c.others(l.name)[0]]
		term := raftgroup.RaftTerm(l.group)
		release := c.net.Hold(transport.OfKind(transport.KindTimeoutNow))
		defer release()
		failed := make(chan error, 1)
		go func() { failed <- l.group.TransferTo(context.Background(), replicaID(target.name)) }()
		synctest.Wait()
		c.eventually("the request is under way", func() bool {
			select {
			case err := <-failed:
				require.FailNow(t, "it came back at once", "%v", err)
			default:
			}
			return c.net.Held() > 0
		})
		require.Empty(t, gates(c), "reads during the transfer")
		require.ErrorIs(t, <-failed, trivet.ErrUnavailable)
		for range 30 {
			pass(heartbeat / 10)
			require.Empty(t, gates(c), "reads after a transfer that may still happen")
		}
		require.Equal(t, l, c.leader())
		release() // the request arrives after all
		for range 40 {
			pass(heartbeat / 10)
			require.Equal(t, []string{l.name}, gates(c))
		}
		require.Equal(t, term, raftgroup.RaftTerm(l.group))
	})
}

func TestTransfer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := startCluster(t, "a", "b", "c")
		c.mustPut("x", "1")
		c.converge()
		l := c.leader()
		target := c.nodes[c.others(l.name)[1]]
		require.NoError(t, l.group.TransferTo(t.Context(), replicaID(l.name)))
		require.NoError(t, l.group.TransferTo(t.Context(), replicaID(target.name)))
		require.Equal(t, target, c.leader())
		require.Equal(t, "1", target.machine.get("x"))
		require.ErrorIs(t, l.group.TransferTo(t.Context(), replicaID("c")), trivet.ErrNotLeader)
		c.converge()
		start := time.Now()
		require.NoError(t, target.group.TransferTo(t.Context(), replicaID(l.name)))
		require.Equal(t, l, c.leader())
		require.Less(t, time.Since(start), heartbeat, "a transfer forth must not delay reads after one back")
		require.ErrorIs(t, l.group.TransferTo(t.Context(), replicaID("z")), trivet.ErrNotFound)
		c.converge()
	})
}

// Raft takes no proposals and serves no reads during a transfer, so one towards a dead replica, tried
// again and again, would stop a group that has a quorum.
func TestTransferToASilentReplicaTriesNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := startCluster(t, "a", "b", "c")
		l := c.leader()
		target := c.others(l.name)[0]
		c.net.Isolate(trivet.NodeID(target))
		pass(heartbeat)
		for range 10 {
			require.ErrorIs(t, l.group.TransferTo(t.Context(), replicaID(target)), trivet.ErrUnavailable)
			require.Equal(t, []string{l.name}, gates(c))
			c.mustPut("x", "1")
		}
	})
}

// D9: a deposed leader must not append under its successor's term.
func TestHeartbeatOfSuccessorDeposesFirst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := startCluster(t, "a", "b", "c")
		c.mustPut("x", "1")
		c.converge() // any of them may be elected
		old := c.leader()
		names := c.others(old.name)
		next := c.nodes[names[0]]
		oldNode := trivet.NodeID(old.name)
		stop := c.net.Lose(func(e transport.Envelope) bool {
			if e.Reply || e.To != oldNode {
				return false
			}
			switch e.Message.Kind {
			case transport.KindAppendEntries:
				return !raftgroup.IsHeartbeatBody(e.Message.Body)
			case transport.KindRequestVote, transport.KindRequestPreVote:
				return true
			}
			return false
		})
		// The old leader's own main loop takes no part in the transfer.
		_, err := old.link.Call(t.Context(), trivet.NodeID(names[1]), transport.Message{
			Kind: transport.KindTransfer, Group: testGroup, From: replicaID(old.name), To: replicaID(names[1]),
			Body: raftgroup.TransferBody(raftgroup.RaftTerm(old.group), replicaID(next.name)),
		})
		require.NoError(t, err)
		_, err = old.link.Call(t.Context(), trivet.NodeID(next.name), transport.Message{
			Kind: transport.KindTimeoutNow, Group: testGroup, From: replicaID(old.name), To: replicaID(next.name),
			Body: raftgroup.TimeoutNowBody(old.group, replicaID(next.name)),
		})
		require.NoError(t, err)
		c.eventually("the new leader has a term", func() bool { return next.group.Status().IsLeader })
		c.eventually("its heartbeat arrives", func() bool {
			return raftgroup.RaftTerm(old.group) == raftgroup.RaftTerm(next.group)
		})
		require.Error(t, raftgroup.RaftApply(old.group, []byte("y=from the old leader")))
		next.mustSet("x", "2")
		stop()
		c.converge()
		require.Empty(t, old.machine.get("y"))
	})
}

// While a follower's log write takes long, its heartbeats are still answered.
func TestFastHeartbeatKeepsSlowFollower(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t, "a", "b", "c")
		disks := stallDisks(c)
		for _, n := range c.nodes {
			require.NoError(t, raftgroup.Create(n.config(), members("a", "b", "c")))
			n.mustOpen()
		}
		l := c.leader()
		names := c.others(l.name)
		c.net.Isolate(trivet.NodeID(names[1])) // so the slow one is needed
		pass(heartbeat / 2)
		term := raftgroup.RaftTerm(l.group)
		resume := disks[names[0]].stall()
		result := make(chan error, 1)
		go func() { result <- l.set("x", "1") }()
		pass(heartbeat * 3 / 2)
		require.Equal(t, []string{l.name}, gates(c), "the leader keeps its lease through a slow disk")
		resume()
		require.NoError(t, <-result)
		require.Equal(t, term, raftgroup.RaftTerm(l.group))
	})
}
