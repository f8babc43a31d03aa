package controller

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller/meta"
)

// SetReplicas says how many replicas a volume should have: 1, 3 or 5. It returns at once; the cluster's
// mender adds or removes them one by one. ErrInvalid for another number; ErrNotFound.
func (c *Controller) SetReplicas(ctx context.Context, id trivet.VolumeID, n int) (meta.Volume, error) {
	res, err := c.store.Propose(ctx, meta.Command{SetReplicas: &meta.SetReplicas{Volume: id, Count: n}})
	if err != nil {
		return meta.Volume{}, err
	}
	return *res.Volume, nil
}

// MoveReplica has a replica of a volume made on node to, on its emptiest disk, in place of the one on node
// from, which goes once the new one has everything and votes. It returns once that is decided. The same
// again while it is under way: nil.
//
// ErrNotFound: no such volume or node, or no replica on from. ErrExists: to has one already. ErrInvalid: to
// is down or cordoned, or the volume is not in a state to be changed. ErrNoSpace: no disk of to has room.
// ErrPending: another replica of the volume is on its way in or out. ErrUnavailable: no majority of its
// replicas is ready, so that nothing can be changed.
func (c *Controller) MoveReplica(ctx context.Context, id trivet.VolumeID, from, to trivet.NodeID) (meta.Volume, error) {
	what := fmt.Sprintf("move replica of %s from %s to %s", id, from, to)
	for {
		s, err := c.store.Read(ctx)
		if err != nil {
			return meta.Volume{}, fmt.Errorf("%s: %w", what, err)
		}
		v, err := lookUp(s, id)
		if err != nil {
			return meta.Volume{}, fmt.Errorf("%s: %w", what, err)
		}
		add, err := moveOf(s, &v, from, to, time.Now())
		if err != nil {
			return meta.Volume{}, fmt.Errorf("%s: %w", what, err)
		}
		if add == nil {
			return v, nil // under way
		}
		res, err := c.store.Propose(ctx, meta.Command{AddReplica: add})
		if errors.Is(err, trivet.ErrPending) && v.Change() == nil {
			continue // it has changed since it was read
		}
		if err != nil {
			return meta.Volume{}, err
		}
		return *res.Volume, nil
	}
}

// moveOf returns the command that moves a replica, or nil when that is under way. It is pure but for the
// new replica's ID.
func moveOf(s *meta.State, v *meta.Volume, from, to trivet.NodeID, now time.Time) (*meta.AddReplica, error) {
	target, ok := s.Node(to)
	if _, known := s.Node(from); !known || !ok {
		unknown := from
		if known {
			unknown = to
		}
		return nil, fmt.Errorf("node %q is unknown: %w", unknown, trivet.ErrNotFound)
	}
	there, here := v.ReplicaOn(from), v.ReplicaOn(to)
	switch {
	case there == nil:
		return nil, fmt.Errorf("no replica on %s: %w", from, trivet.ErrNotFound)
	case here != nil && here.State.Changing() && here.Replaces == there.ID:
		return nil, nil //nolint:nilnil // documented
	case here != nil:
		return nil, fmt.Errorf("%s has a replica already, which is %s: %w", to, here.State, trivet.ErrExists)
	case !target.Alive(now):
		return nil, fmt.Errorf("node %s is down: %w", to, trivet.ErrInvalid)
	case target.Cordoned:
		return nil, fmt.Errorf("node %s is cordoned: %w", to, trivet.ErrInvalid)
	}
	if r := v.Change(); r != nil {
		return nil, fmt.Errorf("replica on %s is %s: %w", r.Node, r.State, trivet.ErrPending)
	}
	if v.Phase == meta.PhaseCreating {
		return nil, fmt.Errorf("volume is %s: %w", v.Phase, trivet.ErrPending)
	}
	if err := copying(s, v); err != nil {
		return nil, err
	}
	m := newMendPass(s, newHistory(time.Time{}), defaultMendSettings(DefaultReplaceAfter), now)
	if !m.majority(v) {
		return nil, fmt.Errorf("no majority of its replicas is ready on living nodes: %w", trivet.ErrUnavailable)
	}
	where, err := Place([]meta.Node{target}, PlaceRequest{
		SizeBytes: v.SizeBytes, Replicas: 1, Load: LoadOf(s.Volumes()),
	}, now)
	if err != nil {
		return nil, err
	}
	return &meta.AddReplica{Volume: v.ID, IfRevision: v.Revision, Replica: meta.Replica{
		ID: m.set.newID(), Node: to, Disk: where[0].Disk, Replaces: there.ID,
	}}, nil
}

