package driver

import (
	"cmp"
	"context"
	"slices"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/trivet-csi/trivet/controller/meta"
)

// pageMax bounds a page of ListVolumes when the caller does not: at some 200 bytes an entry the
// answer stays below the 4 MiB that gRPC clients accept.
const pageMax = 10_000

// ListVolumes lists the volumes and the nodes that hold them, in the order of their IDs. The token
// is the last ID of the page before: it stays good when volumes come and go between pages.
func (s *controllerServer) ListVolumes(ctx context.Context, req *csi.ListVolumesRequest,
) (*csi.ListVolumesResponse, error) {
	after, page, err := pageOf(req.GetMaxEntries(), pageMax, req.GetStartingToken())
	if err != nil {
		return nil, err
	}
	volumes, err := s.ctrl.Volumes(ctx)
	if err != nil {
		return nil, err
	}
	volumes = slices.DeleteFunc(slices.Clone(volumes), func(v meta.Volume) bool {
		return v.ID <= after || !known(&v)
	})
	slices.SortFunc(volumes, func(a, b meta.Volume) int { return cmp.Compare(a.ID, b.ID) })
	resp := &csi.ListVolumesResponse{}
	if len(volumes) > page {
		volumes = volumes[:page]
		resp.NextToken = volumes[page-1].ID.String()
	}
	for i := range volumes {
		v := &volumes[i]
		resp.Entries = append(resp.Entries, &csi.ListVolumesResponse_Entry{
			Volume: volumeOf(v),
			Status: &csi.ListVolumesResponse_VolumeStatus{PublishedNodeIds: publishedNodes(v)},
		})
	}
	return resp, nil
}

// ControllerGetVolume describes one volume and the nodes that hold it.
func (s *controllerServer) ControllerGetVolume(ctx context.Context, req *csi.ControllerGetVolumeRequest,
) (*csi.ControllerGetVolumeResponse, error) {
	if err := checkVolumeID(req.GetVolumeId()); err != nil {
		return nil, err
	}
	v, err := s.volume(ctx, req.GetVolumeId())
	if err != nil {
		return nil, err
	}
	return &csi.ControllerGetVolumeResponse{
		Volume: volumeOf(&v),
		Status: &csi.ControllerGetVolumeResponse_VolumeStatus{PublishedNodeIds: publishedNodes(&v)},
	}, nil
}

// publishedNodes names the nodes that hold v, one whose detach waits for its fence included: the
// attacher must not take it for detached before ControllerUnpublishVolume has said so.
func publishedNodes(v *meta.Volume) []string {
	var out []string
	for _, n := range v.Holders() {
		out = append(out, string(n))
	}
	if v.Detaching != "" && v.Attached != nil && (v.Attached == nil || v.Detaching != v.Attached.Node) {
		out = append(out, string(v.Detaching))
	}
	return out
}

// capacityResponse never answers less than zero, which the specification forbids.
func capacityResponse(available, largest int64, caps []*csi.VolumeCapability) *csi.GetCapacityResponse {
	resp := &csi.GetCapacityResponse{
		AvailableCapacity: max(available, 0),
		MaximumVolumeSize: wrapperspb.Int64(max(largest, 0)),
	}
	if slices.ContainsFunc(caps, isXFS) {
		resp.MinimumVolumeSize = wrapperspb.Int64(xfsBytesMin)
	}
	return resp
}
