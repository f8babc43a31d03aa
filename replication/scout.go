package replication

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/replication/transport"
)

const (
	// scoutAfter is how long an attempt lasts before the volume looks whether another node leads by now, and lookEvery how
	// often it looks then. A leader that is merely slow, as a busy disk makes it, costs a status of each member each time.
	scoutAfter = 200 * time.Millisecond
	lookEvery  = 40 * time.Millisecond
)

// errMoved ends an attempt at a node in whose place another one leads.
var errMoved = errors.New("another node leads")

// scout looks for a leader while attempts wait for a node that does not answer. Without it, a request that was sent to
// a node which then fell silent would wait until the attempt's end for it, though the others have elected a leader
// meanwhile.
type scout struct {
	mu      sync.Mutex
	waiting int                // attempts
	end     context.CancelFunc // of look, while there are any
	moved   chan struct{}      // closed when the route has moved to a new leader; nil until somebody waits
}

// attemptAt returns a context for an attempt at a node, which ends after limit, and before that once another node is
// known to lead. The caller calls end when the attempt is over.
func (v *Volume) attemptAt(ctx context.Context, node trivet.NodeID, limit time.Duration) (
	actx context.Context, end func(),
) {
	actx, cancel := context.WithCancelCause(ctx)
	t := time.AfterFunc(scoutAfter, func() { v.await(actx, cancel, node, limit-scoutAfter) })
	return actx, func() {
		t.Stop()
		cancel(nil)
	}
}

// await ends an attempt when it is time.
func (v *Volume) await(ctx context.Context, cancel context.CancelCauseFunc, node trivet.NodeID, limit time.Duration) {
	t := time.NewTimer(limit)
	defer t.Stop()
	moved := v.scout.enter(v.look)
	defer v.scout.leave()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
			cancel(context.DeadlineExceeded)
			return
		case <-moved:
			if v.route.node() != node {
				cancel(errMoved)
				return
			}
			moved = v.scout.news()
		}
	}
}

// enter begins to wait for news, and starts look for the first who does.
func (s *scout) enter(look func(context.Context)) (moved <-chan struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.waiting++; s.waiting == 1 {
		ctx, end := context.WithCancel(context.Background()) //nolint:forbidigo // ended by the last who leaves
		s.end, s.moved = end, make(chan struct{})
		go look(ctx)
	}
	return s.moved
}

func (s *scout) leave() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.waiting--; s.waiting == 0 {
		s.end()
	}
}

func (s *scout) news() <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.moved
}

// tell wakes all who wait.
func (s *scout) tell() {
	s.mu.Lock()
	defer s.mu.Unlock()
	close(s.moved)
	s.moved = make(chan struct{})
}

// look asks the members for their leader until ctx ends.
func (v *Volume) look(ctx context.Context) {
	tick := time.NewTicker(lookEvery)
	defer tick.Stop()
	for {
		var asked sync.WaitGroup
		for _, node := range v.route.others() {
			asked.Go(func() {
				if leader, term, ok := v.leaderBy(ctx, node); ok && v.route.elected(leader, term) {
					v.log.Debug("another node leads", "leader", leader, "term", term, "by", node)
					v.scout.tell()
				}
			})
		}
		asked.Wait()
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

// leaderBy returns which node leads, and in which term, as a member says.
func (v *Volume) leaderBy(ctx context.Context, node trivet.NodeID) (leader trivet.NodeID, term uint64, ok bool) {
	if node == v.cfg.Network.Local() {
		r, here := v.local()
		if !here {
			return "", 0, false
		}
		leader, term, _ = r.leader()
		return leader, term, leader != ""
	}
	ctx, cancel := context.WithTimeout(ctx, scoutAfter)
	defer cancel()
	m, err := v.cfg.Network.Call(ctx, node, transport.Message{Kind: transport.KindVolumeStatus, Group: v.cfg.ID})
	if err != nil {
		return "", 0, false
	}
	s, err := decodeStatus(m.Body)
	return s.LeaderNode, s.Term, err == nil && s.LeaderNode != ""
}

// others returns the members' nodes but the one that requests go to.
func (r *route) others() []trivet.NodeID {
	r.mu.Lock()
	defer r.mu.Unlock()
	var out []trivet.NodeID
	for _, n := range r.nodes {
		if n != r.target {
			out = append(out, n)
		}
	}
	return out
}

// elected takes note of a leader that somebody has told of, and reports whether requests go to it from now on: when it
// is another node than they go to, in a term above every one that a leader's reply or this has told.
func (r *route) elected(leader trivet.NodeID, term uint64) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if term <= max(r.term, r.told) || leader == r.target {
		return false
	}
	r.told, r.target = term, leader
	return true
}
