package replication

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/replication/raftgroup"
)

const (
	// attemptMin and attemptMax bound one attempt of a request, which ends before that when another node is known to lead
	// (scout.go). A node that is only slow gets longer with each attempt. A second copy of a write that is
	// still on its way in the leader joins the first.
	attemptMin = time.Second
	attemptMax = 8 * time.Second
	// backoffMin and backoffMax bound the pause before an attempt at a node that may not lead either; in
	// the first backoffEarlyN attempts, about a second, it is at most backoffEarly, for that is when
	// leaders change.
	backoffMin    = 5 * time.Millisecond
	backoffEarly  = 40 * time.Millisecond
	backoffEarlyN = 25
	// patienceN is how many attempts in a row a node gets that says it is the leader, but not yet.
	patienceN  = 6
	backoffMax = 200 * time.Millisecond
)

// errIOTimeout is the cause of a call's context when IOTimeout has passed.
var errIOTimeout = errors.New("i/o timeout")

// route remembers which node led last, and the highest term that any reply carried.
type route struct {
	// find, when set, says where the members are now. It is asked without mu.
	find func() []raftgroup.Member

	mu     sync.Mutex
	nodes  []trivet.NodeID // of the members, each once
	target trivet.NodeID
	term   uint64
	told   uint64 // term of the newest leader that others have told of (scout.go)
}

// newRoute begins with the local replica, if there is one: leadership follows the attachment.
func newRoute(members []raftgroup.Member, find func() []raftgroup.Member, local trivet.NodeID) *route {
	r := &route{find: find, nodes: nodesOf(members)}
	r.target = r.nodes[0]
	if slices.Contains(r.nodes, local) {
		r.target = local
	}
	return r
}

// nodesOf returns the nodes of members in their order, each once.
func nodesOf(members []raftgroup.Member) []trivet.NodeID {
	var nodes []trivet.NodeID
	for _, m := range members {
		if !slices.Contains(nodes, m.Node) {
			nodes = append(nodes, m.Node)
		}
	}
	return nodes
}

func (r *route) node() trivet.NodeID {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.target
}

// accept takes note of a reply's term, or refuses it when a higher one was seen: the node was
// deposed and does not know it (I15).
func (r *route) accept(term uint64) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if term < r.term {
		return fmt.Errorf("reply of term %d, term %d was seen: %w", term, r.term, trivet.ErrNotLeader)
	}
	r.term = term
	return nil
}

// failed moves on from a node: to hint, which the node said leads, or else to the next member. A node
// that names itself has just been elected and needs a moment. When another call has moved on already, it
// stays there.
func (r *route) failed(node, hint trivet.NodeID) {
	var now []trivet.NodeID
	if r.find != nil { // the members may all have changed since
		now = nodesOf(r.find())
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(now) > 0 {
		r.nodes = now
	}
	if r.target != node {
		return
	}
	if hint != "" {
		r.target = hint
		return
	}
	for i, n := range r.nodes {
		if n == node {
			r.target = r.nodes[(i+1)%len(r.nodes)]
			return
		}
	}
	r.target = r.nodes[0] // node was a hint from outside the members, or is a member no more
}

// attemptFunc sends a request to a node once. A reply with codeNotLeader is not an error.
type attemptFunc func(ctx context.Context, node trivet.NodeID) (reply, error)

// callLeader sends a request until a leader answers it. Errors other than ErrNotLeader and
// ErrUnavailable are answers. When ctx ends it returns the cause together with the last failure.
// strong tells that a reply of a lower term than seen must not be used.
func (v *Volume) callLeader(ctx context.Context, strong bool, attempt attemptFunc) error {
	started := time.Now()
	var heard uint64              // term of the newest leader that this node heard of and that was tried
	for n, since := 0, 0; ; n++ { // since: attempts since then
		node := v.route.node()
		hint, err := v.try(ctx, n, node, strong, attempt)
		if err == nil || !retryable(err) {
			if n > 0 {
				v.stats.pause(time.Since(started))
			}
			return err
		}
		if ctx.Err() == nil {
			v.stats.retry()
			if hint == node && since >= patienceN {
				hint = ""
			}
			v.route.failed(node, hint)
			v.log.Debug("request is sent again", "node", node, "hint", hint, "attempt", n+1, "err", err)
			if since++; hint == "" || hint == node || since > 2 {
				if term := v.awaitLeader(ctx, node, heard, backoff(since-1)); term > heard {
					heard, since = term, 0
				}
			}
		}
		if ctx.Err() != nil {
			v.stats.pause(time.Since(started))
			return giveUp(ctx, v.cfg.IOTimeout, err)
		}
	}
}

func (v *Volume) try(ctx context.Context, n int, node trivet.NodeID, strong bool, attempt attemptFunc) (
	hint trivet.NodeID, err error,
) {
	actx, end := v.attemptAt(ctx, node, min(attemptMin<<min(n, 8), attemptMax))
	defer end()
	out, err := attempt(actx, node)
	switch {
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, context.Canceled): // ours or the handler's
		return "", fmt.Errorf("no answer from %s: %w", node, trivet.ErrUnavailable)
	case err != nil:
		return "", err
	case out.code == codeNotLeader:
		return out.node, fmt.Errorf("node %s: %w", node, trivet.ErrNotLeader)
	}
	if err := v.route.accept(out.term); err != nil && strong {
		return "", fmt.Errorf("node %s: %w", node, err)
	}
	v.note(out.index)
	return "", nil
}

