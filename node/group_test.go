package node

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller/meta"
	"github.com/trivet-csi/trivet/engine"
	"github.com/trivet-csi/trivet/engine/segment"
	"github.com/trivet-csi/trivet/replication"
	"github.com/trivet-csi/trivet/replication/raftgroup"
	"github.com/trivet-csi/trivet/replication/transport"
)

// groupBench is agents with real engines and real groups over a fake catalogue, within a bubble.
type groupBench struct {
	t         *testing.T
	cat       *fakeCatalogue
	net       *transport.Memory
	nodes     map[int]*groupNode
	parkAfter time.Duration
	trip      *trip // nil: nothing crashes

	wrap func(g *groupNode, m raftgroup.StateMachine) raftgroup.StateMachine // nil: no machine is faulty
}

// groupNode is one machine.
type groupNode struct {
	b     *groupBench
	n     int
	disk  trivet.DiskID
	fs    *vfs.MemFS
	boots int
	found trivet.ReplicaID // what holds said when the machine booted, before its agent could remove it

	link  *transport.MemoryNode
	eng   *engine.Engine
	log   *segment.Log
	host  *replication.Host
	share *countedShare
	agent *Agent // nil while down
}

// inGroups runs f with machines 1 to n and a volume with a replica on each of the first three.
func inGroups(t *testing.T, n int, parkAfter time.Duration, f func(t *testing.T, b *groupBench)) {
	t.Helper()
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		b := &groupBench{
			t: t, cat: newFakeCatalogue(), net: transport.NewMemory(1), nodes: map[int]*groupNode{}, parkAfter: parkAfter,
		}
		b.net.SetSilentAfter(500 * time.Millisecond)
		b.net.SetDefaultFaults(transport.Faults{Delay: transport.Uniform(time.Millisecond, 3*time.Millisecond)})
		for i := 1; i <= n; i++ {
			b.nodes[i] = &groupNode{b: b, n: i, disk: testDisk(i), fs: vfs.NewCrashableMem()}
			b.nodes[i].boot()
		}
		defer func() {
			for _, g := range b.nodes {
				g.kill()
			}
			require.NoError(t, b.net.Close())
		}()
		b.until("all nodes are registered", func() bool { return len(b.cat.Local().Nodes()) == n })
		b.cat.addVolume(vol, 3, nil)
		b.until("the volume is there", func() bool { return b.cat.volume(vol).Phase == meta.PhaseAvailable })
		f(t, b)
	})
}

// until waits for a condition, in the bubble's time. Machines that crashed meanwhile are booted again.
func (b *groupBench) until(what string, cond func() bool) {
	b.t.Helper()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for end := time.Now().Add(2 * time.Minute); !cond(); <-tick.C {
		if b.trip != nil {
			if g := b.trip.victim(); g != nil {
				g.kill()
				g.boot()
			}
		}
		if !time.Now().Before(end) {
			v := b.cat.volume(vol)
			require.FailNow(b.t, "never came true: "+what, "replicas %+v\nretired %+v", v.Replicas, v.Retired)
		}
	}
}

func (g *groupNode) fatal(err error) { g.b.t.Errorf("fatal on n%d: %v", g.n, err) }

