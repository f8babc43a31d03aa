package node

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller/meta"
	"github.com/trivet-csi/trivet/node/blockdev"
)

// journal is what the kernel writes into an overlay in these tests.
var journal = bytes.Repeat([]byte("journal!"), trivet.BlockSize/8)

// overlayFiles lists what overlays there are on disk.
func (b *mountBench) overlayFiles(t *testing.T) []string {
	t.Helper()
	found, err := filepath.Glob(filepath.Join(b.runDir, "overlays", "*"))
	require.NoError(t, err)
	return found
}

func (b *mountBench) requireNoOverlay(t *testing.T) {
	t.Helper()
	require.Empty(t, b.overlayFiles(t))
	require.Zero(t, b.mounts.attacher.overlays.memory.UsedBytes())
}

// replays has the kernel write n blocks while it mounts. What the write returns, it ignores.
func (b *mountBench) replays(t *testing.T, n int) {
	t.Helper()
	b.mounter.mounting = func(string) error {
		_ = b.kernel().device.WriteAt(t.Context(), make([]byte, n*trivet.BlockSize), 0)
		return nil
	}
}

// TestReaderHasAnOverlay: the kernel may write to the device of a filesystem that is attached to be read, nothing of it
// reaches the volume, who is served by NBD or is given the mount cannot write, and unstaging takes it away.
func TestReaderHasAnOverlay(t *testing.T) {
	t.Parallel()
	for _, mode := range []meta.AccessMode{meta.SingleNodeReader, meta.MultiNodeReader} {
		b := newMountBench(t)
		b.grant("n1", mode, false)
		for range 2 {
			require.NoError(t, b.mounts.stage(t.Context(), stageReq()))
		}
		assert.Equal(t, []string{"ext4", "noatime", "ro"}, b.mounter.options[stagingDir])
		device := b.kernel().device
		require.NoError(t, device.WriteAt(t.Context(), journal, 0))
		got := make([]byte, trivet.BlockSize)
		require.NoError(t, device.ReadAt(t.Context(), got, 0))
		assert.Equal(t, journal, got)
		nbd, _, readOnly, err := b.mounts.openNBD(t.Context(), vol)
		require.NoError(t, err)
		assert.True(t, readOnly)
		require.ErrorIs(t, nbd.WriteAt(t.Context(), journal, 0), trivet.ErrInvalid)
		b.mounts.attacher.useNBD(vol, -1)
		require.NoError(t, b.mounts.publish(t.Context(), publishReq(targetA)))
		assert.True(t, b.mounter.ro[targetA])
		assert.Len(t, b.overlayFiles(t), 1)
		assert.Positive(t, b.mounts.attacher.overlays.memory.UsedBytes())
		require.ErrorIs(t, b.mounts.detach(t.Context(), vol), trivet.ErrInUse)

		require.NoError(t, b.mounts.unpublish(t.Context(), vol, targetA))
		require.NoError(t, b.mounts.unstage(t.Context(), vol, stagingDir))
		b.requireNoOverlay(t)
		require.Empty(t, b.mounts.records.list())
	}
}

// TestNoOverlay: a writer's device and a reader's raw block device have none, nor has one that is only shown.
func TestNoOverlay(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name  string
		mode  meta.AccessMode
		block bool
	}{
		{"writer", meta.SingleNodeMultiWriter, false},
		{"reader of blocks", meta.MultiNodeReader, true},
	} {
		b := newMountBench(t)
		b.grant("n1", c.mode, false)
		r := stageReq()
		if r.Block = c.block; c.block {
			r.MountFlags = nil
		}
		require.NoError(t, b.mounts.stage(t.Context(), r), c.name)
		b.requireNoOverlay(t)
		if c.block {
			require.ErrorIs(t, b.kernel().device.WriteAt(t.Context(), journal, 0), trivet.ErrInvalid)
		}
	}
}

// TestDeviceIsMadeAnew: one that was shown without an overlay is not mounted, and one with is not shown as a block
// device.
func TestDeviceIsMadeAnew(t *testing.T) {
	t.Parallel()
	b := newMountBench(t)
	b.grant("n1", meta.MultiNodeReader, false)
	_, err := b.mounts.attach(t.Context(), vol)
	require.NoError(t, err)
	require.ErrorIs(t, b.kernel().device.WriteAt(t.Context(), journal, 0), trivet.ErrInvalid)
	require.NoError(t, b.mounts.stage(t.Context(), stageReq()))
	require.Len(t, b.kernels, 2)
	require.NoError(t, b.kernel().device.WriteAt(t.Context(), journal, 0))
	_, err = b.mounts.attach(t.Context(), vol)
	require.ErrorIs(t, err, trivet.ErrInUse, "a device that takes writes is for the mount alone")
	require.NoError(t, b.mounts.unstage(t.Context(), vol, stagingDir))

	at := b.mounts.attacher.get(vol) // a stage that got no further than this
	_, err = b.mounts.show(t.Context(), vol, at, true)
	require.NoError(t, err)
	block := stageReq()
	block.Block, block.MountFlags = true, nil
	require.NoError(t, b.mounts.stage(t.Context(), block))
	require.ErrorIs(t, b.kernel().device.WriteAt(t.Context(), journal, 0), trivet.ErrInvalid)
	b.requireNoOverlay(t)
}

