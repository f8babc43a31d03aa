package engine_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"sync"
	"testing"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/cockroachdb/pebble/v2/vfs/errorfs"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/engine"
)

// unsynced are the shares of data not synced that survive a crash, in per cent.
var unsynced = []int{0, 25, 50, 75, 100}

// crashed reopens what a crash at this moment leaves.
func crashed(fs *vfs.MemFS, percent int, rng *rand.Rand) (*engine.Engine, error) {
	return engine.Open(config(fs.CrashClone(vfs.CrashCloneCfg{UnsyncedDataPercent: percent, RNG: rng})))
}

// checkPrefix opens a crashed disk and checks that each volume is a whole prefix of its history, at
// least up to min and at most up to max.
func checkPrefix(e *engine.Engine, id trivet.VolumeID, h *history, atLeast, atMost uint64) error {
	v, err := e.OpenVolume(id)
	if err != nil {
		return err
	}
	applied := v.State().AppliedIndex
	if applied < atLeast || applied > atMost {
		return fmt.Errorf("%s is at index %d after the crash, want %d to %d", id, applied, atLeast, atMost)
	}
	if durable, err := v.DurableState(); err != nil || durable.AppliedIndex != applied {
		return fmt.Errorf("%s: durable index %d (%v) right after opening, want %d", id, durable.AppliedIndex, err, applied)
	}
	return errors.Join(h.check(v), engine.CheckLive(e))
}

// TestCrashBetweenCommits: after a crash at any moment, the blocks are those of the applied index
// (H2), and what DurableState promised is there (H1).
func TestCrashBetweenCommits(t *testing.T) {
	steps, blockN := 200, int64(64)
	if testing.Short() {
		steps = 80
	}
	rng := seeds(t, 1)
	fs := vfs.NewCrashableMem()
	e := mustOpen(t, fs)
	ids := []trivet.VolumeID{vol1, vol2}
	var hs []*history
	for _, id := range ids {
		mustVolume(t, e, id, blockN)
		hs = append(hs, newHistory(blockN))
	}
	var stamp uint32
	later := 0
	for range steps {
		k := rng.IntN(2)
		v, err := e.OpenVolume(ids[k])
		require.NoError(t, err)
		ops := randomOps(rng, blockN, &stamp)
		mustCommit(t, v, ops...)
		hs[k].add(ops...)
		if rng.IntN(30) == 0 {
			require.NoError(t, e.Flush())
			d, err := v.DurableState()
			require.NoError(t, err)
			require.Equal(t, v.State().AppliedIndex, d.AppliedIndex, "flushed")
		}
		if rng.IntN(3) > 0 {
			continue
		}
		var durable, applied [2]uint64
		for i, id := range ids {
			v, err := e.OpenVolume(id)
			require.NoError(t, err)
			d, err := v.DurableState()
			require.NoError(t, err)
			durable[i], applied[i] = d.AppliedIndex, v.State().AppliedIndex
		}
		for _, percent := range unsynced {
			e2, err := crashed(fs, percent, rng)
			require.NoError(t, err)
			for i, id := range ids {
				require.NoError(t, checkPrefix(e2, id, hs[i], durable[i], applied[i]), "%d %% unsynced kept", percent)
				if v2, err := e2.OpenVolume(id); err == nil && v2.State().AppliedIndex > 0 {
					later++
				}
			}
			require.NoError(t, e2.Close())
		}
	}
	require.Greater(t, later, steps/4, "hardly any crash found data: the test is void")
	requireRecycled(t, e)
}

// hook calls f before every change to a file system, on whatever goroutine makes it.
func hook(fs vfs.FS, f func(errorfs.Op)) vfs.FS {
	return errorfs.Wrap(fs, errorfs.InjectorFunc(func(op errorfs.Op) error {
		if op.Kind.ReadOrWrite() == errorfs.OpIsWrite {
			f(op)
		}
		return nil
	}))
}

