package meta

import (
	"fmt"
	"slices"

	"github.com/trivet-csi/trivet"
)

// The life of a snapshot, and who needs whom:
//
//	CreateSnapshot ──► Creating ──Ready──► Ready ──DeleteSnapshot──► Deleting ──Removed──► no record
//	                      │ ──Failed──► Failed ──DeleteSnapshot──────►┘
//	                      └─────────────DeleteSnapshot───────────────►┘
//
//	volume, Kept or not ◄── snapshot ◄── clone, until it is flattened
//
// A volume that is deleted while it has snapshots is Kept; the last Removed makes it Deleting. A snapshot that is
// Deleting stays while a clone of it is not flattened: the clone's replicas read blocks of the snapshot's volume.
// Each change of a snapshot or a clone is a change of the volume too, and raises its revision: agents are woken by it,
// and what was decided without knowing is refused.

func (d *draft) putSnapshot(s *Snapshot) {
	s.Revision = d.revision
	d.snaps = d.snaps.with(s.ID, s)
	if s.State == SnapshotCreating {
		d.creating = insertID(d.creating, s.ID)
	} else {
		d.creating = removeID(d.creating, s.ID)
	}
	d.snapshotID, d.changed = s.ID, true
}

// touch raises the revision of a volume that something about it has changed.
func (d *draft) touch(id trivet.VolumeID) {
	if v, ok := d.Volume(id); ok {
		d.put(&v)
	}
}

func (c *CreateSnapshot) op() string {
	return fmt.Sprintf("create snapshot %q of %s", c.Snapshot.Name, c.Snapshot.Volume)
}

func (c *CreateSnapshot) apply(d *draft) error {
	if id, ok := d.snapNames.get(c.Snapshot.Name); ok {
		if s, _ := d.snaps.get(id); s.Volume != c.Snapshot.Volume {
			return fmt.Errorf("%s has that name and is of volume %q (%s): %w", id, s.VolumeName, s.Volume, trivet.ErrExists)
		}
		d.snapshotID = id
		return nil
	}
	if _, ok := d.snaps.get(c.Snapshot.ID); ok {
		return fmt.Errorf("id %s is taken: %w", c.Snapshot.ID, trivet.ErrExists)
	}
	v, err := d.edit(c.Snapshot.Volume)
	if err != nil {
		return err
	}
	if err := v.unmoved(c.IfRevision); err != nil {
		return err
	}
	return d.addSnapshot(v, &Snapshot{
		ID: c.Snapshot.ID, Name: c.Snapshot.Name, Created: instant(c.Snapshot.Created),
	})
}

// addSnapshot adds a snapshot of v, of which ID, Name, Created and Group are given.
func (d *draft) addSnapshot(v *Volume, s *Snapshot) error {
	if err := v.settled(); err != nil {
		return err
	}
	of, _ := d.snapsOf.get(v.ID)
	switch {
	case v.Phase == PhaseKept:
		return fmt.Errorf("volume is %s: %w", v.Phase, trivet.ErrInvalid)
	case len(of) >= snapshotsMax:
		return fmt.Errorf("volume has %d snapshots, the most there may be; delete some: %w", len(of), trivet.ErrNoSpace)
	}
	if id, ok := d.snapNames.get(s.Name); ok {
		return fmt.Errorf("%s has the name %q: %w", id, s.Name, trivet.ErrExists)
	}
	s.Volume, s.VolumeName, s.State, s.Params = v.ID, v.Name, SnapshotCreating, v.Params
	d.snapNames = d.snapNames.with(s.Name, s.ID)
	d.snapsOf = d.snapsOf.with(v.ID, insertID(of, s.ID))
	d.putSnapshot(s)
	d.put(v)
	return nil
}

func (r *ReportSnapshot) op() string { return fmt.Sprintf("report %s as %s", r.Snapshot, r.State) }

