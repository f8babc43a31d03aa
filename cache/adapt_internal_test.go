package cache

import (
	"context"
	"encoding/binary"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/internal/faultdev"
)

// farDisk takes a while for each write, however many are under way, and notes the writes.
type farDisk struct {
	*faultdev.Mem
	latency time.Duration

	mu            sync.Mutex
	insideN, most int
	longest       int
	check         func(p []byte, off int64)
}

func (f *farDisk) WriteAt(ctx context.Context, p []byte, off int64) error {
	f.mu.Lock()
	f.insideN++
	f.most, f.longest = max(f.most, f.insideN), max(f.longest, len(p))
	if f.check != nil {
		f.check(p, off)
	}
	f.mu.Unlock()
	time.Sleep(f.latency)
	err := f.Mem.WriteAt(ctx, p, off)
	f.mu.Lock()
	f.insideN--
	f.mu.Unlock()
	return err
}

func (f *farDisk) forget() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.most, f.longest = 0, 0
}

// openWriteBack opens a writeBack cache over next, in a file of its own. Nothing is written back because it is old.
func openWriteBack(t *testing.T, next trivet.Device, set Settings) *Device {
	t.Helper()
	l, err := Lock(t.TempDir() + "/c")
	require.NoError(t, err)
	set.Mode = WriteBack
	d, err := Open(next, l, Config{Cluster: "c", Volume: 7, Epoch: 1, Settings: set, Deadline: time.Hour})
	require.NoError(t, err)
	return d
}

// TestAdaptiveKeepsItsBounds: on a disk that takes any number of writes at a time, more of them are put under way, and
// never more or longer ones than the bounds; switched off, it is 16 of 64 KiB again.
func TestAdaptiveKeepsItsBounds(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		disk := &farDisk{Mem: faultdev.NewMem(64 << 20), latency: 40 * time.Millisecond}
		d := openWriteBack(t, disk, Settings{Bytes: 16 << 20, Adaptive: true})
		require.True(t, d.Stats().Adaptive)
		ctx := t.Context()
		p := make([]byte, 1<<20)
		write := func(lasting time.Duration) {
			for end, i := d.now()+lasting, int64(0); d.now() < end; i++ {
				require.NoError(t, d.WriteAt(ctx, p, i%64<<20))
			}
		}
		write(15 * time.Second)
		// Where it settles is for the tests of the core; what it measures here hangs on how goroutines take turns.
		disk.mu.Lock()
		most, longest := disk.most, disk.longest
		disk.mu.Unlock()
		require.Greater(t, most, depthDefault)
		require.LessOrEqual(t, most, adaptiveDepthMax)
		require.LessOrEqual(t, longest, flightBlocksMax*trivet.BlockSize)

		set := d.Settings()
		set.Adaptive = false
		require.NoError(t, d.Set(ctx, set))
		s := d.Stats()
		require.Equal(t, depthDefault, s.FlushDepth)
		require.EqualValues(t, trivet.AtomicWriteBytes, s.FlushBytes)
		require.NoError(t, d.Flush(ctx))
		disk.forget()
		write(2 * time.Second)
		require.NoError(t, d.Flush(ctx))
		require.Equal(t, depthDefault, disk.most)
		require.Equal(t, trivet.AtomicWriteBytes, disk.longest)
		require.NoError(t, d.Detach(ctx))
	})
}

// TestManySingleBlocksUnderWay: of blocks with no neighbours as many bytes are under way as of long write-backs, or
// random writes would come one by one to a device that gathers. Who carried them ends when there is nothing to do.
func TestManySingleBlocksUnderWay(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		disk := &farDisk{Mem: faultdev.NewMem(64 << 20), latency: 40 * time.Millisecond}
		d := openWriteBack(t, disk, Settings{Bytes: 16 << 20})
		p := make([]byte, trivet.BlockSize)
		write := func() {
			for i := range int64(1000) {
				require.NoError(t, d.WriteAt(t.Context(), p, i*3*trivet.BlockSize))
			}
			require.NoError(t, d.Flush(t.Context()))
		}
		write()
		require.Greater(t, disk.most, 8*depthDefault)
		require.LessOrEqual(t, disk.most, (depthDefault-1)*pieceBlocks+1)
		require.Equal(t, trivet.BlockSize, disk.longest)
		time.Sleep(2 * thinAfter)
		synctest.Wait()
		require.EqualValues(t, adaptiveDepthMax, d.waitingN.Load())
		write() // and they come again
		require.NoError(t, d.Detach(t.Context()))
	})
}