// TestCrashAtEveryFileOperation takes the crash in the middle of flushes and compactions too.
func TestCrashAtEveryFileOperation(t *testing.T) {
	steps, blockN := 100, int64(48)
	if testing.Short() {
		steps = 30
	}
	rng, hookRNG := seeds(t, 2), seeds(t, 3)
	mem := vfs.NewCrashableMem()
	h := newHistory(blockN)
	var mu sync.Mutex // guards the following, and keeps the clones in order
	var durable, applied uint64
	var armed bool
	points := 0
	fs := hook(mem, func(op errorfs.Op) {
		mu.Lock()
		defer mu.Unlock()
		if !armed {
			return
		}
		percent := unsynced[points%len(unsynced)]
		points++
		e2, err := crashed(mem, percent, hookRNG)
		if err == nil {
			err = errors.Join(checkPrefix(e2, vol1, h, durable, applied+1), e2.Close())
		}
		if err != nil {
			t.Errorf("crash at %s of %s, %d %% unsynced kept: %v", kindName(op), op.Path, percent, err)
		}
	})
	e := mustOpen(t, fs)
	v := mustVolume(t, e, vol1, blockN)
	mu.Lock()
	armed = true
	mu.Unlock()
	var stamp uint32
	for i := range steps {
		ops := randomOps(rng, blockN, &stamp)
		h.add(ops...) // first: the hook may find it on disk before Commit returns
		mustCommit(t, v, ops...)
		if rng.IntN(10) == 0 {
			require.NoError(t, e.Flush())
		}
		d, err := v.DurableState()
		require.NoError(t, err)
		mu.Lock()
		durable, applied = d.AppliedIndex, uint64(i)+1
		mu.Unlock()
	}
	mu.Lock()
	defer mu.Unlock()
	armed = false
	t.Logf("%d crash points", points)
	require.Greater(t, points, steps)
	requireRecycled(t, e)
}

// requireRecycled checks that cleaning was at work: else a crash test says nothing of it.
func requireRecycled(t *testing.T, e *engine.Engine) {
	t.Helper()
	recycled, stored := int64(0), int64(0)
	for _, s := range engine.LogOf(e).Stats() {
		recycled += s.Recycled
		stored += s.StoredBytes
	}
	t.Logf("%d segments recycled, %d bytes moved by cleaning", recycled, stored)
	require.Positive(t, recycled)
	require.Positive(t, stored)
}

func kindName(op errorfs.Op) string { return fmt.Sprintf("operation %d", op.Kind) }

// source makes an image at index 1000 and the digest that a volume restored from it has.
func source(t *testing.T, blockN int64) (image []byte, digest [32]byte) {
	e := mustOpen(t, vfs.NewMem())
	v := filled(t, e, vol1, blockN, 77)
	st := v.State()
	st.AppliedIndex, st.Epoch = 1000, 9
	require.NoError(t, commitState(v, st))
	digest, err := v.Digest()
	require.NoError(t, err)
	return readAll(t, v), digest
}

// TestCrashDuringRestoreStream crashes at every 64 KiB of the stream: the mark must be on disk (H5).
func TestCrashDuringRestoreStream(t *testing.T) {
	image, digest := source(t, 400)
	rng := seeds(t, 4)
	mem := vfs.NewCrashableMem()
	e := mustOpen(t, mem)
	v := filled(t, e, vol1, 100, 5)
	points := 0
	r := &cutReader{r: bytes.NewReader(image), n: 64 << 10, before: func(read int) {
		if read == 0 {
			return // the header is not read yet, nothing has begun
		}
		points++
		e2, err := crashed(mem, unsynced[points%len(unsynced)], rng)
		require.NoError(t, err)
		defer func() { require.NoError(t, e2.Close()) }()
		requireRestoring(t, e2)
		if points%8 != 0 {
			return
		}
		v2, err := e2.OpenVolume(vol1)
		require.NoError(t, err)
		require.NoError(t, v2.Restore(bytes.NewReader(image)), "again, from the start")
		requireDigest(t, v2, digest)
	}}
	require.NoError(t, v.Restore(r))
	require.Greater(t, points, 15)
	requireDigest(t, v, digest)
	e2, err := crashed(mem, 0, rng)
	require.NoError(t, err)
	defer func() { require.NoError(t, e2.Close()) }()
	v2, err := e2.OpenVolume(vol1)
	require.NoError(t, err)
	requireDigest(t, v2, digest) // durable on return
}

// requireRestoring checks that nothing of vol1 can be used, though it is there.
func requireRestoring(t *testing.T, e *engine.Engine) {
	t.Helper()
	v, err := e.OpenVolume(vol1)
	require.NoError(t, err)
	require.True(t, v.Restoring())
	require.Zero(t, v.State().AppliedIndex)
	d, err := v.DurableState()
	require.NoError(t, err)
	require.Zero(t, d.AppliedIndex)
	require.ErrorIs(t, v.ReadAt(make([]byte, bs), 0), trivet.ErrUnavailable)
	_, err = v.Digest()
	require.ErrorIs(t, err, trivet.ErrUnavailable)
	_, err = v.Image(nil)
	require.ErrorIs(t, err, trivet.ErrUnavailable)
	st := v.State()
	st.AppliedIndex = 2000
	require.ErrorIs(t, commitState(v, st, op{0, 1, 1}), trivet.ErrUnavailable)
}

