package driver_test

import (
	"log/slog"
	"path/filepath"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/trivet-csi/trivet/driver"
)

// harness is a driver on a real socket over the two fakes.
type harness struct {
	csi.IdentityClient
	csi.ControllerClient
	csi.NodeClient
	csi.SnapshotMetadataClient

	ctrl     *fakeController
	node     *fakeNode
	changes  *fakeChanges
	ready    bool
	endpoint string
	dir      string
	conn     *grpc.ClientConn
}

// open starts a driver. change, if not nil, alters the configuration first.
func open(t *testing.T, change func(*harness, *driver.Config)) *harness {
	t.Helper()
	h := &harness{ctrl: newFakeController(), node: newFakeNode(), ready: true, dir: t.TempDir()}
	h.changes = newFakeChanges()
	h.endpoint = "unix://" + filepath.Join(h.dir, "csi.sock")
	cfg := driver.Config{
		Endpoint:   h.endpoint,
		Controller: h.ctrl,
		Node:       h.node,
		Changes:    h.changes,
		Ready:      func() bool { return h.ready },
		Version:    "1.2.3",
		Logger:     slog.New(slog.DiscardHandler),
	}
	if change != nil {
		change(h, &cfg)
	}
	s, err := driver.Open(t.Context(), cfg)
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, s.Close()) })
	h.conn = dial(t, h.endpoint)
	h.IdentityClient = csi.NewIdentityClient(h.conn)
	h.ControllerClient = csi.NewControllerClient(h.conn)
	h.NodeClient = csi.NewNodeClient(h.conn)
	h.SnapshotMetadataClient = csi.NewSnapshotMetadataClient(h.conn)
	return h
}

func dial(t *testing.T, endpoint string) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient(endpoint, grpc.WithTransportCredentials(insecure.NewCredentials()))
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, conn.Close()) })
	return conn
}

// requireCode stops the test unless err has the code and, as the specification demands, no details.
func requireCode(t *testing.T, want codes.Code, err error) {
	t.Helper()
	require.Equal(t, want, status.Code(err), "error: %v", err)
	require.Empty(t, status.Convert(err).Details())
}

func mountCap(mode csi.VolumeCapability_AccessMode_Mode) *csi.VolumeCapability {
	return &csi.VolumeCapability{
		AccessMode: &csi.VolumeCapability_AccessMode{Mode: mode},
		AccessType: &csi.VolumeCapability_Mount{Mount: &csi.VolumeCapability_MountVolume{FsType: "ext4"}},
	}
}

func blockCap(mode csi.VolumeCapability_AccessMode_Mode) *csi.VolumeCapability {
	return &csi.VolumeCapability{
		AccessMode: &csi.VolumeCapability_AccessMode{Mode: mode},
		AccessType: &csi.VolumeCapability_Block{Block: &csi.VolumeCapability_BlockVolume{}},
	}
}

const (
	snw  = csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER
	snsw = csi.VolumeCapability_AccessMode_SINGLE_NODE_SINGLE_WRITER
	snmw = csi.VolumeCapability_AccessMode_SINGLE_NODE_MULTI_WRITER
	snro = csi.VolumeCapability_AccessMode_SINGLE_NODE_READER_ONLY
	mnmw = csi.VolumeCapability_AccessMode_MULTI_NODE_MULTI_WRITER
)

func createReq(name string) *csi.CreateVolumeRequest {
	return &csi.CreateVolumeRequest{
		Name:               name,
		CapacityRange:      &csi.CapacityRange{RequiredBytes: 64 << 20},
		VolumeCapabilities: []*csi.VolumeCapability{mountCap(snmw)},
		Parameters:         map[string]string{"replicas": "3"},
	}
}

// mustCreate makes a volume and returns its handle.
func (h *harness) mustCreate(t *testing.T, name string) string {
	t.Helper()
	resp, err := h.CreateVolume(t.Context(), createReq(name))
	require.NoError(t, err)
	return resp.GetVolume().GetVolumeId()
}

// mustAttach attaches a volume to this node and returns the publish context.
func (h *harness) mustAttach(t *testing.T, handle string) map[string]string {
	t.Helper()
	resp, err := h.ControllerPublishVolume(t.Context(), publishReq(handle))
	require.NoError(t, err)
	return resp.GetPublishContext()
}

func publishReq(handle string) *csi.ControllerPublishVolumeRequest {
	return &csi.ControllerPublishVolumeRequest{
		VolumeId: handle, NodeId: string(thisNode), VolumeCapability: mountCap(snmw),
	}
}

func (h *harness) stageReq(handle string) *csi.NodeStageVolumeRequest {
	return &csi.NodeStageVolumeRequest{
		VolumeId: handle, StagingTargetPath: filepath.Join(h.dir, "staging"), VolumeCapability: mountCap(snmw),
		PublishContext: map[string]string{"epoch": "1"},
	}
}

func (h *harness) nodePublishReq(handle, target string) *csi.NodePublishVolumeRequest {
	return &csi.NodePublishVolumeRequest{
		VolumeId: handle, StagingTargetPath: filepath.Join(h.dir, "staging"),
		TargetPath: filepath.Join(h.dir, target), VolumeCapability: mountCap(snmw),
		PublishContext: map[string]string{"epoch": "1"},
	}
}
