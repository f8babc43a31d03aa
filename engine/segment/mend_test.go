package segment

import (
	"errors"
	"slices"
	"testing"
	"testing/synctest"

	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
)

// Wherever a bit of an entry has rotted: a copy of it mends the log, in place, for good, and nothing else is taken for
// it. Old segments, whose heads the log does not need, are flipped in their heads too.
func TestMend(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f, l := fill(t, 8)
		require.NoError(t, l.Close())
		mended := 0
		for name, places := range flipPlaces(t, f.dir) {
			for _, off := range places {
				dir := f.dir.Clone()
				dir.Flip(name, off)
				mended += f.mendAll(t, dir)
			}
		}
		require.Greater(t, mended, 100)
	})
}

// mendAll opens a disk, mends each entry that is damaged, and opens it again. It returns how many there were.
func (f *filled) mendAll(t *testing.T, dir *MemDir) (n int) {
	t.Helper()
	opts := f.opts
	opts.Dir = dir
	l, err := Open(opts)
	if err != nil {
		require.ErrorIs(t, err, trivet.ErrCorrupt)
		return 0
	}
	defer l.Close()
	for id, m := range f.models {
		g := l.Group(id)
		if m.bounds(g) != nil { // a torn tail
			return 0
		}
		for _, want := range m.entries {
			if _, err := g.Read(want.Index); !errors.Is(err, trivet.ErrCorrupt) {
				continue
			}
			other := want
			other.Term++
			require.ErrorIs(t, g.Mend(other), trivet.ErrInvalid)
			other = want
			other.Data = append(slices.Clone(want.Data), make([]byte, 16)...)
			require.ErrorIs(t, g.Mend(other), trivet.ErrInvalid)
			require.NoError(t, g.Mend(want))
			n++
		}
		require.NoError(t, m.matches(g))
	}
	require.NoError(t, l.Close())
	if n == 0 {
		return 0
	}
	what, err := f.verdict(dir)
	require.NoError(t, err)
	require.Equal(t, "same", what, "after a restart too")
	return n
}

// A copy with other bytes is refused where the damaged record still says what it was.
func TestMendRefusesOtherBytes(t *testing.T) {
	l, dir := newTestLog(t)
	g := l.Group(1)
	e := testEntry(1, 1, 1, 300, 0)
	require.NoError(t, g.Append([]Entry{e, testEntry(1, 2, 1, 300, 0)}))
	data := slices.Clone(e.Data)
	_, name, _ := end(g)
	dir.Flip(name, int64(g.durable.at(1).at.off)+recordHeaderBytes+100)
	_, err := g.Read(1)
	require.ErrorIs(t, err, trivet.ErrCorrupt)
	other := e
	other.Data = slices.Clone(data)
	other.Data[5] ^= 1
	require.ErrorIs(t, g.Mend(other), trivet.ErrInvalid)
	require.ErrorIs(t, g.Mend(testEntry(1, 9, 1, 300, 0)), trivet.ErrNotFound)
	e.Data = data
	require.NoError(t, g.Mend(e))
	got, err := g.Read(1)
	require.NoError(t, err)
	require.True(t, sameEntry(got, e))
	require.NoError(t, g.TruncateSuffix(1), "what was mended can go like any other")
	require.NoError(t, g.Append([]Entry{testEntry(1, 1, 2, 10, 0)}))
}
