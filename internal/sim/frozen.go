package sim

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/engine"
	"github.com/trivet-csi/trivet/replication"
)

const (
	frozenMax      = 5 // snapshots at a time; more would leave none to be deleted
	frozenPatience = 8 * time.Second
	cloneBase      = volumeID + 1 // a clone of the i-th snapshot has this ID and i more
	frozenReadMaxN = 48
)

// frozen is a snapshot, and what may be in it. Each block shows a version that was there at one moment between the ask
// and the answer. Which one, nobody knows before it is read; from then on it is that one, on every replica, for ever.
type frozen struct {
	id          trivet.SnapshotID
	floor, ceil []version // of each block
	stamps      []version // that a read has found; unread: nobody has
	dropped     bool      // its deletion was asked for
	busy        bool      // it must stay: a rollback looks at it
}

const unread = version(-1)

// album is all snapshots that were acknowledged and not deleted. It is safe for concurrent use.
type album struct {
	o *oracle

	mu   sync.Mutex
	next trivet.SnapshotID
	kept []*frozen
}

// freeze begins a snapshot: whatever is acknowledged by now is in it.
func (a *album) freeze() *frozen {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.next++
	n := len(a.o.blocks)
	f := &frozen{id: a.next, floor: a.o.floors(0, n), stamps: make([]version, n)}
	for i := range f.stamps {
		f.stamps[i] = unread
	}
	return f
}

// add takes note of a snapshot that was acknowledged: nothing that is issued later is in it.
func (a *album) add(f *frozen) {
	a.o.mu.Lock()
	for i := range a.o.blocks {
		f.ceil = append(f.ceil, version(len(a.o.blocks[i].writes)))
	}
	a.o.mu.Unlock()
	a.mu.Lock()
	defer a.mu.Unlock()
	a.kept = append(a.kept, f)
}

// drop takes a snapshot from the album, for its deletion; false when something looks at it.
func (a *album) drop(f *frozen) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	if f.busy || f.dropped {
		return false
	}
	f.dropped = true
	a.kept = slices.DeleteFunc(a.kept, func(x *frozen) bool { return x == f })
	return true
}

// hold has a snapshot stay until it is released; false when it is about to go.
func (a *album) hold(f *frozen) (release func(), ok bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if f.dropped || f.busy {
		return nil, false
	}
	f.busy = true
	return func() {
		a.mu.Lock()
		defer a.mu.Unlock()
		f.busy = false
	}, true
}

// pick returns a snapshot, nil when there is none, and how many there are.
func (a *album) pick(rnd *rand.Rand) (*frozen, int) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(a.kept) == 0 {
		return nil, 0
	}
	return a.kept[rnd.IntN(len(a.kept))], len(a.kept)
}

func (a *album) all() []*frozen {
	a.mu.Lock()
	defer a.mu.Unlock()
	return slices.Clone(a.kept)
}

// check judges blocks of a snapshot, or of a clone of it, that were read.
func (a *album) check(f *frozen, lba trivet.LBA, p []byte) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.o.mu.Lock()
	defer a.o.mu.Unlock()
	for i := range len(p) / trivet.BlockSize {
		at := lba + trivet.LBA(i)
		h, b := &a.o.blocks[at], p[i*trivet.BlockSize:(i+1)*trivet.BlockSize]
		if _, err := h.findUpTo(b, at, f.floor[at], f.ceil[at]); err != nil {
			return fmt.Errorf("snapshot %d: %w", f.id, err)
		}
		stamp, err := h.stampOf(b, at)
		if err != nil {
			return err
		}
		if f.stamps[at] != unread && f.stamps[at] != stamp {
			return fmt.Errorf("snapshot %d: block %d holds version %d, and held %d before", f.id, at, stamp, f.stamps[at])
		}
		f.stamps[at] = stamp
	}
	return nil
}

// known returns what each block of a snapshot shows, once all of them were read.
func (a *album) known(f *frozen) ([]version, bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return slices.Clone(f.stamps), !slices.Contains(f.stamps, unread)
}

