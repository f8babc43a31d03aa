package meta

import (
	"fmt"

	"github.com/trivet-csi/trivet"
)

// Recovery of a volume of which a majority is lost (H34). An operator decides; nothing here does by itself.
//
//	n1:Ready n2:Ready n3:Ready Attached=n2@4 Epoch=4      n2 and n3 are gone for good
//	  RecoverVolume n1 ──► n1:Ready Recover=n1 Retired=n2,n3 Detaching=n2 Epoch=5
//	  ReportRecovered  ──► n1:Ready Detaching=n2 Epoch=5  n1 is the only voter of the group
//	  ReportFence 5    ──► nobody holds it                then replicas are added again
//
// All other replicas are given up in the same step, whatever state they are in: should their nodes come back, their
// agents remove what they have, and they are never members again under their names (H10).

func (r *RecoverVolume) op() string {
	return fmt.Sprintf("recover %s from replica %s", r.Volume, r.Replica)
}

func (r *RecoverVolume) validate() error {
	if r.IfRevision == 0 {
		return fmt.Errorf("no revision that it was decided on: %w", trivet.ErrInvalid)
	}
	return firstError(validateVolume(r.Volume), validateUUID("replica", string(r.Replica)),
		validateText("detail", r.Detail, reasonBytesMax))
}

func (r *RecoverVolume) apply(d *draft) error {
	v, err := d.edit(r.Volume)
	if err != nil {
		return err
	}
	if v.Recover == r.Replica {
		return nil
	}
	if err := v.unmoved(r.IfRevision); err != nil {
		return err
	}
	rep := v.Replica(r.Replica)
	switch {
	case v.Phase == PhaseCreating || v.Phase == PhaseDeleting:
		return fmt.Errorf("volume is %s: %w", v.Phase, trivet.ErrInvalid)
	case rep == nil:
		return fmt.Errorf("volume has no such replica: %w", trivet.ErrNotFound)
	case rep.State != ReplicaReady && rep.State != ReplicaLeaving:
		return fmt.Errorf("replica is %s, and may not have everything: %w", rep.State, trivet.ErrInvalid)
	case len(v.Replicas) == 1:
		return fmt.Errorf("it is the only replica: %w", trivet.ErrInvalid)
	}
	rep.State, rep.Replaces = ReplicaReady, "" // one that was leaving is needed
	var lost []trivet.ReplicaID
	for _, other := range v.Replicas {
		if other.ID != r.Replica {
			lost = append(lost, other.ID)
		}
	}
	for _, id := range lost {
		d.retire(v, id)
	}
	v.Recover, v.Leader, v.WantLeader = r.Replica, "", ""
	v.Epoch++
	if held := v.Holder(); held != "" {
		v.letGo(held)
	}
	d.put(v)
	rep = v.Replica(r.Replica)
	return d.record(AuditRecover, v, rep.Node, fmt.Sprintf("replica %s is the only one left, %d given up, epoch %d; %s",
		rep.ID, len(lost), v.Epoch, r.Detail))
}

func (r *ReportRecovered) op() string {
	return fmt.Sprintf("report %s recovered from replica %s", r.Volume, r.Replica)
}

func (r *ReportRecovered) validate() error {
	return firstError(validateVolume(r.Volume), validateUUID("replica", string(r.Replica)))
}

func (r *ReportRecovered) apply(d *draft) error {
	v, err := d.edit(r.Volume)
	if err != nil || v.Recover != r.Replica {
		return nil //nolint:nilerr // late
	}
	v.Recover = ""
	d.put(v)
	return nil
}
