package sim

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/replication/raftgroup"
	"github.com/trivet-csi/trivet/replication/transport"
)

// nemesis makes faults, one after the other, and undoes each after a while. Only its own goroutine
// starts and stops machines.
type nemesis struct {
	sim     *sim
	rnd     *rand.Rand
	due     []task
	down    map[*Node]bool // a start is due
	rotten  map[*Node]bool // bits of its disk were changed
	lost    map[*Node]bool // its replica is refused, or found damaged: it stays away
	flipped map[*Node]bool // blocks of it were damaged that the others have
	clones  map[*Node]clone
	snaps   atomic.Int32 // requests for snapshots under way
	grown   int64        // bytes that the volume has grown by

	voters electorate
	change *change // of the members, under way
	wiped  *Node   // it lost a replica that the group still counts on

	past    recorder
	release []func() // rules that last for the whole run
	replays sync.WaitGroup
}

// task is something to do at a time: mostly the end of a fault.
type task struct {
	at time.Time
	do func(ctx context.Context) error
}

func newNemesis(s *sim) *nemesis {
	// Over TCP a lost packet is a delay, and a lost connection is noticed: a loss costs this long.
	s.cluster.Net.SetLossTimeout(lossTimeout)
	s.cluster.Net.SetDefaultFaults(s.linkFaults())
	n := &nemesis{
		sim: s, rnd: newRand(s.opts.Seed, 2),
		down: map[*Node]bool{}, rotten: map[*Node]bool{}, lost: map[*Node]bool{}, flipped: map[*Node]bool{},
		clones: map[*Node]clone{},
	}
	n.voters.sure = s.cluster.Members()
	n.past.rnd = newRand(s.opts.Seed, 3)
	if s.swarm.rates[FaultReplay] > 0 {
		n.release = append(n.release, s.cluster.Net.Lose(n.past.see))
	}
	if s.swarm.writers {
		n.later(writersEvery, n.changeWriters)
	}
	return n
}

// linkFaults is how every link is in this seed.
func (s *sim) linkFaults() transport.Faults {
	return transport.Faults{
		Drop: s.swarm.drop, Duplicate: s.swarm.duplicate,
		Delay: transport.Exponential(s.swarm.delayMean, 40*s.swarm.delayMean),
	}
}

// run makes faults until ctx ends. An error is a machine that did not come back, which no fault excuses.
func (n *nemesis) run(ctx context.Context) error {
	all := context.WithoutCancel(ctx)
	pause, fault := n.sim.swarm.draw(n.rnd)
	next := time.Now().Add(pause)
	for {
		wake := next
		for _, t := range n.due {
			if t.at.Before(wake) {
				wake = t.at
			}
		}
		// Machines stop themselves as well: look often enough to start them again.
		_ = Sleep(ctx, min(time.Until(wake), tendEvery)) // its error is that of ctx
		select {
		case <-ctx.Done():
			return nil
		default:
		}
		if err := n.doDue(all); err != nil {
			return err
		}
		n.tend()
		if time.Now().Before(next) {
			continue
		}
		if err := n.make(all, fault); err != nil {
			return fmt.Errorf("%v: %w", fault, err)
		}
		pause, fault = n.sim.swarm.draw(n.rnd)
		next = time.Now().Add(pause)
	}
}

const tendEvery = 200 * time.Millisecond

// stop ends everything that lasts, but starts no machine: whoever heals decides which.
func (n *nemesis) stop() {
	for _, r := range n.release {
		r()
	}
	n.release, n.due = nil, nil
	net := n.sim.cluster.Net
	net.HealAll()
	net.ClearFaults()
	for _, node := range n.sim.cluster.Nodes() {
		node.SetDiskUsage(usage(50 << 30)) // what would have made room is not due any more
		if l := node.current(); l != nil {
			l.disk.heal()
			l.memory.arm(0, 0)
			l.wire.noise.arm(0, 0)
		}
	}
	n.sim.cluster.client.noise.arm(0, 0)
	n.replays.Wait()
}

// after does something after d.
func (n *nemesis) after(d time.Duration, do func(ctx context.Context) error) {
	n.due = append(n.due, task{at: time.Now().Add(d), do: do})
}

// later does something after a time drawn between 0.2 s and most.
func (n *nemesis) later(most time.Duration, do func(ctx context.Context) error) {
	n.after(200*time.Millisecond+time.Duration(n.rnd.Int64N(int64(most))), do)
}

// rule keeps a rule of the network for a while.
func (n *nemesis) rule(most time.Duration, release func()) {
	once := sync.OnceFunc(release)
	n.release = append(n.release, once)
	n.later(most, func(context.Context) error {
		once()
		return nil
	})
}

func (n *nemesis) doDue(ctx context.Context) error {
	var now, rest []task
	for _, t := range n.due {
		if t.at.After(time.Now()) {
			rest = append(rest, t)
		} else {
			now = append(now, t)
		}
	}
	n.due = rest
	var errs []error
	for _, t := range now {
		errs = append(errs, t.do(ctx))
	}
	return errors.Join(errs...)
}

