package transport_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/internal/pki"
	"github.com/trivet-csi/trivet/replication/transport"
)

const testCluster trivet.ClusterID = "0a0a0a0a-0000-4000-8000-00000000000a"

// book is an AddressBook that tests change.
type book struct {
	mu        sync.Mutex
	addresses map[trivet.NodeID]string
}

func (b *book) Address(node trivet.NodeID) string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.addresses[node]
}

func (b *book) set(node trivet.NodeID, address string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.addresses[node] = address
}

// cluster is what the nodes of a test share.
type cluster struct {
	ca     *pki.CA
	dir    string
	host   string // an address of this machine that hardly anybody else uses: a port that is left there refuses
	book   *book
	limits transport.Limits
	dial   func(ctx context.Context, address string) (net.Conn, error)
	plain  bool // the servers do not wrap what they accept
}

func newCluster(t *testing.T) *cluster {
	t.Helper()
	ca, err := pki.NewCA(testCluster, pki.For(pki.CAValidity))
	require.NoError(t, err)
	return &cluster{
		ca: ca, dir: t.TempDir(), host: fmt.Sprintf("127.%d.%d.%d", 1+rand.IntN(254), rand.IntN(256), 1+rand.IntN(254)),
		book: &book{addresses: map[trivet.NodeID]string{}},
		// Real time passes in these tests, on machines that may stand still for seconds.
		limits: transport.Limits{DialTimeout: time.Minute, DeadAfter: time.Minute},
	}
}

// withoutPings lets nodes send no pings while a test lasts: some would come between the frames that it reads by hand.
func (c *cluster) withoutPings() { c.limits.SilentAfter, c.limits.DeadAfter = time.Hour, time.Hour }

// credentials returns new credentials of a name and role.
func (c *cluster) credentials(t *testing.T, role pki.Role, name string, v pki.Validity) *pki.Credentials {
	t.Helper()
	dir := filepath.Join(c.dir, trivet.NewUUID())
	pair, err := c.ca.Issue(pki.Identity{Cluster: testCluster, Role: role, Name: name}, v)
	require.NoError(t, err)
	require.NoError(t, pki.Write(dir, c.ca.CertPEM(), pair))
	creds, err := pki.Open(dir, role, nil)
	require.NoError(t, err)
	return creds
}

// peersOf returns the network of a node, without a listener.
func (c *cluster) peersOf(t *testing.T, name trivet.NodeID, creds *pki.Credentials) *transport.Peers {
	t.Helper()
	p, err := transport.NewPeers(transport.Config{
		Local: name,
		ClientTLS: func(node trivet.NodeID) (*tls.Config, error) {
			return creds.ClientConfig(node), nil
		},
		PeerNode: creds.PeerNode,
		Book:     c.book,
		Dial:     c.dial,
		Limits:   c.limits,
	})
	require.NoError(t, err)
	return p
}

// node is a Peers with a listener, as a server would run it.
type node struct {
	*transport.Peers
	creds    *pki.Credentials
	listener net.Listener
	wg       sync.WaitGroup
	served   chan error // what ServeConn or the handshake returned
	plain    bool
}

// start runs a node on a free port and enters it in the book.
func (c *cluster) start(t *testing.T, name trivet.NodeID) *node {
	t.Helper()
	creds := c.credentials(t, pki.RoleNode, string(name), pki.For(time.Hour))
	n := &node{Peers: c.peersOf(t, name, creds), creds: creds, served: make(chan error, 1000), plain: c.plain}
	l, err := net.Listen("tcp", net.JoinHostPort(c.host, "0"))
	require.NoError(t, err)
	n.listener = l
	c.book.set(name, l.Addr().String())
	n.wg.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			n.wg.Go(func() { n.served <- n.serve(t.Context(), conn) })
		}
	})
	t.Cleanup(n.stop)
	return n
}

// serve is what a server does with an accepted connection.
func (n *node) serve(ctx context.Context, conn net.Conn) error {
	cfg := n.creds.ServerConfig(pki.Protocols{
		transport.ALPN: {pki.RoleNode},
		"admin":        {pki.RoleNode, pki.RoleClient},
	})
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	if !n.plain {
		conn = transport.Wrap(conn)
	}
	s := tls.Server(conn, cfg)
	if err := s.HandshakeContext(ctx); err != nil {
		_ = conn.Close()
		return err
	}
	return n.ServeConn(s)
}

