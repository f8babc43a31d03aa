package sim

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/replication/transport"
)

// swarm is what one seed does more or less of: runs that do a bit of everything find less than runs
// that differ (hazards: section 3).
type swarm struct {
	pause           time.Duration // mean time between two faults
	drop, duplicate float64
	delayMean       time.Duration
	unsyncedPercent int // -1: drawn anew at each crash
	weights         [faultN]int
}

type fault int

const (
	faultCrash fault = iota
	faultCrashAll
	faultIsolate
	faultOneWay
	faultHold
	faultTransfer
	faultTakeOver
	faultN
)

func drawSwarm(seed uint64) swarm {
	rnd := newRand(seed, 1)
	s := swarm{
		pause:     time.Duration(800+rnd.IntN(4000)) * time.Millisecond,
		delayMean: time.Duration(1+rnd.IntN(10)) * time.Millisecond,
	}
	if rnd.IntN(2) == 0 {
		s.drop = rnd.Float64() * 0.01
	}
	if rnd.IntN(2) == 0 {
		s.duplicate = rnd.Float64() * 0.3
	}
	s.unsyncedPercent = []int{-1, 0, 25, 50, 75, 100}[rnd.IntN(6)]
	for i := range s.weights {
		s.weights[i] = rnd.IntN(10)
	}
	s.weights[faultCrash] += 3 // what this is about
	s.weights[faultCrashAll] /= 4
	return s
}

// nemesis makes faults, one after the other, and undoes each after a while.
type nemesis struct {
	sim  *sim
	rnd  *rand.Rand
	undo []undo
}

type undo struct {
	at time.Time
	do func(ctx context.Context) error
}

func newNemesis(s *sim) *nemesis {
	// Over TCP a lost packet is a delay, and a lost connection is noticed: a loss costs this long.
	s.cluster.Net.SetLossTimeout(lossTimeout)
	s.cluster.Net.SetDefaultFaults(transport.Faults{
		Drop: s.swarm.drop, Duplicate: s.swarm.duplicate,
		Delay: transport.Exponential(s.swarm.delayMean, 40*s.swarm.delayMean),
	})
	return &nemesis{sim: s, rnd: newRand(s.opts.Seed, 2)}
}

// run makes faults until ctx ends, and then undoes those that last. An error is a machine that did
// not come back, which no fault excuses.
func (n *nemesis) run(ctx context.Context) error {
	all := context.WithoutCancel(ctx)
	for {
		pause := time.Duration(n.rnd.ExpFloat64() * float64(n.sim.swarm.pause))
		ended := Sleep(ctx, pause) != nil
		if err := n.undoDue(all, ended); err != nil || ended {
			return err
		}
		if err := n.fault(all, n.draw()); err != nil {
			return err
		}
		for _, node := range n.sim.cluster.Nodes() {
			if r, ok := node.Replica(); ok {
				n.sim.count(func(rep *Report) { rep.Elections = max(rep.Elections, r.Status().Term) })
			}
		}
	}
}

func (n *nemesis) draw() fault {
	sum := 0
	for _, w := range n.sim.swarm.weights {
		sum += w
	}
	k := n.rnd.IntN(sum)
	for f, w := range n.sim.swarm.weights {
		if k -= w; k < 0 {
			return fault(f)
		}
	}
	panic("weights changed")
}

// later undoes something after a time drawn between 0.2 s and most.
func (n *nemesis) later(most time.Duration, do func(ctx context.Context) error) {
	d := 200*time.Millisecond + time.Duration(n.rnd.Int64N(int64(most)))
	n.undo = append(n.undo, undo{at: time.Now().Add(d), do: do})
}

func (n *nemesis) undoDue(ctx context.Context, all bool) error {
	var rest []undo
	var errs []error
	for _, u := range n.undo {
		if all || !u.at.After(time.Now()) {
			errs = append(errs, u.do(ctx))
			continue
		}
		rest = append(rest, u)
	}
	n.undo = rest
	return errors.Join(errs...)
}

