package raftgroup

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/raft"

	"github.com/trivet-csi/trivet"
)

// Silence. The library waits longer after each call that failed, 10.24 s in the end (replication.go:183, failureWait
// doubled maxFailureScale-2 times), and nothing cuts such a wait short: a replica that was away for some minutes, and
// is back, stayed without entries for up to so long, and its group with one less than it could have. So the library
// gets to know of the first silentAfter failures only. The call after them stays here until the follower can be
// reached: until an answer to a heartbeat comes, which are sent at the same pace to one that is away (pace.go), or,
// where heartbeats alone are lost, for probeEvery of them. Then it asks without entries where the follower is, and the
// library goes on from there.
const (
	silentAfter = 5 // the library waits 80 ms then
	probeEvery  = 5 // heartbeats
)

// silence keeps, for one run of the library, which followers do not answer appends.
type silence struct {
	n atomic.Int32 // of followers

	mu    sync.Mutex
	peers map[trivet.ReplicaID]*silent
}

type silent struct {
	failures int           // in a row
	heard    chan struct{} // closed at the next answer to a heartbeat; nil when nobody waits
}

// failed counts a call that failed, and returns how many have in a row.
func (s *silence) failed(id trivet.ReplicaID) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	p := s.peerLocked(id)
	p.failures++
	return p.failures
}

func (s *silence) peerLocked(id trivet.ReplicaID) *silent {
	if s.peers == nil {
		s.peers = make(map[trivet.ReplicaID]*silent)
	}
	p := s.peers[id]
	if p == nil {
		p = new(silent)
		s.peers[id] = p
		s.n.Store(int32(len(s.peers)))
	}
	return p
}

// answered is told of an append that was answered.
func (s *silence) answered(id trivet.ReplicaID) {
	if s.n.Load() == 0 {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.peers, id)
	s.n.Store(int32(len(s.peers)))
}

// beat is told of a heartbeat that was answered, in whatever words.
func (s *silence) beat(id trivet.ReplicaID) {
	if s.n.Load() == 0 {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if p := s.peers[id]; p != nil && p.heard != nil {
		close(p.heard)
		p.heard = nil
	}
}

// next returns what is closed at the next answer to a heartbeat.
func (s *silence) next(id trivet.ReplicaID) <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	p := s.peerLocked(id) // a call of an earlier term may wait beside one whose follower has answered
	if p.heard == nil {
		p.heard = make(chan struct{})
	}
	return p.heard
}

// unreachable tells errors that say that nothing was answered from those that are an answer.
func unreachable(err error) bool {
	return errors.Is(err, trivet.ErrUnavailable) || errors.Is(err, context.DeadlineExceeded)
}

// outwait stays until a follower that does not answer appends is there again, and asks it where it is. It returns an
// error when this replica leads no more in req's term, or the follower is no member any more.
func (t *peerTransport) outwait(id raft.ServerID, to raft.ServerAddress, req *raft.AppendEntriesRequest,
	timeout time.Duration,
) ([]byte, instant, error) {
	req.Entries = nil // the log may drop them meanwhile; the library reads them again
	beat := t.g.cfg.Timing.Heartbeat
	for {
		if err := t.await(req.Term, id, beat/4, nil); err != nil { // not at the pace of the heartbeats
			return nil, instant{}, err
		}
		if err := t.await(req.Term, id, probeEvery*beat, t.silence.next(trivet.ReplicaID(id))); err != nil {
			return nil, instant{}, err
		}
		if err := t.mute(); err != nil {
			return nil, instant{}, err
		}
		b, sent, err := t.sendAppend(id, to, req, timeout)
		if err == nil || !unreachable(err) {
			return b, sent, err
		}
	}
}
