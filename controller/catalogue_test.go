package controller_test

import (
	"context"
	"fmt"
	"log/slog"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller"
	"github.com/trivet-csi/trivet/controller/meta"
	"github.com/trivet-csi/trivet/replication/raftgroup"
	"github.com/trivet-csi/trivet/replication/transport"
)

// group runs real catalogues over a network in memory, within a bubble.
type group struct {
	hub   *transport.Memory
	disks map[trivet.NodeID]*vfs.MemFS
	cats  map[trivet.NodeID]*controller.Catalogue

	snapshotBytes int64
	logger        *slog.Logger // of those that boot from now on
}

var timing = raftgroup.Timing{Heartbeat: 200 * time.Millisecond, Lease: 150 * time.Millisecond}

func newGroup(t *testing.T) *group {
	t.Helper()
	g := &group{
		hub: transport.NewMemory(1), disks: map[trivet.NodeID]*vfs.MemFS{}, cats: map[trivet.NodeID]*controller.Catalogue{},
	}
	g.hub.SetLossTimeout(500 * time.Millisecond)
	t.Cleanup(func() {
		for _, id := range []trivet.NodeID{"n1", "n2", "n3", "n4"} {
			if c := g.cats[id]; c != nil {
				assert.NoError(t, c.Close())
			}
		}
		assert.NoError(t, g.hub.Close())
	})
	return g
}

// boot makes a catalogue on the disk that the node has, closed as yet.
func (g *group) boot(t *testing.T, id trivet.NodeID) *controller.Catalogue {
	t.Helper()
	if g.disks[id] == nil {
		g.disks[id] = vfs.NewMem()
	}
	network := g.hub.Node(id)
	c, err := controller.NewCatalogue(controller.CatalogueConfig{
		Node: id, Cluster: clusterID, Dir: "data/meta", FS: g.disks[id], Network: network, Mux: raftgroup.NewMux(network),
		Timing: timing, SnapshotBytes: g.snapshotBytes, LogSegmentBytes: 256 << 10,
		Logger: g.logger,
		Fatal:  func(err error) { t.Errorf("%s: fatal: %v", id, err) },
	})
	require.NoError(t, err)
	g.cats[id] = c
	return c
}

// kill stops a node; what it keeps is its disk.
func (g *group) kill(t *testing.T, id trivet.NodeID) {
	t.Helper()
	g.hub.Down(id)
	require.NoError(t, g.cats[id].Close())
	delete(g.cats, id)
}

func minute(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	t.Cleanup(cancel)
	return ctx
}

// register does what the node's agent does at its start.
func register(t *testing.T, c *controller.Catalogue, n int) {
	t.Helper()
	nd := testNode(n, time.Now())
	nd.MetaReplica = c.Replica()
	_, err := c.Propose(minute(t), meta.Command{RegisterNode: &meta.RegisterNode{Node: nd}})
	require.NoError(t, err)
}

// join lets node n into the cluster through a sponsor.
func (g *group) join(t *testing.T, sponsor trivet.NodeID, n int) {
	t.Helper()
	id := nodeID(n)
	c := g.boot(t, id)
	replica, err := c.Prepare(t.Context())
	require.NoError(t, err)
	require.NoError(t, c.Open(t.Context()))
	require.NoError(t, g.cats[sponsor].AddMember(minute(t), id, replica))
	register(t, c, n)
}

// cluster returns a group of three voters on n1 to n3.
func cluster(t *testing.T) *group {
	t.Helper()
	g := newGroup(t)
	require.NoError(t, g.boot(t, "n1").Bootstrap(minute(t)))
	register(t, g.cats["n1"], 1)
	g.join(t, "n1", 2)
	g.join(t, "n2", 3) // through a follower
	g.awaitVoters(t, 3)
	return g
}

// eventually waits, in the bubble's time, until ok.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for range 600 {
		if ok() {
			return
		}
		<-time.After(100 * time.Millisecond)
	}
	require.Fail(t, "never came true: "+what)
}