// stop is the end of the node; it may be called twice.
func (n *node) stop() {
	_ = n.listener.Close()
	_ = n.Close()
	n.wg.Wait()
}

// rawConn returns a handshaken connection to n that a test speaks on by hand.
func (c *cluster) rawConn(t *testing.T, n *node, creds *pki.Credentials, proto string) *tls.Conn {
	t.Helper()
	raw, err := net.Dial("tcp", n.listener.Addr().String())
	require.NoError(t, err)
	conn := tls.Client(raw, creds.ClientConfig(n.Local(), proto))
	t.Cleanup(func() { _ = conn.Close() })
	require.NoError(t, conn.HandshakeContext(t.Context()))
	return conn
}

func TestPeersCall(t *testing.T) {
	c := newCluster(t)
	a, b := c.start(t, "a"), c.start(t, "b")
	var from trivet.NodeID
	var got transport.Message
	b.Handle(testKind, func(_ context.Context, f trivet.NodeID, m transport.Message) (transport.Message, error) {
		from, got = f, m
		return transport.Message{Kind: 99, Group: 99, From: m.To, To: m.From, Body: append(m.Body, '!')}, nil
	})
	m := transport.Message{Kind: testKind, Group: 7, From: "r1", To: "r2", Body: []byte("hello")}
	reply, err := a.Call(t.Context(), "b", m)
	require.NoError(t, err)
	assert.Equal(t, transport.Message{Kind: testKind, Group: 7, From: "r2", To: "r1", Body: []byte("hello!")}, reply)
	assert.Equal(t, m, got)
	assert.EqualValues(t, "a", from)
	assert.Equal(t, 1, a.Stats().ConnsOutN)
	assert.Equal(t, 1, b.Stats().ConnsInN)
	assert.Zero(t, a.Stats().ConnsInN, "the reply came back on the request's connection")

	_, err = a.Call(t.Context(), "b", transport.Message{Kind: transport.KindMetaRead})
	require.ErrorIs(t, err, trivet.ErrUnavailable, "no handler")
	_, err = a.Call(t.Context(), "nobody", m)
	require.ErrorIs(t, err, trivet.ErrUnavailable, "not in the book")
	c.book.set("ghost", "127.0.0.1:1")
	_, err = a.Call(t.Context(), "ghost", m)
	require.ErrorIs(t, err, trivet.ErrUnavailable, "nobody listens")
	require.Panics(t, func() { b.Handle(testKind, echo) })
}

func TestPeersConfig(t *testing.T) {
	_, err := transport.NewPeers(transport.Config{Limits: transport.Limits{
		HandlersMax: -1, HandlerBytesMax: 1, QueueBytesMax: -1, DeadAfter: 1, BackoffMin: 2, BackoffMax: 1,
	}})
	require.ErrorIs(t, err, trivet.ErrInvalid)
	for _, field := range []string{
		"Local", "ClientTLS", "PeerNode", "Book",
		"HandlersMax", "HandlerBytesMax", "QueueBytesMax", "DeadAfter", "BackoffMax",
	} {
		assert.ErrorContains(t, err, field)
	}
}

func TestPeersLocal(t *testing.T) {
	c := newCluster(t)
	a := c.start(t, "a")
	var kept []byte
	a.Handle(testKind, func(ctx context.Context, from trivet.NodeID, m transport.Message) (transport.Message, error) {
		kept = m.Body
		assert.EqualValues(t, "a", from)
		return echo(ctx, from, m)
	})
	sent := []byte("hello")
	reply, err := a.Call(t.Context(), "a", transport.Message{Kind: testKind, Group: 4, Body: sent})
	require.NoError(t, err)
	assert.Equal(t, transport.Message{Kind: testKind, Group: 4, Body: []byte("hello")}, reply)
	sent[0] = 'x'
	assert.Equal(t, "hello", string(kept), "the handler owns what it received")
	_, err = a.Call(t.Context(), "a", transport.Message{Kind: transport.KindMetaRead})
	require.ErrorIs(t, err, trivet.ErrUnavailable)
	assert.Zero(t, a.Stats().Dials)
}

