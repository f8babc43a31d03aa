package controller

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller/meta"
)

// Snapshots returns every snapshot as it is now, sorted by ID, hidden ones and those being deleted included.
func (c *Controller) Snapshots(ctx context.Context) ([]meta.Snapshot, error) {
	s, err := c.store.Read(ctx)
	if err != nil {
		return nil, err
	}
	return s.Snapshots(), nil
}

// Snapshot returns a snapshot as it is now; ErrNotFound.
func (c *Controller) Snapshot(ctx context.Context, id trivet.SnapshotID) (meta.Snapshot, error) {
	s, err := c.store.Read(ctx)
	if err != nil {
		return meta.Snapshot{}, err
	}
	snap, ok := s.Snapshot(id)
	if !ok {
		return meta.Snapshot{}, fmt.Errorf("snapshot %s: %w", id, trivet.ErrNotFound)
	}
	return snap, nil
}

// SnapshotByName returns the snapshot that holds a name; ErrNotFound.
func (c *Controller) SnapshotByName(ctx context.Context, name string) (meta.Snapshot, error) {
	s, err := c.store.Read(ctx)
	if err != nil {
		return meta.Snapshot{}, err
	}
	snap, ok := s.SnapshotByName(name)
	if !ok {
		return meta.Snapshot{}, fmt.Errorf("snapshot %q: %w", name, trivet.ErrNotFound)
	}
	return snap, nil
}

// CreateSnapshot makes a snapshot of a volume, attached or not, and returns it once it is Ready: whatever was
// acknowledged to the volume's user before the call is in it, cached or not, and nothing that was written after the
// return. The same again returns the same.
//
// ErrNotFound: no such volume. ErrExists: another volume's snapshot has that name. ErrPending: the volume is being
// created, brought back to a snapshot, or recovered. ErrInvalid: its phase. ErrNoSpace: it has as many snapshots as it
// may. ErrUnavailable: not in time; it will come to be, and the same call waits for it.
func (c *Controller) CreateSnapshot(ctx context.Context, volume trivet.VolumeID, name string) (meta.Snapshot, error) {
	if err := trivet.ValidateName(name); err != nil {
		return meta.Snapshot{}, fmt.Errorf("create snapshot: %w", err)
	}
	snap, err := c.createSnapshot(ctx, volume, name)
	if err != nil {
		return meta.Snapshot{}, fmt.Errorf("create snapshot %q of %s: %w", name, volume, err)
	}
	return snap, nil
}

func (c *Controller) createSnapshot(ctx context.Context, volume trivet.VolumeID, name string) (meta.Snapshot, error) {
	unlock, err := c.busy.lock("snapshot name " + name)
	if err != nil {
		return meta.Snapshot{}, err
	}
	defer unlock()
	for {
		s, err := c.store.Read(ctx)
		if err != nil {
			return meta.Snapshot{}, err
		}
		have, named := s.SnapshotByName(name)
		if named && have.Volume == volume {
			return c.awaitSnapshot(ctx, have.ID, s.Revision())
		}
		v, err := lookUp(s, volume)
		if err != nil {
			return meta.Snapshot{}, err
		}
		res, err := c.store.Propose(ctx, meta.Command{CreateSnapshot: &meta.CreateSnapshot{
			Snapshot:   meta.Snapshot{ID: trivet.NewSnapshotID(), Name: name, Volume: volume, Created: time.Now()},
			IfRevision: v.Revision,
		}})
		switch {
		case errors.Is(err, trivet.ErrPending) && !occupied(&v):
			continue // the volume has changed since it was read
		case err != nil:
			return meta.Snapshot{}, err
		case res.Snapshot == nil:
			return meta.Snapshot{}, fmt.Errorf("catalogue returned no snapshot: %w", trivet.ErrUnavailable)
		}
		return c.awaitSnapshot(ctx, res.Snapshot.ID, res.Revision)
	}
}

// awaitSnapshot waits until a snapshot is Ready.
func (c *Controller) awaitSnapshot(ctx context.Context, id trivet.SnapshotID, since meta.Revision,
) (snap meta.Snapshot, err error) {
	err = c.await(ctx, fmt.Sprintf("freeze of %s", id), since, func(s *meta.State) (bool, error) {
		var ok bool
		snap, ok = s.Snapshot(id)
		switch {
		case !ok || snap.State == meta.SnapshotDeleting:
			return false, fmt.Errorf("%s was deleted meanwhile: %w", id, trivet.ErrUnavailable)
		case snap.State == meta.SnapshotFailed:
			return false, fmt.Errorf("%s failed: %s; delete it, and try again: %w", id, snap.Reason, trivet.ErrNoSpace)
		}
		return snap.State == meta.SnapshotReady, nil
	})
	return snap, err
}

// DeleteSnapshot deletes a snapshot, and returns once the volume's group has dropped it; the space comes back in the
// background. One that a clone still needs is dropped once that is flattened: then it returns at once. Unknown: nil.
// ErrPending while the volume is brought back to it.
func (c *Controller) DeleteSnapshot(ctx context.Context, id trivet.SnapshotID) error {
	res, err := c.store.Propose(ctx, meta.Command{DeleteSnapshot: &meta.DeleteSnapshot{Snapshot: id}})
	if err != nil {
		return err
	}
	return c.await(ctx, fmt.Sprintf("delete %s", id), res.Revision, func(s *meta.State) (bool, error) {
		_, ok := s.Snapshot(id)
		return !ok || len(s.ClonesOf(id)) > 0, nil
	})
}

// RestoreInPlace brings a volume back to one of its snapshots: what was written since is gone, unless a later
// snapshot has it. It returns once that is so. ErrNotFound: no such snapshot; ErrInUse names the node that holds the
// volume; ErrInvalid: the snapshot or the volume is not in a state for it.
func (c *Controller) RestoreInPlace(ctx context.Context, id trivet.SnapshotID) (meta.Volume, error) {
	what := fmt.Sprintf("restore %s in place", id)
	for {
		s, err := c.store.Read(ctx)
		if err != nil {
			return meta.Volume{}, fmt.Errorf("%s: %w", what, err)
		}
		snap, ok := s.Snapshot(id)
		if !ok {
			return meta.Volume{}, fmt.Errorf("%s: %w", what, trivet.ErrNotFound)
		}
		v, err := lookUp(s, snap.Volume)
		if err != nil {
			return meta.Volume{}, fmt.Errorf("%s: %w", what, err)
		}
		since := s.Revision()
		if v.Rollback == nil || v.Rollback.Snapshot != id { // else it is under way
			res, err := c.store.Propose(ctx, meta.Command{Restore: &meta.Restore{Snapshot: id, IfRevision: v.Revision}})
			if errors.Is(err, trivet.ErrPending) && !occupied(&v) {
				continue // it has changed since it was read
			}
			if err != nil {
				return meta.Volume{}, err
			}
			since = res.Revision
		}
		err = c.await(ctx, what, since, func(s *meta.State) (bool, error) {
			v, err = lookUp(s, snap.Volume)
			return v.Phase != meta.PhaseRestoring, err
		})
		return v, err
	}
}
