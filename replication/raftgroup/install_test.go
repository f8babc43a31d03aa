package raftgroup_test

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/cockroachdb/pebble/v2/vfs/errorfs"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/replication/raftgroup"
	"github.com/trivet-csi/trivet/replication/transport"
)

// behind starts a group of all nodes, in which c has missed so much that only an image helps: 200 rows in
// about 50 pieces. c's disk is stopped; each is to reopen it as it likes.
func behind(t *testing.T, c *cluster) {
	t.Helper()
	c.configure = func(cfg *raftgroup.Config) {
		cfg.SnapshotBytes = 128 << 10
		raftgroup.SetPieceBytes(cfg, 512)
	}
	var names []string
	for name := range c.nodes {
		names = append(names, name)
	}
	for _, n := range c.nodes {
		require.NoError(t, raftgroup.Create(n.config(), members(names...)))
		n.mustOpen()
	}
	c.mustPut("first", "1")
	c.converge()
	_, err := c.nodes["c"].machine.Flush() // so that it is not empty when it comes back
	require.NoError(t, err)
	c.nodes["c"].die()
	for k := range 200 {
		c.mustPut(fmt.Sprint(k), strings.Repeat("v", 100))
	}
	c.leader().compacted(50)
}

func crashClone(percent int, seed uint64) vfs.CrashCloneCfg {
	return vfs.CrashCloneCfg{UnsyncedDataPercent: percent, RNG: rand.New(rand.NewPCG(seed, 0))}
}

// countSnapshots counts the images that were restored.
func countSnapshots(c *cluster) *atomic.Int64 {
	var n atomic.Int64
	c.net.Lose(func(e transport.Envelope) bool {
		if e.Message.Kind == transport.KindImageClose && !e.Reply && raftgroup.Restored(e.Message.Body) {
			n.Add(1)
		}
		return false
	})
	return &n
}

func TestInstallSnapshot(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t, "a", "b", "c")
		sent := countSnapshots(c)
		behind(t, c)
		slow := c.nodes["c"]
		slow.mustOpen()
		c.converge()
		require.Equal(t, int64(1), sent.Load())
		require.Equal(t, members("a", "b", "c"), slow.group.Status().Members)
		// What it holds now carries a group on its own terms.
		slow.die()
		slow.mustOpen()
		c.converge()
		require.NoError(t, c.leader().group.TransferTo(t.Context(), replicaID("c")))
		c.converge()
		require.Equal(t, int64(1), sent.Load(), "the log must go on where the snapshot ended")
	})
}

// D6: the log of the follower is ahead of the snapshot, with entries that were never committed.
func TestInstallSnapshotUnderLongerLog(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t, "a", "b", "c")
		sent := countSnapshots(c)
		c.configure = func(cfg *raftgroup.Config) { cfg.SnapshotBytes = 128 << 10 }
		for _, n := range c.nodes {
			require.NoError(t, raftgroup.Create(n.config(), members("a", "b", "c")))
			n.mustOpen()
		}
		c.mustPut("first", "1")
		c.converge()
		old := c.leader()
		c.net.Isolate(trivet.NodeID(old.name))
		var wg sync.WaitGroup
		for k := range 1000 {
			wg.Go(func() { _ = old.set(fmt.Sprint("lost", k), "1") })
		}
		wg.Wait()
		_, ahead := raftgroup.LogBounds(old.group)
		others := c.others(old.name)
		for k := range 200 {
			c.eventually("a write", func() bool {
				return c.leader(others...).set(fmt.Sprint(k), strings.Repeat("v", 100)) == nil
			})
		}
		require.Greater(t, ahead, raftgroup.SnapshotIndex(c.leader(others...).group)+100, "the log is not ahead")
		c.net.HealAll()
		c.converge()
		require.Positive(t, sent.Load(), "no snapshot was sent")
		for k := range 1000 {
			require.Empty(t, old.machine.get(fmt.Sprint("lost", k)))
		}
		old.die()
		old.mustOpen()
		c.converge()
		_, last := raftgroup.LogBounds(old.group)
		require.Less(t, last, ahead, "the log in memory outlived the one on disk")
		require.NoError(t, c.leader().group.TransferTo(t.Context(), replicaID(old.name)))
		c.converge()
	})
}

