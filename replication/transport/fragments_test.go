package transport_test

import (
	"bytes"
	"context"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/internal/pki"
	"github.com/trivet-csi/trivet/replication/transport"
)

// An urgent message waits for a piece of a large one, not for all of it.
func TestPeersUrgentOvertakes(t *testing.T) {
	overPipes(t, func(t *testing.T, _ *cluster, w *wire, a, b *node) {
		b.Handle(testKind, echo)
		b.Handle(transport.KindRequestVote, echo)
		_, err := call(t, a, "b", "x")
		require.NoError(t, err)
		w.delay.Store(int64(100 * time.Millisecond)) // per TLS record of 16 KiB
		large := make(chan error, 1)
		began := time.Now()
		go func() {
			_, err := a.Call(t.Context(), "b", transport.Message{Kind: testKind, Body: make([]byte, 4<<20)})
			large <- err
		}()
		time.Sleep(time.Second)
		_, err = a.Call(t.Context(), "b", transport.Message{Kind: transport.KindRequestVote})
		require.NoError(t, err)
		assert.Less(t, time.Since(began), 3*time.Second)
		require.NoError(t, <-large)
		assert.Greater(t, time.Since(began), 25*time.Second, "the test is about something")
	})
}

// Another group's message is not held up by a deep queue.
func TestPeersFairness(t *testing.T) {
	overPipes(t, func(t *testing.T, _ *cluster, w *wire, a, b *node) {
		b.Handle(testKind, func(context.Context, trivet.NodeID, transport.Message) (transport.Message, error) {
			return transport.Message{}, nil
		})
		_, err := call(t, a, "b", "x")
		require.NoError(t, err)
		w.delay.Store(int64(100 * time.Millisecond))
		deep := make(chan error, 8)
		began := time.Now()
		for range cap(deep) {
			go func() {
				_, err := a.Call(t.Context(), "b", transport.Message{Kind: testKind, Group: 1, Body: make([]byte, 1<<20)})
				deep <- err
			}()
		}
		time.Sleep(time.Second)
		_, err = a.Call(t.Context(), "b", transport.Message{Kind: testKind, Group: 2, Body: make([]byte, 4<<10)})
		require.NoError(t, err)
		assert.Less(t, time.Since(began), 3*time.Second)
		for range cap(deep) {
			require.NoError(t, <-deep)
		}
		assert.Greater(t, time.Since(began), 20*time.Second, "the test is about something")
	})
}

// A request that is given up between two pieces leaves nothing behind at the far end.
func TestPeersCancelBetweenPieces(t *testing.T) {
	overPipes(t, func(t *testing.T, _ *cluster, w *wire, a, b *node) {
		b.Handle(testKind, echo)
		_, err := call(t, a, "b", "x")
		require.NoError(t, err)
		w.delay.Store(int64(100 * time.Millisecond))
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
		defer cancel()
		done := make(chan error, 1)
		go func() {
			_, err := a.Call(ctx, "b", transport.Message{Kind: testKind, Body: make([]byte, 8<<20-100)})
			done <- err
		}()
		time.Sleep(time.Second)
		assert.Equal(t, 1, b.Stats().HandlersN, "it has its room")
		require.ErrorIs(t, <-done, context.DeadlineExceeded)
		time.Sleep(time.Second)
		synctest.Wait()
		assert.Zero(t, b.Stats().HandlersN)
		w.delay.Store(0)
		_, err = call(t, a, "b", "x")
		require.NoError(t, err)
		assert.EqualValues(t, 1, a.Stats().Dials)
		assert.EqualValues(t, 1, a.Stats().Cancels)
	})
}

// Large requests without room are refused at their first piece; what follows of them is forgotten.
func TestPeersBusyInPieces(t *testing.T) {
	c := newCluster(t)
	c.limits.HandlerBytesMax = transport.MessageBytesMax
	a, b := c.start(t, "a"), c.start(t, "b")
	started := make(chan struct{})
	release := make(chan struct{})
	b.Handle(testKind, func(context.Context, trivet.NodeID, transport.Message) (transport.Message, error) {
		started <- struct{}{}
		<-release
		return transport.Message{}, nil
	})
	b.Handle(transport.KindVolumeRead, echo)
	first := make(chan error, 1)
	go func() {
		_, err := a.Call(t.Context(), "b", transport.Message{Kind: testKind, Body: make([]byte, 5<<20)})
		first <- err
	}()
	<-started
	large := bytes.Repeat([]byte{5}, 4<<20)
	for range 5 {
		_, err := a.Call(t.Context(), "b", transport.Message{Kind: transport.KindVolumeRead, Body: large})
		require.ErrorIs(t, err, trivet.ErrUnavailable)
		require.ErrorContains(t, err, "busy")
	}
	close(release)
	require.NoError(t, <-first)
	require.Eventually(t, func() bool { return b.Stats().HandlersN == 0 }, time.Minute, time.Millisecond)
	reply, err := a.Call(t.Context(), "b", transport.Message{Kind: transport.KindVolumeRead, Body: large})
	require.NoError(t, err)
	assert.True(t, bytes.Equal(large, reply.Body))
	assert.EqualValues(t, 1, a.Stats().Dials, "all over one connection")
}

// A connection that ends between two pieces leaves nothing behind.
func TestPeersBreaksBetweenPieces(t *testing.T) {
	c := newCluster(t)
	c.limits.HandlerBytesMax = transport.MessageBytesMax
	a, b := c.start(t, "a"), c.start(t, "b")
	creds := c.credentials(t, pki.RoleNode, "a", pki.For(time.Hour))
	conn := c.rawConn(t, b, creds, transport.ALPN)
	_, err := conn.Write(transport.EncodePreface())
	require.NoError(t, err)
	first := transport.EncodeRequest(1, transport.Message{Kind: testKind, Body: make([]byte, 1<<20)})
	_, err = conn.Write(first[:len(first)/2])
	require.NoError(t, err)
	fragment := transport.EncodeRequest(2, transport.Message{Kind: testKind, Body: make([]byte, 1<<20)})
	_, err = conn.Write(fragment[len(fragment)-100:])
	_ = err // the middle of a frame is no frame
	require.Error(t, <-b.served)
	assert.EqualValues(t, 1, b.Stats().BadFrames)
	assert.Zero(t, b.Stats().HandlersN, "what it had begun has its room back")
	_, err = a.Call(t.Context(), "b", transport.Message{Kind: testKind})
	require.ErrorContains(t, err, "no handler")
}
