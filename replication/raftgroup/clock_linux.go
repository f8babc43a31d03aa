package raftgroup

import (
	"time"

	"golang.org/x/sys/unix"
)

// bootTime is CLOCK_BOOTTIME. Unlike the clock behind time.Now it runs on while the machine is
// suspended, so a lease taken before a suspend is seen to have run out after it. Zero, which voids
// no lease, on a kernel that refuses the call.
func bootTime() time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		return 0
	}
	return time.Duration(ts.Nano())
}
