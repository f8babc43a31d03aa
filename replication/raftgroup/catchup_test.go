package raftgroup_test

import (
	"context"
	"fmt"
	"strings"
	"sync"
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

// behindRows is what c lacks after behind: the image of its state has so many rows.
const behindRows = 200

// openWith opens a replica whose machine calls onRow for every row that it restores.
func (n *node) openWith(onRow func(row int)) {
	n.c.t.Helper()
	m, err := openKV(n.fs, "/machine")
	require.NoError(n.c.t, err)
	m.onRow = onRow
	n.machine = m
	n.group, err = raftgroup.Open(n.config())
	require.NoError(n.c.t, err)
}

// stuckAt returns a hook that stops at a row until released, and a channel that says that it is there.
func stuckAt(row int) (onRow func(int), there chan struct{}, release func()) {
	there, gate := make(chan struct{}), make(chan struct{})
	var once sync.Once
	return func(n int) {
		if n == row {
			once.Do(func() { close(there) })
			<-gate
		}
	}, there, sync.OnceFunc(func() { close(gate) })
}

// counted counts requests of a kind.
func (c *cluster) counted(kind transport.Kind) *atomic.Int64 {
	var n atomic.Int64
	c.net.Lose(func(e transport.Envelope) bool {
		if e.Message.Kind == kind && !e.Reply {
			n.Add(1)
		}
		return false
	})
	return &n
}

// keepWriting proposes on whoever leads, whether or not it works, and returns a function that ends it.
func (c *cluster) keepWriting() (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		for k := 0; ctx.Err() == nil; k++ {
			_ = c.leader().set(fmt.Sprint("w", k%50), fmt.Sprint(k))
			pass(20 * time.Millisecond)
		}
	})
	return func() {
		cancel()
		wg.Wait()
	}
}

// The leader leads on, in its term, while a follower pulls its state, slowly, and writes go on; the other
// follower notices nothing. Status tells how far it is.
func TestCatchUpDisturbsNobody(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t, "a", "b", "c")
		c.segmentBytes = 1 << 20 // an entry has room in a quarter of one
		behind(t, c)
		big := strings.Repeat("v", 10<<10)
		for k := range 200 {
			c.mustPut(fmt.Sprint(k), big)
		}
		l := c.leader()
		term, other := raftgroup.RaftTerm(l.group), c.nodes[c.others(l.name)[0]]
		slow := c.nodes["c"]
		slow.openWith(func(int) { pass(50 * time.Millisecond) })
		c.eventually("it catches up", func() bool { return slow.group.Status().CatchUp.DoneBytes > 0 })
		writes := 0
		var last int64
		for slow.group.Status().CatchUp.Active {
			s := slow.group.Status().CatchUp
			if s.EstimatedBytes > 0 { // else it has just ended
				require.Equal(t, []any{replicaID(l.name), trivet.NodeID(l.name)}, []any{s.From, s.FromNode})
				require.GreaterOrEqual(t, s.DoneBytes, last)
				require.Greater(t, s.EstimatedBytes, int64(3<<19))
				last = s.DoneBytes
			}
			require.Equal(t, term, raftgroup.RaftTerm(other.group))
			require.Equal(t, []string{l.name}, gates(c))
			require.Empty(t, slow.group.Status().Leader)
			require.ErrorIs(t, slow.set("x", "1"), trivet.ErrNotLeader)
			l.mustSet(fmt.Sprint("during", writes%20), "1")
			writes++
			pass(100 * time.Millisecond)
		}
		require.Greater(t, writes, 50)
		require.Greater(t, last, int64(3<<19))
		c.converge()
		require.Equal(t, term, raftgroup.RaftTerm(l.group), "nobody else was elected")
		require.Equal(t, raftgroup.CatchUp{}, slow.group.Status().CatchUp)
	})
}

