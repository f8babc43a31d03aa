package raftgroup

import (
	"sync"
	"sync/atomic"

	"github.com/hashicorp/raft"

	"github.com/trivet-csi/trivet"
)

// Rest. The library sends each follower an AppendEntries every CommitTimeout, with or without anything to tell, which
// in a group with nothing to do is a timer, a goroutine that wakes up and an entry read for nothing. A call that
// would tell its follower nothing (peerTransport.spare) is answered here, and not at once: it rests, and the
// library's replicator with it, until it may have something to tell. What ends the rest:
//
//   - an append to the leader's log (logStore.onAppend), which is what the library wakes its replicators for as well;
//   - what the tick of all groups finds (pace.go): the commit index rose, this replica leads no more or has to give
//     up, the follower stopped answering heartbeats, was started anew, or was told long ago;
//   - the end of this run of the library.
//
// The library hears "success" then, and goes on as it does: it sends what there is, now or after a CommitTimeout. To a
// follower that should be told again the call is sent after all.
type resting struct {
	n atomic.Int32 // calls

	mu    sync.Mutex
	calls map[trivet.ReplicaID]told // one for each follower, as it was told
	term  uint64                    // of all of them
	woken chan struct{}             // closed when they should look; nil when none rests
}

// enter counts a call as resting. The channel is closed when it should look whether to rest on.
func (r *resting) enter(id trivet.ReplicaID, term uint64, what told) <-chan struct{} {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.woken == nil {
		r.woken, r.calls = make(chan struct{}), make(map[trivet.ReplicaID]told)
	}
	r.calls[id], r.term = what, term
	r.n.Store(int32(len(r.calls)))
	return r.woken
}

// leave takes enter back, unless wake has.
func (r *resting) leave(id trivet.ReplicaID, woken <-chan struct{}) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.woken == woken {
		delete(r.calls, id)
		r.n.Store(int32(len(r.calls)))
	}
}

// wake ends the rest of all calls: those that have nothing to tell even so enter again.
func (r *resting) wake() {
	if r.n.Load() == 0 {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.wakeLocked()
}

func (r *resting) wakeLocked() {
	if r.woken != nil {
		close(r.woken)
	}
	r.woken, r.calls = nil, nil // enter makes new ones
	r.n.Store(0)
}

// rest returns when a call that was spared may have something to tell, or the library should be asked: true; false when
// the call should be sent after all.
func (t *peerTransport) rest(id trivet.ReplicaID, req *raft.AppendEntriesRequest,
	resp *raft.AppendEntriesResponse,
) bool {
	for {
		woken := t.rests.enter(id, req.Term, told{match: req.PrevLogEntry, commit: req.LeaderCommitIndex})
		// After enter, so that nothing that happens from here on is missed.
		if t.mayTell(req) {
			t.rests.leave(id, woken)
			return true
		}
		if !t.spare(id, req, resp) {
			t.rests.leave(id, woken)
			return false
		}
		select {
		case <-woken:
		case <-t.ctx.Done():
			return true
		}
	}
}

// mayTell reports whether the library may have more to tell than a request that was made before, or should hear that
// it leads no more.
func (t *peerTransport) mayTell(req *raft.AppendEntriesRequest) bool {
	i := t.g.running()
	if i == nil || i.t != t || i.r.State() != raft.Leader || i.r.CurrentTerm() != req.Term ||
		t.resigned.Load() == req.Term || t.commit(i) > req.LeaderCommitIndex {
		return true
	}
	_, last := t.g.seglog.bounds()
	return last > req.PrevLogEntry
}

// commit is the index that a leader's messages say is committed (gate 3).
func (t *peerTransport) commit(i *instance) uint64 {
	return min(i.r.CommitIndex(), t.g.store.durable.index())
}

// stir wakes the calls that rest when one of them may have something to tell. turn: it is also time to look at how
// the followers are.
func (i *instance) stir(turn bool) {
	r := &i.t.rests
	if r.n.Load() == 0 {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if i.pace.state != raft.Leader || r.term != i.pace.term {
		r.wakeLocked()
		return
	}
	for id, what := range r.calls {
		if i.r.CommitIndex() > what.commit && i.t.commit(i) > what.commit || turn && !i.t.informed(id, r.term, what) {
			r.wakeLocked()
			return
		}
	}
}
