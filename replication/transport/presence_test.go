package transport_test

import (
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/internal/pki"
	"github.com/trivet-csi/trivet/replication/transport"
)

// watched collects what a Watcher tells of one node.
func watched(t *testing.T, w transport.Watcher, node trivet.NodeID) <-chan transport.Presence {
	t.Helper()
	news := make(chan transport.Presence, 100)
	t.Cleanup(w.Watch(func(p transport.Presence) {
		if p.Node == node {
			news <- p
		}
	}))
	return news
}

// told returns the next news, which must be of that state.
func told(t *testing.T, news <-chan transport.Presence, want transport.PresenceState) transport.Presence {
	t.Helper()
	p := <-news
	require.Equal(t, want, p.State, p.Reason)
	require.NotZero(t, p.Since)
	return p
}

// The death of a process is known from the refusal of its machine, long before silence would tell.
func TestPresenceKill(t *testing.T) {
	c := newCluster(t)
	c.limits.SilentAfter = time.Minute
	c.limits.DeadAfter = 3 * time.Minute
	a, b := c.start(t, "a"), c.start(t, "b")
	a.Handle(testKind, echo)
	b.Handle(testKind, echo)
	news := watched(t, a, "b")
	assert.Equal(t, transport.Unknown, a.PresenceOf("b").State)
	_, err := call(t, a, "b", "x")
	require.NoError(t, err)
	first := told(t, news, transport.Alive)
	_, err = call(t, b, "a", "x") // connections both ways
	require.NoError(t, err)
	assert.Equal(t, transport.Alive, b.PresenceOf("a").State)

	b.stop()
	gone := told(t, news, transport.Gone)
	assert.Contains(t, gone.Reason, "refused")
	assert.Equal(t, first.Incarnation, gone.Incarnation)
	assert.Equal(t, gone, a.PresenceOf("b"))

	again := c.start(t, "b") // at another address
	again.Handle(testKind, echo)
	_, err = call(t, a, "b", "x")
	require.NoError(t, err)
	assert.NotEqual(t, first.Incarnation, told(t, news, transport.Alive).Incarnation)
}

// A successor at another address that answers the dial proves the death of the one before, although
// that one's address refuses nobody.
func TestPresenceRestartElsewhere(t *testing.T) {
	c := newCluster(t)
	c.limits.SilentAfter = time.Minute
	c.limits.DeadAfter = 3 * time.Minute
	a, b := c.start(t, "a"), c.start(t, "b")
	b.Handle(testKind, echo)
	news := watched(t, a, "b")
	_, err := call(t, a, "b", "x")
	require.NoError(t, err)
	first := told(t, news, transport.Alive)
	successor := c.start(t, "b") // in the book from now on
	require.NoError(t, b.Close())
	assert.Equal(t, first.Incarnation, told(t, news, transport.Gone).Incarnation)
	second := told(t, news, transport.Alive)
	assert.NotEqual(t, first.Incarnation, second.Incarnation)
	assert.Contains(t, second.Reason, "answered the dial")
	assert.Equal(t, 1, successor.Stats().ConnsInN)
}

// Over pipes: in exact time.

func TestPresenceClosedConnectionAlone(t *testing.T) {
	overPipes(t, func(t *testing.T, _ *cluster, w *wire, a, b *node) {
		b.Handle(testKind, echo)
		news := watched(t, a, "b")
		_, err := call(t, a, "b", "x")
		require.NoError(t, err)
		told(t, news, transport.Alive)
		var dials atomic.Int64 // of b alone: b dials a too when a is back before b saw the old connection end
		w.onDial.Store(func(address string) {
			if address == "b" {
				dials.Add(1)
			}
		})
		b.Disconnect("a")
		synctest.Wait()
		assert.EqualValues(t, 1, dials.Load(), "dialled anew, at once")
		assert.Equal(t, 1, a.Stats().ConnsOutN)
		time.Sleep(time.Minute)
		assert.Empty(t, news)
		assert.Equal(t, transport.Alive, a.PresenceOf("b").State)

		w.refuse.Store(true) // b would come back at once
		a.Disconnect("b")
		synctest.Wait()
		assert.Equal(t, transport.Unknown, a.PresenceOf("b").State, "who was removed is not judged")
	})
}

