package engine

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"path"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/cockroachdb/pebble/v2/vfs/errorfs"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
)

const damagedID = trivet.VolumeID(0xd)

// numbered is a block that begins with x and ends with its LBA.
func numbered(x uint32, lba trivet.LBA) []byte {
	p := bytes.Repeat([]byte{byte(x), byte(x >> 8), 3, byte(lba)}, trivet.BlockSize/4)
	binary.BigEndian.PutUint32(p, x)
	return p
}

func damageConfig(fs vfs.FS) Config {
	// On a bad checksum Pebble tries which single bit would mend it: with table blocks of 16 KiB that
	// takes 0.1 s of CPU each time.
	return Config{FS: fs, Dir: "disk", CacheBytes: 1 << 20, MemTableBytes: 256 << 10, tableBlockBytes: 1 << 10}
}

func mustStore(t testing.TB, cfg Config, blockN int64) (*Engine, *Volume) {
	t.Helper()
	e, err := Open(cfg)
	require.NoError(t, err)
	require.NoError(t, e.CreateVolume(damagedID, "r", blockN*trivet.BlockSize))
	v, err := e.OpenVolume(damagedID)
	require.NoError(t, err)
	return e, v
}

// writeNumbered commits n blocks with the number x from lba on.
func writeNumbered(v *Volume, x uint32, lba, n trivet.LBA) error {
	b := v.NewBatch()
	for i := range n {
		if err := b.Write(lba+i, numbered(x, lba+i)); err != nil {
			return errors.Join(err, b.Close())
		}
	}
	st := v.State()
	st.AppliedIndex++
	return b.Commit(st)
}

// TestMisdirectedValue: a value that is whole, but stands under the key of another block or volume (H24).
func TestMisdirectedValue(t *testing.T) {
	var r rotten
	e, v := mustStore(t, r.config(vfs.NewMem()), 8)
	defer func() { require.NoError(t, e.Close()) }()
	told := func() (ids []trivet.VolumeID) {
		heard, _ := r.get()
		for _, d := range heard {
			require.Equal(t, d.First, d.Last)
			ids = append(ids, d.First)
		}
		return ids
	}
	require.NoError(t, e.CreateVolume(damagedID+1, "r", 8*trivet.BlockSize))
	other, err := e.OpenVolume(damagedID + 1)
	require.NoError(t, err)
	require.NoError(t, writeNumbered(v, 5, 0, 4))
	require.NoError(t, writeNumbered(other, 5, 0, 4))
	val, closer, err := e.db.Get(appendBlockKey(nil, damagedID, 1, 0))
	require.NoError(t, err)
	stray := bytes.Clone(val)
	require.NoError(t, closer.Close())
	require.NoError(t, e.db.Set(appendBlockKey(nil, damagedID, 2, 0), stray, pebble.NoSync))
	require.NoError(t, e.db.Set(appendBlockKey(nil, damagedID+1, 1, 0), stray, pebble.NoSync))
	tomb := make([]byte, valueHeadBytes)
	putTombstone(tomb, place(appendBlockKey(nil, damagedID, 5, 0)))
	require.NoError(t, e.db.Set(appendBlockKey(nil, damagedID, 3, 0), tomb, pebble.NoSync))

	p := make([]byte, trivet.BlockSize)
	require.NoError(t, v.ReadAt(p, 1))
	require.Equal(t, numbered(5, 1), p)
	for _, c := range []struct {
		v   *Volume
		lba trivet.LBA
	}{{v, 2}, {other, 1}, {v, 3}} {
		var be *BlockError
		err := c.v.ReadAt(p, c.lba)
		require.ErrorIs(t, err, trivet.ErrCorrupt)
		require.ErrorAs(t, err, &be)
		require.Equal(t, BlockError{c.v.ID(), c.lba, be.Stored, be.Actual, ""}, *be)
		require.NotEqual(t, be.Stored, be.Actual)
		require.ErrorContains(t, err, fmt.Sprintf("%08x", be.Stored))
		require.ErrorContains(t, err, fmt.Sprintf("%08x", be.Actual))
		require.Contains(t, told(), c.v.ID(), "the owner is told")
		require.ErrorIs(t, c.v.ReadAt(make([]byte, 4*trivet.BlockSize), 0), trivet.ErrCorrupt)
		_, err = c.v.Digest()
		require.ErrorIs(t, err, trivet.ErrCorrupt, "a scrub finds it")
		i, err := c.v.Image(nil)
		require.NoError(t, err)
		_, err = io.ReadAll(i)
		require.ErrorIs(t, err, trivet.ErrCorrupt, "it does not spread (H21)")
		require.NoError(t, i.Close())
	}
}

