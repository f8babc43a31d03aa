package csicall

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// TestMayWorkLater: what the driver can do never is not asked for again.
func TestMayWorkLater(t *testing.T) {
	t.Parallel()
	const noRoom = "place 3 replicas of 67108864 bytes: 2 of 3 nodes qualify"
	for _, tt := range []struct {
		method string
		code   codes.Code
		text   string
		want   bool
	}{
		{"ControllerPublishVolume", codes.Unavailable, "the node is away", true},
		{"CreateVolume", codes.Aborted, "another call works on it", true},
		{"ListVolumes", codes.Aborted, "list again with an empty token", false},
		{"CreateVolume", codes.ResourceExhausted, noRoom + "; down: node-1: no space", true},
		{"CreateVolume", codes.ResourceExhausted, noRoom + "; too little room: node-1: no space", false},
		{"NodeUnstageVolume", codes.FailedPrecondition, "unmount /x: a process uses it: in use", true},
		{"NodeUnpublishVolume", codes.FailedPrecondition, "unmount /x: a process uses it: in use", true},
		{"DeleteVolume", codes.FailedPrecondition, "attached: in use", false},
		{"NodeStageVolume", codes.Internal, "mkfs", false},
		{"CreateVolume", codes.InvalidArgument, "", false},
	} {
		assert.Equal(t, tt.want, mayWorkLater(tt.method, status.Error(tt.code, tt.text)), "%+v", tt)
	}
}

// TestAgain: a call is made again until it works, or a minute has passed, or its caller has gone.
func TestAgain(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		calls := 0
		call := func(ctx context.Context, worksAt int, code codes.Code) error {
			calls = 0
			return Again(ctx, "/csi.v1.Controller/CreateVolume", nil, nil, nil,
				func(context.Context, string, any, any, *grpc.ClientConn, ...grpc.CallOption) error {
					if calls++; calls == worksAt {
						return nil
					}
					return status.Error(code, "x")
				})
		}
		require.NoError(t, call(t.Context(), 3, codes.Unavailable))
		assert.Equal(t, 3, calls)
		require.Equal(t, codes.InvalidArgument, status.Code(call(t.Context(), 0, codes.InvalidArgument)))
		assert.Equal(t, 1, calls)
		began := time.Now()
		require.Equal(t, codes.Unavailable, status.Code(call(t.Context(), 0, codes.Unavailable)))
		assert.WithinDuration(t, began.Add(time.Minute), time.Now(), time.Second)
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		require.Equal(t, codes.Unavailable, status.Code(call(ctx, 0, codes.Unavailable)))
		assert.Equal(t, 1, calls)
	})
}
