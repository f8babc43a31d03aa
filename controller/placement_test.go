package controller_test

import (
	"math/rand"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller"
	"github.com/trivet-csi/trivet/controller/meta"
)

var now = time.Date(2026, 11, 25, 12, 0, 0, 0, time.UTC)

// randomNodes draws up to nine nodes of up to four zones, some down, some without room.
func randomNodes(r *rand.Rand) []meta.Node {
	var nodes []meta.Node
	for n := range r.Intn(9) {
		nd := testNode(n+1, now)
		nd.Zone = []string{"", "a", "b", "c"}[r.Intn(1+r.Intn(4))]
		if r.Intn(5) == 0 {
			nd.LeaseUntil = now
		}
		nd.Disks = nil
		for d := range r.Intn(4) {
			size := int64(1+r.Intn(40)) * gib
			nd.Disks = append(nd.Disks, meta.Disk{
				ID: trivet.DiskID(uuid(n+1, d)), SizeBytes: size, FreeBytes: r.Int63n(size + 1),
			})
		}
		nodes = append(nodes, nd)
	}
	return nodes
}

func randomSegments(r *rand.Rand) []map[string]string {
	var out []map[string]string
	for range r.Intn(3) {
		if r.Intn(2) == 0 {
			out = append(out, map[string]string{controller.TopologyZone: []string{"a", "b", "c"}[r.Intn(3)]})
		} else {
			out = append(out, map[string]string{controller.TopologyNode: string(nodeID(1 + r.Intn(9)))})
		}
	}
	return out
}

func randomPlace(r *rand.Rand) controller.PlaceRequest {
	return controller.PlaceRequest{
		SizeBytes: int64(1+r.Intn(20)) * gib, Replicas: []int{1, 3, 5}[r.Intn(3)],
		Spread:    []controller.Spread{controller.SpreadNode, controller.SpreadZone}[r.Intn(2)],
		Requisite: randomSegments(r), Preferred: randomSegments(r),
	}
}

func in(n meta.Node, segments []map[string]string) bool {
	for _, s := range segments {
		zone := s[controller.TopologyZone]
		if s[controller.TopologyNode] == string(n.ID) || zone != "" && zone == n.Zone {
			return true
		}
	}
	return false
}

// TestPlaceProperties checks what must hold of every placement, and that a refusal was right.
func TestPlaceProperties(t *testing.T) {
	t.Parallel()
	placed, refused := 0, 0
	for seed := range int64(4000) {
		r := rand.New(rand.NewSource(seed))
		nodes, req := randomNodes(r), randomPlace(r)
		byID, able, zones, required := map[trivet.NodeID]meta.Node{}, 0, map[string]bool{}, 0
		for _, n := range nodes {
			byID[n.ID] = n
			roomy := false
			for _, d := range n.Disks {
				roomy = roomy || d.FreeBytes >= req.SizeBytes
			}
			if roomy && n.LeaseUntil.After(now) {
				able++
				zones[n.Zone] = true
				if len(req.Requisite) == 0 || in(n, req.Requisite) {
					required++
				}
			}
		}
		possible := able >= req.Replicas && required > 0 &&
			(req.Spread != controller.SpreadZone || len(zones) >= req.Replicas)
		got, err := controller.Place(nodes, req, now)
		if !possible {
			refused++
			require.ErrorIs(t, err, trivet.ErrNoSpace, "seed %d", seed)
			continue
		}
		placed++
		require.NoError(t, err, "seed %d", seed)
		checkPlacement(t, seed, byID, req, got, len(zones), required)

		r.Shuffle(len(nodes), func(i, j int) { nodes[i], nodes[j] = nodes[j], nodes[i] })
		again, err := controller.Place(nodes, req, now)
		require.NoError(t, err)
		require.Equal(t, got, again, "seed %d: depends on the order of nodes", seed)
	}
	require.Greater(t, placed, 500)
	require.Greater(t, refused, 500)
}