// An image whose source rots after it was pinned and counted.
func TestImageOfRottingBlockFails(t *testing.T) {
	mem := vfs.NewCrashableMem()
	e, v := mustStore(t, damageConfig(mem), 1024)
	for lba := trivet.LBA(0); lba < 1024; lba += 32 {
		require.NoError(t, writeNumbered(v, 9, lba, 32))
	}
	require.NoError(t, e.Flush())
	require.NoError(t, e.db.Compact(t.Context(), []byte{0}, []byte{0xff, 0xff}, false)) // from now on they stay
	require.NoError(t, e.Close())
	cfg := damageConfig(mem)
	cfg.CacheBytes = 1 // nothing stays in memory
	e, err := Open(cfg)
	require.NoError(t, err)
	defer func() { require.NoError(t, e.Close()) }()
	v, err = e.OpenVolume(damagedID)
	require.NoError(t, err)
	i, err := v.Image(nil)
	require.NoError(t, err)
	defer func() { require.NoError(t, i.Close()) }()
	for _, name := range tables(t, mem) {
		b, err := mem.UnsafeGetFileDataBuffer(name)
		require.NoError(t, err)
		for off := len(b) / 2; off < len(b)/2+64; off++ {
			b[off] ^= 0xff
		}
	}
	got, err := io.ReadAll(i)
	require.ErrorIs(t, err, trivet.ErrCorrupt)
	fresh, w := mustStore(t, damageConfig(vfs.NewMem()), 1)
	defer func() { require.NoError(t, fresh.Close()) }()
	require.ErrorIs(t, w.Restore(bytes.NewReader(got)), trivet.ErrCorrupt)
	require.True(t, w.Restoring())
}

func tables(t testing.TB, fs vfs.FS) (names []string) {
	t.Helper()
	list, err := fs.List("disk")
	require.NoError(t, err)
	for _, n := range list {
		if strings.HasSuffix(n, ".sst") {
			names = append(names, fs.PathJoin("disk", n))
		}
	}
	require.NotEmpty(t, names)
	return names
}

// TestBitFlips: one damaged byte anywhere in the tables never makes a wrong block (H22). A damaged
// manifest gives an error or an older state, whole (the caller's log check finds that, H4).
func TestBitFlips(t *testing.T) {
	flips := 150
	if testing.Short() {
		flips = 30
	}
	const blockN = 200
	mem := vfs.NewCrashableMem()
	e, v := mustStore(t, damageConfig(mem), blockN)
	var content []func(lba trivet.LBA) []byte // by applied index
	zero := func(trivet.LBA) []byte { return make([]byte, trivet.BlockSize) }
	content = append(content, zero)
	for x := uint32(1); x <= 12; x++ {
		lba := trivet.LBA(x-1) * 15
		require.NoError(t, writeNumbered(v, x, lba, 20))
		before := content[len(content)-1]
		content = append(content, func(l trivet.LBA) []byte {
			if l >= lba && l < lba+20 {
				return numbered(x, l)
			}
			return before(l)
		})
		if x%3 == 0 {
			require.NoError(t, e.Flush())
		}
	}
	require.NoError(t, e.Close())
	rng := rand.New(rand.NewPCG(7, 7))
	t.Log("seed 7")
	names := tables(t, mem)
	list, err := mem.List("disk")
	require.NoError(t, err)
	for _, n := range list {
		if strings.HasPrefix(n, "MANIFEST") {
			names = append(names, mem.PathJoin("disk", n))
		}
	}
	found := 0
	for range flips {
		clone := mem.CrashClone(vfs.CrashCloneCfg{})
		name := names[rng.IntN(len(names))]
		b, err := clone.UnsafeGetFileDataBuffer(name)
		require.NoError(t, err)
		off := rng.IntN(len(b))
		b[off] ^= byte(1 << rng.IntN(8))
		wrong, seen := readDamaged(t, clone, content)
		require.NoError(t, wrong, "byte %d of %s", off, path.Base(name))
		if seen {
			found++
		}
	}
	t.Logf("%d of %d flips were met by a reader", found, flips)
	require.Greater(t, found, flips/2)
}

