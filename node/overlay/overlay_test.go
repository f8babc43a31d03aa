package overlay_test

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/internal/faultdev"
	"github.com/trivet-csi/trivet/internal/faultdev/devtest"
	"github.com/trivet-csi/trivet/node/overlay"
)

const (
	vol       = trivet.VolumeID(7)
	sizeBytes = int64(8 << 20)
	block     = trivet.BlockSize
)

// bench is an overlay over a device that is only to be read.
type bench struct {
	cfg  overlay.Config
	next *faultdev.Device
	mem  *faultdev.Mem
}

func newBench(t *testing.T, memoryBytes int64) *bench {
	t.Helper()
	b := &bench{mem: faultdev.NewMem(sizeBytes)}
	b.next = faultdev.Wrap(b.mem)
	b.cfg = overlay.Config{
		Path: filepath.Join(t.TempDir(), "sub", "x.overlay"), Volume: vol, Next: b.next,
		Memory: overlay.NewMemory(memoryBytes),
	}
	return b
}

func (b *bench) create(t *testing.T) *overlay.Device {
	t.Helper()
	d, err := overlay.Create(b.cfg)
	require.NoError(t, err)
	return d
}

func (b *bench) open(t *testing.T) *overlay.Device {
	t.Helper()
	d, err := overlay.Open(b.cfg)
	require.NoError(t, err)
	return d
}

func (b *bench) requireUntouched(t *testing.T) {
	t.Helper()
	for _, op := range b.next.Ops() {
		require.Equal(t, faultdev.Read, op.Kind, "%+v reached the volume", op)
	}
}

func fill(c byte, n int64) []byte { return bytes.Repeat([]byte{c}, int(n)) }

func mustRead(t *testing.T, d trivet.Device, off, n int64) []byte {
	t.Helper()
	p := fill(0xee, n)
	require.NoError(t, d.ReadAt(t.Context(), p, off))
	return p
}

func TestOverlayConforms(t *testing.T) {
	t.Parallel()
	b := newBench(t, 64<<20)
	d := b.create(t)
	devtest.TestDevice(t, d)
	b.requireUntouched(t)
	require.NoError(t, d.Remove())
	require.Zero(t, b.cfg.Memory.UsedBytes())
	require.NoFileExists(t, b.cfg.Path)
}

// TestOverlayModel draws requests over a volume that has contents, and restarts in between.
func TestOverlayModel(t *testing.T) {
	t.Parallel()
	for seed := range uint64(8) {
		t.Run(fmt.Sprint("seed ", seed), func(t *testing.T) {
			t.Parallel()
			rng := rand.New(rand.NewPCG(seed, 0))
			b := newBench(t, 64<<20)
			below := make([]byte, sizeBytes)
			for i := range below {
				below[i] = byte(rng.Uint32())
			}
			require.NoError(t, b.mem.WriteAt(t.Context(), below, 0))
			model := bytes.Clone(below)
			d := b.create(t)
			for range 400 {
				off := rng.Int64N(sizeBytes/block) * block
				n := min(1+rng.Int64N(1<<rng.IntN(7)), (sizeBytes-off)/block) * block
				switch rng.IntN(8) {
				case 0, 1, 2:
					p := fill(byte(rng.Uint32()), n)
					require.NoError(t, d.WriteAt(t.Context(), p, off))
					copy(model[off:], p)
				case 3:
					require.NoError(t, d.WriteZeroes(t.Context(), off, n))
					clear(model[off : off+n])
				case 4:
					require.NoError(t, d.Close())
					require.Zero(t, b.cfg.Memory.UsedBytes())
					d = b.open(t)
				default:
					require.True(t, bytes.Equal(model[off:off+n], mustRead(t, d, off, n)), "at %d, %d bytes", off, n)
				}
			}
			require.True(t, bytes.Equal(model, mustRead(t, d, 0, sizeBytes)))
			require.NoError(t, d.Close())
			got := make([]byte, sizeBytes)
			require.NoError(t, b.mem.ReadAt(t.Context(), got, 0))
			require.True(t, bytes.Equal(below, got))
			b.requireUntouched(t)
		})
	}
}