func checkPlacement(t *testing.T, seed int64, nodes map[trivet.NodeID]meta.Node, req controller.PlaceRequest,
	got []meta.Replica, zonesN, required int,
) {
	t.Helper()
	require.Len(t, got, req.Replicas, "seed %d", seed)
	usedNodes, usedZones := map[trivet.NodeID]bool{}, map[string]int{}
	for i, p := range got {
		n, ok := nodes[p.Node]
		require.True(t, ok)
		require.True(t, n.LeaseUntil.After(now), "seed %d: %s is down", seed, n.ID)
		require.False(t, usedNodes[n.ID], "seed %d: two replicas on %s", seed, n.ID)
		usedNodes[n.ID] = true
		usedZones[n.Zone]++
		require.Equal(t, meta.ReplicaCreating, p.State)
		roomy := false
		for _, d := range n.Disks {
			roomy = roomy || d.ID == p.Disk && d.FreeBytes >= req.SizeBytes
		}
		require.True(t, roomy, "seed %d: disk %s of %s has no room", seed, p.Disk, n.ID)
		if i == 0 && len(req.Requisite) > 0 {
			require.True(t, in(n, req.Requisite), "seed %d: first replica outside of the requisite", seed)
		}
	}
	restricted := len(req.Requisite) > 0 && required >= req.Replicas
	if restricted && req.Spread == controller.SpreadNode {
		for id := range usedNodes {
			require.True(t, in(nodes[id], req.Requisite), "seed %d: %s outside of the requisite", seed, id)
		}
	}
	if !restricted {
		require.Len(t, usedZones, min(zonesN, req.Replicas), "seed %d: zones", seed)
	}
	if req.Spread == controller.SpreadZone {
		require.Len(t, usedZones, req.Replicas, "seed %d: zones", seed)
	}
}

func TestPlaceErrorsNameTheCause(t *testing.T) {
	t.Parallel()
	nodes := []meta.Node{testNode(1, now), testNode(2, now), testNode(3, now), testNode(4, now)}
	nodes[1].LeaseUntil = now.Add(-time.Second)
	nodes[2].Disks[0].FreeBytes = 7
	_, err := controller.Place(nodes, controller.PlaceRequest{SizeBytes: gib, Replicas: 3}, now)
	require.ErrorIs(t, err, trivet.ErrNoSpace)
	require.EqualError(t, err, "place 3 replicas of 1073741824 bytes: 2 of 4 nodes qualify; down: n2; "+
		"too little room: n3 (7 bytes free): no space left")
	_, err = controller.Place(nodes, controller.PlaceRequest{
		SizeBytes: gib, Replicas: 1, Requisite: []map[string]string{{controller.TopologyNode: "n2"}},
	}, now)
	require.ErrorIs(t, err, trivet.ErrNoSpace)
	require.ErrorContains(t, err, "none of 2 qualifying nodes is in the required topology; down: n2")
	_, err = controller.Place(nil, controller.PlaceRequest{SizeBytes: gib, Replicas: 1}, now)
	require.ErrorContains(t, err, "0 of 0 nodes qualify")
}

func TestPlacePreferred(t *testing.T) {
	t.Parallel()
	nodes := []meta.Node{testNode(1, now), testNode(2, now), testNode(3, now), testNode(4, now)}
	nodes[0].Disks[0].FreeBytes = 99 * gib
	place := func(preferred ...map[string]string) trivet.NodeID {
		got, err := controller.Place(nodes, controller.PlaceRequest{SizeBytes: gib, Replicas: 3, Preferred: preferred}, now)
		require.NoError(t, err)
		return got[0].Node
	}
	assert.Equal(t, trivet.NodeID("n1"), place(), "most room")
	assert.Equal(t, trivet.NodeID("n3"), place(map[string]string{controller.TopologyNode: "n3"}))
	assert.Equal(t, trivet.NodeID("n2"), place(map[string]string{controller.TopologyZone: "z1"}))
	assert.Equal(t, trivet.NodeID("n4"), place(map[string]string{controller.TopologyNode: "n7"},
		map[string]string{controller.TopologyNode: "n4", controller.TopologyZone: "z0"}))
	assert.Equal(t, trivet.NodeID("n1"), place(map[string]string{"topology.example.com/rack": "r1"}), "foreign key")
}

