package meta_test

import (
	"fmt"
	"math/rand"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller/meta"
)

func snapshotOf(m *meta.Machine, id trivet.SnapshotID, name string, volume trivet.VolumeID) meta.Command {
	v, _ := m.State().Volume(volume)
	return meta.Command{CreateSnapshot: &meta.CreateSnapshot{
		Snapshot: meta.Snapshot{ID: id, Name: name, Volume: volume, Created: day}, IfRevision: max(1, v.Revision),
	}}
}

func frozen(id trivet.SnapshotID) meta.Command {
	return meta.Command{ReportSnapshot: &meta.ReportSnapshot{
		Snapshot: id, State: meta.SnapshotReady, SizeBytes: 1 << 30, Generation: 3, Held: 5,
	}}
}

func dropped(id trivet.SnapshotID) meta.Command {
	return meta.Command{ReportSnapshot: &meta.ReportSnapshot{Snapshot: id, State: meta.SnapshotRemoved}}
}

func unsnap(id trivet.SnapshotID) meta.Command {
	return meta.Command{DeleteSnapshot: &meta.DeleteSnapshot{Snapshot: id}}
}

func cloneOf(id int, snap trivet.SnapshotID, nodes ...int) meta.Command {
	v := volume(id, meta.ReclaimDelete, nodes...)
	v.Source, v.WantReplicas = &meta.Source{Snapshot: snap}, 3
	return meta.Command{CreateVolume: &meta.CreateVolume{Volume: v}}
}

func flat(v, n int) meta.Command {
	return meta.Command{ReportFlattened: &meta.ReportFlattened{Volume: trivet.VolumeID(v), Replica: replicaID(v*10 + n)}}
}

// withSnapshot is a cluster with volume 1 on three nodes and its snapshot 5, "s", which is Ready.
func withSnapshot(t *testing.T) *meta.Machine {
	t.Helper()
	m := cluster(t)
	mustApply(t, m, meta.Command{CreateVolume: &meta.CreateVolume{Volume: volume(1, meta.ReclaimDelete, 1, 2, 3)}})
	for n := 1; n <= 3; n++ {
		mustApply(t, m, report(1, n, meta.ReplicaReady))
	}
	mustApply(t, m, snapshotOf(m, 5, "s", 1))
	mustApply(t, m, frozen(5))
	return m
}

func phaseOf(m *meta.Machine, id trivet.VolumeID) meta.Phase {
	v, ok := m.State().Volume(id)
	if !ok {
		return "gone"
	}
	return v.Phase
}

func stateOf(m *meta.Machine, id trivet.SnapshotID) meta.SnapshotState {
	s, ok := m.State().Snapshot(id)
	if !ok {
		return "gone"
	}
	return s.State
}

func TestSnapshotOutlivesItsVolume(t *testing.T) {
	t.Parallel()
	m := withSnapshot(t)
	mustApply(t, m, meta.Command{Release: &meta.Release{Volume: 1}})
	require.Equal(t, meta.PhaseKept, phaseOf(m, 1))
	_, named := m.State().VolumeByName("name-1")
	require.False(t, named, "its name is free")
	again := volume(2, meta.ReclaimDelete, 1)
	again.Name = "name-1"
	mustApply(t, m, meta.Command{CreateVolume: &meta.CreateVolume{Volume: again}})
	for what, c := range map[string]meta.Command{
		"attach": attach(1, false, 0), "snapshot": snapshotOf(m, 6, "late", 1),
		"fail":    {Fail: &meta.Fail{Volume: 1, Reason: "x"}},
		"removed": report(1, 1, meta.ReplicaRemoved),
	} {
		require.ErrorIs(t, m.Apply(c).Err, trivet.ErrInvalid, what)
	}
	before := m.State().Revision()
	mustApply(t, m, meta.Command{Release: &meta.Release{Volume: 1, Discard: true}})
	require.Equal(t, before, m.State().Revision(), "it is deleted already")
	add := meta.Replica{ID: replicaID(14), Node: "n3", Disk: diskID(3), Replaces: replicaID(13)}
	mustApply(t, m, report(1, 3, meta.ReplicaFaulted))
	v, _ := m.State().Volume(1)
	mustApply(t, m, meta.Command{AddReplica: &meta.AddReplica{Volume: 1, IfRevision: v.Revision, Replica: add}})
	mustApply(t, m, unsnap(5))
	require.Equal(t, meta.PhaseKept, phaseOf(m, 1), "its group has to drop the snapshot first")
	mustApply(t, m, dropped(5))
	require.Equal(t, meta.PhaseDeleting, phaseOf(m, 1))
	other, named := m.State().VolumeByName("name-1")
	require.True(t, named && other.ID == 2, "the name is another volume's by now")
	require.Equal(t, meta.SnapshotState("gone"), stateOf(m, 5))
	require.NoError(t, m.Apply(dropped(5)).Err, "a late copy")
	require.NoError(t, m.Apply(frozen(5)).Err, "a late copy")
}

