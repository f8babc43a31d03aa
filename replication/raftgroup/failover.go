package raftgroup

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/hashicorp/raft"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/replication/transport"
)

// Fast failover.
//
// A follower that has heard nothing of its leader for 1 to 1.5 Heartbeats looks for another one (pace.go).
// When the transport knows that the leader's process is dead, there is nothing to wait for: one voter
// is made to stand at once, as by a leader that hands over. It asks the others first: whoever has the
// newest log stands, the next one 50 ms later if there is still no leader, and nobody before a quorum
// has the same proof, for the others would not vote.
//
// That skips pre-vote and the rule that a follower with a leader votes for nobody else, on which the
// read lease rests (lease.go). Hence a voter takes part only if it holds the proof itself: its own
// transport says that the process of its own leader is gone. A process that is gone serves no reads.
// Silence alone proves less: it counts once this replica has heard nothing for a Heartbeat, when its
// promise to the leader has run out anyway.

// failoverStep is the time that each voter gives to those with a better claim, and that a question to
// one of them may take.
const failoverStep = 50 * time.Millisecond

// canvassEvery is how soon the others are asked again while no quorum has the proof: they find it out
// within milliseconds of each other. After canvassOftenN times they are asked every failoverStep.
const (
	canvassEvery  = 5 * time.Millisecond
	canvassOftenN = 20
	// canvassSilentN is how often in a Heartbeat the others are asked about a leader that is merely silent.
	canvassSilentN = 3
)

// candidacy says why a replica asks for votes.
type candidacy uint8

const (
	byElection candidacy = iota // by the library's own timers, after a pre-vote; not done any more
	byTransfer                  // the leader asked it to; the leader's lease is void
	byProof                     // the leader's process is dead, or the leader silent
)

// obituary is what the transport said last of a node's process.
type obituary struct {
	at     time.Time
	silent bool // nothing was heard of it; else it is certain that the process has ended
	back   bool // another process runs there since
}

// deaths are the nodes whose process has ended since this one began.
type deaths struct {
	mu   sync.Mutex
	last map[trivet.NodeID]obituary
}

// note takes over what the transport says and reports whether a process ended.
func (d *deaths) note(p transport.Presence) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	o, known := d.last[p.Node]
	switch {
	case p.State == transport.Gone:
		d.last[p.Node] = obituary{at: time.Now(), silent: p.Silent}
		return true
	case p.State == transport.Alive && known && o.silent:
		delete(d.last, p.Node) // it was not dead
	case p.State == transport.Alive && known:
		o.back = true
		d.last[p.Node] = o
	}
	return false
}

func (d *deaths) of(node trivet.NodeID) (obituary, bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	o, ok := d.last[node]
	return o, ok
}

// presence hears of the processes of other nodes. It must not block.
func (m *Mux) presence(p transport.Presence) {
	if !m.deaths.note(p) {
		return
	}
	for _, g := range m.groups() {
		g.peerGone(p.Node)
	}
}

// peerGone starts the search for a successor if the node is the leader's.
func (g *Group) peerGone(node trivet.NodeID) {
	i := g.running()
	if i == nil || !i.enter() {
		return
	}
	defer i.leave()
	addr, _ := i.r.LeaderWithID()
	if _, leader, err := parseAddress(addr); err != nil || leader != node {
		return
	}
	i.search(vacancy{leader: addr, node: node, term: i.r.CurrentTerm()})
}

// search starts a search for a leader. REQUIRES: between enter and leave, or no other goroutine knows i.
func (i *instance) search(v vacancy) {
	i.searching.Add(1)
	i.loops.Go(func() {
		defer i.searching.Add(-1)
		i.succeed(v)
	})
}

// vacancy is the office of a leader whose process is said to be gone, or of none yet.
type vacancy struct {
	leader raft.ServerAddress // "" when this replica has heard of no leader since it started
	node   trivet.NodeID
	term   uint64
	silent bool // nothing was heard of the leader, whatever its process does (pace.go)
}

// vacant reports whether the office is still that leader's, and this replica a voter that follows it.
func (i *instance) vacant(v vacancy) bool {
	me, _ := findMember(i.g.store.latestConfig().members, i.g.cfg.Replica)
	addr, _ := i.r.LeaderWithID()
	return me.Replica != "" && !me.Learner && i.r.State() == raft.Follower && i.r.CurrentTerm() == v.term &&
		addr == v.leader && i.g.guard.failed() == nil && !i.g.guard.stalled()
}

