package server_test

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

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

// TestTwoWriters is a live migration as the orchestrator does it: a raw block volume is published on a second node
// while the first still writes; processes on both write and read what the other has written, through kernel devices; a
// third node is refused; the first lets go, and the second goes on writing.
func TestTwoWriters(t *testing.T) {
	t.Parallel()
	if testing.Short() {
		t.Skip("runs a cluster")
	}
	if _, err := os.Stat("/dev/fuse"); err != nil || os.Getuid() != 0 {
		t.Skip("needs root and /dev/fuse")
	}
	c := testutil.StartCluster(t, 3, nil)
	v := createBy(t, c, &api.CreateVolumeRequest{
		Name: "vm", SizeBytes: 64 << 20, Parameters: map[string]string{"cacheMode": "writeBack"},
	})
	m := &migration{t: t, dir: c.Path("pods"), nodes: []string{"node-0", "node-1", "node-2"}, volume: v.GetId()}
	for i := range 3 {
		conn, err := grpc.NewClient(c.CSI(i), grpc.WithTransportCredentials(insecure.NewCredentials()))
		require.NoError(t, err)
		t.Cleanup(func() { _ = conn.Close() })
		m.conns = append(m.conns, conn)
	}
	first := m.stage(0)
	m.write(first, 3, 'a')
	second := m.stage(1)
	_, err := m.publish(2)
	require.Equal(t, codes.FailedPrecondition, status.Code(err), "%v", err)
	require.ErrorContains(t, err, "node-0, node-1")
	for i, device := range []string{first, second, first, second} {
		other := []string{second, first}[i%2]
		m.write(device, 3, byte('b'+i))
		m.requireReads(other, 3, byte('b'+i))
		m.write(device, int64(10+i), byte('m'+i))
	}
	list, err := c.Admin(2).ListVolumes(t.Context(), &api.ListVolumesRequest{})
	require.NoError(t, err)
	require.Equal(t, []string{"node-0", "node-1"}, list.GetVolumes()[0].GetAttachedNodes())

	m.leave(0)
	m.requireReads(second, 3, 'e')
	m.write(second, 3, 'z')
	for i := range 4 {
		m.requireReads(second, int64(10+i), byte('m'+i))
	}
	m.leave(1)
	requireSharedByNBD(t, c)
}

// requireSharedByNBD serves the volume on two nodes by the command line's RPC, with the other named.
func requireSharedByNBD(t *testing.T, c *testutil.Cluster) {
	t.Helper()
	var clients [2]*nbdClient
	for i := range clients {
		socket := c.Path(fmt.Sprintf("shared-%d.nbd", i))
		_, stop := serve(t, c.Admin(i), &api.ServeVolumeRequest{
			Name: "vm", Socket: socket, Shared: true, With: fmt.Sprintf("node-%d", 1-i),
		})
		defer stop()
		var err error
		clients[i], err = dialNBD(t.Context(), socket, "vm")
		require.NoError(t, err)
		defer clients[i].close()
	}
	requireBlock(t, clients[0], 3, 'z')
	mustWrite(t, clients[0], 3, 'x')
	requireBlock(t, clients[1], 3, 'x')
	mustWrite(t, clients[1], 3, 'y')
	requireBlock(t, clients[0], 3, 'y')
}

// migration drives a volume by CSI on several nodes.
type migration struct {
	t      *testing.T
	dir    string   // of the pods
	nodes  []string // their names
	volume string
	conns  []*grpc.ClientConn
}

func (m *migration) capability() *csi.VolumeCapability {
	return &csi.VolumeCapability{
		AccessMode: &csi.VolumeCapability_AccessMode{Mode: csi.VolumeCapability_AccessMode_MULTI_NODE_MULTI_WRITER},
		AccessType: &csi.VolumeCapability_Block{Block: &csi.VolumeCapability_BlockVolume{}},
	}
}

func (m *migration) home(i int) string { return filepath.Join(m.dir, m.nodes[i]) }

func (m *migration) publish(i int) (map[string]string, error) {
	var resp *csi.ControllerPublishVolumeResponse
	err := again(m.t, func() (err error) {
		resp, err = csi.NewControllerClient(m.conns[0]).ControllerPublishVolume(m.t.Context(),
			&csi.ControllerPublishVolumeRequest{VolumeId: m.volume, NodeId: m.nodes[i], VolumeCapability: m.capability()})
		return err
	})
	return resp.GetPublishContext(), err
}

// stage attaches the volume to a node and returns the device in a pod there.
func (m *migration) stage(i int) string {
	m.t.Helper()
	published, err := m.publish(i)
	require.NoError(m.t, err)
	return stageBlock(m.t, csi.NewNodeClient(m.conns[i]), m.volume, m.home(i), m.capability(), published)
}

func (m *migration) leave(i int) {
	m.t.Helper()
	unstageBlock(m.t, csi.NewNodeClient(m.conns[i]), m.volume, m.home(i))
	unpublish(m.t, csi.NewControllerClient(m.conns[0]), m.volume, m.nodes[i])
}

// dd copies a block from one file to another by a process of its own, past the kernel's page cache, as whoever shares a
// disk has to.
func (m *migration) dd(in []byte, args ...string) []byte {
	m.t.Helper()
	cmd := exec.CommandContext(m.t.Context(), "dd",
		append([]string{fmt.Sprintf("bs=%d", trivet.BlockSize), "count=1", "status=none"}, args...)...)
	var out, problem bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(in), &out, &problem
	require.NoError(m.t, cmd.Run(), "dd %v: %s", args, problem.String())
	return out.Bytes()
}

func (m *migration) write(device string, lba int64, b byte) {
	m.t.Helper()
	m.dd(pattern(b), "of="+device, fmt.Sprintf("seek=%d", lba), "conv=notrunc", "oflag=direct", "iflag=fullblock")
}

func (m *migration) requireReads(device string, lba int64, want byte) {
	m.t.Helper()
	require.Equal(m.t, pattern(want), m.dd(nil, "if="+device, fmt.Sprintf("skip=%d", lba), "iflag=direct"))
}
