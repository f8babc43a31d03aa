package engine

import (
	"testing"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
)

// keep commits a snapshot of the volume as it is.
func keep(t testing.TB, v *Volume) trivet.Generation {
	t.Helper()
	st, b := v.State(), v.NewBatch()
	gen := st.Generation
	st.AppliedIndex++
	st.Snapshots = append(st.Snapshots, Snapshot{ID: 7, Generation: gen})
	st.Generation++
	require.NoError(t, b.Commit(st))
	return gen
}

// back has the volume show a snapshot.
func back(t testing.TB, v *Volume, gen trivet.Generation) {
	t.Helper()
	st, b := v.State(), v.NewBatch()
	require.NoError(t, b.Rollback(gen))
	st.AppliedIndex++
	st.Generation++
	require.NoError(t, b.Commit(st))
}

func mustView(t testing.TB, v *Volume) *View {
	t.Helper()
	w, err := v.View(0, v.State().SizeBytes/trivet.BlockSize)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, w.Close()) })
	return w
}

func mustCheck(t testing.TB, w *View) Checked {
	t.Helper()
	c, err := w.Check(t.Context(), nil)
	require.NoError(t, err)
	return c
}

// whole is a repair of a damaged block with its data.
func whole(t testing.TB, v *Volume, b *BadBlock, x uint32) Repair {
	t.Helper()
	r, err := b.With(v.id, numbered(x, b.LBA))
	require.NoError(t, err)
	return r
}

// A check reads what snapshots show, and what they show is compared: it is the same on replicas that have swept or not,
// and another one where a snapshot's block is.
func TestViewChecksSnapshots(t *testing.T) {
	mem := vfs.NewCrashableMem()
	e, v := mustStore(t, logConfig(t, mem, nil), 64)
	defer func() { require.NoError(t, e.Close()) }()
	write(t, v, 1, 0, 40)
	gen := keep(t, v)
	write(t, v, 2, 10, 20)
	settle(t, v)
	before := mustCheck(t, mustView(t, v))
	require.Empty(t, before.Bad)
	require.EqualValues(t, 60, before.BlockN)

	flipBlock(t, mem, numbered(1, 15)) // which the snapshot alone shows
	after := mustCheck(t, mustView(t, v))
	require.Equal(t, []any{before.State, before.Blocks, before.Older}, []any{after.State, after.Blocks, after.Older})
	require.Len(t, after.Bad, 1)
	require.Equal(t, BlockVersion{15, gen, BlockSum(v.id, 15, numbered(1, 15))}, after.Bad[0].BlockVersion)
	p := make([]byte, trivet.BlockSize)
	require.ErrorIs(t, v.ReadAtGeneration(p, 15, gen), trivet.ErrCorrupt)
	bad, err := v.Damaged(15, 1)
	require.NoError(t, err)
	require.Len(t, bad, 1, "a read of the snapshot has it repaired, too")
	n, err := v.Replace([]Repair{whole(t, v, &after.Bad[0], 1)})
	require.NoError(t, err)
	require.Equal(t, 1, n)
	require.NoError(t, v.ReadAtGeneration(p, 15, gen))
	require.Equal(t, numbered(1, 15), p)
	require.NoError(t, CheckLive(e))

	// The map of a snapshot is another one.
	n, err = v.exchange([]Repair{{lba: 15, gen: gen, was: mustValue(t, v, 15, gen), data: numbered(9, 15)}}, nil, ref{})
	require.NoError(t, err)
	require.Equal(t, 1, n)
	wrong := mustCheck(t, mustView(t, v))
	require.Equal(t, before.Blocks, wrong.Blocks)
	require.NotEqual(t, before.Older, wrong.Older)
}

func mustValue(t testing.TB, v *Volume, lba trivet.LBA, gen trivet.Generation) []byte {
	t.Helper()
	val, closer, err := v.e.db.Get(appendBlockKey(nil, v.id, lba, gen))
	require.NoError(t, err)
	defer func() { require.NoError(t, closer.Close()) }()
	return append([]byte(nil), val...)
}