func TestSnapshotIsMadeOnce(t *testing.T) {
	t.Parallel()
	m := withSnapshot(t)
	late := snapshotOf(m, 7, "t", 1)
	mustApply(t, m, late)
	res := m.Apply(snapshotOf(m, 8, "t", 1))
	require.NoError(t, res.Err)
	require.Equal(t, trivet.SnapshotID(7), res.Snapshot.ID, "the same name and volume again")
	mustApply(t, m, meta.Command{CreateVolume: &meta.CreateVolume{Volume: volume(2, meta.ReclaimDelete, 1)}})
	require.ErrorIs(t, m.Apply(snapshotOf(m, 9, "t", 2)).Err, trivet.ErrExists)
	require.ErrorIs(t, m.Apply(snapshotOf(m, 9, "u", 2)).Err, trivet.ErrPending, "the volume is being created")
	require.ErrorIs(t, m.Apply(snapshotOf(m, 9, "u", 3)).Err, trivet.ErrNotFound)

	mustApply(t, m, unsnap(7))
	mustApply(t, m, dropped(7))
	require.ErrorIs(t, m.Apply(late).Err, trivet.ErrPending, "a late copy brings back what has come and gone")
	require.ErrorIs(t, m.Apply(dropped(5)).Err, trivet.ErrInvalid, "nobody wants that")
	mustApply(t, m, snapshotOf(m, 7, "t", 1))
	mustApply(t, m, meta.Command{ReportSnapshot: &meta.ReportSnapshot{
		Snapshot: 7, State: meta.SnapshotFailed, Reason: "no room",
	}})
	mustApply(t, m, frozen(7))
	require.Equal(t, meta.SnapshotFailed, stateOf(m, 7))
}

func TestSnapshotsOfAVolumeAreBounded(t *testing.T) {
	t.Parallel()
	m := withSnapshot(t)
	for i := 1; i < 1000; i++ {
		mustApply(t, m, snapshotOf(m, trivet.SnapshotID(100+i), fmt.Sprint(i), 1))
	}
	require.ErrorIs(t, m.Apply(snapshotOf(m, 9, "more", 1)).Err, trivet.ErrNoSpace)
	require.Len(t, m.State().SnapshotsOf(1), 1000)
}

