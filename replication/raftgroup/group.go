package raftgroup

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/raft"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/internal/stage"
)

// Group is one replica of one Raft group. It is safe for concurrent use.
type Group struct {
	cfg     Config
	log     *slog.Logger
	addr    raft.ServerAddress
	started time.Time

	lock   io.Closer
	guard  *diskGuard
	seglog *groupLog
	store  *logStore
	stable *stableStore
	snaps  *snapshotStore
	fsm    *fsm
	lease  *leaseTable
	catch  *catchUp
	images *images
	slots  chan struct{} // one per proposal under way
	sends  *stage.Meter  // entries on their way to followers; nil = not measured
	found  damage        // of the log, when it was read last: by Open, later by mendLoop alone
	holes  holes         // what of it has to come from other members (mend.go)

	wake        chan struct{} // the watcher should look
	wakeCompact chan struct{} // the compactor should look
	compactSeen atomic.Int64  // of the bytes appended: when it was last woken
	stop        chan struct{}
	life        context.Context // from Open to Close, of what goes on without the library
	stopLife    context.CancelCauseFunc
	loops       sync.WaitGroup

	failOnce sync.Once
	// runTurn is held while the library is started or stopped, which waits for calls and for the disk. No mutex does
	// for that: in a bubble of simulated time nothing goes on while anybody waits for one.
	runTurn chan struct{}
	ran     bool // the library was started since Open; under runTurn

	mu      sync.Mutex
	inst    *instance // nil between two runs, and after Close
	closed  bool
	view    view
	changed chan struct{}
	handing chan struct{} // closed when the transfer that is under way is over; nil when there is none
}

// instance is one run of the library. A catch-up ends it, and another begins.
type instance struct {
	g    *Group
	r    *raft.Raft
	t    *peerTransport
	stop context.CancelCauseFunc // ends what the transport has sent

	stampBase  uint64
	stopping   chan struct{} // closed first: no message in, no call accepted
	began      time.Time
	searched   time.Time    // of Mux.tick alone: when it last began a search
	quarantine time.Time    // no vote is given before
	fast       sync.RWMutex // held for reading by the heartbeat handler
	fastClosed time.Time    // until when heartbeats take the slow path; under fast

	pace        pace         // of Mux.tick alone
	searching   atomic.Int32 // searches for a leader under way
	beater      atomic.Pointer[beater]
	appliedTerm atomic.Uint64 // highest term of which an entry is applied here as leader
	rounds      rounds
	loops       sync.WaitGroup

	mu       sync.Mutex
	handover handover
	calls    int           // under way in the library
	idle     chan struct{} // closed when calls falls to zero while draining
	closed   bool
}

// Open starts the replica that Create made. It returns ErrNotFound if it was never created (an
// empty directory never opens a group: H10), ErrInvalid if the directory is another's (H11),
// ErrInUse if it runs already, and ErrCorrupt when log, state machine and snapshot contradict each
// other or, unless Config.MendLog is set, an entry is damaged that the state machine has not applied: then nothing has
// been changed, and the replica must be rebuilt under a new ID. A replica whose catch-up was interrupted opens, goes on
// with it, and takes no part in the group until it is whole again (Status.CatchUp).
func Open(cfg Config) (*Group, error) {
	cfg = cfg.withDefaults()
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	g := &Group{
		cfg:     cfg,
		log:     cfg.Logger.With("component", "raftgroup", "volume", cfg.Group.String(), "replica", string(cfg.Replica)),
		addr:    address(cfg.Replica, cfg.Network.net.Local()),
		started: time.Now(), lease: newLeaseTable(),
		slots: make(chan struct{}, proposalsMax), wake: make(chan struct{}, 1), wakeCompact: make(chan struct{}, 1),
		stop: make(chan struct{}), runTurn: make(chan struct{}, 1), changed: make(chan struct{}), catch: newCatchUp(),
		images: newImages(cfg.Network.images),
	}
	g.life, g.stopLife = context.WithCancelCause(context.Background())
	g.guard = &diskGuard{fatal: g.fatal, rot: g.suspect, onStall: g.poke}
	if err := g.open(); err != nil {
		err = errors.Join(err, g.release())
		return nil, fmt.Errorf("open replica %s of group %s: %w", cfg.Replica, cfg.Group, err)
	}
	return g, nil
}

