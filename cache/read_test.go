package cache_test

import (
	"context"
	"math/rand/v2"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/cache"
	"github.com/trivet-csi/trivet/internal/faultdev"
)

// TestOvertakenReadIsNotKept: a read from below that a change of the block has overtaken brings what was so before,
// and must not stay in the cache.
func TestOvertakenReadIsNotKept(t *testing.T) {
	t.Parallel()
	for _, mode := range cache.Modes() {
		l := newLab(t, config(mode, small))
		ctx := t.Context()
		require.NoError(t, l.mem.WriteAt(ctx, blocks(1, 2), 0))
		gate := l.disk.Hold(faultdev.OfKind(faultdev.Read))
		read := make(chan error, 1)
		go func() { read <- l.ReadAt(ctx, blocks(0, 2), 0) }()
		op := <-gate.Arrived()
		require.EqualValues(t, 0, op.OffBytes)
		// The read has not seen the disk yet; what it would have seen is put back below once the change is through.
		require.NoError(t, l.Discard(ctx, 0, trivet.BlockSize))
		l.write(1, 2, 1)
		require.NoError(t, l.Flush(ctx))
		require.NoError(t, l.mem.WriteAt(ctx, blocks(1, 2), 0))
		gate.Open()
		require.NoError(t, <-read)
		require.NoError(t, l.mem.WriteAt(ctx, block(0), 0))
		require.NoError(t, l.mem.WriteAt(ctx, block(2), trivet.BlockSize))
		holds(t, l, 0, 0)
		holds(t, l, 1, 2)
	}
}

// TestTwoWriters: without a clean side every read comes from below.
func TestTwoWriters(t *testing.T) {
	t.Parallel()
	cfg := config(cache.WriteThrough, small)
	cfg.NoClean, cfg.ReadAheadBytes = true, 1<<20
	l := newLab(t, cfg)
	l.write(1, 1, 1)
	for b := byte(2); b < 10; b++ {
		require.NoError(t, l.mem.WriteAt(t.Context(), block(b), trivet.BlockSize)) // the other writer
		holds(t, l, 1, b)
	}
}

// TestHitRates: each policy counts for itself, and keeps what it should: under a skewed load LRU and LFU hit more often
// than chance.
func TestHitRates(t *testing.T) {
	t.Parallel()
	l := newLab(t, config(cache.WriteThrough, small)) // 128 of 2048 blocks
	z := rand.NewZipf(rand.New(rand.NewPCG(1, 1)), 1.2, 4, 2047)
	p := block(0)
	rate := map[cache.Eviction]float64{}
	for i, e := range cache.Evictions() {
		require.NoError(t, l.Set(t.Context(), cache.Settings{Mode: cache.WriteThrough, Bytes: small, Eviction: e}))
		for range 10_000 {
			require.NoError(t, l.ReadAt(t.Context(), p, int64(z.Uint64())*trivet.BlockSize))
		}
		r := l.Stats().ByEviction[i]
		require.EqualValues(t, 10_000, r.Hits+r.Misses, e)
		rate[e] = float64(r.Hits) / 10_000
	}
	t.Log(rate)
	require.Greater(t, rate[cache.LFU], rate[cache.Random])
	require.Greater(t, rate[cache.LRU], rate[cache.FIFO])
	require.LessOrEqual(t, l.Stats().CleanBytes, int64(small))
}

