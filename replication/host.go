package replication

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"golang.org/x/sync/errgroup"
	"golang.org/x/time/rate"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/engine"
	"github.com/trivet-csi/trivet/engine/segment"
	"github.com/trivet-csi/trivet/internal/stage"
	"github.com/trivet-csi/trivet/replication/raftgroup"
	"github.com/trivet-csi/trivet/replication/transport"
)

// HostConfig says how a Host runs.
type HostConfig struct {
	// Network carries volume I/O; the Host registers the KindVolume* handlers on it, so a Network
	// serves one Host. Must be set.
	Network transport.Network
	// Mux carries Raft over the same Network. Must be set.
	Mux *raftgroup.Mux
	// Timing of every group; the zero value means raftgroup's defaults. It must be the same on all
	// nodes: Fence waits for the leases of others by it.
	Timing raftgroup.Timing
	// SnapshotBytes of log after which a group compacts it; 0 means raftgroup's default.
	SnapshotBytes int64
	// OverlapFlush lets leaders send entries while their own disk still flushes them; see raftgroup.Config.
	OverlapFlush bool
	// CatchUpBytesPerSecond bounds what all replicas of this Host together pull of the state of others, when
	// they missed more than a log keeps. 0 = no limit; at least CatchUpBytesPerSecondMin.
	CatchUpBytesPerSecond int64
	// Authorize, when set, is asked before each volume I/O whether node may act for an attachment
	// with that epoch; an error is the answer. It must be fast, and decide by what this node knows.
	// The state machine checks the epoch in any case.
	Authorize func(node trivet.NodeID, volume trivet.VolumeID, epoch trivet.Epoch) error
	// IsMember, when set, answers from the catalogue whether a replica of the volume is on that node. A
	// replica asks it about one that its own configuration does not know: the leader of a group that it joins,
	// or whose members all changed while it was away. nil: one that joins takes its log from any sender, and
	// one whose configuration is older than all members takes it from none.
	IsMember func(volume trivet.VolumeID, replica trivet.ReplicaID, node trivet.NodeID) bool
	// ScrubTurn, when set, is where a scrub waits for its turn beside other work before it reads so many bytes of a
	// replica here; its error, which is that of ctx, ends the scrub.
	ScrubTurn func(ctx context.Context, bytes int64) error
	// RoomElsewhere, when set, is asked by a leader before each write whether the other replicas of the volume have
	// room; ErrNoSpace is the answer to the client. It must be fast, and decide by what this node knows.
	RoomElsewhere func(volume trivet.VolumeID) error
	// Disks are those of the node. Snapshots are read from them, whether the volume's group runs or not; none: from none.
	Disks []Disk
	// WrapMachine, when set, stands between each group and its state machine. It is a seam for
	// fault injection in tests; leave it nil.
	WrapMachine func(raftgroup.StateMachine) raftgroup.StateMachine
	// BootTime is every group's; see raftgroup.Config. nil = the kernel's.
	BootTime func() time.Duration
	// Stages is where the replicas are measured, and what KindVolumeStages is answered from; nil = not at all.
	Stages *stage.Registry
	// Logger may be nil.
	Logger *slog.Logger
	// Fatal is called on damage, on a failing disk and on a broken invariant: stop the process. Must be set.
	Fatal func(error)
}

// CatchUpBytesPerSecondMin is the least limit of a catch-up: below it a volume would take weeks.
const CatchUpBytesPerSecondMin = 64 << 10

// catchUpBurst is for how long, as a share of a second, a limited catch-up may run at full speed: the limit
// holds within a tenth over any two seconds.
const catchUpBurst = 8

// Validate returns ErrInvalid naming a field that is not usable.
func (c *HostConfig) Validate() error {
	switch {
	case c.Network == nil:
		return fmt.Errorf("host config: Network is not set: %w", trivet.ErrInvalid)
	case c.Mux == nil:
		return fmt.Errorf("host config: Mux is not set: %w", trivet.ErrInvalid)
	case c.Fatal == nil:
		return fmt.Errorf("host config: Fatal is not set: %w", trivet.ErrInvalid)
	case c.Timing.Heartbeat < 0 || c.Timing.Lease < 0:
		return fmt.Errorf("host config: Timing %v is negative: %w", c.Timing, trivet.ErrInvalid)
	case c.SnapshotBytes < 0:
		return fmt.Errorf("host config: SnapshotBytes %d is negative: %w", c.SnapshotBytes, trivet.ErrInvalid)
	case c.CatchUpBytesPerSecond != 0 && c.CatchUpBytesPerSecond < CatchUpBytesPerSecondMin:
		return fmt.Errorf("host config: CatchUpBytesPerSecond is %d, want 0 or at least %d: %w",
			c.CatchUpBytesPerSecond, CatchUpBytesPerSecondMin, trivet.ErrInvalid)
	}
	return nil
}