// snapshot is what one user of snapshots does: it makes, reads, compares or deletes one. That it fails while faults
// last is no surprise; what it is told must be right.
func (s *sim) snapshot(ctx context.Context, rnd *rand.Rand) {
	ctx, cancel := context.WithTimeout(ctx, frozenPatience)
	defer cancel()
	f, n := s.album.pick(rnd)
	switch k := rnd.IntN(100); {
	case n == 0 || k < 35 && n < frozenMax:
		s.freeze(ctx)
	case k < 70:
		n := 1 + rnd.IntN(min(frozenReadMaxN, s.opts.BlockN))
		lba := trivet.LBA(rnd.IntN(s.opts.BlockN - n + 1))
		s.readFrozen(ctx, f, s.someMember(rnd), lba, n)
	case k < 80:
		if g, _ := s.album.pick(rnd); f.id != g.id {
			s.delta(ctx, f, g, s.someMember(rnd))
		}
	default:
		s.dropFrozen(ctx, f)
	}
}

// someMember returns a machine with a replica.
func (s *sim) someMember(rnd *rand.Rand) trivet.NodeID {
	members := s.cluster.Members()
	return members[rnd.IntN(len(members))].Node
}

// freeze has the holder make a snapshot. One without an answer may be there or not, and is left.
func (s *sim) freeze(ctx context.Context) {
	seat, f := s.holder(), s.album.freeze()
	if _, err := seat.volume.Freeze(ctx, f.id); err != nil || !seat.alive() {
		s.snapError("freeze", err)
		return
	}
	s.album.add(f)
	s.count(func(r *Report) { r.Snapshots++ })
}

func (s *sim) dropFrozen(ctx context.Context, f *frozen) {
	if !s.album.drop(f) {
		return
	}
	err := s.cluster.lead(ctx, func(r *replication.Replica) error { return r.DropSnapshot(ctx, f.id) })
	s.snapError("drop", err)
}

// readFrozen reads blocks of a snapshot from one machine, and reports whether it got them.
func (s *sim) readFrozen(ctx context.Context, f *frozen, node trivet.NodeID, lba trivet.LBA, n int) bool {
	p := make([]byte, n*trivet.BlockSize)
	if err := s.snapshots(node).ReadAt(ctx, f.id, p, lba); err != nil {
		s.snapError("read", err)
		return false
	}
	if err := s.album.check(f, lba, p); err != nil {
		s.violate(fmt.Errorf("%s: %w", node, err))
	}
	s.count(func(r *Report) { r.SnapReads++ })
	return true
}

func (s *sim) snapshots(node trivet.NodeID) *replication.SnapshotReader {
	return &replication.SnapshotReader{
		Volume: volumeID, Network: s.cluster.client, Nodes: []trivet.NodeID{node},
	}
}

// delta lists what differs between two snapshots: no block that is known to may be left out.
func (s *sim) delta(ctx context.Context, from, to *frozen, node trivet.NodeID) {
	differ := map[trivet.LBA]bool{}
	a, _ := s.album.known(from)
	b, _ := s.album.known(to)
	for i := range a {
		if a[i] != unread && b[i] != unread && a[i] != b[i] {
			differ[trivet.LBA(i)] = true
		}
	}
	for at, end := trivet.LBA(0), trivet.LBA(s.opts.BlockN); at < end; {
		xs, next, err := s.snapshots(node).Delta(ctx, from.id, to.id, at, int64(end-at))
		if err != nil {
			s.snapError("delta", err)
			return
		}
		for _, x := range xs {
			for i := range x.BlockN {
				delete(differ, x.LBA+trivet.LBA(i))
			}
		}
		at = next
	}
	if len(differ) > 0 {
		s.violate(fmt.Errorf("%s: blocks %v differ between snapshots %d and %d, and were not listed", node, differ, from.id,
			to.id))
	}
}

// snapError reports an error that no fault explains.
func (s *sim) snapError(what string, err error) {
	switch {
	case err == nil, errors.Is(err, trivet.ErrUnavailable), errors.Is(err, trivet.ErrFenced),
		errors.Is(err, trivet.ErrClosed), errors.Is(err, trivet.ErrNotLeader), errors.Is(err, context.Canceled),
		errors.Is(err, context.DeadlineExceeded),
		errors.Is(err, trivet.ErrNotFound), // that machine has not got so far, or is past the deletion
		errors.Is(err, trivet.ErrNoSpace) && s.full.Load(),
		errors.Is(err, trivet.ErrCorrupt) && (s.rotten.Load() || s.noisy.Load() || s.flipped.Load()):
		return
	}
	s.violate(fmt.Errorf("unexpected answer: %s snapshot: %w", what, err))
}