func (n *nemesis) fault(ctx context.Context, f fault) error {
	c := n.sim.cluster
	node := c.Nodes()[n.rnd.IntN(len(c.Nodes()))]
	other := c.Nodes()[n.rnd.IntN(len(c.Nodes()))]
	switch f {
	case faultCrash:
		return n.crash(ctx, node, n.rnd.IntN(60))
	case faultCrashAll:
		for _, node := range c.Nodes() {
			if err := n.crash(ctx, node, 0); err != nil {
				return err
			}
		}
	case faultIsolate:
		n.sim.count(func(r *Report) { r.Cuts++ })
		c.Net.Isolate(node.ID())
		n.later(3*time.Second, func(context.Context) error {
			c.Net.HealAll()
			return nil
		})
	case faultOneWay:
		n.sim.count(func(r *Report) { r.Cuts++ })
		c.Net.Cut(node.ID(), other.ID())
		n.later(3*time.Second, func(context.Context) error {
			c.Net.Heal(node.ID(), other.ID())
			return nil
		})
	case faultHold:
		n.hold(node.ID())
	case faultTransfer:
		n.transfer(ctx, node)
	case faultTakeOver:
		return n.takeOver(ctx)
	}
	return nil
}

func (n *nemesis) crash(ctx context.Context, node *Node, ops int) error {
	if !node.Up() {
		return nil
	}
	n.sim.count(func(r *Report) { r.Crashes++ })
	kept := n.sim.swarm.unsyncedPercent
	if kept < 0 {
		kept = n.rnd.IntN(101)
	}
	n.sim.log.Debug("crash", "node", node.ID(), "ops", ops, "unsyncedPercent", kept)
	err := node.Crash(ctx, CrashOptions{Rand: n.rnd, UnsyncedPercent: kept, Ops: ops, Wait: 500 * time.Millisecond})
	if err != nil {
		return err
	}
	n.later(3*time.Second, node.Start)
	n.sim.mu.Lock()
	orphan := n.sim.seat.node == node.ID()
	n.sim.mu.Unlock()
	if orphan { // its holder died with the machine
		n.later(time.Second, n.takeOver)
	}
	return nil
}

// hold keeps some of the volume's requests to a machine on the way for up to several elections, while
// the client sends them again and goes on, and lets them loose on whoever leads there then (H39); or it
// keeps some of the log's messages back (H8).
func (n *nemesis) hold(to trivet.NodeID) {
	n.sim.count(func(r *Report) { r.Holds++ })
	kind, chance := transport.KindVolumeWrite, 0.05+0.2*n.rnd.Float64()
	if n.rnd.IntN(3) == 0 {
		kind, chance = transport.KindAppendEntries, 0.2
	}
	rnd := newRand(n.rnd.Uint64(), 3)
	gate := make(chan struct{}, 1) // guards rnd
	release := n.sim.cluster.Net.Hold(func(e transport.Envelope) bool {
		if e.Message.Kind != kind || e.To != to {
			return false
		}
		gate <- struct{}{}
		defer func() { <-gate }()
		return rnd.Float64() < chance
	})
	n.later(6*time.Second, func(context.Context) error {
		release()
		return nil
	})
}

func (n *nemesis) transfer(ctx context.Context, to *Node) {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	_, r, err := n.sim.cluster.Leader(ctx)
	if err != nil {
		return // nobody leads: nothing to move
	}
	if err := r.TransferTo(ctx, to.ReplicaID()); err == nil {
		n.sim.count(func(r *Report) { r.Transfers++ })
	}
}

// takeOver moves the volume to the client or to a machine with a replica.
func (n *nemesis) takeOver(ctx context.Context) error {
	where := ClientNode
	if node := n.sim.cluster.Nodes()[n.rnd.IntN(3)]; node.Up() && n.rnd.IntN(2) == 0 {
		where = node.ID()
	}
	ctx, cancel := context.WithTimeout(ctx, 8*time.Second)
	defer cancel()
	err := n.sim.takeOver(ctx, where)
	switch {
	case errors.Is(err, context.DeadlineExceeded): // the fence may be in: nobody can write until this is done
		n.later(time.Second, n.takeOver)
	case err != nil:
		return fmt.Errorf("take over: %w", err)
	default:
		n.sim.count(func(r *Report) { r.TakeOvers++ })
	}
	return nil
}
