package engine

import (
	"context"
	"errors"
	"testing"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
)

// flipBlock changes a bit of every copy of a block's data that the log's files have.
func flipBlock(t *testing.T, mem *vfs.MemFS, data []byte) {
	t.Helper()
	flipped := 0
	for _, name := range logFiles(t, mem) {
		b := readFile(t, mem, name)
		for off := 0; off+trivet.BlockSize <= len(b); off += trivet.BlockSize {
			if string(b[off:off+trivet.BlockSize]) == string(data) {
				flipByte(t, mem, name, off+1000, 0x10)
				flipped++
			}
		}
	}
	require.Positive(t, flipped)
}

// rotting is a store of 60 blocks of number 1, of which some have rotted.
func rotting(t *testing.T, onCorrupt func(error), lbas ...trivet.LBA) (*vfs.MemFS, *Engine, *Volume) {
	t.Helper()
	mem := vfs.NewCrashableMem()
	cfg := logConfig(t, mem, nil)
	cfg.OnCorruption = onCorrupt
	e, v := mustStore(t, cfg, 64)
	write(t, v, 1, 0, 60)
	settle(t, v)
	for _, lba := range lbas {
		flipBlock(t, mem, numbered(1, lba))
	}
	return mem, e, v
}

func one(trivet.LBA) uint32 { return 1 }

// A damaged block is reported to who watches the volume, found with its checksum, and replaced for good by its data and
// no others; the account stays right, and another restart finds it whole.
func TestReplaceDamagedBlocks(t *testing.T) {
	mem, e, v := rotting(t, func(err error) { t.Errorf("told the owner: %v", err) }, 5, 6, 40)
	var met []trivet.LBA
	v.WatchDamage(func(b *BlockError) { met = append(met, b.LBA) })
	p := make([]byte, trivet.BlockSize)
	require.ErrorIs(t, v.ReadAt(p, 40), trivet.ErrCorrupt)
	require.Equal(t, []trivet.LBA{40}, met)

	bad, err := v.Damaged(0, 64)
	require.NoError(t, err)
	require.Len(t, bad, 3)
	var repairs []Repair
	for i, lba := range []trivet.LBA{5, 6, 40} {
		require.Equal(t, BlockVersion{lba, 0, BlockSum(damagedID, lba, numbered(1, lba))}, bad[i].BlockVersion)
		_, err := bad[i].With(v.ID(), numbered(2, lba))
		require.ErrorIs(t, err, trivet.ErrCorrupt, "other data than it had")
		r, err := bad[i].With(v.ID(), numbered(1, lba))
		require.NoError(t, err)
		repairs = append(repairs, r)
	}
	n, err := v.Replace(append(repairs, repairs[0]))
	require.NoError(t, err)
	require.Equal(t, 3, n)
	requireNumbers(t, v, 60, one)
	require.NoError(t, CheckLive(e))
	n, err = v.Replace(repairs)
	require.NoError(t, err)
	require.Zero(t, n, "the map has moved on")
	require.NoError(t, CheckLive(e))

	settle(t, v)
	churn(t, e) // the damaged places come free
	require.NoError(t, e.Close())
	e, err = Open(logConfig(t, mem, nil))
	require.NoError(t, err)
	defer func() { require.NoError(t, e.Close()) }()
	v, err = e.OpenVolume(damagedID)
	require.NoError(t, err)
	requireNumbers(t, v, 60, one)
	bad, err = v.Damaged(0, 64)
	require.NoError(t, err)
	require.Empty(t, bad)
}

// Without anybody who watches, the owner of the engine is told, once.
func TestUnwatchedDamageIsReported(t *testing.T) {
	var told []error
	_, e, v := rotting(t, func(err error) { told = append(told, err) }, 7)
	defer func() { require.NoError(t, e.Close()) }()
	p := make([]byte, trivet.BlockSize)
	for range 3 {
		require.ErrorIs(t, v.ReadAt(p, 7), trivet.ErrCorrupt)
	}
	v.ReportDamage("again")
	require.Len(t, told, 1)
	var d *DamageError
	require.ErrorAs(t, told[0], &d)
	require.True(t, d.Touches(damagedID))
}

