package node

import (
	"context"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller/meta"
	"github.com/trivet-csi/trivet/engine"
	"github.com/trivet-csi/trivet/replication"
)

const snap = trivet.SnapshotID(0x51)

// Freeze is no business of the cache's tests.
func (d *epochDevice) Freeze(context.Context, trivet.SnapshotID) (replication.Frozen, error) {
	return replication.Frozen{}, trivet.ErrUnavailable
}

func (c *fakeCatalogue) wantSnapshot() {
	c.must(meta.Command{CreateSnapshot: &meta.CreateSnapshot{
		Snapshot:   meta.Snapshot{ID: snap, Name: "s", Volume: vol, Created: time.Unix(1e9, 0)},
		IfRevision: c.volume(vol).Revision,
	}})
}

func (c *fakeCatalogue) snapshotState() meta.SnapshotState {
	s, ok := c.Local().Snapshot(snap)
	if !ok {
		return "gone"
	}
	return s.State
}

func (r *fakeReplica) frozen() []trivet.Epoch {
	r.mu.Lock()
	defer r.mu.Unlock()
	return append([]trivet.Epoch(nil), r.freezes...)
}

// The leader's node makes the snapshot of a volume that nobody writes, reports it, and has it dropped.
func TestLeaderMakesSnapshots(t *testing.T) {
	t.Parallel()
	bench(t, 3, func(t *testing.T, b *agentBench) {
		r := b.ready(t, 3)
		b.cat.wantSnapshot()
		settle()
		require.Equal(t, []trivet.Epoch{0}, r.frozen())
		s, _ := b.cat.Local().Snapshot(snap)
		require.Equal(t, meta.SnapshotReady, s.State)
		require.EqualValues(t, 64<<20, s.SizeBytes)
		require.EqualValues(t, 1, s.Generation)

		b.cat.must(meta.Command{DeleteSnapshot: &meta.DeleteSnapshot{Snapshot: snap}})
		settle()
		require.Equal(t, meta.SnapshotState("gone"), b.cat.snapshotState())
		require.Empty(t, r.Status().Snapshots)
	})
}

// What a writer has acknowledged may be in its cache only: the leader's node leaves the snapshot to it, for as long as
// it is alive.
func TestWriterMakesItsSnapshots(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		mode  meta.AccessMode
		lease time.Duration
		fence bool
		want  []trivet.Epoch
	}{
		"writer":                    {meta.SingleNodeMultiWriter, time.Hour, true, nil},
		"writer that is not let in": {meta.SingleNodeMultiWriter, time.Hour, false, nil},
		"writer whose lease is out": {meta.SingleNodeMultiWriter, -time.Second, true, []trivet.Epoch{1}},
		"writer that dies":          {meta.SingleNodeMultiWriter, 30 * time.Second, true, []trivet.Epoch{1}},
		"reader":                    {meta.SingleNodeReader, time.Hour, true, []trivet.Epoch{1}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			bench(t, 3, func(t *testing.T, b *agentBench) {
				r := b.ready(t, 3)
				if !tt.fence {
					r.failFences(trivet.ErrUnavailable)
				}
				n, _ := b.cat.Local().Node("n2")
				n.Incarnation, n.LeaseUntil = testUUID(0x399), time.Now().Add(tt.lease)
				b.cat.must(meta.Command{RegisterNode: &meta.RegisterNode{Node: n}})
				b.cat.must(meta.Command{Attach: &meta.Attach{Volume: vol, Node: "n2", Mode: tt.mode}})
				b.cat.wantSnapshot()
				settle()
				require.Equal(t, tt.want, r.frozen())
			})
		})
	}
}

// A copy of the catalogue that lags does not know of the attachment; the read before the freeze does.
func TestLeaderLooksBeforeItFreezes(t *testing.T) {
	t.Parallel()
	bench(t, 3, func(t *testing.T, b *agentBench) {
		r := b.ready(t, 3)
		b.cat.setDown(true)
		b.cat.wantSnapshot()
		settle()
		b.cat.freeze(true)
		b.cat.must(meta.Command{Attach: &meta.Attach{Volume: vol, Node: "n2", Mode: meta.SingleNodeMultiWriter}})
		b.cat.must(meta.Command{ReportFence: &meta.ReportFence{Volume: vol, Epoch: 1}})
		b.cat.setDown(false)
		settle()
		require.Empty(t, r.frozen())
	})
}

