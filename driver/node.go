package driver

import (
	"context"
	"fmt"
	"strconv"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/node"
)

// nodeCapabilities are all that this version can do.
var nodeCapabilities = []csi.NodeServiceCapability_RPC_Type{
	csi.NodeServiceCapability_RPC_STAGE_UNSTAGE_VOLUME,
	csi.NodeServiceCapability_RPC_GET_VOLUME_STATS,
	csi.NodeServiceCapability_RPC_SINGLE_NODE_MULTI_WRITER,
	csi.NodeServiceCapability_RPC_GET_VOLUME_HEALTH,
	csi.NodeServiceCapability_RPC_GET_STORAGE_HEALTH,
	csi.NodeServiceCapability_RPC_EXPAND_VOLUME,
}

// nodeServer serves csi.v1.Node.
type nodeServer struct {
	csi.UnimplementedNodeServer

	node Node
	ctrl Examiner
	busy *inflight
}

func newNodeServer(n Node, c Examiner) *nodeServer {
	return &nodeServer{node: n, ctrl: c, busy: newInflight()}
}

// NodeGetCapabilities lists nodeCapabilities.
func (s *nodeServer) NodeGetCapabilities(context.Context, *csi.NodeGetCapabilitiesRequest,
) (*csi.NodeGetCapabilitiesResponse, error) {
	resp := &csi.NodeGetCapabilitiesResponse{}
	for _, t := range nodeCapabilities {
		resp.Capabilities = append(resp.Capabilities, &csi.NodeServiceCapability{
			Type: &csi.NodeServiceCapability_Rpc{Rpc: &csi.NodeServiceCapability_RPC{Type: t}},
		})
	}
	return resp, nil
}

// NodeGetInfo names the node, where it stands and how many volumes it can hold.
func (s *nodeServer) NodeGetInfo(context.Context, *csi.NodeGetInfoRequest) (*csi.NodeGetInfoResponse, error) {
	i := s.node.Info()
	return &csi.NodeGetInfoResponse{
		NodeId:             string(i.Node),
		MaxVolumesPerNode:  i.MaxVolumes,
		AccessibleTopology: nodeTopology(i),
	}, nil
}

