package sim

import (
	"bytes"
	"context"
	"math/rand/v2"
	"sync"
	"syscall"
	"time"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/replication/transport"
)

// make makes one fault of a class. A class that does not apply now makes none, and does not count.
func (n *nemesis) make(ctx context.Context, f Fault) error {
	n.sim.log.Debug("fault", "class", f.String())
	made, err := n.machineFault(ctx, f)
	if !made && err == nil {
		made, err = n.diskFault(ctx, f)
	}
	if !made && err == nil {
		made = n.linkFault(f)
	}
	if made {
		n.sim.count(func(r *Report) { r.Faults[f]++ })
	}
	return err
}

// machineFault makes the faults that stop or move something.
func (n *nemesis) machineFault(ctx context.Context, f Fault) (made bool, err error) {
	node := n.pick()
	switch f {
	case FaultCrash:
		return n.crash(ctx, node, n.rnd.IntN(60))
	case FaultCrashAll:
		for _, node := range n.sim.cluster.Nodes() {
			if _, err := n.crash(ctx, node, 0); err != nil {
				return false, err
			}
		}
		return true, nil
	case FaultRestart:
		if !node.Up() {
			return false, nil
		}
		l := node.current()
		if err := node.Stop(); err != nil && l != nil && !l.excused(err) {
			return false, err
		}
		n.goneDown(node)
		return true, nil
	case FaultTransfer:
		return n.transfer(ctx, node), nil
	case FaultTakeOver:
		if err := n.takeOver(ctx); err != nil {
			return false, err
		}
		if n.rnd.IntN(3) == 0 { // to one that has not applied the fence yet, with luck
			n.transfer(ctx, n.pick())
		}
		return true, nil
	case FaultResize:
		return n.resize(ctx)
	case FaultMove:
		return n.move(), nil
	case FaultReplace:
		return n.replace(ctx)
	}
	return false, nil
}

func (n *nemesis) crash(ctx context.Context, node *Node, ops int) (made bool, err error) {
	if !node.Up() {
		return false, nil
	}
	kept := n.sim.swarm.unsyncedPercent
	if kept < 0 {
		kept = n.rnd.IntN(101)
	}
	n.sim.log.Debug("crash", "node", node.ID(), "ops", ops, "unsyncedPercent", kept)
	err = node.Crash(ctx, CrashOptions{Rand: n.rnd, UnsyncedPercent: kept, Ops: ops, Wait: 500 * time.Millisecond})
	if err != nil {
		return false, err
	}
	n.goneDown(node)
	return true, nil
}

func (n *nemesis) transfer(ctx context.Context, to *Node) bool {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	leader := n.leader()
	if leader == nil {
		return false // nobody leads: nothing to move
	}
	r, ok := leader.Replica()
	return ok && r.TransferTo(ctx, to.ReplicaID()) == nil
}

// growBytes is by how much the volume grows at a time. The users keep to what it had at first.
const growBytes = 16 * trivet.BlockSize

func (n *nemesis) resize(ctx context.Context) (made bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	n.grown += growBytes
	if err := n.sim.cluster.resize(ctx, n.sim.sizeBytes()+n.grown); err != nil && ctx.Err() == nil {
		return false, err
	}
	return true, nil
}

