package transport

import (
	"context"
	"fmt"
	"hash/fnv"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"github.com/trivet-csi/trivet"
)

// lossTimeoutDefault is how long a caller waits for a lost message before it learns of the loss:
// the time in which Peers notices a black hole.
const lossTimeoutDefault = 3 * time.Second

// poison overwrites the caller's buffer in the paranoid mode.
const poison = 0xDB

// Memory is a network within one process, with faults, for tests and the simulator. Each Node is
// a Network. It uses timers and goroutines only, so it runs within a testing/synctest bubble (make
// it inside the bubble); Close joins every goroutine.
//
// Faults act on messages, requests and replies alike, and on one direction of a link at a time. A
// lost message is not retried: its caller gets ErrUnavailable once LossTimeout has passed, as with
// a broken connection, unless its context ends first. Random choices come from one generator per
// direction, drawn in order of sending, so that traffic elsewhere does not shift them.
//
// Bodies are copied at the boundary and errors pass through the wire's encoding, so what works here
// works over Peers. As there, messages may overtake each other. A Memory is safe for concurrent use.
type Memory struct {
	seed uint64

	ctx    context.Context // lifetime; ends with Close
	cancel context.CancelFunc
	wg     sync.WaitGroup // deliveries, watchers of handlers and of cuts

	mu       sync.Mutex
	closed   bool
	paranoid bool
	loss     time.Duration
	silent   time.Duration
	started  uint64 // nodes so far, for their incarnations
	faults   Faults // of links without their own
	nodes    map[trivet.NodeID]*MemoryNode
	links    map[linkName]*link
	rules    []*rule
	calls    map[*memoryCall]struct{} // until their last delivery ended
	heldN    int
}

// Faults says how one direction of a link treats messages. The zero value is a perfect link.
type Faults struct {
	Drop      float64                        // probability that a message is lost, 0 to 1
	Duplicate float64                        // probability that a request is delivered twice, 0 to 1
	Delay     func(*rand.Rand) time.Duration // drawn per message; nil means none
}

// Uniform returns a delay drawn evenly from [least, most].
func Uniform(least, most time.Duration) func(*rand.Rand) time.Duration {
	return func(r *rand.Rand) time.Duration { return least + time.Duration(r.Int64N(int64(most-least)+1)) }
}

// Exponential returns a delay of the given mean with a long tail, cut at most.
func Exponential(mean, most time.Duration) func(*rand.Rand) time.Duration {
	return func(r *rand.Rand) time.Duration { return min(time.Duration(r.ExpFloat64()*float64(mean)), most) }
}

// Envelope is a message on its way, as rules see it.
type Envelope struct {
	From, To trivet.NodeID
	Reply    bool    // an answer, error or not, on its way back
	Message  Message // Body must be neither kept nor changed; empty when the answer is an error
}

// Match selects messages. It is called without locks held, perhaps concurrently.
type Match func(Envelope) bool

// OfKind matches requests of a kind.
func OfKind(k Kind) Match { return func(e Envelope) bool { return e.Message.Kind == k && !e.Reply } }

// linkName is one direction between two nodes.
type linkName struct{ from, to trivet.NodeID }

// link is the state of one direction. Its fields are under Memory.mu.
type link struct {
	rng    *rand.Rand
	faults *Faults       // nil: Memory.faults
	healed chan struct{} // not nil while cut; closed by Heal
}

// rule holds or loses the messages it matches until it is released.
type rule struct {
	match    Match
	lose     bool
	released chan struct{}
}

// NewMemory returns a network without nodes or faults. The seed determines its random choices.
func NewMemory(seed uint64) *Memory {
	ctx, cancel := context.WithCancel(context.Background())
	return &Memory{
		seed: seed, ctx: ctx, cancel: cancel, loss: lossTimeoutDefault, silent: silentAfterDefault,
		nodes: map[trivet.NodeID]*MemoryNode{},
		links: map[linkName]*link{},
		calls: map[*memoryCall]struct{}{},
	}
}

// Node returns the node of that name, which it makes when there is none or it went Down: the new one
// has no handlers, as a process that has just started. After Close the node returned is down.
func (h *Memory) Node(id trivet.NodeID) *MemoryNode {
	h.mu.Lock()
	defer h.mu.Unlock()
	if n := h.nodes[id]; n != nil {
		return n
	}
	h.started++
	n := &MemoryNode{hub: h, id: id, down: h.closed, incarnation: h.started}
	n.ctx, n.cancel = context.WithCancel(context.Background())
	if !h.closed {
		h.nodes[id] = n
	}
	return n
}

// Down ends a node as a killed process: its handlers are removed and their contexts end, calls to
// and from it fail with ErrUnavailable, and later calls of the dead node with ErrClosed. It does not
// wait for handlers that run (MemoryNode.Close does). Node brings up a new one. Unknown names and
// nodes already down are ignored.
func (h *Memory) Down(id trivet.NodeID) {
	h.mu.Lock()
	n := h.nodes[id]
	if n != nil {
		h.removeLocked(n)
	}
	h.mu.Unlock()
	if n != nil {
		n.stop(fmt.Errorf("node %s went down: %w", id, trivet.ErrUnavailable))
	}
}