// The contract with the library: what the transport writes into the meta that SnapshotStore.Open returned
// is where it goes on. The image is ahead of the snapshot that the library knows, so a library that used
// anything else would begin before it (D6: and the follower's log begins right there).
func TestLibraryGoesOnFromTheMeta(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t, "a", "b", "c")
		behind(t, c)
		l := c.leader()
		l.mustSet("more", "1")
		offered := raftgroup.SnapshotIndex(l.group)
		var mu sync.Mutex
		var after []uint64
		restored := false
		c.net.Lose(func(e transport.Envelope) bool {
			mu.Lock()
			defer mu.Unlock()
			switch {
			case e.Reply || e.From != trivet.NodeID(l.name) && e.From != "c":
			case e.Message.Kind == transport.KindImageClose:
				restored = raftgroup.Restored(e.Message.Body)
			case e.Message.Kind == transport.KindAppendEntries && e.To == "c" && restored:
				if prev := raftgroup.AppendAfter(e.Message.Body); prev > 0 { // no heartbeat
					after = append(after, prev)
				}
			}
			return false
		})
		slow := c.nodes["c"]
		slow.mustOpen()
		c.eventually("c runs", func() bool { return !slow.group.Status().CatchUp.Active && restored })
		x := raftgroup.SnapshotIndex(slow.group)
		require.Greater(t, x, offered, "the test shows nothing")
		c.converge()
		mu.Lock()
		defer mu.Unlock()
		require.NotEmpty(t, after)
		require.Equal(t, x, after[0])
	})
}

// The leader dies in the middle of a transfer: of five, the next one goes on; of three, the two that are
// left cannot elect anybody before the transfer is done, and the other follower's image does as well. What
// was restored is not pulled again.
func TestLeaderDiesDuringCatchUp(t *testing.T) {
	for _, names := range [][]string{{"a", "b", "c"}, {"a", "b", "c", "d", "e"}} {
		synctest.Test(t, func(t *testing.T) {
			c := newCluster(t, names...)
			behind(t, c)
			l := c.leader()
			pass(2 * heartbeat) // the other followers are told what is committed
			hook, there, release := stuckAt(120)
			slow := c.nodes["c"]
			slow.openWith(hook)
			<-there
			l.die()
			pass(3 * heartbeat)
			release()
			c.converge()
			require.Less(t, slow.machine.taken(), behindRows+60, "it began anew")
			require.NotEqual(t, l.name, c.leader().name)
			l.mustOpen()
			c.converge()
		})
	}
}

// The only image that is left is older than what was pulled before: its source has the entry in its log,
// but was not told that it is committed, and cannot be elected. Patched together the two would be no state at
// all, so the machine refuses it, and takes it whole.
func TestOlderImageIsTakenWhole(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t, "a", "b", "c")
		behind(t, c)
		l := c.leader()
		other := c.nodes[c.others(l.name)[0]]
		release := c.net.Hold(transport.OfKind(transport.KindImageOpen))
		hook, there, free := stuckAt(150)
		slow := c.nodes["c"]
		slow.openWith(hook)
		c.eventually("it asks", func() bool { return c.net.Held() > 0 })
		var x, have uint64
		for have == x {
			l.mustSet("first", fmt.Sprint(x))
			x, _ = l.machine.Applied()
			have, _ = other.machine.Applied()
		}
		c.net.Cut(trivet.NodeID(l.name), trivet.NodeID(other.name))
		release()
		<-there
		have, _ = other.machine.Applied()
		require.Less(t, have, x, "it was told that the entry is committed")
		l.die()
		c.net.HealAll()
		free()
		c.converge()
		require.Greater(t, slow.machine.taken(), behindRows+150, "nothing was pulled whole")
		l.mustOpen()
		c.converge()
	})
}

// Leadership moves on in the middle of a transfer. The old leader still has the image, and the follower
// stays with it.
func TestTransferDuringCatchUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t, "a", "b", "c")
		behind(t, c)
		opens := c.counted(transport.KindImageOpen)
		l := c.leader()
		other := c.others(l.name)[0]
		hook, there, release := stuckAt(120)
		slow := c.nodes["c"]
		slow.openWith(hook)
		<-there
		require.NoError(t, l.group.TransferTo(t.Context(), replicaID(other)))
		require.Equal(t, other, c.leader().name)
		pass(3 * heartbeat)
		release()
		c.converge()
		require.Equal(t, int64(1), opens.Load())
		require.Equal(t, other, c.leader().name)
	})
}

