package driver

import (
	"context"
	"fmt"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller/meta"
)

// Expander is what the driver needs of the cluster to let volumes grow; controller.Controller documents
// the method.
type Expander interface {
	ExpandVolume(ctx context.Context, id trivet.VolumeID, requiredBytes, limitBytes int64) (meta.Volume, error)
}

// expansionCapability says that volumes grow while they are in use.
func expansionCapability() *csi.PluginCapability {
	return &csi.PluginCapability{Type: &csi.PluginCapability_VolumeExpansion_{
		VolumeExpansion: &csi.PluginCapability_VolumeExpansion{
			Type: csi.PluginCapability_VolumeExpansion_ONLINE,
		},
	}}
}

// ControllerExpandVolume makes a volume larger, in use or not, and answers once its replicas have agreed on
// the size. One that is large enough already is left as it is.
func (s *controllerServer) ControllerExpandVolume(ctx context.Context, req *csi.ControllerExpandVolumeRequest,
) (*csi.ControllerExpandVolumeResponse, error) {
	if err := checkVolumeID(req.GetVolumeId()); err != nil {
		return nil, err
	}
	required, limit, err := capacityRange(req.GetCapacityRange())
	if err != nil {
		return nil, err
	}
	if required == 0 && limit == 0 {
		return nil, fmt.Errorf("capacity_range is missing: %w", trivet.ErrInvalid)
	}
	c, err := optionalCapability(req.GetVolumeCapability())
	if err != nil {
		return nil, err
	}
	v, err := s.volume(ctx, req.GetVolumeId())
	if err != nil {
		return nil, err
	}
	done, err := s.busy.start("size of " + v.ID.String()) // not the volume itself: it can be detached meanwhile
	if err != nil {
		return nil, err
	}
	defer done()
	required = max(required, 1) // with a limit alone any size below it will do, so nothing grows
	if v, err = s.ctrl.ExpandVolume(ctx, v.ID, required, limit); err != nil {
		return nil, err
	}
	return &csi.ControllerExpandVolumeResponse{
		CapacityBytes: v.SizeBytes, NodeExpansionRequired: expandsOnNode(c, &v),
	}, nil
}

// optionalCapability is capabilityOf for a field that need not be there; nil then. Both calls that expand
// answer an invalid argument for a capability that no volume has (spec, "Exceeds capabilities").
func optionalCapability(c *csi.VolumeCapability) (*capability, error) {
	if c == nil {
		return nil, nil //nolint:nilnil // there is none
	}
	out, err := capabilityOf(c)
	if err != nil {
		return nil, asInvalid(err)
	}
	return &out, nil
}

// expandsOnNode reports whether there is something left to do on a node. A block volume that is nowhere
// attached has its new size when it is; an attached one has it once the kernel was told, which is worth
// waiting for. A filesystem grows on a node, now or when it is staged there the next time.
func expandsOnNode(c *capability, v *meta.Volume) bool {
	return c == nil || !c.block || len(v.Holders()) > 0
}

// known reports whether the orchestrator knows of v. One that is brought back to a snapshot is there all
// the time: a final "not found" would have the orchestrator give up on it.
func known(v *meta.Volume) bool {
	if v.Phase == meta.PhaseRestoring && v.Rollback != nil {
		return visible(v.Rollback.Before)
	}
	return visible(v.Phase)
}

// NodeExpandVolume makes the device of a volume as large as the volume, and the filesystem on it as large
// as the device, while both are in use.
func (s *nodeServer) NodeExpandVolume(ctx context.Context, req *csi.NodeExpandVolumeRequest,
) (*csi.NodeExpandVolumeResponse, error) {
	if err := checkVolumeID(req.GetVolumeId()); err != nil {
		return nil, err
	}
	if req.GetVolumePath() == "" {
		return nil, fmt.Errorf("volume_path is missing: %w", trivet.ErrInvalid)
	}
	required, limit, err := capacityRange(req.GetCapacityRange())
	if err != nil {
		return nil, err
	}
	if _, err := optionalCapability(req.GetVolumeCapability()); err != nil {
		return nil, err
	}
	id, err := parseVolume(req.GetVolumeId())
	if err != nil {
		return nil, err
	}
	done, err := s.busy.start(id.String())
	if err != nil {
		return nil, err
	}
	defer done()
	size, err := s.node.Expand(ctx, id, req.GetVolumePath(), required)
	if absent(err) && req.GetStagingTargetPath() != "" {
		// Of a block volume kubelet gives as volume_path what it calls the device path, which need not be
		// where we published it (pkg/volume/csi/expander.go, nodeExpandWithClient); the staging path is right.
		size, err = s.node.Expand(ctx, id, req.GetStagingTargetPath(), required)
	}
	if err != nil {
		return nil, err
	}
	if limit > 0 && size > limit {
		return nil, fmt.Errorf("expand %s to at most %d bytes: it has %d: %w", id, limit, size, trivet.ErrOutOfRange)
	}
	return &csi.NodeExpandVolumeResponse{CapacityBytes: size}, nil
}
