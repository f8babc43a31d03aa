package sim

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/engine"
	"github.com/trivet-csi/trivet/engine/segment"
	"github.com/trivet-csi/trivet/replication"
	"github.com/trivet-csi/trivet/replication/raftgroup"
	"github.com/trivet-csi/trivet/replication/transport"
)

const (
	diskDir = "/disk"
	logDir  = diskDir + "/log"

	// logSegmentBytes is small, so that segments come and go; a quarter of it takes the largest entry of a
	// volume (replication: 128 KiB and the heads of 256 requests).
	logSegmentBytes = 1 << 20

	// diskID is that of every disk: what the superblock of a real one says is none of the simulator's, and
	// with one ID for all, a swapped disk meets the checks below it as well.
	diskID = trivet.DiskID("00000000-0000-4000-8000-00000000d15c")
)

// Node is a machine with a replica, or a spare one. It lives from boot to crash, again and again, on what its
// disk kept.
type Node struct {
	c      *Cluster
	id     trivet.NodeID
	timing raftgroup.Timing
	clock  bootClock

	swapped atomic.Bool // it has another machine's disk

	mu      sync.Mutex
	replica trivet.ReplicaID   // "" = none
	members []raftgroup.Member // with which it was made; nil when it joined
	made    bool               // it was made, durably
	rotted  bool               // bits of its disk were changed
	mem     *vfs.MemFS         // as the last crash left it
	life    *life              // nil while down
	exited  bool               // it stopped itself, and was not booted since
	remains []*life            // of machines that stopped themselves, not cleared away yet
}

// life is what a machine runs between boot and crash.
type life struct {
	disk *disk
	net  *transport.MemoryNode
	wire *noisyWire // what the machine sends by
	mux  *raftgroup.Mux
	log  *segment.Log
	eng  *engine.Engine
	host *replication.Host

	over chan struct{} // closed once dead, and its disk is what it left

	memory noise       // of what the machine applies
	rotten atomic.Bool // bits of its disk were changed

	mu   sync.Mutex
	dead bool
}

// excused reports whether the machine was given a reason to stop itself. Rotten bits are one only when the disk takes
// no more writes for them.
func (l *life) excused(err error) bool {
	var rot *engine.DamageError
	return l.rotten.Load() && errors.As(err, &rot) || l.memory.hits() > 0 || l.disk.wasFaulty()
}

func (l *life) isDead() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.dead
}

// gone is closed when the life is over and its disk is what it left.
func (l *life) gone() <-chan struct{} { return l.over }

// die marks the life as over and reports whether it was alive.
func (l *life) die() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	was := !l.dead
	l.dead = true
	return was
}

// ID returns the machine's name.
func (n *Node) ID() trivet.NodeID { return n.id }

// ReplicaID returns the name of its replica, "" when it has none.
func (n *Node) ReplicaID() trivet.ReplicaID {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.replica
}

// Up reports whether the machine runs.
func (n *Node) Up() bool { return n.current() != nil }

// current returns the machine's life, or nil while it is down.
func (n *Node) current() *life {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.life == nil || n.life.isDead() {
		return nil
	}
	return n.life
}

// Host returns the machine's Host, or nil while it is down.
func (n *Node) Host() *replication.Host {
	if l := n.current(); l != nil {
		return l.host
	}
	return nil
}

// Replica returns the running replica.
func (n *Node) Replica() (*replication.Replica, bool) {
	l := n.current()
	if l == nil {
		return nil, false
	}
	return l.host.Replica(volumeID)
}

// Blocks returns the engine's handle of the volume; it is valid until the machine stops.
func (n *Node) Blocks() (*engine.Volume, error) {
	l := n.current()
	if l == nil {
		return nil, fmt.Errorf("node %s is down: %w", n.id, trivet.ErrUnavailable)
	}
	return l.eng.OpenVolume(volumeID)
}

// SetDiskUsage makes the disk say how full it is; it cannot tell before. A crash forgets it.
func (n *Node) SetDiskUsage(u vfs.DiskUsage) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.mem.TestingSetDiskUsage(u)
}

