package meta_test

import (
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller/meta"
)

// TestPlaceNode: what somebody says of where a node stands outlives what the node says of itself, until it may say so
// again, each of zone and rack by itself.
func TestPlaceNode(t *testing.T) {
	t.Parallel()
	m := meta.NewMachine(nil)
	register := func(zone, rack string, i int) {
		t.Helper()
		n := node(1)
		n.Zone, n.Rack, n.Incarnation = zone, rack, incarnation(i)
		n.ZoneSet, n.RackSet = true, true // not for a node to say
		mustApply(t, m, meta.Command{RegisterNode: &meta.RegisterNode{Node: n}})
	}
	at := func(zone, rack string, zoneSet, rackSet bool) {
		t.Helper()
		n, ok := m.State().Node("n1")
		require.True(t, ok)
		assert.Equal(t, []any{zone, rack, zoneSet, rackSet}, []any{n.Zone, n.Rack, n.ZoneSet, n.RackSet})
	}
	place := func(zone, rack *string) meta.Command {
		return meta.Command{PlaceNode: &meta.PlaceNode{Node: "n1", Zone: zone, Rack: rack, Own: zone == nil && rack == nil}}
	}
	mustApply(t, m, meta.Command{InitCluster: &meta.InitCluster{Cluster: trivet.ClusterID(trivet.NewUUID()), Time: day}})
	register("a", "r1", 1)
	at("a", "r1", false, false)
	mustApply(t, m, meta.Command{CordonNode: &meta.CordonNode{Node: "n1", Cordoned: true}})
	mustApply(t, m, place(new("b"), nil))
	at("b", "r1", true, false)
	register("a", "r2", 2)
	at("b", "r2", true, false)
	mustApply(t, m, place(nil, new("")))
	at("b", "", true, true)

	before := m.State().Revision()
	mustApply(t, m, place(new("b"), new("")))
	assert.Equal(t, before, m.State().Revision(), "a late copy changes nothing")

	mustApply(t, m, place(nil, nil))
	at("b", "", false, false)
	register("a", "r1", 2)
	at("a", "r1", false, false)
	n, _ := m.State().Node("n1")
	assert.True(t, n.Cordoned)

	res := m.Apply(meta.Command{PlaceNode: &meta.PlaceNode{Node: "n9", Own: true}})
	require.ErrorIs(t, res.Err, trivet.ErrNotFound)
	for name, p := range map[string]meta.PlaceNode{
		"nothing":    {Node: "n1"},
		"both ways":  {Node: "n1", Own: true, Zone: new("a")},
		"no text":    {Node: "n1", Zone: new("\xff")},
		"of no node": {Own: true},
	} {
		require.ErrorIs(t, meta.Command{PlaceNode: &p}.Validate(), trivet.ErrInvalid, name)
	}
}
