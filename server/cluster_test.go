package server_test

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/api"
	"github.com/trivet-csi/trivet/internal/testutil"
	"github.com/trivet-csi/trivet/replication/transport"
	"github.com/trivet-csi/trivet/server"
)

// startOverMemory starts three servers whose traffic goes through an in-memory network with faults.
func startOverMemory(t *testing.T, change ...func(*server.Config)) (*testutil.Cluster, *transport.Memory) {
	t.Helper()
	hub := transport.NewMemory(1)
	t.Cleanup(func() { require.NoError(t, hub.Close()) })
	return testutil.StartCluster(t, 3, func(_ int, cfg *server.Config) {
		cfg.Network = hub.Node(cfg.Node)
		for _, c := range change {
			c(cfg)
		}
	}), hub
}

// again makes a call until its answer is another than that the same call should be made again, as every client has to:
// nobody could say, a node is away for a moment, or another operation is under way.
func again(t *testing.T, call func() error) error {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), eventuallyTimeout)
	defer cancel()
	for {
		err := call()
		code := status.Code(err)
		passes := code == codes.Unavailable || code == codes.Aborted ||
			code == codes.ResourceExhausted && strings.Contains(err.Error(), "; down: ")
		if !passes || ctx.Err() != nil {
			return err
		}
		pauseFor(ctx)
	}
}

func create(t *testing.T, c *testutil.Cluster, name string) *api.Volume {
	t.Helper()
	return createBy(t, c, &api.CreateVolumeRequest{Name: name, SizeBytes: 64 << 20})
}

func createBy(t *testing.T, c *testutil.Cluster, r *api.CreateVolumeRequest) (v *api.Volume) {
	t.Helper()
	require.NoError(t, again(t, func() (err error) { v, err = c.Admin(0).CreateVolume(t.Context(), r); return err }))
	require.Len(t, v.GetReplicas(), 3)
	return v
}

// serve has a server serve a volume until stop is called or the test ends.
func serve(t *testing.T, admin api.AdminClient, r *api.ServeVolumeRequest) (
	ready *api.ServeVolumeResponse, stop func(),
) {
	t.Helper()
	require.NoError(t, again(t, func() error {
		ctx, cancel := context.WithCancel(t.Context())
		stop = cancel
		stream, err := admin.ServeVolume(ctx, r)
		if err == nil {
			ready, err = stream.Recv()
		}
		if err != nil {
			cancel()
		}
		return err
	}))
	return ready, stop
}

// serveNBD serves a volume on server i until the returned function is called.
func serveNBD(t *testing.T, c *testutil.Cluster, i int, name string) (*nbdClient, func()) {
	t.Helper()
	socket := c.Path(fmt.Sprintf("%s-%d.nbd", name, i))
	ready, cancel := serve(t, c.Admin(i), &api.ServeVolumeRequest{Name: name, Socket: socket})
	assert.Contains(t, ready.GetUri(), socket)
	client, err := dialNBD(t.Context(), socket, name)
	require.NoError(t, err)
	return client, func() {
		require.NoError(t, client.close())
		cancel() // the server notices and detaches
		require.Eventually(t, func() bool {
			v, err := c.Admin(i).GetVolume(t.Context(), &api.VolumeRequest{Name: name})
			return err == nil && v.GetAttachedNode() != fmt.Sprintf("node-%d", i)
		}, time.Minute, 20*time.Millisecond)
		awaitUnlocked(t, c.Admin(i), name)
	}
}

// awaitUnlocked waits until the server that has just detached a volume by itself is through with that. The catalogue
// shows it detached a moment before, while other calls to that server are still refused.
func awaitUnlocked(t *testing.T, admin api.AdminClient, name string) {
	t.Helper()
	require.Eventually(t, func() bool { // there is nothing to detach any more, but it takes the same lock
		_, err := admin.DetachVolume(context.WithoutCancel(t.Context()), &api.DetachVolumeRequest{Name: name})
		return err == nil || status.Code(err) == codes.FailedPrecondition // others hold it by now
	}, time.Minute, 20*time.Millisecond)
}

func pattern(b byte) []byte { return bytes.Repeat([]byte{b}, trivet.BlockSize) }

func mustWrite(t *testing.T, c *nbdClient, lba int64, b byte) {
	t.Helper()
	require.NoError(t, c.write(pattern(b), lba*trivet.BlockSize))
	require.NoError(t, c.flush())
}

