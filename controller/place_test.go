package controller_test

import (
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller"
)

// TestPlaceNode: where somebody says that a node stands is where volumes are placed at once, and what no topology could
// name is refused.
func TestPlaceNode(t *testing.T) {
	t.Parallel()
	b := newBench(t, 3)
	n, err := b.PlaceNode(soon(t), "n2", new("west"), new("r7"), false)
	require.NoError(t, err)
	assert.Equal(t, "west", n.Zone)
	assert.Equal(t, "r7", n.Rack)
	n, err = b.PlaceNode(soon(t), "n2", nil, new(""), false)
	require.NoError(t, err)
	assert.Equal(t, "west", n.Zone)
	assert.Empty(t, n.Rack)
	v, err := b.CreateVolume(soon(t), controller.CreateRequest{
		Name: "v", RequiredBytes: 1 << 20, Params: map[string]string{controller.ParamReplicas: "1"},
		Requisite: []map[string]string{{controller.TopologyZone: "west"}},
	})
	require.NoError(t, err)
	assert.Equal(t, trivet.NodeID("n2"), v.Replicas[0].Node)

	for _, bad := range []string{"a b", "-a", "a_", "ü", string(make([]byte, controller.SegmentMax+1))} {
		_, err = b.PlaceNode(soon(t), "n2", nil, &bad, false)
		require.ErrorIs(t, err, trivet.ErrInvalid, bad)
		require.ErrorContains(t, err, "rack")
	}
	_, err = b.PlaceNode(soon(t), "n9", nil, nil, true)
	require.ErrorIs(t, err, trivet.ErrNotFound)
}
