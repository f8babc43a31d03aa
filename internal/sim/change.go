package sim

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"

	"github.com/trivet-csi/trivet/replication/raftgroup"
)

// change is one change of the group's members: a replica comes, one goes, or both. Its steps are taken one
// by one, each again until it succeeds, while other faults go on. There is never more than one (H33).
type change struct {
	joiner *Node            // machine that gets a replica; nil: nobody joins
	leaver raftgroup.Member // who goes, once that is decided
	grow   bool             // nobody goes
	step   changeStep
	goal   uint64 // what was committed when the joiner's promotion was first asked for
}

type changeStep int

const (
	stepMake changeStep = iota
	stepLearner
	stepPromote
	stepRemove
	stepRetire
	stepDone
)

// changePatience is how long one attempt at a step takes.
const changePatience = 2 * time.Second

// electorate is what the nemesis knows of who votes. It is what it must leave a majority of.
type electorate struct {
	sure  []raftgroup.Member // as the last change left them that is known to be committed
	maybe []raftgroup.Member // as they are if the change under way was made; nil: none is
}

// settled takes over a change whose success was reported.
func (e *electorate) settled() { e.sure, e.maybe = e.maybe, nil }

func (e *electorate) has(m raftgroup.Member) bool { return slices.Contains(e.sure, m) }

// move begins a change: a spare machine gets a replica, and most of the time another one goes.
func (n *nemesis) move() bool {
	if n.change != nil {
		return false
	}
	ch := &change{grow: n.rnd.IntN(4) == 0}
	extra := len(n.voters.sure) - n.sim.swarm.replicas
	if extra > 0 && n.rnd.IntN(2) == 0 {
		ch.step = stepRemove
	} else {
		for _, node := range n.sim.cluster.Nodes() {
			if node.ReplicaID() == "" && !n.lost[node] {
				ch.joiner = node
			}
		}
		if ch.joiner == nil && extra <= 0 {
			return false
		} else if ch.joiner == nil {
			ch.step = stepRemove
		}
	}
	n.begin(ch)
	return true
}

// replace takes the disk of a machine for good. Its replica is gone, and a new one under a new name takes its
// place, on the same machine (H10).
func (n *nemesis) replace(ctx context.Context) (made bool, err error) {
	node := n.pick()
	old := raftgroup.Member{Replica: node.ReplicaID(), Node: node.ID()}
	if n.change != nil || !n.voters.has(old) || !n.spare(node) {
		return false, nil
	}
	if _, err := n.crash(ctx, node, 0); err != nil {
		return false, err
	}
	if err := n.emptyDisk(node); err != nil {
		return false, err
	}
	n.wiped = node
	n.begin(&change{joiner: node, leaver: old})
	return true, nil
}

// emptyDisk gives a machine that is down another disk, with nothing on it.
func (n *nemesis) emptyDisk(node *Node) error {
	node.swapDisk(vfs.NewCrashableMem())
	node.forgetRot()
	node.setReplica("", nil, false)
	delete(n.rotten, node)
	delete(n.flipped, node)
	delete(n.clones, node)
	delete(n.lost, node)
	return node.format()
}

func (n *nemesis) begin(ch *change) {
	n.change = ch
	n.later(time.Second, n.advance)
}

// advance takes the next step of the change, or tries it again. Every second time the one after it follows
// at once: a learner is asked to vote before it has anything.
func (n *nemesis) advance(ctx context.Context) error {
	for n.change != nil {
		step := n.change.step
		if err := n.attempt(ctx); err != nil {
			return err
		}
		if n.change != nil && (n.change.step == step || n.rnd.IntN(2) == 0) {
			n.later(time.Second, n.advance)
			return nil
		}
	}
	return nil
}

// attempt tries the next step once. Its failure is what faults do; that it succeeds in the end, settle demands.
func (n *nemesis) attempt(ctx context.Context) error {
	ch := n.change
	try, cancel := context.WithTimeout(ctx, changePatience)
	defer cancel()
	err := n.do(try, ch)
	n.sim.log.Debug("change of members", "step", int(ch.step), "joiner", ch.joiner.name(), "leaver", ch.leaver.Node,
		"err", err)
	switch {
	case errors.Is(err, errDiskGone):
		return err
	case err != nil:
		return nil //nolint:nilerr // it is tried again
	}
	ch.step++
	if ch.step == stepRemove && ch.grow && ch.leaver.Replica == "" {
		ch.step = stepDone
	}
	if ch.step == stepDone {
		n.change = nil
		n.sim.count(func(r *Report) { r.Changes++ })
	}
	return nil
}

// errDiskGone is a failure of the simulator itself.
var errDiskGone = errors.New("no disk for a machine")

func (n *Node) name() string {
	if n == nil {
		return ""
	}
	return string(n.id)
}

