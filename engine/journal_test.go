package engine

import (
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"testing"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
)

// Whatever is added, the set is that of a map, and its extents rise and do not overlap.
func TestBlockSet(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 1))
	for range 30 {
		var s BlockSet
		var want []extent
		const lbaN = 3 * longExtentN
		var in [lbaN]bool
		for range rng.IntN(12) {
			n := 1 + rng.Int64N(20)
			switch rng.IntN(4) {
			case 0:
				n = 1 + rng.Int64N(longExtentN-1)
			case 1:
				n = longExtentN + rng.Int64N(longExtentN)
			}
			x := extent{trivet.LBA(rng.Int64N(lbaN - n + 1)), n}
			s.add(x)
			want = append(want, x)
			for i := range x.n {
				in[int64(x.lba)+i] = true
			}
		}
		count := int64(0)
		for _, b := range in {
			if b {
				count++
			}
		}
		require.Equal(t, count, s.Len(), "%v", want)
		last := trivet.LBA(0)
		for lba, n := range s.Extents() {
			require.True(t, n > 0 && lba >= last, "%v", want)
			last = lba + trivet.LBA(n)
			for i := lba; i < last; i++ {
				if !in[i] {
					t.Fatalf("block %d of %v", i, want)
				}
			}
			count -= n
		}
		require.Zero(t, count)
		for range 100 {
			lba := rng.IntN(lbaN)
			require.Equal(t, in[lba], s.Contains(trivet.LBA(lba)))
		}
	}
}

// A set of everything on the largest volume is cheap to keep and to walk.
func TestBlockSetOfHugeVolume(t *testing.T) {
	var s BlockSet
	s.add(extent{7, 3})
	s.add(extent{0, lbaMax})
	s.add(extent{5, lbaMax - 5})
	require.Equal(t, int64(lbaMax), s.Len())
	n := 0
	for range s.Extents() {
		n++
	}
	require.Equal(t, 1, n)
	require.True(t, s.Contains(lbaMax-1))
	require.False(t, s.Contains(lbaMax))
}

// A coverage never claims more than was set, and exactly that while it has room.
func TestCoverage(t *testing.T) {
	rng := rand.New(rand.NewPCG(2, 1))
	const lbaN = 400
	for round := range 50 {
		start := rng.Uint64N(9)
		c, model := wholly(start), make([]uint64, lbaN)
		for i := range model {
			model[i] = start
		}
		sets := 1 + rng.IntN(80)
		for range sets {
			from := rng.IntN(lbaN)
			to, index := from+1+rng.IntN(min(lbaN-from, 8)), rng.Uint64N(9)
			c = c.set(trivet.LBA(from), trivet.LBA(to), index)
			require.NoError(t, c.check(), "round %d", round)
			for i := from; i < to; i++ {
				model[i] = index
			}
		}
		exact := true
		for i, want := range model {
			got := c.lowest(trivet.LBA(i), trivet.LBA(i)+1)
			require.LessOrEqual(t, got, want)
			exact = exact && got == want
		}
		if sets < coverageSpansMax/2 {
			require.True(t, exact, "round %d: %v", round, c)
		}
		require.LessOrEqual(t, c.lowest(lbaN, lbaMax), start)
		a := rng.IntN(lbaN - 1)
		b := a + 1 + rng.IntN(lbaN-a-1)
		low := uint64(math.MaxUint64)
		for i := a; i < b; i++ {
			low = min(low, c.lowest(trivet.LBA(i), trivet.LBA(i)+1))
		}
		require.Equal(t, low, c.lowest(trivet.LBA(a), trivet.LBA(b)))
		require.True(t, c.covers(c))
		more := c.set(trivet.LBA(a), trivet.LBA(b), c.ceiling()+1)
		require.True(t, more.covers(c) || len(c) > coverageSpansMax-2)
		require.False(t, c.covers(wholly(c.ceiling()+1)))
		if len(c) <= coverageSpansMax-2 {
			require.False(t, c.covers(c.set(trivet.LBA(a), trivet.LBA(a)+1, 100)))
		}
		encoded := c.append(nil)
		require.Len(t, encoded, c.encodedBytes())
		got, rest, ok := cutCoverage(append(encoded, 1))
		require.True(t, ok)
		require.Equal(t, c, got)
		require.Equal(t, []byte{1}, rest)
	}
}