// readDamaged reads everything; wrong tells of a block that is not what it should be, seen whether
// the damage was noticed.
func readDamaged(t *testing.T, fs vfs.FS, content []func(trivet.LBA) []byte) (wrong error, seen bool) {
	var heard atomic.Int32
	cfg := damageConfig(fs)
	cfg.Fatal = func(err error) { t.Errorf("fatal: %v", err) }
	cfg.OnCorruption = func(err error) {
		if !errors.Is(err, trivet.ErrCorrupt) {
			t.Errorf("not an ErrCorrupt: %v", err)
		}
		heard.Add(1)
	}
	e, err := Open(cfg)
	if err != nil {
		return nil, true
	}
	defer func() {
		if err := e.Close(); err != nil {
			seen = true
		}
		seen = seen || heard.Load() > 0
	}()
	v, err := e.OpenVolume(damagedID)
	if err != nil {
		if !isAny(err, trivet.ErrCorrupt, trivet.ErrNotFound) {
			return err, true
		}
		return nil, true
	}
	applied := v.State().AppliedIndex
	seen = applied != uint64(len(content)-1)
	want := content[applied]
	p := make([]byte, trivet.BlockSize)
	for lba := range trivet.LBA(v.State().SizeBytes / trivet.BlockSize) {
		switch err := v.ReadAt(p, lba); {
		case errors.Is(err, trivet.ErrCorrupt):
			seen = true
		case err != nil:
			return err, true
		case !bytes.Equal(p, want(lba)):
			return fmt.Errorf("block %d at index %d: %x, want %x", lba, applied, p[:8], want(lba)[:8]), true
		}
	}
	if _, err := v.Digest(); err == nil {
		seen = false || seen
	} else if !errors.Is(err, trivet.ErrCorrupt) {
		return err, true
	} else {
		seen = true
	}
	return nil, seen
}

// failing injects an error into every operation of the given kinds on files whose name contains part,
// once armed, from the nth on.
type failing struct {
	part  string
	kinds []errorfs.OpKind
	nth   int32

	armed atomic.Bool
	n     atomic.Int32
	hit   atomic.Bool
}

func (f *failing) MaybeError(op errorfs.Op) error {
	if !f.armed.Load() || !strings.Contains(path.Base(op.Path), f.part) {
		return nil
	}
	for _, k := range f.kinds {
		if op.Kind == k && f.n.Add(1) > f.nth {
			f.hit.Store(true)
			return errorfs.ErrInjected
		}
	}
	return nil
}

func (f *failing) String() string { return "failing " + f.part }

// TestWriteErrors: whichever write of a table fails, Fatal is called once, nothing is acknowledged
// afterwards, and reads and the disk are those of whole batches (H28).
func TestWriteErrors(t *testing.T) {
	kinds := []errorfs.OpKind{
		errorfs.OpCreate, errorfs.OpFileWrite, errorfs.OpFileSync, errorfs.OpFileSyncData,
		errorfs.OpFileSyncTo, errorfs.OpFileClose,
	}
	hits := 0
	for nth := int32(0); nth < 40; nth += 3 {
		f := &failing{part: ".sst", kinds: kinds, nth: nth}
		mem := vfs.NewCrashableMem()
		cfg := damageConfig(errorfs.Wrap(mem, f))
		var mu sync.Mutex
		var fatal []error
		cfg.Fatal = func(err error) {
			mu.Lock()
			defer mu.Unlock()
			fatal = append(fatal, err)
		}
		e, v := mustStore(t, cfg, 64)
		f.armed.Store(true)
		x, err := uint32(0), error(nil)
		var durable uint64
		for x < 200 && err == nil {
			x++
			if err = writeNumbered(v, x, trivet.LBA(x%4)*16, 16); err != nil {
				break
			}
			if x%3 == 0 {
				err = e.Flush()
			}
			if d, derr := v.DurableState(); derr == nil {
				durable = d.AppliedIndex
			}
		}
		require.Equal(t, f.hit.Load(), err != nil, "nth %d", nth)
		if err == nil {
			require.NoError(t, e.Close())
			continue
		}
		hits++
		require.ErrorIs(t, err, errorfs.ErrInjected)
		require.ErrorIs(t, writeNumbered(v, 1000, 0, 1), errorfs.ErrInjected)
		require.ErrorIs(t, e.Flush(), errorfs.ErrInjected)
		_, err = v.DurableState()
		require.ErrorIs(t, err, errorfs.ErrInjected)
		require.ErrorIs(t, e.CreateVolume(3, "r", trivet.BlockSize), errorfs.ErrInjected)
		applied := v.State().AppliedIndex
		requireNumbered(t, v, applied)
		require.ErrorIs(t, e.Close(), errorfs.ErrInjected)
		mu.Lock()
		require.Len(t, fatal, 1, "once")
		require.ErrorIs(t, fatal[0], errorfs.ErrInjected)
		mu.Unlock()

		e, err = Open(damageConfig(mem.CrashClone(vfs.CrashCloneCfg{})))
		require.NoError(t, err)
		v, err = e.OpenVolume(damagedID)
		require.NoError(t, err)
		require.GreaterOrEqual(t, v.State().AppliedIndex, durable)
		require.LessOrEqual(t, v.State().AppliedIndex, applied)
		requireNumbered(t, v, v.State().AppliedIndex)
		require.NoError(t, e.Close())
	}
	require.Greater(t, hits, 5)
}

