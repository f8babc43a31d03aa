package sim

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/replication/raftgroup"
)

// Options of one run. The zero value of a field means its default.
type Options struct {
	Seed     uint64
	Duration time.Duration // how long faults last; 60 s
	Workers  int           // 6
	BlockN   int           // size of the volume; 96: small, so that blocks are written again and again
	// WrapMachine stands between each group and its state machine: a place to break something, and
	// see that the run finds it.
	WrapMachine func(raftgroup.StateMachine) raftgroup.StateMachine
	// LyingDisks claim to have synced Raft's files and have not.
	LyingDisks bool
	Logger     *slog.Logger
}

// Report says what happened in a run.
type Report struct {
	Calls      int // reads, writes, discards, write-zeroes and flushes asked for
	Succeeded  int // of these
	Writes     int // acknowledged changes
	Reads      int // checked reads
	Crashes    int
	Cuts       int // links or machines cut off
	Holds      int // messages held back
	TakeOvers  int
	Transfers  int
	Elections  uint64 // highest term
	Restores   int    // snapshots installed
	Flushes    int    // flushes before log compaction
	LongestGap time.Duration
}

func (r Report) String() string {
	return fmt.Sprintf("calls=%d succeeded=%d writes=%d reads=%d crashes=%d cuts=%d holds=%d takeovers=%d "+
		"transfers=%d terms=%d restores=%d flushes=%d longestGap=%v", r.Calls, r.Succeeded, r.Writes, r.Reads,
		r.Crashes, r.Cuts, r.Holds, r.TakeOvers, r.Transfers, r.Elections, r.Restores, r.Flushes, r.LongestGap)
}

const (
	heartbeat     = 500 * time.Millisecond
	ioTimeout     = 5 * time.Second // short, so that writes of unknown outcome happen
	lossTimeout   = 300 * time.Millisecond
	livenessMax   = 60 * time.Second
	activityFloor = 0.30
	// snapshotBytes is about what a few seconds of writing make of log.
	snapshotBytes = 256 << 10
)

// sim is one run.
type sim struct {
	opts    Options
	cluster *Cluster
	oracle  *oracle
	log     *slog.Logger
	swarm   swarm

	restores, flushes atomic.Int64

	mu         sync.Mutex
	report     Report
	violations []error
	seat       *seat // who holds the volume now
}

// Run plays one seed and returns an error for anything that must not happen: a wrong or lost block, a
// write by a fenced writer, replicas that differ, a machine that gave up, too little success while
// faults last, or none after they ended. It must be called in a synctest bubble.
func Run(ctx context.Context, opts Options) (Report, error) {
	if opts.Duration == 0 {
		opts.Duration = time.Minute
	}
	if opts.Workers == 0 {
		opts.Workers = 6
	}
	if opts.BlockN == 0 {
		opts.BlockN = 96
	}
	if opts.Logger == nil {
		opts.Logger = slog.New(slog.DiscardHandler)
	}
	s := &sim{opts: opts, log: opts.Logger, oracle: newOracle(opts.BlockN), swarm: drawSwarm(opts.Seed)}
	err := s.run(ctx)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.report.Restores, s.report.Flushes = int(s.restores.Load()), int(s.flushes.Load())
	return s.report, err
}

func (s *sim) run(ctx context.Context) (err error) {
	s.log.Info("swarm", "seed", s.opts.Seed, "faults", fmt.Sprintf("%+v", s.swarm))
	s.cluster, err = NewCluster(ctx, ClusterConfig{
		Seed: s.opts.Seed, Replicas: 3, SizeBytes: int64(s.opts.BlockN) * trivet.BlockSize,
		SnapshotBytes: snapshotBytes, Heartbeat: heartbeat, WrapMachine: s.wrapMachine,
		LyingDisks: s.opts.LyingDisks, Logger: s.log,
	})
	if err != nil {
		return err
	}
	defer func() {
		if s.seat != nil {
			err = errors.Join(err, s.seat.volume.Close())
		}
		err = errors.Join(err, s.cluster.Close())
	}()
	if err := s.takeOver(ctx, ClientNode); err != nil {
		return err
	}
	if err := s.faults(ctx); err != nil {
		return err
	}
	if err := s.settle(ctx); err != nil {
		return err
	}
	return s.verdict()
}

// faults runs workers and nemesis side by side.
func (s *sim) faults(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, s.opts.Duration)
	defer cancel()
	var wg sync.WaitGroup
	for i := range s.opts.Workers {
		w := &worker{sim: s, rnd: newRand(s.opts.Seed, uint64(100+i))}
		wg.Go(func() { w.run(ctx) })
	}
	n := newNemesis(s)
	err := n.run(ctx)
	wg.Wait()
	return err
}