// journaled applies random batches to a volume, and knows what each touched.
type journaled struct {
	t       *testing.T
	rng     *rand.Rand
	v       *Volume
	touched map[uint64][]extent // by index
}

func (j *journaled) commit() {
	b := j.v.NewBatch()
	st := j.v.State()
	st.AppliedIndex += 1 + j.rng.Uint64N(3)
	for range j.rng.IntN(4) {
		n := 1 + j.rng.Int64N(6)
		x := extent{trivet.LBA(j.rng.Int64N(200 - n)), n}
		j.touched[st.AppliedIndex] = append(j.touched[st.AppliedIndex], x)
		if j.rng.IntN(3) == 0 {
			require.NoError(j.t, b.Zero(x.lba, x.n))
			continue
		}
		for i := range x.n {
			require.NoError(j.t, b.Write(x.lba+trivet.LBA(i), patternBlock()))
		}
	}
	require.NoError(j.t, b.Commit(st))
}

// check compares the journal, since every index from the floor on, with what was touched.
func (j *journaled) check(v *Volume) (floor uint64) {
	j.t.Helper()
	applied, floor := v.State().AppliedIndex, v.recordNow().journal.floor
	for _, since := range []uint64{
		0, floor - min(floor, 1), floor, floor + 1, applied, applied + 1,
		j.rng.Uint64N(applied + 1), j.rng.Uint64N(applied + 1),
	} {
		set, ok, err := v.ChangedSince(since)
		require.NoError(j.t, err)
		require.Equal(j.t, since >= floor, ok, "since %d, floor %d", since, floor)
		if !ok {
			continue
		}
		want := map[trivet.LBA]bool{}
		for i := since + 1; i <= applied; i++ {
			for _, x := range j.touched[i] {
				for k := range x.n {
					want[x.lba+trivet.LBA(k)] = true
				}
			}
		}
		require.Equal(j.t, int64(len(want)), set.Len(), "since %d of %d, floor %d", since, applied, floor)
		for lba := range want {
			if !set.Contains(lba) {
				j.t.Fatalf("block %d since %d of %d", lba, since, applied)
			}
		}
	}
	return floor
}

// journalSize counts what the store has.
func journalSize(t *testing.T, v *Volume) (n int64) {
	t.Helper()
	lower, upper := volumeJournal(v.id)
	it, err := v.e.db.NewIter(&pebble.IterOptions{LowerBound: lower, UpperBound: upper})
	require.NoError(t, err)
	for ok := it.First(); ok; ok = it.Next() {
		value, err := it.ValueAndErr()
		require.NoError(t, err)
		n += int64(len(it.Key()) + len(value))
	}
	require.NoError(t, it.Close())
	return n
}

// The journal says exactly what was touched, keeps within its bound, and is never parted from the applied
// index by a crash.
func TestJournal(t *testing.T) {
	for seed := range uint64(3) {
		rng := rand.New(rand.NewPCG(seed, 5))
		mem := vfs.NewCrashableMem()
		cfg := damageConfig(mem)
		cfg.JournalBytes = 1500
		e, v := mustStore(t, cfg, 200)
		j := &journaled{t: t, rng: rng, v: v, touched: map[uint64][]extent{}}
		var floor uint64
		for step := range 150 {
			j.commit()
			if step%20 == 0 {
				require.NoError(t, e.Flush())
			}
			if step%5 > 0 {
				continue
			}
			now := j.check(v)
			require.GreaterOrEqual(t, now, floor)
			floor = now
			require.LessOrEqual(t, journalSize(t, v), cfg.JournalBytes)
			require.Equal(t, journalSize(t, v), v.recordNow().journal.bytes)
			after := cfg
			after.FS = mem.CrashClone(vfs.CrashCloneCfg{UnsyncedDataPercent: rng.IntN(101), RNG: rng})
			e2, v2 := mustStore(t, after, 200)
			j.check(v2)
			require.Equal(t, journalSize(t, v2), v2.recordNow().journal.bytes)
			require.NoError(t, e2.Close())
		}
		require.Positive(t, floor, "the bound was never met")
		require.Less(t, floor, v.State().AppliedIndex-10, "hardly anything is kept")
		require.NoError(t, e.Close())
	}
}