func (r *ReportSnapshot) apply(d *draft) error {
	s, ok := d.Snapshot(r.Snapshot)
	if !ok {
		return nil // a late copy: it is gone
	}
	d.snapshotID = s.ID
	switch r.State {
	case SnapshotReady:
		if s.State != SnapshotCreating {
			return nil
		}
		if err := d.mayBeAlone(&s); err != nil {
			return err
		}
		s.State, s.SizeBytes, s.Generation, s.Held = SnapshotReady, r.SizeBytes, r.Generation, r.Held
	case SnapshotFailed:
		if s.State != SnapshotCreating {
			return nil
		}
		s.State, s.Reason = SnapshotFailed, r.Reason
	case SnapshotRemoved:
		return d.forgetSnapshot(&s)
	case SnapshotCreating, SnapshotDeleting: // refused by validate
		return nil
	}
	d.putSnapshot(&s)
	d.touch(s.Volume)
	if s.State == SnapshotFailed {
		d.memberFailed(&s)
	}
	return nil
}

// forgetSnapshot removes the record of a snapshot that the group has dropped.
func (d *draft) forgetSnapshot(s *Snapshot) error {
	if s.State != SnapshotDeleting {
		return fmt.Errorf("snapshot is %s, not %s: %w", s.State, SnapshotDeleting, trivet.ErrInvalid)
	}
	if clones, _ := d.clonesOf.get(s.ID); len(clones) > 0 {
		return fmt.Errorf("%s needs it still: %w", clones[0], trivet.ErrInUse)
	}
	d.snaps = d.snaps.without(s.ID)
	d.leaveGroup(s)
	of, _ := d.snapsOf.get(s.Volume)
	if of = removeID(of, s.ID); len(of) > 0 {
		d.snapsOf = d.snapsOf.with(s.Volume, of)
	} else {
		d.snapsOf = d.snapsOf.without(s.Volume)
	}
	d.changed = true
	v, ok := d.Volume(s.Volume)
	switch {
	case !ok:
	case v.Phase == PhaseKept && len(of) == 0:
		v.Phase = PhaseDeleting // its name may be another's by now
		d.put(&v)
	default:
		d.put(&v)
	}
	return nil
}

func (c *DeleteSnapshot) op() string { return fmt.Sprintf("delete %s", c.Snapshot) }

func (c *DeleteSnapshot) apply(d *draft) error {
	s, ok := d.Snapshot(c.Snapshot)
	if !ok || s.State == SnapshotDeleting {
		d.snapshotID = c.Snapshot
		return nil
	}
	if v, ok := d.Volume(s.Volume); ok && v.Rollback != nil && v.Rollback.Snapshot == s.ID {
		return fmt.Errorf("volume %q is being brought back to it: %w", v.Name, trivet.ErrPending)
	}
	if err := d.groupNeeds(&s); err != nil {
		return err
	}
	d.unwant(&s)
	return nil
}

// unwant makes a snapshot Deleting.
func (d *draft) unwant(s *Snapshot) {
	d.snapNames = d.snapNames.without(s.Name)
	s.State = SnapshotDeleting
	d.putSnapshot(s)
	d.touch(s.Volume)
}

// beginClone makes v a copy of a snapshot.
func (d *draft) beginClone(v *Volume, id trivet.SnapshotID) error {
	s, ok := d.Snapshot(id)
	switch {
	case !ok:
		return fmt.Errorf("%s is unknown: %w", id, trivet.ErrNotFound)
	case s.State == SnapshotCreating:
		return fmt.Errorf("snapshot %q is %s: %w", s.Name, s.State, trivet.ErrPending)
	case s.State != SnapshotReady:
		return fmt.Errorf("snapshot %q is %s: %w", s.Name, s.State, trivet.ErrInvalid)
	case v.SizeBytes < s.SizeBytes:
		return fmt.Errorf("size of %d bytes: snapshot %q has %d: %w", v.SizeBytes, s.Name, s.SizeBytes,
			trivet.ErrOutOfRange)
	}
	parent, ok := d.Volume(s.Volume)
	if !ok {
		return fmt.Errorf("%s of %s is unknown: %w", s.Volume, id, trivet.ErrNotFound)
	}
	for _, r := range v.Replicas {
		if !slices.ContainsFunc(parent.Replicas, func(p Replica) bool {
			return p.Node == r.Node && p.Disk == r.Disk && p.State == ReplicaReady
		}) {
			return fmt.Errorf("snapshot %q has no ready replica on disk %s of node %s: %w", s.Name, r.Disk, r.Node,
				trivet.ErrPending)
		}
	}
	v.Source = &Source{Snapshot: s.ID, Volume: s.Volume, Generation: s.Generation}
	clones, _ := d.clonesOf.get(s.ID)
	d.clonesOf = d.clonesOf.with(s.ID, insertID(clones, v.ID))
	d.put(&parent)
	return nil
}