// requireNumbered checks the content after the first `applied` commits of TestWriteErrors.
func requireNumbered(t *testing.T, v *Volume, applied uint64) {
	t.Helper()
	p := make([]byte, trivet.BlockSize)
	for lba := range trivet.LBA(64) {
		x := applied
		for x > 0 && trivet.LBA(x%4) != lba/16 {
			x--
		}
		want := make([]byte, trivet.BlockSize)
		if x > 0 {
			want = numbered(uint32(x), lba)
		}
		require.NoError(t, v.ReadAt(p, lba))
		require.Equal(t, want[:8], p[:8], "block %d at index %d", lba, applied)
	}
}

// TestManifestErrorIsFatal: Pebble calls Fatalf and must not be returned to; the owner of this engine
// ends the goroutine instead of the process.
func TestManifestErrorIsFatal(t *testing.T) {
	f := &failing{part: "MANIFEST", kinds: []errorfs.OpKind{errorfs.OpFileSync, errorfs.OpFileSyncData}}
	mem := vfs.NewCrashableMem()
	cfg := damageConfig(errorfs.Wrap(mem, f))
	calls := make(chan error, 8)
	cfg.Fatal = func(err error) {
		calls <- err
		runtime.Goexit()
	}
	e, v := mustStore(t, cfg, 64)
	require.NoError(t, writeNumbered(v, 1, 16, 16))
	require.NoError(t, e.Flush())
	f.armed.Store(true)
	if err := writeNumbered(v, 2, 32, 16); err != nil { // a compaction may have met it first
		require.ErrorIs(t, err, errorfs.ErrInjected)
	}
	require.ErrorIs(t, e.Flush(), errorfs.ErrInjected)
	require.ErrorIs(t, writeNumbered(v, 3, 48, 16), errorfs.ErrInjected)
	require.ErrorIs(t, <-calls, errorfs.ErrInjected) // Flush may have been quicker to tell
	require.Empty(t, calls)
	// The engine is left as it stands, as by the end of a process.
	e, err := Open(damageConfig(mem.CrashClone(vfs.CrashCloneCfg{})))
	require.NoError(t, err)
	v, err = e.OpenVolume(damagedID)
	require.NoError(t, err)
	require.Equal(t, uint64(1), v.State().AppliedIndex)
	requireNumbered(t, v, 1)
	require.NoError(t, e.Close())
}

// Damage met by a compaction is reported and survived; any other background error is the end.
func TestBackgroundErrors(t *testing.T) {
	var fatal, corrupt []error
	h := newHealth(Config{
		Fatal:        func(err error) { fatal = append(fatal, err) },
		OnCorruption: func(err error) { corrupt = append(corrupt, err) },
	})
	h.opening.Store(false)
	l := h.listener()
	l.BackgroundError(fmt.Errorf("compaction: %w", pebble.ErrCorruption))
	l.DataCorruption(pebble.DataCorruptionInfo{Path: "000001.sst", Details: pebble.ErrCorruption})
	require.Len(t, corrupt, 2)
	require.ErrorIs(t, corrupt[0], trivet.ErrCorrupt)
	require.ErrorContains(t, corrupt[1], "000001.sst")
	require.NoError(t, h.check())
	for range 3 {
		l.BackgroundError(errorfs.ErrInjected)
	}
	require.Len(t, fatal, 1)
	require.ErrorIs(t, h.check(), errorfs.ErrInjected)
}

