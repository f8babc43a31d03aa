package driver_test

import (
	"context"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller"
	"github.com/trivet-csi/trivet/driver"
	"github.com/trivet-csi/trivet/node"
)

// TestRacks: a node tells its rack, and requirements that name racks reach the placement.
func TestRacks(t *testing.T) {
	t.Parallel()
	h := open(t, func(h *harness, _ *driver.Config) { h.node.info = node.Info{Node: "n", Zone: "z", Rack: "r"} })
	info, err := h.NodeGetInfo(t.Context(), &csi.NodeGetInfoRequest{})
	require.NoError(t, err)
	require.Equal(t, map[string]string{
		"topology.csi.trivet.dev/node": "n", "topology.csi.trivet.dev/zone": "z", "topology.csi.trivet.dev/rack": "r",
	}, info.GetAccessibleTopology().GetSegments())

	var asked controller.CreateRequest
	h.ctrl.on("CreateVolume", func(_ context.Context, arg any) error {
		asked = arg.(controller.CreateRequest)
		return nil
	})
	req := createReq("a")
	req.AccessibilityRequirements = &csi.TopologyRequirement{
		Requisite: topologies(controller.TopologyRack, "r"), Preferred: topologies("Topology.csi.trivet.dev/RACK", "r"),
	}
	_, err = h.CreateVolume(t.Context(), req)
	require.NoError(t, err)
	want := []map[string]string{{controller.TopologyRack: "r"}}
	require.Equal(t, want, asked.Requisite)
	require.Equal(t, want, asked.Preferred)

	cfg := config(t)
	cfg.Node.(*fakeNode).info = node.Info{Node: "n", Rack: "a b"}
	_, err = driver.Open(t.Context(), cfg)
	require.ErrorIs(t, err, trivet.ErrInvalid)
	require.ErrorContains(t, err, "rack")
}

// TestCapacityOfXFS: what mkfs.xfs refuses is told before a claim asks for it.
func TestCapacityOfXFS(t *testing.T) {
	t.Parallel()
	h := open(t, nil)
	for fsType, want := range map[string]int64{"ext4": 0, "xfs": 300 << 20} {
		c := mountCap(snmw)
		c.GetMount().FsType = fsType
		resp, err := h.GetCapacity(t.Context(), &csi.GetCapacityRequest{VolumeCapabilities: []*csi.VolumeCapability{c}})
		require.NoError(t, err)
		require.Equal(t, want, resp.GetMinimumVolumeSize().GetValue(), fsType)
	}
}
