package controller_test

import (
	"context"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller"
	"github.com/trivet-csi/trivet/controller/meta"
)

const gib = int64(1) << 30

func uuid(kind, n int) string { return fmt.Sprintf("%08x-0000-4000-8000-%012x", kind, n) }

func nodeID(n int) trivet.NodeID { return trivet.NodeID(fmt.Sprintf("n%d", n)) }

var clusterID = trivet.ClusterID(uuid(1, 1))

// testNode is a node with one disk and a live lease.
func testNode(n int, now time.Time) meta.Node {
	return meta.Node{
		ID: nodeID(n), Address: fmt.Sprintf("n%d:1", n), Zone: fmt.Sprintf("z%d", (n-1)%3), Incarnation: uuid(0xf, n),
		LeaseUntil: now.Add(time.Hour),
		Disks:      []meta.Disk{{ID: trivet.DiskID(uuid(0xd, n)), Path: "/d", SizeBytes: 100 * gib, FreeBytes: 80 * gib}},
	}
}

// memory is a catalogue of one process: the real state machine without a group around it.
type memory struct {
	mu      sync.Mutex
	machine *meta.Machine
	changed chan struct{}
	down    bool                      // no quorum
	lagging *meta.State               // what Local returns while it lags; nil = the truth
	before  func(c meta.Command) bool // called before each proposal; false loses it
}

var _ controller.Store = (*memory)(nil)

func newMemory(t *testing.T, nodes int) *memory {
	t.Helper()
	m := &memory{machine: meta.NewMachine(nil), changed: make(chan struct{})}
	m.must(t, meta.Command{InitCluster: &meta.InitCluster{Cluster: clusterID, Time: time.Now()}})
	for n := 1; n <= nodes; n++ {
		m.must(t, meta.Command{RegisterNode: &meta.RegisterNode{Node: testNode(n, time.Now())}})
	}
	return m
}

func (m *memory) must(t *testing.T, c meta.Command) {
	t.Helper()
	_, err := m.apply(c)
	require.NoError(t, err)
}

func (m *memory) apply(c meta.Command) (meta.Result, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	before := m.machine.State()
	res := m.machine.Apply(c)
	if m.machine.State() != before {
		close(m.changed)
		m.changed = make(chan struct{})
	}
	return res, res.Err
}

func (m *memory) Local() *meta.State {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.lagging != nil {
		return m.lagging
	}
	return m.machine.State()
}

// setLag freezes Local at what it is now, or lets it catch up.
func (m *memory) setLag(lag bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.lagging = nil
	if lag {
		m.lagging = m.machine.State()
	}
	close(m.changed)
	m.changed = make(chan struct{})
}

func (m *memory) Changed() <-chan struct{} {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.changed
}

func (m *memory) Read(context.Context) (*meta.State, error) {
	if m.isDown() {
		return nil, fmt.Errorf("read catalogue: %w", trivet.ErrUnavailable)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.machine.State(), nil
}

func (m *memory) Propose(_ context.Context, c meta.Command) (meta.Result, error) {
	if m.before != nil && !m.before(c) || m.isDown() {
		return meta.Result{}, fmt.Errorf("%s: %w", c.Op(), trivet.ErrUnavailable)
	}
	return m.apply(c)
}

func (m *memory) Leader() trivet.NodeID { return "n1" }

func (m *memory) isDown() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.down
}

func (m *memory) setDown(down bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.down = down
}

// agents do what the node agents of a cluster do, for every node but those told not to.
type agents struct {
	store *memory

	mu      sync.Mutex
	dead    map[trivet.NodeID]bool // reports nothing
	faulty  map[trivet.NodeID]bool // cannot make replicas
	noFence bool                   // the volumes' groups have no quorum

	noFlatten bool // clones stay as they are made
	noGroups  bool // groups of snapshots fail
}

func startAgents(t *testing.T, store *memory) *agents {
	t.Helper()
	a := &agents{store: store, dead: map[trivet.NodeID]bool{}, faulty: map[trivet.NodeID]bool{}}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			changed := store.Changed()
			a.round()
			select {
			case <-changed:
			case <-ctx.Done():
				return
			}
		}
	}()
	t.Cleanup(func() { cancel(); <-done })
	return a
}

// set changes what the agents do, and lets them look again.
func (a *agents) set(t *testing.T, change func()) {
	t.Helper()
	a.mu.Lock()
	change()
	a.mu.Unlock()
	a.round()
}

