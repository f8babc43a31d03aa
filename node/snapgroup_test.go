package node

import (
	"context"
	"encoding/binary"
	"path/filepath"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller/meta"
	"github.com/trivet-csi/trivet/internal/faultdev"
	"github.com/trivet-csi/trivet/replication"
	"github.com/trivet-csi/trivet/replication/transport"
)

const snapGroup = trivet.SnapshotGroupID(0x71)

// pointDevice is the group of a volume in memory. A write takes a millisecond; a freeze notes the number in block zero
// after a while of its own.
type pointDevice struct {
	trivet.Device

	mu     sync.Mutex
	freeze time.Duration
	err    error             // of Freeze
	points map[uint64]uint64 // by snapshot
	gate   chan struct{}     // writes wait for it to close; nil = they do not
}

func (d *pointDevice) Close() error        { return nil }
func (d *pointDevice) SetSize(int64) error { return trivet.ErrInvalid }

func (d *pointDevice) WriteAt(ctx context.Context, p []byte, off int64) error {
	d.mu.Lock()
	gate := d.gate
	d.mu.Unlock()
	if gate != nil {
		<-gate
	}
	time.Sleep(time.Millisecond)
	return d.Device.WriteAt(ctx, p, off)
}

func (d *pointDevice) Freeze(ctx context.Context, id trivet.SnapshotID) (replication.Frozen, error) {
	d.mu.Lock()
	wait, err := d.freeze, d.err
	d.mu.Unlock()
	select {
	case <-time.After(wait):
	case <-ctx.Done():
		return replication.Frozen{}, ctx.Err()
	}
	p := make([]byte, trivet.BlockSize)
	if err == nil {
		err = d.ReadAt(ctx, p, 0)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.points[uint64(id)] = binary.LittleEndian.Uint64(p)
	return replication.Frozen{Generation: 4, SizeBytes: 64 << 20}, err
}

// set changes how the device answers.
func (d *pointDevice) set(change func(*pointDevice)) {
	d.mu.Lock()
	defer d.mu.Unlock()
	change(d)
}

func (d *pointDevice) point(id trivet.SnapshotID) uint64 {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.points[uint64(id)]
}

// barrierBench is nodes n1 and n2 over fakes: n1 has volume 1 attached, n2 volume 2, and nobody volume 3.
type barrierBench struct {
	cat     *fakeCatalogue
	net     *transport.Memory
	nodes   map[trivet.NodeID]*mounts
	volumes map[trivet.VolumeID]*pointDevice
	stops   map[trivet.NodeID]func()
}

// inBarrierBench runs f in a bubble.
func inBarrierBench(t *testing.T, f func(t *testing.T, b *barrierBench)) {
	t.Helper()
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		b := &barrierBench{
			cat: newFakeCatalogue(), net: transport.NewMemory(1), nodes: map[trivet.NodeID]*mounts{},
			volumes: map[trivet.VolumeID]*pointDevice{}, stops: map[trivet.NodeID]func(){},
		}
		for n := 1; n <= 3; n++ {
			b.cat.addNode(n)
		}
		for id := trivet.VolumeID(1); id <= 3; id++ {
			b.cat.addVolume(id, 3, map[string]string{"cacheMode": "writeThrough"})
			for n := 1; n <= 3; n++ {
				b.cat.report(id, n, meta.ReplicaReady)
			}
			b.volumes[id] = &pointDevice{Device: faultdev.NewMem(64 << 20), points: map[uint64]uint64{}}
		}
		b.start(t, 1, dir)
		b.start(t, 2, dir)
		b.attach(1, "n1")
		b.attach(2, "n2")
		f(t, b)
		for _, stop := range b.stops {
			stop()
		}
		for _, m := range b.nodes {
			m.holds.close()
			for id := range b.volumes {
				require.NoError(t, m.attacher.drop(id))
			}
		}
		require.NoError(t, b.net.Close())
	})
}

func (b *barrierBench) attach(id trivet.VolumeID, node trivet.NodeID) {
	b.cat.must(meta.Command{Attach: &meta.Attach{Volume: id, Node: node, Mode: meta.SingleNodeMultiWriter}})
	b.cat.must(meta.Command{ReportFence: &meta.ReportFence{Volume: id, Epoch: b.cat.volume(id).Epoch}})
}

