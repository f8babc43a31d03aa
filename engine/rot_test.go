package engine

import (
	"errors"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
)

// rotten is what an owner heard of the damage on its disk.
type rotten struct {
	mu     sync.Mutex
	heard  []*DamageError
	fatals []error
}

func (r *rotten) config(mem vfs.FS) Config {
	cfg := damageConfig(mem)
	cfg.CacheBytes = 1 // nothing stays in memory
	cfg.OnCorruption = func(err error) {
		r.mu.Lock()
		defer r.mu.Unlock()
		var d *DamageError
		if !errors.As(err, &d) {
			d = &DamageError{Cause: "not a DamageError: " + err.Error()}
		}
		r.heard = append(r.heard, d)
	}
	cfg.Fatal = func(err error) {
		r.mu.Lock()
		defer r.mu.Unlock()
		r.fatals = append(r.fatals, err)
	}
	return cfg
}

func (r *rotten) get() ([]*DamageError, []error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return append([]*DamageError(nil), r.heard...), append([]error(nil), r.fatals...)
}

// rotInLevel0 makes a store of which a table in level 0 has a flipped bit, and enough tables above it that Pebble
// wants to compact. Blocks 0 to 15 are in the damaged table, 16 to 31 in another; all were written again since, with
// number 10.
func rotInLevel0(t *testing.T, cfg Config, mem *vfs.MemFS) (*Engine, *Volume) {
	t.Helper()
	e, v := mustStore(t, cfg, 64)
	c := e.health.compactions
	c.mu.Lock()
	c.paused = time.NewTimer(time.Hour) // until the bit is flipped
	c.mu.Unlock()
	synctest.Wait()
	require.NoError(t, writeNumbered(v, 1, 0, 16))
	require.NoError(t, e.Flush())
	first := slices.Max(tables(t, mem))
	f, err := mem.OpenReadWrite(first, vfs.WriteCategoryUnspecified)
	require.NoError(t, err)
	st, err := f.Stat()
	require.NoError(t, err)
	b := make([]byte, 1)
	_, err = f.ReadAt(b, st.Size()/3)
	require.NoError(t, err)
	b[0] ^= 4
	_, err = f.WriteAt(b, st.Size()/3)
	require.NoError(t, err)
	require.NoError(t, f.Close())
	require.NoError(t, writeNumbered(v, 2, 16, 16))
	require.NoError(t, e.Flush())
	for x := range uint32(8) {
		require.NoError(t, writeNumbered(v, 3+x, 0, 32))
		require.NoError(t, e.Flush())
	}
	c.resume()
	return e, v
}

// A compaction that meets a flipped bit is tried again, but later and later: a dozen times within an hour. The
// engine's owner hears of the table once, and once more that the disk does not get past it. Good blocks are
// read meanwhile, and a bad one never.
func TestCompactionMeetsRot(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		mem := vfs.NewCrashableMem()
		var r rotten
		e, v := rotInLevel0(t, r.config(mem), mem)
		defer func() { require.NoError(t, e.Close()) }()
		time.Sleep(time.Hour)
		synctest.Wait()
		failed := e.db.Metrics().Compact.FailedCount
		t.Logf("%d compactions failed in an hour", failed)
		require.GreaterOrEqual(t, failed, int64(damageStuckN))
		require.Less(t, failed, int64(30))
		heard, fatals := r.get()
		require.Empty(t, fatals)
		require.Len(t, heard, 2)
		require.NotEmpty(t, heard[0].Table)
		require.ErrorIs(t, heard[0], trivet.ErrCorrupt)
		require.True(t, heard[0].Touches(damagedID))
		require.True(t, heard[1].Touches(0))
		require.True(t, heard[1].Touches(volumeMax))

		p := make([]byte, trivet.BlockSize)
		bad := 0
		for lba := range trivet.LBA(32) {
			err := v.ReadAt(p, lba)
			if lba < 16 && errors.Is(err, trivet.ErrCorrupt) {
				bad++ // what lies below it in the damaged table cannot be read
				continue
			}
			require.NoError(t, err)
			require.Equal(t, numbered(10, lba), p)
		}
		require.Less(t, bad, 8)
		heard, _ = r.get()
		require.Len(t, heard, 2, "a reader that meets it again")
	})
}

