package server_test

import (
	"errors"
	"io"
	"path/filepath"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/api"
	"github.com/trivet-csi/trivet/driver"
	"github.com/trivet-csi/trivet/internal/pki"
	"github.com/trivet-csi/trivet/server"
)

// csiController is a csi-controller, as sidecars see it: a proxy that reaches a server of the cluster over mutual TLS.
func csiController(t *testing.T, address, dir string) *grpc.ClientConn {
	t.Helper()
	endpoint := "unix://" + filepath.Join(t.TempDir(), "c.sock")
	p, err := driver.OpenProxy(t.Context(), driver.ProxyConfig{
		Endpoint: endpoint, Upstream: connect(t, address, dir, pki.RoleClient), Version: "test",
	})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, p.Close()) })
	conn, err := grpc.NewClient(endpoint, grpc.WithTransportCredentials(insecure.NewCredentials()))
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, conn.Close()) })
	return conn
}

// rangesOf reads a stream of GetMetadataDelta to its end: offsets and sizes.
func rangesOf(t *testing.T, c csi.SnapshotMetadataClient, req *csi.GetMetadataDeltaRequest) (all []int64) {
	t.Helper()
	require.NoError(t, again(t, func() error {
		all = nil
		stream, err := c.GetMetadataDelta(t.Context(), req)
		for err == nil {
			var m *csi.GetMetadataDeltaResponse
			if m, err = stream.Recv(); errors.Is(err, io.EOF) {
				return nil
			}
			for _, x := range m.GetBlockMetadata() {
				all = append(all, x.GetByteOffset(), x.GetSizeBytes())
			}
		}
		return err
	}))
	return all
}

// TestCSILive is a volume in use on three real servers, seen through csi-controller: its attributes change, the
// metadata of its snapshots tells what was written, and its health what fails.
func TestCSILive(t *testing.T) {
	t.Parallel()
	c := snapshotCluster(t, func(cfg *server.Config) { cfg.Lease = 15 * time.Second })
	ctx := t.Context()
	conn := csiController(t, c.Config(0).Advertise, c.Path("client"))
	ctrl, metadata := csi.NewControllerClient(conn), csi.NewSnapshotMetadataClient(conn)
	create := &csi.CreateVolumeRequest{
		Name: "v", CapacityRange: &csi.CapacityRange{RequiredBytes: 64 << 20},
		VolumeCapabilities: []*csi.VolumeCapability{{
			AccessMode: &csi.VolumeCapability_AccessMode{Mode: csi.VolumeCapability_AccessMode_SINGLE_NODE_MULTI_WRITER},
			AccessType: &csi.VolumeCapability_Block{Block: &csi.VolumeCapability_BlockVolume{}},
		}},
		MutableParameters: map[string]string{"iopsLimit": "5000"},
	}
	var made *csi.CreateVolumeResponse
	require.NoError(t, again(t, func() (err error) { made, err = ctrl.CreateVolume(ctx, create); return err }))
	handle := made.GetVolume().GetVolumeId()
	client, stop := serveNBD(t, c, 0, "v")
	defer stop()
	mustWrite(t, client, 0, 'a')
	mustWrite(t, client, 7, 'a')
	first := snapshot(t, c, 1, "v", "first")

	modify := func(params map[string]string) error {
		_, err := ctrl.ControllerModifyVolume(ctx, &csi.ControllerModifyVolumeRequest{
			VolumeId: handle, MutableParameters: params,
		})
		return err
	}
	require.Equal(t, codes.InvalidArgument, status.Code(modify(map[string]string{"iopsLimit": "9", "spread": "zone"})))
	require.NoError(t, modify(map[string]string{"iopsLimit": "4000", "cacheMode": "writeBack", "priority": "80"}))
	v, err := c.Admin(2).GetVolume(ctx, &api.VolumeRequest{Name: "v"})
	require.NoError(t, err)
	require.Equal(t, []string{"4000", "writeBack", "80"}, []string{
		v.GetParameters()["iopsLimit"], v.GetParameters()["cacheMode"], v.GetParameters()["priority"],
	})

	mustWrite(t, client, 7, 'b') // while the cache changes
	mustWrite(t, client, 9, 'b')
	second := snapshot(t, c, 2, "v", "second")
	delta := &csi.GetMetadataDeltaRequest{BaseSnapshotId: first.GetId(), TargetSnapshotId: second.GetId(), MaxResults: 1}
	const block = trivet.BlockSize
	require.Equal(t, []int64{7 * block, block, 9 * block, block}, rangesOf(t, metadata, delta))
	delta.StartingOffset = 8 * block
	require.Equal(t, []int64{9 * block, block}, rangesOf(t, metadata, delta))

	health := func() []string {
		h, err := ctrl.ControllerGetVolumeHealth(ctx, &csi.ControllerGetVolumeHealthRequest{VolumeId: handle})
		if err != nil {
			return []string{err.Error()}
		}
		out := []string{}
		for _, e := range h.GetVolumeHealth().GetHealthStatuses() {
			out = append(out, e.GetStatus().String()+" "+e.GetReason())
		}
		return out
	}
	require.Eventually(t, func() bool { return len(health()) == 0 }, eventuallyTimeout, 50*time.Millisecond)
	c.Stop(2)
	require.Eventually(t, func() bool {
		got := health()
		return len(got) == 1 && got[0] == "DEGRADED NodeDown"
	}, eventuallyTimeout, 50*time.Millisecond)
	list, err := ctrl.ControllerListVolumeHealth(ctx, &csi.ControllerListVolumeHealthRequest{})
	require.NoError(t, err)
	require.Len(t, list.GetEntries(), 1)
	require.Equal(t, handle, list.GetEntries()[0].GetVolumeId())
	delta.StartingOffset = 0
	require.Len(t, rangesOf(t, metadata, delta), 4, "those that are left tell it, too")
	c.Start(2)
	require.Eventually(t, func() bool { return len(health()) == 0 }, eventuallyTimeout, 50*time.Millisecond)
}
