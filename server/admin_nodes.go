package server

import (
	"context"
	"fmt"
	"time"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/api"
)

// SetReplicas implements api.AdminServer.
func (a *admin) SetReplicas(ctx context.Context, r *api.SetReplicasRequest) (*api.Volume, error) {
	v, err := a.find(ctx, r.GetName())
	if err != nil {
		return nil, err
	}
	if v, err = a.s.controller.SetReplicas(ctx, v.ID, int(r.GetCount())); err != nil {
		return nil, err
	}
	return a.volume(ctx, v, true), nil
}

// MoveReplica implements api.AdminServer.
func (a *admin) MoveReplica(ctx context.Context, r *api.MoveReplicaRequest) (*api.Volume, error) {
	v, err := a.find(ctx, r.GetName())
	if err != nil {
		return nil, err
	}
	v, err = a.s.controller.MoveReplica(ctx, v.ID, trivet.NodeID(r.GetFrom()), trivet.NodeID(r.GetTo()))
	if err != nil {
		return nil, err
	}
	return a.volume(ctx, v, true), nil
}

// CordonNode implements api.AdminServer.
func (a *admin) CordonNode(ctx context.Context, r *api.CordonNodeRequest) (*api.NodeStatus, error) {
	id := trivet.NodeID(r.GetNode())
	if _, err := a.s.controller.CordonNode(ctx, id, r.GetCordoned(), r.GetDraining()); err != nil {
		return nil, err
	}
	return a.nodeStatus(ctx, id)
}

// PlaceNode implements api.AdminServer.
func (a *admin) PlaceNode(ctx context.Context, r *api.PlaceNodeRequest) (*api.NodeStatus, error) {
	id := trivet.NodeID(r.GetNode())
	if _, err := a.s.controller.PlaceNode(ctx, id, r.Zone, r.Rack, r.GetOwn()); err != nil {
		return nil, err
	}
	return a.nodeStatus(ctx, id)
}

// GetNode implements api.AdminServer.
func (a *admin) GetNode(ctx context.Context, r *api.NodeRequest) (*api.NodeStatus, error) {
	return a.nodeStatus(ctx, trivet.NodeID(r.GetNode()))
}

func (a *admin) nodeStatus(ctx context.Context, id trivet.NodeID) (*api.NodeStatus, error) {
	state, err := a.s.catalogue.Read(ctx)
	if err != nil {
		return nil, err
	}
	out := &api.NodeStatus{}
	for _, n := range a.nodes(state, time.Now()) {
		if n.GetId() == string(id) {
			out.Node = n
		}
	}
	if out.GetNode() == nil {
		return nil, fmt.Errorf("node %q: %w", id, trivet.ErrNotFound)
	}
	remaining, err := a.s.controller.Remaining(ctx, id)
	if err != nil {
		return nil, err
	}
	for _, r := range remaining {
		out.Remaining = append(out.Remaining, &api.Remaining{
			Volume: r.Volume.String(), Name: r.Name, Replica: string(r.Replica), State: string(r.State), Leader: r.Leads,
			Attached: r.Attached, Reason: r.Why,
		})
	}
	return out, nil
}

// ForgetNode implements api.AdminServer.
func (a *admin) ForgetNode(ctx context.Context, r *api.ForgetNodeRequest) (*api.ForgetNodeResponse, error) {
	forgotten, err := a.s.controller.ForgetNode(ctx, trivet.NodeID(r.GetNode()), r.GetAllow())
	if err != nil {
		return nil, err
	}
	resp := &api.ForgetNodeResponse{}
	for _, id := range forgotten {
		resp.Forgotten = append(resp.Forgotten, string(id))
	}
	return resp, nil
}
