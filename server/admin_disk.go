package server

import (
	"context"

	"github.com/trivet-csi/trivet/api"
)

// ShowDisks implements api.AdminServer.
func (a *admin) ShowDisks(context.Context, *api.ShowDisksRequest) (*api.ShowDisksResponse, error) {
	n, err := a.s.node()
	if err != nil {
		return nil, err
	}
	out := &api.ShowDisksResponse{Node: string(a.s.cfg.Node)}
	disks, err := n.DiskUse()
	if err != nil {
		return nil, err
	}
	for _, d := range disks {
		out.Disks = append(out.Disks, &api.DiskUse{
			Id: string(d.ID), Path: d.Path, SizeBytes: d.Space.TotalBytes, AvailableBytes: d.Space.FreeBytes - d.ReadyBytes,
			ReserveBytes: d.Space.ReserveBytes, RoomBytes: d.RoomBytes, LiveBytes: d.Log.LiveBytes,
			SnapshotBytes: d.Log.SnapshotBytes, RetainedBytes: d.Log.RetainedBytes, GarbageBytes: d.Log.GarbageBytes,
			FreeFileBytes: d.Log.FreeBytes, Segments: int64(d.Log.Segments),
		})
	}
	return out, nil
}
