package controller

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller/meta"
)

// orphanAfter is how long the hidden snapshot of a clone is kept that was never made.
const orphanAfter = 10 * time.Minute

// CopyOf names what a volume begins as a copy of: at most one of the two.
type CopyOf struct {
	Snapshot trivet.SnapshotID
	Volume   trivet.VolumeID // as it is when the volume is made
}

// String is part of the request that a volume was made for; empty for none.
func (f CopyOf) String() string {
	switch {
	case f.Snapshot != 0:
		return "/" + f.Snapshot.String()
	case f.Volume != 0:
		return "/" + f.Volume.String()
	}
	return ""
}

// takeSource finds, or makes, the snapshot that a new volume is a copy of, and takes size and parameters from it where
// none are given. A volume of that name which exists needs none: what it is was decided when it was made, and the
// source may have grown since, have other parameters, or be gone.
func (c *Controller) takeSource(ctx context.Context, w *creation) error {
	if w.Source == (CopyOf{}) {
		return nil
	}
	if w.Source.Snapshot != 0 && w.Source.Volume != 0 {
		return fmt.Errorf("two sources are given, %s and %s: %w", w.Source.Snapshot, w.Source.Volume, trivet.ErrInvalid)
	}
	s, err := c.store.Read(ctx)
	if err != nil {
		return err
	}
	if v, exists := s.VolumeByName(w.Name); exists {
		w.there = true
		if len(w.Params) == 0 && strings.HasSuffix(v.Request, w.Source.String()) {
			w.request = v.Request
		}
		return nil
	}
	from, ok, err := c.sourceOf(ctx, s, w)
	if err != nil || !ok {
		return err
	}
	if len(w.Params) == 0 {
		w.Params = from.Params
	}
	if w.Params, err = WithMutable(w.Params, w.Mutable); err != nil {
		return err
	}
	w.from = &from
	return w.fitSource(from.SizeBytes)
}

// sourceOf returns the snapshot that a new volume is a copy of, which it makes if that is a volume. False: there is no
// such source, or it has been deleted.
func (c *Controller) sourceOf(ctx context.Context, s *meta.State, w *creation) (
	from meta.Snapshot, ok bool, err error,
) {
	if w.Source.Volume == 0 {
		from, ok = s.Snapshot(w.Source.Snapshot)
		if ok && from.State == meta.SnapshotCreating {
			from, err = c.awaitSnapshot(ctx, from.ID, s.Revision())
		}
		return from, ok && from.State != meta.SnapshotDeleting, err
	}
	v, ok := s.Volume(w.Source.Volume)
	if !ok {
		return from, false, nil
	}
	trial := *w // what does not fit is refused before a snapshot is made for it
	if err := trial.fitSource(v.SizeBytes); err != nil {
		return from, false, err
	}
	if from, err = c.createSnapshot(ctx, v.ID, meta.HiddenPrefix+w.Name); err != nil {
		return from, false, fmt.Errorf("snapshot of %q: %w", v.Name, err)
	}
	return from, true, nil
}

// fitSource makes the size at least that of the source.
func (w *creation) fitSource(sizeBytes int64) error {
	switch {
	case w.RequiredBytes == 0 && (w.LimitBytes == 0 || w.LimitBytes >= sizeBytes):
		w.RequiredBytes = sizeBytes
	case max(w.RequiredBytes, w.LimitBytes) < sizeBytes:
		return fmt.Errorf("size of %d bytes: its source has %d; ask for at least that: %w",
			max(w.RequiredBytes, w.LimitBytes), sizeBytes, trivet.ErrOutOfRange)
	case w.RequiredBytes < sizeBytes && w.LimitBytes == 0:
		return fmt.Errorf("size of %d bytes: its source has %d; ask for at least that: %w", w.RequiredBytes, sizeBytes,
			trivet.ErrOutOfRange)
	default:
		w.RequiredBytes = max(w.RequiredBytes, sizeBytes)
	}
	return nil
}

