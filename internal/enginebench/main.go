// Command enginebench measures the engine of one disk over references into the log, in ratios that are taken in one
// run: against the same engine over Pebble values, against plain reads of a file, and against itself in another state.
// Each figure is printed with the value that is wanted and whether that is reached. Phases:
//
//	write      log and apply, CPU, allocations, bytes written and space; beside Pebble values
//	read       cold single blocks, beside O_DIRECT reads of a plain file
//	snapshots  freezes and clones of small and large volumes, with few and many snapshots; reads under many
//	latency    p99.9 of log and apply with cleaning and flushes of the map, beside the same without
//	crash      the start of a store whose process was killed, with entries that are to be applied yet
//
//	enginebench -dir /mnt/disk -mib 4096 -phases write,read
//
// It says how much free space -dir needs, and leaves nothing there. For the phase crash it starts itself again and
// kills that process.
package main

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"runtime"
	"runtime/pprof"
	"slices"
	"strings"
	"syscall"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/internal/procs"
)

type options struct {
	dir          string
	phases       string
	mib          int64
	segmentMiB   int64
	overwrites   int
	entryBlocks  int
	run          bool
	goroutines   int
	rounds       int
	snapshots    int
	smallMiB     int64 // volumes of the phase snapshots
	largeMiB     int64
	spreadBlocks int // live blocks of each
	entries      int
	openBlocks   int
	backlogMiB   int64

	cpuProfile, memProfile string
}

// phases, in the order in which they run.
func phases() []string { return []string{"apply", "write", "read", "snapshots", "latency", "crash"} }

func parse(args []string) (o options, err error) {
	f := flag.NewFlagSet("enginebench", flag.ContinueOnError)
	f.StringVar(&o.dir, "dir", "", "directory on the disk to measure (default: a temporary one)")
	f.StringVar(&o.phases, "phases", strings.Join(phases(), ","), "what is measured")
	f.Int64Var(&o.mib, "mib", 512, "size of the volume in MiB; 4096 for figures that count")
	f.Int64Var(&o.segmentMiB, "segment", 16, "size of a segment of the log in MiB")
	f.IntVar(&o.overwrites, "overwrites", 5, "write: how often the volume is written over, at random")
	f.IntVar(&o.entryBlocks, "entry", 16, "blocks of one entry, at one place if -run is set, else each at its own")
	f.BoolVar(&o.run, "run", false, "write: random overwrites are runs of blocks")
	f.IntVar(&o.goroutines, "goroutines", 8, "readers at a time")
	f.IntVar(&o.rounds, "rounds", 9, "how often two things that are compared take turns")
	f.IntVar(&o.snapshots, "snapshots", 250, "snapshots: how many are many")
	f.Int64Var(&o.smallMiB, "small", 1<<10, "snapshots: size of a small volume in MiB")
	f.Int64Var(&o.largeMiB, "large", 100<<10, "snapshots, crash: size of a large one; it is sparse")
	f.IntVar(&o.spreadBlocks, "spread", 1<<14, "snapshots: live blocks of a small volume, and of a large one")
	f.IntVar(&o.entries, "entries", 4096, "latency: entries of a turn")
	f.IntVar(&o.openBlocks, "open", 1<<20, "crash: live blocks of the store")
	f.Int64Var(&o.backlogMiB, "backlog", 1024, "crash: entries that are in the log and not applied, in MiB")
	f.StringVar(&o.cpuProfile, "cpuprofile", "", "file for a CPU profile of the run")
	f.StringVar(&o.memProfile, "memprofile", "", "file for a profile of what the run allocated")
	if err := f.Parse(args); err != nil {
		return o, err
	}
	return o, o.validate()
}