// inspectFrozen reads all snapshots behind Raft's back: a replica has them all, and shows in them what it must.
func (s *sim) inspectFrozen(when string, n *Node, vol *engine.Volume) error {
	p := make([]byte, s.opts.BlockN*trivet.BlockSize)
	st := vol.State()
	for _, f := range s.album.all() {
		i := slices.IndexFunc(st.Snapshots, func(x engine.Snapshot) bool { return x.ID == uint64(f.id) })
		if i < 0 {
			s.violate(fmt.Errorf("%s: replica on %s has no snapshot %d", when, n.ID(), f.id))
			continue
		}
		if err := vol.ReadAtGeneration(p, 0, st.Snapshots[i].Generation); err != nil {
			return fmt.Errorf("%s: snapshot %d on %s: %w", when, f.id, n.ID(), err)
		}
		if err := s.album.check(f, 0, p); err != nil {
			s.violate(fmt.Errorf("%s: replica on %s: %w", when, n.ID(), err))
		}
		s.count(func(r *Report) { r.SnapReads++ })
	}
	return nil
}

// rollback has the volume show a snapshot again: between two attachments, in an epoch of its own, as the controller
// does. To the users it is a change of all blocks at once.
func (n *nemesis) rollback(ctx context.Context) (made bool, err error) {
	s := n.sim
	f, _ := s.album.pick(n.rnd)
	if f == nil {
		return false, nil
	}
	release, ok := s.album.hold(f)
	if !ok {
		return false, nil
	}
	defer release()
	ctx, cancel := context.WithTimeout(ctx, frozenPatience)
	defer cancel()
	for range 3 { // what it shows has to be known to the last block
		if s.readFrozen(ctx, f, s.someMember(n.rnd), 0, s.opts.BlockN) {
			break
		}
	}
	was, ok := s.album.known(f)
	if !ok {
		return false, nil
	}
	defer n.later(time.Second, n.takeOver) // nobody holds the volume any more, whatever comes of it
	epoch := s.reserve()
	if err := s.cluster.Fence(ctx, epoch); err != nil {
		return false, ignoreTimeout(ctx, err)
	}
	versions, ok := s.beginBack(ctx, was, epoch)
	if !ok {
		return false, nil
	}
	h := s.history.begin(0, len(versions), false, was)
	err = s.cluster.lead(ctx, func(r *replication.Replica) error { return r.Rollback(ctx, epoch, f.id) })
	s.history.end(h, err == nil, nil)
	s.oracle.end(0, len(versions), err == nil)
	if err != nil {
		return false, ignoreTimeout(ctx, err)
	}
	s.count(func(r *Report) { r.Rollbacks++ })
	return true, nil
}

func ignoreTimeout(ctx context.Context, err error) error {
	if ctx.Err() == nil {
		return fmt.Errorf("roll back: %w", err)
	}
	return nil
}

// reserve takes the next epoch for something else than an attachment.
func (s *sim) reserve() trivet.Epoch {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.reserved = max(s.reserved, s.seat.epoch) + 1
	return s.reserved
}

// beginBack reserves all blocks for a rollback, once the calls of the fenced holder have ended.
func (s *sim) beginBack(ctx context.Context, was []version, epoch trivet.Epoch) ([]version, bool) {
	for {
		versions, ok := s.oracle.beginEach(0, len(was), func(i int) write {
			return write{back: true, was: was[i], epoch: epoch}
		})
		if ok {
			return versions, true
		}
		if Sleep(ctx, pollEvery) != nil {
			return nil, false
		}
	}
}

// clone is a volume without a group that one machine has made of a snapshot, to see that its blocks stay.
type clone struct {
	id trivet.VolumeID
	of *frozen
}

