package blockdev

import (
	"context"
	"errors"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/node/keeper"
)

// vmKeeper runs a keeper until stop, or the test's end.
func vmKeeper(t *testing.T, socket string, watchdog time.Duration) (stop func()) {
	t.Helper()
	k, err := keeper.Open(keeper.Config{Socket: socket, Watchdog: watchdog, Ender: DeviceEnder{}})
	require.NoError(t, err)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- k.Serve(ctx) }()
	return func() {
		cancel()
		require.NoError(t, <-ended)
	}
}

// vmOutcome returns what became of a request, which must not wait for ever.
func vmOutcome(t *testing.T, done <-chan error) error {
	t.Helper()
	select {
	case err := <-done:
		return err
	case <-time.After(3 * time.Minute):
		require.Fail(t, "nobody has answered the request")
		return nil
	}
}

// vmHeldWrite begins a write that the server holds.
func vmHeldWrite(t *testing.T, dev *sharedDev, path string) <-chan error {
	t.Helper()
	f, data, written := openBlock(t, path, 0), pages(t, 4096, 9), make(chan error, 1)
	dev.word(wordHold).Store(1)
	go func() {
		_, err := f.WriteAt(data, 4096)
		written <- errors.Join(err, f.Close()) // the last user of a device keeps an nbd device's name
	}()
	require.Eventually(t, func() bool { return dev.word(wordHeld).Load() > 0 }, time.Minute, time.Millisecond)
	return written
}

// TestVMWatchdog: what waits for a server that never comes back gets an error after the keeper's time.
func TestVMWatchdog(t *testing.T) {
	eachKind(t, func(t *testing.T, kind Kind) {
		socket := filepath.Join(t.TempDir(), "keeper", "sock")
		t.Setenv(vmKeeperEnv, socket)
		stop := vmKeeper(t, socket, time.Second)
		defer stop()
		devFile, runDir := filepath.Join(t.TempDir(), "dev"), t.TempDir()
		dev := makeShared(t, devFile, vmBytes, vmBytesMax)
		h := startHelper(t, "attach", kind, devFile, runDir)
		written := vmHeldWrite(t, dev, h.path)
		h.kill(t)
		require.ErrorIs(t, vmOutcome(t, written), unix.EIO)
		c := keeper.NewClient(socket, nil, nil)
		defer c.Close()
		require.Eventually(t, func() bool {
			all, err := c.List()
			return err == nil && len(all) == 0
		}, time.Minute, time.Millisecond)
		left := Leftovers{RunDir: runDir, Keeper: c}
		if kind == KindUblk {
			names, err := left.Resumable(t.Context())
			require.NoError(t, err)
			require.Empty(t, names, "it is over")
		}
		require.NoError(t, left.CleanOne(t.Context(), "vol"))
		vmNothingLeft(t, runDir)
	})
}

// TestVMWatchdogAfterResume: a server that goes on with a device is watched again, also by a keeper that comes later;
// it is left alone while it serves, and when it has detached the device.
func TestVMWatchdogAfterResume(t *testing.T) {
	eachKind(t, func(t *testing.T, kind Kind) {
		socket := filepath.Join(t.TempDir(), "keeper", "sock")
		t.Setenv(vmKeeperEnv, socket)
		stop := vmKeeper(t, socket, time.Hour)
		devFile, runDir := filepath.Join(t.TempDir(), "dev"), t.TempDir()
		dev := makeShared(t, devFile, vmBytes, vmBytesMax)
		h := startHelper(t, "attach", kind, devFile, runDir)
		h.kill(t)
		h = startHelper(t, "resume", kind, devFile, runDir)
		c := keeper.NewClient(socket, nil, nil)
		served := func() bool {
			all, err := c.List()
			return err == nil && len(all) == 1 && all[0].Served && all[0].Device
		}
		require.True(t, served())
		c.Close()
		stop()
		stop = vmKeeper(t, socket, time.Second)
		defer stop()
		c = keeper.NewClient(socket, nil, nil)
		defer c.Close()
		require.Eventually(t, served, time.Minute, time.Millisecond)
		written := vmHeldWrite(t, dev, h.path)
		h.kill(t)
		require.ErrorIs(t, vmOutcome(t, written), unix.EIO)
		require.NoError(t, Leftovers{RunDir: runDir, Keeper: c}.CleanOne(t.Context(), "vol"))
		vmNothingLeft(t, runDir)

		dev.word(wordHold).Store(0)
		h = startHelper(t, "attach", kind, devFile, runDir)
		require.Eventually(t, served, time.Minute, time.Millisecond)
		h.detach(t)
		all, err := c.List()
		require.NoError(t, err)
		require.Empty(t, all)
		vmNothingLeft(t, runDir)
	})
}

