package driver

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller"
	"github.com/trivet-csi/trivet/controller/meta"
)

// controllerCapabilities are all that this version can do; csi-sanity and the sidecars call what
// stands here and nothing else.
var controllerCapabilities = []csi.ControllerServiceCapability_RPC_Type{
	csi.ControllerServiceCapability_RPC_CREATE_DELETE_VOLUME,
	csi.ControllerServiceCapability_RPC_PUBLISH_UNPUBLISH_VOLUME,
	csi.ControllerServiceCapability_RPC_LIST_VOLUMES,
	csi.ControllerServiceCapability_RPC_GET_CAPACITY,
	csi.ControllerServiceCapability_RPC_PUBLISH_READONLY,
	csi.ControllerServiceCapability_RPC_LIST_VOLUMES_PUBLISHED_NODES, // the reads are linearizable
	csi.ControllerServiceCapability_RPC_GET_VOLUME,
	csi.ControllerServiceCapability_RPC_SINGLE_NODE_MULTI_WRITER,
	csi.ControllerServiceCapability_RPC_MODIFY_VOLUME,
	csi.ControllerServiceCapability_RPC_GET_VOLUME_HEALTH,
	csi.ControllerServiceCapability_RPC_LIST_VOLUME_HEALTH,
	csi.ControllerServiceCapability_RPC_CREATE_DELETE_SNAPSHOT,
	csi.ControllerServiceCapability_RPC_LIST_SNAPSHOTS,
	csi.ControllerServiceCapability_RPC_GET_SNAPSHOT,
	csi.ControllerServiceCapability_RPC_CLONE_VOLUME,
	csi.ControllerServiceCapability_RPC_EXPAND_VOLUME,
}

// controllerServer serves csi.v1.Controller.
type controllerServer struct {
	csi.UnimplementedControllerServer

	ctrl     Controller
	busy     *inflight
	attaches *attachLimit
}

func newControllerServer(c Controller, maxVolumes int64) *controllerServer {
	return &controllerServer{ctrl: c, busy: newInflight(), attaches: newAttachLimit(c, maxVolumes)}
}

// ControllerGetCapabilities lists controllerCapabilities.
func (s *controllerServer) ControllerGetCapabilities(context.Context, *csi.ControllerGetCapabilitiesRequest,
) (*csi.ControllerGetCapabilitiesResponse, error) {
	resp := &csi.ControllerGetCapabilitiesResponse{}
	for _, t := range controllerCapabilities {
		resp.Capabilities = append(resp.Capabilities, &csi.ControllerServiceCapability{
			Type: &csi.ControllerServiceCapability_Rpc{Rpc: &csi.ControllerServiceCapability_RPC{Type: t}},
		})
	}
	return resp, nil
}

// CreateVolume makes a volume, or finds the one that the same request made before.
func (s *controllerServer) CreateVolume(ctx context.Context, req *csi.CreateVolumeRequest,
) (*csi.CreateVolumeResponse, error) {
	r, err := createRequest(req)
	if err != nil {
		return nil, err
	}
	done, err := s.busy.start("name " + r.Name)
	if err != nil {
		return nil, err
	}
	defer done()
	v, err := s.createVolume(ctx, r)
	if err != nil {
		return nil, err
	}
	if v.Phase == meta.PhaseCreating {
		return nil, fmt.Errorf("volume %s is still being made: %w", v.ID, trivet.ErrPending)
	}
	out := volumeOf(&v)
	out.ContentSource = req.GetVolumeContentSource() // the provisioner deletes a copy that does not say so
	return &csi.CreateVolumeResponse{Volume: out}, nil
}

// createRequest validates req and translates it.
func createRequest(req *csi.CreateVolumeRequest) (controller.CreateRequest, error) {
	r := controller.CreateRequest{Name: req.GetName(), Params: req.GetParameters()}
	if err := trivet.ValidateName(r.Name); err != nil {
		return r, err
	}
	if err := checkCapabilities(req.GetVolumeCapabilities()); err != nil {
		return r, err
	}
	if err := checkSource(req.GetVolumeContentSource()); err != nil {
		return r, err
	}
	params, err := controller.WithMutable(r.Params, req.GetMutableParameters())
	switch {
	case err != nil:
		return r, fmt.Errorf("mutable_parameters: %w", err)
	case req.GetVolumeContentSource() != nil && len(r.Params) == 0:
		r.Mutable = req.GetMutableParameters() // the others are those of the source
	default:
		r.Params = params
	}
	if r.RequiredBytes, r.LimitBytes, err = capacityRange(req.GetCapacityRange()); err != nil {
		return r, err
	}
	if r.RequiredBytes > 0 || req.GetVolumeContentSource() == nil { // else it is as large as its source
		if err = raiseForXFS(&r, req.GetVolumeCapabilities()); err != nil {
			return r, err
		}
	}
	top := req.GetAccessibilityRequirements()
	if r.Requisite, err = segmentsOf("requisite", top.GetRequisite()); err != nil {
		return r, err
	}
	if r.Preferred, err = segmentsOf("preferred", top.GetPreferred()); err != nil {
		return r, err
	}
	r.Source, err = parseSource(req.GetVolumeContentSource()) // last: it is a lookup by what it answers
	return r, err
}

// xfsBytesMin is the smallest filesystem that mkfs.xfs makes (xfsprogs 5.19 and later: 300 MB).
const xfsBytesMin = 300 << 20

func isXFS(c *csi.VolumeCapability) bool { return c.GetMount().GetFsType() == "xfs" }

