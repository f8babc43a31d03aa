// Package procs sets how many goroutines the Go runtime runs at a time, for a program that waits for disks, and has
// work in the background pass the processor on.
package procs

import (
	"os"
	"runtime"
)

// diskMin is how many places there are at least beside one for each processor.
const diskMin = 4

// AllowForDisks lets the Go runtime run goroutines beside those that wait for a disk. A thread in a system call keeps
// one of the GOMAXPROCS places until the runtime's monitor takes it away, which it does every 20 µs at best (retake
// of runtime/proc.go): with one place for each processor all of them stand in reads of a fast disk, and the
// processors idle. Many more cost more than they give: with 20 on two processors, a read took 45 µs of CPU and not 31.
// GOMAXPROCS in the environment is left alone.
func AllowForDisks() {
	if os.Getenv("GOMAXPROCS") != "" {
		return
	}
	n := runtime.GOMAXPROCS(0)
	runtime.GOMAXPROCS(n + max(n, diskMin))
}