// Many calls of all sizes at once, both ways over two connections, each get their own reply.
func TestPeersConcurrency(t *testing.T) {
	c := newCluster(t)
	a, b := c.start(t, "a"), c.start(t, "b")
	for _, n := range []*node{a, b} {
		n.Handle(testKind, echo)
		n.Handle(transport.KindAppendEntries, echo)
	}
	var wg sync.WaitGroup
	for i := range 64 {
		from, to := a, b
		if i%2 == 1 {
			from, to = b, a
		}
		wg.Go(func() {
			for j := range 20 {
				body := bytes.Repeat([]byte{byte(i), byte(j)}, 1<<(j%17))
				want := bytes.Clone(body)
				kind := testKind
				if j%3 == 0 {
					kind = transport.KindAppendEntries
				}
				reply, err := from.Call(t.Context(), to.Local(), transport.Message{Kind: kind, Group: 1, Body: body})
				clear(body) // ours again
				if !assert.NoError(t, err) || !assert.Equal(t, want, reply.Body) {
					return
				}
			}
		})
	}
	wg.Wait()
	largest := bytes.Repeat([]byte{7}, transport.MessageBytesMax-transport.FrameHeaderBytes)
	reply, err := a.Call(t.Context(), "b", transport.Message{Kind: testKind, Body: largest})
	require.NoError(t, err)
	assert.True(t, bytes.Equal(largest, reply.Body))
	assert.EqualValues(t, 1, a.Stats().Dials)
	assert.EqualValues(t, 1, b.Stats().Dials)
}

func TestPeersErrorsCross(t *testing.T) {
	c := newCluster(t)
	a, b := c.start(t, "a"), c.start(t, "b")
	sentinels := []error{
		trivet.ErrNotFound, trivet.ErrExists, trivet.ErrInUse, trivet.ErrFenced, trivet.ErrNotLeader,
		trivet.ErrUnavailable, trivet.ErrPending, trivet.ErrNoSpace, trivet.ErrOutOfRange, trivet.ErrCorrupt,
		trivet.ErrClosed, trivet.ErrInvalid, context.DeadlineExceeded, context.Canceled, errors.New("anything else"),
	}
	b.Handle(testKind, func(_ context.Context, _ trivet.NodeID, m transport.Message) (transport.Message, error) {
		return transport.Message{}, fmt.Errorf("handle: %w", sentinels[m.Body[0]])
	})
	for i, want := range sentinels {
		_, err := a.Call(t.Context(), "b", transport.Message{Kind: testKind, Body: []byte{byte(i)}})
		require.ErrorContains(t, err, "call b, kind 16: node b: handle: "+want.Error())
		for j, other := range sentinels[:len(sentinels)-1] {
			assert.Equal(t, i == j, errors.Is(err, other), "%v is %v", want, other)
		}
	}
	assert.Equal(t, 1, a.Stats().ConnsOutN, "errors do not cost the connection")
}

func TestPeersCancel(t *testing.T) {
	c := newCluster(t)
	a, b := c.start(t, "a"), c.start(t, "b")
	started, ended := make(chan struct{}), make(chan error)
	b.Handle(testKind, func(ctx context.Context, _ trivet.NodeID, _ transport.Message) (transport.Message, error) {
		started <- struct{}{}
		<-ctx.Done()
		ended <- ctx.Err()
		return transport.Message{}, ctx.Err()
	})
	b.Handle(transport.KindVolumeRead, echo)
	ctx, cancel := context.WithCancel(t.Context())
	result := make(chan error, 1)
	go func() {
		_, err := a.Call(ctx, "b", transport.Message{Kind: testKind})
		result <- err
	}()
	<-started
	cancel()
	require.ErrorIs(t, <-result, context.Canceled)
	require.ErrorIs(t, <-ended, context.Canceled, "the handler learns of it")
	_, err := a.Call(t.Context(), "b", transport.Message{Kind: transport.KindVolumeRead})
	require.NoError(t, err)
	assert.EqualValues(t, 1, a.Stats().Dials, "a cancelled call does not cost the connection")
	assert.EqualValues(t, 1, a.Stats().Cancels)
}