// raiseForXFS raises the required size to what xfs needs; ErrOutOfRange when the limit is below.
func raiseForXFS(r *controller.CreateRequest, caps []*csi.VolumeCapability) error {
	if r.RequiredBytes >= xfsBytesMin || !slices.ContainsFunc(caps, isXFS) {
		return nil
	}
	if r.LimitBytes > 0 && r.LimitBytes < xfsBytesMin {
		return fmt.Errorf("capacity_range: limit of %d bytes: xfs needs at least %d; ask for more, or for ext4: %w",
			r.LimitBytes, xfsBytesMin, trivet.ErrOutOfRange)
	}
	r.RequiredBytes = xfsBytesMin
	return nil
}

// capacityRange returns the bounds of a volume's size in bytes; zero means unbounded.
func capacityRange(c *csi.CapacityRange) (required, limit int64, err error) {
	required, limit = c.GetRequiredBytes(), c.GetLimitBytes()
	switch {
	case required < 0 || limit < 0:
		return 0, 0, fmt.Errorf("capacity_range %d to %d bytes: negative: %w", required, limit, trivet.ErrInvalid)
	case limit > 0 && required > limit:
		return 0, 0, fmt.Errorf("capacity_range: required %d bytes exceed the limit of %d: %w",
			required, limit, trivet.ErrOutOfRange)
	}
	return required, limit, nil
}

// volumeOf describes v. The accessible topology is empty on purpose: see the package comment.
func volumeOf(v *meta.Volume) *csi.Volume {
	return &csi.Volume{VolumeId: v.ID.String(), CapacityBytes: v.SizeBytes}
}

// DeleteVolume deletes a volume. One that is unknown, or was never ours, is deleted already.
func (s *controllerServer) DeleteVolume(ctx context.Context, req *csi.DeleteVolumeRequest,
) (*csi.DeleteVolumeResponse, error) {
	if err := checkVolumeID(req.GetVolumeId()); err != nil {
		return nil, err
	}
	resp := &csi.DeleteVolumeResponse{}
	id, err := parseVolume(req.GetVolumeId())
	if err != nil {
		return resp, nil //nolint:nilerr // what was never there is gone
	}
	done, err := s.busy.start(id.String())
	if err != nil {
		return nil, err
	}
	defer done()
	if err := s.ctrl.DeleteVolume(ctx, id); err != nil && !absent(err) {
		return nil, err
	}
	return resp, nil
}

// ValidateVolumeCapabilities confirms the capabilities when a volume can have all of them; else it
// says which one it cannot have.
func (s *controllerServer) ValidateVolumeCapabilities(ctx context.Context,
	req *csi.ValidateVolumeCapabilitiesRequest,
) (*csi.ValidateVolumeCapabilitiesResponse, error) {
	if err := checkVolumeID(req.GetVolumeId()); err != nil {
		return nil, err
	}
	if len(req.GetVolumeCapabilities()) == 0 {
		return nil, fmt.Errorf("volume_capabilities are missing: %w", trivet.ErrInvalid)
	}
	refusal, err := refusalOf(req.GetVolumeCapabilities())
	if err != nil {
		return nil, err
	}
	if _, err := controller.WithMutable(nil, req.GetMutableParameters()); err != nil && refusal == "" {
		refusal = "mutable_parameters: " + err.Error()
	}
	if _, err := s.volume(ctx, req.GetVolumeId()); err != nil {
		return nil, err
	}
	if refusal != "" {
		return &csi.ValidateVolumeCapabilitiesResponse{Message: refusal}, nil
	}
	return &csi.ValidateVolumeCapabilitiesResponse{
		Confirmed: &csi.ValidateVolumeCapabilitiesResponse_Confirmed{
			VolumeCapabilities: req.GetVolumeCapabilities(),
			MutableParameters:  req.GetMutableParameters(),
		},
	}, nil
}

// refusalOf says which of the capabilities no volume can have, if any. One that is malformed is an
// error instead.
func refusalOf(cs []*csi.VolumeCapability) (refusal string, err error) {
	for _, c := range cs {
		_, err := capabilityOf(c)
		switch {
		case errors.Is(err, errCapability):
			refusal = err.Error()
		case err != nil:
			return "", err
		}
	}
	return refusal, nil
}

// volume returns the volume that a handle names. ErrNotFound also when the orchestrator has deleted
// it and it is kept by its reclaim policy or still being removed.
func (s *controllerServer) volume(ctx context.Context, handle string) (meta.Volume, error) {
	id, err := parseVolume(handle)
	if err != nil {
		return meta.Volume{}, err
	}
	v, err := s.ctrl.Volume(ctx, id)
	if err != nil {
		return meta.Volume{}, err
	}
	if !known(&v) {
		return meta.Volume{}, fmt.Errorf("volume %s is %s: %w", id, v.Phase, trivet.ErrNotFound)
	}
	return v, nil
}

// visible reports whether the orchestrator knows of a volume in phase p: CreateVolume has answered
// and DeleteVolume has not.
func visible(p meta.Phase) bool {
	switch p {
	case meta.PhaseAvailable, meta.PhaseBound, meta.PhaseFailed:
		return true
	default:
		return false
	}
}

// GetCapacity says how much room there is for new volumes with these parameters.
func (s *controllerServer) GetCapacity(ctx context.Context, req *csi.GetCapacityRequest,
) (*csi.GetCapacityResponse, error) {
	refusal, err := refusalOf(req.GetVolumeCapabilities())
	switch {
	case err != nil:
		return nil, err
	case refusal != "":
		return &csi.GetCapacityResponse{}, nil // there is no room for what cannot be made
	}
	segment, err := segmentOf("accessible_topology", req.GetAccessibleTopology())
	if err != nil {
		return nil, err
	}
	available, largest, err := s.ctrl.Capacity(ctx, req.GetParameters(), segment)
	if err != nil {
		return nil, err
	}
	return capacityResponse(available, largest, req.GetVolumeCapabilities()), nil
}