func TestSnapshotThatCannotBeMadeFails(t *testing.T) {
	t.Parallel()
	bench(t, 3, func(t *testing.T, b *agentBench) {
		r := b.ready(t, 3)
		r.mu.Lock()
		r.freezeErr = trivet.ErrNoSpace
		r.mu.Unlock()
		b.cat.wantSnapshot()
		settle()
		require.Equal(t, meta.SnapshotFailed, b.cat.snapshotState())
	})
}

// A snapshot that is in the group and unknown to the catalogue was deleted; one that the local copy alone does not know
// yet was not.
func TestUnknownSnapshotIsDropped(t *testing.T) {
	t.Parallel()
	bench(t, 3, func(t *testing.T, b *agentBench) {
		r := b.ready(t, 3)
		b.cat.freeze(true)
		b.cat.wantSnapshot()
		r.mu.Lock()
		r.status.Snapshots = []engine.Snapshot{{ID: 99, Generation: 3}, {ID: uint64(snap), Generation: 4}}
		r.mu.Unlock()
		r.lead(true)
		settle()
		require.Equal(t, []engine.Snapshot{{ID: uint64(snap), Generation: 4}}, r.Status().Snapshots)
	})
}

// A group that sleeps is woken for a snapshot and sleeps again; that of a kept volume too.
func TestSnapshotsWakeAParkedGroup(t *testing.T) {
	t.Parallel()
	v := meta.Volume{ID: vol, Phase: meta.PhaseKept, Replicas: []meta.Replica{
		{ID: "r1", Node: "n1", Disk: "d1", State: meta.ReplicaReady},
	}}
	l := local{disks: map[trivet.DiskID]bool{"d1": true}, onDisk: []placed{{"d1", "r1"}}}
	assert.Empty(t, plan("n1", &v, l))
	l.awake = true
	assert.Equal(t, []action{{verb: doOpen, disk: "d1", id: "r1"}}, plan("n1", &v, l))

	c := newFakeCatalogue()
	c.addNode(1)
	c.addVolume(vol, 1, nil)
	c.report(vol, 1, meta.ReplicaReady)
	busy := func() bool {
		v := c.volume(vol)
		return copiesOf(c.Local(), &v, time.Unix(1e9, 0)).busy
	}
	assert.False(t, busy())
	c.wantSnapshot()
	assert.True(t, busy(), "to be made")
	c.must(meta.Command{ReportSnapshot: &meta.ReportSnapshot{
		Snapshot: snap, State: meta.SnapshotReady, SizeBytes: 64 << 20,
	}})
	assert.False(t, busy())
	clone := meta.Volume{
		ID: 9, Name: "clone", SizeBytes: 64 << 20, Reclaim: meta.ReclaimDelete, Request: "r", Created: time.Unix(1e9, 0),
		Source: &meta.Source{Snapshot: snap}, WantReplicas: 1, Replicas: []meta.Replica{{
			ID: testReplica(0x91), Node: "n1", Disk: testDisk(1), State: meta.ReplicaCreating,
		}},
	}
	c.must(meta.Command{CreateVolume: &meta.CreateVolume{Volume: clone}})
	assert.True(t, busy(), "a clone waits for the freeze to be applied here")
	c.report(9, 1, meta.ReplicaReady)
	c.must(meta.Command{DeleteSnapshot: &meta.DeleteSnapshot{Snapshot: snap}})
	assert.False(t, busy(), "the clone needs it")
	c.must(meta.Command{ReportFlattened: &meta.ReportFlattened{Volume: 9, Replica: testReplica(0x91)}})
	assert.True(t, busy(), "to be dropped")
}

// frozenDevice looks at the disk below when a snapshot is made.
type frozenDevice struct {
	*epochDevice
	look func() error
}

func (d *frozenDevice) Freeze(context.Context, trivet.SnapshotID) (replication.Frozen, error) {
	if err := d.look(); err != nil {
		return replication.Frozen{}, err
	}
	return replication.Frozen{Generation: 5, SizeBytes: 64 << 20}, nil
}