// When a peer dies, outstanding calls fail at once; when it is back, calls work again.
func TestPeersKill(t *testing.T) {
	c := newCluster(t)
	a, b := c.start(t, "a"), c.start(t, "b")
	started := make(chan struct{})
	block := func(ctx context.Context, _ trivet.NodeID, _ transport.Message) (transport.Message, error) {
		started <- struct{}{}
		<-ctx.Done()
		return transport.Message{}, ctx.Err()
	}
	b.Handle(testKind, block)
	const n = 20
	results := make(chan error, n)
	for range n {
		go func() {
			_, err := a.Call(t.Context(), "b", transport.Message{Kind: testKind})
			results <- err
		}()
	}
	for range n {
		<-started
	}
	b.stop()
	for range n {
		err := <-results
		require.ErrorIs(t, err, trivet.ErrUnavailable)
		require.NotErrorIs(t, err, trivet.ErrClosed, "that is b's business")
	}
	_, err := a.Call(t.Context(), "b", transport.Message{Kind: testKind})
	require.ErrorIs(t, err, trivet.ErrUnavailable)

	again := c.start(t, "b") // at another address
	again.Handle(testKind, echo)
	_, err = a.Call(t.Context(), "b", transport.Message{Kind: testKind})
	require.NoError(t, err)
}

// H37: an address that answers with another node's certificate is not the node that was called.
func TestPeersWrongNode(t *testing.T) {
	c := newCluster(t)
	a, b := c.start(t, "a"), c.start(t, "b")
	var ran atomic.Int64
	b.Handle(testKind, counted(&ran))
	c.book.set("c", b.listener.Addr().String())
	_, err := a.Call(t.Context(), "c", transport.Message{Kind: testKind})
	require.ErrorIs(t, err, trivet.ErrUnavailable)
	require.ErrorContains(t, err, "server is node b, want c")
	assert.Zero(t, ran.Load())
	require.Error(t, <-b.served)

	// The same when the TLS configuration does not check the name: Peers does so itself.
	lax, err := transport.NewPeers(transport.Config{
		Local:     "a",
		ClientTLS: func(trivet.NodeID) (*tls.Config, error) { return a.creds.ClientConfig(""), nil },
		PeerNode:  a.creds.PeerNode,
		Book:      c.book,
		Limits:    c.limits,
	})
	require.NoError(t, err)
	defer lax.Close()
	_, err = lax.Call(t.Context(), "c", transport.Message{Kind: testKind})
	require.ErrorContains(t, err, "far end is node b, want c")
	assert.Zero(t, ran.Load())
	_, err = lax.Call(t.Context(), "b", transport.Message{Kind: testKind})
	require.NoError(t, err, "control")
}

// Who is no node of the cluster, or claims to be the server itself, is refused.
func TestPeersRefusesRogues(t *testing.T) {
	c := newCluster(t)
	b := c.start(t, "b")
	var ran atomic.Int64
	b.Handle(testKind, counted(&ran))
	hour := pki.For(time.Hour)
	request := append(transport.EncodePreface(), transport.EncodeRequest(1, transport.Message{Kind: testKind})...)
	for _, tt := range []struct {
		name  string
		role  pki.Role
		node  string
		proto string
		want  string
	}{
		{"client", pki.RoleClient, "a", transport.ALPN, "has role client"}, // refused in the handshake
		{"client by another protocol", pki.RoleClient, "a", "admin", `protocol "admin"`},
		{"node by another protocol", pki.RoleNode, "a", "admin", `protocol "admin"`},
		{"our own certificate", pki.RoleNode, "b", transport.ALPN, "our own certificate"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			conn := c.rawConn(t, b, c.credentials(t, tt.role, tt.node, hour), tt.proto)
			_, _ = conn.Write(request) // may fail: the server may have hung up
			_, err := io.ReadAll(conn)
			_ = err // an alert, a reset or EOF
			require.ErrorContains(t, <-b.served, tt.want)
			assert.Zero(t, ran.Load())
		})
	}

	// A client's own Peers gets no further, whatever it calls itself.
	rogue := c.peersOf(t, "a", c.credentials(t, pki.RoleClient, "a", hour))
	defer rogue.Close()
	_, err := rogue.Call(t.Context(), "b", transport.Message{Kind: testKind})
	require.ErrorIs(t, err, trivet.ErrUnavailable)
	require.Error(t, <-b.served)

	// ServeConn itself refuses a client when the server's configuration let it in.
	raw, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer raw.Close()
	done := make(chan error, 1)
	go func() {
		conn, err := raw.Accept()
		if err != nil {
			done <- err
			return
		}
		s := tls.Server(conn, b.creds.ServerConfig(pki.Protocols{transport.ALPN: {pki.RoleClient, pki.RoleNode}}))
		if err := s.HandshakeContext(t.Context()); err != nil {
			done <- err
			return
		}
		done <- b.ServeConn(s)
	}()
	c.book.set("b", raw.Addr().String())
	rogue = c.peersOf(t, "a", c.credentials(t, pki.RoleClient, "a", hour))
	defer rogue.Close()
	_, err = rogue.Call(t.Context(), "b", transport.Message{Kind: testKind})
	require.ErrorIs(t, err, trivet.ErrUnavailable)
	require.ErrorContains(t, <-done, "far end refused: peer")
	assert.Zero(t, ran.Load())
}

