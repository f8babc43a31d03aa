// Command chaos breaks a real Trivet cluster on purpose and checks that it kept its promises. It runs a server in
// each of three or five network namespaces of its own, keeps volumes attached and served over NBD, lets clients
// read and write few blocks, and meanwhile kills, pauses, cuts off, freezes, fills, wipes and swaps the nodes, as
// a seed says. At the end everything is healed and read, and the history of every block must be linearizable. It
// needs root, ip, nft, nsenter and mkfs.ext4, and leaves nothing behind. Exit status 0 says that all was well.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"
)

// options are the flags.
type options struct {
	binary   string
	seed     uint64
	duration time.Duration
	nodes    int
	classes  []class
	dir      string
	keep     bool
}

func main() {
	var (
		o       options
		classes string
	)
	flag.StringVar(&o.binary, "trivet", "bin/trivet", "the trivet binary")
	flag.Uint64Var(&o.seed, "seed", 1, "decides which faults there are, when and where")
	flag.DurationVar(&o.duration, "duration", time.Minute, "how long to break things")
	flag.IntVar(&o.nodes, "nodes", 3, "servers, 3 to 5")
	flag.StringVar(&classes, "classes", "", "kinds of fault, as kill,pause (default: drawn from the seed)")
	flag.StringVar(&o.dir, "dir", "", "folder for the run's folder; a short path (default the system's temporary one)")
	flag.BoolVar(&o.keep, "keep", false, "keep logs and history of a good run, too")
	flag.Parse()
	var err error
	if o.classes, err = parseClasses(classes); err == nil && (flag.NArg() > 0 || o.nodes < 3 || o.nodes > 5) {
		err = errors.New("want 3 to 5 -nodes and no arguments")
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "chaos: %v\n", err)
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err = start(ctx, o, os.Stdout)
	stop()
	if err != nil {
		fmt.Fprintf(os.Stderr, "chaos: %v\n", err)
		os.Exit(1)
	}
	fmt.Fprintln(os.Stdout, "chaos: ok")
}

// start makes the folder of the run, runs, and removes the folder if all was well.
func start(ctx context.Context, o options, out io.Writer) error {
	if err := checkMachine(); err != nil {
		return err
	}
	binary, err := filepath.Abs(o.binary)
	if err != nil {
		return err
	}
	if _, err := os.Stat(binary); err != nil {
		return fmt.Errorf("%w; build it first with `make build`", err)
	}
	o.binary = binary
	dir, err := os.MkdirTemp(o.dir, "trivet-chaos-")
	if err != nil {
		return err
	}
	if dir, err = filepath.Abs(dir); err != nil {
		return err
	}
	const socketPathMax = 107 // sun_path of unix(7), less its zero
	if longest := filepath.Join(dir, "n1", "v1-1000-1000000.sock"); len(longest) > socketPathMax {
		return errors.Join(fmt.Errorf("-dir %s: sockets in it would have too long a path; choose a shorter one", o.dir),
			os.Remove(dir))
	}
	err = runIn(ctx, o, dir, out)
	if err != nil {
		return fmt.Errorf("%w\n  logs and history are in %s; again: make chaos SEED=%d", err, dir, o.seed)
	}
	if o.keep {
		fmt.Fprintf(out, "logs and history are in %s\n", dir)
		return nil
	}
	return os.RemoveAll(dir)
}

// runIn builds the lab in dir, runs in it and removes it, whatever happens.
func runIn(ctx context.Context, o options, dir string, out io.Writer) error {
	l, err := newLab(dir, o.binary, o.nodes)
	if err != nil {
		return err
	}
	r := &runner{opts: o, lab: l, history: newHistory(), out: out}
	err = r.run(ctx)
	if ctx.Err() != nil {
		err = errors.Join(errors.New("interrupted"), err)
	}
	err = errors.Join(err, l.close(context.WithoutCancel(ctx)))
	for _, n := range l.nodes { // they are large when read, though sparse
		if removeErr := os.Remove(n.image()); !errors.Is(removeErr, os.ErrNotExist) {
			err = errors.Join(err, removeErr)
		}
	}
	return err
}

// checkMachine says what is missing, and how to get it.
func checkMachine() error {
	if os.Geteuid() != 0 {
		return errors.New("needs root: it makes network namespaces and mounts; try `sudo make chaos`")
	}
	packages := map[string]string{
		"ip": "iproute2", "nft": "nftables", "nsenter": "util-linux", "fsfreeze": "util-linux", "mkfs.ext4": "e2fsprogs",
		"mount": "mount",
	}
	var errs []error
	for tool, pkg := range packages {
		if _, err := exec.LookPath(tool); err != nil {
			errs = append(errs, fmt.Errorf("needs %s; on Debian: apt-get install %s", tool, pkg))
		}
	}
	if _, err := os.Stat("/dev/loop-control"); err != nil {
		errs = append(errs, fmt.Errorf("needs loop devices: %w; try modprobe loop", err))
	}
	return errors.Join(errs...)
}
