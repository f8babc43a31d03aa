package server_test

import (
	"bytes"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet/api"
	"github.com/trivet-csi/trivet/internal/testutil"
)

// changeLog changes the files of the log of a server's catalogue on the disk, where the server may have them open.
func changeLog(t *testing.T, c *testutil.Cluster, i int, change func(b []byte) (at int64, to []byte)) {
	t.Helper()
	names, err := filepath.Glob(filepath.Join(c.Config(i).DataDir, "meta", "log", "seg-*"))
	require.NoError(t, err)
	hits := 0
	for _, name := range names {
		b, err := os.ReadFile(name)
		require.NoError(t, err)
		at, to := change(b)
		if to == nil {
			continue
		}
		hits++
		f, err := os.OpenFile(name, os.O_WRONLY, 0)
		require.NoError(t, err)
		_, err = f.WriteAt(to, at)
		require.NoError(t, err)
		require.NoError(t, f.Sync()) // the server reads past the page cache
		require.NoError(t, f.Close())
	}
	require.Positive(t, hits, "nothing to change in the log of server %d", i)
}

// rotLog changes a byte of the entry of the catalogue's log that has a text.
func rotLog(t *testing.T, c *testutil.Cluster, i int, text string) {
	t.Helper()
	changeLog(t, c, i, func(b []byte) (int64, []byte) {
		at := bytes.Index(b, []byte(text))
		if at < 0 {
			return 0, nil
		}
		return int64(at), []byte{b[at] ^ 1}
	})
}

// awaitCatalogue waits until every server's catalogue has a volume and nobody's log is damaged.
func awaitCatalogue(t *testing.T, c *testutil.Cluster, name string) {
	t.Helper()
	for i := range 3 {
		last := ""
		require.Eventually(t, func() bool {
			st, err := c.Admin(i).ClusterStatus(t.Context(), &api.ClusterStatusRequest{})
			if err != nil {
				last = err.Error()
				return false
			}
			last = strings.Join(st.GetWarnings(), "; ")
			_, err = c.Admin(i).GetVolume(t.Context(), &api.VolumeRequest{Name: name})
			return err == nil && !strings.Contains(last, "catalogue")
		}, 2*time.Minute, 50*time.Millisecond, "server %d: %v", i, &last)
	}
}

// A byte of the catalogue's log rots on the disk of a server: before it starts, while it runs, and so that not even
// term and vote can be read. In each case the process goes on, the catalogue loses nothing, and its volumes are read
// and written meanwhile (H23). A server that wanted to stop itself would fail the test.
func TestCatalogueRot(t *testing.T) {
	t.Parallel()
	if testing.Short() {
		t.Skip("three servers, some of which stop and start")
	}
	c := testutil.StartCluster(t, 3, nil)
	create(t, c, "rotten-one")

	// Before a start: the state on its disk does not have the entry.
	c.Stop(2)
	rotLog(t, c, 2, "rotten-one")
	c.Start(2)
	awaitCatalogue(t, c, "rotten-one")

	// While it runs, on both servers that can send it to the third.
	c.Stop(2)
	_, err := c.Admin(0).SetLabels(t.Context(), &api.SetLabelsRequest{
		Name: "rotten-one", Labels: map[string]string{"rotten": "label-two"},
	})
	require.NoError(t, err)
	for i := range 2 { // so that nothing of their logs is in memory
		c.Stop(i)
	}
	for i := range 2 {
		c.Start(i)
	}
	client, stop := serveNBD(t, c, 0, "rotten-one")
	defer stop()
	mustWrite(t, client, 1, 'a')
	for i := range 2 {
		rotLog(t, c, i, "label-two")
	}
	c.Start(2)
	mustWrite(t, client, 2, 'b')
	awaitCatalogue(t, c, "rotten-one")
	v, err := c.Admin(2).GetVolume(t.Context(), &api.VolumeRequest{Name: "rotten-one"})
	require.NoError(t, err)
	require.Equal(t, "label-two", v.GetLabels()["rotten"])
	requireBlock(t, client, 1, 'a')

	// What cannot be opened any more: the server joins anew, with its replicas.
	before := replicaOn(t, c, "rotten-one", "node-1")
	c.Stop(1)
	changeLog(t, c, 1, func([]byte) (int64, []byte) { return 0, make([]byte, 4096) })
	c.Start(1)
	mustWrite(t, client, 3, 'c')
	awaitCatalogue(t, c, "rotten-one")
	c.AwaitUp(3)
	require.DirExists(t, filepath.Join(c.Config(1).DataDir, "meta.damaged"))
	awaitReplicas(t, c, "rotten-one", 3)
	require.Equal(t, before, replicaOn(t, c, "rotten-one", "node-1"), "its replica was not touched")
	for lba, b := range []byte{'a', 'b', 'c'} {
		requireBlock(t, client, int64(lba)+1, b)
	}
	st, err := c.Admin(1).ListNodes(t.Context(), &api.ListNodesRequest{})
	require.NoError(t, err)
	require.False(t, slices.ContainsFunc(st.GetNodes(), func(n *api.Node) bool { return n.GetRole() == "Learner" }))
}
