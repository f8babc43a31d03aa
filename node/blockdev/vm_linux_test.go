package blockdev

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/node/keeper"
)

// The tests in this file need a kernel with nbd or ublk: `make vm-test` runs them in a guest that has both
// (package internal/vm). Elsewhere they skip.

const (
	vmBytes    = 48 << 20
	vmBytesMax = 80 << 20
)

// vmKinds are the transports that the kernel serves without a keeper.
var vmKinds = []Kind{KindNBD, KindUblk}

// eachKind runs a test for each transport that the machine has.
func eachKind(t *testing.T, test func(t *testing.T, kind Kind)) {
	t.Helper()
	for _, kind := range vmKinds {
		t.Run(string(kind), func(t *testing.T) {
			if _, err := choose(kind, nil); err != nil {
				if os.Getenv("TRIVET_VM_GUEST") != "" {
					t.Fatal(err)
				}
				t.Skip(err)
			}
			if os.Geteuid() != 0 {
				t.Skip("needs root")
			}
			test(t, kind)
		})
	}
}

// vmRun runs a program and returns what it printed.
func vmRun(t *testing.T, name string, args ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), 2*time.Minute)
	defer cancel()
	out, err := exec.CommandContext(ctx, name, args...).CombinedOutput()
	require.NoError(t, err, "%s %v: %s", name, args, out)
	return string(out)
}

// vmAttach attaches a new sharedDev in this process.
func vmAttach(t *testing.T, kind Kind) (*Attachment, *sharedDev, string) {
	t.Helper()
	dev := makeShared(t, filepath.Join(t.TempDir(), "dev"), vmBytes, vmBytesMax)
	runDir := t.TempDir()
	a, err := Attach(t.Context(), Config{Name: "vol", RunDir: runDir, Device: dev, Kind: kind})
	require.NoError(t, err)
	t.Cleanup(func() { _ = a.Detach(context.WithoutCancel(t.Context())) })
	return a, dev, runDir
}

func queue(t *testing.T, path, attribute string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("/sys/block", filepath.Base(path), "queue", attribute))
	require.NoError(t, err)
	return strings.TrimSpace(string(b))
}

// vmNothingLeft checks that no device of ours is left in the kernel and no file on disk.
func vmNothingLeft(t *testing.T, runDir string) {
	t.Helper()
	entries, err := os.ReadDir(runDir)
	require.NoError(t, err)
	require.Empty(t, entries)
	index, err := findNBD(nbdBackendOf(&site{folder: &folder{path: filepath.Join(runDir, "vol")}}))
	require.NoError(t, err)
	require.Equal(t, noNBD, index)
	ublk, err := filepath.Glob("/dev/ublk[bc]*")
	require.NoError(t, err)
	require.Empty(t, ublk)
}

func openBlock(t *testing.T, path string, flags int) *os.File {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR|unix.O_DIRECT|flags, 0)
	require.NoError(t, err)
	t.Cleanup(func() { _ = f.Close() })
	return f
}

