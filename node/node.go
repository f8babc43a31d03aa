// Package node is what one machine does: it keeps the disks given to Trivet, runs the replicas that
// the catalogue wants there, and gives volumes to the programs on the machine as mounted
// filesystems, block devices or NBD sockets.
//
//	disk.go, superblock.go      a disk is a directory that knows whose it is, and is no copy
//	agent.go, plan.go,          the machine is made to match the catalogue: plan says what is to be
//	reconcile.go, members.go    done (pure), one worker a volume does it
//	attach.go, stack.go         the data path of a volume, opened at an epoch of this process alone
//	stage.go, publish.go,       what the CSI driver asks for: attach, format, mount, bind
//	mounter.go, record.go
//
// What it guarantees: no two processes use one disk (I9); a replica whose data is gone is never made
// anew under its ID (H10); nothing on a disk is removed unless the catalogue says, read
// linearizably, that its volume was deleted, or that the replica left its group or is replaced (H35);
// a device is only shown once everything older than its epoch is fenced (H12); a volume is never
// formatted unless it could be read and was blank (H31).
//
// What it leaves to its caller: opening the disks (FormatDisk, OpenDisk) before Open and closing them
// after Close; running the catalogue; stopping the process when Fatal is called.
//
// # Stop and crash
//
// A kernel device that survives its process (see blockdev, and Config.Keeper) stays in place, with its
// mounts, when the process stops or crashes, and the next one resumes it (resume.go): programs see a
// pause. Until then calls for the volume get ErrPending.
//
// A device that does not survive dies with the process. Close then unmounts what it can and detaches;
// what is in use it unmounts lazily, after writing back, and says so in the log. Programs that still
// hold files open get I/O errors. After a crash, Open removes what the dead process left behind. In
// both cases an empty read-only filesystem stays at each published path until it is unpublished, so
// that a container which is started again cannot write to the machine's own disk by mistake. The
// kubelet stages and publishes anew for new pods.
package node

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/cache"
	"github.com/trivet-csi/trivet/controller/meta"
	"github.com/trivet-csi/trivet/internal/stage"
	"github.com/trivet-csi/trivet/node/blockdev"
	"github.com/trivet-csi/trivet/node/keeper"
	"github.com/trivet-csi/trivet/replication"
	"github.com/trivet-csi/trivet/replication/raftgroup"
	"github.com/trivet-csi/trivet/replication/transport"
)

// parkAfterDefault is longer than a pod takes to move to another node.
const parkAfterDefault = 30 * time.Second

// closeTimeout bounds the unmounting and detaching of one volume in Close.
const closeTimeout = 20 * time.Second

