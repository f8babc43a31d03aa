package transport_test

import (
	"context"
	"crypto/tls"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/internal/pki"
	"github.com/trivet-csi/trivet/replication/transport"
)

// These tests run real TLS over pipes within a bubble, so that time is exact.

// wire is the state of all pipes of a test.
type wire struct {
	hole   atomic.Bool  // what is written vanishes
	delay  atomic.Int64 // per write
	refuse atomic.Bool  // dials fail
	reset  atomic.Int32 // of those, so many connect and are reset
	onDial atomic.Value // func(address string), called for each dial
	dials  atomic.Int64
	mu     sync.Mutex
	nodes  map[string]*node // by address; under mu once dials began
	wg     sync.WaitGroup
}

// set puts a node behind an address, nil for none.
func (w *wire) set(address string, n *node) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.nodes[address] = n
}

// at returns who is behind an address, nil for none.
func (w *wire) at(address string) *node {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.nodes[address]
}

// wireConn is one end of a pipe.
type wireConn struct {
	net.Conn
	wire   *wire
	closed *atomic.Bool
}

func (c wireConn) Write(b []byte) (int, error) {
	if c.wire.hole.Load() {
		return len(b), nil
	}
	if d := c.wire.delay.Load(); d > 0 {
		time.Sleep(time.Duration(d)) // in the bubble's time
	}
	return c.Conn.Write(b)
}

// Close does not reach the far end through a hole.
func (c wireConn) Close() error {
	c.closed.Store(true)
	if c.wire.hole.Load() {
		return c.SetDeadline(time.Now())
	}
	return c.Conn.Close()
}

func (c wireConn) SetReadDeadline(t time.Time) error {
	if c.closed.Load() {
		return net.ErrClosed
	}
	return c.Conn.SetReadDeadline(t)
}

// overPipes runs f in a bubble with the nodes a and b.
func overPipes(t *testing.T, f func(t *testing.T, c *cluster, w *wire, a, b *node)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		c, w := newCluster(t), &wire{nodes: map[string]*node{}}
		c.limits = transport.DefaultLimits()
		c.dial = func(ctx context.Context, address string) (net.Conn, error) {
			w.dials.Add(1)
			if f, ok := w.onDial.Load().(func(string)); ok {
				f(address)
			}
			to := w.at(address)
			near, far := net.Pipe()
			if w.refuse.Load() && w.reset.Add(-1) >= 0 {
				_ = far.Close()
				return near, nil
			}
			if w.reset.CompareAndSwap(-1, 0); w.refuse.Load() || to == nil {
				return nil, syscall.ECONNREFUSED
			}
			w.wg.Go(func() { to.served <- to.serve(t.Context(), wireConn{far, w, new(atomic.Bool)}) })
			return wireConn{near, w, new(atomic.Bool)}, nil
		}
		for _, name := range []trivet.NodeID{"a", "b"} {
			creds := c.credentials(t, pki.RoleNode, string(name), pki.For(30*time.Minute))
			w.nodes[string(name)] = &node{
				Peers: c.peersOf(t, name, creds), creds: creds, served: make(chan error, 1000),
			}
			c.book.set(name, string(name))
		}
		f(t, c, w, w.nodes["a"], w.nodes["b"])
		for _, n := range w.nodes {
			if n == nil {
				continue
			}
			require.NoError(t, n.Close())
		}
		w.wg.Wait()
	}) // the bubble fails the test when a goroutine is left
}

// blockHandler answers when the returned channel is closed, or reports that its context ended.
func blockHandler(n *node) (answer, ended chan struct{}) {
	answer, ended = make(chan struct{}), make(chan struct{})
	n.Handle(testKind, func(ctx context.Context, _ trivet.NodeID, m transport.Message) (transport.Message, error) {
		select {
		case <-answer:
			return m, nil
		case <-ctx.Done():
			close(ended)
			return transport.Message{}, ctx.Err()
		}
	})
	return answer, ended
}

