package engine

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
)

// TestGiveBackIsWorthIt: the background flushes the map to give a segment back only when several wait, when one has
// waited for long, or when the disk runs full.
func TestGiveBackIsWorthIt(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		cfg := logConfig(t, vfs.NewMem(), nil)
		cfg.CleanTarget = 0.1 // nothing is copied
		e, v := mustStore(t, cfg, 256)
		defer func() { require.NoError(t, e.Close()) }()
		x := uint32(0)
		// die has so many segments die that the log itself has cut.
		die := func(n int) {
			t.Helper()
			before := e.live.deadN()
			for e.live.deadN() < before+n {
				x++
				require.Less(t, x, uint32(1000))
				write(t, v, x, 0, 8)
			}
			require.NoError(t, TrimLog(v))
			require.Equal(t, before+n, e.live.deadN())
		}
		// kept reports whether all dead segments are still there, once the background has done what it does by then.
		kept := func(n int, after time.Duration) bool {
			time.Sleep(after)
			synctest.Wait()
			return e.live.deadN() == n
		}
		time.Sleep(giveBackAge / 2)
		die(1)
		flushed := e.flushed.Load()
		require.True(t, kept(1, giveBackAge/4), "one alone")
		require.Equal(t, flushed, e.flushed.Load(), "the map is not flushed for it")
		require.True(t, kept(0, giveBackAge), "for long")

		die(1)
		require.NoError(t, e.Flush())
		write(t, v, x, 0, 8)
		flushed = e.flushed.Load()
		e.clean.poke()
		require.True(t, kept(0, cleanPause+time.Millisecond), "somebody else flushed")
		require.Equal(t, flushed, e.flushed.Load())

		die(1)
		e.clean.setPressure(true)
		require.True(t, kept(0, cleanPause+time.Millisecond), "the disk runs full")
		require.True(t, e.Tight())
		e.clean.setPressure(false)
		require.False(t, e.Tight())

		die(giveBackSegmentsMin)
		require.True(t, kept(0, cleanPause+time.Millisecond), "several")
		requireNumbers(t, v, 8, func(trivet.LBA) uint32 { return x })
		require.NoError(t, CheckLive(e))
	})
}

// TestGiveBackAt: the more room there is, the more segments may wait.
func TestGiveBackAt(t *testing.T) {
	t.Parallel()
	cfg := logConfig(t, vfs.NewMem(), nil)
	e, _ := mustStore(t, cfg, 256)
	defer func() { require.NoError(t, e.Close()) }()
	s := &space{log: e.log}
	for left, want := range map[int64]int{
		-1: giveBackSegmentsMin, 0: giveBackSegmentsMin,
		5 * giveBackDivisor:  5,
		50 * giveBackDivisor: giveBackSegmentsMax,
	} {
		s.left = left * e.log.SegmentBytes()
		require.Equal(t, want, s.giveBackAt(), "%d segments are left", left)
	}
	s.unknown = true
	require.Equal(t, giveBackSegmentsMin, s.giveBackAt())
}

// TestFilesGoBack: files of the log that nobody needs any more are room in the filesystem some minutes later, all but
// those that the next segments take.
func TestFilesGoBack(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		cfg := logConfig(t, vfs.NewMem(), nil)
		cfg.CleanTarget = 0.1 // nothing is copied
		e, v := mustStore(t, cfg, 256)
		defer func() { require.NoError(t, e.Close()) }()
		files := func() int64 { return e.log.FreeBytes() / e.log.SegmentBytes() }
		x := uint32(0)
		fill := func(segments int64) {
			for n := rolls(e) + segments; rolls(e) < n; x++ {
				write(t, v, x, 0, 8)
			}
			settle(t, v)
			time.Sleep(giveBackAge + 2*cleanPause)
			synctest.Wait()
		}
		fill(30)
		filled := files()
		require.Greater(t, filled, int64(25))
		for range 8 { // what is needed now and then stays
			fill(20)
			time.Sleep(trimAge / 2)
		}
		require.GreaterOrEqual(t, files(), int64(20))
		time.Sleep(20 * trimAge)
		synctest.Wait()
		require.LessOrEqual(t, files(), int64(len(e.log.Stats())))
		require.Equal(t, time.Hour, e.clean.lookIn(), "and nobody looks for more")
	})
}

// rolls is how many segments the lanes of the log have begun.
func rolls(e *Engine) (n int64) {
	for _, l := range e.log.Stats() {
		n += l.Rolls
	}
	return n
}
