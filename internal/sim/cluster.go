package sim

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/replication"
	"github.com/trivet-csi/trivet/replication/raftgroup"
	"github.com/trivet-csi/trivet/replication/transport"
)

const (
	pollEvery = 20 * time.Millisecond
	volumeID  = trivet.VolumeID(0x5157)
)

// ClusterConfig says what a Cluster is made of.
type ClusterConfig struct {
	Seed          uint64
	Replicas      int // that the volume begins with; nodes are called n1, n2, ...
	Spares        int // further machines, without a replica until one joins there
	SizeBytes     int64
	SnapshotBytes int64 // small, so that logs are compacted and snapshots installed
	Heartbeat     time.Duration
	// WrapMachine, when set, stands between each group and its state machine.
	WrapMachine func(raftgroup.StateMachine) raftgroup.StateMachine
	// OverlapFlush is every Host's.
	OverlapFlush bool
	// LyingDisks claim to have synced Raft's files and have not, once the cluster is made.
	LyingDisks bool
	// FlushLatency, when positive, is the mean time that a flush of Raft's log takes.
	FlushLatency time.Duration
	// Skew, when set, is how fast each machine's clock runs its timers, 1 being right. Machines are told
	// nothing of it, but followers do tell their leader how long they keep a promise.
	Skew []float64
	// ReadConsistency of what OpenVolume returns.
	ReadConsistency trivet.ReadConsistency
	// Authorize, when set, is every Host's.
	Authorize func(node trivet.NodeID, volume trivet.VolumeID, epoch trivet.Epoch) error
	// Background, when set, is every Host's.
	Background func(ctx context.Context, bytes int) (release func(), err error)
	// SweepRate is every engine's, LogCacheBytes every log's; 0 = the default.
	SweepRate     int
	LogCacheBytes int64
	Logger        *slog.Logger // may be nil
}

// Cluster is a volume on machines that can crash, and a client that has no replica. Its methods may be
// called concurrently, but those that start or stop one machine must not run together.
type Cluster struct {
	Net *transport.Memory

	cfg     ClusterConfig
	ballots *ballots
	timing  raftgroup.Timing
	nodes   []*Node
	client  *noisyWire // of ClientNode

	mu       sync.Mutex
	members  []raftgroup.Member // where replicas are that may lead: what a catalogue would say
	joined   int                // replicas that were given a new ID
	failures []error            // Fatal of machines that ran and had no reason
	exits    uint64             // of machines that had one
	lives    uint64             // machines booted
	damaged  bool               // a machine met damage on its disk
}

// ClientNode is the machine without a replica.
const ClientNode = trivet.NodeID("client")

// ProbeNode is another one, whose links no fault of the nemesis cuts on purpose.
const ProbeNode = trivet.NodeID("probe")

// NewCluster makes the machines and the volume's replicas, and starts them.
func NewCluster(ctx context.Context, cfg ClusterConfig) (*Cluster, error) {
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	c := &Cluster{
		Net: transport.NewMemory(cfg.Seed), cfg: cfg,
		timing: raftgroup.Timing{Heartbeat: cfg.Heartbeat, Lease: cfg.Heartbeat * 3 / 4},
	}
	c.ballots = watchVotes(c)
	if cfg.Heartbeat > 0 {
		c.Net.SetSilentAfter(cfg.Heartbeat)
	}
	c.client = &noisyWire{MemoryNode: c.Net.Node(ClientNode)}
	for i := range cfg.Replicas + cfg.Spares {
		c.nodes = append(c.nodes, c.newNode(i))
		if i < cfg.Replicas {
			m := raftgroup.Member{Replica: replicaID(0, i+1), Node: c.nodes[i].id}
			c.members = append(c.members, m)
		}
	}
	for i, n := range c.nodes {
		var err error
		if i < cfg.Replicas {
			err = n.birth(ctx, c.members[i].Replica, c.members)
		} else {
			err = n.bootSpare()
		}
		if err != nil {
			return nil, errors.Join(err, c.Close())
		}
	}
	return c, nil
}

func (c *Cluster) newNode(i int) *Node {
	n := &Node{c: c, id: trivet.NodeID(fmt.Sprintf("n%d", i+1)), mem: vfs.NewCrashableMem(), timing: c.timing}
	if i < len(c.cfg.Skew) {
		n.timing.Heartbeat = time.Duration(float64(n.timing.Heartbeat) / c.cfg.Skew[i])
		n.timing.Lease = time.Duration(float64(n.timing.Lease) / c.cfg.Skew[i])
		n.clock.rate = c.cfg.Skew[i]
	}
	return n
}

