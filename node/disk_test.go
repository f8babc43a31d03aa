package node

import (
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
)

const (
	testCluster = trivet.ClusterID("11111111-1111-4111-8111-111111111111")
	testNode    = trivet.NodeID("n1")
)

func diskConfig(t *testing.T, dir string) DiskConfig {
	t.Helper()
	return DiskConfig{
		Dir: dir, Cluster: testCluster, Node: testNode, CacheBytes: 1 << 20,
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