// A clone that lies upon its base is checked as it shows. A block that has rotted beneath is repaired in the clone, by
// a version of its own, and stays so when the clone is flattened; what was written to the clone since stays in any
// case.
func TestViewChecksClone(t *testing.T) {
	const cloneID = damagedID + 5
	mem := vfs.NewCrashableMem()
	e, v := mustStore(t, logConfig(t, mem, nil), 64)
	defer func() { require.NoError(t, e.Close()) }()
	e.sweeper.stop() // it would flatten the clone
	write(t, v, 1, 0, 40)
	gen := keep(t, v)
	settle(t, v)
	require.NoError(t, e.CreateClone(cloneID, "r", 64*trivet.BlockSize, Base{v.id, gen}))
	c, err := e.OpenVolume(cloneID)
	require.NoError(t, err)
	write(t, c, 3, 20, 1)
	blockN, last, err := c.RunOf(0, 10)
	require.NoError(t, err)
	require.False(t, last)
	require.EqualValues(t, 10, blockN, "what shows through counts")
	before := mustCheck(t, mustView(t, c))
	require.Empty(t, before.Bad)
	require.EqualValues(t, 40, before.BlockN)

	for _, lba := range []trivet.LBA{5, 6, 20} {
		flipBlock(t, mem, numbered(1, lba))
	}
	w := mustView(t, c)
	after := mustCheck(t, w)
	require.Equal(t, before.Blocks, after.Blocks)
	require.Len(t, after.Bad, 2, "block 20 of the base is none of the clone's")
	repairs := []Repair{whole(t, c, &after.Bad[0], 1), whole(t, c, &after.Bad[1], 1)}
	b, st := c.NewBatch(), c.State()
	require.NoError(t, b.Zero(6, 1))
	st.AppliedIndex++
	require.NoError(t, b.Commit(st))
	require.NoError(t, c.Flatten(t.Context()))
	n, err := c.Replace(repairs)
	require.NoError(t, err)
	require.Zero(t, n, "the blocks have versions of their own by now, one of them damaged")
	after = mustCheck(t, mustView(t, c))
	require.Len(t, after.Bad, 1)
	n, err = c.Replace([]Repair{whole(t, c, &after.Bad[0], 1)})
	require.NoError(t, err)
	require.Equal(t, 1, n)
	require.NoError(t, CheckLive(e))
	requireClone(t, c)
	require.Len(t, mustCheck(t, mustView(t, v)).Bad, 3, "the base has its own repaired")
}

// The same, repaired before it is flattened.
func TestViewRepairsCloneBeforeFlattening(t *testing.T) {
	const cloneID = damagedID + 5
	mem := vfs.NewCrashableMem()
	e, v := mustStore(t, logConfig(t, mem, nil), 64)
	defer func() { require.NoError(t, e.Close()) }()
	e.sweeper.stop()
	write(t, v, 1, 0, 40)
	gen := keep(t, v)
	settle(t, v)
	require.NoError(t, e.CreateClone(cloneID, "r", 64*trivet.BlockSize, Base{v.id, gen}))
	c, err := e.OpenVolume(cloneID)
	require.NoError(t, err)
	write(t, c, 3, 20, 1)
	for _, lba := range []trivet.LBA{5, 6, 7} {
		flipBlock(t, mem, numbered(1, lba))
	}
	w := mustView(t, c)
	bad := mustCheck(t, w).Bad
	require.Len(t, bad, 3)
	// Block 7 is discarded and the volume flattened and swept: nothing is there to compare with but the view.
	b, st := c.NewBatch(), c.State()
	require.NoError(t, b.Zero(6, 2))
	st.AppliedIndex++
	require.NoError(t, b.Commit(st))
	late := whole(t, c, &bad[2], 1)
	n, err := c.Replace([]Repair{whole(t, c, &bad[0], 1)})
	require.NoError(t, err)
	require.Equal(t, 1, n)
	require.NoError(t, c.Flatten(t.Context()))
	require.NoError(t, e.Sweep(t.Context()))
	n, err = c.Replace([]Repair{late})
	require.NoError(t, err)
	require.Zero(t, n, "a discard leaves nothing to compare with")
	require.NoError(t, CheckLive(e))
	p := make([]byte, trivet.BlockSize)
	require.NoError(t, c.ReadAt(p, 7))
	require.Equal(t, make([]byte, trivet.BlockSize), p)
	require.NoError(t, c.ReadAt(p, 5))
	require.Equal(t, numbered(1, 5), p)
}

