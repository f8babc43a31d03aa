package node

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/cache"
	"github.com/trivet-csi/trivet/controller/meta"
	"github.com/trivet-csi/trivet/internal/stage"
	"github.com/trivet-csi/trivet/iothrottle"
	"github.com/trivet-csi/trivet/node/blockdev"
	"github.com/trivet-csi/trivet/node/keeper"
	"github.com/trivet-csi/trivet/node/overlay"
	"github.com/trivet-csi/trivet/replication"
	"github.com/trivet-csi/trivet/replication/raftgroup"
	"github.com/trivet-csi/trivet/replication/transport"
)

// groupDevice is what the attacher needs of replication.Volume.
type groupDevice interface {
	trivet.Device
	Freeze(ctx context.Context, id trivet.SnapshotID) (replication.Frozen, error)
	SetSize(sizeBytes int64) error
	Close() error
}

// kernelDevice is what the attacher needs of blockdev.Attachment.
type kernelDevice interface {
	Path() string
	Err() error
	Grow(ctx context.Context) error
	Detach(ctx context.Context) error
	Survives() error
	Release(ctx context.Context) error
	Resent() (blockdev.Resent, bool)
}

// attacher opens volumes for I/O on this node and shows them as kernel devices. Its methods are
// REQUIRED to be called with the volume's keyLock held, except get, outdated and useNBD.
type attacher struct {
	node    trivet.NodeID
	process string // incarnation that the node registers
	runDir  string // of package blockdev
	kind    blockdev.Kind
	keeper  *keeper.Client // may be nil
	buffers *blockdev.Buffers
	follow  bool // leadership follows the attachment

	ioTimeout time.Duration
	shared    shared

	cat     Catalogue
	network transport.Network
	log     *slog.Logger

	// host of this node, whose leading replicas are called without a detour; may be nil.
	host *replication.Host
	// registered waits until the node is registered under process: before that the catalogue grants
	// it nothing.
	registered func(context.Context) error

	caches   *caches
	overlays *overlays

	openGroup func(replication.VolumeConfig) (groupDevice, error)
	show      func(context.Context, blockdev.Config) (kernelDevice, error)
	resume    func(context.Context, blockdev.Config) (kernelDevice, error)

	mu   sync.Mutex
	held map[trivet.VolumeID]*attached
	nbdN map[trivet.VolumeID]int // NBD servers on the volume
}

// attached is a volume that this process holds at an epoch. The open group outlives the kernel
// device: the group counts the writes of an epoch from one, so an epoch has exactly one
// groupDevice, from the first attach until the catalogue has passed on to the next epoch (H39).
//
// An attached never changes; a changed copy takes its place.
type attached struct {
	epoch  trivet.Epoch  // granted to this process: at which its session began (meta.Attachment.Session)
	lock   *cache.Locked // of the mapping file, until path has it; may be nil
	goesOn bool          // until path is open: the kernel device of an earlier process is to be resumed on it
	group  groupDevice   // nil while waiting for the fence
	path   *path         // the data path on top of group
	kernel kernelDevice  // nil while not shown

	overlay *overlay.Device // between kernel and path; nil: none. It comes and goes with kernel
}

func newAttacher(cfg *Config) *attacher {
	return &attacher{
		node: cfg.ID, process: cfg.Incarnation, runDir: cfg.blockdevDir(), kind: cfg.Attach, keeper: cfg.Keeper,
		buffers: new(blockdev.Buffers),
		follow:  cfg.FollowAttachment, ioTimeout: cfg.IOTimeout,
		shared: shared{scheduler: iothrottle.NewScheduler(), stages: cfg.Stages},
		cat:    cfg.Catalogue, network: cfg.Network, log: loggerOr(cfg.Logger),
		held: make(map[trivet.VolumeID]*attached), nbdN: make(map[trivet.VolumeID]int), caches: newCaches(cfg),
		overlays:  newOverlays(cfg),
		openGroup: func(c replication.VolumeConfig) (groupDevice, error) { return replication.OpenVolume(c) },
		show: func(ctx context.Context, c blockdev.Config) (kernelDevice, error) {
			return blockdev.Attach(ctx, c)
		},
		resume: func(ctx context.Context, c blockdev.Config) (kernelDevice, error) {
			return blockdev.Resume(ctx, c)
		},
	}
}