// catchUpLimit returns the limit that all groups share; nil = none.
func (c *HostConfig) catchUpLimit() *rate.Limiter {
	if c.CatchUpBytesPerSecond == 0 {
		return nil
	}
	return rate.NewLimiter(rate.Limit(c.CatchUpBytesPerSecond), int(c.CatchUpBytesPerSecond/catchUpBurst))
}

// lease returns the longest read lease of a group with this timing; see raftgroup.Timing.
func (c *HostConfig) lease() time.Duration {
	if c.Timing.Lease > 0 {
		return c.Timing.Lease
	}
	if c.Timing.Heartbeat > 0 {
		return c.Timing.Heartbeat * 3 / 4
	}
	return time.Second * 3 / 4
}

// Disk is where replicas of this node live.
type Disk struct {
	ID     trivet.DiskID
	Dir    string // groups live in Dir/groups/<volume id>
	FS     vfs.FS // vfs.Default when nil
	Engine *engine.Engine
	Log    *segment.Log // the Raft logs of all its replicas; open for as long as they run
	Share  DiskShare    // nil: everything goes at once
}

// DiskShare shares a disk out between the volumes whose replicas on it lead, and background work.
type DiskShare interface {
	// Open returns the turns of the requests to a volume. The replica closes them when it ends.
	Open(volume trivet.VolumeID) Turns
	// Background waits for the turn of background work; see raftgroup.Config.
	Background(ctx context.Context, bytes int) (release func(), err error)
}

// Turns is where requests wait for their turn. It must not allocate, and cost next to nothing while nobody waits.
type Turns interface {
	// Acquire waits for the turn of a request of n bytes; an error is that of ctx. Else Release follows.
	Acquire(ctx context.Context, n int) error
	// Release ends a request, which took so long since its turn.
	Release(n int, took time.Duration)
	// Close ends the use. No request comes after it; some may still be under way.
	Close()
}

func (d *Disk) background() func(ctx context.Context, bytes int) (release func(), err error) {
	if d.Share == nil {
		return nil
	}
	return d.Share.Background
}

func (d *Disk) fs() vfs.FS {
	if d.FS == nil {
		return vfs.Default
	}
	return d.FS
}

// ReplicaSpec names a replica and says what it is a copy of.
type ReplicaSpec struct {
	Volume  trivet.VolumeID
	Replica trivet.ReplicaID
	Disk    Disk
	// SizeBytes is the size with which the volume began, also for a replica that joins after a Resize:
	// it may be given the log from its first entry on, and what fits is decided by this size until
	// the log says Resize (I13). A replica that is given an image takes the size from there.
	SizeBytes int64
	// Members is the initial configuration: every replica, this one included. Empty for a replica
	// that joins a group that exists.
	Members []raftgroup.Member
	// Base is the snapshot of another volume on the same disk that the volume begins with; nil = empty. A replica that
	// joins has none: it is given everything.
	Base *engine.Base
}

// Host runs this node's replicas and answers volume I/O for those that lead. It is safe for
// concurrent use; creating, opening and destroying take turns per volume.
type Host struct {
	cfg     HostConfig
	log     *slog.Logger
	catchUp *rate.Limiter
	usages  *usages

	mu       sync.Mutex
	closed   bool
	replicas map[trivet.VolumeID]*Replica
	busy     map[trivet.VolumeID]chan struct{} // closed when the operation on the volume ends
	rested   map[trivet.ReplicaID]time.Time    // when a parked replica was stopped
	began    time.Time                         // of this Host: what was never opened rests since before

	reopening sync.WaitGroup // replicas that are suspect (suspect.go); nothing is added once closed
}

// NewHost registers the volume handlers on cfg.Network. The caller closes the Host before the Mux
// and the Network. ErrInvalid: the configuration is not usable.
func NewHost(cfg HostConfig) (*Host, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	h := &Host{
		cfg:      cfg,
		log:      cfg.Logger.With("component", "replication"),
		catchUp:  cfg.catchUpLimit(),
		replicas: make(map[trivet.VolumeID]*Replica),
		busy:     make(map[trivet.VolumeID]chan struct{}),
		rested:   make(map[trivet.ReplicaID]time.Time),
		began:    time.Now(),
		usages:   newUsages(),
	}
	cfg.Network.Handle(transport.KindVolumeWrite, h.handleWrite)
	cfg.Network.Handle(transport.KindVolumeRead, h.handleRead)
	cfg.Network.Handle(transport.KindVolumeStatus, h.handleStatus)
	cfg.Network.Handle(transport.KindVolumeStages, h.handleStages)
	cfg.Network.Handle(transport.KindVolumeFreeze, h.handleFreeze)
	cfg.Network.Handle(transport.KindVolumeMark, h.handleMark)
	cfg.Network.Handle(transport.KindVolumeScrub, h.handleScrub)
	cfg.Network.Handle(transport.KindVolumeSnapRead, h.handleSnapshot)
	cfg.Network.Handle(transport.KindVolumeDelta, h.handleSnapshot)
	cfg.Network.Handle(transport.KindVolumeAllocated, h.handleAllocated)
	cfg.Network.Handle(transport.KindVolumeUsage, h.handleUsage)
	return h, nil
}