// Spec names the machine's replica, on its present disk.
func (n *Node) Spec() replication.ReplicaSpec {
	n.mu.Lock()
	s := replication.ReplicaSpec{
		Volume: volumeID, Replica: n.replica, SizeBytes: n.c.cfg.SizeBytes, Members: n.members,
	}
	n.mu.Unlock()
	if l := n.current(); l != nil {
		s.Disk = replication.Disk{ID: trivet.DiskID(n.id), Dir: diskDir, FS: l.disk, Engine: l.eng, Log: l.log}
		s.Disk.Share = n.share()
	}
	return s
}

// birth formats the machine's disk, creates one of the first replicas and starts it.
func (n *Node) birth(ctx context.Context, id trivet.ReplicaID, members []raftgroup.Member) error {
	if err := n.bootSpare(); err != nil {
		return err
	}
	n.setReplica(id, members, false)
	return n.makeReplica(ctx)
}

// bootSpare formats the machine's disk and boots it.
func (n *Node) bootSpare() error {
	if err := n.format(); err != nil {
		return err
	}
	return n.Boot()
}

// setReplica says which replica the machine has from now on; "" = none.
func (n *Node) setReplica(id trivet.ReplicaID, members []raftgroup.Member, made bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.replica, n.members, n.made = id, members, made
}

// makeReplica creates the machine's replica, unless it is made, and starts it.
func (n *Node) makeReplica(ctx context.Context) error {
	l := n.current()
	if l == nil {
		return fmt.Errorf("make replica on %s: machine is down: %w", n.id, trivet.ErrUnavailable)
	}
	if !n.hasReplica() {
		l.disk.lie.Store(false)
		if err := l.host.CreateReplica(ctx, n.Spec()); err != nil {
			return err
		}
		if l.isDead() { // what it says counts no more
			return fmt.Errorf("make replica on %s: machine went down: %w", n.id, trivet.ErrUnavailable)
		}
		n.mu.Lock()
		n.made = true
		n.mu.Unlock()
		l.disk.lie.Store(n.c.cfg.LyingDisks)
	}
	return l.host.OpenReplica(ctx, n.Spec())
}

// hasReplica reports whether the machine has a replica that was made.
func (n *Node) hasReplica() bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.replica != "" && n.made
}

// logOptions returns where the log is, by way of fs.
func logOptions(fs vfs.FS, seed uint64) segment.Options {
	return segment.Options{
		Dir: raftgroup.LogDir(fs, logDir), Disk: diskID, Lanes: 1, SegmentBytes: logSegmentBytes, DataLane: true, Hold: true,
		Rand: newRand(seed, 51).Uint64,
	}
}

// format makes the disk's directory and an empty log, durably.
func (n *Node) format() error {
	if err := n.mem.MkdirAll(diskDir, 0o700); err != nil {
		return err
	}
	if err := segment.Format(logOptions(n.mem, n.c.cfg.Seed)); err != nil {
		return err
	}
	root, err := n.mem.OpenDir("/")
	if err != nil {
		return err
	}
	return errors.Join(root.Sync(), root.Close())
}