func TestPresenceRefused(t *testing.T) {
	overPipes(t, func(t *testing.T, _ *cluster, w *wire, a, b *node) {
		b.Handle(testKind, echo)
		news := watched(t, a, "b")
		_, err := call(t, a, "b", "x")
		require.NoError(t, err)
		first := told(t, news, transport.Alive)
		began := time.Now()
		w.reset.Store(2) // the dying process still takes two connections
		w.refuse.Store(true)
		require.NoError(t, b.Close())
		assert.Equal(t, first.Incarnation, told(t, news, transport.Gone).Incarnation)
		assert.Less(t, time.Since(began), 50*time.Millisecond)
		assert.Zero(t, w.reset.Load())
	})
}

// A black hole is known by its silence. When it ends, the same process is Alive again.
func TestPresenceBlackHole(t *testing.T) {
	overPipes(t, func(t *testing.T, _ *cluster, w *wire, a, b *node) {
		b.Handle(testKind, echo)
		news := watched(t, a, "b")
		_, err := call(t, a, "b", "x")
		require.NoError(t, err)
		first := told(t, news, transport.Alive)
		time.Sleep(10 * time.Second)
		assert.Empty(t, news, "pings are a sign of life")
		began := time.Now()
		w.hole.Store(true)
		gone := told(t, news, transport.Gone)
		took := time.Since(began)
		assert.Contains(t, gone.Reason, "nothing heard for 1s")
		assert.GreaterOrEqual(t, took, 750*time.Millisecond)
		assert.LessOrEqual(t, took, 1125*time.Millisecond)
		w.hole.Store(false)
		for a.PresenceOf("b").State == transport.Gone {
			_, _ = call(t, a, "b", "x") // until the connection with lost bytes is given up
			time.Sleep(100 * time.Millisecond)
		}
		assert.Equal(t, first.Incarnation, told(t, news, transport.Alive).Incarnation)
	})
}

// A new process behind the same address: Gone for the old one, then Alive for the new one.
func TestPresenceRestart(t *testing.T) {
	overPipes(t, func(t *testing.T, c *cluster, w *wire, a, b *node) {
		b.Handle(testKind, echo)
		news := watched(t, a, "b")
		_, err := call(t, a, "b", "x")
		require.NoError(t, err)
		first := told(t, news, transport.Alive)
		successor := &node{Peers: c.peersOf(t, "b", b.creds), creds: b.creds, served: make(chan error, 1000)}
		w.set("b", successor)
		w.set("b, dead", b)
		require.NoError(t, b.Close())
		gone := told(t, news, transport.Gone)
		assert.Equal(t, first.Incarnation, gone.Incarnation)
		assert.Contains(t, gone.Reason, "another incarnation")
		assert.NotEqual(t, first.Incarnation, told(t, news, transport.Alive).Incarnation)
	})
}

// A process that comes to us while we believe in its predecessor is verified by a dial.
func TestPresenceSuccessorConnects(t *testing.T) {
	overPipes(t, func(t *testing.T, c *cluster, w *wire, a, b *node) {
		a.Handle(testKind, echo)
		b.Handle(testKind, echo)
		news := watched(t, a, "b")
		_, err := call(t, a, "b", "x")
		require.NoError(t, err)
		first := told(t, news, transport.Alive)
		successor := &node{Peers: c.peersOf(t, "b", b.creds), creds: b.creds, served: make(chan error, 1000)}
		w.set("b, lost", b) // nobody told us of its end
		w.set("b", successor)
		_, err = call(t, successor, "a", "x")
		require.NoError(t, err)
		assert.Equal(t, first.Incarnation, told(t, news, transport.Gone).Incarnation)
		assert.NotEqual(t, first.Incarnation, told(t, news, transport.Alive).Incarnation)
	})
}

