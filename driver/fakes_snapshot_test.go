package driver_test

import (
	"context"
	"fmt"
	"path/filepath"
	"time"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller"
	"github.com/trivet-csi/trivet/controller/meta"
)

const fakeSize = 64 << 20 // of a volume for which no size is asked

// sizeLocked is the size of a new volume by the rules of the real controller.
func (c *fakeController) sizeLocked(r *controller.CreateRequest) (int64, error) {
	var source int64
	switch {
	case r.Source.Snapshot != 0:
		s, ok := c.snaps[r.Source.Snapshot]
		if !ok || s.State == meta.SnapshotDeleting {
			return 0, fmt.Errorf("create volume %q: source %s: %w", r.Name, r.Source, trivet.ErrNotFound)
		}
		source = s.SizeBytes
	case r.Source.Volume != 0:
		v, ok := c.volumes[r.Source.Volume]
		if !ok {
			return 0, fmt.Errorf("create volume %q: source %s: %w", r.Name, r.Source, trivet.ErrNotFound)
		}
		if v.Phase == meta.PhaseKept {
			return 0, fmt.Errorf("create volume %q: source is %s: %w", r.Name, v.Phase, trivet.ErrInvalid)
		}
		source = v.SizeBytes
	default:
		return max(r.RequiredBytes, fakeSize), nil
	}
	if r.RequiredBytes > 0 && r.RequiredBytes < source || r.LimitBytes > 0 && r.LimitBytes < source {
		return 0, fmt.Errorf("create volume %q: its source has %d bytes: %w", r.Name, source, trivet.ErrOutOfRange)
	}
	return max(r.RequiredBytes, source), nil
}

func (c *fakeController) CloneVolume(ctx context.Context, r controller.CreateRequest) (meta.Volume, error) {
	if err := c.run(ctx, "CloneVolume", r); err != nil {
		return meta.Volume{}, err
	}
	return c.CreateVolume(ctx, r)
}

func (c *fakeController) CreateSnapshot(ctx context.Context, id trivet.VolumeID, name string) (meta.Snapshot, error) {
	if err := c.run(ctx, "CreateSnapshot", name); err != nil {
		return meta.Snapshot{}, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, s := range c.snaps {
		switch {
		case s.Name != name || s.State == meta.SnapshotDeleting:
		case s.Volume != id:
			return meta.Snapshot{}, fmt.Errorf("create snapshot %q: it is of %s: %w", name, s.Volume, trivet.ErrExists)
		case s.State == meta.SnapshotFailed:
			return meta.Snapshot{}, fmt.Errorf("create snapshot %q: failed: %w", name, trivet.ErrNoSpace)
		default:
			return *s, nil
		}
	}
	v, ok := c.volumes[id]
	if !ok {
		return meta.Snapshot{}, fmt.Errorf("create snapshot %q of %s: %w", name, id, trivet.ErrNotFound)
	}
	s := meta.Snapshot{
		ID: trivet.NewSnapshotID(), Name: name, Volume: id, State: meta.SnapshotReady, SizeBytes: v.SizeBytes,
		Created: time.Now(),
	}
	c.snaps[s.ID] = &s
	return s, nil
}

func (c *fakeController) DeleteSnapshot(ctx context.Context, id trivet.SnapshotID) error {
	if err := c.run(ctx, "DeleteSnapshot", id); err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if s, ok := c.snaps[id]; ok && s.Group != 0 {
		return fmt.Errorf("delete %s: it belongs to %s: %w", id, s.Group, trivet.ErrInUse)
	}
	delete(c.snaps, id)
	return nil
}

func (c *fakeController) Snapshot(ctx context.Context, id trivet.SnapshotID) (meta.Snapshot, error) {
	if err := c.run(ctx, "Snapshot", id); err != nil {
		return meta.Snapshot{}, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	s, ok := c.snaps[id]
	if !ok {
		return meta.Snapshot{}, fmt.Errorf("snapshot %s: %w", id, trivet.ErrNotFound)
	}
	return *s, nil
}

func (c *fakeController) SnapshotByName(ctx context.Context, name string) (meta.Snapshot, error) {
	if err := c.run(ctx, "SnapshotByName", name); err != nil {
		return meta.Snapshot{}, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, s := range c.snaps {
		if s.Name == name && s.State != meta.SnapshotDeleting {
			return *s, nil
		}
	}
	return meta.Snapshot{}, fmt.Errorf("snapshot %q: %w", name, trivet.ErrNotFound)
}

func (c *fakeController) Snapshots(ctx context.Context) ([]meta.Snapshot, error) {
	if err := c.run(ctx, "Snapshots", nil); err != nil {
		return nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	var out []meta.Snapshot
	for _, s := range c.snaps {
		out = append(out, *s)
	}
	return out, nil
}

// putSnapshot adds a snapshot as it stands.
func (c *fakeController) putSnapshot(s meta.Snapshot) meta.Snapshot {
	c.mu.Lock()
	defer c.mu.Unlock()
	if s.ID == 0 {
		s.ID = trivet.NewSnapshotID()
	}
	s.Created = time.Unix(1_700_000_000, 0)
	c.snaps[s.ID] = &s
	return s
}

// expandArgs is what a hook on ExpandVolume sees.
type expandArgs struct{ required, limit int64 }

func (c *fakeController) ExpandVolume(ctx context.Context, id trivet.VolumeID, required, limit int64,
) (meta.Volume, error) {
	if err := c.run(ctx, "ExpandVolume", expandArgs{required, limit}); err != nil {
		return meta.Volume{}, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	v, ok := c.volumes[id]
	switch {
	case !ok:
		return meta.Volume{}, fmt.Errorf("expand %s: %w", id, trivet.ErrNotFound)
	case limit > 0 && v.SizeBytes > limit:
		return meta.Volume{}, fmt.Errorf("expand %s to at most %d bytes: it has %d: %w", id, limit, v.SizeBytes,
			trivet.ErrOutOfRange)
	}
	v.SizeBytes = max(v.SizeBytes, required)
	return *v, nil
}

func (n *fakeNode) Expand(ctx context.Context, id trivet.VolumeID, path string, required int64) (int64, error) {
	if err := n.run(ctx, "Expand", path); err != nil {
		return 0, err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	s, staged := n.staged[id]
	p, published := n.published[filepath.Clean(path)]
	if (!staged || s.StagingPath != path) && (!published || p.Volume != id) {
		return 0, fmt.Errorf("volume %s is not at %q: %w", id, path, trivet.ErrNotFound)
	}
	n.sizes[id] = max(n.sizes[id], required, fakeSize)
	return n.sizes[id], nil
}