// succeed makes this replica stand for election if no voter with a better claim does. It gives up after two
// Heartbeats; pace.go begins again.
func (i *instance) succeed(v vacancy) {
	if !i.sleep(time.Until(i.quarantine)) {
		return
	}
	began := time.Now()
	var proven time.Time // when a quorum first had the proof: whoever has a better claim stands from then on
	for round := 0; time.Since(began) < 2*i.g.cfg.Timing.Heartbeat; round++ {
		if !i.vacant(v) {
			return
		}
		better, known, err := i.canvass(v)
		if err != nil {
			i.g.log.Debug("no failover", "term", v.term, "err", err)
			return
		}
		wait := canvassEvery
		switch {
		case v.silent: // may go on for as long as a partition does
			wait = i.g.cfg.Timing.Heartbeat / canvassSilentN
		case round > canvassOftenN:
			wait = failoverStep
		}
		if known {
			if proven.IsZero() {
				proven = time.Now()
			}
			if wait = time.Until(proven.Add(time.Duration(better) * failoverStep)); wait <= 0 {
				if err := i.stand(v); err != nil {
					i.g.log.Warn("could not stand for election", "term", v.term, "err", err)
				}
				return
			}
		}
		if !i.sleep(wait) {
			return
		}
	}
}

// sleep waits for d and reports whether this run of the library still goes on.
func (i *instance) sleep(d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-i.stopping:
		return false
	}
}

// canvass asks the other voters. better is how many have a better claim to the office than this
// replica; proven says that a quorum, this replica included, knows that the leader is gone. An error
// means that somebody is past the leader's term.
func (i *instance) canvass(v vacancy) (better int, proven bool, err error) {
	members := i.g.store.latestConfig().members
	mine := i.standing(v.term)
	type answer struct {
		from trivet.ReplicaID
		standing
	}
	answers := make(chan answer, len(members))
	asked := 0
	for _, m := range members {
		if m.Learner || m.Node == v.node || m.Replica == i.g.cfg.Replica {
			continue
		}
		asked++
		go func() { // answers has room; the call ends with the instance or after failoverStep
			b, err := i.t.call(raft.ServerID(m.Replica), address(m.Replica, m.Node), transport.KindStanding,
				standingRequest{term: v.term}.encode(), failoverStep)
			var s standing
			if err == nil {
				s, err = decodeStanding(b)
			}
			if err != nil {
				s = standing{}
			}
			answers <- answer{m.Replica, s}
		}()
	}
	knowing := 0
	if mine.proven {
		knowing++
	}
	for range asked {
		a := <-answers
		if a.term > v.term {
			if v.silent && i.leaderless() {
				i.adopt(a.term, a.from)
			}
			return 0, false, fmt.Errorf("replica %s is in term %d, the leader was of %d: %w", a.from, a.term, v.term,
				errors.ErrUnsupported)
		}
		if !a.proven {
			continue
		}
		knowing++
		if a.log.newer(mine.log) || a.log == mine.log && a.from < i.g.cfg.Replica {
			better++
		}
	}
	return better, mine.proven && knowing >= voterN(members)/2+1, nil
}

// standing returns what this replica says of itself to one that asks about the leader of a term. One
// that has no leader would vote without any proof, but for a while after a restart.
func (i *instance) standing(term uint64) standing {
	s := standing{term: i.r.CurrentTerm(), log: i.logEnd()}
	leader, _ := i.r.LeaderWithID()
	switch {
	case i.r.State() == raft.Leader || s.term > term:
	case leader == "":
		s.proven = !time.Now().Before(i.quarantine)
	default:
		s.proven = i.leaderGone() // also in an older term: the library names its last leader until it has another
	}
	return s
}

// logEnd returns the end of the log, as an election compares it.
func (i *instance) logEnd() logPosition {
	_, last := i.g.seglog.bounds()
	if snap := i.g.snaps.record(); snap.index >= last {
		return logPosition{term: snap.term, index: snap.index}
	}
	term, _ := i.g.seglog.term(last)
	return logPosition{term: term, index: last}
}

