package meta

import (
	"fmt"
	"slices"
	"strings"
	"time"

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
//
// Two writers share one, too (apply_writers.go).
//
// Readers share an epoch (decision 0020). The first one reserves it, so every writer before is fenced;
// others join and leave at it, and the last one's detach reserves the next, as a writer's does. An epoch
// numbers the writes of one writer (H39); of readers there are none.
//
//	Attached=n1@3 Epoch=3            n1 reads
//	  Attach n2 ──► Attached=n1@3 Also=n2@3 Epoch=3         both read, once 3 is fenced
//	  Detach n1 ──► Attached=n2@3 Epoch=3
//	  Detach n2 ──► Detaching=n2 Epoch=4

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
		ReadOnly:    a.ReadOnly || a.Mode.Reads(),
		Incarnation: node.Incarnation,
		With:        a.With,
	}
	if a.With != "" && d.nodes[a.With] == nil {
		return fmt.Errorf("node %s is unknown: %w", a.With, trivet.ErrNotFound)
	}
	if err := v.admits(&want); err != nil || v.GrantOf(a.Node) != nil {
		return err
	}
	switch v.Phase {
	case PhaseAvailable, PhaseBound:
	case PhaseCreating, PhaseRestoring:
		return fmt.Errorf("volume is %s: %w", v.Phase, trivet.ErrPending)
	case PhaseReleased, PhaseRecycling, PhaseDeleting, PhaseFailed, PhaseKept:
		return fmt.Errorf("volume is %s: %w", v.Phase, trivet.ErrInvalid)
	}
	for _, old := range []trivet.NodeID{v.Detaching, v.Leaving} {
		switch old {
		case "":
		case a.Node:
			return fmt.Errorf("earlier attachment is still being detached: %w", trivet.ErrPending)
		default:
			return fmt.Errorf("still being detached from node %s: %w", old, trivet.ErrInUse)
		}
	}
	if a.Epoch != 0 && a.Epoch != v.Epoch+1 {
		return fmt.Errorf("next epoch is %d, not %d: %w", v.Epoch+1, a.Epoch, trivet.ErrPending)
	}
	if err := v.unmoved(a.IfRevision); err != nil {
		return err
	}
	if v.Attached != nil && a.Mode == MultiNodeMultiWriter {
		v.joinWriter(want)
		d.put(v)
		return nil
	}
	if v.Attached != nil { // it reads beside others
		want.Epoch = v.Epoch
		v.Also = append(v.Also, want)
		d.put(v)
		return nil
	}
	v.Epoch++
	want.Epoch = v.Epoch
	v.Attached, v.Phase, v.Claimed = &want, PhaseBound, true
	d.put(v)
	return nil
}

// admits says why want cannot be granted beside the attachments there are, if it cannot: the rule of the
// access modes. Nil when it can, or is granted already.
func (v *Volume) admits(want *Attachment) error {
	if held := v.GrantOf(want.Node); held != nil {
		if held.Mode != want.Mode || held.ReadOnly != want.ReadOnly {
			return fmt.Errorf("attached there as %s, read-only %t: %w", held.Mode, held.ReadOnly, trivet.ErrExists)
		}
		if want.With != "" && want.With != held.With {
			return fmt.Errorf("attached there to write beside %q, not %q: %w", held.With, want.With, trivet.ErrExists)
		}
		return nil
	}
	switch {
	case v.Attached == nil:
		return nil
	case v.Attached.Mode == MultiNodeMultiWriter && want.Mode == MultiNodeMultiWriter:
		return v.admitsWriter(want)
	case v.Attached.Mode != MultiNodeReader || want.Mode != MultiNodeReader:
		return fmt.Errorf("held by %s: %w", v.holderText(), trivet.ErrInUse)
	case len(v.Also) >= readersMax-1:
		return fmt.Errorf("%d nodes read it, the most there may be: %w", readersMax, trivet.ErrNoSpace)
	}
	return nil
}

// holderText names the nodes that hold v, for an error.
func (v *Volume) holderText() string {
	if len(v.Holders()) == 1 {
		return "node " + v.holderNames()
	}
	return "nodes " + v.holderNames()
}

func (v *Volume) holderNames() string {
	var names []string
	for _, n := range v.Holders() {
		names = append(names, string(n))
	}
	return strings.Join(names, ", ")
}

func (t *TakeOver) op() string { return fmt.Sprintf("take over %s on %s", t.Volume, t.Node) }

func (t *TakeOver) apply(d *draft) error {
	v, err := d.edit(t.Volume)
	if err != nil {
		return err
	}
	held := v.GrantOf(t.Node)
	if held == nil {
		return fmt.Errorf("held by %q at epoch %d: %w", v.holderNames(), v.Epoch, trivet.ErrFenced)
	}
	node := d.nodes[t.Node] // there: nodes are never forgotten
	if t.Incarnation != "" && t.Incarnation != node.Incarnation {
		return fmt.Errorf("incarnation %s does not run as this node: %w", t.Incarnation, trivet.ErrFenced)
	}
	if t.Incarnation != "" && t.Incarnation == held.Incarnation {
		return nil
	}
	switch {
	case held.Mode == MultiNodeMultiWriter:
		v.renewWriter(held)
	case held.Mode != MultiNodeReader:
		v.Epoch++
		held.Epoch = v.Epoch
	case held.Incarnation == node.Incarnation:
		return nil
	}
	held.Incarnation = node.Incarnation
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
	if t.Node != "" {
		held = v.GrantOf(t.Node)
	}
	if held == nil || t.Epoch != 0 && held.Epoch != t.Epoch {
		return nil
	}
	if err := v.unmoved(t.IfRevision); err != nil {
		return err
	}
	node := held.Node
	if n, ok := d.nodes[node]; !t.IfLease.IsZero() && ok && !n.LeaseUntil.Equal(t.IfLease) {
		return fmt.Errorf("node has renewed its lease, until %s: %w", n.LeaseUntil.Format(time.RFC3339), trivet.ErrPending)
	}
	if r := v.ReplicaOn(node); r != nil && r.ID == v.WantLeader {
		v.WantLeader = "" // leadership was to follow the attachment; that node may be dead by now
	}
	switch {
	case t.Node != "" && len(v.Also) > 0 && held.Mode == MultiNodeMultiWriter:
		v.dropWriter(t.Node)
	case t.Node != "" && len(v.Also) > 0:
		v.dropReader(t.Node)
	default:
		v.Epoch++
		v.letGo(node)
	}
	d.put(v)
	if t.Forced {
		return d.record(AuditForcedDetach, v, node, fmt.Sprintf("what it has not flushed is lost; epoch %d", v.Epoch))
	}
	return nil
}

// dropReader takes one of several readers off. REQUIRES: node is one, and not the only one.
func (v *Volume) dropReader(node trivet.NodeID) {
	rest := append([]Attachment{*v.Attached}, v.Also...)
	rest = slices.DeleteFunc(rest, func(a Attachment) bool { return a.Node == node })
	first := rest[0]
	v.Attached, v.Also = &first, rest[1:]
	if len(v.Also) == 0 {
		v.Also = nil
	}
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
		v.Detaching, v.Leaving = "", ""
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