// start starts node n, and what makes groups on it.
func (b *barrierBench) start(t *testing.T, n int, dir string) {
	t.Helper()
	id := testNodeID(n)
	cfg := Config{
		ID: id, Incarnation: testUUID(0x300 + n), RunDir: filepath.Join(dir, string(id)), Catalogue: b.cat,
		Network: b.net.Node(id), CacheBytes: 4 << 20,
	}
	recs, err := openRecords(filepath.Join(cfg.RunDir, "volumes"), "boot-1")
	require.NoError(t, err)
	m := &mounts{
		attacher: newAttacher(&cfg), mounter: newFakeMounter(), records: recs, log: loggerOr(nil), growing: newVolumeSet(),
	}
	m.attacher.registered = func(context.Context) error { return nil }
	m.attacher.openGroup = func(c replication.VolumeConfig) (groupDevice, error) { return b.volumes[c.ID], nil }
	m.serveGroups(cfg.Network)
	b.nodes[id] = m
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { m.makeGroups(ctx); close(done) }()
	b.stops[id] = func() { cancel(); <-done }
}

func (b *barrierBench) open(t *testing.T, node trivet.NodeID, id trivet.VolumeID) trivet.Device {
	t.Helper()
	d, _, _, err := b.nodes[node].openNBD(t.Context(), id)
	require.NoError(t, err)
	return d
}

// ask asks for a group; its snapshots have the IDs 16*id and up.
func (b *barrierBench) ask(id trivet.SnapshotGroupID, volumes ...trivet.VolumeID) {
	c := &meta.CreateSnapshotGroup{ID: id, Name: id.String(), Created: time.Now()}
	for i, volume := range volumes {
		c.Members = append(c.Members, meta.NewMember{
			Snapshot: trivet.SnapshotID(16*uint64(id) + uint64(i)), Volume: volume, IfRevision: b.cat.volume(volume).Revision,
		})
	}
	b.cat.must(meta.Command{CreateSnapshotGroup: c})
}

// settled waits until a group is made or given up.
func (b *barrierBench) settled(id trivet.SnapshotGroupID) meta.SnapshotGroup {
	for {
		changed := b.cat.Changed()
		if g, _ := b.cat.Local().SnapshotGroup(id); g.Settled() {
			return g
		}
		<-changed
	}
}

func numbered(n uint64) []byte {
	p := make([]byte, trivet.BlockSize)
	binary.LittleEndian.PutUint64(p, n)
	return p
}

// writeBoth writes n to first and, once that is acknowledged, to second, for n = 1, 2, …, until the bubble's test ends
// it, and returns how far it came.
func writeBoth(t *testing.T, first, second trivet.Device) (stop func() uint64) {
	t.Helper()
	ended, done := make(chan struct{}), make(chan uint64)
	go func() {
		for n := uint64(1); ; n++ {
			select {
			case <-ended:
				done <- n - 1
				return
			default:
			}
			for _, d := range []trivet.Device{first, second} {
				assert.NoError(t, d.WriteAt(context.Background(), numbered(n), 0)) //nolint:usetesting,forbidigo // beyond t
			}
		}
	}()
	return func() uint64 { close(ended); return <-done }
}

// A write that was acknowledged before another one was begun is never missing where that one is in, whichever volume
// takes longer to freeze; and writes go on afterwards.
func TestGroupIsAtOnePoint(t *testing.T) {
	t.Parallel()
	inBarrierBench(t, func(t *testing.T, b *barrierBench) {
		stop := writeBoth(t, b.open(t, "n1", 1), b.open(t, "n2", 2))
		for i := range trivet.SnapshotGroupID(6) {
			time.Sleep(100 * time.Millisecond)
			b.volumes[1+trivet.VolumeID(i%2)].set(func(d *pointDevice) { d.freeze = 0 })
			b.volumes[2-trivet.VolumeID(i%2)].set(func(d *pointDevice) { d.freeze = time.Second })
			b.ask(snapGroup+i, 2, 1)
			g := b.settled(snapGroup + i)
			require.Equal(t, meta.GroupReady, g.State, g.Reason)
			require.GreaterOrEqual(t, g.Held, time.Second)
			first, second := b.volumes[1].point(g.Members[1].Snapshot), b.volumes[2].point(g.Members[0].Snapshot)
			require.Contains(t, []uint64{second, second + 1}, first, "the order of the writes is not kept")
			require.Positive(t, first)
			s, _ := b.cat.Local().Snapshot(g.Members[0].Snapshot)
			require.Equal(t, meta.SnapshotReady, s.State)
			require.EqualValues(t, 4, s.Generation)
		}
		n1 := b.nodes["n1"].holdTimes.Group.Totals()
		_, all := n1.Cumulative()
		require.EqualValues(t, 6, all)
		require.Greater(t, stop(), uint64(6*10))
	})
}

