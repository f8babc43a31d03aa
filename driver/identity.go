package driver

import (
	"context"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/trivet-csi/trivet"
)

// identityServer serves csi.v1.Identity.
type identityServer struct {
	csi.UnimplementedIdentityServer

	version string
	ready   func(context.Context) bool

	snapshotTopology bool // Config.SnapshotTopology
}

// GetPluginInfo names the driver.
func (s *identityServer) GetPluginInfo(context.Context, *csi.GetPluginInfoRequest,
) (*csi.GetPluginInfoResponse, error) {
	return &csi.GetPluginInfoResponse{Name: trivet.DriverName, VendorVersion: s.version}, nil
}

// GetPluginCapabilities is the same at every node of a version.
func (s *identityServer) GetPluginCapabilities(context.Context, *csi.GetPluginCapabilitiesRequest,
) (*csi.GetPluginCapabilitiesResponse, error) {
	resp := &csi.GetPluginCapabilitiesResponse{}
	for _, t := range []csi.PluginCapability_Service_Type{
		csi.PluginCapability_Service_CONTROLLER_SERVICE,
		csi.PluginCapability_Service_VOLUME_ACCESSIBILITY_CONSTRAINTS,
		csi.PluginCapability_Service_SNAPSHOT_METADATA_SERVICE,
		csi.PluginCapability_Service_GROUP_CONTROLLER_SERVICE,
	} {
		resp.Capabilities = append(resp.Capabilities, &csi.PluginCapability{
			Type: &csi.PluginCapability_Service_{Service: &csi.PluginCapability_Service{Type: t}},
		})
	}
	resp.Capabilities = append(resp.Capabilities, expansionCapability())
	if s.snapshotTopology {
		resp.Capabilities = append(resp.Capabilities, snapshotTopologyCapability())
	}
	return resp, nil
}

// Probe answers "not ready" until the catalogue is joined: the sidecars then wait.
func (s *identityServer) Probe(ctx context.Context, _ *csi.ProbeRequest) (*csi.ProbeResponse, error) {
	return &csi.ProbeResponse{Ready: wrapperspb.Bool(s.ready(ctx))}, nil
}