// diskFault makes the faults of disks and of memory.
func (n *nemesis) diskFault(ctx context.Context, f Fault) (made bool, err error) {
	node := n.pick()
	l := node.current()
	switch f {
	case FaultRot:
		return n.rot(ctx, node)
	case FaultWipe:
		return n.wipe(ctx, node)
	case FaultSwap:
		return n.swap(ctx)
	}
	if l == nil {
		return false, nil
	}
	switch f {
	case FaultStall:
		l.disk.stall(time.Duration(logUniform(n.rnd, 0.1, 60) * float64(time.Second)))
	case FaultEIO:
		l.disk.fail(1+n.rnd.IntN(200), syscall.EIO)
	case FaultENOSPC:
		l.disk.fill(true)
		n.later(4*time.Second, func(context.Context) error {
			l.disk.fill(false)
			return nil
		})
	case FaultNearlyFull:
		node.SetDiskUsage(usage(1 << 20))
		n.sim.full.Store(true)
		n.later(4*time.Second, func(context.Context) error {
			node.SetDiskUsage(usage(50 << 30))
			return nil
		})
	case FaultMemory:
		n.sim.noisy.Store(true)
		switch n.rnd.IntN(3) {
		case 0:
			l.memory.arm(1+n.rnd.IntN(20), n.rnd.Uint64())
		case 1:
			l.wire.noise.arm(1+n.rnd.IntN(20), n.rnd.Uint64())
		default:
			n.sim.cluster.client.noise.arm(1+n.rnd.IntN(20), n.rnd.Uint64())
		}
	default:
		return false, nil
	}
	return true, nil
}

// linkFault makes the faults of the network.
func (n *nemesis) linkFault(f Fault) bool {
	net := n.sim.cluster.Net
	a, b := n.two()
	switch f {
	case FaultIsolate:
		net.Isolate(a.ID())
		n.later(3*time.Second, n.heal)
	case FaultOneWay:
		net.Cut(a.ID(), b.ID())
		n.later(3*time.Second, n.heal)
	case FaultBridge:
		net.Partition([]trivet.NodeID{a.ID()}, []trivet.NodeID{b.ID()})
		n.later(5*time.Second, n.heal)
	case FaultClog:
		n.rule(10*time.Second, net.Hold(func(e transport.Envelope) bool { return e.From == a.ID() && e.To == b.ID() }))
	case FaultHoldWrite:
		// The client sends such a request again and goes on; the first copy meets whoever leads then (H39).
		n.rule(6*time.Second, net.Hold(n.some(0.05+0.3*n.rnd.Float64(), func(e transport.Envelope) bool {
			return e.Message.Kind == transport.KindVolumeWrite && !e.Reply && e.To == a.ID()
		})))
	case FaultHoldLog:
		n.rule(6*time.Second, net.Hold(n.some(0.2, func(e transport.Envelope) bool {
			return e.Message.Kind == transport.KindAppendEntries && !e.Reply && e.To == a.ID()
		})))
	case FaultHoldReply:
		n.rule(2*time.Second, net.Hold(n.some(0.3, func(e transport.Envelope) bool {
			return e.Message.Kind == transport.KindAppendEntries && e.Reply && e.From == a.ID()
		})))
	case FaultDepose:
		return n.depose()
	case FaultReplay:
		n.replay()
	case FaultPause:
		return n.pause(a)
	default:
		return false
	}
	return true
}

func (n *nemesis) heal(context.Context) error {
	n.sim.cluster.Net.HealAll()
	return nil
}

// some matches a share of what m matches.
func (n *nemesis) some(chance float64, m transport.Match) transport.Match {
	var mu sync.Mutex
	rnd := newRand(n.rnd.Uint64(), 3)
	return func(e transport.Envelope) bool {
		if !m(e) {
			return false
		}
		mu.Lock()
		defer mu.Unlock()
		return rnd.Float64() < chance
	}
}

// pause lets a machine stand still: nothing reaches it, nothing leaves it, and its log waits. Its timers
// run on, as a bubble has one clock for all.
func (n *nemesis) pause(node *Node) bool {
	l := node.current()
	if l == nil {
		return false
	}
	d := 100*time.Millisecond + time.Duration(n.rnd.Int64N(int64(7*time.Second)))
	release := sync.OnceFunc(n.sim.cluster.Net.Hold(func(e transport.Envelope) bool {
		return e.From == node.ID() || e.To == node.ID()
	}))
	l.disk.stall(d)
	n.release = append(n.release, release)
	n.after(d, func(context.Context) error {
		release()
		return nil
	})
	return true
}