func retryable(err error) bool {
	return errors.Is(err, trivet.ErrNotLeader) || errors.Is(err, trivet.ErrUnavailable)
}

// giveUp says why a call ended without an answer: fenced or closed, out of time, or its caller left.
func giveUp(ctx context.Context, timeout time.Duration, last error) error {
	cause := context.Cause(ctx)
	switch {
	case errors.Is(cause, errIOTimeout):
		return fmt.Errorf("no leader answered within %v (last: %v): %w", timeout, last, trivet.ErrUnavailable)
	case errors.Is(cause, trivet.ErrFenced), errors.Is(cause, trivet.ErrClosed):
		return cause
	}
	return fmt.Errorf("caller left while waiting for a leader (last: %v): %w", last, ctx.Err())
}

func backoff(n int) time.Duration {
	if n < backoffEarlyN {
		return min(backoffMin<<min(n, 8), backoffEarly)
	}
	return backoffMax
}

// awaitLeader waits for d, but no longer than until a replica on this node hears of a leader of a term
// above heard, other than the node that has just failed; the route then leads there, and awaitLeader
// returns that term. Each term is taken once, so that a replica which is wrong about its leader cannot
// make calls spin.
func (v *Volume) awaitLeader(ctx context.Context, failed trivet.NodeID, heard uint64, d time.Duration) (term uint64) {
	r, ok := v.local()
	if !ok {
		pause(ctx, d)
		return heard
	}
	t := time.NewTimer(d)
	defer t.Stop()
	for {
		leader, term, changed := r.leader()
		if leader != "" && leader != failed && term > heard {
			v.route.failed(v.route.node(), leader)
			return term
		}
		select {
		case <-changed:
		case <-t.C:
			return heard
		case <-ctx.Done():
			return heard
		}
	}
}

// local returns this node's own replica of the volume.
func (v *Volume) local() (*Replica, bool) {
	if v.cfg.Host == nil {
		return nil, false
	}
	return v.cfg.Host.Replica(v.cfg.ID)
}

func pause(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}

// stats counts what VolumeStats reports.
type stats struct {
	mu      sync.Mutex
	longest time.Duration
	retries uint64
}

func (s *stats) pause(d time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.longest = max(s.longest, d)
}

func (s *stats) retry() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.retries++
}

func (s *stats) take() VolumeStats {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := VolumeStats{LongestPause: s.longest, Retries: s.retries}
	s.longest = 0
	return out
}