// SetFaults sets the faults of one direction, in place of the default.
func (h *Memory) SetFaults(from, to trivet.NodeID, f Faults) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.linkLocked(from, to).faults = &f
}

// SetDefaultFaults sets the faults of all directions that have none of their own.
func (h *Memory) SetDefaultFaults(f Faults) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.faults = f
}

// ClearFaults makes all links perfect again; cuts and rules stay.
func (h *Memory) ClearFaults() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.faults = Faults{}
	for _, l := range h.links {
		l.faults = nil
	}
}

// SetLossTimeout sets how long a caller waits before it learns that a message was lost (3 s).
// A cut that lasts as long fails the calls outstanding over the link.
func (h *Memory) SetLossTimeout(d time.Duration) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.loss = d
}

// SetParanoid makes every Call overwrite its caller's Body when it returns, as a caller may that
// owns it again: a handler that still looks at it, or a caller that gave away a slice it needs, is
// found out. Callers that send the same Body twice are right, but cannot run in this mode.
func (h *Memory) SetParanoid(on bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.paranoid = on
}

// Cut loses every message from one node to another until healed. The other direction still works.
func (h *Memory) Cut(from, to trivet.NodeID) {
	h.mu.Lock()
	defer h.mu.Unlock()
	l := h.linkLocked(from, to)
	if l.healed != nil || h.closed {
		return
	}
	healed := make(chan struct{})
	l.healed = healed
	// Like a broken connection, a long cut fails the calls that were waiting when it began.
	var waiting []*memoryCall
	for c := range h.calls {
		if c.uses(from, to) {
			waiting = append(waiting, c)
		}
	}
	loss, silent := h.loss, h.silent
	h.wg.Go(func() { h.hushed(from, to, silent, healed) })
	h.wg.Go(func() {
		if h.wait(loss, healed) {
			for _, c := range waiting {
				c.fail(fmt.Errorf("connection of %s and %s broke: %w", from, to, trivet.ErrUnavailable))
			}
		}
	})
}

// Partition cuts both directions between every node of a and every node of b.
func (h *Memory) Partition(a, b []trivet.NodeID) {
	for _, x := range a {
		for _, y := range b {
			if x != y {
				h.Cut(x, y)
				h.Cut(y, x)
			}
		}
	}
}

// Isolate cuts a node off from all others that exist now, both ways.
func (h *Memory) Isolate(id trivet.NodeID) {
	h.mu.Lock()
	var others []trivet.NodeID
	for other := range h.nodes {
		if other != id {
			others = append(others, other)
		}
	}
	h.mu.Unlock()
	h.Partition([]trivet.NodeID{id}, others)
}

// Heal ends the cut of one direction.
func (h *Memory) Heal(from, to trivet.NodeID) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.linkLocked(from, to).heal()
}

// HealAll ends all cuts; faults and rules stay.
func (h *Memory) HealAll() {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, l := range h.links {
		l.heal()
	}
}

// Hold keeps the messages that match from arriving until release is called; they then arrive in any
// order. Release is idempotent.
func (h *Memory) Hold(m Match) (release func()) { return h.addRule(&rule{match: m}) }

// Lose loses the messages that match until stop is called. Stop is idempotent.
func (h *Memory) Lose(m Match) (stop func()) { return h.addRule(&rule{match: m, lose: true}) }

// Held returns how many messages are being held.
func (h *Memory) Held() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.heldN
}

// Close fails outstanding calls with ErrClosed, ends the contexts of handlers and waits for them.
// It is idempotent. It must not be called from a handler.
func (h *Memory) Close() error {
	h.mu.Lock()
	h.closed = true
	nodes := h.nodes
	h.nodes = map[trivet.NodeID]*MemoryNode{}
	h.mu.Unlock()
	for id, n := range nodes {
		n.stop(fmt.Errorf("node %s: %w", id, trivet.ErrClosed))
	}
	h.cancel()
	for _, n := range nodes {
		n.wg.Wait()
		n.board.close()
	}
	h.wg.Wait()
	return nil
}

// removeLocked forgets a node that is about to stop, and lets Close wait for its handlers.
func (h *Memory) removeLocked(n *MemoryNode) {
	if h.nodes[n.id] == n {
		delete(h.nodes, n.id)
		h.diedLocked(n)
		h.wg.Go(func() {
			<-n.ctx.Done()
			n.wg.Wait()
			n.board.close()
		})
	}
}