func TestPeersLongCall(t *testing.T) {
	overPipes(t, func(t *testing.T, _ *cluster, _ *wire, a, b *node) {
		answer, _ := blockHandler(b)
		time.AfterFunc(10*time.Minute, func() { close(answer) })
		_, err := call(t, a, "b", "x")
		require.NoError(t, err, "pings keep the connection")
		assert.EqualValues(t, 1, a.Stats().Dials)
	})
}

// A black hole is noticed by both ends within DeadAfter of the last byte.
func TestPeersBlackHole(t *testing.T) {
	overPipes(t, func(t *testing.T, _ *cluster, w *wire, a, b *node) {
		_, ended := blockHandler(b)
		result := make(chan error, 1)
		go func() {
			_, err := call(t, a, "b", "x")
			result <- err
		}()
		time.Sleep(90 * time.Second)
		began := time.Now()
		w.hole.Store(true)
		err := <-result
		require.ErrorIs(t, err, trivet.ErrUnavailable)
		require.ErrorContains(t, err, "nothing moved for 3s")
		<-ended
		synctest.Wait()
		assert.LessOrEqual(t, time.Since(began), 3*time.Second)
		assert.EqualValues(t, 1, a.Stats().Timeouts)
		assert.EqualValues(t, 1, b.Stats().Timeouts)
		require.ErrorContains(t, <-b.served, "nothing moved")
		assert.Zero(t, a.Stats().ConnsOutN+b.Stats().ConnsInN)

		// A dial into the hole ends too, and does not stand in the way afterwards.
		began = time.Now()
		_, err = call(t, a, "b", "x")
		require.ErrorIs(t, err, trivet.ErrUnavailable)
		assert.Equal(t, 3*time.Second, time.Since(began))
		w.hole.Store(false)
		time.Sleep(time.Second)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		_, err = a.Call(ctx, "b", transport.Message{Kind: transport.KindMetaRead})
		require.ErrorContains(t, err, "no handler")
	})
}

// A far end that sends but does not read is dead as well.
func TestPeersFarEndDoesNotRead(t *testing.T) {
	overPipes(t, func(t *testing.T, c *cluster, w *wire, a, b *node) {
		creds := c.credentials(t, pki.RoleNode, "deaf", pki.For(time.Hour))
		near, far := net.Pipe()
		dial := make(chan net.Conn, 1)
		dial <- near
		c.dial = func(ctx context.Context, _ string) (net.Conn, error) {
			select {
			case conn := <-dial:
				return conn, nil
			case <-ctx.Done(): // a black hole from then on
				return nil, ctx.Err()
			}
		}
		c.book.set("deaf", "deaf")
		caller := c.peersOf(t, "a", a.creds)
		w.wg.Go(func() {
			conn := tls.Server(far, creds.ServerConfig(pki.Protocols{transport.ALPN: {pki.RoleNode}}))
			_, err := conn.Read(make([]byte, transport.PrefaceBytes))
			assert.NoError(t, err)
			_, err = conn.Write(transport.EncodePreface())
			for err == nil {
				time.Sleep(time.Second)
				_, err = conn.Write(transport.EncodePing())
			}
		})
		_, err := caller.Call(t.Context(), "deaf", transport.Message{Kind: testKind, Body: make([]byte, 1<<20)})
		require.ErrorIs(t, err, trivet.ErrUnavailable)
		require.ErrorContains(t, err, "nothing moved")
		require.NoError(t, caller.Close())
	})
}

// A slow connection is not a dead one: the largest message takes a minute each way and arrives.
func TestPeersSlowConnection(t *testing.T) {
	overPipes(t, func(t *testing.T, _ *cluster, w *wire, a, b *node) {
		b.Handle(testKind, echo)
		_, err := call(t, a, "b", "x")
		require.NoError(t, err)
		w.delay.Store(int64(100 * time.Millisecond)) // per TLS record of 16 KiB
		began := time.Now()
		body := make([]byte, transport.MessageBytesMax-transport.FrameHeaderBytes)
		_, err = a.Call(t.Context(), "b", transport.Message{Kind: testKind, Body: body})
		require.NoError(t, err)
		assert.Greater(t, time.Since(began), 40*time.Second, "the test is about something")
		assert.EqualValues(t, 1, a.Stats().Dials)
	})
}