// A follower that dies in the middle of a transfer takes no part in the group until it is whole, goes on
// from where it was, and until then has nothing to say, whoever asks.
func TestFollowerRestartsDuringCatchUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t, "a", "b", "c")
		behind(t, c)
		slow, l := c.nodes["c"], c.leader()
		hook, there, release := stuckAt(160)
		slow.openWith(hook)
		<-there
		photo := slow.fs
		slow.fs = photo.CrashClone(crashClone(100, 1))
		require.NoError(t, slow.link.Close())
		release()
		slow.stop()
		slow.connect()

		lose := c.net.Lose(func(e transport.Envelope) bool {
			return e.Message.Kind == transport.KindImageOpen && e.From == "c" && !e.Reply
		})
		slow.mustOpen()
		require.True(t, slow.machine.Restoring())
		for range 20 {
			pass(heartbeat)
			s := slow.group.Status()
			require.Equal(t, raftgroup.CatchUp{Active: true}, s.CatchUp)
			require.Empty(t, s.Leader)
		}
		require.ErrorIs(t, slow.set("x", "1"), trivet.ErrNotLeader)
		_, err := slow.group.ReadGate()
		require.ErrorIs(t, err, trivet.ErrNotLeader)
		for kind, body := range map[transport.Kind][]byte{
			transport.KindRequestVote:   raftgroup.VoteBody(1000, 1e9, 999, true),
			transport.KindStanding:      raftgroup.StandingBody(1000),
			transport.KindAppendEntries: raftgroup.AppendBody(1, 0, 0, nil),
			transport.KindImageOpen:     raftgroup.ImageOpenBody(),
		} {
			_, err := l.link.Call(t.Context(), "c", transport.Message{
				Kind: kind, Group: testGroup, From: replicaID(l.name), To: replicaID("c"), Body: body,
			})
			require.ErrorIs(t, err, trivet.ErrUnavailable, "kind %d", kind)
		}
		lose()
		c.converge()
		require.Less(t, slow.machine.taken(), behindRows-100, "it began anew")
		require.Empty(t, slow.fatals())
	})
}

// A replica is closed while it stops the library for a catch-up, and the library waits for the state machine. With a
// lock that holds the clock of the bubble this test never ends.
func TestCloseDuringSuspend(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t, "a", "b", "c")
		behind(t, c)
		slow, gate := c.nodes["c"], make(chan struct{})
		slow.mustOpen()
		c.converge()
		slow.machine.holdApply(gate)
		c.mustPut("held", "1")
		c.mustPut("later", "1") // tells c that the one before is committed
		pass(heartbeat)
		c.net.Isolate("c")
		has := slow.group.Status().LastIndex
		for k := range behindRows {
			c.mustPut(fmt.Sprint(k), strings.Repeat("w", 100))
		}
		l := c.leader() // which keeps what c lacks, for a while; its follower does not
		other := c.nodes[c.others(l.name, "c")[0]]
		other.compacted(has + 1)
		require.NoError(t, l.group.TransferTo(t.Context(), replicaID(other.name)))
		c.net.HealAll()
		c.eventually("a catch-up", func() bool { return slow.group.Status().CatchUp.Active })
		pass(heartbeat)
		closed := make(chan error)
		go func() { closed <- slow.group.Close() }()
		pass(heartbeat)
		close(gate)
		require.NoError(t, <-closed)
		slow.machine.holdApply(nil)
		slow.die()
		slow.mustOpen()
		c.converge()
	})
}

