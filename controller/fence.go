package controller

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller/meta"
)

// FenceAway takes a volume from a node that is away: whose lease has run out. It returns once the fence behind
// its attachment is committed, with the epoch of that fence: from then on nothing that the node still sends is
// accepted, and its reads have ended. It is ForceDetach with a condition that the catalogue itself checks, so
// that a node which comes back at that moment keeps its volumes.
//
// Not attached there, or unknown: nil, with the epoch that is fenced (0 when it is unknown). One of several
// readers is only taken off the record, as Detach does. ErrInUse: the node is not away. It leaves an audit record.
func (c *Controller) FenceAway(ctx context.Context, id trivet.VolumeID, node trivet.NodeID) (trivet.Epoch, error) {
	what := fmt.Sprintf("take %s from %s, which is away", id, node)
	unlock, err := c.busy.lock("volume " + id.String())
	if err != nil {
		return 0, err
	}
	defer unlock()
	for {
		s, err := c.store.Read(ctx)
		if err != nil {
			return 0, fmt.Errorf("%s: %w", what, err)
		}
		v, ok := s.Volume(id)
		if !ok {
			return 0, nil
		}
		since, fence := s.Revision(), v.Epoch
		if held := v.GrantOf(node); held != nil {
			end, err := fenceOf(s, &v, held)
			if err != nil {
				return 0, fmt.Errorf("%s: %w", what, err)
			}
			res, err := c.store.Propose(ctx, meta.Command{Detach: end})
			if errors.Is(err, trivet.ErrPending) {
				continue // it has come back, or other readers have come or gone since it was read
			}
			if err != nil {
				return 0, err
			}
			if res.Volume != nil && res.Volume.GrantOf(node) != nil {
				continue // taken over by a new process since it was read
			}
			if res.Volume == nil || res.Volume.Attached != nil {
				return v.FencedEpoch, nil // gone, or others go on reading
			}
			since, fence = res.Revision, res.Volume.Epoch
		} else if v.Detaching != node {
			return v.FencedEpoch, nil
		}
		return fence, c.await(ctx, what+": fence", since, func(s *meta.State) (bool, error) {
			v, ok := s.Volume(id)
			return !ok || v.FencedEpoch >= fence, nil
		})
	}
}

// fenceOf returns the command that takes v from the node that holds it, provided that its lease has run out and
// stays so. ErrInUse when it has not.
func fenceOf(s *meta.State, v *meta.Volume, held *meta.Attachment) (*meta.Detach, error) {
	n, ok := s.Node(held.Node)
	if !ok {
		return nil, fmt.Errorf("node is unknown: %w", trivet.ErrNotFound) // never: attached nodes are not forgotten
	}
	if n.Alive(time.Now()) {
		return nil, fmt.Errorf("its lease lasts until %s: %w", n.LeaseUntil.Format(time.RFC3339), trivet.ErrInUse)
	}
	end := detachOf(v, held, held.Node)
	end.Forced, end.IfLease = true, n.LeaseUntil
	return end, nil
}
