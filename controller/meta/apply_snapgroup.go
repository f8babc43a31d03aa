package meta

import (
	"fmt"
	"time"

	"github.com/trivet-csi/trivet"
)

// The life of a group of snapshots (decision 0033):
//
//	CreateSnapshotGroup ──► Creating ──Begin──► Freezing ──Ready──► Ready ──Delete──► Deleting ──► no record
//	                           │                   │ ──Failed, or a volume changed hands──► Failed ──Delete──►┘
//	                           └──Failed, or a volume changed hands──►─────────────────────►┘
//
// Its snapshots are Creating with it. Those of volumes that nobody may write become Ready one by one, at any time: the
// epoch vouches that nothing was written since. Those of the others become Ready with the group, in one command. A group
// that fails takes all of them with it, and one that is deleted too; its record goes with the last of theirs.

func (d *draft) putGroup(g *SnapshotGroup) {
	g.Revision = d.revision
	d.groups = d.groups.with(g.ID, g)
	if g.Settled() {
		d.unsettled = removeID(d.unsettled, g.ID)
	} else {
		d.unsettled = insertID(d.unsettled, g.ID)
	}
	d.groupID, d.changed = g.ID, true
}

func (c *CreateSnapshotGroup) op() string { return fmt.Sprintf("create snapshot group %q", c.Name) }

func (c *CreateSnapshotGroup) apply(d *draft) error {
	if g, ok := d.SnapshotGroupByName(c.Name); ok {
		var volumes []trivet.VolumeID
		for _, m := range c.Members {
			volumes = append(volumes, m.Volume)
		}
		if !g.Of(volumes) {
			return fmt.Errorf("%s has that name and is of other volumes: %w", g.ID, trivet.ErrExists)
		}
		d.groupID = g.ID
		return nil
	}
	if _, ok := d.groups.get(c.ID); ok {
		return fmt.Errorf("id %s is taken: %w", c.ID, trivet.ErrExists)
	}
	g := &SnapshotGroup{ID: c.ID, Name: c.Name, State: GroupCreating, Created: instant(c.Created)}
	for i := range c.Members {
		if err := d.addGroupMember(g, &c.Members[i]); err != nil {
			return fmt.Errorf("%s: %w", c.Members[i].Volume, err)
		}
	}
	d.groupNames = d.groupNames.with(g.Name, g.ID)
	d.putGroup(g)
	return nil
}

func (d *draft) addGroupMember(g *SnapshotGroup, m *NewMember) error {
	if _, ok := d.snaps.get(m.Snapshot); ok {
		return fmt.Errorf("id %s is taken: %w", m.Snapshot, trivet.ErrExists)
	}
	v, ok := d.Volume(m.Volume)
	if !ok {
		return fmt.Errorf("volume is unknown: %w", trivet.ErrNotFound)
	}
	if err := v.unmoved(m.IfRevision); err != nil {
		return err
	}
	if v.FencedEpoch != v.Epoch {
		return fmt.Errorf("volume is on its way to a node or from one: %w", trivet.ErrPending)
	}
	s := &Snapshot{ID: m.Snapshot, Name: MemberName(g.Name, v.Name), Created: g.Created, Group: g.ID}
	if err := d.addSnapshot(&v, s); err != nil {
		return err
	}
	g.Members = append(g.Members, GroupMember{Snapshot: s.ID, Volume: v.ID, Epoch: v.Epoch})
	return nil
}

func (b *BeginSnapshotGroup) op() string { return fmt.Sprintf("begin to freeze %s", b.Group) }

func (b *BeginSnapshotGroup) apply(d *draft) error {
	g, ok := d.SnapshotGroup(b.Group)
	if !ok {
		return nil // it was deleted
	}
	d.groupID = g.ID
	switch {
	case g.Settled():
		return nil
	case g.State == GroupFreezing && (g.Owner != b.Node || g.OwnerIncarnation != b.Incarnation):
		return fmt.Errorf("process %s of node %s freezes it: %w", g.OwnerIncarnation, g.Owner, trivet.ErrInUse)
	case g.State == GroupFreezing:
		return nil
	}
	if reason := d.movedMember(&g); reason != "" {
		d.failGroup(&g, reason)
		return nil
	}
	g.State, g.Owner, g.OwnerIncarnation = GroupFreezing, b.Node, b.Incarnation
	d.putGroup(&g)
	d.touchMembers(&g)
	return nil
}

// movedMember says which volume of g has changed hands since g was asked for, if any has.
func (d *draft) movedMember(g *SnapshotGroup) string {
	for _, m := range g.Members {
		v, ok := d.volumes.get(m.Volume)
		if !ok || v.Epoch != m.Epoch {
			return fmt.Sprintf("volume %s was attached, detached or opened anew while its snapshot was made", m.Volume)
		}
	}
	return ""
}

// touchMembers wakes the agents that have to do with a volume of g.
func (d *draft) touchMembers(g *SnapshotGroup) {
	for _, m := range g.Members {
		d.touch(m.Volume)
	}
}

func (r *ReportSnapshotGroup) op() string { return fmt.Sprintf("report %s as %s", r.Group, r.State) }

