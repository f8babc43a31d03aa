package transport

import (
	"context"
	"crypto/tls"
	"fmt"
	"math/rand/v2"
	"time"

	"github.com/trivet-csi/trivet"
)

// route is how we reach a node. Its fields are under Peers.mu.
type route struct {
	conn    *client // live, or nil
	attempt *attempt

	// The last failure, for as long as no new dial may be made.
	err     error
	address string // what failed; another one may be tried at once
	retryAt time.Time
	backoff time.Duration // the next
}

// attempt is one dial that calls wait for.
type attempt struct {
	address string
	done    chan struct{} // closed at the end
	conn    *client       // the result, nil when err is not
	err     error
}

// clientTo returns a live connection to a node, dialled if need be. While a failed dial is less than
// its backoff ago it returns that failure at once, unless free says to pass over the backoff.
func (p *Peers) clientTo(ctx context.Context, node trivet.NodeID, free bool) (*client, error) {
	for {
		c, a, err := p.dialling(node, free)
		if a == nil {
			return c, err
		}
		select {
		case <-a.done:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
		// Who came while the node's old address was being dialled has learned nothing of the new one.
		if a.err == nil || p.cfg.Book.Address(node) == a.address {
			return a.conn, a.err
		}
	}
}

// dialling returns a live connection to a node, or the dial under way, which it begins if need be, or why there is
// neither.
func (p *Peers) dialling(node trivet.NodeID, free bool) (*client, *attempt, error) {
	address := p.cfg.Book.Address(node) // not under the lock: it is not ours
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return nil, nil, p.errClosed()
	}
	r := p.routes[node]
	if r != nil && r.conn != nil {
		if c := r.conn; c.ctx.Err() == nil {
			return c, nil, nil
		}
		p.lostLocked(r, r.conn)
	}
	if address == "" {
		return nil, nil, fmt.Errorf("address of node %s is unknown: %w", node, trivet.ErrUnavailable)
	}
	if r == nil {
		r = &route{}
		p.routes[node] = r
	}
	if r.attempt == nil {
		if !free && r.err != nil && r.address == address && time.Now().Before(r.retryAt) {
			return nil, nil, r.err
		}
		a := &attempt{address: address, done: make(chan struct{})}
		r.attempt = a
		p.wg.Go(func() { p.connect(node, r, a) })
	}
	return nil, r.attempt, nil
}

// connect makes one attempt and, when it succeeds, serves the connection to its end.
func (p *Peers) connect(node trivet.NodeID, r *route, a *attempt) {
	address := a.address
	p.stats.dials.Add(1)
	p.live.dialling(node, address)
	begun := time.Now()
	c, err := p.dial(node, address)
	if err != nil {
		p.stats.dialFailures.Add(1)
		p.judgeDial(node, address, begun, err)
		a.err = fmt.Errorf("dial %s at %s: %w: %w", node, address, err, trivet.ErrUnavailable)
		if p.lifetime.Err() != nil {
			a.err = p.errClosed()
		}
	}
	a.conn = c
	p.mu.Lock()
	r.attempt = nil
	r.conn = c
	if p.closed && c != nil {
		c.fail(p.errClosed()) // Close did not see it
	}
	if a.err != nil {
		p.failedLocked(r, address, a.err)
	}
	p.mu.Unlock()
	close(a.done)
	if c == nil {
		p.log.Debug("dial failed", "peer", node, "address", address, "err", a.err)
		return
	}
	p.log.Info("connected to peer", "peer", node, "address", address)
	c.run()
	p.log.Info("disconnected from peer", "peer", node, "address", address, "err", c.cause())
	p.mu.Lock()
	defer p.mu.Unlock()
	p.lostLocked(r, c)
}

// lostLocked forgets a connection that ended, if r still has it. One that ended at once counts as a
// failed dial: a far end that accepts only to hang up must not be dialled in a tight loop.
func (p *Peers) lostLocked(r *route, c *client) {
	if r.conn != c {
		return
	}
	r.conn, r.err = nil, nil
	if time.Since(c.began) < p.limits.BackoffMax {
		p.failedLocked(r, c.address, c.cause())
	} else {
		r.backoff = 0
	}
}

// failedLocked records a failure and doubles the backoff, with jitter so that nodes spread out.
func (p *Peers) failedLocked(r *route, address string, err error) {
	if r.backoff == 0 || r.address != address {
		r.backoff = p.limits.BackoffMin
	}
	r.err, r.address = err, address
	wait := r.backoff/2 + rand.N(r.backoff/2+1)
	r.retryAt = time.Now().Add(wait)
	r.backoff = min(2*r.backoff, p.limits.BackoffMax)
}

// dial opens a connection and makes sure who is at the far end.
func (p *Peers) dial(node trivet.NodeID, address string) (*client, error) {
	ctx, cancel := context.WithTimeout(p.lifetime, p.limits.DialTimeout)
	defer cancel()
	cfg, err := p.cfg.ClientTLS(node)
	if err != nil {
		return nil, err
	}
	cfg = cfg.Clone()
	cfg.NextProtos = []string{ALPN}
	raw, err := p.cfg.Dial(ctx, address)
	if err != nil {
		return nil, err
	}
	tuneSocket(raw)
	conn := tls.Client(newWire(raw), cfg)
	far, err := p.greetServer(ctx, conn, node)
	if err != nil {
		_ = raw.Close()
		return nil, err
	}
	c := &client{stream: newStream(p, node, conn), address: address, pending: map[uint64]chan frame{}}
	p.present(c.stream, far.incarnation, true)
	c.start()
	return c, nil
}

// greetServer makes the handshake and exchanges prefaces. Only with the far end's preface is it
// certain that it took our certificate: in TLS 1.3 our side of the handshake ends before that.
func (p *Peers) greetServer(ctx context.Context, conn *tls.Conn, node trivet.NodeID) (preface, error) {
	if err := conn.HandshakeContext(ctx); err != nil {
		return preface{}, err
	}
	got, err := p.identify(conn)
	if err == nil && got != node {
		err = fmt.Errorf("far end is node %s, want %s: %w", got, node, trivet.ErrInvalid)
	}
	if err != nil {
		p.stats.refused.Add(1)
		return preface{}, err
	}
	stop := context.AfterFunc(ctx, func() { _ = conn.NetConn().Close() })
	defer stop()
	if _, err := conn.Write(p.preface()); err != nil {
		return preface{}, fmt.Errorf("write preface: %w", err)
	}
	far, err := readPreface(conn)
	if err != nil {
		return preface{}, err
	}
	if !stop() {
		return preface{}, ctx.Err()
	}
	return far, nil
}