// Config says what a Node is and works with.
type Config struct {
	ID          trivet.NodeID
	Address     string           // host:port at which other nodes reach this one
	Zone        string           // may be empty
	Rack        string           // within its zone; may be empty
	MetaReplica trivet.ReplicaID // this node's member of the catalogue; empty = none
	Incarnation string           // UUID drawn at this start of the process

	Disks  []*Disk // opened by, and closed by, the caller
	RunDir string  // absolute, below /run: does not outlive the boot; one Node has it

	Cluster    trivet.ClusterID // goes into the mapping files of caches
	CacheDir   string           // absolute, on a tmpfs: mapping files of caches; "" = no volume is writeBack here
	CacheBytes int64            // of the caches of all volumes together

	// ReplayBytes bounds the overlays of all volumes together that are attached here to be read, into which their journals
	// are replayed; 0 = ReplayBytesDefault, else at least ReplayBytesMin. They are files in CacheDir, or RunDir if there
	// is none.
	ReplayBytes int64

	Catalogue Catalogue
	Network   transport.Network // one Node a Network
	Mux       *raftgroup.Mux
	Timing    raftgroup.Timing // the zero value means the defaults
	IOTimeout time.Duration    // how long I/O waits for a leader before it fails; 0 = 60 s

	// Stages is where the attachments and the replicas of this node are measured; nil = not at all.
	Stages *stage.Registry

	// OverlapFlush is that of replication.HostConfig.
	OverlapFlush bool
	// CatchUpBytesPerSecond is that of replication.HostConfig; 0 = no limit.
	CatchUpBytesPerSecond int64

	// ParkAfter is how long the replica of a detached volume runs on before it is stopped, to be started
	// again when the volume is attached; negative = never stopped (DefaultConfig: 30 s).
	ParkAfter time.Duration

	// Lease is how long this node counts as alive after it has last been heard of; 0 = 6 s. It is for tests that must not
	// fail when the machine stands still for a while.
	Lease time.Duration

	// ScrubEvery is how often all that a volume's replicas hold is read and compared, in use or not; negative = only when
	// somebody asks for it (DefaultConfig: 7 days).
	ScrubEvery time.Duration

	MaxVolumes       int64 // volumes attached here at a time, as told to Kubernetes; 0 = what the machine can (limit.go)
	FollowAttachment bool  // Attach brings leadership to the local replica (DefaultConfig: true)

	// Attach is the kind of kernel devices; zero = blockdev.KindAuto.
	Attach blockdev.Kind
	// Keeper holds kernel devices while no process serves them; closed by the caller after Close. Nil: a
	// device of KindFUSE ends with this process.
	Keeper *keeper.Client
	// DetachOnStop makes Close take every volume off the machine, although its device would survive.
	DetachOnStop bool

	Mounter Mounter      // nil = NewMounter()
	Logger  *slog.Logger // nil discards
	// Fatal is called when the process must stop: damage, a failing disk, or another process that
	// runs as this node. It may be called from any goroutine and more than once.
	Fatal func(error)
}

// DefaultConfig returns the configuration to start from.
func DefaultConfig() Config {
	return Config{FollowAttachment: true, ParkAfter: parkAfterDefault, ScrubEvery: scrubEveryDefault}
}

// Validate names the field that is missing or malformed.
func (c *Config) Validate() error {
	if err := trivet.ValidateNodeID(string(c.ID)); err != nil {
		return fmt.Errorf("node config: ID: %w", err)
	}
	if err := trivet.ValidateUUID(c.Incarnation); err != nil {
		return fmt.Errorf("node config: Incarnation: %w", err)
	}
	missing := ""
	switch {
	case c.Address == "":
		missing = "Address"
	case !filepath.IsAbs(c.RunDir):
		missing = "RunDir (absolute)"
	case c.CacheDir != "" && !filepath.IsAbs(c.CacheDir):
		missing = "CacheDir (absolute)"
	case c.Catalogue == nil:
		missing = "Catalogue"
	case c.Network == nil:
		missing = "Network"
	case c.Mux == nil:
		missing = "Mux"
	case c.Fatal == nil:
		missing = "Fatal"
	case c.ReplayBytes != 0 && c.ReplayBytes < ReplayBytesMin:
		missing = fmt.Sprintf("ReplayBytes (%d or more)", ReplayBytesMin)
	case c.MaxVolumes < 0:
		missing = "MaxVolumes (not negative)"
	}
	if missing != "" {
		return fmt.Errorf("node config: %s is not set: %w", missing, trivet.ErrInvalid)
	}
	return nil
}

func (c *Config) blockdevDir() string { return filepath.Join(c.RunDir, "blockdev") }

// Node is one machine of the cluster. It is safe for concurrent use.
type Node struct {
	cfg    Config
	log    *slog.Logger
	lock   *os.File // of RunDir
	host   *replication.Host
	agent  *Agent
	mounts *mounts

	left []leftover // what the last process left to be resumed

	stop  context.CancelFunc // of the sweeper and of what resumes
	group *errgroup.Group

	closeOnce sync.Once
	closeErr  error
}

// Open cleans up after an earlier process, and starts the replicas and the agent. ErrInUse: another
// process has RunDir. ctx bounds the clean-up alone.
func Open(ctx context.Context, cfg Config) (*Node, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	n, err := open(ctx, cfg)
	if err != nil {
		return nil, fmt.Errorf("open node %s: %w", cfg.ID, err)
	}
	return n, nil
}

