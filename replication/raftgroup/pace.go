package raftgroup

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/hashicorp/raft"

	"github.com/trivet-csi/trivet"
)

// The pace of groups.
//
// The library has timers and goroutines of its own for each group: a heartbeat every 0.1 to 0.2 Heartbeats for each
// follower, a look at the leader's contacts, each follower's election timer. With hundreds of idle groups their
// wake-ups are all that a node does. So they are set to never, and one tick for all groups of a node does it in
// their place: what is due for a group costs no wake-up, timer or goroutine of its own.
//
//   - A leader's heartbeats leave every beatEvery, those of all groups to a node as one message (coalesce.go).
//   - A leader that has heard of no quorum for quorumShare of a Heartbeat resigns: its transport answers the
//     library so that it steps down (deny), with its term as it is (raft.go:856, replication.go:646).
//   - A follower that has heard nothing for 1 to 1.5 Heartbeats searches for a leader (failover.go). To ask the
//     others first is the pre-vote (Ongaro's thesis, 9.6): nobody's term rises before a quorum agrees.
//   - A candidate that is not elected within 1 to 1.8 Heartbeats withdraws, and searches again. One that finds
//     another voter in a newer term takes that over first, as it would from the answer to a pre-vote.
//
// A follower's promise stays what it was: for a Heartbeat from each contact on it helps nobody else (lease.go).
const (
	// libraryNever is longer than anything takes. Its tenth must be, too.
	libraryNever = 1000 * time.Hour

	// ticksN is how many ticks a Heartbeat has.
	ticksN = 10
	// beatShare is how much of a lease, in per cent, lies between two heartbeats: 0.4 Heartbeats by default. The lease
	// outlives an answer that is late, and a follower's patience a heartbeat that is lost.
	beatShare = 54
	// quorumShare is how much of a Heartbeat, in per cent, a leader does without a quorum: it has given up when
	// its followers begin to search.
	quorumShare = 90
	// searchExtra and candidateExtra are what is drawn at random on top of a Heartbeat, in per cent of it.
	searchExtra    = 50
	candidateExtra = 80
)

// pacer is the tick of a node's groups. It runs while there are any.
type pacer struct {
	began time.Time // ticks and heartbeats are in step from here on

	mu    sync.Mutex // held over a tick, which never waits
	timer *time.Timer
	every time.Duration // 0: there are no groups
}

// pace is what the tick remembers of one run of the library.
type pace struct {
	state   raft.RaftState
	term    uint64
	since   time.Time // of state and term
	beaten  int64     // number of the last heartbeat's turn
	patient time.Duration
	sure    time.Time // as a leader: until then a quorum was heard of recently enough
	lonely  bool      // as forsaken says
}

// pulse is a heartbeat that is due, and whose it is.
type pulse struct {
	beat
	i    *instance
	term uint64
}

func tickEvery(t Timing) time.Duration { return max(t.Heartbeat/ticksN, time.Millisecond) }

// beatEvery is a whole number of ticks, so that the heartbeats of all groups fall together.
func beatEvery(t Timing) time.Duration {
	tick := tickEvery(t)
	return max(t.Lease*beatShare/100/tick, 1) * tick //nolint:durationcheck // the quotient is a number
}

// setPace starts, adapts or stops the tick.
func (m *Mux) setPace() {
	every := time.Duration(0)
	for _, g := range m.groups() {
		if e := tickEvery(g.cfg.Timing); every == 0 || e < every {
			every = e
		}
	}
	p := &m.pacer
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.every == every {
		return
	}
	p.every = every
	if p.timer == nil {
		p.timer = time.AfterFunc(p.nextLocked(), m.tick)
		return
	}
	p.timer.Stop()
	if every > 0 {
		p.timer.Reset(p.nextLocked())
	}
}

func (p *pacer) nextLocked() time.Duration { return p.every - time.Since(p.began)%p.every }