// Writes that wait for level 0 when compactions do not get past damage would wait for ever: the owner is told to end
// the process, and they end with that error, as does who closes the engine.
func TestStallBehindRotIsFatal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		mem := vfs.NewCrashableMem()
		var r rotten
		e, v := rotInLevel0(t, r.config(mem), mem)
		wrote := make(chan error, 1)
		go func() {
			var err error
			for x := uint32(0); x < 2*l0StopSublevel && err == nil; x++ {
				if err = writeNumbered(v, x, 0, 32); err == nil {
					err = e.Flush()
				}
			}
			wrote <- err
		}()
		time.Sleep(time.Hour)
		_, fatals := r.get()
		require.Len(t, fatals, 1)
		require.ErrorIs(t, fatals[0], trivet.ErrCorrupt)
		require.ErrorContains(t, fatals[0], "no more writes")
		require.ErrorContains(t, <-wrote, "no more writes")
		require.Error(t, e.Close())
	})
}

// Writes wait while level 0 is full, and go on once compactions have made room.
func TestWritesWaitForLevel0(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e, v := mustStore(t, damageConfig(vfs.NewMem()), 64)
		c := e.health.compactions
		c.mu.Lock()
		c.paused = time.NewTimer(time.Hour)
		c.mu.Unlock()
		const n = l0StopSublevel + 20
		wrote := make(chan error, 1)
		go func() {
			var err error
			for x := uint32(0); x < n && err == nil; x++ {
				err = errors.Join(writeNumbered(v, x, 0, 8), e.Flush())
			}
			wrote <- err
		}()
		time.Sleep(time.Minute)
		require.Empty(t, wrote)
		require.Equal(t, l0StopSublevel, int(e.db.Metrics().Levels[0].Sublevels))
		c.resume()
		require.NoError(t, <-wrote)
		p := make([]byte, trivet.BlockSize)
		require.NoError(t, v.ReadAt(p, 3))
		require.Equal(t, numbered(n-1, 3), p)
		require.NoError(t, e.Close())
	})
}

// A stall without damage is none of our business.
func TestStallAlone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var r rotten
		h := newHealth(r.config(vfs.NewMem()))
		h.opening.Store(false)
		defer h.compactions.Unregister()
		h.level0Waits(true)
		for range damageStuckN - 1 {
			h.compactionFailed(errors.New("x"))
		}
		h.level0Waits(false)
		h.compactionFailed(errors.New("x"))
		_, fatals := r.get()
		require.Empty(t, fatals)
		h.level0Waits(true)
		_, fatals = r.get()
		require.Len(t, fatals, 1)
	})
}

// Damage of long ago does not count.
func TestOldDamageIsForgotten(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCompactions()
		defer c.Unregister()
		for range 5 * damageStuckN {
			require.False(t, c.damaged())
			time.Sleep(damageForget)
		}
	})
}

// Compactions are granted up to what Pebble allows, however they end and whoever asks.
func TestCompactionsAreGranted(t *testing.T) {
	cfg := damageConfig(vfs.NewMem())
	e, v := mustStore(t, cfg, 4096)
	for x := range uint32(200) {
		require.NoError(t, writeNumbered(v, x, trivet.LBA(x%8)*16, 64))
		if x%4 == 0 {
			require.NoError(t, e.Flush())
		}
	}
	require.Eventually(t, func() bool {
		m := e.db.Metrics()
		e.health.compactions.mu.Lock()
		defer e.health.compactions.mu.Unlock() // one that is just being offered counts as running for a moment
		return m.Compact.NumInProgress == 0 && m.Levels[0].Sublevels < l0CompactSublevel &&
			e.health.compactions.running == 0
	}, time.Minute, time.Millisecond)
	require.NoError(t, e.Close())
}

// A table tells which volumes it may hold something of.
func TestTouched(t *testing.T) {
	block := func(id trivet.VolumeID) []byte { return appendBlockKey(nil, id, 1, 0) }
	for _, c := range []struct {
		lo, hi      []byte
		first, last trivet.VolumeID
	}{
		{block(3), block(3), 3, 3},
		{block(3), block(9), 3, 9},
		{appendJournalKey(nil, 4, 1), appendJournalKey(nil, 5, 1), 4, 5},
		{appendVolumeKey(nil, 4), appendVolumeKey(nil, 5), 4, 5},
		{appendVolumeKey(nil, 4), block(4), 0, volumeMax},
		{block(4), appendJournalKey(nil, 4, 1), 0, volumeMax},
		{[]byte{tableFormat}, []byte{tableFormat}, 0, volumeMax},
		{nil, nil, 0, volumeMax},
	} {
		first, last := touched(c.lo, c.hi)
		require.Equal(t, [2]trivet.VolumeID{c.first, c.last}, [2]trivet.VolumeID{first, last}, "%x to %x", c.lo, c.hi)
		d := DamageError{First: c.first, Last: c.last}
		require.Equal(t, c.first == 0, d.Touches(1))
		require.Equal(t, c.last == volumeMax, d.Touches(100))
		require.True(t, d.Touches(4) || c.last == 3)
	}
}

