package server_test

import (
	"fmt"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/trivet-csi/trivet/api"
	"github.com/trivet-csi/trivet/cache"
	"github.com/trivet-csi/trivet/internal/testutil"
	"github.com/trivet-csi/trivet/server"
)

// snapshots is a cluster of three servers, with groups that park at once and write-back caches where there is a tmpfs.
func snapshotCluster(t *testing.T) *testutil.Cluster {
	t.Helper()
	return testutil.StartCluster(t, 3, func(_ int, cfg *server.Config) {
		cfg.ParkAfter = 200 * time.Millisecond
		if cache.CheckDir("/dev/shm") == nil {
			cfg.CacheDir = "/dev/shm"
		}
	})
}

func snapshot(t *testing.T, c *testutil.Cluster, i int, volume, name string) *api.Snapshot {
	t.Helper()
	s, err := c.Admin(i).CreateSnapshot(t.Context(), &api.CreateSnapshotRequest{Volume: volume, Name: name})
	require.NoError(t, err)
	require.Equal(t, "Ready", s.GetState())
	return s
}

// TestSnapshots is the life of snapshots on three real servers: of a volume in use, whose cache holds what it
// acknowledged, and of one that sleeps; what they show is compared; they outlive their volume, and leave nothing.
func TestSnapshots(t *testing.T) {
	c := snapshotCluster(t)
	ctx := t.Context()
	_, err := c.Admin(0).CreateVolume(ctx, &api.CreateVolumeRequest{
		Name: "v", SizeBytes: 64 << 20, Parameters: map[string]string{"cacheMode": "writeBack"},
	})
	require.NoError(t, err)
	client, stop := serveNBD(t, c, 0, "v")
	require.NoError(t, client.write(pattern('a'), 0)) // and not flushed
	first := snapshot(t, c, 1, "v", "first")
	require.Positive(t, first.GetHeldSeconds())
	require.EqualValues(t, 64<<20, first.GetSizeBytes())
	mustWrite(t, client, 0, 'b')
	stop()
	second := snapshot(t, c, 2, "v", "second")
	require.Zero(t, second.GetHeldSeconds())
	require.Equal(t, first.GetId(), snapshot(t, c, 2, "v", "first").GetId(), "the same again")
	create(t, c, "w")
	_, err = c.Admin(0).CreateSnapshot(ctx, &api.CreateSnapshotRequest{Volume: "w", Name: "first"})
	require.Equal(t, codes.AlreadyExists, status.Code(err))
	require.ErrorContains(t, err, `"v"`)

	_, err = c.Admin(0).DeleteVolume(ctx, &api.VolumeRequest{Name: "v"})
	require.NoError(t, err)
	create(t, c, "v") // the name is free
	list, err := c.Admin(0).ListSnapshots(ctx, &api.ListSnapshotsRequest{Volume: first.GetVolume()})
	require.NoError(t, err)
	require.Len(t, list.GetSnapshots(), 2)
	_, err = c.Admin(0).AttachVolume(ctx, &api.VolumeRequest{Name: first.GetVolume()})
	require.Equal(t, codes.InvalidArgument, status.Code(err))
	require.ErrorContains(t, err, "Kept")

	for _, name := range []string{"first", "second"} {
		_, err = c.Admin(1).DeleteSnapshot(ctx, &api.SnapshotRequest{Name: name})
		require.NoError(t, err)
	}
	require.Eventually(t, func() bool {
		_, err := c.Admin(2).GetVolume(ctx, &api.VolumeRequest{Name: first.GetVolume()})
		return status.Code(err) == codes.NotFound
	}, eventuallyTimeout, 20*time.Millisecond, "the volume goes with its last snapshot")
	_, err = c.Admin(1).GetSnapshot(ctx, &api.SnapshotRequest{Name: "first"})
	require.Equal(t, codes.NotFound, status.Code(err), fmt.Sprint(err))
}