func (g *group) awaitVoters(t *testing.T, want int) {
	t.Helper()
	eventually(t, fmt.Sprintf("%d voters", want), func() bool {
		for _, c := range g.cats {
			n := 0
			for _, voter := range c.Roles() {
				if voter {
					n++
				}
			}
			if n != want {
				return false
			}
		}
		return true
	})
}

// leader waits until the living nodes agree on a living leader.
func (g *group) leader(t *testing.T) trivet.NodeID {
	t.Helper()
	var leader trivet.NodeID
	eventually(t, "a leader that all agree on", func() bool {
		leader = ""
		for _, c := range g.cats {
			l := c.Leader()
			if leader == "" {
				leader = l
			}
			if l == "" || l != leader || g.cats[l] == nil {
				return false
			}
		}
		return true
	})
	return leader
}

// follower returns a living node that does not lead.
func (g *group) follower(t *testing.T) trivet.NodeID {
	t.Helper()
	leader := g.leader(t)
	for _, id := range []trivet.NodeID{"n1", "n2", "n3"} {
		if id != leader && g.cats[id] != nil {
			return id
		}
	}
	require.Fail(t, "no follower")
	return ""
}

func createCommand(name string, node int) meta.Command {
	return meta.Command{CreateVolume: &meta.CreateVolume{Volume: meta.Volume{
		ID: trivet.NewVolumeID(), Name: name, SizeBytes: gib, Reclaim: meta.ReclaimDelete, Request: "r", Created: time.Now(),
		Replicas: []meta.Replica{{
			ID: trivet.ReplicaID(trivet.NewUUID()), Node: nodeID(node), Disk: trivet.DiskID(uuid(0xd, node)),
			State: meta.ReplicaCreating,
		}},
	}, Claim: true}}
}

func TestCatalogueLife(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		g := cluster(t)
		assert.Equal(t, clusterID, g.cats["n3"].Local().Cluster())

		// A command from a follower, then a read on each node: everyone has it.
		follower := g.follower(t)
		res, err := g.cats[follower].Propose(minute(t), createCommand("a", 1))
		require.NoError(t, err)
		require.NotNil(t, res.Volume)
		assert.Equal(t, "a", res.Volume.Name)
		g.mustSee(t, "a")

		// A refusal keeps its sentinel on the way from the leader.
		other := createCommand("a", 1)
		other.CreateVolume.Volume.Request = "other"
		for _, id := range []trivet.NodeID{follower, g.leader(t)} {
			res, err = g.cats[id].Propose(minute(t), other)
			require.ErrorIs(t, err, trivet.ErrExists)
			require.ErrorIs(t, res.Err, trivet.ErrExists)
			require.NotErrorIs(t, err, trivet.ErrUnavailable)
		}

		// The leader dies.
		dead := g.leader(t)
		g.kill(t, dead)
		_, err = g.cats[g.follower(t)].Propose(minute(t), createCommand("b", 1))
		require.NoError(t, err)
		g.mustSee(t, "a", "b")
		require.NoError(t, g.boot(t, dead).Open(t.Context()))
		g.mustSee(t, "a", "b")

		// Everybody restarts.
		for id := range g.cats {
			g.kill(t, id)
		}
		for _, id := range []trivet.NodeID{"n1", "n2", "n3"} {
			assert.True(t, g.boot(t, id).Joined())
			require.NoError(t, g.cats[id].Open(t.Context()))
			require.NoError(t, g.cats[id].Open(t.Context()), "again")
		}
		g.mustSee(t, "a", "b")
		g.mustAgree(t)
	})
}

// Agents act by their own node's copy, which hears of a command soon after it took effect, though none follows.
func TestLocalCopiesHearSoon(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		g := cluster(t)
		for _, name := range []string{"a", "b", "c"} {
			<-time.After(5 * time.Second) // at rest
			_, err := g.cats[g.leader(t)].Propose(minute(t), createCommand(name, 1))
			require.NoError(t, err)
			<-time.After(timing.Heartbeat / 2) // no heartbeat need have told of it
			for id, c := range g.cats {
				_, ok := c.Local().VolumeByName(name)
				require.True(t, ok, "%s has not heard of %s", id, name)
			}
		}
	})
}

