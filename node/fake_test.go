package node

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller/meta"
	"github.com/trivet-csi/trivet/engine"
	"github.com/trivet-csi/trivet/replication"
	"github.com/trivet-csi/trivet/replication/raftgroup"
)

// fakeCatalogue is the real state machine without a group around it. Its local copy can be made to
// lag, and it can be cut off.
type fakeCatalogue struct {
	mu      sync.Mutex
	machine *meta.Machine
	local   *meta.State // what Local shows while lagging
	lagging bool
	down    bool
	changed chan struct{}
	log     []meta.Command
	awaited []func(*meta.State) bool // of once
}

func newFakeCatalogue() *fakeCatalogue {
	c := &fakeCatalogue{machine: meta.NewMachine(nil), changed: make(chan struct{})}
	c.must(meta.Command{InitCluster: &meta.InitCluster{Cluster: testCluster, Time: time.Unix(1e9, 0)}})
	return c
}

func (c *fakeCatalogue) Local() *meta.State {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.lagging {
		return c.local
	}
	return c.machine.State()
}

func (c *fakeCatalogue) Changed() <-chan struct{} {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.changed
}

func (c *fakeCatalogue) Read(context.Context) (*meta.State, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.down {
		return nil, trivet.ErrUnavailable
	}
	return c.machine.State(), nil
}

func (c *fakeCatalogue) Propose(_ context.Context, cmd meta.Command) (meta.Result, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.down {
		return meta.Result{}, trivet.ErrUnavailable
	}
	c.log = append(c.log, cmd)
	res := c.machine.Apply(cmd)
	c.notifyLocked()
	return res, nil
}

func (c *fakeCatalogue) notifyLocked() {
	close(c.changed)
	c.changed = make(chan struct{})
	st := c.machine.State()
	c.awaited = slices.DeleteFunc(c.awaited, func(seen func(*meta.State) bool) bool { return seen(st) })
}

// once returns a channel that is closed by the first state, from the present one on, for which is holds. Whoever waits
// for a change may find the next one in its place; this misses none.
func (c *fakeCatalogue) once(is func(*meta.State) bool) <-chan struct{} {
	c.mu.Lock()
	defer c.mu.Unlock()
	came := make(chan struct{})
	seen := func(st *meta.State) bool {
		if is(st) {
			close(came)
			return true
		}
		return false
	}
	if !seen(c.machine.State()) {
		c.awaited = append(c.awaited, seen)
	}
	return came
}

// must applies a command on behalf of somebody else.
func (c *fakeCatalogue) must(cmd meta.Command) meta.Result {
	c.mu.Lock()
	defer c.mu.Unlock()
	res := c.machine.Apply(cmd)
	if res.Err != nil {
		panic(res.Err)
	}
	c.notifyLocked()
	return res
}

// freeze makes Local show the present for as long as it is on.
func (c *fakeCatalogue) freeze(on bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.lagging, c.local = on, c.machine.State()
	c.notifyLocked()
}

func (c *fakeCatalogue) setDown(down bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.down = down
}

func (c *fakeCatalogue) volume(id trivet.VolumeID) meta.Volume {
	c.mu.Lock()
	defer c.mu.Unlock()
	v, _ := c.machine.State().Volume(id)
	return v
}

// count says how many proposals of the agent satisfy is.
func (c *fakeCatalogue) count(is func(meta.Command) bool) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	n := 0
	for _, cmd := range c.log {
		if is(cmd) {
			n++
		}
	}
	return n
}

func testUUID(n int) string { return fmt.Sprintf("%08x-0000-4000-8000-000000000000", n) }

func testReplica(n int) trivet.ReplicaID { return trivet.ReplicaID(testUUID(0x100 + n)) }

func testDisk(n int) trivet.DiskID { return trivet.DiskID(testUUID(0x200 + n)) }

func testNodeID(n int) trivet.NodeID { return trivet.NodeID(fmt.Sprintf("n%d", n)) }