func requireBlock(t *testing.T, c *nbdClient, lba int64, want byte) {
	t.Helper()
	got := make([]byte, trivet.BlockSize)
	require.NoError(t, c.read(got, lba*trivet.BlockSize))
	require.Equal(t, pattern(want), got)
}

// leaderOf waits until a volume has a leader and returns the number of its server.
func leaderOf(t *testing.T, c *testutil.Cluster, ask int, name string) int {
	t.Helper()
	leader := -1
	require.Eventually(t, func() bool {
		v, err := c.Admin(ask).GetVolume(t.Context(), &api.VolumeRequest{Name: name})
		if err != nil {
			return false
		}
		for _, r := range v.GetReplicas() {
			if r.GetLeader() && r.GetTerm() > 0 {
				_, err := fmt.Sscanf(r.GetNode(), "node-%d", &leader)
				return err == nil
			}
		}
		return false
	}, time.Minute, 50*time.Millisecond)
	return leader
}

// moveLeader moves the leadership of a volume. A move that an attach had asked for may be under way and
// come in between, or an election: then once more.
func moveLeader(t *testing.T, c *testutil.Cluster, name string, to int) {
	t.Helper()
	require.Eventually(t, func() bool {
		ctx, cancel := context.WithTimeout(t.Context(), 15*time.Second)
		defer cancel()
		_, err := c.Admin(0).MoveLeader(ctx, &api.MoveLeaderRequest{Name: name, Node: fmt.Sprintf("node-%d", to)})
		return err == nil && leaderOf(t, c, 0, name) == to
	}, 2*time.Minute, 50*time.Millisecond)
}

func TestVolumeOutlivesItsLeader(t *testing.T) {
	c, hub := startOverMemory(t)
	create(t, c, "v")
	client, stop := serveNBD(t, c, 0, "v")
	defer stop()
	moveLeader(t, c, "v", 2)
	mustWrite(t, client, 1, 'a')
	hub.Isolate("node-2")
	mustWrite(t, client, 2, 'b') // waits for a new leader
	requireBlock(t, client, 1, 'a')
	require.NotEqual(t, 2, leaderOf(t, c, 0, "v"))
	hub.HealAll()
	require.Eventually(t, func() bool { // the old leader catches up
		v, err := c.Admin(0).GetVolume(t.Context(), &api.VolumeRequest{Name: "v"})
		if err != nil {
			return false
		}
		applied := map[uint64]bool{}
		for _, r := range v.GetReplicas() {
			applied[r.GetApplied()] = true
		}
		return len(applied) == 1 && !applied[0]
	}, time.Minute, 50*time.Millisecond)
}

// TestForcedDetachFences: the node that holds the volume is cut off; the volume is taken from it and
// used elsewhere. When it is back it can neither write nor read (H12), and what it wrote before is
// there.
func TestForcedDetachFences(t *testing.T) {
	c, hub := startOverMemory(t)
	create(t, c, "v")
	old, stopOld := serveNBD(t, c, 2, "v")
	mustWrite(t, old, 1, 'a')
	hub.Isolate("node-2")

	_, err := c.Admin(0).DetachVolume(t.Context(), &api.DetachVolumeRequest{Name: "v"})
	require.Equal(t, codes.FailedPrecondition, status.Code(err))
	assert.Contains(t, err.Error(), "node-2")
	_, err = c.Admin(0).DetachVolume(t.Context(), &api.DetachVolumeRequest{Name: "v", Force: true})
	require.NoError(t, err)
	client, stop := serveNBD(t, c, 0, "v")
	defer stop()
	requireBlock(t, client, 1, 'a')
	mustWrite(t, client, 1, 'b')

	hub.HealAll()
	require.Error(t, old.write(pattern('z'), trivet.BlockSize), "a fenced node wrote")
	require.Error(t, old.flush())
	stopOld()
	requireBlock(t, client, 1, 'b')
}

func TestAttachElsewhereNamesTheHolder(t *testing.T) {
	c, _ := startOverMemory(t)
	create(t, c, "v")
	_, stop := serveNBD(t, c, 1, "v")
	defer stop()
	err := again(t, func() error {
		_, err := c.Admin(0).AttachVolume(t.Context(), &api.VolumeRequest{Name: "v"})
		return err
	})
	require.Equal(t, codes.FailedPrecondition, status.Code(err))
	assert.Contains(t, err.Error(), "node-1")
	_, err = c.Admin(0).DeleteVolume(t.Context(), &api.VolumeRequest{Name: "v"})
	require.Equal(t, codes.FailedPrecondition, status.Code(err))
	assert.Contains(t, err.Error(), "node-1")
}

