package node

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	mountutils "k8s.io/mount-utils"
	utilexec "k8s.io/utils/exec"

	"github.com/trivet-csi/trivet"
)

const (
	formatsAtOnce = 2 // mkfs writes much; more at a time make all of them slower
	formatTimeout = 5 * time.Minute
	probeBytes    = 1 << 20 // where every known filesystem has its superblock
)

// linuxMounter is the real Mounter. Formatting and checking is left to mount-utils, as every driver
// does it; bind mounts use the kernel's descriptor-based calls (Linux 5.12), with which no path is
// looked up twice and so cannot be swapped between check and use.
type linuxMounter struct {
	format *mountutils.SafeFormatAndMount
}

// NewMounter returns the Mounter of the machine. It needs CAP_SYS_ADMIN, and blkid, fsck and mkfs.
func NewMounter() Mounter {
	return &linuxMounter{format: mountutils.NewSafeFormatAndMount(mountutils.NewWithoutSystemd(""), utilexec.New(),
		mountutils.WithMaxConcurrentFormat(formatsAtOnce, formatTimeout))}
}

func (m *linuxMounter) FormatAndMount(ctx context.Context, device, target, fsType string, options []string) error {
	if err := requireTools(fsType); err != nil {
		return err
	}
	if err := probeDevice(device); err != nil {
		return err
	}
	dir, err := openNoSymlink(target, unix.O_PATH|unix.O_DIRECTORY)
	if err != nil {
		return fmt.Errorf("mount at %s: %w", target, err)
	}
	defer unix.Close(dir) //nolint:errcheck // a path handle has nothing to lose
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("mount at %s: %w", target, err)
	}
	if err := m.format.FormatAndMount(device, target, fsType, slices.Clone(options)); err != nil {
		return mountError(device, target, err)
	}
	return m.checkMounted(device, target)
}

// checkMounted makes sure that the device appeared where it was wanted: mount(8) looks the path up
// by itself.
func (m *linuxMounter) checkMounted(device, target string) error {
	want, err := m.DeviceNumber(device)
	if err != nil {
		return err
	}
	got, ok, err := m.Mounted(target)
	if err != nil {
		return err
	}
	if !ok || got != want {
		return fmt.Errorf("mount at %s: %s is not there after mounting it: %w", target, device, ErrUnsupported)
	}
	return nil
}

// requireTools returns ErrUnsupported naming the package that is missing.
func requireTools(fsType string) error {
	for _, t := range []struct{ tool, pkg string }{
		{"mkfs." + fsType, filesystems[fsType].tools},
		{"blkid", "util-linux"},
		{"fsck", "util-linux"},
		{"mount", "util-linux"},
		{"umount", "util-linux"},
		{"dd", "coreutils"},
		{"sync", "coreutils"},
	} {
		if _, err := exec.LookPath(t.tool); err != nil {
			return fmt.Errorf("%s is not installed on this node, install package %s: %w", t.tool, t.pkg, ErrUnsupported)
		}
	}
	return nil
}

// probeDevice reads the head of the device. blkid answers the same for a blank device and for one
// whose reads fail, and a filesystem must never be made over data that could not be read (H31).
func probeDevice(device string) error {
	// Direct, or the answer may come from the page cache.
	out, err := runTool("dd", "if="+device, "of=/dev/null", "bs="+strconv.Itoa(probeBytes), "count=1", "iflag=direct",
		"status=none")
	if err != nil {
		return fmt.Errorf("probe %s, not taken for blank: %w: %s: %w", device, err, out, trivet.ErrUnavailable)
	}
	return nil
}

// runTool runs a tool to its end and returns what it said.
//
// Whatever may wait for one of our own block devices must run in another process: a thread of ours
// that waits for a device which this process serves cannot be killed, keeps the device's descriptors
// open, and so waits for ever once the process has died. Another process gets EIO then. For the same
// reason the tool does not end with a context.
func runTool(name string, args ...string) (string, error) {
	//nolint:noctx // see above
	cmd := exec.Command(name, args...)
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	out, err := cmd.CombinedOutput()
	return strings.TrimSpace(string(out)), err
}

