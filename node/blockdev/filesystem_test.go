package blockdev_test

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/internal/faultdev"
)

// filesystems and how to make and check them.
var filesystems = []struct {
	name, mkfs string
	mkfsArgs   []string
	check      string
	checkArgs  []string
	sizeBytes  int64
}{
	{"ext4", "mkfs.ext4", []string{"-q", "-F", "-m0"}, "fsck.ext4", []string{"-f", "-n"}, 64 << 20},
	{"xfs", "mkfs.xfs", []string{"-q", "-f"}, "xfs_repair", []string{"-n"}, 320 << 20},
}

// mount mounts the attachment on a new directory, which goes with the test.
func mount(t *testing.T, a attached, fstype string) string {
	t.Helper()
	dir := t.TempDir()
	require.NoError(t, unix.Mount(a.Path(), dir, fstype, 0, ""))
	t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
	return dir
}

func TestFilesystems(t *testing.T) {
	for _, fs := range filesystems {
		t.Run(fs.name, func(t *testing.T) {
			needPrograms(t, fs.mkfs, fs.check, "fstrim")
			a := attach(t, fs.sizeBytes)
			run(t, fs.mkfs, append(fs.mkfsArgs, a.Path())...)
			dir := mount(t, a, fs.name)

			sums := map[string][32]byte{}
			a.dev.Forget()
			for i := range 20 {
				path, data := filepath.Join(dir, fmt.Sprintf("f%d", i)), bytes.Repeat([]byte{byte(i), 1, 2}, 100_000)
				f, err := os.Create(path)
				require.NoError(t, err)
				_, err = f.Write(data)
				require.NoError(t, err)
				require.NoError(t, f.Sync())
				require.NoError(t, f.Close())
				sums[path] = sha256.Sum256(data)
			}
			require.GreaterOrEqual(t, a.dev.Count(faultdev.Flush), 20, "each fsync is at least one flush")
			require.ErrorIs(t, a.Detach(t.Context()), trivet.ErrInUse, "mounted")

			require.NoError(t, os.Remove(filepath.Join(dir, "f0")))
			delete(sums, filepath.Join(dir, "f0"))
			a.dev.Forget()
			run(t, "fstrim", dir)
			require.Positive(t, a.dev.Count(faultdev.Discard))
			require.NoError(t, unix.Unmount(dir, 0))

			require.NoError(t, unix.Mount(a.Path(), dir, fs.name, 0, ""))
			for path, want := range sums {
				data, err := os.ReadFile(path)
				require.NoError(t, err)
				require.Equal(t, want, sha256.Sum256(data), path)
			}
			require.NoError(t, unix.Unmount(dir, 0))
			run(t, fs.check, append(fs.checkArgs, a.Path())...)
			require.NoError(t, a.Detach(t.Context()))
			requireNothingLeft(t, a.runDir)
			requireNoGoroutines(t)
		})
	}
}

func TestDiscardAndZeroing(t *testing.T) {
	needPrograms(t, "blkdiscard")
	a := attach(t, 64<<20)
	require.NoError(t, a.mem.WriteAt(t.Context(), bytes.Repeat([]byte{1}, 64<<20), 0))
	a.dev.Forget()
	run(t, "blkdiscard", "-o", "1048576", "-l", "2097152", a.Path())
	require.Equal(t, 1, a.dev.Count(faultdev.Discard))
	run(t, "blkdiscard", "-z", "-o", "8388608", "-l", "1048576", a.Path())
	require.Positive(t, a.dev.Count(faultdev.WriteZeroes))
	require.Equal(t, 1, a.dev.Count(faultdev.Discard), "explicit zeroing is no hint")
	got := make([]byte, 64<<20)
	require.NoError(t, a.mem.ReadAt(t.Context(), got, 0))
	want := bytes.Repeat([]byte{1}, 64<<20)
	clear(want[1<<20 : 3<<20])
	clear(want[8<<20 : 9<<20])
	require.True(t, bytes.Equal(want, got))

	a.dev.Forget()
	run(t, "blkdiscard", "-f", a.Path())
	require.Equal(t, 1, a.dev.Count(faultdev.Discard), "a whole device is one request")
	require.NoError(t, a.mem.ReadAt(t.Context(), got, 0))
	require.True(t, bytes.Equal(make([]byte, 64<<20), got))
}

func TestQueueLimits(t *testing.T) {
	a := attach(t, 16<<20)
	queue := "/sys/block/" + filepath.Base(a.Path()) + "/queue/"
	for name, want := range map[string]string{
		"logical_block_size": "4096\n", "physical_block_size": "4096\n", "discard_granularity": "4096\n",
		"write_cache": "write back\n", // so that the kernel sends flushes
	} {
		require.Equal(t, want, readFile(t, queue+name), name)
	}
	loop := "/sys/block/" + filepath.Base(a.Path()) + "/loop/"
	require.Equal(t, "1\n", readFile(t, loop+"dio"), "direct I/O is what keeps the data from being cached twice")
	require.Equal(t, "0\n", readFile(t, loop+"autoclear"))
}

// TestNoPageCacheBelow is H30's root: the FUSE file itself never has pages in the cache, even
// when somebody switches the loop device to buffered I/O.
func TestNoPageCacheBelow(t *testing.T) {
	needPrograms(t, "losetup")
	a := attach(t, 16<<20)
	run(t, "losetup", "--direct-io=off", a.Path())
	f := openDirect(t, a.Path())
	buf := aligned(t, 1<<20)
	for i := range buf {
		buf[i] = 1
	}
	_, err := f.WriteAt(buf, 0)
	require.NoError(t, err)
	_, err = f.ReadAt(buf, 0)
	require.NoError(t, err)
	// The device below changes; a cached page would hide it.
	require.NoError(t, a.mem.WriteZeroes(t.Context(), 0, 1<<20))
	_, err = f.ReadAt(buf, 0)
	require.NoError(t, err)
	require.True(t, bytes.Equal(make([]byte, 1<<20), buf))
	require.NoError(t, f.Close())
}

// TestFioVerifies keeps many requests of all lengths under way, with flushes and trims among
// them, and checks the checksum of every block.
func TestFioVerifies(t *testing.T) {
	needPrograms(t, "fio")
	a := attach(t, 32<<20)
	run(t, "fio", "--name=x", "--filename="+a.Path(), "--ioengine=libaio", "--direct=1", "--rw=randrw",
		"--bsrange=4k-1m", "--bs_unaligned=0", "--blockalign=4k", "--iodepth=32", "--size=32m", "--fsync=16",
		"--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0", "--loops=3", "--allow_file_create=0")
	require.Positive(t, a.dev.Count(faultdev.Flush))
}
