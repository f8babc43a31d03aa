package server_test

import (
	"context"
	"os"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet/api"
	"github.com/trivet-csi/trivet/controller/meta"
	"github.com/trivet-csi/trivet/internal/testutil"
	"github.com/trivet-csi/trivet/server"
)

// Two of the three nodes with a volume are gone for good, and an operator gives them up; the volume, which had grown
// before, goes on from the third, gets replicas again, and all that cannot be undone is in the audit (H34, H20).
func TestRecoverVolume(t *testing.T) {
	t.Parallel()
	if testing.Short() {
		t.Skip("five servers, and leases that run out")
	}
	// A machine that stands still for less than that loses no lease.
	c := testutil.StartCluster(t, 5, func(_ int, cfg *server.Config) { cfg.Lease = 15 * time.Second })
	ctx, cancel := context.WithTimeout(t.Context(), 4*time.Minute)
	defer cancel()
	cordon := func(on bool) { // the catalogue's voters are the first three: it is to live on
		for _, node := range []string{"node-1", "node-2"} {
			_, err := c.Admin(0).CordonNode(ctx, &api.CordonNodeRequest{Node: node, Cordoned: on})
			require.NoError(t, err)
		}
	}
	cordon(true)
	create(t, c, "v")
	v, err := c.Admin(1).ExpandVolume(ctx, &api.ExpandVolumeRequest{Name: "v", SizeBytes: 128 << 20})
	require.NoError(t, err)
	assert.EqualValues(t, 128<<20, v.GetSizeBytes())
	_, err = c.Admin(1).ExpandVolume(ctx, &api.ExpandVolumeRequest{Name: "v", SizeBytes: 64 << 20})
	require.ErrorContains(t, err, "never shrinks")
	require.ElementsMatch(t, []string{"node-0", "node-3", "node-4"}, placesOf(t, c, "v"))
	_, err = c.Admin(0).RecoverVolume(ctx, &api.RecoverVolumeRequest{Name: "v", AcceptDataLoss: true})
	require.ErrorContains(t, err, "is a majority")

	c.Stop(3)
	c.Stop(4)
	cordon(false)
	var plan *api.RecoverVolumeResponse
	require.Eventually(t, func() bool { // their leases run out
		plan, err = c.Admin(1).RecoverVolume(ctx, &api.RecoverVolumeRequest{Name: "v"})
		return err == nil
	}, time.Minute, 200*time.Millisecond, "%v", err)
	assert.Equal(t, "node-0", plan.GetNode())
	assert.Len(t, plan.GetLost(), 2)
	assert.NotEmpty(t, plan.GetLastHeard())
	_, err = c.Admin(1).RecoverVolume(ctx, &api.RecoverVolumeRequest{Name: "v", AcceptDataLoss: true})
	require.NoError(t, err)
	awaitReplicas(t, c, "v", 3)
	require.ElementsMatch(t, []string{"node-0", "node-1", "node-2"}, placesOf(t, c, "v"))
	v, err = c.Admin(0).GetVolume(ctx, &api.VolumeRequest{Name: "v"})
	require.NoError(t, err)
	assert.EqualValues(t, 128<<20, v.GetSizeBytes())

	log, err := c.Admin(2).ListAudit(ctx, &api.ListAuditRequest{})
	require.NoError(t, err)
	kinds := []string{}
	for _, r := range log.GetRecords() {
		kinds = append(kinds, r.GetKind())
	}
	require.True(t, slices.Contains(kinds, string(meta.AuditRecover)), "%v", kinds)
	disks, err := c.Admin(1).ShowDisks(ctx, &api.ShowDisksRequest{})
	require.NoError(t, err)
	require.Len(t, disks.GetDisks(), 1)
	d := disks.GetDisks()[0]
	used := d.GetLiveBytes() + d.GetSnapshotBytes() + d.GetRetainedBytes() + d.GetGarbageBytes()
	assert.Equal(t, d.GetSegments()*(16<<20), used, "they add up to the files that hold something")
	assert.Positive(t, d.GetRoomBytes())
	assert.Equal(t, "node-1", disks.GetNode())
}

// Two of the three servers are gone for good, and with them the catalogue's majority. An operator gives both up on the
// third, which was restarted meanwhile; a lost server that comes back with an empty catalogue joins anew (H34).
func TestRecoverCatalogue(t *testing.T) {
	t.Parallel()
	if testing.Short() {
		t.Skip("three servers, and leases that run out")
	}
	c := testutil.StartCluster(t, 3, testutil.ShortLease)
	ctx, cancel := context.WithTimeout(t.Context(), 4*time.Minute)
	defer cancel()
	create(t, c, "v")
	_, err := c.Admin(0).RecoverCatalogue(ctx, &api.RecoverCatalogueRequest{AcceptDataLoss: true})
	require.ErrorContains(t, err, "3 of its 3 voters live")
	c.Stop(1)
	c.Stop(2)
	c.Stop(0)
	c.Start(0)
	var plan *api.RecoverCatalogueResponse
	require.Eventually(t, func() bool { // the client connects again
		plan, err = c.Admin(0).RecoverCatalogue(ctx, &api.RecoverCatalogueRequest{})
		return err == nil
	}, time.Minute, 200*time.Millisecond, "%v", err)
	require.Equal(t, []string{"node-1", "node-2"}, slices.Sorted(slices.Values(plan.GetLost())))
	require.Equal(t, "node-0", plan.GetNode())
	done, err := c.Admin(0).RecoverCatalogue(ctx, &api.RecoverCatalogueRequest{AcceptDataLoss: true})
	require.NoError(t, err)
	require.NotEmpty(t, done.GetWarning())

	require.Eventually(t, func() bool { // the leases of the others run out
		_, err = c.Admin(0).RecoverVolume(ctx, &api.RecoverVolumeRequest{Name: "v", AcceptDataLoss: true})
		return err == nil
	}, time.Minute, 200*time.Millisecond, "%v", err)
	require.NoError(t, os.RemoveAll(c.Path("node-1", "data", "meta")))
	c.Start(1)
	awaitReplicas(t, c, "v", 2)
	require.ElementsMatch(t, []string{"node-0", "node-1"}, placesOf(t, c, "v"))
}