// freezing is a cacheBench whose volume n1 has attached for writing, with a snapshot to be made.
func freezing(t *testing.T, look func(b *cacheBench) error) *cacheBench {
	t.Helper()
	b := newCacheBench(t, writeBackParams())
	b.mounts.attacher.openGroup = func(c replication.VolumeConfig) (groupDevice, error) {
		return &frozenDevice{
			epochDevice: &epochDevice{Device: b.disk, cat: b.cat, epoch: c.Epoch}, look: func() error { return look(b) },
		}, nil
	}
	b.grant("n1", meta.SingleNodeMultiWriter, false)
	return b
}

// freezeAndStop runs what a node does until the snapshot is no longer to be made.
func (b *cacheBench) freezeAndStop() {
	ctx, stop := context.WithCancel(b.t.Context())
	done := make(chan struct{})
	go func() { b.mounts.freezeHeld(ctx); close(done) }()
	for b.cat.snapshotState() == meta.SnapshotCreating {
		changed := b.cat.Changed()
		if b.cat.snapshotState() == meta.SnapshotCreating {
			<-changed
		}
	}
	stop()
	<-done
}

// What the cache acknowledged is below when the snapshot is made, no write gets in between, and writes go on after it.
func TestFreezeDrainsTheCache(t *testing.T) {
	t.Parallel()
	wrote := make(chan error, 1)
	b := freezing(t, func(b *cacheBench) error {
		assert.EqualValues(t, 7, b.below(3), "acknowledged, and not in the snapshot")
		p := b.mounts.attacher.get(vol).path
		began := make(chan struct{})
		go func() {
			close(began)
			wrote <- p.WriteAt(b.t.Context(), make([]byte, trivet.BlockSize), 3*trivet.BlockSize)
		}()
		<-began
		select {
		case err := <-wrote:
			assert.Fail(t, "a write was acknowledged while the snapshot was made", "%v", err)
			wrote <- err
		default:
		}
		return nil
	})
	require.NoError(t, b.mounts.stage(t.Context(), stageReq()))
	b.write(3, 7)
	b.cat.wantSnapshot()
	b.freezeAndStop()
	s, _ := b.cat.Local().Snapshot(snap)
	require.Equal(t, meta.SnapshotReady, s.State)
	require.EqualValues(t, 5, s.Generation)
	require.Positive(t, s.Held)
	require.NoError(t, <-wrote)
	require.NoError(t, b.mounts.attacher.drop(vol))
}

// An attempt that fails lets writes go on, and is followed by another.
func TestFreezeIsTriedAgain(t *testing.T) {
	t.Parallel()
	n := 0
	b := freezing(t, func(b *cacheBench) error {
		if n++; n == 1 {
			return trivet.ErrUnavailable
		}
		return nil
	})
	require.NoError(t, b.mounts.stage(t.Context(), stageReq()))
	b.cat.wantSnapshot()
	b.freezeAndStop()
	require.Equal(t, 2, n)
	b.write(3, 1)
	require.NoError(t, b.mounts.attacher.drop(vol))
}

// A volume that is attached here and not open is frozen through the group, but not before what a dead process
// acknowledged is written back.
func TestFreezeOfAnUnopenedVolume(t *testing.T) {
	t.Parallel()
	b := freezing(t, func(*cacheBench) error { return nil })
	b.cat.wantSnapshot()
	b.freezeAndStop()
	require.Equal(t, meta.SnapshotReady, b.cat.snapshotState())
	require.Nil(t, b.mounts.attacher.get(vol))

	b = newCacheBench(t, writeBackParams())
	b.grant("n1", meta.SingleNodeMultiWriter, false)
	require.NoError(t, b.mounts.stage(t.Context(), stageReq()))
	b.write(3, 7)
	b.die()
	b.start(0x302)
	b.cat.wantSnapshot()
	done, err := b.mounts.freezeOnce(t.Context(), snap)
	require.False(t, done)
	require.ErrorIs(t, err, trivet.ErrPending)
	b.recovering()
	require.NoError(t, b.mounts.attacher.drop(vol))
}