// get returns what this process holds of a volume.
func (a *attacher) get(id trivet.VolumeID) *attached {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.held[id]
}

// paths returns the data paths that are open.
func (a *attacher) paths() map[trivet.VolumeID]*path {
	a.mu.Lock()
	defer a.mu.Unlock()
	open := make(map[trivet.VolumeID]*path, len(a.held))
	for id, at := range a.held {
		if at.path != nil {
			open[id] = at.path
		}
	}
	return open
}

func (a *attacher) set(id trivet.VolumeID, at *attached) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if at == nil {
		delete(a.held, id)
		return
	}
	a.held[id] = at
}

// holding reads from the catalogue, linearizably, the volume that this node holds, as this node sees it
// (Volume.As). ErrNotFound for
// an unknown volume, ErrInUse when the node does not hold it.
func (a *attacher) holding(ctx context.Context, id trivet.VolumeID) (*meta.Volume, error) {
	st, err := a.cat.Read(ctx)
	if err != nil {
		return nil, fmt.Errorf("attach %s: %w", id, err)
	}
	v, ok := st.Volume(id)
	switch {
	case !ok:
		return nil, fmt.Errorf("attach %s: %w", id, trivet.ErrNotFound)
	case v.Attached == nil:
		return nil, fmt.Errorf("attach %s: no node holds it, node %s has to be granted it first: %w",
			id, a.node, trivet.ErrInUse)
	case v.GrantOf(a.node) == nil:
		return nil, fmt.Errorf("attach %s: node %s holds it, not %s: %w", id, v.Attached.Node, a.node, trivet.ErrInUse)
	}
	v = v.As(a.node)
	return &v, nil
}

// stale reports whether the session of what this process holds is not the current one (H13).
func (at *attached) stale(v *meta.Volume) bool { return at.epoch != v.Attached.Session() }

// dead returns why the kernel device is of no use any more, or nil (H31).
func (at *attached) dead() error {
	if at == nil || at.kernel == nil {
		return nil
	}
	return at.kernel.Err()
}

// open returns the volume with its data path open, at an epoch that belongs to this process alone.
// REQUIRES: v comes from holding, and what is held is not stale.
func (a *attacher) open(ctx context.Context, v *meta.Volume) (*attached, error) {
	at := a.get(v.ID)
	poisoned := a.poisoned(ctx, v.ID, at)
	if poisoned {
		a.log.Warn("opening a volume anew, for a write of its last use was lost", "volume", v.ID, "epoch", at.epoch)
		if err := a.drop(v.ID); err != nil {
			return nil, err
		}
		at = nil
	}
	if at == nil {
		lock, err := a.caches.lock(v) // before the epoch rises (H13)
		if err != nil {
			return nil, fmt.Errorf("attach %s: %w", v.ID, err)
		}
		epoch, err := a.takeOver(ctx, v.ID, poisoned)
		if err != nil {
			return nil, errors.Join(err, unlockCache(lock))
		}
		at = &attached{epoch: epoch, lock: lock}
		a.set(v.ID, at)
	}
	return a.openGranted(ctx, v.ID, at)
}

// openGranted opens the data path at an epoch that was granted, once everything older is fenced.
func (a *attacher) openGranted(ctx context.Context, id trivet.VolumeID, at *attached) (*attached, error) {
	if at.group != nil {
		return at, nil
	}
	v, err := a.awaitFence(ctx, id, at.epoch)
	if err != nil {
		return nil, err
	}
	a.bringLeader(ctx, v)
	return a.openPath(at, v)
}

