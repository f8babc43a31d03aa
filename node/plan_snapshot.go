package node

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller/meta"
	"github.com/trivet-csi/trivet/engine"
	"github.com/trivet-csi/trivet/replication"
)

// copies is what the catalogue says of a volume's snapshots and of the volumes that are copies of them.
type copies struct {
	snapshots []meta.Snapshot
	needed    map[trivet.SnapshotID]bool // by a clone that is not flattened
	// leader says that the leader's node makes snapshots: nobody has the volume attached who might have
	// acknowledged writes that the group has not seen, or who has cannot be reached.
	leader bool
	flat   map[trivet.ReplicaID]bool // own replicas that are flattened, and not reported so
	busy   bool                      // the group has something to do about them
	waits  bool                      // for the holder to make a snapshot, or for its lease to run out
	// grouped has the snapshots that are to be made in a group, and whether the leader's node makes them.
	grouped map[trivet.SnapshotID]bool
}

func copiesOf(st *meta.State, v *meta.Volume, now time.Time) copies {
	c := copies{
		snapshots: st.SnapshotsOf(v.ID), needed: map[trivet.SnapshotID]bool{}, leader: leaderFreezes(st, v, now),
		grouped: map[trivet.SnapshotID]bool{},
	}
	for i := range c.snapshots {
		s := &c.snapshots[i]
		for _, id := range st.ClonesOf(s.ID) {
			c.needed[s.ID] = true
			clone, ok := st.Volume(id)
			// Its replicas can be made once the replicas here have applied the freeze.
			c.busy = c.busy || ok && clone.Phase == meta.PhaseCreating
		}
		switch {
		case s.State == meta.SnapshotCreating && s.Group != 0:
			c.busy = true
			c.grouped[s.ID] = mayFreezeAlone(st, v, s)
		case s.State == meta.SnapshotCreating:
			c.busy, c.waits = true, !c.leader
		case s.State == meta.SnapshotDeleting && !c.needed[s.ID]:
			c.busy = true
		}
	}
	return c
}

// baseOf returns what a new replica of v begins with.
func baseOf(v *meta.Volume) *engine.Base {
	if v.Source == nil || v.Source.Flattened {
		return nil
	}
	return &engine.Base{Volume: v.Source.Volume, Generation: v.Source.Generation}
}

// flatten notes which replicas of v here are flattened without the catalogue's knowledge, and reports whether there
// are others, which are being flattened by their disk's engine: nobody tells when that is done.
func (w *worker) flatten(v *meta.Volume, l *local) (waits bool) {
	if v.Source == nil || v.Source.Flattened || v.Phase == meta.PhaseDeleting {
		return false
	}
	l.copies.flat = map[trivet.ReplicaID]bool{}
	for _, r := range v.Replicas {
		disk, here := w.agent.cfg.Disks[r.Disk]
		if r.Node != w.agent.cfg.ID || !here || r.State == meta.ReplicaCreating || slices.Contains(v.Source.Flat, r.ID) {
			continue
		}
		flat, err := flattened(disk, v.ID, r.ID)
		if err != nil {
			w.log.Debug("a copy may not be flattened", "replica", r.ID, "err", err)
		}
		if flat {
			l.copies.flat[r.ID] = true
		} else {
			waits = true
		}
	}
	return waits
}

// flattened reports whether a replica on a disk needs no blocks of another volume.
func flattened(disk replication.Disk, id trivet.VolumeID, replica trivet.ReplicaID) (bool, error) {
	if disk.Engine == nil {
		return false, fmt.Errorf("disk %s has no engine: %w", disk.ID, trivet.ErrUnavailable)
	}
	v, err := disk.Engine.OpenVolume(id)
	if err != nil || v.Replica() != replica || v.Restoring() {
		return false, err
	}
	return len(v.Bases()) == 0, nil
}

// leaderFreezes reports whether the node of the volume's leader makes its snapshots, rather than the node that has it
// attached: what that one has acknowledged may be in its cache only. A node whose lease has run out is not waited
// for: what it did not flush is as lost as by a power cut, if it is dead.
func leaderFreezes(st *meta.State, v *meta.Volume, now time.Time) bool {
	if v.Attached == nil || v.Attached.ReadOnly {
		return v.FencedEpoch == v.Epoch
	}
	n, ok := st.Node(v.Attached.Node)
	return v.FencedEpoch == v.Epoch && (!ok || !n.Alive(now))
}