// boot starts the machine on what its disk has.
func (g *groupNode) boot() {
	t := g.b.t
	t.Helper()
	if _, err := g.fs.Stat("/d"); err != nil {
		require.NoError(t, g.fs.MkdirAll("/d", 0o700))
		root, err := g.fs.OpenDir("/")
		require.NoError(t, err)
		require.NoError(t, root.Sync())
		require.NoError(t, root.Close())
	}
	var err error
	g.log, g.share = g.openLog(), newCountedShare(g.b.cat)
	g.eng, err = engine.Open(engine.Config{
		FS: g.fs, Dir: "/d/engine", CacheBytes: 1 << 20, MemTableBytes: 1 << 20, Log: g.log, Fatal: g.fatal,
		Background: g.share.Background,
	})
	require.NoError(t, err)
	g.link = g.b.net.Node(testNodeID(g.n))
	g.host, err = replication.NewHost(replication.HostConfig{
		Network: g.link, Mux: raftgroup.NewMux(g.link), Timing: raftgroup.Timing{Heartbeat: 500 * time.Millisecond},
		SnapshotBytes: 256 << 10, IsMember: memberChecker(g.b.cat), Fatal: g.fatal,
		WrapMachine: func(m raftgroup.StateMachine) raftgroup.StateMachine {
			if g.b.wrap == nil {
				return m
			}
			return g.b.wrap(g, m)
		},
	})
	require.NoError(t, err)
	g.boots++
	cfg := agentConfig{
		ID: testNodeID(g.n), ParkAfter: g.b.parkAfter, Fatal: g.fatal,
		Self: meta.Node{Address: fmt.Sprintf("10.0.0.%d:7000", g.n), Incarnation: testUUID(g.n<<12 | g.boots)},
		Usage: func() ([]meta.Disk, error) {
			return []meta.Disk{{ID: g.disk, Path: "/d", SizeBytes: 1 << 40, FreeBytes: 1 << 40}}, nil
		},
		Verify: func() error { return nil },
		Disks: map[trivet.DiskID]replication.Disk{g.disk: {
			ID: g.disk, Dir: "/d", FS: g.fs, Engine: g.eng, Log: g.log, Share: g.share,
		}},
		OnDisk: map[trivet.VolumeID][]placed{},
	}
	if g.found = g.holds(); g.found != "" {
		cfg.OnDisk[vol] = []placed{{g.disk, g.found}}
	}
	var cat Catalogue = g.b.cat
	var host replicaHost = realHost{g.host}
	if g.b.trip != nil {
		cat, host = tripCatalogue{cat, g}, tripHost{host, g}
	}
	g.agent = openAgent(cfg, cat, host)
}

// openLog opens the disk's log, and formats it on a new disk.
func (g *groupNode) openLog() *segment.Log {
	t := g.b.t
	t.Helper()
	opts := segment.Options{
		Dir: raftgroup.LogDir(g.fs, "/d/log"), Disk: g.disk, Lanes: 1, SegmentBytes: 256 << 10, DataLane: true,
		Hold: true,
	}
	if _, err := g.fs.Stat("/d/log"); err != nil {
		require.NoError(t, segment.Format(opts))
	}
	log, err := segment.Open(opts)
	require.NoError(t, err)
	return log
}

// kill takes the power from the machine.
func (g *groupNode) kill() {
	if g.agent == nil {
		return
	}
	after := g.fs.CrashClone(vfs.CrashCloneCfg{})
	require.NoError(g.b.t, g.link.Close())
	g.agent.close()
	_ = g.host.Close() // a dead process: what it says does not count
	_ = g.eng.Close()
	_ = g.log.Close()
	g.agent, g.fs = nil, after
}

// wipe gives the machine, while it is down, an empty disk under another name.
func (g *groupNode) wipe() {
	g.fs, g.disk = vfs.NewCrashableMem(), testDisk(0x10+g.n)
}

// holds returns which replica of the volume is on the disk, "" for none.
func (g *groupNode) holds() trivet.ReplicaID {
	v, err := g.eng.OpenVolume(vol)
	if errors.Is(err, trivet.ErrNotFound) {
		return ""
	}
	require.NoError(g.b.t, err)
	return v.Replica()
}

// runs reports whether a replica of the volume runs on the machine.
func (g *groupNode) runs() bool {
	_, ok := g.host.Replica(vol)
	return ok
}

func ours(i int) trivet.ReplicaID { return testReplica(int(vol)<<4 | i) }