// addNode registers node n with disk n.
func (c *fakeCatalogue) addNode(n int) {
	c.must(meta.Command{RegisterNode: &meta.RegisterNode{Node: meta.Node{
		ID: testNodeID(n), Address: fmt.Sprintf("10.0.0.%d:7000", n), Incarnation: testUUID(0x300 + n),
		LeaseUntil: time.Unix(2e9, 0),
		Disks:      []meta.Disk{{ID: testDisk(n), Path: "/d", SizeBytes: 1 << 40, FreeBytes: 1 << 40}},
	}}})
}

// addVolume creates a volume with a replica on each of nodes 1 to n.
func (c *fakeCatalogue) addVolume(id trivet.VolumeID, n int, params map[string]string) {
	v := meta.Volume{
		ID: id, Name: id.String(), SizeBytes: 64 << 20, Reclaim: meta.ReclaimDelete, Request: "r", Params: params,
		Created: time.Unix(1e9, 0),
	}
	for i := 1; i <= n; i++ {
		v.Replicas = append(v.Replicas, meta.Replica{
			ID: testReplica(int(id)<<4 | i), Node: testNodeID(i), Disk: testDisk(i), State: meta.ReplicaCreating,
		})
	}
	c.must(meta.Command{CreateVolume: &meta.CreateVolume{Volume: v}})
}

func (c *fakeCatalogue) report(id trivet.VolumeID, i int, s meta.ReplicaState) {
	c.must(meta.Command{ReportReplica: &meta.ReportReplica{
		Volume: id, Replica: testReplica(int(id)<<4 | i), State: s,
	}})
}

// fakeHost keeps replicas in memory.
type fakeHost struct {
	mu       sync.Mutex
	made     map[trivet.VolumeID]trivet.ReplicaID
	members  map[trivet.VolumeID][]raftgroup.Member // of the spec it was made with
	lost     map[trivet.VolumeID]error              // what OpenReplica says
	open     map[trivet.VolumeID]*fakeReplica
	created  int
	blockOn  trivet.VolumeID // CreateReplica of it hangs
	createIn chan struct{}   // closed by the first CreateReplica that hangs
}

func newFakeHost() *fakeHost {
	return &fakeHost{
		made: make(map[trivet.VolumeID]trivet.ReplicaID), lost: make(map[trivet.VolumeID]error),
		open: make(map[trivet.VolumeID]*fakeReplica), createIn: make(chan struct{}),
		members: make(map[trivet.VolumeID][]raftgroup.Member),
	}
}

func (h *fakeHost) CreateReplica(ctx context.Context, s replication.ReplicaSpec) error {
	h.mu.Lock()
	block := h.blockOn == s.Volume
	h.mu.Unlock()
	if block {
		close(h.createIn)
		<-ctx.Done()
		return ctx.Err()
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.made[s.Volume], h.members[s.Volume] = s.Replica, s.Members
	h.created++
	return nil
}

func (h *fakeHost) OpenReplica(_ context.Context, s replication.ReplicaSpec) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if err := h.lost[s.Volume]; err != nil {
		return err
	}
	if h.made[s.Volume] != s.Replica {
		return fmt.Errorf("no replica %s: %w", s.Replica, trivet.ErrNotFound)
	}
	if h.open[s.Volume] == nil {
		h.open[s.Volume] = &fakeReplica{changed: make(chan struct{}), status: replication.ReplicaStatus{
			Status: raftgroup.Status{Members: h.members[s.Volume]}, Replica: s.Replica,
		}}
	}
	return nil
}

func (h *fakeHost) RecoverReplica(ctx context.Context, s replication.ReplicaSpec) error {
	if err := h.OpenReplica(ctx, s); err != nil {
		return err
	}
	r := h.replica(s.Volume)
	r.mu.Lock()
	defer r.mu.Unlock()
	r.status.Members = []raftgroup.Member{{Replica: s.Replica}}
	return nil
}