// NodeStageVolume brings the volume's device to this machine and mounts it at the staging path.
func (s *nodeServer) NodeStageVolume(ctx context.Context, req *csi.NodeStageVolumeRequest,
) (*csi.NodeStageVolumeResponse, error) {
	if err := checkVolumeID(req.GetVolumeId()); err != nil {
		return nil, err
	}
	staging, err := checkPath("staging_target_path", req.GetStagingTargetPath())
	if err != nil {
		return nil, err
	}
	c, err := nodeCapability(req.GetVolumeCapability(), req.GetPublishContext())
	if err != nil {
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
	err = s.node.Stage(ctx, node.StageRequest{
		Volume:      id,
		StagingPath: staging,
		FSType:      c.fsType,
		MountFlags:  c.mountFlags,
		Block:       c.block,
		ReadOnly:    c.readOnly,
	})
	if err != nil {
		return nil, err
	}
	return &csi.NodeStageVolumeResponse{}, nil
}

// nodeCapability translates c; it is read-only also when the attachment is.
func nodeCapability(c *csi.VolumeCapability, publishContext map[string]string) (capability, error) {
	out, err := capabilityOf(c)
	if err != nil {
		return out, asPrecondition(err)
	}
	if text, ok := publishContext[contextReadOnly]; ok {
		readOnly, err := strconv.ParseBool(text)
		if err != nil {
			return out, fmt.Errorf("publish_context: bad value of %q: %w", contextReadOnly, trivet.ErrInvalid)
		}
		out.readOnly = out.readOnly || readOnly
	}
	return out, nil
}

// NodeUnstageVolume undoes NodeStageVolume. What is not staged, or not ours, is unstaged already:
// kubelet takes any error for a mount that is still there.
func (s *nodeServer) NodeUnstageVolume(ctx context.Context, req *csi.NodeUnstageVolumeRequest,
) (*csi.NodeUnstageVolumeResponse, error) {
	err := s.undo(ctx, req.GetVolumeId(), "staging_target_path", req.GetStagingTargetPath(), s.node.Unstage)
	if err != nil {
		return nil, err
	}
	return &csi.NodeUnstageVolumeResponse{}, nil
}

// undo validates the arguments of an Unstage or Unpublish and calls it.
func (s *nodeServer) undo(ctx context.Context, handle, field, path string,
	call func(context.Context, trivet.VolumeID, string) error,
) error {
	if err := checkVolumeID(handle); err != nil {
		return err
	}
	path, err := checkPath(field, path)
	if err != nil {
		return err
	}
	id, err := parseVolume(handle)
	if err != nil {
		return nil //nolint:nilerr // what never was is not mounted
	}
	done, err := s.busy.start(id.String())
	if err != nil {
		return err
	}
	defer done()
	if err := call(ctx, id, path); err != nil && !absent(err) {
		return err
	}
	return nil
}

// NodePublishVolume makes a staged volume appear at the target path.
func (s *nodeServer) NodePublishVolume(ctx context.Context, req *csi.NodePublishVolumeRequest,
) (*csi.NodePublishVolumeResponse, error) {
	if err := checkVolumeID(req.GetVolumeId()); err != nil {
		return nil, err
	}
	target, err := checkPath("target_path", req.GetTargetPath())
	if err != nil {
		return nil, err
	}
	c, err := nodeCapability(req.GetVolumeCapability(), req.GetPublishContext())
	if err != nil {
		return nil, err
	}
	if req.GetStagingTargetPath() == "" {
		return nil, fmt.Errorf("staging_target_path is missing: %w", errPrecondition)
	}
	staging, err := checkPath("staging_target_path", req.GetStagingTargetPath())
	if err != nil {
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
	err = s.node.Publish(ctx, node.PublishRequest{
		Volume:      id,
		StagingPath: staging,
		TargetPath:  target,
		FSType:      c.fsType,
		MountFlags:  c.mountFlags,
		Block:       c.block,
		ReadOnly:    c.readOnly || req.GetReadonly(),
		Mode:        c.mode,
	})
	if err != nil {
		return nil, err
	}
	return &csi.NodePublishVolumeResponse{}, nil
}

// NodeUnpublishVolume undoes NodePublishVolume; what is not published is success.
func (s *nodeServer) NodeUnpublishVolume(ctx context.Context, req *csi.NodeUnpublishVolumeRequest,
) (*csi.NodeUnpublishVolumeResponse, error) {
	err := s.undo(ctx, req.GetVolumeId(), "target_path", req.GetTargetPath(), s.node.Unpublish)
	if err != nil {
		return nil, err
	}
	return &csi.NodeUnpublishVolumeResponse{}, nil
}

// NodeGetVolumeStats says how full the volume is. Any path at which the volume is not, however it
// looks, is NOT_FOUND.
func (s *nodeServer) NodeGetVolumeStats(ctx context.Context, req *csi.NodeGetVolumeStatsRequest,
) (*csi.NodeGetVolumeStatsResponse, error) {
	if err := checkVolumeID(req.GetVolumeId()); err != nil {
		return nil, err
	}
	if req.GetVolumePath() == "" {
		return nil, fmt.Errorf("volume_path is missing: %w", trivet.ErrInvalid)
	}
	id, err := parseVolume(req.GetVolumeId())
	if err != nil {
		return nil, err
	}
	st, err := s.node.Stats(ctx, id, req.GetVolumePath())
	if err != nil {
		return nil, err
	}
	return &csi.NodeGetVolumeStatsResponse{Usage: usageOf(st)}, nil
}

func usageOf(st node.VolumeStats) []*csi.VolumeUsage {
	bytes := &csi.VolumeUsage{Unit: csi.VolumeUsage_BYTES, Total: st.TotalBytes}
	if st.Block {
		return []*csi.VolumeUsage{bytes}
	}
	bytes.Used, bytes.Available = st.UsedBytes, st.AvailableBytes
	return []*csi.VolumeUsage{bytes, {
		Unit:      csi.VolumeUsage_INODES,
		Total:     st.TotalInodes,
		Used:      st.UsedInodes,
		Available: st.FreeInodes,
	}}
}
