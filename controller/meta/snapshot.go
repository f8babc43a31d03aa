package meta

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/trivet-csi/trivet"
)

// SnapshotState says how far a snapshot is.
type SnapshotState string

// The snapshot states. A snapshot keeps its name until it is Deleting.
const (
	SnapshotCreating SnapshotState = "Creating" // wanted; its volume's group has not frozen it yet
	SnapshotReady    SnapshotState = "Ready"    // frozen: what it shows never changes
	SnapshotFailed   SnapshotState = "Failed"   // the group refused for good; see Reason
	SnapshotDeleting SnapshotState = "Deleting" // the group drops it once no clone needs it, then the record goes
	SnapshotRemoved  SnapshotState = "Removed"  // the group has dropped it: only reported
)

// Snapshot is the catalogue's record of a snapshot of a volume. It outlives the volume's deletion (PhaseKept).
type Snapshot struct {
	ID         trivet.SnapshotID `json:"id"`
	Name       string            `json:"name"` // unique among snapshots; HiddenPrefix begins those that a clone made
	Volume     trivet.VolumeID   `json:"volume"`
	VolumeName string            `json:"volumeName"` // when it was made
	State      SnapshotState     `json:"state"`
	Reason     string            `json:"reason,omitempty"` // of Failed
	Created    time.Time         `json:"created"`          // when it was asked for
	// Params are those of the volume when it was asked for; a volume that is made of it has them unless others are given.
	Params map[string]string `json:"params,omitempty"`

	// Known once it is Ready.
	SizeBytes  int64             `json:"sizeBytes,omitempty"` // of the volume then; at least that of the freeze
	Generation trivet.Generation `json:"generation,omitempty"`
	// Held is how long writes waited for it on the node that had the volume attached, in nanoseconds.
	Held time.Duration `json:"held,omitempty"`

	// Group is the group of snapshots that it was made with; 0 = none.
	Group trivet.SnapshotGroupID `json:"group,omitempty"`

	Revision Revision `json:"revision"`
}

// HiddenPrefix begins the name of a snapshot that was made to clone a volume, and that goes by itself once the clone
// needs it no more. No user can choose such a name.
const HiddenPrefix = "clone/"

// Hidden reports whether the snapshot belongs to the making of a clone.
func (s *Snapshot) Hidden() bool { return strings.HasPrefix(s.Name, HiddenPrefix) }

// Clone returns a copy that shares nothing with s.
func (s *Snapshot) Clone() Snapshot {
	c := *s
	c.Params = maps.Clone(s.Params)
	return c
}

// Source is what a volume began as a copy of. Until it is Flattened, replicas of the volume read blocks of the
// snapshot's volume that lie on the same disk, and the snapshot stays.
type Source struct {
	Snapshot   trivet.SnapshotID `json:"snapshot"`
	Volume     trivet.VolumeID   `json:"volume"`     // of the snapshot
	Generation trivet.Generation `json:"generation"` // of the snapshot
	// Flat are the replicas that have all blocks themselves; empty once Flattened.
	Flat      []trivet.ReplicaID `json:"flat,omitempty"`
	Flattened bool               `json:"flattened,omitempty"` // all have
}

func (s *Source) clone() *Source {
	if s == nil {
		return nil
	}
	c := *s
	c.Flat = slices.Clone(s.Flat)
	return &c
}

func (s *Source) validate(replicaN, want int) error {
	switch {
	case s == nil:
		return nil
	case s.Snapshot == 0 || s.Volume != 0 || s.Generation != 0 || s.Flat != nil || s.Flattened:
		return fmt.Errorf("source: want a snapshot and nothing else: %w", trivet.ErrInvalid)
	case replicaN > want:
		return fmt.Errorf("%d replicas where %d are wanted: %w", replicaN, want, trivet.ErrInvalid)
	}
	return validateCount(want)
}

// Rollback says to what a volume in PhaseRestoring is brought back.
type Rollback struct {
	Snapshot trivet.SnapshotID `json:"snapshot"`
	Before   Phase             `json:"before"` // the volume's phase before and after
}

// Snapshot returns the snapshot with that ID, and whether there is one.
func (s *State) Snapshot(id trivet.SnapshotID) (Snapshot, bool) {
	snap, ok := s.snaps.get(id)
	if !ok {
		return Snapshot{}, false
	}
	return snap.Clone(), true
}

// SnapshotByName returns the snapshot that holds the name. One being deleted holds it no longer.
func (s *State) SnapshotByName(name string) (Snapshot, bool) {
	id, ok := s.snapNames.get(name)
	if !ok {
		return Snapshot{}, false
	}
	return s.Snapshot(id)
}

// Snapshots returns every snapshot, sorted by ID, hidden ones and those being deleted included.
func (s *State) Snapshots() []Snapshot {
	if s.snaps.n == 0 {
		return nil
	}
	out := make([]Snapshot, 0, s.snaps.n)
	s.snaps.each(func(_ trivet.SnapshotID, snap *Snapshot) { out = append(out, snap.Clone()) })
	slices.SortFunc(out, func(a, b Snapshot) int { return cmp.Compare(a.ID, b.ID) })
	return out
}

