package meta

import (
	"fmt"
	"slices"

	"github.com/trivet-csi/trivet"
)

// forgottenMax bounds the names that may not register again.
const forgottenMax = 256

func (f *ForgetNode) op() string {
	if f.Allow {
		return fmt.Sprintf("allow node %s to register again", f.Node)
	}
	return fmt.Sprintf("forget node %s", f.Node)
}

func (f *ForgetNode) validate() error {
	return firstError(trivet.ValidateNodeID(string(f.Node)), validateTime("time", f.Time))
}

func (f *ForgetNode) apply(d *draft) error {
	at, forgotten := slices.BinarySearch(d.forgotten, f.Node)
	if f.Allow {
		if forgotten {
			d.forgotten = slices.Delete(slices.Clone(d.forgotten), at, at+1)
			d.changed = true
		}
		return nil
	}
	if forgotten {
		return nil
	}
	n, ok := d.Node(f.Node)
	switch {
	case !ok:
		return fmt.Errorf("node is unknown: %w", trivet.ErrNotFound)
	case n.Alive(f.Time):
		return fmt.Errorf("node is up: its lease runs until %s: %w", n.LeaseUntil.Format("15:04:05.000 MST"), trivet.ErrInUse)
	case len(d.forgotten) >= forgottenMax:
		return fmt.Errorf("%d nodes are forgotten, allow some of them first: %w", len(d.forgotten), trivet.ErrInvalid)
	}
	if err := d.needs(f.Node); err != nil {
		return err
	}
	d.forgotten = slices.Insert(slices.Clone(d.forgotten), at, f.Node)
	d.removeNode(f.Node)
	return firstError(d.record(AuditNodeForgotten, nil, f.Node, ""), d.strike(f.Node))
}

// needs returns ErrInUse when a volume needs a node: it is attached or being detached there, or has a replica
// there that is not retired, in whichever state it is. Of a volume that is being deleted nothing is needed.
func (d *draft) needs(node trivet.NodeID) error {
	for _, v := range d.Volumes() {
		if v.Holds(node) {
			return fmt.Errorf("volume %q is attached to it: %w", v.Name, trivet.ErrInUse)
		}
		for _, r := range v.Replicas {
			if r.Node == node && v.Phase != PhaseDeleting {
				return fmt.Errorf("volume %q has a replica on it, which is %s: %w", v.Name, r.State, trivet.ErrInUse)
			}
		}
	}
	return nil
}

// strike takes what waits for a node that is gone off the record: its retired replicas, and those of volumes that are
// being deleted. REQUIRES: the node is removed.
func (d *draft) strike(node trivet.NodeID) error {
	for _, v := range d.Volumes() {
		kept := slices.DeleteFunc(slices.Clone(v.Retired), func(r Replica) bool { return r.Node == node })
		changed := len(kept) != len(v.Retired)
		if v.Retired = kept; len(kept) == 0 {
			v.Retired = nil // as an image has it
		}
		for i := range v.Replicas { // of volumes that are being deleted, or needs would have refused
			if r := &v.Replicas[i]; r.Node == node && r.State != ReplicaRemoved {
				r.State, r.Reason, changed = ReplicaRemoved, "", true
			}
		}
		if changed {
			if err := d.putOrForget(&v); err != nil {
				return err
			}
		}
	}
	return nil
}

// removeNode takes a node off the record.
func (d *draft) removeNode(id trivet.NodeID) {
	nodes := make(map[trivet.NodeID]*Node, len(d.nodes))
	for other, n := range d.nodes {
		if other != id {
			nodes[other] = n
		}
	}
	d.nodes, d.nodeID, d.changed = nodes, id, true
}
