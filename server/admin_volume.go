package server

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/api"
	"github.com/trivet-csi/trivet/controller"
	"github.com/trivet-csi/trivet/controller/meta"
	"github.com/trivet-csi/trivet/replication"
)

// find returns the volume with a name or, when none has it, with that ID.
func (a *admin) find(ctx context.Context, name string) (meta.Volume, error) {
	if name == "" {
		return meta.Volume{}, fmt.Errorf("volume name is missing: %w", trivet.ErrInvalid)
	}
	v, err := a.s.controller.VolumeByName(ctx, name)
	if !errors.Is(err, trivet.ErrNotFound) {
		return v, err
	}
	id, parseErr := trivet.ParseVolumeID(name)
	if parseErr != nil {
		return meta.Volume{}, err
	}
	return a.s.controller.Volume(ctx, id)
}

// show returns a volume as the API shows it, with what its replicas say of themselves.
func (a *admin) show(ctx context.Context, id trivet.VolumeID) (*api.Volume, error) {
	v, err := a.s.controller.Volume(ctx, id)
	if err != nil {
		return nil, err
	}
	return a.volume(ctx, v, true), nil
}

// volume converts v; ask adds the status of each replica, asked from the node that has it.
func (a *admin) volume(ctx context.Context, v meta.Volume, ask bool) *api.Volume {
	out := &api.Volume{
		Id: v.ID.String(), Name: v.Name, SizeBytes: v.SizeBytes, Phase: string(v.Phase), Reason: v.Reason,
		ReclaimPolicy: string(v.Reclaim), Parameters: v.Params, Labels: v.Labels, Epoch: uint64(v.Epoch),
		Created: v.Created.Format(time.RFC3339), WantReplicas: int32(v.Want()), WantSizeBytes: v.WantSizeBytes,
	}
	out.AttachedNode = string(v.Holder())
	for _, n := range v.Holders() {
		out.AttachedNodes = append(out.AttachedNodes, string(n))
	}
	out.AttachedReadOnly = v.Attached != nil && v.Attached.ReadOnly
	out.UsedBytes = -1
	if n, err := a.s.node(); err == nil {
		out.Device = n.Device(v.ID)
		if st, runs := n.ReplicaStatus(v.ID); runs {
			out.UsedBytes = st.UsedBytes
		}
	}
	leader, replicas := v.Leader, make([]*api.Replica, 0, len(v.Replicas))
	if ask && out.GetAttachedNode() == "" {
		leader = "" // the last one known may have been parked with the volume
	}
	for _, r := range v.Replicas {
		replica := &api.Replica{
			Id: string(r.ID), Node: string(r.Node), Disk: string(r.Disk), State: string(r.State), Reason: r.Reason,
			Replaces: string(r.Replaces),
		}
		if ask && r.State == meta.ReplicaReady {
			st, err := a.replicaStatus(ctx, v.ID, r.Node)
			if errors.Is(err, trivet.ErrNotFound) && out.GetAttachedNode() == "" {
				replica.State = stateParked
			}
			if err == nil { // a dead node's replica has no status
				replica.Applied, replica.Commit, replica.Term = st.Applied, st.Commit, st.Term
				replica.UsedBytes = st.UsedBytes
				out.UsedBytes = max(out.UsedBytes, st.UsedBytes)
				if st.IsLeader {
					leader = r.ID
				}
			}
		}
		replicas = append(replicas, replica)
	}
	for _, r := range replicas {
		r.Leader = r.GetId() == string(leader)
	}
	out.Replicas = replicas
	for _, r := range v.Retired {
		out.Retired = append(out.Retired, &api.Replica{
			Id: string(r.ID), Node: string(r.Node), Disk: string(r.Disk), State: string(r.State), Reason: r.Reason,
		})
	}
	if ask {
		out.Pending = controller.PendingOf(a.s.catalogue.Local(), time.Now())(&v)
	}
	return out
}

// stateParked is shown of a ready replica that its node has stopped because the volume is detached.
const stateParked = "Parked"

// statusTimeout bounds the question to a node how its replica is; a dead node must not hold up `show`.
const statusTimeout = time.Second

func (a *admin) replicaStatus(ctx context.Context, id trivet.VolumeID, node trivet.NodeID,
) (replication.RemoteStatus, error) {
	ctx, cancel := context.WithTimeout(ctx, statusTimeout)
	defer cancel()
	return replication.QueryStatus(ctx, a.s.network, node, id)
}

// CreateVolume implements api.AdminServer.
func (a *admin) CreateVolume(ctx context.Context, r *api.CreateVolumeRequest) (*api.Volume, error) {
	if r.GetSizeBytes() <= 0 {
		return nil, fmt.Errorf("create volume %q: size of %d bytes: want more than zero: %w", r.GetName(), r.GetSizeBytes(),
			trivet.ErrInvalid)
	}
	v, err := a.s.controller.CreateVolume(ctx, controller.CreateRequest{
		Name: r.GetName(), RequiredBytes: r.GetSizeBytes(), Params: r.GetParameters(), Labels: r.GetLabels(),
	})
	if err != nil {
		return nil, err
	}
	return a.volume(ctx, v, true), nil
}

// ListVolumes implements api.AdminServer.
func (a *admin) ListVolumes(ctx context.Context, r *api.ListVolumesRequest) (*api.ListVolumesResponse, error) {
	matches, err := controller.ParseSelector(r.GetSelector())
	if err != nil {
		return nil, err
	}
	volumes, err := a.s.controller.Volumes(ctx)
	if err != nil {
		return nil, err
	}
	volumes = slices.DeleteFunc(slices.Clone(volumes), func(v meta.Volume) bool { return !matches(v.Labels) })
	resp := &api.ListVolumesResponse{}
	for _, v := range volumes {
		resp.Volumes = append(resp.Volumes, a.volume(ctx, v, false))
	}
	if r.GetUsage() {
		a.addUsages(ctx, volumes, resp.Volumes)
	}
	return resp, nil
}

