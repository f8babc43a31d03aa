package driver

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller"
	"github.com/trivet-csi/trivet/controller/meta"
)

// GroupSnapshotter is what the driver needs of the cluster for group snapshots; controller.Controller
// documents the methods.
type GroupSnapshotter interface {
	CreateSnapshotGroup(ctx context.Context, name string, volumes []trivet.VolumeID) (controller.SnapshotGroup, error)
	DeleteSnapshotGroup(ctx context.Context, id trivet.SnapshotGroupID) error
	SnapshotGroup(ctx context.Context, id trivet.SnapshotGroupID) (controller.SnapshotGroup, error)
	SnapshotGroupByName(ctx context.Context, name string) (controller.SnapshotGroup, error)
}

// groupPrefix begins the full names of the methods of the group controller.
const groupPrefix = servicePrefix + "GroupController/"

// ForCluster reports whether a method, by its full name, is of a service that a server of the cluster answers,
// whichever is asked, and that a Proxy passes on.
func ForCluster(method string) bool {
	return strings.HasPrefix(method, ControllerPrefix) || strings.HasPrefix(method, groupPrefix)
}

// groupServer serves csi.v1.GroupController.
type groupServer struct {
	csi.UnimplementedGroupControllerServer

	ctrl *controllerServer // its volumes and its calls under way
}

// GroupControllerGetCapabilities lists the one that there is.
func (s *groupServer) GroupControllerGetCapabilities(context.Context, *csi.GroupControllerGetCapabilitiesRequest,
) (*csi.GroupControllerGetCapabilitiesResponse, error) {
	const all = csi.GroupControllerServiceCapability_RPC_CREATE_DELETE_GET_VOLUME_GROUP_SNAPSHOT
	return &csi.GroupControllerGetCapabilitiesResponse{Capabilities: []*csi.GroupControllerServiceCapability{{
		Type: &csi.GroupControllerServiceCapability_Rpc{Rpc: &csi.GroupControllerServiceCapability_RPC{Type: all}},
	}}}, nil
}

// CreateVolumeGroupSnapshot makes snapshots of several volumes at one point of their writes, or none of any,
// and answers once they are cut. The same request again finds them, whatever became of the volumes.
func (s *groupServer) CreateVolumeGroupSnapshot(ctx context.Context, req *csi.CreateVolumeGroupSnapshotRequest,
) (*csi.CreateVolumeGroupSnapshotResponse, error) {
	if err := checkGroupRequest(req); err != nil {
		return nil, err
	}
	volumes := make([]trivet.VolumeID, 0, len(req.GetSourceVolumeIds()))
	for _, handle := range req.GetSourceVolumeIds() {
		id, err := parseVolume(handle)
		if err != nil {
			return nil, err
		}
		volumes = append(volumes, id)
	}
	done, err := s.ctrl.busy.start("snapshot group " + req.GetName())
	if err != nil {
		return nil, err
	}
	defer done()
	g, err := s.create(ctx, req.GetName(), volumes)
	if err != nil {
		return nil, err
	}
	return &csi.CreateVolumeGroupSnapshotResponse{GroupSnapshot: groupOf(&g)}, nil
}

func checkGroupRequest(req *csi.CreateVolumeGroupSnapshotRequest) error {
	if err := trivet.ValidateName(req.GetName()); err != nil {
		return err
	}
	const field = "source_volume_ids"
	handles := req.GetSourceVolumeIds()
	if len(handles) == 0 {
		return fmt.Errorf("%s are missing: %w", field, trivet.ErrInvalid)
	}
	for i, handle := range handles {
		if err := checkHandle(field, handle); err != nil {
			return err
		}
		if slices.Contains(handles[:i], handle) {
			return fmt.Errorf("%s: %q is there twice: %w", field, handle, trivet.ErrInvalid)
		}
	}
	return checkSnapshotParameters(req.GetParameters())
}

func (s *groupServer) create(ctx context.Context, name string, volumes []trivet.VolumeID,
) (controller.SnapshotGroup, error) {
	for _, id := range volumes {
		_, err := s.ctrl.volume(ctx, id.String())
		if err == nil {
			continue
		}
		if !absent(err) {
			return controller.SnapshotGroup{}, err
		}
		// If it was deleted since the first such request, whose answer was lost, the group is there.
		if _, byName := s.ctrl.ctrl.SnapshotGroupByName(ctx, name); absent(byName) {
			return controller.SnapshotGroup{}, err
		}
		break
	}
	g, err := s.ctrl.ctrl.CreateSnapshotGroup(ctx, name, volumes)
	if err != nil {
		return g, errors.Join(err, s.dropFailed(ctx, name))
	}
	return g, nil
}