func requireDigest(t *testing.T, v *engine.Volume, want [32]byte) {
	t.Helper()
	require.False(t, v.Restoring())
	got, err := v.Digest()
	require.NoError(t, err)
	require.Equal(t, want, got)
}

// cutReader hands out n bytes at a time and calls before ahead of each.
type cutReader struct {
	r      io.Reader
	n      int
	read   int
	before func(read int)
}

func (c *cutReader) Read(p []byte) (int, error) {
	if c.read%c.n == 0 {
		c.before(c.read)
	}
	n, err := c.r.Read(p[:min(len(p), c.n-c.read%c.n)])
	c.read += n
	return n, err
}

// TestCrashAtEveryFileOperationOfRestore: at any point the volume is the old one, or marked, or the
// new one, and goes through these in this order.
func TestCrashAtEveryFileOperationOfRestore(t *testing.T) {
	image, digest := source(t, 400)
	rng := seeds(t, 5)
	mem := vfs.NewCrashableMem()
	var mu sync.Mutex
	var armed bool
	var oldDigest [32]byte
	var seen [3]int // old, marked, new
	stage, writes := 0, 0
	fs := hook(mem, func(op errorfs.Op) {
		mu.Lock()
		defer mu.Unlock()
		if op.Kind == errorfs.OpFileWrite {
			writes++
		}
		if !armed || op.Kind == errorfs.OpFileWrite && writes%8 != 0 { // what is not synced is lost here anyway
			return
		}
		now, err := restoreStage(mem, rng, oldDigest, digest)
		if err != nil || now < stage {
			t.Errorf("crash at %s of %s: stage %d after %d: %v", kindName(op), op.Path, now, stage, err)
			return
		}
		seen[now]++
		stage = now
	})
	e := mustOpen(t, fs)
	v := filled(t, e, vol1, 100, 5)
	require.NoError(t, e.Flush())
	var err error
	oldDigest, err = v.Digest()
	require.NoError(t, err)
	mu.Lock()
	armed = true
	mu.Unlock()
	require.NoError(t, v.Restore(bytes.NewReader(image)))
	mu.Lock()
	defer mu.Unlock()
	armed = false
	t.Logf("crashes found the old volume %d times, the mark %d, the new volume %d", seen[0], seen[1], seen[2])
	require.Positive(t, seen[0])
	require.Greater(t, seen[1], 10)
}

// restoreStage says what a crash now leaves: 0 the old volume, 1 the mark, 2 the new volume.
func restoreStage(mem *vfs.MemFS, rng *rand.Rand, before, after [32]byte) (stage int, err error) {
	e, err := crashed(mem, 0, rng) // with unsynced data, the order of two crashes at nearly one moment is open
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, e.Close()) }()
	v, err := e.OpenVolume(vol1)
	if err != nil {
		return 0, err
	}
	if v.Restoring() {
		return 1, nil
	}
	switch d, err := v.Digest(); {
	case err != nil:
		return 0, err
	case d == before:
		return 0, nil
	case d == after:
		return 2, nil
	default:
		return 0, errors.New("neither the old volume nor the new one")
	}
}

// A crash during a drop leaves the volume whole or not at all; a new one of that name is empty (S13).
func TestCrashDuringDrop(t *testing.T) {
	rng := seeds(t, 6)
	mem := vfs.NewCrashableMem()
	var mu sync.Mutex
	var armed bool
	seen := map[bool]int{}
	want := bytes32(300, 5)
	fs := hook(mem, func(op errorfs.Op) {
		mu.Lock()
		defer mu.Unlock()
		if !armed {
			return
		}
		e, err := crashed(mem, unsynced[len(seen)%len(unsynced)], rng)
		if err != nil {
			t.Error(err)
			return
		}
		v, err := e.OpenVolume(vol1)
		seen[err == nil]++
		if errors.Is(err, trivet.ErrNotFound) {
			if err = e.CreateVolume(vol1, "next", 300*bs); err == nil {
				v, err = e.OpenVolume(vol1)
				err = errors.Join(err, checkStamps(v, make([]uint32, 300)))
			}
		} else if err == nil {
			err = checkStamps(v, want)
		}
		if err := errors.Join(err, e.Close()); err != nil {
			t.Errorf("crash at %s of %s: %v", kindName(op), op.Path, err)
		}
	})
	e := mustOpen(t, fs)
	filled(t, e, vol1, 300, 5)
	require.NoError(t, e.Flush())
	mu.Lock()
	armed = true
	mu.Unlock()
	require.NoError(t, e.DropVolume(vol1))
	mu.Lock()
	defer mu.Unlock()
	armed = false
	require.Positive(t, seen[true])
}