// placeBeside puts the replicas of a copy on the disks of the source's ready replicas, for they share blocks until
// the copy is flattened. It takes fewer than are wanted if there are no more, but a majority of them: the mender adds
// the rest. The first, which is meant to lead, lies in a requisite segment, or it is ErrNoSpace, and in the best
// preferred one that there is.
func (w *creation) placeBeside(s *meta.State, now time.Time) ([]meta.Replica, error) {
	parent, ok := s.Volume(w.from.Volume)
	if !ok {
		return nil, fmt.Errorf("volume %s of snapshot %q: %w", w.from.Volume, w.from.Name, trivet.ErrNotFound)
	}
	var out []meta.Replica
	for _, r := range parent.Replicas {
		n, known := s.Node(r.Node)
		there := known && slices.ContainsFunc(n.Disks, func(d meta.Disk) bool { return d.ID == r.Disk })
		if r.State == meta.ReplicaReady && there && n.Alive(now) && !w.avoid[r.Node] {
			out = append(out, meta.Replica{
				ID: trivet.ReplicaID(trivet.NewUUID()), Node: r.Node, Disk: r.Disk, State: meta.ReplicaCreating,
			})
		}
	}
	slices.SortStableFunc(out, func(a, b meta.Replica) int { return slices.Compare(w.ranks(s, a), w.ranks(s, b)) })
	if len(out) > 0 && w.ranks(s, out[0])[0] > 0 {
		return nil, fmt.Errorf("none of the %d replicas of %q, where its blocks are, is in the required topology: %w",
			len(out), w.from.VolumeName, trivet.ErrNoSpace)
	}
	out = out[:min(len(out), w.params.Replicas)]
	if could := min(len(parent.Replicas), w.params.Replicas); 2*len(out) <= could {
		return nil, fmt.Errorf("%d of the %d replicas of %q, where its blocks are, are ready on living nodes; a majority is "+
			"needed: %w", len(out), len(parent.Replicas), w.from.VolumeName, trivet.ErrUnavailable)
	}
	return out, nil
}

// ranks orders the replicas of a copy: those outside the requisite segments last, then those on cordoned nodes, then
// by preferred segment.
func (w *creation) ranks(s *meta.State, r meta.Replica) []int {
	ranks := make([]int, 3)
	n, _ := s.Node(r.Node)
	if len(w.Requisite) > 0 && segmentOf(&n, w.Requisite) == len(w.Requisite) {
		ranks[0] = 1
	}
	if n.Cordoned {
		ranks[1] = 1
	}
	ranks[2] = segmentOf(&n, w.Preferred)
	return ranks
}

// CloneVolume makes a volume that begins as a copy of another, as that is at some moment of the call. Errors as of
// CreateVolume and CreateSnapshot.
func (c *Controller) CloneVolume(ctx context.Context, r CreateRequest) (meta.Volume, error) {
	v, err := c.CreateVolume(ctx, r)
	if err == nil || errors.Is(err, trivet.ErrUnavailable) || errors.Is(err, trivet.ErrPending) {
		return v, err
	}
	// It will not be made: its hidden snapshot is of no use. What is missed here, the mender finds.
	s, readErr := c.store.Read(ctx)
	if readErr != nil {
		return v, err
	}
	if snap, ok := s.SnapshotByName(meta.HiddenPrefix + r.Name); ok && len(s.ClonesOf(snap.ID)) == 0 {
		_, dropErr := c.store.Propose(ctx, meta.Command{DeleteSnapshot: &meta.DeleteSnapshot{Snapshot: snap.ID}})
		err = errors.Join(err, dropErr)
	}
	return v, err
}

// copying says why no replica of v may be moved now: blocks of it are those of a copy too, on the same disks. Nil when
// there is no copy that is not flattened.
func copying(s *meta.State, v *meta.Volume) error {
	if v.Source != nil && !v.Source.Flattened {
		return fmt.Errorf("it is a copy of %s and not flattened yet: %w", v.Source.Volume, trivet.ErrPending)
	}
	for _, snap := range s.SnapshotsOf(v.ID) {
		if clones := s.ClonesOf(snap.ID); len(clones) > 0 {
			return fmt.Errorf("its copy %s is not flattened yet: %w", clones[0], trivet.ErrPending)
		}
	}
	return nil
}

// orphans deletes hidden snapshots whose clone was given up.
func (m *mendPass) orphans(s *meta.State) []meta.Command {
	var out []meta.Command
	for _, snap := range s.Snapshots() {
		if snap.Hidden() && snap.State != meta.SnapshotDeleting && len(s.ClonesOf(snap.ID)) == 0 &&
			m.now.Sub(snap.Created) > orphanAfter {
			out = append(out, meta.Command{DeleteSnapshot: &meta.DeleteSnapshot{Snapshot: snap.ID}})
		}
	}
	return out
}
