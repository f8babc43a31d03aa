package server_test

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet/api"
	"github.com/trivet-csi/trivet/internal/testutil"
	"github.com/trivet-csi/trivet/server"
)

// awaitParked waits until no replica of a volume runs Raft.
func awaitParked(t *testing.T, c *testutil.Cluster, name string) {
	t.Helper()
	require.Eventually(t, func() bool {
		v, err := c.Admin(0).GetVolume(t.Context(), &api.VolumeRequest{Name: name})
		if err != nil || len(v.GetReplicas()) != 3 {
			return false
		}
		for _, r := range v.GetReplicas() {
			if r.GetState() != "Parked" || r.GetLeader() || r.GetTerm() != 0 {
				return false
			}
		}
		return true
	}, time.Minute, 20*time.Millisecond)
}

// TestParking: a detached volume runs no Raft on any node, and attaching it, also after a restart of
// every server, brings back what was written.
func TestParking(t *testing.T) {
	t.Parallel()
	c := testutil.StartCluster(t, 3, func(_ int, cfg *server.Config) { cfg.ParkAfter = 200 * time.Millisecond })
	create(t, c, "v")
	awaitParked(t, c, "v")
	for round, b := range []byte{'a', 'b', 'c'} {
		client, stop := serveNBD(t, c, round, "v")
		if round > 0 {
			requireBlock(t, client, 1, b-1)
		}
		mustWrite(t, client, 1, b)
		stop()
		awaitParked(t, c, "v")
		if round == 1 {
			for i := range 3 {
				c.Stop(i)
			}
			for i := range 3 {
				c.Start(i)
			}
			c.AwaitUp(3)
			awaitParked(t, c, "v")
		}
	}

	// Moving the leader of a volume that sleeps wakes it for as long as it takes.
	moveParked, err := c.Admin(0).MoveLeader(t.Context(), &api.MoveLeaderRequest{Name: "v", Node: "node-1"})
	require.NoError(t, err)
	require.Equal(t, "v", moveParked.GetName())
	awaitParked(t, c, "v")
	_, err = c.Admin(0).DeleteVolume(t.Context(), &api.VolumeRequest{Name: "v"})
	require.NoError(t, err)
	list, err := c.Admin(0).ListVolumes(t.Context(), &api.ListVolumesRequest{})
	require.NoError(t, err)
	require.Empty(t, list.GetVolumes(), "a volume that sleeps can be deleted")
}