// TestLongWriteBacksAreCutBetweenWrites: the device below cuts what is longer than AtomicWriteBytes at multiples of it;
// no write that was whole may lie across such a cut (promise 7 of the volume).
func TestLongWriteBacksAreCutBetweenWrites(t *testing.T) {
	t.Parallel()
	disk := &farDisk{Mem: faultdev.NewMem(4 << 20)}
	const enough = 20
	var longN atomic.Int64
	disk.check = func(p []byte, off int64) {
		if len(p) <= trivet.AtomicWriteBytes {
			return
		}
		longN.Add(1)
		for at := trivet.BlockSize; at < len(p); at += trivet.BlockSize {
			if (off+int64(at))%trivet.AtomicWriteBytes == 0 {
				before := binary.LittleEndian.Uint64(p[at-trivet.BlockSize:])
				assert.NotEqual(t, before, binary.LittleEndian.Uint64(p[at:]), "write %d is cut", before)
			}
		}
	}
	d := openWriteBack(t, disk, Settings{Bytes: 4 << 20})
	d.mu.Lock()
	d.mode.blocks = flightBlocksMax
	d.mu.Unlock()
	r := rand.New(rand.NewPCG(1, 2))
	p := make([]byte, trivet.AtomicWriteBytes)
	// The slower we are, beside who writes back, the fewer are long.
	for id := uint64(0); id < 3000 || longN.Load() <= enough && id < 100_000; id++ {
		n := 1 + r.IntN(pieceBlocks)
		for i := range n {
			binary.LittleEndian.PutUint64(p[i*trivet.BlockSize:], id+1)
		}
		lba := r.Int64N(1024 - pieceBlocks)
		require.NoError(t, d.WriteAt(t.Context(), p[:n*trivet.BlockSize], lba*trivet.BlockSize))
		if id%100 == 99 {
			require.NoError(t, d.Flush(t.Context()))
		}
	}
	require.NoError(t, d.Detach(t.Context()))
	require.Greater(t, longN.Load(), int64(enough))
}

// TestReadAheadAdapts: a sequential reader that is slower than its fetches is read ahead for by twice the product of
// its rate and their latency, and by all of its setting when that is not adaptive.
func TestReadAheadAdapts(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		next := &slowReads{Mem: faultdev.NewMem(256 << 20), latency: 4 * time.Millisecond}
		d, err := Open(next, nil, Config{Volume: 7, Epoch: 1, Settings: Settings{
			Bytes: 16 << 20, ReadAheadBytes: ReadAheadMax, Adaptive: true,
		}})
		require.NoError(t, err)
		require.EqualValues(t, ReadAheadMax, d.Stats().ReadAheadBytes, "nothing is known yet")
		p := make([]byte, 64<<10)
		for i := range int64(1000) { // 16 blocks each 2 ms: 8000 a second, of which 32 are under way in 4 ms
			require.NoError(t, d.ReadAt(t.Context(), p, i*int64(len(p))))
			time.Sleep(2 * time.Millisecond)
		}
		s := d.Stats()
		require.InDelta(t, 64*trivet.BlockSize, s.ReadAheadBytes, 16*trivet.BlockSize)
		lru := s.ByEviction[0]
		require.Greater(t, lru.Hits, 20*lru.Misses, "and that is enough")
		require.NoError(t, d.Close(t.Context()))
	})
}

type slowReads struct {
	*faultdev.Mem
	latency time.Duration
}

func (s *slowReads) ReadAt(ctx context.Context, p []byte, off int64) error {
	time.Sleep(s.latency)
	return s.Mem.ReadAt(ctx, p, off)
}
