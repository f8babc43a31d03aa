package engine_test

import (
	"bytes"
	"testing"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/engine"
)

// mustClone makes vol2 out of the first snapshot of vol1.
func mustClone(t testing.TB, e *engine.Engine, blockN int64) *engine.Volume {
	t.Helper()
	require.NoError(t, e.CreateClone(vol2, "replica-2", blockN*bs, engine.Base{Volume: vol1}))
	v, err := e.OpenVolume(vol2)
	require.NoError(t, err)
	return v
}

// A clone has what the snapshot showed, before it is flattened and after, and neither volume sees the other's writes.
func TestClone(t *testing.T) {
	fs := vfs.NewMem()
	e, err := engine.Open(config(fs))
	require.NoError(t, err)
	defer func() { require.NoError(t, e.Close()) }()
	v := mustVolume(t, e, vol1, 64)
	require.NoError(t, freeze(v, 1, op{0, 8, 1}, op{40, 2, 2}))
	mustCommit(t, v, op{0, 4, 3})
	c := mustClone(t, e, 64)
	require.Equal(t, []engine.Base{{Volume: vol1}}, c.Bases())
	mustCommit(t, c, op{1, 1, 4}, op{2, 1, 0}, op{40, 24, 0})
	want := make([]uint32, 64)
	copy(want, []uint32{1, 4, 0, 1, 1, 1, 1, 1})
	require.NoError(t, checkStamps(c, want))
	before, err := c.Digest()
	require.NoError(t, err)

	require.NoError(t, c.Flatten(t.Context()))
	require.True(t, c.Flattened())
	require.Empty(t, c.Bases())
	require.NoError(t, checkStamps(c, want))
	after, err := c.Digest()
	require.NoError(t, err)
	require.Equal(t, before, after, "flattening is nobody's business")
	require.NoError(t, engine.CheckLive(e))

	require.NoError(t, thaw(v, 0))
	require.NoError(t, engine.SweepNow(e))
	require.NoError(t, e.DropVolume(vol1))
	require.NoError(t, engine.TrimLog(c))
	_, err = e.Clean()
	require.NoError(t, err)
	require.NoError(t, checkStamps(c, want), "it does not need the other any more")
	require.NoError(t, engine.CheckLive(e))
	require.NoError(t, e.Close())
	e, err = engine.Open(config(fs))
	require.NoError(t, err)
	c, err = e.OpenVolume(vol2)
	require.NoError(t, err)
	require.NoError(t, checkStamps(c, want))
}

// What a clone needs stays: the generation after the deletion of its snapshot, and the volume.
func TestCloneKeepsItsBase(t *testing.T) {
	fs := vfs.NewMem()
	e, err := engine.Open(config(fs))
	require.NoError(t, err)
	defer func() { require.NoError(t, e.Close()) }()
	v := mustVolume(t, e, vol1, 16)
	err = e.CreateClone(vol2, "r", 16*bs, engine.Base{Volume: vol1})
	require.ErrorIs(t, err, trivet.ErrUnavailable, "no snapshot yet")
	err = e.CreateClone(vol2, "r", 16*bs, engine.Base{Volume: 77})
	require.ErrorIs(t, err, trivet.ErrUnavailable, "no such volume")
	require.NoError(t, freeze(v, 1, op{0, 16, 1}))
	c := mustClone(t, e, 16)
	mustCommit(t, v, op{0, 16, 2})
	require.NoError(t, thaw(v, 0))
	for range 3 { // the sweep of the base; flattening is another volume's step
		require.NoError(t, engine.SweepStep(v))
	}
	require.True(t, engine.SweepOwed(v), "something is kept that the volume itself does not show")
	want := make([]uint32, 16)
	for i := range want {
		want[i] = 1
	}
	require.NoError(t, checkStamps(c, want))
	require.ErrorIs(t, e.DropVolume(vol1), trivet.ErrInUse)
	img, err := v.Image(nil)
	require.NoError(t, err)
	require.ErrorIs(t, v.Restore(img), trivet.ErrInUse)
	require.NoError(t, img.Close())
	require.NoError(t, e.Close())
	e, err = engine.Open(config(fs))
	require.NoError(t, err)
	require.ErrorIs(t, e.DropVolume(vol1), trivet.ErrInUse, "as the records say")
	require.NoError(t, engine.SweepNow(e))
	v, err = e.OpenVolume(vol1)
	require.NoError(t, err)
	c, err = e.OpenVolume(vol2)
	require.NoError(t, err)
	require.True(t, c.Flattened())
	require.False(t, engine.SweepOwed(v))
	n, err := engine.Versions(v)
	require.NoError(t, err)
	require.Equal(t, 16, n, "what was kept for the clone went with the need")
	require.NoError(t, checkStamps(c, want))
	require.NoError(t, e.DropVolume(vol1))
	require.NoError(t, checkStamps(c, want))
}

