package server_test

import (
	"fmt"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/trivet-csi/trivet/api"
	"github.com/trivet-csi/trivet/internal/testutil"
)

func cordon(t *testing.T, c *testutil.Cluster, node string, cordoned, draining bool) *api.NodeStatus {
	t.Helper()
	st, err := c.Admin(0).CordonNode(t.Context(), &api.CordonNodeRequest{
		Node: node, Cordoned: cordoned, Draining: draining,
	})
	require.NoError(t, err)
	return st
}

// TestAdminNodes: what an operator says of nodes and numbers is kept, shown and refused, with the reason.
func TestAdminNodes(t *testing.T) {
	c := testutil.StartCluster(t, 4, nil)
	v := create(t, c, "v")
	free := "" // the node without a replica
	has := map[string]bool{}
	for _, r := range v.GetReplicas() {
		has[r.GetNode()] = true
	}
	for i := range 4 {
		if name := fmt.Sprintf("node-%d", i); !has[name] {
			free = name
		}
	}
	used := v.GetReplicas()[1].GetNode()
	other := v.GetReplicas()[2].GetNode()
	cordon(t, c, free, true, false)
	st := cordon(t, c, used, false, true)
	assert.True(t, st.GetNode().GetCordoned())
	assert.True(t, st.GetNode().GetDraining())
	require.Len(t, st.GetRemaining(), 1)
	assert.Equal(t, "v", st.GetRemaining()[0].GetName())
	assert.Contains(t, st.GetRemaining()[0].GetReason(), "cordoned: "+free)

	move := func(from, to string) error {
		_, err := c.Admin(1).MoveReplica(t.Context(), &api.MoveReplicaRequest{Name: "v", From: from, To: to})
		return err
	}
	for _, tc := range []struct {
		name string
		err  error
		code codes.Code
		says string
	}{
		{"to a cordoned node", move(used, free), codes.InvalidArgument, free + " is cordoned"},
		{"to one that has a replica", move(used, other), codes.AlreadyExists, other + " has a replica already"},
		{"from one that has none", move(free, other), codes.NotFound, "no replica on " + free},
		{"to nowhere", move(used, "nowhere"), codes.NotFound, "nowhere"},
		{"two replicas", func() error {
			_, err := c.Admin(1).SetReplicas(t.Context(), &api.SetReplicasRequest{Name: "v", Count: 2})
			return err
		}(), codes.InvalidArgument, "1, 3 or 5"},
		{"of an unknown volume", func() error {
			_, err := c.Admin(1).SetReplicas(t.Context(), &api.SetReplicasRequest{Name: "w", Count: 3})
			return err
		}(), codes.NotFound, "w"},
		{"an unknown node", func() error {
			_, err := c.Admin(1).CordonNode(t.Context(), &api.CordonNodeRequest{Node: "nowhere", Cordoned: true})
			return err
		}(), codes.NotFound, "nowhere"},
		{"how an unknown node is", func() error {
			_, err := c.Admin(1).GetNode(t.Context(), &api.NodeRequest{Node: "nowhere"})
			return err
		}(), codes.NotFound, "nowhere"},
		{"to forget an unknown node", forget(t, c, "nowhere"), codes.NotFound, "nowhere"},
		{"to forget one that is up", forget(t, c, free), codes.FailedPrecondition, "node is up"},
		{"a new volume", func() error {
			_, err := c.Admin(1).CreateVolume(t.Context(), &api.CreateVolumeRequest{Name: "w", SizeBytes: 1 << 20})
			return err
		}(), codes.ResourceExhausted, "cordoned: "},
	} {
		require.Equal(t, tc.code, status.Code(tc.err), "%s: %v", tc.name, tc.err)
		assert.Contains(t, tc.err.Error(), tc.says, tc.name)
	}

	got, err := c.Admin(2).SetReplicas(t.Context(), &api.SetReplicasRequest{Name: "v", Count: 5})
	require.NoError(t, err)
	assert.EqualValues(t, 5, got.GetWantReplicas())
	assert.Contains(t, got.GetPending(), "nodes qualify")
	cluster, err := c.Admin(2).ClusterStatus(t.Context(), &api.ClusterStatusRequest{})
	require.NoError(t, err)
	assert.Contains(t, fmt.Sprint(cluster.GetWarnings()), `volume "v" has 3 replicas, want 5`)

	// A restart does not end a drain.
	i := int(used[len(used)-1] - '0')
	c.Stop(i)
	c.Start(i)
	c.AwaitUp(4)
	list, err := c.Admin(0).ListNodes(t.Context(), &api.ListNodesRequest{})
	require.NoError(t, err)
	for _, n := range list.GetNodes() {
		assert.Equal(t, n.GetId() == used, n.GetDraining(), n.GetId())
		assert.Equal(t, n.GetId() == used || n.GetId() == free, n.GetCordoned(), n.GetId())
	}
	st = cordon(t, c, used, false, false)
	assert.False(t, st.GetNode().GetCordoned())
	assert.False(t, st.GetNode().GetDraining())
}