// A snapshot stays while a clone reads its blocks, and so does its volume; the clone needs both no more once all its
// replicas are flattened.
func TestCloneKeepsItsSource(t *testing.T) {
	t.Parallel()
	m := withSnapshot(t)
	small := cloneOf(4, 5, 1, 2, 3)
	small.CreateVolume.Volume.SizeBytes = 1 << 20
	require.ErrorIs(t, m.Apply(small).Err, trivet.ErrOutOfRange)
	require.ErrorIs(t, m.Apply(cloneOf(4, 99, 1, 2, 3)).Err, trivet.ErrNotFound)
	mustApply(t, m, meta.Command{RegisterNode: &meta.RegisterNode{Node: node(4)}})
	require.ErrorIs(t, m.Apply(cloneOf(4, 5, 1, 2, 4)).Err, trivet.ErrPending, "the source is not on n4")
	mustApply(t, m, cloneOf(4, 5, 1, 2))
	v, _ := m.State().Volume(4)
	require.Equal(t, meta.Source{Snapshot: 5, Volume: 1, Generation: 3}, *v.Source)
	require.Equal(t, 3, v.Want())
	require.Equal(t, []trivet.VolumeID{4}, m.State().ClonesOf(5))

	mustApply(t, m, meta.Command{Release: &meta.Release{Volume: 1}})
	mustApply(t, m, unsnap(5))
	require.ErrorIs(t, m.Apply(dropped(5)).Err, trivet.ErrInUse)
	require.ErrorIs(t, m.Apply(cloneOf(6, 5, 1, 2)).Err, trivet.ErrInvalid, "no more clones of it")
	mustApply(t, m, flat(4, 1))
	mustApply(t, m, flat(4, 1))
	require.ErrorIs(t, m.Apply(dropped(5)).Err, trivet.ErrInUse)
	mustApply(t, m, flat(4, 2))
	require.Empty(t, m.State().ClonesOf(5))
	mustApply(t, m, dropped(5))
	require.Equal(t, meta.PhaseDeleting, phaseOf(m, 1))
	mustImage(t, m.State())
}

// The snapshot behind the clone of a volume goes by itself, whether the clone is flattened, loses the replica that is
// not, or is deleted.
func TestHiddenSnapshotGoes(t *testing.T) {
	t.Parallel()
	for name, end := range map[string]func(m *meta.Machine){
		"flattened": func(m *meta.Machine) {
			for n := 1; n <= 3; n++ {
				mustApply(t, m, flat(4, n))
			}
		},
		"replica retired": func(m *meta.Machine) {
			for n := 1; n <= 3; n++ {
				mustApply(t, m, report(4, n, meta.ReplicaReady))
			}
			mustApply(t, m, flat(4, 1))
			mustApply(t, m, flat(4, 2))
			mustApply(t, m, meta.Command{RemoveReplica: &meta.RemoveReplica{Volume: 4, Replica: replicaID(43)}})
			mustApply(t, m, report(4, 3, meta.ReplicaLeft))
		},
		"deleted": func(m *meta.Machine) {
			mustApply(t, m, meta.Command{Release: &meta.Release{Volume: 4}})
			for n := 1; n <= 3; n++ {
				require.NotEqual(t, meta.SnapshotDeleting, stateOf(m, 6))
				mustApply(t, m, report(4, n, meta.ReplicaRemoved))
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			m := withSnapshot(t)
			mustApply(t, m, snapshotOf(m, 6, meta.HiddenPrefix+"name-4", 1))
			mustApply(t, m, frozen(6))
			mustApply(t, m, cloneOf(4, 6, 1, 2, 3))
			end(m)
			require.Equal(t, meta.SnapshotDeleting, stateOf(m, 6))
			mustApply(t, m, dropped(6))
			mustImage(t, m.State())
		})
	}
}

func TestRestoreInPlace(t *testing.T) {
	t.Parallel()
	m := withSnapshot(t)
	restore := func() meta.Command {
		v, _ := m.State().Volume(1)
		return meta.Command{Restore: &meta.Restore{Snapshot: 5, IfRevision: v.Revision}}
	}
	mustApply(t, m, attach(2, false, 0))
	require.ErrorIs(t, m.Apply(restore()).Err, trivet.ErrInUse)
	mustApply(t, m, meta.Command{ReportFence: &meta.ReportFence{Volume: 1, Epoch: 1}})
	mustApply(t, m, meta.Command{Detach: &meta.Detach{Volume: 1}})
	mustApply(t, m, meta.Command{ReportFence: &meta.ReportFence{Volume: 1, Epoch: 2}})
	late := restore()
	mustApply(t, m, late)
	require.Equal(t, meta.PhaseRestoring, phaseOf(m, 1))
	require.ErrorIs(t, m.Apply(attach(1, false, 0)).Err, trivet.ErrPending)
	require.ErrorIs(t, m.Apply(unsnap(5)).Err, trivet.ErrPending)
	require.ErrorIs(t, m.Apply(meta.Command{Release: &meta.Release{Volume: 1}}).Err, trivet.ErrPending)
	mustApply(t, m, meta.Command{ReportRolledBack: &meta.ReportRolledBack{Volume: 1, Epoch: 2}})
	require.Equal(t, meta.PhaseRestoring, phaseOf(m, 1), "a report of another epoch")
	mustApply(t, m, meta.Command{ReportRolledBack: &meta.ReportRolledBack{Volume: 1, Epoch: 3}})
	require.Equal(t, meta.PhaseBound, phaseOf(m, 1))
	require.ErrorIs(t, m.Apply(late).Err, trivet.ErrPending, "a late copy undoes what was written since")
}

