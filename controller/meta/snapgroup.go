package meta

import (
	"cmp"
	"fmt"
	"slices"
	"time"

	"github.com/trivet-csi/trivet"
)

// SnapshotGroupState says how far a group of snapshots is.
type SnapshotGroupState string

// The states of a group. It keeps its name until it is Deleting.
const (
	GroupCreating SnapshotGroupState = "Creating" // wanted; nothing that must be at one point was frozen yet
	GroupFreezing SnapshotGroupState = "Freezing" // its Owner holds writes and freezes: once, or never
	GroupReady    SnapshotGroupState = "Ready"    // all members are made, at one point
	GroupFailed   SnapshotGroupState = "Failed"   // given up, see Reason; its snapshots are Deleting, or gone
	GroupDeleting SnapshotGroupState = "Deleting" // goes with the record of its last snapshot
)

// GroupMember is one volume of a group of snapshots.
type GroupMember struct {
	Snapshot trivet.SnapshotID `json:"snapshot"`
	Volume   trivet.VolumeID   `json:"volume"`
	// Epoch is the volume's when the group was asked for. Nobody has come to write the volume, and nobody who wrote it has
	// gone, for as long as the volume has it; a group whose member has another one before it is Ready fails.
	Epoch trivet.Epoch `json:"epoch"`
}

// SnapshotGroup is the catalogue's record of snapshots of several volumes that were made at one point: a write that
// was acknowledged before another one was begun is in its snapshot if that other one is in its own.
type SnapshotGroup struct {
	ID      trivet.SnapshotGroupID `json:"id"`
	Name    string                 `json:"name"` // unique among groups
	State   SnapshotGroupState     `json:"state"`
	Reason  string                 `json:"reason,omitempty"` // of Failed
	Created time.Time              `json:"created"`          // when it was asked for
	Members []GroupMember          `json:"members"`          // in the order asked for; a volume is there once
	// Owner is the process that alone may make it Ready, from Freezing on.
	Owner            trivet.NodeID `json:"owner,omitempty"`
	OwnerIncarnation string        `json:"ownerIncarnation,omitempty"`
	// Held is the longest time for which writes to one of the volumes waited, in nanoseconds.
	Held time.Duration `json:"held,omitempty"`

	Revision Revision `json:"revision"`
}

// Settled reports whether nothing is to be done any more to make the group.
func (g *SnapshotGroup) Settled() bool { return g.State != GroupCreating && g.State != GroupFreezing }

// Clone returns a copy that shares nothing with g.
func (g *SnapshotGroup) Clone() SnapshotGroup {
	c := *g
	c.Members = slices.Clone(g.Members)
	return c
}

// Of reports whether the group is of these volumes and no others, in any order.
func (g *SnapshotGroup) Of(volumes []trivet.VolumeID) bool {
	have := make([]trivet.VolumeID, 0, len(g.Members))
	for _, m := range g.Members {
		have = append(have, m.Volume)
	}
	want := slices.Clone(volumes)
	slices.Sort(have)
	slices.Sort(want)
	return slices.Equal(have, want)
}

// MemberName is the name of the snapshot of a volume in a group: no user can choose such a name.
func MemberName(group, volume string) string { return group + "/" + volume }

// Writers returns the attachments that may write to the volume; none: nobody can.
func (v *Volume) Writers() []Attachment {
	var out []Attachment
	if v.Attached != nil && !v.Attached.ReadOnly {
		out = append(out, *v.Attached)
	}
	for _, a := range v.Also {
		if !a.ReadOnly {
			out = append(out, a)
		}
	}
	return out
}

// SnapshotGroup returns the group with that ID, and whether there is one.
func (s *State) SnapshotGroup(id trivet.SnapshotGroupID) (SnapshotGroup, bool) {
	g, ok := s.groups.get(id)
	if !ok {
		return SnapshotGroup{}, false
	}
	return g.Clone(), true
}

// SnapshotGroupByName returns the group that holds the name. One being deleted holds it no longer.
func (s *State) SnapshotGroupByName(name string) (SnapshotGroup, bool) {
	id, ok := s.groupNames.get(name)
	if !ok {
		return SnapshotGroup{}, false
	}
	return s.SnapshotGroup(id)
}