// TestPlaceBalances: volumes are thin, so free bytes alone would send every one of them to the same
// disks. 300 volumes over 5 nodes must come out even.
func TestPlaceBalances(t *testing.T) {
	t.Parallel()
	var nodes []meta.Node
	for n := 1; n <= 5; n++ {
		nd := testNode(n, now)
		nd.Zone = ""
		nd.Disks[0].FreeBytes += int64(n) // never quite equal
		nodes = append(nodes, nd)
	}
	var volumes []meta.Volume
	for i := range 300 {
		got, err := controller.Place(nodes, controller.PlaceRequest{
			SizeBytes: gib, Replicas: 3, Load: controller.LoadOf(volumes),
		}, now)
		require.NoError(t, err)
		volumes = append(volumes, meta.Volume{ID: trivet.VolumeID(i + 1), SizeBytes: gib, Replicas: got})
	}
	for disk, load := range controller.LoadOf(volumes) {
		assert.InDelta(t, 180, load.Replicas, 2, "disk %s", disk)
	}
}

// TestPlaceOneMore: a replica beside others goes to a free node in a free zone, and not where it must not.
func TestPlaceOneMore(t *testing.T) {
	t.Parallel()
	now := time.Now()
	nodes := make([]meta.Node, 0, 6)
	for n := 1; n <= 6; n++ { // zones z0 z1 z2 z0 z1 z2
		nodes = append(nodes, testNode(n, now))
	}
	beside := []meta.Replica{{Node: "n1"}, {Node: "n2"}}
	one := func(r controller.PlaceRequest, change func(nodes []meta.Node)) (trivet.NodeID, error) {
		r.SizeBytes, r.Replicas, r.Beside = gib, 1, beside
		nodes := slices.Clone(nodes)
		if change != nil {
			change(nodes)
		}
		got, err := controller.Place(nodes, r, now)
		if err != nil {
			return "", err
		}
		return got[0].Node, nil
	}
	got, err := one(controller.PlaceRequest{}, nil)
	require.NoError(t, err)
	assert.Equal(t, trivet.NodeID("n3"), got, "the only zone without a replica")
	got, err = one(controller.PlaceRequest{}, func(nodes []meta.Node) { nodes[2].Cordoned = true })
	require.NoError(t, err)
	assert.Equal(t, trivet.NodeID("n6"), got, "not the cordoned one")
	got, err = one(controller.PlaceRequest{Avoid: map[trivet.NodeID]bool{"n3": true, "n6": true}}, nil)
	require.NoError(t, err)
	assert.Equal(t, trivet.NodeID("n4"), got, "a zone twice rather than nothing")
	_, err = one(controller.PlaceRequest{
		Spread: controller.SpreadZone, Avoid: map[trivet.NodeID]bool{"n3": true, "n6": true},
	}, nil)
	require.ErrorIs(t, err, trivet.ErrNoSpace, "no zone twice where that was ruled out")
	_, err = one(controller.PlaceRequest{Avoid: map[trivet.NodeID]bool{"n5": true}}, func(nodes []meta.Node) {
		nodes[2].Cordoned, nodes[3].LeaseUntil, nodes[5].Disks = true, now, nil
	})
	require.ErrorIs(t, err, trivet.ErrNoSpace)
	for _, why := range []string{
		"down: n4", "cordoned: n3", "with a replica of it: n1, n2", "busy or tried lately: n5", "too little room: n6",
	} {
		require.ErrorContains(t, err, why)
	}
}