// A member that nobody may write is made by its leader's agent; the group waits for it without holding anything.
func TestGroupWaitsForTheUnheld(t *testing.T) {
	t.Parallel()
	inBarrierBench(t, func(t *testing.T, b *barrierBench) {
		d := b.open(t, "n1", 1)
		b.ask(snapGroup, 1, 3)
		time.Sleep(time.Second)
		g, _ := b.cat.Local().SnapshotGroup(snapGroup)
		require.Equal(t, meta.GroupCreating, g.State)
		s, _ := b.cat.Local().Snapshot(g.Members[0].Snapshot)
		require.Nil(t, b.nodes["n1"].freezes(b.cat.Local(), &s), "it is not for n1 alone to freeze")
		began := time.Now()
		require.NoError(t, d.WriteAt(t.Context(), numbered(1), 0))
		require.Less(t, time.Since(began), 10*time.Millisecond)
		b.cat.must(meta.Command{ReportSnapshot: &meta.ReportSnapshot{
			Snapshot: g.Members[1].Snapshot, State: meta.SnapshotReady, SizeBytes: 64 << 20,
		}})
		g = b.settled(snapGroup)
		require.Equal(t, meta.GroupReady, g.State, g.Reason)
		b.ask(snapGroup+1, 3)
		b.cat.must(meta.Command{ReportSnapshot: &meta.ReportSnapshot{
			Snapshot: 16 * trivet.SnapshotID(snapGroup+1), State: meta.SnapshotReady, SizeBytes: 64 << 20,
		}})
		g = b.settled(snapGroup + 1)
		require.Equal(t, meta.GroupReady, g.State, "nobody writes any of it")
	})
}

// A holder that does not come to hold fails the group. The others' writes do not wait for longer than the limit, and go
// on in between.
func TestGroupOfALateHolder(t *testing.T) {
	t.Parallel()
	inBarrierBench(t, func(t *testing.T, b *barrierBench) {
		one, two := b.open(t, "n1", 1), b.open(t, "n2", 2)
		gate := make(chan struct{})
		b.volumes[2].set(func(d *pointDevice) { d.gate = gate })
		hung := make(chan error, 1)
		go func() { hung <- two.WriteAt(t.Context(), numbered(1), 0) }()
		synctest.Wait()
		b.ask(snapGroup, 1, 2)
		wrote, longest := 0, time.Duration(0)
		for g, _ := b.cat.Local().SnapshotGroup(snapGroup); !g.Settled(); g, _ = b.cat.Local().SnapshotGroup(snapGroup) {
			began := time.Now()
			require.NoError(t, one.WriteAt(t.Context(), numbered(1), 0))
			wrote, longest = wrote+1, max(longest, time.Since(began))
		}
		g := b.settled(snapGroup)
		require.Equal(t, meta.GroupFailed, g.State)
		require.Contains(t, g.Reason, "node n2")
		require.Greater(t, wrote, groupHoldsMax)
		require.Greater(t, longest, groupHoldMax/2, "nothing was held")
		require.LessOrEqual(t, longest, groupHoldMax+time.Second)
		close(gate)
		require.NoError(t, <-hung)
		s, _ := b.cat.Local().Snapshot(g.Members[0].Snapshot)
		require.Equal(t, meta.SnapshotDeleting, s.State)
	})
}

