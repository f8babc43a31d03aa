package raftgroup

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/hashicorp/raft"

	"github.com/trivet-csi/trivet"
)

// changeAttempts is how often a change is tried again because another one came in between.
const changeAttempts = 8

// configCall asks the library for one change of the configuration whose index is prev.
type configCall func(r *raft.Raft, prev uint64, wait time.Duration) raft.IndexFuture

// AddLearner adds a replica without a vote, on the leader. A member of the same ID on the same node,
// learner or voter, is success; on another node ErrExists. Errors are those of Propose, and
// ErrPending while another change is under way.
func (g *Group) AddLearner(ctx context.Context, m Member) error {
	if _, _, err := parseAddress(address(m.Replica, m.Node)); err != nil {
		return fmt.Errorf("add learner to %s: %w", g.cfg.Group, err)
	}
	return g.change(ctx, "add learner "+string(m.Replica), func(members []Member) (configCall, error) {
		if old, ok := findMember(members, m.Replica); ok {
			if old.Node != m.Node {
				return nil, fmt.Errorf("member is on node %s, not %s: %w", old.Node, m.Node, trivet.ErrExists)
			}
			return nil, nil
		}
		if len(members) >= MembersMax {
			return nil, fmt.Errorf("%d members already: %w", len(members), trivet.ErrInvalid)
		}
		return func(r *raft.Raft, prev uint64, wait time.Duration) raft.IndexFuture {
			return r.AddNonvoter(raft.ServerID(m.Replica), address(m.Replica, m.Node), prev, wait)
		}, nil
	})
}

// Promote gives a learner its vote, on the leader. A voter is success, no member ErrNotFound. It
// refuses with ErrPending a learner that lags (I14) or is silent: the library would make it a voter at
// once, and a quorum would need it. While a leader is busy every follower lags a little, so the learner
// has a Heartbeat's time to reach what was committed at the call: one round of Ongaro's thesis, 4.2.1.
func (g *Group) Promote(ctx context.Context, id trivet.ReplicaID) error {
	goal, err := g.committed()
	if err == nil {
		err = g.awaitMatch(ctx, id, goal)
	}
	if err != nil {
		return fmt.Errorf("promote %s in %s: %w", id, g.cfg.Group, err)
	}
	return g.change(ctx, "promote "+string(id), func(members []Member) (configCall, error) {
		m, ok := findMember(members, id)
		if !ok {
			return nil, fmt.Errorf("no such member: %w", trivet.ErrNotFound)
		}
		if !m.Learner {
			return nil, nil
		}
		s := g.Status()
		if match := s.Match[id]; match < goal {
			return nil, fmt.Errorf("learner has entries to %d, leader had committed %d: %w", match, goal, trivet.ErrPending)
		}
		if !g.lease.answered(s.Term, id, g.cfg.Timing.Heartbeat, g.now()) {
			return nil, fmt.Errorf("learner has not answered for %s: %w", g.cfg.Timing.Heartbeat, trivet.ErrPending)
		}
		return func(r *raft.Raft, prev uint64, wait time.Duration) raft.IndexFuture {
			return r.AddVoter(raft.ServerID(id), address(m.Replica, m.Node), prev, wait)
		}, nil
	})
}

// CaughtUp waits until a learner is known to have what was committed at the call, on the leader, at most for a
// Heartbeat: then ErrPending. A voter, or no member, is nil at once. Other errors are those of Promote.
func (g *Group) CaughtUp(ctx context.Context, id trivet.ReplicaID) error {
	goal, err := g.committed()
	if err == nil {
		err = g.awaitMatch(ctx, id, goal)
	}
	if err != nil {
		return fmt.Errorf("wait for %s in %s: %w", id, g.cfg.Group, err)
	}
	return nil
}

// committed returns the index up to which the group has committed, on a leader that knows: what earlier terms
// have committed it learns from an entry of its own. ErrPending until then.
func (g *Group) committed() (uint64, error) {
	i, err := g.leading()
	if err != nil {
		return 0, err
	}
	if term := i.r.CurrentTerm(); i.appliedTerm.Load() != term {
		return 0, fmt.Errorf("no entry of term %d applied yet: %w", term, trivet.ErrPending)
	}
	return i.r.CommitIndex(), nil
}