func (g *Group) open() error {
	s, err := readSuperblock(g.cfg.FS, g.cfg.Dir)
	if err != nil {
		return err
	}
	if err := checkIdentity(g.cfg, s); err != nil {
		return err
	}
	if g.lock, err = g.cfg.FS.Lock(g.path(fileLock)); err != nil {
		return fmt.Errorf("lock directory: %v: %w", err, trivet.ErrInUse)
	}
	if err := g.openStores(); err != nil {
		return err
	}
	owing, err := g.resumeInstall()
	if err != nil {
		return err
	}
	holey, err := g.settle(owing)
	if err != nil {
		return err
	}
	if g.cfg.Recover {
		if err := g.recoverAlone(owing); err != nil {
			return err
		}
	}
	if owing {
		g.log.Info("state is not whole: a catch-up was interrupted")
	}
	if owing || holey { // before the first message arrives
		g.catch.active = true
		g.fsm.setMixed(true)
	}
	if err := g.cfg.Network.add(g); err != nil {
		return err
	}
	switch {
	case owing: // its image covers holes, too
		g.loops.Go(g.catchUpLoop)
	case holey:
		g.loops.Go(g.mendLoop)
	default:
		if err := g.start(); err != nil {
			return err
		}
	}
	g.loops.Go(g.watch)
	g.loops.Go(g.watchLog)
	g.loops.Go(g.compact)
	g.poke()
	return nil
}

// settle decides what a log with damage is good for, once it belongs to the state. holey: the library must not start
// before other members have mended it.
func (g *Group) settle(owing bool) (holey bool, err error) {
	if owing {
		return g.isHoley(), g.checkHome()
	}
	if err := g.checkState(); err != nil {
		return false, err
	}
	if g.cfg.Recover {
		if err := g.cutAtHole(); err != nil {
			return false, err
		}
	}
	if g.isHoley() {
		return true, nil
	}
	if err := g.leaveRot(); err != nil {
		return false, err
	}
	return false, g.leaveApplied()
}

func (g *Group) path(name string) string { return g.cfg.FS.PathJoin(g.cfg.Dir, name) }

// openStores opens what the group keeps, and reads all of its log. It changes nothing that counts.
func (g *Group) openStores() error {
	var err error
	g.seglog = newGroupLog(g.cfg.Log, g.cfg.Group)
	g.seglog.payload = g.cfg.PayloadAt
	has, _ := g.cfg.Machine.Applied()
	if g.cfg.Machine.Restoring() {
		has = 0
	}
	g.stable = newStableStore(g.seglog, g.guard)
	g.stable.onSet = g.poke
	if g.snaps, err = openSnapshots(g.cfg.FS, g.cfg.Dir, g.guard); err != nil {
		return err
	}
	base := g.snaps.record().config
	if g.found, err = g.seglog.verify(has, base.index); err != nil {
		return err
	}
	if len(g.found.holes) > 0 && !g.cfg.MendLog {
		return g.found.first
	}
	g.store, err = newLogStore(g.seglog, g.guard, base, g.cfg.OverlapFlush, g.found.holes...)
	if err != nil {
		return err
	}
	g.store.onAppend = g.appended
	g.store.leads, g.store.follows = g.cfg.Stages.Meter(stage.LeaderLog), g.cfg.Stages.Meter(stage.FollowerLog)
	g.sends = g.cfg.Stages.Meter(stage.Network)
	applied, _ := g.cfg.Machine.Applied()
	g.fsm = &fsm{
		machine: g.cfg.Machine, fatal: g.fatal, failed: g.guard.failed, durable: g.store.durable, log: g.seglog,
		config: g.store.configAt(max(applied, g.snaps.record().index)),
	}
	g.snaps.fsm = g.fsm
	return nil
}