// A member that is not frozen fails the group; what was frozen is deleted.
func TestGroupOfAFailedFreeze(t *testing.T) {
	t.Parallel()
	inBarrierBench(t, func(t *testing.T, b *barrierBench) {
		one := b.open(t, "n1", 1)
		b.open(t, "n2", 2)
		b.volumes[2].set(func(d *pointDevice) { d.err = trivet.ErrNoSpace })
		b.ask(snapGroup, 1, 2)
		g := b.settled(snapGroup)
		require.Equal(t, meta.GroupFailed, g.State)
		require.Contains(t, g.Reason, trivet.ErrNoSpace.Error())
		require.NoError(t, one.WriteAt(t.Context(), numbered(1), 0))
		for _, m := range g.Members {
			s, _ := b.cat.Local().Snapshot(m.Snapshot)
			require.Equal(t, meta.SnapshotDeleting, s.State)
		}
	})
}

// ofStep matches the messages that ask for a step.
func ofStep(s barrierStep) transport.Match {
	return func(e transport.Envelope) bool {
		return e.Message.Kind == transport.KindSnapshotBarrier && !e.Reply && e.Message.Body[1] == byte(s)
	}
}

// A holder that hears nothing any more lets writes go on by itself; what comes then is refused, and the group fails.
func TestHolderLetsGo(t *testing.T) {
	t.Parallel()
	inBarrierBench(t, func(t *testing.T, b *barrierBench) {
		b.open(t, "n1", 1)
		two := b.open(t, "n2", 2)
		b.net.Lose(ofStep(stepFreeze))
		b.net.Lose(ofStep(stepRelease))
		b.ask(snapGroup, 1, 2)
		synctest.Wait()
		time.Sleep(100 * time.Millisecond)
		began := time.Now()
		require.NoError(t, two.WriteAt(t.Context(), numbered(1), 0))
		require.Greater(t, time.Since(began), groupHoldMax/2, "writes were not held")
		require.LessOrEqual(t, time.Since(began), groupHoldMax)
		g := b.settled(snapGroup)
		require.Equal(t, meta.GroupFailed, g.State)
		require.Zero(t, b.volumes[2].point(g.Members[1].Snapshot))
	})
}

// began makes node n1 the owner of a group of volumes 1 and 2.
func (b *barrierBench) began(id trivet.SnapshotGroupID) {
	for _, stop := range b.stops {
		stop()
	}
	b.ask(id, 1, 2)
	b.cat.must(meta.Command{BeginSnapshotGroup: &meta.BeginSnapshotGroup{
		Group: id, Node: "n1", Incarnation: testUUID(0x301),
	}})
}

// What a holder does by itself, message by message.
func TestHolderByMessages(t *testing.T) {
	t.Parallel()
	inBarrierBench(t, func(t *testing.T, b *barrierBench) {
		ctx, m := t.Context(), b.nodes["n2"]
		two := b.open(t, "n2", 2)
		first := groupMessage{group: snapGroup, attempt: 1}
		b.began(snapGroup)
		err := m.holdGroup(ctx, "n3", first)
		require.ErrorIs(t, err, trivet.ErrPending, "n3 does not own it")
		_, err = m.freezeGroup(ctx, "n1", first)
		require.ErrorIs(t, err, trivet.ErrUnavailable, "not held")

		b.volumes[2].set(func(d *pointDevice) { d.freeze = groupHoldMax + time.Second })
		err = m.holdGroup(ctx, "n1", first)
		require.NoError(t, err)
		err = m.holdGroup(ctx, "n1", first)
		require.ErrorIs(t, err, trivet.ErrInvalid, "a copy")
		_, err = m.freezeGroup(ctx, "n1", first)
		require.ErrorIs(t, err, trivet.ErrUnavailable, "writes went on before it was frozen")
		require.ErrorContains(t, err, "went on")

		b.volumes[2].set(func(d *pointDevice) { d.freeze = 0 })
		second := groupMessage{group: snapGroup, attempt: 2}
		err = m.holdGroup(ctx, "n1", second)
		require.NoError(t, err)
		_, err = m.freezeGroup(ctx, "n1", first)
		require.ErrorIs(t, err, trivet.ErrUnavailable, "of an earlier attempt")
		_, err = m.freezeGroup(ctx, "n2", second)
		require.ErrorIs(t, err, trivet.ErrUnavailable, "of another node")
		frozen, err := m.freezeGroup(ctx, "n1", second)
		require.NoError(t, err)
		require.Equal(t, []meta.FrozenMember{{
			Snapshot: 16*trivet.SnapshotID(snapGroup) + 1, Generation: 4, SizeBytes: 64 << 20, Held: frozen[0].Held,
		}}, frozen)
		m.releaseGroup("n1", second) // it goes on already

		err = m.holdGroup(ctx, "n1", groupMessage{group: snapGroup, attempt: 3})
		require.NoError(t, err)
		m.releaseGroup("n1", groupMessage{group: snapGroup, attempt: 3})
		began := time.Now()
		require.NoError(t, two.WriteAt(ctx, numbered(1), 0))
		require.Less(t, time.Since(began), time.Second)

		gone, cancel := context.WithCancel(ctx)
		cancel()
		err = m.holdGroup(gone, "n1", groupMessage{group: snapGroup, attempt: 4})
		require.ErrorIs(t, err, context.Canceled)
		require.NoError(t, two.WriteAt(ctx, numbered(1), 0))
		require.Less(t, time.Since(began), time.Second)

		b.cat.must(meta.Command{TakeOver: &meta.TakeOver{Volume: 2, Node: "n2"}})
		err = m.holdGroup(ctx, "n1", groupMessage{group: snapGroup, attempt: 5})
		require.ErrorIs(t, err, trivet.ErrFenced, "another process has the volume")
		m.holds.close()
	})
}