// TestReplayNeedsRoom: a journal that does not fit is an error that says what to do, also if mount(2) was content. It
// leaves nothing behind, and the next try has all the room that there is.
func TestReplayNeedsRoom(t *testing.T) {
	t.Parallel()
	b := newMountBench(t)
	b.mounts.attacher.overlays = newOverlays(&Config{RunDir: b.runDir, ReplayBytes: 4 << 20})
	b.grant("n1", meta.MultiNodeReader, false)
	requireFull := func() {
		t.Helper()
		err := b.mounts.stage(t.Context(), stageReq())
		require.ErrorIs(t, err, trivet.ErrNoSpace)
		require.ErrorContains(t, err, "attach it once for writing")
		require.ErrorContains(t, err, "--replay-memory")
		require.Zero(t, b.mounter.mountedN())
		require.Empty(t, b.mounter.devices)
		require.Empty(t, b.mounts.records.list())
		b.requireNoOverlay(t)
	}
	b.replays(t, 2000)
	requireFull()
	b.mounter.mounting = func(string) error {
		k := b.kernel()
		k.failN = 1 // it tells once of what was not written back
		return errors.Join(errors.New("mount failed"), k.device.WriteAt(t.Context(), make([]byte, 8<<20), 0))
	}
	requireFull()
	b.replays(t, 900)
	require.NoError(t, b.mounts.stage(t.Context(), stageReq()))
	require.NoError(t, b.mounts.publish(t.Context(), publishReq(targetA)))

	// A program that writes to the device itself spoils its own mount, and no other call unmounts what is in use.
	require.Error(t, b.kernel().device.WriteAt(t.Context(), make([]byte, 8<<20), 0))
	require.ErrorIs(t, b.mounts.stage(t.Context(), stageReq()), trivet.ErrNoSpace)
	require.Equal(t, 2, b.mounter.mountedN())
	require.NoError(t, b.mounts.unpublish(t.Context(), vol, targetA))
	require.ErrorIs(t, b.mounts.stage(t.Context(), stageReq()), trivet.ErrNoSpace)
	b.requireNoOverlay(t)
	require.NoError(t, b.mounts.stage(t.Context(), stageReq()))
}

// TestStagedBeforeOverlays: what an earlier version mounted without one stays as it is, for as long as it is staged.
func TestStagedBeforeOverlays(t *testing.T) {
	t.Parallel()
	b := newMountBench(t)
	b.grant("n1", meta.MultiNodeReader, false)
	device, err := b.mounts.attach(t.Context(), vol)
	require.NoError(t, err)
	want, err := checkStage(stageReq())
	require.NoError(t, err)
	rec := b.mounts.records.get(vol)
	rec.Staged, rec.ReadOnly, rec.Device = want, true, b.mounter.devices[device]
	require.NoError(t, b.mounts.records.put(rec))
	b.mounter.table[stagingDir] = []uint64{rec.Device}
	require.NoError(t, b.mounts.stage(t.Context(), stageReq()))
	require.Len(t, b.kernels, 1)
	require.NoError(t, b.mounts.publish(t.Context(), publishReq(targetA)))
	require.NoError(t, b.mounts.unpublish(t.Context(), vol, targetA))
	require.NoError(t, b.mounts.unstage(t.Context(), vol, stagingDir))
	require.NoError(t, b.mounts.stage(t.Context(), stageReq()))
	require.Len(t, b.overlayFiles(t), 1)
}

// TestResumeWithOverlay: a process goes on with what the last one has taken, also with overlays elsewhere than its own.
func TestResumeWithOverlay(t *testing.T) {
	for _, elsewhere := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			b := newResumeBenchOf(t, meta.MultiNodeReader)
			if elsewhere {
				b.mounts.attacher.overlays = newOverlays(&Config{RunDir: b.runDir, CacheDir: t.TempDir()})
			}
			b.mounts.resume(t.Context(), b.leftover(t))
			require.Equal(t, 1, b.resumedN)
			got := make([]byte, trivet.BlockSize)
			at := b.mounts.attacher.get(vol)
			require.NoError(t, at.overlay.ReadAt(t.Context(), got, trivet.BlockSize))
			require.Equal(t, journal, got)
			require.Same(t, at.overlay, at.kernel.(*fakeKernel).device)
			require.NoError(t, b.mounts.stage(t.Context(), stageReq()))
			require.FileExists(t, b.mounts.records.get(vol).Overlay, "for the process after this one")
			require.NoError(t, b.mounts.unpublish(t.Context(), vol, targetA))
			require.NoError(t, b.mounts.unstage(t.Context(), vol, stagingDir))
			require.Len(t, b.kernels, 1, "no second device was made")
			b.requireNoOverlay(t)
		})
	}
}

