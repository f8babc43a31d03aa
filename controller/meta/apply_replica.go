package meta

import (
	"fmt"
	"slices"

	"github.com/trivet-csi/trivet"
)

// The life of a replica. What is written on an arrow is the command; Joining to Leaving are the states of
// Replica.State, and at most one replica of a volume is in one of them (I11).
//
//	CreateVolume ──► Creating ──Ready──► Ready ◄──Ready── Faulted
//	                                     ▲ │ ──Faulted──►
//	AddReplica ──► Joining ─Filling─► Filling                │
//	                  │                  │ Faulted           │ RemoveReplica, or the one that
//	                  │ Faulted          ▼ RemoveReplica     │ replaces it is Ready
//	                  │ RemoveReplica  Leaving ◄─────────────┘
//	                  ▼                  │ Left
//	               Retired ◄─────────────┘
//	                  │ Removed
//	                  ▼
//	               no record
//
// Two ways out for one that never was Ready. A Joining one goes at once: the leader adds only what the
// catalogue shows as Filling, and Filling is reported of nothing but Joining, so that no group has it as a
// member or ever will; a report that it was made, if it comes late, finds it retired. A Filling one may be
// a learner, or a voter already whose promotion was not reported: only the leader can say that it is
// neither, so it is Leaving, and its data stays until then. Removing it at once instead would take a voter
// from a group that does not know (H10).

func (r *ReportReplica) op() string {
	return fmt.Sprintf("report replica %s of %s as %s", r.Replica, r.Volume, r.State)
}

func (r *ReportReplica) apply(d *draft) error {
	v, err := d.edit(r.Volume)
	if err != nil {
		if r.State == ReplicaRemoved && d.Used(r.Volume) {
			return nil // a late copy: the record is gone
		}
		return err
	}
	if i := v.retired(r.Replica); i >= 0 {
		if r.State == ReplicaRemoved {
			if v.Retired = slices.Delete(v.Retired, i, i+1); len(v.Retired) == 0 {
				v.Retired = nil // as an image has it
			}
			return d.putOrForget(v)
		}
		return nil // whatever else is said of it is late
	}
	rep := v.Replica(r.Replica)
	switch {
	case rep == nil && (r.State == ReplicaRemoved || r.State == ReplicaLeft):
		return nil // a late copy: it was retired and is forgotten
	case rep == nil:
		return fmt.Errorf("volume has no such replica: %w", trivet.ErrNotFound)
	case v.Phase == PhaseDeleting:
		if r.State != ReplicaRemoved || rep.State == ReplicaRemoved {
			return nil // late
		}
		rep.State, rep.Reason = r.State, r.Reason
		return d.putOrForget(v)
	}
	changed, err := r.move(d, v, rep)
	if err != nil || !changed {
		return err
	}
	if v.Phase == PhaseCreating && v.all(ReplicaReady) {
		v.Phase = PhaseAvailable
		if v.Claimed {
			v.Phase = PhaseBound
		}
	}
	d.put(v)
	return nil
}

// move brings a replica of a volume that is not being deleted into its next state, and reports whether
// that is another one.
func (r *ReportReplica) move(d *draft, v *Volume, rep *Replica) (bool, error) {
	from := rep.State
	switch r.State {
	case ReplicaFilling:
		if from == ReplicaJoining {
			rep.State, rep.Reason = ReplicaFilling, r.Reason
			return true, nil
		}
		if from == ReplicaCreating {
			return false, fmt.Errorf("replica is %s, not %s: %w", from, ReplicaJoining, trivet.ErrInvalid)
		}
		return false, nil // late
	case ReplicaLeft:
		if from != ReplicaLeaving {
			return false, fmt.Errorf("replica is %s, not %s: %w", from, ReplicaLeaving, trivet.ErrInvalid)
		}
		d.retire(v, rep.ID)
		return true, nil
	case ReplicaRemoved:
		return false, fmt.Errorf("volume is %s, not %s: %w", v.Phase, PhaseDeleting, trivet.ErrInvalid)
	case ReplicaReady:
		return r.ready(v, rep)
	case ReplicaFaulted:
		return r.faulted(d, v, rep), nil
	case ReplicaCreating, ReplicaJoining, ReplicaLeaving: // refused by validate
	}
	return false, nil
}