// A volume that its holder has not open is frozen by its group, and nobody opens it meanwhile.
func TestGroupOfAnUnopenedVolume(t *testing.T) {
	t.Parallel()
	inBarrierBench(t, func(t *testing.T, b *barrierBench) {
		ctx, m := t.Context(), b.nodes["n2"]
		b.began(snapGroup)
		err := m.holdGroup(ctx, "n1", groupMessage{group: snapGroup, attempt: 1})
		require.NoError(t, err)
		_, _, _, err = m.openNBD(ctx, 2)
		require.ErrorIs(t, err, trivet.ErrPending)
		frozen, err := m.freezeGroup(ctx, "n1", groupMessage{group: snapGroup, attempt: 1})
		require.NoError(t, err)
		require.Len(t, frozen, 1)
		b.open(t, "n2", 2)
	})
}

// A group whose coordinator is gone is given up by another node; what is being made by one that lives is left alone.
func TestGroupOfADeadCoordinator(t *testing.T) {
	t.Parallel()
	inBarrierBench(t, func(t *testing.T, b *barrierBench) {
		b.ask(snapGroup, 3)
		n3, _ := b.cat.Local().Node("n3")
		n3.LeaseUntil = time.Now().Add(time.Minute)
		b.cat.must(meta.Command{RenewLease: &meta.RenewLease{
			Node: "n3", Incarnation: n3.Incarnation, Until: n3.LeaseUntil, Disks: n3.Disks,
		}})
		b.cat.must(meta.Command{BeginSnapshotGroup: &meta.BeginSnapshotGroup{
			Group: snapGroup, Node: "n3", Incarnation: n3.Incarnation,
		}})
		time.Sleep(30 * time.Second)
		g, _ := b.cat.Local().SnapshotGroup(snapGroup)
		require.Equal(t, meta.GroupFreezing, g.State)
		n3.Incarnation = testUUID(0x399)
		b.cat.must(meta.Command{RegisterNode: &meta.RegisterNode{Node: n3}})
		g = b.settled(snapGroup)
		require.Equal(t, meta.GroupFailed, g.State)
		require.Contains(t, g.Reason, "node n3")
	})
}

