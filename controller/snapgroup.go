package controller

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller/meta"
)

// SnapshotGroup is a group of snapshots, with its snapshots in the order of its members; those that are gone, of a group
// that is Failed or Deleting, are left out.
type SnapshotGroup struct {
	meta.SnapshotGroup

	Snapshots []meta.Snapshot
}

// SnapshotGroups returns every group of snapshots as it is now, sorted by ID, those being deleted included.
func (c *Controller) SnapshotGroups(ctx context.Context) ([]SnapshotGroup, error) {
	s, err := c.store.Read(ctx)
	if err != nil {
		return nil, err
	}
	var out []SnapshotGroup
	for _, g := range s.SnapshotGroups() {
		out = append(out, groupIn(s, g))
	}
	return out, nil
}

// SnapshotGroup returns a group of snapshots as it is now; ErrNotFound.
func (c *Controller) SnapshotGroup(ctx context.Context, id trivet.SnapshotGroupID) (SnapshotGroup, error) {
	s, err := c.store.Read(ctx)
	if err != nil {
		return SnapshotGroup{}, err
	}
	g, ok := s.SnapshotGroup(id)
	if !ok {
		return SnapshotGroup{}, fmt.Errorf("group %s: %w", id, trivet.ErrNotFound)
	}
	return groupIn(s, g), nil
}

// SnapshotGroupByName is SnapshotGroup for the group that holds a name.
func (c *Controller) SnapshotGroupByName(ctx context.Context, name string) (SnapshotGroup, error) {
	s, err := c.store.Read(ctx)
	if err != nil {
		return SnapshotGroup{}, err
	}
	g, ok := s.SnapshotGroupByName(name)
	if !ok {
		return SnapshotGroup{}, fmt.Errorf("group %q: %w", name, trivet.ErrNotFound)
	}
	return groupIn(s, g), nil
}

func groupIn(s *meta.State, g meta.SnapshotGroup) SnapshotGroup {
	out := SnapshotGroup{SnapshotGroup: g}
	for _, m := range g.Members {
		if snap, ok := s.Snapshot(m.Snapshot); ok {
			out.Snapshots = append(out.Snapshots, snap)
		}
	}
	return out
}

// CreateSnapshotGroup makes snapshots of several volumes at one point, attached or not, and returns the group and its
// snapshots, in the order of volumes, once all are Ready. A write that was acknowledged on any of the volumes before a
// write on any other was begun is in its snapshot if the other is in its own. Writes to the volumes are held for
// that, for milliseconds. The same name and volumes again return the same.
//
// ErrNotFound, ErrInvalid, ErrNoSpace: as of CreateSnapshot, of any of the volumes. ErrExists: the name is that of a
// group of other volumes. ErrPending: a volume is being created, or on its way to a node or from one, for as long as ctx
// lasts. ErrUnavailable with a group that is Failed: its reason is in the error, none of its snapshots is left, and it has to
// be deleted before the name can be used for another attempt. ErrUnavailable without: not in time; the same call
// waits for it.
func (c *Controller) CreateSnapshotGroup(ctx context.Context, name string, volumes []trivet.VolumeID) (SnapshotGroup, error) {
	g, err := c.createSnapshotGroup(ctx, name, volumes)
	if err != nil {
		err = fmt.Errorf("create snapshot group %q: %w", name, err)
	}
	return g, err
}

func (c *Controller) createSnapshotGroup(ctx context.Context, name string, volumes []trivet.VolumeID) (SnapshotGroup, error) {
	unlock, err := c.busy.lock("snapshot group " + name)
	if err != nil {
		return SnapshotGroup{}, err
	}
	defer unlock()
	for {
		changed := c.store.Changed()
		s, err := c.store.Read(ctx)
		if err != nil {
			return SnapshotGroup{}, err
		}
		if g, ok := s.SnapshotGroupByName(name); ok && g.Of(volumes) {
			return c.awaitSnapshotGroup(ctx, g.ID, s.Revision())
		}
		command, err := newSnapshotGroup(s, name, volumes)
		if err != nil {
			return SnapshotGroup{}, err
		}
		res, err := c.store.Propose(ctx, meta.Command{CreateSnapshotGroup: command})
		switch {
		case errors.Is(err, trivet.ErrPending):
			// A volume has changed since it was read, or has to be fenced first.
			select {
			case <-changed:
				continue
			case <-ctx.Done():
				return SnapshotGroup{}, err
			}
		case err != nil:
			return SnapshotGroup{}, err
		case res.Group == nil:
			return SnapshotGroup{}, fmt.Errorf("catalogue returned no group: %w", trivet.ErrUnavailable)
		}
		return c.awaitSnapshotGroup(ctx, res.Group.ID, res.Revision)
	}
}

func newSnapshotGroup(s *meta.State, name string, volumes []trivet.VolumeID) (*meta.CreateSnapshotGroup, error) {
	c := &meta.CreateSnapshotGroup{ID: trivet.NewSnapshotGroupID(), Name: name, Created: time.Now()}
	for _, id := range volumes {
		v, err := lookUp(s, id)
		if err != nil {
			return nil, err
		}
		if v.Phase == meta.PhaseCreating || v.Phase == meta.PhaseRestoring {
			return nil, fmt.Errorf("volume %q is %s: %w", v.Name, v.Phase, trivet.ErrPending)
		}
		c.Members = append(c.Members, meta.NewMember{
			Snapshot: trivet.NewSnapshotID(), Volume: id, IfRevision: v.Revision,
		})
	}
	return c, nil
}

// awaitSnapshotGroup waits until a group is Ready.
func (c *Controller) awaitSnapshotGroup(ctx context.Context, id trivet.SnapshotGroupID, since meta.Revision) (
	g SnapshotGroup, err error,
) {
	err = c.await(ctx, fmt.Sprintf("freeze of %s", id), since, func(s *meta.State) (bool, error) {
		now, ok := s.SnapshotGroup(id)
		g = groupIn(s, now)
		switch {
		case !ok || g.State == meta.GroupDeleting:
			return false, fmt.Errorf("%s was deleted meanwhile: %w", id, trivet.ErrUnavailable)
		case g.State == meta.GroupFailed:
			return false, fmt.Errorf("%s failed: %s; delete it, and try again: %w", id, g.Reason, trivet.ErrUnavailable)
		}
		return g.State == meta.GroupReady, nil
	})
	return g, err
}

// DeleteSnapshotGroup deletes a group with all its snapshots, and returns once the volumes' groups have dropped them.
// Those that a clone still needs are dropped once that is flattened: they are not waited for. Unknown: nil. ErrPending while
// a volume is brought back to one of them.
func (c *Controller) DeleteSnapshotGroup(ctx context.Context, id trivet.SnapshotGroupID) error {
	res, err := c.store.Propose(ctx, meta.Command{DeleteSnapshotGroup: &meta.DeleteSnapshotGroup{Group: id}})
	if err != nil {
		return err
	}
	return c.await(ctx, fmt.Sprintf("delete %s", id), res.Revision, func(s *meta.State) (bool, error) {
		g, ok := s.SnapshotGroup(id)
		if !ok {
			return true, nil
		}
		return !slices.ContainsFunc(groupIn(s, g).Snapshots, func(snap meta.Snapshot) bool {
			return len(s.ClonesOf(snap.ID)) == 0
		}), nil
	})
}
