package controller_test

import (
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller"
	"github.com/trivet-csi/trivet/controller/meta"
)

// rackNodes are two zones of two racks with two nodes each: n1, n2 in z1/r1, n3, n4 in z1/r2, n5, n6 in z2/r1, n7,
// n8 in z2/r2. The lower the number, the more room.
func rackNodes() []meta.Node {
	var nodes []meta.Node
	for n := 1; n <= 8; n++ {
		nd := testNode(n, now)
		nd.Zone, nd.Rack = []string{"z1", "z2"}[(n-1)/4], []string{"r1", "r2"}[(n-1)/2%2]
		nd.Disks[0].FreeBytes -= int64(n) * gib
		nodes = append(nodes, nd)
	}
	return nodes
}

func TestPlaceInRacks(t *testing.T) {
	t.Parallel()
	place := func(change func(*controller.PlaceRequest), n int) (out []string, err error) {
		req := controller.PlaceRequest{SizeBytes: gib, Replicas: n}
		change(&req)
		got, err := controller.Place(rackNodes(), req, now)
		for _, r := range got {
			out = append(out, string(r.Node))
		}
		return out, err
	}
	got, err := place(func(*controller.PlaceRequest) {}, 3)
	require.NoError(t, err)
	require.Equal(t, []string{"n1", "n5", "n3"}, got, "zones first, then racks, then room")
	got, err = place(func(r *controller.PlaceRequest) { r.Spread = controller.SpreadRack }, 3)
	require.NoError(t, err)
	require.Equal(t, []string{"n1", "n5", "n3"}, got)
	_, err = place(func(r *controller.PlaceRequest) { r.Spread = controller.SpreadRack }, 5)
	require.ErrorIs(t, err, trivet.ErrNoSpace)
	require.ErrorContains(t, err, "in a rack each: 4 of them have a qualifying node")
	_, err = place(func(r *controller.PlaceRequest) { r.Spread = controller.SpreadZone }, 3)
	require.ErrorContains(t, err, "in a zone each: 2 of them")

	// A rack is what it is within its zone, and a segment may name both.
	inRack := []map[string]string{{controller.TopologyZone: "z2", controller.TopologyRack: "r1"}}
	got, err = place(func(r *controller.PlaceRequest) { r.Requisite = inRack }, 1)
	require.NoError(t, err)
	require.Equal(t, []string{"n5"}, got)
	got, err = place(func(r *controller.PlaceRequest) { r.Preferred = inRack }, 3)
	require.NoError(t, err)
	require.Equal(t, "n5", got[0])

	// One more beside two: the rack that has none, and, where that was ruled out, no rack twice.
	beside := []meta.Replica{{Node: "n1"}, {Node: "n5"}, {Node: "n7"}}
	got, err = place(func(r *controller.PlaceRequest) { r.Spread, r.Beside = controller.SpreadRack, beside }, 1)
	require.NoError(t, err)
	require.Equal(t, []string{"n3"}, got)
	_, err = place(func(r *controller.PlaceRequest) {
		r.Spread, r.Beside = controller.SpreadRack, beside
		r.Avoid = map[trivet.NodeID]bool{"n3": true, "n4": true}
	}, 1)
	require.ErrorIs(t, err, trivet.ErrNoSpace)
}
