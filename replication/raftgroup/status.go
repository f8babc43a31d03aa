package raftgroup

import (
	"maps"
	"time"

	"github.com/hashicorp/raft"

	"github.com/trivet-csi/trivet"
)

// Status is a replica's view of its group.
type Status struct {
	Leader     trivet.ReplicaID // "" unknown
	LeaderNode trivet.NodeID
	IsLeader   bool
	Term       uint64
	Commit     uint64
	Applied    uint64
	LastIndex  uint64
	LastTerm   uint64   // of the entry at LastIndex
	Members    []Member // the newest configuration, committed or not
	// Match: on the leader, last acknowledged index per replica (from our transport).
	Match map[trivet.ReplicaID]uint64
	// Damaged is how many entries of its log the replica cannot read and waits to get from other members; it does not run
	// meanwhile. WholeIndex and WholeTerm are where the log ends before the first of them that the state machine does
	// not have; LastIndex and LastTerm when there is none.
	Damaged               int
	WholeIndex, WholeTerm uint64
	// CatchUp is set while the replica pulls what it missed from another one, and does not run.
	CatchUp CatchUp
}

// view is what Changed tells changes of.
type view struct {
	leader   raft.ServerAddress
	isLeader bool
	term     uint64
	lost     chan struct{} // of a leader: closed when it leads no more
}

// Status returns the current view. Between two runs of the library it has no leader.
func (g *Group) Status() Status {
	applied, _ := g.cfg.Machine.Applied()
	_, last := g.seglog.bounds()
	s := Status{
		Term: g.stable.record().term, Applied: applied, LastIndex: max(last, g.snaps.record().index),
		Members: sortedMembers(g.store.latestConfig().members), CatchUp: g.catch.status(),
	}
	if term, ok := g.seglog.term(s.LastIndex); ok {
		s.LastTerm = term
	} else {
		s.LastTerm = g.snaps.record().term
	}
	s.WholeIndex, s.WholeTerm = s.LastIndex, s.LastTerm
	i := g.running()
	if i == nil {
		g.addDamage(&s)
		return s
	}
	v := g.look(i)
	s.IsLeader, s.Commit = v.isLeader, i.r.CommitIndex()
	if id, node, err := parseAddress(v.leader); err == nil {
		s.Leader, s.LeaderNode = id, node
	}
	if s.IsLeader {
		s.Match = maps.Clone(g.lease.matches(s.Term))
	}
	return s
}

// addDamage tells of holes in the log.
func (g *Group) addDamage(s *Status) {
	holes := g.holes.all()
	s.Damaged = len(holes)
	for _, index := range holes {
		if index <= s.Applied {
			continue
		}
		s.WholeIndex = index - 1
		term, ok := g.seglog.term(s.WholeIndex)
		if rec := g.snaps.record(); !ok && rec.index == s.WholeIndex {
			term = rec.term
		}
		s.WholeTerm = term
		return
	}
}

// Changed is closed at the next change of leader or term.
func (g *Group) Changed() <-chan struct{} {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.changed
}

// leadership is closed when this replica stops leading; nil, which never is, when it does not lead.
func (g *Group) leadership() <-chan struct{} {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.view.lost
}

// poke makes the watcher look. It never blocks.
func (g *Group) poke() {
	select {
	case g.wake <- struct{}{}:
	default:
	}
}

// look reads the state of the library. A replica whose disk hangs does not lead (D8).
func (g *Group) look(i *instance) view {
	if i == nil {
		return view{term: g.stable.record().term}
	}
	addr, _ := i.r.LeaderWithID()
	v := view{leader: addr, term: i.r.CurrentTerm()}
	v.isLeader = i.r.State() == raft.Leader && !g.guard.stalled()
	if addr == g.addr && !v.isLeader || i.forsaken() {
		v.leader = ""
	}
	return v
}

// watch follows leader and term. It compares states rather than counting edges, which the library
// may drop.
func (g *Group) watch() {
	var confirming uint64 // newest term in which this replica was seen to lead
	for {
		select {
		case <-g.wake:
		case <-g.stop:
			return
		}
		i := g.running()
		v := g.look(i)
		if g.notify(v) && v.isLeader && v.term > confirming && i.enter() {
			g.log.Info("replica leads", "term", v.term)
			confirming = v.term
			i.loops.Go(func() { i.confirm(v.term) })
			i.leave()
		}
	}
}

// notify takes over a view and tells of changes. It reports whether there was one.
func (g *Group) notify(v view) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	old := g.view
	if old.leader == v.leader && old.isLeader == v.isLeader && old.term == v.term && !g.closed {
		return false
	}
	if old.isLeader && (!v.isLeader || v.term != old.term) {
		close(old.lost)
		old.lost = nil
	}
	if v.isLeader {
		if v.lost = old.lost; v.lost == nil {
			v.lost = make(chan struct{})
		}
	}
	g.view = v
	close(g.changed)
	g.changed = make(chan struct{})
	return true
}

// confirm waits until an entry of this term is applied here: until then the state may lack what an
// earlier leader acknowledged. The library's no-op never reaches the state machine, so it is a
// barrier that tells.
func (i *instance) confirm(term uint64) {
	for {
		if i.r.State() != raft.Leader || i.r.CurrentTerm() != term || !i.enter() {
			return
		}
		err := i.r.Barrier(i.g.enqueueWait()).Error()
		i.leave()
		// Terms only rise: if it is the same now, the barrier was of this term.
		if err == nil && i.r.CurrentTerm() == term {
			i.appliedTerm.Store(term)
			return
		}
		timer := time.NewTimer(i.g.cfg.Timing.Heartbeat / 10)
		select {
		case <-timer.C:
		case <-i.stopping:
			timer.Stop()
			return
		}
	}
}
