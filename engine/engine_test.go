package engine_test

import (
	"bytes"
	"io"
	"math"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/engine"
)

func TestConfigValidate(t *testing.T) {
	for name, cfg := range map[string]engine.Config{
		"no dir":         {},
		"negative cache": {Dir: "d", CacheBytes: -1},
		"huge memtable":  {Dir: "d", MemTableBytes: math.MaxInt64},
	} {
		_, err := engine.Open(cfg)
		require.ErrorIs(t, err, trivet.ErrInvalid, name)
	}
}

// On a real filesystem, with the sizes of production.
func TestReopenOnDisk(t *testing.T) {
	cfg := engine.Config{Dir: t.TempDir() + "/a/b"}
	e, err := engine.Open(cfg)
	require.NoError(t, err)
	_, err = engine.Open(cfg)
	require.ErrorIs(t, err, trivet.ErrInUse, "one engine per disk (I9)")
	v := mustVolume(t, e, vol1, 8)
	mustCommit(t, v, op{1, 2, 5})
	u, err := e.Usage()
	require.NoError(t, err)
	assert.Positive(t, u.FreeBytes)
	assert.Greater(t, u.TotalBytes, u.ReserveBytes)
	require.NoError(t, e.Close())
	require.NoError(t, e.Close(), "idempotent")

	e, err = engine.Open(cfg)
	require.NoError(t, err)
	v, err = e.OpenVolume(vol1)
	require.NoError(t, err)
	require.NoError(t, checkStamps(v, []uint32{0, 5, 5, 0, 0, 0, 0, 0}), "Close flushes")
	assert.Equal(t, trivet.ReplicaID("replica-1"), v.Replica())
	require.NoError(t, e.Close())
}

func TestCreateOpenDrop(t *testing.T) {
	fs := vfs.NewCrashableMem()
	e := mustOpen(t, fs)
	_, err := e.OpenVolume(vol1)
	require.ErrorIs(t, err, trivet.ErrNotFound)
	for name, c := range map[string]struct {
		id      trivet.VolumeID
		replica trivet.ReplicaID
		size    int64
	}{
		"meta group":    {trivet.MetaGroup, "r", bs},
		"no replica":    {vol1, "", bs},
		"long replica":  {vol1, trivet.ReplicaID(make([]byte, 256)), bs},
		"no size":       {vol1, "r", 0},
		"half a block":  {vol1, "r", bs / 2},
		"too large":     {vol1, "r", trivet.VolumeSizeMax + bs},
		"negative size": {vol1, "r", -bs},
	} {
		require.ErrorIs(t, e.CreateVolume(c.id, c.replica, c.size), trivet.ErrInvalid, name)
	}
	require.NoError(t, e.CreateVolume(vol2, "r", trivet.VolumeSizeMax))
	v := mustVolume(t, e, vol1, 8)
	require.ErrorIs(t, e.CreateVolume(vol1, "other", 8*bs), trivet.ErrExists)
	again, err := e.OpenVolume(vol1)
	require.NoError(t, err)
	require.Same(t, v, again, "one shared handle")
	ids, err := e.Volumes()
	require.NoError(t, err)
	require.Equal(t, []trivet.VolumeID{vol1, vol2}, ids)

	// Created and dropped volumes survive a crash at once.
	e2 := mustOpen(t, fs.CrashClone(vfs.CrashCloneCfg{}))
	ids, err = e2.Volumes()
	require.NoError(t, err)
	require.Equal(t, []trivet.VolumeID{vol1, vol2}, ids)
	require.NoError(t, e.DropVolume(vol1))
	e3 := mustOpen(t, fs.CrashClone(vfs.CrashCloneCfg{}))
	ids, err = e3.Volumes()
	require.NoError(t, err)
	require.Equal(t, []trivet.VolumeID{vol2}, ids)
}