// S2: connections end with the certificate that opened them.
func TestPeersCertificateExpires(t *testing.T) {
	overPipes(t, func(t *testing.T, _ *cluster, _ *wire, a, b *node) {
		_, ended := blockHandler(b)
		result := make(chan error, 1)
		go func() {
			_, err := call(t, a, "b", "x")
			result <- err
		}()
		err := <-result
		require.ErrorIs(t, err, trivet.ErrUnavailable)
		<-ended
		lasted := time.Until(b.creds.Expires())
		assert.Negative(t, lasted)
		assert.Greater(t, lasted, -20*time.Second)
		assert.NotZero(t, a.Stats().Refused+b.Stats().Refused)
	})
}

// After a failed dial calls fail at once until the backoff is over; it grows to its bound and ends
// with success or with another address.
func TestPeersBackoff(t *testing.T) {
	overPipes(t, func(t *testing.T, c *cluster, w *wire, a, b *node) {
		b.Handle(testKind, echo)
		w.refuse.Store(true)
		began := time.Now()
		for time.Since(began) < time.Minute {
			_, err := call(t, a, "b", "x")
			require.ErrorIs(t, err, trivet.ErrUnavailable)
			require.ErrorContains(t, err, "connection refused")
			time.Sleep(5 * time.Millisecond)
		}
		assert.InDelta(t, 80, w.dials.Load(), 25, "some quick ones, then every 0.5 to 1 s")
		w.refuse.Store(false)
		w.set("b2", b)
		c.book.set("b", "b2")
		_, err := call(t, a, "b", "x")
		require.NoError(t, err, "another address is tried at once")
		dialled := w.dials.Load()

		// A far end that hangs up as soon as it is connected is not dialled in a tight loop.
		began = time.Now()
		for time.Since(began) < time.Minute {
			if _, err := call(t, a, "b", "x"); err == nil {
				b.Disconnect("a")
			}
			time.Sleep(5 * time.Millisecond)
		}
		assert.InDelta(t, 100, w.dials.Load()-dialled, 50, "the same, and one at once after it hung up, every second")
	})
}

// However long a peer has refused every connection, at whatever pace it was called, its return is noticed within the
// longest backoff, by the next call after it; and until then the dials were few.
func TestPeersNoticesReturn(t *testing.T) {
	for _, away := range []time.Duration{100 * time.Millisecond, 10 * time.Second, 10 * time.Minute} {
		overPipes(t, func(t *testing.T, c *cluster, w *wire, a, b *node) {
			b.Handle(testKind, echo)
			w.refuse.Store(true)
			for began := time.Now(); time.Since(began) < away; time.Sleep(10 * time.Millisecond) {
				_, err := call(t, a, "b", "x")
				require.ErrorIs(t, err, trivet.ErrUnavailable)
			}
			most := int64(6 + 2*away/c.limits.BackoffMax) // 50 ms doubled to 1 s, then at least half of that apart
			require.LessOrEqual(t, w.dials.Load(), most)
			w.refuse.Store(false)
			back := time.Now()
			for {
				if _, err := call(t, a, "b", "x"); err == nil {
					break
				}
				require.Less(t, time.Since(back), c.limits.BackoffMax, "in the bubble's time")
				time.Sleep(10 * time.Millisecond)
			}
			before := w.dials.Load()
			for range 100 {
				_, err := call(t, a, "b", "x")
				require.NoError(t, err)
			}
			require.Equal(t, before, w.dials.Load(), "it is connected")
		})
	}
}

