package server

import (
	"context"

	"github.com/trivet-csi/trivet/api"
)

// SetLabels implements api.AdminServer.
func (a *admin) SetLabels(ctx context.Context, r *api.SetLabelsRequest) (*api.Volume, error) {
	v, err := a.find(ctx, r.GetName())
	if err != nil {
		return nil, err
	}
	if v, err = a.s.controller.SetLabels(ctx, v.ID, r.GetLabels(), r.GetRemove()); err != nil {
		return nil, err
	}
	return a.volume(ctx, v, true), nil
}

// SetVolume implements api.AdminServer.
func (a *admin) SetVolume(ctx context.Context, r *api.SetVolumeRequest) (*api.Volume, error) {
	v, err := a.find(ctx, r.GetName())
	if err != nil {
		return nil, err
	}
	if v, err = a.s.controller.SetParams(ctx, v.ID, r.GetParameters()); err != nil {
		return nil, err
	}
	return a.volume(ctx, v, true), nil
}
