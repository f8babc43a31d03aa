package blockdev_test

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/internal/faultdev"
	"github.com/trivet-csi/trivet/internal/faultdev/devtest"
	"github.com/trivet-csi/trivet/node/blockdev"
)

// kernelDevice is a block device as a trivet.Device, so that the whole way through the kernel
// and back can be held against the model.
type kernelDevice struct {
	t         *testing.T
	f         *os.File
	sizeBytes int64
}

func (k kernelDevice) Size() int64 { return k.sizeBytes }

func (k kernelDevice) ReadAt(_ context.Context, p []byte, off int64) error {
	return k.io(p, off, func(b []byte) error {
		_, err := k.f.ReadAt(b, off)
		copy(p, b)
		return err
	})
}

func (k kernelDevice) WriteAt(_ context.Context, p []byte, off int64) error {
	return k.io(p, off, func(b []byte) error {
		copy(b, p)
		_, err := k.f.WriteAt(b, off)
		return err
	})
}

func (k kernelDevice) io(p []byte, off int64, do func([]byte) error) error {
	if err := trivet.CheckRange(off, int64(len(p)), k.sizeBytes); err != nil || len(p) == 0 {
		return err
	}
	b, err := unix.Mmap(-1, 0, len(p), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return err
	}
	return errors.Join(do(b), unix.Munmap(b))
}

func (k kernelDevice) Discard(_ context.Context, off, n int64) error {
	if off < 0 || n < 0 {
		return trivet.ErrInvalid
	}
	first, blocksN := trivet.AlignInwards(off, n)
	if blocksN == 0 {
		return nil
	}
	return k.rangeIoctl(unix.BLKDISCARD, int64(first)*trivet.BlockSize, blocksN*trivet.BlockSize)
}

func (k kernelDevice) WriteZeroes(_ context.Context, off, n int64) error {
	if err := trivet.CheckRange(off, n, k.sizeBytes); err != nil || n == 0 {
		return err
	}
	return k.rangeIoctl(blkZeroOut, off, n)
}

func (k kernelDevice) Flush(context.Context) error { return k.f.Sync() }

const blkZeroOut = 0x127f // BLKZEROOUT, linux/fs.h

func (k kernelDevice) rangeIoctl(req uint, off, n int64) error {
	return ioctlRange(k.f, req, [2]uint64{uint64(off), uint64(n)})
}

func TestKernelPathConforms(t *testing.T) {
	a := attach(t, 32<<20)
	dev := kernelDevice{t: t, f: openDirect(t, a.Path()), sizeBytes: 32 << 20}
	devtest.TestDevice(t, dev)
	require.Positive(t, a.dev.Count(faultdev.Discard))
	require.Positive(t, a.dev.Count(faultdev.WriteZeroes))
	require.NoError(t, dev.f.Close())
}

// TestPageCacheStaysCoherent uses buffered I/O of every length and place: the kernel's page
// cache must read, merge and write back whole blocks.
func TestPageCacheStaysCoherent(t *testing.T) {
	const span = 4 << 20
	a := attach(t, 16<<20)
	f, err := os.OpenFile(a.Path(), os.O_RDWR, 0)
	require.NoError(t, err)
	defer func() { _ = f.Close() }()
	model := make([]byte, span)
	rng := rand.New(rand.NewPCG(1, 2))
	for range 300 {
		p := make([]byte, 1+rng.IntN(100_000))
		for i := range p {
			p[i] = byte(rng.Uint32())
		}
		off := rng.IntN(span - len(p))
		_, err := f.WriteAt(p, int64(off))
		require.NoError(t, err)
		copy(model[off:], p)
	}
	require.NoError(t, f.Sync())
	got := make([]byte, span)
	require.NoError(t, a.mem.ReadAt(t.Context(), got, 0))
	require.True(t, bytes.Equal(model, got))
}

