package sim

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/engine"
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
	// Overlap turns OverlapFlush on, whatever the seed says.
	Overlap bool
	// Session lets the holder read by trivet.ReadSession, whatever the seed says.
	Session bool
	// Writers lets two write, whatever the seed says.
	Writers bool
	// Only, when set, are the classes of faults to draw from, whatever the seed says.
	Only   []Fault
	Logger *slog.Logger
}

const (
	heartbeat     = 500 * time.Millisecond
	ioTimeout     = 5 * time.Second // short, so that writes of unknown outcome happen
	lossTimeout   = 300 * time.Millisecond
	livenessMax   = 120 * time.Second
	activityFloor = 0.30
)

// sim is one run.
type sim struct {
	opts    Options
	cluster *Cluster
	oracle  *oracle
	album   *album
	log     *slog.Logger
	swarm   swarm

	history *History

	restores, flushes   atomic.Int64
	rotten, noisy, full atomic.Bool // such faults were made: their answers are no surprise
	damaged             atomic.Bool // a user was told of damage since the nemesis looked
	flipped             atomic.Bool // blocks were damaged that can be repaired

	mu         sync.Mutex
	report     Report
	violations []error
	seat       *seat        // who holds the volume now; of two writers, one
	pair       *pair        // nil: nobody ever writes beside another
	reserved   trivet.Epoch // the last epoch that was taken for something else
}

// Run plays one seed and returns an error for anything that must not happen: a wrong or lost block, a
// write by a fenced writer, replicas that differ, a machine that gave up, too little success while
// faults last, or none after they ended. It must be called in a synctest bubble.
func Run(ctx context.Context, opts Options) (Report, error) {
	s := newSim(opts)
	err := s.run(ctx)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.report.Restores, s.report.Flushes = int(s.restores.Load()), int(s.flushes.Load())
	s.report.History = s.history
	s.report.Violations = len(s.violations)
	if s.cluster != nil {
		s.report.Exits = s.cluster.Exits()
	}
	return s.report, err
}

// newSim draws what a run will be.
func newSim(opts Options) *sim {
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
	s := &sim{
		opts: opts, log: opts.Logger, swarm: drawSwarm(opts.Seed),
		oracle: newOracle(opts.BlockN), history: newHistory(opts.BlockN),
	}
	s.album = &album{o: s.oracle}
	s.swarm.session = s.swarm.session || opts.Session
	if s.swarm.writers = !opts.Session && (s.swarm.writers || opts.Writers); s.swarm.writers {
		s.swarm.session = false
		s.pair, s.oracle.shared = newPair(), true
	}
	if opts.Overlap || s.swarm.overlap {
		s.swarm.overlapped(opts.Seed)
	}
	if len(opts.Only) > 0 {
		s.swarm.only(opts.Only)
	}
	if s.swarm.writers {
		s.swarm.alone()
	}
	return s
}

func (s *sim) sizeBytes() int64 { return int64(s.opts.BlockN) * trivet.BlockSize }

func (s *sim) run(ctx context.Context) (err error) {
	if err := s.open(ctx); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.close()) }()
	if err := s.takeOver(ctx, ClientNode); err != nil {
		return err
	}
	n := newNemesis(s)
	err = s.faults(ctx, n)
	n.stop()
	if err == nil {
		err = s.settle(ctx, n)
	}
	return errors.Join(err, s.verdict())
}

// open starts the machines.
func (s *sim) open(ctx context.Context) (err error) {
	s.log.Info("swarm", "seed", s.opts.Seed, "faults", fmt.Sprintf("%+v", s.swarm))
	reads := trivet.ReadStrong
	if s.session() {
		reads = trivet.ReadSession
	}
	s.cluster, err = NewCluster(ctx, ClusterConfig{
		ReadConsistency: reads,
		Seed:            s.opts.Seed, Replicas: s.swarm.replicas, Spares: s.swarm.spares, SizeBytes: s.sizeBytes(),
		SnapshotBytes: s.swarm.snapshotBytes, Heartbeat: heartbeat, WrapMachine: s.wrapMachine,
		OverlapFlush: s.swarm.overlap, LyingDisks: s.opts.LyingDisks, FlushLatency: s.swarm.flush, Skew: s.swarm.skew,
		SweepRate: s.swarm.sweepRate, LogCacheBytes: s.swarm.logCacheBytes,
		Logger: s.log,
	})
	return err
}

