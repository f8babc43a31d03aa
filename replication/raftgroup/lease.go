package raftgroup

import (
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/hashicorp/raft"

	"github.com/trivet-csi/trivet"
)

// The read lease.
//
// A follower that answered an AppendEntries or heartbeat of term T with success has a leader, and
// has just noted the contact; for one Heartbeat from then on it votes for nobody else and does not
// stand itself (raft.go:1647, 1673; a restarted one is held to the same by instance.quarantine).
// Only success counts: a rejected AppendEntries does not renew the contact (raft.go:1588). So while
// a quorum of voters, this leader among them, answered requests that were *sent* less than Lease <
// Heartbeat ago, no other replica can have been elected. Nonvoters count for nothing (D3), and a
// held reply is worth what its sending time is worth (D4).
//
// A transfer of leadership skips those rules, so the lease is void from before it begins until the
// transfer can no longer take effect. Age is measured on two clocks and both must agree: the
// monotonic one, and one that counts the time in which the machine was suspended.

// instant is a moment on both clocks.
type instant struct {
	mono time.Time
	boot time.Duration
}

// since returns the larger of the two ages.
func (a instant) since(b instant) time.Duration { return max(a.mono.Sub(b.mono), a.boot-b.boot) }

// leaseTable is what a leader knows of its followers in one term.
type leaseTable struct {
	mu     sync.Mutex
	term   uint64
	acks   map[trivet.ReplicaID]ack
	match  map[trivet.ReplicaID]uint64
	told   map[trivet.ReplicaID]told
	stamps map[trivet.ReplicaID]stamp // newest clock reading of each follower, of any term

	voidTerm  uint64    // in which a transfer was tried
	transfers int       // of that term, under way
	voidUntil time.Time // after one that failed
}

type ack struct {
	sent    instant
	heard   time.Time
	promise time.Duration
}

// stamp is a clock reading of a follower, and when it came.
type stamp struct {
	reading uint64
	heard   time.Time
}

// stampJump is by how much two readings of the same run never disagree with the time between them. Two runs disagree by
// less once in two million times.
const stampJump = time.Hour

// told is what a follower was told last: that the log reaches so far, and is committed so far.
type told struct {
	match, commit uint64
	sent          instant
}

func newLeaseTable() *leaseTable {
	return &leaseTable{
		told: make(map[trivet.ReplicaID]told),
		acks: make(map[trivet.ReplicaID]ack), match: make(map[trivet.ReplicaID]uint64),
		stamps: make(map[trivet.ReplicaID]stamp),
	}
}

// enterLocked turns the table to a term; false when it is past it.
func (t *leaseTable) enterLocked(term uint64) bool {
	if term < t.term {
		return false
	}
	if term > t.term {
		t.term = term
		clear(t.acks)
		clear(t.match)
		clear(t.told)
	}
	return true
}

// acked notes a success of a request that was sent at the given moment in the given term. match is
// the last index that it proves to be on the follower; 0 = none.
func (t *leaseTable) acked(term uint64, id trivet.ReplicaID, sent instant, promise time.Duration, match uint64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if !t.enterLocked(term) {
		return
	}
	if old, ok := t.acks[id]; promise > 0 && (!ok || sent.mono.After(old.sent.mono)) {
		t.acks[id] = ack{sent, time.Now(), promise}
	}
	t.match[id] = max(t.match[id], match)
}

// setStamp notes a clock reading. One of another run of the follower says that it has forgotten what it was told: a
// library that begins knows of no commit.
func (t *leaseTable) setStamp(id trivet.ReplicaID, reading uint64) {
	now := time.Now()
	t.mu.Lock()
	defer t.mu.Unlock()
	if old, ok := t.stamps[id]; ok {
		jump := time.Duration(reading-old.reading) - now.Sub(old.heard)
		if jump > stampJump || jump < -stampJump {
			delete(t.told, id)
		}
	}
	t.stamps[id] = stamp{reading, now}
}

func (t *leaseTable) stamp(id trivet.ReplicaID) uint64 {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.stamps[id].reading
}

// matches returns the last index known to be on each follower in term.
func (t *leaseTable) matches(term uint64) map[trivet.ReplicaID]uint64 {
	t.mu.Lock()
	defer t.mu.Unlock()
	out := make(map[trivet.ReplicaID]uint64, len(t.match))
	if t.term == term {
		for id, m := range t.match {
			out[id] = m
		}
	}
	return out
}