// replicaID names the i-th replica of those that the volume begins with (kind 0) or that join (kind 1).
func replicaID(kind, i int) trivet.ReplicaID {
	return trivet.ReplicaID(fmt.Sprintf("0000000%d-0000-4000-8000-%012d", kind, i))
}

// Volume returns the ID of the cluster's volume.
func (c *Cluster) Volume() trivet.VolumeID { return volumeID }

// Nodes returns the machines, those without a replica too.
func (c *Cluster) Nodes() []*Node { return c.nodes }

// Node returns a machine by its name.
func (c *Cluster) Node(id trivet.NodeID) *Node {
	for _, n := range c.nodes {
		if n.id == id {
			return n
		}
	}
	return nil
}

// Members returns where replicas are that may lead, as a catalogue would know it: one that is being added is
// among them once it is a learner, one that is removed until it has left.
func (c *Cluster) Members() []raftgroup.Member {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Clone(c.members)
}

// fatal is what a machine calls instead of stopping its process.
func (c *Cluster) fatal(n *Node, l *life) func(error) {
	return func(err error) {
		if l.isDead() {
			return
		}
		if l.excused(err) {
			n.exit(l, err)
			return
		}
		c.fail(fmt.Errorf("fatal on %s: %w", n.id, err))
	}
}

// fail notes what makes the run fail.
func (c *Cluster) fail(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.failures = append(c.failures, err)
}

// damage is what a machine's engine calls when it meets damage. Where nobody changed a bit there must be none.
func (c *Cluster) damage(n *Node, l *life) func(error) {
	return func(err error) {
		if l.isDead() {
			return
		}
		c.mu.Lock()
		defer c.mu.Unlock()
		if !l.rotten.Load() {
			c.failures = append(c.failures, fmt.Errorf("damage on %s, whose disk is whole: %w", n.id, err))
		}
		c.damaged = true
	}
}

// hasDamage reports whether a machine has met damage since it was asked last.
func (c *Cluster) hasDamage() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	was := c.damaged
	c.damaged = false
	return was
}

// nextExit numbers the machines that stop themselves.
func (c *Cluster) nextExit() uint64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.exits++
	return c.exits
}

// nextLife numbers the boots of machines.
func (c *Cluster) nextLife() uint64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.lives++
	return c.lives
}

// Exits returns how many machines stopped themselves because of an injected fault.
func (c *Cluster) Exits() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return int(c.exits)
}

// Failures returns what made machines give up, other than being crashed.
func (c *Cluster) Failures() []error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return append([]error(nil), c.failures...)
}

// standing says how each machine's replica is, for a run that got stuck.
func (c *Cluster) standing() string {
	var b strings.Builder
	for _, n := range c.nodes {
		fmt.Fprintf(&b, "%s: up=%t rotted=%t", n.ID(), n.Up(), n.hasRotted())
		if r, ok := n.Replica(); ok {
			fmt.Fprintf(&b, " replica=%s %+v", n.ReplicaID(), r.Status())
		}
		b.WriteByte('\n')
	}
	return b.String()
}

// Leader waits for a replica that leads.
func (c *Cluster) Leader(ctx context.Context) (*Node, *replication.Replica, error) {
	for {
		var best *Node
		var replica *replication.Replica
		var term uint64
		for _, n := range c.nodes { // a deposed leader may not know it yet
			r, ok := n.Replica()
			if !ok {
				continue
			}
			if st := r.Status(); st.IsLeader && st.Term >= term {
				best, replica, term = n, r, st.Term
			}
		}
		if best != nil {
			return best, replica, nil
		}
		if err := Sleep(ctx, pollEvery); err != nil {
			return nil, nil, fmt.Errorf("wait for a leader: %w", err)
		}
	}
}

// Fence commits an epoch through whoever leads, asking again until it is done.
func (c *Cluster) Fence(ctx context.Context, epoch trivet.Epoch) error {
	return c.lead(ctx, func(r *replication.Replica) error { return r.Fence(ctx, epoch) })
}

// resize makes the volume larger through whoever leads, asking again until it is done.
func (c *Cluster) resize(ctx context.Context, sizeBytes int64) error {
	return c.lead(ctx, func(r *replication.Replica) error { return r.Resize(ctx, sizeBytes) })
}

