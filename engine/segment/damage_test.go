package segment

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
)

// filled is a log of two lanes with several segments each, and what it holds.
type filled struct {
	opts   Options
	dir    *MemDir
	models map[trivet.VolumeID]*model
	cur    map[int]string // names of the current files
	last   map[int]int64  // where their last batch begins
	end    map[int]int64
	before map[trivet.VolumeID]*model // without the last change of each lane
}

// fill must run in a bubble, so that no mark is written before it is wanted.
func fill(t *testing.T, seed uint64) (*filled, *Log) {
	t.Helper()
	f := &filled{
		dir: NewMemDir(), models: map[trivet.VolumeID]*model{}, cur: map[int]string{}, last: map[int]int64{},
		end: map[int]int64{}, before: map[trivet.VolumeID]*model{},
	}
	f.opts = testOptions(f.dir, seed)
	require.NoError(t, Format(f.opts))
	l, err := Open(f.opts)
	require.NoError(t, err)
	rng := rand.New(rand.NewPCG(seed, 3))
	do := func(id trivet.VolumeID, o op) {
		ticket, err := o.start(l.Group(id))
		require.NoError(t, err)
		require.NoError(t, ticket.Err())
		o.apply(f.models[id])
	}
	for id := trivet.VolumeID(1); id <= 4; id++ {
		f.models[id] = newModel()
	}
	for range 90 {
		id := trivet.VolumeID(1 + rng.IntN(4))
		do(id, randomOp(rng, f.models[id], id == 1))
	}
	for id := trivet.VolumeID(3); id <= 4; id++ { // the last batch of each lane
		m := f.models[id]
		f.before[id] = m.clone()
		lane := l.Group(id).lane.id
		_, _, pos := end(l.Group(id))
		do(id, appendOp([]Entry{testEntry(uint64(id), m.last()+1, 1000, 100, 1), testEntry(7, m.last()+2, 1000, 100, 1)}))
		_, name, after := end(l.Group(id))
		f.cur[lane], f.last[lane], f.end[lane] = name, pos, after
		require.Less(t, pos, after, "seed: the last batch must not begin a segment")
		require.Less(t, after, int64(segmentBytesMin), "seed: there must be room for the mark")
	}
	return f, l
}

// verdict opens a damaged disk and returns what became of it: "same", "cut" when only the last batch of a lane is
// gone, "entry" when single entries are reported, "refused". Anything else fails.
func (f *filled) verdict(dir *MemDir) (string, error) {
	opts := f.opts
	opts.Dir = dir
	l, err := Open(opts)
	if err != nil {
		if errors.Is(err, trivet.ErrCorrupt) {
			return "refused", nil
		}
		return "", err
	}
	defer l.Close()
	out := "same"
	for id, m := range f.models {
		g := l.Group(id)
		if err := m.bounds(g); err != nil {
			if f.before[id] == nil || f.before[id].matches(g) != nil {
				return "", fmt.Errorf("group %d: %w", id, err)
			}
			out = "cut"
			continue
		}
		for _, want := range m.entries {
			got, err := g.Read(want.Index)
			switch {
			case errors.Is(err, trivet.ErrCorrupt) && !errors.Is(err, trivet.ErrNotFound):
				out = "entry"
			case err != nil:
				return "", err
			case !sameEntry(got, want):
				return "", fmt.Errorf("group %d: wrong bytes in entry %d", id, want.Index)
			}
		}
	}
	return out, nil
}

// flipPlaces are a place in every 512 bytes of a disk, and more in the heads of pages.
func flipPlaces(t *testing.T, dir *MemDir) map[string][]int64 {
	t.Helper()
	names, err := dir.List()
	require.NoError(t, err)
	out := map[string][]int64{}
	for _, name := range names {
		for off := int64(0); off < segmentBytesMin; off += 512 {
			out[name] = append(out[name], off+(off/512*37)%512)
			if off%pageBytes == 0 && !testing.Short() {
				for k := int64(0); k < 400; k += 19 {
					out[name] = append(out[name], off+k)
				}
			}
		}
	}
	return out
}

// Rot anywhere in a log that was closed, or idle for 100 ms: nothing is cut, nothing is wrong, nothing is missing
// without being reported.
func TestRotAnywhere(t *testing.T) {
	for _, how := range []string{"closed", "idle"} {
		synctest.Test(t, func(t *testing.T) {
			f, l := fill(t, 8)
			if how == "idle" {
				<-time.After(100 * time.Millisecond)
				synctest.Wait()
				f.dir = f.dir.Crash(0, true, rand.New(rand.NewPCG(1, 1)))
			}
			require.NoError(t, l.Close())
			verdicts := f.flipAll(t, func(string, int64) []string { return []string{"same", "entry", "refused"} })
			require.Greater(t, verdicts["refused"], 5)
			require.Greater(t, verdicts["entry"], 50)
		})
	}
}

