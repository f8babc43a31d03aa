package node

import (
	"context"
)

// Mounter is everything that this package asks of the kernel's mount table and of mount tools. It is
// a seam for tests without root; NewMounter returns the real one. Implementations are safe for
// concurrent use on different paths.
//
// Paths are absolute and clean. The last component of a target must not be a symlink: such a target
// gives ErrUnsupported and is left alone (S8).
type Mounter interface {
	// FormatAndMount mounts the block device at target, an existing directory, after making a
	// filesystem on it if it is blank and options do not have "ro". It checks a filesystem that is
	// there. A device that cannot be read is never taken for blank: ErrUnavailable.
	// ErrUnsupported: mkfs is missing, or the device holds something else. The tools it runs
	// cannot be interrupted.
	FormatAndMount(ctx context.Context, device, target, fsType string, options []string) error

	// Bind makes source, a directory or (block) a device node, appear at target too, which it
	// makes: a directory or an empty file. A read-only bind is never writable, not even for a moment.
	Bind(source, target string, block, readOnly bool) error

	// Shade covers target, an existing directory, by an empty read-only filesystem, so that
	// whoever still uses the path cannot write to the disk below it.
	Shade(target string) error

	// Unmount undoes one mount at target; nothing mounted there, or no such path, is success.
	// ErrInUse while it is busy, unless lazy: then it goes from the tree at once and from the
	// kernel when its last user does, after its dirty data were written back.
	Unmount(target string, lazy bool) error

	// Remove removes the directory or file that Bind made. No such path is success. It refuses,
	// with ErrInvalid, a directory or file that is not empty.
	Remove(target string) error

	// Mounted reports whether target is the root of a mount, and the number of the block device
	// behind it: the one that the filesystem is on, or the bound device node itself.
	Mounted(target string) (device uint64, ok bool, err error)

	// DeviceNumber returns the number of a block device node.
	DeviceNumber(device string) (uint64, error)

	// GrowFilesystem makes the filesystem on the block device, mounted at target, as large as the device; one that is
	// so already is success. ErrUnsupported: its tool is missing. The tool cannot be interrupted.
	GrowFilesystem(ctx context.Context, device, target, fsType string) error

	// Usage returns the use of the filesystem mounted at path.
	Usage(path string) (VolumeStats, error)
}