// checkState returns ErrCorrupt unless log, snapshot, vote and state machine belong together (H4,
// I1, I2). All entries have been read by now, so the library meets no damage.
func (g *Group) checkState() error {
	first, last := g.seglog.bounds()
	snap := g.snaps.record()
	applied, appliedTerm := g.cfg.Machine.Applied()
	lastTerm, _ := g.seglog.term(last)
	entryTerm, inLog := g.seglog.term(applied)
	var what string
	switch {
	case g.stable.record().term == 0:
		what = "the disk's log knows nothing of the group"
	case g.cfg.Machine.Restoring():
		what = "state is the remains of an interrupted restore"
	case applied < snap.machine:
		what = "state is behind the snapshot"
	case applied > last && applied > snap.index:
		what = "state is ahead of the log"
	case first > snap.index+1:
		what = "entries between snapshot and log are missing"
	case last >= first && last < snap.index:
		what = "log ends before the snapshot"
	case inLog && entryTerm != appliedTerm:
		what = fmt.Sprintf("state has applied an entry of term %d where the log has term %d", appliedTerm, entryTerm)
	case max(lastTerm, snap.term, appliedTerm) > g.stable.record().term:
		what = "current term is behind log or state"
	default:
		return g.checkHome()
	}
	return fmt.Errorf("%s: state applied %d of term %d, snapshot at %d (machine %d), log %d to %d, term %d; "+
		"log and state do not belong together, replace it by a replica with a new ID: %w", what, applied, appliedTerm,
		snap.index, snap.machine, first, last, g.stable.record().term, trivet.ErrCorrupt)
}

// checkHome returns ErrInvalid unless this is the node that the configuration says (H11).
func (g *Group) checkHome() error {
	self, member := findMember(g.store.latestConfig().members, g.cfg.Replica)
	if member && address(self.Replica, self.Node) != g.addr {
		return fmt.Errorf("replica belongs to node %s, this is %s: %w",
			self.Node, g.cfg.Network.net.Local(), trivet.ErrInvalid)
	}
	return nil
}

// raftConfig is what the adapters of this package rely on. A test asserts it.
func raftConfig(cfg Config) *raft.Config {
	c := raft.DefaultConfig()
	c.LocalID = raft.ServerID(cfg.Replica)
	c.HeartbeatTimeout = libraryNever // pace.go has these in its place
	c.ElectionTimeout = libraryNever
	c.LeaderLeaseTimeout = libraryNever
	c.CommitTimeout = cfg.TellCommit
	c.MaxAppendEntries = appendEntriesMax
	c.BatchApplyCh = false              // an enqueue timeout must mean "not applied"
	c.ShutdownOnRemove = false          // we own the lifecycle
	c.RestoreCommittedLogs = false      // D1, D2
	c.NoSnapshotRestoreOnStart = true   // the state machine is durable
	c.PreVoteDisabled = false           //
	c.SnapshotThreshold = math.MaxInt64 // snapshots are driven by us, on bytes
	c.SnapshotInterval = 24 * time.Hour
	c.TrailingLogs = trailingMin
	c.NoLegacyTelemetry = true
	c.Logger = newRaftLogger(cfg.Logger.With("component", "raft", "volume", cfg.Group.String()))
	return c
}

// start runs the library. REQUIRES: it does not run.
func (g *Group) start() error {
	g.runTurn <- struct{}{}
	defer func() { <-g.runTurn }()
	return g.startLocked()
}

func (g *Group) startLocked() error {
	ctx, cancel := context.WithCancelCause(context.Background())
	i := &instance{g: g, stop: cancel, stopping: make(chan struct{}), began: time.Now(), stampBase: randomUint64()}
	i.t = &peerTransport{g: g, ctx: ctx, rpc: make(chan raft.RPC)}
	if g.stable.record().term > 1 {
		// A leader may count on a promise that this replica gave before (lease.go). The first term that
		// has a leader is 2, so a group that is being born loses no time.
		i.quarantine = time.Now().Add(g.cfg.Timing.Heartbeat)
		if rested := g.cfg.RestedSince; !rested.IsZero() && !g.ran {
			i.quarantine = rested.Add(g.cfg.Timing.Heartbeat)
		}
	}
	g.ran = true
	r, err := raft.NewRaft(raftConfig(g.cfg), g.fsm, g.store, g.stable, g.snaps, i.t)
	if err != nil {
		cancel(err)
		return fmt.Errorf("start raft: %w", err)
	}
	i.r = r
	r.RegisterObserver(raft.NewObserver(nil, false, func(o *raft.Observation) bool {
		switch o.Data.(type) {
		case raft.LeaderObservation, raft.RaftState:
			g.poke()
		}
		return false
	}))
	g.mu.Lock()
	g.inst = i
	g.mu.Unlock()
	// A group that comes up as a whole, woken or after a power cut, has no leader to wait for.
	i.search(vacancy{term: r.CurrentTerm()})
	return nil
}