func TestFatalfNeverReturns(t *testing.T) {
	calls := 0
	h := newHealth(Config{Fatal: func(error) { calls++ }})
	h.opening.Store(false)
	cause := errors.New("cause")
	require.PanicsWithError(t, "engine: commit: cause", func() { h.Fatalf("commit: %v", cause) })
	returned := false
	var wg sync.WaitGroup
	wg.Go(func() {
		h.Fatalf("again")
		returned = true
	})
	wg.Wait()
	require.False(t, returned)
	require.Equal(t, 1, calls)
	require.ErrorIs(t, h.check(), cause)
}

// A disk that fails while it opens is an error of Open, not the end of the process, and can be opened
// once it is well again.
func TestOpenFails(t *testing.T) {
	for _, part := range []string{"MANIFEST", "marker", "dbtmp", ".sst"} {
		f := &failing{part: part, kinds: []errorfs.OpKind{errorfs.OpCreate, errorfs.OpFileSync, errorfs.OpFileSyncData}}
		cfg := damageConfig(errorfs.Wrap(vfs.NewMem(), f))
		cfg.Logger = slog.New(slowHandler{slog.DiscardHandler}) // the failing goroutine is late to let go of the lock
		f.armed.Store(true)
		_, err := Open(cfg)
		require.ErrorIs(t, err, errorfs.ErrInjected, part)
		f.armed.Store(false)
		e, err := Open(cfg)
		require.NoError(t, err, part)
		require.NoError(t, e.Close())
	}
}

// slowHandler takes its time over each error.
type slowHandler struct{ slog.Handler }

func (slowHandler) Enabled(_ context.Context, l slog.Level) bool { return l >= slog.LevelError }

func (slowHandler) Handle(context.Context, slog.Record) error {
	time.Sleep(5 * time.Millisecond)
	return nil
}

// A disk that is full when Pebble writes its manifest, at any moment from the beginning of Open, is an
// error of Open or of a later call. It never ends the process by a panic on a goroutine of Pebble's, such as
// the flush that Open begins.
func TestOpenOnAFullDisk(t *testing.T) {
	mem := vfs.NewCrashableMem()
	_, v := mustStore(t, damageConfig(mem), 64)
	for i := range 200 {
		require.NoError(t, writeNumbered(v, uint32(i), trivet.LBA(i%64), 1))
	}
	opened := 0
	for k := int32(0); k < 20; k++ {
		var writes atomic.Int32
		full := errorfs.InjectorFunc(func(op errorfs.Op) error {
			manifest := strings.Contains(op.Path, "MANIFEST")
			if manifest && (op.Kind == errorfs.OpFileWrite || op.Kind == errorfs.OpCreate) {
				if n := writes.Add(1); n > k && n < 1<<20 {
					return syscall.ENOSPC
				}
			}
			return nil
		})
		fs := mem.CrashClone(vfs.CrashCloneCfg{})
		cfg := damageConfig(errorfs.Wrap(fs, full))
		cfg.Fatal = func(error) {}
		e, err := Open(cfg)
		if err != nil {
			continue
		}
		opened++
		writes.Store(1 << 20) // there is room again
		_ = e.Close()         // its last flush may have failed before
	}
	require.Positive(t, opened, "20 writes are more than opening takes")
	require.Less(t, opened, 20)
}

