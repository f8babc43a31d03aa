package server_test

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
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
	"github.com/trivet-csi/trivet/internal/testutil"
)

// TestReadOnlyMany: what one node has written, three read at the same time, through kernel devices; nobody can write
// meanwhile, and when the last reader is gone somebody can again.
func TestReadOnlyMany(t *testing.T) {
	t.Parallel()
	if testing.Short() {
		t.Skip("runs a cluster")
	}
	if _, err := os.Stat("/dev/fuse"); err != nil || os.Getuid() != 0 {
		t.Skip("needs root and /dev/fuse")
	}
	c := testutil.StartCluster(t, 3, nil)
	v := create(t, c, "x")
	writer, stop := serveNBD(t, c, 0, "x")
	mustWrite(t, writer, 3, 'a')
	stop()
	requireReadersByNBD(t, c)

	capability := &csi.VolumeCapability{
		AccessMode: &csi.VolumeCapability_AccessMode{Mode: csi.VolumeCapability_AccessMode_MULTI_NODE_READER_ONLY},
		AccessType: &csi.VolumeCapability_Block{Block: &csi.VolumeCapability_BlockVolume{}},
	}
	var conns []*grpc.ClientConn
	for i := range 3 {
		conn, err := grpc.NewClient(c.CSI(i), grpc.WithTransportCredentials(insecure.NewCredentials()))
		require.NoError(t, err)
		t.Cleanup(func() { _ = conn.Close() })
		conns = append(conns, conn)
	}
	controller := csi.NewControllerClient(conns[0])
	publish := func(i int) map[string]string {
		var resp *csi.ControllerPublishVolumeResponse
		require.NoError(t, again(t, func() (err error) {
			resp, err = controller.ControllerPublishVolume(t.Context(), &csi.ControllerPublishVolumeRequest{
				VolumeId: v.GetId(), NodeId: string(c.Config(i).Node), VolumeCapability: capability,
			})
			return err
		}))
		return resp.GetPublishContext()
	}
	for i := range 3 {
		home := c.Path(string(c.Config(i).Node))
		device := stageBlock(t, csi.NewNodeClient(conns[i]), v.GetId(), home, capability, publish(i))
		requireReads(t, device, 3, 'a')
		f, err := os.OpenFile(device, os.O_WRONLY|os.O_SYNC, 0)
		if err == nil {
			_, err = f.WriteAt(pattern('b'), 0)
			require.Error(t, err, "nobody writes")
			_ = f.Close()
		}
	}
	got, err := controller.ControllerGetVolume(t.Context(), &csi.ControllerGetVolumeRequest{VolumeId: v.GetId()})
	require.NoError(t, err)
	require.ElementsMatch(t, []string{"node-0", "node-1", "node-2"}, got.GetStatus().GetPublishedNodeIds())
	_, err = controller.ControllerPublishVolume(t.Context(), &csi.ControllerPublishVolumeRequest{
		VolumeId: v.GetId(), NodeId: "node-1", VolumeCapability: &csi.VolumeCapability{
			AccessMode: &csi.VolumeCapability_AccessMode{Mode: csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER},
			AccessType: capability.GetAccessType(),
		},
	})
	require.Equal(t, codes.AlreadyExists, status.Code(err), "%v", err)

	for i := range 3 {
		home := c.Path(string(c.Config(i).Node))
		unstageBlock(t, csi.NewNodeClient(conns[i]), v.GetId(), home)
		unpublish(t, controller, v.GetId(), string(c.Config(i).Node))
		for j := i + 1; j < 3; j++ {
			requireReads(t, filepath.Join(c.Path(string(c.Config(j).Node)), "target"), 3, 'a')
		}
	}
	writer, stop = serveNBD(t, c, 1, "x")
	requireBlock(t, writer, 3, 'a')
	mustWrite(t, writer, 3, 'b')
	stop()
}