func (r *ReportSnapshotGroup) apply(d *draft) error {
	g, ok := d.SnapshotGroup(r.Group)
	if !ok {
		return nil // a late copy: it is gone
	}
	d.groupID = g.ID
	switch {
	case g.Settled():
		return nil
	case r.State == GroupFailed:
		d.failGroup(&g, r.Reason)
		return nil
	case g.State != GroupFreezing || g.Owner != r.Node || g.OwnerIncarnation != r.Incarnation:
		return fmt.Errorf("group is %s by process %q of node %q: %w", g.State, g.OwnerIncarnation, g.Owner,
			trivet.ErrInvalid)
	}
	if reason := d.movedMember(&g); reason != "" {
		d.failGroup(&g, reason)
		return nil
	}
	for _, m := range g.Members {
		held, err := d.settleMember(m, r.frozen(m.Snapshot))
		if err != nil {
			return err
		}
		g.Held = max(g.Held, held)
	}
	g.State = GroupReady
	d.putGroup(&g)
	return nil
}

func (r *ReportSnapshotGroup) frozen(id trivet.SnapshotID) *FrozenMember {
	for i := range r.Frozen {
		if r.Frozen[i].Snapshot == id {
			return &r.Frozen[i]
		}
	}
	return nil
}

// settleMember makes a member Ready, unless it is, and returns for how long writes to it were held.
func (d *draft) settleMember(m GroupMember, f *FrozenMember) (held time.Duration, err error) {
	s, ok := d.Snapshot(m.Snapshot)
	switch {
	case ok && s.State == SnapshotReady:
		return s.Held, nil
	case !ok || s.State != SnapshotCreating || f == nil:
		return 0, fmt.Errorf("%s of %s is not made (state %q): %w", m.Snapshot, m.Volume, s.State, trivet.ErrInvalid)
	}
	s.State, s.SizeBytes, s.Generation, s.Held = SnapshotReady, f.SizeBytes, f.Generation, f.Held
	d.putSnapshot(&s)
	d.touch(s.Volume)
	return s.Held, nil
}

// failGroup gives a group up, and deletes its snapshots.
func (d *draft) failGroup(g *SnapshotGroup, reason string) {
	g.State, g.Reason = GroupFailed, reason
	d.putGroup(g)
	d.unwantMembers(g)
}

func (d *draft) unwantMembers(g *SnapshotGroup) {
	for _, m := range g.Members {
		if s, ok := d.Snapshot(m.Snapshot); ok && s.State != SnapshotDeleting {
			d.unwant(&s)
		}
	}
}

// mayBeAlone returns ErrInvalid for a report that a member of a group is Ready although somebody may write its volume:
// that point is nobody else's.
func (d *draft) mayBeAlone(s *Snapshot) error {
	v, ok := d.volumes.get(s.Volume)
	if s.Group == 0 || ok && len(v.Writers()) == 0 {
		return nil
	}
	return fmt.Errorf("%s belongs to %s, and its volume may be written: %w", s.ID, s.Group, trivet.ErrInvalid)
}

// memberFailed gives up the group of a snapshot that cannot be made.
func (d *draft) memberFailed(s *Snapshot) {
	if g, ok := d.SnapshotGroup(s.Group); ok && !g.Settled() {
		reason := fmt.Sprintf("snapshot of %s: %s", s.Volume, s.Reason)
		d.failGroup(&g, reason[:min(len(reason), reasonBytesMax)])
	}
}

// groupNeeds returns ErrInUse for a snapshot that goes with its group only.
func (d *draft) groupNeeds(s *Snapshot) error {
	g, ok := d.groups.get(s.Group)
	if !ok || g.State == GroupFailed || g.State == GroupDeleting {
		return nil
	}
	return fmt.Errorf("it belongs to the group %q (%s), with which it is deleted: %w", g.Name, g.ID, trivet.ErrInUse)
}

// leaveGroup forgets a group that is being deleted when the record of s was the last of it.
func (d *draft) leaveGroup(s *Snapshot) {
	if g, ok := d.SnapshotGroup(s.Group); ok && g.State == GroupDeleting {
		d.forgetEmptyGroup(&g)
	}
}

func (d *draft) forgetEmptyGroup(g *SnapshotGroup) {
	for _, m := range g.Members {
		if _, ok := d.snaps.get(m.Snapshot); ok {
			return
		}
	}
	d.groups, d.changed = d.groups.without(g.ID), true
}

func (c *DeleteSnapshotGroup) op() string { return fmt.Sprintf("delete %s", c.Group) }

func (c *DeleteSnapshotGroup) apply(d *draft) error {
	g, ok := d.SnapshotGroup(c.Group)
	if !ok || g.State == GroupDeleting {
		d.groupID = c.Group
		return nil
	}
	for _, m := range g.Members {
		if v, ok := d.volumes.get(m.Volume); ok && v.Rollback != nil && v.Rollback.Snapshot == m.Snapshot {
			return fmt.Errorf("volume %q is being brought back to a snapshot of it: %w", v.Name, trivet.ErrPending)
		}
	}
	d.groupNames = d.groupNames.without(g.Name)
	g.State = GroupDeleting
	d.putGroup(&g)
	d.unwantMembers(&g)
	d.forgetEmptyGroup(&g)
	return nil
}