// tick does what is due for all groups of this node.
func (m *Mux) tick() {
	p := &m.pacer
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.every == 0 {
		return
	}
	now := time.Now()
	due := make(map[trivet.NodeID][]pulse)
	for _, g := range m.groups() {
		if g.tight() {
			g.pokeCompact() // who appends nothing any more keeps too much as well
		}
		if i := g.running(); i != nil && i.enter() {
			i.tick(now, due)
			i.leave()
		}
	}
	for node, pulses := range due {
		for len(pulses) > 0 {
			n := min(len(pulses), beatsMax)
			go m.carry(node, pulses[:n:n]) // ends after a Heartbeat at the latest
			pulses = pulses[n:]
		}
	}
	p.timer.Reset(p.nextLocked())
}

// carry sends heartbeats and hands out their answers.
func (m *Mux) carry(node trivet.NodeID, pulses []pulse) {
	beats := make([]beat, len(pulses))
	sent := make([]instant, len(pulses)) // from here the leases count
	timeout := time.Duration(0)
	for k, p := range pulses {
		beats[k], sent[k] = p.beat, p.i.g.now()
		timeout = max(timeout, p.i.g.cfg.Timing.Heartbeat)
	}
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	for k, a := range m.sendBeats(ctx, node, beats) {
		pulses[k].answered(sent[k], a)
	}
}

// answered takes over the answer to a heartbeat.
func (p pulse) answered(sent instant, a beatAnswer) {
	g := p.i.g
	var r appendReply
	err := a.err
	if err == nil {
		r, err = decodeAppendReply(a.body)
	}
	if err != nil {
		g.log.Debug("heartbeat failed", "peer", string(p.to), "term", p.term, "err", err)
		return
	}
	p.i.t.silence.beat(p.to)
	g.lease.setStamp(p.to, r.stamp)
	switch {
	case r.success && r.term == p.term:
		g.lease.acked(p.term, p.to, sent, r.promise, 0)
	case r.term > p.term && p.i.enter():
		p.i.resign(p.term, fmt.Sprintf("replica %s is in term %d", p.to, r.term))
		p.i.leave()
	}
}

// tick does what is due for one group.
func (i *instance) tick(now time.Time, due map[trivet.NodeID][]pulse) {
	term, state := i.r.CurrentTerm(), i.r.State()
	if i.r.CurrentTerm() != term {
		return // next time
	}
	p := &i.pace
	if p.since.IsZero() || p.state != state || p.term != term {
		i.pace = pace{state: state, term: term, since: now, beaten: -1, lonely: p.lonely}
		i.drawPatience()
	}
	if lonely := i.forsaken(); lonely != p.lonely {
		p.lonely = lonely
		i.g.poke()
	}
	if state != raft.Leader {
		i.stir(false)
	}
	switch state {
	case raft.Leader:
		i.tickLeader(now, due)
	case raft.Follower:
		i.tickFollower(now)
	case raft.Candidate:
		i.tickCandidate(now)
	}
}

// drawPatience draws how long this replica waits as a follower or candidate.
func (i *instance) drawPatience() {
	beat, extra := i.g.cfg.Timing.Heartbeat, i.g.cfg.Timing.Heartbeat*searchExtra/100
	if i.pace.state == raft.Candidate {
		extra = beat * candidateExtra / 100
	}
	i.pace.patient = beat + rand.N(extra) //nolint:gosec // no secret
}

// tickLeader sends the heartbeats that are due, and looks for a quorum.
func (i *instance) tickLeader(now time.Time, due map[trivet.NodeID][]pulse) {
	p, timing := &i.pace, i.g.cfg.Timing
	turn := int64(now.Sub(i.g.cfg.Network.pacer.began) / beatEvery(timing))
	i.stir(turn != p.beaten)
	// A leader whose disk hangs must not be kept in office by heartbeats (D8).
	if turn != p.beaten && i.t.mute() == nil && i.t.resigned.Load() != p.term {
		p.beaten = turn
		if members := i.g.store.latestConfig().members; len(members) > 1 {
			i.beat(members, due)
		}
	}
	without := timing.Heartbeat * quorumShare / 100
	if now.Sub(p.since) < without || now.Before(p.sure) {
		return
	}
	heard, ok := i.g.lease.quorumHeard(p.term, i.g.cfg.Replica, i.g.store.latestConfig().members, now)
	if p.sure = heard.Add(without); !ok || !now.Before(p.sure) {
		i.resign(p.term, "no quorum answers")
	}
}