func (r *ReportFlattened) op() string {
	return fmt.Sprintf("report replica %s of %s flattened", r.Replica, r.Volume)
}

func (r *ReportFlattened) apply(d *draft) error {
	v, err := d.edit(r.Volume)
	if err != nil {
		return nil //nolint:nilerr // a late copy: the volume is gone
	}
	src := v.Source
	if src == nil || src.Flattened || v.Replica(r.Replica) == nil || slices.Contains(src.Flat, r.Replica) {
		return nil
	}
	src.Flat = append(src.Flat, r.Replica)
	d.settleSource(v)
	d.put(v)
	return nil
}

// settleSource ends the need of v for the snapshot that it is a copy of, if all its replicas have their own blocks.
// Its caller puts v.
func (d *draft) settleSource(v *Volume) {
	src := v.Source
	if src == nil || src.Flattened {
		return
	}
	src.Flat = slices.DeleteFunc(src.Flat, func(id trivet.ReplicaID) bool { return v.Replica(id) == nil })
	for _, r := range v.Replicas {
		if !slices.Contains(src.Flat, r.ID) {
			return
		}
	}
	src.Flat, src.Flattened = nil, true
	d.endClone(src.Snapshot, v.ID)
}

// forgetSource ends the need of a volume whose record is gone.
func (d *draft) forgetSource(v *Volume) {
	if v.Source != nil && !v.Source.Flattened {
		d.endClone(v.Source.Snapshot, v.ID)
	}
}

func (d *draft) endClone(id trivet.SnapshotID, clone trivet.VolumeID) {
	clones, _ := d.clonesOf.get(id)
	if clones = removeID(clones, clone); len(clones) > 0 {
		d.clonesOf = d.clonesOf.with(id, clones)
	} else {
		d.clonesOf = d.clonesOf.without(id)
	}
	s, ok := d.Snapshot(id)
	switch {
	case !ok:
	case s.Hidden() && s.State != SnapshotDeleting && len(clones) == 0:
		d.unwant(&s)
	default:
		d.touch(s.Volume)
	}
}

func (r *Restore) op() string { return fmt.Sprintf("restore %s in place", r.Snapshot) }

func (r *Restore) apply(d *draft) error {
	s, ok := d.Snapshot(r.Snapshot)
	if !ok {
		return fmt.Errorf("snapshot is unknown: %w", trivet.ErrNotFound)
	}
	v, err := d.edit(s.Volume)
	if err != nil {
		return err
	}
	if err := firstError(v.unmoved(r.IfRevision), v.settled(), v.idle()); err != nil {
		return err
	}
	switch {
	case v.Phase == PhaseKept:
		return fmt.Errorf("volume is %s: %w", v.Phase, trivet.ErrInvalid)
	case s.State != SnapshotReady:
		return fmt.Errorf("snapshot %q is %s: %w", s.Name, s.State, trivet.ErrInvalid)
	}
	v.Rollback = &Rollback{Snapshot: s.ID, Before: v.Phase}
	v.Phase = PhaseRestoring
	v.Epoch++
	d.put(v)
	return nil
}

func (r *ReportRolledBack) op() string {
	return fmt.Sprintf("report %s brought back at epoch %d", r.Volume, r.Epoch)
}

func (r *ReportRolledBack) apply(d *draft) error {
	v, err := d.edit(r.Volume)
	if err != nil {
		return err
	}
	if v.Phase != PhaseRestoring || v.Epoch != r.Epoch {
		return nil // late
	}
	v.FencedEpoch = v.Epoch // it was committed at that epoch, so the fence was
	v.Phase, v.Rollback = v.Rollback.Before, nil
	d.put(v)
	return nil
}