// A write that comes between the finding of the damage and its repair wins, and so do a discard and a drop.
func TestReplaceLosesToAWrite(t *testing.T) {
	_, e, v := rotting(t, nil, 5, 6)
	defer func() { require.NoError(t, e.Close()) }()
	bad, err := v.Damaged(0, 64)
	require.NoError(t, err)
	require.Len(t, bad, 2)
	five, err := bad[0].With(v.ID(), numbered(1, 5))
	require.NoError(t, err)
	six, err := bad[1].With(v.ID(), numbered(1, 6))
	require.NoError(t, err)
	write(t, v, 2, 5, 1)
	still, err := v.StillBad(bad)
	require.NoError(t, err)
	require.Equal(t, bad[1:], still)
	b := v.NewBatch()
	require.NoError(t, b.Zero(6, 1))
	st := v.State()
	st.AppliedIndex++
	require.NoError(t, b.Commit(st))
	n, err := v.Replace([]Repair{five, six})
	require.NoError(t, err)
	require.Zero(t, n)
	p := make([]byte, 2*trivet.BlockSize)
	require.NoError(t, v.ReadAt(p, 5))
	require.Equal(t, append(numbered(2, 5), make([]byte, trivet.BlockSize)...), p)
	require.NoError(t, CheckLive(e))
	require.NoError(t, e.DropVolume(damagedID))
	_, err = v.Replace([]Repair{five})
	require.ErrorIs(t, err, trivet.ErrNotFound)
}

// Blocks that are values of the store, as without a log, are replaced as well.
func TestReplaceValues(t *testing.T) {
	e, err := Open(damageConfig(vfs.NewMem()))
	require.NoError(t, err)
	defer func() { require.NoError(t, e.Close()) }()
	require.NoError(t, e.CreateVolume(damagedID, "r", 64*trivet.BlockSize))
	v, err := e.OpenVolume(damagedID)
	require.NoError(t, err)
	require.NoError(t, writeNumbered(v, 1, 0, 60))
	key := appendBlockKey(nil, damagedID, 9, 0)
	val := make([]byte, dataValueBytes)
	putData(val, numbered(1, 9), place(key))
	val[99] ^= 1
	require.NoError(t, e.db.Set(key, val, pebble.NoSync))
	bad, err := v.Damaged(0, 64)
	require.NoError(t, err)
	require.Len(t, bad, 1)
	r, err := bad[0].With(v.ID(), numbered(1, 9))
	require.NoError(t, err)
	n, err := v.Replace([]Repair{r})
	require.NoError(t, err)
	require.Equal(t, 1, n)
	requireNumbers(t, v, 60, one)
}

// ReadVersion gives the data that are asked for, verified, or nothing.
func TestReadVersion(t *testing.T) {
	_, e, v := rotting(t, nil, 5)
	defer func() { require.NoError(t, e.Close()) }()
	p := make([]byte, trivet.BlockSize)
	sum := func(x uint32, lba trivet.LBA) uint32 { return BlockSum(damagedID, lba, numbered(x, lba)) }
	require.NoError(t, v.ReadVersion(p, BlockVersion{LBA: 4, Sum: sum(1, 4)}))
	require.Equal(t, numbered(1, 4), p)
	require.ErrorIs(t, v.ReadVersion(p, BlockVersion{LBA: 4, Sum: sum(2, 4)}), trivet.ErrNotFound)
	require.NoError(t, v.ReadVersion(p, BlockVersion{LBA: 4, Generation: 1, Sum: sum(1, 4)}), "of another generation")
	require.ErrorIs(t, v.ReadVersion(p, BlockVersion{LBA: 61, Sum: sum(1, 61)}), trivet.ErrNotFound)
	require.ErrorIs(t, v.ReadVersion(p, BlockVersion{LBA: 5, Sum: sum(1, 5)}), trivet.ErrCorrupt)
}

