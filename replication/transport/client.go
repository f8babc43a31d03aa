package transport

import (
	"context"
	"fmt"
	"sync"

	"github.com/trivet-csi/trivet"
)

// client is a connection that we dialled: it carries our requests and the replies to them.
type client struct {
	*stream
	address string

	mu      sync.Mutex
	lastID  uint64
	pending map[uint64]chan frame // by request; each channel has room for the reply
}

// run serves the connection until it ends.
func (c *client) run() {
	var wg sync.WaitGroup
	wg.Go(c.writeLoop)
	c.readLoop(c.begin, c.handle)
	wg.Wait()
}

// begin bounds the replies of which pieces are missing.
func (c *client) begin(f frame, total int) (bool, error) {
	if f.typ == frameRequest {
		return false, unexpected(f)
	}
	if most := c.peers.limits.HandlerBytesMax; c.in.bytes+int64(total) > most {
		return false, fmt.Errorf("incomplete replies of %d and %d bytes, at most %d are allowed: %w",
			c.in.bytes, total, most, trivet.ErrCorrupt)
	}
	return true, nil
}

// handle hands a reply to its caller. One that nobody waits for is of a call that gave up.
func (c *client) handle(f frame) error {
	switch f.typ {
	case framePing:
		return nil
	case frameReply, frameError:
		c.mu.Lock()
		reply := c.pending[f.id]
		delete(c.pending, f.id)
		c.mu.Unlock()
		if reply != nil {
			reply <- f
		}
		return nil
	default:
		return unexpected(f)
	}
}

// call sends a request and waits for its reply.
func (c *client) call(ctx context.Context, m Message) (Message, error) {
	id, reply := c.register()
	defer c.forget(id)
	l := laneBulk
	if urgent(m) {
		l = laneUrgent
	}
	sent, err := c.queue.send(ctx, c.ctx, l, frame{typ: frameRequest, id: id, msg: m})
	if err != nil {
		if c.ctx.Err() != nil {
			return Message{}, c.cause()
		}
		return Message{}, err
	}
	select {
	case f := <-reply:
		if started, finished := c.queue.abort(sent); started && !finished {
			c.queue.mustSend(laneUrgent, frame{typ: frameCancel, id: id}) // refused at its first piece
		}
		return c.result(m, f)
	case <-ctx.Done():
		c.giveUp(sent, id)
		return Message{}, ctx.Err()
	case <-c.ctx.Done():
		select {
		case f := <-reply: // arrived before the end
			return c.result(m, f)
		default:
			return Message{}, c.cause()
		}
	}
}

// giveUp keeps a request from being sent, or cancels it.
func (c *client) giveUp(sent *outgoing, id uint64) {
	cancel := frame{typ: frameCancel, id: id}
	switch started, finished := c.queue.abort(sent); {
	case !started:
		return
	case finished:
		c.queue.trySend(laneUrgent, cancel) // without room the handler runs to its end for nothing; no harm
	default:
		c.queue.mustSend(laneUrgent, cancel) // the far end waits for the rest, and keeps room for it
	}
	c.peers.stats.cancels.Add(1)
}

func (c *client) register() (uint64, chan frame) {
	reply := make(chan frame, 1)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.lastID++
	c.pending[c.lastID] = reply
	return c.lastID, reply
}

func (c *client) forget(id uint64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.pending, id)
}

// result turns an answer to m into what Call returns.
func (c *client) result(m Message, f frame) (Message, error) {
	if f.typ == frameError {
		remote, err := decodeError(c.node, f.msg.Body)
		if err != nil {
			err = fmt.Errorf("answer of %s: %w: %w", c.node, err, trivet.ErrUnavailable)
			c.fail(err)
			return Message{}, err
		}
		return Message{}, remote
	}
	f.msg.Kind, f.msg.Group = m.Kind, m.Group
	return f.msg, nil
}