// Pebble's record of its options has no checksum. Whatever byte of it rots, the store opens or is called damaged: a
// failure without a name would be tried again for ever.
func TestRottenOptions(t *testing.T) {
	mem := vfs.NewCrashableMem()
	e, _ := mustStore(t, damageConfig(mem), 4)
	require.NoError(t, e.Close())
	var path string
	var text []byte
	dir := damageConfig(mem).Dir
	names, err := mem.List(dir)
	require.NoError(t, err)
	for _, name := range names {
		if strings.HasPrefix(name, "OPTIONS-") {
			path = mem.PathJoin(dir, name)
			f, err := mem.Open(path)
			require.NoError(t, err)
			text, err = io.ReadAll(f)
			require.NoError(t, err)
			require.NoError(t, f.Close())
		}
	}
	require.NotEmpty(t, text)
	refused := 0
	for i := range text {
		fs := mem.CrashClone(vfs.CrashCloneCfg{UnsyncedDataPercent: 100, RNG: rand.New(rand.NewPCG(1, 2))})
		rotten := bytes.Clone(text)
		rotten[i] ^= 1 << (i % 8)
		f, err := fs.Create(path, vfs.WriteCategoryUnspecified)
		require.NoError(t, err)
		_, err = f.Write(rotten)
		require.NoError(t, err)
		require.NoError(t, f.Close())
		e, err := Open(damageConfig(fs))
		if err != nil {
			require.ErrorIs(t, err, trivet.ErrCorrupt, "byte %d of %q", i, text)
			refused++
			continue
		}
		require.NoError(t, e.Close())
	}
	require.Positive(t, refused)
}

// A store of the future, or of somebody else, is left alone.
func TestForeignStores(t *testing.T) {
	for name, c := range map[string]struct {
		key, value []byte
		err        error
	}{
		"newer":          {[]byte{tableFormat}, appendStoreFormat(nil, storeVersion+1), trivet.ErrInvalid},
		"damaged record": {[]byte{tableFormat}, []byte("????????????"), trivet.ErrCorrupt},
		"no record":      {[]byte{tableVolume, 1}, []byte("x"), trivet.ErrCorrupt},
	} {
		fs := vfs.NewMem()
		require.NoError(t, fs.MkdirAll("disk", 0o700))
		db, err := pebble.Open("disk", options(damageConfig(fs), newHealth(Config{})))
		require.NoError(t, err)
		require.NoError(t, db.Set(c.key, c.value, pebble.NoSync))
		require.NoError(t, db.Flush())
		require.NoError(t, db.Close())
		_, err = Open(damageConfig(fs))
		require.ErrorIs(t, err, c.err, name)
		db, err = pebble.Open("disk", options(damageConfig(fs), newHealth(Config{})))
		require.NoError(t, err, "the lock is free")
		v, closer, err := db.Get(c.key)
		require.NoError(t, err)
		require.Equal(t, c.value, v)
		require.NoError(t, closer.Close())
		require.NoError(t, db.Close())
	}
}

// A damaged record takes its own volume down, no other (H38); dropping it still works.
func TestDamagedRecord(t *testing.T) {
	e, _ := mustStore(t, damageConfig(vfs.NewMem()), 8)
	defer func() { require.NoError(t, e.Close()) }()
	require.NoError(t, e.CreateVolume(1, "r", trivet.BlockSize))
	val, closer, err := e.db.Get(appendVolumeKey(nil, damagedID))
	require.NoError(t, err)
	stray := bytes.Clone(val)
	require.NoError(t, closer.Close())
	require.NoError(t, e.db.Set(appendVolumeKey(nil, 1), stray, pebble.NoSync)) // of another volume
	_, err = e.OpenVolume(1)
	require.ErrorIs(t, err, trivet.ErrCorrupt)
	require.ErrorIs(t, e.CreateVolume(1, "r", trivet.BlockSize), trivet.ErrCorrupt)
	ids, err := e.Volumes()
	require.NoError(t, err)
	require.Equal(t, []trivet.VolumeID{1, damagedID}, ids)
	require.NoError(t, e.DropVolume(1))
	require.NoError(t, e.CreateVolume(1, "r", trivet.BlockSize))
}

// A drop leaves no key behind, or the space would never come back.
func TestDropLeavesNothing(t *testing.T) {
	e, v := mustStore(t, damageConfig(vfs.NewMem()), 64)
	defer func() { require.NoError(t, e.Close()) }()
	require.NoError(t, writeNumbered(v, 1, 0, 64))
	require.NoError(t, e.DropVolume(damagedID))
	it, err := e.db.NewIter(&pebble.IterOptions{LowerBound: []byte{tableVolume}})
	require.NoError(t, err)
	require.False(t, it.First(), "key %x", it.Key())
	require.NoError(t, it.Close())
}
