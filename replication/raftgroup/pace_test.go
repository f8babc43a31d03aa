package raftgroup_test

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/replication/raftgroup"
	"github.com/trivet-csi/trivet/replication/transport"
)

// A candidate whose requests for votes were lost withdraws and stands again: the library alone would not for hours.
func TestCandidateWithdraws(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := startCluster(t, "a", "b", "c")
		c.converge() // or the deaf one may be the only one that could be elected
		l := c.leader()
		rest := c.others(l.name)
		deaf := trivet.NodeID(rest[1]) // it answers, and asks nothing: else it would stand, or raise the other's term
		defer c.net.Lose(func(e transport.Envelope) bool { return !e.Reply && e.From == deaf })()
		stop := c.net.Lose(func(e transport.Envelope) bool { return e.Message.Kind == transport.KindRequestVote })
		l.die()
		pass(3 * heartbeat)
		stop()
		began := time.Now()
		c.leader(rest[0])
		require.Less(t, time.Since(began), 5*heartbeat)
	})
}

// A voter that fell behind in a newer term, and can answer but not ask, does not keep the one with the newest log from
// standing.
func TestNewerTermIsTakenOver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := startCluster(t, "a", "b", "c")
		c.mustPut("x", "1")
		l := c.leader()
		rest := c.others(l.name)
		next, old := c.nodes[rest[0]], c.nodes[rest[1]]
		c.net.Isolate(trivet.NodeID(old.name))
		l.mustSet("x", "2")
		pass(2 * heartbeat)
		raftgroup.Adopt(old.group, raftgroup.RaftTerm(l.group)+5, replicaID(next.name))
		defer c.net.Lose(func(e transport.Envelope) bool { return !e.Reply && e.From == trivet.NodeID(old.name) })()
		l.die()
		c.net.HealAll()
		require.Equal(t, next, c.leader(rest...))
		require.Greater(t, raftgroup.RaftTerm(next.group), uint64(6))
		require.Equal(t, "2", next.machine.get("x"))
	})
}

// The library names the leader that it had for ever; we do for two Heartbeats.
func TestSilentLeaderIsForgotten(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := startCluster(t, "a", "b", "c")
		l := c.leader()
		f := c.nodes[c.others(l.name)[0]]
		c.eventually("it follows", func() bool { return f.group.Status().Leader == replicaID(l.name) })
		changed := f.group.Changed()
		c.net.Isolate(trivet.NodeID(f.name))
		pass(heartbeat * 3 / 2)
		require.Equal(t, replicaID(l.name), f.group.Status().Leader)
		pass(heartbeat)
		require.Empty(t, f.group.Status().Leader)
		select {
		case <-changed:
		default:
			t.Error("nobody was told")
		}
		c.net.HealAll()
		c.eventually("it follows again", func() bool { return f.group.Status().Leader == replicaID(l.name) })
		require.Equal(t, l, c.leader(), "and has disturbed nobody")
	})
}

// What is proposed during a transfer waits for its outcome, whatever that is.
func TestProposalsWaitForATransfer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := startCluster(t, "a", "b", "c")
		l := c.leader()
		to := c.others(l.name)[0]
		proposed := make(chan error, 1)
		stop := c.net.Lose(func(e transport.Envelope) bool {
			if e.Message.Kind != transport.KindTimeoutNow || e.Reply {
				return false
			}
			go func() { proposed <- l.set("x", "1") }()
			return true
		})
		began := time.Now()
		require.ErrorIs(t, l.group.TransferTo(t.Context(), replicaID(to)), trivet.ErrUnavailable)
		require.LessOrEqual(t, time.Since(began), heartbeat*11/10)
		require.NoError(t, <-proposed, "it leads on")
		stop()
		c.leader()

		began = time.Now()
		require.NoError(t, l.group.TransferTo(t.Context(), replicaID(to)))
		require.Less(t, time.Since(began), heartbeat/10)
		require.ErrorIs(t, l.set("x", "2"), trivet.ErrNotLeader)
		c.leader(to).mustSet("x", "2")
	})
}