// close stops them. REQUIRES: open returned nil.
func (s *sim) close() (err error) {
	for _, at := range s.seats() {
		err = errors.Join(err, at.volume.Close())
	}
	return errors.Join(err, s.cluster.Close())
}

// faults is the safety phase: workers and nemesis side by side.
func (s *sim) faults(ctx context.Context, n *nemesis) error {
	ctx, cancel := context.WithTimeout(ctx, s.opts.Duration)
	defer cancel()
	var wg sync.WaitGroup
	for i := range s.opts.Workers {
		w := &worker{sim: s, rnd: newRand(s.opts.Seed, uint64(100+i))}
		wg.Go(func() { w.run(ctx) })
	}
	wg.Go(func() { s.probe(ctx, newRand(s.opts.Seed, 10)) })
	if s.swarm.staleWriter {
		wg.Go(func() { s.stale(ctx, newRand(s.opts.Seed, 11)) })
	}
	err := n.run(ctx)
	if err != nil {
		cancel()
	}
	wg.Wait()
	return err
}

// settle is the liveness phase. A majority, drawn, is healed while the rest stays away: it must serve
// and agree. Then all that is not lost must, a change of members that was under way included; and again after
// a power cut of everything.
func (s *sim) settle(ctx context.Context, n *nemesis) error {
	began := time.Now()
	rnd := newRand(s.opts.Seed, 7)
	if err := s.healMajority(ctx, n, rnd); err != nil {
		return err
	}
	s.count(func(r *Report) { r.Healed = time.Since(began) })
	s.cluster.Net.HealAll()
	if err := s.revive(ctx, n, n.remaining(s.cluster.Nodes())); err != nil {
		return err
	}
	if err := n.finish(ctx); err != nil {
		return err
	}
	whole := n.whole()
	if err := s.sweep(ctx, "after the faults", n.remaining(whole)); err != nil {
		return err
	}
	if err := s.tamper(ctx, rnd, n.remaining(whole)); err != nil {
		return err
	}
	for _, node := range s.cluster.Nodes() {
		if err := node.Crash(ctx, CrashOptions{Rand: rnd}); err != nil {
			return err
		}
	}
	whole = n.remaining(whole)
	if err := s.revive(ctx, n, whole); err != nil {
		return err
	}
	return s.sweep(ctx, "after a power cut of all machines", n.remaining(whole))
}

// healMajority has a majority serve and agree. When one of it turns out to be damaged only now, another one is drawn:
// no machine more than a minority is.
func (s *sim) healMajority(ctx context.Context, n *nemesis, rnd *rand.Rand) error {
	for {
		core, err := n.core(rnd)
		if err != nil {
			return err
		}
		var ids, rest []trivet.NodeID
		for _, node := range s.cluster.Nodes() {
			if slices.Contains(core, node) {
				ids = append(ids, node.ID())
			} else {
				rest = append(rest, node.ID())
			}
		}
		s.cluster.Net.HealAll()
		s.cluster.Net.Partition(append(ids, ClientNode), rest)
		if err := s.revive(ctx, n, core); err != nil {
			return err
		}
		if len(n.remaining(core)) < len(core) {
			continue
		}
		err = s.sweep(ctx, "by a healed majority", core)
		if err == nil {
			return nil
		}
		for _, node := range core {
			err = errors.Join(err, n.start(ctx, node))
		}
		if len(n.remaining(core)) == len(core) {
			return fmt.Errorf("%w\n%s", err, s.cluster.standing())
		}
	}
}