func open(ctx context.Context, cfg Config) (*Node, error) {
	n := &Node{cfg: cfg, log: loggerOr(cfg.Logger)}
	if err := n.openMounts(ctx); err != nil {
		return nil, errors.Join(err, n.unlock())
	}
	for _, d := range cfg.Disks {
		d.share.connect(cfg.Catalogue, cfg.Stages)
	}
	host, err := replication.NewHost(replication.HostConfig{
		Network: cfg.Network, Mux: cfg.Mux, Timing: cfg.Timing, Authorize: Authorizer(cfg.Catalogue),
		OverlapFlush: cfg.OverlapFlush, CatchUpBytesPerSecond: cfg.CatchUpBytesPerSecond,
		IsMember: memberChecker(cfg.Catalogue), Stages: cfg.Stages, RoomElsewhere: roomElsewhere(cfg.Catalogue),
		ScrubTurn: n.scrubTurn, Disks: n.disks(),
		Logger: cfg.Logger, Fatal: cfg.Fatal,
	})
	if err != nil {
		return nil, errors.Join(err, n.unlock())
	}
	n.host, n.mounts.attacher.host = host, host
	n.mounts.serveGroups(cfg.Network)
	agentCfg, err := n.agentConfig()
	if err != nil {
		return nil, errors.Join(err, host.Close(), n.unlock())
	}
	n.agent = openAgent(agentCfg, cfg.Catalogue, realHost{host})
	n.mounts.attacher.registered = n.agent.awaitRegistered
	//nolint:forbidigo // the node's own lifetime, ended by Close
	life, cancel := context.WithCancel(context.Background())
	n.stop, n.group = cancel, new(errgroup.Group)
	n.group.Go(func() error { n.sweep(life); return nil })
	n.group.Go(func() error { n.mounts.freezeHeld(life); return nil })
	n.group.Go(func() error { n.mounts.makeGroups(life); return nil })
	n.group.Go(func() error { n.mounts.growKernels(life); return nil })
	n.group.Go(func() error { n.watchUsage(life); return nil })
	for _, l := range n.left {
		n.group.Go(func() error { n.mounts.resume(life, l); return nil })
	}
	n.group.Go(func() error { n.mounts.recoverCaches(life); return nil })
	return n, nil
}

// openMounts takes the run directory and removes what an earlier process left in it.
func (n *Node) openMounts(ctx context.Context) error {
	if err := os.MkdirAll(n.cfg.RunDir, 0o700); err != nil {
		return err
	}
	lock, err := lockDisk(n.cfg.RunDir)
	if err != nil {
		return err
	}
	n.lock = lock
	boot, err := bootID()
	if err != nil {
		return err
	}
	recs, err := openRecords(filepath.Join(n.cfg.RunDir, "volumes"), boot)
	if err != nil {
		return err
	}
	mounter := n.cfg.Mounter
	if mounter == nil {
		mounter = NewMounter()
	}
	n.mounts = &mounts{
		attacher: newAttacher(&n.cfg), mounter: mounter, records: recs, log: n.log, detachOnStop: n.cfg.DetachOnStop,
		growing: newVolumeSet(),
	}
	n.left, err = n.mounts.takeStock(ctx, blockdev.Leftovers{
		RunDir: n.cfg.blockdevDir(), Keeper: n.cfg.Keeper, Logger: n.log,
	})
	return err
}