// An entry of 64 KiB costs at most 40 bytes of journal, wherever it goes; one allocation more at most.
func TestJournalCost(t *testing.T) {
	for _, lba := range []trivet.LBA{0, 1000, 1 << 31, lbaMax - 16} {
		require.LessOrEqual(t, journalKeyBytes+journalValueBytes([]extent{{lba, 16}}), 40)
	}
	e, v := mustStore(t, damageConfig(vfs.NewMem()), 64)
	defer func() { require.NoError(t, e.Close()) }()
	require.NoError(t, writeNumbered(v, 1, 3, 16))
	require.LessOrEqual(t, journalSize(t, v), int64(40), "neighbours are one extent")
}

func TestJournalStartsAnew(t *testing.T) {
	cfg := damageConfig(vfs.NewMem())
	cfg.JournalBytes = 200
	e, v := mustStore(t, cfg, 1<<20)
	defer func() { require.NoError(t, e.Close()) }()
	since := func(index uint64) (int64, bool) {
		t.Helper()
		set, ok, err := v.ChangedSince(index)
		require.NoError(t, err)
		if !ok {
			return 0, false
		}
		return set.Len(), true
	}
	requireSince := func(index uint64, n int64, known bool) {
		t.Helper()
		got, ok := since(index)
		require.Equal(t, known, ok)
		require.Equal(t, n, got)
	}
	zero := func(index uint64, xs ...extent) {
		t.Helper()
		b := v.NewBatch()
		for _, x := range xs {
			require.NoError(t, b.Zero(x.lba, x.n))
		}
		st := v.State()
		st.AppliedIndex = index
		require.NoError(t, b.Commit(st))
	}
	requireSince(0, 0, true)
	zero(3, extent{0, 1 << 20}) // a wipe
	requireSince(2, 1<<20, true)
	requireSince(3, 0, true)
	zero(3) // nothing but state
	requireSince(3, 0, true)
	zero(3, extent{5, 1}) // who is at 3 may not have this
	requireSince(3, 0, false)
	requireSince(4, 0, true)
	zero(4, extent{5, 1}, extent{7, 1})
	requireSince(3, 0, false)
	requireSince(4, 0, true)
	zero(5, extent{9, 1})
	requireSince(4, 1, true)
	many := make([]extent, 200)
	for i := range many {
		many[i] = extent{trivet.LBA(i * 1000), 1}
	}
	zero(6, many...) // larger than the journal may be
	requireSince(5, 0, false)
	requireSince(6, 0, true)
	zero(7, extent{9, 1})
	requireSince(6, 1, true)
	require.Less(t, journalSize(t, v), int64(200))

	require.NoError(t, e.DropVolume(v.id))
	_, _, err := v.ChangedSince(0)
	require.ErrorIs(t, err, trivet.ErrNotFound)
	require.NoError(t, e.CreateVolume(damagedID, "r2", trivet.BlockSize))
	v, err = e.OpenVolume(damagedID)
	require.NoError(t, err)
	requireSince(0, 0, true)
	require.Zero(t, journalSize(t, v))
}

