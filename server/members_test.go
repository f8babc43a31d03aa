package server_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet/api"
	"github.com/trivet-csi/trivet/internal/testutil"
	"github.com/trivet-csi/trivet/server"
)

// TestReplicasComeAndGo walks a volume in use through what an operator and an unlucky week do to its replicas: a wiped
// disk, a move, a drain, fewer and more replicas, a node that dies for good. Real servers, TLS, disks; a client
// writes before each step and reads everything after it.
func TestReplicasComeAndGo(t *testing.T) {
	t.Parallel()
	c := testutil.StartCluster(t, 4, func(_ int, cfg *server.Config) {
		// A machine that stands still for less than that has no replica replaced for it.
		cfg.Lease, cfg.ReplaceAfter = 12*time.Second, 3*time.Second
	})
	ctx := t.Context()
	create(t, c, "v")
	client, stop := serveNBD(t, c, 0, "v")
	defer stop()
	var written byte
	step := func(name string, do func()) {
		t.Helper()
		for range 20 {
			mustWrite(t, client, int64(written), written)
			written++
		}
		do()
		for lba := range written {
			requireBlock(t, client, int64(lba), lba)
		}
		t.Logf("%s: %v", name, placesOf(t, c, "v"))
	}
	elsewhere := func() (has, free string) { // a node with a replica, not the one that serves, and the one without
		at := placesOf(t, c, "v")
		for i := 1; i < 4; i++ {
			if n := fmt.Sprintf("node-%d", i); slices.Contains(at, n) {
				has = n
			} else {
				free = n
			}
		}
		if !slices.Contains(at, "node-0") {
			free = "node-0"
		}
		return has, free
	}
	number := func(node string) (i int) {
		_, err := fmt.Sscanf(node, "node-%d", &i)
		require.NoError(t, err)
		return i
	}
	step("wiped disk", func() {
		wiped, _ := elsewhere()
		before := replicaOn(t, c, "v", wiped)
		c.Stop(number(wiped))
		require.NoError(t, os.RemoveAll(filepath.Join(c.Config(number(wiped)).DataDir, "disk")))
		c.Start(number(wiped))
		require.Eventually(t, func() bool { // until its server has said so, it is taken for there
			return replicaOn(t, c, "v", wiped) != before
		}, 2*time.Minute, 50*time.Millisecond)
		awaitReplicas(t, c, "v", 3)
	})
	step("move", func() {
		from, to := elsewhere()
		require.Eventually(t, func() bool {
			_, err := c.Admin(0).MoveReplica(ctx, &api.MoveReplicaRequest{Name: "v", From: from, To: to})
			return err == nil
		}, time.Minute, 50*time.Millisecond)
		require.Eventually(t, func() bool {
			at := placesOf(t, c, "v")
			return slices.Contains(at, to) && !slices.Contains(at, from)
		}, time.Minute, 50*time.Millisecond)
		awaitReplicas(t, c, "v", 3)
	})
	step("drain", func() {
		node, _ := elsewhere()
		cordon := func(on bool) {
			_, err := c.Admin(0).CordonNode(ctx, &api.CordonNodeRequest{Node: node, Cordoned: on, Draining: on})
			require.NoError(t, err)
		}
		cordon(true)
		awaitGone(t, c, "v", node)
		awaitReplicas(t, c, "v", 3)
		cordon(false)
	})
	for _, n := range []int32{1, 3} {
		step(fmt.Sprint("replicas: ", n), func() {
			_, err := c.Admin(0).SetReplicas(ctx, &api.SetReplicasRequest{Name: "v", Count: n})
			require.NoError(t, err)
			awaitReplicas(t, c, "v", int(n))
		})
	}
	step("dead node", func() {
		dead, _ := elsewhere()
		c.Stop(number(dead))
		awaitGone(t, c, "v", dead)
		awaitReplicas(t, c, "v", 3)
		c.Start(number(dead)) // and removes what it has
		require.Eventually(t, func() bool {
			v, err := c.Admin(0).GetVolume(ctx, &api.VolumeRequest{Name: "v"})
			return err == nil && !slices.ContainsFunc(v.GetRetired(), func(r *api.Replica) bool {
				return !strings.HasPrefix(r.GetReason(), "disk is not on") // that of the wiped disk stays on record
			})
		}, time.Minute, 50*time.Millisecond)
		left, err := filepath.Glob(filepath.Join(c.Config(number(dead)).DataDir, "disk", "groups", "*"))
		require.NoError(t, err)
		require.Empty(t, left)
	})
}

// replicasOf returns a volume's replicas, whatever their state.
func replicasOf(t *testing.T, c *testutil.Cluster, name string) []*api.Replica {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	v, err := c.Admin(0).GetVolume(ctx, &api.VolumeRequest{Name: name})
	require.NoError(t, err)
	return v.GetReplicas()
}

// placesOf returns the nodes of a volume's replicas.
func placesOf(t *testing.T, c *testutil.Cluster, name string) (nodes []string) {
	t.Helper()
	for _, r := range replicasOf(t, c, name) {
		nodes = append(nodes, r.GetNode())
	}
	return nodes
}

// replicaOn returns the replica of a volume on a node, or "".
func replicaOn(t *testing.T, c *testutil.Cluster, name, node string) string {
	t.Helper()
	for _, r := range replicasOf(t, c, name) {
		if r.GetNode() == node {
			return r.GetId()
		}
	}
	return ""
}

// awaitGone waits until a node has no replica of a volume.
func awaitGone(t *testing.T, c *testutil.Cluster, name, node string) {
	t.Helper()
	gone := func() bool { return !slices.Contains(placesOf(t, c, name), node) }
	require.Eventually(t, gone, 2*time.Minute, 50*time.Millisecond)
}

// awaitReplicas waits until a volume has n replicas, all of them ready.
func awaitReplicas(t *testing.T, c *testutil.Cluster, name string, n int) {
	t.Helper()
	var states []string
	require.Eventually(t, func() bool {
		v, err := c.Admin(0).GetVolume(t.Context(), &api.VolumeRequest{Name: name})
		if err != nil {
			return false
		}
		states = nil
		for _, r := range v.GetReplicas() {
			states = append(states, r.GetState())
		}
		return len(states) == n && strings.Count(strings.Join(states, " "), "Ready") == n
	}, 2*time.Minute, 50*time.Millisecond, "%v", &states)
}