// Rot in a log that a crash ended before its mark: only the last batch of a lane can pass for a torn one.
func TestRotBeforeTheMark(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f, l := fill(t, 8)
		f.dir = f.dir.Crash(0, true, rand.New(rand.NewPCG(1, 1)))
		require.NoError(t, l.Close())
		verdicts := f.flipAll(t, func(name string, off int64) []string {
			for lane, cur := range f.cur {
				if name == cur && off >= f.last[lane] && off < f.end[lane] {
					return []string{"same", "cut"}
				}
			}
			return []string{"same", "entry", "refused"}
		})
		require.Greater(t, verdicts["cut"], 5)
		require.Greater(t, verdicts["refused"], 5)
		require.Greater(t, verdicts["entry"], 50)
	})
}

func (f *filled) flipAll(t *testing.T, allowed func(name string, off int64) []string) map[string]int {
	t.Helper()
	verdicts := map[string]int{}
	for name, places := range flipPlaces(t, f.dir) {
		for _, off := range places {
			dir := f.dir.Clone()
			dir.Flip(name, off)
			v, err := f.verdict(dir)
			require.NoError(t, err, "flip of %s at %d", name, off)
			require.Contains(t, allowed(name, off), v, "flip of %s at %d", name, off)
			verdicts[v]++
		}
	}
	t.Log(verdicts)
	return verdicts
}

// H38: a payload that rots in the middle of the log takes down its own entry, and no other of any group.
func TestRotHarmsOneEntry(t *testing.T) {
	l, dir := newTestLog(t)
	a, b := l.Group(2), l.Group(4)
	entry := testEntry(2, 1, 1, 50, 1)
	require.NoError(t, a.Append([]Entry{entry, testEntry(4, 2, 1, 50, 1)}))
	require.NoError(t, b.Append([]Entry{testEntry(6, 1, 1, 50, 1)}))
	place, err := a.Locate(1)
	require.NoError(t, err)
	_, name, _ := end(a)
	require.NoError(t, l.Close())
	dir.Flip(name, place.Off+500)
	l = mustOpen(t, testOptions(dir, 9))
	_, err = l.Group(2).Read(1)
	require.ErrorIs(t, err, trivet.ErrCorrupt)
	require.ErrorContains(t, err, "entry 1")
	require.ErrorContains(t, err, trivet.VolumeID(2).String())
	require.ErrorContains(t, err, fmt.Sprintf("stored %08x", bodySum(entry.Data, entry.Payload)))
	got, err := l.Group(2).Read(2)
	require.NoError(t, err)
	require.True(t, sameEntry(got, testEntry(4, 2, 1, 50, 1)))
	_, err = l.Group(4).Read(1)
	require.NoError(t, err)
}

// The header of an old segment is damaged: its batches say which one it is, so nothing is lost.
func TestRotOfAnOldHeader(t *testing.T) {
	l, dir := newTestLog(t)
	g := l.Group(2)
	var want []Entry
	for i := uint64(1); curNumber(g) < 4; i++ {
		want = append(want, testEntry(i, i, 1, 20, 2))
		require.NoError(t, g.Append(want[len(want)-1:]))
	}
	g.lane.mu.Lock()
	old := g.lane.segments[2].name
	g.lane.mu.Unlock()
	require.NoError(t, l.Close())
	dir.Flip(old, 33)
	l = mustOpen(t, testOptions(dir, 9))
	require.NoError(t, (&model{first: 1, entries: want}).matches(l.Group(2)))
}

// A swapped block: the right checksums at the wrong place are not accepted (H24).
func TestMisdirectedWrite(t *testing.T) {
	synctest.Test(t, func(t *testing.T) { // so that no mark comes between two appends
		l, dir := newTestLog(t)
		g := l.Group(2)
		require.NoError(t, g.Append([]Entry{testEntry(2, 1, 1, 50, 1)}))
		_, name, first := end(g)
		require.NoError(t, g.Append([]Entry{testEntry(2, 2, 1, 50, 1)}))
		require.NoError(t, l.Close())
		f, err := dir.Open(name)
		require.NoError(t, err)
		b := alignedBytes(2 * pageBytes)
		require.NoError(t, readFull(f, b, first))
		for _, at := range []int64{first - 2*pageBytes, first + 2*pageBytes} {
			copied := dir.Clone()
			f, err := copied.Open(name)
			require.NoError(t, err)
			require.NoError(t, writeDurable(f, b, at))
			l, err := Open(testOptions(copied, 3))
			if at < first {
				require.ErrorIs(t, err, trivet.ErrCorrupt, "batch 2 in place of batch 1")
				continue
			}
			require.NoError(t, err)
			_, last := l.Group(2).FirstLast()
			require.Equal(t, uint64(2), last, "batch 2 again after batch 2, over the mark")
			require.NoError(t, l.Close())
		}
	})
}

