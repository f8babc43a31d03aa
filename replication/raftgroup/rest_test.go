package raftgroup_test

import (
	"fmt"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/raft"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/replication/raftgroup"
	"github.com/trivet-csi/trivet/replication/transport"
)

// restingCluster returns a cluster in which the library has nothing to do.
func restingCluster(t *testing.T) (c *cluster, leader *node) {
	t.Helper()
	c = startCluster(t, "a", "b", "c")
	c.mustPut("x", "1")
	c.converge()
	l := c.leader()
	rests(c, l, 2)
	return c, l
}

// rests waits until so many calls rest: each does after two of the library's CommitTimeouts.
func rests(c *cluster, l *node, n int) {
	c.t.Helper()
	c.eventually(fmt.Sprintf("%d calls rest", n), func() bool { return raftgroup.Resting(l.group) == n })
}

// An idle group's calls rest, and a write does not wait for them.
func TestWriteEndsRest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, l := restingCluster(t)
		for range 5 {
			pass(heartbeat / 3)
			began := time.Now()
			l.mustSet("x", "2")
			require.Less(t, time.Since(began), heartbeat/20)
			rests(c, l, 2)
			for _, f := range c.others(l.name) {
				require.Equal(t, "2", c.nodes[f].machine.get("x"), "the followers have heard of the commit")
			}
		}
	})
}

// TellCommit bounds how long followers do not hear of a commit that nothing follows.
func TestFollowersHearOfTheLastCommit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const tell = 20 * time.Millisecond
		names := []string{"a", "b", "c"}
		c := newCluster(t, names...)
		c.configure = func(cfg *raftgroup.Config) { cfg.TellCommit = tell }
		for _, name := range names {
			require.NoError(t, raftgroup.Create(c.nodes[name].config(), members(names...)))
			c.nodes[name].mustOpen()
		}
		c.mustPut("x", "0")
		for i := range 5 {
			pass(heartbeat)
			l, want := c.leader(), fmt.Sprint(i)
			l.mustSet("x", want)
			pass(2*tell + 20*time.Millisecond) // and the way there, of 5 ms at most
			for _, f := range c.others(l.name) {
				require.Equal(t, want, c.nodes[f].machine.get("x"))
			}
		}
	})
}

// Who leads no more lets the library's replicators go: it waits for them before it leads again, or stops.
func TestRestEndsWithLeadership(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, l := restingCluster(t)
		raftgroup.Adopt(l.group, raftgroup.RaftTerm(l.group)+5, replicaID(c.others(l.name)[0]))
		pass(heartbeat / 4)
		require.Zero(t, raftgroup.Resting(l.group), "before anybody leads, whose first entry would end it, too")
		c.leader()
	})
}

// A call rests no longer than its follower answers.
func TestRestEndsWithSilence(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, l := restingCluster(t)
		gone := c.others(l.name)[0]
		c.net.Isolate(trivet.NodeID(gone))
		rests(c, l, 1)
		pass(3 * heartbeat)
		require.Equal(t, 1, raftgroup.Resting(l.group))
		c.net.HealAll()
		rests(c, l, 2)
		require.Equal(t, l, c.leader())
	})
}

// A commit index that has risen since ends the rest at the next tick; without one it goes on.
func TestRestEndsWithCommit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, l := restingCluster(t)
		f := replicaID(c.others(l.name)[0])
		informed := raftgroup.RestBehind(l.group, f, 0)
		pass(heartbeat / 5)
		select {
		case <-informed:
			t.Error("there was nothing to tell")
		default:
		}
		behind := raftgroup.RestBehind(l.group, f, 1)
		pass(heartbeat / 5)
		select {
		case <-behind:
		default:
			t.Error("it was not woken")
		}
	})
}

// A replica that was started anew has forgotten what is committed, and is told as soon as its clock shows that.
func TestRestartedFollowerIsTold(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, l := restingCluster(t)
		f := c.nodes[c.others(l.name)[0]]
		f.stop()
		f.mustOpen()
		began := time.Now()
		c.eventually("it is told", func() bool {
			return f.group.Status().Commit == l.group.Status().Commit
		})
		require.Less(t, time.Since(began), 5*heartbeat)
		rests(c, l, 2)
	})
}

// Should that ever be missed, it is told again after a while, and not all the time.
func TestFollowersAreToldAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, l := restingCluster(t)
		var toldN atomic.Int64
		defer c.net.Lose(func(e transport.Envelope) bool {
			if !e.Reply && e.Message.Kind == transport.KindAppendEntries && !raftgroup.IsHeartbeatBody(e.Message.Body) {
				toldN.Add(1)
			}
			return false
		})()
		pass(100 * heartbeat)
		require.Zero(t, toldN.Load())
		pass(30 * heartbeat)
		require.Equal(t, int64(2), toldN.Load(), "each of them once")
		require.Equal(t, l, c.leader())
	})
}

// Whatever becomes of a proposal, nothing of it stays behind.
func TestProposalsAreForgotten(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, l := restingCluster(t)
		require.Zero(t, raftgroup.Expected(l.group))
		c.net.Isolate(trivet.NodeID(l.name))
		lost := make(chan error, 1)
		go func() { lost <- l.set("x", "2") }()
		synctest.Wait()
		require.Equal(t, 1, raftgroup.Expected(l.group))
		require.ErrorIs(t, <-lost, trivet.ErrUnavailable)
		c.leader(c.others(l.name)...).mustSet("x", "3")
		c.net.HealAll()
		c.converge()
		require.Zero(t, raftgroup.Expected(l.group))
	})
}

// Contract of the library: what it refuses at once it answers with a value, what it takes with a pointer.
func TestRefusalsAreToldApart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := startCluster(t, "a")
		a := c.leader()
		refusal, err := raftgroup.Refused(a.group, []byte("x=1"))
		require.NoError(t, err)
		require.False(t, refusal)
		require.NoError(t, raftgroup.StopRaft(a.group))
		refusal, err = raftgroup.Refused(a.group, []byte("x=2"))
		require.ErrorIs(t, err, raft.ErrRaftShutdown)
		require.True(t, refusal)
		_, err = a.group.Propose(t.Context(), []byte("x=3"))
		require.Error(t, err)
		require.NotErrorIs(t, err, trivet.ErrClosed)
	})
}