func unlockCache(l *cache.Locked) error {
	if l == nil {
		return nil
	}
	return l.Close()
}

// poisoned reports whether a group that nothing uses at the moment has lost a write: its Flush then
// fails for the rest of the epoch (H14), and whoever uses the volume next deserves a new one.
func (a *attacher) poisoned(ctx context.Context, id trivet.VolumeID, at *attached) bool {
	if at == nil || at.group == nil || at.kernel != nil || a.usersNBD(id) > 0 {
		return false
	}
	return (at.group.Flush(ctx) != nil || at.path.cache.Lost() != nil) && ctx.Err() == nil
}

// takeOver returns an epoch of this process. The catalogue raises it unless it was granted to this
// process already, so an earlier process of this node is fenced (H31). renew raises it in any case.
func (a *attacher) takeOver(ctx context.Context, id trivet.VolumeID, renew bool) (trivet.Epoch, error) {
	if err := a.registered(ctx); err != nil {
		return 0, fmt.Errorf("attach %s: %w", id, err)
	}
	t := &meta.TakeOver{Volume: id, Node: a.node, Incarnation: a.process}
	if renew {
		t.Incarnation = "" // a late copy of this would fence us once more, which costs a retry
	}
	c := meta.Command{TakeOver: t}
	res, err := propose(ctx, a.cat, c)
	if err != nil {
		return 0, fmt.Errorf("attach %s: %w", id, err)
	}
	if res.Volume == nil || res.Volume.GrantOf(a.node) == nil {
		return 0, fmt.Errorf("attach %s: take over granted no epoch: %w", id, trivet.ErrUnavailable)
	}
	return res.Volume.GrantOf(a.node).Session(), nil
}

func (a *attacher) openPath(at *attached, v *meta.Volume) (*attached, error) {
	if err := checkSettings(v); err != nil {
		return nil, err
	}
	epoch := at.epoch
	find := func() []raftgroup.Member {
		now, _ := a.cat.Local().Volume(v.ID) // gone: nobody
		return mayLead(&now)
	}
	group, err := a.openGroup(replication.VolumeConfig{
		ID: v.ID, SizeBytes: v.SizeBytes, Epoch: v.Attached.Epoch, Writer: v.Attached.Writer, Renew: a.renewer(v, epoch),
		IOTimeout: a.ioTimeout, Members: mayLead(v), FindMembers: find,
		ReadConsistency: readsOf(v), Network: a.network, Host: a.host, Logger: a.log.With("volume", v.ID),
	})
	if err != nil {
		return nil, fmt.Errorf("attach %s: %w", v.ID, err)
	}
	stages := a.shared.stages.Open(v.ID)
	cached, err := a.caches.open(probeStage(group, stages, stage.Replication), v, at, cacheMeters(stages))
	if err != nil {
		stages.Close()
		return nil, errors.Join(err, group.Close())
	}
	path, err := stack(a.caches.follow(cached, v, epoch), v, &a.shared, stages)
	if err != nil {
		stages.Close()
		return nil, errors.Join(err, cached.Abandon(), group.Close())
	}
	at = &attached{epoch: epoch, group: group, path: path}
	a.set(v.ID, at)
	if now, ok := a.cat.Local().Volume(v.ID); ok { // it may have grown while nobody saw that it is open
		if _, err := at.take(now.SizeBytes); err != nil {
			a.log.Error("a volume keeps its old size here", "volume", v.ID, "err", err)
		}
	}
	return at, nil
}

