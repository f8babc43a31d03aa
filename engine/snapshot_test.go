package engine_test

import (
	"testing"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/engine"
)

// freeze takes a snapshot in the same commit as ops.
func freeze(v *engine.Volume, id uint64, ops ...op) error {
	st := v.State()
	st.AppliedIndex++
	st.Snapshots = append(st.Snapshots, engine.Snapshot{ID: id, Generation: st.Generation})
	st.Generation++
	return commitState(v, st, ops...)
}

// thaw deletes the i-th snapshot.
func thaw(v *engine.Volume, i int) error {
	st := v.State()
	st.AppliedIndex++
	st.Snapshots = append(st.Snapshots[:i], st.Snapshots[i+1:]...)
	return commitState(v, st)
}

// wantStamp compares one block as of a generation.
func wantStamp(t testing.TB, v *engine.Volume, gen trivet.Generation, lba trivet.LBA, stamp uint32) {
	t.Helper()
	p := make([]byte, bs)
	require.NoError(t, v.ReadAtGeneration(p, lba, gen))
	require.Equal(t, block(stamp, lba), p, "block %d of generation %d", lba, gen)
}

// A snapshot shows what the volume showed when it was taken, the first one, of generation 0, included.
func TestReadAtGeneration(t *testing.T) {
	v := mustVolume(t, mustOpen(t, vfs.NewMem()), vol1, 16)
	p := make([]byte, bs)
	require.ErrorIs(t, v.ReadAtGeneration(p, 0, 0), trivet.ErrNotFound, "no snapshot holds it")
	mustCommit(t, v, op{0, 2, 1})
	require.NoError(t, freeze(v, 100, op{2, 1, 2}))
	mustCommit(t, v, op{0, 1, 3}, op{3, 1, 4})
	require.NoError(t, freeze(v, 101))
	mustCommit(t, v, op{1, 1, 0}, op{0, 1, 5})
	for _, x := range []struct {
		gen  trivet.Generation
		want []uint32
	}{
		{0, []uint32{1, 1, 2, 0}},
		{1, []uint32{3, 1, 2, 4}},
		{engine.Live, []uint32{5, 0, 2, 4}},
	} {
		all := make([]byte, 4*bs)
		require.NoError(t, v.ReadAtGeneration(all, 0, x.gen))
		for i, stamp := range x.want {
			wantStamp(t, v, x.gen, trivet.LBA(i), stamp)
			require.Equal(t, block(stamp, trivet.LBA(i)), all[i*bs:(i+1)*bs], "block %d, generation %d", i, x.gen)
		}
	}
	require.NoError(t, thaw(v, 0))
	require.ErrorIs(t, v.ReadAtGeneration(p, 0, 0), trivet.ErrNotFound, "deleted")
	wantStamp(t, v, 1, 1, 1)
}

// What a snapshot may be is checked where it is committed.
func TestSnapshotsFollow(t *testing.T) {
	v := mustVolume(t, mustOpen(t, vfs.NewMem()), vol1, 16)
	require.NoError(t, freeze(v, 7))
	require.NoError(t, freeze(v, 8))
	for name, change := range map[string]func(st *engine.State){
		"of the generation that begins": func(st *engine.State) {
			st.Generation++
			st.Snapshots = append(st.Snapshots, engine.Snapshot{ID: 9, Generation: st.Generation})
		},
		"of the generation that goes on": func(st *engine.State) {
			st.Snapshots = append(st.Snapshots, engine.Snapshot{ID: 9, Generation: st.Generation})
		},
		"with another ID": func(st *engine.State) { st.Snapshots[0].ID = 9 },
		"out of order": func(st *engine.State) {
			st.Snapshots[0], st.Snapshots[1] = st.Snapshots[1], st.Snapshots[0]
		},
		"of a generation that was left": func(st *engine.State) {
			st.Generation += 2
			st.Snapshots = append(st.Snapshots, engine.Snapshot{ID: 9, Generation: st.Generation - 1})
		},
	} {
		st := v.State()
		st.AppliedIndex++
		change(&st)
		require.ErrorIs(t, commitState(v, st), trivet.ErrInvalid, name)
	}
	require.NoError(t, thaw(v, 0))
	st := v.State()
	st.Snapshots = []engine.Snapshot{{ID: 7, Generation: 0}, {ID: 8, Generation: 1}}
	require.ErrorIs(t, commitState(v, st), trivet.ErrInvalid, "one that was deleted")
}

// Once the newest snapshot is deleted, a block that is written for the first time since leaves an older version that
// nothing shows: that is swept, too, without a pass over the volume.
func TestOverwritesAfterADeletion(t *testing.T) {
	e := mustOpen(t, vfs.NewMem())
	v := mustVolume(t, e, vol1, 64)
	require.NoError(t, freeze(v, 1, op{0, 64, 1}))
	require.NoError(t, thaw(v, 0))
	require.NoError(t, engine.SweepNow(e))
	require.False(t, engine.SweepOwed(v))
	versions := func() int {
		n, err := engine.Versions(v)
		require.NoError(t, err)
		return n
	}
	require.Equal(t, 64, versions())
	mustCommit(t, v, op{3, 5, 2}, op{40, 1, 0})
	require.True(t, engine.SweepOwed(v))
	require.Equal(t, 64+5+1, versions())
	require.NoError(t, engine.SweepNow(e))
	require.False(t, engine.SweepOwed(v))
	require.Equal(t, 63, versions())
	require.NoError(t, engine.CheckLive(e))
}

// A sweep that was interrupted goes on after the restart: the mark is in the batch that deletes the snapshot.
func TestSweepGoesOnAfterRestart(t *testing.T) {
	fs := vfs.NewMem()
	e, err := engine.Open(config(fs))
	require.NoError(t, err)
	v := mustVolume(t, e, vol1, 3000)
	for i := range trivet.LBA(30) {
		require.NoError(t, commit(v, op{100 * i, 100, 1}))
	}
	require.NoError(t, freeze(v, 1))
	for i := range trivet.LBA(30) {
		require.NoError(t, commit(v, op{100 * i, 100, 2}))
	}
	require.NoError(t, thaw(v, 0))
	require.NoError(t, engine.SweepStep(v))
	n, err := engine.Versions(v)
	require.NoError(t, err)
	require.Less(t, n, 6000)
	require.Greater(t, n, 5000, "a step is bounded")
	require.NoError(t, e.Close())
	e, err = engine.Open(config(fs))
	require.NoError(t, err)
	defer func() { require.NoError(t, e.Close()) }()
	require.NoError(t, engine.SweepNow(e))
	v, err = e.OpenVolume(vol1)
	require.NoError(t, err)
	n, err = engine.Versions(v)
	require.NoError(t, err)
	require.Equal(t, 3000, n)
	require.False(t, engine.SweepOwed(v))
}