// TestRestartOfAll stops every server of a TLS cluster and starts them again: catalogue and data are
// there, and servers find each other by the addresses they kept.
func TestRestartOfAll(t *testing.T) {
	c := testutil.StartCluster(t, 3, nil)
	create(t, c, "v")
	client, stop := serveNBD(t, c, 0, "v")
	mustWrite(t, client, 7, 'x')
	stop()
	for i := range 3 {
		c.Stop(i)
	}
	for i := range 3 {
		c.Start(i)
	}
	c.AwaitUp(3)
	client, stop = serveNBD(t, c, 1, "v")
	defer stop()
	requireBlock(t, client, 7, 'x')
}

// TestWipedDisk: a disk that was wiped gets a new identity, its replica is reported as faulted and
// not made anew under its old name (H10), and the volume goes on with the others.
func TestWipedDisk(t *testing.T) {
	c := testutil.StartCluster(t, 3, nil)
	create(t, c, "v")
	client, stop := serveNBD(t, c, 0, "v")
	defer stop()
	mustWrite(t, client, 3, 'd')
	c.Stop(2)
	require.NoError(t, os.RemoveAll(filepath.Join(c.Config(2).DataDir, "disk")))
	c.Start(2)
	require.Eventually(t, func() bool {
		st, err := c.Admin(0).ClusterStatus(t.Context(), &api.ClusterStatusRequest{})
		return err == nil && strings.Contains(strings.Join(st.GetWarnings(), "\n"), "replica on node-2 is faulted")
	}, time.Minute, 50*time.Millisecond)
	mustWrite(t, client, 3, 'e')
	requireBlock(t, client, 3, 'e')
}

func TestDeleteLeavesNothing(t *testing.T) {
	c, _ := startOverMemory(t)
	v := create(t, c, "v")
	_, err := c.Admin(1).DeleteVolume(t.Context(), &api.VolumeRequest{Name: v.GetId()})
	require.NoError(t, err)
	_, err = c.Admin(1).DeleteVolume(t.Context(), &api.VolumeRequest{Name: "v"})
	require.NoError(t, err, "an absent volume is deleted already")
	list, err := c.Admin(2).ListVolumes(t.Context(), &api.ListVolumesRequest{})
	require.NoError(t, err)
	require.Empty(t, list.GetVolumes())
	for i := range 3 {
		groups, err := filepath.Glob(filepath.Join(c.Config(i).DataDir, "disk", "groups", "*"))
		require.NoError(t, err)
		require.Empty(t, groups)
	}
}

func TestLabels(t *testing.T) {
	c, _ := startOverMemory(t)
	createBy(t, c, &api.CreateVolumeRequest{
		Name: "gold", SizeBytes: 16 << 20, Labels: map[string]string{"tier": "gold", "old": ""},
	})
	create(t, c, "plain")
	names := func(selector string) (names []string) {
		require.NoError(t, again(t, func() error {
			list, err := c.Admin(2).ListVolumes(t.Context(), &api.ListVolumesRequest{Selector: selector})
			names = nil
			for _, v := range list.GetVolumes() {
				names = append(names, v.GetName())
			}
			return err
		}))
		return names
	}
	require.ElementsMatch(t, []string{"gold", "plain"}, names(""))
	require.Equal(t, []string{"gold"}, names("tier=gold,old"))
	var v *api.Volume
	require.NoError(t, again(t, func() (err error) {
		v, err = c.Admin(1).SetLabels(t.Context(), &api.SetLabelsRequest{
			Name: "gold", Labels: map[string]string{"team": "shop"}, Remove: []string{"old"},
		})
		return err
	}))
	require.Equal(t, map[string]string{"tier": "gold", "team": "shop"}, v.GetLabels())
	require.Empty(t, names("old"))
	require.Equal(t, []string{"plain"}, names("!tier"))
	for _, call := range []func() error{
		func() error {
			_, err := c.Admin(0).SetLabels(t.Context(), &api.SetLabelsRequest{Name: "gold", Remove: []string{"bad key"}})
			return err
		},
		func() error {
			_, err := c.Admin(0).ListVolumes(t.Context(), &api.ListVolumesRequest{Selector: "bad key"})
			return err
		},
	} {
		err := again(t, call)
		require.Equal(t, codes.InvalidArgument, status.Code(err), "%v", err)
		require.ErrorContains(t, err, "bad key")
	}
}

