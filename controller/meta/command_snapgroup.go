package meta

import (
	"fmt"
	"strings"
	"time"

	"github.com/trivet-csi/trivet"
)

const (
	groupMembersMax = 64 // volumes of a group: each holds its writes until all are frozen
	groupReserved   = "clone"
)

// NewMember is a volume of which a group makes a snapshot.
type NewMember struct {
	Snapshot trivet.SnapshotID `json:"snapshot"`
	Volume   trivet.VolumeID   `json:"volume"`
	// IfRevision is the Volume.Revision that this was decided on.
	IfRevision Revision `json:"ifRevision"`
}

// CreateSnapshotGroup adds a group of snapshots in state Creating, and a snapshot in that state for each member, named
// by MemberName. The same name and volumes again returns the existing one, whatever its state; other volumes give
// ErrExists. For each volume errors are those of CreateSnapshot, and ErrPending while it is on its way to a node or from
// one: its epoch has to be fenced. All members come to be, or none.
type CreateSnapshotGroup struct {
	ID      trivet.SnapshotGroupID `json:"id"`
	Name    string                 `json:"name"`
	Created time.Time              `json:"created"`
	Members []NewMember            `json:"members"`
}

// BeginSnapshotGroup makes a process the one that freezes a group, from Creating to Freezing: it has one attempt, for a
// member that is frozen keeps its point. ErrInUse when another process has begun. The same again, and of a group that
// is Settled or unknown: no effect. A group of which a volume has changed hands fails (Result.Group tells).
type BeginSnapshotGroup struct {
	Group       trivet.SnapshotGroupID `json:"group"`
	Node        trivet.NodeID          `json:"node"`
	Incarnation string                 `json:"incarnation"`
}

// FrozenMember is a member that was made while writes to all members that somebody may write were held.
type FrozenMember struct {
	Snapshot   trivet.SnapshotID `json:"snapshot"`
	SizeBytes  int64             `json:"sizeBytes"`
	Generation trivet.Generation `json:"generation"`
	Held       time.Duration     `json:"held,omitempty"` // see Snapshot.Held
}

// ReportSnapshotGroup says what became of a group that is not Settled; of another: late, no effect.
//
// Ready, by its owner: Frozen are the members that it had frozen behind its barrier; the others are Ready already, and
// nobody could write them. Then the group is Ready, unless a volume has changed hands since it was asked for, which
// fails it. ErrInvalid from another process, while it is Creating, and with a member missing.
//
// Failed, with a reason, by any node: the snapshots of all members are deleted.
type ReportSnapshotGroup struct {
	Group       trivet.SnapshotGroupID `json:"group"`
	Node        trivet.NodeID          `json:"node"`
	Incarnation string                 `json:"incarnation"`
	State       SnapshotGroupState     `json:"state"`
	Reason      string                 `json:"reason,omitempty"`
	Frozen      []FrozenMember         `json:"frozen,omitempty"`
}

// DeleteSnapshotGroup deletes a group with all its snapshots, and frees its name. Unknown or Deleting: no effect.
// ErrPending while a volume is brought back to one of them.
type DeleteSnapshotGroup struct {
	Group trivet.SnapshotGroupID `json:"group"`
}

func (c *CreateSnapshotGroup) validate() error {
	if n := len(c.Members); n == 0 || n > groupMembersMax {
		return fmt.Errorf("%d volumes, want 1 to %d: %w", n, groupMembersMax, trivet.ErrInvalid)
	}
	if c.Name == groupReserved || strings.HasPrefix(c.Name, HiddenPrefix) {
		return fmt.Errorf("name %q is reserved: %w", c.Name, trivet.ErrInvalid)
	}
	snaps, volumes := map[trivet.SnapshotID]bool{}, map[trivet.VolumeID]bool{}
	for _, m := range c.Members {
		switch {
		case snaps[m.Snapshot] || volumes[m.Volume]:
			return fmt.Errorf("%s or %s is there twice: %w", m.Volume, m.Snapshot, trivet.ErrInvalid)
		case m.IfRevision == 0:
			return fmt.Errorf("%s: no revision that it was decided on: %w", m.Volume, trivet.ErrInvalid)
		}
		snaps[m.Snapshot], volumes[m.Volume] = true, true
		if err := firstError(validateSnapshot(m.Snapshot), validateVolume(m.Volume)); err != nil {
			return err
		}
	}
	return firstError(validateGroup(c.ID), trivet.ValidateName(c.Name), validateTime("created", c.Created))
}

func validateGroup(id trivet.SnapshotGroupID) error {
	if id == 0 {
		return fmt.Errorf("group id is zero: %w", trivet.ErrInvalid)
	}
	return nil
}

func (b *BeginSnapshotGroup) validate() error {
	return firstError(
		validateGroup(b.Group), trivet.ValidateNodeID(string(b.Node)), validateUUID("incarnation", b.Incarnation),
	)
}

func (r *ReportSnapshotGroup) validate() error {
	switch {
	case r.State == GroupFailed && r.Reason == "":
		return fmt.Errorf("reason is empty: %w", trivet.ErrInvalid)
	case r.State == GroupFailed && len(r.Frozen) > 0, r.State == GroupReady && r.Reason != "":
		return fmt.Errorf("%s with a reason and %d members: %w", r.State, len(r.Frozen), trivet.ErrInvalid)
	case r.State != GroupFailed && r.State != GroupReady:
		return fmt.Errorf("state %q cannot be reported: %w", r.State, trivet.ErrInvalid)
	case len(r.Frozen) > groupMembersMax:
		return fmt.Errorf("%d members, want at most %d: %w", len(r.Frozen), groupMembersMax, trivet.ErrInvalid)
	}
	for i := range r.Frozen {
		f := &r.Frozen[i]
		one := ReportSnapshot{
			Snapshot: f.Snapshot, State: SnapshotReady, SizeBytes: f.SizeBytes, Generation: f.Generation, Held: f.Held,
		}
		if err := one.validate(); err != nil {
			return err
		}
	}
	return firstError(
		validateGroup(r.Group), trivet.ValidateNodeID(string(r.Node)), validateUUID("incarnation", r.Incarnation),
		validateText("reason", r.Reason, reasonBytesMax),
	)
}

func (c *DeleteSnapshotGroup) validate() error { return validateGroup(c.Group) }