// SnapshotsOf returns the snapshots of a volume, sorted by ID.
func (s *State) SnapshotsOf(id trivet.VolumeID) []Snapshot {
	ids, _ := s.snapsOf.get(id)
	out := make([]Snapshot, 0, len(ids))
	for _, id := range ids {
		if snap, ok := s.Snapshot(id); ok {
			out = append(out, snap)
		}
	}
	return out
}

// CreatingSnapshots returns the snapshots that are still to be made, sorted by ID. It costs nothing when there are
// none.
func (s *State) CreatingSnapshots() []Snapshot {
	var out []Snapshot
	for _, id := range s.creating {
		if snap, ok := s.Snapshot(id); ok {
			out = append(out, snap)
		}
	}
	return out
}

// ClonesOf returns the volumes that began as copies of a snapshot and still need it, sorted.
func (s *State) ClonesOf(id trivet.SnapshotID) []trivet.VolumeID {
	ids, _ := s.clonesOf.get(id)
	return slices.Clone(ids)
}

// insertID returns ids, which is sorted, with id. It changes nothing in place.
func insertID[T ~uint64](ids []T, id T) []T {
	i, found := slices.BinarySearch(ids, id)
	if found {
		return ids
	}
	return slices.Insert(slices.Clone(ids), i, id)
}

// removeID is the inverse of insertID.
func removeID[T ~uint64](ids []T, id T) []T {
	i, found := slices.BinarySearch(ids, id)
	if !found {
		return ids
	}
	return slices.Delete(slices.Clone(ids), i, i+1)
}

// snapshots adds what an image has of them.
func (im *image) snapshots(s *State) error {
	for i := range im.Snapshots {
		snap := im.Snapshots[i].Clone()
		snap.Created = instant(snap.Created)
		if _, ok := s.snaps.get(snap.ID); ok {
			return fmt.Errorf("%s is there twice: %w", snap.ID, trivet.ErrCorrupt)
		}
		s.snaps.fill(snap.ID, &snap)
		of, _ := s.snapsOf.get(snap.Volume)
		s.snapsOf.fill(snap.Volume, insertID(of, snap.ID))
		if snap.State == SnapshotCreating {
			s.creating = insertID(s.creating, snap.ID)
		}
		if snap.State == SnapshotDeleting {
			continue
		}
		if other, ok := s.snapNames.get(snap.Name); ok {
			return fmt.Errorf("%s and %s have the name %q: %w", other, snap.ID, snap.Name, trivet.ErrCorrupt)
		}
		s.snapNames.fill(snap.Name, snap.ID)
	}
	return nil
}

// checkSnapshots returns ErrCorrupt for a snapshot that cannot be.
func (s *State) checkSnapshots() error {
	var err error
	s.snaps.each(func(id trivet.SnapshotID, snap *Snapshot) {
		v, ok := s.volumes.get(snap.Volume)
		problem := ""
		switch {
		case id == 0:
			problem = "id is zero"
		case !ok:
			problem = fmt.Sprintf("its volume %s is unknown", snap.Volume)
		case v.Phase == PhaseDeleting:
			problem = fmt.Sprintf("its volume %s is %s", snap.Volume, v.Phase)
		case snap.Revision > s.revision:
			problem = "revision lies in the future"
		case snap.SizeBytes < 0 || snap.SizeBytes%trivet.BlockSize != 0:
			problem = fmt.Sprintf("size of %d bytes", snap.SizeBytes)
		}
		switch snap.State {
		case SnapshotCreating, SnapshotReady, SnapshotFailed, SnapshotDeleting:
		default:
			problem = fmt.Sprintf("state %q is unknown", snap.State)
		}
		if problem != "" && err == nil {
			err = fmt.Errorf("%s: %s: %w", id, problem, trivet.ErrCorrupt)
		}
	})
	return err
}

// copyProblem names the first invariant that v breaks as the source or the copy of something.
func (s *State) copyProblem(v *Volume) string {
	snaps, _ := s.snapsOf.get(v.ID)
	switch {
	case v.Phase == PhaseKept && len(snaps) == 0:
		return "kept for no snapshot"
	case (v.Rollback != nil) != (v.Phase == PhaseRestoring):
		return fmt.Sprintf("rollback %v while %s", v.Rollback, v.Phase)
	case v.Rollback != nil && !slices.Contains(snaps, v.Rollback.Snapshot):
		return fmt.Sprintf("is brought back to %s, which is not its own", v.Rollback.Snapshot)
	}
	src := v.Source
	if src == nil {
		return ""
	}
	if src.Flattened {
		if len(src.Flat) > 0 {
			return "is flattened and lists replicas that are"
		}
		return ""
	}
	if snap, ok := s.snaps.get(src.Snapshot); !ok || snap.Volume != src.Volume || snap.Generation != src.Generation {
		return fmt.Sprintf("is a copy of %s at generation %d of %s, which is unknown", src.Snapshot, src.Generation,
			src.Volume)
	}
	return ""
}
