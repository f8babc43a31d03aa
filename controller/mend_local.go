package controller

import (
	"cmp"
	"fmt"
	"slices"
	"time"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller/meta"
)

// followAfter is how long a node has had a volume attached before a replica follows it there: filling one costs more
// than the crossings of the network that a short-lived pod saves.
const followAfter = time.Minute

// heldSince says which node has a volume attached, and since when the mender sees that.
type heldSince struct {
	node  trivet.NodeID
	since time.Time
}

// observeHolder notes who has v attached, when a replica is to follow. REQUIRES: into is a new map.
func (h *history) observeHolder(v *meta.Volume, into map[trivet.VolumeID]heldSince, now time.Time) {
	node := localTo(v)
	if node == "" {
		return
	}
	into[v.ID] = heldSince{node, now}
	if seen, ok := h.held[v.ID]; ok && seen.node == node {
		into[v.ID] = seen
	}
}

// localTo returns the node to which a replica of v, and its leadership, should follow, "" when there is none: the only
// one that has it attached, where v says dataLocality: preferred.
func localTo(v *meta.Volume) trivet.NodeID {
	if v.Params[ParamDataLocality] != LocalityPreferred || v.Attached == nil || len(v.Also) > 0 || v.Detaching != "" {
		return ""
	}
	return v.Attached.Node
}

// isStray reports whether v lacks nothing but a replica on the node that has it attached, which could get one. What
// heals a volume goes first, and a replica is never given up for one that is nearer while another is missing.
func (m *mendPass) isStray(v *meta.Volume) bool {
	node := localTo(v)
	if node == "" || v.ReplicaOn(node) != nil || !m.alive(node) || m.cordoned(node) {
		return false
	}
	held, ok := m.h.held[v.ID]
	if !ok || held.node != node || m.now.Sub(held.since) < followAfter {
		return false
	}
	return !slices.ContainsFunc(v.Replicas, func(r meta.Replica) bool { return !m.well(&r) })
}

// follow places a replica on the node that has v attached, in place of one whose loss keeps the replicas spread: one
// of the same zone if there is one, else the one that leastUse would remove.
func (m *mendPass) follow(v *meta.Volume) (meta.Command, error) {
	node := m.byID[localTo(v)]
	if err := copying(m.s, v); err != nil {
		return meta.Command{}, err
	}
	first := m.leastUse(v)
	rank := func(r *meta.Replica) int {
		switch n := m.byID[r.Node]; {
		case n != nil && n.Zone == node.Zone:
			return 0
		case r.ID == first.ID:
			return 1
		}
		return 2
	}
	old := make([]*meta.Replica, len(v.Replicas))
	for i := range v.Replicas {
		old[i] = &v.Replicas[i]
	}
	slices.SortStableFunc(old, func(a, b *meta.Replica) int { return cmp.Compare(rank(a), rank(b)) })
	var why error
	for _, r := range old {
		where, err := m.placeAmong([]meta.Node{*node}, v, m.placeRequest(v, r))
		if err == nil {
			return m.addAt(v, r, where)
		}
		why = err
	}
	return meta.Command{}, fmt.Errorf("a replica beside its pod: %w", why)
}

// leadLocally asks for the leadership of v at the replica on the node that has it attached, when that came after the
// attachment; one that was there before was asked for by the node itself (node.attacher).
func (m *mendPass) leadLocally(v *meta.Volume) (meta.Command, bool) {
	node := localTo(v)
	if node == "" || v.Phase != meta.PhaseBound || m.cordoned(node) || v.Leader == "" {
		return meta.Command{}, false
	}
	r := v.ReplicaOn(node)
	if r == nil || !m.well(r) || v.Leader == r.ID || v.WantLeader != "" {
		return meta.Command{}, false
	}
	return meta.Command{WantLeader: &meta.WantLeader{Volume: v.ID, Replica: r.ID}}, true
}
