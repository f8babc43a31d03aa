package raftgroup_test

import (
	"context"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/replication/raftgroup"
	"github.com/trivet-csi/trivet/replication/transport"
)

// A leader that nobody can hear any more serves no round, however good it takes its lease to be.
func TestRoundNeedsAQuorum(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := startCluster(t, "a", "b", "c")
		l := c.leader()
		term, err := l.group.ReadRound(t.Context())
		require.NoError(t, err)
		require.Equal(t, l.group.Status().Term, term)

		one := c.others(l.name)[0]
		c.net.Cut(trivet.NodeID(l.name), trivet.NodeID(one))
		_, err = l.group.ReadRound(t.Context())
		require.NoError(t, err, "a quorum is left")

		c.net.Isolate(trivet.NodeID(l.name))
		_, err = l.group.ReadGate()
		require.NoError(t, err, "the lease still holds: the test shows something")
		_, err = l.group.ReadRound(t.Context())
		require.ErrorIs(t, err, trivet.ErrUnavailable)
		c.net.HealAll()
		_, err = c.nodes[one].group.ReadRound(t.Context())
		require.ErrorIs(t, err, trivet.ErrNotLeader)
	})
}

// A learner that answers is no quorum (D3).
func TestRoundCountsVotersOnly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t, "a", "b", "c", "d")
		for _, name := range []string{"a", "b", "c", "d"} {
			boot := members("a", "b", "c")
			if name == "d" {
				boot = nil
			}
			require.NoError(t, raftgroup.Create(c.nodes[name].config(), boot))
			c.nodes[name].mustOpen()
		}
		l := c.leader()
		require.NoError(t, l.group.AddLearner(t.Context(), member("d")))
		c.converge()
		l = c.leader()
		for _, name := range c.others(l.name, "d") {
			c.net.Partition([]trivet.NodeID{trivet.NodeID(l.name)}, []trivet.NodeID{trivet.NodeID(name)})
		}
		_, err := l.group.ReadRound(t.Context())
		require.ErrorIs(t, err, trivet.ErrUnavailable)
	})
}

// A read that comes while a round is under way is not served by it, but by the next, which it shares with all others
// that came meanwhile.
func TestRoundsBeginAfterTheirReads(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := startCluster(t, "a", "b", "c")
		l := c.leader()
		me := trivet.NodeID(l.name)
		pass(heartbeat) // nothing else is under way but heartbeats
		const readN = 20
		beats := func(e transport.Envelope) bool { return e.Message.Kind == transport.KindAppendEntries }
		release := c.net.Hold(func(e transport.Envelope) bool { return beats(e) && e.Reply && e.To == me })
		first, later := make(chan error, 1), make(chan error, readN)
		read := func(to chan error) {
			_, err := l.group.ReadRound(t.Context())
			to <- err
		}
		go read(first)
		synctest.Wait()
		for range readN {
			go read(later)
		}
		synctest.Wait()
		stop := c.net.Lose(func(e transport.Envelope) bool { return beats(e) && !e.Reply && e.From == me })
		release()
		require.NoError(t, <-first)
		for range readN {
			require.ErrorIs(t, <-later, trivet.ErrUnavailable, "the answers were to what was asked before they came")
		}
		stop()
		l = c.leader()

		var asked atomic.Int64
		defer c.net.Lose(func(e transport.Envelope) bool {
			if beats(e) && !e.Reply && e.From == me {
				asked.Add(1)
			}
			return false
		})()
		release = c.net.Hold(func(e transport.Envelope) bool { return beats(e) && e.Reply && e.To == me })
		go read(first)
		synctest.Wait()
		for range readN {
			go read(later)
		}
		synctest.Wait()
		release()
		require.NoError(t, <-first)
		for range readN {
			require.NoError(t, <-later)
		}
		assert.LessOrEqual(t, asked.Load(), int64(2*2+2), "two rounds of two followers, and a heartbeat of the group")
	})
}

// Who gives up does not take the round from others, and a replica that stops lets nobody wait.
func TestRoundIsLeft(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := startCluster(t, "a", "b", "c")
		l := c.leader()
		release := c.net.Hold(func(e transport.Envelope) bool { return e.Reply && e.To == trivet.NodeID(l.name) })
		ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
		defer cancel()
		others := make(chan error, 1)
		go func() {
			_, err := l.group.ReadRound(t.Context())
			others <- err
		}()
		_, err := l.group.ReadRound(ctx)
		require.ErrorIs(t, err, context.DeadlineExceeded)
		release()
		require.NoError(t, <-others)

		release = c.net.Hold(func(e transport.Envelope) bool { return e.Reply && e.To == trivet.NodeID(l.name) })
		defer release()
		go func() {
			_, err := l.group.ReadRound(t.Context())
			others <- err
		}()
		synctest.Wait()
		l.die()
		require.Error(t, <-others)
	})
}