// CordonNode says whether a node may get new replicas, and whether those it has should move elsewhere
// (draining, which implies cordoned). It returns at once. ErrNotFound.
func (c *Controller) CordonNode(ctx context.Context, node trivet.NodeID, cordoned, draining bool) (meta.Node, error) {
	cmd := &meta.CordonNode{Node: node, Cordoned: cordoned || draining, Draining: draining}
	res, err := c.store.Propose(ctx, meta.Command{CordonNode: cmd})
	if err != nil {
		return meta.Node{}, err
	}
	if res.Node == nil {
		return meta.Node{}, fmt.Errorf("catalogue returned no node: %w", trivet.ErrUnavailable)
	}
	return *res.Node, nil
}

// ForgetNode takes a node that does not come back off the record, or with allow lets its name register again, as a
// new node. It returns the nodes that are forgotten then. ErrInUse: its lease has not run out, a volume is attached
// to it, or has a replica there. ErrNotFound.
func (c *Controller) ForgetNode(ctx context.Context, node trivet.NodeID, allow bool) ([]trivet.NodeID, error) {
	forget := &meta.ForgetNode{Node: node, Time: time.Now(), Allow: allow}
	if _, err := c.store.Propose(ctx, meta.Command{ForgetNode: forget}); err != nil {
		return nil, err
	}
	s, err := c.store.Read(ctx)
	if err != nil {
		return nil, err
	}
	return s.AllForgotten(), nil
}

// Remaining is what a node still has to do with a volume.
type Remaining struct {
	Volume   trivet.VolumeID
	Name     string
	Replica  trivet.ReplicaID  // "" = it has none, and the volume is only attached there
	State    meta.ReplicaState // of the replica
	Leads    bool              // as last reported
	Attached bool              // the node holds the attachment: for its user to end, nothing moves it
	Why      string            // what the replica waits for, if anything
}

// Remaining returns what a node has to do with volumes, sorted by volume, and why it is there still.
// ErrNotFound for an unknown node.
func (c *Controller) Remaining(ctx context.Context, node trivet.NodeID) ([]Remaining, error) {
	s, err := c.store.Read(ctx)
	if err != nil {
		return nil, err
	}
	if _, ok := s.Node(node); !ok {
		return nil, fmt.Errorf("node %q: %w", node, trivet.ErrNotFound)
	}
	reason := PendingOf(s, time.Now())
	var out []Remaining
	for _, v := range s.Volumes() {
		attached := v.Holds(node)
		for _, r := range v.Replicas {
			if r.Node != node || r.State == meta.ReplicaRemoved {
				continue
			}
			out = append(out, Remaining{
				Volume: v.ID, Name: v.Name, Replica: r.ID, State: r.State, Leads: r.ID == v.Leader && v.Holder() != "",
				Attached: attached, Why: reason(&v),
			})
			attached = false
		}
		if attached {
			out = append(out, Remaining{Volume: v.ID, Name: v.Name, Attached: true})
		}
	}
	return out, nil
}

// PendingOf returns a function that says in a few words which change of its replicas a volume of s waits
// for, or why it does not get it; "" when it needs none that anybody knows of. (How long a node or a disk is
// away, the mender alone knows.)
func PendingOf(s *meta.State, now time.Time) func(v *meta.Volume) string {
	plan := mend(s, newHistory(time.Time{}), defaultMendSettings(DefaultReplaceAfter), now)
	soon := map[trivet.VolumeID]bool{}
	for _, c := range plan.commands {
		switch {
		case c.AddReplica != nil:
			soon[c.AddReplica.Volume] = true
		case c.RemoveReplica != nil:
			soon[c.RemoveReplica.Volume] = true
		}
	}
	return func(v *meta.Volume) string {
		if r := v.Change(); r != nil {
			return changeText(v, r)
		}
		switch why, blocked := plan.blocked[v.ID]; {
		case blocked:
			return why
		case soon[v.ID]:
			return "about to change"
		}
		return ""
	}
}

func changeText(v *meta.Volume, r *meta.Replica) string {
	text := map[meta.ReplicaState]string{
		meta.ReplicaJoining: "a replica is being made on " + string(r.Node),
		meta.ReplicaFilling: "the replica on " + string(r.Node) + " is being filled",
		meta.ReplicaLeaving: "the replica on " + string(r.Node) + " is leaving",
	}[r.State]
	if old := v.Replica(r.Replaces); old != nil && old.Node != r.Node {
		text += ", in place of the one on " + string(old.Node)
	}
	return text
}