// requireReadersByNBD serves x read-only on two nodes at once: both read, neither writes, and all are told of both.
func requireReadersByNBD(t *testing.T, c *testutil.Cluster) {
	t.Helper()
	first, stopFirst := serveReadOnly(t, c, 0)
	second, stopSecond := serveReadOnly(t, c, 1)
	for _, client := range []*nbdClient{first, second} {
		requireBlock(t, client, 3, 'a')
		require.Error(t, client.write(pattern('b'), 0))
	}
	list, err := c.Admin(2).ListVolumes(t.Context(), &api.ListVolumesRequest{})
	require.NoError(t, err)
	require.Equal(t, []string{"node-0", "node-1"}, list.GetVolumes()[0].GetAttachedNodes())
	require.True(t, list.GetVolumes()[0].GetAttachedReadOnly())
	stopFirst()
	requireBlock(t, second, 3, 'a')
	stopSecond()
}

func serveReadOnly(t *testing.T, c *testutil.Cluster, i int) (*nbdClient, func()) {
	t.Helper()
	socket := c.Path(fmt.Sprintf("ro-%d.nbd", i))
	_, cancel := serve(t, c.Admin(i), &api.ServeVolumeRequest{Name: "x", Socket: socket, ReadOnly: true})
	client, err := dialNBD(t.Context(), socket, "x")
	require.NoError(t, err)
	return client, func() {
		require.NoError(t, client.close())
		cancel() // the server notices and detaches
		require.Eventually(t, func() bool {
			v, err := c.Admin(i).GetVolume(t.Context(), &api.VolumeRequest{Name: "x"})
			return err == nil && !slices.Contains(v.GetAttachedNodes(), fmt.Sprintf("node-%d", i))
		}, time.Minute, 20*time.Millisecond)
	}
}

// stageBlock stages and publishes a block volume and returns the path of the device.
func stageBlock(t *testing.T, node csi.NodeClient, id, home string, capability *csi.VolumeCapability,
	published map[string]string,
) string {
	t.Helper()
	staging, target := filepath.Join(home, "staging"), filepath.Join(home, "target")
	require.NoError(t, os.MkdirAll(staging, 0o700))
	require.NoError(t, again(t, func() error {
		_, err := node.NodeStageVolume(t.Context(), &csi.NodeStageVolumeRequest{
			VolumeId: id, StagingTargetPath: staging, VolumeCapability: capability, PublishContext: published,
		})
		return err
	}))
	readOnly := capability.GetAccessMode().GetMode() == csi.VolumeCapability_AccessMode_MULTI_NODE_READER_ONLY
	require.NoError(t, again(t, func() error {
		_, err := node.NodePublishVolume(t.Context(), &csi.NodePublishVolumeRequest{
			VolumeId: id, StagingTargetPath: staging, TargetPath: target, VolumeCapability: capability,
			PublishContext: published, Readonly: readOnly,
		})
		return err
	}))
	return target
}

func unpublish(t *testing.T, controller csi.ControllerClient, id, node string) {
	t.Helper()
	require.NoError(t, again(t, func() error {
		_, err := controller.ControllerUnpublishVolume(t.Context(), &csi.ControllerUnpublishVolumeRequest{
			VolumeId: id, NodeId: node,
		})
		return err
	}))
}

func unstageBlock(t *testing.T, node csi.NodeClient, id, home string) {
	t.Helper()
	require.NoError(t, again(t, func() error {
		_, err := node.NodeUnpublishVolume(t.Context(), &csi.NodeUnpublishVolumeRequest{
			VolumeId: id, TargetPath: filepath.Join(home, "target"),
		})
		return err
	}))
	require.Eventually(t, func() bool { // a probe of the new block device may have it open
		_, err := node.NodeUnstageVolume(t.Context(), &csi.NodeUnstageVolumeRequest{
			VolumeId: id, StagingTargetPath: filepath.Join(home, "staging"),
		})
		return err == nil
	}, time.Minute, 50*time.Millisecond)
}

func requireReads(t *testing.T, device string, lba int64, want byte) {
	t.Helper()
	f, err := os.Open(device)
	require.NoError(t, err)
	defer f.Close()
	got := make([]byte, trivet.BlockSize)
	_, err = f.ReadAt(got, lba*trivet.BlockSize)
	require.NoError(t, err)
	require.Equal(t, pattern(want), got)
}