// TestReadOfAnEmptyOverlayAllocatesNothing, and neither does one that finds blocks here.
func TestReadOfAnEmptyOverlayAllocatesNothing(t *testing.T) {
	b := newBench(t, 4<<20)
	b.cfg.Next = b.mem
	d := b.create(t)
	p := make([]byte, 16*block)
	ctx := t.Context()
	read := func() {
		if err := d.ReadAt(ctx, p, 0); err != nil {
			t.Error(err)
		}
	}
	require.Zero(t, testing.AllocsPerRun(100, read), "empty")
	require.NoError(t, d.WriteAt(ctx, fill('a', block), 3*block))
	require.Zero(t, testing.AllocsPerRun(100, read), "with a block")
	require.Equal(t, fill('a', block), p[3*block:4*block])
	require.NoError(t, d.Close())
}

// TestReadsBelowOnlyWhatIsMissing: once, however the blocks alternate, and not at all if all are here.
func TestReadsBelowOnlyWhatIsMissing(t *testing.T) {
	t.Parallel()
	b := newBench(t, 4<<20)
	d := b.create(t)
	for _, lba := range []int64{0, 2, 3} {
		require.NoError(t, d.WriteAt(t.Context(), fill('a', block), lba*block))
	}
	want := append(append(fill('a', block), fill(0, block)...), fill('a', 2*block)...)
	require.Equal(t, want, mustRead(t, d, 0, 4*block))
	require.Len(t, b.next.Ops(), 1)
	require.Equal(t, fill('a', 2*block), mustRead(t, d, 2*block, 2*block))
	require.Len(t, b.next.Ops(), 1)
	require.NoError(t, d.Close())
}

// TestOverlayIsBounded: what does not fit is refused whole, Full tells of it ever after, in the next process too, and
// what was there before is still there. A discard that does not fit is no loss.
func TestOverlayIsBounded(t *testing.T) {
	t.Parallel()
	b := newBench(t, 600<<10) // two chunks of 260 KiB
	d := b.create(t)
	require.NoError(t, d.WriteAt(t.Context(), fill('a', 100*block), 0))
	require.ErrorIs(t, d.Discard(t.Context(), 0, 1<<20), trivet.ErrNoSpace)
	require.NoError(t, d.Full())
	require.NoError(t, d.Discard(t.Context(), 99*block, block))
	held := d.Bytes()
	for range 200 { // what is written again takes no more room
		require.NoError(t, d.WriteAt(t.Context(), fill('a', 8*block), 16*block))
	}
	require.Equal(t, held, d.Bytes())
	require.ErrorIs(t, d.WriteAt(t.Context(), fill('b', 64*block), 99*block), trivet.ErrNoSpace)
	require.Equal(t, held, d.Bytes())
	require.ErrorIs(t, d.Full(), trivet.ErrNoSpace)
	require.NoError(t, d.WriteAt(t.Context(), fill('c', 8*block), 100*block), "what fits goes on")

	require.NoError(t, d.Close())
	d = b.open(t)
	require.ErrorIs(t, d.Full(), trivet.ErrNoSpace)
	require.Equal(t, fill('a', 99*block), mustRead(t, d, 0, 99*block))
	require.Equal(t, fill(0, block), mustRead(t, d, 99*block, block))
	require.Equal(t, fill('c', 8*block), mustRead(t, d, 100*block, 8*block))
	require.Equal(t, held, b.cfg.Memory.UsedBytes())
	require.ErrorIs(t, d.WriteZeroes(t.Context(), 0, 1<<20), trivet.ErrNoSpace)
	require.NoError(t, d.Remove())
	require.Zero(t, b.cfg.Memory.UsedBytes())
}

// TestMemoryIsShared: overlays of a node draw from one Memory, and one that is removed gives all back.
func TestMemoryIsShared(t *testing.T) {
	t.Parallel()
	b := newBench(t, 600<<10)
	first := b.create(t)
	other := b.cfg
	other.Path += "2"
	second, err := overlay.Create(other)
	require.NoError(t, err)
	require.NoError(t, first.WriteAt(t.Context(), fill('a', 128*block), 0))
	require.ErrorIs(t, second.WriteAt(t.Context(), fill('b', block), 0), trivet.ErrNoSpace)
	require.ErrorContains(t, second.Full(), "532480 of 614400")
	require.NoError(t, first.Full())
	require.NoError(t, first.Remove())
	require.NoError(t, second.WriteAt(t.Context(), fill('b', block), 0))
	require.NoError(t, second.Remove())
}