func (h *Memory) addRule(r *rule) (release func()) {
	r.released = make(chan struct{})
	h.mu.Lock()
	defer h.mu.Unlock()
	h.rules = append(slices.Clone(h.rules), r) // cloned: crossing messages read the old list unlocked
	return sync.OnceFunc(func() {
		h.mu.Lock()
		defer h.mu.Unlock()
		h.rules = slices.DeleteFunc(slices.Clone(h.rules), func(x *rule) bool { return x == r })
		close(r.released)
	})
}

func (h *Memory) linkLocked(from, to trivet.NodeID) *link {
	name := linkName{from, to}
	l := h.links[name]
	if l == nil {
		sum := fnv.New64a()
		fmt.Fprintf(sum, "%s\x00%s", from, to)
		l = &link{rng: rand.New(rand.NewPCG(h.seed, sum.Sum64()))}
		h.links[name] = l
	}
	return l
}

func (h *Memory) lossTimeout() time.Duration {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.loss
}

// wait reports whether d passed before stop was closed or the network was.
func (h *Memory) wait(d time.Duration, stop <-chan struct{}) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-stop:
	case <-h.ctx.Done():
	}
	return false
}

func (l *link) heal() {
	if l.healed != nil {
		close(l.healed)
		l.healed = nil
	}
}

// MemoryNode is one node's end of a Memory. It is a Network, safe for concurrent use.
type MemoryNode struct {
	hub         *Memory
	id          trivet.NodeID
	incarnation uint64
	board       board

	ctx    context.Context // of local calls; ends once down is set
	cancel context.CancelFunc
	wg     sync.WaitGroup // handlers; Add under mu while up

	mu       sync.Mutex
	down     bool
	handlers map[Kind]Handler
}

var _ Network = (*MemoryNode)(nil)

// Local returns the node's name.
func (n *MemoryNode) Local() trivet.NodeID { return n.id }

// Handle registers the handler of a kind; see Network.
func (n *MemoryNode) Handle(kind Kind, f Handler) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.handlers[kind] != nil {
		panic(fmt.Sprintf("transport: node %s: kind %d has a handler already", n.id, kind))
	}
	if n.handlers == nil {
		n.handlers = map[Kind]Handler{}
	}
	n.handlers[kind] = f
}

// Close takes the node down, as Memory.Down does, and waits for its handlers. It must not be called
// from one of them. It is idempotent and leaves a successor of the same name alone.
func (n *MemoryNode) Close() error {
	n.hub.mu.Lock()
	n.hub.removeLocked(n)
	n.hub.mu.Unlock()
	n.stop(fmt.Errorf("node %s went down: %w", n.id, trivet.ErrUnavailable))
	n.wg.Wait()
	n.board.close()
	return nil
}

// stop marks the node as down and fails the calls that begin or end at it.
func (n *MemoryNode) stop(cause error) {
	n.mu.Lock()
	n.down = true
	n.handlers = nil
	n.mu.Unlock()
	n.cancel()
	n.board.end()

	n.hub.mu.Lock()
	defer n.hub.mu.Unlock()
	for c := range n.hub.calls {
		if c.from == n || c.dest == n {
			c.fail(cause)
		}
	}
}

// isDown reports whether the node was stopped.
func (n *MemoryNode) isDown() bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.down
}

// enter returns the handler of a kind and counts it as running, or says why it cannot run.
// On success the caller calls n.wg.Done when the handler returned.
func (n *MemoryNode) enter(kind Kind) (Handler, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.down {
		return nil, fmt.Errorf("node %s is down: %w", n.id, trivet.ErrUnavailable)
	}
	f := n.handlers[kind]
	if f == nil {
		return nil, fmt.Errorf("node %s has no handler for kind %d: %w", n.id, kind, trivet.ErrUnavailable)
	}
	n.wg.Add(1)
	return f, nil
}

// Call sends m to a node and waits for the reply; see Network.
func (n *MemoryNode) Call(ctx context.Context, to trivet.NodeID, m Message) (Message, error) {
	reply, err := n.call(ctx, to, m)
	n.hub.mu.Lock()
	paranoid := n.hub.paranoid
	n.hub.mu.Unlock()
	if paranoid {
		for i := range m.Body {
			m.Body[i] = poison
		}
	}
	if err != nil {
		return Message{}, fmt.Errorf("call %s, kind %d: %w", to, m.Kind, err)
	}
	return reply, nil
}

func (n *MemoryNode) call(ctx context.Context, to trivet.NodeID, m Message) (Message, error) {
	if err := ctx.Err(); err != nil {
		return Message{}, err
	}
	if err := checkMessage(m); err != nil {
		return Message{}, err
	}
	if n.isDown() {
		return Message{}, fmt.Errorf("node %s is down: %w", n.id, trivet.ErrClosed)
	}
	if to == n.id {
		f, err := n.enter(m.Kind)
		if err != nil {
			return Message{}, err
		}
		defer n.wg.Done()
		return callLocal(ctx, n.ctx, f, n.id, m)
	}
	c, err := n.hub.begin(n, to, m)
	if err != nil {
		return Message{}, err
	}
	return c.await(ctx)
}