// awaitFence waits until the volume's group has fenced everything older than epoch (H12).
func (a *attacher) awaitFence(ctx context.Context, id trivet.VolumeID, epoch trivet.Epoch) (*meta.Volume, error) {
	for {
		changed := a.cat.Changed()
		v, ok := a.cat.Local().Volume(id)
		switch {
		case ok && holdsSession(&v, a.node, epoch) && v.FencedEpoch == v.Epoch:
			v = v.As(a.node)
			return &v, nil
		case ok && v.Epoch > epoch && !holdsSession(&v, a.node, epoch):
			if err := a.drop(id); err != nil {
				return nil, err
			}
			return nil, fmt.Errorf("attach %s: epoch %d was overtaken by %d: %w", id, epoch, v.Epoch, trivet.ErrFenced)
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, fmt.Errorf("attach %s: the volume's group has not fenced epoch %d yet (has it a quorum?): %w: %w",
				id, epoch, ctx.Err(), trivet.ErrUnavailable)
		}
	}
}

// bringLeader asks for the group's leadership to come to this node's replica, if it has a ready one
// and the node is set to do so and is the only one to use the volume. Failing that costs a network hop for
// each I/O and nothing else.
func (a *attacher) bringLeader(ctx context.Context, v *meta.Volume) {
	r := v.ReplicaOn(a.node)
	if !a.follow || len(v.Also) > 0 || r == nil || r.State != meta.ReplicaReady ||
		v.Leader == r.ID || v.WantLeader == r.ID {
		return
	}
	c := meta.Command{WantLeader: &meta.WantLeader{Volume: v.ID, Replica: r.ID}}
	if _, err := propose(ctx, a.cat, c); err != nil {
		a.log.Warn("leadership does not follow the attachment", "volume", v.ID, "err", err)
	}
}

// showKernel makes the open volume a kernel block device and returns its path. Unless overlayFile is empty, what is
// written to the device goes there.
func (a *attacher) showKernel(ctx context.Context, id trivet.VolumeID, at *attached, overlayFile string,
) (string, error) {
	if at.kernel == nil {
		over, err := a.overlays.create(id, overlayFile, at.path)
		if err != nil {
			return "", fmt.Errorf("attach %s: %w", id, err)
		}
		at = &attached{epoch: at.epoch, group: at.group, path: at.path, overlay: over}
		k, err := a.show(ctx, a.kernelConfig(id, at))
		if err != nil {
			return "", fmt.Errorf("attach %s: %w", id, errors.Join(err, over.Remove()))
		}
		at = at.with(k)
		a.set(id, at)
		a.log.Info("volume attached", "volume", id, "epoch", at.epoch, "device", k.Path())
	}
	return at.kernel.Path(), nil
}

func (a *attacher) kernelConfig(id trivet.VolumeID, at *attached) blockdev.Config {
	return blockdev.Config{
		Name: id.String(), RunDir: a.runDir, Device: at.device(), Kind: a.kind, Keeper: a.keeper,
		Shared: at.path.shared, Buffers: a.buffers,
		Logger: a.log.With("volume", id),
	}
}

// resumeKernel goes on with the kernel device of an earlier process, and with its overlay, if it has one. REQUIRES:
// everything older than at's epoch is fenced (H13, H31), which holds for whoever has its data path.
func (a *attacher) resumeKernel(ctx context.Context, id trivet.VolumeID, at *attached, overlayFile string) error {
	over, err := a.overlays.open(id, overlayFile, at.path)
	if err != nil {
		return fmt.Errorf("resume %s: %w", id, err)
	}
	at = &attached{epoch: at.epoch, group: at.group, path: at.path, overlay: over}
	k, err := a.resume(ctx, a.kernelConfig(id, at))
	if err != nil {
		return fmt.Errorf("resume %s: %w", id, errors.Join(err, over.Close()))
	}
	a.set(id, at.with(k))
	a.log.Info("volume resumed: what uses it has seen a pause", "volume", id, "epoch", at.epoch, "device", k.Path())
	return nil
}

