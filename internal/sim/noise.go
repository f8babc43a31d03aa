package sim

import (
	"bytes"
	"context"
	"sync"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/replication/raftgroup"
	"github.com/trivet-csi/trivet/replication/transport"
)

// noise changes one bit of what passes, as memory does that is not as good as its owner believes
// (H25): TLS guards the wire, and what stands before and behind it has to guard itself (I12).
type noise struct {
	mu     sync.Mutex
	flipIn int    // bodies until one is changed; 0 = never
	at     uint64 // where in the body, modulo its length
	hitN   int
}

// arm makes the n-th body from now change, once.
func (n *noise) arm(in int, at uint64) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.flipIn, n.at = in, at
}

// pass returns b, or a copy of it with one bit changed.
func (n *noise) pass(b []byte) []byte {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.flipIn == 0 || len(b) == 0 {
		return b
	}
	if n.flipIn--; n.flipIn > 0 {
		return b
	}
	n.hitN++
	b = bytes.Clone(b)
	b[n.at%uint64(len(b))] ^= 1 << (n.at >> 60 & 7)
	return b
}

// hits returns how many bits were changed.
func (n *noise) hits() int {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.hitN
}

// noisyWire is a machine's network with a noisy memory in front: of requests that it sends and replies
// that it receives. Only bodies that carry blocks are changed.
type noisyWire struct {
	*transport.MemoryNode // a Watcher too: without it nobody would fail over on proof
	noise                 noise
}

// Call implements transport.Network.
func (w *noisyWire) Call(ctx context.Context, to trivet.NodeID, m transport.Message) (transport.Message, error) {
	switch m.Kind {
	case transport.KindVolumeWrite, transport.KindAppendEntries:
		if len(m.Body) >= trivet.BlockSize {
			m.Body = w.noise.pass(m.Body)
		}
	}
	reply, err := w.MemoryNode.Call(ctx, to, m)
	switch m.Kind {
	case transport.KindVolumeRead, transport.KindImageRead:
		if err == nil && len(reply.Body) >= trivet.BlockSize {
			reply.Body = w.noise.pass(reply.Body)
		}
	}
	return reply, err
}

// noisyMachine changes entries between the log and the state machine.
type noisyMachine struct {
	raftgroup.StateMachine
	memory *noise
}

// Apply implements raftgroup.StateMachine.
func (m *noisyMachine) Apply(entries []raftgroup.Entry) ([]any, error) {
	index, _ := m.Applied()
	for i := range entries {
		if entries[i].Index > index && len(entries[i].Data) >= trivet.BlockSize {
			entries[i].Data = m.memory.pass(entries[i].Data)
		}
	}
	return m.StateMachine.Apply(entries)
}
