package driver

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller"
	"github.com/trivet-csi/trivet/controller/meta"
)

// Snapshotter is what the driver needs of the cluster for snapshots and copies; controller.Controller
// documents the methods.
type Snapshotter interface {
	// CloneVolume is CreateVolume of a copy of another volume.
	CloneVolume(ctx context.Context, r controller.CreateRequest) (meta.Volume, error)
	CreateSnapshot(ctx context.Context, volume trivet.VolumeID, name string) (meta.Snapshot, error)
	DeleteSnapshot(ctx context.Context, id trivet.SnapshotID) error
	Snapshot(ctx context.Context, id trivet.SnapshotID) (meta.Snapshot, error)
	SnapshotByName(ctx context.Context, name string) (meta.Snapshot, error)
	Snapshots(ctx context.Context) ([]meta.Snapshot, error)
}

// metadataPrefix begins the parameters that csi-snapshotter adds with --extra-create-metadata. They
// name the VolumeSnapshot, and change nothing.
const metadataPrefix = "csi.storage.k8s.io/"

// CreateSnapshot makes a snapshot of a volume, attached or not, and answers once it is cut, which is
// when it can be used. The same request again finds it, whatever became of the volume.
func (s *controllerServer) CreateSnapshot(ctx context.Context, req *csi.CreateSnapshotRequest,
) (*csi.CreateSnapshotResponse, error) {
	if err := checkSnapshotRequest(req); err != nil {
		return nil, err
	}
	id, err := parseVolume(req.GetSourceVolumeId())
	if err != nil {
		return nil, err
	}
	done, err := s.busy.start("snapshot " + req.GetName())
	if err != nil {
		return nil, err
	}
	defer done()
	snap, err := s.createSnapshot(ctx, id, req.GetName())
	if err != nil {
		return nil, err
	}
	return &csi.CreateSnapshotResponse{Snapshot: snapshotOf(&snap)}, nil
}

func checkSnapshotRequest(req *csi.CreateSnapshotRequest) error {
	if err := trivet.ValidateName(req.GetName()); err != nil {
		return err
	}
	if err := checkHandle("source_volume_id", req.GetSourceVolumeId()); err != nil {
		return err
	}
	if err := checkSnapshotParameters(req.GetParameters()); err != nil {
		return err
	}
	// Any requirement is met: a volume that is made of the snapshot can be used at every node.
	top := req.GetAccessibilityRequirements()
	if _, err := segmentsOf("requisite", top.GetRequisite()); err != nil {
		return err
	}
	_, err := segmentsOf("preferred", top.GetPreferred())
	return err
}

// paramDeletionPolicy is a field of a class, beside its parameters. Kubernetes' own tests write it into those of a
// VolumeGroupSnapshotClass, too, and expect a driver not to mind.
const paramDeletionPolicy = "deletionPolicy"

// checkSnapshotParameters refuses a parameter that would have no effect. Snapshots have none.
func checkSnapshotParameters(params map[string]string) error {
	for _, key := range slices.Sorted(maps.Keys(params)) { // sorted: the same error each time
		if key == paramDeletionPolicy {
			if v := params[key]; v != "Delete" && v != "Retain" {
				return fmt.Errorf("parameter %q: %q: want Delete or Retain, as the class's field of that name: %w",
					key, v, trivet.ErrInvalid)
			}
			continue
		}
		if !strings.HasPrefix(strings.ToLower(key), metadataPrefix) {
			return fmt.Errorf("parameter %q is unknown; snapshots have no parameters: %w", key, trivet.ErrInvalid)
		}
	}
	return nil
}

func (s *controllerServer) createSnapshot(ctx context.Context, id trivet.VolumeID, name string,
) (meta.Snapshot, error) {
	if _, err := s.volume(ctx, id.String()); err != nil {
		return s.madeBefore(ctx, id, name, err)
	}
	snap, err := s.ctrl.CreateSnapshot(ctx, id, name)
	if errors.Is(err, trivet.ErrNoSpace) {
		return snap, errors.Join(err, s.dropFailed(ctx, id, name))
	}
	return snap, err
}

// madeBefore answers a request for a snapshot of a volume that cannot be looked up for the reason
// given: if it was deleted since the first such request, whose answer was lost, the snapshot is there.
func (s *controllerServer) madeBefore(ctx context.Context, id trivet.VolumeID, name string, reason error,
) (meta.Snapshot, error) {
	if !absent(reason) {
		return meta.Snapshot{}, reason
	}
	snap, err := s.ctrl.SnapshotByName(ctx, name)
	switch {
	case absent(err):
		return meta.Snapshot{}, reason
	case err != nil:
		return meta.Snapshot{}, err
	case snap.Volume != id:
		return meta.Snapshot{}, fmt.Errorf("snapshot %q is of volume %s: %w", name, snap.Volume, trivet.ErrExists)
	}
	return s.ctrl.CreateSnapshot(ctx, id, name)
}

// dropFailed deletes the record of a snapshot that the volume's group has refused. The orchestrator never
// learned its ID, so it could not, and the next try would meet it again.
func (s *controllerServer) dropFailed(ctx context.Context, id trivet.VolumeID, name string) error {
	snap, err := s.ctrl.SnapshotByName(ctx, name)
	if absent(err) {
		return nil
	}
	if err != nil {
		return err
	}
	if snap.Volume != id || snap.State != meta.SnapshotFailed {
		return nil
	}
	return s.ctrl.DeleteSnapshot(ctx, snap.ID)
}