// stopLocked ends the current run of the library, if there is one, and waits for it. Calls that are
// under way in it are answered first: it forgets those that it has handed to the state machine.
// REQUIRES: runTurn.
func (g *Group) stopLocked() {
	g.mu.Lock()
	i := g.inst
	g.inst = nil
	g.mu.Unlock()
	if i == nil {
		return
	}
	close(i.stopping)
	// A leader steps down and answers what it cannot commit.
	i.resign(i.r.CurrentTerm(), "it stops")
	i.stop(fmt.Errorf("group %s stops: %w", g.cfg.Group, trivet.ErrClosed))
	i.drain(4 * g.cfg.Timing.Heartbeat)
	if err := i.r.Shutdown().Error(); err != nil {
		g.log.Warn("raft did not stop cleanly", "err", err)
	}
	i.loops.Wait()
	g.poke()
}

// running returns the current run of the library, nil when there is none.
func (g *Group) running() *instance {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.inst
}

// watchLog fails the group with the disk's log, also when it has nothing to write: after a failed flush no
// group of that disk may lead, vote or answer (H28).
func (g *Group) watchLog() {
	select {
	case <-g.cfg.Log.Failed():
		g.guard.fail(g.cfg.Log.Err())
	case <-g.stop:
	}
}

func (g *Group) isClosed() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.closed
}

// fatal reports a failure that ends the process.
func (g *Group) fatal(err error) {
	err = fmt.Errorf("replica %s of group %s: %w", g.cfg.Replica, g.cfg.Group, err)
	g.guard.poison(err)
	g.failOnce.Do(func() {
		g.log.Error("replica failed", "err", err)
		g.poke()
		g.cfg.Fatal(err)
	})
}

// suspect reports an entry of the log that cannot be read any more, which ends this run of the group and no more.
func (g *Group) suspect(err error) {
	if g.cfg.Damaged == nil {
		g.fatal(err)
		return
	}
	err = fmt.Errorf("replica %s of group %s: %w", g.cfg.Replica, g.cfg.Group, err)
	g.failOnce.Do(func() {
		g.log.Error("an entry of the log is damaged: the replica is suspect", "err", err)
		g.poke()
		g.cfg.Damaged(err)
	})
}

// Close stops the replica and waits for it; outstanding calls fail. It is idempotent.
func (g *Group) Close() error {
	g.mu.Lock()
	first := !g.closed
	g.closed = true
	g.mu.Unlock()
	if !first {
		return nil
	}
	g.cfg.Network.remove(g)
	g.runTurn <- struct{}{}
	g.stopLocked()
	<-g.runTurn
	g.stopLife(fmt.Errorf("group %s closes: %w", g.cfg.Group, trivet.ErrClosed))
	close(g.stop)
	g.loops.Wait()
	g.images.close()
	g.notify(view{})
	if err := g.release(); err != nil {
		return fmt.Errorf("close replica %s of group %s: %w", g.cfg.Replica, g.cfg.Group, err)
	}
	return nil
}

// release gives up the directory. The log is the disk's, and stays open.
func (g *Group) release() error {
	g.stopLife(trivet.ErrClosed)
	g.cfg.Network.remove(g)
	g.guard.close()
	if g.lock == nil {
		return nil
	}
	return g.lock.Close()
}

func randomUint64() uint64 {
	var b [8]byte
	rand.Read(b[:]) //nolint:errcheck // crypto/rand.Read never fails since Go 1.24
	return binary.LittleEndian.Uint64(b[:])
}