// The records that a file held in its earlier lives stay dead, whatever stands where the log ends: here a whole
// old batch stands exactly there.
func TestRecycledSegmentStaysDead(t *testing.T) {
	l, dir := newTestLog(t)
	g := l.Group(2)
	for i := uint64(1); curNumber(g) < 12; i++ {
		require.NoError(t, g.Append([]Entry{testEntry(i, i, 1, 20, 1)}))
		require.NoError(t, g.TrimPrefix(i-1))
	}
	names, err := dir.List()
	require.NoError(t, err)
	require.Less(t, len(names), 9, "files are used again")
	first, last := g.FirstLast()
	require.NoError(t, l.Close())
	for range 3 { // nothing new: the end of the log is followed by batches of another life
		l = mustOpen(t, testOptions(dir, 9))
		gotFirst, gotLast := l.Group(2).FirstLast()
		require.Equal(t, []uint64{first, last}, []uint64{gotFirst, gotLast})
		require.NoError(t, l.Close())
	}
}

// The same segment number begun twice, because a crash took the first beginning back: a batch that was
// written in the first must not count in the second.
func TestIncarnationIsNotTheNumber(t *testing.T) {
	s := segmentHeader{lanes: 1, number: 5, incarnation: 77, segmentBytes: segmentBytesMin, checkpointBytes: 8}
	b := alignedBytes(segmentBytesMin)
	r := &record{kind: kindEntry, group: 1, index: 1, term: 1, data: []byte("dead")}
	r.sum = bodySum(r.data, nil)
	_, total := batchBytes([]*record{r})
	at := s.start()
	encodeBatch(nil, b[at:at+total], batchHeader{number: 5, incarnation: 76, off: at, durable: at}, []*record{r})
	l := newLane(&Log{shape: shape{lanes: 1, segmentBytes: segmentBytesMin}}, 0)
	require.NoError(t, l.replay(b, s, 0))
	require.Equal(t, at, l.pos)
	require.Empty(t, l.groups)
	s.incarnation = 76
	require.NoError(t, l.replay(b, s, 0))
	require.Equal(t, at+total, l.pos)
}

// A crash interrupted the beginning of a segment; its header still says how far the one before it was durable.
func TestRotBehindAnInterruptedSegment(t *testing.T) {
	synctest.Test(t, func(t *testing.T) { // so that no mark comes between two appends
		l, dir := newTestLog(t)
		g := l.Group(2)
		require.NoError(t, g.Append([]Entry{testEntry(2, 1, 1, 50, 1)}))
		number, name, at := end(g)
		until := at + 2*pageBytes
		require.NoError(t, g.Append([]Entry{testEntry(2, 2, 1, 50, 1)}))
		_, _, after := end(g)
		require.Equal(t, until, after)
		dir = dir.Crash(0, true, rand.New(rand.NewPCG(1, 1)))
		const next = "seg-00-00000063"
		f, err := dir.Create(next, segmentBytesMin)
		require.NoError(t, err)
		_, err = activate(f, l.shape, segmentHeader{number: number + 1, incarnation: 5, prevEnd: until}, goldenGroups())
		require.NoError(t, err)
		dir.Flip(next, pageBytes+9) // the header arrived, the checkpoint did not

		again := mustOpen(t, testOptions(dir.Clone(), 2))
		_, last := again.Group(2).FirstLast()
		require.Equal(t, uint64(2), last)
		require.NoError(t, again.Group(2).Append([]Entry{testEntry(2, 3, 1, 50, 1)}))
		require.NoError(t, again.Close())

		for off := at; off < until; off += 100 {
			damaged := dir.Clone()
			damaged.Flip(name, off)
			opts := testOptions(damaged, 2)
			again, err := Open(opts)
			if err == nil {
				_, last := again.Group(2).FirstLast()
				require.Equal(t, uint64(2), last, "flip at %d", off)
				require.NoError(t, again.Close())
				continue
			}
			require.ErrorIs(t, err, trivet.ErrCorrupt)
		}
	})
}