// mustSee reads on every living node.
func (g *group) mustSee(t *testing.T, names ...string) {
	t.Helper()
	for id, c := range g.cats {
		s, err := c.Read(minute(t))
		require.NoError(t, err, id)
		for _, name := range names {
			_, ok := s.VolumeByName(name)
			assert.True(t, ok, "%s does not see %s", id, name)
		}
	}
}

// mustAgree compares the bytes of all copies at one revision.
func (g *group) mustAgree(t *testing.T) {
	t.Helper()
	var want []byte
	for id, c := range g.cats {
		s, err := c.Read(minute(t))
		require.NoError(t, err)
		got, err := s.EncodeImage()
		require.NoError(t, err)
		if want == nil {
			want = got
		}
		assert.Equal(t, string(want), string(got), id)
	}
}

// TestReadIsLinearizable: the old leader is cut off and does not know it. It may answer nothing, but
// never what was true before; nor may one that is not the leader answer from its own copy.
func TestReadIsLinearizable(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		g := cluster(t)
		old := g.leader(t)
		g.hub.Isolate(old)
		survivor := trivet.NodeID("n1")
		if old == survivor {
			survivor = "n2"
		}
		_, err := g.cats[survivor].Propose(minute(t), createCommand("new", 1))
		require.NoError(t, err)
		for range 20 {
			ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
			s, err := g.cats[old].Read(ctx)
			cancel()
			if err == nil {
				_, ok := s.VolumeByName("new")
				require.True(t, ok, "stale read on %s", old)
			} else {
				require.ErrorIs(t, err, trivet.ErrUnavailable)
			}
		}
		_, err = g.cats[old].Propose(soon(t), createCommand("x", 1))
		require.ErrorIs(t, err, trivet.ErrUnavailable)
		g.hub.HealAll()
		g.mustSee(t, "new")

		// A follower whose copy lags waits for it: the leader's entries reach it late.
		follower := g.follower(t)
		leader := g.leader(t)
		release := g.hub.Hold(func(e transport.Envelope) bool {
			return e.From == leader && e.To == follower && e.Message.Kind == transport.KindAppendEntries && !e.Reply
		})
		_, err = g.cats[leader].Propose(minute(t), createCommand("late", 1))
		require.NoError(t, err)
		_, ok := g.cats[follower].Local().VolumeByName("late")
		require.False(t, ok, "the test holds nothing up")
		seen := make(chan bool, 1)
		go func() {
			s, err := g.cats[follower].Read(minute(t))
			ok := err == nil
			if ok {
				_, ok = s.VolumeByName("late")
			}
			seen <- ok
		}()
		synctest.Wait()
		release()
		assert.True(t, <-seen)
	})
}

// TestProposeAfterLostAnswer: the leader applies a command and its answer is lost. The retry applies
// it again, without effect.
func TestProposeAfterLostAnswer(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		g := cluster(t)
		lost := 0
		stop := g.hub.Lose(func(e transport.Envelope) bool {
			if e.Reply && e.Message.Kind == transport.KindMetaPropose && lost == 0 {
				lost++
				return true
			}
			return false
		})
		defer stop()
		res, err := g.cats[g.follower(t)].Propose(minute(t), createCommand("once", 1))
		require.NoError(t, err)
		assert.Equal(t, 1, lost)
		require.NotNil(t, res.Volume)
		s, err := g.cats["n1"].Read(minute(t))
		require.NoError(t, err)
		assert.Len(t, s.Volumes(), 1)
	})
}

