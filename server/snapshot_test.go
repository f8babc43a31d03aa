package server_test

import (
	"errors"
	"fmt"
	"io"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/api"
	"github.com/trivet-csi/trivet/cache"
	"github.com/trivet-csi/trivet/internal/testutil"
	"github.com/trivet-csi/trivet/replication/raftgroup"
	"github.com/trivet-csi/trivet/server"
)

// snapshots is a cluster of three servers, with groups that park at once and write-back caches where there is a tmpfs.
func snapshotCluster(t *testing.T, change ...func(*server.Config)) *testutil.Cluster {
	t.Helper()
	return testutil.StartCluster(t, 3, func(_ int, cfg *server.Config) {
		cfg.ParkAfter, cfg.Timing = 200*time.Millisecond, raftgroup.Timing{Heartbeat: 400 * time.Millisecond}
		cfg.MetricsAddr = "127.0.0.1:0"
		if cache.CheckDir("/dev/shm") == nil {
			cfg.CacheDir = "/dev/shm"
		}
		for _, c := range change {
			c(cfg)
		}
	})
}

func snapshot(t *testing.T, c *testutil.Cluster, i int, volume, name string) (s *api.Snapshot) {
	t.Helper()
	r := &api.CreateSnapshotRequest{Volume: volume, Name: name}
	require.NoError(t, again(t, func() (err error) { s, err = c.Admin(i).CreateSnapshot(t.Context(), r); return err }))
	require.Equal(t, "Ready", s.GetState())
	return s
}

// TestSnapshots is the life of snapshots on three real servers: of a volume in use, whose cache holds what it
// acknowledged, and of one that sleeps; what they show is compared; they outlive their volume, and leave nothing.
func TestSnapshots(t *testing.T) {
	t.Parallel()
	c := snapshotCluster(t)
	ctx := t.Context()
	createBy(t, c, &api.CreateVolumeRequest{
		Name: "v", SizeBytes: 64 << 20, Parameters: map[string]string{"cacheMode": "writeBack"},
	})
	client, stop := serveNBD(t, c, 0, "v")
	require.NoError(t, client.write(pattern('a'), 0)) // and not flushed
	first := snapshot(t, c, 1, "v", "first")
	require.Positive(t, first.GetHeldSeconds())
	require.EqualValues(t, 64<<20, first.GetSizeBytes())
	require.NoError(t, client.write(pattern('c'), 3*trivet.BlockSize))
	require.NoError(t, again(t, func() error {
		_, err := c.Admin(2).CloneVolume(ctx, &api.CloneVolumeRequest{Source: "v", Name: "clone"})
		return err
	}))
	mustWrite(t, client, 0, 'b')
	stop()
	second := snapshot(t, c, 2, "v", "second")
	require.Equal(t, []int64{0, trivet.BlockSize, 3 * trivet.BlockSize, trivet.BlockSize}, diffOf(t, c, "first", "second"))
	require.Equal(t, []int64{0, trivet.BlockSize}, diffOf(t, c, "", "first"))
	require.Zero(t, second.GetHeldSeconds())
	holds := scrape(t, c, 0)[`trivet_snapshot_hold_seconds_count{kind="single"}`]
	require.Equal(t, 2, int(holds), "for the first, and for the clone")
	requireUsage(t, c)
	require.Equal(t, first.GetId(), snapshot(t, c, 2, "v", "first").GetId(), "the same again")
	create(t, c, "w")
	_, err := c.Admin(0).CreateSnapshot(ctx, &api.CreateSnapshotRequest{Volume: "w", Name: "first"})
	require.Equal(t, codes.AlreadyExists, status.Code(err))
	require.ErrorContains(t, err, `"v"`)

	back := restore(t, c, &api.RestoreSnapshotRequest{Snapshot: "first", InPlace: true})
	require.Equal(t, "Bound", back.GetPhase())
	requireVolume(t, c, "v", map[int64]byte{0: 'a', 3: 0})

	require.Eventually(t, func() bool { // aborted for as long as the detach holds the volume's lock
		_, err = c.Admin(0).DeleteVolume(ctx, &api.VolumeRequest{Name: "v"})
		return err == nil
	}, eventuallyTimeout, 20*time.Millisecond)
	create(t, c, "v") // the name is free
	r := restore(t, c, &api.RestoreSnapshotRequest{Snapshot: "second", Name: "restored", SizeBytes: 128 << 20})
	require.EqualValues(t, 128<<20, r.GetSizeBytes())
	requireVolume(t, c, "restored", map[int64]byte{0: 'b', 3: 'c', 20000: 0})
	list, err := c.Admin(0).ListSnapshots(ctx, &api.ListSnapshotsRequest{Volume: first.GetVolume()})
	require.NoError(t, err)
	require.Len(t, list.GetSnapshots(), 2, "that of the clone is hidden")
	err = again(t, func() error {
		_, err := c.Admin(0).AttachVolume(ctx, &api.VolumeRequest{Name: first.GetVolume()})
		return err
	})
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
	requireVolume(t, c, "clone", map[int64]byte{0: 'a', 3: 'c'}) // with nothing beneath it any more
}

