package blockdev

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/trivet-csi/trivet"
)

const (
	fusePath   = "/dev/fuse"
	fuseFstype = "fuse.trivet"
)

// fuseSource is the source that mountinfo shows for the attachment called name.
func fuseSource(name string) string { return "trivet:" + name }

// mountFuse mounts a new FUSE filesystem, whose root is a regular file, over the file at point
// and returns the connection, non-blocking. The kernel sends INIT at once.
func mountFuse(name, point string) (int, error) {
	fd, err := unix.Open(fusePath, unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("open %s: %w", fusePath, err)
	}
	opts := fmt.Sprintf("fd=%d,rootmode=%o,user_id=0,group_id=0,max_read=%d", fd, unix.S_IFREG, requestBytesMax)
	err = unix.Mount(fuseSource(name), point, fuseFstype, unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOATIME, opts)
	if err != nil {
		return -1, errors.Join(fmt.Errorf("mount fuse on %s: %w", point, err), unix.Close(fd))
	}
	return fd, nil
}

// fuseMounted tells whether the FUSE file of the attachment called name is mounted on point.
func fuseMounted(name, point string) (bool, error) {
	mounts, err := readMounts()
	if err != nil {
		return false, err
	}
	for _, m := range mounts {
		if m.point == point && m.fstype == fuseFstype && m.source == fuseSource(name) {
			return true, nil
		}
	}
	return false, nil
}

// fuseConnection returns the minor device number of the file's filesystem, by which fusectl names the
// connection; 0 if the mount is not to be seen.
func fuseConnection(point string) uint32 {
	mounts, err := readMounts()
	if err != nil {
		return 0
	}
	for _, m := range mounts {
		if minor, ok := strings.CutPrefix(m.dev, "0:"); ok && m.point == point && m.fstype == fuseFstype {
			n, err := strconv.ParseUint(minor, 10, 32)
			if err == nil {
				return uint32(n)
			}
		}
	}
	return 0
}

// abortFuse makes the kernel fail every request, waiting or to come, of the connection mounted
// on point, whether or not the mount is busy. Not mounted is no error.
func abortFuse(point string) error {
	// MNT_FORCE aborts first and only then finds out that the mount is busy.
	err := unix.Unmount(point, unix.MNT_FORCE|unix.UMOUNT_NOFOLLOW)
	if err != nil && !errors.Is(err, unix.EBUSY) && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("abort fuse on %s: %w", point, err)
	}
	return nil
}

// unmountFuse unmounts point, patiently: the loop driver drops its file a moment after the loop
// device is gone. A mount that stays busy is detached lazily. Not mounted is no error.
func unmountFuse(ctx context.Context, point string) error {
	err := retry(ctx, busyPatience, func() (bool, error) {
		err := unix.Unmount(point, unix.UMOUNT_NOFOLLOW)
		return errors.Is(err, unix.EBUSY), err
	})
	if errors.Is(err, unix.EBUSY) {
		err = unix.Unmount(point, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
	}
	if err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("unmount fuse from %s: %w", point, err)
	}
	return nil
}

// fileSize asks the kernel, and so the server, for the size of the FUSE file, in bytes, and the
// device number of its filesystem. Asking also renews the size that the kernel has cached.
func fileSize(point string) (sizeBytes int64, dev uint64, err error) {
	var st unix.Stat_t
	if err := unix.Stat(point, &st); err != nil {
		return 0, 0, fmt.Errorf("stat %s: %w", point, err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return 0, 0, fmt.Errorf("stat %s: mode %o is not a regular file: %w", point, st.Mode, trivet.ErrCorrupt)
	}
	return st.Size, st.Dev, nil
}

// openFile opens the FUSE file for the loop device; the caller closes the descriptor.
//
// It must not be an os.File: opening one adds it to the runtime's poller, which asks the kernel
// whether the file is ready, which asks our server, which waits in that poller. To spare other
// code in this process the same deadlock, openFile asks once itself, by an ordinary system
// call: the server says ENOSYS, and the kernel never asks again.
//
// It asks for the size too: before Linux 6.16 the loop driver takes the size that the kernel holds for the
// file, which is zero until somebody asked the server (drivers/block/loop.c: get_loop_size).
func openFile(point string) (int, error) {
	fd, err := unix.Open(point, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("open fuse file: %w", err)
	}
	if _, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0); err != nil && err != unix.EINTR {
		return -1, errors.Join(fmt.Errorf("poll fuse file: %w", err), unix.Close(fd))
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return -1, errors.Join(fmt.Errorf("stat fuse file: %w", err), unix.Close(fd))
	}
	return fd, nil
}

const (
	// busyPatience is how long we wait for a brief user of a device or mount (a prober, the
	// kernel's own delayed work) to go away before we call it in use.
	busyPatience = 2 * time.Second

	retryEvery = 10 * time.Millisecond

	// retryLeast is the part of the tries for which patience has time that are made however long they take: time in
	// which the machine stood still gave nobody else the chance to go away.
	retryLeast = 8
)

// retry calls try until it returns false, patience is over or ctx ends, and returns the last
// error.
func retry(ctx context.Context, patience time.Duration, try func() (again bool, err error)) error {
	deadline := time.Now().Add(patience)
	for left := patience / retryEvery / retryLeast; ; left-- {
		again, err := try()
		if !again || left <= 0 && time.Now().After(deadline) {
			return err
		}
		select {
		case <-time.After(retryEvery):
		case <-ctx.Done():
			return errors.Join(err, context.Cause(ctx))
		}
	}
}
