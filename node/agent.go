package node

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller/meta"
	"github.com/trivet-csi/trivet/replication"
)

const (
	renewEvery = 2 * time.Second
	leaseLen   = 6 * time.Second // a node that misses three renewals counts as down
)

// errNotOurs says that a disk's directory is not the disk any more that was opened.
var errNotOurs = errors.New("disk was replaced")

// agentConfig is what an Agent works with.
type agentConfig struct {
	ID     trivet.NodeID
	Self   meta.Node // address, zone, meta replica and incarnation to register
	Usage  func() ([]meta.Disk, error)
	Verify func() error // that the disks are still ours
	Disks  map[trivet.DiskID]replication.Disk
	OnDisk map[trivet.VolumeID][]placed // what the disks held at the start
	// Damages are what the engines of the disks say of them.
	Damages map[trivet.DiskID]*damages
	// ParkAfter is how long a replica of a volume that nobody needs runs on; negative = for good.
	ParkAfter time.Duration
	Lease     time.Duration // 0 = leaseLen
	// ScrubEvery is how often each volume is scrubbed; 0 = never.
	ScrubEvery time.Duration
	Logger     *slog.Logger
	Fatal      func(error)
}

// Agent makes one machine match the catalogue: it makes, starts, and removes replicas, and where one
// leads, fences, wipes and moves its group. It registers the node and keeps its lease.
//
// It is level-triggered: it acts on what is, not on what happened, so a missed wake-up or a crash
// costs a retry and nothing else. Each volume has a worker of its own, so one that is stuck holds up
// no other.
type Agent struct {
	cfg     agentConfig
	cat     Catalogue
	host    replicaHost
	diskSet map[trivet.DiskID]bool
	log     *slog.Logger

	registered chan struct{} // closed by keepLease at the first registration

	stop  context.CancelFunc
	group *errgroup.Group

	mu      sync.Mutex
	workers map[trivet.VolumeID]*worker
	orphans map[trivet.VolumeID][]placed      // found at the start, not yet given to a worker
	fills   map[trivet.VolumeID]trivet.NodeID // volumes of which a new replica is filled from here, and where

	damageSeen map[trivet.DiskID]int       // how much of Damages was looked at
	damaged    map[trivet.ReplicaID]string // replicas that it touches, and why they are out of service
	hurt       chan struct{}               // capacity 1: Damages has news

	scrubbing map[trivet.VolumeID]bool // passes that are carried out from here
}

// openAgent starts an agent.
func openAgent(cfg agentConfig, cat Catalogue, host replicaHost) *Agent {
	//nolint:forbidigo // the agent's own lifetime, ended by close
	ctx, cancel := context.WithCancel(context.Background())
	group, ctx := errgroup.WithContext(ctx)
	a := &Agent{
		cfg: cfg, cat: cat, host: host, diskSet: make(map[trivet.DiskID]bool, len(cfg.Disks)),
		log: loggerOr(cfg.Logger), registered: make(chan struct{}), stop: cancel, group: group,
		workers: make(map[trivet.VolumeID]*worker), orphans: maps.Clone(cfg.OnDisk),
		fills: make(map[trivet.VolumeID]trivet.NodeID), damageSeen: make(map[trivet.DiskID]int),
		damaged: make(map[trivet.ReplicaID]string), hurt: make(chan struct{}, 1),
		scrubbing: make(map[trivet.VolumeID]bool),
	}
	for _, d := range cfg.Damages {
		d.watch(func() {
			select {
			case a.hurt <- struct{}{}:
			default: // it is going to look anyway
			}
		})
	}
	for id := range cfg.Disks {
		a.diskSet[id] = true
	}
	group.Go(func() error { return a.keepLease(ctx) })
	group.Go(func() error { return a.dispatch(ctx) })
	group.Go(func() error { return a.watchScrubs(ctx) })
	return a
}

// close stops all work and waits for it. Replicas keep running: they are the host's.
func (a *Agent) close() {
	a.stop()
	_ = a.group.Wait() // the loops return nil or their context's error
}

// awaitRegistered waits until the node is registered under this process's incarnation.
func (a *Agent) awaitRegistered(ctx context.Context) error {
	select {
	case <-a.registered:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("node %s is not registered yet: %w: %w", a.cfg.ID, ctx.Err(), trivet.ErrUnavailable)
	}
}

// dispatch gives every volume of this node a worker and wakes those whose volume has changed.
func (a *Agent) dispatch(ctx context.Context) error {
	for {
		changed := a.cat.Changed()
		start := time.Now()
		a.noteDamage()
		a.wake(ctx)
		// Looking takes time in proportion to the number of volumes in the cluster; rest four times as
		// long, so that it never takes more than a fifth of a core, however often the catalogue changes.
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(4 * time.Since(start)):
		}
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
		case <-a.hurt:
		}
	}
}

