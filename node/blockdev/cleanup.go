package blockdev

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/trivet-csi/trivet"
)

// Cleanup removes what dead processes left under runDir: it unmounts, in this mount namespace,
// everything that stands on their block devices, frees the loop devices, unmounts the FUSE files
// and deletes the records. Data that were not fsynced are lost; they were already when the
// process died. It returns the names of the attachments it removed, also beside an error; one
// that cannot be removed does not keep it from the others.
//
// It touches only what a record names, and a loop device only if the kernel says that our file
// is below it. Attachments of live processes, this one included, are left alone. A missing
// runDir is an empty one. Call it before the first Attach.
func Cleanup(ctx context.Context, runDir string, log *slog.Logger) ([]string, error) {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	log = log.With("component", "blockdev")
	runDir, err := filepath.EvalSymlinks(runDir)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	} else if err != nil {
		return nil, fmt.Errorf("clean up: %w", err)
	}
	entries, err := os.ReadDir(runDir)
	if err != nil {
		return nil, fmt.Errorf("clean up: %w", err)
	}
	var cleaned []string
	var errs []error
	for _, e := range entries {
		if ctx.Err() != nil {
			errs = append(errs, fmt.Errorf("clean up: %w", context.Cause(ctx)))
			break
		}
		if !e.IsDir() {
			continue
		}
		done, err := cleanOne(ctx, filepath.Join(runDir, e.Name()), log.With("volume", e.Name()))
		if err != nil {
			errs = append(errs, fmt.Errorf("clean up %s: %w", e.Name(), err))
		} else if done {
			cleaned = append(cleaned, e.Name())
		}
	}
	return cleaned, errors.Join(errs...)
}

// cleanOne removes one attachment, and tells whether there was one to remove.
func cleanOne(ctx context.Context, path string, log *slog.Logger) (bool, error) {
	dir, err := lockFolder(path, false)
	if errors.Is(err, os.ErrNotExist) { // no lock: not a folder of ours
		return false, nil
	}
	if errors.Is(err, errAlive) {
		log.Info("attachment left alone: its process is alive")
		return false, nil
	}
	if err != nil {
		return false, err
	}
	if err := cleanFolder(ctx, dir, log); err != nil {
		dir.unlock()
		return false, err
	}
	log.Info("removed an attachment that a dead process left")
	return true, dir.remove()
}

// cleanFolder undoes what the record in dir says, if there is one. The files stay.
func cleanFolder(ctx context.Context, dir *folder, log *slog.Logger) error {
	rec, err := dir.read()
	if errors.Is(err, os.ErrNotExist) { // nothing is done before there is a record
		return nil
	}
	if err != nil {
		return err
	}
	// The server is dead. Before all else tell the kernel, so that nothing below, and no thread
	// of the corpse, waits for it.
	mounted, err := fuseMounted(rec.Name, rec.Point)
	if err != nil {
		return err
	}
	if mounted {
		if err := abortFuse(rec.Point); err != nil {
			return err
		}
	} else if dir.corpse {
		return fmt.Errorf("process %d was killed, cannot die and its mount is gone; mount fusectl and write 1 to "+
			"/sys/fs/fuse/connections/*/abort: %w", rec.PID, trivet.ErrInUse)
	}
	if rec.Loop != noLoop && rec.BootID == bootID() {
		if err := cleanLoop(ctx, rec, log); err != nil {
			return err
		}
	}
	for mounted { // a point may carry more than one mount
		if err := unmountFuse(ctx, rec.Point); err != nil {
			return err
		}
		if mounted, err = fuseMounted(rec.Name, rec.Point); err != nil {
			return err
		}
	}
	return nil
}

// cleanLoop unmounts everything on the loop device and frees it, if it is ours.
func cleanLoop(ctx context.Context, rec record, log *slog.Logger) error {
	l, err := findLoop(rec.Loop)
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
	own, err := ownLoop(dev, l.number, loopTag(rec.Name), rec.Point)
	if err != nil || !own {
		return err
	}
	if err := unmountUsers(ctx, l, log); err != nil {
		return err
	}
	// A lazily unmounted filesystem that a pod still uses keeps the device: then the kernel has
	// it marked to go with its last user, and that must do.
	if err := clearLoop(dev, l.number, loopTag(rec.Name), false); errors.Is(err, trivet.ErrInUse) {
		log.Warn("loop device is still in use and goes with its last user", "device", l.path(), "err", err)
		return nil
	} else if err != nil {
		return err
	}
	if err := dev.Close(); err != nil {
		return fmt.Errorf("close loop device: %w", err)
	}
	return awaitLoopGone(ctx, l, rec.Point)
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