func TestSnapshotCommandsRefused(t *testing.T) {
	t.Parallel()
	m := withSnapshot(t)
	more := snapshotOf(m, 9, "x", 1)
	more.CreateSnapshot.Snapshot.State = meta.SnapshotReady
	for name, c := range map[string]meta.Command{
		"no name": snapshotOf(m, 9, "", 1), "no id": snapshotOf(m, 0, "x", 1),
		"hidden without": snapshotOf(m, 9, "clone/", 1),
		"slash":          snapshotOf(m, 9, "a/b", 1), "state": more, "no volume": snapshotOf(m, 9, "x", 0),
		"no revision": {CreateSnapshot: &meta.CreateSnapshot{Snapshot: meta.Snapshot{ID: 9, Name: "x", Volume: 1}}},
		"ready of no size": {ReportSnapshot: &meta.ReportSnapshot{
			Snapshot: 5, State: meta.SnapshotReady,
		}},
		"failed for nothing": {ReportSnapshot: &meta.ReportSnapshot{Snapshot: 5, State: meta.SnapshotFailed}},
		"creating reported":  {ReportSnapshot: &meta.ReportSnapshot{Snapshot: 5, State: meta.SnapshotCreating}},
		"nonsense reported":  {ReportSnapshot: &meta.ReportSnapshot{Snapshot: 5, State: "Lost"}},
		"delete nothing":     unsnap(0), "restore without": {Restore: &meta.Restore{Snapshot: 5}},
		"two replicas wanted": func() meta.Command {
			c := cloneOf(4, 5, 1)
			c.CreateVolume.Volume.WantReplicas = 2
			return c
		}(),
	} {
		require.ErrorIs(t, c.Validate(), trivet.ErrInvalid, name)
	}
}

// TestImageRefusesSnapshotsThatCannotBe: a valid frame around snapshots without a volume, or copies of nothing.
func TestImageRefusesSnapshotsThatCannotBe(t *testing.T) {
	t.Parallel()
	m := withSnapshot(t)
	mustApply(t, m, cloneOf(4, 5, 1, 2, 3))
	mustApply(t, m, snapshotOf(m, 6, "u", 1))
	b := mustImage(t, m.State())
	body := string(b[16 : len(b)-4])
	at, flags := strings.Index(body, `"snapshots":[`), `"flat":["x"],"flattened":true}`
	for want, bad := range map[string]string{
		"is unknown":             strings.Replace(body, `"source":{"snapshot":5`, `"source":{"snapshot":8`, 1),
		"its volume vol-":        body[:at] + strings.Replace(body[at:], `"name":"u","volume":1`, `"name":"u","volume":9`, 1),
		"have the name \"u\"":    strings.Replace(body, `"name":"s"`, `"name":"u"`, 1),
		"there twice":            strings.Replace(body, `{"id":6,`, `{"id":5,`, 1),
		"kept for no snapshot":   strings.Replace(body, `"phase":"Creating"`, `"phase":"Kept"`, 1),
		"rollback":               strings.Replace(body, `"phase":"Available"`, `"phase":"Restoring"`, 1),
		"state \"Odd\"":          strings.Replace(body, `"state":"Ready","created"`, `"state":"Odd","created"`, 1),
		"lists replicas":         strings.Replace(body, `"generation":3}`, `"generation":3,`+flags, 1),
		"is Deleting":            strings.Replace(body, `"phase":"Available"`, `"phase":"Deleting"`, 1),
		"size of 1073741825 byt": body[:at] + strings.Replace(body[at:], "1073741824", "1073741825", 1),
	} {
		require.NotEqual(t, body, bad, want)
		_, err := meta.DecodeImage(framed([]byte(bad)))
		require.ErrorIs(t, err, trivet.ErrCorrupt, want)
		require.ErrorContains(t, err, want)
	}
	read, err := meta.DecodeImage(b)
	require.NoError(t, err)
	require.Equal(t, b, mustImage(t, read))
	require.Equal(t, []trivet.VolumeID{4}, read.ClonesOf(5))
	require.Len(t, read.SnapshotsOf(1), 2)
	for _, s := range []*meta.State{m.State(), read} {
		require.Len(t, s.CreatingSnapshots(), 1)
		require.Equal(t, trivet.SnapshotID(6), s.CreatingSnapshots()[0].ID)
	}
	mustApply(t, m, frozen(6))
	require.Empty(t, m.State().CreatingSnapshots())
}