func TestPeersDisconnect(t *testing.T) {
	overPipes(t, func(t *testing.T, _ *cluster, _ *wire, a, b *node) {
		_, ended := blockHandler(b)
		result := make(chan error, 1)
		go func() {
			_, err := call(t, a, "b", "x")
			result <- err
		}()
		synctest.Wait()
		b.Disconnect("a")
		require.ErrorIs(t, <-result, trivet.ErrUnavailable)
		<-ended
	})
	overPipes(t, func(t *testing.T, _ *cluster, _ *wire, a, b *node) {
		_, ended := blockHandler(b)
		result := make(chan error, 1)
		go func() {
			_, err := call(t, a, "b", "x")
			result <- err
		}()
		synctest.Wait()
		a.Disconnect("b")
		require.ErrorIs(t, <-result, trivet.ErrUnavailable)
		<-ended
	})
}

// Calls that wait for one dial share its result; one that gives up leaves it to the others.
func TestPeersSharedDial(t *testing.T) {
	overPipes(t, func(t *testing.T, _ *cluster, w *wire, a, b *node) {
		b.Handle(testKind, echo)
		w.delay.Store(int64(200 * time.Millisecond))
		hasty, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
		defer cancel()
		gaveUp := make(chan error, 1)
		go func() {
			_, err := a.Call(hasty, "b", transport.Message{Kind: testKind})
			gaveUp <- err
		}()
		results := make(chan error, 10)
		for range cap(results) {
			go func() {
				_, err := call(t, a, "b", "x")
				results <- err
			}()
		}
		require.ErrorIs(t, <-gaveUp, context.DeadlineExceeded)
		for range cap(results) {
			require.NoError(t, <-results)
		}
		assert.EqualValues(t, 1, w.dials.Load())
	})
}

// A call that comes while the address that a node has left is being dialled does not take that dial's failure for an
// answer.
func TestPeersSharedDialOfOldAddress(t *testing.T) {
	overPipes(t, func(t *testing.T, c *cluster, w *wire, a, b *node) {
		b.Handle(testKind, echo)
		w.set("b", nil)
		w.set("b2", b)
		w.onDial.Store(func(address string) {
			if address == "b" {
				time.Sleep(time.Second) // in the bubble's time
			}
		})
		results := make(chan error, 2)
		dial := func() {
			_, err := call(t, a, "b", "x")
			results <- err
		}
		go dial()
		synctest.Wait()
		c.book.set("b", "b2")
		go dial()
		require.NoError(t, <-results)
		require.NoError(t, <-results)
		assert.EqualValues(t, 2, w.dials.Load())
	})
}

// Close ends a dial under way.
func TestPeersCloseWhileDialling(t *testing.T) {
	overPipes(t, func(t *testing.T, _ *cluster, w *wire, a, _ *node) {
		w.hole.Store(true)
		result := make(chan error, 1)
		go func() {
			_, err := call(t, a, "b", "x")
			result <- err
		}()
		synctest.Wait()
		began := time.Now()
		require.NoError(t, a.Close())
		require.ErrorIs(t, <-result, trivet.ErrClosed)
		assert.Zero(t, time.Since(began))
	})
}

// A request cancelled before it was written is not sent at all.
func TestPeersCancelBeforeSend(t *testing.T) {
	overPipes(t, func(t *testing.T, _ *cluster, w *wire, a, b *node) {
		var ran atomic.Int64
		b.Handle(testKind, counted(&ran))
		_, err := call(t, a, "b", "x")
		require.NoError(t, err)
		w.delay.Store(int64(100 * time.Millisecond))
		var wg sync.WaitGroup
		wg.Go(func() { // occupies the writer for seconds
			_, err := a.Call(t.Context(), "b", transport.Message{Kind: testKind, Body: make([]byte, 1<<20)})
			assert.NoError(t, err)
		})
		synctest.Wait()
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		_, err = a.Call(ctx, "b", transport.Message{Kind: testKind})
		require.ErrorIs(t, err, context.DeadlineExceeded)
		wg.Wait()
		assert.EqualValues(t, 2, ran.Load())
		assert.Zero(t, a.Stats().Cancels, "no need for a cancel frame")
	})
}