func (a *Agent) wake(ctx context.Context) {
	st := a.cat.Local()
	a.mu.Lock()
	defer a.mu.Unlock()
	for id := range a.orphans {
		a.ensureLocked(ctx, id)
	}
	for _, v := range st.Volumes() {
		if concerns(a.cfg.ID, a.diskSet, &v) {
			a.ensureLocked(ctx, v.ID)
		}
		if w := a.workers[v.ID]; w != nil && (w.seen != v.Revision || w.scrubs != v.Scrubbing()) {
			w.seen, w.scrubs = v.Revision, v.Scrubbing()
			w.poke()
		}
	}
	for id, w := range a.workers {
		if _, known := st.Volume(id); !known && w.seen != 0 {
			w.seen = 0
			w.poke()
		}
	}
}

func (a *Agent) ensureLocked(ctx context.Context, id trivet.VolumeID) {
	if a.workers[id] != nil {
		return
	}
	w := &worker{
		agent: a, volume: id, poked: make(chan struct{}, 1), log: a.log.With("volume", id),
		onDisk: a.orphans[id], ignored: make(map[placed]bool), lost: make(map[placed]bool),
	}
	delete(a.orphans, id)
	a.workers[id] = w
	a.group.Go(func() error {
		for w.run(ctx); !a.retire(ctx, w); w.run(ctx) {
			continue
		}
		return nil
	})
}

// retire forgets a worker that found nothing to do, unless it was poked since it looked.
func (a *Agent) retire(ctx context.Context, w *worker) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	select {
	case <-w.poked:
		if ctx.Err() == nil {
			return false
		}
	default:
	}
	delete(a.workers, w.volume)
	return true
}

// keepLease registers the node and renews its lease until ctx ends. A refusal because another
// process runs as this node, or a disk that is not ours any more, is fatal: two processes must never
// serve the same replicas (I9).
func (a *Agent) keepLease(ctx context.Context) error {
	registered := false
	retry := retryMin
	for {
		err := a.renew(ctx, &registered)
		wait := renewEvery
		switch {
		case ctx.Err() != nil:
			return nil //nolint:nilerr // the end of the agent is not a failure
		case err == nil:
			retry = retryMin
		case errors.Is(err, trivet.ErrFenced) || errors.Is(err, trivet.ErrInUse) || errors.Is(err, errNotOurs):
			a.cfg.Fatal(fmt.Errorf("node %s: %w", a.cfg.ID, err))
			return nil
		default:
			wait = min(retry, renewEvery)
			retry *= 2
			if errors.Is(err, trivet.ErrNotFound) {
				registered = false
			}
			a.log.Warn("node lease not renewed", "err", err)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(wait):
		}
	}
}

func (a *Agent) renew(ctx context.Context, registered *bool) error {
	if err := a.cfg.Verify(); errors.Is(err, trivet.ErrInvalid) {
		return fmt.Errorf("%w: %w", errNotOurs, err)
	} else if err != nil {
		return err
	}
	disks, err := a.cfg.Usage()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, leaseLen)
	defer cancel()
	until := time.Now().Add(cmp.Or(a.cfg.Lease, leaseLen))
	if *registered && a.standsWhereItSays() {
		_, err := propose(ctx, a.cat, meta.Command{RenewLease: &meta.RenewLease{
			Node: a.cfg.ID, Incarnation: a.cfg.Self.Incarnation, Until: until, Disks: disks, Fills: a.fillsHere(),
		}})
		return err
	}
	self := a.cfg.Self
	self.ID, self.LeaseUntil, self.Disks = a.cfg.ID, until, disks
	if _, err := propose(ctx, a.cat, meta.Command{RegisterNode: &meta.RegisterNode{Node: self}}); err != nil {
		return err
	}
	*registered = true
	select {
	case <-a.registered: // again, after the catalogue had forgotten the node
	default:
		close(a.registered)
	}
	a.log.Info("node registered", "incarnation", self.Incarnation)
	return nil
}

// standsWhereItSays reports whether the catalogue has the node's own zone and rack, unless somebody else says them:
// one that may say them itself again registers again.
func (a *Agent) standsWhereItSays() bool {
	n, ok := a.cat.Local().Node(a.cfg.ID)
	return !ok || (n.ZoneSet || n.Zone == a.cfg.Self.Zone) && (n.RackSet || n.Rack == a.cfg.Self.Rack)
}
