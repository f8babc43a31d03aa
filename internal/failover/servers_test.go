package failover_test

import (
	"context"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/api"
	"github.com/trivet-csi/trivet/internal/failover"
)

// adminOf answers with what the functions say.
type adminOf struct {
	api.AdminClient

	nodes func(ctx context.Context) (*api.ListNodesResponse, error)
	fence func(ctx context.Context, r *api.FenceVolumeRequest) error
}

func (a *adminOf) ListNodes(ctx context.Context, _ *api.ListNodesRequest, _ ...grpc.CallOption,
) (*api.ListNodesResponse, error) {
	return a.nodes(ctx)
}

func (a *adminOf) FenceVolume(ctx context.Context, r *api.FenceVolumeRequest, _ ...grpc.CallOption,
) (*api.FenceVolumeResponse, error) {
	return &api.FenceVolumeResponse{}, a.fence(ctx, r)
}

// hang is a server that died: its answer never comes.
func hang(ctx context.Context) error {
	<-ctx.Done()
	return status.FromContextError(ctx.Err()).Err()
}

func TestServersNodes(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		calls := 0
		s := &failover.Servers{Admin: &adminOf{nodes: func(ctx context.Context) (*api.ListNodesResponse, error) {
			if calls++; calls == 1 {
				return nil, hang(ctx)
			}
			return &api.ListNodesResponse{Nodes: []*api.Node{
				{Id: "n1", State: "Up"}, {Id: "n2", State: "Down"}, {Id: "n3", State: "a word from the future"},
			}}, nil
		}}}
		began := time.Now()
		got, err := s.Nodes(t.Context())
		require.NoError(t, err)
		assert.Equal(t, map[trivet.NodeID]bool{"n1": false, "n2": true, "n3": true}, got)
		assert.Equal(t, 2*time.Second, time.Since(began), "the next one is asked")

		s.Admin = &adminOf{nodes: func(ctx context.Context) (*api.ListNodesResponse, error) { return nil, hang(ctx) }}
		_, err = s.Nodes(t.Context())
		require.ErrorIs(t, err, trivet.ErrUnavailable)
	})
}

func TestServersFence(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		answers := []error{
			hang(expired(t)), status.Error(codes.Unavailable, "no leader"), status.Error(codes.Aborted, "under way"), nil,
		}
		s := &failover.Servers{Admin: &adminOf{fence: func(_ context.Context, r *api.FenceVolumeRequest) error {
			assert.Equal(t, "vol-1", r.GetVolume())
			assert.Equal(t, "n1", r.GetNode())
			err := answers[0]
			answers = answers[1:]
			return err
		}}}
		require.NoError(t, s.Fence(t.Context(), "vol-1", "n1"))
		require.Empty(t, answers)

		answers = []error{status.Error(codes.FailedPrecondition, "it lives")}
		require.ErrorIs(t, s.Fence(t.Context(), "vol-1", "n1"), trivet.ErrInUse)
		answers = []error{status.Error(codes.InvalidArgument, "no ID")}
		require.Error(t, s.Fence(t.Context(), "vol-1", "n1"))

		s.Admin = &adminOf{fence: func(ctx context.Context, _ *api.FenceVolumeRequest) error { return hang(ctx) }}
		ctx, cancel := context.WithTimeout(t.Context(), 12*time.Second)
		defer cancel()
		require.ErrorIs(t, s.Fence(ctx, "vol-1", "n1"), trivet.ErrUnavailable, "no answer is no success")
	})
}

func expired(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 0)
	t.Cleanup(cancel)
	return ctx
}