// mountError adds the sentinel that says whether another try can help.
func mountError(device, target string, err error) error {
	var me mountutils.MountError
	if errors.As(err, &me) {
		switch me.Type {
		case mountutils.FilesystemMismatch, mountutils.UnformattedReadOnly:
			return fmt.Errorf("mount %s at %s: %w: %w", device, target, err, ErrUnsupported)
		case mountutils.HasFilesystemErrors:
			return fmt.Errorf("mount %s at %s: %w: %w", device, target, err, trivet.ErrCorrupt)
		case mountutils.GetDiskFormatFailed:
			return fmt.Errorf("mount %s at %s: %w: %w", device, target, err, trivet.ErrUnavailable)
		case mountutils.FormatFailed, mountutils.UnknownMountError:
		}
	}
	return fmt.Errorf("mount %s at %s: %w", device, target, err)
}

func (m *linuxMounter) Bind(source, target string, block, readOnly bool) error {
	if err := m.bind(source, target, block, readOnly); err != nil {
		return fmt.Errorf("bind %s at %s: %w", source, target, err)
	}
	return nil
}

func (m *linuxMounter) bind(source, target string, block, readOnly bool) error {
	at, err := makeTarget(target, block)
	if err != nil {
		return err
	}
	defer unix.Close(at) //nolint:errcheck // a path handle has nothing to lose
	tree, err := unix.OpenTree(unix.AT_FDCWD, source, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_SYMLINK_NOFOLLOW)
	if err != nil {
		return fmt.Errorf("open_tree: %w", err)
	}
	defer unix.Close(tree) //nolint:errcheck // dissolves the mount if it was not attached
	if readOnly {
		attr := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY}
		if err := unix.MountSetattr(tree, "", unix.AT_EMPTY_PATH, &attr); err != nil {
			return fmt.Errorf("mount_setattr: %w", err)
		}
	}
	return moveMount(tree, at)
}

// moveMount attaches a detached mount to what the descriptor at names.
func moveMount(tree, at int) error {
	if err := unix.MoveMount(tree, "", at, "", unix.MOVE_MOUNT_F_EMPTY_PATH|unix.MOVE_MOUNT_T_EMPTY_PATH); err != nil {
		return fmt.Errorf("move_mount: %w", err)
	}
	return nil
}

func (m *linuxMounter) Shade(target string) error {
	at, err := openNoSymlink(target, unix.O_PATH|unix.O_DIRECTORY)
	if err != nil {
		return fmt.Errorf("shade %s: %w", target, err)
	}
	defer unix.Close(at) //nolint:errcheck // a path handle has nothing to lose
	tree, err := emptyReadOnly()
	if err != nil {
		return fmt.Errorf("shade %s: %w", target, err)
	}
	defer unix.Close(tree) //nolint:errcheck // dissolves the mount if it was not attached
	if err := moveMount(tree, at); err != nil {
		return fmt.Errorf("shade %s: %w", target, err)
	}
	return nil
}

// emptyReadOnly returns a detached mount of an empty read-only tmpfs.
func emptyReadOnly() (int, error) {
	fsfd, err := unix.Fsopen("tmpfs", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return -1, fmt.Errorf("fsopen: %w", err)
	}
	defer unix.Close(fsfd) //nolint:errcheck // the mount holds the filesystem
	if err := unix.FsconfigSetString(fsfd, "source", "trivet-lost"); err != nil {
		return -1, fmt.Errorf("fsconfig: %w", err)
	}
	if err := unix.FsconfigCreate(fsfd); err != nil {
		return -1, fmt.Errorf("fsconfig: %w", err)
	}
	attrs := unix.MOUNT_ATTR_RDONLY | unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV | unix.MOUNT_ATTR_NOEXEC
	fd, err := unix.Fsmount(fsfd, unix.FSMOUNT_CLOEXEC, attrs)
	if err != nil {
		return -1, fmt.Errorf("fsmount: %w", err)
	}
	return fd, nil
}