// beat puts a heartbeat to each other member among what is due.
func (i *instance) beat(members []Member, due map[trivet.NodeID][]pulse) {
	term, self := i.pace.term, i.g.cfg.Replica
	body := encodeEmptyAppend(&raft.AppendEntriesRequest{Term: term})
	for _, m := range members {
		if m.Replica == self {
			continue
		}
		due[m.Node] = append(due[m.Node], pulse{
			beat: beat{group: i.g.cfg.Group, from: self, to: m.Replica, body: body}, i: i, term: term,
		})
	}
}

// resign makes this replica lead no more in a term. The library asks its followers whether it leads, at once, and
// hears that it does not, from them or from the next AppendEntries.
func (i *instance) resign(term uint64, why string) {
	if i.t.resigned.Swap(term) == term {
		return
	}
	i.g.log.Info("replica gives up leading", "term", term, "why", why)
	i.t.rests.wake()
	i.r.VerifyLeader() //nolint:forbidigo // for what it makes the library do: nobody reads the answer
}

// tickFollower searches for a leader when there has been none for long enough.
func (i *instance) tickFollower(now time.Time) {
	p := &i.pace
	contact := i.r.LastContact()
	for _, t := range []time.Time{i.began, i.searched} {
		if t.After(contact) {
			contact = t
		}
	}
	if now.Sub(contact) < p.patient || i.searching.Load() > 0 {
		return
	}
	me, member := findMember(i.g.store.latestConfig().members, i.g.cfg.Replica)
	if !member || me.Learner {
		return
	}
	leader, _ := i.r.LeaderWithID()
	i.drawPatience()
	i.searched = now
	i.search(vacancy{leader: leader, term: p.term, silent: true})
}

// tickCandidate withdraws a candidacy that has come to nothing. To the library that is what a request for votes in the
// next term does, from a member whose log is too old for it to have the vote.
func (i *instance) tickCandidate(now time.Time) {
	p := &i.pace
	if now.Sub(p.since) < p.patient || i.searching.Load() > 0 {
		return
	}
	for _, m := range i.g.store.latestConfig().members {
		if m.Learner || m.Replica == i.g.cfg.Replica {
			continue
		}
		i.drawPatience()
		p.since = now
		term := p.term
		i.searching.Add(1)
		i.loops.Go(func() {
			defer i.searching.Add(-1)
			i.withdraw(term, m)
		})
		return
	}
}

// withdraw ends a candidacy.
func (i *instance) withdraw(term uint64, other Member) {
	if i.r.State() == raft.Candidate && i.r.CurrentTerm() == term {
		i.adopt(term+1, other.Replica)
	}
}

// adopt makes the library a follower of a newer term, as a request for votes in it from a member does. No vote is
// given: the log that it names is empty.
func (i *instance) adopt(term uint64, from trivet.ReplicaID) {
	m, ok := findMember(i.g.store.latestConfig().members, from)
	if !ok {
		return
	}
	ctx, cancel := context.WithTimeout(i.t.ctx, i.g.cfg.Timing.Heartbeat)
	defer cancel()
	addr := []byte(address(m.Replica, m.Node))
	_, err := i.deliver(ctx, &raft.RequestVoteRequest{
		Candidate: addr, //nolint:staticcheck // the library still reads it
		RPCHeader: raft.RPCHeader{ProtocolVersion: raft.ProtocolVersionMax, ID: []byte(m.Replica), Addr: addr},
		Term:      term, LeadershipTransfer: true, // whatever leader it had: it has been silent
	})
	if err != nil {
		i.g.log.Debug("term not adopted", "term", term, "err", err)
	}
}

// forsaken reports whether this replica is a follower that has heard nothing for two Heartbeats. The library goes on
// naming the leader that it had.
func (i *instance) forsaken() bool {
	return i.r.State() == raft.Follower && time.Since(i.r.LastContact()) >= 2*i.g.cfg.Timing.Heartbeat
}
