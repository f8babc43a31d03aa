package sim

import (
	"encoding/binary"
	"fmt"
	"sync"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/engine/segment"
	"github.com/trivet-csi/trivet/replication/transport"
)

// ballots knows who has asked for votes, in which terms. A vote on a disk is for somebody who did: one that
// joins the term of one election and the candidate of another was torn by a crash, and would be given again
// whatever the candidate's log lacks (D5). So rare is the election in which that loses something that a run would
// hardly see one: the disk shows it at the next boot.
type ballots struct {
	c *Cluster

	mu      sync.Mutex
	asked   map[ballot]bool
	waiting map[trivet.NodeID]func() // called at the next request of or to a machine, once
}

// ballot is a candidacy: an address, as votes name it (raftgroup: replica@node), and the term.
type ballot struct {
	candidate string
	term      uint64
}

// watchVotes has all requests for votes noted from now on.
func watchVotes(c *Cluster) *ballots {
	b := &ballots{c: c, asked: map[ballot]bool{}, waiting: map[trivet.NodeID]func(){}}
	c.Net.Lose(b.see)
	return b
}

// see is a transport.Match that matches nothing. The term stands behind the version of the body's format
// (raftgroup/wire.go, voteRequest).
func (b *ballots) see(e transport.Envelope) bool {
	if e.Reply || e.Message.Kind != transport.KindRequestVote || len(e.Message.Body) < 1+8 {
		return false
	}
	vote := ballot{fmt.Sprintf("%s@%s", e.Message.From, e.From), binary.LittleEndian.Uint64(e.Message.Body[1:])}
	b.mu.Lock()
	b.asked[vote] = true
	var calls []func()
	for _, id := range []trivet.NodeID{e.From, e.To} {
		if f := b.waiting[id]; f != nil {
			delete(b.waiting, id)
			calls = append(calls, f)
		}
	}
	b.mu.Unlock()
	for _, f := range calls {
		f()
	}
	return false
}

// await calls f when a machine gets or sends a request for a vote the next time, unless release was called.
func (b *ballots) await(id trivet.NodeID, f func()) (release func()) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.waiting[id] = f
	return func() {
		b.mu.Lock()
		defer b.mu.Unlock()
		delete(b.waiting, id)
	}
}

// check looks at the vote on the disk of a machine that boots. A candidate's first vote is its own, perhaps
// before it has asked anybody.
func (b *ballots) check(n *Node, log *segment.Log) {
	s := log.Group(volumeID).Stable()
	own := fmt.Sprintf("%s@%s", n.ReplicaID(), n.id)
	if s.Vote == "" || s.Vote == own {
		return
	}
	b.mu.Lock()
	asked := b.asked[ballot{s.Vote, s.VoteTerm}]
	b.mu.Unlock()
	if asked || n.swapped.Load() {
		return
	}
	b.c.fail(fmt.Errorf("the disk of %s holds a vote for %s in term %d, who has not stood in it",
		n.id, s.Vote, s.VoteTerm))
}