// answered reports whether a follower's newest success in term was asked for less than age ago.
func (t *leaseTable) answered(term uint64, id trivet.ReplicaID, age time.Duration, now instant) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	a, ok := t.acks[id]
	return ok && t.term == term && now.since(a.sent) < age
}

// quorumHeard returns since when a leader of term, which is self, has heard of a quorum of the voters among members,
// itself included: at that moment, or after it, each of them last answered. False when it never has.
func (t *leaseTable) quorumHeard(term uint64, self trivet.ReplicaID, members []Member, now time.Time,
) (time.Time, bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	heard := make([]time.Time, 0, MembersMax)
	for _, m := range members {
		a, ok := t.acks[m.Replica]
		switch {
		case m.Learner:
		case m.Replica == self:
			heard = append(heard, now)
		case ok && t.term == term:
			heard = append(heard, a.heard)
		}
	}
	quorum := voterN(members)/2 + 1
	if len(heard) < quorum {
		return time.Time{}, false
	}
	slices.SortFunc(heard, func(a, b time.Time) int { return b.Compare(a) })
	return heard[quorum-1], true
}

// tell notes that a follower confirmed a request that said so.
func (t *leaseTable) tell(term uint64, id trivet.ReplicaID, what told) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.enterLocked(term) {
		t.told[id] = what
	}
}

// knows reports whether a follower was told the same in term less than age before the moment in what.
func (t *leaseTable) knows(term uint64, id trivet.ReplicaID, what told, age time.Duration) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	old, ok := t.told[id]
	return ok && t.term == term && old.match == what.match && old.commit == what.commit &&
		what.sent.since(old.sent) < age
}

// void voids the lease of a term until the returned function is called, and for a while after it.
func (t *leaseTable) void(term uint64, after time.Duration) (done func()) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if term != t.voidTerm {
		t.voidTerm, t.transfers, t.voidUntil = term, 0, time.Time{}
	}
	t.transfers++
	return func() {
		t.mu.Lock()
		defer t.mu.Unlock()
		if term == t.voidTerm {
			t.transfers--
			t.voidUntil = time.Now().Add(after)
		}
	}
}

// held reports whether self, a voter among members, has a lease as the leader of term.
func (t *leaseTable) held(term uint64, self trivet.ReplicaID, members []Member, lease time.Duration, now instant) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if term == t.voidTerm && (t.transfers > 0 || now.mono.Before(t.voidUntil)) {
		return false
	}
	fresh := 0
	for _, m := range members {
		if m.Learner {
			continue
		}
		if m.Replica == self {
			fresh++
			continue
		}
		a, ok := t.acks[m.Replica]
		// The follower's own promise bounds it too, should its period be shorter than ours.
		if ok && t.term == term && now.since(a.sent) < min(lease, a.promise*3/4) {
			fresh++
		}
	}
	me, ok := findMember(members, self)
	return ok && !me.Learner && fresh >= voterN(members)/2+1
}

func (g *Group) now() instant { return instant{time.Now(), g.cfg.BootTime()} }

// ReadGate returns the leader's term when this replica may serve reads now: it leads, has applied an
// entry of its own term, and holds a lease from a quorum of voters. Otherwise it returns
// ErrNotLeader, or ErrUnavailable while it leads without a lease. It must be called before the
// read: what is read after it is not older than anything acknowledged before it.
func (g *Group) ReadGate() (term uint64, err error) {
	i := g.running()
	if i == nil || g.guard.failed() != nil || i.r.State() != raft.Leader {
		return 0, fmt.Errorf("read of %s: %w", g.cfg.Group, trivet.ErrNotLeader)
	}
	term = i.r.CurrentTerm()
	if i.appliedTerm.Load() != term {
		return 0, fmt.Errorf("read of %s: no entry of term %d applied yet: %w", g.cfg.Group, term, trivet.ErrUnavailable)
	}
	if !g.lease.held(term, g.cfg.Replica, g.store.latestConfig().members, g.cfg.Timing.Lease, g.now()) {
		return 0, fmt.Errorf("read of %s: no lease in term %d: %w", g.cfg.Group, term, trivet.ErrUnavailable)
	}
	// Seen again after the lease: a step down in between has not gone unnoticed.
	if i.r.State() != raft.Leader || i.r.CurrentTerm() != term {
		return 0, fmt.Errorf("read of %s: %w", g.cfg.Group, trivet.ErrNotLeader)
	}
	return term, nil
}