// GetVolume implements api.AdminServer.
func (a *admin) GetVolume(ctx context.Context, r *api.VolumeRequest) (*api.Volume, error) {
	v, err := a.find(ctx, r.GetName())
	if err != nil {
		return nil, err
	}
	out := a.volume(ctx, v, true)
	out.Usage = usageOf(a.usage(ctx, &v, 0))
	return out, nil
}

// DeleteVolume implements api.AdminServer. An operator's delete removes the data whatever the
// reclaim policy says, which is for claims.
func (a *admin) DeleteVolume(ctx context.Context, r *api.VolumeRequest) (*api.DeleteVolumeResponse, error) {
	v, err := a.find(ctx, r.GetName())
	if errors.Is(err, trivet.ErrNotFound) {
		return &api.DeleteVolumeResponse{}, nil
	}
	if err != nil {
		return nil, err
	}
	discard := a.s.controller.Discard
	if r.GetSkipWipe() {
		discard = a.s.controller.DiscardUnwiped
	}
	if err := discard(ctx, v.ID); err != nil {
		return nil, err
	}
	return &api.DeleteVolumeResponse{}, nil
}

// ReleaseVolume implements api.AdminServer.
func (a *admin) ReleaseVolume(ctx context.Context, r *api.VolumeRequest) (*api.Volume, error) {
	v, err := a.find(ctx, r.GetName())
	if err != nil {
		return nil, err
	}
	if err := a.s.controller.Release(ctx, v.ID); err != nil {
		return nil, err
	}
	return a.showOrGone(ctx, v)
}

// ReclaimVolume implements api.AdminServer.
func (a *admin) ReclaimVolume(ctx context.Context, r *api.ReclaimVolumeRequest) (*api.Volume, error) {
	v, err := a.find(ctx, r.GetName())
	if err != nil {
		return nil, err
	}
	if err := a.s.controller.Reclaim(ctx, v.ID, meta.ReclaimPolicy(r.GetPolicy())); err != nil {
		return nil, err
	}
	return a.showOrGone(ctx, v)
}

// showOrGone shows a volume that the call may have removed: then as it last was, being deleted.
func (a *admin) showOrGone(ctx context.Context, v meta.Volume) (*api.Volume, error) {
	out, err := a.show(ctx, v.ID)
	if errors.Is(err, trivet.ErrNotFound) {
		v.Phase = meta.PhaseDeleting
		return a.volume(ctx, v, false), nil
	}
	return out, err
}

// MoveLeader implements api.AdminServer.
func (a *admin) MoveLeader(ctx context.Context, r *api.MoveLeaderRequest) (*api.Volume, error) {
	v, err := a.find(ctx, r.GetName())
	if err != nil {
		return nil, err
	}
	if err := a.s.controller.MoveLeader(ctx, v.ID, trivet.NodeID(r.GetNode())); err != nil {
		return nil, err
	}
	return a.show(ctx, v.ID)
}

// AttachVolume implements api.AdminServer.
func (a *admin) AttachVolume(ctx context.Context, r *api.VolumeRequest) (*api.AttachVolumeResponse, error) {
	attach, err := a.attachFor(r)
	if err != nil {
		return nil, err
	}
	v, err := attach(ctx, r.GetName())
	if err != nil {
		return nil, err
	}
	n, err := a.s.node()
	if err != nil {
		return nil, err
	}
	device, err := n.Attach(ctx, v.ID)
	if err != nil {
		return nil, err
	}
	out, err := a.show(ctx, v.ID)
	if err != nil {
		return nil, err
	}
	return &api.AttachVolumeResponse{Volume: out, Device: device}, nil
}

// attach grants the volume to this node.
func (a *admin) attach(ctx context.Context, name string) (meta.Volume, error) {
	v, err := a.find(ctx, name)
	if err != nil {
		return meta.Volume{}, err
	}
	return a.s.controller.Attach(ctx, v.ID, a.s.cfg.Node, meta.SingleNodeMultiWriter, false)
}

// attachReader attaches a volume to this node as one of any number of readers.
func (a *admin) attachReader(ctx context.Context, name string) (meta.Volume, error) {
	v, err := a.find(ctx, name)
	if err != nil {
		return meta.Volume{}, err
	}
	return a.s.controller.Attach(ctx, v.ID, a.s.cfg.Node, meta.MultiNodeReader, true)
}

// DetachVolume implements api.AdminServer.
func (a *admin) DetachVolume(ctx context.Context, r *api.DetachVolumeRequest) (*api.Volume, error) {
	v, err := a.find(ctx, r.GetName())
	if err != nil {
		return nil, err
	}
	holder := a.s.cfg.Node
	if v.Attached != nil && v.GrantOf(holder) == nil {
		if !r.GetForce() {
			return nil, fmt.Errorf("detach %q: node %s holds it; detach it there, or use --force if that node is dead: %w",
				v.Name, v.Attached.Node, trivet.ErrInUse)
		}
		holder = v.Attached.Node
	}
	if holder == a.s.cfg.Node {
		n, err := a.s.node()
		if err != nil {
			return nil, err
		}
		if err := n.Detach(ctx, v.ID); err != nil {
			return nil, err
		}
	}
	detach := a.s.controller.Detach
	if r.GetForce() && holder != a.s.cfg.Node {
		detach = a.s.controller.ForceDetach
	}
	if err := detach(ctx, v.ID, holder); err != nil {
		return nil, err
	}
	return a.show(ctx, v.ID)
}
