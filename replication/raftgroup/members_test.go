package raftgroup_test

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/replication/raftgroup"
	"github.com/trivet-csi/trivet/replication/transport"
)

func (c *cluster) mustPromote(name string) {
	c.t.Helper()
	c.eventually("promote "+name, func() bool {
		return c.leader().group.Promote(context.Background(), replicaID(name)) == nil
	})
}

func TestMembership(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t, "a", "b", "c")
		a := c.nodes["a"]
		require.NoError(t, raftgroup.Create(a.config(), members("a")))
		a.mustOpen()
		c.leader()
		for k := range 50 {
			a.mustSet(fmt.Sprint(k), "v")
		}
		for _, name := range []string{"b", "c"} {
			n := c.nodes[name]
			require.NoError(t, raftgroup.Create(n.config(), nil))
			n.mustOpen()
			require.NoError(t, a.group.AddLearner(t.Context(), member(name)))
			require.NoError(t, a.group.AddLearner(t.Context(), member(name)), "again")
			wrong := member(name)
			wrong.Node = "elsewhere"
			require.ErrorIs(t, a.group.AddLearner(t.Context(), wrong), trivet.ErrExists)
			m, _ := memberOf(a, name)
			require.True(t, m.Learner)
			c.mustPromote(name)
			require.NoError(t, c.leader().group.Promote(t.Context(), replicaID(name)), "again")
			require.NoError(t, c.leader().group.AddLearner(t.Context(), member(name)), "a voter is more than asked for")
		}
		c.converge()
		require.Equal(t, members("a", "b", "c"), c.leader().group.Status().Members)
		require.Equal(t, members("a", "b", "c"), c.leader().machine.state.Members)

		l := c.leader()
		gone := c.others(l.name)[0]
		require.NoError(t, l.group.Remove(t.Context(), replicaID(gone)))
		require.NoError(t, l.group.Remove(t.Context(), replicaID(gone)), "again")
		require.ErrorIs(t, l.group.Promote(t.Context(), replicaID(gone)), trivet.ErrNotFound)
		require.Len(t, l.group.Status().Members, 2)
		c.nodes[gone].die()
		require.NoError(t, raftgroup.Destroy(c.nodes[gone].config()))
		c.converge()

		other := c.others(l.name)[0]
		require.ErrorIs(t, c.nodes[other].group.AddLearner(t.Context(), member(gone)), trivet.ErrNotLeader)
		require.NoError(t, l.group.Remove(t.Context(), replicaID(l.name)), "the leader itself")
		require.Equal(t, other, c.leader(other).name)
		require.ErrorIs(t, c.leader(other).group.Remove(t.Context(), replicaID(other)), trivet.ErrInvalid, "the last voter")
	})
}

func memberOf(n *node, name string) (raftgroup.Member, bool) {
	for _, m := range n.group.Status().Members {
		if m.Replica == replicaID(name) {
			return m, true
		}
	}
	return raftgroup.Member{}, false
}

// I14: a learner that lags gets no vote, and a new one is filled by a snapshot if need be.
func TestPromoteRefusesLaggard(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t, "a", "b")
		sent := countSnapshots(c)
		c.configure = func(cfg *raftgroup.Config) { cfg.SnapshotBytes = 128 << 10 }
		a, b := c.nodes["a"], c.nodes["b"]
		require.NoError(t, raftgroup.Create(a.config(), members("a")))
		a.mustOpen()
		c.leader()
		for k := range 200 {
			a.mustSet(fmt.Sprint(k), strings.Repeat("v", 100))
		}
		require.NoError(t, raftgroup.Create(b.config(), nil))
		b.mustOpen()
		c.net.Cut("a", "b")
		require.NoError(t, a.group.AddLearner(t.Context(), member("b")))
		require.ErrorIs(t, a.group.Promote(t.Context(), replicaID("b")), trivet.ErrPending)
		c.net.HealAll()
		c.mustPromote("b")
		require.Positive(t, sent.Load())
		c.converge()
		require.Equal(t, members("a", "b"), b.group.Status().Members)
	})
}

// H33: changes at the same time are made one after the other, each from the newest configuration.
func TestConcurrentChanges(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t, "a", "b", "c", "d", "e")
		a := c.nodes["a"]
		for name, n := range c.nodes {
			var boot []raftgroup.Member
			if name == "a" {
				boot = members("a")
			}
			require.NoError(t, raftgroup.Create(n.config(), boot))
			n.mustOpen()
		}
		c.leader()
		var wg sync.WaitGroup
		for _, name := range []string{"b", "c", "d", "e"} {
			wg.Go(func() {
				for a.group.AddLearner(context.Background(), member(name)) != nil {
					pass(10 * time.Millisecond)
				}
			})
		}
		wg.Wait()
		require.Len(t, a.group.Status().Members, 5)
		c.converge()
		for _, name := range []string{"b", "c", "d", "e"} {
			wg.Go(func() {
				for a.group.Promote(context.Background(), replicaID(name)) != nil {
					pass(10 * time.Millisecond)
				}
			})
		}
		wg.Wait()
		require.Equal(t, members("a", "b", "c", "d", "e"), a.group.Status().Members)
		c.converge()
	})
}