// pages returns n bytes, page-aligned, filled from seed.
func pages(t *testing.T, n int, seed byte) []byte {
	t.Helper()
	b, err := unix.Mmap(-1, 0, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	require.NoError(t, err)
	t.Cleanup(func() { _ = unix.Munmap(b) })
	for i := range b {
		b[i] = seed + byte(i>>9)
	}
	return b
}

// TestVMRawDevice counts what reaches the Device of each kind of request.
func TestVMRawDevice(t *testing.T) {
	eachKind(t, func(t *testing.T, kind Kind) {
		a, dev, runDir := vmAttach(t, kind)
		for name, want := range map[string]string{
			"logical_block_size": "4096", "physical_block_size": "4096", "discard_granularity": "4096",
			"write_cache": "write back", "fua": "1", "max_sectors_kb": "1024",
			"io_timeout": "3000", // how soon requests under way are seen to have lost their server
		} {
			require.Equal(t, want, queue(t, a.Path(), name), name)
		}
		f := openBlock(t, a.Path(), 0)
		data := pages(t, 4<<20, 3)
		dev.forget()
		_, err := f.WriteAt(data, 8<<20)
		require.NoError(t, err)
		require.True(t, bytes.Equal(data, dev.visible[8<<20:12<<20]))
		require.GreaterOrEqual(t, dev.count(wordWrites), 4, "no request is longer than our buffers")
		require.Zero(t, dev.count(wordFlushes), "a plain write is not flushed")
		got := pages(t, 4<<20, 0)
		_, err = f.ReadAt(got, 8<<20)
		require.NoError(t, err)
		require.True(t, bytes.Equal(data, got))

		// O_DSYNC on a block device is a FUA write and then a flush (block/fops.c). The FUA is one Flush of ours.
		sync := openBlock(t, a.Path(), unix.O_DSYNC)
		dev.forget()
		for i := range 10 {
			_, err := sync.WriteAt(data[:4096], int64(i)<<12)
			require.NoError(t, err)
			require.Equal(t, data[:4096], dev.durable[i<<12:i<<12+4096], "durable after a FUA write")
		}
		require.Equal(t, 10, dev.count(wordWrites))
		require.Equal(t, 20, dev.count(wordFlushes), "FUA and flush")
		require.NoError(t, f.Sync())
		require.Equal(t, 1, dev.count(wordFlushes))

		vmRun(t, "blkdiscard", "-o", "8388608", "-l", "1048576", a.Path())
		require.Equal(t, 1, dev.count(wordDiscards))
		require.Zero(t, dev.count(wordZeroes))
		vmRun(t, "blkdiscard", "-z", "-o", "10485760", "-l", "1048576", a.Path())
		require.Equal(t, 1, dev.count(wordZeroes), "zeroing is a request of its own")
		require.Zero(t, dev.count(wordDiscards), "zeroing is no hint")
		want := bytes.Clone(data)
		clear(want[:1<<20])
		clear(want[2<<20 : 3<<20])
		_, err = f.ReadAt(got, 8<<20)
		require.NoError(t, err)
		require.True(t, bytes.Equal(want, got))

		require.ErrorIs(t, a.Detach(t.Context()), trivet.ErrInUse, "open in this process: it must not hang nor go")
		require.NoError(t, f.Close())
		require.NoError(t, sync.Close())
		require.NoError(t, a.Detach(t.Context()))
		vmNothingLeft(t, runDir)
	})
}

// TestVMNoStalePages is H30: a device never shows what an earlier one of the same number had in the page
// cache, or what this one had before it was detached and written elsewhere.
func TestVMNoStalePages(t *testing.T) {
	eachKind(t, func(t *testing.T, kind Kind) {
		dev := makeShared(t, filepath.Join(t.TempDir(), "dev"), vmBytes, vmBytesMax)
		for round := range 3 {
			for i := range dev.visible[:1<<20] { // as another node would
				dev.visible[i] = byte(round + i>>12)
			}
			runDir := t.TempDir()
			a, err := Attach(t.Context(), Config{Name: "vol", RunDir: runDir, Device: dev, Kind: kind})
			require.NoError(t, err)
			f, err := os.OpenFile(a.Path(), os.O_RDWR, 0) // through the page cache
			require.NoError(t, err)
			got := make([]byte, 1<<20)
			_, err = f.ReadAt(got, 0)
			require.NoError(t, err)
			require.True(t, bytes.Equal(dev.visible[:1<<20], got), "round %d", round)
			_, err = f.WriteAt(bytes.Repeat([]byte{byte(round)}, 4096), 8192) // stays dirty until the close
			require.NoError(t, err)
			require.NoError(t, f.Close())
			require.NoError(t, a.Detach(t.Context()))
			require.Equal(t, bytes.Repeat([]byte{byte(round)}, 4096), dev.durable[8192:12288], "detach writes back and flushes")
			vmNothingLeft(t, runDir)
		}
	})
}

// vmMount mounts the device on a new folder.
func vmMount(t *testing.T, dev string) string {
	t.Helper()
	dir := t.TempDir()
	require.NoError(t, unix.Mount(dev, dir, "ext4", 0, ""))
	t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
	return dir
}

// writeSynced writes a file and syncs it.
func writeSynced(path string, data []byte) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	return errors.Join(err, f.Sync(), f.Close())
}