func TestCoordinatorOf(t *testing.T) {
	t.Parallel()
	c := newFakeCatalogue()
	now := time.Unix(1e9, 0)
	for n := 1; n <= 3; n++ {
		c.addNode(n)
	}
	c.addVolume(1, 1, nil)
	c.report(1, 1, meta.ReplicaReady)
	g := &meta.SnapshotGroup{State: meta.GroupCreating, Members: []meta.GroupMember{{Volume: 1}}}
	assert.Equal(t, trivet.NodeID("n1"), coordinatorOf(c.Local(), g, now), "nobody holds anything")
	c.must(meta.Command{Attach: &meta.Attach{Volume: 1, Node: "n2", Mode: meta.SingleNodeMultiWriter}})
	assert.Equal(t, trivet.NodeID("n2"), coordinatorOf(c.Local(), g, now))
	n2, _ := c.Local().Node("n2")
	n2.Incarnation, n2.LeaseUntil = testUUID(0x399), now.Add(-1)
	c.must(meta.Command{RegisterNode: &meta.RegisterNode{Node: n2}})
	assert.Equal(t, trivet.NodeID("n1"), coordinatorOf(c.Local(), g, now), "the holder is dead")
	g.State, g.Owner, g.OwnerIncarnation = meta.GroupFreezing, "n3", testUUID(0x303)
	assert.Equal(t, trivet.NodeID("n3"), coordinatorOf(c.Local(), g, now), "it has begun")
	g.OwnerIncarnation = testUUID(0x304)
	assert.Equal(t, trivet.NodeID("n1"), coordinatorOf(c.Local(), g, now), "that process is gone")
	assert.Empty(t, coordinatorOf(c.Local(), g, time.Unix(3e9, 0)))
}

// The leader's agent makes a group's member only while nobody can write it, dead or alive: who is cut off from the
// catalogue may write on.
func TestLeaderMakesMembersNobodyWrites(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		mode meta.AccessMode
		want []trivet.Epoch
	}{
		"nobody": {"", []trivet.Epoch{0}}, "reader": {meta.SingleNodeReader, []trivet.Epoch{1}},
		"writer whose lease is out": {meta.SingleNodeMultiWriter, nil},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			bench(t, 3, func(t *testing.T, b *agentBench) {
				r := b.ready(t, 3)
				n, _ := b.cat.Local().Node("n2")
				n.Incarnation, n.LeaseUntil = testUUID(0x399), time.Now().Add(-time.Second)
				b.cat.must(meta.Command{RegisterNode: &meta.RegisterNode{Node: n}})
				if tt.mode != "" {
					b.cat.must(meta.Command{Attach: &meta.Attach{Volume: vol, Node: "n2", Mode: tt.mode}})
					settle()
				}
				b.cat.must(meta.Command{CreateSnapshotGroup: &meta.CreateSnapshotGroup{
					ID: snapGroup, Name: "g", Created: time.Now(), Members: []meta.NewMember{{
						Snapshot: snap, Volume: vol, IfRevision: b.cat.volume(vol).Revision,
					}},
				}})
				settle()
				require.Equal(t, tt.want, r.frozen())
			})
		})
	}
}

func TestGroupWire(t *testing.T) {
	t.Parallel()
	msg := groupMessage{step: stepFreeze, group: 1 << 63, attempt: 7, revision: 1 << 40}
	got, err := decodeGroupMessage(msg.encode())
	require.NoError(t, err)
	require.Equal(t, msg, got)
	all := []meta.FrozenMember{{Snapshot: 1 << 63, Generation: 5, SizeBytes: 4096, Held: time.Second}, {Snapshot: 2}}
	back, err := decodeFrozen(encodeFrozen(all))
	require.NoError(t, err)
	require.Equal(t, all, back)
}

// FuzzGroupWire: what comes from another node is refused or understood.
func FuzzGroupWire(f *testing.F) {
	f.Add(groupMessage{step: stepHold, group: 7, attempt: 1}.encode())
	f.Add(encodeFrozen([]meta.FrozenMember{{Snapshot: 7, Generation: 1, SizeBytes: 4096}}))
	f.Fuzz(func(t *testing.T, b []byte) {
		if m, err := decodeGroupMessage(b); err == nil {
			require.Equal(t, b, m.encode())
		} else {
			require.ErrorIs(t, err, trivet.ErrInvalid)
		}
		if all, err := decodeFrozen(b); err == nil {
			require.Equal(t, b, encodeFrozen(all))
		} else {
			require.ErrorIs(t, err, trivet.ErrCorrupt)
		}
	})
}