// TestVMNewRequestsWaitNoLonger: the kernel's own limit for new requests of an nbd device is the keeper's, so it works
// where the keeper may not end devices.
func TestVMNewRequestsWaitNoLonger(t *testing.T) {
	eachKind(t, func(t *testing.T, kind Kind) {
		if kind != KindNBD {
			return // has no such limit
		}
		socket := filepath.Join(t.TempDir(), "keeper", "sock")
		t.Setenv(vmKeeperEnv, socket)
		k, err := keeper.Open(keeper.Config{Socket: socket, Watchdog: time.Second}) // without an Ender
		require.NoError(t, err)
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error, 1)
		go func() { ended <- k.Serve(ctx) }()
		defer func() { cancel(); require.NoError(t, <-ended) }()
		devFile, runDir := filepath.Join(t.TempDir(), "dev"), t.TempDir()
		makeShared(t, devFile, vmBytes, vmBytesMax)
		h := startHelper(t, "attach", kind, devFile, runDir)
		f, data, written := openBlock(t, h.path, 0), pages(t, 4096, 9), make(chan error, 1)
		h.kill(t)
		go func() {
			_, err := f.WriteAt(data, 4096)
			written <- errors.Join(err, f.Close())
		}()
		require.ErrorIs(t, vmOutcome(t, written), unix.EIO)
		require.NoError(t, Leftovers{RunDir: runDir}.CleanOne(t.Context(), "vol"))
		vmNothingLeft(t, runDir)
	})
}

// TestVMEnderKnowsItsDevice: a device of that number that is another's is left alone.
func TestVMEnderKnowsItsDevice(t *testing.T) {
	eachKind(t, func(t *testing.T, kind Kind) {
		a, _, runDir := vmAttach(t, kind)
		d := a.dev.(interface{ kept() keeper.Device }).kept()
		require.NoError(t, DeviceEnder{}.Available(d.Kind))
		for _, other := range []keeper.Device{
			{Kind: d.Kind, Number: d.Number, Tag: d.Tag + 1}, {Kind: d.Kind, Number: d.Number + 1, Tag: d.Tag},
		} {
			require.NoError(t, DeviceEnder{}.End(other))
		}
		require.ErrorIs(t, DeviceEnder{}.Available(99), trivet.ErrUnavailable)
		f := openBlock(t, a.Path(), 0)
		_, err := f.WriteAt(pages(t, 4096, 1), 0)
		require.NoError(t, err)
		require.NoError(t, f.Close())
		require.NoError(t, a.Detach(t.Context()))
		vmNothingLeft(t, runDir)
	})
}

// TestVMSharedIsNotResumed: the kernels of nbd and ublk do not tell what they send again, so a device that another node
// may write too ends with its process. What was under way has not been carried out a second time.
func TestVMSharedIsNotResumed(t *testing.T) {
	eachKind(t, func(t *testing.T, kind Kind) {
		devFile, runDir := filepath.Join(t.TempDir(), "dev"), t.TempDir()
		dev := makeShared(t, devFile, vmBytes, vmBytesMax)
		h := startHelper(t, "attach", kind, devFile, runDir)
		written := vmHeldWrite(t, dev, h.path)
		h.kill(t)
		dev.word(wordHold).Store(0)
		_, err := Resume(t.Context(), Config{Name: "vol", RunDir: runDir, Device: dev, Shared: true})
		require.ErrorIs(t, err, trivet.ErrClosed)
		require.ErrorContains(t, err, "another node may write")
		require.Empty(t, written, "it waits")
		require.NoError(t, Leftovers{RunDir: runDir}.CleanOne(t.Context(), "vol"))
		require.ErrorIs(t, vmOutcome(t, written), unix.EIO)
		require.Equal(t, make([]byte, 4096), dev.visible[4096:8192])
		vmNothingLeft(t, runDir)

		a, err := Attach(t.Context(), Config{Name: "vol", RunDir: runDir, Device: dev, Kind: kind, Shared: true})
		require.NoError(t, err)
		require.ErrorIs(t, a.Survives(), trivet.ErrUnavailable)
		require.NoError(t, a.Detach(t.Context()))
	})
}
