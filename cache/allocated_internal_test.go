package cache

import (
	"context"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/internal/faultdev"
)

// thin is a disk that knows which of its blocks were written.
type thin struct {
	*faultdev.Device
	mu   sync.Mutex // guards has
	has  [256]bool
	then func() // runs after the answer was made, before it is given
}

func (d *thin) WriteAt(ctx context.Context, p []byte, off int64) error {
	err := d.Device.WriteAt(ctx, p, off)
	d.mu.Lock()
	defer d.mu.Unlock()
	for i := range int64(len(p)) / trivet.BlockSize {
		d.has[off/trivet.BlockSize+i] = d.has[off/trivet.BlockSize+i] || err == nil
	}
	return err
}

func (d *thin) Discard(ctx context.Context, off, n int64) error {
	lba, blocks := trivet.AlignInwards(off, n)
	d.mu.Lock()
	clear(d.has[lba : lba+trivet.LBA(blocks)])
	d.mu.Unlock()
	return d.Device.Discard(ctx, off, n)
}

func (d *thin) Allocated(_ context.Context, off, n int64, runs []trivet.Run) (int, error) {
	used := d.runs(off, n, runs)
	if d.then != nil {
		d.then()
	}
	return used, nil
}

// runs fills in as many runs as there is room for.
func (d *thin) runs(off, n int64, runs []trivet.Run) (used int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for i := off / trivet.BlockSize; i < (off+n)/trivet.BlockSize; i++ {
		switch has := d.has[i]; {
		case used > 0 && runs[used-1].Allocated == has:
			runs[used-1].LenBytes += trivet.BlockSize
		case used == len(runs):
			return used
		default:
			runs[used] = trivet.Run{LenBytes: trivet.BlockSize, Allocated: has}
			used++
		}
	}
	return used
}

// blockStatus returns for each block of the range whether it is called data, with so many runs an answer.
func blockStatus(t *testing.T, a trivet.Allocator, off, n int64, runsN int) []bool {
	t.Helper()
	var out []bool
	for runs := make([]trivet.Run, runsN); n > 0; {
		used, err := a.Allocated(t.Context(), off, n, runs)
		require.NoError(t, err)
		require.Positive(t, used)
		for _, r := range runs[:used] {
			require.Positive(t, r.LenBytes)
			require.Zero(t, r.LenBytes%trivet.BlockSize)
			for range r.LenBytes / trivet.BlockSize {
				out = append(out, r.Allocated)
			}
			off, n = off+r.LenBytes, n-r.LenBytes
		}
		require.GreaterOrEqual(t, n, int64(0), "beyond what was asked for")
	}
	return out
}

// TestOverlay compares with block by block, for any number of runs an answer.
func TestOverlay(t *testing.T) {
	t.Parallel()
	for seed := range uint64(2000) {
		r := rand.New(rand.NewPCG(seed, 1))
		const from, n = 7, 40
		var want [n]bool
		var below []trivet.Run
		for at := 0; at < n; {
			k := min(1+r.IntN(8), n-at)
			has := r.IntN(2) == 0
			below = append(below, trivet.Run{LenBytes: int64(k) * trivet.BlockSize, Allocated: has})
			for range k {
				want[at] = has
				at++
			}
		}
		var blocks []trivet.LBA
		for i := range n {
			if r.IntN(4) == 0 {
				blocks = append(blocks, trivet.LBA(from+i))
				want[i] = true
				if r.IntN(3) == 0 {
					blocks = append(blocks, trivet.LBA(from+i))
				}
			}
		}
		out := make([]trivet.Run, 1+r.IntN(12))
		used := overlay(below, from*trivet.BlockSize, blocks, out)
		require.Positive(t, used)
		at := 0
		for i, run := range out[:used] {
			require.True(t, i == 0 || run.Allocated != out[i-1].Allocated, "seed %d: runs are as long as they can be", seed)
			for range run.LenBytes / trivet.BlockSize {
				require.Equal(t, want[at], run.Allocated, "seed %d, block %d", seed, at)
				at++
			}
		}
		require.True(t, at == n || used == len(out), "seed %d: %d of %d", seed, at, n)
	}
}