// settle ends all faults and demands that the volume serves again, that replicas agree, and that what
// was acknowledged is there; then again after a power cut of everything.
func (s *sim) settle(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 4*livenessMax)
	defer cancel()
	s.cluster.Net.HealAll()
	s.cluster.Net.ClearFaults()
	if err := s.startAll(ctx); err != nil {
		return err
	}
	if err := s.sweep(ctx, "after the faults"); err != nil {
		return err
	}
	rnd := newRand(s.opts.Seed, 7)
	for _, n := range s.cluster.Nodes() {
		if err := n.Crash(ctx, CrashOptions{Rand: rnd}); err != nil {
			return err
		}
	}
	if err := s.startAll(ctx); err != nil {
		return err
	}
	return s.sweep(ctx, "after a power cut of all machines")
}

func (s *sim) startAll(ctx context.Context) error {
	for _, n := range s.cluster.Nodes() {
		if err := n.Start(ctx); err != nil {
			return fmt.Errorf("restart: %w", err)
		}
	}
	return nil
}

// sweep takes the volume over, so that nothing is under way any more, reads all of it, and compares
// the replicas with each other and with the oracle.
func (s *sim) sweep(ctx context.Context, when string) error {
	began := time.Now()
	live, cancel := context.WithTimeout(ctx, livenessMax)
	defer cancel()
	if err := s.takeOver(live, ClientNode); err != nil {
		return fmt.Errorf("no service %s, after %v: %w", when, time.Since(began), err)
	}
	w := &worker{sim: s, rnd: newRand(s.opts.Seed, 8)}
	for at := 0; at < s.opts.BlockN; at += 16 {
		if err := w.read(live, s.seat, trivet.LBA(at), min(16, s.opts.BlockN-at)); err != nil {
			return fmt.Errorf("read %s: %w", when, err)
		}
	}
	if err := s.cluster.Converge(live); err != nil {
		return fmt.Errorf("replicas do not converge %s: %w", when, err)
	}
	digests, err := s.cluster.Digests()
	if err != nil {
		return err
	}
	first := digests[s.cluster.Nodes()[0].ID()]
	for id, d := range digests {
		if d != first {
			s.violate(fmt.Errorf("%s: replica on %s has digest %x, n1 has %x", when, id, d[:4], first[:4]))
		}
	}
	return s.inspect(when)
}

// inspect reads each replica's blocks behind Raft's back.
func (s *sim) inspect(when string) error {
	for _, n := range s.cluster.Nodes() {
		vol, err := n.Blocks()
		if err != nil {
			return err
		}
		p := make([]byte, s.opts.BlockN*trivet.BlockSize)
		floors := s.oracle.floors(0, s.opts.BlockN)
		if err := vol.ReadAt(p, 0); err != nil {
			return fmt.Errorf("%s: replica on %s: %w", when, n.ID(), err)
		}
		if err := s.oracle.check(0, p, floors); err != nil {
			s.violate(fmt.Errorf("%s: replica on %s: %w", when, n.ID(), err))
		}
	}
	return nil
}

func (s *sim) violate(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.violations = append(s.violations, err)
}

func (s *sim) count(f func(r *Report)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f(&s.report)
}

func (s *sim) verdict() error {
	errs := s.cluster.Failures()
	s.mu.Lock()
	defer s.mu.Unlock()
	errs = append(errs, s.violations...)
	if r := s.report; float64(r.Succeeded) < activityFloor*float64(r.Calls) || r.Calls == 0 {
		errs = append(errs, fmt.Errorf("%d of %d calls succeeded: the run says nothing", r.Succeeded, r.Calls))
	}
	return errors.Join(errs...)
}

// wrapMachine counts what a run is worth, and puts the option's own machine outside.
func (s *sim) wrapMachine(m raftgroup.StateMachine) raftgroup.StateMachine {
	m = &countingMachine{StateMachine: m, s: s}
	if s.opts.WrapMachine != nil {
		m = s.opts.WrapMachine(m)
	}
	return m
}

type countingMachine struct {
	raftgroup.StateMachine
	s *sim
}

func (m *countingMachine) Flush() (uint64, error) {
	m.s.flushes.Add(1)
	return m.StateMachine.Flush()
}

func (m *countingMachine) Restore(r io.Reader) error {
	m.s.restores.Add(1)
	return m.StateMachine.Restore(r)
}