// TestHandOverWithOverlay: a process that ends in good order leaves it, and writes to it no more.
func TestHandOverWithOverlay(t *testing.T) {
	t.Parallel()
	b := newMountBench(t)
	b.survive = true
	b.grant("n1", meta.MultiNodeReader, false)
	require.NoError(t, b.mounts.stage(t.Context(), stageReq()))
	require.NoError(t, b.kernel().device.WriteAt(t.Context(), journal, 0))
	require.NoError(t, b.mounts.close(t.Context()))
	require.Len(t, b.overlayFiles(t), 1)
	require.Zero(t, b.mounts.attacher.overlays.memory.UsedBytes())
	require.ErrorIs(t, b.kernel().device.WriteAt(t.Context(), journal, 0), trivet.ErrClosed)
	require.NotEmpty(t, b.mounts.records.get(vol).Overlay)
}

// TestResumeWithoutItsOverlay: a device would show another volume than before, and is given up.
func TestResumeWithoutItsOverlay(t *testing.T) {
	for name, spoil := range map[string]func(path string) error{
		"gone":    os.Remove,
		"damaged": func(path string) error { return os.WriteFile(path, []byte("x"), 0o600) },
	} {
		synctest.Test(t, func(t *testing.T) {
			b := newResumeBenchOf(t, meta.MultiNodeReader)
			require.NoError(t, spoil(b.overlayFiles(t)[0]), name)
			ctx, cancel := context.WithTimeout(t.Context(), time.Hour) // of a bubble: it is not tried for ever
			defer cancel()
			b.mounts.resume(ctx, b.leftover(t))
			b.requireGivenUp(t)
			b.requireNoOverlay(t)
		})
	}
}

// TestOverlayGoesWithItsDevice: one that is given up, or died with its process, has none any more; and strangers' files
// stay.
func TestOverlayGoesWithItsDevice(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newResumeBenchOf(t, meta.MultiNodeReader)
		b.checkErr = trivet.ErrClosed
		b.mounts.resume(t.Context(), b.leftover(t))
		b.requireGivenUp(t)
		b.requireNoOverlay(t)
	})
	b := newResumeBenchOf(t, meta.MultiNodeReader)
	left := blockdev.Leftovers{RunDir: filepath.Join(b.runDir, "blockdev")}
	require.NoError(t, b.mounts.cleanUp(t.Context(), left, []string{vol.String()}))
	require.Len(t, b.overlayFiles(t), 1, "its device is to be resumed")
	require.NoError(t, b.mounts.cleanUp(t.Context(), left, nil))
	require.Empty(t, b.overlayFiles(t))
	require.Empty(t, b.mounts.records.get(vol).Overlay)
	o := b.mounts.attacher.overlays
	for _, name := range []string{
		vol.String() + ".overlay", "vol-00000000000000ff.overlay", "x.overlay", vol.String() + ".cache",
	} {
		require.NoError(t, os.WriteFile(filepath.Join(o.dir, name), nil, 0o600))
	}
	require.NoError(t, b.mounts.cleanUp(t.Context(), left, []string{vol.String()}))
	require.Len(t, b.overlayFiles(t), 3)
	require.NoFileExists(t, filepath.Join(o.dir, "vol-00000000000000ff.overlay"))
}

// TestOverlayIsForItsVersion: a program that does not know overlays must not go on with such a device (H36).
func TestOverlayIsForItsVersion(t *testing.T) {
	t.Parallel()
	b := newMountBench(t)
	b.grant("n1", meta.MultiNodeReader, false)
	file := filepath.Join(b.runDir, "volumes", vol.String()+".json")
	version := func() int {
		raw, err := os.ReadFile(file)
		require.NoError(t, err)
		rec, err := decodeRecord(raw)
		require.NoError(t, err)
		return rec.Version
	}
	require.NoError(t, b.mounts.stage(t.Context(), stageReq()))
	require.Equal(t, 2, version())
	require.NoError(t, b.mounts.publish(t.Context(), publishReq(targetA)))
	require.NoError(t, b.mounts.abandon(ptr(b.mounts.records.get(vol))))
	rec := b.mounts.records.get(vol)
	require.NoError(t, rec.dropDevice())
	require.NoError(t, b.mounts.records.put(rec))
	require.Equal(t, 1, version())
}