// lead calls f with the leader until it gives an answer that is not "ask again".
func (c *Cluster) lead(ctx context.Context, f func(*replication.Replica) error) error {
	for {
		_, r, err := c.Leader(ctx)
		if err != nil {
			return err
		}
		err = f(r)
		if !errors.Is(err, trivet.ErrNotLeader) && !errors.Is(err, trivet.ErrUnavailable) {
			return err
		}
		if err := Sleep(ctx, pollEvery); err != nil {
			return fmt.Errorf("%w: %w", err, trivet.ErrUnavailable)
		}
	}
}

// OpenVolume opens the volume on a machine; on ClientNode without a local replica.
func (c *Cluster) OpenVolume(node trivet.NodeID, epoch trivet.Epoch, ioTimeout time.Duration) (
	*replication.Volume, error,
) {
	return c.openVolume(node, epoch, ioTimeout, c.Members(), c.Members, c.cfg.ReadConsistency)
}

// OpenVolumeWith is OpenVolume for reads of another consistency than the cluster's.
func (c *Cluster) OpenVolumeWith(node trivet.NodeID, epoch trivet.Epoch, reads trivet.ReadConsistency) (
	*replication.Volume, error,
) {
	return c.openVolume(node, epoch, 0, c.Members(), c.Members, reads)
}

// openVolume opens a volume that asks only the given members, or those that find says.
func (c *Cluster) openVolume(node trivet.NodeID, epoch trivet.Epoch, ioTimeout time.Duration,
	members []raftgroup.Member, find func() []raftgroup.Member, reads trivet.ReadConsistency,
) (*replication.Volume, error) {
	return replication.OpenVolume(c.volumeConfig(node, epoch, ioTimeout, members, find, reads))
}

func (c *Cluster) volumeConfig(node trivet.NodeID, epoch trivet.Epoch, ioTimeout time.Duration,
	members []raftgroup.Member, find func() []raftgroup.Member, reads trivet.ReadConsistency,
) replication.VolumeConfig {
	cfg := replication.VolumeConfig{
		ID: volumeID, SizeBytes: c.cfg.SizeBytes, Epoch: epoch, Members: members, FindMembers: find, ReadConsistency: reads,
		IOTimeout: ioTimeout, Network: c.Net.Node(node), Logger: c.cfg.Logger.With("node", node),
	}
	if node == ClientNode {
		cfg.Network = c.client
	}
	if n := c.Node(node); n != nil {
		if l := n.current(); l != nil {
			cfg.Host, cfg.Network = l.host, l.wire
		}
	}
	return cfg
}

// Converge waits until every member's replica has applied what the leader has.
func (c *Cluster) Converge(ctx context.Context) error { return c.converge(ctx, c.holders()) }

// holders returns the machines of Members.
func (c *Cluster) holders() []*Node {
	members := c.Members()
	var out []*Node
	for _, n := range c.nodes {
		id := n.ReplicaID()
		if slices.ContainsFunc(members, func(m raftgroup.Member) bool { return m.Replica == id }) {
			out = append(out, n)
		}
	}
	return out
}

func (c *Cluster) converge(ctx context.Context, nodes []*Node) error {
	for {
		indexes := map[uint64]bool{}
		for _, n := range nodes {
			if l := n.current(); l != nil {
				if vol, err := l.eng.OpenVolume(volumeID); err == nil && !vol.Restoring() {
					indexes[vol.State().AppliedIndex] = true
					continue
				}
			}
			indexes[^uint64(0)] = true
		}
		if len(indexes) == 1 && !indexes[^uint64(0)] {
			return nil
		}
		if err := Sleep(ctx, pollEvery); err != nil {
			return fmt.Errorf("replicas are at indexes %v: %w", indexes, err)
		}
	}
}

// Digests returns the digest of blocks and state of each member's replica that runs.
func (c *Cluster) Digests() (map[trivet.NodeID][32]byte, error) {
	out := map[trivet.NodeID][32]byte{}
	for _, n := range c.holders() {
		l := n.current()
		if l == nil {
			continue
		}
		vol, err := l.eng.OpenVolume(volumeID)
		if err != nil {
			return nil, err
		}
		if out[n.id], err = vol.Digest(); err != nil {
			return nil, err
		}
	}
	return out, nil
}

// Close stops everything and waits for it.
func (c *Cluster) Close() error {
	var errs []error
	for _, n := range c.nodes {
		errs = append(errs, n.Stop())
		n.bury()
	}
	errs = append(errs, c.Net.Close())
	return errors.Join(errs...)
}

// Sleep waits for d or the end of ctx, whose error it returns.
func Sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func newRand(seed, stream uint64) *rand.Rand { return rand.New(rand.NewPCG(seed, stream)) }
