//go:build !linux

package raftgroup

import "time"

// bootTime has no source here; leases rest on the monotonic clock alone.
func bootTime() time.Duration { return 0 }