func (h *fakeHost) ParkReplica(_ context.Context, s replication.ReplicaSpec) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.open, s.Volume)
	return nil
}

func (h *fakeHost) DestroyReplica(_ context.Context, s replication.ReplicaSpec) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.open, s.Volume)
	delete(h.made, s.Volume)
	return nil
}

func (h *fakeHost) running(id trivet.VolumeID) (runningReplica, bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	r, ok := h.open[id]
	return r, ok
}

func (h *fakeHost) replica(id trivet.VolumeID) *fakeReplica {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.open[id]
}

func (h *fakeHost) has(id trivet.VolumeID) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	_, ok := h.made[id]
	return ok
}

func (h *fakeHost) createdN() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.created
}

// fakeReplica leads when told to.
type fakeReplica struct {
	mu       sync.Mutex
	status   replication.ReplicaStatus
	changed  chan struct{}
	fenced   []trivet.Epoch
	writers  []replication.Writers // of fences that named them
	wiped    []trivet.Epoch
	fenceErr error
	stays    bool // leadership, whatever TransferTo wants
	lags     bool // its learners
	promotes int

	freezes   []trivet.Epoch // of each freeze
	freezeErr error
	back      []trivet.Epoch // of each rollback

	scrubs   []replication.ScrubOptions
	scrubErr error
	scrubN   trivet.LBA // ranges of one block that a pass has
}

// ScrubRange finds one damaged block in each range.
func (r *fakeReplica) ScrubRange(_ context.Context, o replication.ScrubOptions) (replication.ScrubRange, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.status.IsLeader {
		return replication.ScrubRange{}, trivet.ErrNotLeader
	}
	if r.scrubErr != nil {
		return replication.ScrubRange{}, r.scrubErr
	}
	r.scrubs = append(r.scrubs, o)
	return replication.ScrubRange{
		Next: o.From + 1, Done: o.From+1 >= r.scrubN, CheckedBytes: 3 * trivet.BlockSize, Found: 1, Repaired: 1,
		Findings: []string{"a block"},
	}, nil
}

func (r *fakeReplica) failScrubs(err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.scrubErr = err
}

func (r *fakeReplica) scrubbed() []replication.ScrubOptions {
	r.mu.Lock()
	defer r.mu.Unlock()
	return append([]replication.ScrubOptions(nil), r.scrubs...)
}

func (r *fakeReplica) lead(on bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.status.IsLeader = on
	r.status.Term++
	close(r.changed)
	r.changed = make(chan struct{})
}

func (r *fakeReplica) failFences(err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.fenceErr = err
}

func (r *fakeReplica) epochs() (fenced, wiped []trivet.Epoch) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return append([]trivet.Epoch(nil), r.fenced...), append([]trivet.Epoch(nil), r.wiped...)
}

func (r *fakeReplica) Status() replication.ReplicaStatus {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.status
}

func (r *fakeReplica) Changed() <-chan struct{} {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.changed
}

func (r *fakeReplica) FenceWriters(ctx context.Context, epoch trivet.Epoch, w replication.Writers) error {
	err := r.Fence(ctx, epoch)
	r.mu.Lock()
	defer r.mu.Unlock()
	r.writers = append(r.writers, w)
	return err
}

func (r *fakeReplica) Fence(_ context.Context, epoch trivet.Epoch) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.status.IsLeader {
		return trivet.ErrNotLeader
	}
	if r.fenceErr != nil {
		return r.fenceErr
	}
	r.fenced = append(r.fenced, epoch)
	return nil
}

func (r *fakeReplica) Wipe(_ context.Context, epoch trivet.Epoch) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.wiped = append(r.wiped, epoch)
	return nil
}

