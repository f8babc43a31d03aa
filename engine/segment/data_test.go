package segment

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
)

const dataVolume = trivet.VolumeID(0x77)

func withDataLane(o *Options) { o.DataLane = true }

// testBlocks are n blocks whose content follows from seed.
func testBlocks(seed uint64, n int) ([]BlockInfo, []byte) {
	e := testEntry(seed*2, 1, 1, 0, n)
	return e.Blocks, e.Payload
}

func TestStoreNeedsDataLane(t *testing.T) {
	l, _ := newTestLog(t)
	infos, p := testBlocks(1, 1)
	_, err := l.Store(dataVolume, infos, p)
	require.ErrorIs(t, err, trivet.ErrInvalid)
	require.False(t, l.HasDataLane())

	l, _ = newTestLog(t, withDataLane)
	require.True(t, l.HasDataLane())
	most := int(l.StoreBytesMax() / pageBytes)
	for name, n := range map[string][2]int{
		"nothing": {0, 0}, "undescribed": {1, 2}, "too many": {most + 1, most + 1},
	} {
		infos, _ := testBlocks(1, n[0])
		_, p := testBlocks(1, n[1])
		_, err := l.Store(dataVolume, infos, p)
		require.ErrorIs(t, err, trivet.ErrInvalid, name)
	}
	_, err = l.Store(dataVolume, infos, p[:pageBytes-1])
	require.ErrorIs(t, err, trivet.ErrInvalid)
	infos, p = testBlocks(1, most)
	at, err := l.Store(dataVolume, infos, p)
	require.NoError(t, err, "as much as is promised")
	require.NoError(t, pinned{at, p}.check(l))
}

// Blocks stay while they are pinned, also over restarts, and go when nobody pins them; no group's entry is ever
// put into the data lane, whose files the other lanes do not touch.
func TestStoredBlocksStayWhilePinned(t *testing.T) {
	l, dir := newTestLog(t, withDataLane)
	opts := testOptions(dir, 2)
	opts.Hold = true
	for id := trivet.VolumeID(1); id < 9; id++ {
		require.NoError(t, l.Group(id).Append([]Entry{testEntry(1, 1, 1, 10, 1)}))
	}
	infos, p := testBlocks(3, 2)
	at, err := l.Store(dataVolume, infos, p)
	require.NoError(t, err)
	require.EqualValues(t, 2, at.Segment&0xff, "the last lane")
	fill := func(n int) {
		t.Helper()
		for i := range n {
			infos, p := testBlocks(uint64(i), 3)
			other, err := l.Store(dataVolume, infos, p)
			require.NoError(t, err)
			l.Unpin(other.Segment)
		}
	}
	fill(40)
	require.NoError(t, pinned{at, p}.check(l))
	for range 3 {
		require.NoError(t, l.Close())
		l = mustOpen(t, opts)
		require.NoError(t, l.Pin(at.Segment))
		l.Release()
		fill(20)
		require.NoError(t, pinned{at, p}.check(l), "after a restart")
	}
	for _, s := range l.Segments() {
		require.Equal(t, s.Lane == 2, s.Data)
		if s.Data {
			require.Zero(t, s.Entries)
		}
	}
	l.Unpin(at.Segment)
	fill(40)
	require.ErrorIs(t, l.ReadAt(at.Segment, p, at.Off), trivet.ErrNotFound, "recycled")
}