func TestGoldenOfSnapshots(t *testing.T) {
	t.Parallel()
	m := withSnapshot(t)
	create := snapshotOf(m, 6, "second", 1)
	mustApply(t, m, create)
	mustApply(t, m, cloneOf(4, 5, 1, 2, 3))
	mustApply(t, m, flat(4, 2))
	restore := meta.Command{Restore: &meta.Restore{Snapshot: 5, IfRevision: 12}}
	golden := map[string][]byte{"image.v4": mustImage(t, m.State())}
	for name, c := range map[string]meta.Command{
		"command-snapshot.v1": create, "command-frozen.v1": frozen(5), "command-unsnap.v1": unsnap(5),
		"command-flat.v1": flat(4, 1), "command-restore.v1": restore, "command-clone.v1": cloneOf(4, 5, 1, 2, 3),
		"command-back.v1": {ReportRolledBack: &meta.ReportRolledBack{Volume: 1, Epoch: 3}},
	} {
		b, err := c.Encode()
		require.NoError(t, err)
		golden[name] = b
	}
	for name, got := range golden {
		path := filepath.Join("testdata", name)
		if os.Getenv("REWRITE") != "" {
			require.NoError(t, os.WriteFile(path, got, 0o600))
		}
		want, err := os.ReadFile(path)
		require.NoError(t, err)
		assert.Equal(t, string(want), string(got), name)
	}
}

// randomSnapshotCommands are the commands of this file for randomCommand; v is the volume that it drew.
func randomSnapshotCommands(r *rand.Rand, m *meta.Machine, v meta.Volume) []func() meta.Command {
	id, snaps := trivet.SnapshotID(1+r.Intn(6)), m.State().Snapshots()
	if len(snaps) > 0 && r.Intn(5) > 0 {
		id = snaps[r.Intn(len(snaps))].ID
	}
	return []func() meta.Command{
		func() meta.Command {
			return snapshotOf(m, id, []string{"a", "b", "clone/c", "d"}[r.Intn(4)], max(1, v.ID))
		},
		func() meta.Command { return frozen(id) },
		func() meta.Command { return frozen(id) },
		func() meta.Command { return unsnap(id) },
		func() meta.Command { return dropped(id) },
		func() meta.Command {
			c := cloneOf(1+r.Intn(6), id, []int{1, 2, 3}[:1+r.Intn(3)]...)
			c.CreateVolume.Volume.ID = trivet.VolumeID(r.Intn(500))
			return c
		},
		func() meta.Command {
			all := slices.Clone(v.Replicas)
			if len(all) == 0 {
				return unsnap(id)
			}
			return meta.Command{ReportFlattened: &meta.ReportFlattened{Volume: v.ID, Replica: all[r.Intn(len(all))].ID}}
		},
		func() meta.Command {
			return meta.Command{Restore: &meta.Restore{Snapshot: id, IfRevision: max(1, v.Revision)}}
		},
		func() meta.Command {
			return meta.Command{ReportRolledBack: &meta.ReportRolledBack{Volume: max(1, v.ID), Epoch: max(1, v.Epoch)}}
		},
	}
}