// Two of three replicas find themselves in the middle of a catch-up: nobody can be elected. They pull from
// the third one, which does not lead.
func TestTwoCatchUpWithoutLeader(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t, "a", "b", "c", "d", "e")
		behind(t, c) // without c
		var lag []*node
		l := c.leader()
		for _, name := range c.others(l.name)[:1] { // one more: three of five are left
			lag = append(lag, c.nodes[name])
		}
		lag = append(lag, c.nodes["c"])
		lag[0].die()
		for k := range 400 {
			c.mustPut(fmt.Sprint(k), strings.Repeat("w", 100))
		}
		last := c.nodes[c.others(l.name)[0]]
		release := make([]func(), len(lag))
		for k, n := range lag {
			hook, there, free := stuckAt(150)
			n.openWith(hook)
			<-there
			release[k] = free
			n.fs = n.fs.CrashClone(crashClone(100, uint64(k)))
			require.NoError(t, n.link.Close())
			free()
			n.stop()
			n.connect()
		}
		// The leader and one more die for good, so there are two in pieces and one that is whole.
		l.die()
		c.nodes[c.others(l.name, last.name)[0]].die()
		for _, n := range lag {
			n.mustOpen()
			require.True(t, n.group.Status().CatchUp.Active)
		}
		c.converge()
		for _, n := range lag {
			require.False(t, n.machine.Restoring())
			require.Empty(t, n.fatals())
		}
	})
}

// Two followers pull at once from the same leader, which leads no more then: it has no quorum.
func TestTwoFollowersAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t, "a", "b", "c", "d", "e")
		behind(t, c)
		l := c.leader()
		names := c.others(l.name)
		lag := []*node{c.nodes["c"], c.nodes[names[0]], c.nodes[names[1]]}
		lag[1].die()
		c.mustPut("x", "1")
		for k := range 400 {
			c.mustPut(fmt.Sprint(k), strings.Repeat("w", 100))
		}
		sent := countSnapshots(c)
		hook1, there1, release1 := stuckAt(50)
		hook2, there2, release2 := stuckAt(50)
		lag[0].openWith(hook1)
		lag[1].openWith(hook2)
		<-there1
		<-there2
		lag[2].die() // two of five run
		pass(5 * heartbeat)
		require.Empty(t, gates(c), "a leader without a quorum")
		release1()
		release2()
		c.converge()
		require.Equal(t, int64(2), sent.Load())
		lag[2].mustOpen()
		c.converge()
	})
}

// H6: an image whose follower fell silent is let go after 30 s. One that comes back then begins with
// another, and goes on from where it was; one that never comes back pins nothing.
func TestSourceDropsIdleImage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t, "a", "b", "c")
		behind(t, c)
		opens := c.counted(transport.KindImageOpen)
		slow, l := c.nodes["c"], c.leader()
		hook, there, release := stuckAt(60)
		slow.openWith(hook)
		<-there
		own, process := raftgroup.OpenImages(l.group)
		require.Equal(t, []int{1, 1}, []int{own, process})
		pass(2 * time.Minute) // it lives, if slowly
		own, _ = raftgroup.OpenImages(l.group)
		require.Equal(t, 1, own, "a follower that lives was forgotten")
		lose := c.net.Lose(func(e transport.Envelope) bool { return e.Message.Kind == transport.KindImageRead })
		pass(31 * time.Second)
		own, process = raftgroup.OpenImages(l.group)
		require.Equal(t, []int{0, 0}, []int{own, process})
		lose()
		release()
		c.converge()
		require.Equal(t, int64(2), opens.Load())
		require.Less(t, slow.machine.taken(), behindRows+70, "it began anew")
	})
}

// A follower that lives and gets nowhere may not pin an image for ever either.
func TestSourceDropsStuckImage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t, "a", "b", "c")
		behind(t, c)
		slow, l := c.nodes["c"], c.leader()
		hook, there, release := stuckAt(60)
		slow.openWith(hook)
		<-there
		pass(9 * time.Minute)
		own, _ := raftgroup.OpenImages(l.group)
		require.Equal(t, 1, own)
		pass(2 * time.Minute)
		own, process := raftgroup.OpenImages(l.group)
		require.Equal(t, []int{0, 0}, []int{own, process})
		release()
		c.converge()
	})
}

// noisyReplies changes one bit of the nth reply with a piece of an image.
type noisyReplies struct {
	*transport.MemoryNode
	n   *atomic.Int64
	hit int64
}

