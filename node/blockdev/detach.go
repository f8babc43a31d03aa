package blockdev

import (
	"context"
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/trivet-csi/trivet"
)

// ending is one run of detach. done is closed when it is over; then err is set.
type ending struct {
	done chan struct{}
	err  error
}

// Detach writes back what the kernel holds, flushes the Device, and removes the block device
// and all traces of it. It returns ErrInUse, and leaves everything working, while the device is
// mounted in any mount namespace, bound to a pod, or open. If writing back fails on a live
// attachment it returns that error and leaves the attachment for another try; a dead one (see
// Err) is removed regardless. A second Detach returns nil.
//
// ctx ends the wait only: the removal goes on, and the next Detach joins it.
func (a *Attachment) Detach(ctx context.Context) error {
	a.mu.Lock()
	if a.closed {
		a.mu.Unlock()
		return nil
	}
	e := a.ending
	if e == nil {
		e = &ending{done: make(chan struct{})}
		a.ending = e
		go a.runDetach(context.WithoutCancel(ctx), e)
	}
	a.mu.Unlock()
	select {
	case <-e.done:
		return e.err
	case <-ctx.Done():
		return fmt.Errorf("detach %s: %w", a.name, context.Cause(ctx))
	}
}

func (a *Attachment) runDetach(ctx context.Context, e *ending) {
	err := a.detach(ctx)
	a.mu.Lock()
	defer a.mu.Unlock()
	a.closed = err == nil
	a.ending = nil
	if err != nil {
		e.err = fmt.Errorf("detach %s: %w", a.name, err)
	} else {
		a.log.Info("detached", "device", a.Path())
	}
	close(e.done)
}

// detach runs alone. Each step may be repeated after an error in a later one.
func (a *Attachment) detach(ctx context.Context) error {
	if !a.loopOff {
		if err := a.freeLoop(ctx); err != nil {
			return err
		}
		a.loopOff = true
	}
	if err := a.endServer(ctx); err != nil {
		return err
	}
	return a.folder.remove()
}

// freeLoop frees the loop device, unless somebody else already has.
func (a *Attachment) freeLoop(ctx context.Context) error {
	if err := a.checkUnmounted(); err != nil {
		return err
	}
	err := retry(ctx, busyPatience, func() (bool, error) {
		err := a.tryFreeLoop(ctx)
		return errors.Is(err, trivet.ErrInUse), err
	})
	if err != nil {
		return err
	}
	return awaitLoopGone(ctx, a.loop, a.point)
}

// checkUnmounted returns ErrInUse if the device is mounted, or its node is bound to a pod.
func (a *Attachment) checkUnmounted() error {
	if file, err := backingFile(a.loop.number); err != nil || file != a.point {
		return err // not our device any more
	}
	mounts, err := readMounts()
	if err != nil {
		return err
	}
	if users := usersOf(mounts, a.loop); len(users) > 0 {
		return fmt.Errorf("%s is mounted on %s: %w", a.Path(), users[0].point, trivet.ErrInUse)
	}
	return nil
}

// tryFreeLoop writes back and frees the loop device once. While it runs nobody can mount the
// device, because an exclusive open and a mount exclude each other, in all mount namespaces.
func (a *Attachment) tryFreeLoop(ctx context.Context) error {
	if n := a.server.opensN.Load(); n > 1 && a.server.err() == nil {
		return fmt.Errorf("%s is open beside the loop device: %w", a.point, trivet.ErrInUse)
	}
	dev, err := os.OpenFile(a.Path(), os.O_RDWR|os.O_EXCL, 0)
	if errors.Is(err, unix.EBUSY) {
		return fmt.Errorf("%s is held by a mount elsewhere or a program: %w", a.Path(), trivet.ErrInUse)
	}
	if errors.Is(err, unix.ENXIO) || errors.Is(err, os.ErrNotExist) { // being freed, or gone
		return nil
	}
	if err != nil {
		return fmt.Errorf("open loop device: %w", err)
	}
	defer func() { _ = dev.Close() }() // writeBack has the errors
	own, err := ownLoop(dev, a.loop.number, loopTag(a.name), a.point)
	if err != nil {
		return err
	}
	if !own {
		a.log.Warn("loop device was freed by somebody else", "device", a.Path())
		return nil
	}
	if err := a.writeBack(ctx, dev); err != nil {
		return err
	}
	return clearLoop(dev, a.loop.number, loopTag(a.name), true)
}

// writeBack writes the device's dirty pages to the Device, drops the pages (H30) and flushes the
// Device. On a dead attachment there is nothing to save.
//
// The flush is ours, not the kernel's by fsync(2): a process that is killed while one of its
// threads waits in the kernel for the process itself cannot die. There are hardly ever pages to
// wait for either, since the kernel writes them back when the last user closes the device.
func (a *Attachment) writeBack(ctx context.Context, dev *os.File) error {
	const all = unix.SYNC_FILE_RANGE_WAIT_BEFORE | unix.SYNC_FILE_RANGE_WRITE | unix.SYNC_FILE_RANGE_WAIT_AFTER
	err := unix.SyncFileRange(int(dev.Fd()), 0, 0, all)
	if err == nil {
		err = unix.IoctlSetInt(int(dev.Fd()), unix.BLKFLSBUF, 0)
	}
	if err == nil && a.server.err() == nil {
		if err = a.device.Flush(ctx); errors.Is(err, trivet.ErrFenced) {
			a.server.fail(err)
		}
	}
	if err == nil {
		return nil
	}
	if dead := a.server.err(); dead != nil {
		a.log.Warn("unwritten data are lost with the attachment", "err", dead)
		return nil
	}
	return fmt.Errorf("write back %s: %w", a.Path(), err)
}

// endServer unmounts the FUSE file and stops the server.
func (a *Attachment) endServer(ctx context.Context) error {
	a.server.stopping.Store(true)
	if err := unmountFuse(ctx, a.point); err != nil {
		return err
	}
	return a.server.stop()
}