func TestWithoutQuorum(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		g := cluster(t)
		g.kill(t, "n2")
		g.kill(t, "n3")
		_, err := g.cats["n1"].Propose(soon(t), createCommand("x", 1))
		require.ErrorIs(t, err, trivet.ErrUnavailable)
		require.NotErrorIs(t, err, context.DeadlineExceeded)
		_, err = g.cats["n1"].Read(soon(t))
		require.ErrorIs(t, err, trivet.ErrUnavailable)
		require.ErrorIs(t, g.cats["n1"].AddMember(soon(t), "n4", trivet.ReplicaID(uuid(9, 9))), trivet.ErrUnavailable)
		require.NoError(t, g.boot(t, "n2").Open(t.Context()))
		_, err = g.cats["n1"].Propose(minute(t), createCommand("y", 1))
		require.NoError(t, err)
	})
}

// TestFourthIsLearner: only VoterMax members vote, and the fourth has a copy all the same.
func TestFourthIsLearner(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		g := cluster(t)
		g.join(t, "n3", 4)
		_, err := g.cats["n4"].Propose(minute(t), createCommand("d", 4))
		require.NoError(t, err)
		g.mustSee(t, "d")
		<-time.After(10 * timing.Heartbeat)
		assert.Equal(t, map[trivet.NodeID]bool{"n1": true, "n2": true, "n3": true, "n4": false}, g.cats["n4"].Roles())
	})
}

// TestJoinBySnapshot: the log that a new member would need is cut, so it gets the state; and the others
// restart from their files.
func TestJoinBySnapshot(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		g := newGroup(t)
		g.snapshotBytes = 8 << 10
		require.NoError(t, g.boot(t, "n1").Bootstrap(minute(t)))
		register(t, g.cats["n1"], 1)
		g.join(t, "n1", 2)
		g.join(t, "n1", 3)
		g.awaitVoters(t, 3)
		for i := range 300 {
			_, err := g.cats["n1"].Propose(minute(t), createCommand(fmt.Sprint("v", i), 1+i%3))
			require.NoError(t, err)
		}
		var begun atomic.Int32
		defer g.hub.Lose(func(e transport.Envelope) bool { // loses nothing: it counts
			if e.Message.Kind == transport.KindFetch && !e.Reply {
				begun.Add(1)
			}
			return false
		})()
		g.join(t, "n2", 4)
		g.mustSee(t, "v0", "v299")
		assert.Positive(t, begun.Load(), "the log was never cut")
		for id := range g.cats {
			g.kill(t, id)
			_, err := g.disks[id].Stat("data/meta/catalogue")
			require.NoError(t, err, id)
		}
		for _, id := range []trivet.NodeID{"n1", "n2", "n3", "n4"} {
			require.NoError(t, g.boot(t, id).Open(t.Context()))
		}
		g.mustSee(t, "v0", "v299")
		g.mustAgree(t)
	})
}

// TestCloseEndsCalls: a call that waits for a membership that never comes ends with Close.
func TestCloseEndsCalls(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		g := newGroup(t)
		c := g.boot(t, "n1")
		done := make(chan error, 1)
		go func() {
			_, err := c.Read(t.Context())
			done <- err
		}()
		synctest.Wait()
		require.NoError(t, c.Close())
		require.ErrorIs(t, <-done, trivet.ErrClosed)
		require.ErrorIs(t, c.Bootstrap(minute(t)), trivet.ErrClosed)
		require.NoError(t, c.Close())
	})
}

// TestLostLogIsRefused: a member whose log is gone has forgotten its votes. It does not come back under its name,
// with or without the rest of its group (H10).
func TestLostLogIsRefused(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		g := newGroup(t)
		require.NoError(t, g.boot(t, "n1").Bootstrap(minute(t)))
		g.kill(t, "n1")
		require.NoError(t, g.disks["n1"].RemoveAll("data/meta/log"))
		c := g.boot(t, "n1")
		err := c.Open(t.Context())
		require.ErrorIs(t, err, trivet.ErrCorrupt)
		require.ErrorContains(t, err, "has forgotten its votes")
		g.kill(t, "n1")
		require.NoError(t, g.disks["n1"].Remove("data/meta/member"))
		c = g.boot(t, "n1")
		_, err = c.Prepare(t.Context())
		require.ErrorIs(t, err, trivet.ErrCorrupt, "what is left of a member does not get a new name")
	})
}

