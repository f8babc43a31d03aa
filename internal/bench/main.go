package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

type options struct {
	binary, dir string
	out         string // Markdown to write into; empty: only print
	sizeMiB     int64
	seconds     float64
	cacheMiB    int64
	rounds      int
	peers       string
	only        string
	busy        bool
	serverArgs  string

	pairs  int    // compare a setting with its absence instead of the peers
	toggle string // the setting, and its two values: adaptive=on,off
}

func main() {
	var o options
	quick := flag.Bool("quick", false, "small and short: at most 10 minutes instead of 40")
	flag.StringVar(&o.binary, "trivet", "bin/trivet", "the trivet program")
	flag.StringVar(&o.dir, "dir", "", "folder for all data, on the disk to measure (default: a new one in TMPDIR)")
	flag.StringVar(&o.out, "out", "docs/benchmarks.md", "file to put the report into; empty prints it only")
	flag.Int64Var(&o.sizeMiB, "size", 2048, "MiB of each volume and file, all filled before")
	flag.Float64Var(&o.seconds, "seconds", 10, "length of a run")
	flag.Int64Var(&o.cacheMiB, "cache", 64,
		"MiB of cache of the writeBack volumes; a run of J1 and J4 writes three times as much")
	flag.IntVar(&o.rounds, "rounds", 3, "runs of each job on each system")
	flag.StringVar(&o.peers, "peers", "", "more systems, with commas between: ceph")
	flag.StringVar(&o.only, "only", "", "only jobs with these names, with commas between: J1,J2")
	flag.BoolVar(&o.busy, "busy", false, "run although the machine has other things to do; the figures mean nothing")
	flag.StringVar(&o.serverArgs, "server-args", "", "more arguments for trivet server")
	flag.IntVar(&o.pairs, "pairs", 0, "instead of peers: so many interleaved pairs of a volume with and without -toggle")
	flag.StringVar(&o.toggle, "toggle", "adaptive=on,off", "KEY=WITH,WITHOUT: the parameter that -pairs is about")
	flag.Parse()
	if *quick {
		o.sizeMiB, o.seconds, o.rounds = 512, 4, 1
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, &o); err != nil {
		stop()
		fmt.Fprintf(os.Stderr, "bench: %v\n", err)
		os.Exit(1) //nolint:gocritic // stop has been called
	}
}

func run(ctx context.Context, o *options) (err error) {
	if _, err := exec.LookPath("fio"); err != nil { // before minutes of filling
		return fmt.Errorf("fio, which measures, is to be installed: %w", err)
	}
	if err := checkIdle(o.busy); err != nil {
		return err
	}
	if o.dir, err = os.MkdirTemp(o.dir, "trivet-bench-"); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(o.dir)) }()
	if err := checkSpace(o.dir, o.sizeMiB); err != nil {
		return err
	}
	if o.pairs > 0 {
		return runPairs(ctx, o)
	}
	systems, stop, err := start(ctx, o)
	defer func() { err = errors.Join(err, stop()) }()
	if err != nil {
		return err
	}
	for _, s := range systems {
		if s.reason != "" {
			fmt.Fprintf(os.Stderr, "left out: %s (%s)\n", s.name, s.reason)
		}
	}
	r, err := measure(ctx, o, systems)
	if err != nil {
		return err
	}
	if o.out == "" {
		_, err := os.Stdout.WriteString(r.markdown("benchmarks.svg") + "\n")
		return err
	}
	plot := strings.TrimSuffix(o.out, filepath.Ext(o.out)) + ".svg"
	return writeReport(r, o.out, plot, filepath.Base(plot))
}

// loadMax is how busy the machine may be before the bench begins.
const loadMax = 0.7

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

// checkSpace: three raw files, two peers' and, for each mode, three replicas with log and engine.
func checkSpace(dir string, sizeMiB int64) error {
	const copies, logsMiB = 3 + 2 + 2*3*3, 3 * 1024
	var st syscall.Statfs_t
	if err := syscall.Statfs(dir, &st); err != nil {
		return err
	}
	want, free := copies*sizeMiB+logsMiB, int64(st.Bavail)*st.Bsize>>20 //nolint:gosec // far from it
	if free < want {
		return fmt.Errorf("%s has %d MiB free, want %d: give -dir or a smaller -size", dir, free, want)
	}
	return nil
}

