package server

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"time"

	"google.golang.org/grpc/credentials"

	"github.com/trivet-csi/trivet/replication/transport"
)

// handshakeTimeout bounds how long a client may take over its TLS handshake (slow-loris, S14).
const handshakeTimeout = 10 * time.Second

// handshakesMax bounds the handshakes under way; more connections wait in the kernel's queue.
const handshakesMax = 256

// alpnGRPC is the protocol name of HTTP/2, and so of gRPC (RFC 7301, RFC 9113).
const alpnGRPC = "h2"

// port is the one TCP port of a server. It shakes hands and hands each connection to whom its ALPN
// names: the traffic between nodes, or the administration API. A client that names neither, or
// has no certificate of this cluster, is refused before a byte of payload is read.
type port struct {
	listener net.Listener
	config   *tls.Config
	peerALPN string
	peer     func(*tls.Conn) // serves the connection and closes it
	admin    *connListener
	log      *slog.Logger

	wg sync.WaitGroup

	mu    sync.Mutex
	conns map[net.Conn]struct{} // in their handshake; closed by close
	ended bool
}

// serve accepts until close.
func (p *port) serve() {
	slots := make(chan struct{}, handshakesMax)
	for {
		conn, err := p.listener.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil { // out of descriptors, or a connection that was gone before it was accepted
			p.log.Warn("accept failed", "err", err)
			time.Sleep(50 * time.Millisecond)
			continue
		}
		if !p.track(conn) {
			conn.Close()
			return
		}
		slots <- struct{}{}
		go func() {
			defer p.wg.Done()
			p.dispatch(conn, func() { <-slots })
		}()
	}
}

// track remembers a connection for close, which waits for its goroutine; it reports false once close
// has begun.
func (p *port) track(conn net.Conn) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.ended {
		return false
	}
	p.conns[conn] = struct{}{}
	p.wg.Add(1) // under mu, so never after close waits
	return true
}

func (p *port) untrack(conn net.Conn) {
	p.mu.Lock()
	delete(p.conns, conn)
	p.mu.Unlock()
}

// dispatch shakes hands, calls shaken and hands the connection on.
func (p *port) dispatch(raw net.Conn, shaken func()) {
	conn := tls.Server(transport.Wrap(raw), p.config)
	ctx, cancel := context.WithTimeout(context.Background(), handshakeTimeout)
	err := conn.HandshakeContext(ctx)
	cancel()
	shaken()
	if err != nil {
		p.untrack(raw)
		p.log.Warn("refused a connection", "remote", raw.RemoteAddr().String(), "err", err)
		conn.Close()
		return
	}
	switch conn.ConnectionState().NegotiatedProtocol {
	case p.peerALPN:
		p.peer(conn)
		p.untrack(raw)
	case alpnGRPC:
		p.untrack(raw)
		p.admin.deliver(conn)
	default: // ALPN with no common protocol fails in the handshake; this one offered none
		p.untrack(raw)
		p.log.Warn("refused a connection without ALPN", "remote", raw.RemoteAddr().String())
		conn.Close()
	}
}

// close stops accepting, ends the connections between nodes and waits for them.
func (p *port) close() {
	p.listener.Close()
	p.admin.Close() //nolint:errcheck // returns nil
	p.mu.Lock()
	p.ended = true
	for conn := range p.conns {
		conn.Close()
	}
	p.mu.Unlock()
	p.wg.Wait()
}

// connListener is the net.Listener that gRPC accepts from: connections that have shaken hands.
type connListener struct {
	addr  net.Addr
	conns chan net.Conn
	done  chan struct{}
	once  sync.Once
}

func newConnListener(addr net.Addr) *connListener {
	return &connListener{addr: addr, conns: make(chan net.Conn), done: make(chan struct{})}
}

func (l *connListener) deliver(c net.Conn) {
	select {
	case l.conns <- c:
	case <-l.done:
		c.Close()
	}
}

// Accept implements net.Listener.
func (l *connListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.done:
		return nil, net.ErrClosed
	}
}

// Close implements net.Listener.
func (l *connListener) Close() error {
	l.once.Do(func() { close(l.done) })
	return nil
}

// Addr implements net.Listener.
func (l *connListener) Addr() net.Addr { return l.addr }

// shaken is the gRPC credential of a connection whose TLS handshake port has already done.
type shaken struct {
	credentials.TransportCredentials
}

// ServerHandshake implements credentials.TransportCredentials.
func (shaken) ServerHandshake(conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	tlsConn, ok := conn.(*tls.Conn)
	if !ok {
		return nil, nil, fmt.Errorf("connection of type %T did not come through the server's port", conn)
	}
	return conn, credentials.TLSInfo{
		State:          tlsConn.ConnectionState(),
		CommonAuthInfo: credentials.CommonAuthInfo{SecurityLevel: credentials.PrivacyAndIntegrity},
	}, nil
}

// Clone implements credentials.TransportCredentials.
func (s shaken) Clone() credentials.TransportCredentials { return s }

// Info implements credentials.TransportCredentials.
func (shaken) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "tls"}
}