// TestWipedMemberComesBack: a node that lost its directory joins under a new replica, which replaces
// the old one without a moment of fewer voters (H10).
func TestWipedMemberComesBack(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		g := cluster(t)
		victim := g.follower(t)
		var n int
		_, err := fmt.Sscanf(string(victim), "n%d", &n)
		require.NoError(t, err)
		old := g.cats[victim].Replica()
		g.kill(t, victim)
		delete(g.disks, victim)
		c := g.boot(t, victim)
		assert.False(t, c.Joined())
		require.ErrorIs(t, c.Open(t.Context()), trivet.ErrNotFound, "an empty directory opens nothing")
		require.NoError(t, c.Close())
		g.hub.Down(victim)
		g.join(t, g.leader2(t, victim), n)
		assert.NotEqual(t, old, g.cats[victim].Replica())
		g.awaitVoters(t, 3)
		_, err = g.cats[victim].Propose(minute(t), createCommand("w", 1))
		require.NoError(t, err)
		g.mustSee(t, "w")
		g.mustAgree(t)
	})
}

// TestForgottenNode: a node that never returns leaves the meta group, another one votes in its place, and what is left
// of it somewhere, or its certificate, gets nowhere until its name is allowed again. Then it joins as a new one.
func TestForgottenNode(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		g := cluster(t)
		g.join(t, "n2", 4)
		victim := g.follower(t)
		var n int
		_, err := fmt.Sscanf(string(victim), "n%d", &n)
		require.NoError(t, err)
		old, sponsor := g.cats[victim].Replica(), g.leader2(t, victim)
		forget := func(late time.Duration, allow bool) error {
			_, err := g.cats[sponsor].Propose(minute(t), meta.Command{ForgetNode: &meta.ForgetNode{
				Node: victim, Time: time.Now().Add(late), Allow: allow,
			}})
			return err
		}
		require.ErrorIs(t, forget(0, false), trivet.ErrInUse, "it is up")
		g.kill(t, victim)
		require.NoError(t, forget(2*time.Hour, false))
		eventually(t, "it is out of the meta group, and another votes", func() bool {
			roles := g.cats[sponsor].Roles()
			_, there := roles[victim]
			return !there && len(roles) == 3 && roles["n4"]
		})
		for _, id := range []trivet.NodeID{sponsor, g.follower(t)} { // the leader, and by way of another
			require.ErrorIs(t, g.cats[id].AddMember(minute(t), victim, old), trivet.ErrInvalid)
		}
		nd := testNode(n, time.Now())
		_, err = g.cats[sponsor].Propose(minute(t), meta.Command{RegisterNode: &meta.RegisterNode{Node: nd}})
		require.ErrorIs(t, err, trivet.ErrFenced)
		<-time.After(10 * timing.Heartbeat)
		require.Len(t, g.cats[sponsor].Roles(), 3)

		require.NoError(t, forget(0, true))
		delete(g.disks, victim)
		g.join(t, sponsor, n)
		require.NotEqual(t, old, g.cats[victim].Replica())
		eventually(t, "it is a member again", func() bool { return len(g.cats[sponsor].Roles()) == 4 })
		g.mustAgree(t)
	})
}

// leader2 is leader among all but one.
func (g *group) leader2(t *testing.T, but trivet.NodeID) trivet.NodeID {
	t.Helper()
	away := g.cats[but]
	delete(g.cats, but)
	defer func() { g.cats[but] = away }()
	return g.leader(t)
}

func TestForwardedCommandsAreAuthorized(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		g := cluster(t)
		follower := g.follower(t)
		c := g.cats[follower]
		var other trivet.NodeID = "n1"
		if follower == "n1" {
			other = "n2"
		}
		_, err := c.Propose(minute(t), meta.Command{RenewLease: &meta.RenewLease{
			Node: other, Incarnation: uuid(0xf, 1), Until: time.Now().Add(time.Hour),
		}})
		require.ErrorIs(t, err, trivet.ErrInvalid)
		require.ErrorContains(t, err, "not for node "+string(follower)+" to say")
		_, err = c.Propose(minute(t), meta.Command{InitCluster: &meta.InitCluster{Cluster: clusterID, Time: time.Now()}})
		require.ErrorIs(t, err, trivet.ErrInvalid)
	})
}

