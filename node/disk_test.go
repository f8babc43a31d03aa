package node

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/engine/segment"
)

const (
	testCluster = trivet.ClusterID("11111111-1111-4111-8111-111111111111")
	testNode    = trivet.NodeID("n1")
)

func diskConfig(t *testing.T, dir string) DiskConfig {
	t.Helper()
	return DiskConfig{
		Dir: dir, Cluster: testCluster, Node: testNode, CacheBytes: 1 << 20, LogLanes: 1, LogSegmentBytes: 1 << 20,
		Fatal: func(err error) { t.Errorf("fatal: %v", err) },
	}
}

// mustFormat formats a fresh directory.
func mustFormat(t *testing.T) (string, trivet.DiskID) {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "disk")
	require.NoError(t, os.Mkdir(dir, 0o700))
	id, err := FormatDisk(diskConfig(t, dir))
	require.NoError(t, err)
	return dir, id
}

func mustOpenDisk(t *testing.T, dir string) *Disk {
	t.Helper()
	d, err := OpenDisk(diskConfig(t, dir))
	require.NoError(t, err)
	return d
}

// TestDiskLockEndsBesideAFork: a child that another goroutine starts has all descriptors until it runs its program. The
// disk is free all the same once it is closed.
func TestDiskLockEndsBesideAFork(t *testing.T) {
	t.Parallel()
	lock, err := lockDisk(t.TempDir())
	require.NoError(t, err)
	child, err := unix.Dup(int(lock.Fd())) // the same open file, as in a child
	require.NoError(t, err)
	defer unix.Close(child) //nolint:errcheck // nothing was written
	_, err = lockDisk(filepath.Dir(lock.Name()))
	require.ErrorIs(t, err, trivet.ErrInUse)
	require.NoError(t, unlockDisk(lock))
	again, err := lockDisk(filepath.Dir(lock.Name()))
	require.NoError(t, err)
	require.NoError(t, unlockDisk(again))
}

// TestRunDirIsFreeBesideAFork: so is the run directory once its node is closed.
func TestRunDirIsFreeBesideAFork(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	lock, err := lockDisk(dir)
	require.NoError(t, err)
	child, err := unix.Dup(int(lock.Fd()))
	require.NoError(t, err)
	defer unix.Close(child) //nolint:errcheck // nothing was written
	n := &Node{lock: lock}
	require.NoError(t, n.unlock())
	again, err := lockDisk(dir)
	require.NoError(t, err)
	require.NoError(t, unlockDisk(again))
}

func TestDiskFormatOpenReopen(t *testing.T) {
	t.Parallel()
	dir, id := mustFormat(t)
	d := mustOpenDisk(t, dir)
	assert.Equal(t, id, d.ID())
	require.NoError(t, d.Verify())
	u, err := d.Usage()
	require.NoError(t, err)
	assert.Equal(t, id, u.ID)
	assert.Positive(t, u.SizeBytes)
	assert.Less(t, u.FreeBytes, u.SizeBytes)
	require.NoError(t, d.Close())
	_, err = FormatDisk(diskConfig(t, dir))
	require.ErrorIs(t, err, trivet.ErrExists, "servers format at each start what is not formatted")

	// The directory may be renamed, and the machine rebooted: neither makes it another disk.
	moved := dir + "-moved"
	require.NoError(t, os.Rename(dir, moved))
	d = mustOpenDisk(t, moved)
	assert.Equal(t, id, d.ID())
	require.NoError(t, d.Close())
}

func TestFormatTakesEmptyDirectoriesOnly(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name    string
		file    string
		wantErr error
	}{
		{"empty", "", nil},
		{"lost+found", "lost+found", nil},
		{"interrupted format", "superblock.tmp", nil},
		{"somebody's data", "notes.txt", trivet.ErrInvalid},
		{"an engine without superblock", "engine", trivet.ErrInvalid},
		{"a log without superblock", "log", trivet.ErrInvalid},
		{"a disk", "superblock", trivet.ErrExists},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			if tt.file != "" {
				require.NoError(t, os.WriteFile(filepath.Join(dir, tt.file), nil, 0o600))
			}
			_, err := FormatDisk(diskConfig(t, dir))
			require.ErrorIs(t, err, tt.wantErr)
		})
	}
}