func (w noisyReplies) Call(ctx context.Context, to trivet.NodeID, m transport.Message) (transport.Message, error) {
	reply, err := w.MemoryNode.Call(ctx, to, m)
	if err == nil && m.Kind == transport.KindImageRead && w.n.Add(1) == w.hit {
		reply.Body[len(reply.Body)/2] ^= 4
	}
	return reply, err
}

// A piece that is damaged on its way is read again, within the same image.
func TestDamagedPieceIsReadAgain(t *testing.T) {
	for _, hit := range []int64{1, 2, 20} {
		synctest.Test(t, func(t *testing.T) {
			var n atomic.Int64
			c := newClusterOn(t, func(x *node) transport.Network { return noisyReplies{x.link, &n, hit} }, "a", "b", "c")
			behind(t, c)
			opens := c.counted(transport.KindImageOpen)
			c.nodes["c"].mustOpen()
			c.converge()
			require.Equal(t, int64(1), opens.Load())
			require.Greater(t, n.Load(), hit)
		})
	}
}

// forger claims in the first answers of a follower that it is done, somewhere.
type forger struct {
	*transport.MemoryNode
	forge func(body []byte) []byte
}

func (w forger) Call(ctx context.Context, to trivet.NodeID, m transport.Message) (transport.Message, error) {
	reply, err := w.MemoryNode.Call(ctx, to, m)
	if err == nil && m.Kind == transport.KindFetch {
		reply.Body = w.forge(reply.Body)
	}
	return reply, err
}

// A leader believes a follower that is done only where it has the same entry itself: else the
// library would count the follower for entries that it does not have.
func TestLeaderChecksWhereTheFollowerIs(t *testing.T) {
	for name, ahead := range map[string]int{"ahead": 5, "another term": 0} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var c *cluster
				var n atomic.Int64
				c = newClusterOn(t, func(x *node) transport.Network {
					return forger{x.link, func(body []byte) []byte {
						if n.Add(1) > 4 {
							return body
						}
						_, last := raftgroup.LogBounds(x.group)
						index, term := last+uint64(ahead), raftgroup.RaftTerm(x.group)
						if ahead == 0 {
							index, _ = x.machine.Applied()
							term = raftgroup.LogTerm(x.group, index) + 1
						}
						return raftgroup.ForgeDone(body, index, term)
					}}
				}, "a", "b", "c")
				behind(t, c)
				hook, there, release := stuckAt(100)
				c.nodes["c"].openWith(hook)
				<-there
				for range 300 {
					pass(heartbeat / 5)
					s := c.leader().group.Status()
					require.Less(t, s.Match[replicaID("c")], s.Commit)
				}
				require.Greater(t, n.Load(), int64(5))
				release()
				c.converge()
			})
		})
	}
}

// Pieces that get lost, one way or the other, are read again, and the questions of the leader too.
func TestCatchUpOverBadNetwork(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t, "a", "b", "c")
		behind(t, c)
		sent := countSnapshots(c)
		var n atomic.Int64
		defer c.net.Lose(func(e transport.Envelope) bool {
			switch e.Message.Kind {
			case transport.KindFetch, transport.KindImageOpen, transport.KindImageRead:
				return n.Add(1)%7 == 0
			}
			return false
		})()
		c.nodes["c"].mustOpen()
		c.patience = 10 * time.Minute // some 14 of 50 pieces get lost, each costs its timeout of 3 s, and more by chance
		c.converge()
		require.Greater(t, n.Load(), int64(50))
		require.Equal(t, int64(1), sent.Load())
		c.eventually("the leader hears of it", func() bool {
			s := c.leader().group.Status()
			return s.LeaderNode == "c" || s.Match[replicaID("c")] == s.LastIndex
		})
	})
}

