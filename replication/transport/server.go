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
	requests map[uint64]context.CancelFunc // being handled
	urgentN  int
	bulkN    int
	bytes    int64 // of their bodies
}

// run serves the connection until it ended and its handlers returned.
func (s *server) run() {
	s.wg.Go(s.writeLoop)
	s.readLoop(s.handle)
	s.wg.Wait()
}

func (s *server) handle(f frame) error {
	switch f.typ {
	case framePing:
		return nil
	case frameCancel:
		s.mu.Lock()
		cancel := s.requests[f.id]
		s.mu.Unlock()
		if cancel != nil {
			cancel()
		}
		return nil
	case frameRequest:
		return s.request(f)
	default:
		return unexpected(f)
	}
}

// request starts the handler of a request, or answers that we are busy.
func (s *server) request(f frame) error {
	isUrgent := urgent(f.msg)
	ctx, cancel := context.WithCancel(s.ctx)
	admitted, err := s.admit(f, isUrgent, cancel)
	if err != nil {
		cancel()
		return err
	}
	if !admitted {
		cancel()
		s.peers.stats.busy.Add(1)
		err := fmt.Errorf("node %s is busy with requests of %s: %w", s.peers.cfg.Local, s.node, trivet.ErrUnavailable)
		// Urgent, so that reading does not wait for bulk to be written. When there is no room even so,
		// waiting is right: the far end does not read its answers.
		s.answer(laneUrgent, refusal(f, err))
		return nil
	}
	s.wg.Go(func() {
		defer s.release(f.id, isUrgent, int64(len(f.msg.Body)))
		defer cancel()
		s.serve(ctx, f)
	})
	return nil
}

// admit counts a request as being handled, or reports that there is no room for it.
func (s *server) admit(f frame, isUrgent bool, cancel context.CancelFunc) (bool, error) {
	limits := s.peers.limits
	n := int64(len(f.msg.Body))
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.requests[f.id] != nil {
		return false, fmt.Errorf("request %d sent again: %w", f.id, trivet.ErrCorrupt)
	}
	switch {
	case isUrgent && s.urgentN < urgentHandlersMax:
		s.urgentN++
	case !isUrgent && s.bulkN < limits.HandlersMax && s.bytes+n <= limits.HandlerBytesMax:
		s.bulkN++
		s.bytes += n
	default:
		return false, nil
	}
	s.requests[f.id] = cancel
	s.peers.stats.handlers.Add(1)
	return true, nil
}

func (s *server) release(id uint64, wasUrgent bool, n int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.requests, id)
	if wasUrgent {
		s.urgentN--
	} else {
		s.bulkN--
		s.bytes -= n
	}
	s.peers.stats.handlers.Add(-1)
}

// serve runs the handler and queues its answer.
func (s *server) serve(ctx context.Context, f frame) {
	answer := s.handled(ctx, f)
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