func TestFsyncIsFlush(t *testing.T) {
	a := attach(t, 16<<20)
	f := openDirect(t, a.Path())
	buf := aligned(t, 4096)
	a.dev.Forget()
	for i := range 20 {
		_, err := f.WriteAt(buf, int64(i)*4096)
		require.NoError(t, err)
		require.NoError(t, f.Sync())
	}
	require.Equal(t, 20, a.dev.Count(faultdev.Flush))
	// A flush never starts before the writes it covers have returned.
	writesN := 0
	for _, op := range a.dev.Ops() {
		switch op.Kind {
		case faultdev.Write:
			writesN++
		case faultdev.Flush:
			require.Positive(t, writesN)
			writesN = 0
		}
	}
	require.NoError(t, f.Close())
}

func TestFailedFlushIsSeen(t *testing.T) {
	a := attach(t, 16<<20)
	f := openDirect(t, a.Path())
	_, err := f.WriteAt(aligned(t, 4096), 0)
	require.NoError(t, err)
	a.dev.Inject(faultdev.Fault{Match: faultdev.OfKind(faultdev.Flush), Err: trivet.ErrUnavailable})
	require.ErrorIs(t, f.Sync(), unix.EIO)
	require.ErrorIs(t, f.Sync(), unix.EIO, "H14: the second too")
	require.NoError(t, a.Err(), "a failed flush alone does not kill the attachment")
	require.NoError(t, f.Close())
	require.ErrorIs(t, a.Detach(t.Context()), trivet.ErrUnavailable, "detach must not claim that all is flushed")
	a.dev.Heal()
	require.NoError(t, a.Detach(t.Context()))
	requireNothingLeft(t, a.runDir)
}

func TestErrnoOfWrites(t *testing.T) {
	a := attach(t, 16<<20)
	f := openDirect(t, a.Path())
	buf := aligned(t, 4096)
	for _, c := range []struct {
		err  error
		want error
	}{{trivet.ErrNoSpace, unix.ENOSPC}, {trivet.ErrUnavailable, unix.EIO}, {trivet.ErrCorrupt, unix.EIO}} {
		a.dev.Inject(faultdev.Fault{Match: faultdev.OfKind(faultdev.Write), Times: 1, Err: c.err})
		_, err := f.WriteAt(buf, 0)
		require.ErrorIs(t, err, c.want, "%v", c.err)
		_, err = f.WriteAt(buf, 0)
		require.NoError(t, err)
		a.dev.Heal()
	}
	require.NoError(t, f.Close())
}

// TestBlockedRequestsDoNotBlockOthers holds as many writes as the kernel sends at once.
func TestBlockedRequestsDoNotBlockOthers(t *testing.T) {
	const heldN = 40
	a := attach(t, 16<<20)
	f := openDirect(t, a.Path())
	gate := a.dev.Hold(faultdev.Touches(0, 1<<20))
	buf := aligned(t, 4096)
	var wg sync.WaitGroup
	errs := make([]error, heldN)
	for i := range heldN {
		wg.Go(func() { _, errs[i] = f.WriteAt(buf, int64(i)*8192) }) // with gaps: the kernel merges neighbours
	}
	for range heldN {
		<-gate.Arrived()
	}
	other := openDirect(t, a.Path())
	_, err := other.ReadAt(aligned(t, 1<<20), 8<<20)
	require.NoError(t, err, "reads elsewhere")
	_, err = other.WriteAt(aligned(t, 1<<20), 8<<20)
	require.NoError(t, err, "long writes elsewhere")
	require.NoError(t, other.Sync(), "a flush covers completed writes only, so it need not wait")
	a.mem.Grow(24 << 20)
	require.NoError(t, a.Grow(t.Context()), "the file is stat'ed meanwhile")
	gate.Open()
	wg.Wait()
	require.NoError(t, errors.Join(errs...))
	require.NoError(t, f.Close())
	require.NoError(t, other.Close())
}

