package transport

import (
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/trivet-csi/trivet"
)

// PresenceState says what is known of another node's process.
type PresenceState uint8

const (
	// Unknown is a node that was never in contact, or was disconnected by us.
	Unknown PresenceState = iota
	// Alive is a node whose process was heard, and of whose end there is no proof.
	Alive
	// Gone is a node whose process is proved to be dead, or was silent for Limits.SilentAfter. One
	// that was merely silent may be Alive again in the same incarnation.
	Gone
)

// String returns the state's name, for logs.
func (s PresenceState) String() string {
	switch s {
	case Alive:
		return "alive"
	case Gone:
		return "gone"
	default:
		return "unknown"
	}
}

// Presence is what is known of the process of one node.
type Presence struct {
	Node        trivet.NodeID
	State       PresenceState
	Incarnation uint64    // of the process; drawn by each at its start; 0 while Unknown
	Since       time.Time // when the state began here; zero when the node was never in contact
	Reason      string    // for logs: why
	Silent      bool      // Gone for want of a sign of life; false when the end of the process is certain
}

// Watcher tells of processes that come and go. Gone is declared on proof only, so that an election
// may rest on it (design.md section 4, fast failover):
//
//   - every connection with the process ended, and a dial begun after that was actively refused;
//   - or a handshake showed another incarnation: Gone for the old one, then Alive for the new one;
//   - or no byte came from it, on any connection, for Limits.SilentAfter. Time in which the own
//     process did not run does not count.
//
// A connection that ended alone is no proof: it is dialled again at once. Peers and MemoryNode are
// Watchers.
type Watcher interface {
	// Watch calls fn for the present state of every node that is not Unknown, and then for each
	// change, in order, from one goroutine for all watchers and without locks held. fn must not block
	// for long, and must not close the network. When fn is thousands of changes behind, the oldest are
	// left out. After cancel fn is not called again, but a call may be under way. cancel may be called
	// from fn, and more than once.
	Watch(fn func(Presence)) (cancel func())

	// PresenceOf returns what is known of a node now.
	PresenceOf(node trivet.NodeID) Presence
}

// nothingHeard begins the reason of every Gone that rests on silence.
const nothingHeard = "nothing heard"

// noticesMax bounds the notices that wait for slow watchers.
const noticesMax = 4096

// board holds the presence of all nodes and tells watchers of changes.
type board struct {
	wg sync.WaitGroup // the goroutine that tells; Add under mu while open

	mu       sync.Mutex
	closed   bool
	telling  bool // the goroutine runs; it ends when there is nothing to tell
	latest   map[trivet.NodeID]Presence
	watchers []*watcher // never changed in place: notices refer to it
	notices  []notice
}

type watcher struct {
	fn        func(Presence)
	cancelled bool // under board.mu
}

// notice is one change and who is to be told of it: who watched when it happened.
type notice struct {
	presence Presence
	to       []*watcher
}

// Watch registers a watcher; see Watcher.
func (b *board) Watch(fn func(Presence)) (cancel func()) {
	w := &watcher{fn: fn}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.watchers = append(slices.Clone(b.watchers), w)
	for _, p := range b.latest {
		if p.State != Unknown {
			b.postLocked(notice{presence: p, to: []*watcher{w}})
		}
	}
	return func() {
		b.mu.Lock()
		defer b.mu.Unlock()
		w.cancelled = true
		b.watchers = slices.DeleteFunc(slices.Clone(b.watchers), func(x *watcher) bool { return x == w })
	}
}

// PresenceOf returns what is known of a node; see Watcher.
func (b *board) PresenceOf(node trivet.NodeID) Presence {
	b.mu.Lock()
	defer b.mu.Unlock()
	p := b.latest[node]
	p.Node = node
	return p
}

// set records a state and tells the watchers, unless it is the known one already.
func (b *board) set(node trivet.NodeID, state PresenceState, incarnation uint64, reason string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	old := b.latest[node]
	if old.State == state && old.Incarnation == incarnation {
		return
	}
	if b.latest == nil {
		b.latest = map[trivet.NodeID]Presence{}
	}
	p := Presence{
		Node: node, State: state, Incarnation: incarnation, Since: time.Now(), Reason: reason,
		Silent: state == Gone && strings.HasPrefix(reason, nothingHeard),
	}
	b.latest[node] = p
	b.postLocked(notice{presence: p, to: b.watchers})
}

func (b *board) postLocked(n notice) {
	if b.closed || len(n.to) == 0 {
		return
	}
	if len(b.notices) >= noticesMax {
		b.notices = slices.Delete(b.notices, 0, 1)
	}
	b.notices = append(b.notices, n)
	if !b.telling {
		b.telling = true
		b.wg.Go(b.tell)
	}
}

// tell calls the watchers until there is nothing more to tell.
func (b *board) tell() {
	for {
		b.mu.Lock()
		if b.closed || len(b.notices) == 0 {
			b.telling = false
			b.mu.Unlock()
			return
		}
		n := b.notices[0]
		b.notices = slices.Delete(b.notices, 0, 1)
		b.mu.Unlock()
		for _, w := range n.to {
			b.mu.Lock()
			skip := w.cancelled || b.closed
			b.mu.Unlock()
			if !skip {
				w.fn(n.presence)
			}
		}
	}
}

// end ends the telling. A watcher that is being told may outlast it.
func (b *board) end() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.closed = true
	b.notices = nil
}

// close is end, and waits for the watcher that is being told.
func (b *board) close() {
	b.end()
	b.wg.Wait()
}