func TestDroppedHandle(t *testing.T) {
	e := mustOpen(t, vfs.NewMem())
	v := mustVolume(t, e, vol1, 8)
	mustCommit(t, v, op{0, 8, 1})
	b := v.NewBatch()
	require.NoError(t, b.Write(3, block(2, 3)))
	st := v.State()
	require.NoError(t, e.DropVolume(vol1))
	require.ErrorIs(t, b.Commit(st), trivet.ErrNotFound, "a late batch must not bring the volume back")
	require.ErrorIs(t, v.ReadAt(make([]byte, bs), 0), trivet.ErrNotFound)
	require.ErrorIs(t, v.NewBatch().Commit(st), trivet.ErrNotFound)
	_, err := v.DurableState()
	require.ErrorIs(t, err, trivet.ErrNotFound)
	_, err = v.Digest()
	require.ErrorIs(t, err, trivet.ErrNotFound)
	_, err = v.Image(nil)
	require.ErrorIs(t, err, trivet.ErrNotFound)
	require.ErrorIs(t, v.Restore(bytes.NewReader(nil)), trivet.ErrNotFound)
	ids, err := e.Volumes()
	require.NoError(t, err)
	require.Empty(t, ids)
	require.NoError(t, checkStamps(mustVolume(t, e, vol1, 8), make([]uint32, 8)), "S13")
	require.ErrorIs(t, v.ReadAt(make([]byte, bs), 0), trivet.ErrNotFound, "the old handle stays dead")
}

func TestReadAtRanges(t *testing.T) {
	e := mustOpen(t, vfs.NewMem())
	v := mustVolume(t, e, vol1, 8)
	require.NoError(t, v.ReadAt(nil, 8))
	require.ErrorIs(t, v.ReadAt(make([]byte, bs), 8), trivet.ErrOutOfRange)
	require.ErrorIs(t, v.ReadAt(make([]byte, 2*bs), 7), trivet.ErrOutOfRange)
	require.ErrorIs(t, v.ReadAt(make([]byte, bs), math.MaxUint64), trivet.ErrOutOfRange)
	require.ErrorIs(t, v.ReadAt(make([]byte, 100), 0), trivet.ErrInvalid)
	// p is filled, whatever it held.
	mustCommit(t, v, op{2, 1, 1}, op{5, 1, 2})
	p := bytes.Repeat([]byte{0xaa}, 8*bs)
	require.NoError(t, v.ReadAt(p, 0))
	for i, stamp := range []uint32{0, 0, 1, 0, 0, 2, 0, 0} {
		require.Equal(t, block(stamp, trivet.LBA(i)), p[i*bs:(i+1)*bs])
	}
}

func TestBatchRules(t *testing.T) {
	e := mustOpen(t, vfs.NewMem())
	v := mustVolume(t, e, vol1, 8)
	b := v.NewBatch()
	second := v.NewBatch()
	require.ErrorIs(t, second.Write(0, block(1, 0)), trivet.ErrInUse)
	require.ErrorIs(t, second.Commit(v.State()), trivet.ErrInUse)
	require.ErrorIs(t, v.Restore(bytes.NewReader(nil)), trivet.ErrInUse)
	require.ErrorIs(t, b.Write(0, make([]byte, 100)), trivet.ErrInvalid)
	require.ErrorIs(t, b.Write(math.MaxUint64, block(1, 0)), trivet.ErrOutOfRange)
	require.ErrorIs(t, b.Zero(1, -1), trivet.ErrInvalid)
	require.ErrorIs(t, b.Zero(1, math.MaxInt64), trivet.ErrOutOfRange)
	require.NoError(t, b.Write(0, block(1, 0)))
	st := v.State()
	st.AppliedIndex, st.Session, st.Config = 4, []byte("s"), []byte("c")
	require.NoError(t, b.Commit(st))
	st.Session[0] = 'x'
	got := v.State()
	require.Equal(t, []byte("s"), got.Session, "Commit copies")
	got.Config[0] = 'x'
	require.Equal(t, []byte("c"), v.State().Config, "State copies")
	require.ErrorIs(t, b.Commit(v.State()), trivet.ErrClosed)
	require.ErrorIs(t, b.Write(0, block(1, 0)), trivet.ErrClosed)
	require.NoError(t, b.Close())

	third := v.NewBatch()
	require.NoError(t, b.Close(), "closing the old one again")
	require.ErrorIs(t, v.NewBatch().Commit(v.State()), trivet.ErrInUse, "does not end the new one")
	require.NoError(t, third.Close())
	st = v.State()
	st.Session = make([]byte, engine.StateBytesMax+1)
	require.ErrorIs(t, commitState(v, st), trivet.ErrInvalid)
	require.NoError(t, commit(v), "the volume is still usable")
}