func TestGrow(t *testing.T) {
	a := attach(t, 16<<20)
	require.NoError(t, a.Grow(t.Context()), "nothing to grow")
	a.mem.Grow(48 << 20)
	require.NoError(t, a.Grow(t.Context()))
	require.Equal(t, "50331648\n", run(t, "blockdev", "--getsize64", a.Path()))
	f := openDirect(t, a.Path())
	_, err := f.WriteAt(aligned(t, 4096), 48<<20-4096)
	require.NoError(t, err)
	_, err = f.WriteAt(aligned(t, 4096), 48<<20)
	require.Error(t, err)
	require.NoError(t, f.Close())
	require.NoError(t, a.Detach(t.Context()))
	require.ErrorIs(t, a.Grow(t.Context()), trivet.ErrClosed)
}

func TestFencedIsDeadForGood(t *testing.T) {
	a := attach(t, 16<<20)
	f := openDirect(t, a.Path())
	buf := aligned(t, 4096)
	a.dev.Inject(faultdev.Fault{Match: faultdev.OfKind(faultdev.Write), Times: 1, Err: trivet.ErrFenced})
	_, err := f.WriteAt(buf, 0)
	require.ErrorIs(t, err, unix.EIO)
	require.ErrorIs(t, a.Err(), trivet.ErrFenced)
	before := len(a.dev.Ops())
	_, err = f.WriteAt(buf, 4096)
	require.ErrorIs(t, err, unix.EIO, "although the device would serve it")
	_, err = f.ReadAt(buf, 8192)
	require.ErrorIs(t, err, unix.EIO)
	require.ErrorIs(t, f.Sync(), unix.EIO)
	require.Len(t, a.dev.Ops(), before, "nothing more reaches the device")
	require.NoError(t, f.Close())
	require.NoError(t, a.Detach(t.Context()), "a dead attachment goes without a flush")
	requireNothingLeft(t, a.runDir)
}

// TestFencedWithDirtyPages: pages that can no longer be written must not keep Detach.
func TestFencedWithDirtyPages(t *testing.T) {
	a := attach(t, 16<<20)
	f, err := os.OpenFile(a.Path(), os.O_RDWR, 0)
	require.NoError(t, err)
	_, err = f.WriteAt(make([]byte, 1<<20), 0)
	require.NoError(t, err)
	a.dev.Inject(faultdev.Fault{Err: trivet.ErrFenced})
	_ = f.Close() // may report the loss, or not
	require.NoError(t, a.Detach(t.Context()))
	requireNothingLeft(t, a.runDir)
	requireNoGoroutines(t)
}

// TestDetachWritesBack is one half of H30: nothing stays in the kernel.
func TestDetachWritesBack(t *testing.T) {
	a := attach(t, 16<<20)
	f, err := os.OpenFile(a.Path(), os.O_RDWR, 0)
	require.NoError(t, err)
	want := bytes.Repeat([]byte{7}, 1<<20)
	_, err = f.WriteAt(want, 4096)
	require.NoError(t, err)
	require.NoError(t, f.Close())
	require.NoError(t, a.Detach(t.Context()))
	ops := a.dev.Ops()
	require.Equal(t, faultdev.Flush, ops[len(ops)-1].Kind, "the last thing the device sees is a flush")
	got := make([]byte, 1<<20)
	require.NoError(t, a.mem.ReadAt(t.Context(), got, 4096))
	require.True(t, bytes.Equal(want, got))
}

// TestReattachReadsFresh is the other half of H30: what another node wrote meanwhile is seen.
func TestReattachReadsFresh(t *testing.T) {
	needKernel(t)
	mem, runDir := faultdev.NewMem(16<<20), t.TempDir()
	for i := range 10 {
		want := bytes.Repeat([]byte{byte(i + 1)}, 1<<20)
		require.NoError(t, mem.WriteAt(t.Context(), want, 0))
		a, err := blockdev.Attach(t.Context(), blockdev.Config{Name: "v", RunDir: runDir, Device: mem})
		require.NoError(t, err)
		got, err := os.ReadFile(a.Path()) // buffered: fills the page cache
		require.NoError(t, a.Detach(t.Context()))
		require.NoError(t, err)
		require.True(t, bytes.Equal(want, got[:1<<20]), "round %d", i)
	}
	requireNothingLeft(t, runDir)
}