// snapshotOf describes a snapshot. The accessible topology is empty, as that of volumes is.
func snapshotOf(s *meta.Snapshot) *csi.Snapshot {
	out := &csi.Snapshot{
		SnapshotId:     s.ID.String(),
		SourceVolumeId: s.Volume.String(),
		SizeBytes:      s.SizeBytes, // zero, which means unknown, until it is cut
		CreationTime:   timestamppb.New(s.Created),
		ReadyToUse:     s.State == meta.SnapshotReady,
	}
	if s.Group != 0 {
		out.GroupSnapshotId = s.Group.String()
	}
	return out
}

// DeleteSnapshot deletes a snapshot. One that is unknown, or was never ours, is deleted already.
func (s *controllerServer) DeleteSnapshot(ctx context.Context, req *csi.DeleteSnapshotRequest,
) (*csi.DeleteSnapshotResponse, error) {
	if err := checkHandle("snapshot_id", req.GetSnapshotId()); err != nil {
		return nil, err
	}
	resp := &csi.DeleteSnapshotResponse{}
	id, err := trivet.ParseSnapshotID(req.GetSnapshotId())
	if err != nil {
		return resp, nil //nolint:nilerr // what was never there is gone
	}
	done, err := s.busy.start(id.String())
	if err != nil {
		return nil, err
	}
	defer done()
	switch err := s.ctrl.DeleteSnapshot(ctx, id); {
	case errors.Is(err, trivet.ErrInUse): // by its group, which the specification wants to be an invalid argument
		return nil, fmt.Errorf("%w: %w", err, trivet.ErrInvalid)
	case err != nil && !absent(err):
		return nil, err
	}
	return resp, nil
}

// GetSnapshot describes one snapshot, cut or on its way.
func (s *controllerServer) GetSnapshot(ctx context.Context, req *csi.GetSnapshotRequest,
) (*csi.GetSnapshotResponse, error) {
	if err := checkHandle("snapshot_id", req.GetSnapshotId()); err != nil {
		return nil, err
	}
	id, err := parseSnapshot(req.GetSnapshotId())
	if err != nil {
		return nil, err
	}
	snap, err := s.ctrl.Snapshot(ctx, id)
	if err != nil {
		return nil, err
	}
	if snap.State != meta.SnapshotCreating && !listed(&snap) {
		return nil, fmt.Errorf("snapshot %s is %s: %w", id, snap.State, trivet.ErrNotFound)
	}
	return &csi.GetSnapshotResponse{Snapshot: snapshotOf(&snap)}, nil
}

// parseSnapshot returns the snapshot that a handle names. A handle that Trivet never gave out names none:
// ErrNotFound.
func parseSnapshot(s string) (trivet.SnapshotID, error) {
	id, err := trivet.ParseSnapshotID(s)
	if err != nil {
		return 0, fmt.Errorf("snapshot %q is none of ours: %w", s, trivet.ErrNotFound)
	}
	return id, nil
}

// listed reports whether a snapshot is to be listed: it is cut, nobody has deleted it, and it does not
// belong to the making of a clone.
func listed(s *meta.Snapshot) bool { return s.State == meta.SnapshotReady && !s.Hidden() }

// ListSnapshots lists the snapshots that are cut, in the order of their IDs. Filters that match nothing, or
// name what was never ours, give an empty list. The token is the last ID of the page before: it stays good
// when snapshots come and go between pages.
func (s *controllerServer) ListSnapshots(ctx context.Context, req *csi.ListSnapshotsRequest,
) (*csi.ListSnapshotsResponse, error) {
	if req.GetMaxEntries() < 0 {
		return nil, fmt.Errorf("max_entries %d is negative: %w", req.GetMaxEntries(), trivet.ErrInvalid)
	}
	var after trivet.SnapshotID
	if token := req.GetStartingToken(); token != "" {
		var err error
		if after, err = trivet.ParseSnapshotID(token); err != nil {
			return nil, fmt.Errorf("starting_token %q was never given out: %w", token, errToken)
		}
	}
	snaps, err := s.ctrl.Snapshots(ctx)
	if err != nil {
		return nil, err
	}
	volume, snapshot := req.GetSourceVolumeId(), req.GetSnapshotId()
	snaps = slices.DeleteFunc(slices.Clone(snaps), func(s meta.Snapshot) bool {
		return s.ID <= after || !listed(&s) || volume != "" && s.Volume.String() != volume ||
			snapshot != "" && s.ID.String() != snapshot
	})
	slices.SortFunc(snaps, func(a, b meta.Snapshot) int { return cmp.Compare(a.ID, b.ID) })
	page := pageMax
	if n := int(req.GetMaxEntries()); n > 0 {
		page = min(n, pageMax)
	}
	resp := &csi.ListSnapshotsResponse{}
	if len(snaps) > page {
		snaps = snaps[:page]
		resp.NextToken = snaps[page-1].ID.String()
	}
	for i := range snaps {
		resp.Entries = append(resp.Entries, &csi.ListSnapshotsResponse_Entry{Snapshot: snapshotOf(&snaps[i])})
	}
	return resp, nil
}

// snapshotTopologyCapability says that requirements on where a snapshot can be used are honoured: it can be
// used everywhere.
func snapshotTopologyCapability() *csi.PluginCapability {
	return &csi.PluginCapability{Type: &csi.PluginCapability_Service_{Service: &csi.PluginCapability_Service{
		Type: csi.PluginCapability_Service_SNAPSHOT_ACCESSIBILITY_CONSTRAINTS,
	}}}
}