// SnapshotGroups returns every group, sorted by ID, those being deleted included.
func (s *State) SnapshotGroups() []SnapshotGroup {
	if s.groups.n == 0 {
		return nil
	}
	out := make([]SnapshotGroup, 0, s.groups.n)
	s.groups.each(func(_ trivet.SnapshotGroupID, g *SnapshotGroup) { out = append(out, g.Clone()) })
	slices.SortFunc(out, func(a, b SnapshotGroup) int { return cmp.Compare(a.ID, b.ID) })
	return out
}

// UnsettledGroups returns the groups that are still to be made, sorted by ID. It costs nothing when there are none.
func (s *State) UnsettledGroups() []SnapshotGroup {
	var out []SnapshotGroup
	for _, id := range s.unsettled {
		if g, ok := s.SnapshotGroup(id); ok {
			out = append(out, g)
		}
	}
	return out
}

// snapshotGroups adds what an image has of them.
func (im *image) snapshotGroups(s *State) error {
	for i := range im.SnapshotGroups {
		g := im.SnapshotGroups[i].Clone()
		g.Created = instant(g.Created)
		if _, ok := s.groups.get(g.ID); ok {
			return fmt.Errorf("%s is there twice: %w", g.ID, trivet.ErrCorrupt)
		}
		s.groups.fill(g.ID, &g)
		if !g.Settled() {
			s.unsettled = insertID(s.unsettled, g.ID)
		}
		if g.State == GroupDeleting {
			continue
		}
		if other, ok := s.groupNames.get(g.Name); ok {
			return fmt.Errorf("%s and %s have the name %q: %w", other, g.ID, g.Name, trivet.ErrCorrupt)
		}
		s.groupNames.fill(g.Name, g.ID)
	}
	return nil
}

// checkGroups returns ErrCorrupt for a group that cannot be, and for a snapshot of none.
func (s *State) checkGroups() error {
	var err error
	s.groups.each(func(id trivet.SnapshotGroupID, g *SnapshotGroup) {
		if problem := s.groupProblem(g); problem != "" && err == nil {
			err = fmt.Errorf("%s: %s: %w", id, problem, trivet.ErrCorrupt)
		}
	})
	s.snaps.each(func(id trivet.SnapshotID, snap *Snapshot) {
		if snap.Group == 0 || err != nil {
			return
		}
		g, ok := s.groups.get(snap.Group)
		if !ok || !slices.ContainsFunc(g.Members, func(m GroupMember) bool { return m.Snapshot == id }) {
			err = fmt.Errorf("%s: its group %s does not know it: %w", id, snap.Group, trivet.ErrCorrupt)
		}
	})
	return err
}

// groupProblem names the first invariant that g breaks.
func (s *State) groupProblem(g *SnapshotGroup) string {
	switch g.State {
	case GroupCreating, GroupFreezing, GroupReady, GroupFailed, GroupDeleting:
	default:
		return fmt.Sprintf("state %q is unknown", g.State)
	}
	left := 0
	for _, m := range g.Members {
		snap, ok := s.snaps.get(m.Snapshot)
		switch {
		case ok && (snap.Group != g.ID || snap.Volume != m.Volume):
			return fmt.Sprintf("%s is no snapshot of %s in it", m.Snapshot, m.Volume)
		case ok:
			left++
		}
		if g.State == GroupReady && (!ok || snap.State != SnapshotReady) || !g.Settled() && !ok {
			return fmt.Sprintf("is %s without %s", g.State, m.Snapshot)
		}
	}
	switch {
	case g.ID == 0 || len(g.Members) == 0:
		return "id is zero, or it has no members"
	case g.Revision > s.revision:
		return "revision lies in the future"
	case g.State == GroupDeleting && left == 0:
		return "is being deleted, and nothing of it is left"
	case (g.Owner == "") != (g.OwnerIncarnation == "") || g.State == GroupFreezing && g.Owner == "":
		return fmt.Sprintf("is %s by %q, process %q", g.State, g.Owner, g.OwnerIncarnation)
	}
	return ""
}