func (r *ReportReplica) ready(v *Volume, rep *Replica) (bool, error) {
	switch rep.State {
	case ReplicaJoining:
		return false, fmt.Errorf("replica is %s, nobody has made it: %w", rep.State, trivet.ErrInvalid)
	case ReplicaLeaving:
		return false, nil // it was promoted, or its disk came back, too late
	case ReplicaFilling:
		old := v.Replica(rep.Replaces)
		if old != nil && (old.State == ReplicaReady || old.State == ReplicaFaulted) {
			v.leave(old)
		}
		rep.State, rep.Reason, rep.Replaces = ReplicaReady, r.Reason, ""
		return true, nil
	case ReplicaCreating, ReplicaReady, ReplicaFaulted, ReplicaRemoved, ReplicaLeft:
	}
	return rep.set(ReplicaReady, r.Reason), nil
}

func (r *ReportReplica) faulted(d *draft, v *Volume, rep *Replica) bool {
	switch rep.State {
	case ReplicaJoining:
		d.retire(v, rep.ID)
		return true
	case ReplicaFilling:
		v.leave(rep)
		rep.Reason = r.Reason
		return true
	case ReplicaLeaving:
		return rep.set(ReplicaLeaving, r.Reason)
	case ReplicaCreating, ReplicaReady, ReplicaFaulted, ReplicaRemoved, ReplicaLeft:
	}
	return rep.set(ReplicaFaulted, r.Reason)
}

// set reports whether it changed anything.
func (r *Replica) set(state ReplicaState, reason string) bool {
	if r.State == state && r.Reason == reason {
		return false
	}
	r.State, r.Reason = state, reason
	return true
}

// leave makes a replica Leaving. Nobody may wait for it to lead any more.
func (v *Volume) leave(r *Replica) {
	r.State, r.Replaces = ReplicaLeaving, ""
	if v.WantLeader == r.ID {
		v.WantLeader = ""
	}
}

// retired returns the place of a replica among the retired ones, or -1.
func (v *Volume) retired(id trivet.ReplicaID) int {
	return slices.IndexFunc(v.Retired, func(r Replica) bool { return r.ID == id })
}

// retire moves a replica that is in no group to the retired ones, whose data its agent removes. The list
// is bounded: at retiredMax the oldest on a disk that no node has any more is forgotten. Should that
// disk come back, its agent leaves what it does not know alone (H35).
func (d *draft) retire(v *Volume, id trivet.ReplicaID) {
	i := slices.IndexFunc(v.Replicas, func(r Replica) bool { return r.ID == id })
	r := v.Replicas[i]
	v.Replicas = slices.Delete(v.Replicas, i, i+1)
	d.settleSource(v)
	v.leave(&r)
	r.State = ReplicaLeft
	v.Retired = append(v.Retired, r)
	if v.Leader == id {
		v.Leader = ""
	}
	if len(v.Retired) >= retiredMax {
		if i := slices.IndexFunc(v.Retired, func(r Replica) bool { return d.diskOwner(r.Disk) == "" }); i >= 0 {
			v.Retired = slices.Delete(v.Retired, i, i+1)
		}
	}
}

// putOrForget stores a volume one of whose replicas was removed, or forgets it when it is being deleted
// and nothing is left. A retired replica on a disk that no node has is not waited for: it lost its disk
// long ago, and should that come back, it is a stray of a deleted volume, which its agent removes.
func (d *draft) putOrForget(v *Volume) error {
	left := slices.ContainsFunc(v.Retired, func(r Replica) bool { return d.diskOwner(r.Disk) != "" })
	if v.Phase == PhaseDeleting && v.all(ReplicaRemoved) && !left {
		d.volumes = d.volumes.without(v.ID)
		d.changed = true
		d.forgetSource(v)
		gone := ""
		if n := len(v.Retired); n > 0 {
			gone = fmt.Sprintf(" but %d on disks that no node has", n)
		}
		return d.record(AuditDeleted, v, "", "every replica is removed"+gone)
	}
	d.put(v)
	return nil
}

// settled returns an error unless the members of the volume's group may change now.
func (v *Volume) settled() error {
	if v.Recover != "" {
		return fmt.Errorf("volume is being recovered from replica %s: %w", v.Recover, trivet.ErrPending)
	}
	switch v.Phase {
	case PhaseAvailable, PhaseBound, PhaseReleased, PhaseKept:
		return nil
	case PhaseCreating, PhaseRestoring:
		return fmt.Errorf("volume is %s: %w", v.Phase, trivet.ErrPending)
	case PhaseRecycling, PhaseDeleting, PhaseFailed:
	}
	return fmt.Errorf("volume is %s: %w", v.Phase, trivet.ErrInvalid)
}

func (a *AddReplica) op() string {
	return fmt.Sprintf("add replica %s on %s to %s", a.Replica.ID, a.Replica.Node, a.Volume)
}

