package raftgroup_test

import (
	"context"
	"testing"
	"testing/synctest"

	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/replication/raftgroup"
	"github.com/trivet-csi/trivet/replication/transport"
)

// overlapped starts three replicas with OverlapFlush on disks that can be made to hang. It returns the leader and
// two followers.
func overlapped(t *testing.T) (c *cluster, disks map[string]*stallDisk, l, f, g *node) {
	t.Helper()
	c = newCluster(t, "a", "b", "c")
	disks = stallDisks(c)
	stall := c.configure
	c.configure = func(cfg *raftgroup.Config) {
		stall(cfg)
		cfg.OverlapFlush = true
	}
	for _, n := range c.nodes {
		require.NoError(t, raftgroup.Create(n.config(), members("a", "b", "c")))
		n.mustOpen()
	}
	c.mustPut("x", "0")
	c.converge()
	l = c.leader()
	others := c.others(l.name)
	return c, disks, l, c.nodes[others[0]], c.nodes[others[1]]
}

// lonely cuts a node off and returns how to mend that.
func (c *cluster) lonely(n *node) (mend func()) {
	return c.net.Lose(func(e transport.Envelope) bool {
		return e.From == trivet.NodeID(n.name) || e.To == trivet.NodeID(n.name)
	})
}

// begin proposes, and lets half a second pass: less than a stall that anybody notices.
func begin(n *node, v string) (outcome <-chan error) {
	done := make(chan error, 1)
	go func() { done <- n.set("x", v) }()
	pass(heartbeat / 2)
	return done
}

// With the leader's disk hanging, its followers have the entry meanwhile: the flushes overlap.
func TestOverlapSendsBeforeItsDisk(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, disks, l, f, g := overlapped(t)
		resume := disks[l.name].stall()
		defer resume()
		_, before := raftgroup.LogBounds(f.group)
		done := begin(l, "1")
		for _, n := range []*node{f, g} {
			_, last := raftgroup.LogBounds(n.group)
			require.Equal(t, before+1, last)
		}
		resume()
		require.NoError(t, <-done)
	})
}

// Gate 1: what a follower has in memory only, it does not acknowledge; neither to a copy of the request, nor to one
// that asks for nothing but that place.
func TestGate1(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, disks, l, f, g := overlapped(t)
		mend := c.lonely(g)
		resume := disks[f.name].stall()
		defer resume()
		before := l.group.Status().Commit
		done := begin(l, "1")
		require.Empty(t, done)
		require.Equal(t, before, l.group.Status().Commit)

		_, last := raftgroup.LogBounds(f.group)
		term := raftgroup.RaftTerm(l.group)
		require.Equal(t, before+1, last, "it has the entry")
		for name, body := range map[string][]byte{
			"copy":  raftgroup.AppendBody(term, last-1, term, []byte("x=1")),
			"empty": raftgroup.AppendBody(term, last, term, nil),
		} {
			ctx, cancel := context.WithTimeout(t.Context(), heartbeat/4)
			_, err := l.link.Call(ctx, trivet.NodeID(f.name), transport.Message{
				Kind: transport.KindAppendEntries, Group: testGroup, From: replicaID(l.name), To: replicaID(f.name), Body: body,
			})
			require.ErrorIs(t, err, context.DeadlineExceeded, name)
			cancel()
		}
		resume()
		require.NoError(t, <-done)
		mend()
		c.converge()
	})
}

// Gate 2: committed means that the leader has it on disk, too.
func TestGate2(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, disks, l, _, _ := overlapped(t)
		resume := disks[l.name].stall()
		defer resume()
		before := l.group.Status().Commit
		done := begin(l, "1")
		require.Empty(t, done)
		require.Equal(t, before, l.group.Status().Commit, "both followers have it on disk")
		resume()
		require.NoError(t, <-done)
		c.converge()
	})
}

// Gate 4: the state machine does not get ahead of the log, though the rest of the group has committed (H4).
func TestGate4(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, disks, l, f, _ := overlapped(t)
		resume := disks[f.name].stall()
		defer resume()
		require.NoError(t, l.set("x", "1"), "with the other follower")
		_, last := raftgroup.LogBounds(l.group)
		c.eventually("it has the entry, in its queue", func() bool {
			_, have := raftgroup.LogBounds(f.group)
			return have == last
		})
		applied, _ := f.machine.Applied()
		require.Less(t, applied, last)
		// The leader's next request, which would tell of the commit, waits for the answer to this one. Its timeout, or
		// another leader, can bring the news all the same.
		ctx, cancel := context.WithTimeout(t.Context(), heartbeat/4)
		defer cancel()
		term := raftgroup.RaftTerm(l.group)
		_, err := l.link.Call(ctx, trivet.NodeID(f.name), transport.Message{
			Kind: transport.KindAppendEntries, Group: testGroup, From: replicaID(l.name), To: replicaID(f.name),
			Body: raftgroup.AppendCommitBody(term, last, term, last),
		})
		require.ErrorIs(t, err, context.DeadlineExceeded, "gate 1")
		now, _ := f.machine.Applied()
		require.Equal(t, applied, now)
		resume()
		c.eventually("it applies", func() bool { now, _ := f.machine.Applied(); return now == last })
		c.converge()
	})
}
