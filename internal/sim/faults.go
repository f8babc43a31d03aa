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
	case FaultCrashVote:
		return n.crashVote(ctx, node)
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
	case FaultSnapshot:
		return n.snapshot(ctx), nil
	case FaultRollback:
		return n.rollback(ctx)
	case FaultClean:
		return n.clean(ctx, node)
	}
	return false, nil
}

// crashVote takes the power from a machine while it writes a vote, and so between any two of the steps in which it
// does. It asks for an election to that end, but takes any.
func (n *nemesis) crashVote(ctx context.Context, node *Node) (made bool, err error) {
	to := n.pick()
	if !node.Up() || !node.hasReplica() || node == n.leader() {
		return false, nil
	}
	n.replays.Go(func() { n.transfer(ctx, to) })
	return n.cut(ctx, node, CrashOptions{Ops: 1 + n.rnd.IntN(6), Wait: 2 * time.Second, Vote: true})
}

func (n *nemesis) crash(ctx context.Context, node *Node, ops int) (made bool, err error) {
	return n.cut(ctx, node, CrashOptions{Ops: ops, Wait: 500 * time.Millisecond})
}

// cut takes the power from a machine as o says; what of the unsynced data is kept, the seed says.
func (n *nemesis) cut(ctx context.Context, node *Node, o CrashOptions) (made bool, err error) {
	if !node.Up() {
		return false, nil
	}
	kept := n.sim.swarm.unsyncedPercent
	if kept < 0 {
		kept = n.rnd.IntN(101)
	}
	n.sim.log.Debug("crash", "node", node.ID(), "ops", o.Ops, "vote", o.Vote, "unsyncedPercent", kept)
	o.Rand, o.UnsyncedPercent = n.rnd, kept
	if err := node.Crash(ctx, o); err != nil {
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
	case FaultFlip:
		return n.flip(ctx, node)
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
	case FaultHoldBeat:
		n.holdBeats(a)
	case FaultDepose:
		return n.depose()
	case FaultReplay:
		n.replay()
	case FaultPause:
		return n.pause(a)
	case FaultSuspend:
		if !n.pause(a) {
			return false
		}
		a.clock.jump(n.someTime(time.Hour))
	case FaultClock:
		a.clock.jump(n.someTime(time.Hour))
	default:
		return false
	}
	return true
}

// someTime draws a time of a millisecond to most, short ones as often as long ones.
func (n *nemesis) someTime(most time.Duration) time.Duration {
	return time.Duration(logUniform(n.rnd, float64(time.Millisecond), float64(most)))
}

// holdBeats holds what a machine is answered to its heartbeats, for as long as that may still count, and lets it
// arrive at once. A lease is worth what the time of asking is worth (D4, H8).
func (n *nemesis) holdBeats(at *Node) {
	answered := func(e transport.Envelope) bool {
		return e.Reply && e.To == at.ID() && (e.Message.Kind == transport.KindHeartbeats ||
			e.Message.Kind == transport.KindAppendEntries)
	}
	n.rule(heartbeat, n.sim.cluster.Net.Hold(n.some(0.3+0.7*n.rnd.Float64(), answered)))
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

// depose makes others elect a leader while the old one still believes in itself. Its followers' answers come late,
// so late in half of the cases that they hardly count any more; then it reaches nobody. In half of the cases nothing
// new of the others reaches it either, only answers to what it had asked: a lease that counts from the receipt of
// an answer serves stale reads then (H8). Else it hears of its successor by heartbeats only, or by everything: a
// leader that learns of a new term beside its main loop may write its own entries in that term (D9).
func (n *nemesis) depose() bool {
	leader := n.leader()
	if leader == nil {
		return false
	}
	net, id := n.sim.cluster.Net, leader.ID()
	least := time.Duration(1+n.rnd.IntN(400)) * time.Millisecond
	late := n.sim.linkFaults()
	late.Delay = transport.Uniform(least, 490*time.Millisecond) // a heartbeat's call ends after one Heartbeat
	for _, o := range n.others(leader) {
		net.SetFaults(o.ID(), id, late)
	}
	how := n.rnd.IntN(4)
	n.after(700*time.Millisecond, func(ctx context.Context) error {
		for _, o := range n.others(leader) {
			net.Cut(id, o.ID())
		}
		net.Cut(ClientNode, id) // so that its user looks for the successor at once
		if how > 0 {
			n.rule(3*time.Second, net.Lose(func(e transport.Envelope) bool {
				return e.To == id && !e.Reply && e.From != ProbeNode && (how > 1 || notHeartbeat(e.Message))
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