// tend has machines started again that stopped themselves, and a volume without a holder taken over.
func (n *nemesis) tend() {
	for _, node := range n.sim.cluster.Nodes() {
		if r, ok := node.Replica(); ok {
			n.sim.noteTerm(r.Status().Term)
		}
		if !node.Up() && !n.down[node] && !n.lost[node] {
			n.goneDown(node)
		}
	}
	if told := n.sim.damaged.Swap(false); !n.sim.cluster.hasDamage() && !told {
		return
	}
	for _, node := range n.sim.cluster.Nodes() { // a user or a machine was told of damage: look who has it
		if n.rotten[node] && !n.lost[node] && node.Up() {
			if err := n.scrub(node); err != nil {
				n.lose(node, err)
			}
		}
	}
}

// lose takes a machine out of the game because its replica is damaged.
func (n *nemesis) lose(node *Node, why error) {
	if !errors.Is(why, trivet.ErrCorrupt) && !errors.Is(why, trivet.ErrInvalid) && !errors.Is(why, trivet.ErrNotFound) {
		n.sim.violate(fmt.Errorf("damage on %s has no proper name: %w", node.ID(), why))
	}
	n.sim.log.Debug("damage is reported", "node", node.ID(), "err", why)
	n.sim.count(func(r *Report) { r.Refused++ })
	n.lost[node] = true
	if n.sim.sits(node.ID()) {
		n.later(time.Second, n.takeOver)
	}
	if err := node.Stop(); err != nil {
		n.sim.log.Debug("remains of a damaged replica", "node", node.ID(), "err", err)
	}
}

// goneDown has a machine started later, and the volume taken from it.
func (n *nemesis) goneDown(node *Node) {
	n.down[node] = true
	n.later(3*time.Second, func(ctx context.Context) error { return n.start(ctx, node) })
	if n.sim.sits(node.ID()) { // its holder died with the machine
		n.later(time.Second, n.takeOver)
	}
}

// start boots a machine. One whose disk has rotted may be refused, and is out of the game then; so it
// is when a scrub finds damage. Any other must come back.
func (n *nemesis) start(ctx context.Context, node *Node) error {
	delete(n.down, node)
	if n.lost[node] || node.Up() {
		return nil
	}
	err := node.Start(ctx)
	if n.flipped[node] && errors.Is(err, trivet.ErrCorrupt) { // where an entry stands that its state has not
		n.lose(node, err)
		return nil
	}
	if !n.rotten[node] {
		if err != nil && node.stoppedItself() {
			return nil // it stopped itself again; tend starts it
		}
		return err
	}
	if err == nil && n.rnd.IntN(3) > 0 {
		err = n.scrub(node)
	}
	if err != nil {
		n.lose(node, err)
	}
	return nil
}

// scrub reads all of a replica.
func (n *nemesis) scrub(node *Node) error {
	vol, err := node.Blocks()
	if err == nil {
		_, err = vol.Digest()
	}
	if errors.Is(err, trivet.ErrUnavailable) || errors.Is(err, trivet.ErrClosed) {
		return nil // down already, or a snapshot is being installed
	}
	return err
}

// spare reports whether one more machine may be damaged: the last good copy never is. It must have one that
// counts.
func (n *nemesis) spare(node *Node) bool {
	if !n.voters.has(raftgroup.Member{Replica: node.ReplicaID(), Node: node.ID()}) {
		return false
	}
	if n.rotten[node] || n.flipped[node] {
		return true
	}
	bad := len(n.rotten)
	for x := range n.flipped {
		if !n.rotten[x] {
			bad++
		}
	}
	if n.wiped != nil {
		bad++
	}
	return bad < (n.sim.swarm.replicas-1)/2
}

// pick returns a machine that is not out of the game.
func (n *nemesis) pick() *Node {
	for {
		nodes := n.sim.cluster.Nodes()
		if node := nodes[n.rnd.IntN(len(nodes))]; !n.lost[node] {
			return node
		}
	}
}

// two returns two different machines.
func (n *nemesis) two() (a, b *Node) {
	nodes := n.sim.cluster.Nodes()
	p := n.rnd.Perm(len(nodes))
	return nodes[p[0]], nodes[p[1]]
}

// remaining returns the machines that are not out of the game.
func (n *nemesis) remaining(nodes []*Node) []*Node {
	return slices.DeleteFunc(slices.Clone(nodes), func(x *Node) bool { return n.lost[x] })
}

// leader returns who leads now, nil when nobody is known to.
func (n *nemesis) leader() *Node {
	var best *Node
	var term uint64
	for _, node := range n.sim.cluster.Nodes() {
		if r, ok := node.Replica(); ok {
			if st := r.Status(); st.IsLeader && st.Term >= term {
				best, term = node, st.Term
			}
		}
	}
	return best
}

// others returns all machines but one.
func (n *nemesis) others(not *Node) []*Node {
	var out []*Node
	for _, node := range n.sim.cluster.Nodes() {
		if node != not {
			out = append(out, node)
		}
	}
	return out
}

// takeOver moves the volume to the client or to a machine with a replica.
func (n *nemesis) takeOver(ctx context.Context) error {
	where := ClientNode
	if node := n.pick(); node.Up() && n.rnd.IntN(2) == 0 {
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