func (n *nemesis) do(ctx context.Context, ch *change) error {
	c := n.sim.cluster
	switch ch.step {
	case stepMake:
		return ch.joiner.Join(ctx)
	case stepLearner:
		return c.AddLearner(ctx, ch.joiner)
	case stepPromote:
		return n.promote(ctx, ch)
	case stepRemove:
		if ch.leaver.Replica == "" {
			ch.leaver = n.leaver(ch.joiner)
		}
		n.voters.maybe = slices.DeleteFunc(slices.Clone(n.voters.sure), func(m raftgroup.Member) bool {
			return m == ch.leaver
		})
		if err := c.Remove(ctx, ch.leaver.Replica); err != nil {
			return err
		}
		n.voters.settled()
		n.wiped = nil
	case stepRetire:
		return n.retire(ctx, ch.leaver)
	case stepDone:
	}
	return nil
}

// promote gives the joiner its vote. It must have everything then that was committed when that was first asked
// for (I14), whichever attempt it was that succeeded.
func (n *nemesis) promote(ctx context.Context, ch *change) error {
	m := raftgroup.Member{Replica: ch.joiner.ReplicaID(), Node: ch.joiner.ID()}
	n.voters.maybe = append(slices.Clone(n.voters.sure), m)
	if leader := n.leader(); ch.goal == 0 && leader != nil {
		if r, ok := leader.Replica(); ok {
			ch.goal = r.Status().Commit
		}
	}
	if err := n.sim.cluster.Promote(ctx, ch.joiner); err != nil {
		return err
	}
	n.voters.settled()
	if r, ok := ch.joiner.Replica(); ok && r.Status().LastIndex < ch.goal {
		n.sim.violate(fmt.Errorf("replica on %s got a vote with entries to %d, %d was committed",
			ch.joiner.ID(), r.Status().LastIndex, ch.goal))
	}
	return nil
}

// leaver draws who goes: one that is lost before all others, the leader as often as not.
func (n *nemesis) leaver(not *Node) raftgroup.Member {
	var others []raftgroup.Member
	leader := n.leader()
	for _, m := range n.voters.sure {
		switch node := n.sim.cluster.Node(m.Node); {
		case n.lost[node]:
			return m
		case node == not:
		case node == leader && n.rnd.IntN(2) == 0:
			return m
		default:
			others = append(others, m)
		}
	}
	return others[n.rnd.IntN(len(others))]
}

// retire removes the data of a replica that has left, mostly a while after that: until then the machine runs
// it and has not heard of it, or not understood.
func (n *nemesis) retire(ctx context.Context, m raftgroup.Member) error {
	node := n.sim.cluster.Node(m.Node)
	switch {
	case node.ReplicaID() != m.Replica:
		return nil // it went with its disk
	case n.lost[node]:
		if err := n.emptyDisk(node); err != nil {
			return fmt.Errorf("%w: %w", errDiskGone, err)
		}
		return nil
	case n.rnd.IntN(4) > 0:
		return errors.New("not yet")
	}
	return node.Discard(ctx)
}

// finish brings the change under way to its end.
func (n *nemesis) finish(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, livenessMax)
	defer cancel()
	for n.change != nil {
		step := n.change.step
		if err := n.attempt(ctx); err != nil {
			return err
		}
		if err := Sleep(ctx, pollEvery); err != nil {
			return fmt.Errorf("change of members does not get beyond step %d: %w", step, err)
		}
	}
	return nil
}

// serves reports whether a member's replica is on its machine and not lost.
func (n *nemesis) serves(m raftgroup.Member) bool {
	node := n.sim.cluster.Node(m.Node)
	return !n.lost[node] && node.ReplicaID() == m.Replica && node.hasReplica()
}

// core draws machines for the liveness phase that are a majority whether or not the change under way was made.
// None of them is about to be removed: such a one need not converge.
func (n *nemesis) core(rnd *rand.Rand) ([]*Node, error) {
	sets := [][]raftgroup.Member{n.voters.sure}
	candidates := n.voters.sure
	if n.voters.maybe != nil {
		sets = append(sets, n.voters.maybe)
		candidates = n.voters.maybe
	}
	var core []*Node
	have := map[raftgroup.Member]bool{}
	for _, i := range rnd.Perm(len(candidates)) {
		if majorities(sets, have) {
			return core, nil
		}
		if m := candidates[i]; n.serves(m) {
			have[m] = true
			core = append(core, n.sim.cluster.Node(m.Node))
		}
	}
	if !majorities(sets, have) {
		return nil, fmt.Errorf("no majority is left of %v", sets)
	}
	return core, nil
}

func majorities(sets [][]raftgroup.Member, have map[raftgroup.Member]bool) bool {
	for _, set := range sets {
		k := 0
		for _, m := range set {
			if have[m] {
				k++
			}
		}
		if k <= len(set)/2 {
			return false
		}
	}
	return true
}

// whole returns the machines of all voters that are not lost. REQUIRES: no change is under way.
func (n *nemesis) whole() []*Node {
	var out []*Node
	for _, m := range n.voters.sure {
		if n.serves(m) {
			out = append(out, n.sim.cluster.Node(m.Node))
		}
	}
	return out
}