func TestDetachRefusesWhileOpen(t *testing.T) {
	a := attach(t, 16<<20)
	f := openDirect(t, a.Path())
	require.ErrorIs(t, a.Detach(t.Context()), trivet.ErrInUse)
	require.NoError(t, a.Err())
	_, err := f.WriteAt(aligned(t, 4096), 0)
	require.NoError(t, err, "the refusal must not disturb the user")
	require.NoError(t, f.Close())
	require.Equal(t, "0\n", readFile(t, "/sys/block/"+filepath.Base(a.Path())+"/loop/autoclear"),
		"and the device must not vanish with its user")
	require.NoError(t, a.Detach(t.Context()))
	requireNothingLeft(t, a.runDir)
}

func TestDetachRefusesWhileBoundToAPod(t *testing.T) {
	a := attach(t, 16<<20)
	target := filepath.Join(t.TempDir(), "block volume") // with a blank: mountinfo escapes it
	require.NoError(t, os.WriteFile(target, nil, 0o600))
	require.NoError(t, unix.Mount(a.Path(), target, "", unix.MS_BIND, ""))
	t.Cleanup(func() { _ = unix.Unmount(target, unix.MNT_DETACH) })
	require.ErrorIs(t, a.Detach(t.Context()), trivet.ErrInUse)
	require.NoError(t, unix.Unmount(target, 0))
	require.NoError(t, a.Detach(t.Context()))
}

func TestDetachTwoAtOnceAndEndedContext(t *testing.T) {
	a := attach(t, 16<<20)
	gate := a.dev.Hold(faultdev.OfKind(faultdev.Flush))
	ctx, cancel := context.WithCancel(t.Context())
	errc := make(chan error, 2)
	go func() { errc <- a.Detach(ctx) }()
	<-gate.Arrived()
	go func() { errc <- a.Detach(t.Context()) }()
	cancel()
	require.ErrorIs(t, <-errc, context.Canceled)
	gate.Open()
	require.NoError(t, <-errc, "the second joins the first")
	requireNothingLeft(t, a.runDir)
	requireNoGoroutines(t)
}

func TestAttachTwice(t *testing.T) {
	a := attach(t, 16<<20)
	_, err := blockdev.Attach(t.Context(), blockdev.Config{Name: "vol-test", RunDir: a.runDir, Device: a.mem})
	require.ErrorIs(t, err, trivet.ErrInUse)
	cleaned, err := blockdev.Cleanup(t.Context(), a.runDir, nil)
	require.NoError(t, err)
	require.Empty(t, cleaned, "this process lives")
	_, err = openDirect(t, a.Path()).ReadAt(aligned(t, 4096), 0)
	require.NoError(t, err)
}

// Many attach and detach at once, and take loop devices that others are giving back.
func TestAttachMany(t *testing.T) {
	needKernel(t)
	runDir := t.TempDir()
	var wg sync.WaitGroup
	errs := make([]error, 6)
	for i := range errs {
		wg.Go(func() {
			for range 20 {
				a, err := blockdev.Attach(t.Context(), blockdev.Config{
					Name: trivet.VolumeID(i + 1).String(), RunDir: runDir, Device: faultdev.NewMem(int64(i+1) << 20),
				})
				if err == nil {
					err = a.Detach(t.Context())
				}
				if errs[i] = err; err != nil {
					return
				}
			}
		})
	}
	wg.Wait()
	require.NoError(t, errors.Join(errs...))
	requireNothingLeft(t, runDir)
}

func TestAttachLeavesNothingOnFailure(t *testing.T) {
	needKernel(t)
	runDir := t.TempDir()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err := blockdev.Attach(ctx, blockdev.Config{Name: "v", RunDir: runDir, Device: faultdev.NewMem(1 << 20)})
	require.ErrorIs(t, err, context.Canceled)
	requireNothingLeft(t, runDir)
	requireNoGoroutines(t)
}

