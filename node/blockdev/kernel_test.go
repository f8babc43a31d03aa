package blockdev_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime/pprof"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/internal/faultdev"
	"github.com/trivet-csi/trivet/node/blockdev"
)

// needKernel skips unless this process can make FUSE mounts and loop devices.
func needKernel(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root, to mount and to set up loop devices")
	}
	for _, path := range []string{"/dev/fuse", "/dev/loop-control"} {
		if f, err := os.OpenFile(path, os.O_RDWR, 0); err != nil {
			t.Skipf("needs %s: %v", path, err)
		} else {
			require.NoError(t, f.Close())
		}
	}
}

// needPrograms skips unless the programs are installed.
func needPrograms(t *testing.T, names ...string) {
	t.Helper()
	for _, name := range names {
		if _, err := exec.LookPath(name); err != nil {
			t.Skipf("needs the program %s", name)
		}
	}
}

// run runs a program and returns what it printed; a failure stops the test.
func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := tryRun(t, name, args...)
	require.NoError(t, err, "%s %s:\n%s", name, strings.Join(args, " "), out)
	return out
}

func tryRun(t *testing.T, name string, args ...string) (string, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), 2*time.Minute)
	defer cancel()
	out, err := exec.CommandContext(ctx, name, args...).CombinedOutput()
	return string(out), err
}

// attached is an attachment of a faulty memory Device, detached when the test ends.
type attached struct {
	*blockdev.Attachment
	dev    *faultdev.Device
	mem    *faultdev.Mem
	runDir string
}

func attach(t *testing.T, sizeBytes int64) attached {
	t.Helper()
	needKernel(t)
	mem := faultdev.NewMem(sizeBytes)
	a := attached{mem: mem, dev: faultdev.Wrap(mem), runDir: t.TempDir()}
	var err error
	a.Attachment, err = blockdev.Attach(t.Context(), blockdev.Config{
		Name: "vol-test", RunDir: a.runDir, Device: a.dev,
	})
	require.NoError(t, err)
	t.Cleanup(func() {
		a.dev.Heal()
		detachHard(t, a)
	})
	return a
}

// detachHard detaches whatever state a failed test left.
func detachHard(t *testing.T, a attached) {
	t.Helper()
	ctx := context.WithoutCancel(t.Context())
	err := a.Detach(ctx)
	if errors.Is(err, trivet.ErrInUse) {
		_, _ = tryRun(t, "sh", "-c", "grep '^"+a.Path()+" ' /proc/mounts | cut -d' ' -f2 | xargs -r umount -l")
		err = a.Detach(ctx)
	}
	if err != nil { // the last resort: end the connection and free the rest with it
		_ = unix.Unmount(filepath.Join(a.runDir, "vol-test", "device"), unix.MNT_FORCE)
		err = a.Detach(ctx)
	}
	require.NoError(t, err)
	requireNothingLeft(t, a.runDir)
}

// requireNothingLeft checks that no loop device, mount or file under runDir is left.
func requireNothingLeft(t *testing.T, runDir string) {
	t.Helper()
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	require.NoError(t, err)
	require.NotContains(t, string(mounts), runDir)
	files, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	require.NoError(t, err)
	for _, f := range files {
		b, _ := os.ReadFile(f) // may go meanwhile: others use loop devices too
		require.NotContains(t, string(b), runDir, f)
	}
	entries, err := os.ReadDir(runDir)
	require.NoError(t, err)
	require.Empty(t, entries)
}

// requireNoGoroutines checks that none of the package's goroutines is left. A test must not run
// in parallel with others to use it.
func requireNoGoroutines(t *testing.T) {
	t.Helper()
	require.Eventually(t, func() bool {
		var b bytes.Buffer
		_ = pprof.Lookup("goroutine").WriteTo(&b, 1)
		return !strings.Contains(b.String(), "node/blockdev.(")
	}, time.Minute, 10*time.Millisecond)
}

// openDirect opens a block device for direct I/O.
func openDirect(t *testing.T, path string) *os.File {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR|unix.O_DIRECT, 0)
	require.NoError(t, err)
	t.Cleanup(func() { _ = f.Close() })
	return f
}

// aligned returns n page-aligned bytes, as direct I/O wants them.
func aligned(t *testing.T, n int) []byte {
	t.Helper()
	b, err := unix.Mmap(-1, 0, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	require.NoError(t, err)
	t.Cleanup(func() { _ = unix.Munmap(b) })
	return b
}

func TestAttachReadWriteDetach(t *testing.T) {
	a := attach(t, 64<<20)
	require.NoError(t, a.Err())
	f := openDirect(t, a.Path())
	buf := aligned(t, 1<<20)
	for i := range buf {
		buf[i] = byte(i >> 8)
	}
	_, err := f.WriteAt(buf, 3<<20)
	require.NoError(t, err)
	got := make([]byte, len(buf))
	require.NoError(t, a.mem.ReadAt(t.Context(), got, 3<<20))
	require.True(t, bytes.Equal(buf, got), "the device below holds what was written")
	clear(buf)
	_, err = f.ReadAt(buf, 3<<20)
	require.NoError(t, err)
	require.True(t, bytes.Equal(buf, got))
	end, err := f.Seek(0, io.SeekEnd)
	require.NoError(t, err)
	require.EqualValues(t, 64<<20, end)
	require.NoError(t, f.Close())

	require.NoError(t, a.Detach(t.Context()))
	requireNothingLeft(t, a.runDir)
	requireNoGoroutines(t)
	require.ErrorIs(t, a.Err(), trivet.ErrClosed)
	require.NoError(t, a.Detach(t.Context()), "detach of the detached")
}