// Unmount looks first and lets umount(8) do it; see runTool. The path cannot turn into a symlink in
// between, for the kernel renames and removes no mount point.
func (m *linuxMounter) Unmount(target string, lazy bool) error {
	_, mounted, err := m.Mounted(target)
	if err != nil || !mounted {
		return err
	}
	args := []string{"--internal-only", "--no-canonicalize", "--no-mtab", target}
	if lazy {
		// After a lazy unmount nobody waits for what is dirty. An error is that of a device that is
		// dead already, which its owner has logged.
		_, _ = runTool("sync", "--file-system", target)
		args = append([]string{"--lazy"}, args...)
	}
	out, err := runTool("umount", args...)
	if err == nil {
		return nil
	}
	if _, mounted, lookErr := m.Mounted(target); lookErr == nil && !mounted {
		return nil // somebody else was first
	}
	if strings.Contains(strings.ReplaceAll(out, target, ""), "busy") { // a path may have any name
		return fmt.Errorf("unmount %s: a process uses it: %w", target, trivet.ErrInUse)
	}
	return fmt.Errorf("unmount %s: %w: %s", target, err, out)
}

func (m *linuxMounter) Remove(target string) error {
	st, err := os.Lstat(target)
	switch {
	case errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR):
		return nil
	case err != nil:
		return fmt.Errorf("remove %s: %w", target, err)
	case !st.IsDir() && (!st.Mode().IsRegular() || st.Size() != 0):
		return fmt.Errorf("remove %s: it is not an empty file or directory: %w", target, trivet.ErrInvalid)
	}
	err = os.Remove(target)
	if errors.Is(err, unix.ENOTEMPTY) {
		return fmt.Errorf("remove %s: something was written into it: %w", target, trivet.ErrInvalid)
	}
	return err
}

func (m *linuxMounter) Mounted(target string) (uint64, bool, error) {
	var st unix.Statx_t
	err := unix.Statx(unix.AT_FDCWD, target, unix.AT_SYMLINK_NOFOLLOW, unix.STATX_TYPE, &st)
	switch {
	case errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR):
		return 0, false, nil
	case errors.Is(err, unix.ENOTCONN) || errors.Is(err, unix.EIO) || errors.Is(err, unix.ESTALE):
		return 0, true, nil // a dead mount is one
	case err != nil:
		return 0, false, &fs.PathError{Op: "statx", Path: target, Err: err}
	}
	device := unix.Mkdev(st.Dev_major, st.Dev_minor)
	if st.Mode&unix.S_IFMT == unix.S_IFBLK {
		device = unix.Mkdev(st.Rdev_major, st.Rdev_minor)
	}
	return device, st.Attributes&unix.STATX_ATTR_MOUNT_ROOT != 0, nil
}

func (m *linuxMounter) DeviceNumber(device string) (uint64, error) {
	var st unix.Stat_t
	if err := unix.Stat(device, &st); err != nil {
		return 0, &fs.PathError{Op: "stat", Path: device, Err: err}
	}
	if st.Mode&unix.S_IFMT != unix.S_IFBLK {
		return 0, fmt.Errorf("%s is not a block device: %w", device, trivet.ErrInvalid)
	}
	return st.Rdev, nil
}

// GrowFilesystem grows online: resize2fs by EXT4_IOC_RESIZE_FS, xfs_growfs by XFS_IOC_FSGROWFSDATA. Both do nothing to
// a filesystem that fills its device.
func (m *linuxMounter) GrowFilesystem(ctx context.Context, device, target, fsType string) error {
	tool := []string{"resize2fs", device}
	if fsType == "xfs" {
		tool = []string{"xfs_growfs", target}
	}
	if _, err := exec.LookPath(tool[0]); err != nil {
		return fmt.Errorf("%s is not installed on this node, install package %s: %w", tool[0], filesystems[fsType].tools,
			ErrUnsupported)
	}
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("grow filesystem at %s: %w", target, err)
	}
	if err := m.checkMounted(device, target); err != nil {
		return err
	}
	out, err := runTool(tool[0], tool[1])
	if err != nil && strings.Contains(out, "Permission denied to resize") {
		// ext4_resize_begin (fs/ext4/resize.c) asks for it.
		return fmt.Errorf(
			"grow filesystem on %s at %s: the server's process has no CAP_SYS_RESOURCE, which ext4 wants: %w: %s",
			device, target, ErrUnsupported, out)
	}
	if err != nil {
		return fmt.Errorf("grow filesystem on %s at %s: %w: %s", device, target, err, out)
	}
	return nil
}