// TestStoreCrashAtEveryOperation: what Store acknowledged and somebody pins is there after a crash at any moment,
// whatever became of what was not flushed.
func TestStoreCrashAtEveryOperation(t *testing.T) {
	steps := 60
	if testing.Short() {
		steps = 20
	}
	rng := rand.New(rand.NewPCG(5, 5))
	hooked := rand.New(rand.NewPCG(5, 6)) // the hook runs beside the test, too: when lanes fall idle
	dir := NewMemDir()
	opts := testOptions(dir, 5)
	opts.DataLane = true
	require.NoError(t, Format(opts))
	var mu sync.Mutex
	var kept []pinned
	points := 0
	dir.SetHook(func(op MemOp) MemFault {
		mu.Lock()
		defer mu.Unlock()
		points++
		if err := checkKept(dir.CrashLocked([]int{0, 25, 50, 75, 100}[points%5], points%2 == 0, hooked), kept); err != nil {
			t.Errorf("crash at %v: %v", op, err)
		}
		return MemFault{}
	})
	l := mustOpen(t, opts)
	for i := range steps {
		infos, p := testBlocks(uint64(i), 1+rng.IntN(3))
		at, err := l.Store(dataVolume, infos, p)
		require.NoError(t, err)
		require.NoError(t, l.Group(1).Append([]Entry{testEntry(3, uint64(i+1), 1, 100, 1)}))
		if i > 3 {
			require.NoError(t, l.Group(1).TrimPrefix(uint64(i-2)))
		}
		mu.Lock()
		kept = append(kept, pinned{at, p})
		var gone pinned
		if len(kept) > 4 {
			k := rng.IntN(len(kept))
			gone = kept[k]
			kept = slices.Delete(kept, k, k+1)
		}
		mu.Unlock()
		if gone.want != nil {
			l.Unpin(gone.place.Segment)
		}
	}
	dir.SetHook(nil)
	require.Greater(t, points, 2*steps)
}

func checkKept(dir *MemDir, kept []pinned) error {
	opts := testOptions(dir, 6)
	opts.Hold = true
	l, err := Open(opts)
	if err != nil {
		return err
	}
	for _, p := range kept {
		err = errors.Join(err, l.Pin(p.place.Segment))
	}
	if err == nil {
		l.Release()
		for _, p := range kept {
			err = errors.Join(err, p.check(l))
		}
	}
	return errors.Join(err, l.Close())
}

// A record of one lane is damage in another.
func TestBlocksInWrongLane(t *testing.T) {
	l, dir := newTestLog(t, withDataLane)
	infos, p := testBlocks(1, 1)
	r := &record{kind: kindBlocks, group: 2, blocks: infos, payload: p, sum: bodySum(nil, p)}
	var at Place
	require.NoError(t, l.lanes[0].submitBlocks(&request{records: []*record{r}, refs: []*ref{nil}, stored: &at}))
	require.NoError(t, l.Close())
	_, err := Open(testOptions(dir, 2))
	require.ErrorIs(t, err, trivet.ErrCorrupt)
}

func TestEntryWhole(t *testing.T) {
	whole := bytes.Repeat([]byte("0123456789abcdef"), 3*pageBytes/16+1)
	l, _ := newTestLog(t, func(o *Options) { o.SegmentBytes = 256 << 10 })
	g := l.Group(1)
	for i, cut := range []int{0, 16, len(whole)} {
		data, payload := whole[:cut], whole[cut:]
		if cut == 0 {
			payload = whole[:3*pageBytes]
		}
		e := Entry{Index: uint64(i + 1), Term: 1, Data: data, Payload: payload}
		require.NoError(t, g.Append([]Entry{e}))
		want := slices.Concat(data, payload)
		require.Equal(t, want, e.Whole())
		const runs = 1000 // what the log's goroutines allocate meanwhile is less than one a run
		allocs := testing.AllocsPerRun(runs, func() { _ = e.Whole() })
		require.Zero(t, allocs, "cut out of one slice")
		got, err := g.Read(e.Index)
		require.NoError(t, err)
		require.Equal(t, want, got.Whole(), fmt.Sprint(cut))
		require.Zero(t, testing.AllocsPerRun(runs, func() { _ = got.Whole() }), "as read")
		apart := Entry{Data: slices.Clone(data), Payload: slices.Clone(payload)}
		require.Equal(t, want, apart.Whole())
		require.Equal(t, data, apart.Data, "a copy")
	}
}