func (r *fakeReplica) Resize(_ context.Context, sizeBytes int64) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.status.IsLeader {
		return trivet.ErrNotLeader
	}
	if sizeBytes < r.status.SizeBytes {
		return trivet.ErrOutOfRange
	}
	r.status.SizeBytes = sizeBytes
	return nil
}

func (r *fakeReplica) TransferTo(context.Context, trivet.ReplicaID) error {
	r.mu.Lock()
	stays := r.stays
	r.mu.Unlock()
	if stays {
		return trivet.ErrUnavailable
	}
	r.lead(false)
	return nil
}

func (r *fakeReplica) AddLearner(_ context.Context, m raftgroup.Member) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	m.Learner = true
	r.status.Members = append(slices.Clone(r.status.Members), m)
	return nil
}

func (r *fakeReplica) Promote(_ context.Context, id trivet.ReplicaID) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.promotes++
	if r.lags {
		return trivet.ErrPending
	}
	r.status.Members = slices.Clone(r.status.Members)
	for i := range r.status.Members {
		if r.status.Members[i].Replica == id {
			r.status.Members[i].Learner = false
		}
	}
	return nil
}

func (r *fakeReplica) Remove(_ context.Context, id trivet.ReplicaID) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.status.Members = slices.DeleteFunc(slices.Clone(r.status.Members), func(m raftgroup.Member) bool {
		return m.Replica == id
	})
	return nil
}

// Freeze keeps the snapshot in the status.
func (r *fakeReplica) Freeze(_ context.Context, epoch trivet.Epoch, id trivet.SnapshotID) (replication.Frozen, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.freezeErr != nil {
		return replication.Frozen{}, r.freezeErr
	}
	r.freezes = append(r.freezes, epoch)
	n := trivet.Generation(len(r.freezes))
	r.status.Snapshots = append(slices.Clone(r.status.Snapshots), engine.Snapshot{ID: uint64(id), Generation: n})
	return replication.Frozen{Generation: n, SizeBytes: 64 << 20}, nil
}

// Rollback remembers the epoch.
func (r *fakeReplica) Rollback(_ context.Context, epoch trivet.Epoch, _ trivet.SnapshotID) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.back = append(r.back, epoch)
	return nil
}

func (r *fakeReplica) DropSnapshot(_ context.Context, id trivet.SnapshotID) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.status.Snapshots = slices.DeleteFunc(slices.Clone(r.status.Snapshots), func(s engine.Snapshot) bool {
		return s.ID == uint64(id)
	})
	return nil
}

// edit changes a volume's record past all rules, for states that no command of this package's tests makes.
func (c *fakeCatalogue) edit(id trivet.VolumeID, f func(*meta.Volume)) {
	c.mu.Lock()
	defer c.mu.Unlock()
	b, err := c.machine.State().EncodeImage()
	if err != nil {
		panic(err)
	}
	revision := c.machine.State().Revision() + 1
	const header, trailer = 16, 4 // controller/meta/image.go
	var im map[string]json.RawMessage
	var vs []meta.Volume
	if err := errors.Join(json.Unmarshal(b[header:len(b)-trailer], &im), json.Unmarshal(im["volumes"], &vs)); err != nil {
		panic(err)
	}
	for i := range vs {
		if vs[i].ID == id {
			f(&vs[i])
			vs[i].Revision = revision
		}
	}
	if im["volumes"], err = json.Marshal(vs); err != nil {
		panic(err)
	}
	im["revision"] = json.RawMessage(strconv.FormatUint(uint64(revision), 10))
	body, err := json.Marshal(im)
	if err != nil {
		panic(err)
	}
	b = append(binary.LittleEndian.AppendUint64(b[:8:8], uint64(len(body))), body...)
	b = binary.LittleEndian.AppendUint32(b, crc32.Checksum(b, crc32.MakeTable(crc32.Castagnoli)))
	st, err := meta.DecodeImage(b)
	if err != nil {
		panic(err)
	}
	c.machine = meta.NewMachine(st)
	c.notifyLocked()
}