// A change is decided on one configuration and made on the same: a replica that is removed meanwhile
// does not come back by its promotion.
func TestPromoteDoesNotUndoRemove(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t, "a", "b")
		a, b := c.nodes["a"], c.nodes["b"]
		require.NoError(t, raftgroup.Create(a.config(), members("a")))
		require.NoError(t, raftgroup.Create(b.config(), nil))
		a.mustOpen()
		b.mustOpen()
		c.leader()
		for range 100 {
			require.NoError(t, a.group.AddLearner(t.Context(), member("b")))
			c.eventually("b follows", func() bool {
				s := a.group.Status()
				return s.Match[replicaID("b")] >= s.Commit
			})
			var wg sync.WaitGroup
			wg.Go(func() { _ = a.group.Promote(context.Background(), replicaID("b")) })
			wg.Go(func() { require.NoError(t, a.group.Remove(context.Background(), replicaID("b"))) })
			wg.Wait()
			require.Equal(t, members("a"), a.group.Status().Members)
		}
	})
}

// H37, S3: only members take part, from their own node, in their own name, and the refused change
// nothing.
func TestRogueSenders(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := startCluster(t, "a", "b", "c")
		c.mustPut("x", "1")
		c.converge()
		l := c.leader()
		victim := c.nodes[c.others(l.name)[0]]
		rogue := c.net.Node("rogue")
		term := raftgroup.RaftTerm(victim.group)
		first, last := raftgroup.LogBounds(victim.group)
		high := raftgroup.AppendBody(term+100, last, term, []byte("x=evil"))
		send := func(from *transport.MemoryNode, as string, kind transport.Kind, body []byte) error {
			_, err := from.Call(t.Context(), trivet.NodeID(victim.name), transport.Message{
				Kind: kind, Group: testGroup, From: trivet.ReplicaID(as), To: replicaID(victim.name), Body: body,
			})
			return err
		}
		third := c.nodes[c.others(l.name, victim.name)[0]]
		stranger, leader := string(replicaID("z")), string(replicaID(l.name))
		follower := string(replicaID(third.name))
		vote := raftgroup.VoteBody(term+100, last, term, true)
		election := raftgroup.TimeoutNowBody(l.group, replicaID(victim.name))
		oldElection := raftgroup.OldTimeoutNowBody(l.group, replicaID(victim.name), heartbeat)
		for name, err := range map[string]error{
			"entries as the leader":   send(rogue, leader, transport.KindAppendEntries, high),
			"entries as a stranger":   send(rogue, stranger, transport.KindAppendEntries, high),
			"entries as nobody":       send(rogue, "", transport.KindAppendEntries, high),
			"entries as a path":       send(rogue, "../../x", transport.KindAppendEntries, high),
			"vote as a member":        send(rogue, leader, transport.KindRequestVote, vote),
			"vote as a stranger":      send(rogue, stranger, transport.KindRequestVote, vote),
			"pre-vote as a stranger":  send(rogue, stranger, transport.KindRequestPreVote, vote),
			"election as leader":      send(rogue, leader, transport.KindTimeoutNow, election),
			"fetch":                   send(rogue, stranger, transport.KindFetch, raftgroup.FetchBody(l.group)),
			"image":                   send(rogue, stranger, transport.KindImageOpen, raftgroup.ImageOpenBody()),
			"another member's name":   send(l.link, follower, transport.KindAppendEntries, high),
			"junk of a member":        send(l.link, leader, transport.KindAppendEntries, []byte("junk")),
			"election by a follower":  send(third.link, follower, transport.KindTimeoutNow, election),
			"election asked long ago": send(l.link, leader, transport.KindTimeoutNow, oldElection),
		} {
			require.Error(t, err, name)
			require.NotErrorIs(t, err, trivet.ErrUnavailable, name)
		}
		_, err := rogue.Call(t.Context(), trivet.NodeID(victim.name), transport.Message{
			Kind: transport.KindAppendEntries, Group: testGroup + 1, To: replicaID(victim.name), From: replicaID(l.name),
			Body: high,
		})
		require.ErrorIs(t, err, trivet.ErrNotFound, "another group")
		require.Equal(t, term, raftgroup.RaftTerm(victim.group))
		f, n := raftgroup.LogBounds(victim.group)
		require.Equal(t, []uint64{first, last}, []uint64{f, n})
		require.Equal(t, l, c.leader())
		require.Equal(t, "1", victim.machine.get("x"))
	})
}