func freeBlocks(t *testing.T, dir string) uint64 {
	t.Helper()
	var st unix.Statfs_t
	require.NoError(t, unix.Statfs(dir, &st))
	return st.Blocks
}

// TestVMFilesystem runs ext4: every fsync is durable, fstrim discards, the filesystem grows online.
func TestVMFilesystem(t *testing.T) {
	eachKind(t, func(t *testing.T, kind Kind) {
		a, dev, runDir := vmAttach(t, kind)
		vmRun(t, "mkfs.ext4", "-q", "-F", "-m0", a.Path())
		dir := vmMount(t, a.Path())
		dev.forget()
		for i := range 8 {
			require.NoError(t, writeSynced(fmt.Sprintf("%s/f%d", dir, i), bytes.Repeat([]byte{byte(i), 9}, 1<<19)))
		}
		require.GreaterOrEqual(t, dev.count(wordFlushes), 8, "each fsync is a flush at least")
		requirePowerCut(t, dev, func(dir string) {
			for i := range 8 {
				got, err := os.ReadFile(fmt.Sprintf("%s/f%d", dir, i))
				require.NoError(t, err)
				require.True(t, bytes.Equal(bytes.Repeat([]byte{byte(i), 9}, 1<<19), got), "f%d", i)
			}
		})
		require.ErrorIs(t, a.Detach(t.Context()), trivet.ErrInUse, "mounted")
		for i := range 7 {
			require.NoError(t, os.Remove(fmt.Sprintf("%s/f%d", dir, i)))
		}
		dev.forget()
		vmRun(t, "fstrim", dir)
		require.Positive(t, dev.count(wordDiscards), "fstrim discards")

		before := freeBlocks(t, dir)
		dev.word(wordSize).Store(vmBytesMax)
		if err := a.Grow(t.Context()); errors.Is(err, errors.ErrUnsupported) {
			require.ErrorIs(t, err, trivet.ErrInUse, "it has to be detached to grow")
			t.Logf("no online growth: %v", err)
		} else {
			require.NoError(t, err)
			require.NoError(t, a.Grow(t.Context()), "growing again is harmless")
			vmRun(t, "resize2fs", a.Path())
			require.Greater(t, freeBlocks(t, dir), before*3/2)
		}
		require.NoError(t, writeSynced(dir+"/after", []byte("grown")))
		require.NoError(t, unix.Unmount(dir, 0))
		vmRun(t, "fsck.ext4", "-f", "-n", a.Path())
		require.NoError(t, a.Detach(t.Context()))
		vmNothingLeft(t, runDir)
	})
}

// requirePowerCut mounts what a power cut would leave, and lets check look at it.
func requirePowerCut(t *testing.T, dev *sharedDev, check func(dir string)) {
	t.Helper()
	image := makeShared(t, filepath.Join(t.TempDir(), "cut"), dev.Size(), dev.Size())
	copy(image.visible, dev.durable)
	runDir := t.TempDir()
	a, err := Attach(t.Context(), Config{Name: "cut", RunDir: runDir, Device: image, Kind: KindNBD})
	require.NoError(t, err)
	defer func() { require.NoError(t, a.Detach(context.WithoutCancel(t.Context()))) }()
	dir := t.TempDir()
	require.NoError(t, unix.Mount(a.Path(), dir, "ext4", 0, ""), "the journal is replayed")
	check(dir)
	require.NoError(t, unix.Unmount(dir, 0))
	vmRun(t, "fsck.ext4", "-f", "-n", a.Path())
}

// The environment of a helper process.
const (
	vmHelperEnv = "TRIVET_VM_HELPER" // what to do: attach or resume
	vmKindEnv   = "TRIVET_VM_KIND"
	vmDevEnv    = "TRIVET_VM_DEV"
	vmRunEnv    = "TRIVET_VM_RUN"
	vmKeeperEnv = "TRIVET_VM_KEEPER" // socket of a keeper; may be empty
	vmReady     = "serving "
)

