package blockdev

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/trivet-csi/trivet"
)

const (
	loopControlPath = "/dev/loop-control"
	loFlagDirectIO  = 16
	loopTriesMax    = 64 // losing the race for a free device that often means something else is wrong
	loopGoneWait    = 10 * time.Second
)

// loopDevice is a loop device by number. It holds no descriptor: if we kept one, the kernel
// would write the device's dirty pages back in our exit, to our own dead server, and hang.
type loopDevice struct {
	number       int
	major, minor uint32
}

func (l loopDevice) path() string { return fmt.Sprintf("/dev/loop%d", l.number) }

// findLoop fills in the device number of /dev/loopN.
func findLoop(number int) (loopDevice, error) {
	l := loopDevice{number: number}
	var st unix.Stat_t
	if err := unix.Stat(l.path(), &st); err != nil {
		return l, fmt.Errorf("stat %s: %w", l.path(), err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFBLK {
		return l, fmt.Errorf("stat %s: not a block device: %w", l.path(), trivet.ErrCorrupt)
	}
	l.major, l.minor = unix.Major(st.Rdev), unix.Minor(st.Rdev)
	return l, nil
}

// configureLoop gives the open file to a free loop device. claim is told the number before the
// device is configured, and may be told several until one is got.
func configureLoop(ctx context.Context, file int, tag string, claim func(number int) error) (loopDevice, error) {
	ctl, err := os.OpenFile(loopControlPath, os.O_RDWR, 0)
	if err != nil {
		return loopDevice{}, fmt.Errorf("open loop control: %w", err)
	}
	defer func() { _ = ctl.Close() }() // nothing was written
	for range loopTriesMax {
		if ctx.Err() != nil {
			return loopDevice{}, fmt.Errorf("configure loop device: %w", context.Cause(ctx))
		}
		number, err := unix.IoctlRetInt(int(ctl.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			return loopDevice{}, fmt.Errorf("get a free loop device: %w", err)
		}
		if err := claim(number); err != nil {
			return loopDevice{}, err
		}
		l, err := tryConfigure(file, tag, number)
		if errors.Is(err, unix.EBUSY) || errors.Is(err, errLoopGoing) { // another process was quicker
			continue
		}
		return l, err
	}
	return loopDevice{}, fmt.Errorf("configure loop device: lost the race for one %d times: %w",
		loopTriesMax, trivet.ErrUnavailable)
}

// errLoopGoing: since the loop device was free, another process has taken it and is giving it back, and the kernel lets
// nobody open it meanwhile.
var errLoopGoing = errors.New("the loop device is being freed")

func tryConfigure(file int, tag string, number int) (loopDevice, error) {
	l, err := findLoop(number)
	if err != nil {
		return l, err
	}
	dev, err := os.OpenFile(l.path(), os.O_RDWR, 0)
	if errors.Is(err, unix.ENXIO) {
		return l, errLoopGoing
	}
	if err != nil {
		return l, fmt.Errorf("open loop device: %w", err)
	}
	defer func() { _ = dev.Close() }() // nothing was written
	cfg := unix.LoopConfig{Fd: uint32(file), Size: trivet.BlockSize}
	cfg.Info.Flags = loFlagDirectIO
	copy(cfg.Info.File_name[:len(cfg.Info.File_name)-1], tag)
	if err := unix.IoctlLoopConfigure(int(dev.Fd()), &cfg); err != nil {
		return l, fmt.Errorf("configure %s: %w", l.path(), err)
	}
	// A page that a former user of this number left in the cache would be read as ours (H30).
	if err := unix.IoctlSetInt(int(dev.Fd()), unix.BLKFLSBUF, 0); err != nil {
		return l, errors.Join(fmt.Errorf("drop page cache of %s: %w", l.path(), err), clearLoop(dev, number, tag, false))
	}
	return l, nil
}

// loopTag names an attachment in its loop device, cut to what the kernel keeps.
func loopTag(name string) string {
	tag := fuseSource(name)
	return tag[:min(len(tag), 63)]
}

// ownLoop tells whether the open loop device has our FUSE file, mounted on point, below it. A
// file whose mount is gone, lazily or with its mount namespace, shows as "/"; then the tag
// decides, or that the file's server is dead, on which the kernel does not give the tag away.
func ownLoop(dev *os.File, number int, tag, point string) (bool, error) {
	switch file, err := backingFile(number); {
	case err != nil:
		return false, err
	case file == point:
		return true, nil
	case file != "/":
		return false, nil
	}
	info, err := unix.IoctlLoopGetStatus64(int(dev.Fd()))
	if errors.Is(err, unix.ENXIO) {
		return false, nil
	}
	if errors.Is(err, unix.ENOTCONN) || errors.Is(err, unix.ECONNABORTED) {
		return true, nil
	}
	if err != nil {
		return false, fmt.Errorf("status of %s: %w", dev.Name(), err)
	}
	name, _, _ := bytes.Cut(info.File_name[:], []byte{0})
	return string(name) == tag, nil
}

// clearLoop frees the open loop device. The kernel refuses nothing here: while others have the
// device open it only marks it to go with its last user. clearLoop finds that out and returns
// ErrInUse, having taken the mark off again if undo is set; dev, still open, keeps the last of
// the others from freeing the device in between. On success it is free once dev is closed.
//
// It asks the kernel nothing that would make it ask our server: with a dead one that hangs.
func clearLoop(dev *os.File, number int, tag string, undo bool) error {
	fd := int(dev.Fd())
	if err := unix.IoctlSetInt(fd, unix.LOOP_CLR_FD, 0); err != nil && !errors.Is(err, unix.ENXIO) {
		return fmt.Errorf("free %s: %w", dev.Name(), err)
	}
	again, err := os.Open(dev.Name())
	if errors.Is(err, unix.ENXIO) { // it is going, and takes no new users
		return nil
	}
	if err != nil {
		return fmt.Errorf("free %s: %w", dev.Name(), err)
	}
	_ = again.Close() // nothing was written
	if file, err := backingFile(number); err != nil || file == "" {
		return err // kernels before 6.11 free it at once
	}
	if undo {
		info := unix.LoopInfo64{} // all else that can be changed is zero anyway
		copy(info.File_name[:len(info.File_name)-1], tag)
		if err := unix.IoctlLoopSetStatus64(fd, &info); err != nil {
			return fmt.Errorf("free %s: it is open elsewhere, undo: %w", dev.Name(), err)
		}
	}
	return fmt.Errorf("free %s: it is open elsewhere: %w", dev.Name(), trivet.ErrInUse)
}

// awaitLoopGone waits until the kernel has dropped the file behind the loop device.
func awaitLoopGone(ctx context.Context, l loopDevice, point string) error {
	return retry(ctx, loopGoneWait, func() (bool, error) {
		if file, err := backingFile(l.number); err != nil || file != point {
			return false, err
		}
		return true, fmt.Errorf("free %s: the kernel still uses it: %w", l.path(), trivet.ErrInUse)
	})
}

// backingFile returns what the kernel shows as the file behind a loop device, "" when it has
// none. After a lazy unmount the kernel shows "/".
func backingFile(number int) (string, error) {
	b, err := os.ReadFile(fmt.Sprintf("/sys/block/loop%d/loop/backing_file", number))
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ENODEV) || errors.Is(err, unix.ENXIO) {
		return "", nil
	}
	if err != nil {
		return "", fmt.Errorf("backing file of loop%d: %w", number, err)
	}
	return strings.TrimSuffix(string(b), "\n"), nil
}

// growLoop makes the loop device take over the present size of its file, and returns it.
func growLoop(l loopDevice) (sizeBytes int64, err error) {
	dev, err := os.Open(l.path())
	if err != nil {
		return 0, fmt.Errorf("open loop device: %w", err)
	}
	defer func() { _ = dev.Close() }() // nothing was written
	if err := unix.IoctlSetInt(int(dev.Fd()), unix.LOOP_SET_CAPACITY, 0); err != nil {
		return 0, fmt.Errorf("resize %s: %w", l.path(), err)
	}
	return deviceSize(dev)
}

// deviceSize returns the size of an open block device in bytes.
func deviceSize(dev *os.File) (int64, error) {
	end, err := dev.Seek(0, 2)
	if err != nil {
		return 0, fmt.Errorf("size of %s: %w", dev.Name(), err)
	}
	return end, nil
}