func (m *linuxMounter) Usage(path string) (VolumeStats, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(path, &st); err != nil {
		return VolumeStats{}, &fs.PathError{Op: "statfs", Path: path, Err: err}
	}
	bs := st.Bsize
	return VolumeStats{
		TotalBytes:     int64(st.Blocks) * bs,
		AvailableBytes: int64(st.Bavail) * bs,
		UsedBytes:      int64(st.Blocks-st.Bfree) * bs,
		TotalInodes:    int64(st.Files),
		FreeInodes:     int64(st.Ffree),
		UsedInodes:     int64(st.Files - st.Ffree),
	}, nil
}

// makeTarget makes the directory or empty file to mount on, unless it is there, and returns a path
// descriptor of it. Its parent must exist.
func makeTarget(target string, block bool) (int, error) {
	parent, base := filepath.Split(target)
	dir, err := unix.Open(parent, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, &fs.PathError{Op: "open", Path: parent, Err: err}
	}
	defer unix.Close(dir) //nolint:errcheck // a path handle has nothing to lose
	flags := unix.O_PATH | unix.O_DIRECTORY
	if block {
		flags = unix.O_PATH
		fd, err := unix.Openat(dir, base, unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o640)
		if err == nil {
			_ = unix.Close(fd) // empty
		} else if !errors.Is(err, unix.EEXIST) {
			return -1, &fs.PathError{Op: "create", Path: target, Err: err}
		}
	} else if err := unix.Mkdirat(dir, base, 0o750); err != nil && !errors.Is(err, unix.EEXIST) {
		return -1, &fs.PathError{Op: "mkdir", Path: target, Err: err}
	}
	fd, err := openBeneath(dir, base, flags)
	if err != nil {
		return -1, fmt.Errorf("open %s: %w", target, err)
	}
	return fd, checkTargetType(fd, target, block)
}

// checkTargetType closes fd and returns ErrUnsupported unless it is what a mount of that kind can
// lie on.
func checkTargetType(fd int, target string, block bool) error {
	var st unix.Stat_t
	err := unix.Fstat(fd, &st)
	if want := st.Mode&unix.S_IFMT == unix.S_IFREG; err == nil && block && !want {
		err = fmt.Errorf("%s is not a regular file: %w", target, ErrUnsupported)
	}
	if err != nil {
		_ = unix.Close(fd) // a path handle has nothing to lose
	}
	return err
}

// openNoSymlink opens path, whose last component must not be a symlink. Those before it may be: the
// kubelet's directory often lies behind one, and only root writes there.
func openNoSymlink(path string, flags int) (int, error) {
	parent, base := filepath.Split(path)
	dir, err := unix.Open(parent, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	defer unix.Close(dir) //nolint:errcheck // a path handle has nothing to lose
	return openBeneath(dir, base, flags)
}

// openBeneath opens a child of dir that is not a symlink.
func openBeneath(dir int, base string, flags int) (int, error) {
	fd, err := unix.Openat2(dir, strings.TrimSuffix(base, "/"), &unix.OpenHow{
		Flags: uint64(flags) | unix.O_CLOEXEC, Resolve: unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_BENEATH,
	})
	if errors.Is(err, unix.ELOOP) || errors.Is(err, unix.ENOTDIR) {
		return -1, fmt.Errorf("%s is a symlink or of the wrong kind (%w): %w", base, err, ErrUnsupported)
	}
	return fd, err
}