// A view shows one moment, digests it by the map, and reads every version in it, those of older generations too.
func TestViewChecks(t *testing.T) {
	mem, e, v := rotting(t, nil)
	defer func() { require.NoError(t, e.Close()) }()
	ctx := t.Context()
	st := v.State()
	st.AppliedIndex++
	st.Snapshots = []Snapshot{{ID: 1, Generation: st.Generation}}
	st.Generation++
	require.NoError(t, v.NewBatch().Commit(st)) // freezes what there is
	write(t, v, 2, 10, 20)
	settle(t, v)
	w, err := v.View(0, 64)
	require.NoError(t, err)
	before, err := w.Check(ctx, nil)
	require.NoError(t, err)
	require.EqualValues(t, 80, before.BlockN)
	require.Empty(t, before.Bad)
	write(t, v, 3, 0, 60)
	settle(t, v)
	flipBlock(t, mem, numbered(1, 15)) // under a newer one, and only the older is damaged
	flipBlock(t, mem, numbered(2, 29))
	turns := int64(0)
	after, err := w.Check(ctx, func(_ context.Context, n int64) error { turns += n; return nil })
	require.NoError(t, err)
	require.Equal(t, before.Blocks, after.Blocks)
	require.Equal(t, before.State, after.State)
	require.GreaterOrEqual(t, turns, int64(80*trivet.BlockSize))
	require.Len(t, after.Bad, 2)
	require.Equal(t, BlockVersion{15, 0, BlockSum(damagedID, 15, numbered(1, 15))}, after.Bad[0].BlockVersion)
	require.Equal(t, BlockVersion{29, 1, BlockSum(damagedID, 29, numbered(2, 29))}, after.Bad[1].BlockVersion)
	var repairs []Repair
	for i, data := range [][]byte{numbered(1, 15), numbered(2, 29)} {
		r, err := after.Bad[i].With(v.ID(), data)
		require.NoError(t, err)
		repairs = append(repairs, r)
	}
	n, err := v.Replace(repairs)
	require.NoError(t, err)
	require.Equal(t, 1, n, "the one of the older generation; the other was written again")
	require.NoError(t, CheckLive(e))
	require.NoError(t, w.Close())
	require.NoError(t, w.Close())
	_, err = w.Check(ctx, nil)
	require.ErrorIs(t, err, trivet.ErrClosed)
	w, err = v.View(0, 64)
	require.NoError(t, err)
	again, err := w.Check(ctx, nil)
	require.NoError(t, err)
	require.Empty(t, again.Bad)
	require.NotEqual(t, before.Blocks, again.Blocks)
	_, err = w.Check(ctx, func(context.Context, int64) error { return errors.ErrUnsupported })
	require.ErrorIs(t, err, errors.ErrUnsupported)
}

// A replica whose map differs is made what the others are: a block that it lacks, one too many, one that is another.
// Whatever was written to a block since the view stays, a discard too.
func TestViewRepairs(t *testing.T) {
	mem := vfs.NewCrashableMem()
	e, v := mustStore(t, logConfig(t, mem, nil), 64)
	defer func() { require.NoError(t, e.Close()) }()
	write(t, v, 1, 0, 50)
	write(t, v, 9, 20, 1) // is another
	write(t, v, 9, 55, 1) // is too many
	w, err := v.View(0, 64)
	require.NoError(t, err)
	defer func() { require.NoError(t, w.Close()) }()
	versions, next, err := w.Versions(0, 40)
	require.NoError(t, err)
	require.Len(t, versions, 40)
	require.EqualValues(t, 40, next)
	rest, next, err := w.Versions(next, 40)
	require.NoError(t, err)
	require.Len(t, rest, 11)
	require.EqualValues(t, 64, next)

	at := func(lba trivet.LBA) BlockVersion {
		return BlockVersion{LBA: lba, Sum: BlockSum(damagedID, lba, numbered(1, lba))}
	}
	repair := func(lba trivet.LBA, data []byte) Repair {
		r, err := w.Repair(at(lba), data)
		require.NoError(t, err)
		return r
	}
	_, err = w.Repair(at(20), numbered(2, 20))
	require.ErrorIs(t, err, trivet.ErrCorrupt)
	_, err = w.Repair(at(64), numbered(1, 64))
	require.ErrorIs(t, err, trivet.ErrInvalid)
	lacks, another, tooMany := repair(52, numbered(1, 52)), repair(20, numbered(1, 20)), repair(55, nil)
	discarded, rewritten := repair(53, numbered(1, 53)), repair(21, numbered(1, 21))
	b := v.NewBatch()
	require.NoError(t, b.Zero(53, 1))
	st := v.State()
	st.AppliedIndex++
	require.NoError(t, b.Commit(st))
	write(t, v, 4, 21, 1)
	n, err := v.Replace([]Repair{lacks, another, tooMany, discarded, rewritten})
	require.NoError(t, err)
	require.Equal(t, 3, n)
	require.NoError(t, CheckLive(e))
	p := make([]byte, trivet.BlockSize)
	for lba := range trivet.LBA(64) {
		want := numbered(1, lba)
		switch {
		case lba == 21:
			want = numbered(4, lba)
		case lba >= 50 && lba != 52:
			want = make([]byte, trivet.BlockSize)
		}
		require.NoError(t, v.ReadAt(p, lba))
		require.Equal(t, want, p, "block %d", lba)
	}
}

// A view that is open does not keep an engine from closing.
func TestViewEndsWithTheEngine(t *testing.T) {
	_, e, v := rotting(t, nil)
	w, err := v.View(0, 64)
	require.NoError(t, err)
	require.NoError(t, e.Close())
	_, err = w.Check(t.Context(), nil)
	require.ErrorIs(t, err, trivet.ErrClosed)
	require.NoError(t, w.Close())
}