// TestVMHelper is the process that serves and is killed. It prints the device's path, and detaches
// when its input ends.
func TestVMHelper(t *testing.T) {
	do := os.Getenv(vmHelperEnv)
	if do == "" {
		t.Skip("runs as a process of other tests")
	}
	dev, err := openShared(os.Getenv(vmDevEnv))
	require.NoError(t, err)
	dev.word(wordServed).Add(1)
	cfg := Config{Name: "vol", RunDir: os.Getenv(vmRunEnv), Device: dev, Kind: Kind(os.Getenv(vmKindEnv))}
	if socket := os.Getenv(vmKeeperEnv); socket != "" {
		cfg.Keeper = keeper.NewClient(socket, nil, nil)
		defer cfg.Keeper.Close()
	}
	var path string
	var detach func(context.Context) error
	if do == "resume" {
		d, dir := vmResume(t, cfg)
		path = d.path()
		detach = func(ctx context.Context) error { return errors.Join(d.detach(ctx), dir.remove()) }
	} else {
		a, err := Attach(t.Context(), cfg)
		require.NoError(t, err)
		path, detach = a.Path(), a.Detach
	}
	_, err = fmt.Fprintln(os.Stdout, vmReady+path)
	require.NoError(t, err)
	_, _ = io.Copy(io.Discard, os.Stdin)
	require.NoError(t, detach(context.WithoutCancel(t.Context())))
}

// vmResume goes on with what a dead process left.
func vmResume(t *testing.T, cfg Config) (kernelDev, *folder) {
	t.Helper()
	path, err := attachmentPath(cfg.RunDir, cfg.Name)
	require.NoError(t, err)
	dir, err := lockFolder(path, false)
	require.NoError(t, err)
	s := newSite(cfg, dir)
	rec, err := dir.read()
	require.NoError(t, err)
	tr := transportOf(rec.Kind)
	require.NoError(t, tr.resumable(t.Context(), s, rec))
	d, err := tr.resume(t.Context(), s, rec)
	require.NoError(t, err)
	return d, dir
}

// helper is a running TestVMHelper.
type helper struct {
	cmd   *exec.Cmd
	stdin io.WriteCloser
	path  string // of the block device
}

func startHelper(t *testing.T, do string, kind Kind, devFile, runDir string) *helper {
	t.Helper()
	h := &helper{cmd: exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestVMHelper$", "-test.timeout=10m")}
	h.cmd.Env = append(os.Environ(), vmHelperEnv+"="+do, vmKindEnv+"="+string(kind), vmDevEnv+"="+devFile,
		vmRunEnv+"="+runDir)
	h.cmd.Stderr = os.Stderr
	var err error
	h.stdin, err = h.cmd.StdinPipe()
	require.NoError(t, err)
	out, err := h.cmd.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, h.cmd.Start())
	var said []string
	lines := bufio.NewScanner(out)
	for lines.Scan() {
		said = append(said, lines.Text())
		if path, ok := strings.CutPrefix(lines.Text(), vmReady); ok {
			h.path = path
			return h
		}
	}
	t.Fatalf("%s helper ended: %v: %s", do, h.cmd.Wait(), strings.Join(said, "\n"))
	return nil
}

func (h *helper) kill(t *testing.T) {
	t.Helper()
	require.NoError(t, h.cmd.Process.Kill())
	_ = h.cmd.Wait() // "killed"
}

// detach ends the helper in good order.
func (h *helper) detach(t *testing.T) {
	t.Helper()
	require.NoError(t, h.stdin.Close())
	require.NoError(t, h.cmd.Wait())
}