func (a *AddReplica) apply(d *draft) error {
	v, err := d.edit(a.Volume)
	if err != nil {
		return err
	}
	want := a.Replica
	if have := v.Replica(want.ID); have != nil && have.Node == want.Node && have.Disk == want.Disk {
		return nil
	}
	if v.Replica(want.ID) != nil || v.retired(want.ID) >= 0 {
		return fmt.Errorf("volume has or had that replica: %w", trivet.ErrExists)
	}
	if err := firstError(v.unmoved(a.IfRevision), v.settled()); err != nil {
		return err
	}
	if r := v.Change(); r != nil {
		return fmt.Errorf("replica %s on %s is %s: %w", r.ID, r.Node, r.State, trivet.ErrPending)
	}
	node, ok := d.nodes[want.Node]
	switch {
	case !ok:
		return fmt.Errorf("node is unknown: %w", trivet.ErrNotFound)
	case d.diskOwner(want.Disk) != want.Node:
		return fmt.Errorf("disk %s is unknown there: %w", want.Disk, trivet.ErrNotFound)
	case node.Cordoned:
		return fmt.Errorf("node is cordoned: %w", trivet.ErrInvalid)
	case len(v.Replicas) >= replicasMax || len(v.Retired) >= retiredMax:
		return fmt.Errorf("volume has %d replicas, and %d that are still to be removed: %w",
			len(v.Replicas), len(v.Retired), trivet.ErrInvalid)
	}
	if err := v.replaceable(want); err != nil {
		return err
	}
	want.State = ReplicaJoining
	v.Replicas = append(v.Replicas, want)
	d.put(v)
	return nil
}

// replaceable checks what a new replica replaces, and that it does not share its node with another.
func (v *Volume) replaceable(want Replica) error {
	old := v.Replica(want.Replaces)
	switch {
	case want.Replaces == "":
	case old == nil:
		return fmt.Errorf("replaced replica %s is unknown: %w", want.Replaces, trivet.ErrNotFound)
	case old.State != ReplicaReady && old.State != ReplicaFaulted:
		return fmt.Errorf("replaced replica %s is %s: %w", old.ID, old.State, trivet.ErrInvalid)
	}
	for _, r := range v.Replicas {
		if r.Node == want.Node && (r.ID != want.Replaces || r.State != ReplicaFaulted) {
			return fmt.Errorf("node has replica %s, which is %s: %w", r.ID, r.State, trivet.ErrExists)
		}
	}
	return nil
}

func (r *RemoveReplica) op() string {
	return fmt.Sprintf("remove replica %s of %s", r.Replica, r.Volume)
}

func (r *RemoveReplica) apply(d *draft) error {
	v, err := d.edit(r.Volume)
	if err != nil {
		return err
	}
	rep := v.Replica(r.Replica)
	switch {
	case v.retired(r.Replica) >= 0, rep != nil && rep.State == ReplicaLeaving:
		return nil
	case rep == nil:
		return fmt.Errorf("volume has no such replica: %w", trivet.ErrNotFound)
	}
	if err := firstError(v.unmoved(r.IfRevision), v.settled()); err != nil {
		return err
	}
	if c := v.Change(); c != nil && c.ID != rep.ID {
		return fmt.Errorf("replica %s on %s is %s: %w", c.ID, c.Node, c.State, trivet.ErrPending)
	}
	switch rep.State {
	case ReplicaJoining:
		d.retire(v, rep.ID)
	case ReplicaFilling:
		v.leave(rep)
	case ReplicaReady, ReplicaFaulted, ReplicaCreating, ReplicaRemoved, ReplicaLeaving, ReplicaLeft:
		if ready, left := d.without(v, rep.ID); 2*ready <= left {
			return fmt.Errorf("%d of the %d replicas that remain would be ready, which is no majority: %w",
				ready, left, trivet.ErrInvalid)
		}
		v.leave(rep)
	}
	d.put(v)
	return nil
}

// without counts the replicas that remain without one, and how many of those are Ready on a disk that is
// there: one whose disk is gone is about to be reported.
func (d *draft) without(v *Volume, id trivet.ReplicaID) (ready, left int) {
	for _, r := range v.Replicas {
		if r.ID == id {
			continue
		}
		left++
		if r.State == ReplicaReady && d.diskOwner(r.Disk) == r.Node {
			ready++
		}
	}
	return ready, left
}

func (s *SetReplicas) op() string { return fmt.Sprintf("set replicas of %s to %d", s.Volume, s.Count) }

func (s *SetReplicas) apply(d *draft) error {
	v, err := d.edit(s.Volume)
	if err != nil {
		return err
	}
	if v.Phase == PhaseDeleting {
		return fmt.Errorf("volume is %s: %w", v.Phase, trivet.ErrInvalid)
	}
	if v.WantReplicas == s.Count {
		return nil
	}
	v.WantReplicas = s.Count
	d.put(v)
	return nil
}
