package transport

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"slices"
	"sync"
	"time"

	"github.com/trivet-csi/trivet"
)

// Peers is the Network between machines. For each node called it keeps one connection, dialled when
// needed; the replies come back on it. Connections of other nodes are accepted by the server, which
// owns the listener, and handed to ServeConn.
//
//	caller ─ Call ─ queue ─ writer ═══ TLS ═══ reader ─ handler, one goroutine each
//	   └──────────── reader ═══ TLS ═══ writer ─ queue ─┘
//
// Small Raft messages overtake bulk in the queues and have handlers reserved; they wait for the frame
// that is being written, and a larger message goes in frames of 64 KiB. Bulk takes turns by group
// (flow). The writer is whoever has queued something, when nobody else is and as long as the kernel takes it at once,
// else a goroutine of the connection (stream.writeNow): to hand a small message over costs more than to write it.
// Several TLS records go in one system call, either way (wire). A connection over which nothing moves for
// Limits.DeadAfter, pings included, is ended; its calls fail at once, and the node is dialled again. A malformed frame
// ends its connection, no other.
//
// Peers is a Watcher: what its connections show of the other nodes' processes is judged by liveness.
//
// Peers is safe for concurrent use. Close ends and joins everything.
type Peers struct {
	cfg         Config
	limits      Limits // with defaults
	log         *slog.Logger
	incarnation uint64
	began       time.Time
	pool        bufferPool
	stats       counters
	board       board
	live        *liveness
	judging     sync.Once // starts judge

	lifetime context.Context // ends with Close
	cancel   context.CancelCauseFunc
	wg       sync.WaitGroup // dials, connections, local calls; Add under mu while open, or within a member

	mu       sync.Mutex
	closed   bool
	handlers map[Kind]Handler
	routes   map[trivet.NodeID]*route
	accepted map[trivet.NodeID][]*stream // oldest first
}

var _ Network = (*Peers)(nil)

// NewPeers returns a network without connections. It returns ErrInvalid when cfg cannot work.
func NewPeers(cfg Config) (*Peers, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	p := &Peers{
		cfg: cfg, limits: cfg.Limits.withDefaults(), log: cfg.Logger,
		incarnation: rand.Uint64() | 1, // 0 stands for none
		began:       time.Now(),
		handlers:    map[Kind]Handler{},
		routes:      map[trivet.NodeID]*route{},
		accepted:    map[trivet.NodeID][]*stream{},
	}
	if p.log == nil {
		p.log = slog.New(slog.DiscardHandler)
	}
	if p.cfg.Dial == nil {
		p.cfg.Dial = func(ctx context.Context, address string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "tcp", address)
		}
	}
	p.live = newLiveness(&p.board, p.limits.SilentAfter)
	p.lifetime, p.cancel = context.WithCancelCause(context.Background())
	return p, nil
}

// untilPing returns how long it is to the next ping. Those of all connections fall together: an idle process, and the
// idle ones at the far ends, wake up once for all of them.
func (p *Peers) untilPing() time.Duration {
	return p.limits.PingEvery - time.Since(p.began)%p.limits.PingEvery
}

// Local returns the own node.
func (p *Peers) Local() trivet.NodeID { return p.cfg.Local }

// Handle registers the handler of a kind; see Network.
func (p *Peers) Handle(kind Kind, h Handler) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.handlers[kind] != nil {
		panic(fmt.Sprintf("transport: node %s: kind %d has a handler already", p.cfg.Local, kind))
	}
	p.handlers[kind] = h
}

func (p *Peers) handler(kind Kind) Handler {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.handlers[kind]
}

// Call sends m to a node and waits for the reply; see Network. ErrInvalid means that m is too large,
// ErrClosed that Close was called, before or meanwhile.
func (p *Peers) Call(ctx context.Context, to trivet.NodeID, m Message) (Message, error) {
	reply, err := p.call(ctx, to, m)
	if err != nil {
		return Message{}, fmt.Errorf("call %s, kind %d: %w", to, m.Kind, err)
	}
	return reply, nil
}

func (p *Peers) call(ctx context.Context, to trivet.NodeID, m Message) (Message, error) {
	if err := ctx.Err(); err != nil {
		return Message{}, err
	}
	if err := checkMessage(m); err != nil {
		return Message{}, err
	}
	if to == p.cfg.Local {
		return p.callSelf(ctx, m)
	}
	c, err := p.clientTo(ctx, to, false)
	if err != nil {
		return Message{}, err
	}
	return c.call(ctx, m)
}

func (p *Peers) callSelf(ctx context.Context, m Message) (Message, error) {
	if !p.enter() {
		return Message{}, p.errClosed()
	}
	defer p.wg.Done()
	h := p.handler(m.Kind)
	if h == nil {
		return Message{}, fmt.Errorf("node %s has no handler for kind %d: %w", p.cfg.Local, m.Kind, trivet.ErrUnavailable)
	}
	return callLocal(ctx, p.lifetime, h, p.cfg.Local, m)
}

// enter makes Close wait for the caller, which calls p.wg.Done, and reports whether p is open.
func (p *Peers) enter() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.closed {
		p.wg.Add(1)
	}
	return !p.closed
}

func (p *Peers) errClosed() error {
	return fmt.Errorf("transport of node %s: %w", p.cfg.Local, trivet.ErrClosed)
}