// One bad frame ends its connection, and no other.
func TestPeersBadFrames(t *testing.T) {
	c := newCluster(t)
	c.withoutPings()
	a, b := c.start(t, "a"), c.start(t, "b")
	b.Handle(testKind, echo)
	_, err := a.Call(t.Context(), "b", transport.Message{Kind: testKind})
	require.NoError(t, err)
	creds := c.credentials(t, pki.RoleNode, "rogue", pki.For(time.Hour))
	good := transport.EncodeRequest(1, transport.Message{Kind: testKind, Body: []byte("body")})
	flipped := bytes.Clone(good)
	flipped[len(flipped)-1] ^= 1
	huge := bytes.Clone(good)
	binary.BigEndian.PutUint32(huge, 2<<30)
	for _, tt := range []struct {
		name, want string
		send       []byte
	}{
		{"corrupt body", "checksum", append(transport.EncodePreface(), flipped...)},
		{"length of 2 GiB", "frame of 2147483648 bytes", append(transport.EncodePreface(), huge...)},
		{"same request twice", "request 1 sent again", nil},
		{"no preface", "preface begins with", bytes.Repeat([]byte("GET / HTTP/1.1\r\n"), 4)},
	} {
		t.Run(tt.name, func(t *testing.T) {
			conn := c.rawConn(t, b, creds, transport.ALPN)
			if tt.send == nil {
				block := transport.KindVolumeRead
				b.Handle(block, func(ctx context.Context, _ trivet.NodeID, _ transport.Message) (transport.Message, error) {
					<-ctx.Done()
					return transport.Message{}, ctx.Err()
				})
				twice := transport.EncodeRequest(1, transport.Message{Kind: block})
				tt.send = append(transport.EncodePreface(), append(twice, twice...)...)
			}
			_, err := conn.Write(tt.send)
			require.NoError(t, err)
			require.ErrorContains(t, <-b.served, tt.want)
			_, err = io.ReadAll(conn)
			_ = err
			_, err = a.Call(t.Context(), "b", transport.Message{Kind: testKind})
			require.NoError(t, err, "the other connection")
		})
	}
	assert.EqualValues(t, 1, a.Stats().Dials)
	assert.EqualValues(t, 3, b.Stats().BadFrames)

	// Control: the good frame on a connection by hand.
	conn := c.rawConn(t, b, creds, transport.ALPN)
	_, err = conn.Write(append(transport.EncodePreface(), good...))
	require.NoError(t, err)
	answer := make([]byte, transport.PrefaceBytes+len(good))
	_, err = io.ReadFull(conn, answer)
	require.NoError(t, err)
	assert.Equal(t, "body", string(answer[len(answer)-4:]))
}

// An oversized message is refused at its origin, request or reply, and costs no connection.
func TestPeersOversized(t *testing.T) {
	c := newCluster(t)
	a, b := c.start(t, "a"), c.start(t, "b")
	b.Handle(testKind, func(context.Context, trivet.NodeID, transport.Message) (transport.Message, error) {
		return transport.Message{Body: make([]byte, transport.MessageBytesMax)}, nil
	})
	_, err := a.Call(t.Context(), "b", transport.Message{Kind: testKind, Body: make([]byte, transport.MessageBytesMax)})
	require.ErrorIs(t, err, trivet.ErrInvalid)
	assert.Zero(t, a.Stats().Dials)
	_, err = a.Call(t.Context(), "b", transport.Message{Kind: testKind})
	require.ErrorIs(t, err, trivet.ErrInvalid)
	require.ErrorContains(t, err, "node b: message of 8388636 bytes")
	assert.Equal(t, 1, a.Stats().ConnsOutN)
}

