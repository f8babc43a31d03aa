package keeper

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// abortConnection makes the kernel fail every request of a FUSE connection, waiting or to come (linux
// Documentation/filesystems/fuse/fuse.rst, "Control filesystem"). It needs no mount of fusectl that
// others would see: it makes one that is attached nowhere (fsmount(2)), of which there is one
// instance in the kernel anyway.
func abortConnection(connection uint32) (err error) {
	fs, err := unix.Fsopen("fusectl", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return fmt.Errorf("open fusectl: %w", err)
	}
	defer func() { err = errors.Join(err, unix.Close(fs)) }()
	if err := unix.FsconfigCreate(fs); err != nil {
		return fmt.Errorf("make fusectl: %w", err)
	}
	root, err := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("mount fusectl: %w", err)
	}
	defer func() { err = errors.Join(err, unix.Close(root)) }()
	file, err := unix.Openat(root, fmt.Sprintf("%d/abort", connection), unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.ENOENT) { // it is gone
		return nil
	}
	if err != nil {
		return fmt.Errorf("abort connection %d: %w", connection, err)
	}
	defer func() { err = errors.Join(err, unix.Close(file)) }()
	if _, err := unix.Write(file, []byte("1")); err != nil {
		return fmt.Errorf("abort connection %d: %w", connection, err)
	}
	return nil
}