// Boot starts the machine without its replica. A machine that runs is left alone.
func (n *Node) Boot() error {
	if n.Up() {
		return nil
	}
	n.bury()
	l := &life{disk: newDisk(n.mem), over: make(chan struct{}), net: n.c.Net.Node(n.id)}
	l.rotten.Store(n.hasRotted())
	l.wire = &noisyWire{MemoryNode: l.net}
	l.disk.setLatency(n.c.cfg.FlushLatency, newRand(n.c.cfg.Seed, 50+n.c.nextLife()))
	l.disk.lie.Store(n.c.cfg.LyingDisks)
	fatal := n.c.fatal(n, l)
	opts := logOptions(l.disk, n.c.cfg.Seed+n.c.nextLife())
	opts.Fatal, opts.CacheBytes = fatal, n.c.cfg.LogCacheBytes
	var err error
	if l.log, err = segment.Open(opts); err != nil {
		return errors.Join(fmt.Errorf("boot %s: %w", n.id, err), l.net.Close())
	}
	n.c.ballots.check(n, l.log)
	l.eng, err = engine.Open(engine.Config{
		FS: l.disk, Dir: diskDir + "/engine", CacheBytes: 1 << 20, MemTableBytes: 1 << 20, Log: l.log,
		SweepRate: n.c.cfg.SweepRate, Fatal: fatal, OnCorruption: n.c.damage(n, l), Logger: n.c.cfg.Logger.With("node", n.id),
	})
	if err != nil {
		return errors.Join(fmt.Errorf("boot %s: %w", n.id, err), l.log.Close(), l.net.Close())
	}
	l.mux = raftgroup.NewMux(l.wire)
	l.host, err = replication.NewHost(replication.HostConfig{
		Network: l.wire, Mux: l.mux, Timing: n.timing, SnapshotBytes: n.c.cfg.SnapshotBytes,
		OverlapFlush: n.c.cfg.OverlapFlush, BootTime: n.clock.now,
		WrapMachine: n.wrapMachine(l), Authorize: n.c.cfg.Authorize, IsMember: n.c.isMember, Fatal: fatal,
		Disks:  []replication.Disk{{ID: trivet.DiskID(n.id), Dir: diskDir, FS: l.disk, Engine: l.eng, Log: l.log}},
		Logger: n.c.cfg.Logger.With("node", n.id),
	})
	if err != nil {
		return errors.Join(fmt.Errorf("boot %s: %w", n.id, err), l.eng.Close(), l.log.Close(), l.net.Close())
	}
	n.mu.Lock()
	n.life, n.exited = l, false
	n.mu.Unlock()
	return nil
}

// Start boots the machine and opens its replica. A machine that runs is left alone.
func (n *Node) Start(ctx context.Context) error {
	if n.Up() {
		return nil
	}
	if err := n.Boot(); err != nil {
		return err
	}
	l := n.current()
	if l == nil { // a fault was waiting for it
		return fmt.Errorf("start %s: it stopped at once: %w", n.id, trivet.ErrUnavailable)
	}
	if !n.hasReplica() {
		return nil
	}
	if err := l.host.OpenReplica(ctx, n.Spec()); err != nil {
		return fmt.Errorf("start %s: %w", n.id, err)
	}
	return nil
}

// wrapMachine puts what the simulator needs between group and state machine; the caller's is outside.
func (n *Node) wrapMachine(l *life) func(raftgroup.StateMachine) raftgroup.StateMachine {
	return func(m raftgroup.StateMachine) raftgroup.StateMachine {
		m = &noisyMachine{StateMachine: m, memory: &l.memory}
		if n.c.cfg.WrapMachine != nil {
			m = n.c.cfg.WrapMachine(m)
		}
		return m
	}
}

// Stop ends the machine in an orderly way. A machine that is down is left alone.
func (n *Node) Stop() error {
	n.mu.Lock()
	l := n.life
	n.life = nil
	n.mu.Unlock()
	if l == nil {
		return nil
	}
	return l.close()
}

func (l *life) close() error {
	l.disk.release()
	err := l.host.Close()
	return errors.Join(err, l.eng.Close(), l.log.Close(), l.net.Close())
}

// CrashOptions say how a machine loses power.
type CrashOptions struct {
	Rand            *rand.Rand
	UnsyncedPercent int // of the unsynced writes that reach the disk all the same, 0 to 100
	// Ops, when positive, lets the machine run on until just before that operation on its disk, but
	// no longer than Wait.
	Ops  int
	Wait time.Duration
	// Vote lets the operations be counted from the first request for a vote on, that the machine gets or sends.
	Vote bool
}