// add wants replica i, on the disk of its node, instead of another.
func (b *groupBench) add(i, node int, replaces trivet.ReplicaID) {
	b.cat.edit(vol, func(v *meta.Volume) {
		v.Replicas = append(v.Replicas, meta.Replica{
			ID: ours(i), Node: testNodeID(node), Disk: b.nodes[node].disk, State: meta.ReplicaJoining, Replaces: replaces,
		})
	})
}

// has reports whether the volume has exactly these replicas, all Ready, and retired ones.
func (b *groupBench) has(retired int, is ...int) func() bool {
	return func() bool {
		v := b.cat.volume(vol)
		for _, i := range is {
			if r := v.Replica(ours(i)); r == nil || r.State != meta.ReplicaReady {
				return false
			}
		}
		return len(v.Replicas) == len(is) && len(v.Retired) == retired
	}
}

// leader returns the machine whose replica leads, nil while none is known to.
func (b *groupBench) leader() (*groupNode, *replication.Replica) {
	var best *groupNode
	var replica *replication.Replica
	for _, g := range b.nodes {
		if g.agent == nil {
			continue
		}
		if r, ok := g.host.Replica(vol); ok && r.Status().IsLeader {
			if best == nil || r.Status().Term > replica.Status().Term {
				best, replica = g, r
			}
		}
	}
	return best, replica
}

// requireGroup demands that the group consists of these voters, which hold the same.
func (b *groupBench) requireGroup(is ...int) {
	b.t.Helper()
	var want []raftgroup.Member
	v := b.cat.volume(vol)
	for _, i := range is {
		want = append(want, raftgroup.Member{Replica: ours(i), Node: v.Replica(ours(i)).Node})
	}
	var r *replication.Replica
	b.until("a leader", func() bool { _, r = b.leader(); return r != nil })
	require.ElementsMatch(b.t, want, r.Status().Members)
	b.until("the replicas are equal", func() bool {
		digests := map[[32]byte]bool{}
		for _, g := range b.nodes {
			if g.agent == nil || v.ReplicaOn(testNodeID(g.n)) == nil {
				continue
			}
			blocks, err := g.eng.OpenVolume(vol)
			if err != nil || blocks.Restoring() {
				return false
			}
			d, err := blocks.Digest()
			require.NoError(b.t, err)
			digests[d] = true
		}
		return len(digests) == 1
	})
}

// attach grants the volume to node 1 and opens it, on a machine that has no replica, as the attacher does.
func (b *groupBench) attach() *replication.Volume { return b.attachTo("n1") }

func (b *groupBench) attachTo(node trivet.NodeID) *replication.Volume {
	b.t.Helper()
	b.cat.must(meta.Command{Attach: &meta.Attach{Volume: vol, Node: node, Mode: meta.SingleNodeMultiWriter}})
	b.until("the epoch is fenced", func() bool {
		v := b.cat.volume(vol)
		return v.Attached != nil && v.FencedEpoch == v.Epoch
	})
	v := b.cat.volume(vol)
	find := func() []raftgroup.Member {
		now := b.cat.volume(vol)
		return mayLead(&now)
	}
	d, err := replication.OpenVolume(replication.VolumeConfig{
		ID: vol, SizeBytes: v.SizeBytes, Epoch: v.Epoch, Members: mayLead(&v), FindMembers: find,
		Network: b.net.Node("client"),
	})
	require.NoError(b.t, err)
	return d
}

func (b *groupBench) detach(d *replication.Volume) {
	require.NoError(b.t, d.Close())
	b.cat.must(meta.Command{Detach: &meta.Detach{Volume: vol, Node: "n1"}})
}