// TestFullFilesystem: the folder of overlays may have less room than the Memory.
func TestFullFilesystem(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounting needs root")
	}
	b := newBench(t, 64<<20)
	mountTmpfs(t, filepath.Dir(b.cfg.Path), "size=1m")
	d := b.create(t)
	require.NoError(t, d.WriteAt(t.Context(), fill('a', 64*block), 0))
	require.ErrorIs(t, d.WriteAt(t.Context(), fill('b', 1<<20), 0), trivet.ErrNoSpace)
	require.ErrorIs(t, d.Full(), trivet.ErrNoSpace)
	require.Equal(t, fill('a', 64*block), mustRead(t, d, 0, 64*block))
	require.NoError(t, d.Remove())
}

// TestForeignFilesAreRefused, and left alone.
func TestForeignFilesAreRefused(t *testing.T) {
	t.Parallel()
	b := newBench(t, 4<<20)
	_, err := overlay.Open(b.cfg)
	require.ErrorIs(t, err, trivet.ErrNotFound)
	d := b.create(t)
	require.NoError(t, d.WriteAt(t.Context(), fill('a', block), block))
	require.NoError(t, d.Close())
	good, err := os.ReadFile(b.cfg.Path)
	require.NoError(t, err)
	other := b.cfg
	other.Volume++
	_, err = overlay.Open(other)
	require.ErrorIs(t, err, trivet.ErrInvalid)
	headAt := len(good) - 65*block
	for _, c := range []struct {
		name string
		at   int
		want error
	}{
		{"magic", 0, trivet.ErrCorrupt},
		{"version", 8, trivet.ErrInvalid},
		{"checksum", 12, trivet.ErrCorrupt},
		{"volume", 16, trivet.ErrCorrupt},
		{"head of a slot", headAt + 8, trivet.ErrCorrupt},
	} {
		bad := bytes.Clone(good)
		bad[c.at]++
		require.NoError(t, os.WriteFile(b.cfg.Path, bad, 0o600))
		_, err := overlay.Open(b.cfg)
		require.ErrorIs(t, err, c.want, c.name)
	}
	require.NoError(t, os.WriteFile(b.cfg.Path, good[:100], 0o600))
	_, err = overlay.Open(b.cfg)
	require.ErrorIs(t, err, trivet.ErrCorrupt)
	require.Zero(t, b.cfg.Memory.UsedBytes())

	bad := bytes.Clone(good)
	bad[headAt+block]++ // the data of the first slot
	require.NoError(t, os.WriteFile(b.cfg.Path, bad, 0o600))
	d = b.open(t)
	require.ErrorIs(t, d.ReadAt(t.Context(), make([]byte, block), block), trivet.ErrCorrupt)
	require.NoError(t, d.ReadAt(t.Context(), make([]byte, block), 0))
	require.NoError(t, d.Remove())
}

// TestFenced: once the volume is another's, what is here is of no use either.
func TestFenced(t *testing.T) {
	t.Parallel()
	b := newBench(t, 4<<20)
	d := b.create(t)
	require.NoError(t, d.WriteAt(t.Context(), fill('a', block), block))
	b.next.FailNth(faultdev.Read, 1, trivet.ErrFenced)
	require.ErrorIs(t, d.ReadAt(t.Context(), make([]byte, block), 0), trivet.ErrFenced)
	require.ErrorIs(t, d.ReadAt(t.Context(), make([]byte, block), block), trivet.ErrFenced)
	require.ErrorIs(t, d.WriteAt(t.Context(), fill('a', block), block), trivet.ErrFenced)
	require.ErrorIs(t, d.Flush(t.Context()), trivet.ErrFenced)
	require.NoError(t, d.Remove())
}

// TestClosed: nobody writes into what was left to the next process.
func TestClosed(t *testing.T) {
	t.Parallel()
	b := newBench(t, 4<<20)
	d := b.create(t)
	require.NoError(t, d.WriteAt(t.Context(), fill('a', block), 0))
	require.NoError(t, d.Close())
	require.NoError(t, d.Close())
	require.ErrorIs(t, d.WriteAt(t.Context(), fill('b', block), 0), trivet.ErrClosed)
	require.ErrorIs(t, d.WriteZeroes(t.Context(), 0, block), trivet.ErrClosed)
	require.ErrorIs(t, d.ReadAt(t.Context(), make([]byte, block), 0), trivet.ErrClosed)
	d = b.open(t)
	require.Equal(t, fill('a', block), mustRead(t, d, 0, block))
	require.NoError(t, d.Remove())
	var none *overlay.Device
	require.NoError(t, none.Close())
	require.NoError(t, none.Remove())
	require.NoError(t, none.Full())
	require.Zero(t, none.Bytes())
}
