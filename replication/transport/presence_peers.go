package transport

import (
	"errors"
	"fmt"
	"syscall"
	"time"

	"github.com/trivet-csi/trivet"
)

var _ Watcher = (*Peers)(nil)

// A probe is the dial that follows the end of a connection, and its repetitions: a process that is
// being killed may still accept a connection and then reset it.
const (
	probeDialsMax = 8                    // about 1.3 s; then silence judges
	probeFreeN    = 4                    // that pass over the backoff
	probeWaitMin  = 5 * time.Millisecond // after the first, then doubling
)

// silenceTicks is how often the silent are looked for in one Limits.SilentAfter.
const silenceTicks = 8

// Watch calls fn for every change of another node's presence; see Watcher.
func (p *Peers) Watch(fn func(Presence)) (cancel func()) { return p.board.Watch(fn) }

// PresenceOf returns what is known of another node's process; see Watcher.
func (p *Peers) PresenceOf(node trivet.NodeID) Presence { return p.board.PresenceOf(node) }

// present enters a connection, of which both prefaces are exchanged, in the judgement of its node.
// REQUIRES: the caller is a member of p.wg.
func (p *Peers) present(s *stream, incarnation uint64, dialled bool) {
	p.judging.Do(func() { p.wg.Go(p.judge) })
	s.incarnation = incarnation
	var suspect bool
	if s.record, suspect = p.live.began(s.node, incarnation, dialled); suspect {
		p.endOther(s.node, func(c *client) bool { return c.incarnation != incarnation },
			"the node came as another process")
		p.startProbe(s.record)
	}
}

// absent ends what present began.
func (p *Peers) absent(s *stream) {
	p.live.ended(s.record, s.incarnation, time.Now())
	p.startProbe(s.record)
}

// endOther ends the connection that we dialled to a node, if it is one that we do not want.
func (p *Peers) endOther(node trivet.NodeID, unwanted func(*client) bool, why string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if r := p.routes[node]; r != nil && r.conn != nil && unwanted(r.conn) {
		r.conn.fail(fmt.Errorf("connection with %s: %s: %w", node, why, trivet.ErrUnavailable))
	}
}

// startProbe dials a node again, to have a connection or to learn that it is Gone.
// REQUIRES: the caller is a member of p.wg.
func (p *Peers) startProbe(r *record) {
	if p.lifetime.Err() == nil {
		p.wg.Go(func() { p.probe(r) })
	}
}

func (p *Peers) probe(r *record) {
	for again := true; again; {
		endedN, free, ok := p.live.wantProbe(r, time.Now(), p.limits.BackoffMax)
		if !ok {
			return
		}
		p.dialAgain(r, free)
		again = p.live.doneProbe(r, endedN) && p.lifetime.Err() == nil
	}
}

// dialAgain dials until there is a connection or the node is not Alive any more. connect hands the
// result to liveness.
func (p *Peers) dialAgain(r *record, free bool) {
	wait := probeWaitMin
	for try := range probeDialsMax {
		_, err := p.clientTo(p.lifetime, r.node, free && try < probeFreeN)
		if err == nil || !p.live.isAlive(r) {
			return
		}
		timer := time.NewTimer(wait)
		select {
		case <-timer.C:
		case <-p.lifetime.Done():
			timer.Stop()
			return
		}
		wait = min(2*wait, p.limits.BackoffMax)
	}
}

// judgeDial hands a failed dial to liveness if it was refused where the node still is.
func (p *Peers) judgeDial(node trivet.NodeID, address string, begun time.Time, err error) {
	if errors.Is(err, syscall.ECONNREFUSED) && p.cfg.Book.Address(node) == address {
		p.live.refused(node, address, begun)
	}
}

// judge looks for silent nodes until p is closed.
func (p *Peers) judge() {
	ticker := time.NewTicker(max(p.limits.SilentAfter/silenceTicks, time.Millisecond))
	defer ticker.Stop()
	for {
		select {
		case <-ticker.C:
		case <-p.lifetime.Done():
			return
		}
		addresses := map[trivet.NodeID]string{}
		for _, node := range p.live.nodes() {
			addresses[node] = p.cfg.Book.Address(node)
		}
		for _, r := range p.live.tick(time.Now(), addresses) {
			p.endOther(r.node, func(c *client) bool { return c.address != addresses[r.node] },
				"the node has another address")
			p.startProbe(r)
		}
	}
}
