// Command enginebench measures the engine of one disk over references into the log against the same engine over
// Pebble values, one after the other on the same disk and in the same run, and prints ratios: what a write costs in CPU
// and allocations, what reaches the disk for each byte, and how long a start takes.
//
//	enginebench -dir /mnt/disk -mib 512 -overwrites 5
//
// It needs six times -mib of free space in -dir, and leaves nothing there.
package main

import (
	"flag"
	"fmt"
	"os"
)

func main() {
	var o options
	flag.StringVar(&o.dir, "dir", "", "directory on the disk to measure (default: a temporary one)")
	flag.Int64Var(&o.mib, "mib", 512, "size of the volume in MiB")
	flag.IntVar(&o.overwrites, "overwrites", 5, "how often the volume is written over, at random")
	flag.IntVar(&o.entryBlocks, "entry", 16, "blocks of one entry, at one place if -run is set, else each at its own")
	flag.BoolVar(&o.run, "run", false, "entries are runs of blocks, as of sequential writers")
	flag.IntVar(&o.openBlocks, "open", 1<<20, "live blocks of the store whose start is timed")
	flag.Parse()
	if err := bench(o); err != nil {
		fmt.Fprintln(os.Stderr, "enginebench:", err)
		os.Exit(1)
	}
}