func TestReclaim(t *testing.T) {
	c, _ := startOverMemory(t)
	createBy(t, c, &api.CreateVolumeRequest{
		Name: "kept", SizeBytes: 16 << 20, Parameters: map[string]string{"reclaimPolicy": "retain"},
	})
	client, stop := serveNBD(t, c, 0, "kept")
	mustWrite(t, client, 0, 's')
	stop()
	var v *api.Volume
	require.NoError(t, again(t, func() (err error) { // aborted for as long as the detach holds the volume's lock
		v, err = c.Admin(0).ReleaseVolume(t.Context(), &api.VolumeRequest{Name: "kept"})
		return err
	}))
	require.Equal(t, "Released", v.GetPhase())
	v, err := c.Admin(0).ReclaimVolume(t.Context(), &api.ReclaimVolumeRequest{Name: "kept", Policy: "recycle"})
	require.NoError(t, err)
	require.Eventually(t, func() bool {
		v, err = c.Admin(0).GetVolume(t.Context(), &api.VolumeRequest{Name: v.GetId()})
		return err == nil && v.GetPhase() == "Available"
	}, time.Minute, 50*time.Millisecond)
	client, stop = serveNBD(t, c, 1, v.GetName())
	defer stop()
	requireBlock(t, client, 0, 0) // the old tenant's bytes are gone (S13)
}

func TestBadInput(t *testing.T) {
	c, _ := startOverMemory(t)
	create(t, c, "taken")
	tests := []struct {
		name   string
		volume string
		size   int64
		params map[string]string
		want   codes.Code
		says   string
	}{
		{"no name", "", 1 << 20, nil, codes.InvalidArgument, "empty"},
		{"slash", "a/b", 1 << 20, nil, codes.InvalidArgument, "a/b"},
		{"nul", "a\x00b", 1 << 20, nil, codes.InvalidArgument, "U+0000"},
		{"dots", "..", 1 << 20, nil, codes.InvalidArgument, ".."},
		{"300 characters", strings.Repeat("n", 300), 1 << 20, nil, codes.InvalidArgument, "300"},
		{"no size", "a", 0, nil, codes.InvalidArgument, "zero"},
		{"negative size", "a", -1, nil, codes.InvalidArgument, "-1"},
		{"more than a volume may have", "a", trivet.VolumeSizeMax + 1, nil, codes.OutOfRange, ""},
		{"unknown parameter", "a", 1 << 20, map[string]string{"replcas": "3"}, codes.InvalidArgument, "replcas"},
		{"two replicas", "a", 1 << 20, map[string]string{"replicas": "2"}, codes.InvalidArgument, "replicas"},
		{"more replicas than nodes", "a", 1 << 20, map[string]string{"replicas": "5"}, codes.ResourceExhausted, "3"},
		{"taken with another size", "taken", 128 << 20, nil, codes.AlreadyExists, "taken"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, err := c.Admin(1).CreateVolume(t.Context(), &api.CreateVolumeRequest{
				Name: tt.volume, SizeBytes: tt.size, Parameters: tt.params,
			})
			require.Equal(t, tt.want, status.Code(err), "%v", err)
			assert.Contains(t, err.Error(), tt.says)
		})
	}
	list, err := c.Admin(0).ListVolumes(t.Context(), &api.ListVolumesRequest{})
	require.NoError(t, err)
	require.Len(t, list.GetVolumes(), 1, "a refused request left something behind")
	_, err = c.Admin(0).GetVolume(t.Context(), &api.VolumeRequest{Name: "nope"})
	require.Equal(t, codes.NotFound, status.Code(err))
	_, err = c.Admin(0).MoveLeader(t.Context(), &api.MoveLeaderRequest{Name: "taken", Node: "nowhere"})
	require.Equal(t, codes.NotFound, status.Code(err))
	_, err = c.Admin(0).InitCluster(t.Context(), &api.InitClusterRequest{})
	require.Equal(t, codes.AlreadyExists, status.Code(err))
}

// eventuallyTimeout bounds what happens in the background of real servers.
const eventuallyTimeout = time.Minute

func pauseFor(ctx context.Context) {
	select {
	case <-ctx.Done():
	case <-time.After(50 * time.Millisecond):
	}
}