// awaitMatch waits until a learner is known to have the entries up to goal, or is none, or cannot be
// told to be one here; at most for a Heartbeat.
func (g *Group) awaitMatch(ctx context.Context, id trivet.ReplicaID, goal uint64) error {
	ctx, cancel := context.WithTimeout(ctx, g.cfg.Timing.Heartbeat)
	defer cancel()
	look := time.NewTicker(max(g.cfg.Timing.Heartbeat/100, time.Millisecond))
	defer look.Stop()
	for {
		s := g.Status()
		m, _ := findMember(s.Members, id)
		if !m.Learner || !s.IsLeader || s.Match[id] >= goal {
			return nil
		}
		select {
		case <-look.C:
		case <-ctx.Done():
			return fmt.Errorf("learner has entries to %d, leader had committed %d: %w", s.Match[id], goal, trivet.ErrPending)
		}
	}
}

// Remove takes a replica out of the group, on the leader; no member is success. The last voter
// cannot go: ErrInvalid. A leader that removes itself steps down. ErrUnavailable, and nothing was done,
// when those that remain have no quorum that answers: the new configuration rules as soon as it is in
// the log, so the group would stand still until the silent ones are back (I11).
func (g *Group) Remove(ctx context.Context, id trivet.ReplicaID) error {
	return g.change(ctx, "remove "+string(id), func(members []Member) (configCall, error) {
		m, ok := findMember(members, id)
		if !ok {
			return nil, nil
		}
		if !m.Learner && voterN(members) == 1 {
			return nil, fmt.Errorf("it is the last voter: %w", trivet.ErrInvalid)
		}
		if !m.Learner {
			if err := g.checkRemaining(members, id); err != nil {
				return nil, err
			}
		}
		return func(r *raft.Raft, prev uint64, wait time.Duration) raft.IndexFuture {
			return r.RemoveServer(raft.ServerID(id), prev, wait)
		}, nil
	})
}

// checkRemaining returns ErrUnavailable unless a quorum of the voters but gone answered of late.
func (g *Group) checkRemaining(members []Member, gone trivet.ReplicaID) error {
	term, now := g.Status().Term, g.now()
	var voters, silent []Member
	for _, m := range members {
		if m.Learner || m.Replica == gone {
			continue
		}
		voters = append(voters, m)
		if m.Replica != g.cfg.Replica && !g.lease.answered(term, m.Replica, g.cfg.Timing.Heartbeat, now) {
			silent = append(silent, m)
		}
	}
	if len(voters)-len(silent) > len(voters)/2 {
		return nil
	}
	return fmt.Errorf("of the %d voters that would remain, %d have not answered for %s, %s among them: %w",
		len(voters), len(silent), g.cfg.Timing.Heartbeat, silent[0].Replica, trivet.ErrUnavailable)
}

// change makes one single-server change. step looks at the newest configuration and returns what to
// ask for, nil when there is nothing to do. The library does it only if that configuration is
// still the newest: its own figure for the index is always 0 (api.go, GetConfiguration), so ours
// comes from the log.
func (g *Group) change(ctx context.Context, what string, step func([]Member) (configCall, error)) error {
	fail := func(err error) error { return fmt.Errorf("%s in %s: %w", what, g.cfg.Group, err) }
	for range changeAttempts {
		if err := g.settled(ctx); err != nil {
			return fail(err)
		}
		i, err := g.leading()
		if err != nil {
			return fail(err)
		}
		now := g.store.latestConfig()
		call, err := step(now.members)
		if err != nil {
			return fail(err)
		}
		if call == nil {
			return g.Barrier(ctx) // what is there already must be committed, too
		}
		_, err = i.ask(ctx, func() future { return call(i.r, now.index, g.enqueueWait()) })
		switch {
		case err == nil:
			g.log.Info("membership changed", "change", what)
			return nil
		case errors.Is(err, raft.ErrEnqueueTimeout):
			return fail(fmt.Errorf("another change is under way: %w", trivet.ErrPending))
		case strings.HasPrefix(err.Error(), "configuration changed since"):
			continue
		}
		return fail(outcome(err))
	}
	return fail(fmt.Errorf("the configuration keeps changing: %w", trivet.ErrPending))
}

// transferVoid is how long, in heartbeats, a failed transfer may still make another leader: the
// target accepts the request for one after it gave us its clock reading, and stands for two at
// most. One is for clocks that differ.
const transferVoid = 4

