package raftgroup

import (
	"syscall"
	"time"
	"unsafe"
)

const clockBoottime = 7 // linux/time.h: CLOCK_BOOTTIME

// bootTime is CLOCK_BOOTTIME. Unlike the clock behind time.Now it runs on while the machine is
// suspended, so a lease taken before a suspend is seen to have run out after it. Zero, which voids
// no lease, on a kernel that refuses the call.
func bootTime() time.Duration {
	var ts syscall.Timespec
	_, _, errno := syscall.Syscall(syscall.SYS_CLOCK_GETTIME, clockBoottime, uintptr(unsafe.Pointer(&ts)), 0)
	if errno != 0 {
		return 0
	}
	return time.Duration(ts.Nano())
}
