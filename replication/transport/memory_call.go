package transport

import (
	"bytes"
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/trivet-csi/trivet"
)

// memoryCall is one Call between two nodes of a Memory: the caller waits in await while one
// delivery, or two when the request is duplicated, carries the request there and the reply back.
type memoryCall struct {
	hub         *Memory
	from        *MemoryNode
	to          trivet.NodeID
	dest        *MemoryNode // who was called to when the call began; nil when it was down
	deliveriesN int
	deliveries  sync.WaitGroup
	results     chan memoryResult // one per delivery, buffered
	cancelled   chan struct{}     // closed when the caller gave up before a reply

	mu     sync.Mutex
	cause  error         // why broken; nil until then
	broken chan struct{} // closed by fail: the connection broke or a node went down
}

// memoryResult is what one delivery brought back. When lost, err says how, and the handler may or
// may not have run; else err is the handler's.
type memoryResult struct {
	reply Message
	err   error
	lost  bool
}

// fate is what chance has in store for one message.
type fate struct {
	lost  bool
	delay time.Duration
}

// begin registers a call and starts its deliveries, each with a copy of the message.
func (h *Memory) begin(from *MemoryNode, to trivet.NodeID, m Message) (*memoryCall, error) {
	c := &memoryCall{
		hub: h, from: from, to: to, deliveriesN: 1,
		results: make(chan memoryResult, 2), broken: make(chan struct{}), cancelled: make(chan struct{}),
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	// Looked up again under the lock: stop must find the call in h.calls, or we must see the stop.
	if h.closed || h.nodes[from.id] != from {
		return nil, fmt.Errorf("node %s is down: %w", from.id, trivet.ErrClosed)
	}
	c.dest = h.nodes[to]
	l := h.linkLocked(from.id, to)
	if f := h.faultsLocked(l); f.Duplicate > 0 && l.rng.Float64() < f.Duplicate {
		c.deliveriesN = 2
	}
	h.calls[c] = struct{}{}
	for range c.deliveriesN {
		fate := h.fateLocked(l)
		req := m
		req.Body = bytes.Clone(m.Body) // here, while the caller waits: later it owns m.Body again
		c.deliveries.Add(1)
		h.wg.Go(func() {
			defer c.deliveries.Done()
			c.results <- c.deliver(req, fate)
		})
	}
	h.wg.Go(func() {
		c.deliveries.Wait()
		h.mu.Lock()
		defer h.mu.Unlock()
		delete(h.calls, c)
	})
	return c, nil
}

func (h *Memory) faultsLocked(l *link) Faults {
	if l.faults != nil {
		return *l.faults
	}
	return h.faults
}

// fateLocked draws the fate of the next message on a link.
func (h *Memory) fateLocked(l *link) fate {
	f := h.faultsLocked(l)
	out := fate{lost: l.healed != nil}
	if f.Drop > 0 && l.rng.Float64() < f.Drop {
		out.lost = true
	}
	if f.Delay != nil {
		out.delay = f.Delay(l.rng)
	}
	return out
}

// await returns the first reply, or the error of the last delivery when none brought one.
func (c *memoryCall) await(ctx context.Context) (Message, error) {
	var err error
	for range c.deliveriesN {
		select {
		case r := <-c.results:
			if !r.lost {
				return r.reply, r.err
			}
			err = r.err
		case <-c.broken:
			return Message{}, c.cause
		case <-ctx.Done():
			close(c.cancelled)
			return Message{}, ctx.Err()
		}
	}
	return Message{}, err
}

// deliver carries the request, runs the handler and carries the reply.
func (c *memoryCall) deliver(req Message, there fate) memoryResult {
	if !c.carry(Envelope{From: c.from.id, To: c.to, Message: req}, there) {
		return c.lost("request")
	}
	c.hub.hears(c.dest, c.from)
	if c.dest == nil {
		return memoryResult{lost: true, err: fmt.Errorf("node %s is down: %w", c.to, trivet.ErrUnavailable)}
	}
	f, err := c.dest.enter(req.Kind)
	if err != nil {
		return memoryResult{lost: true, err: err}
	}
	reply, err := c.serve(f, req)
	c.dest.wg.Done()

	c.hub.mu.Lock()
	back := c.hub.fateLocked(c.hub.linkLocked(c.to, c.from.id))
	c.hub.mu.Unlock()
	if !c.carry(Envelope{From: c.to, To: c.from.id, Reply: true, Message: reply}, back) {
		return c.lost("reply")
	}
	c.hub.hears(c.from, c.dest)
	return memoryResult{reply: reply, err: err}
}

// serve runs the handler under a context that ends when the connection does or the caller's
// cancellation arrives. The reply is a copy; the error is as the wire would carry it.
func (c *memoryCall) serve(f Handler, req Message) (Message, error) {
	ctx, cancel := context.WithCancel(c.hub.ctx)
	defer cancel()
	c.hub.wg.Go(func() { c.watch(ctx, cancel) })
	out := Message{Kind: req.Kind, Group: req.Group}
	reply, err := f(ctx, c.from.id, req)
	if err == nil {
		reply.Kind, reply.Group = out.Kind, out.Group
		err = checkMessage(reply)
	}
	if err != nil {
		remote, _ := decodeError(c.to, encodeError(err)) // an encoded error always decodes
		return out, remote
	}
	reply.Body = bytes.Clone(reply.Body)
	return reply, nil
}

// watch ends a handler's context. A cancellation crosses the link like a message; over a cut link
// the far side learns only when it notices that the connection is dead.
func (c *memoryCall) watch(ctx context.Context, cancel context.CancelFunc) {
	defer cancel()
	select {
	case <-c.cancelled:
		c.hub.mu.Lock()
		cut := c.hub.linkLocked(c.from.id, c.to).healed != nil
		c.hub.mu.Unlock()
		if cut {
			c.hub.wait(c.hub.lossTimeout(), ctx.Done())
		}
	case <-c.broken:
	case <-ctx.Done():
	}
}

// carry takes a message across its link and reports whether it arrived.
func (c *memoryCall) carry(e Envelope, f fate) bool {
	h := c.hub
	if f.lost {
		return false
	}
	h.mu.Lock()
	rules := h.rules
	h.mu.Unlock()
	for _, r := range rules {
		if r.match(e) && (r.lose || !c.hold(r)) {
			return false
		}
	}
	if f.delay > 0 && !h.wait(f.delay, c.broken) {
		return false
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.linkLocked(e.From, e.To).healed == nil && !c.isBroken()
}

// hold waits until the rule is released and reports whether it was, rather than the call broken.
func (c *memoryCall) hold(r *rule) bool {
	h := c.hub
	h.countHeld(1)
	defer h.countHeld(-1)
	select {
	case <-r.released:
		return true
	case <-c.broken:
	case <-h.ctx.Done():
	}
	return false
}

func (h *Memory) countHeld(n int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.heldN += n
}

// lost is the result of a lost message, once the caller may know of it.
func (c *memoryCall) lost(what string) memoryResult {
	c.hub.wait(c.hub.lossTimeout(), c.broken)
	err := fmt.Errorf("%s between %s and %s lost: %w", what, c.from.id, c.to, trivet.ErrUnavailable)
	return memoryResult{lost: true, err: err}
}

// fail breaks the call: await returns err and handlers' contexts end. The first error stays.
func (c *memoryCall) fail(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.cause == nil {
		c.cause = err
		close(c.broken)
	}
}

func (c *memoryCall) isBroken() bool {
	select {
	case <-c.broken:
		return true
	default:
		return false
	}
}

// uses reports whether a message of the call crosses the link, one way or the other.
func (c *memoryCall) uses(from, to trivet.NodeID) bool {
	return c.from.id == from && c.to == to || c.from.id == to && c.to == from
}