// A replica that waits to be added takes entries from whom the catalogue knows, votes for nobody, and
// one that lags asks the catalogue about a leader that it does not know.
func TestUnknownLeader(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t, "a", "b")
		known := map[trivet.ReplicaID]bool{}
		var mu sync.Mutex
		c.configure = func(cfg *raftgroup.Config) {
			cfg.IsMember = func(id trivet.ReplicaID, node trivet.NodeID) bool {
				mu.Lock()
				defer mu.Unlock()
				return known[id] && (node == "a" || node == "b")
			}
		}
		a, b := c.nodes["a"], c.nodes["b"]
		require.NoError(t, raftgroup.Create(b.config(), nil))
		b.mustOpen()
		call := func(kind transport.Kind, body []byte) error {
			_, err := a.link.Call(t.Context(), "b", transport.Message{
				Kind: kind, Group: testGroup, From: replicaID("a"), To: replicaID("b"), Body: body,
			})
			return err
		}
		require.ErrorIs(t, call(transport.KindAppendEntries, raftgroup.AppendBody(2, 0, 0, []byte("x"))), trivet.ErrInvalid)
		mu.Lock()
		known[replicaID("a")] = true
		mu.Unlock()
		require.ErrorIs(t, call(transport.KindRequestVote, raftgroup.VoteBody(3, 9, 2, false)), trivet.ErrInvalid)
		require.NoError(t, call(transport.KindAppendEntries, raftgroup.AppendBody(2, 0, 0, []byte("x"))))
		_, last := raftgroup.LogBounds(b.group)
		require.Equal(t, uint64(1), last)
	})
}

// H37: once a replica is out of the configuration, the others refuse all that it says, whatever its term, and
// on whoever's word it still runs.
func TestRemovedMemberIsRefused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := startCluster(t, "a", "b", "c")
		c.mustPut("x", "1")
		l := c.leader()
		gone := c.nodes[c.others(l.name)[0]]
		third := c.nodes[c.others(l.name, gone.name)[0]]
		require.NoError(t, l.group.Remove(t.Context(), replicaID(gone.name)))
		c.eventually("the others know", func() bool { return len(third.group.Status().Members) == 2 })
		term := raftgroup.RaftTerm(third.group)
		_, last := raftgroup.LogBounds(third.group)
		for kind, body := range map[transport.Kind][]byte{
			transport.KindAppendEntries:  raftgroup.AppendBody(term+100, last, term, []byte("x=evil")),
			transport.KindRequestVote:    raftgroup.VoteBody(term+100, last+9, term+1, true),
			transport.KindRequestPreVote: raftgroup.VoteBody(term+100, last+9, term+1, true),
			transport.KindTimeoutNow:     raftgroup.TimeoutNowBody(l.group, replicaID(third.name)),
		} {
			_, err := gone.link.Call(t.Context(), trivet.NodeID(third.name), transport.Message{
				Kind: kind, Group: testGroup, From: replicaID(gone.name), To: replicaID(third.name), Body: body,
			})
			require.ErrorIs(t, err, trivet.ErrInvalid, "kind %v", kind)
		}
		pass(10 * heartbeat)
		require.Equal(t, term, raftgroup.RaftTerm(third.group))
		require.Equal(t, l, c.leader())
		require.Equal(t, "1", third.machine.get("x"))
	})
}

// A voter that missed changes of the members votes for one that it does not know as a voter, if the catalogue knows it:
// here the only one left that can lead. While it has a leader it does not.
func TestUnknownCandidate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t, "a", "b", "c", "d")
		c.configure = func(cfg *raftgroup.Config) {
			cfg.IsMember = func(id trivet.ReplicaID, node trivet.NodeID) bool { return id == replicaID(string(node)) }
		}
		for _, name := range []string{"a", "b", "c"} {
			require.NoError(t, raftgroup.Create(c.nodes[name].config(), members("a", "b", "c")))
			c.nodes[name].mustOpen()
		}
		c.mustPut("x", "1")
		l := c.leader()
		rest := c.others(l.name, "d")
		cut, gone, d := c.nodes[rest[0]], c.nodes[rest[1]], c.nodes["d"]
		vote := transport.Message{
			Kind: transport.KindRequestVote, Group: testGroup, From: replicaID("d"), To: replicaID(cut.name),
			Body: raftgroup.VoteBody(raftgroup.RaftTerm(cut.group)+9, 99, 99, true),
		}
		_, err := d.link.Call(t.Context(), trivet.NodeID(cut.name), vote)
		require.ErrorIs(t, err, trivet.ErrInvalid, "it has a leader")
		for _, other := range []string{l.name, gone.name, "d"} {
			c.net.Cut(trivet.NodeID(cut.name), trivet.NodeID(other))
		}
		require.NoError(t, raftgroup.Create(d.config(), nil))
		d.mustOpen()
		require.NoError(t, l.group.AddLearner(t.Context(), member("d")))
		c.eventually("promote d", func() bool { return l.group.Promote(context.Background(), replicaID("d")) == nil })
		require.NoError(t, l.group.Remove(t.Context(), replicaID(gone.name)))
		c.eventually("d knows", func() bool { return len(d.group.Status().Members) == 3 })
		l.die()
		gone.die()
		c.net.HealAll()
		require.Equal(t, "d", c.leader(cut.name, "d").name)
		c.eventually("they know each other", func() bool { return len(cut.group.Status().Members) == 3 })
		require.Equal(t, "1", cut.machine.get("x"))
	})
}