// start starts all systems. stop ends what was started, also after an error.
func start(ctx context.Context, o *options) (systems []*system, stop func() error, err error) {
	var cl *cluster
	stop = func() error {
		var errs []error
		for _, s := range slices.Backward(systems) {
			if s.stop != nil {
				errs = append(errs, s.stop())
			}
		}
		if cl != nil {
			errs = append(errs, cl.stop())
		}
		return errors.Join(errs...)
	}
	size := o.sizeMiB << 20
	systems = append(systems, startRaw(o.dir)...)
	systems = append(systems, startQEMU(ctx, o.dir, size), startNBDKit(ctx, o.dir, size))
	for _, peer := range strings.FieldsFunc(o.peers, func(r rune) bool { return r == ',' }) {
		if peer != "ceph" {
			return systems, stop, fmt.Errorf("peer %q: know ceph only", peer)
		}
		systems = append(systems, startCeph(ctx, size))
	}
	binary, err := filepath.Abs(o.binary)
	if err != nil {
		return systems, stop, err
	}
	cl, err = startCluster(ctx, binary, filepath.Join(o.dir, "trivet"), strings.Fields(o.serverArgs))
	if err != nil {
		cl = nil // it has stopped
		return systems, stop, err
	}
	for _, mode := range []string{modeThrough, modeBack} {
		systems = append(systems, cl.volume(ctx, mode, size, o.cacheMiB)...)
	}
	return systems, stop, nil
}

// measure fills everything and runs the jobs: rounds outermost, systems innermost.
func measure(ctx context.Context, o *options, systems []*system) (*report, error) {
	chosen := jobs
	if o.only != "" {
		names := strings.Split(o.only, ",")
		chosen = slices.DeleteFunc(slices.Clone(jobs), func(j job) bool { return !slices.Contains(names, j.id) })
	}
	r := &report{
		systems: systems, by: map[string]map[string]*measurement{}, when: time.Now(), machine: machine(),
		run: fmt.Sprintf("%d MiB, %d rounds of %.0f s for each job and system, in turn; J1 and J4 longer where that is "+
			"needed to write %d MiB, %d times the cache of a writeBack volume", o.sizeMiB, o.rounds, o.seconds,
			dirtyLimits*o.cacheMiB, dirtyLimits),
	}
	bar := newProgress(os.Stderr, len(r.measured())*(1+o.rounds*len(chosen)))
	for _, s := range r.measured() {
		r.by[s.name] = map[string]*measurement{}
		bar.step("filling " + s.name)
		if s.name == nameRaw { // the first of raw3x's files
			continue
		}
		if err := fill(ctx, &s.target, o.sizeMiB<<20); err != nil {
			return nil, fmt.Errorf("fill %s: %w", s.name, err)
		}
	}
	for range o.rounds {
		for i := range chosen {
			for _, s := range r.measured() {
				bar.step(chosen[i].id + " " + s.name)
				if err := r.once(ctx, o, &chosen[i], s); err != nil {
					return nil, fmt.Errorf("%s on %s: %w", chosen[i].id, s.name, err)
				}
			}
		}
	}
	bar.end()
	return r, nil
}

// once runs one job on one system and keeps what it gave.
func (r *report) once(ctx context.Context, o *options, j *job, s *system) error {
	var before []use
	var err error
	if r.stretches == nil {
		r.stretches = make(map[string]*stretch)
	}
	length := r.stretches[j.id+" "+s.name]
	if length == nil {
		length = newStretch(time.Duration(o.seconds * float64(time.Second)))
		r.stretches[j.id+" "+s.name] = length
	}
	res, err := length.untilLong(o.leastBytes(j), s.target.copies, func(d time.Duration) (result, error) {
		if before, err = readUses(s.processes); err != nil { // of the run that counts
			return result{}, err
		}
		return j.run(ctx, &s.target, o.sizeMiB<<20, d)
	})
	if err != nil {
		return err
	}
	after, err := readUses(s.processes)
	if err != nil {
		return err
	}
	for i := range after {
		after[i] = after[i].minus(before[i])
	}
	m := r.by[s.name][j.id]
	if m == nil {
		m = &measurement{}
		r.by[s.name][j.id] = m
	}
	m.results, m.used = append(m.results, res), append(m.used, after)
	return nil
}

// machine describes where this runs, as far as it matters.
func machine() string {
	kernel := "?"
	var u syscall.Utsname
	if syscall.Uname(&u) == nil {
		var b []byte
		for _, c := range u.Release {
			if c == 0 {
				break
			}
			b = append(b, byte(c))
		}
		kernel = string(b)
	}
	version := "fio ?"
	if out, err := exec.Command("fio", "--version").Output(); err == nil { //nolint:noctx // at once
		version = strings.TrimSpace(string(out))
	}
	return fmt.Sprintf("%d cores, Linux %s, %s, everything on one disk", runtime.NumCPU(), kernel, version)
}
