package engine

import (
	"testing"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
)

// copyOf is where some data stand in a file of the log.
type copyOf struct {
	name string
	off  int
}

func copies(t *testing.T, mem *vfs.MemFS, data []byte) (out []copyOf) {
	t.Helper()
	for _, name := range logFiles(t, mem) {
		b := readFile(t, mem, name)
		for off := 0; off+trivet.BlockSize <= len(b); off += trivet.BlockSize {
			if string(b[off:off+trivet.BlockSize]) == string(data) {
				out = append(out, copyOf{name, off})
			}
		}
	}
	return out
}

// sparse is a store of 60 blocks of number 1, two of three overwritten with 2, which cleaning will bring together:
// those that are left, 2, 5, 8 and so on, move.
func sparse(t *testing.T) (*vfs.MemFS, *Engine, *Volume) {
	t.Helper()
	mem := vfs.NewCrashableMem()
	e, v := mustStore(t, logConfig(t, mem, nil), 64)
	t.Cleanup(func() { require.NoError(t, e.Close()) })
	write(t, v, 1, 0, 60)
	for lba := trivet.LBA(0); lba < 60; lba += 3 {
		write(t, v, 2, lba, 2)
	}
	settle(t, v)
	return mem, e, v
}

func sparseNumber(lba trivet.LBA) uint32 {
	if lba%3 == 2 {
		return 1
	}
	return 2
}

// moveIt cleans until the block has moved, and returns where the copy stands.
func moveIt(t *testing.T, mem *vfs.MemFS, e *Engine, lba trivet.LBA) copyOf {
	t.Helper()
	was, err := refOf(e, lba)
	require.NoError(t, err)
	before := copies(t, mem, numbered(1, lba))
	_, err = e.Clean()
	require.NoError(t, err)
	now, err := refOf(e, lba)
	require.NoError(t, err)
	require.NotEqual(t, was, now, "cleaning has moved it")
	for _, c := range copies(t, mem, numbered(1, lba)) {
		known := false
		for _, b := range before {
			known = known || b == c
		}
		if !known {
			return c
		}
	}
	require.Fail(t, "no new copy")
	return copyOf{}
}

// Cleaning moves a block between the marker and the check, and the copy rots. The view reads it where it was; it is
// looked at where it stands now, too, found, and repaired there.
func TestCheckFollowsMovedBlocks(t *testing.T) {
	mem, e, v := sparse(t)
	w := mustView(t, v)
	at := moveIt(t, mem, e, 5)
	flipByte(t, mem, at.name, at.off+1000, 0x10)
	c := mustCheck(t, w)
	require.Len(t, c.Bad, 1)
	require.Equal(t, BlockVersion{5, 0, BlockSum(v.id, 5, numbered(1, 5))}, c.Bad[0].BlockVersion)
	n, err := v.Replace([]Repair{whole(t, v, &c.Bad[0], 1)})
	require.NoError(t, err)
	require.Equal(t, 1, n)
	requireNumbers(t, v, 60, sparseNumber)
	require.NoError(t, CheckLive(e))
	require.Empty(t, mustCheck(t, mustView(t, v)).Bad)
}

// A block that was found damaged, and that cleaning has put elsewhere since, is looked at there: it is still bad when
// the copy is, at the place where that stands, and else it is not.
func TestStillBadFollowsMovedBlocks(t *testing.T) {
	mem, e, v := sparse(t)
	found := newBadBlock(blockKey{v.id, 5, 0}, BlockSum(v.id, 5, numbered(1, 5)), mustValue(t, v, 5, 0))
	at := moveIt(t, mem, e, 5)
	still, err := v.StillBad([]BadBlock{found})
	require.NoError(t, err)
	require.Empty(t, still, "the copy is good")
	flipByte(t, mem, at.name, at.off+1000, 0x10)
	n, err := v.Replace([]Repair{whole(t, v, &found, 1)})
	require.NoError(t, err)
	require.Zero(t, n, "it is not where it was")
	still, err = v.StillBad([]BadBlock{found})
	require.NoError(t, err)
	require.Len(t, still, 1)
	n, err = v.Replace([]Repair{whole(t, v, &still[0], 1)})
	require.NoError(t, err)
	require.Equal(t, 1, n)
	requireNumbers(t, v, 60, sparseNumber)
	require.NoError(t, CheckLive(e))
	still, err = v.StillBad(still)
	require.NoError(t, err)
	require.Empty(t, still)
}

// A block that differs from the majority's is made what they have, wherever cleaning has put it since the marker. One
// that was written since is not.
func TestRepairOfMovedBlocks(t *testing.T) {
	mem, e, v := sparse(t)
	w := mustView(t, v)
	fix := func(lba trivet.LBA) Repair {
		r, err := w.Repair(BlockVersion{lba, 0, BlockSum(v.id, lba, numbered(9, lba))}, numbered(9, lba))
		require.NoError(t, err)
		return r
	}
	repairs := []Repair{fix(5), fix(8)}
	moveIt(t, mem, e, 5)
	write(t, v, 3, 8, 1)
	n, err := v.Replace(repairs)
	require.NoError(t, err)
	require.Equal(t, 1, n)
	require.False(t, w.IsWritten(5))
	require.True(t, w.IsWritten(8))
	requireNumbers(t, v, 60, func(lba trivet.LBA) uint32 {
		switch lba {
		case 5:
			return 9
		case 8:
			return 3
		}
		return sparseNumber(lba)
	})
	require.NoError(t, CheckLive(e))
}