// revive starts machines. One that stops itself at once, for what happened before, is started again.
func (s *sim) revive(ctx context.Context, n *nemesis, nodes []*Node) error {
	for range 3 {
		up := true
		for _, node := range nodes {
			if err := n.start(ctx, node); err != nil {
				return fmt.Errorf("restart: %w", err)
			}
			up = up && (node.Up() || n.lost[node])
		}
		if up {
			return nil
		}
	}
	return errors.New("restart: a machine stops itself again and again")
}

// sweep takes the volume over, so that nothing is under way any more, reads all of it, and compares
// the replicas with each other and with the oracle.
func (s *sim) sweep(ctx context.Context, when string, nodes []*Node) error {
	began := time.Now()
	live, cancel := context.WithTimeout(ctx, livenessMax)
	defer cancel()
	for { // one that waited for longer than a call may is asked again, until livenessMax is over
		err := s.sweepOnce(live, when, began)
		if err == nil {
			break
		}
		// A leader learns within a second that its disk has room again.
		wasFull := errors.Is(err, trivet.ErrNoSpace) && s.full.Load()
		if wasFull {
			time.Sleep(time.Second) // of the bubble's clock
		}
		if !wasFull && !errors.Is(err, trivet.ErrUnavailable) || live.Err() != nil {
			return err
		}
	}
	if err := s.cluster.converge(live, nodes); err != nil {
		return fmt.Errorf("replicas do not converge %s: %w", when, err)
	}
	if s.flipped.Load() {
		if err := s.mend(live, when, nodes); err != nil {
			return err
		}
	}
	return s.compare(when, nodes)
}

// sweepOnce takes the volume over, writes and reads.
func (s *sim) sweepOnce(live context.Context, when string, began time.Time) error {
	if err := s.takeOver(live, ClientNode); err != nil {
		return fmt.Errorf("no service %s, after %v: %w", when, time.Since(began), err)
	}
	w := &worker{sim: s, rnd: newRand(s.opts.Seed, 8)}
	for lba := range trivet.LBA(min(hotN, s.opts.BlockN)) {
		if _, err := w.write(live, s.seat, lba, 1); err != nil {
			return fmt.Errorf("write %s: %w", when, err)
		}
	}
	for at := 0; at < s.opts.BlockN; at += 16 {
		if err := w.read(live, s.seat, trivet.LBA(at), min(16, s.opts.BlockN-at)); err != nil {
			return fmt.Errorf("read %s: %w", when, err)
		}
	}
	return nil
}

// compare demands that replicas are equal (I4), and what the oracle says.
func (s *sim) compare(when string, nodes []*Node) error {
	var first [32]byte
	var of *Node
	for _, n := range nodes {
		vol, err := n.Blocks()
		if err != nil {
			return err
		}
		d, err := vol.Digest()
		if errors.Is(err, trivet.ErrCorrupt) && s.rotten.Load() {
			s.count(func(r *Report) { r.Refused++ })
			continue // damage that is told is no lie
		}
		if err != nil {
			return err
		}
		if of == nil {
			first, of = d, n
		}
		if d != first {
			s.violate(fmt.Errorf("%s: replica on %s has digest %x, %s has %x", when, n.ID(), d[:4], of.ID(), first[:4]))
		}
		if err := s.inspect(when, n, vol); err != nil {
			return err
		}
	}
	return nil
}

// inspect reads a replica's blocks behind Raft's back.
func (s *sim) inspect(when string, n *Node, vol *engine.Volume) error {
	p := make([]byte, s.opts.BlockN*trivet.BlockSize)
	floors := s.oracle.floors(0, s.opts.BlockN)
	if err := vol.ReadAt(p, 0); err != nil {
		return fmt.Errorf("%s: replica on %s: %w", when, n.ID(), err)
	}
	if err := s.oracle.check(0, p, floors); err != nil {
		s.violate(fmt.Errorf("%s: replica on %s: %w", when, n.ID(), err))
	}
	return s.inspectFrozen(when, n, vol)
}

// holder returns who holds the volume now.
func (s *sim) holder() *seat {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.seat
}

func (s *sim) noteTerm(term uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if term > s.report.Elections {
		s.report.Elections = term
		s.report.Leaders++
	}
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
