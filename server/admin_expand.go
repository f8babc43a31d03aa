package server

import (
	"context"

	"github.com/trivet-csi/trivet/api"
)

// ExpandVolume implements api.AdminServer.
func (a *admin) ExpandVolume(ctx context.Context, r *api.ExpandVolumeRequest) (*api.Volume, error) {
	v, err := a.find(ctx, r.GetName())
	if err != nil {
		return nil, err
	}
	if r.GetAtLeast() {
		v, err = a.s.controller.ExpandVolume(ctx, v.ID, r.GetSizeBytes(), r.GetLimitBytes())
	} else {
		v, err = a.s.controller.ResizeVolume(ctx, v.ID, r.GetSizeBytes())
	}
	if err != nil {
		return nil, err
	}
	return a.volume(ctx, v, true), nil
}