// Zero hits its blocks and no neighbour, whether it takes points, a range or tombstones (H18).
func TestZeroBoundaries(t *testing.T) {
	const blockN = 300
	for gen := range trivet.Generation(2) {
		e := mustOpen(t, vfs.NewMem())
		v := filled(t, e, vol1, blockN, 1)
		st := v.State()
		st.Generation = gen
		require.NoError(t, commitState(v, st))
		want := bytes32(blockN, 1)
		for i, n := range []int64{1, 2, 63, 64, 65, 250, blockN} {
			lba := min(int64(20-i), blockN-n)
			mustCommit(t, v, op{trivet.LBA(lba), n, 0})
			clear(want[lba : lba+n])
			require.NoError(t, checkStamps(v, want), "generation %d: %d blocks at %d", gen, n, lba)
			mustCommit(t, v, op{0, blockN, uint32(i) + 2})
			want = bytes32(blockN, uint32(i)+2)
			// All-zero data is Zero by another name.
			b := v.NewBatch()
			require.NoError(t, b.Write(trivet.LBA(lba), make([]byte, n*bs)))
			require.NoError(t, b.Commit(v.State()))
			clear(want[lba : lba+n])
			require.NoError(t, checkStamps(v, want), "generation %d: %d zero blocks at %d", gen, n, lba)
		}
	}
}

// A discard of a huge volume is one tombstone, however much it hides.
func TestHugeDiscardIsCheap(t *testing.T) {
	e := mustOpen(t, vfs.NewMem())
	v := mustVolume(t, e, vol1, trivet.VolumeSizeMax/bs)
	last := trivet.LBA(trivet.VolumeSizeMax/bs - 1)
	mustCommit(t, v, op{0, 100, 1}, op{last, 1, 2})
	mustCommit(t, v, op{1, int64(last) - 1, 0})
	mustCommit(t, v, op{0, int64(last) + 1, 0}, op{last, 1, 3})
	p := make([]byte, bs)
	for lba, stamp := range map[trivet.LBA]uint32{0: 0, 50: 0, last: 3} {
		require.NoError(t, v.ReadAt(p, lba))
		require.Equal(t, block(stamp, lba), p)
	}
}

func TestUsedBytesComeBack(t *testing.T) {
	e := mustOpen(t, vfs.NewMem())
	v := mustVolume(t, e, vol1, 1024)
	mustCommit(t, v, op{0, 1024, 1})
	require.NoError(t, e.Flush())
	n, err := v.UsedBytes()
	require.NoError(t, err)
	assert.InDelta(t, 1024*bs, n, 256*bs)
	other := mustVolume(t, e, vol2, 8)
	n, err = other.UsedBytes()
	require.NoError(t, err)
	assert.Less(t, n, int64(64*bs))
}

// Closing under readers, a writer, a restore and an image: all end, nothing breaks.
func TestCloseWhileBusy(t *testing.T) {
	cfg := config(vfs.NewMem())
	e, err := engine.Open(cfg)
	require.NoError(t, err)
	v := mustVolume(t, e, vol1, 64)
	mustCommit(t, v, op{0, 64, 1})
	image, err := v.Image(nil)
	require.NoError(t, err)
	w := mustVolume(t, e, vol2, 64)
	var wg sync.WaitGroup
	started := make(chan struct{}, 3)
	untilClosed := func(f func() error) {
		wg.Go(func() {
			for i := 0; ; i++ {
				if err := f(); err != nil {
					assert.ErrorIs(t, err, trivet.ErrClosed)
					return
				}
				if i == 0 {
					started <- struct{}{}
				}
			}
		})
	}
	untilClosed(func() error { return v.ReadAt(make([]byte, 64*bs), 0) })
	untilClosed(func() error { return commit(v, op{1, 8, 2}) })
	untilClosed(func() error {
		i, err := v.Image(nil)
		if err != nil {
			return err
		}
		defer i.Close() //nolint:errcheck // the engine closes under it
		return w.Restore(i)
	})
	for range 3 {
		<-started
	}
	require.NoError(t, e.Close())
	wg.Wait()
	_, err = io.ReadAll(image)
	require.ErrorIs(t, err, trivet.ErrClosed)
	require.NoError(t, image.Close())
	require.ErrorIs(t, e.Flush(), trivet.ErrClosed)
	require.False(t, e.HasRoom(0))
}

