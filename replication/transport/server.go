package transport

import (
	"context"
	"fmt"
	"sync"

	"github.com/trivet-csi/trivet"
)

// server is a connection that we accepted: it carries the far end's requests and our replies.
type server struct {
	*stream
	wg sync.WaitGroup // handlers and writer

	mu       sync.Mutex
	requests map[uint64]*request // being received or handled
	urgentN  int
	bulkN    int
	bytes    [laneN]int64 // of their bodies
}

// request is a request that was admitted.
type request struct {
	ctx    context.Context
	cancel context.CancelFunc
	lane   lane
	bytes  int64 // of its body
}

// run serves the connection until it ended and its handlers returned.
func (s *server) run() {
	s.wg.Go(s.writeLoop)
	s.readLoop(s.begin, s.handle)
	for id := range s.in.parts {
		s.cancelled(id)
	}
	s.wg.Wait()
}

func (s *server) handle(f frame) error {
	switch f.typ {
	case framePing:
		return nil
	case frameCancel:
		s.cancelled(f.id)
		return nil
	case frameRequest:
		return s.request(f)
	default:
		return unexpected(f)
	}
}

// cancelled ends a request that its caller gave up, and forgets it when it is not complete.
func (s *server) cancelled(id uint64) {
	s.mu.Lock()
	r := s.requests[id]
	s.mu.Unlock()
	if r != nil {
		r.cancel()
	}
	if wanted, ok := s.in.drop(id); ok && wanted {
		s.release(id, r)
	}
}

// begin admits a request whose first piece has come, or answers that we are busy: the rest is then
// read for nothing.
func (s *server) begin(f frame, total int) (bool, error) {
	if f.typ != frameRequest {
		return false, unexpected(f)
	}
	r, err := s.admit(f.id, laneBulk, int64(total))
	if err == nil && r == nil {
		s.busy(f)
	}
	return r != nil, err
}

// request starts the handler of a request that is complete, or answers that we are busy.
func (s *server) request(f frame) error {
	var r *request
	if len(f.msg.Body) > fragmentBytes { // admitted by begin
		s.mu.Lock()
		r = s.requests[f.id]
		s.mu.Unlock()
	} else {
		l := laneBulk
		if urgent(f.msg) {
			l = laneUrgent
		}
		var err error
		if r, err = s.admit(f.id, l, int64(len(f.msg.Body))); err != nil {
			return err
		}
	}
	if r == nil {
		s.busy(f)
		return nil
	}
	s.wg.Go(func() {
		defer s.release(f.id, r)
		s.serve(r.ctx, f)
	})
	return nil
}

// busy refuses a request for want of room.
func (s *server) busy(f frame) {
	s.peers.stats.busy.Add(1)
	err := fmt.Errorf("node %s is busy with requests of %s: %w", s.peers.cfg.Local, s.node, trivet.ErrUnavailable)
	// Urgent, so that reading does not wait for bulk to be written. When there is no room even so,
	// waiting is right: the far end does not read its answers.
	s.answer(laneUrgent, refusal(f, err))
}

// admit counts a request of n bytes as being handled, or returns nil when there is no room for it.
func (s *server) admit(id uint64, l lane, n int64) (*request, error) {
	limits := s.peers.limits
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.requests[id] != nil {
		return nil, fmt.Errorf("request %d sent again: %w", id, trivet.ErrCorrupt)
	}
	switch {
	case l == laneUrgent && s.urgentN < urgentHandlersMax && s.bytes[l]+n <= urgentHandlerBytesMax:
		s.urgentN++
	case l == laneBulk && s.bulkN < limits.HandlersMax && s.bytes[l]+n <= limits.HandlerBytesMax:
		s.bulkN++
	default:
		return nil, nil //nolint:nilnil // no room is no error
	}
	r := &request{lane: l, bytes: n}
	r.ctx, r.cancel = context.WithCancel(s.ctx)
	s.bytes[l] += n
	s.requests[id] = r
	s.peers.stats.handlers.Add(1)
	return r, nil
}

// release ends what admit began.
func (s *server) release(id uint64, r *request) {
	r.cancel()
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.requests, id)
	s.bytes[r.lane] -= r.bytes
	if r.lane == laneUrgent {
		s.urgentN--
	} else {
		s.bulkN--
	}
	s.peers.stats.handlers.Add(-1)
}

// serve runs the handler and queues its answer. What a handler returns after the connection has ended is not sent, even
// while the socket still takes it: it would say of our end, which ended the handler too, that the caller gave up.
func (s *server) serve(ctx context.Context, f frame) {
	answer := s.handled(ctx, f)
	if s.ctx.Err() != nil {
		return
	}
	l := laneBulk
	if urgent(answer.msg) {
		l = laneUrgent
	}
	s.answer(l, answer)
}

// handled returns the handler's answer to a request.
func (s *server) handled(ctx context.Context, f frame) frame {
	h := s.peers.handler(f.msg.Kind)
	if h == nil {
		return refusal(f, fmt.Errorf("node %s has no handler for kind %d: %w",
			s.peers.cfg.Local, f.msg.Kind, trivet.ErrUnavailable))
	}
	reply, err := h(ctx, s.node, f.msg)
	if err == nil {
		err = checkMessage(reply)
	}
	if err != nil {
		return refusal(f, err)
	}
	reply.Kind, reply.Group = f.msg.Kind, f.msg.Group
	return frame{typ: frameReply, id: f.id, msg: reply}
}

// refusal is the answer to a request that failed.
func refusal(f frame, err error) frame {
	m := Message{Kind: f.msg.Kind, Group: f.msg.Group, Body: encodeError(err)}
	return frame{typ: frameError, id: f.id, msg: m}
}

// answer queues an answer. When the connection ends first there is nobody to tell.
func (s *server) answer(l lane, f frame) { _, _ = s.queue.send(s.ctx, s.ctx, l, f) }