// A dial that is refused where the node is not any more proves nothing.
func TestPresenceAddressChanged(t *testing.T) {
	overPipes(t, func(t *testing.T, c *cluster, w *wire, a, b *node) {
		b.Handle(testKind, echo)
		news := watched(t, a, "b")
		_, err := call(t, a, "b", "x")
		require.NoError(t, err)
		told(t, news, transport.Alive)
		w.set("b2", b)
		var asked atomic.Int64
		w.onDial.Store(func(address string) {
			if address == "b" && asked.Add(1) == 1 {
				w.set("b", nil)
				c.book.set("b", "b2") // meanwhile
			}
		})
		b.Disconnect("a")
		time.Sleep(30 * time.Second)
		assert.Empty(t, news)
		assert.Equal(t, 1, a.Stats().ConnsOutN)
		assert.EqualValues(t, 1, asked.Load())
	})
}

func TestPresenceConfig(t *testing.T) {
	c := newCluster(t)
	c.limits.SilentAfter = 100 * time.Millisecond
	creds := c.credentials(t, pki.RoleNode, "a", pki.For(time.Hour))
	require.NoError(t, c.peersOf(t, "a", creds).Close(), "PingEvery follows SilentAfter")
	_, err := transport.NewPeers(transport.Config{Limits: transport.Limits{SilentAfter: 1, PingEvery: 1}})
	require.ErrorContains(t, err, "Limits.SilentAfter")
}

// Real processes are far apart; Memory shows the same.
func TestPresenceMemory(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := transport.NewMemory(1)
		defer h.Close()
		a, b := h.Node("a"), h.Node("b")
		b.Handle(testKind, echo)
		news := watched(t, a, "b")
		_, err := a.Call(t.Context(), "b", transport.Message{Kind: testKind})
		require.NoError(t, err)
		first := told(t, news, transport.Alive)
		assert.Equal(t, transport.Alive, b.PresenceOf("a").State, "heard by its request")

		began := time.Now()
		h.Down("b")
		gone := told(t, news, transport.Gone)
		assert.Equal(t, first.Incarnation, gone.Incarnation)
		assert.Equal(t, time.Millisecond, time.Since(began))
		second := h.Node("b")
		second.Handle(testKind, echo)
		time.Sleep(time.Minute)
		assert.Empty(t, news, "not in contact yet")
		_, err = a.Call(t.Context(), "b", transport.Message{Kind: testKind})
		require.NoError(t, err)
		successor := told(t, news, transport.Alive)
		assert.NotEqual(t, first.Incarnation, successor.Incarnation)

		// One direction is enough for silence, and it is the other one's.
		bNews := watched(t, second, "a")
		told(t, bNews, transport.Alive)
		began = time.Now()
		h.Cut("b", "a")
		assert.Contains(t, told(t, news, transport.Gone).Reason, "nothing heard")
		assert.Equal(t, time.Second, time.Since(began))
		time.Sleep(time.Minute)
		assert.Empty(t, bNews)
		h.HealAll()
		assert.Equal(t, successor.Incarnation, told(t, news, transport.Alive).Incarnation)

		// A short cut is nothing; a death behind a cut is known by silence only.
		h.Isolate("b")
		time.Sleep(900 * time.Millisecond)
		h.HealAll()
		time.Sleep(time.Minute)
		assert.Empty(t, news)
		h.Isolate("b")
		h.Down("b")
		began = time.Now()
		told(t, news, transport.Gone)
		assert.Equal(t, time.Second, time.Since(began))
	})
}

// A successor is seen although its predecessor's death was not.
func TestPresenceMemoryRestart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := transport.NewMemory(1)
		defer h.Close()
		h.SetSilentAfter(time.Hour)
		a, b := h.Node("a"), h.Node("b")
		a.Handle(testKind, echo)
		b.Handle(testKind, echo)
		news := watched(t, a, "b")
		_, err := a.Call(t.Context(), "b", transport.Message{Kind: testKind})
		require.NoError(t, err)
		first := told(t, news, transport.Alive)
		h.Isolate("b")
		h.Down("b")
		again := h.Node("b")
		h.HealAll()
		_, err = again.Call(t.Context(), "a", transport.Message{Kind: testKind})
		require.NoError(t, err)
		assert.Equal(t, first.Incarnation, told(t, news, transport.Gone).Incarnation)
		assert.NotEqual(t, first.Incarnation, told(t, news, transport.Alive).Incarnation)
	})
}
