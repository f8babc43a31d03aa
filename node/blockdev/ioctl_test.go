package blockdev_test

import (
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// ioctlRange does BLKDISCARD or BLKZEROOUT, which x/sys has no function for.
func ioctlRange(f *os.File, req uint, r [2]uint64) error {
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), uintptr(req), uintptr(unsafe.Pointer(&r)))
	if errno != 0 {
		return errno
	}
	return nil
}