// requireUsage waits until nothing but block 0 of "first" is there for a snapshot alone: the clone has to be flattened.
func requireUsage(t *testing.T, c *testutil.Cluster) {
	t.Helper()
	ctx := t.Context()
	// Each question goes to whichever node answers in time, and the copies of the clone are flattened one by one.
	require.EventuallyWithT(t, func(t *assert.CollectT) {
		s, err := c.Admin(2).GetSnapshot(ctx, &api.SnapshotRequest{Name: "first"})
		require.NoError(t, err)
		require.EqualValues(t, trivet.BlockSize, s.GetAloneBytes())
		s, err = c.Admin(0).GetSnapshot(ctx, &api.SnapshotRequest{Name: "second"})
		require.NoError(t, err)
		require.Zero(t, s.GetAloneBytes(), "the volume shows the same")
		v, err := c.Admin(1).GetVolume(ctx, &api.VolumeRequest{Name: "v"})
		require.NoError(t, err)
		u := v.GetUsage()
		require.EqualValues(t, 2*trivet.BlockSize, u.GetUsedBytes())
		require.EqualValues(t, trivet.BlockSize, u.GetSnapshotBytes())
		require.Equal(t, u.GetUniqueBytes()+u.GetSharedBytes(), u.GetUsedBytes()+u.GetSnapshotBytes()+u.GetOtherBytes())
		list, err := c.Admin(1).ListVolumes(ctx, &api.ListVolumesRequest{Usage: true})
		require.NoError(t, err)
		for _, v := range list.GetVolumes() {
			require.NotNil(t, v.GetUsage(), v.GetName())
		}
	}, eventuallyTimeout, 20*time.Millisecond)
}

// restore makes a volume of a snapshot.
func restore(t *testing.T, c *testutil.Cluster, r *api.RestoreSnapshotRequest) (v *api.Volume) {
	t.Helper()
	require.NoError(t, again(t, func() (err error) { v, err = c.Admin(0).RestoreSnapshot(t.Context(), r); return err }))
	return v
}

// requireVolume serves a volume and compares blocks.
func requireVolume(t *testing.T, c *testutil.Cluster, name string, want map[int64]byte) {
	t.Helper()
	client, stop := serveNBD(t, c, 2, name)
	defer stop()
	for lba, b := range want {
		requireBlock(t, client, lba, b)
	}
}

// diffOf returns offsets and sizes.
func diffOf(t *testing.T, c *testutil.Cluster, from, to string) (all []int64) {
	t.Helper()
	require.NoError(t, again(t, func() error {
		all = nil
		stream, err := c.Admin(1).DiffSnapshots(t.Context(), &api.DiffSnapshotsRequest{From: from, To: to})
		for err == nil {
			var page *api.DiffPage
			if page, err = stream.Recv(); errors.Is(err, io.EOF) {
				return nil
			}
			for _, x := range page.GetExtents() {
				all = append(all, x.GetOffset(), x.GetSizeBytes())
			}
		}
		return err
	}))
	return all
}
