package node_test

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync/atomic"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/internal/loopdev"
	"github.com/trivet-csi/trivet/node"
	"github.com/trivet-csi/trivet/node/blockdev"
)

func requireRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("mounting needs root")
	}
	if _, err := os.Stat("/dev/loop-control"); err != nil {
		t.Skip("no loop devices: ", err)
	}
}

// unmountAtEnd takes away whatever a failed test leaves at the paths.
func unmountAtEnd(t *testing.T, paths ...string) {
	t.Helper()
	t.Cleanup(func() {
		for _, p := range paths {
			for unix.Unmount(p, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW) == nil {
				continue
			}
		}
	})
}

func mustMkdir(t *testing.T, elem ...string) string {
	t.Helper()
	dir := filepath.Join(elem...)
	require.NoError(t, os.MkdirAll(dir, 0o750))
	return dir
}

// mustLoop makes a loop device over a sparse file.
func mustLoop(t *testing.T, sizeBytes int64) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "image")
	require.NoError(t, os.WriteFile(file, nil, 0o600))
	require.NoError(t, os.Truncate(file, sizeBytes))
	device, err := loopdev.Open(file)
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, device.Close()) })
	return device.Name()
}

func TestBindDirectory(t *testing.T) {
	requireRoot(t)
	m, dir := node.NewMounter(), t.TempDir()
	source, rw, ro := mustMkdir(t, dir, "source"), filepath.Join(dir, "rw"), filepath.Join(dir, "ro")
	unmountAtEnd(t, rw, ro)
	require.NoError(t, m.Bind(source, rw, false, false))
	require.NoError(t, m.Bind(source, ro, false, true))
	require.NoError(t, os.WriteFile(filepath.Join(rw, "f"), []byte("x"), 0o600))
	b, err := os.ReadFile(filepath.Join(ro, "f"))
	require.NoError(t, err)
	assert.Equal(t, "x", string(b))
	require.ErrorIs(t, os.WriteFile(filepath.Join(ro, "g"), nil, 0o600), unix.EROFS)

	_, mounted, err := m.Mounted(ro)
	require.NoError(t, err)
	assert.True(t, mounted)
	_, mounted, err = m.Mounted(source)
	require.NoError(t, err)
	assert.False(t, mounted)

	f, err := os.Open(filepath.Join(rw, "f"))
	require.NoError(t, err)
	require.ErrorIs(t, m.Unmount(rw, false), trivet.ErrInUse)
	require.NoError(t, f.Close())
	for range 2 {
		require.NoError(t, m.Unmount(rw, false))
		require.NoError(t, m.Unmount(ro, false))
		require.NoError(t, m.Remove(rw))
		require.NoError(t, m.Remove(ro))
	}
	require.FileExists(t, filepath.Join(source, "f"))
}

// What umount says has the path in it, which is not what it says of it.
func TestUnmountOddNames(t *testing.T) {
	requireRoot(t)
	m, dir := node.NewMounter(), t.TempDir()
	source := mustMkdir(t, dir, "source")
	for _, name := range []string{"not mounted", "busy"} {
		target := filepath.Join(dir, name)
		unmountAtEnd(t, target)
		require.NoError(t, m.Bind(source, target, false, false))
		f, err := os.Create(filepath.Join(target, "f"))
		require.NoError(t, err)
		require.ErrorIs(t, m.Unmount(target, false), trivet.ErrInUse, name)
		_, mounted, err := m.Mounted(target)
		require.NoError(t, err)
		require.True(t, mounted, name)
		require.NoError(t, f.Close())
		require.NoError(t, m.Unmount(target, false))
		require.NoError(t, m.Remove(target))
	}
}

func TestBindBlock(t *testing.T) {
	requireRoot(t)
	m := node.NewMounter()
	device := mustLoop(t, 1<<20)
	target := filepath.Join(t.TempDir(), "device")
	unmountAtEnd(t, target)
	require.NoError(t, m.Bind(device, target, true, false))
	want, err := m.DeviceNumber(device)
	require.NoError(t, err)
	got, mounted, err := m.Mounted(target)
	require.NoError(t, err)
	assert.True(t, mounted)
	assert.Equal(t, want, got)
	n, err := m.DeviceNumber(target)
	require.NoError(t, err)
	assert.Equal(t, want, n)
	require.NoError(t, m.Unmount(target, false))
	require.NoError(t, m.Remove(target))
	require.NoFileExists(t, target)
}

// S8: a symlink in the target's place is not followed, whoever put it there.
func TestTargetsAreNotSymlinks(t *testing.T) {
	requireRoot(t)
	m, dir := node.NewMounter(), t.TempDir()
	source, victim, link := mustMkdir(t, dir, "source"), mustMkdir(t, dir, "victim"), filepath.Join(dir, "link")
	file := filepath.Join(dir, "file")
	fileLink := filepath.Join(dir, "filelink")
	require.NoError(t, os.WriteFile(file, nil, 0o600))
	require.NoError(t, os.Symlink(victim, link))
	require.NoError(t, os.Symlink(file, fileLink))
	unmountAtEnd(t, victim, file)
	device := mustLoop(t, 1<<20)

	require.ErrorIs(t, m.Bind(source, link, false, false), node.ErrUnsupported)
	require.ErrorIs(t, m.Bind(device, fileLink, true, false), node.ErrUnsupported)
	require.ErrorIs(t, m.Shade(link), node.ErrUnsupported)
	require.ErrorIs(t, m.FormatAndMount(t.Context(), device, link, "ext4", nil), node.ErrUnsupported)
	require.ErrorIs(t, m.Remove(link), trivet.ErrInvalid)
	require.ErrorIs(t, m.Bind(source, file, false, false), node.ErrUnsupported, "a file where a directory belongs")
	require.ErrorIs(t, m.Bind(device, victim, true, false), node.ErrUnsupported, "a directory where a file belongs")
	for _, p := range []string{victim, file} {
		_, mounted, err := m.Mounted(p)
		require.NoError(t, err)
		assert.False(t, mounted, p)
	}
}

