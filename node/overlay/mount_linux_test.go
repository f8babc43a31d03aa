package overlay_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/internal/faultdev"
	"github.com/trivet-csi/trivet/node/blockdev"
	"github.com/trivet-csi/trivet/node/overlay"
)

var filesystems = []struct {
	name      string
	mkfs      []string
	sizeBytes int64
}{
	{"ext4", []string{"mkfs.ext4", "-q", "-F", "-m0"}, 64 << 20},
	{"xfs", []string{"mkfs.xfs", "-q", "-f"}, 320 << 20},
	{"btrfs", []string{"mkfs.btrfs", "-q", "-f"}, 128 << 20},
}

// dirtyDevice is a device as it is at a moment at which its filesystem is mounted and in use, with what was
// synced by then.
func dirtyDevice(t *testing.T, name string, mkfs []string, sizeBytes int64) (*faultdev.Mem, map[string][]byte) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("mounting needs root")
	}
	for _, path := range []string{"/dev/fuse", "/dev/loop-control"} {
		if _, err := os.Stat(path); err != nil {
			t.Skip("needs ", path)
		}
	}
	if _, err := exec.LookPath(mkfs[0]); err != nil {
		t.Skip("needs ", mkfs[0])
	}
	mem := faultdev.NewMem(sizeBytes)
	a := attach(t, mem)
	out, err := exec.CommandContext(t.Context(), mkfs[0], append(mkfs[1:], a.Path())...).CombinedOutput()
	require.NoError(t, err, "%s", out)
	dir := t.TempDir()
	require.NoError(t, unix.Mount(a.Path(), dir, name, 0, ""))
	t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) }) // after a failure
	synced := map[string][]byte{}
	rng := rand.New(rand.NewPCG(1, 1))
	for i := range 20 {
		data := make([]byte, 1+rng.IntN(100_000))
		for j := range data {
			data[j] = byte(rng.Uint32())
		}
		name := fmt.Sprint("f", i)
		synced[name] = data
		f, err := os.Create(filepath.Join(dir, name))
		require.NoError(t, err)
		_, err = f.Write(data)
		require.NoError(t, err)
		require.NoError(t, f.Sync())
		require.NoError(t, f.Close())
	}
	bytesNow := make([]byte, sizeBytes)
	require.NoError(t, mem.ReadAt(t.Context(), bytesNow, 0)) // the snapshot
	require.NoError(t, unix.Unmount(dir, 0))
	require.NoError(t, a.Detach(t.Context()))
	taken := faultdev.NewMem(sizeBytes)
	require.NoError(t, taken.WriteAt(t.Context(), bytesNow, 0))
	return taken, synced
}

func attach(t *testing.T, dev trivet.Device) *blockdev.Attachment {
	t.Helper()
	a, err := blockdev.Attach(t.Context(), blockdev.Config{
		Name: "x", RunDir: t.TempDir(), Device: dev, Kind: blockdev.KindFUSE,
	})
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, a.Detach(context.WithoutCancel(t.Context()))) })
	return a
}

// missing lists the synced files that are not in dir as they were written.
func missing(t *testing.T, dir string, synced map[string][]byte) []string {
	t.Helper()
	var gone []string
	for name, want := range synced {
		got, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil || !bytes.Equal(want, got) {
			gone = append(gone, name)
		}
	}
	return gone
}

func sum(t *testing.T, dev trivet.Device) [32]byte {
	t.Helper()
	b := make([]byte, dev.Size())
	require.NoError(t, dev.ReadAt(t.Context(), b, 0))
	return sha256.Sum256(b)
}

// TestReplayForReaders: a read-only mount of a snapshot of a filesystem in use shows all that was synced before it, and
// not a byte of the volume changes.
func TestReplayForReaders(t *testing.T) {
	for _, fs := range filesystems {
		t.Run(fs.name, func(t *testing.T) {
			taken, synced := dirtyDevice(t, fs.name, fs.mkfs, fs.sizeBytes)
			before := sum(t, taken)
			next := faultdev.Wrap(taken)
			d, err := overlay.Create(overlay.Config{
				Path: filepath.Join(t.TempDir(), "o"), Volume: vol, Next: next, Memory: overlay.NewMemory(64 << 20),
			})
			require.NoError(t, err)
			a := attach(t, d)
			dir := t.TempDir()
			require.NoError(t, unix.Mount(a.Path(), dir, fs.name, unix.MS_RDONLY, ""))
			t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) }) // after a failure
			assert.Empty(t, missing(t, dir, synced))
			require.ErrorIs(t, os.WriteFile(filepath.Join(dir, "new"), nil, 0o600), unix.EROFS)
			require.NoError(t, d.Full())
			t.Logf("%s: %d KiB of overlay", fs.name, d.Bytes()>>10)
			require.Positive(t, d.Bytes(), "the journal was clean: this shows nothing")
			require.NoError(t, unix.Unmount(dir, 0))
			require.NoError(t, a.Detach(t.Context()))
			require.NoError(t, d.Remove())
			require.Equal(t, before, sum(t, taken), "the volume has changed")
			for _, op := range next.Ops() {
				require.Equal(t, faultdev.Read, op.Kind)
			}
		})
	}
}

// TestReplayNeedsRoom: a filesystem whose journal does not fit is known, whatever mount(2) says.
func TestReplayNeedsRoom(t *testing.T) {
	for _, fs := range filesystems {
		t.Run(fs.name, func(t *testing.T) {
			taken, synced := dirtyDevice(t, fs.name, fs.mkfs, fs.sizeBytes)
			before := sum(t, taken)
			d, err := overlay.Create(overlay.Config{
				Path: filepath.Join(t.TempDir(), "o"), Volume: vol, Next: taken, Memory: overlay.NewMemory(16 << 10),
			})
			require.NoError(t, err)
			a := attach(t, d)
			dir := t.TempDir()
			err = unix.Mount(a.Path(), dir, fs.name, unix.MS_RDONLY, "")
			t.Logf("mount: %v", err)
			if err == nil {
				t.Logf("%d of %d files are missing", len(missing(t, dir, synced)), len(synced))
				require.NoError(t, unix.Unmount(dir, 0))
			}
			require.ErrorIs(t, d.Full(), trivet.ErrNoSpace)
			if a.Detach(t.Context()) != nil { // the kernel tells once of what it could not write back
				require.NoError(t, a.Detach(t.Context()))
			}
			require.NoError(t, d.Remove())
			require.Equal(t, before, sum(t, taken))
		})
	}
}