// Bulk that fills its slots is told so; votes and heartbeats still get through.
func TestPeersBusy(t *testing.T) {
	c := newCluster(t)
	c.limits.HandlersMax = 2
	a, b := c.start(t, "a"), c.start(t, "b")
	started := make(chan struct{})
	b.Handle(testKind, func(ctx context.Context, _ trivet.NodeID, _ transport.Message) (transport.Message, error) {
		started <- struct{}{}
		<-ctx.Done()
		return transport.Message{}, ctx.Err()
	})
	for _, k := range []transport.Kind{transport.KindAppendEntries, transport.KindRequestVote, transport.KindTimeoutNow} {
		b.Handle(k, echo)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	for range 2 {
		wg.Go(func() { _, _ = a.Call(ctx, "b", transport.Message{Kind: testKind}) })
		<-started
	}
	_, err := a.Call(t.Context(), "b", transport.Message{Kind: testKind})
	require.ErrorIs(t, err, trivet.ErrUnavailable)
	require.ErrorContains(t, err, "busy")
	_, err = a.Call(t.Context(), "b", transport.Message{Kind: transport.KindAppendEntries, Body: make([]byte, 64<<10)})
	require.ErrorContains(t, err, "busy", "data is bulk")
	for _, k := range []transport.Kind{transport.KindAppendEntries, transport.KindRequestVote, transport.KindTimeoutNow} {
		_, err := a.Call(t.Context(), "b", transport.Message{Kind: k, Body: make([]byte, 200)})
		require.NoError(t, err, "kind %d", k)
	}
	assert.EqualValues(t, 2, b.Stats().Busy)
	assert.GreaterOrEqual(t, b.Stats().HandlersN, 2, "an answered one may still count for a moment")
}

// A node that opens connection after connection keeps only the newest few.
func TestPeersDisplacesOldConnections(t *testing.T) {
	c := newCluster(t)
	c.withoutPings()
	b := c.start(t, "b")
	b.Handle(testKind, echo)
	creds := c.credentials(t, pki.RoleNode, "a", pki.For(time.Hour))
	request := append(transport.EncodePreface(), transport.EncodeRequest(1, transport.Message{Kind: testKind})...)
	conns := make([]*tls.Conn, 12)
	for i := range conns {
		conns[i] = c.rawConn(t, b, creds, transport.ALPN)
		_, err := conns[i].Write(request)
		require.NoError(t, err)
		_, err = io.ReadFull(conns[i], make([]byte, len(request)))
		require.NoError(t, err)
	}
	for range len(conns) - 4 {
		require.ErrorContains(t, <-b.served, "displaced by a newer one")
	}
	assert.Equal(t, 4, b.Stats().ConnsInN)
	newest := conns[len(conns)-1]
	_, err := newest.Write(transport.EncodeRequest(2, transport.Message{Kind: testKind}))
	require.NoError(t, err)
	_, err = io.ReadFull(newest, make([]byte, transport.FrameHeaderBytes))
	require.NoError(t, err)
}

// A far end whose kernel resets the connection, because it was closed before all had been read, has ended it as well
// as one that closes it in good order.
func TestPeersFarEndResets(t *testing.T) {
	c := newCluster(t)
	c.withoutPings()
	b := c.start(t, "b")
	b.Handle(testKind, echo)
	conn := c.rawConn(t, b, c.credentials(t, pki.RoleNode, "a", pki.For(time.Hour)), transport.ALPN)
	request := append(transport.EncodePreface(), transport.EncodeRequest(1, transport.Message{Kind: testKind})...)
	_, err := conn.Write(request)
	require.NoError(t, err)
	_, err = io.ReadFull(conn, make([]byte, len(request)))
	require.NoError(t, err)
	raw, ok := conn.NetConn().(*net.TCPConn)
	require.True(t, ok)
	require.NoError(t, raw.SetLinger(0)) // its end is a reset
	require.NoError(t, raw.Close())
	require.NoError(t, <-b.served)
}

func TestPeersClose(t *testing.T) {
	before := goroutines()
	c := newCluster(t)
	a, b := c.start(t, "a"), c.start(t, "b")
	started := make(chan struct{})
	block := func(ctx context.Context, _ trivet.NodeID, _ transport.Message) (transport.Message, error) {
		started <- struct{}{}
		<-ctx.Done()
		return transport.Message{}, ctx.Err()
	}
	a.Handle(testKind, block)
	b.Handle(testKind, block)
	results := make(chan error, 3)
	for _, to := range []trivet.NodeID{"a", "b", "b"} { // one local
		go func() {
			_, err := a.Call(t.Context(), to, transport.Message{Kind: testKind})
			results <- err
		}()
		<-started
	}
	require.NoError(t, a.Close())
	require.NoError(t, a.Close())
	var closedN int
	for range 3 {
		if err := <-results; errors.Is(err, trivet.ErrClosed) {
			closedN++
		} else {
			require.ErrorIs(t, err, context.Canceled, "the local handler's answer")
		}
	}
	assert.Equal(t, 2, closedN)
	for _, to := range []trivet.NodeID{"a", "b"} {
		_, err := a.Call(t.Context(), to, transport.Message{Kind: testKind})
		require.ErrorIs(t, err, trivet.ErrClosed)
	}
	require.NoError(t, <-b.served, "a connection that the far end closed is no error")
	_, err := b.Call(t.Context(), "a", transport.Message{Kind: testKind})
	require.ErrorIs(t, err, trivet.ErrUnavailable)
	require.ErrorIs(t, <-a.served, trivet.ErrClosed, "the listener is still there, the transport is not")
	a.stop()
	b.stop()
	assert.Equal(t, before, goroutines(), "goroutines of this package are left")
}

// goroutines returns the stacks of goroutines that run code of this package.
func goroutines() (stacks []string) {
	buf := make([]byte, 1<<20)
	for g := range strings.SplitSeq(string(buf[:runtime.Stack(buf, true)]), "\n\n") {
		own, _, _ := strings.Cut(g, "created by ")
		if strings.Contains(own, "replication/transport.(") {
			stacks = append(stacks, g)
		}
	}
	return stacks
}

// A call ends with its context though the far end has stopped reading, and its connection's buffers are full: who
// writes on its own goroutine does not block there.
func TestPeersCallerIsNotHeldUp(t *testing.T) {
	c := newCluster(t)
	creds := c.credentials(t, pki.RoleNode, "deaf", pki.For(time.Hour))
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer l.Close()
	c.book.set("deaf", l.Addr().String())
	connected, done, ended := make(chan struct{}), make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		raw, err := l.Accept()
		if !assert.NoError(t, err) {
			return
		}
		defer raw.Close()
		conn := tls.Server(raw, creds.ServerConfig(pki.Protocols{transport.ALPN: {pki.RoleNode}}))
		_, err = conn.Read(make([]byte, transport.PrefaceBytes))
		assert.NoError(t, err)
		_, err = conn.Write(transport.EncodePreface())
		assert.NoError(t, err)
		close(connected)
		<-done
	}()
	caller := c.peersOf(t, "a", c.credentials(t, pki.RoleNode, "a", pki.For(time.Hour)))
	defer func() {
		close(done)
		require.NoError(t, caller.Close())
		<-ended
	}()
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		<-connected // however long that takes
		cancel()
	}()
	_, err = caller.Call(ctx, "deaf", transport.Message{Kind: testKind})
	require.ErrorIs(t, err, context.Canceled)
	for range 40 {
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
		_, err = caller.Call(ctx, "deaf", transport.Message{Kind: testKind, Body: make([]byte, 200<<10)})
		cancel()
		require.ErrorIs(t, err, context.DeadlineExceeded)
	}
	require.Zero(t, caller.Stats().Timeouts, "who waits for the connection until it counts as dead")
}

// A connection that the server did not wrap does as well.
func TestPeersPlainConn(t *testing.T) {
	c := newCluster(t)
	c.plain = true
	a, b := c.start(t, "a"), c.start(t, "b")
	b.Handle(testKind, echo)
	body := bytes.Repeat([]byte("0123456789"), 30<<10)
	reply, err := a.Call(t.Context(), "b", transport.Message{Kind: testKind, Body: body})
	require.NoError(t, err)
	require.True(t, bytes.Equal(body, reply.Body))
}
