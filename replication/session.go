package replication

import (
	"context"
	"sync"
)

// session numbers the requests of one epoch. A sequence is open from begin to end: its caller has
// no answer yet. It is the client's half of the window: no sequence opens windowN above the lowest
// open one, so an honest client never leaves the window.
type session struct {
	mu       sync.Mutex
	next     uint64        // sequence of the next request
	low      uint64        // lowest open sequence; next when none is open
	answered [windowN]bool // of low .. next-1, by sequence modulo windowN
	moved    chan struct{} // closed when low rises
}

func newSession() *session { return &session{next: 1, low: 1, moved: make(chan struct{})} }

// begin opens a sequence and returns it with the lowest open one. It waits while the window is full.
func (s *session) begin(ctx context.Context) (seq, low uint64, err error) {
	for {
		s.mu.Lock()
		if s.next < s.low+windowN {
			seq, low = s.next, s.low
			s.answered[seq%windowN] = false
			s.next++
			s.mu.Unlock()
			return seq, low, nil
		}
		moved := s.moved
		s.mu.Unlock()
		select {
		case <-moved:
		case <-ctx.Done():
			return 0, 0, ctx.Err()
		}
	}
}

// end closes a sequence: its caller has an answer, be it that the outcome is unknown. From the next
// request on, no copy of it is applied any more.
func (s *session) end(seq uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.answered[seq%windowN] = true
	if seq != s.low {
		return
	}
	for s.low < s.next && s.answered[s.low%windowN] {
		s.low++
	}
	close(s.moved)
	s.moved = make(chan struct{})
}
