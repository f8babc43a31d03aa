package server_test

import (
	"encoding/binary"
	"fmt"
	"os"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/api"
	"github.com/trivet-csi/trivet/internal/testutil"
)

// writeInTurn writes 1, 2, 3, … to block zero of one volume and then, once that is acknowledged, to that of the other.
// count is the newest number that both have acknowledged.
func writeInTurn(first, second *nbdClient) (count *atomic.Uint64, stop func() error) {
	count = new(atomic.Uint64)
	ended, done := make(chan struct{}), make(chan error, 1)
	go func() {
		p := make([]byte, trivet.BlockSize)
		for n := uint64(1); ; n++ {
			select {
			case <-ended:
				done <- nil
				return
			default:
			}
			binary.LittleEndian.PutUint64(p, n)
			for _, c := range []*nbdClient{first, second} {
				if err := c.write(p, 0); err != nil {
					done <- err
					return
				}
			}
			count.Store(n)
		}
	}()
	return count, func() error { close(ended); return <-done }
}

// numberIn reads the number in block zero of a volume.
func numberIn(t *testing.T, c *testutil.Cluster, name string) uint64 {
	t.Helper()
	client, stop := serveNBD(t, c, 2, name)
	defer stop()
	p := make([]byte, trivet.BlockSize)
	require.NoError(t, client.read(p, 0))
	return binary.LittleEndian.Uint64(p)
}

// createGroup makes a group of snapshots. One fails if a machine stands still while writes are held: it is made anew.
func createGroup(t *testing.T, c *testutil.Cluster, name string, volumes []string) (g *api.SnapshotGroup, tries int) {
	t.Helper()
	require.NoError(t, again(t, func() (err error) {
		tries++
		r := &api.CreateSnapshotGroupRequest{Name: name, Volumes: volumes}
		if g, err = c.Admin(2).CreateSnapshotGroup(t.Context(), r); err != nil {
			t.Log(err)
			_, dropErr := c.Admin(2).DeleteSnapshotGroup(t.Context(), &api.SnapshotGroupRequest{Name: name})
			require.NoError(t, dropErr)
		}
		return err
	}))
	return g, tries
}

// TestSnapshotGroup makes groups of snapshots of two volumes that are written on two servers, one from a write-back
// cache, and of one that sleeps: their order of writes is kept, and how long writes were held is told.
func TestSnapshotGroup(t *testing.T) {
	t.Parallel()
	c := snapshotCluster(t)
	ctx := t.Context()
	create(t, c, "a")
	createBy(t, c, &api.CreateVolumeRequest{
		Name: "b", SizeBytes: 64 << 20, Parameters: map[string]string{"cacheMode": "writeBack"},
	})
	create(t, c, "sleeps")
	first, stopFirst := serveNBD(t, c, 0, "a")
	second, stopSecond := serveNBD(t, c, 1, "b")
	count, stop := writeInTurn(first, second)
	groups := 2
	if os.Getenv("TRIVET_MEASURE") != "" {
		groups = 100
	}
	volumes := []string{"b", "sleeps", "a"}
	var held []time.Duration
	failed := 0
	for i := range groups {
		before := count.Load()
		require.Eventually(t, func() bool { return count.Load() > before }, time.Minute, time.Millisecond, "writes go on")
		if i > 0 {
			volumes = []string{"b", "a"}
		}
		g, tries := createGroup(t, c, fmt.Sprintf("g%d", i), volumes)
		failed += tries - 1
		require.Equal(t, "Ready", g.GetState())
		require.Len(t, g.GetSnapshots(), len(volumes))
		require.Equal(t, fmt.Sprintf("g%d/b", i), g.GetSnapshots()[0].GetName())
		require.Positive(t, g.GetHeldSeconds())
		held = append(held, time.Duration(g.GetHeldSeconds()*float64(time.Second)))
	}
	slices.Sort(held)
	t.Logf("writes were held: median %v, p99 %v, longest %v, for %d groups; %d writes to each volume", held[len(held)/2],
		held[len(held)*99/100], held[len(held)-1], groups, count.Load())
	for i := range 2 {
		n := int(scrape(t, c, i)[`trivet_snapshot_hold_seconds_count{kind="group"}`])
		require.GreaterOrEqual(t, n, groups)
		require.LessOrEqual(t, n, groups+failed)
	}
	require.NoError(t, stop())
	stopFirst()
	stopSecond()

	numbers := map[string]uint64{}
	for _, v := range []string{"a", "b"} {
		restore(t, c, &api.RestoreSnapshotRequest{Snapshot: "g1/" + v, Name: v + "1"})
		numbers[v] = numberIn(t, c, v+"1")
	}
	require.Contains(t, []uint64{numbers["b"], numbers["b"] + 1}, numbers["a"])
	require.Positive(t, numbers["a"])
	_, err := c.Admin(0).DeleteSnapshot(ctx, &api.SnapshotRequest{Name: "g0/a"})
	require.Equal(t, codes.FailedPrecondition, status.Code(err))
	require.ErrorContains(t, err, `"g0"`)
	_, err = c.Admin(1).DeleteSnapshotGroup(ctx, &api.SnapshotGroupRequest{Name: "g0"})
	require.NoError(t, err)
	_, err = c.Admin(1).GetSnapshotGroup(ctx, &api.SnapshotGroupRequest{Name: "g0"})
	require.Equal(t, codes.NotFound, status.Code(err))
	list, err := c.Admin(1).ListSnapshotGroups(ctx, &api.ListSnapshotGroupsRequest{})
	require.NoError(t, err)
	require.Len(t, list.GetGroups(), groups-1)
}