func TestBootstrap(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		g := newGroup(t)
		c := g.boot(t, "n1")
		assert.False(t, c.Joined())
		assert.Empty(t, c.Leader())
		assert.Empty(t, c.Replica())
		_, err := c.Read(soon(t))
		require.ErrorIs(t, err, trivet.ErrUnavailable)
		_, err = c.Propose(soon(t), createCommand("x", 1))
		require.ErrorIs(t, err, trivet.ErrUnavailable)
		require.NoError(t, c.Bootstrap(minute(t)))
		assert.True(t, c.Joined())
		require.ErrorIs(t, c.Bootstrap(minute(t)), trivet.ErrExists)
		replica, err := c.Prepare(t.Context())
		require.NoError(t, err)
		assert.Equal(t, c.Replica(), replica, "it is prepared")
		g.kill(t, "n1")
		c = g.boot(t, "n1")
		require.ErrorIs(t, c.Bootstrap(minute(t)), trivet.ErrExists)
		require.NoError(t, c.Open(t.Context()))
		_, err = c.Read(minute(t))
		require.NoError(t, err)

		// Another node's directory, or another cluster's, is refused (H11).
		g.disks["n2"] = g.disks["n1"]
		_, err = g.boot(t, "n2").Prepare(t.Context())
		require.ErrorIs(t, err, trivet.ErrInvalid)
		require.ErrorContains(t, err, "node n1")
		require.ErrorIs(t, g.cats["n2"].Open(t.Context()), trivet.ErrInvalid)

		// What is left of a member that lost its name gets no new one (H10).
		g.kill(t, "n1")
		require.NoError(t, g.disks["n1"].Remove("data/meta/member"))
		c = g.boot(t, "n1")
		_, err = c.Prepare(t.Context())
		require.ErrorIs(t, err, trivet.ErrCorrupt)
		require.ErrorIs(t, c.Bootstrap(minute(t)), trivet.ErrCorrupt)

		d := g.boot(t, "n3")
		first, err := d.Prepare(t.Context())
		require.NoError(t, err)
		again, err := d.Prepare(t.Context())
		require.NoError(t, err)
		assert.Equal(t, first, again)
		assert.True(t, d.Joined())
		require.ErrorIs(t, d.Bootstrap(minute(t)), trivet.ErrExists)
	})
}

func TestCatalogueConfig(t *testing.T) {
	t.Parallel()
	hub := transport.NewMemory(1)
	network := hub.Node("n1")
	good := controller.CatalogueConfig{
		Node: "n1", Cluster: clusterID, Dir: "d", Network: network, Mux: raftgroup.NewMux(network), Fatal: func(error) {},
	}
	require.NoError(t, good.Validate())
	for name, change := range map[string]func(*controller.CatalogueConfig){
		"node":    func(c *controller.CatalogueConfig) { c.Node = "" },
		"cluster": func(c *controller.CatalogueConfig) { c.Cluster = "x" },
		"dir":     func(c *controller.CatalogueConfig) { c.Dir = "" },
		"mux":     func(c *controller.CatalogueConfig) { c.Mux = nil },
		"n2's":    func(c *controller.CatalogueConfig) { c.Node = "n2" },
		"fatal":   func(c *controller.CatalogueConfig) { c.Fatal = nil },
		"voters":  func(c *controller.CatalogueConfig) { c.VoterMax = 2 },
	} {
		bad := good
		change(&bad)
		_, err := controller.NewCatalogue(bad)
		require.ErrorIs(t, err, trivet.ErrInvalid, name)
		if name != "n2's" {
			require.ErrorContains(t, err, name)
		}
	}
	require.NoError(t, hub.Close())
}
