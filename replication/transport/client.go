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
	c.readLoop(c.handle)
	wg.Wait()
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
		return c.result(m, f)
	case <-ctx.Done():
		if !c.queue.abort(sent) {
			// Without room the handler runs to its end for nothing; no harm.
			c.queue.trySend(laneUrgent, frame{typ: frameCancel, id: id})
			c.peers.stats.cancels.Add(1)
		}
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
