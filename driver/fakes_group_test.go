package driver_test

import (
	"context"
	"fmt"
	"time"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller"
	"github.com/trivet-csi/trivet/controller/meta"
)

func (c *fakeController) CreateSnapshotGroup(ctx context.Context, name string, volumes []trivet.VolumeID,
) (controller.SnapshotGroup, error) {
	if err := c.run(ctx, "CreateSnapshotGroup", name); err != nil {
		return controller.SnapshotGroup{}, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if g := c.groupLocked(name); g != nil {
		switch {
		case !g.Of(volumes):
			return controller.SnapshotGroup{}, fmt.Errorf("create snapshot group %q: of other volumes: %w", name,
				trivet.ErrExists)
		case g.State == meta.GroupFailed:
			return controller.SnapshotGroup{}, fmt.Errorf("create snapshot group %q: it failed: %w", name,
				trivet.ErrUnavailable)
		}
		return c.wholeLocked(g), nil
	}
	g := &meta.SnapshotGroup{
		ID: trivet.NewSnapshotGroupID(), Name: name, State: meta.GroupReady, Created: time.Unix(1_700_000_000, 0),
	}
	for _, id := range volumes {
		v, ok := c.volumes[id]
		if !ok {
			return controller.SnapshotGroup{}, fmt.Errorf("create snapshot group %q: %s: %w", name, id, trivet.ErrNotFound)
		}
		s := &meta.Snapshot{
			ID: trivet.NewSnapshotID(), Name: meta.MemberName(name, v.Name), Volume: id, State: meta.SnapshotReady,
			SizeBytes: v.SizeBytes, Created: g.Created, Group: g.ID,
		}
		c.snaps[s.ID] = s
		g.Members = append(g.Members, meta.GroupMember{Snapshot: s.ID, Volume: id})
	}
	c.groups[g.ID] = g
	return c.wholeLocked(g), nil
}

func (c *fakeController) groupLocked(name string) *meta.SnapshotGroup {
	for _, g := range c.groups {
		if g.Name == name && g.State != meta.GroupDeleting {
			return g
		}
	}
	return nil
}

func (c *fakeController) wholeLocked(g *meta.SnapshotGroup) controller.SnapshotGroup {
	out := controller.SnapshotGroup{SnapshotGroup: *g}
	for _, m := range g.Members {
		if s, ok := c.snaps[m.Snapshot]; ok {
			out.Snapshots = append(out.Snapshots, *s)
		}
	}
	return out
}

func (c *fakeController) DeleteSnapshotGroup(ctx context.Context, id trivet.SnapshotGroupID) error {
	if err := c.run(ctx, "DeleteSnapshotGroup", id); err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if g, ok := c.groups[id]; ok {
		for _, m := range g.Members {
			delete(c.snaps, m.Snapshot)
		}
	}
	delete(c.groups, id)
	return nil
}

func (c *fakeController) SnapshotGroup(ctx context.Context, id trivet.SnapshotGroupID,
) (controller.SnapshotGroup, error) {
	if err := c.run(ctx, "SnapshotGroup", id); err != nil {
		return controller.SnapshotGroup{}, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	g, ok := c.groups[id]
	if !ok {
		return controller.SnapshotGroup{}, fmt.Errorf("group %s: %w", id, trivet.ErrNotFound)
	}
	return c.wholeLocked(g), nil
}

func (c *fakeController) SnapshotGroupByName(ctx context.Context, name string,
) (controller.SnapshotGroup, error) {
	if err := c.run(ctx, "SnapshotGroupByName", name); err != nil {
		return controller.SnapshotGroup{}, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	g := c.groupLocked(name)
	if g == nil {
		return controller.SnapshotGroup{}, fmt.Errorf("group %q: %w", name, trivet.ErrNotFound)
	}
	return c.wholeLocked(g), nil
}

// putGroup adds a group of one snapshot as it stands.
func (c *fakeController) putGroup(state meta.SnapshotGroupState, volume trivet.VolumeID) meta.SnapshotGroup {
	g := meta.SnapshotGroup{ID: trivet.NewSnapshotGroupID(), Name: "g", State: state, Created: time.Unix(1_700_000_000, 0)}
	s := meta.Snapshot{Name: "g/v", Volume: volume, State: meta.SnapshotCreating, Group: g.ID}
	switch state {
	case meta.GroupReady:
		s.State = meta.SnapshotReady
	case meta.GroupFailed, meta.GroupDeleting:
		s.State = meta.SnapshotDeleting
	case meta.GroupCreating, meta.GroupFreezing:
	}
	s = c.putSnapshot(s)
	g.Members = []meta.GroupMember{{Snapshot: s.ID, Volume: volume}}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.groups[g.ID] = &g
	return g
}