// release leaves the kernel device in place for the next process, if it survives this one. ErrUnavailable
// if not: then nothing has changed.
func (a *attacher) release(ctx context.Context, id trivet.VolumeID) error {
	at := a.get(id)
	if at == nil || at.kernel == nil {
		return fmt.Errorf("release %s: it is not attached: %w", id, trivet.ErrUnavailable)
	}
	if err := at.kernel.Survives(); err != nil {
		return err
	}
	if err := at.kernel.Release(ctx); err != nil {
		return err
	}
	if err := at.overlay.Close(); err != nil {
		a.log.Error("an overlay was not closed", "volume", id, "err", err)
	}
	a.set(id, at.with(nil))
	a.log.Info("volume left attached for the next process", "volume", id, "epoch", at.epoch)
	return nil
}

// hide removes the kernel device, flushing it. Not shown is success. ErrInUse while it is open or
// mounted. The group stays open.
func (a *attacher) hide(ctx context.Context, id trivet.VolumeID) error {
	at := a.get(id)
	if at == nil {
		return nil
	}
	if at.kernel == nil {
		a.drain(ctx, id, at)
		return nil
	}
	dead := at.dead()
	if err := at.detach(ctx); err != nil {
		return fmt.Errorf("detach %s: %w", id, err)
	}
	if err := at.overlay.Remove(); err != nil {
		a.log.Error("an overlay is left, and replaced by the next", "volume", id, "err", err)
	}
	a.set(id, at.with(nil))
	a.drain(ctx, id, at)
	if dead != nil {
		// umount and detach succeed on a dead device although they drop its dirty pages.
		a.log.Error("detached a dead device; writes that were not synced are lost", "volume", id, "err", dead)
	}
	a.log.Info("volume detached", "volume", id, "epoch", at.epoch)
	return nil
}

// drain has everything committed that was acknowledged, for the attachment may end now, and with it the right to
// write. The kernel has flushed; this is for whoever did not. A failure is no reason to stay attached: a device that
// has lost a write would never be let go.
func (a *attacher) drain(ctx context.Context, id trivet.VolumeID, at *attached) {
	if at == nil || at.path == nil {
		return
	}
	if err := at.path.drain(ctx); err != nil && !errors.Is(err, trivet.ErrClosed) {
		a.log.Error("writes that were acknowledged, and not flushed, are not committed yet", "volume", id, "err", err)
	}
}

// drop closes the group, for good as far as this epoch is concerned. REQUIRES: hidden.
func (a *attacher) drop(id trivet.VolumeID) error {
	at := a.get(id)
	if at == nil {
		return nil
	}
	a.set(id, nil)
	if at.group == nil {
		return unlockCache(at.lock)
	}
	at.path.cache.end()
	defer at.path.close() // when what was under way has ended
	if err := at.group.Close(); err != nil && !errors.Is(err, trivet.ErrClosed) {
		return fmt.Errorf("close %s at epoch %d: %w", id, at.epoch, err)
	}
	return nil
}

// outdated lists the volumes that are held at an epoch which the catalogue has left behind, and
// that nothing uses. Epochs only rise, so the local copy is good enough to tell.
func (a *attacher) outdated() []trivet.VolumeID {
	st := a.cat.Local()
	a.mu.Lock()
	defer a.mu.Unlock()
	var ids []trivet.VolumeID
	for id, at := range a.held {
		v, known := st.Volume(id)
		gone := !known && st.Used(id)
		// A reader may leave others behind at its epoch. Of a writer the epoch alone can tell: its group must
		// not be opened a second time at the same one (H39).
		left := v.Attached != nil && v.Attached.Mode == meta.MultiNodeReader && v.GrantOf(a.node) == nil
		over := v.Epoch > at.epoch && !holdsSession(&v, a.node, at.epoch)
		if (gone || left || over) && at.kernel == nil && a.nbdN[id] == 0 {
			ids = append(ids, id)
		}
	}
	return ids
}

func (a *attacher) usersNBD(id trivet.VolumeID) int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.nbdN[id]
}

// useNBD counts an NBD server on the volume in (1) or out (-1).
func (a *attacher) useNBD(id trivet.VolumeID, n int) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.nbdN[id] += n; a.nbdN[id] == 0 {
		delete(a.nbdN, id)
	}
}
