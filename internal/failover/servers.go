package failover

import (
	"context"
	"fmt"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/api"
)

// stateUp is what ListNodes says of a node whose lease has not run out (server/admin.go).
const stateUp = "Up"

// How long one server is waited for before the call goes to the next: one of those that are asked in turn is the
// one that died.
const (
	askTimeout = 2 * time.Second
	askTries   = 3

	fenceTry = 5 * time.Second
)

// Servers is a Catalogue that asks the servers of the cluster, each call any of them.
type Servers struct {
	// Admin reaches any server at each call.
	Admin api.AdminClient
}

var _ Catalogue = (*Servers)(nil)

// Nodes implements Catalogue.
func (s *Servers) Nodes(ctx context.Context) (map[trivet.NodeID]bool, error) {
	var (
		list *api.ListNodesResponse
		err  error
	)
	for range askTries {
		if list, err = s.listNodes(ctx); err == nil || ctx.Err() != nil {
			break
		}
	}
	if err != nil {
		return nil, fmt.Errorf("list nodes: %w: %w", err, trivet.ErrUnavailable)
	}
	away := make(map[trivet.NodeID]bool, len(list.GetNodes()))
	for _, n := range list.GetNodes() {
		away[trivet.NodeID(n.GetId())] = n.GetState() != stateUp
	}
	return away, nil
}

func (s *Servers) listNodes(ctx context.Context) (*api.ListNodesResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	return s.Admin.ListNodes(ctx, &api.ListNodesRequest{})
}

// Fence implements Catalogue. It asks again while ctx lasts: a server that is asked may be the one that died, and a
// call that was cut off goes on there.
func (s *Servers) Fence(ctx context.Context, volume string, node trivet.NodeID) error {
	for {
		err := s.fence(ctx, volume, node)
		switch status.Code(err) {
		case codes.OK:
			return nil
		case codes.FailedPrecondition:
			return fmt.Errorf("%w: %w", err, trivet.ErrInUse)
		case codes.Unavailable, codes.DeadlineExceeded, codes.Aborted:
		default:
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%w: %w", err, trivet.ErrUnavailable)
		case <-time.After(time.Second):
		}
	}
}

func (s *Servers) fence(ctx context.Context, volume string, node trivet.NodeID) error {
	ctx, cancel := context.WithTimeout(ctx, fenceTry)
	defer cancel()
	_, err := s.Admin.FenceVolume(ctx, &api.FenceVolumeRequest{Volume: volume, Node: string(node)})
	return err
}
