package raftgroup_test

import (
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/replication/raftgroup"
	"github.com/trivet-csi/trivet/replication/transport"
)

// herald is a network that says of other nodes what the test tells it to.
type herald struct {
	*transport.MemoryNode

	mu  sync.Mutex
	fns []func(transport.Presence)
}

func (h *herald) Watch(fn func(transport.Presence)) func() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.fns = append(h.fns, fn)
	return func() {}
}

func (h *herald) PresenceOf(node trivet.NodeID) transport.Presence {
	return transport.Presence{Node: node}
}

func (h *herald) say(p transport.Presence) {
	h.mu.Lock()
	fns := h.fns
	h.mu.Unlock()
	for _, fn := range fns {
		fn(p)
	}
}

// heralds starts a cluster whose nodes hear of deaths from the returned function only.
func heralds(t *testing.T, names ...string) (*cluster, func(to string, p transport.Presence)) {
	t.Helper()
	all := map[string]*herald{}
	c := newClusterOn(t, func(n *node) transport.Network {
		all[n.name] = &herald{MemoryNode: n.link}
		return all[n.name]
	}, names...)
	for _, name := range names {
		n := c.nodes[name]
		require.NoError(t, raftgroup.Create(n.config(), members(names...)))
		n.mustOpen()
	}
	c.mustPut("x", "1")
	c.converge()
	return c, func(to string, p transport.Presence) { all[to].say(p) }
}

func gone(node string) transport.Presence {
	return transport.Presence{Node: trivet.NodeID(node), State: transport.Gone}
}

// TestFailover: with proof that the leader's process is gone nobody waits for a timeout.
func TestFailover(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, tell := heralds(t, "a", "b", "c")
		old := c.leader()
		term := raftgroup.RaftTerm(old.group)
		others := c.others(old.name)
		old.die()
		began := time.Now()
		for _, name := range others {
			tell(name, gone(old.name))
		}
		next := c.leader(others...)
		require.Less(t, time.Since(began), heartbeat/4, "in the bubble's time")
		require.Equal(t, term+1, raftgroup.RaftTerm(next.group), "one election")
		require.Equal(t, "1", next.machine.get("x"))
		c.mustPut("x", "2")
	})
}

// TestFailoverTakesTheNewestLog: the replica with the smaller ID would lose its election, and the
// other had to wait.
func TestFailoverTakesTheNewestLog(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, tell := heralds(t, "a", "b", "c")
		require.NoError(t, c.leader().group.TransferTo(t.Context(), replicaID("c")))
		old := c.leader("c")
		stop := c.net.Lose(func(e transport.Envelope) bool { // a hears no entries
			return e.To == "a" && e.Message.Kind == transport.KindAppendEntries &&
				!raftgroup.IsHeartbeatBody(e.Message.Body)
		})
		old.mustSet("x", "2")
		old.die()
		stop()
		term := raftgroup.RaftTerm(c.nodes["a"].group)
		began := time.Now()
		tell("a", gone("c"))
		tell("b", gone("c"))
		require.Equal(t, "b", c.leader("a", "b").name)
		require.Less(t, time.Since(began), heartbeat/4)
		require.Equal(t, term+1, raftgroup.RaftTerm(c.nodes["b"].group))
		require.Equal(t, "2", c.nodes["b"].machine.get("x"))
	})
}

// TestFailoverNeedsAQuorumOfProof: one replica that takes a living leader for dead changes nothing.
func TestFailoverNeedsAQuorumOfProof(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, tell := heralds(t, "a", "b", "c")
		l := c.leader()
		term := raftgroup.RaftTerm(l.group)
		tell(c.others(l.name)[0], gone(l.name))
		pass(4 * heartbeat)
		require.Equal(t, l, c.leader())
		require.Equal(t, term, raftgroup.RaftTerm(l.group))
	})
}

// TestSilenceIsNoProof while the leader is still heard: the read lease rests on the followers' promise.
func TestSilenceIsNoProof(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, tell := heralds(t, "a", "b", "c")
		l := c.leader()
		term := raftgroup.RaftTerm(l.group)
		silent := gone(l.name)
		silent.Silent = true
		for _, name := range c.others(l.name) {
			tell(name, silent)
		}
		pass(4 * heartbeat)
		require.Equal(t, l, c.leader())
		require.Equal(t, term, raftgroup.RaftTerm(l.group))
	})
}