// panickyFS panics when a file is opened.
type panickyFS struct{ vfs.FS }

func (panickyFS) Open(string, ...vfs.OpenOption) (vfs.File, error) {
	panic("element has outstanding references")
}

// A panic of Pebble while it opens is a failed Open, after which the disk is free.
func TestPanicWhileOpening(t *testing.T) {
	mem := vfs.NewMem()
	e, v := mustStore(t, damageConfig(mem), 8)
	require.NoError(t, writeNumbered(v, 1, 0, 8))
	require.NoError(t, e.Close())
	_, err := Open(damageConfig(panickyFS{mem}))
	require.ErrorContains(t, err, "outstanding references")
	e, err = Open(damageConfig(mem))
	require.NoError(t, err)
	require.NoError(t, e.Close())
}

// fakeDB is what a scheduler sees of Pebble.
type fakeDB struct {
	mu      sync.Mutex
	allowed int
	waiting int
	begun   int
	asked   func() // called once, by GetWaitingCompaction, which then says that nothing waits
}

func (f *fakeDB) GetAllowedWithoutPermission() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.allowed
}

func (f *fakeDB) GetWaitingCompaction() (bool, pebble.WaitingCompaction) {
	f.mu.Lock()
	asked := f.asked
	f.asked = nil
	f.mu.Unlock()
	if asked != nil {
		asked()
		return false, pebble.WaitingCompaction{}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.waiting > 0, pebble.WaitingCompaction{}
}

func (f *fakeDB) Schedule(pebble.CompactionGrantHandle) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.waiting == 0 {
		return false
	}
	f.waiting--
	f.begun++
	return true
}

func (f *fakeDB) set(allowed, waiting int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.allowed, f.waiting = allowed, waiting
}

func (f *fakeDB) beganN() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.begun
}

// What was refused is begun as soon as it may: when another is done, when Pebble allows more, when a pause is over,
// and when the refusal came just while the scheduler looked for work.
func TestRefusedCompactionsBegin(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, db := newCompactions(), &fakeDB{allowed: 2}
		c.Register(2, db)
		try := func() bool {
			ok, _ := c.TrySchedule()
			return ok
		}
		require.True(t, try())
		require.True(t, try())
		require.False(t, try(), "two run")
		db.set(2, 3)
		c.Done()
		require.Equal(t, 1, db.beganN(), "one is done")
		require.False(t, try())
		db.set(3, 2)
		c.UpdateGetAllowedWithoutPermission()
		synctest.Wait()
		require.Equal(t, 2, db.beganN(), "one more is allowed")

		c.damaged()
		c.Done()
		require.False(t, try(), "a pause")
		require.Equal(t, 2, db.beganN(), "a pause")
		time.Sleep(damagePauseMin)
		synctest.Wait()
		require.Equal(t, 3, db.beganN(), "the pause is over")

		db.set(3, 0)
		db.mu.Lock()
		db.asked = func() { // Pebble finds work just then, and is refused for what the scheduler may find
			ok, _ := c.TrySchedule()
			require.False(t, ok)
			db.set(3, 1)
		}
		db.mu.Unlock()
		c.Done()
		require.Equal(t, 4, db.beganN(), "refused in between")
		c.Unregister()
		c.Done()
		db.set(9, 9)
		c.UpdateGetAllowedWithoutPermission()
		synctest.Wait()
		require.Equal(t, 4, db.beganN(), "after Unregister")
	})
}

// A table that the manifest names and that is not there is damage, and says so.
func TestMissingTableIsDamage(t *testing.T) {
	fs := vfs.NewMem()
	cfg := damageConfig(fs)
	e, v := mustStore(t, cfg, 64)
	require.NoError(t, writeNumbered(v, 1, 0, 64))
	require.NoError(t, e.Flush())
	require.NoError(t, e.Close())
	names, err := fs.List(cfg.Dir)
	require.NoError(t, err)
	removed := 0
	for _, name := range names {
		if strings.HasSuffix(name, ".sst") {
			require.NoError(t, fs.Remove(fs.PathJoin(cfg.Dir, name)))
			removed++
		}
	}
	require.Positive(t, removed)
	_, err = Open(damageConfig(fs))
	require.ErrorIs(t, err, trivet.ErrCorrupt)
}