// TestSequentialReaderFindsBlocksHere: a sequential reader's blocks are mostly there before it asks, in larger reads
// than its own; a random reader causes not one read more than it asks for.
func TestSequentialReaderFindsBlocksHere(t *testing.T) {
	t.Parallel()
	path := file(t)
	synctest.Test(t, func(t *testing.T) {
		disk := faultdev.Wrap(faultdev.NewMem(32 << 20))
		cfg := config(cache.WriteThrough, 8<<20)
		cfg.ReadAheadBytes = cache.ReadAheadMax
		d := open(t, path, disk, cfg)
		p := blocks(0, 4)
		for at := int64(0); at < 16<<20; at += int64(len(p)) {
			require.NoError(t, d.ReadAt(t.Context(), p, at))
			synctest.Wait() // the reader thinks, and the disk does not
		}
		s := d.Stats()
		require.Less(t, s.ByEviction[0].Misses, uint64(64), "of 4096 blocks")
		require.Less(t, disk.Count(faultdev.Read), 4096/4/4)
		require.LessOrEqual(t, s.ReadAheadBlocks, uint64(4096+256))
		disk.Forget()
		r := rand.New(rand.NewPCG(1, 1))
		before := d.Stats().ByEviction[0].Hits
		for range 500 {
			require.NoError(t, d.ReadAt(t.Context(), block(0), (4096+r.Int64N(4000))*trivet.BlockSize))
			synctest.Wait()
		}
		require.LessOrEqual(t, disk.Count(faultdev.Read), 500-int(d.Stats().ByEviction[0].Hits-before)+8)
		require.NoError(t, d.Detach(t.Context()))
	})
}

// TestDrainHoldsWrites: from Drain to release nothing changes, and reads go on.
func TestDrainHoldsWrites(t *testing.T) {
	t.Parallel()
	path := file(t)
	synctest.Test(t, func(t *testing.T) {
		mem := faultdev.NewMem(1 << 20)
		d := open(t, path, mem, config(cache.WriteBack, small))
		ctx := t.Context()
		require.NoError(t, d.WriteAt(ctx, block(1), 0))
		release, err := d.Drain(ctx)
		require.NoError(t, err)
		holds(t, mem, 0, 1)
		done := make(chan error, 3)
		go func() { done <- d.WriteAt(ctx, block(2), 0) }()
		go func() { done <- d.Discard(ctx, trivet.BlockSize, trivet.BlockSize) }()
		short, cancel := context.WithTimeout(ctx, time.Second)
		defer cancel()
		require.ErrorIs(t, d.WriteAt(short, block(3), 0), context.DeadlineExceeded)
		synctest.Wait()
		require.Empty(t, done)
		holds(t, d, 0, 1)
		require.NoError(t, d.Flush(ctx))
		release()
		release()
		require.NoError(t, <-done)
		require.NoError(t, <-done)
		holds(t, d, 0, 2)
		require.NoError(t, d.Detach(ctx))
	})
}

// TestFullCacheWaitsForTheDisk: a stalled disk stops writers at the dirty limit, not with an error, and not above it;
// a caller that gives up takes nothing with it (H32).
func TestFullCacheWaitsForTheDisk(t *testing.T) {
	t.Parallel()
	path := file(t)
	synctest.Test(t, func(t *testing.T) {
		mem := faultdev.NewMem(4 << 20)
		disk := faultdev.Wrap(mem)
		d := open(t, path, disk, config(cache.WriteBack, small))
		ctx := t.Context()
		gate := disk.Hold(faultdev.OfKind(faultdev.Write))
		n := int64(0)
		for ; n < 1000; n++ {
			short, cancel := context.WithTimeout(ctx, time.Second)
			err := d.WriteAt(short, block(byte(n)), n*trivet.BlockSize)
			cancel()
			if err != nil {
				require.ErrorIs(t, err, context.DeadlineExceeded)
				break
			}
		}
		require.EqualValues(t, small/trivet.BlockSize*75/100, n)
		require.Equal(t, n*trivet.BlockSize, d.Stats().DirtyBytes)
		short, cancel := context.WithTimeout(ctx, time.Second)
		defer cancel()
		require.ErrorIs(t, d.Flush(short), context.DeadlineExceeded, "no flush without the disk")
		done := make(chan error, 1)
		go func() { done <- d.WriteAt(ctx, block(9), n*trivet.BlockSize) }()
		synctest.Wait()
		gate.Open()
		require.NoError(t, <-done)
		require.NoError(t, d.Flush(ctx))
		for lba := range n {
			holds(t, mem, lba, byte(lba))
		}
		holds(t, mem, n, 9)
		require.NoError(t, d.Detach(ctx))
	})
}