// TestFailoverOfTheSilent: followers that know nothing but that the leader is silent stand as soon as
// their promise to it has run out, not one to two Heartbeats after. Now and then the library's own timer is
// faster, and its election may be split: hence the median of many.
func TestFailoverOfTheSilent(t *testing.T) {
	var took []time.Duration
	for range 15 {
		synctest.Test(t, func(t *testing.T) {
			c, tell := heralds(t, "a", "b", "c")
			old := c.leader()
			others := c.others(old.name)
			old.die()
			began := time.Now()
			for _, name := range others {
				p := gone(old.name)
				p.Silent = true
				tell(name, p)
			}
			c.leader(others...)
			took = append(took, time.Since(began)) // in the bubble's time
		})
	}
	slices.Sort(took)
	require.Less(t, took[len(took)/2], heartbeat*5/4, "all: %v", took)
}

// TestWakesQuickly: the replicas of a group that rested need not wait for each other's old promises, nor
// for a timeout.
func TestWakesQuickly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := startCluster(t, "a", "b", "c")
		c.mustPut("x", "1")
		c.converge()
		term := raftgroup.RaftTerm(c.leader().group)
		sleep := func() {
			for _, n := range c.nodes {
				n.stop()
			}
			pass(2 * heartbeat)
		}
		wake := func() time.Duration {
			began := time.Now()
			for _, n := range c.nodes {
				n.mustOpen()
			}
			require.Equal(t, "1", c.leader().machine.get("x"))
			return time.Since(began) // in the bubble's time
		}
		sleep()
		require.GreaterOrEqual(t, wake(), heartbeat, "who knows what was promised before")

		sleep()
		rested := time.Now().Add(-2 * heartbeat)
		c.configure = func(cfg *raftgroup.Config) { cfg.RestedSince = rested }
		require.Less(t, wake(), heartbeat/4)
		require.Less(t, raftgroup.RaftTerm(c.leader().group), term+5, "one election each time, give or take")

		for _, n := range c.nodes {
			n.stop()
		}
		rested = time.Now() // a promise of this moment still holds
		require.GreaterOrEqual(t, wake(), heartbeat)
	})
}

// TestPrivilegedVotes: a candidate gets a vote against a living leader only if the leader announced
// it, or the voter itself knows that the leader is dead.
func TestPrivilegedVotes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, _ := heralds(t, "a", "b", "c")
		l := c.leader()
		voter, rogue := c.nodes[c.others(l.name)[0]], c.nodes[c.others(l.name)[1]]
		term := raftgroup.RaftTerm(l.group)
		_, last := raftgroup.LogBounds(voter.group)
		send := func(from *node, kind transport.Kind, body []byte) (transport.Message, error) {
			return from.link.Call(t.Context(), trivet.NodeID(voter.name), transport.Message{
				Kind: kind, Group: testGroup, From: replicaID(from.name), To: replicaID(voter.name), Body: body,
			})
		}
		for name, body := range map[string][]byte{
			"by transfer": raftgroup.VoteBody(term+1, last+9, term, true),
			"by proof":    raftgroup.ProofVoteBody(term+1, last+9, term),
		} {
			reply, err := send(rogue, transport.KindRequestVote, body)
			require.NoError(t, err, name)
			_, yes, err := raftgroup.Granted(reply.Body)
			require.NoError(t, err, name)
			require.False(t, yes, name)
		}
		_, err := send(rogue, transport.KindTransfer, raftgroup.TransferBody(term, replicaID(rogue.name)))
		require.ErrorIs(t, err, trivet.ErrInvalid, "only the leader announces")
		reply, err := send(rogue, transport.KindStanding, raftgroup.StandingBody(term))
		require.NoError(t, err)
		proven, err := raftgroup.Proven(reply.Body)
		require.NoError(t, err)
		require.False(t, proven)
		require.Equal(t, term, raftgroup.RaftTerm(voter.group))
		require.Equal(t, l, c.leader())

		require.NoError(t, l.group.TransferTo(t.Context(), replicaID(rogue.name)))
		require.Equal(t, rogue, c.leader(), "a real handover passes")
		require.Equal(t, term+1, raftgroup.RaftTerm(rogue.group))
	})
}

// TestLearnerNeverStands, whatever it knows.
func TestLearnerNeverStands(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, tell := heralds(t, "a", "b")
		c.nodes["z"] = &node{c: c, name: "z", fs: vfs.NewCrashableMem()}
		z := c.nodes["z"]
		z.connect()
		require.NoError(t, raftgroup.Create(z.config(), nil))
		z.mustOpen()
		l := c.leader("a", "b")
		require.NoError(t, l.group.AddLearner(t.Context(), member("z")))
		c.converge()
		other := c.others(l.name, "z")[0]
		l.die()
		term := raftgroup.RaftTerm(z.group)
		tell("z", gone(l.name))
		tell(other, gone(l.name))
		pass(4 * heartbeat)
		require.Equal(t, term, raftgroup.RaftTerm(z.group), "nobody stood: one voter of two is no quorum")
		require.Equal(t, raftgroup.Status{}.Leader, z.group.Status().Leader)
	})
}
