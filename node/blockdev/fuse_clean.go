package blockdev

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/trivet-csi/trivet"
)

// clean aborts the connection, frees the loop device with all that stands on it and unmounts the file.
// It touches a loop device only if the kernel says that our file is below it.
func (fuseTransport) clean(ctx context.Context, s *site, rec record) error {
	st, err := decodeFuseState(rec, s.folder.file(deviceName))
	if err != nil {
		return err
	}
	// The server is dead. Before all else tell the kernel, so that nothing below, and no thread
	// of the corpse, waits for it.
	mounted, err := abortAll(ctx, s, st.Point)
	if err != nil {
		return err
	}
	if !mounted && s.folder.corpse {
		return fmt.Errorf("process %d was killed, cannot die and its mount is gone; mount fusectl and write 1 to "+
			"/sys/fs/fuse/connections/*/abort: %w", rec.PID, trivet.ErrInUse)
	}
	if st.Loop != noLoop && rec.BootID == bootID() {
		if err := cleanLoop(ctx, rec.Name, st, s.log); err != nil {
			return err
		}
	}
	for mounted { // a point may carry more than one mount
		if err := unmountFuse(ctx, st.Point); err != nil {
			return err
		}
		if mounted, err = fuseMounted(rec.Name, st.Point); err != nil {
			return err
		}
	}
	return nil
}

// abort ends the connection, whoever has descriptors of it.
func (fuseTransport) abort(ctx context.Context, s *site, rec record) error {
	st, err := decodeFuseState(rec, s.folder.file(deviceName))
	if err != nil {
		return err
	}
	_, err = abortAll(ctx, s, st.Point)
	return err
}

// abortAll aborts the connection through the keeper, which has it when the mount is in another mount
// namespace, too, and through the mount. It tells whether the file is mounted here.
func abortAll(ctx context.Context, s *site, point string) (mounted bool, err error) {
	if s.keeper != nil {
		err := whileInUse(ctx, func() error { return s.keeper.Drop(s.name, true) })
		if err != nil && !errors.Is(err, trivet.ErrUnavailable) {
			return false, err
		}
	}
	mounted, err = fuseMounted(s.name, point)
	if err == nil && mounted {
		err = abortFuse(point)
	}
	return mounted, err
}

// cleanLoop unmounts everything on the loop device and frees it, if it is ours.
func cleanLoop(ctx context.Context, name string, st fuseState, log *slog.Logger) error {
	l, err := findLoop(st.Loop)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	} else if err != nil {
		return err
	}
	dev, err := os.OpenFile(l.path(), os.O_RDONLY, 0)
	if errors.Is(err, unix.ENXIO) || errors.Is(err, os.ErrNotExist) {
		return nil
	} else if err != nil {
		return fmt.Errorf("open loop device: %w", err)
	}
	defer func() { _ = dev.Close() }() // nothing was written
	own, err := ownLoop(dev, l.number, loopTag(name), st.Point)
	if err != nil || !own {
		return err
	}
	if err := unmountUsers(ctx, l, log); err != nil {
		return err
	}
	// A lazily unmounted filesystem that a pod still uses keeps the device: then the kernel has
	// it marked to go with its last user, and that must do.
	if err := clearLoop(dev, l.number, loopTag(name), false); errors.Is(err, trivet.ErrInUse) {
		log.Warn("loop device is still in use and goes with its last user", "device", l.path(), "err", err)
		return nil
	} else if err != nil {
		return err
	}
	if err := dev.Close(); err != nil {
		return fmt.Errorf("close loop device: %w", err)
	}
	return awaitLoopGone(ctx, l, st.Point)
}

// unmountUsers unmounts all filesystems on the device and bind mounts of its node, the latest
// first. One that is busy is detached lazily.
func unmountUsers(ctx context.Context, l loopDevice, log *slog.Logger) error {
	mounts, err := readMounts()
	if err != nil {
		return err
	}
	for _, m := range slices.Backward(usersOf(mounts, l)) {
		if ctx.Err() != nil {
			return fmt.Errorf("unmount %s: %w", m.point, context.Cause(ctx))
		}
		err := unix.Unmount(m.point, unix.UMOUNT_NOFOLLOW)
		if errors.Is(err, unix.EBUSY) {
			err = unix.Unmount(m.point, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
		}
		if err != nil && !errors.Is(err, unix.EINVAL) { // EINVAL: went with a mount above it
			return fmt.Errorf("unmount %s: %w", m.point, err)
		}
		log.Warn("unmounted what stood on a dead attachment", "device", l.path(), "path", m.point)
	}
	return nil
}
