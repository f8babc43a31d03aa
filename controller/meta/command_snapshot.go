package meta

import (
	"fmt"
	"strings"
	"time"

	"github.com/trivet-csi/trivet"
)

// CreateSnapshot adds a snapshot in state Creating; whoever may freeze the volume does and reports it. The same name
// and volume again returns the existing one; another volume's gives ErrExists. A late copy must not bring back a
// snapshot that has come and gone, so IfRevision must be set: ErrPending when the volume has changed since.
// ErrNotFound: no such volume; ErrPending while it is Creating or Restoring; ErrInvalid unless it is Available, Bound
// or Released otherwise; ErrNoSpace when it has as many snapshots as a volume may have.
type CreateSnapshot struct {
	Snapshot Snapshot `json:"snapshot"` // ID, Name, Volume, Created
	// IfRevision is the Volume.Revision that this was decided on.
	IfRevision Revision `json:"ifRevision"`
}

// ReportSnapshot says what became of a snapshot in the volume's group: Ready, with Generation and SizeBytes, or Failed,
// with a reason, of one that is Creating; Removed of one that is Deleting and that no clone needs, which removes its
// record, and makes a Kept volume Deleting when it was the last. ErrInvalid for Removed of another, and for Ready of a
// group's member whose volume may be written. Everything else is late and without effect.
type ReportSnapshot struct {
	Snapshot   trivet.SnapshotID `json:"snapshot"`
	State      SnapshotState     `json:"state"`
	Reason     string            `json:"reason,omitempty"`
	SizeBytes  int64             `json:"sizeBytes,omitempty"`
	Generation trivet.Generation `json:"generation,omitempty"`
	Held       time.Duration     `json:"held,omitempty"` // see Snapshot.Held
}

// DeleteSnapshot makes a snapshot Deleting and frees its name. Unknown or Deleting: no effect. ErrPending while its
// volume is brought back to it; ErrInUse, naming the group, for one that belongs to a group.
type DeleteSnapshot struct {
	Snapshot trivet.SnapshotID `json:"snapshot"`
}

// ReportFlattened says that a replica of a volume with a Source has all its blocks itself. Once all replicas have, the
// volume needs the snapshot no more, and a hidden one becomes Deleting. Unknown, or said before: no effect.
type ReportFlattened struct {
	Volume  trivet.VolumeID  `json:"volume"`
	Replica trivet.ReplicaID `json:"replica"`
}

// Restore brings a volume back to one of its snapshots in place: it is Restoring, at an epoch reserved for that, until
// its leader's agent has done it (ReportRolledBack). ErrNotFound: no such snapshot; ErrInUse, naming the node,
// while the volume is attached; ErrInvalid unless the snapshot is Ready and the volume Available, Bound or Released.
// ErrPending as in Release, which must be set: a late copy would undo what was written since.
type Restore struct {
	Snapshot   trivet.SnapshotID `json:"snapshot"`
	IfRevision Revision          `json:"ifRevision"`
}

// ReportRolledBack says that the volume's group has fenced at Epoch and shows the snapshot. The volume is as before
// its Restore. Any other epoch or phase: late, no effect.
type ReportRolledBack struct {
	Volume trivet.VolumeID `json:"volume"`
	Epoch  trivet.Epoch    `json:"epoch"`
}

func (c *CreateSnapshot) validate() error {
	s := &c.Snapshot
	if s.State != "" || s.Reason != "" || s.SizeBytes != 0 || s.Generation != 0 || s.Held != 0 || s.Params != nil ||
		s.VolumeName != "" || s.Group != 0 {
		return fmt.Errorf("snapshot %s: more is given than can be known: %w", s.ID, trivet.ErrInvalid)
	}
	if c.IfRevision == 0 {
		return fmt.Errorf("no revision that it was decided on: %w", trivet.ErrInvalid)
	}
	return firstError(
		validateSnapshot(s.ID),
		validateVolume(s.Volume),
		trivet.ValidateName(strings.TrimPrefix(s.Name, HiddenPrefix)),
		validateTime("created", s.Created),
	)
}

func validateSnapshot(id trivet.SnapshotID) error {
	if id == 0 {
		return fmt.Errorf("snapshot id is zero: %w", trivet.ErrInvalid)
	}
	return nil
}

func (r *ReportSnapshot) validate() error {
	switch r.State {
	case SnapshotReady:
		if r.SizeBytes <= 0 || r.SizeBytes > trivet.VolumeSizeMax || r.SizeBytes%trivet.BlockSize != 0 || r.Held < 0 {
			return fmt.Errorf("size of %d bytes, held for %v: %w", r.SizeBytes, r.Held, trivet.ErrInvalid)
		}
	case SnapshotFailed:
		if r.Reason == "" {
			return fmt.Errorf("reason is empty: %w", trivet.ErrInvalid)
		}
	case SnapshotRemoved:
	case SnapshotCreating, SnapshotDeleting:
		return fmt.Errorf("state %s cannot be reported, only wanted: %w", r.State, trivet.ErrInvalid)
	default:
		return fmt.Errorf("state %q is unknown: %w", r.State, trivet.ErrInvalid)
	}
	return firstError(validateSnapshot(r.Snapshot), validateText("reason", r.Reason, reasonBytesMax))
}

func (c *DeleteSnapshot) validate() error { return validateSnapshot(c.Snapshot) }

func (r *ReportFlattened) validate() error {
	return firstError(validateVolume(r.Volume), validateUUID("replica", string(r.Replica)))
}

func (r *Restore) validate() error {
	if r.IfRevision == 0 {
		return fmt.Errorf("no revision that it was decided on: %w", trivet.ErrInvalid)
	}
	return validateSnapshot(r.Snapshot)
}

func (r *ReportRolledBack) validate() error {
	return firstError(validateVolume(r.Volume), validateEpoch(r.Epoch))
}
