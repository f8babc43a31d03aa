package raftgroup_test

import (
	"fmt"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/time/rate"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/replication/raftgroup"
	"github.com/trivet-csi/trivet/replication/transport"
)

// second is another group on the machines of a cluster: same Mux, same disk, same log.
type second struct {
	group   *raftgroup.Group
	machine *kv
}

func (n *node) openSecond(create bool) *second {
	t := n.c.t
	t.Helper()
	m, err := openKV(n.fs, "/machine-2")
	require.NoError(t, err)
	cfg := n.config()
	cfg.Group, cfg.Dir, cfg.Machine = testGroup+1, "/disk/groups/w", m
	if create {
		require.NoError(t, raftgroup.Create(cfg, members("a", "b", "c")))
	}
	g, err := raftgroup.Open(cfg)
	require.NoError(t, err)
	return &second{g, m}
}

// While one group pulls its state into a replica, slowly because of the rate that all groups of the process share, and
// then not at all because its machine hangs in the middle of it, another group of the same nodes, disks and
// connections notices nothing: its leader stays, with its lease, each of its writes commits at the
// first attempt, and the replica on the node that catches up applies them.
func TestCatchUpLeavesOtherGroupsAlone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t, "a", "b", "c")
		behind(t, c)
		c.leader()
		hook, there, release := stuckAt(behindRows / 2)
		c.configure = func(cfg *raftgroup.Config) { cfg.CatchUpLimit = rate.NewLimiter(2<<10, 2<<10) }
		slow := c.nodes["c"]
		slow.openWith(hook)
		others := map[string]*second{}
		for name, n := range c.nodes {
			others[name] = n.openSecond(true)
		}
		defer func() {
			for _, o := range others {
				require.NoError(t, o.group.Close())
			}
		}()
		var lead *second
		c.eventually("the second group has a leader", func() bool {
			for _, o := range others {
				if _, err := o.group.ReadGate(); err == nil {
					lead = o
				}
			}
			return lead != nil
		})
		term := raftgroup.RaftTerm(lead.group)
		c.eventually("the first group catches up", func() bool { return slow.group.Status().CatchUp.DoneBytes > 0 })
		writes, stuck := 0, 0
		for stuck < 50 {
			require.True(t, slow.group.Status().CatchUp.Active, "it is over already: the test shows nothing")
			_, err := lead.group.Propose(t.Context(), fmt.Appendf(nil, "k%d=%d", writes%10, writes))
			require.NoError(t, err)
			_, err = lead.group.ReadGate()
			require.NoError(t, err, "its lease needs the heartbeats")
			require.Equal(t, term, raftgroup.RaftTerm(lead.group))
			writes++
			pass(50 * time.Millisecond)
			select {
			case <-there:
				stuck++
			default:
			}
		}
		require.Greater(t, writes, stuck, "none were made while the state was pulled")
		pass(2 * heartbeat)
		require.Equal(t, lead.machine.data(), others["c"].machine.data(), "the node follows in the other group")
		require.True(t, slow.group.Status().CatchUp.Active)
		release()
		c.converge()
	})
}

// A node that refuses every connection at once is not called in a tight loop, however long it is away and whatever is
// written, and is up to date at once when it returns: the library's longest backoff is 10.24 s (replication.go:
// failureWait doubled maxFailureScale-2 times), and nothing would cut it short.
func TestReturnIsNoticedSoon(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := startCluster(t, "a", "b", "c")
		away := c.nodes[c.others(c.leader().name)[0]]
		away.die()
		require.NoError(t, away.link.Close()) // calls fail at once, as where nobody listens
		calls := writeWithout(c, away, func(transport.Envelope) bool { return false })
		t.Logf("%d calls in 120 heartbeats", calls)
		require.Less(t, calls, int64(120*5))
		away.connect()
		away.mustOpen()
		require.Less(t, upToDate(c, away), 2*heartbeat, "in the bubble's time")
	})
}

// Where heartbeats alone are lost, a node that returns is found all the same: it is asked now and then.
func TestReturnIsNoticedWithoutHeartbeats(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := startCluster(t, "a", "b", "c")
		away := c.nodes[c.others(c.leader().name)[0]]
		node := trivet.NodeID(away.name)
		noBeats := func(e transport.Envelope) bool {
			return e.To == node && !e.Reply && e.Message.Kind == transport.KindAppendEntries && // one group's go alone
				raftgroup.IsHeartbeatBody(e.Message.Body)
		}
		away.die()
		require.NoError(t, away.link.Close())
		writeWithout(c, away, noBeats)
		defer c.net.Lose(noBeats)()
		away.connect()
		away.mustOpen()
		require.Less(t, upToDate(c, away), 7*heartbeat, "in the bubble's time")
	})
}

// writeWithout writes for 120 heartbeats while a node is away, loses what lost says, and returns how many messages were
// sent to it.
func writeWithout(c *cluster, away *node, lost func(transport.Envelope) bool) int64 {
	var calls atomic.Int64
	defer c.net.Lose(func(e transport.Envelope) bool {
		if e.To == trivet.NodeID(away.name) && !e.Reply {
			calls.Add(1)
		}
		return lost(e)
	})()
	l := c.leader()
	for k := range 120 {
		l.mustSet(fmt.Sprint("k", k%10), fmt.Sprint(k))
		pass(heartbeat)
	}
	return calls.Load()
}

// upToDate waits until a node has applied what the leader has now, and returns for how long it had to.
func upToDate(c *cluster, n *node) time.Duration {
	began := time.Now()
	want, _ := c.leader().machine.Applied()
	c.eventually("it is up to date", func() bool {
		have, _ := n.machine.Applied()
		return have >= want
	})
	return time.Since(began)
}