// leaderGone reports whether this replica, which follows a leader, holds the proof that the leader's process is gone,
// or has heard nothing of the leader for a Heartbeat: then it has promised nothing any more (lease.go).
func (i *instance) leaderGone() bool {
	if i.r.State() == raft.Leader {
		return false
	}
	addr, _ := i.r.LeaderWithID()
	_, node, err := parseAddress(addr)
	if err != nil {
		return false
	}
	contact := i.r.LastContact()
	if time.Since(contact) >= i.g.cfg.Timing.Heartbeat {
		return true
	}
	o, known := i.g.cfg.Network.deaths.of(node)
	switch {
	case !known || o.silent:
		return false
	case o.back: // another process: is it that one which we follow?
		return contact.Before(o.at)
	default:
		return true
	}
}

// leaderless reports whether this replica has no leader, or none that it has heard of for a Heartbeat.
func (i *instance) leaderless() bool {
	addr, _ := i.r.LeaderWithID()
	return i.r.State() != raft.Leader && (addr == "" || i.leaderGone())
}

// stand makes the library stand for election, as when the leader hands over.
func (i *instance) stand(v vacancy) error {
	i.fast.Lock()
	i.fastClosed = time.Now().Add(i.g.cfg.Timing.Heartbeat)
	i.fast.Unlock()
	ctx, cancel := context.WithTimeout(context.Background(), i.g.cfg.Timing.Heartbeat)
	defer cancel()
	// The library stands in the next term, and only once: a later candidacy is by its own timer.
	i.t.proofTerm.Store(v.term + 1)
	if !i.vacant(v) {
		return nil
	}
	i.g.log.Info("standing for election at once", "lost", string(v.node), "term", v.term)
	_, err := i.deliver(ctx, &raft.TimeoutNowRequest{RPCHeader: raft.RPCHeader{
		ProtocolVersion: raft.ProtocolVersionMax, ID: []byte(i.g.cfg.Replica), Addr: []byte(i.g.addr),
	}})
	return err
}

// handover is what a leader announces before it makes another replica stand.
type handover struct {
	term  uint64 // of the leader
	to    trivet.ReplicaID
	until time.Time
}

// announce tells the other voters, itself included, whom this leader hands over to: they refuse the
// privilege of such a candidate to anybody else. Who cannot be reached votes by the ordinary rules.
func (i *instance) announce(term uint64, to trivet.ReplicaID) {
	i.noteHandover(term, to)
	body := transferNotice{term: term, to: to}.encode()
	var wg sync.WaitGroup
	for _, m := range i.g.store.latestConfig().members {
		if m.Learner || m.Replica == i.g.cfg.Replica || m.Replica == to {
			continue
		}
		wg.Go(func() {
			_, err := i.t.call(raft.ServerID(m.Replica), address(m.Replica, m.Node), transport.KindTransfer, body, failoverStep)
			if err != nil {
				i.g.log.Debug("handover not announced", "peer", string(m.Replica), "err", err)
			}
		})
	}
	wg.Wait()
}

func (i *instance) noteHandover(term uint64, to trivet.ReplicaID) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.handover = handover{term: term, to: to, until: time.Now().Add(transferVoid * i.g.cfg.Timing.Heartbeat)}
}

// onTransfer takes note of the announcement of this replica's own leader.
func (i *instance) onTransfer(header raft.RPCHeader, body []byte) ([]byte, error) {
	n, err := decodeTransferNotice(body)
	if err != nil {
		return nil, err
	}
	_, leader := i.r.LeaderWithID()
	if string(leader) != string(header.ID) || n.term != i.r.CurrentTerm() {
		return nil, fmt.Errorf("handover of %s in term %d, own leader is %q of term %d: %w", header.ID, n.term,
			string(leader), i.r.CurrentTerm(), trivet.ErrInvalid)
	}
	i.noteHandover(n.term, n.to)
	return verdict{term: n.term, yes: true}.encode(), nil
}

// privileged reports whether a candidate may have this replica's vote although there is a leader.
func (i *instance) privileged(v voteRequest, candidate trivet.ReplicaID) bool {
	switch v.why {
	case byTransfer:
		i.mu.Lock()
		defer i.mu.Unlock()
		h := i.handover
		return h.to == candidate && v.term == h.term+1 && time.Now().Before(h.until)
	case byProof, byElection: // the library has a leader until it hears of another one
		return i.leaderGone()
	default:
		return false
	}
}

// onStanding answers a replica that canvasses.
func (i *instance) onStanding(body []byte) ([]byte, error) {
	req, err := decodeStandingRequest(body)
	if err != nil {
		return nil, err
	}
	return i.standing(req.term).encode(), nil
}