// write keeps two blocks changing until stop, and reads each back.
func (b *groupBench) write(d *replication.Volume) (stop func()) {
	ctx, cancel := context.WithCancel(b.t.Context())
	var wg sync.WaitGroup
	for i := range 2 {
		wg.Go(func() {
			got := make([]byte, trivet.BlockSize)
			for k := 1; ctx.Err() == nil; k++ {
				want := bytes.Repeat([]byte{byte(k)}, trivet.BlockSize)
				err := d.WriteAt(ctx, want, int64(i)*trivet.BlockSize)
				if err == nil {
					err = d.ReadAt(ctx, got, int64(i)*trivet.BlockSize)
				}
				if ctx.Err() != nil {
					return
				}
				if !assert.NoError(b.t, err) || !assert.Equal(b.t, want[0], got[0], "block %d", i) {
					return
				}
				<-time.After(30 * time.Millisecond)
			}
		})
	}
	return func() {
		cancel()
		wg.Wait()
	}
}

// trip kills the machine that does a certain step: the at-th of those that change something. It stands
// still there, before the step or after it, until the test has killed it.
type trip struct {
	at    int
	after bool

	mu    sync.Mutex
	steps int
	dead  *groupNode
}

func (p *trip) victim() *groupNode {
	p.mu.Lock()
	defer p.mu.Unlock()
	g := p.dead
	p.dead = nil
	return g
}

func (p *trip) hit() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.steps++
	return p.steps == p.at
}

func (p *trip) done() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.steps
}

func (p *trip) reached() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.steps >= p.at
}

// step does f, unless the machine crashes before or after it.
func (g *groupNode) step(ctx context.Context, f func() error) error {
	p := g.b.trip
	hit := p.hit()
	if !hit {
		return f()
	}
	if p.after {
		_ = f() // nobody hears what has become of it
	}
	p.mu.Lock()
	p.dead = g
	p.mu.Unlock()
	<-ctx.Done()
	return ctx.Err()
}

type tripCatalogue struct {
	Catalogue
	g *groupNode
}

func (c tripCatalogue) Propose(ctx context.Context, cmd meta.Command) (res meta.Result, err error) {
	if cmd.ReportReplica == nil && cmd.ReportSize == nil && cmd.ReportRecovered == nil {
		return c.Catalogue.Propose(ctx, cmd)
	}
	err = c.g.step(ctx, func() error {
		res, err = c.Catalogue.Propose(ctx, cmd)
		return err
	})
	return res, err
}

type tripHost struct {
	replicaHost
	g *groupNode
}

func (h tripHost) CreateReplica(ctx context.Context, s replication.ReplicaSpec) error {
	return h.g.step(ctx, func() error { return h.replicaHost.CreateReplica(ctx, s) })
}

func (h tripHost) RecoverReplica(ctx context.Context, s replication.ReplicaSpec) error {
	return h.g.step(ctx, func() error { return h.replicaHost.RecoverReplica(ctx, s) })
}

func (h tripHost) DestroyReplica(ctx context.Context, s replication.ReplicaSpec) error {
	return h.g.step(ctx, func() error { return h.replicaHost.DestroyReplica(ctx, s) })
}

func (h tripHost) running(id trivet.VolumeID) (runningReplica, bool) {
	r, ok := h.replicaHost.running(id)
	return tripReplica{r, h.g}, ok
}

type tripReplica struct {
	runningReplica
	g *groupNode
}

func (r tripReplica) AddLearner(ctx context.Context, m raftgroup.Member) error {
	return r.g.step(ctx, func() error { return r.runningReplica.AddLearner(ctx, m) })
}

func (r tripReplica) Promote(ctx context.Context, id trivet.ReplicaID) error {
	return r.g.step(ctx, func() error { return r.runningReplica.Promote(ctx, id) })
}

func (r tripReplica) Remove(ctx context.Context, id trivet.ReplicaID) error {
	return r.g.step(ctx, func() error { return r.runningReplica.Remove(ctx, id) })
}

func (r tripReplica) Resize(ctx context.Context, sizeBytes int64) error {
	return r.g.step(ctx, func() error { return r.runningReplica.Resize(ctx, sizeBytes) })
}

func (r tripReplica) TransferTo(ctx context.Context, id trivet.ReplicaID) error {
	return r.g.step(ctx, func() error { return r.runningReplica.TransferTo(ctx, id) })
}