// While an image is pulled, and until the follower has gone on from it, the log is kept from it on, so one
// round does, however slow; but not for any price: what is then missing comes with a second round, which
// brings what has changed only.
func TestLogIsHeldForCatchUp(t *testing.T) {
	for name, row := range map[string]struct {
		entries, bytes int // written meanwhile; 2 KiB make a snapshot, and 64 entries are kept in any case
		afterwards     bool
		rounds         int64
	}{
		"during":     {130, 100, false, 1},
		"afterwards": {130, 100, true, 1},
		"too much":   {600, 350, false, 2},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				c := newCluster(t, "a", "b", "c")
				c.segmentBytes = 1 << 20 // a lane has as many entries as a checkpoint has room for
				behind(t, c)
				sent := countSnapshots(c)
				hook, there, release := stuckAt(100)
				slow := c.nodes["c"]
				slow.openWith(hook)
				<-there
				image, _ := c.leader().machine.Applied()
				hear := func() {}
				if row.afterwards { // the follower is done, and the leader does not hear of it for a while
					hear = c.net.Lose(func(e transport.Envelope) bool { return e.Message.Kind == transport.KindFetch })
					release()
					c.eventually("it is done", func() bool { return !slow.group.Status().CatchUp.Active })
				}
				for k := range row.entries {
					c.mustPut(fmt.Sprint("meanwhile", k%10), strings.Repeat("v", row.bytes))
				}
				l := c.leader()
				if row.rounds > 1 {
					l.compacted(image + 100)
				} else {
					c.eventually("snapshots", func() bool { return raftgroup.SnapshotIndex(l.group) > image+90 })
				}
				hear()
				release()
				c.converge()
				require.Equal(t, row.rounds, sent.Load())
				require.Less(t, slow.machine.taken(), behindRows+50, "the second round brought everything again")
			})
		})
	}
}

// A new replica is filled while writes go on.
func TestLearnerIsFilledUnderLoad(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t, "a", "b", "c", "d")
		d := c.nodes["d"]
		delete(c.nodes, "d")
		behind(t, c)
		c.nodes["c"].mustOpen()
		c.nodes["d"] = d
		require.NoError(t, raftgroup.Create(d.config(), nil))
		d.openWith(func(int) { pass(10 * time.Millisecond) })
		stop := c.keepWriting()
		require.NoError(t, c.leader().group.AddLearner(t.Context(), member("d")))
		c.mustPromote("d")
		stop()
		c.converge()
		require.Greater(t, d.machine.taken(), 100)
		require.Equal(t, members("a", "b", "c", "d"), d.group.Status().Members)
	})
}

// The limit holds within a tenth.
func TestCatchUpLimit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const limit = 64 << 10
		c := newCluster(t, "a", "b", "c")
		c.segmentBytes = 1 << 20
		behind(t, c)
		for k := range 40 {
			c.mustPut(fmt.Sprint(k), strings.Repeat("v", 20<<10))
		}
		slow, sent := c.nodes["c"], countSnapshots(c)
		usual := c.configure
		c.configure = func(cfg *raftgroup.Config) {
			usual(cfg)
			cfg.CatchUpLimit = rate.NewLimiter(limit, limit/8)
		}
		began := time.Now()
		slow.mustOpen()
		var bytes int64
		c.eventually("it is done", func() bool {
			bytes = max(bytes, slow.group.Status().CatchUp.DoneBytes)
			return sent.Load() == 1
		})
		took := time.Since(began).Seconds()
		require.Greater(t, took, 10.0, "too short to tell")
		require.InEpsilon(t, limit, float64(bytes)/took, 0.1)
		c.converge()
	})
}

