package controller

import (
	"fmt"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller/meta"
)

// authorize returns ErrInvalid unless the node, as its certificate says, may send the command (S4).
// A node speaks for itself: its registration, its lease, its replicas, its take-overs. What is said
// of a volume's group (fence, wipe, size, leader, who votes or has left) must come from a node with a replica in
// it. What users want may come from every node of the cluster: its server has authenticated the user.
//
// A node that is not registered yet may be registered by another one, which lets it in.
func authorize(s *meta.State, from trivet.NodeID, c meta.Command) error {
	if c.By != "" && c.By != from { // or an audit record would name another node
		return fmt.Errorf("%s: by node %s, sent by %s: %w", c.Op(), c.By, from, trivet.ErrInvalid)
	}
	ok := false
	_, registered := s.Node(from)
	switch {
	case c.InitCluster != nil, c.RecoverCatalogue != nil: // only on the member itself, which leads then
	case c.RegisterNode != nil:
		_, known := s.Node(c.RegisterNode.Node.ID)
		ok = c.RegisterNode.Node.ID == from || registered && !known
	case c.RenewLease != nil:
		ok = c.RenewLease.Node == from
	case c.TakeOver != nil:
		ok = c.TakeOver.Node == from
	case c.ReportReplica != nil:
		r := c.ReportReplica
		ok = owns(s, r.Volume, r.Replica, from) || byLeader(s, r, from)
	case c.ReportLeader != nil:
		ok = owns(s, c.ReportLeader.Volume, c.ReportLeader.Replica, from)
	case c.ReportFence != nil:
		ok = hosts(s, c.ReportFence.Volume, from)
	case c.ReportWiped != nil:
		ok = hosts(s, c.ReportWiped.Volume, from)
	case c.ReportSnapshot != nil:
		ok = maySnapshot(s, c.ReportSnapshot.Snapshot, from)
	case c.ReportFlattened != nil:
		ok = owns(s, c.ReportFlattened.Volume, c.ReportFlattened.Replica, from)
	case c.ReportRolledBack != nil:
		ok = hosts(s, c.ReportRolledBack.Volume, from)
	case c.ReportRecovered != nil:
		ok = owns(s, c.ReportRecovered.Volume, c.ReportRecovered.Replica, from)
	case c.ReportSize != nil:
		ok = hosts(s, c.ReportSize.Volume, from)
	case c.BeginSnapshotGroup != nil:
		ok = registered && c.BeginSnapshotGroup.Node == from
	case c.ReportSnapshotGroup != nil:
		ok = registered && c.ReportSnapshotGroup.Node == from
	default:
		ok = registered
	}
	if !ok {
		return fmt.Errorf("%s: not for node %s to say: %w", c.Op(), from, trivet.ErrInvalid)
	}
	return nil
}

// owns reports whether the replica, which may be retired, is on the node, or there is no such volume or
// replica: then the state machine has the say.
func owns(s *meta.State, volume trivet.VolumeID, replica trivet.ReplicaID, node trivet.NodeID) bool {
	v, ok := s.Volume(volume)
	if !ok {
		return true
	}
	if r := v.Replica(replica); r != nil {
		return r.Node == node
	}
	for _, r := range v.Retired {
		if r.ID == replica {
			return r.Node == node
		}
	}
	return true
}

// byLeader reports whether c is what the node whose replica leads says of another node's: that a Filling one
// votes by now, or differs from the leader, or that a Leaving one is no member any more.
func byLeader(s *meta.State, c *meta.ReportReplica, node trivet.NodeID) bool {
	v, ok := s.Volume(c.Volume)
	if !ok || v.ReplicaOn(node) == nil {
		return false
	}
	r := v.Replica(c.Replica)
	// Ready: it is said again.
	promoted := r != nil && (r.State == meta.ReplicaFilling || r.State == meta.ReplicaReady)
	differs := r != nil && r.State == meta.ReplicaFilling && c.State == meta.ReplicaFaulted && c.Reason != ""
	return differs || c.State == meta.ReplicaLeft || c.State == meta.ReplicaReady && promoted && c.Reason == ""
}

// hosts reports whether the node has a replica of the volume, or there is no such volume.
func hosts(s *meta.State, volume trivet.VolumeID, node trivet.NodeID) bool {
	v, ok := s.Volume(volume)
	return !ok || v.ReplicaOn(node) != nil
}

// maySnapshot reports whether the node has a replica of the snapshot's volume or holds it, or there is no such
// snapshot.
func maySnapshot(s *meta.State, id trivet.SnapshotID, node trivet.NodeID) bool {
	snap, ok := s.Snapshot(id)
	if !ok {
		return true
	}
	v, ok := s.Volume(snap.Volume)
	return !ok || v.ReplicaOn(node) != nil || v.GrantOf(node) != nil
}