func (n *Node) agentConfig() (agentConfig, error) {
	c := agentConfig{
		ID: n.cfg.ID, Usage: n.usage, Verify: n.verify, Logger: n.cfg.Logger, Fatal: n.cfg.Fatal,
		ParkAfter: n.cfg.ParkAfter, Lease: n.cfg.Lease, ScrubEvery: max(n.cfg.ScrubEvery, 0),
		Self: meta.Node{
			ID: n.cfg.ID, Address: n.cfg.Address, Zone: n.cfg.Zone, Rack: n.cfg.Rack, MetaReplica: n.cfg.MetaReplica,
			Incarnation: n.cfg.Incarnation,
		},
		Disks:  make(map[trivet.DiskID]replication.Disk, len(n.cfg.Disks)),
		OnDisk: make(map[trivet.VolumeID][]placed),

		Damages: make(map[trivet.DiskID]*damages, len(n.cfg.Disks)),
	}
	for _, d := range n.cfg.Disks {
		c.Disks[d.ID()] = d.Replication()
		c.Damages[d.ID()] = &d.damage
		found, err := d.replicas()
		if err != nil {
			return c, err
		}
		for id, replica := range found {
			c.OnDisk[id] = append(c.OnDisk[id], placed{d.ID(), replica})
		}
	}
	return c, nil
}

func (n *Node) disks() []replication.Disk {
	out := make([]replication.Disk, len(n.cfg.Disks))
	for i, d := range n.cfg.Disks {
		out[i] = d.Replication()
	}
	return out
}

func (n *Node) usage() ([]meta.Disk, error) {
	disks := make([]meta.Disk, 0, len(n.cfg.Disks))
	for _, d := range n.cfg.Disks {
		u, err := d.Usage()
		if err != nil {
			return nil, err
		}
		disks = append(disks, u)
	}
	return disks, nil
}

func (n *Node) verify() error {
	for _, d := range n.cfg.Disks {
		if err := d.Verify(); err != nil {
			return err
		}
	}
	return nil
}

// sweep makes data paths follow the catalogue, and closes those of attachments that are over.
func (n *Node) sweep(ctx context.Context) {
	for {
		changed := n.cfg.Catalogue.Changed()
		n.mounts.follow()
		for _, d := range n.cfg.Disks {
			d.share.follow()
		}
		n.mounts.followSizes()
		n.mounts.sweep()
		select {
		case <-ctx.Done():
			return
		case <-changed:
		case <-n.mounts.attacher.caches.poke:
		}
	}
}

// Close unmounts and detaches every volume (see the package comment), stops the agent and then the
// replicas. Idempotent; returns the first error.
func (n *Node) Close() error {
	n.closeOnce.Do(func() {
		n.stop()
		_ = n.group.Wait() // returns nil
		n.mounts.holds.close()
		//nolint:forbidigo // Close has no context; each volume has a time limit of its own
		errs := []error{n.mounts.close(context.Background())}
		n.mounts.attacher.caches.tidy()
		n.agent.close()
		errs = append(errs, n.host.Close(), n.unlock())
		n.closeErr = errors.Join(errs...)
	})
	return n.closeErr
}

func (n *Node) unlock() error {
	if n.lock == nil {
		return nil
	}
	return unlockDisk(n.lock)
}

// Attach opens the volume and shows it as a kernel block device, whose path it returns. The same
// again returns the same path. Errors are those of Stage.
func (n *Node) Attach(ctx context.Context, id trivet.VolumeID) (string, error) {
	return n.mounts.attach(ctx, id)
}

// Detach undoes Attach. Not attached is success. ErrInUse while it is staged, open or mounted.
func (n *Node) Detach(ctx context.Context, id trivet.VolumeID) error { return n.mounts.detach(ctx, id) }

// Device returns the path of the kernel block device of a volume that is attached here, or "".
func (n *Node) Device(id trivet.VolumeID) string {
	if at := n.mounts.attacher.get(id); at != nil && at.kernel != nil {
		return at.kernel.Path()
	}
	return ""
}

// CacheStats returns the figures of the cache of a volume whose data path is open here; false if it is not.
func (n *Node) CacheStats(id trivet.VolumeID) (cache.Stats, bool) {
	at := n.mounts.attacher.get(id)
	if at == nil || at.path == nil {
		return cache.Stats{}, false
	}
	return at.path.cache.Stats(), true
}