// TestConnectionCut: an administrator, or the watchdog of the kernel, aborts the connection.
func TestConnectionCut(t *testing.T) {
	a := attach(t, 16<<20)
	f := openDirect(t, a.Path())
	err := unix.Unmount(filepath.Join(a.runDir, "vol-test", "device"), unix.MNT_FORCE)
	require.ErrorIs(t, err, unix.EBUSY)
	_, err = f.WriteAt(aligned(t, 4096), 0)
	require.ErrorIs(t, err, unix.EIO)
	require.Eventually(t, func() bool { return a.Err() != nil }, time.Minute, time.Millisecond)
	require.NotErrorIs(t, a.Err(), trivet.ErrClosed)
	require.NoError(t, f.Close())
	require.NoError(t, a.Detach(t.Context()))
	requireNothingLeft(t, a.runDir)
	requireNoGoroutines(t)
}

// TestFileItself: what the loop device never does, a program might do to the file below it.
func TestFileItself(t *testing.T) {
	a := attach(t, 16<<20)
	point := filepath.Join(a.runDir, "vol-test", "device")
	f, err := os.OpenFile(point, os.O_RDWR, 0)
	require.NoError(t, err)
	defer func() { _ = f.Close() }()
	_, err = f.WriteAt(make([]byte, 100), 0)
	require.ErrorIs(t, err, unix.EINVAL, "unaligned")
	_, err = f.ReadAt(make([]byte, 100), 0)
	require.ErrorIs(t, err, unix.EINVAL, "unaligned")
	_, err = f.WriteAt(make([]byte, 4096), 16<<20)
	require.ErrorIs(t, err, unix.EINVAL, "past the end")
	n, err := f.ReadAt(make([]byte, 8192), 16<<20-4096)
	require.Equal(t, 4096, n)
	require.ErrorContains(t, err, "EOF")
	require.ErrorIs(t, f.Truncate(0), unix.EPERM)
	require.ErrorIs(t, os.Chmod(point, 0o777), unix.EPERM)
	require.NoError(t, os.Chtimes(point, time.Now(), time.Now()), "harmless")
	require.ErrorIs(t, unix.Fallocate(int(f.Fd()), 0, 0, 4096), unix.EINVAL)
	require.NoError(t, unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 1, 8192))
	require.ErrorIs(t, a.Detach(t.Context()), trivet.ErrInUse, "the file is open")
}

func TestConfigValidate(t *testing.T) {
	t.Parallel()
	good := blockdev.Config{Name: "vol-1", RunDir: "/run/x", Device: faultdev.NewMem(4096)}
	require.NoError(t, good.Validate())
	for name, change := range map[string]func(*blockdev.Config){
		"no name":       func(c *blockdev.Config) { c.Name = "" },
		"path":          func(c *blockdev.Config) { c.Name = "../x" },
		"hidden":        func(c *blockdev.Config) { c.Name = ".x" },
		"relative dir":  func(c *blockdev.Config) { c.RunDir = "run" },
		"no device":     func(c *blockdev.Config) { c.Device = nil },
		"odd size":      func(c *blockdev.Config) { c.Device = sized(4095) },
		"empty device":  func(c *blockdev.Config) { c.Device = sized(0) },
		"long name":     func(c *blockdev.Config) { c.Name = strings.Repeat("x", 200) },
		"leading minus": func(c *blockdev.Config) { c.Name = "-rf" },
	} {
		c := good
		change(&c)
		require.ErrorIs(t, c.Validate(), trivet.ErrInvalid, name)
		_, err := blockdev.Attach(t.Context(), c)
		require.ErrorIs(t, err, trivet.ErrInvalid, name)
	}
}

// sized is a Device of any size.
type sizedDevice struct {
	trivet.Device
	n int64
}

func (s sizedDevice) Size() int64 { return s.n }

func sized(n int64) trivet.Device { return sizedDevice{n: n} }

func readFile(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	require.NoError(t, err)
	return string(b)
}
