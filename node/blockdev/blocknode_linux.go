package blockdev

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/trivet-csi/trivet"
)

// blockNode is a block device of the kernel by its name under /dev. It holds no descriptor: a
// process that kept one would write the device's dirty pages back in its own exit, and wait for itself.
type blockNode struct {
	name         string // such as nbd3
	major, minor uint32
}

func (b blockNode) path() string { return "/dev/" + b.name }

// findBlockNode fills in the device number. ErrNotExist if there is no such device.
func findBlockNode(name string) (blockNode, error) {
	b := blockNode{name: name}
	var st unix.Stat_t
	if err := unix.Stat(b.path(), &st); err != nil {
		return b, fmt.Errorf("stat %s: %w", b.path(), err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFBLK {
		return b, fmt.Errorf("stat %s: not a block device: %w", b.path(), trivet.ErrCorrupt)
	}
	b.major, b.minor = unix.Major(st.Rdev), unix.Minor(st.Rdev)
	return b, nil
}

// mounts returns the mounts that lead to the device: filesystems on it, and bind mounts of its node, by
// which a pod gets a raw block volume.
func (b blockNode) mounts() ([]mountEntry, error) {
	all, err := readMounts()
	if err != nil {
		return nil, err
	}
	dev := fmt.Sprintf("%d:%d", b.major, b.minor)
	return slices.DeleteFunc(all, func(m mountEntry) bool {
		return m.dev != dev && (m.fstype != "devtmpfs" || m.root != "/"+b.name)
	}), nil
}

// opener returns a process that has the device open other than by our descriptor own, as far as this
// pid namespace shows it; 0 if there is none. Neither nbd nor ublk asks who has the device open before it is
// removed, and an exclusive open only keeps mounts away.
func (b blockNode) opener(own int) int {
	links, err := filepath.Glob("/proc/[0-9]*/fd/*")
	if err != nil {
		return 0
	}
	ours := fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), own)
	for _, l := range links {
		target, err := os.Readlink(l)
		// Only what is under /dev is asked for its number: stat of a file on a volume whose server is dead
		// would wait for ever.
		if err != nil || l == ours || !strings.HasPrefix(target, "/dev/") {
			continue
		}
		var st unix.Stat_t
		if unix.Stat(l, &st) == nil && st.Mode&unix.S_IFMT == unix.S_IFBLK && st.Rdev == unix.Mkdev(b.major, b.minor) {
			pid, _ := strconv.Atoi(strings.Split(l, "/")[2])
			return pid
		}
	}
	return 0
}

// openUnused opens the device exclusively, so that nobody can mount it meanwhile in any mount
// namespace. ErrInUse names who uses it.
func (b blockNode) openUnused() (*os.File, error) {
	users, err := b.mounts()
	if err != nil {
		return nil, err
	}
	if len(users) > 0 {
		return nil, fmt.Errorf("%s is mounted on %s: %w", b.path(), users[0].point, trivet.ErrInUse)
	}
	// Not an os.File from the start: in blocking mode, out of the runtime's poller.
	fd, err := unix.Open(b.path(), unix.O_RDWR|unix.O_EXCL|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.EBUSY) {
		return nil, fmt.Errorf("%s is held by a mount elsewhere or a program: %w", b.path(), trivet.ErrInUse)
	}
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", b.path(), err)
	}
	f := os.NewFile(uintptr(fd), b.path())
	if pid := b.opener(fd); pid != 0 {
		_ = f.Close() // nothing was written
		return nil, fmt.Errorf("%s is open in process %d: %w", b.path(), pid, trivet.ErrInUse)
	}
	return f, nil
}

// writeBack writes the device's dirty pages to the Device below, drops them (H30) and flushes dev.
// The flush is not the kernel's, by fsync(2): see fuseDev.writeBack.
func (b blockNode) writeBack(ctx context.Context, f *os.File, dev trivet.Device) error {
	const all = unix.SYNC_FILE_RANGE_WAIT_BEFORE | unix.SYNC_FILE_RANGE_WRITE | unix.SYNC_FILE_RANGE_WAIT_AFTER
	err := unix.SyncFileRange(int(f.Fd()), 0, 0, all)
	if err == nil {
		err = unix.IoctlSetInt(int(f.Fd()), unix.BLKFLSBUF, 0)
	}
	if err == nil {
		err = dev.Flush(ctx)
	}
	if err != nil {
		return fmt.Errorf("write back %s: %w", b.path(), err)
	}
	return nil
}