// TestAdminPlacesNode: where somebody says that a node stands counts on every server at once, and outlives its restart.
func TestAdminPlacesNode(t *testing.T) {
	c := testutil.StartCluster(t, 3, nil)
	st, err := c.Admin(1).PlaceNode(t.Context(), &api.PlaceNodeRequest{Node: "node-2", Zone: new("west"), Rack: new("r7")})
	require.NoError(t, err)
	own := c.Config(0).Zone
	is := func(zone, rack string, set bool) {
		t.Helper()
		list, err := c.Admin(0).ListNodes(t.Context(), &api.ListNodesRequest{})
		require.NoError(t, err)
		for _, n := range list.GetNodes() {
			if n.GetId() != "node-2" {
				assert.Equal(t, own, n.GetZone())
				assert.False(t, n.GetZoneSet() || n.GetRackSet())
				continue
			}
			assert.Equal(t, []any{zone, rack, set, set}, []any{n.GetZone(), n.GetRack(), n.GetZoneSet(), n.GetRackSet()})
		}
	}
	assert.Equal(t, "west", st.GetNode().GetZone())
	is("west", "r7", true)
	c.Stop(2)
	c.Start(2)
	c.AwaitUp(3)
	is("west", "r7", true)
	_, err = c.Admin(0).PlaceNode(t.Context(), &api.PlaceNodeRequest{Node: "node-2", Own: true})
	require.NoError(t, err)
	require.Eventually(t, func() bool {
		st, err := c.Admin(1).GetNode(t.Context(), &api.NodeRequest{Node: "node-2"})
		return err == nil && st.GetNode().GetZone() == own && !st.GetNode().GetZoneSet()
	}, eventuallyTimeout, 50*time.Millisecond, "its server says so again, without a restart")

	for _, tc := range []struct {
		r    *api.PlaceNodeRequest
		code codes.Code
	}{
		{&api.PlaceNodeRequest{Node: "nowhere", Own: true}, codes.NotFound},
		{&api.PlaceNodeRequest{Node: "node-2"}, codes.InvalidArgument},
		{&api.PlaceNodeRequest{Node: "node-2", Own: true, Zone: new("a")}, codes.InvalidArgument},
		{&api.PlaceNodeRequest{Node: "node-2", Zone: new("a b")}, codes.InvalidArgument},
	} {
		_, err := c.Admin(1).PlaceNode(t.Context(), tc.r)
		assert.Equal(t, tc.code, status.Code(err), "%v: %v", tc.r, err)
	}
}

// TestAdminForgetsNode: a node that is gone for good is taken off the record once its lease has run out, and its name
// is kept until it is allowed again.
func TestAdminForgetsNode(t *testing.T) {
	c := testutil.StartCluster(t, 4, testutil.ShortLease)
	c.Stop(3)
	require.Eventually(t, func() bool { return forget(t, c, "node-3") == nil }, eventuallyTimeout, 200*time.Millisecond)
	list, err := c.Admin(1).ListNodes(t.Context(), &api.ListNodesRequest{})
	require.NoError(t, err)
	assert.Len(t, list.GetNodes(), 3)
	resp, err := c.Admin(0).ForgetNode(t.Context(), &api.ForgetNodeRequest{Node: "node-3"})
	require.NoError(t, err, "again")
	assert.Equal(t, []string{"node-3"}, resp.GetForgotten())
	resp, err = c.Admin(1).ForgetNode(t.Context(), &api.ForgetNodeRequest{Node: "node-3", Allow: true})
	require.NoError(t, err)
	assert.Empty(t, resp.GetForgotten())
}

func forget(t *testing.T, c *testutil.Cluster, node string) error {
	t.Helper()
	_, err := c.Admin(1).ForgetNode(t.Context(), &api.ForgetNodeRequest{Node: node})
	return err
}

// TestAdminDrainMovesTheLeader: a node that is drained hands the leadership over, though it holds the
// attachment; what is attached goes on.
func TestAdminDrainMovesTheLeader(t *testing.T) {
	c, _ := startOverMemory(t)
	create(t, c, "v")
	client, stop := serveNBD(t, c, 1, "v")
	defer stop()
	mustWrite(t, client, 1, 'a')
	require.Eventually(t, func() bool { return leaderOf(t, c, 0, "v") == 1 }, eventuallyTimeout, 50*time.Millisecond)
	st := cordon(t, c, "node-1", true, true)
	require.Len(t, st.GetRemaining(), 1)
	assert.True(t, st.GetRemaining()[0].GetAttached())
	require.Eventually(t, func() bool { return leaderOf(t, c, 0, "v") != 1 }, eventuallyTimeout, 50*time.Millisecond)
	mustWrite(t, client, 2, 'b')
	requireBlock(t, client, 1, 'a')
	st, err := c.Admin(2).GetNode(t.Context(), &api.NodeRequest{Node: "node-1"})
	require.NoError(t, err)
	require.Len(t, st.GetRemaining(), 1, "its replica has nowhere to go")
	assert.Contains(t, st.GetRemaining()[0].GetReason(), "with a replica of it")
	cordon(t, c, "node-1", false, false)
}