// TestVMSurvivesKill kills the server three times while writes are certainly under way, and lets
// another process go on. The writer sees pauses and no error, and nothing is lost.
func TestVMSurvivesKill(t *testing.T) {
	eachKind(t, func(t *testing.T, kind Kind) {
		devFile, runDir := filepath.Join(t.TempDir(), "dev"), t.TempDir()
		dev := makeShared(t, devFile, vmBytes, vmBytesMax)
		h := startHelper(t, "attach", kind, devFile, runDir)
		vmRun(t, "mkfs.ext4", "-q", "-F", "-m0", h.path)
		dir := vmMount(t, h.path)
		sum, device := sha256.New(), h.path
		for round := range 3 {
			dev.word(wordHold).Store(1)
			written := make(chan error, 1)
			go func() { written <- writeChunks(filepath.Join(dir, "r"+strconv.Itoa(round)), round) }()
			require.Eventually(t, func() bool { return dev.word(wordHeld).Load() > 0 }, time.Minute, time.Millisecond,
				"a write is under way")
			h.kill(t)
			held := dev.count(wordHeld)
			dev.word(wordHold).Store(0)
			select {
			case err := <-written:
				t.Fatalf("round %d: the writer did not wait: %v", round, err)
			default:
			}
			began := time.Now()
			h = startHelper(t, "resume", kind, devFile, runDir)
			require.Equal(t, device, h.path)
			require.NoError(t, <-written, "round %d", round)
			t.Logf("round %d: %d writes were under way; written %.1f s after the new process began",
				round, held, time.Since(began).Seconds())
		}
		require.EqualValues(t, 4, dev.word(wordServed).Load())
		check := func(dir string) {
			for round := range 3 {
				got, err := os.ReadFile(filepath.Join(dir, "r"+strconv.Itoa(round)))
				require.NoError(t, err)
				sum.Reset()
				for i := range vmChunksN {
					sum.Write(chunk(round, i))
				}
				require.Equal(t, sum.Sum(nil), sha256Of(got), "round %d", round)
			}
		}
		requirePowerCut(t, dev, check)
		require.NoError(t, unix.Unmount(dir, 0))
		vmRun(t, "fsck.ext4", "-f", "-n", device)
		require.NoError(t, unix.Mount(device, dir, "ext4", 0, ""))
		check(dir)
		require.NoError(t, unix.Unmount(dir, 0))
		h.detach(t)
		vmNothingLeft(t, runDir)
	})
}

func sha256Of(b []byte) []byte { s := sha256.Sum256(b); return s[:] }

// vmChunksN chunks make a file.
const vmChunksN = 12

func chunk(round, i int) []byte { return bytes.Repeat([]byte{byte(round), byte(i), 5, 7}, 64<<10) }

// writeChunks writes a file in chunks, with an fsync after each.
func writeChunks(path string, round int) (err error) {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	for i := range vmChunksN {
		if _, err := f.Write(chunk(round, i)); err != nil {
			return fmt.Errorf("chunk %d: %w", i, err)
		}
		if err := f.Sync(); err != nil {
			return fmt.Errorf("chunk %d: %w", i, err)
		}
	}
	return nil
}

// TestVMCleanup removes what a killed process left, with a filesystem mounted on it and requests that
// wait: they get an error, and nothing is left.
func TestVMCleanup(t *testing.T) {
	eachKind(t, func(t *testing.T, kind Kind) {
		devFile, runDir := filepath.Join(t.TempDir(), "dev"), t.TempDir()
		dev := makeShared(t, devFile, vmBytes, vmBytesMax)
		h := startHelper(t, "attach", kind, devFile, runDir)
		vmRun(t, "mkfs.ext4", "-q", "-F", "-m0", h.path)
		dir := vmMount(t, h.path)
		dev.word(wordHold).Store(1)
		written := make(chan error, 1)
		go func() { written <- writeChunks(filepath.Join(dir, "lost"), 0) }()
		require.Eventually(t, func() bool { return dev.word(wordHeld).Load() > 0 }, time.Minute, time.Millisecond)
		require.Empty(t, must(Cleanup(t.Context(), runDir, nil))(t), "a live process is left alone")
		h.kill(t)
		require.Equal(t, []string{"vol"}, must(Cleanup(t.Context(), runDir, nil))(t))
		require.Error(t, <-written)
		vmNothingLeft(t, runDir)
	})
}

func must[T any](v T, err error) func(*testing.T) T {
	return func(t *testing.T) T {
		t.Helper()
		require.NoError(t, err)
		return v
	}
}
