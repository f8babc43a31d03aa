package server

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/api"
	"github.com/trivet-csi/trivet/controller"
)

// findGroup returns the group of snapshots with a name or, when none has it, with that ID.
func (a *admin) findGroup(ctx context.Context, name string) (controller.SnapshotGroup, error) {
	if name == "" {
		return controller.SnapshotGroup{}, fmt.Errorf("group name is missing: %w", trivet.ErrInvalid)
	}
	g, err := a.s.controller.SnapshotGroupByName(ctx, name)
	if !errors.Is(err, trivet.ErrNotFound) {
		return g, err
	}
	id, parseErr := trivet.ParseSnapshotGroupID(name)
	if parseErr != nil {
		return g, fmt.Errorf("%w; `trivet snapshot list` shows those there are", err)
	}
	return a.s.controller.SnapshotGroup(ctx, id)
}

func (a *admin) group(g *controller.SnapshotGroup) *api.SnapshotGroup {
	out := &api.SnapshotGroup{
		Id: g.ID.String(), Name: g.Name, State: string(g.State), Reason: g.Reason,
		Created: g.Created.Format(time.RFC3339), HeldSeconds: g.Held.Seconds(),
	}
	for i := range g.Snapshots {
		out.Snapshots = append(out.Snapshots, a.snapshot(&g.Snapshots[i]))
	}
	return out
}

// CreateSnapshotGroup implements api.AdminServer.
func (a *admin) CreateSnapshotGroup(ctx context.Context, r *api.CreateSnapshotGroupRequest) (
	*api.SnapshotGroup, error,
) {
	var volumes []trivet.VolumeID
	for _, name := range r.GetVolumes() {
		v, err := a.find(ctx, name)
		if err != nil {
			return nil, err
		}
		volumes = append(volumes, v.ID)
	}
	g, err := a.s.controller.CreateSnapshotGroup(ctx, r.GetName(), volumes)
	if err != nil {
		return nil, err
	}
	return a.group(&g), nil
}

// ListSnapshotGroups implements api.AdminServer.
func (a *admin) ListSnapshotGroups(ctx context.Context, _ *api.ListSnapshotGroupsRequest) (
	*api.ListSnapshotGroupsResponse, error,
) {
	all, err := a.s.controller.SnapshotGroups(ctx)
	if err != nil {
		return nil, err
	}
	resp := &api.ListSnapshotGroupsResponse{}
	for i := range all {
		resp.Groups = append(resp.Groups, a.group(&all[i]))
	}
	return resp, nil
}

// GetSnapshotGroup implements api.AdminServer.
func (a *admin) GetSnapshotGroup(ctx context.Context, r *api.SnapshotGroupRequest) (*api.SnapshotGroup, error) {
	g, err := a.findGroup(ctx, r.GetName())
	if err != nil {
		return nil, err
	}
	return a.group(&g), nil
}

// DeleteSnapshotGroup implements api.AdminServer.
func (a *admin) DeleteSnapshotGroup(ctx context.Context, r *api.SnapshotGroupRequest) (
	*api.DeleteSnapshotGroupResponse, error,
) {
	g, err := a.findGroup(ctx, r.GetName())
	if errors.Is(err, trivet.ErrNotFound) {
		return &api.DeleteSnapshotGroupResponse{}, nil
	}
	if err != nil {
		return nil, err
	}
	if err := a.s.controller.DeleteSnapshotGroup(ctx, g.ID); err != nil {
		return nil, err
	}
	return &api.DeleteSnapshotGroupResponse{}, nil
}