// TestAllocated: dirty blocks and those under way are data, as are those below; discards and blocks that are only read
// are not.
func TestAllocated(t *testing.T) {
	t.Parallel()
	next := &thin{Device: faultdev.Wrap(faultdev.NewMem(1 << 20))}
	d := openWriteBack(t, next, Settings{Bytes: 1 << 20, ReadAheadBytes: 64 << 10})
	ctx := t.Context()
	p := make([]byte, 16*trivet.BlockSize)
	write := func(lba, n int64) { require.NoError(t, d.WriteAt(ctx, p[:n*trivet.BlockSize], lba*trivet.BlockSize)) }
	want := make([]bool, 256)
	set := func(lba, n int64, has bool) {
		for i := range n {
			want[lba+i] = has
		}
	}
	check := func(when string) {
		t.Helper()
		for _, runsN := range []int{1, 2, 3, 100} {
			require.Equal(t, want, blockStatus(t, d, 0, 1<<20, runsN), when)
			require.Equal(t, want[9:30], blockStatus(t, d, 9*trivet.BlockSize, 21*trivet.BlockSize, runsN), when)
		}
	}
	check("nothing was written")
	write(10, 3)
	write(200, 16)
	set(10, 3, true)
	set(200, 16, true)
	check("dirty")
	require.NoError(t, d.Flush(ctx))
	require.Equal(t, want, blockStatus(t, next, 0, 1<<20, 100))
	check("below")
	require.NoError(t, d.ReadAt(ctx, p, 40*trivet.BlockSize))
	check("only read")
	write(100, 2)
	set(100, 2, true)
	gate := next.Hold(faultdev.OfKind(faultdev.Write))
	flushed := make(chan error, 1)
	go func() { flushed <- d.Flush(ctx) }()
	<-gate.Arrived()
	check("under way")
	gate.Open()
	require.NoError(t, <-flushed)
	require.NoError(t, d.Discard(ctx, 10*trivet.BlockSize, 2*trivet.BlockSize))
	set(10, 2, false)
	check("discarded")

	write(60, 1)
	next.then = func() { next.then = nil; require.NoError(t, d.Flush(ctx)) }
	set(60, 1, true)
	require.Equal(t, want, blockStatus(t, d, 0, 1<<20, 100), "what lands while the device below is asked")

	next.Inject(faultdev.Fault{Match: faultdev.OfKind(faultdev.Write), Err: trivet.ErrFenced})
	write(70, 1)
	require.ErrorIs(t, d.Flush(ctx), trivet.ErrFenced)
	_, err := d.Allocated(ctx, 0, 4096, make([]trivet.Run, 1))
	require.ErrorIs(t, err, trivet.ErrFenced)
	_, err = d.Allocated(ctx, 0, 2<<20, make([]trivet.Run, 1))
	require.ErrorIs(t, err, trivet.ErrOutOfRange)
	require.NoError(t, d.Detach(ctx))
}

// TestAllocatedInPieces: a table with more unwritten blocks than one answer may look at is asked piece by piece.
func TestAllocatedInPieces(t *testing.T) {
	t.Parallel()
	mem := faultdev.NewMem(2 * (unwrittenMax + 4096) * trivet.BlockSize)
	disk := faultdev.Wrap(mem)
	gate := disk.Hold(faultdev.OfKind(faultdev.Write))
	d := openWriteBack(t, &hollow{disk}, Settings{Bytes: (unwrittenMax + 8192) * trivet.BlockSize * 4 / 3})
	p := make([]byte, trivet.BlockSize)
	want := make([]bool, mem.Size()/trivet.BlockSize)
	for i := range int64(unwrittenMax + 1000) {
		require.NoError(t, d.WriteAt(t.Context(), p, 2*i*trivet.BlockSize))
		want[2*i] = true
	}
	got := blockStatus(t, d, 0, mem.Size(), 1000)
	require.True(t, slices.Equal(want, got))
	gate.Open()
	require.NoError(t, d.Detach(t.Context()))
}

// hollow says that none of its blocks hold data.
type hollow struct{ trivet.Device }

func (*hollow) Allocated(_ context.Context, _, n int64, runs []trivet.Run) (int, error) {
	runs[0] = trivet.Run{LenBytes: n}
	return 1, nil
}