// mayFreezeAlone reports whether a member of a group may be frozen at any time: nobody can write its volume, and if
// somebody comes to, the epoch moves, and the group fails. What a dead holder has not flushed is another matter: it may
// be cut off from the catalogue only, and write on.
func mayFreezeAlone(st *meta.State, v *meta.Volume, s *meta.Snapshot) bool {
	g, _ := st.SnapshotGroup(s.Group)
	i := slices.IndexFunc(g.Members, func(m meta.GroupMember) bool { return m.Snapshot == s.ID })
	return i >= 0 && g.Members[i].Epoch == v.Epoch && v.FencedEpoch == v.Epoch && len(v.Writers()) == 0
}

// mayMake reports whether the node of the volume's leader makes a snapshot.
func mayMake(st *meta.State, v *meta.Volume, s *meta.Snapshot, now time.Time) bool {
	if s.Group != 0 {
		return mayFreezeAlone(st, v, s)
	}
	return leaderFreezes(st, v, now)
}

// planSnapshots is what the leader's node has to do about snapshots.
func planSnapshots(v *meta.Volume, r *meta.Replica, l local) []action {
	var acts []action
	known := map[trivet.SnapshotID]bool{}
	for i := range l.copies.snapshots {
		s := &l.copies.snapshots[i]
		known[s.ID] = true
		switch {
		case s.State == meta.SnapshotCreating && (l.copies.grouped[s.ID] || s.Group == 0 && l.copies.leader):
			acts = append(acts, action{verb: doFreeze, disk: r.Disk, id: r.ID, epoch: v.Epoch, snapshot: s.ID})
		case s.State == meta.SnapshotDeleting && !l.copies.needed[s.ID]:
			acts = append(acts, action{verb: doDrop, disk: r.Disk, id: r.ID, snapshot: s.ID})
		}
	}
	// A copy of a freeze that came when its snapshot was deleted already leaves one that nobody knows.
	for _, s := range l.status.Snapshots {
		if id := trivet.SnapshotID(s.ID); !known[id] {
			acts = append(acts, action{verb: doDrop, disk: r.Disk, id: r.ID, snapshot: id})
		}
	}
	return acts
}

// snapshot makes or drops a snapshot, as the catalogue says, read linearizably: a copy that lags could have a snapshot
// made without what its holder has in a cache, or drop one that was made just now.
func (w *worker) snapshot(ctx context.Context, a action) error {
	r, ok := w.agent.host.running(w.volume)
	if !ok {
		return fmt.Errorf("%s %s of %s: replica %s does not run: %w", a.verb, a.snapshot, w.volume, a.id, trivet.ErrNotLeader)
	}
	st, err := w.agent.cat.Read(ctx)
	if err != nil {
		return fmt.Errorf("%s %s of %s: %w", a.verb, a.snapshot, w.volume, err)
	}
	v, ok := st.Volume(w.volume)
	if !ok {
		return nil // the local copy will follow
	}
	s, known := st.Snapshot(a.snapshot)
	if a.verb == doFreeze {
		if !known || s.State != meta.SnapshotCreating || v.Epoch != a.epoch || !mayMake(st, &v, &s, time.Now()) {
			return nil
		}
		f, err := r.Freeze(ctx, a.epoch, a.snapshot)
		if errors.Is(err, trivet.ErrNoSpace) {
			return reportSnapshot(ctx, w.agent.cat, &meta.ReportSnapshot{
				Snapshot: a.snapshot, State: meta.SnapshotFailed, Reason: err.Error(),
			})
		}
		if err != nil {
			return err
		}
		w.log.Info("snapshot made", "snapshot", a.snapshot, "generation", f.Generation)
		return reportSnapshot(ctx, w.agent.cat, &meta.ReportSnapshot{
			Snapshot: a.snapshot, State: meta.SnapshotReady, Generation: f.Generation, SizeBytes: f.SizeBytes,
		})
	}
	if known && (s.State != meta.SnapshotDeleting || len(st.ClonesOf(s.ID)) > 0) {
		return nil
	}
	if err := r.DropSnapshot(ctx, a.snapshot); err != nil {
		return err
	}
	if !known {
		w.log.Info("dropped a snapshot that the catalogue does not know", "snapshot", a.snapshot)
		return nil
	}
	return reportSnapshot(ctx, w.agent.cat, &meta.ReportSnapshot{Snapshot: a.snapshot, State: meta.SnapshotRemoved})
}

func reportSnapshot(ctx context.Context, cat Catalogue, r *meta.ReportSnapshot) error {
	_, err := propose(ctx, cat, meta.Command{ReportSnapshot: r})
	return err
}
