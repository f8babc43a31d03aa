package server_test

import (
	"runtime"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet/internal/testutil"
)

// TestCloseEndsCalls: a server that is closed while it serves a volume, and while nobody can commit that the volume is
// detached, leaves no call behind. Not parallel: it looks at all goroutines.
func TestCloseEndsCalls(t *testing.T) {
	c := testutil.StartCluster(t, 3, nil)
	create(t, c, "v")
	client, _ := serveNBD(t, c, 0, "v")
	defer client.close() //nolint:errcheck // its server is gone
	mustWrite(t, client, 1, 'a')
	for _, i := range []int{2, 1, 0} {
		c.Stop(i)
	}
	stacks := make([]byte, 16<<20)
	stacks = stacks[:runtime.Stack(stacks, true)]
	require.NotContains(t, string(stacks), ".(*admin).ServeVolume(")
}
