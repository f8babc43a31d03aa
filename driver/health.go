package driver

import (
	"context"
	"fmt"
	"strings"
	"unicode/utf8"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller"
)

// healthPageMax bounds a page of ControllerListVolumeHealth as pageMax does one of ListVolumes: an entry may have
// several messages.
const healthPageMax = 500

// messageMax is the length, in bytes, to which Kubernetes cuts the message of a condition.
const messageMax = 1024

// Examiner is what the driver needs to know of the health of volumes, linearizably.
type Examiner interface {
	// VolumeHealth returns a volume and what is wrong with it; ErrNotFound.
	VolumeHealth(ctx context.Context, id trivet.VolumeID) (controller.VolumeHealth, error)
	// Unhealthy returns the volumes with which something is wrong, sorted by ID.
	Unhealthy(ctx context.Context) ([]controller.VolumeHealth, error)
}

// NodeExaminer is what the driver needs to know of the health of this machine. node.Node documents the methods.
type NodeExaminer interface {
	VolumeHealth(id trivet.VolumeID) (conditions []trivet.Condition, here bool)
	StorageHealth() []trivet.Condition
}

// ControllerGetVolumeHealth says what is wrong with a volume, wherever it is used.
func (s *controllerServer) ControllerGetVolumeHealth(ctx context.Context, req *csi.ControllerGetVolumeHealthRequest,
) (*csi.ControllerGetVolumeHealthResponse, error) {
	if err := checkVolumeID(req.GetVolumeId()); err != nil {
		return nil, err
	}
	id, err := parseVolume(req.GetVolumeId())
	if err != nil {
		return nil, err
	}
	h, err := s.ctrl.VolumeHealth(ctx, id)
	if err != nil {
		return nil, err
	}
	if !known(&h.Volume) {
		return nil, fmt.Errorf("volume %s is %s: %w", id, h.Volume.Phase, trivet.ErrNotFound)
	}
	return &csi.ControllerGetVolumeHealthResponse{VolumeHealth: healthOf(id, h.Conditions)}, nil
}

// ControllerListVolumeHealth lists the volumes with which something is wrong, in the order of their IDs. Tokens are
// those of ListVolumes.
func (s *controllerServer) ControllerListVolumeHealth(ctx context.Context, req *csi.ControllerListVolumeHealthRequest,
) (*csi.ControllerListVolumeHealthResponse, error) {
	after, page, err := pageOf(req.GetMaxEntries(), healthPageMax, req.GetStartingToken())
	if err != nil {
		return nil, err
	}
	ill, err := s.ctrl.Unhealthy(ctx)
	if err != nil {
		return nil, err
	}
	resp := &csi.ControllerListVolumeHealthResponse{}
	for i := range ill {
		switch v := &ill[i].Volume; {
		case v.ID <= after || !known(v):
		case len(resp.Entries) == page:
			resp.NextToken = resp.Entries[page-1].GetVolumeId()
			return resp, nil
		default:
			resp.Entries = append(resp.Entries, healthOf(v.ID, ill[i].Conditions))
		}
	}
	return resp, nil
}

// pageOf reads where a page begins and how long it is at most: ErrInvalid for a negative length, errToken for a token
// that was never given out.
func pageOf(maxEntries int32, most int, token string) (after trivet.VolumeID, page int, err error) {
	if maxEntries < 0 {
		return 0, 0, fmt.Errorf("max_entries %d is negative: %w", maxEntries, trivet.ErrInvalid)
	}
	if token != "" {
		if after, err = trivet.ParseVolumeID(token); err != nil {
			return 0, 0, fmt.Errorf("starting_token %q was never given out: %w", token, errToken)
		}
	}
	if maxEntries == 0 {
		return after, most, nil
	}
	return after, min(int(maxEntries), most), nil
}

// volumeStatuses are the statuses of conditions, as CSI has them of volumes.
var volumeStatuses = map[trivet.HealthStatus]csi.VolumeHealthErrorType{
	trivet.HealthDegraded:     csi.VolumeHealthErrorType_DEGRADED,
	trivet.HealthInaccessible: csi.VolumeHealthErrorType_INACCESSIBLE,
	trivet.HealthDataLoss:     csi.VolumeHealthErrorType_DATA_LOSS,
}

func healthOf(id trivet.VolumeID, conditions []trivet.Condition) *csi.VolumeHealth {
	out := &csi.VolumeHealth{VolumeId: id.String()}
	for _, c := range conditions {
		out.HealthStatuses = append(out.HealthStatuses, &csi.VolumeHealth_VolumeHealthEntry{
			Status: volumeStatuses[c.Status], Reason: c.Reason, Message: shortened(c.Message),
		})
	}
	return out
}

// shortened cuts a message to what Kubernetes keeps of it, between characters, and says that it did.
func shortened(s string) string {
	const more = "…"
	s = strings.ToValidUTF8(s, "?")
	if len(s) <= messageMax {
		return s
	}
	s = s[:messageMax-len(more)]
	for !utf8.ValidString(s) {
		s = s[:len(s)-1]
	}
	return s + more
}

// NodeGetVolumeHealth says what is wrong with a volume as seen from this machine, mounted here or not: what the machine
// knows by itself, and what the catalogue knows. While the catalogue does not answer, the former alone is told if it is
// anything; else the call fails, which leaves what was known before in force.
func (s *nodeServer) NodeGetVolumeHealth(ctx context.Context, req *csi.NodeGetVolumeHealthRequest,
) (*csi.NodeGetVolumeHealthResponse, error) {
	if err := checkVolumeID(req.GetVolumeId()); err != nil {
		return nil, err
	}
	id, err := parseVolume(req.GetVolumeId())
	if err != nil {
		return nil, err
	}
	found, here := s.node.VolumeHealth(id)
	h, err := s.ctrl.VolumeHealth(ctx, id)
	switch {
	case err == nil && !here && !known(&h.Volume):
		return nil, fmt.Errorf("volume %s is %s: %w", id, h.Volume.Phase, trivet.ErrNotFound)
	case absent(err) && here: // it was deleted under its user, who is to hear of it
	case err != nil && len(found) == 0:
		return nil, err
	}
	for _, c := range h.Conditions {
		found = trivet.AddCondition(found, c)
	}
	return &csi.NodeGetVolumeHealthResponse{VolumeHealth: healthOf(id, found)}, nil
}

// NodeGetStorageHealth says what is wrong with this machine, whatever volume is used.
func (s *nodeServer) NodeGetStorageHealth(context.Context, *csi.NodeGetStorageHealthRequest,
) (*csi.NodeGetStorageHealthResponse, error) {
	resp := &csi.NodeGetStorageHealthResponse{}
	for _, c := range s.node.StorageHealth() {
		status := csi.StorageHealthErrorType_STORAGE_DEGRADED
		if c.Status != trivet.HealthDegraded {
			status = csi.StorageHealthErrorType_STORAGE_UNREACHABLE
		}
		resp.BackendHealth = append(resp.BackendHealth, &csi.NodeGetStorageHealthResponse_StorageBackendHealth{
			Status: status, Reason: c.Reason, Message: shortened(c.Message),
		})
	}
	return resp, nil
}