// depose makes others elect a leader while the old one still believes in itself: its followers' answers
// come late, then nothing of it arrives any more, and of its successor it gets heartbeats only. A lease
// that counts from the receipt of an answer serves stale reads now (H8), and a leader that learns of a
// new term by a heartbeat beside its main loop writes its own entries in that term (D9).
func (n *nemesis) depose() bool {
	leader := n.leader()
	if leader == nil {
		return false
	}
	net, id := n.sim.cluster.Net, leader.ID()
	answers := func(least, most time.Duration) {
		late := n.sim.linkFaults()
		late.Delay = transport.Uniform(least, most)
		for _, o := range n.others(leader) {
			net.SetFaults(o.ID(), id, late)
		}
	}
	answers(20*time.Millisecond, 480*time.Millisecond)
	heartbeatsOnly := n.rnd.IntN(2) == 0
	n.after(500*time.Millisecond, func(context.Context) error {
		answers(250*time.Millisecond, 490*time.Millisecond)
		return nil
	})
	n.after(700*time.Millisecond, func(ctx context.Context) error {
		for _, o := range n.others(leader) {
			net.Cut(id, o.ID())
		}
		net.Cut(ClientNode, id) // so that its user looks for the successor at once
		if heartbeatsOnly {
			n.rule(3*time.Second, net.Lose(func(e transport.Envelope) bool {
				return e.To == id && !e.Reply && notHeartbeat(e.Message)
			}))
		}
		n.replays.Go(func() { n.sim.stubborn(ctx, leader) })
		return nil
	})
	n.after(3*time.Second, func(context.Context) error {
		for _, o := range n.others(leader) {
			net.SetFaults(o.ID(), id, n.sim.linkFaults())
		}
		net.HealAll()
		return nil
	})
	return true
}

// notHeartbeat tells the messages of elections, log and catch-ups from heartbeats, which are AppendEntries
// of nothing after nothing: after version and term the body is zero (raftgroup/wire.go, encodeAppend).
func notHeartbeat(m transport.Message) bool {
	switch m.Kind {
	case transport.KindRequestVote, transport.KindRequestPreVote, transport.KindFetch,
		transport.KindImageOpen, transport.KindImageRead, transport.KindImageClose:
		return true
	case transport.KindAppendEntries:
		const from, to = 1 + 8, 1 + 8 + 3*8 + 4
		return len(m.Body) < to || bytes.Count(m.Body[from:to], []byte{0}) != to-from
	}
	return false
}

// recorder keeps some of the last requests.
type recorder struct {
	mu   sync.Mutex
	rnd  *rand.Rand
	last []transport.Envelope
	next int
}

// see is a transport.Match that matches nothing.
func (p *recorder) see(e transport.Envelope) bool {
	if e.Reply || e.Message.Kind == transport.KindVolumeRead || e.Message.Kind == transport.KindVolumeStatus {
		return false
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.rnd.IntN(8) > 0 {
		return false
	}
	e.Message.Body = bytes.Clone(e.Message.Body)
	if len(p.last) < 128 {
		p.last = append(p.last, e)
	} else {
		p.last[p.next] = e
	}
	p.next = (p.next + 1) % 128
	return false
}

func (p *recorder) some(n int) []transport.Envelope {
	p.mu.Lock()
	defer p.mu.Unlock()
	var out []transport.Envelope
	for range min(n, len(p.last)) {
		out = append(out, p.last[p.rnd.IntN(len(p.last))])
	}
	return out
}

// replay sends old requests again. Nobody waits for the answers.
func (n *nemesis) replay() {
	for _, e := range n.past.some(1 + n.rnd.IntN(30)) {
		net := n.sim.cluster.client.MemoryNode
		if node := n.sim.cluster.Node(e.From); node != nil {
			l := node.current()
			if l == nil {
				continue
			}
			net = l.net
		}
		n.replays.Go(func() {
			ctx, cancel := context.WithTimeout(context.Background(), time.Second)
			defer cancel()
			_, _ = net.Call(ctx, e.To, e.Message) // what it says is for the sender of the first copy
		})
	}
}
