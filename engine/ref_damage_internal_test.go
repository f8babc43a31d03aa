package engine

import (
	"errors"
	"io"
	"strings"
	"testing"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/engine/segment"
)

// logFiles are the files of the log.
func logFiles(t *testing.T, fs vfs.FS) []string {
	t.Helper()
	list, err := fs.List("disk.log")
	require.NoError(t, err)
	var names []string
	for _, n := range list {
		names = append(names, fs.PathJoin("disk.log", n))
	}
	require.NotEmpty(t, names)
	return names
}

// readFile returns what a file holds.
func readFile(t *testing.T, fs vfs.FS, name string) []byte {
	t.Helper()
	f, err := fs.Open(name)
	require.NoError(t, err)
	b, err := io.ReadAll(f)
	require.NoError(t, err)
	require.NoError(t, f.Close())
	return b
}

// flipByte changes bits of a byte of a file by the means of its filesystem: the log is open, and once it is idle it
// marks its end.
func flipByte(t *testing.T, fs vfs.FS, name string, off int, bits byte) {
	t.Helper()
	f, err := fs.OpenReadWrite(name, vfs.WriteCategoryUnspecified)
	require.NoError(t, err)
	b := make([]byte, 1)
	_, err = f.ReadAt(b, int64(off))
	require.NoError(t, err)
	b[0] ^= bits
	_, err = f.WriteAt(b, int64(off))
	require.NoError(t, err)
	require.NoError(t, f.Close())
}

// TestLogBitFlips: a flipped byte in each 512 bytes of the log's files costs at most the block that it is in; a read
// gives the right bytes or ErrCorrupt with the block's name, and a digest and an image end (H21, H22).
func TestLogBitFlips(t *testing.T) {
	mem := vfs.NewCrashableMem()
	e, v := mustStore(t, logConfig(t, mem, nil), 64)
	defer func() { require.NoError(t, e.Close()) }()
	write(t, v, 1, 0, 60)
	write(t, v, 2, 10, 8)
	settle(t, v)
	stamp := func(lba trivet.LBA) uint32 {
		if lba >= 10 && lba < 18 {
			return 2
		}
		return 1
	}
	flips, hits := 0, 0
	p := make([]byte, trivet.BlockSize)
	for _, name := range logFiles(t, mem) {
		step := 512
		if testing.Short() {
			step = 4096 - 512
		}
		for off, end := 0, len(readFile(t, mem, name)); off < end; off += step {
			flips++
			flipByte(t, mem, name, off, 0x40)
			bad := 0
			for lba := range trivet.LBA(60) {
				err := v.ReadAt(p, lba)
				var be *BlockError
				switch {
				case err == nil:
					require.Equal(t, numbered(stamp(lba), lba), p, "byte %d of %s", off, name)
				case errors.As(err, &be) && errors.Is(err, trivet.ErrCorrupt):
					require.Equal(t, lba, be.LBA)
					bad++
				default:
					require.NoError(t, err)
				}
			}
			require.LessOrEqual(t, bad, 1)
			hits += bad
			_, err := v.Digest()
			require.Equal(t, bad > 0, errors.Is(err, trivet.ErrCorrupt), "%v", err)
			i, err := v.Image(nil)
			require.NoError(t, err)
			_, err = io.Copy(io.Discard, i)
			require.Equal(t, bad > 0, errors.Is(err, trivet.ErrCorrupt), "%v", err)
			require.NoError(t, i.Close())
			flipByte(t, mem, name, off, 0x40)
		}
	}
	t.Logf("%d of %d flips were in live blocks", hits, flips)
	require.GreaterOrEqual(t, hits, 60)
	requireNumbers(t, v, 60, stamp)
}

// TestCleaningLeavesDamage: a damaged block is not copied, its segment stays, and everything beside it moves.
func TestCleaningLeavesDamage(t *testing.T) {
	mem := vfs.NewCrashableMem()
	e, v := mustStore(t, logConfig(t, mem, nil), 64)
	defer func() { require.NoError(t, e.Close()) }()
	write(t, v, 1, 0, 60)
	for lba := trivet.LBA(0); lba < 60; lba += 3 { // the log goes on elsewhere, and what stays is sparse
		write(t, v, 2, lba, 2)
	}
	settle(t, v)
	at, err := refOf(e, 5)
	require.NoError(t, err)
	flipBlock(t, mem, numbered(1, 5))
	for range 2 * cleanTriesMax {
		_, err := e.Clean()
		require.NoError(t, err)
		require.NoError(t, CheckLive(e))
	}
	now, err := refOf(e, 5)
	require.NoError(t, err)
	require.Equal(t, at, now)
	p := make([]byte, trivet.BlockSize)
	for lba := range trivet.LBA(60) {
		want := uint32(2)
		if lba%3 == 2 {
			want = 1
		}
		if err := v.ReadAt(p, lba); lba == 5 {
			require.ErrorIs(t, err, trivet.ErrCorrupt)
		} else {
			require.NoError(t, err)
			require.Equal(t, numbered(want, lba), p)
		}
	}
	moved, err := refOf(e, 8)
	require.NoError(t, err)
	require.NotEqual(t, at.seg, moved.seg, "its neighbour in the segment has moved")
	write(t, v, 3, 5, 1)
	require.NoError(t, v.ReadAt(p, 5), "written again, it is whole")
}

func refOf(e *Engine, lba trivet.LBA) (at ref, err error) {
	val, closer, err := e.db.Get(appendBlockKey(nil, damagedID, lba, 0))
	if err != nil {
		return ref{}, err
	}
	at, _, err = decodeRef(val, blockKey{damagedID, lba, 0})
	return at, errors.Join(err, closer.Close())
}

// TestLostSegment: a segment file that is gone costs the blocks that stood in it, and no more.
func TestLostSegment(t *testing.T) {
	mem := vfs.NewMem()
	e, v := mustStore(t, logConfig(t, mem, nil), 64)
	write(t, v, 1, 0, 60)
	settle(t, v)
	lost, err := refOf(e, 0)
	require.NoError(t, err)
	in := map[trivet.LBA]bool{}
	for lba := range trivet.LBA(60) {
		at, err := refOf(e, lba)
		require.NoError(t, err)
		in[lba] = at.seg == lost.seg
	}
	require.NoError(t, e.Close())
	for _, name := range logFiles(t, mem) {
		f, err := mem.Open(name)
		require.NoError(t, err)
		b := make([]byte, 64)
		_, err = f.ReadAt(b, 0)
		require.NoError(t, err)
		require.NoError(t, f.Close())
		id := segment.ID(uint64(b[32])<<8 | uint64(b[24])) // number and lane, small ones
		if id == lost.seg && strings.HasPrefix(string(b), "trvtseg") {
			require.NoError(t, mem.Remove(name))
		}
	}
	e, err = Open(logConfig(t, mem, nil))
	require.NoError(t, err)
	defer func() { require.NoError(t, e.Close()) }()
	v, err = e.OpenVolume(damagedID)
	require.NoError(t, err)
	p, bad := make([]byte, trivet.BlockSize), 0
	for lba := range trivet.LBA(60) {
		err := v.ReadAt(p, lba)
		require.Equal(t, in[lba], errors.Is(err, trivet.ErrCorrupt), "block %d: %v", lba, err)
		if err != nil {
			bad++
		}
	}
	require.Positive(t, bad)
	write(t, v, 2, 0, 60)
	settle(t, v)
	_, err = e.Clean()
	require.NoError(t, err)
	requireNumbers(t, v, 60, func(trivet.LBA) uint32 { return 2 })
}