// A clone that is dropped sets its base free.
func TestDroppedCloneFreesItsBase(t *testing.T) {
	e := mustOpen(t, vfs.NewMem())
	v := mustVolume(t, e, vol1, 16)
	require.NoError(t, freeze(v, 1, op{0, 16, 1}))
	mustClone(t, e, 16)
	mustCommit(t, v, op{0, 16, 2})
	require.NoError(t, thaw(v, 0))
	require.NoError(t, e.DropVolume(vol2))
	require.NoError(t, engine.SweepNow(e))
	n, err := engine.Versions(v)
	require.NoError(t, err)
	require.Equal(t, 16, n)
	require.NoError(t, e.DropVolume(vol1))
}

// A clone smaller than what the snapshot shows never shows the rest, however much it grows.
func TestSmallerClone(t *testing.T) {
	e := mustOpen(t, vfs.NewMem())
	v := mustVolume(t, e, vol1, 32)
	require.NoError(t, freeze(v, 1, op{0, 32, 1}))
	c := mustClone(t, e, 8)
	st := c.State()
	st.AppliedIndex, st.SizeBytes = st.AppliedIndex+1, 32*bs
	require.NoError(t, commitState(c, st))
	want := make([]uint32, 32)
	for i := range 8 {
		want[i] = 1
	}
	require.NoError(t, checkStamps(c, want))
	require.NoError(t, c.Flatten(t.Context()))
	require.NoError(t, checkStamps(c, want))
}

// Clones of clones are looked up beneath one another, up to a bound.
func TestCloneOfClones(t *testing.T) {
	e := mustOpen(t, vfs.NewMem())
	v := mustVolume(t, e, 1, 16)
	want := make([]uint32, 16)
	var last trivet.VolumeID
	for id := trivet.VolumeID(1); ; id++ {
		want[id%16] = uint32(id)
		require.NoError(t, freeze(v, 1, op{trivet.LBA(id % 16), 1, uint32(id)}))
		err := e.CreateClone(id+1, "r", 16*bs, engine.Base{Volume: id})
		if err != nil {
			require.ErrorIs(t, err, trivet.ErrUnavailable)
			last = id
			break
		}
		v, err = e.OpenVolume(id + 1)
		require.NoError(t, err)
		require.NoError(t, checkStamps(v, want))
	}
	require.Greater(t, last, trivet.VolumeID(5))
	require.NoError(t, engine.SweepNow(e))
	require.NoError(t, e.CreateClone(last+1, "r", 16*bs, engine.Base{Volume: last}))
	for id := trivet.VolumeID(1); id < last; id++ {
		require.NoError(t, e.DropVolume(id))
	}
	require.NoError(t, checkStamps(v, want))
	require.NoError(t, engine.CheckLive(e))
}