func requireClone(t testing.TB, c *Volume) {
	t.Helper()
	p := make([]byte, trivet.BlockSize)
	for lba := range trivet.LBA(64) {
		want := numbered(1, lba)
		switch {
		case lba == 20:
			want = numbered(3, lba)
		case lba == 6, lba >= 40:
			want = make([]byte, trivet.BlockSize)
		}
		require.NoError(t, c.ReadAt(p, lba))
		require.Equal(t, want, p, "block %d", lba)
	}
}

// A volume that was set back is checked as it shows, and has the same digests before and after it is flattened. What
// the others say a block is, it becomes, whatever lies beneath.
func TestViewOfRollback(t *testing.T) {
	mem := vfs.NewCrashableMem()
	e, v := mustStore(t, logConfig(t, mem, nil), 64)
	defer func() { require.NoError(t, e.Close()) }()
	e.sweeper.stop()
	write(t, v, 1, 0, 40)
	gen := keep(t, v)
	write(t, v, 2, 10, 20)
	back(t, v, gen)
	settle(t, v)
	require.False(t, v.Flattened())
	before := mustCheck(t, mustView(t, v))
	require.EqualValues(t, 40, before.BlockN, "what the volume and its snapshot show, once")
	flipBlock(t, mem, numbered(1, 12))
	w := mustView(t, v)
	bad := mustCheck(t, w).Bad
	require.Len(t, bad, 1)
	other, err := w.Repair(BlockVersion{13, 0, BlockSum(v.id, 13, numbered(5, 13))}, numbered(5, 13))
	require.NoError(t, err)
	none, err := w.Repair(BlockVersion{LBA: 14}, nil)
	require.NoError(t, err)
	n, err := v.Replace([]Repair{whole(t, v, &bad[0], 1), other, none})
	require.NoError(t, err)
	require.Equal(t, 3, n)
	require.NoError(t, CheckLive(e))
	shows := func() {
		t.Helper()
		p := make([]byte, trivet.BlockSize)
		for lba, want := range map[trivet.LBA][]byte{
			12: numbered(1, 12), 13: numbered(5, 13), 14: make([]byte, trivet.BlockSize), 15: numbered(1, 15),
		} {
			require.NoError(t, v.ReadAt(p, lba))
			require.Equal(t, want, p, "block %d", lba)
			require.NoError(t, v.ReadAtGeneration(p, lba, gen))
			require.Equal(t, numbered(1, lba), p, "block %d of the snapshot", lba)
		}
	}
	shows()
	layered := mustCheck(t, mustView(t, v))
	require.NoError(t, v.Flatten(t.Context()))
	require.NoError(t, e.Sweep(t.Context()))
	shows()
	flat := mustCheck(t, mustView(t, v))
	require.Equal(t, []any{layered.State, layered.Blocks, layered.Older}, []any{flat.State, flat.Blocks, flat.Older})
	require.NoError(t, CheckLive(e))
}

// Data are found by their checksum, of whatever generation they are here.
func TestReadVersionOfAnyGeneration(t *testing.T) {
	mem := vfs.NewCrashableMem()
	e, v := mustStore(t, logConfig(t, mem, nil), 64)
	defer func() { require.NoError(t, e.Close()) }()
	e.sweeper.stop()
	write(t, v, 1, 0, 4)
	gen := keep(t, v)
	write(t, v, 2, 0, 2)
	settle(t, v)
	p := make([]byte, trivet.BlockSize)
	sum := func(x uint32) uint32 { return BlockSum(v.id, 1, numbered(x, 1)) }
	for want, x := range map[BlockVersion]uint32{
		{1, gen, sum(1)}: 1, {1, 5, sum(1)}: 1, {1, gen + 1, sum(2)}: 2, {1, gen, sum(2)}: 2,
	} {
		require.NoError(t, v.ReadVersion(p, want))
		require.Equal(t, numbered(x, 1), p)
	}
	require.ErrorIs(t, v.ReadVersion(p, BlockVersion{1, gen, sum(3)}), trivet.ErrNotFound)
	require.ErrorIs(t, v.ReadVersion(p, BlockVersion{50, gen, sum(1)}), trivet.ErrNotFound)
	flipBlock(t, mem, numbered(1, 1))
	require.ErrorIs(t, v.ReadVersion(p, BlockVersion{1, gen, sum(1)}), trivet.ErrCorrupt)
	require.NoError(t, v.ReadVersion(p, BlockVersion{1, gen, sum(2)}))
}
