package driver

import (
	"context"
	"fmt"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller"
	"github.com/trivet-csi/trivet/controller/meta"
)

// Modifier is what the driver needs to change volumes while they are in use.
type Modifier interface {
	// SetParams changes parameters of a volume, all of patch or nothing; controller.Controller documents it.
	SetParams(ctx context.Context, id trivet.VolumeID, patch map[string]string) (meta.Volume, error)
}

// ControllerModifyVolume changes what the given keys say and nothing else: limits, priority, cache, number of replicas,
// locality. It is one command of the catalogue, so either all of them hold from then on or, with INVALID_ARGUMENT, none
// was touched. The node that has the volume attached follows within a second; replicas are added or removed one by
// one, behind the answer.
func (s *controllerServer) ControllerModifyVolume(ctx context.Context, req *csi.ControllerModifyVolumeRequest,
) (*csi.ControllerModifyVolumeResponse, error) {
	if err := checkVolumeID(req.GetVolumeId()); err != nil {
		return nil, err
	}
	if len(req.GetMutableParameters()) == 0 {
		return nil, fmt.Errorf("mutable_parameters are missing: %w", trivet.ErrInvalid)
	}
	v, err := s.volume(ctx, req.GetVolumeId())
	if err != nil {
		return nil, err
	}
	done, err := s.busy.start("parameters of " + v.ID.String())
	if err != nil {
		return nil, err
	}
	defer done()
	patch := controller.WithoutMetadata(req.GetMutableParameters())
	if len(patch) == 0 {
		return &csi.ControllerModifyVolumeResponse{}, nil // the sidecar's own keys alone: nothing is to be modified
	}
	if _, err := s.ctrl.SetParams(ctx, v.ID, patch); err != nil {
		return nil, err
	}
	return &csi.ControllerModifyVolumeResponse{}, nil
}
