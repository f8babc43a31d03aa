package transport

import (
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/trivet-csi/trivet"
)

// liveness judges the processes of other nodes by what their connections show, and writes its
// judgements on a board. It knows no sockets and reads no clock but in heard: Peers tells it what
// happened and when, so its rules can be tested alone. Every connection, dialled or accepted, belongs
// to the incarnation that its preface named.
type liveness struct {
	board       *board
	silentAfter time.Duration
	epoch       time.Time // origin of the times below, so that they fit in an atomic

	mu       sync.Mutex
	records  map[trivet.NodeID]*record
	lastTick time.Time // zero before the first
}

// replacedMax is how many dead incarnations of a node are remembered.
const replacedMax = 8

// record is what liveness knows of one node.
type record struct {
	node        trivet.NodeID
	heardAt     atomic.Int64  // nanoseconds after liveness.epoch: the last byte of current
	current     atomic.Uint64 // incarnation; 0 while state is not Alive: reading then takes the lock
	incarnation uint64        // the fields from here on are under liveness.mu
	state       PresenceState
	live        map[uint64]int // connections by incarnation
	endedAt     time.Time      // when the last one ended
	endedN      uint64         // how many ended
	replaced    []uint64       // incarnations that a later one followed: they never return
	windowFrom  time.Time      // silence counts from here at the earliest
	address     string         // last dialled
	probing     bool           // Peers dials it, to find out
	freeAt      time.Time      // from when on such a dial need not wait
}

func newLiveness(b *board, silentAfter time.Duration) *liveness {
	return &liveness{board: b, silentAfter: silentAfter, epoch: time.Now(), records: map[trivet.NodeID]*record{}}
}

func (l *liveness) recordLocked(node trivet.NodeID) *record {
	r := l.records[node]
	if r == nil {
		r = &record{node: node, live: map[uint64]int{}}
		l.records[node] = r
	}
	return r
}

// began notes a connection whose preface named an incarnation. Of a dialled one the preface is proof
// of what runs there now: it answered ours. That of an accepted one may have lain here for long, so a
// process that was Alive is not given up for it: then began returns true, and a dial must tell.
func (l *liveness) began(node trivet.NodeID, incarnation uint64, dialled bool) (r *record, suspect bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	r = l.recordLocked(node)
	r.live[incarnation]++
	switch {
	case r.state == Alive && r.incarnation == incarnation:
		l.heardLocked(r)
	case dialled:
		if r.incarnation != 0 && r.incarnation != incarnation {
			l.replaceLocked(r, "another incarnation answered the dial")
		}
		r.replaced = slices.DeleteFunc(r.replaced, func(x uint64) bool { return x == incarnation })
		l.aliveLocked(r, incarnation, "answered the dial")
	case slices.Contains(r.replaced, incarnation):
	case r.state == Alive:
		return r, true
	default:
		l.aliveLocked(r, incarnation, "connected")
	}
	return r, false
}

// ended notes the end of a connection that began.
func (l *liveness) ended(r *record, incarnation uint64, now time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	r.endedAt = now
	r.endedN++
	if r.live[incarnation]--; r.live[incarnation] <= 0 {
		delete(r.live, incarnation)
	}
}