// TransferTo moves leadership to a voter and returns once this replica leads no more. Being the
// leader is success; without leading, ErrNotLeader; a replica that is no voter, ErrNotFound; one that
// is silent, ErrUnavailable, and then nothing was tried: Raft takes no proposals during an attempt,
// so one repeated towards a dead node would hold up all I/O. The
// read lease is void from before the attempt; after one that failed (ErrUnavailable) this replica
// still leads, but serves no reads for four heartbeats.
func (g *Group) TransferTo(ctx context.Context, id trivet.ReplicaID) error {
	fail := func(err error) error { return fmt.Errorf("transfer %s to %s: %w", g.cfg.Group, id, err) }
	i, err := g.leading()
	if err != nil {
		return fail(err)
	}
	if id == g.cfg.Replica {
		return nil
	}
	m, ok := findMember(g.store.latestConfig().members, id)
	if !ok || m.Learner {
		return fail(fmt.Errorf("it is no voter: %w", trivet.ErrNotFound))
	}
	if !g.lease.answered(i.r.CurrentTerm(), id, g.cfg.Timing.Heartbeat, g.now()) {
		return fail(fmt.Errorf("it has not answered for %s: %w", g.cfg.Timing.Heartbeat, trivet.ErrUnavailable))
	}
	if err := g.transfer(ctx, i, m); err != nil {
		return fail(err)
	}
	return nil
}

// transfer is the library's LeadershipTransferToServer, which holds up all proposals for one of its ElectionTimeouts,
// whatever comes of it, and tells those who wait nothing: here they wait for the outcome, at most for a Heartbeat.
func (g *Group) transfer(ctx context.Context, i *instance, to Member) error {
	term := i.r.CurrentTerm()
	lost := g.leadership()
	over, err := g.handOver()
	if err != nil {
		return err
	}
	defer over()
	defer g.lease.void(term, transferVoid*g.cfg.Timing.Heartbeat)()
	i.announce(term, to.Replica)
	ctx, cancel := context.WithTimeout(ctx, g.cfg.Timing.Heartbeat)
	defer cancel()
	if err := g.awaitLevel(ctx, term, to.Replica); err != nil {
		return err
	}
	if i.r.State() != raft.Leader || i.r.CurrentTerm() != term || lost == nil {
		return trivet.ErrNotLeader
	}
	err = i.t.TimeoutNow(raft.ServerID(to.Replica), address(to.Replica, to.Node), nil, nil)
	if err != nil && !errors.Is(err, trivet.ErrUnavailable) && !errors.Is(err, context.DeadlineExceeded) {
		return fmt.Errorf("%w: %w", err, trivet.ErrUnavailable) // refused: it stands for nothing
	}
	select { // an answer may be lost, but not what it is about
	case <-lost:
		return nil
	case <-i.stopping:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("it has not taken over: %w: %w", context.Cause(ctx), trivet.ErrUnavailable)
	}
}

// awaitLevel waits until a voter is known to have all of this leader's log. No proposal is accepted meanwhile.
func (g *Group) awaitLevel(ctx context.Context, term uint64, id trivet.ReplicaID) error {
	look := time.NewTicker(max(g.cfg.Timing.Heartbeat/1000, time.Millisecond))
	defer look.Stop()
	for {
		_, last := g.seglog.bounds()
		match := g.lease.matches(term)[id]
		if match >= max(last, g.snaps.record().index) {
			return nil
		}
		select {
		case <-look.C:
		case <-ctx.Done():
			return fmt.Errorf("it has entries to %d, this leader to %d: %w", match, last, trivet.ErrUnavailable)
		}
	}
}

// handOver makes new proposals wait until over is called. ErrPending: another transfer is under way.
func (g *Group) handOver() (over func(), err error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.handing != nil {
		return nil, fmt.Errorf("another transfer is under way: %w", trivet.ErrPending)
	}
	done := make(chan struct{})
	g.handing = done
	return func() {
		g.mu.Lock()
		defer g.mu.Unlock()
		g.handing = nil
		close(done)
	}, nil
}

// settled waits until no transfer is under way.
func (g *Group) settled(ctx context.Context) error {
	for {
		g.mu.Lock()
		handing := g.handing
		g.mu.Unlock()
		if handing == nil {
			return nil
		}
		select {
		case <-handing:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}
