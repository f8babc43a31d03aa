package server

import (
	"context"
	"fmt"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/api"
	"github.com/trivet-csi/trivet/controller"
	"github.com/trivet-csi/trivet/controller/meta"
	"github.com/trivet-csi/trivet/driver"
	"github.com/trivet-csi/trivet/internal/pki"
)

// admin implements the administration API over the parts of a Server.
type admin struct {
	api.UnimplementedAdminServer
	s *Server
}

// caller returns the identity in the certificate of whoever makes the call.
func caller(ctx context.Context) (pki.Identity, error) {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return pki.Identity{}, status.Error(codes.Unauthenticated, "call without a peer")
	}
	info, ok := p.AuthInfo.(credentials.TLSInfo)
	if !ok {
		return pki.Identity{}, status.Error(codes.Unauthenticated, "call without TLS")
	}
	id, err := pki.IdentityOf(info.State)
	if err != nil {
		return pki.Identity{}, status.Error(codes.Unauthenticated, err.Error())
	}
	return id, nil
}

// authorize lets nodes join and clients do everything else (S4): a stolen node certificate deletes
// no volume.
func authorize(ctx context.Context, method string) error {
	id, err := caller(ctx)
	if err != nil {
		return err
	}
	want := pki.RoleClient
	if method == api.Admin_Join_FullMethodName {
		want = pki.RoleNode
	}
	if id.Role != want {
		return status.Errorf(codes.PermissionDenied, "%s needs a %s certificate; %s %q called", method, want, id.Role,
			id.Name)
	}
	return nil
}

func authorizeUnary(ctx context.Context, req any, info *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
	if err := authorize(ctx, info.FullMethod); err != nil {
		return nil, err
	}
	resp, err := next(ctx, req)
	if err != nil {
		return nil, driver.ToStatus(err)
	}
	return resp, nil
}

// membersOnly refuses CSI calls at once while the server is no member of a cluster: whoever asks can
// then ask another server, instead of waiting here for a catalogue.
func (s *Server) membersOnly(ctx context.Context, req any, info *grpc.UnaryServerInfo, next grpc.UnaryHandler,
) (any, error) {
	if driver.ForCluster(info.FullMethod) {
		if _, err := s.node(); err != nil {
			return nil, driver.ToStatus(err)
		}
	}
	return next(ctx, req)
}

func authorizeStream(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, next grpc.StreamHandler) error {
	if err := authorize(ss.Context(), info.FullMethod); err != nil {
		return err
	}
	if err := next(srv, ss); err != nil {
		return driver.ToStatus(err)
	}
	return nil
}

// InitCluster implements api.AdminServer.
func (a *admin) InitCluster(ctx context.Context, _ *api.InitClusterRequest) (*api.InitClusterResponse, error) {
	if err := a.s.initCluster(ctx); err != nil {
		return nil, err
	}
	return &api.InitClusterResponse{Cluster: string(a.s.cluster), Node: string(a.s.cfg.Node)}, nil
}

// Join implements api.AdminServer.
func (a *admin) Join(ctx context.Context, r *api.JoinRequest) (*api.JoinResponse, error) {
	id, err := caller(ctx)
	if err != nil {
		return nil, err
	}
	if id.Name != r.GetNode() {
		return nil, status.Errorf(codes.PermissionDenied, "node %q cannot join as %q", id.Name, r.GetNode())
	}
	return a.s.admit(ctx, r)
}

// ClusterStatus implements api.AdminServer.
func (a *admin) ClusterStatus(ctx context.Context, _ *api.ClusterStatusRequest) (*api.ClusterStatusResponse, error) {
	state, err := a.s.catalogue.Read(ctx)
	if err != nil {
		return nil, err
	}
	resp := &api.ClusterStatusResponse{
		Cluster: string(state.Cluster()), Leader: string(a.s.catalogue.Leader()), Revision: uint64(state.Revision()),
		VolumesByPhase: map[string]int32{}, Nodes: a.nodes(state, time.Now()),
	}
	for _, n := range resp.GetNodes() {
		if n.GetState() != stateUp {
			resp.Warnings = append(resp.Warnings, fmt.Sprintf("node %s is down: its replicas miss writes until it is back, "+
				"or are replaced", n.GetId()))
		}
	}
	if damage := a.s.catalogue.Damage(); damage != "" {
		resp.Warnings = append(resp.Warnings, damage)
	}
	pending := controller.PendingOf(state, time.Now())
	for _, v := range state.Volumes() {
		resp.VolumesByPhase[string(v.Phase)]++
		if v.Phase == meta.PhaseFailed {
			resp.Warnings = append(resp.Warnings, fmt.Sprintf("volume %q failed: %s", v.Name, v.Reason))
		}
		for _, r := range v.Replicas {
			if r.State == meta.ReplicaFaulted {
				resp.Warnings = append(resp.Warnings, fmt.Sprintf("volume %q: replica on %s is faulted: %s", v.Name, r.Node,
					r.Reason))
			}
		}
		if why := pending(&v); why != "" {
			resp.Warnings = append(resp.Warnings, fmt.Sprintf("volume %q has %d replicas, want %d: %s", v.Name,
				len(v.Replicas), v.Want(), why))
		}
	}
	return resp, nil
}

// ListNodes implements api.AdminServer.
func (a *admin) ListNodes(ctx context.Context, _ *api.ListNodesRequest) (*api.ListNodesResponse, error) {
	state, err := a.s.catalogue.Read(ctx)
	if err != nil {
		return nil, err
	}
	return &api.ListNodesResponse{Nodes: a.nodes(state, time.Now())}, nil
}

// The words for a node's state and its role in the meta group.
const (
	stateUp     = "Up"
	stateDown   = "Down"
	roleLeader  = "Leader"
	roleVoter   = "Voter"
	roleLearner = "Learner"
)

func (a *admin) nodes(state *meta.State, now time.Time) []*api.Node {
	replicas := map[trivet.NodeID]int32{}
	for _, v := range state.Volumes() {
		for _, r := range v.Replicas {
			replicas[r.Node]++
		}
	}
	roles := a.s.catalogue.Roles()
	var nodes []*api.Node
	for _, n := range state.Nodes() {
		node := &api.Node{
			Id: string(n.ID), Address: n.Address, Zone: n.Zone, Rack: n.Rack, State: stateDown, Role: roleLearner,
			ReplicaCount: replicas[n.ID], Cordoned: n.Cordoned, Draining: n.Draining,
			ZoneSet: n.ZoneSet, RackSet: n.RackSet,
		}
		if now.Before(n.LeaseUntil) {
			node.State = stateUp
		}
		if voter, known := roles[n.ID]; known && voter {
			node.Role = roleVoter
		}
		if n.ID == a.s.catalogue.Leader() {
			node.Role = roleLeader
		}
		for _, d := range n.Disks {
			node.Disks = append(node.Disks, &api.Disk{
				Id: string(d.ID), Path: d.Path, SizeBytes: d.SizeBytes, FreeBytes: d.FreeBytes,
			})
		}
		nodes = append(nodes, node)
	}
	return nodes
}