// unmount unmounts, in this mount namespace, all that stands on the device, the latest first. What is
// busy is detached lazily. REQUIRES: requests to the device do not wait any more.
func (b blockNode) unmount(ctx context.Context, log *slog.Logger) error {
	users, err := b.mounts()
	if err != nil {
		return err
	}
	for _, m := range slices.Backward(users) {
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
		log.Warn("unmounted what stood on a dead attachment", "device", b.path(), "path", m.point)
	}
	return nil
}

// setQueue writes an attribute of the device's queue.
func (b blockNode) setQueue(attribute string, value int) error {
	path := filepath.Join("/sys/block", b.name, "queue", attribute)
	if err := os.WriteFile(path, strconv.AppendInt(nil, int64(value), 10), 0); err != nil {
		return fmt.Errorf("set %s: %w", path, err)
	}
	return nil
}

// sizeBytes returns the size that the kernel has for the device.
func (b blockNode) sizeBytes() (int64, error) {
	text, err := os.ReadFile(filepath.Join("/sys/block", b.name, "size"))
	if err != nil {
		return 0, fmt.Errorf("size of %s: %w", b.name, err)
	}
	sectors, err := strconv.ParseInt(strings.TrimSpace(string(text)), 10, 64)
	if err != nil {
		return 0, fmt.Errorf("size of %s: %w: %w", b.name, err, trivet.ErrCorrupt)
	}
	return sectors * sectorBytes, nil
}

// sectorBytes is the unit of sizes and offsets of the kernel's block layer, whatever the block size.
const sectorBytes = 512

var _ trivet.Device = (*mortal)(nil)

// mortal passes requests on until the Device is fenced, or it is told to fail; from then on everything
// fails with that reason. It is what kernelDev.err tells.
type mortal struct {
	trivet.Device
	log    *slog.Logger
	failed atomic.Pointer[error]
}

// err returns why the device is dead, or nil.
func (m *mortal) err() error {
	if p := m.failed.Load(); p != nil {
		return *p
	}
	return nil
}

// fail makes every later request fail. The first reason stays.
func (m *mortal) fail(err error) {
	if m.failed.CompareAndSwap(nil, &err) {
		m.log.Warn("attachment is dead, all further requests fail", "err", err)
	}
}

// pass looks at the error of a request below.
func (m *mortal) pass(err error) error {
	if err != nil && errors.Is(err, trivet.ErrFenced) {
		m.fail(err)
	}
	return err
}

// ReadAt implements trivet.Device.
func (m *mortal) ReadAt(ctx context.Context, p []byte, off int64) error {
	if err := m.err(); err != nil {
		return err
	}
	return m.pass(m.Device.ReadAt(ctx, p, off))
}

// WriteAt implements trivet.Device.
func (m *mortal) WriteAt(ctx context.Context, p []byte, off int64) error {
	if err := m.err(); err != nil {
		return err
	}
	return m.pass(m.Device.WriteAt(ctx, p, off))
}

// Discard implements trivet.Device.
func (m *mortal) Discard(ctx context.Context, off, n int64) error {
	if err := m.err(); err != nil {
		return err
	}
	return m.pass(m.Device.Discard(ctx, off, n))
}

// WriteZeroes implements trivet.Device.
func (m *mortal) WriteZeroes(ctx context.Context, off, n int64) error {
	if err := m.err(); err != nil {
		return err
	}
	return m.pass(m.Device.WriteZeroes(ctx, off, n))
}

// Flush implements trivet.Device.
func (m *mortal) Flush(ctx context.Context) error {
	if err := m.err(); err != nil {
		return err
	}
	return m.pass(m.Device.Flush(ctx))
}