// The log of a replica that has pulled its state begins behind the snapshot. When all that it holds conflicts with the
// leader's log, the leader goes on from the snapshot, and must be heard: it would try without a pause for ever.
func TestAppendBehindInstalledSnapshot(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t, "a", "b", "c")
		behind(t, c)
		slow := c.nodes["c"]
		slow.mustOpen()
		c.converge()
		snap, term := raftgroup.SnapshotIndex(slow.group), raftgroup.RaftTerm(slow.group)
		first, last := raftgroup.LogBounds(slow.group)
		require.Less(t, last, first, "the log goes on behind the snapshot")
		c.nodes["a"].die()
		c.nodes["b"].die()
		send := func(from string, body []byte) bool {
			reply, err := c.net.Node(trivet.NodeID(from)).Call(t.Context(), "c", transport.Message{
				Kind: transport.KindAppendEntries, Group: slow.config().Group,
				From: replicaID(from), To: replicaID("c"), Body: body,
			})
			require.NoError(t, err)
			success, _, err := raftgroup.Appended(reply.Body)
			require.NoError(t, err)
			return success
		}
		// a, leading in the next term, sends an entry that nobody else gets; then b leads.
		require.True(t, send("a", raftgroup.AppendBody(term+1, snap, term, []byte("k=a"))))
		require.True(t, send("a", raftgroup.AppendBody(term+1, snap+1, term+1, []byte("l=a"))))
		require.False(t, send("b", raftgroup.AppendBody(term+2, snap+1, term+2, []byte("k=b"))), "another entry is there")
		require.False(t, send("b", raftgroup.AppendBody(term+2, snap, term-1, []byte("k=b"))), "another snapshot is there")
		require.True(t, send("b", raftgroup.AppendBody(term+2, snap, term, []byte("k=b"))))
		require.True(t, send("b", raftgroup.CommitBody(term+2, snap+1, term+2, snap+1, nil)))
		c.eventually("it is applied", func() bool { return slow.machine.get("k") == "b" })
		require.Empty(t, slow.machine.get("l"))
	})
}

// A leader's commit index says nothing of entries behind those that it has sent: they may be another leader's.
func TestCommitOnlyWhatWasSent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := startCluster(t, "a", "b", "c")
		c.mustPut("first", "1")
		c.converge()
		slow := c.nodes["c"]
		_, last := raftgroup.LogBounds(slow.group)
		term := raftgroup.RaftTerm(slow.group)
		c.nodes["a"].die()
		c.nodes["b"].die()
		send := func(from string, body []byte) {
			reply, err := c.net.Node(trivet.NodeID(from)).Call(t.Context(), "c", transport.Message{
				Kind: transport.KindAppendEntries, Group: slow.config().Group,
				From: replicaID(from), To: replicaID("c"), Body: body,
			})
			require.NoError(t, err)
			success, _, err := raftgroup.Appended(reply.Body)
			require.NoError(t, err)
			require.True(t, success)
		}
		send("a", raftgroup.AppendBody(term+1, last, term, []byte("k=a")))
		send("b", raftgroup.CommitBody(term+2, last, term, last+1, nil)) // its own entry there is still to be sent
		synctest.Wait()
		require.Empty(t, slow.machine.get("k"))
		send("b", raftgroup.CommitBody(term+2, last, term, last+1, []byte("k=b")))
		c.eventually("it is applied", func() bool { return slow.machine.get("k") == "b" })
	})
}

// H5: a crash before any change of the disk while a snapshot is received and restored. The replica
// opens, finishes the restore or is sent another image, and ends equal to the others.
func TestInstallCrash(t *testing.T) {
	every := 1
	if testing.Short() {
		every = 5
	}
	for start, percent := range []int{0, 50, 100} {
		if percent > 0 { // TestHandOver has every change of the hand-over itself
			every = max(every, 3)
		}
		for n, done := start, false; !done; n += every {
			synctest.Test(t, func(t *testing.T) { done = !installCrash(t, n, percent) })
		}
	}
}

