package driver

import (
	"context"
	"errors"
	"fmt"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller"
	"github.com/trivet-csi/trivet/controller/meta"
)

// checkSource returns ErrInvalid for a volume_content_source that is malformed. None is fine.
func checkSource(src *csi.VolumeContentSource) error {
	if src == nil {
		return nil
	}
	switch t := src.GetType().(type) {
	case *csi.VolumeContentSource_Snapshot:
		return checkHandle("volume_content_source: snapshot_id", t.Snapshot.GetSnapshotId())
	case *csi.VolumeContentSource_Volume:
		return checkHandle("volume_content_source: volume_id", t.Volume.GetVolumeId())
	default:
		return fmt.Errorf("volume_content_source: type is missing: %w", trivet.ErrInvalid)
	}
}

// parseSource returns what a new volume is to be a copy of. ErrNotFound: a handle is none of ours.
// REQUIRES: checkSource has returned nil.
func parseSource(src *csi.VolumeContentSource) (from controller.CopyOf, err error) {
	switch t := src.GetType().(type) {
	case *csi.VolumeContentSource_Snapshot:
		from.Snapshot, err = parseSnapshot(t.Snapshot.GetSnapshotId())
	case *csi.VolumeContentSource_Volume:
		from.Volume, err = parseVolume(t.Volume.GetVolumeId())
	}
	return from, err
}

// createVolume makes a volume, empty or a copy.
func (s *controllerServer) createVolume(ctx context.Context, r controller.CreateRequest) (meta.Volume, error) {
	if r.Source.Volume == 0 {
		return s.ctrl.CreateVolume(ctx, r)
	}
	v, err := s.ctrl.CloneVolume(ctx, r)
	if errors.Is(err, trivet.ErrInvalid) { // of a source, too, that the orchestrator has deleted and that is kept
		if _, gone := s.volume(ctx, r.Source.Volume.String()); absent(gone) {
			return v, fmt.Errorf("source of volume %q: %w", r.Name, gone)
		}
	}
	return v, err
}