// dropFailed deletes the record of a group that failed. The orchestrator never learned its ID, so it could
// not, and the next try would meet it again.
func (s *groupServer) dropFailed(ctx context.Context, name string) error {
	g, err := s.ctrl.ctrl.SnapshotGroupByName(ctx, name)
	if err != nil || g.State != meta.GroupFailed {
		return nil //nolint:nilerr // the error that led here says more; the next try comes here again
	}
	return s.ctrl.ctrl.DeleteSnapshotGroup(ctx, g.ID)
}

// groupOf describes a group and its snapshots.
func groupOf(g *controller.SnapshotGroup) *csi.VolumeGroupSnapshot {
	out := &csi.VolumeGroupSnapshot{
		GroupSnapshotId: g.ID.String(),
		CreationTime:    timestamppb.New(g.Created),
		ReadyToUse:      g.State == meta.GroupReady,
	}
	for i := range g.Snapshots {
		out.Snapshots = append(out.Snapshots, snapshotOf(&g.Snapshots[i]))
	}
	return out
}

// GetVolumeGroupSnapshot describes a group, made or on its way.
func (s *groupServer) GetVolumeGroupSnapshot(ctx context.Context, req *csi.GetVolumeGroupSnapshotRequest,
) (*csi.GetVolumeGroupSnapshotResponse, error) {
	id, err := s.parse(req.GetGroupSnapshotId())
	if err != nil {
		return nil, err
	}
	g, err := s.ctrl.ctrl.SnapshotGroup(ctx, id)
	switch {
	case err != nil:
		return nil, err
	case g.State == meta.GroupFailed || g.State == meta.GroupDeleting:
		return nil, fmt.Errorf("group snapshot %s is %s: %w", id, g.State, trivet.ErrNotFound)
	}
	if err := checkMembers(&g, req.GetSnapshotIds()); err != nil {
		return nil, err
	}
	return &csi.GetVolumeGroupSnapshotResponse{GroupSnapshot: groupOf(&g)}, nil
}

// parse returns the group that a handle names: ErrInvalid when it is malformed, ErrNotFound when it is none of
// ours.
func (s *groupServer) parse(handle string) (trivet.SnapshotGroupID, error) {
	if err := checkHandle("group_snapshot_id", handle); err != nil {
		return 0, err
	}
	id, err := trivet.ParseSnapshotGroupID(handle)
	if err != nil {
		return 0, fmt.Errorf("group snapshot %q is none of ours: %w", handle, trivet.ErrNotFound)
	}
	return id, nil
}

// checkMembers returns ErrInvalid when handles are not those of the group's snapshots. None are no mismatch:
// csi-snapshotter gives none of a group of which it never learned them, and has to delete it all the same.
func checkMembers(g *controller.SnapshotGroup, handles []string) error {
	if len(handles) == 0 {
		return nil
	}
	want := make([]string, 0, len(g.Members))
	for _, m := range g.Members {
		want = append(want, m.Snapshot.String())
	}
	have := slices.Clone(handles)
	slices.Sort(want)
	slices.Sort(have)
	if !slices.Equal(want, have) {
		return fmt.Errorf("snapshot_ids %q are not the snapshots of %s, which are %q: %w", have, g.ID, want,
			trivet.ErrInvalid)
	}
	return nil
}

// DeleteVolumeGroupSnapshot deletes a group with its snapshots. One that is unknown, or was never ours, is
// deleted already.
func (s *groupServer) DeleteVolumeGroupSnapshot(ctx context.Context, req *csi.DeleteVolumeGroupSnapshotRequest,
) (*csi.DeleteVolumeGroupSnapshotResponse, error) {
	resp := &csi.DeleteVolumeGroupSnapshotResponse{}
	id, err := s.parse(req.GetGroupSnapshotId())
	if absent(err) {
		return resp, nil
	}
	if err != nil {
		return nil, err
	}
	done, err := s.ctrl.busy.start(id.String())
	if err != nil {
		return nil, err
	}
	defer done()
	g, err := s.ctrl.ctrl.SnapshotGroup(ctx, id)
	if absent(err) {
		return resp, nil
	}
	if err == nil {
		err = checkMembers(&g, req.GetSnapshotIds())
	}
	if err == nil {
		err = s.ctrl.ctrl.DeleteSnapshotGroup(ctx, id)
	}
	if err != nil && !absent(err) {
		return nil, err
	}
	return resp, nil
}