func TestRemoveKeepsWhatIsNotEmpty(t *testing.T) {
	t.Parallel()
	m, dir := node.NewMounter(), t.TempDir()
	require.NoError(t, m.Remove(filepath.Join(dir, "absent")))
	require.NoError(t, m.Remove("/dev/null/absent"))
	full := mustMkdir(t, dir, "full", "child")
	require.ErrorIs(t, m.Remove(filepath.Dir(full)), trivet.ErrInvalid)
	file := filepath.Join(dir, "passwd")
	require.NoError(t, os.WriteFile(file, []byte("root"), 0o600))
	require.ErrorIs(t, m.Remove(file), trivet.ErrInvalid)
	require.FileExists(t, file)
}

func TestShade(t *testing.T) {
	requireRoot(t)
	m, dir := node.NewMounter(), t.TempDir()
	target := mustMkdir(t, dir, "target")
	unmountAtEnd(t, target)
	require.NoError(t, m.Shade(target))
	require.ErrorIs(t, os.WriteFile(filepath.Join(target, "f"), nil, 0o600), unix.EROFS)
	require.NoError(t, m.Unmount(target, true))
	require.NoError(t, m.Remove(target))
}

func TestFormatAndMount(t *testing.T) {
	requireRoot(t)
	for _, fsType := range []string{"ext4", "xfs"} {
		t.Run(fsType, func(t *testing.T) {
			m := node.NewMounter()
			device := mustLoop(t, 320<<20) // xfs wants 300 MB
			target := mustMkdir(t, t.TempDir(), "staging")
			unmountAtEnd(t, target)
			err := m.FormatAndMount(t.Context(), device, target, fsType, []string{"ro"})
			require.ErrorIs(t, err, node.ErrUnsupported, "a blank device is not formatted for reading only")
			require.NoError(t, m.FormatAndMount(t.Context(), device, target, fsType, []string{"noatime"}))
			want, err := m.DeviceNumber(device)
			require.NoError(t, err)
			got, mounted, err := m.Mounted(target)
			require.NoError(t, err)
			assert.True(t, mounted)
			assert.Equal(t, want, got)
			require.NoError(t, os.WriteFile(filepath.Join(target, "f"), []byte("kept"), 0o600))
			u, err := m.Usage(target)
			require.NoError(t, err)
			assert.Positive(t, u.TotalBytes)
			assert.Positive(t, u.FreeInodes)
			require.NoError(t, m.Unmount(target, false))

			require.NoError(t, m.FormatAndMount(t.Context(), device, target, fsType, []string{"ro"}))
			b, err := os.ReadFile(filepath.Join(target, "f"))
			require.NoError(t, err)
			assert.Equal(t, "kept", string(b), "what is formatted is not formatted again")
			require.NoError(t, m.Unmount(target, false))

			other := map[string]string{"ext4": "xfs", "xfs": "ext4"}[fsType]
			err = m.FormatAndMount(t.Context(), device, target, other, nil)
			require.ErrorIs(t, err, node.ErrUnsupported, "nor as another filesystem")
		})
	}
}

func TestMissingTools(t *testing.T) {
	requireRoot(t)
	device := mustLoop(t, 1<<20)
	target := mustMkdir(t, t.TempDir(), "staging")
	bin := t.TempDir()
	for _, tool := range []string{"blkid", "mount", "umount", "dd", "sync", "fsck", "mkfs.ext4"} {
		path, err := exec.LookPath(tool)
		require.NoError(t, err)
		require.NoError(t, os.Symlink(path, filepath.Join(bin, tool)))
	}
	t.Setenv("PATH", bin)
	err := node.NewMounter().FormatAndMount(t.Context(), device, target, "xfs", nil)
	require.ErrorIs(t, err, node.ErrUnsupported)
	require.ErrorContains(t, err, "mkfs.xfs is not installed")
	require.ErrorContains(t, err, "xfsprogs")
}

// unreadable is a device of which no block can be read, as when a volume has lost its quorum.
type unreadable struct{ writes atomic.Int64 }

func (d *unreadable) ReadAt(context.Context, []byte, int64) error {
	return fmt.Errorf("read: %w", trivet.ErrUnavailable)
}

func (d *unreadable) WriteAt(context.Context, []byte, int64) error {
	d.writes.Add(1)
	return nil
}

func (d *unreadable) Discard(context.Context, int64, int64) error {
	d.writes.Add(1)
	return nil
}

func (d *unreadable) WriteZeroes(context.Context, int64, int64) error {
	d.writes.Add(1)
	return nil
}

func (d *unreadable) Flush(context.Context) error { return nil }

func (d *unreadable) Size() int64 { return 64 << 20 }

// H31: what cannot be read is not blank. blkid cannot tell the two apart.
func TestUnreadableDeviceIsNotFormatted(t *testing.T) {
	requireRoot(t)
	device := new(unreadable)
	a, err := blockdev.Attach(t.Context(), blockdev.Config{Name: "unreadable", RunDir: t.TempDir(), Device: device})
	require.NoError(t, err)
	target := mustMkdir(t, t.TempDir(), "staging")
	unmountAtEnd(t, target)
	err = node.NewMounter().FormatAndMount(t.Context(), a.Path(), target, "ext4", nil)
	require.ErrorIs(t, err, trivet.ErrUnavailable)
	require.NoError(t, a.Detach(t.Context()))
	assert.Zero(t, device.writes.Load())
}
