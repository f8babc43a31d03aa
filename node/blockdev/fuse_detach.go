package blockdev

import (
	"context"
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/trivet-csi/trivet"
)

// detach runs alone. Each step may be repeated after an error in a later one.
func (d *fuseDev) detach(ctx context.Context) error {
	if !d.loopOff {
		if err := d.freeLoop(ctx); err != nil {
			return err
		}
		d.loopOff = true
	}
	return d.endServer(ctx)
}

// freeLoop frees the loop device, unless somebody else already has.
func (d *fuseDev) freeLoop(ctx context.Context) error {
	if err := d.checkUnmounted(); err != nil {
		return err
	}
	err := retry(ctx, busyPatience, func() (bool, error) {
		err := d.tryFreeLoop(ctx)
		return errors.Is(err, trivet.ErrInUse), err
	})
	if err != nil {
		return err
	}
	return awaitLoopGone(ctx, d.loop, d.point)
}

// checkUnmounted returns ErrInUse if the device is mounted, or its node is bound to a pod.
func (d *fuseDev) checkUnmounted() error {
	// "/" is a file whose mount is gone, as after a resume in another mount namespace.
	if file, err := backingFile(d.loop.number); err != nil || (file != d.point && file != "/") {
		return err // not our device any more
	}
	mounts, err := readMounts()
	if err != nil {
		return err
	}
	if users := usersOf(mounts, d.loop); len(users) > 0 {
		return fmt.Errorf("%s is mounted on %s: %w", d.path(), users[0].point, trivet.ErrInUse)
	}
	return nil
}

// tryFreeLoop writes back and frees the loop device once. While it runs nobody can mount the
// device, because an exclusive open and a mount exclude each other, in all mount namespaces.
func (d *fuseDev) tryFreeLoop(ctx context.Context) error {
	if n := d.server.opensN.Load(); n > 1 && d.server.err() == nil {
		return fmt.Errorf("%s is open beside the loop device: %w", d.point, trivet.ErrInUse)
	}
	dev, err := os.OpenFile(d.path(), os.O_RDWR|os.O_EXCL, 0)
	if errors.Is(err, unix.EBUSY) {
		return fmt.Errorf("%s is held by a mount elsewhere or a program: %w", d.path(), trivet.ErrInUse)
	}
	if errors.Is(err, unix.ENXIO) || errors.Is(err, os.ErrNotExist) { // being freed, or gone
		return nil
	}
	if err != nil {
		return fmt.Errorf("open loop device: %w", err)
	}
	defer func() { _ = dev.Close() }() // writeBack has the errors
	own, err := ownLoop(dev, d.loop.number, loopTag(d.name), d.point)
	if err != nil {
		return err
	}
	if !own {
		d.log.Warn("loop device was freed by somebody else", "device", d.path())
		return nil
	}
	if err := d.writeBack(ctx, dev); err != nil {
		return err
	}
	return clearLoop(dev, d.loop.number, loopTag(d.name), true)
}

// writeBack writes the device's dirty pages to the Device, drops the pages (H30) and flushes the
// Device. On a dead attachment there is nothing to save.
//
// The flush is ours, not the kernel's by fsync(2): a process that is killed while one of its
// threads waits in the kernel for the process itself cannot die. There are hardly ever pages to
// wait for either, since the kernel writes them back when the last user closes the device.
func (d *fuseDev) writeBack(ctx context.Context, dev *os.File) error {
	const all = unix.SYNC_FILE_RANGE_WAIT_BEFORE | unix.SYNC_FILE_RANGE_WRITE | unix.SYNC_FILE_RANGE_WAIT_AFTER
	err := unix.SyncFileRange(int(dev.Fd()), 0, 0, all)
	if err == nil {
		err = unix.IoctlSetInt(int(dev.Fd()), unix.BLKFLSBUF, 0)
	}
	if err == nil && d.server.err() == nil {
		if err = d.device.Flush(ctx); errors.Is(err, trivet.ErrFenced) {
			d.server.fail(err)
		}
	}
	if err == nil {
		return nil
	}
	if dead := d.server.err(); dead != nil {
		d.log.Warn("unwritten data are lost with the attachment", "err", dead)
		return nil
	}
	return fmt.Errorf("write back %s: %w", d.path(), err)
}

// endServer unmounts the FUSE file and stops the server. The keeper lets go before: as long as it has a
// descriptor, to close ours would not end the connection, and requests would wait for nobody.
func (d *fuseDev) endServer(ctx context.Context) error {
	d.server.stopping.Store(true)
	if err := unmountFuse(ctx, d.point); err != nil {
		return err
	}
	if d.keeper != nil {
		if err := d.keeper.Drop(d.name, false); err != nil && !errors.Is(err, trivet.ErrUnavailable) {
			return err
		}
	}
	return d.server.stop()
}