// A rollback shows what the snapshot did, keeps the snapshots, and leaves what came after the snapshot to the sweep.
func TestRollback(t *testing.T) {
	e := mustOpen(t, vfs.NewMem())
	v := mustVolume(t, e, vol1, 16)
	require.NoError(t, freeze(v, 1, op{0, 4, 1}))
	require.NoError(t, freeze(v, 2, op{0, 2, 2}, op{8, 2, 3}))
	mustCommit(t, v, op{1, 3, 4}, op{12, 1, 5})
	at := v.State().AppliedIndex
	back := func(gen trivet.Generation, st engine.State) error {
		b := v.NewBatch()
		require.NoError(t, b.Rollback(gen))
		require.ErrorIs(t, b.Write(0, block(9, 0)), trivet.ErrInvalid, "nothing follows it")
		return b.Commit(st)
	}
	b := v.NewBatch()
	require.ErrorIs(t, b.Rollback(7), trivet.ErrNotFound)
	require.NoError(t, b.Close())
	st := v.State()
	st.AppliedIndex++
	require.ErrorIs(t, back(0, st), trivet.ErrInvalid, "it needs a generation of its own")
	st.Generation++
	require.NoError(t, back(0, st))
	require.False(t, v.Flattened())
	_, known, err := v.ChangedSince(at)
	require.NoError(t, err)
	require.False(t, known, "a journal cannot tell what it changed")
	want := make([]uint32, 16)
	copy(want, []uint32{1, 1, 1, 1})
	check := func() {
		t.Helper()
		require.NoError(t, checkStamps(v, want))
		for lba, stamp := range []uint32{2, 2, 1, 1, 0, 0, 0, 0, 3} {
			wantStamp(t, v, 1, trivet.LBA(lba), stamp)
		}
		wantStamp(t, v, 0, 0, 1)
	}
	check()
	mustCommit(t, v, op{2, 1, 6}, op{3, 1, 0})
	want[2], want[3] = 6, 0
	check()
	require.NoError(t, engine.SweepNow(e))
	require.True(t, v.Flattened())
	check()
	require.NoError(t, engine.CheckLive(e))
}

// A generation that only a rollback looks at keeps what lies beneath it, whatever becomes of its snapshot.
func TestRollbackOfAClone(t *testing.T) {
	e := mustOpen(t, vfs.NewMem())
	v := mustVolume(t, e, vol1, 16)
	require.NoError(t, freeze(v, 1, op{0, 8, 1}))
	c := mustClone(t, e, 16)
	require.NoError(t, freeze(c, 2, op{0, 1, 2}))
	mustCommit(t, c, op{0, 16, 3})
	st := c.State()
	st.AppliedIndex++
	st.Generation++
	st.Snapshots = nil // the rollback and the deletion of its snapshot in one commit
	b := c.NewBatch()
	require.NoError(t, b.Rollback(0))
	require.NoError(t, b.Commit(st))
	want := make([]uint32, 16)
	copy(want, []uint32{2, 1, 1, 1, 1, 1, 1, 1})
	require.NoError(t, checkStamps(c, want))
	require.NoError(t, engine.SweepNow(e))
	require.True(t, c.Flattened())
	require.NoError(t, checkStamps(c, want))
	require.NoError(t, e.DropVolume(vol1))
	require.NoError(t, checkStamps(c, want))
	require.NoError(t, engine.CheckLive(e))
}

// A restore of everything takes the layers away before the first block changes, and with them the claim to have any
// block: what an interrupted one leaves is made whole by the next.
func TestRestoreOverLayers(t *testing.T) {
	var clones [2]*engine.Volume
	for i := range clones {
		e := mustOpen(t, vfs.NewMem())
		require.NoError(t, freeze(mustVolume(t, e, vol1, 64), 1, op{0, 64, 1}))
		clones[i] = mustClone(t, e, 64)
		mustCommit(t, clones[i], op{0, 4, 2})
	}
	source, target := clones[0], clones[1]
	mustCommit(t, source, op{2, 4, 3})
	image := readAll(t, source)
	require.ErrorIs(t, target.Restore(bytes.NewReader(image[:len(image)/8])), trivet.ErrCorrupt, "cut off")
	require.True(t, target.Restoring())
	require.True(t, target.Flattened())
	i, err := source.Image(target.Want())
	require.NoError(t, err)
	require.NoError(t, target.Restore(i))
	require.NoError(t, i.Close())
	want, err := source.Digest()
	require.NoError(t, err)
	got, err := target.Digest()
	require.NoError(t, err)
	require.Equal(t, want, got)
}
