package raftgroup_test

import (
	"bytes"
	"context"
	"fmt"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/replication/raftgroup"
	"github.com/trivet-csi/trivet/replication/transport"
)

func TestProposeErrors(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := startCluster(t, "a", "b", "c")
		l := c.leader()
		f := c.nodes[c.others(l.name)[0]]
		require.ErrorIs(t, f.set("x", "1"), trivet.ErrNotLeader)
		require.ErrorIs(t, f.group.Barrier(t.Context()), trivet.ErrNotLeader)
		_, err := f.group.ReadGate()
		require.ErrorIs(t, err, trivet.ErrNotLeader)
		_, err = l.group.Propose(t.Context(), make([]byte, raftgroup.EntryBytesMax+1))
		require.ErrorIs(t, err, trivet.ErrInvalid)
		_, err = l.group.Propose(t.Context(), nil)
		require.NoError(t, err)

		// Cut off, it does not know what became of the entry, and says so as soon as it steps down.
		c.net.Isolate(trivet.NodeID(l.name))
		start := time.Now()
		require.ErrorIs(t, l.set("x", "1"), trivet.ErrUnavailable)
		require.Less(t, time.Since(start), heartbeat)
		require.ErrorIs(t, l.set("x", "1"), trivet.ErrNotLeader)
		c.net.HealAll()

		l = c.leader()
		stop := c.net.Lose(func(e transport.Envelope) bool {
			return e.Message.Kind == transport.KindAppendEntries && !e.Reply && !raftgroup.IsHeartbeatBody(e.Message.Body)
		})
		ctx, cancel := context.WithTimeout(t.Context(), heartbeat/10)
		_, err = l.group.Propose(ctx, []byte("x=2"))
		cancel()
		require.ErrorIs(t, err, context.DeadlineExceeded)
		stop()
		c.converge()
		require.Equal(t, "2", l.machine.get("x"), "unknown is not failed")
		g := l.group
		l.stop()
		_, err = g.Propose(t.Context(), []byte("x=3"))
		require.ErrorIs(t, err, trivet.ErrClosed)
		require.ErrorIs(t, g.Barrier(t.Context()), trivet.ErrClosed)
	})
}

// While a leader hands over, it takes no proposal: each one that it took would be one more that the successor has to
// have first, and under load it would never have them all. Those that come meanwhile wait, and are then refused for
// certain, not left unknown.
func TestProposeWaitsForHandOver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := startCluster(t, "a", "b", "c")
		l := c.leader()
		heir := c.others(l.name)[0]
		release := c.net.Hold(func(e transport.Envelope) bool {
			return e.To == trivet.NodeID(heir) && e.Message.Kind == transport.KindAppendEntries && !e.Reply &&
				!raftgroup.IsHeartbeatBody(e.Message.Body)
		})
		l.mustSet("x", "1") // which the heir lacks
		moved, proposed := make(chan error, 1), make(chan error, 20)
		go func() { moved <- l.group.TransferTo(t.Context(), replicaID(heir)) }()
		synctest.Wait()
		before := l.group.Status().LastIndex
		for k := range cap(proposed) {
			go func() { proposed <- l.set("y", fmt.Sprint(k)) }()
		}
		pass(heartbeat / 4)
		require.Equal(t, before, l.group.Status().LastIndex, "the log stands still")
		require.Empty(t, proposed)
		release()
		require.NoError(t, <-moved)
		for range cap(proposed) {
			require.ErrorIs(t, <-proposed, trivet.ErrNotLeader)
		}
		require.Equal(t, heir, c.leader().name)
		c.converge()
		require.Equal(t, "1", l.machine.get("x"))
		require.Empty(t, l.machine.get("y"), "what was refused never happens")
	})
}

// Proposals under way are answered when the replica is closed.
func TestCloseAnswersProposals(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := startCluster(t, "a", "b", "c")
		l := c.leader()
		c.net.Isolate(trivet.NodeID(l.name))
		var wg sync.WaitGroup
		for k := range 100 {
			wg.Go(func() {
				_, err := l.group.Propose(context.Background(), fmt.Appendf(nil, "%d=1", k))
				require.Error(t, err)
			})
		}
		synctest.Wait()
		l.die()
		wg.Wait()
		c.net.HealAll()
		l.mustOpen()
		c.converge()
	})
}

// Entries that are committed when the replica is closed, and not yet applied, are answered too.
func TestCloseWaitsForApply(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := startCluster(t, "a")
		a := c.leader()
		gate := make(chan struct{})
		a.machine.holdApply(gate)
		var wg sync.WaitGroup
		for k := range 20 {
			wg.Go(func() {
				_, err := a.group.Propose(context.Background(), fmt.Appendf(nil, "%d=1", k))
				require.NoError(t, err)
			})
			synctest.Wait() // one entry a batch
		}
		closed := make(chan error)
		go func() { closed <- a.group.Close() }()
		pass(heartbeat)
		close(gate)
		wg.Wait()
		require.NoError(t, <-closed)
	})
}

// Entries far beyond what fits in one message reach a follower that comes late.
func TestLargeEntries(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t, "a", "b", "c")
		c.segmentBytes = 8 << 20
		for _, n := range c.nodes {
			require.NoError(t, raftgroup.Create(n.config(), members("a", "b", "c")))
			n.mustOpen()
		}
		l := c.leader()
		late := c.nodes[c.others(l.name)[0]]
		late.die()
		l = c.leader()
		big := bytes.Repeat([]byte{'v'}, raftgroup.EntryBytesMax-2)
		for k := range 12 {
			_, err := l.group.Propose(t.Context(), append([]byte{'0' + byte(k), '='}, big...))
			require.NoError(t, err)
		}
		var most int
		var mu sync.Mutex
		c.net.Lose(func(e transport.Envelope) bool {
			mu.Lock()
			defer mu.Unlock()
			most = max(most, len(e.Message.Body))
			return false
		})
		late.mustOpen()
		c.converge()
		mu.Lock()
		defer mu.Unlock()
		require.Greater(t, most, 3<<20)
		require.Less(t, most, transport.MessageBytesMax)
	})
}

func TestChanged(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := startCluster(t, "a", "b", "c")
		l := c.leader()
		f := c.nodes[c.others(l.name)[0]]
		c.eventually("the follower knows", func() bool { return f.group.Status().Leader == replicaID(l.name) })
		synctest.Wait()
		changed := f.group.Changed()
		select {
		case <-changed:
			require.Fail(t, "nothing has changed")
		case <-time.After(5 * heartbeat):
		}
		l.die()
		<-changed
		c.leader()
		lost := f.group.Changed()
		f.stop()
		<-lost
	})
}

// A follower learns what is committed without waiting for the next write.
func TestFollowersApplySoon(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := startCluster(t, "a", "b", "c")
		c.mustPut("x", "1")
		pass(3 * heartbeat)
		for name, n := range c.nodes {
			require.Equal(t, "1", n.machine.get("x"), name)
		}
		s := c.leader().group.Status()
		require.Equal(t, s.LastIndex, s.Commit)
		require.Len(t, s.Match, 2)
		for id, m := range s.Match {
			require.Equal(t, s.LastIndex, m, id)
		}
	})
}