// Crash takes the power from the machine: its messages stop, its disk keeps what was synced and a share
// of the rest, and nothing that it does afterwards counts. It returns once the dead process is cleared
// away. A machine that is down is left alone.
func (n *Node) Crash(ctx context.Context, o CrashOptions) error {
	n.mu.Lock()
	l := n.life
	n.mu.Unlock()
	if l == nil {
		return nil
	}
	crashed := make(chan struct{})
	crash := func() {
		if n.kill(l, o.Rand, o.UnsyncedPercent) {
			close(crashed)
		}
	}
	if o.Ops > 0 {
		if o.Vote {
			defer n.c.ballots.await(n.id, func() { l.disk.arm(o.Ops, crash) })()
		} else {
			l.disk.arm(o.Ops, crash)
		}
		t := time.NewTimer(o.Wait)
		defer t.Stop()
		select {
		case <-crashed:
		case <-l.gone():
		case <-t.C:
		case <-ctx.Done():
		}
	}
	crash()
	<-l.gone()
	// The dead process talks to a disk and a network that nobody looks at any more: what its shutdown
	// says does not matter, only that it ends.
	if err := l.close(); err != nil {
		n.c.cfg.Logger.Debug("remains of a crash", "node", n.id, "err", err)
	}
	return nil
}

// kill ends a life, and reports false when it had ended. The disk is copied once the machine can send
// nothing more: whatever it told others about its disk is in the copy.
func (n *Node) kill(l *life, rnd *rand.Rand, unsyncedPercent int) bool {
	if !l.die() {
		return false
	}
	n.c.Net.Down(n.id)
	after := l.disk.afterCrash(rnd, unsyncedPercent)
	n.mu.Lock()
	if n.mem == l.disk.mem { // else it has been given another one since (swapDisk)
		n.mem = after
	}
	if n.life == l {
		n.life = nil
	}
	n.mu.Unlock()
	l.disk.release()
	close(l.over)
	return true
}

// exit is how a machine stops itself after a fault of its disk or its memory. The kernel lives on, but
// may have forgotten what it could not write, so any share of the unsynced data may be there later.
// It is called with the product's locks held; bury clears the remains away.
func (n *Node) exit(l *life, why error) {
	rnd := newRand(n.c.cfg.Seed, 1<<32+n.c.nextExit())
	if !n.kill(l, rnd, rnd.IntN(101)) {
		return
	}
	n.c.cfg.Logger.Debug("machine stopped itself", "node", n.id, "err", why)
	n.mu.Lock()
	defer n.mu.Unlock()
	n.exited = true
	n.remains = append(n.remains, l)
}

// stoppedItself reports whether a fault has stopped the machine since it was booted.
func (n *Node) stoppedItself() bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.exited
}

// forgetRot is for a disk that is another one now.
func (n *Node) forgetRot() {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.rotted = false
}

// hasRotted reports whether bits of the machine's disk were changed.
func (n *Node) hasRotted() bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.rotted
}

// rot flips bits on the disk of a machine that is down.
func (n *Node) rot(rnd *rand.Rand, bitN int, dir string) ([]string, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	var out []string
	n.rotted = true
	for range bitN {
		what, err := flipBit(n.mem, dir, rnd)
		if err != nil {
			return nil, err
		}
		out = append(out, what)
	}
	return out, nil
}

// bury ends what is left of machines that stopped themselves, and waits for it.
func (n *Node) bury() {
	n.mu.Lock()
	remains := n.remains
	n.remains = nil
	n.mu.Unlock()
	for _, l := range remains {
		if err := l.close(); err != nil {
			n.c.cfg.Logger.Debug("remains of an exit", "node", n.id, "err", err)
		}
	}
}

// share makes the disk's background work wait as Config says.
func (n *Node) share() replication.DiskShare {
	if n.c.cfg.Background == nil {
		return nil
	}
	return background(n.c.cfg.Background)
}

// background is a share of a disk that keeps nobody waiting but background work.
type background func(ctx context.Context, bytes int) (release func(), err error)

// Open implements replication.DiskShare.
func (background) Open(trivet.VolumeID) replication.Turns { return nil }

// Background implements replication.DiskShare.
func (b background) Background(ctx context.Context, bytes int) (release func(), err error) {
	return b(ctx, bytes)
}
