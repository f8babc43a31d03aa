package transport

import (
	"time"

	"github.com/trivet-csi/trivet"
)

var _ Watcher = (*MemoryNode)(nil)

// silentAfterDefault is that of Limits, and deathNotice how long a closed connection and a refused
// dial take to be noticed.
const (
	silentAfterDefault = time.Second
	deathNotice        = time.Millisecond
)

// Watch calls fn for every change of another node's presence; see Watcher. A node is Alive once a
// message of it arrived, request or reply. It is Gone shortly after Down or Close, when the links both
// ways are whole; when a cut link keeps its messages out for as long as SetSilentAfter says; and when
// a message of its successor arrives. Lost, held and slow messages are no silence: connections
// have pings.
func (n *MemoryNode) Watch(fn func(Presence)) (cancel func()) { return n.board.Watch(fn) }

// PresenceOf returns what is known of another node's process; see Watcher.
func (n *MemoryNode) PresenceOf(node trivet.NodeID) Presence { return n.board.PresenceOf(node) }

// SetSilentAfter sets how long a node is not heard before it is Gone (1 s), for cuts from now on.
func (h *Memory) SetSilentAfter(d time.Duration) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.silent = d
}

// hears notes that a message of from has arrived at a node.
func (h *Memory) hears(at, from *MemoryNode) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if at == nil || h.nodes[at.id] != at || h.nodes[from.id] != from || at == from {
		return // what a dead process sent is no sign of life
	}
	if p := at.board.PresenceOf(from.id); p.State == Alive && p.Incarnation != from.incarnation {
		at.board.set(from.id, Gone, p.Incarnation, "another incarnation sent a message")
	}
	at.board.set(from.id, Alive, from.incarnation, "sent a message")
}

// diedLocked lets the others learn of the end of a node's process: at once if they can reach its
// machine, else by its silence.
func (h *Memory) diedLocked(dead *MemoryNode) {
	for id, at := range h.nodes {
		wait, reason := deathNotice, "its connections ended and another was refused"
		if h.linkLocked(id, dead.id).healed != nil || h.linkLocked(dead.id, id).healed != nil {
			wait, reason = h.silent, "nothing heard"
		}
		h.wg.Go(func() {
			if h.wait(wait, at.ctx.Done()) {
				h.lost(at, dead.id, dead.incarnation, reason)
			}
		})
	}
}

// hushed lets a node learn that it hears nothing of another over a cut link, and of the end of that.
func (h *Memory) hushed(from, to trivet.NodeID, silent time.Duration, healed <-chan struct{}) {
	if !h.wait(silent, healed) {
		return
	}
	h.mu.Lock()
	at, far := h.nodes[to], h.nodes[from]
	h.mu.Unlock()
	if at == nil || far == nil || !h.lost(at, from, far.incarnation, nothingHeard) {
		return
	}
	select {
	case <-healed:
	case <-h.ctx.Done():
		return
	}
	if h.wait(deathNotice, nil) && at.board.PresenceOf(from).State == Gone && !h.isCut(from, to) {
		h.hears(at, far)
	}
}

func (h *Memory) isCut(from, to trivet.NodeID) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.linkLocked(from, to).healed != nil
}

// lost makes a node Gone in the eyes of another that has it for Alive, and reports whether it had.
func (h *Memory) lost(at *MemoryNode, node trivet.NodeID, incarnation uint64, reason string) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	p := at.board.PresenceOf(node)
	if h.nodes[at.id] != at || p.State != Alive || p.Incarnation != incarnation {
		return false
	}
	at.board.set(node, Gone, incarnation, reason)
	return true
}
