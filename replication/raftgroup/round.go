package raftgroup

import (
	"context"
	"fmt"
	"sync"

	"github.com/hashicorp/raft"

	"github.com/trivet-csi/trivet"
)

// Rounds: reads that a quorum confirms.
//
// A lease says that nobody else leads as long as clocks keep to what is asked of them (lease.go). A round asks: a
// leader sends a heartbeat to each voter, and when a quorum has answered yes in its term, no other had been elected
// when the first of them was asked, so what it has applied is not older than anything acknowledged by then (ReadIndex:
// Ongaro's thesis,
// 6.4). A round counts for whoever came before it began. One is under way at a time; who comes meanwhile waits for the
// next, together with all others that do. A transfer of leadership does not void a round: a voter that
// answered had not yet voted for another.

// rounds are those of one run of the library.
type rounds struct {
	mu      sync.Mutex
	running bool
	next    *round // gathers while one is under way
}

// round is one, under way or to come. err is valid once done is closed.
type round struct {
	term uint64
	done chan struct{}
	err  error
}

// join returns a round that has not begun yet when it is called, or begins now. REQUIRES: i.enter.
func (i *instance) join() *round {
	i.rounds.mu.Lock()
	defer i.rounds.mu.Unlock()
	if i.rounds.next == nil {
		i.rounds.next = &round{done: make(chan struct{})}
	}
	r := i.rounds.next
	if !i.rounds.running {
		i.rounds.running = true
		i.loops.Go(i.playRounds)
	}
	return r
}

// playRounds plays one round after the other while somebody waits.
func (i *instance) playRounds() {
	for {
		i.rounds.mu.Lock()
		r := i.rounds.next
		i.rounds.next = nil
		i.rounds.running = r != nil
		i.rounds.mu.Unlock()
		if r == nil {
			return
		}
		r.term = i.r.CurrentTerm()
		r.err = i.play(r.term)
		close(r.done)
	}
}

// play asks all voters whether they follow this replica in term, and returns nil once a quorum does.
func (i *instance) play(term uint64) error {
	g := i.g
	// A leader whose disk hangs must not be kept in office by heartbeats (D8).
	if err := i.t.mute(); err != nil {
		return err
	}
	if i.t.resigned.Load() == term {
		return fmt.Errorf("replica gave up leading in term %d: %w", term, trivet.ErrNotLeader)
	}
	members := g.store.latestConfig().members
	me, ok := findMember(members, g.cfg.Replica)
	if !ok || me.Learner {
		return fmt.Errorf("replica has no vote: %w", trivet.ErrUnavailable)
	}
	ctx, cancel := context.WithTimeout(i.t.ctx, g.cfg.Timing.Heartbeat)
	defer cancel()
	need := voterN(members) / 2 // beside this one
	answers := make(chan bool, len(members))
	asked := 0
	for _, m := range members {
		if m.Learner || m.Replica == g.cfg.Replica {
			continue
		}
		asked++
		i.loops.Go(func() { answers <- i.follows(ctx, m, term) }) // has room: nobody waits for a late one
	}
	yes := 0
	for ; yes < need && asked > 0; asked-- {
		if <-answers {
			yes++
		}
	}
	if yes < need {
		return fmt.Errorf("%d of %d other voters follow in term %d: %w", yes, need, term, trivet.ErrUnavailable)
	}
	return nil
}

// follows asks a voter whether it follows this replica in term. It ends with ctx.
func (i *instance) follows(ctx context.Context, m Member, term uint64) bool {
	answer := i.g.cfg.Network.sendBeats(ctx, m.Node, []beat{{
		group: i.g.cfg.Group, from: i.g.cfg.Replica, to: m.Replica,
		body: encodeEmptyAppend(&raft.AppendEntriesRequest{Term: term}),
	}})[0]
	if answer.err != nil {
		return false
	}
	r, err := decodeAppendReply(answer.body)
	return err == nil && r.success && r.term == term
}

// ReadRound is ReadGate for those who do not rely on clocks: it returns the leader's term once a round of the quorum
// has passed that began after the call, one for all who wait. What is read after it is not older than anything
// acknowledged before the call. Errors as of ReadGate, and ctx's. It needs no lease.
func (g *Group) ReadRound(ctx context.Context) (term uint64, err error) {
	i := g.running()
	if i == nil || g.guard.failed() != nil || i.r.State() != raft.Leader {
		return 0, fmt.Errorf("read of %s: %w", g.cfg.Group, trivet.ErrNotLeader)
	}
	term = i.r.CurrentTerm()
	if i.appliedTerm.Load() != term {
		return 0, fmt.Errorf("read of %s: no entry of term %d applied yet: %w", g.cfg.Group, term, trivet.ErrUnavailable)
	}
	if !i.enter() {
		return 0, fmt.Errorf("read of %s: it stops: %w", g.cfg.Group, trivet.ErrNotLeader)
	}
	r := i.join()
	i.leave()
	select {
	case <-r.done:
	case <-ctx.Done():
		return 0, fmt.Errorf("read of %s: wait for a quorum: %w", g.cfg.Group, ctx.Err())
	}
	switch {
	case r.err != nil:
		return 0, fmt.Errorf("read of %s: %w", g.cfg.Group, r.err)
	case r.term != term || i.r.State() != raft.Leader || i.r.CurrentTerm() != term:
		return 0, fmt.Errorf("read of %s: term %d is over: %w", g.cfg.Group, term, trivet.ErrNotLeader)
	}
	return term, nil
}