func TestReserveAndHasRoom(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fs := vfs.NewMem()
		e := mustOpen(t, fs)
		require.True(t, e.HasRoom(math.MaxInt64), "a filesystem that cannot tell has no limit")
		_, err := e.Usage()
		require.ErrorIs(t, err, vfs.ErrUnsupported)
		for _, c := range []struct{ total, reserve int64 }{
			{1 << 30, 1 << 30 / 10},     // small: a tenth
			{30 << 30, 2 << 30},         // 2 GiB
			{1 << 40, (1 << 40) / 20},   // 5 %
			{20 << 30, 20 << 30 / 10},   // where a tenth is 2 GiB
			{40 << 30, (40 << 30) / 20}, // where 5 % is 2 GiB
		} {
			fs.TestingSetDiskUsage(vfs.DiskUsage{TotalBytes: uint64(c.total), AvailBytes: uint64(c.total)})
			u, err := e.Usage()
			require.NoError(t, err)
			require.Equal(t, engine.Usage{TotalBytes: c.total, FreeBytes: c.total, ReserveBytes: c.reserve}, u)
		}
		const total, free = 1 << 30, 120 << 20
		fs.TestingSetDiskUsage(vfs.DiskUsage{TotalBytes: total, AvailBytes: free})
		require.True(t, e.HasRoom(math.MaxInt64), "looked less than a second ago")
		time.Sleep(time.Second) //nolint:forbidigo // virtual time
		const room = free - total/10
		require.False(t, e.HasRoom(room+1))
		require.True(t, e.HasRoom(room-8<<20), "what waits in memory is less than 8 MiB here")
		v := mustVolume(t, e, vol1, 1<<20)
		for lba := trivet.LBA(0); e.HasRoom(1 << 20); lba += 256 {
			require.Less(t, lba, trivet.LBA(room/bs), "writes use up the room though the clock stands")
			mustCommit(t, v, op{lba, 256, 1})
		}
		require.NoError(t, commit(v, op{0, 1 << 19, 0}), "a discard needs no room")
		fs.TestingSetDiskUsage(vfs.DiskUsage{TotalBytes: total, AvailBytes: total})
		time.Sleep(time.Second) //nolint:forbidigo // virtual time
		require.True(t, e.HasRoom(1<<20), "space came back, without a restart")
	})
}

func TestRestoreRefusesWithoutRoom(t *testing.T) {
	fs := vfs.NewMem()
	e := mustOpen(t, fs)
	image := readAll(t, filled(t, e, vol1, 512, 7))
	v := mustVolume(t, e, vol2, 8)
	mustCommit(t, v, op{0, 8, 9})
	fs2 := vfs.NewMem()
	fs2.TestingSetDiskUsage(vfs.DiskUsage{TotalBytes: 100 << 20, AvailBytes: 11 << 20})
	e2 := mustOpen(t, fs2)
	v2 := mustVolume(t, e2, vol2, 8)
	mustCommit(t, v2, op{0, 8, 9})
	require.ErrorIs(t, v2.Restore(bytes.NewReader(image)), trivet.ErrNoSpace)
	require.False(t, v2.Restoring())
	require.NoError(t, checkStamps(v2, bytes32(8, 9)), "nothing was touched")
	require.NoError(t, v.Restore(bytes.NewReader(image)), "the same where there is room")
}

// bytes32 is n stamps.
func bytes32(n int, stamp uint32) []uint32 {
	s := make([]uint32, n)
	for i := range s {
		s[i] = stamp
	}
	return s
}

// filled makes a volume of n blocks with a stamp in all of them.
func filled(t testing.TB, e *engine.Engine, id trivet.VolumeID, n int64, stamp uint32) *engine.Volume {
	t.Helper()
	v := mustVolume(t, e, id, n)
	for lba := int64(0); lba < n; lba += 32 {
		mustCommit(t, v, op{trivet.LBA(lba), min(32, n-lba), stamp})
	}
	return v
}

// readAll reads an image of v.
func readAll(t testing.TB, v *engine.Volume) []byte {
	t.Helper()
	i, err := v.Image(nil)
	require.NoError(t, err)
	defer func() { require.NoError(t, i.Close()) }()
	b, err := io.ReadAll(i)
	require.NoError(t, err)
	return b
}
