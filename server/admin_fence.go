package server

import (
	"context"
	"fmt"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/api"
)

// FenceVolume implements api.AdminServer.
func (a *admin) FenceVolume(ctx context.Context, r *api.FenceVolumeRequest) (*api.FenceVolumeResponse, error) {
	id, err := trivet.ParseVolumeID(r.GetVolume())
	if err != nil {
		return nil, err
	}
	if err := trivet.ValidateNodeID(r.GetNode()); err != nil {
		return nil, fmt.Errorf("fence volume %s: %w", id, err)
	}
	epoch, err := a.s.controller.FenceAway(ctx, id, trivet.NodeID(r.GetNode()))
	if err != nil {
		return nil, err
	}
	return &api.FenceVolumeResponse{Epoch: uint64(epoch)}, nil
}