// Each side of a catch-up takes its turn on its own disk for each piece, and neither has one while it waits for the
// other: with a single turn for all disks together it ends all the same.
func TestCatchUpTakesTurns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t, "a", "b", "c")
		c.segmentBytes = 1 << 20
		var mu sync.Mutex
		turn, bytes := make(chan struct{}, 1), map[trivet.ReplicaID]int{}
		behind(t, c)
		usual := c.configure
		c.configure = func(cfg *raftgroup.Config) {
			usual(cfg)
			id := cfg.Replica
			cfg.Background = func(ctx context.Context, n int) (func(), error) {
				select {
				case turn <- struct{}{}:
				case <-ctx.Done():
					return nil, ctx.Err()
				}
				mu.Lock()
				bytes[id] += n
				mu.Unlock()
				return func() { <-turn }, nil
			}
		}
		for _, name := range []string{"a", "b"} {
			c.nodes[name].die()
			c.nodes[name].mustOpen()
		}
		for k := range 100 {
			c.mustPut(fmt.Sprint(k), strings.Repeat("v", 10<<10))
		}
		slow, sent := c.nodes["c"], countSnapshots(c)
		slow.mustOpen()
		c.eventually("it is done", func() bool { return sent.Load() == 1 })
		c.converge()
		mu.Lock()
		defer mu.Unlock()
		require.Greater(t, bytes[replicaID("c")], 1<<19, "what it restored")
		delete(bytes, replicaID("c"))
		read := 0
		for _, n := range bytes {
			read += n
		}
		require.Greater(t, read, 1<<19, "what was read for it")
		require.Empty(t, turn, "all turns were given back")
	})
}

// What a group shows, and a process with all its groups, is bounded, and only members see it.
func TestImagesAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		names := []string{"a", "b", "c", "d", "e", "f", "g"}
		c := startCluster(t, names...)
		c.mustPut("x", "1")
		c.converge()
		a := c.nodes["a"]
		call := func(n *node, kind transport.Kind, body []byte) (transport.Message, error) {
			return n.link.Call(t.Context(), "a", transport.Message{
				Kind: kind, Group: testGroup, From: replicaID(n.name), To: replicaID("a"), Body: body,
			})
		}
		var first uint64
		for _, name := range names[1:5] {
			reply, err := call(c.nodes[name], transport.KindImageOpen, raftgroup.ImageOpenBody())
			require.NoError(t, err)
			if first == 0 {
				first, err = raftgroup.ImageOpened(reply.Body)
				require.NoError(t, err)
			}
		}
		_, err := call(c.nodes["f"], transport.KindImageOpen, raftgroup.ImageOpenBody())
		require.ErrorIs(t, err, trivet.ErrPending)
		_, err = call(c.nodes["c"], transport.KindImageRead, raftgroup.ImageReadBody(first, 0))
		require.ErrorIs(t, err, trivet.ErrNotFound, "another one's image")
		_, err = call(c.nodes["b"], transport.KindImageRead, raftgroup.ImageReadBody(first, 0))
		require.NoError(t, err)
		_, err = call(c.nodes["b"], transport.KindImageRead, raftgroup.ImageReadBody(first, 512<<20))
		require.ErrorIs(t, err, trivet.ErrInvalid, "far ahead")
		_, err = call(c.nodes["b"], transport.KindImageRead, raftgroup.ImageReadBody(first, 7))
		require.ErrorIs(t, err, trivet.ErrInvalid)
		_, err = call(c.nodes["b"], transport.KindImageOpen, raftgroup.ImageOpenBody())
		require.NoError(t, err, "in place of the one that it had")
		own, process := raftgroup.OpenImages(a.group)
		require.Equal(t, []int{4, 4}, []int{own, process})
		_, err = call(c.nodes["b"], transport.KindImageRead, raftgroup.ImageReadBody(first, 0))
		require.ErrorIs(t, err, trivet.ErrNotFound)
		a.stop()
		require.Zero(t, a.mux.OpenImages())
	})
}

// Of three replicas one is behind and one is gone for good, and the third has started again: it leads, and does not
// know how far the group had committed, only what its own machine has. It cannot learn it without the one that is
// behind, whose state is as far as that machine's once it has pulled it. That the leader has the same entry is
// enough.
func TestLeaderLearnsFromWhomItFilled(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t, "a", "b", "c")
		behind(t, c)
		l := c.leader()
		_, err := l.machine.Flush()
		require.NoError(t, err)
		applied, _ := l.machine.Applied()
		require.Greater(t, applied, raftgroup.SnapshotIndex(l.group))
		gone := c.nodes[c.others(l.name)[0]]
		gone.die()
		l.die()
		sent := countSnapshots(c)
		l.mustOpen()
		c.nodes["c"].mustOpen()
		c.converge()
		require.Equal(t, int64(1), sent.Load())
		gone.mustOpen()
		c.converge()
	})
}