// Who has lost the attachment, or only reads, leaves the snapshot alone.
func TestOthersDoNotFreeze(t *testing.T) {
	t.Parallel()
	b := freezing(t, func(*cacheBench) error { panic("frozen") })
	b.cat.wantSnapshot()
	b.revoke()
	done, err := b.mounts.freezeOnce(t.Context(), snap)
	require.NoError(t, err)
	require.True(t, done)
	b.grant("n1", meta.SingleNodeReader, true)
	done, err = b.mounts.freezeOnce(t.Context(), snap)
	require.NoError(t, err)
	require.True(t, done)
	require.Equal(t, meta.SnapshotCreating, b.cat.snapshotState())
}

// The leader's node brings a volume back at the epoch that was reserved for it, after the fence.
func TestLeaderRollsBack(t *testing.T) {
	t.Parallel()
	bench(t, 3, func(t *testing.T, b *agentBench) {
		r := b.ready(t, 3)
		b.cat.wantSnapshot()
		settle()
		b.cat.must(meta.Command{Restore: &meta.Restore{Snapshot: snap, IfRevision: b.cat.volume(vol).Revision}})
		settle()
		fenced, _ := r.epochs()
		require.Equal(t, []trivet.Epoch{1}, fenced)
		r.mu.Lock()
		defer r.mu.Unlock()
		require.Equal(t, []trivet.Epoch{1}, r.back)
		require.Equal(t, meta.PhaseAvailable, b.cat.volume(vol).Phase)
	})
}

// A copy is flattened when no other volume lies beneath it; the report ends its need for the snapshot.
func TestFlattenedIsReported(t *testing.T) {
	t.Parallel()
	e, err := engine.Open(engine.Config{FS: vfs.NewMem(), Dir: "e", Fatal: func(err error) { t.Error(err) }})
	require.NoError(t, err)
	defer func() { require.NoError(t, e.Close()) }()
	require.NoError(t, e.CreateVolume(vol, "r1", 1<<20))
	v, err := e.OpenVolume(vol)
	require.NoError(t, err)
	require.ErrorIs(t, e.CreateClone(9, "r9", 1<<20, engine.Base{Volume: vol}), trivet.ErrUnavailable, "no freeze yet")
	batch := v.NewBatch()
	require.NoError(t, batch.Write(0, make([]byte, trivet.BlockSize)))
	st := v.State()
	st.AppliedIndex, st.AppliedTerm, st.Generation = 1, 1, 1
	st.Snapshots = []engine.Snapshot{{ID: uint64(snap), Generation: 0}}
	require.NoError(t, batch.Commit(st))
	require.NoError(t, e.CreateClone(9, "r9", 1<<20, engine.Base{Volume: vol}))

	disk := replication.Disk{ID: testDisk(1), Engine: e}
	clone, err := e.OpenVolume(9)
	require.NoError(t, err)
	require.NoError(t, clone.Flatten(t.Context()))
	flat, err := flattened(disk, 9, "r9")
	require.NoError(t, err)
	require.True(t, flat)
	flat, err = flattened(disk, 9, "another")
	require.NoError(t, err)
	require.False(t, flat, "the disk has another replica")
	flat, err = flattened(disk, 10, "r9")
	require.ErrorIs(t, err, trivet.ErrNotFound)
	require.False(t, flat)

	r := &meta.Replica{ID: "r9", Node: "n1", Disk: "d1", State: meta.ReplicaReady}
	cv := meta.Volume{
		ID: 9, Phase: meta.PhaseBound, Source: &meta.Source{Snapshot: snap, Volume: vol}, Replicas: []meta.Replica{*r},
	}
	l := local{disks: map[trivet.DiskID]bool{"d1": true}, onDisk: []placed{{"d1", "r9"}}}
	l.copies.flat = map[trivet.ReplicaID]bool{"r9": true}
	require.Equal(t, []action{{verb: doFlat, disk: "d1", id: "r9"}}, plan("n1", &cv, l))
	require.Equal(t, &engine.Base{Volume: vol}, baseOf(&cv))
	cv.Source.Flattened = true
	require.Nil(t, baseOf(&cv))
}