// A journal that rots costs work, never blocks: the image has everything then.
func TestJournalRot(t *testing.T) {
	e, v := mustStore(t, damageConfig(vfs.NewMem()), 64)
	defer func() { require.NoError(t, e.Close()) }()
	require.NoError(t, writeNumbered(v, 1, 0, 64))
	require.NoError(t, writeNumbered(v, 2, 7, 1))
	w := appendWant(nil, &want{damagedID, 1, wholly(1)})
	size := func() int {
		i, err := v.Image(w)
		require.NoError(t, err)
		b := mustReadAll(t, i)
		n, err := readImage(b)
		require.NoError(t, err)
		return n
	}
	require.Equal(t, 1, size())
	key := appendJournalKey(nil, damagedID, 2)
	require.NoError(t, e.db.Set(key, appendJournalValue(nil, key[1:], []extent{{7, 1}}), pebble.NoSync))
	require.Equal(t, 64+1, size(), "all blocks, and the rest of the volume")
	_, ok, err := v.ChangedSince(1)
	require.NoError(t, err)
	require.False(t, ok)
	// A trim that meets it drops the whole journal.
	e.journalBytes = 10
	require.NoError(t, writeNumbered(v, 3, 8, 1))
	require.Zero(t, journalSize(t, v))
}

// A store of version 1 is taken over: its volumes' journals begin where they are.
func TestStoreVersion1(t *testing.T) {
	mem := vfs.NewMem()
	e, v := mustStore(t, damageConfig(mem), 64)
	require.NoError(t, writeNumbered(v, 1, 0, 64))
	id := trivet.VolumeID(0x0123456789abcdef)
	lower, upper := volumeJournal(damagedID)
	require.NoError(t, e.db.DeleteRange(lower, upper, pebble.NoSync))
	require.NoError(t, e.db.Set(appendVolumeKey(nil, id), goldenBytes(t, "volume_record_v1"), pebble.NoSync))
	require.NoError(t, e.db.Set([]byte{tableFormat}, appendStoreFormat(nil, 1), pebble.NoSync))
	require.NoError(t, e.Close())
	e, err := Open(damageConfig(mem))
	require.NoError(t, err)
	old, err := e.OpenVolume(id)
	require.NoError(t, err)
	require.True(t, old.Restoring())
	w, err := decodeWant(old.Want())
	require.NoError(t, err)
	require.Equal(t, want{id, 42, wholly(0)}, w)
	raw, closer, err := e.db.Get([]byte{tableFormat})
	require.NoError(t, err)
	require.Equal(t, appendStoreFormat(nil, storeVersion), raw)
	require.NoError(t, closer.Close())
	require.NoError(t, e.db.Set([]byte{tableFormat}, appendStoreFormat(nil, storeVersion+1), pebble.NoSync))
	require.NoError(t, e.db.Flush())
	require.NoError(t, e.Close())
	_, err = Open(damageConfig(mem))
	require.ErrorIs(t, err, trivet.ErrInvalid, "a newer one is not")
}

func mustReadAll(t *testing.T, i *Image) (b []byte) {
	t.Helper()
	b, err := readUntil(i, math.MaxInt)
	require.NoError(t, errors.Join(err, i.Close()))
	return b
}

// BenchmarkJournal is what a commit pays for its journal, apart from Pebble's work: one extent, and 32 scattered.
func BenchmarkJournal(b *testing.B) {
	for _, n := range []int{1, 32} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			e, v := mustStore(b, Config{FS: vfs.NewMem(), Dir: "disk"}, 1<<20)
			defer func() { require.NoError(b, e.Close()) }()
			batch := v.NewBatch()
			rng := rand.New(rand.NewPCG(1, 1))
			xs := make([]extent, n)
			for i := range xs {
				xs[i] = extent{trivet.LBA(rng.Int64N(1<<20 - 16)), 16}
			}
			old, index := v.recordNow(), uint64(0)
			b.ReportAllocs()
			for b.Loop() {
				index++
				batch.touched = append(batch.touched[:0], xs...)
				j, err := batch.journalNext(&old, index)
				require.NoError(b, err)
				if batch.b.Len() > 1<<20 {
					batch.b.Reset()
				}
				b.ReportMetric(float64(j.bytes), "B/batch")
			}
			require.NoError(b, batch.Close())
		})
	}
}