// A crash while formatting leaves an unfinished log, or a whole one that has not got its name yet.
func TestFormatDiskCrash(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	tmp := filepath.Join(dir, logTmpDir)
	require.NoError(t, os.Mkdir(tmp, 0o700))
	require.NoError(t, os.WriteFile(filepath.Join(tmp, "seg-00-00000000"), make([]byte, 4096), 0o600))
	_, err := FormatDisk(diskConfig(t, dir))
	require.NoError(t, err, "no superblock was written: it is begun again")
	require.NoDirExists(t, tmp)

	require.NoError(t, os.Rename(filepath.Join(dir, logDir), tmp))
	require.NoError(t, mustOpenDisk(t, dir).Close())
	require.NoDirExists(t, tmp)
	require.NoError(t, mustOpenDisk(t, dir).Close())
}

// H4: a disk without its log, or with that of another disk, does not open, nor with damage in its newest segment.
func TestDiskNeedsItsLog(t *testing.T) {
	t.Parallel()
	dir, _ := mustFormat(t)
	log := filepath.Join(dir, logDir)
	other, _ := mustFormat(t)
	require.NoError(t, os.Rename(log, log+"-away"))
	_, err := OpenDisk(diskConfig(t, dir))
	require.ErrorIs(t, err, trivet.ErrCorrupt)
	require.ErrorContains(t, err, "its log is gone")
	require.ErrorContains(t, err, "format it anew")
	require.NoDirExists(t, log)

	require.NoError(t, os.Rename(filepath.Join(other, logDir), log))
	_, err = OpenDisk(diskConfig(t, dir))
	require.ErrorIs(t, err, trivet.ErrInvalid)
	require.NoError(t, os.RemoveAll(log))

	require.NoError(t, os.Rename(log+"-away", log))
	d := mustOpenDisk(t, dir)
	require.NoError(t, d.log.Group(1).SetStable(segment.Stable{Term: 1}))
	require.NoError(t, d.Close(), "it writes an end mark, which vouches for the term")
	entries, err := os.ReadDir(log)
	require.NoError(t, err)
	for _, e := range entries {
		b, err := os.ReadFile(filepath.Join(log, e.Name()))
		require.NoError(t, err)
		if at := bytes.LastIndex(b, []byte("trvtbat")); at > 0 { // the mark; the batch before it is one page
			b[at-trivet.BlockSize+80] ^= 1
		}
		require.NoError(t, os.WriteFile(filepath.Join(log, e.Name()), b, 0o600))
	}
	_, err = OpenDisk(diskConfig(t, dir))
	require.ErrorIs(t, err, trivet.ErrCorrupt)
	require.ErrorContains(t, err, "is damaged")
}

func TestLogShape(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		total   int64
		lanes   int
		segment int64
	}{
		{64 << 20, 1, 8 << 20},
		{512 << 20, 1, 8 << 20},
		{1 << 30, 2, 8 << 20},
		{2 << 30, 4, 8 << 20},
		{5 << 30, 4, 32 << 20},
		{10 << 30, 4, 64 << 20},
		{10 << 40, 4, 64 << 20},
	} {
		lanes, segmentBytes := logShape(tt.total)
		assert.Equal(t, tt.lanes, lanes, "%d", tt.total)
		assert.Equal(t, tt.segment, segmentBytes, "%d", tt.total)
		if tt.total >= 512<<20 {
			assert.LessOrEqual(t, int64(lanes+1)*segmentBytes*logFilesN, tt.total/10, "%d", tt.total)
		}
	}
}

func TestWipedDiskGetsAnotherID(t *testing.T) {
	t.Parallel()
	dir, id := mustFormat(t)
	require.NoError(t, os.RemoveAll(dir))
	require.NoError(t, os.Mkdir(dir, 0o700))
	_, err := OpenDisk(diskConfig(t, dir))
	require.ErrorIs(t, err, trivet.ErrNotFound)
	require.NoFileExists(t, filepath.Join(dir, lockFile), "a directory that is not ours stays untouched")
	second, err := FormatDisk(diskConfig(t, dir))
	require.NoError(t, err)
	assert.NotEqual(t, id, second)
}