func (o *options) validate() error {
	bad := func(format string, args ...any) error {
		return fmt.Errorf("enginebench: %s: %w", fmt.Sprintf(format, args...), trivet.ErrInvalid)
	}
	for _, p := range strings.Split(o.phases, ",") {
		if !slices.Contains(phases(), p) {
			return bad("-phases: %q is none of %s", p, strings.Join(phases(), ", "))
		}
	}
	entryBytes := int64(o.entryBlocks) * trivet.BlockSize
	switch {
	case o.entryBlocks < 1 || entryBytes+3*trivet.BlockSize > o.segmentMiB<<20/4:
		return bad("-entry: %d blocks, want at least 1 and no more than a quarter of -segment, %d MiB", o.entryBlocks,
			o.segmentMiB)
	case o.mib < 1 || o.mib<<20 < writersN*entryBytes:
		return bad("-mib: %d, want at least 1 and %d entries of %d bytes", o.mib, writersN, entryBytes)
	case o.overwrites < 1 || o.goroutines < 1 || o.rounds < 1 || o.snapshots < 1 || o.entries < 1 || o.backlogMiB < 1:
		return bad("-overwrites, -goroutines, -rounds, -snapshots, -entries and -backlog: want at least 1 of each")
	case o.snapshots+o.rounds > snapshotsMax:
		return bad("-snapshots and -rounds: %d together, want at most %d", o.snapshots+o.rounds, snapshotsMax)
	case o.smallMiB<<20/trivet.BlockSize < int64(o.spreadBlocks), o.largeMiB < o.smallMiB,
		o.spreadBlocks < o.entryBlocks:
		return bad("-small %d, -large %d, -spread %d: want %d blocks at least to spread, and room for them in both volumes",
			o.smallMiB, o.largeMiB, o.spreadBlocks, o.entryBlocks)
	case o.entries*o.entryBlocks > quietBlocksMax:
		return bad("-entries %d of %d blocks: want at most %d blocks, or the map is flushed in a quiet turn",
			o.entries, o.entryBlocks, quietBlocksMax)
	case int64(o.openBlocks) > o.largeMiB<<20/trivet.BlockSize || o.openBlocks < o.entryBlocks:
		return bad("-open %d, -large %d: want blocks that fit, an entry's at least", o.openBlocks, o.largeMiB)
	}
	return nil
}

func main() {
	procs.AllowForDisks() // as the server does
	err := func() error {
		if len(os.Args) > 1 && os.Args[1] == victimArg {
			return victim(os.Args[2:], os.Stdin, os.Stdout)
		}
		o, err := parse(os.Args[1:])
		if errors.Is(err, flag.ErrHelp) {
			return nil
		}
		if err != nil {
			return err
		}
		return profiled(o)
	}()
	if err != nil {
		fmt.Fprintln(os.Stderr, "enginebench:", err)
		os.Exit(1)
	}
}

// profiled runs the phases, under the profiles that were asked for. A signal ends the process, and what it has on the
// disk.
func profiled(o options) (err error) {
	b, err := newBench(o, os.Stdout, os.Stderr)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, b.remove()) }()
	ended := make(chan os.Signal, 1)
	signal.Notify(ended, syscall.SIGINT, syscall.SIGTERM)
	go func() { // for as long as the process lives
		sig := <-ended
		fmt.Fprintln(os.Stderr, "enginebench:", sig, b.remove())
		os.Exit(1)
	}()
	if o.cpuProfile != "" {
		f, err := os.Create(o.cpuProfile)
		if err == nil {
			err = pprof.StartCPUProfile(f)
		}
		if err != nil {
			return err
		}
		defer func() {
			pprof.StopCPUProfile()
			err = errors.Join(err, f.Close())
		}()
	}
	if o.memProfile != "" {
		runtime.MemProfileRate = 4 << 10
		defer func() { err = errors.Join(err, writeAllocs(o.memProfile)) }()
	}
	return b.run()
}

func writeAllocs(name string) error {
	f, err := os.Create(name)
	if err != nil {
		return err
	}
	return errors.Join(pprof.Lookup("allocs").WriteTo(f, 0), f.Close())
}
