package server_test

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/api"
	"github.com/trivet-csi/trivet/internal/loopdev"
	"github.com/trivet-csi/trivet/internal/testutil"
	"github.com/trivet-csi/trivet/server"
)

// smallDisk mounts a real filesystem of n bytes and returns its mount point.
func smallDisk(t *testing.T, n int64) string {
	t.Helper()
	image, dir := filepath.Join(t.TempDir(), "disk.img"), t.TempDir()
	f, err := os.Create(image)
	require.NoError(t, err)
	require.NoError(t, f.Truncate(n))
	require.NoError(t, f.Close())
	require.NoError(t, loopdev.With(image, func(device string) error {
		for _, args := range [][]string{{"mkfs.ext4", "-q", "-m0", device}, {"mount", "-t", "ext4", device, dir}} {
			out, err := exec.CommandContext(t.Context(), args[0], args[1:]...).CombinedOutput()
			require.NoError(t, err, "%s", out)
		}
		return nil
	}))
	t.Cleanup(func() {
		require.Eventually(t, func() bool { // a program that another test starts has its files until it runs
			err := unix.Unmount(dir, 0)
			require.True(t, err == nil || errors.Is(err, unix.EBUSY), "%v", err)
			return err == nil
		}, time.Minute, 20*time.Millisecond)
	})
	return dir
}

// TestFullDisk fills the disks below a volume that, with its log, needs more than they have: writes get
// "no space" before any disk is full, what was flushed stays readable, no server dies, and deleting
// the volume makes room again without a restart (H26).
func TestFullDisk(t *testing.T) {
	t.Parallel()
	if testing.Short() {
		t.Skip("fills a gigabyte; not with -short")
	}
	if os.Geteuid() != 0 {
		t.Skip("needs root: it mounts filesystems")
	}
	disks := []string{smallDisk(t, 1<<30), smallDisk(t, 1<<30), smallDisk(t, 1<<30)}
	c := testutil.StartCluster(t, 3, func(i int, cfg *server.Config) {
		cfg.Disks, cfg.LogLanes, cfg.LogSegmentBytes = []string{disks[i]}, 0, 0 // as the size of the disk has it
	})
	createBy(t, c, &api.CreateVolumeRequest{Name: "full", SizeBytes: 780 << 20})
	client, stop := serveNBD(t, c, 0, "full")
	mustWrite(t, client, 0, 'k')

	const chunk = 1 << 20
	var err error
	data, filled := make([]byte, chunk), int64(0)
	for ; filled < 779; filled++ {
		for i := range data {
			data[i] = byte(int64(i)*filled + filled + 1) // no two blocks alike
		}
		if err = client.write(data, (filled+1)*chunk); err != nil {
			break
		}
	}
	require.ErrorContains(t, err, "nbd error 28", "want ENOSPC before the disk is full, after %d MiB", filled)
	requireBlock(t, client, 0, 'k')
	stop()

	_, err = c.Admin(0).DeleteVolume(t.Context(), &api.VolumeRequest{Name: "full"})
	require.NoError(t, err)
	require.NoError(t, writeSomeTo(t, c, "after"))
	c.AwaitUp(3)
}

// writeSomeTo makes a volume, as soon as there is room for one, and writes to it.
func writeSomeTo(t *testing.T, c *testutil.Cluster, name string) error {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*eventuallyTimeout)
	defer cancel()
	var err error
	for ctx.Err() == nil {
		_, err = c.Admin(0).CreateVolume(ctx, &api.CreateVolumeRequest{Name: name, SizeBytes: 64 << 20})
		if err == nil {
			break
		}
		pauseFor(ctx)
	}
	if err != nil {
		return err
	}
	client, stop := serveNBD(t, c, 1, name)
	defer stop()
	for ctx.Err() == nil { // the engine gives space back in the background
		if err = client.write(pattern('r'), 8*trivet.BlockSize); err == nil {
			return client.flush()
		}
		pauseFor(ctx)
	}
	return err
}