// Replica returns a running replica of a volume on this node.
func (h *Host) Replica(id trivet.VolumeID) (*Replica, bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	r, ok := h.replicas[id]
	return r, ok
}

// restedSince returns when this process ended its last run of a replica; without one, when the process
// began: the disk is locked, so nobody has run it since.
func (h *Host) restedSince(id trivet.ReplicaID) time.Time {
	h.mu.Lock()
	defer h.mu.Unlock()
	if at, ok := h.rested[id]; ok {
		return at
	}
	return h.began
}

// ended takes a replica that was closed off the list. Whatever it has promised to a leader may hold for as long from
// now on.
func (h *Host) ended(s *ReplicaSpec) {
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.replicas, s.Volume)
	h.rested[s.Replica] = time.Now()
}

// Close stops all replicas and waits for them. Idempotent; the first error is returned.
func (h *Host) Close() error {
	h.mu.Lock()
	h.closed = true
	h.mu.Unlock()
	for { // operations under way may still add a replica
		h.mu.Lock()
		var wait chan struct{}
		for _, wait = range h.busy {
			break
		}
		h.mu.Unlock()
		if wait == nil {
			break
		}
		<-wait
	}
	h.mu.Lock()
	var all errgroup.Group
	for id, r := range h.replicas {
		all.Go(func() error {
			if err := r.close(); err != nil {
				return fmt.Errorf("close replica %s of %s: %w", r.spec.Replica, id, err)
			}
			return nil
		})
	}
	clear(h.replicas)
	h.mu.Unlock()
	err := all.Wait()
	h.reopening.Wait()
	return err
}

// exclusive waits for its turn on a volume and calls f.
func (h *Host) exclusive(ctx context.Context, id trivet.VolumeID, f func() error) error {
	for {
		h.mu.Lock()
		if h.closed {
			h.mu.Unlock()
			return fmt.Errorf("host: %w", trivet.ErrClosed)
		}
		wait, taken := h.busy[id]
		if !taken {
			break
		}
		h.mu.Unlock()
		select {
		case <-wait:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	turn := make(chan struct{})
	h.busy[id] = turn
	h.mu.Unlock()
	defer func() {
		h.mu.Lock()
		delete(h.busy, id)
		h.mu.Unlock()
		close(turn)
	}()
	return f()
}

// groupConfig returns the raftgroup configuration of a replica, without its machine.
func (h *Host) groupConfig(s *ReplicaSpec) raftgroup.Config {
	fs := s.Disk.fs()
	cfg := raftgroup.Config{
		Group:         s.Volume,
		Replica:       s.Replica,
		FS:            fs,
		Dir:           fs.PathJoin(s.Disk.Dir, "groups", s.Volume.String()),
		Log:           s.Disk.Log,
		Network:       h.cfg.Mux,
		PayloadAt:     payloadAt,
		Timing:        h.cfg.Timing,
		OverlapFlush:  h.cfg.OverlapFlush,
		SnapshotBytes: h.cfg.SnapshotBytes,
		Tight:         s.Disk.Engine.Tight,
		CatchUpLimit:  h.catchUp,
		Background:    s.Disk.background(),
		BootTime:      h.cfg.BootTime,
		Logger:        h.log.With("volume", s.Volume.String()),
		Fatal:         h.cfg.Fatal,
	}
	if ask := h.cfg.IsMember; ask != nil {
		cfg.IsMember = func(id trivet.ReplicaID, node trivet.NodeID) bool { return ask(s.Volume, id, node) }
	}
	return cfg
}

// Validate returns ErrInvalid naming a field that is not usable.
func (s *ReplicaSpec) Validate() error {
	switch {
	case s.Volume == trivet.MetaGroup:
		return fmt.Errorf("replica spec: Volume is not set: %w", trivet.ErrInvalid)
	case s.Replica == "":
		return fmt.Errorf("replica spec of %s: Replica is not set: %w", s.Volume, trivet.ErrInvalid)
	case s.Disk.Engine == nil || s.Disk.Log == nil || s.Disk.Dir == "":
		return fmt.Errorf("replica spec of %s: Disk has no engine, log or directory: %w", s.Volume, trivet.ErrInvalid)
	}
	return nil
}

func notFound(err error) bool { return errors.Is(err, trivet.ErrNotFound) }