// H10, H11: whatever way a disk was copied, the copy is not the disk.
func TestCopiedDiskIsRefused(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name string
		args []string
	}{
		{"cp -a", []string{"cp", "-a"}},
		{"cp with hard links", []string{"cp", "-al"}},
		{"cp with reflinks", []string{"cp", "-a", "--reflink=auto"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			dir, _ := mustFormat(t)
			require.NoError(t, mustOpenDisk(t, dir).Close())
			dup := dir + "-copy"
			args := slices.Concat(tt.args[1:], []string{dir, dup})
			out, err := exec.CommandContext(t.Context(), tt.args[0], args...).CombinedOutput()
			require.NoError(t, err, "%s", out)
			_, err = OpenDisk(diskConfig(t, dup))
			require.ErrorIs(t, err, trivet.ErrInvalid)
			require.ErrorContains(t, err, "copy of disk")
			require.NoError(t, mustOpenDisk(t, dir).Close(), "the original stays usable")
		})
	}
}

// A copy back into the emptied original keeps the directory's inode but not the file's.
func TestRestoredDiskIsRefused(t *testing.T) {
	t.Parallel()
	dir, _ := mustFormat(t)
	old, err := os.ReadFile(filepath.Join(dir, superblockFile))
	require.NoError(t, err)
	require.NoError(t, os.Remove(filepath.Join(dir, superblockFile)))
	require.NoError(t, os.WriteFile(filepath.Join(dir, "other"), nil, 0o600)) // may take the inode number
	require.NoError(t, os.WriteFile(filepath.Join(dir, superblockFile), old, 0o600))
	_, err = OpenDisk(diskConfig(t, dir))
	require.ErrorIs(t, err, trivet.ErrInvalid)
}

func TestForeignDiskIsRefused(t *testing.T) {
	t.Parallel()
	dir, _ := mustFormat(t)
	cfg := diskConfig(t, dir)
	cfg.Node = "n2"
	_, err := OpenDisk(cfg)
	require.ErrorIs(t, err, trivet.ErrInvalid)
	require.ErrorContains(t, err, "belongs to node n1")
	cfg = diskConfig(t, dir)
	cfg.Cluster = "99999999-9999-4999-8999-999999999999"
	_, err = OpenDisk(cfg)
	require.ErrorIs(t, err, trivet.ErrInvalid)
	require.ErrorContains(t, err, "belongs to cluster")
}

// I9: two processes never hold one disk. flock tells open files apart, so one process can play both.
func TestDiskIsHeldOnce(t *testing.T) {
	t.Parallel()
	dir, _ := mustFormat(t)
	d := mustOpenDisk(t, dir)
	_, err := OpenDisk(diskConfig(t, dir))
	require.ErrorIs(t, err, trivet.ErrInUse)
	require.ErrorContains(t, err, "of node n1")
	_, err = FormatDisk(diskConfig(t, dir))
	require.ErrorIs(t, err, trivet.ErrInUse)
	require.NoError(t, d.Close())
	require.NoError(t, mustOpenDisk(t, dir).Close())
}

// Where flock does not reach, another process overwrites the lock file, and that is noticed.
func TestVerifyNoticesAnotherHolder(t *testing.T) {
	t.Parallel()
	dir, _ := mustFormat(t)
	d := mustOpenDisk(t, dir)
	other := `{"boot":"b","node":"n1","pid":7,"process":"p"}`
	require.NoError(t, os.WriteFile(filepath.Join(dir, lockFile), []byte(other), 0o600))
	err := d.Verify()
	require.ErrorIs(t, err, trivet.ErrFenced)
	require.ErrorContains(t, err, "process 7")
	require.NoError(t, d.Close())
}

func TestVerifyNoticesAReplacedDirectory(t *testing.T) {
	t.Parallel()
	dir, _ := mustFormat(t)
	d := mustOpenDisk(t, dir)
	require.NoError(t, os.Rename(dir, dir+"-away"))
	require.Error(t, d.Verify())
	require.NoError(t, os.Mkdir(dir, 0o700))
	_, err := FormatDisk(diskConfig(t, dir))
	require.NoError(t, err)
	require.ErrorIs(t, d.Verify(), trivet.ErrInvalid)
	require.NoError(t, os.RemoveAll(dir))
	require.NoError(t, os.Rename(dir+"-away", dir))
	require.NoError(t, d.Close())
}