func installCrash(t *testing.T, n, percent int) bool {
	c := newCluster(t, "a", "b", "c")
	behind(t, c)
	slow := c.nodes["c"]
	crash := make(chan *vfs.MemFS, 1)
	rng := rand.New(rand.NewPCG(uint64(n), uint64(percent)))
	disk := slow.fs
	var count atomic.Int64
	watched := errorfs.Wrap(vfs.FS(disk), &onChange{f: func(int) {
		if count.Add(1) == int64(n)+1 {
			crash <- disk.CrashClone(vfs.CrashCloneCfg{UnsyncedDataPercent: percent, RNG: rng})
		}
	}})
	c.configure = func(cfg *raftgroup.Config) {
		cfg.SnapshotBytes = 128 << 10
		raftgroup.SetPieceBytes(cfg, 512)
		if cfg.Replica == replicaID("c") && slow.fs == disk {
			cfg.FS = watched
		}
	}
	// The machine lives on the same disk: its changes count too.
	m, err := openKV(watched, "/machine")
	require.NoError(t, err)
	slow.machine = m
	slow.group, err = raftgroup.Open(slow.config())
	require.NoError(t, err)
	caught := make(chan struct{})
	go func() {
		defer close(caught)
		want, _ := c.leader("a", "b").machine.Applied()
		c.eventually("c catches up", func() bool {
			have, _ := m.Applied()
			return have >= want || len(crash) > 0
		})
	}()
	<-caught
	var after *vfs.MemFS
	select {
	case after = <-crash:
	default:
		return false
	}
	slow.die()
	slow.fs = after
	slow.mustOpen()
	c.converge()
	return true
}

// While an image is restored the replica neither votes nor answers, and its group goes on.
func TestGroupServesDuringRestore(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t, "a", "b", "c")
		behind(t, c)
		slow := c.nodes["c"]
		m, err := openKV(slow.fs, "/machine")
		require.NoError(t, err)
		m.gate = make(chan struct{})
		slow.machine = m
		slow.group, err = raftgroup.Open(slow.config())
		require.NoError(t, err)
		l := c.leader("a", "b")
		for range 50 {
			pass(heartbeat / 5)
			require.Equal(t, []string{l.name}, gates(c))
		}
		require.Empty(t, slow.group.Status().Leader)
		require.ErrorIs(t, slow.set("x", "1"), trivet.ErrNotLeader)
		l.mustSet("x", "1")
		close(m.gate)
		c.converge()
	})
}

// A follower that lags no further than the log is kept for is not sent an image.
func TestLaggardIsServedFromTheLog(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t, "a", "b", "c")
		sent := countSnapshots(c)
		c.configure = func(cfg *raftgroup.Config) { cfg.SnapshotBytes = 480 << 10 } // 120 entries
		for _, n := range c.nodes {
			require.NoError(t, raftgroup.Create(n.config(), members("a", "b", "c")))
			n.mustOpen()
		}
		c.mustPut("first", "1")
		c.converge()
		slow := c.nodes[c.others(c.leader().name)[0]]
		slow.die()
		for k := range 250 {
			c.mustPut(fmt.Sprint(k), strings.Repeat("v", 100))
		}
		l := c.leader()
		c.eventually("a snapshot", func() bool { return raftgroup.SnapshotIndex(l.group) > 200 })
		slow.mustOpen()
		c.converge()
		require.Zero(t, sent.Load())
	})
}

// A snapshot whose last entry the log holds is not wanted: the log may hold entries beyond it that
// this replica has acknowledged, and a quorum may rest on them.
func TestSnapshotNeverCostsEntries(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := startCluster(t, "a", "b", "c")
		c.mustPut("x", "1")
		c.converge()
		l := c.leader()
		f := c.nodes[c.others(l.name)[0]]
		// The follower must hold an entry of which it does not know that it is committed. Now and then the
		// leader tells it before we look; then there is another entry.
		var want, have uint64
		for try := 0; have == want && try < 50; try++ {
			l.mustSet("x", fmt.Sprint(try))
			_, want = raftgroup.LogBounds(l.group)
			c.eventually("the entry is in the follower's log", func() bool {
				_, last := raftgroup.LogBounds(f.group)
				return last == want
			})
			have, _ = f.machine.Applied()
		}
		require.Less(t, have, want, "the follower does not know yet that it is committed")
		reply, err := l.link.Call(t.Context(), trivet.NodeID(f.name), transport.Message{
			Kind: transport.KindFetch, Group: testGroup, From: replicaID(l.name), To: replicaID(f.name),
			Body: raftgroup.FetchBody(l.group),
		})
		require.NoError(t, err)
		done, at, err := raftgroup.Fetched(reply.Body)
		require.NoError(t, err)
		require.True(t, done)
		require.Equal(t, want, at)
		_, last := raftgroup.LogBounds(f.group)
		require.Equal(t, want, last)
	})
}
