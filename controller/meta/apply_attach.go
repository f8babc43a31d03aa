package meta

import (
	"fmt"

	"github.com/trivet-csi/trivet"
)

// Fencing (H12). A command reserves an epoch here; the agent of the volume's leader commits it as a
// fence in the volume's own group and reports that. Between the two nobody may do I/O: the old
// holder may be refused at any moment, the new one is not let in yet.
//
//	Attached=n1@3 Epoch=3 Fenced=3     n1 may write
//	  Detach  ──► Detaching=n1 Epoch=4 Fenced=3     n1 may still write; n2 is refused: in use
//	  ReportFence 4 ──► Epoch=4 Fenced=4            nobody can write
//	  Attach n2 ──► Attached=n2@5 Epoch=5 Fenced=4  n2 waits
//	  ReportFence 5 ──► Epoch=5 Fenced=5            n2 may write
//
// Invariant: FencedEpoch <= Epoch. Attached: Attached.Epoch == Epoch and Detaching is empty.
// Detaching: FencedEpoch < Epoch.

func (a *Attach) op() string { return fmt.Sprintf("attach %s to %s", a.Volume, a.Node) }

func (a *Attach) apply(d *draft) error {
	node, ok := d.nodes[a.Node]
	if !ok {
		return fmt.Errorf("node is unknown: %w", trivet.ErrNotFound)
	}
	v, err := d.edit(a.Volume)
	if err != nil {
		return err
	}
	want := Attachment{
		Node:        a.Node,
		Mode:        a.Mode,
		ReadOnly:    a.ReadOnly || a.Mode == SingleNodeReader,
		Incarnation: node.Incarnation,
	}
	if held := v.Attached; held != nil {
		switch {
		case held.Node != a.Node:
			return fmt.Errorf("held by node %s: %w", held.Node, trivet.ErrInUse)
		case held.Mode != want.Mode || held.ReadOnly != want.ReadOnly:
			return fmt.Errorf("attached there as %s, read-only %t: %w", held.Mode, held.ReadOnly, trivet.ErrExists)
		}
		return nil
	}
	switch v.Phase {
	case PhaseAvailable, PhaseBound:
	case PhaseCreating:
		return fmt.Errorf("volume is %s: %w", v.Phase, trivet.ErrPending)
	case PhaseReleased, PhaseRecycling, PhaseDeleting, PhaseFailed:
		return fmt.Errorf("volume is %s: %w", v.Phase, trivet.ErrInvalid)
	}
	switch v.Detaching {
	case "":
	case a.Node:
		return fmt.Errorf("earlier attachment is still being detached: %w", trivet.ErrPending)
	default:
		return fmt.Errorf("still being detached from node %s: %w", v.Detaching, trivet.ErrInUse)
	}
	if a.Epoch != 0 && a.Epoch != v.Epoch+1 {
		return fmt.Errorf("next epoch is %d, not %d: %w", v.Epoch+1, a.Epoch, trivet.ErrPending)
	}
	v.Epoch++
	want.Epoch = v.Epoch
	v.Attached, v.Phase, v.Claimed = &want, PhaseBound, true
	d.put(v)
	return nil
}

func (t *TakeOver) op() string { return fmt.Sprintf("take over %s on %s", t.Volume, t.Node) }

func (t *TakeOver) apply(d *draft) error {
	v, err := d.edit(t.Volume)
	if err != nil {
		return err
	}
	if v.Attached == nil || v.Attached.Node != t.Node {
		return fmt.Errorf("held by %q at epoch %d: %w", v.Holder(), v.Epoch, trivet.ErrFenced)
	}
	node := d.nodes[t.Node] // there: nodes are never forgotten
	if t.Incarnation != "" && t.Incarnation != node.Incarnation {
		return fmt.Errorf("incarnation %s does not run as this node: %w", t.Incarnation, trivet.ErrFenced)
	}
	if t.Incarnation != "" && t.Incarnation == v.Attached.Incarnation {
		return nil
	}
	v.Epoch++
	v.Attached.Epoch, v.Attached.Incarnation = v.Epoch, node.Incarnation
	d.put(v)
	return nil
}

func (t *Detach) op() string {
	if t.Node == "" {
		return fmt.Sprintf("detach %s from any node", t.Volume)
	}
	return fmt.Sprintf("detach %s from %s", t.Volume, t.Node)
}

func (t *Detach) apply(d *draft) error {
	v, err := d.edit(t.Volume)
	if err != nil {
		return nil //nolint:nilerr // nothing is attached to the unknown
	}
	held := v.Attached
	if held == nil || t.Node != "" && held.Node != t.Node || t.Epoch != 0 && held.Epoch != t.Epoch {
		return nil
	}
	v.Epoch++
	v.Attached, v.Detaching = nil, held.Node
	if r := v.ReplicaOn(held.Node); r != nil && r.ID == v.WantLeader {
		v.WantLeader = "" // leadership was to follow the attachment; that node may be dead by now
	}
	d.put(v)
	return nil
}

func (r *ReportFence) op() string {
	return fmt.Sprintf("report fence of %s at epoch %d", r.Volume, r.Epoch)
}

func (r *ReportFence) apply(d *draft) error {
	v, err := d.edit(r.Volume)
	if err != nil {
		return nil //nolint:nilerr // a late copy: the volume is gone
	}
	if r.Epoch > v.Epoch {
		return fmt.Errorf("epoch %d was never reserved, the highest is %d: %w", r.Epoch, v.Epoch, trivet.ErrInvalid)
	}
	if r.Epoch <= v.FencedEpoch {
		return nil
	}
	v.FencedEpoch = r.Epoch
	if v.FencedEpoch == v.Epoch {
		v.Detaching = ""
	}
	d.put(v)
	return nil
}

func (r *ReportLeader) op() string { return fmt.Sprintf("report leader %s of %s", r.Replica, r.Volume) }

func (r *ReportLeader) apply(d *draft) error {
	v, err := d.edit(r.Volume)
	if err != nil {
		return err
	}
	if v.Replica(r.Replica) == nil {
		return fmt.Errorf("volume has no such replica: %w", trivet.ErrNotFound)
	}
	if r.Term != 0 && r.Term < v.LeaderTerm {
		return nil // late
	}
	if v.Leader == r.Replica && v.LeaderTerm == max(r.Term, v.LeaderTerm) && v.WantLeader != r.Replica {
		return nil
	}
	v.Leader, v.LeaderTerm = r.Replica, max(r.Term, v.LeaderTerm)
	if v.WantLeader == r.Replica {
		v.WantLeader = ""
	}
	d.put(v)
	return nil
}

func (w *WantLeader) op() string { return fmt.Sprintf("want leader %s of %s", w.Replica, w.Volume) }

func (w *WantLeader) apply(d *draft) error {
	v, err := d.edit(w.Volume)
	if err != nil {
		return err
	}
	rep := v.Replica(w.Replica)
	switch {
	case rep == nil:
		return fmt.Errorf("volume has no such replica: %w", trivet.ErrNotFound)
	case rep.State.Changing():
		return fmt.Errorf("replica is %s: %w", rep.State, trivet.ErrInvalid)
	}
	if v.WantLeader == w.Replica || v.WantLeader == "" && v.Leader == w.Replica {
		return nil
	}
	v.WantLeader = w.Replica
	if v.Leader == w.Replica {
		v.WantLeader = "" // withdraws the wish for another one
	}
	d.put(v)
	return nil
}
