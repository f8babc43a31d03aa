package controller

import (
	"fmt"
	"math/rand"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller/meta"
)

// clusterOf draws nodes in up to three zones of two racks each, of one to three disks each, some without room, one
// in six down or cordoned.
func clusterOf(r *rand.Rand, now time.Time) []meta.Node {
	var nodes []meta.Node
	for n := range 1 + r.Intn(9) {
		nd := meta.Node{
			ID: benchNode(n + 1), LeaseUntil: now.Add(time.Minute), Zone: fmt.Sprintf("z%d", r.Intn(3)),
			Rack: fmt.Sprintf("r%d", r.Intn(2)), Cordoned: r.Intn(6) == 0,
		}
		if r.Intn(6) == 0 {
			nd.LeaseUntil = now
		}
		for d := range 1 + r.Intn(3) {
			nd.Disks = append(nd.Disks, meta.Disk{
				ID: trivet.DiskID(testUUID(n+1, d+1)), SizeBytes: 200 << 30, FreeBytes: int64(r.Intn(4)) * r.Int63n(50<<30),
			})
		}
		nodes = append(nodes, nd)
	}
	return nodes
}

// fill places volumes, each written full, until no more fits, and returns how many did.
func fill(nodes []meta.Node, req PlaceRequest, now time.Time) int {
	for n := 0; ; n++ {
		where, err := Place(nodes, req, now)
		if err != nil {
			return n
		}
		for _, r := range where {
			for i := range nodes {
				for k := range nodes[i].Disks {
					if d := &nodes[i].Disks[k]; d.ID == r.Disk {
						d.FreeBytes -= req.SizeBytes
					}
				}
			}
		}
	}
}

// TestCapacityIsWhatFits: what is said to be available fits to within 5 %, in volumes that are small beside it. The
// largest volume can be placed, and one that is larger by a unit cannot.
func TestCapacityIsWhatFits(t *testing.T) {
	t.Parallel()
	now := time.Date(2026, 11, 26, 0, 0, 0, 0, time.UTC)
	some, none := 0, 0
	for seed := range int64(120) {
		r := rand.New(rand.NewSource(seed))
		nodes := clusterOf(r, now)
		p := DefaultParams()
		p.Replicas = []int{1, 3, 3, 5}[r.Intn(4)]
		p.Spread = []Spread{SpreadNode, SpreadNode, SpreadRack, SpreadZone}[r.Intn(4)]
		var segment map[string]string
		switch r.Intn(4) {
		case 0:
			segment = map[string]string{TopologyNode: string(nodes[r.Intn(len(nodes))].ID)}
		case 1:
			segment = map[string]string{TopologyZone: nodes[r.Intn(len(nodes))].Zone}
		}
		what := fmt.Sprintf("seed %d: %d replicas, spread %s, in %v", seed, p.Replicas, p.Spread, segment)
		available, largest := capacity(nodes, p, segment, now)
		req := PlaceRequest{Replicas: p.Replicas, Spread: p.Spread}
		if segment != nil {
			req.Requisite = []map[string]string{segment}
		}
		req.SizeBytes = largest + sizeUnit
		_, err := Place(nodes, req, now)
		require.ErrorIs(t, err, trivet.ErrNoSpace, what)
		if largest == 0 {
			none++
			require.Zero(t, available, what)
			continue
		}
		req.SizeBytes = largest
		_, err = Place(nodes, req, now)
		require.NoError(t, err, what)
		if req.SizeBytes = available / 700 / sizeUnit * sizeUnit; req.SizeBytes < 16<<20 {
			continue // what is left of each disk would count
		}
		some++
		fitted := int64(fill(nodes, req, now)) * req.SizeBytes
		require.InEpsilon(t, fitted, available, 0.05, what)
	}
	require.Greater(t, some, 40)
	require.Greater(t, none, 10)
}