func (a *agents) round() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.roundOfSnapshots()
	for _, v := range a.truth().Volumes() {
		for _, r := range v.Replicas {
			if r.State == meta.ReplicaLeaving { // the leader's to report, which is somewhere
				a.report(meta.Command{ReportReplica: &meta.ReportReplica{
					Volume: v.ID, Replica: r.ID, State: meta.ReplicaLeft,
				}})
				continue
			}
			if a.dead[r.Node] {
				continue
			}
			state := r.State
			switch {
			case v.Phase == meta.PhaseDeleting:
				state = meta.ReplicaRemoved
			case r.State == meta.ReplicaCreating && a.faulty[r.Node]:
				state = meta.ReplicaFaulted
			case r.State == meta.ReplicaCreating, r.State == meta.ReplicaFilling:
				state = meta.ReplicaReady
			case r.State == meta.ReplicaJoining && a.faulty[r.Node]:
				state = meta.ReplicaFaulted
			case r.State == meta.ReplicaJoining:
				state = meta.ReplicaFilling
			}
			if state != r.State {
				a.report(meta.Command{ReportReplica: &meta.ReportReplica{Volume: v.ID, Replica: r.ID, State: state}})
			}
		}
		for _, r := range v.Retired {
			if !a.dead[r.Node] {
				a.report(meta.Command{ReportReplica: &meta.ReportReplica{
					Volume: v.ID, Replica: r.ID, State: meta.ReplicaRemoved,
				}})
			}
		}
		if v.Phase == meta.PhaseDeleting || v.Phase == meta.PhaseCreating || a.noFence {
			continue
		}
		if v.FencedEpoch < v.Epoch {
			a.report(meta.Command{ReportFence: &meta.ReportFence{Volume: v.ID, Epoch: v.Epoch}})
		}
		if v.Growing() {
			a.report(meta.Command{ReportSize: &meta.ReportSize{Volume: v.ID, SizeBytes: v.WantSizeBytes}})
		}
		if v.Phase == meta.PhaseRecycling {
			a.report(meta.Command{ReportWiped: &meta.ReportWiped{Volume: v.ID, Epoch: v.Epoch}})
		}
		if v.WantLeader != "" {
			a.report(meta.Command{ReportLeader: &meta.ReportLeader{Volume: v.ID, Replica: v.WantLeader}})
		}
	}
}

// roundOfSnapshots freezes, drops and flattens.
func (a *agents) roundOfSnapshots() {
	if a.noFence {
		return
	}
	s := a.truth()
	for _, snap := range s.Snapshots() {
		switch snap.State {
		case meta.SnapshotCreating:
			v, _ := s.Volume(snap.Volume)
			a.report(meta.Command{ReportSnapshot: &meta.ReportSnapshot{
				Snapshot: snap.ID, State: meta.SnapshotReady, SizeBytes: v.SizeBytes, Generation: 3,
			}})
		case meta.SnapshotDeleting:
			a.report(meta.Command{ReportSnapshot: &meta.ReportSnapshot{Snapshot: snap.ID, State: meta.SnapshotRemoved}})
		case meta.SnapshotReady, meta.SnapshotFailed, meta.SnapshotRemoved:
		}
	}
	a.roundOfGroups()
	for _, v := range s.Volumes() {
		for _, r := range v.Replicas {
			if v.Source != nil && !v.Source.Flattened && r.State == meta.ReplicaReady && !a.noFlatten {
				a.report(meta.Command{ReportFlattened: &meta.ReportFlattened{Volume: v.ID, Replica: r.ID}})
			}
		}
		if v.Phase == meta.PhaseRestoring {
			a.report(meta.Command{ReportRolledBack: &meta.ReportRolledBack{Volume: v.ID, Epoch: v.Epoch}})
		}
	}
}

// roundOfGroups makes groups of snapshots on node n1, whose members' writers it speaks for.
func (a *agents) roundOfGroups() {
	s := a.truth()
	n1, _ := s.Node("n1")
	for _, g := range s.UnsettledGroups() {
		r := &meta.ReportSnapshotGroup{Group: g.ID, Node: n1.ID, Incarnation: n1.Incarnation, State: meta.GroupReady}
		if a.noGroups {
			r.State, r.Reason = meta.GroupFailed, "node n9 does not answer"
		}
		for _, m := range g.Members {
			if snap, _ := s.Snapshot(m.Snapshot); snap.State == meta.SnapshotCreating && !a.noGroups {
				r.Frozen = append(r.Frozen, meta.FrozenMember{Snapshot: m.Snapshot, SizeBytes: gib, Generation: 4, Held: 9})
			}
		}
		a.report(meta.Command{BeginSnapshotGroup: &meta.BeginSnapshotGroup{
			Group: g.ID, Node: n1.ID, Incarnation: n1.Incarnation,
		}})
		a.report(meta.Command{ReportSnapshotGroup: r})
	}
}

// truth is what the agents of the other nodes see.
func (a *agents) truth() *meta.State {
	s, err := a.store.Read(context.Background())
	if err != nil {
		return a.store.Local()
	}
	return s
}

// report ignores refusals: the next round looks again.
func (a *agents) report(c meta.Command) { _, _ = a.store.apply(c) }