// ServeConn serves a connection that another node opened, until it ended and the handlers of its
// requests returned. REQUIRES: the handshake is complete, with client certificate, and negotiated
// ALPN; above a connection of Wrap it is faster. ServeConn owns conn and closes it. It returns nil when the far end or
// Close ended it, else
// what was wrong: ErrInvalid when the far end is no node that may connect.
func (p *Peers) ServeConn(conn *tls.Conn) error {
	defer func() { _ = conn.NetConn().Close() }()
	if !p.enter() {
		return p.errClosed()
	}
	defer p.wg.Done()
	node, err := p.identify(conn)
	if err != nil {
		p.stats.refused.Add(1)
		return fmt.Errorf("serve connection from %s: %w", conn.RemoteAddr(), err)
	}
	s := &server{stream: newStream(p, node, conn), requests: map[uint64]*request{}}
	defer s.cancel(nil)
	if !p.addAccepted(s.stream) {
		return p.errClosed()
	}
	defer p.removeAccepted(s.stream)
	tuneSocket(conn.NetConn())
	far, err := p.greetClient(conn)
	if err != nil {
		p.stats.refused.Add(1)
		return fmt.Errorf("serve connection of %s: %w", node, err)
	}
	p.stats.accepted.Add(1)
	p.present(s.stream, far.incarnation, false)
	s.start()
	p.log.Info("peer connected", "peer", node, "address", conn.RemoteAddr())
	s.run()
	p.log.Info("peer disconnected", "peer", node, "err", s.cause())
	if errors.Is(s.cause(), errHungUp) || errors.Is(s.cause(), trivet.ErrClosed) {
		return nil
	}
	return fmt.Errorf("serve connection of %s: %w", node, s.cause())
}

// identify returns the node at the far end of a connection.
func (p *Peers) identify(conn *tls.Conn) (trivet.NodeID, error) {
	state := conn.ConnectionState()
	if !state.HandshakeComplete || state.Version != tls.VersionTLS13 || state.NegotiatedProtocol != ALPN {
		return "", fmt.Errorf("connection speaks %s and protocol %q, handshake complete: %t, want TLS 1.3 and %q: %w",
			tls.VersionName(state.Version), state.NegotiatedProtocol, state.HandshakeComplete, ALPN, trivet.ErrInvalid)
	}
	node, err := p.cfg.PeerNode(state)
	if err != nil {
		return "", fmt.Errorf("far end refused: %w", err)
	}
	if node == p.cfg.Local {
		return "", fmt.Errorf("far end has our own certificate, of node %s: %w", node, trivet.ErrInvalid)
	}
	return node, nil
}

// greetClient exchanges prefaces on an accepted connection.
func (p *Peers) greetClient(conn *tls.Conn) (preface, error) {
	if err := conn.SetDeadline(time.Now().Add(p.limits.DialTimeout)); err != nil {
		return preface{}, err
	}
	far, err := readPreface(conn)
	if err != nil {
		return preface{}, err
	}
	if _, err := conn.Write(p.preface()); err != nil {
		return preface{}, fmt.Errorf("write preface: %w", err)
	}
	return far, conn.SetDeadline(time.Time{})
}

func (p *Peers) preface() []byte {
	return encodePreface(preface{oldest: versionOldest, newest: versionNewest, incarnation: p.incarnation})
}

// addAccepted registers an accepted connection and ends the oldest of the same node beyond the
// limit: a node that lost its connections without our notice must not be locked out.
func (p *Peers) addAccepted(s *stream) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return false
	}
	conns := append(p.accepted[s.node], s) //nolint:gocritic // put back under the same key below
	if len(conns) > acceptedPerNodeMax {
		conns[0].fail(fmt.Errorf("connection with %s: displaced by a newer one: %w", s.node, trivet.ErrUnavailable))
		conns = slices.Delete(conns, 0, 1)
	}
	p.accepted[s.node] = conns
	return true
}

func (p *Peers) removeAccepted(s *stream) {
	p.mu.Lock()
	defer p.mu.Unlock()
	conns := slices.DeleteFunc(p.accepted[s.node], func(x *stream) bool { return x == s })
	if len(conns) == 0 {
		delete(p.accepted, s.node)
		return
	}
	p.accepted[s.node] = conns
}

// Disconnect ends all connections with a node, as when it was removed from the cluster. It does not
// keep the node from connecting again: Config.PeerNode does. The node's presence is Unknown until then.
func (p *Peers) Disconnect(node trivet.NodeID) {
	p.live.forget(node, "disconnected by us")
	cause := fmt.Errorf("connection with %s: ended by us: %w", node, trivet.ErrUnavailable)
	p.mu.Lock()
	defer p.mu.Unlock()
	p.endLocked(node, cause)
}

func (p *Peers) endLocked(node trivet.NodeID, cause error) {
	for _, s := range p.accepted[node] {
		s.fail(cause)
	}
	if r := p.routes[node]; r != nil && r.conn != nil {
		r.conn.fail(cause)
	}
}

// Close ends all connections; outstanding calls fail with ErrClosed and the contexts of handlers
// end. It returns when all handlers returned and all goroutines ended, so it must not be called from
// a handler. It is idempotent.
func (p *Peers) Close() error {
	p.mu.Lock()
	p.closed = true
	p.cancel(p.errClosed())
	for node := range p.accepted {
		p.endLocked(node, p.errClosed())
	}
	for node := range p.routes {
		p.endLocked(node, p.errClosed())
	}
	p.mu.Unlock()
	p.wg.Wait()
	p.board.close()
	return nil
}
