package server_test

import (
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/api"
	"github.com/trivet-csi/trivet/server"
)

// TestFenceVolumeOfALostNode: a volume is taken from a node once its lease has run out, not before, and that
// node can neither write nor read when it is back (H12).
func TestFenceVolumeOfALostNode(t *testing.T) {
	// A machine that stands still for less than that loses no lease.
	c, hub := startOverMemory(t, func(cfg *server.Config) { cfg.Lease = 15 * time.Second })
	v := create(t, c, "v")
	old, stopOld := serveNBD(t, c, 2, "v")
	mustWrite(t, old, 1, 'a')
	fence := &api.FenceVolumeRequest{Volume: v.GetId(), Node: "node-2"}
	_, err := c.Admin(0).FenceVolume(t.Context(), fence)
	require.Equal(t, codes.FailedPrecondition, status.Code(err), "it lives")
	mustWrite(t, old, 1, 'b')

	hub.Isolate("node-2")
	var answer *api.FenceVolumeResponse
	require.Eventually(t, func() bool { // once its lease has run out
		answer, err = c.Admin(0).FenceVolume(t.Context(), fence)
		return err == nil
	}, time.Minute, 200*time.Millisecond)
	again, err := c.Admin(1).FenceVolume(t.Context(), fence)
	require.NoError(t, err)
	assert.Equal(t, answer.GetEpoch(), again.GetEpoch(), "the same again is the same")
	_, err = c.Admin(0).FenceVolume(t.Context(), &api.FenceVolumeRequest{Volume: "v", Node: "node-2"})
	require.Equal(t, codes.InvalidArgument, status.Code(err), "an ID is wanted, not a name")

	client, stop := serveNBD(t, c, 0, "v")
	defer stop()
	requireBlock(t, client, 1, 'b')
	hub.HealAll()
	require.Error(t, old.write(pattern('z'), trivet.BlockSize), "a fenced node wrote")
	stopOld()
	requireBlock(t, client, 1, 'b')
}
