package server

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/api"
	"github.com/trivet-csi/trivet/controller"
	"github.com/trivet-csi/trivet/controller/meta"
)

// findSnapshot returns the snapshot with a name or, when none has it, with that ID.
func (a *admin) findSnapshot(ctx context.Context, name string) (meta.Snapshot, error) {
	if name == "" {
		return meta.Snapshot{}, fmt.Errorf("snapshot name is missing: %w", trivet.ErrInvalid)
	}
	s, err := a.s.controller.SnapshotByName(ctx, name)
	if !errors.Is(err, trivet.ErrNotFound) {
		return s, err
	}
	id, parseErr := trivet.ParseSnapshotID(name)
	if parseErr != nil {
		return meta.Snapshot{}, fmt.Errorf("%w; `trivet snapshot list` shows those there are", err)
	}
	return a.s.controller.Snapshot(ctx, id)
}

// snapshot converts s; the clones are those that this node knows of.
func (a *admin) snapshot(s *meta.Snapshot) *api.Snapshot {
	out := &api.Snapshot{
		Id: s.ID.String(), Name: s.Name, Volume: s.Volume.String(), VolumeName: s.VolumeName, State: string(s.State),
		Reason: s.Reason, SizeBytes: s.SizeBytes, Generation: uint32(s.Generation),
		Created: s.Created.Format(time.RFC3339), HeldSeconds: s.Held.Seconds(),
	}
	if s.Group != 0 {
		g, _ := a.s.catalogue.Local().SnapshotGroup(s.Group)
		out.Group, out.GroupName = s.Group.String(), g.Name
	}
	for _, id := range a.s.catalogue.Local().ClonesOf(s.ID) {
		out.Clones = append(out.Clones, id.String())
	}
	return out
}

// CreateSnapshot implements api.AdminServer.
func (a *admin) CreateSnapshot(ctx context.Context, r *api.CreateSnapshotRequest) (*api.Snapshot, error) {
	v, err := a.find(ctx, r.GetVolume())
	if err != nil {
		return nil, err
	}
	s, err := a.s.controller.CreateSnapshot(ctx, v.ID, r.GetName())
	if err != nil {
		return nil, err
	}
	return a.snapshot(&s), nil
}

// ListSnapshots implements api.AdminServer. Those that belong to the making of a clone are left out.
func (a *admin) ListSnapshots(ctx context.Context, r *api.ListSnapshotsRequest) (*api.ListSnapshotsResponse, error) {
	all, err := a.s.controller.Snapshots(ctx)
	if err != nil {
		return nil, err
	}
	var of trivet.VolumeID
	if name := r.GetVolume(); name != "" {
		if of, err = a.volumeOfSnapshots(ctx, name, all); err != nil {
			return nil, err
		}
	}
	resp := &api.ListSnapshotsResponse{}
	for i := range all {
		if s := &all[i]; !s.Hidden() && (of == 0 || s.Volume == of) {
			resp.Snapshots = append(resp.Snapshots, a.snapshot(s))
		}
	}
	return resp, nil
}

// volumeOfSnapshots returns the volume of a name or ID; one that was deleted is known by its snapshots still.
func (a *admin) volumeOfSnapshots(ctx context.Context, name string, all []meta.Snapshot) (trivet.VolumeID, error) {
	v, err := a.find(ctx, name)
	if !errors.Is(err, trivet.ErrNotFound) {
		return v.ID, err
	}
	for i := range all {
		if all[i].VolumeName == name {
			return all[i].Volume, nil
		}
	}
	return 0, err
}

// GetSnapshot implements api.AdminServer.
func (a *admin) GetSnapshot(ctx context.Context, r *api.SnapshotRequest) (*api.Snapshot, error) {
	s, err := a.findSnapshot(ctx, r.GetName())
	if err != nil {
		return nil, err
	}
	return a.snapshot(&s), nil
}

// DeleteSnapshot implements api.AdminServer.
func (a *admin) DeleteSnapshot(ctx context.Context, r *api.SnapshotRequest) (*api.DeleteSnapshotResponse, error) {
	s, err := a.findSnapshot(ctx, r.GetName())
	if errors.Is(err, trivet.ErrNotFound) {
		return &api.DeleteSnapshotResponse{}, nil
	}
	if err != nil {
		return nil, err
	}
	if s.Hidden() {
		return nil, fmt.Errorf("delete snapshot %s: it belongs to a clone that is being made, and goes by itself: %w", s.ID,
			trivet.ErrInUse)
	}
	if err := a.s.controller.DeleteSnapshot(ctx, s.ID); err != nil {
		return nil, err
	}
	return &api.DeleteSnapshotResponse{}, nil
}

// RestoreSnapshot implements api.AdminServer.
func (a *admin) RestoreSnapshot(ctx context.Context, r *api.RestoreSnapshotRequest) (*api.Volume, error) {
	s, err := a.findSnapshot(ctx, r.GetSnapshot())
	if err != nil {
		return nil, err
	}
	if r.GetInPlace() {
		v, err := a.s.controller.RestoreInPlace(ctx, s.ID)
		if err != nil {
			return nil, err
		}
		return a.volume(ctx, v, true), nil
	}
	v, err := a.s.controller.CreateVolume(ctx, controller.CreateRequest{
		Name: r.GetName(), RequiredBytes: r.GetSizeBytes(), Params: r.GetParameters(),
		Source: controller.CopyOf{Snapshot: s.ID},
	})
	if err != nil {
		return nil, err
	}
	return a.volume(ctx, v, true), nil
}

// CloneVolume implements api.AdminServer.
func (a *admin) CloneVolume(ctx context.Context, r *api.CloneVolumeRequest) (*api.Volume, error) {
	v, err := a.find(ctx, r.GetSource())
	if err != nil {
		return nil, err
	}
	out, err := a.s.controller.CloneVolume(ctx, controller.CreateRequest{
		Name: r.GetName(), RequiredBytes: r.GetSizeBytes(), Params: r.GetParameters(),
		Source: controller.CopyOf{Volume: v.ID},
	})
	if err != nil {
		return nil, err
	}
	return a.volume(ctx, out, true), nil
}