// heard notes that bytes came over a connection of an incarnation.
func (l *liveness) heard(r *record, incarnation uint64) {
	if r.current.Load() == incarnation {
		r.heardAt.Store(int64(time.Since(l.epoch)))
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if r.state == Gone && !slices.Contains(r.replaced, incarnation) {
		l.aliveLocked(r, incarnation, "was heard again")
	}
}

// refused notes that a dial of address, begun at some time, was actively refused. It proves the death
// of a process all of whose connections had ended by then.
func (l *liveness) refused(node trivet.NodeID, address string, begun time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	r := l.records[node]
	if r == nil || r.state != Alive || r.live[r.incarnation] > 0 || begun.Before(r.endedAt) {
		return
	}
	l.goneLocked(r, fmt.Sprintf("its connections ended and %s refused another", address))
	l.settleLocked(r)
}

// forget makes a node Unknown.
func (l *liveness) forget(node trivet.NodeID, reason string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	r := l.records[node]
	if r == nil || r.state == Unknown {
		return
	}
	r.state, r.incarnation = Unknown, 0
	r.current.Store(0)
	l.board.set(node, Unknown, 0, reason)
}

// tick judges the silent. A node that was dialled at one address and has another in the book gets a
// new window, and is returned: it must be dialled anew before it is judged. After a pause of the own
// process everybody gets a new window: what they sent meanwhile may not have been read yet.
func (l *liveness) tick(now time.Time, addressOf map[trivet.NodeID]string) (moved []*record) {
	l.mu.Lock()
	defer l.mu.Unlock()
	paused := !l.lastTick.IsZero() && now.Sub(l.lastTick) > l.silentAfter/2
	l.lastTick = now
	for node, r := range l.records {
		if paused {
			r.windowFrom = now
		}
		if r.state != Alive || now.Sub(r.quietSinceLocked(l)) < l.silentAfter {
			continue
		}
		if a := addressOf[node]; a != "" && r.address != "" && a != r.address {
			r.windowFrom, r.address = now, a
			moved = append(moved, r)
			continue
		}
		l.goneLocked(r, fmt.Sprintf("%s for %s", nothingHeard, l.silentAfter))
		l.settleLocked(r)
	}
	return moved
}

func (r *record) quietSinceLocked(l *liveness) time.Time {
	heard := l.epoch.Add(time.Duration(r.heardAt.Load()))
	if heard.Before(r.windowFrom) {
		return r.windowFrom
	}
	return heard
}

// nodes returns the nodes with a record.
func (l *liveness) nodes() (out []trivet.NodeID) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for node := range l.records {
		out = append(out, node)
	}
	return out
}

// dialling notes where a node is being dialled.
func (l *liveness) dialling(node trivet.NodeID, address string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if r := l.records[node]; r != nil {
		r.address = address
	}
}

// wantProbe reports whether the caller is to dial a node to find out about it, and makes it the only
// one who does. endedN is for doneProbe; free says whether the dial may pass over the backoff, which
// it may once in a while.
func (l *liveness) wantProbe(r *record, now time.Time, every time.Duration) (endedN uint64, free, ok bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if r.probing || r.state != Alive {
		return 0, false, false
	}
	r.probing = true
	if free = !now.Before(r.freeAt); free {
		r.freeAt = now.Add(every)
	}
	return r.endedN, free, true
}

// doneProbe ends what wantProbe began. It reports whether a connection ended in the meantime, so that
// there is a new reason.
func (l *liveness) doneProbe(r *record, endedN uint64) (again bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	r.probing = false
	return r.endedN != endedN && r.state == Alive
}

func (l *liveness) isAlive(r *record) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return r.state == Alive
}

func (l *liveness) aliveLocked(r *record, incarnation uint64, reason string) {
	r.state, r.incarnation = Alive, incarnation
	l.heardLocked(r)
	r.current.Store(incarnation)
	l.board.set(r.node, Alive, incarnation, reason)
}

func (l *liveness) goneLocked(r *record, reason string) {
	r.state = Gone
	r.current.Store(0)
	l.board.set(r.node, Gone, r.incarnation, reason)
}

// replaceLocked declares the known incarnation Gone for good.
func (l *liveness) replaceLocked(r *record, reason string) {
	if r.state == Alive {
		l.goneLocked(r, reason)
	}
	if !slices.Contains(r.replaced, r.incarnation) {
		r.replaced = append(r.replaced, r.incarnation)
	}
	if len(r.replaced) > replacedMax {
		r.replaced = slices.Delete(r.replaced, 0, 1)
	}
}

// settleLocked turns to a newer process that is connected already, after the end of the old one.
func (l *liveness) settleLocked(r *record) {
	for incarnation := range r.live {
		if incarnation != r.incarnation && !slices.Contains(r.replaced, incarnation) {
			l.replaceLocked(r, "")
			l.aliveLocked(r, incarnation, "connected")
			return
		}
	}
}

func (l *liveness) heardLocked(r *record) { r.heardAt.Store(int64(time.Since(l.epoch))) }