// tendClone looks at the clone that a machine has, or makes one. It lies upon the snapshot until the engine has
// flattened it, and keeps what that shows when the snapshot is deleted.
func (n *nemesis) tendClone(node *Node) error {
	l := node.current()
	if l == nil || n.sim.swarm.rates[FaultFlip] > 0 { // a clone without a group has nobody who repairs what rots
		return nil
	}
	if c, ok := n.clones[node]; ok {
		kept, err := n.readClone(l, c)
		if err != nil || kept && n.rnd.IntN(2) == 0 {
			return err
		}
		delete(n.clones, node)
		if err := l.eng.DropVolume(c.id); err != nil && !goneOrBusy(err) {
			return fmt.Errorf("drop clone on %s: %w", node.ID(), err)
		}
		return nil
	}
	f, _ := n.sim.album.pick(n.rnd)
	vol, err := l.eng.OpenVolume(volumeID)
	if f == nil || err != nil {
		return nil //nolint:nilerr // the machine has no replica, or goes down
	}
	st := vol.State()
	i := slices.IndexFunc(st.Snapshots, func(x engine.Snapshot) bool { return x.ID == uint64(f.id) })
	if i < 0 {
		return nil // not applied here yet
	}
	c := clone{cloneBase + trivet.VolumeID(f.id), f}
	base := engine.Base{Volume: volumeID, Generation: st.Snapshots[i].Generation}
	switch err := l.eng.CreateClone(c.id, "clone", n.sim.sizeBytes(), base); {
	case err == nil:
		n.clones[node] = c
		n.sim.count(func(r *Report) { r.Clones++ })
	case !goneOrBusy(err) && !errors.Is(err, trivet.ErrExists):
		return fmt.Errorf("clone on %s: %w", node.ID(), err)
	}
	return nil
}

// readClone judges what a clone shows, and reports whether it is there: a crash may have taken it back.
func (n *nemesis) readClone(l *life, c clone) (kept bool, err error) {
	vol, err := l.eng.OpenVolume(c.id)
	p := make([]byte, n.sim.opts.BlockN*trivet.BlockSize)
	if err == nil {
		err = vol.ReadAt(p, 0)
	}
	switch {
	case err == nil:
		if err := n.sim.album.check(c.of, 0, p); err != nil {
			n.sim.violate(fmt.Errorf("clone %v: %w", c.id, err))
		}
		n.sim.count(func(r *Report) { r.SnapReads++ })
		return true, nil
	case goneOrBusy(err) || l.isDead():
		return false, nil
	case errors.Is(err, trivet.ErrCorrupt) && (n.sim.rotten.Load() || n.sim.flipped.Load()):
		return false, nil
	}
	return false, err
}

func goneOrBusy(err error) bool {
	return errors.Is(err, trivet.ErrNotFound) || errors.Is(err, trivet.ErrUnavailable) ||
		errors.Is(err, trivet.ErrClosed) || errors.Is(err, trivet.ErrInUse)
}

// clean has a machine clean its log, sweep its blocks and flatten what lies upon others, at full speed, and in half of
// the cases takes the power from it between any two operations of its disk meanwhile.
func (n *nemesis) clean(ctx context.Context, node *Node) (made bool, err error) {
	l := node.current()
	if l == nil {
		return false, nil
	}
	if err := n.tendClone(node); err != nil && !l.isDead() && !l.disk.wasFaulty() {
		return false, err
	}
	n.replays.Go(func() { // its writes to the log may hang
		_, err := l.eng.Clean()
		err = errors.Join(err, l.eng.Sweep(ctx))
		switch {
		case err == nil, goneOrBusy(err), errors.Is(err, trivet.ErrNoSpace), l.disk.wasFaulty(), node.current() != l,
			errors.Is(err, trivet.ErrCorrupt) && n.sim.rotten.Load():
		default:
			n.sim.violate(fmt.Errorf("clean on %s: %w", node.ID(), err))
		}
	})
	if n.rnd.IntN(2) == 0 {
		return true, nil
	}
	return n.crash(ctx, node, 1+n.rnd.IntN(40))
}

// snapshot lets a user of snapshots do something, beside the next faults.
func (n *nemesis) snapshot(ctx context.Context) bool {
	if n.snaps.Add(1) > 2 {
		n.snaps.Add(-1)
		return false // two at a time, or those that wait would go on after the faults
	}
	rnd := newRand(n.rnd.Uint64(), 4)
	n.replays.Go(func() {
		defer n.snaps.Add(-1)
		n.sim.snapshot(ctx, rnd)
	})
	return true
}
