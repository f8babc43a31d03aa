// Command replbench measures replication against what the same disk does without it, in one run: three
// node processes with mutual TLS on loopback keep two groups, one of a volume with the real engine
// and one whose state machine keeps nothing, and the figures are ratios to plain writers of three
// files. Absolute speeds of shared machines drift by a factor of three, ratios of one run do not.
//
// It starts itself again as the node processes and as the writers, and speaks lines of JSON with them. It
// must have the machine to itself: it refuses to judge when the load says otherwise, unless -busy is given.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/trivet-csi/trivet"
)

// The roles of a process.
const (
	roleNode   = "node"
	roleWriter = "writer"
)

// loadMax is the load average of the last minute from which on figures mean nothing on two cores.
const loadMax = 0.7

type options struct {
	role, name, dir string
	seconds         int
	rounds          int
	idleSeconds     int
	busy            bool
	profile         string
	only            string
	overlap         bool
}

func main() {
	var o options
	flag.StringVar(&o.role, "role", "", "for its own use: what a child process is")
	flag.StringVar(&o.name, "name", "", "for its own use: the child's name")
	flag.StringVar(&o.dir, "dir", "", "folder on the disk to measure; default: a temporary one")
	flag.IntVar(&o.seconds, "seconds", 5, "length of each measurement")
	flag.IntVar(&o.rounds, "rounds", 3, "each measurement and its yardstick are taken this often, in turns")
	flag.IntVar(&o.idleSeconds, "idle-seconds", 60, "how long idle groups are watched")
	flag.StringVar(&o.profile, "profile", "", "folder for CPU profiles of the nodes, one for each measurement")
	flag.StringVar(&o.only, "only", "",
		"one measurement: latency, entries, singles, transfer, silence, catchup, idle or parked")
	flag.BoolVar(&o.overlap, "overlap", true, "let log flushes overlap with sending, as servers do (decision 0012)")
	flag.BoolVar(&o.busy, "busy", false, "measure although the machine is not idle")
	flag.Parse()
	if err := run(&o); err != nil {
		fmt.Fprintf(os.Stderr, "replbench: %v\n", err)
		os.Exit(1)
	}
}

func run(o *options) (err error) {
	switch o.role {
	case "":
	case roleNode:
		return serveNode(o, os.Stdin, os.Stdout)
	case roleWriter:
		return serveWriter(o, os.Stdin, os.Stdout)
	default:
		return fmt.Errorf("role %q is unknown: %w", o.role, trivet.ErrInvalid)
	}
	if err := checkIdle(o.busy); err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if o.dir == "" {
		if o.dir, err = os.MkdirTemp("", "trivet-replbench-"); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, os.RemoveAll(o.dir)) }()
	}
	return measure(ctx, o, os.Stdout)
}

func checkIdle(busy bool) error {
	b, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return err
	}
	first, _, _ := strings.Cut(string(b), " ")
	load, err := strconv.ParseFloat(first, 64)
	if err != nil {
		return fmt.Errorf("read /proc/loadavg: %w", err)
	}
	if load > loadMax && !busy {
		return fmt.Errorf("load is %.2f: something else runs here; wait, or give -busy and trust nothing", load)
	}
	return nil
}

// measure runs everything and prints a table.
func measure(ctx context.Context, o *options, out io.Writer) error {
	began := time.Now()
	if o.only == "" || o.only == "parked" { // on nodes of their own, for it is their memory that is measured
		if err := inLab(ctx, o, func(l *lab) error { return l.parked(out) }); err != nil {
			return fmt.Errorf("parked: %w", err)
		}
	}
	if o.only != "parked" {
		if err := inLab(ctx, o, func(l *lab) error { return l.steps(o, out) }); err != nil {
			return err
		}
	}
	fmt.Fprintf(out, "%d rounds of %d s each, %s in all\n", o.rounds, o.seconds, time.Since(began).Round(time.Second))
	return nil
}

func inLab(ctx context.Context, o *options, f func(l *lab) error) (err error) {
	own := *o
	if own.dir, err = os.MkdirTemp(o.dir, "lab-"); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(own.dir)) }()
	l, err := newLab(ctx, &own)
	if err != nil {
		return err
	}
	return errors.Join(f(l), l.close())
}

func (l *lab) steps(o *options, out io.Writer) error {
	for _, step := range []struct {
		name string
		do   func(io.Writer) error
	}{
		{"latency", l.latency},
		{"entries", l.entries},
		{"singles", l.singles},
		{"transfer", l.transfer},
		{"silence", l.silence},
		{"catchup", l.catchUp},
		{"idle", l.idle},
	} {
		if o.only != "" && o.only != step.name {
			continue
		}
		if err := step.do(out); err != nil {
			return fmt.Errorf("%s: %w", step.name, err)
		}
	}
	return nil
}
