package meta

import (
	"fmt"

	"github.com/trivet-csi/trivet"
)

// The life of a volume (types.go has the phases):
//
//	CreateVolume            last replica Ready
//	──────────► Creating ──────────────────────► Available ◄────────────┐
//	               │                              │      ▲              │
//	               │ last replica Ready, claimed  │Attach│ReportWiped   │Reclaim retain
//	               ├──────────► Bound ◄───────────┘      │ (or, to be deleted, Deleting)
//	               │              │ Release (by policy)  │              │
//	               │              ├─────────────────► Recycling         │
//	               │ Release      ├─────────────────► Released ─────────┤
//	               └──► Deleting ◄┘   Reclaim delete ◄─┴────────────────┴── Failed ◄── Fail
//	                       │ last replica Removed, retired ones too
//	                       ▼
//	                   no record; the ID stays used
//
// What becomes Deleting is Kept instead for as long as it has snapshots (apply_snapshot.go). Available, Bound and
// Released turn into Restoring, and back again.
//
// An attached volume is Bound or Failed. Whatever frees or wipes data needs nobody attached.

func (c *CreateVolume) op() string { return fmt.Sprintf("create volume %q", c.Volume.Name) }

func (c *CreateVolume) apply(d *draft) error {
	if id, ok := d.names.get(c.Volume.Name); ok {
		return c.again(d, id)
	}
	if d.Used(c.Volume.ID) {
		return fmt.Errorf("id %s was used before: %w", c.Volume.ID, trivet.ErrExists)
	}
	if len(c.Volume.Replicas) == 0 {
		return fmt.Errorf("no volume has that name, and no replicas are given: %w", trivet.ErrNotFound)
	}
	for _, r := range c.Volume.Replicas {
		if _, ok := d.nodes[r.Node]; !ok {
			return fmt.Errorf("node %s is unknown: %w", r.Node, trivet.ErrNotFound)
		}
		if d.diskOwner(r.Disk) != r.Node {
			return fmt.Errorf("disk %s of node %s is unknown: %w", r.Disk, r.Node, trivet.ErrNotFound)
		}
	}
	asked := c.Volume.Clone()
	v := &Volume{
		ID:        asked.ID,
		Name:      asked.Name,
		SizeBytes: asked.SizeBytes,
		Phase:     PhaseCreating,
		Reclaim:   asked.Reclaim,
		Claimed:   c.Claim,
		Params:    asked.Params,
		Labels:    asked.Labels,
		Request:   asked.Request,
		Created:   instant(asked.Created),
		Replicas:  asked.Replicas,

		WantReplicas: len(asked.Replicas),
	}
	if asked.Source != nil {
		v.WantReplicas = asked.WantReplicas
		if err := d.beginClone(v, asked.Source.Snapshot); err != nil {
			return err
		}
	}
	d.volumeID = v.ID
	d.names = d.names.with(v.Name, v.ID)
	d.used = d.used.with(v.ID, struct{}{})
	d.put(v)
	return nil
}

// again answers a create whose name is taken.
func (c *CreateVolume) again(d *draft, id trivet.VolumeID) error {
	v, err := d.edit(id)
	if err != nil {
		return err
	}
	if v.Request != c.Volume.Request {
		return fmt.Errorf("%s has that name and other parameters: %w", id, trivet.ErrExists)
	}
	switch v.Phase {
	case PhaseReleased:
		return fmt.Errorf("%s has that name and is %s: %w", id, v.Phase, trivet.ErrExists)
	case PhaseRecycling:
		return fmt.Errorf("%s has that name and is %s: %w", id, v.Phase, trivet.ErrPending)
	case PhaseAvailable:
		if c.Claim {
			v.Phase, v.Claimed = PhaseBound, true
			d.put(v)
		}
	case PhaseCreating:
		if c.Claim && !v.Claimed {
			v.Claimed = true
			d.put(v)
		}
	case PhaseRestoring:
		return fmt.Errorf("%s has that name and is %s: %w", id, v.Phase, trivet.ErrPending)
	case PhaseBound, PhaseFailed, PhaseDeleting, PhaseKept: // as it is; the last two hold no name
	}
	return nil
}

func (v *Volume) all(state ReplicaState) bool { return v.count(state) == len(v.Replicas) }

func (v *Volume) count(state ReplicaState) int {
	n := 0
	for _, r := range v.Replicas {
		if r.State == state {
			n++
		}
	}
	return n
}

// idle returns ErrInUse, naming the node, while anybody may still write.
func (v *Volume) idle() error {
	switch {
	case v.Attached != nil:
		return fmt.Errorf("attached to %s: %w", v.holderText(), trivet.ErrInUse)
	case v.Detaching != "":
		return fmt.Errorf("still being detached from node %s: %w", v.Detaching, trivet.ErrInUse)
	}
	return nil
}

// unmoved returns ErrPending when the volume has changed since revision want, unless that is 0.
func (v *Volume) unmoved(want Revision) error {
	if want != 0 && v.Revision != want {
		return fmt.Errorf("volume is at revision %d, not %d: %w", v.Revision, want, trivet.ErrPending)
	}
	return nil
}

func (r *Release) op() string { return fmt.Sprintf("release %s", r.Volume) }

func (r *Release) apply(d *draft) error {
	v, err := d.edit(r.Volume)
	if err != nil {
		return nil //nolint:nilerr // releasing the unknown is done
	}
	policy := v.Reclaim
	switch v.Phase {
	case PhaseDeleting, PhaseKept:
		return nil
	case PhaseRestoring:
		return fmt.Errorf("volume is %s: %w", v.Phase, trivet.ErrPending)
	case PhaseReleased, PhaseRecycling:
		if !r.Discard {
			return nil
		}
	case PhaseCreating:
		policy = ReclaimDelete
	case PhaseFailed:
		if policy == ReclaimRecycle {
			policy = ReclaimRetain
		}
	case PhaseAvailable, PhaseBound:
	}
	if r.Discard {
		policy = ReclaimDelete
	}
	if err := firstError(v.unmoved(r.IfRevision), v.idle()); err != nil {
		return err
	}
	if policy == ReclaimDelete && !r.SkipWipe && v.Phase == PhaseRecycling && v.ThenDelete {
		return nil
	}
	v.Claimed = false
	return d.reclaim(v, policy, v.wiped() && !r.SkipWipe)
}

// reclaim applies a policy to a volume that nobody holds. wipe has it wiped before it is deleted: it is Recycling until
// then, and keeps its name. One whose replicas were never all made has no data to be wiped, and no group to do it.
func (d *draft) reclaim(v *Volume, policy ReclaimPolicy, wipe bool) error {
	from, made := v.Phase, v.Phase != PhaseCreating && v.count(ReplicaCreating) == 0
	wipe = wipe && made
	v.ThenDelete = false
	var err error
	switch {
	case policy == ReclaimDelete && wipe:
		v.Phase, v.ThenDelete = PhaseRecycling, true
		v.Epoch++
		err = d.record(AuditDelete, v, "", fmt.Sprintf("%d bytes, was %s, wiped first", v.SizeBytes, from))
	case policy == ReclaimDelete:
		how := ""
		if v.wiped() && made {
			how = ", without the wipe it was made for"
		}
		v.delete(d)
		err = d.record(AuditDelete, v, "", fmt.Sprintf("%d bytes, was %s%s", v.SizeBytes, from, how))
	case policy == ReclaimRecycle:
		v.Phase = PhaseRecycling
		v.Epoch++
		err = d.record(AuditRecycle, v, "", fmt.Sprintf("%d bytes, was %s", v.SizeBytes, from))
	case policy == ReclaimRetain:
		v.Phase = PhaseReleased
	}
	d.put(v)
	return err
}

// delete begins the removal of v's replicas.
func (v *Volume) delete(d *draft) {
	v.Phase, v.WantLeader, v.ThenDelete = PhaseDeleting, "", false
	if snaps, _ := d.snapsOf.get(v.ID); len(snaps) > 0 {
		v.Phase = PhaseKept
	}
	d.names = d.names.without(v.Name)
}

// ParamReclaimWipe is the one parameter that this package reads: "zero" has a volume wiped before it is deleted.
const ParamReclaimWipe = "reclaimWipe"

func (v *Volume) wiped() bool { return v.Params[ParamReclaimWipe] == "zero" }

func (r *Reclaim) op() string { return fmt.Sprintf("reclaim %s by %s", r.Volume, r.Policy) }

func (r *Reclaim) apply(d *draft) error {
	v, err := d.edit(r.Volume)
	if err != nil {
		return err
	}
	if v.Phase != PhaseReleased && v.Phase != PhaseFailed {
		return fmt.Errorf("volume is %s, not %s or %s: %w", v.Phase, PhaseReleased, PhaseFailed, trivet.ErrInvalid)
	}
	if err := firstError(v.unmoved(r.IfRevision), v.idle()); err != nil {
		return err
	}
	if n := v.count(ReplicaCreating) + v.count(ReplicaRemoved); n > 0 && r.Policy != ReclaimDelete {
		return fmt.Errorf("%d of %d replicas were never made: %w", n, len(v.Replicas), trivet.ErrInvalid)
	}
	v.Claimed = false
	if r.Policy == ReclaimRetain {
		v.Phase, v.Reason = PhaseAvailable, ""
		d.put(v)
		return nil
	}
	return d.reclaim(v, r.Policy, v.wiped())
}

func (r *ReportWiped) op() string {
	return fmt.Sprintf("report %s wiped at epoch %d", r.Volume, r.Epoch)
}

func (r *ReportWiped) apply(d *draft) error {
	v, err := d.edit(r.Volume)
	if err != nil {
		return err
	}
	if v.Phase != PhaseRecycling || v.Epoch != r.Epoch {
		return nil // late
	}
	v.FencedEpoch = v.Epoch // the wipe was committed at that epoch, so the fence was
	v.Phase, v.Reason = PhaseAvailable, ""
	if v.ThenDelete {
		v.delete(d)
	}
	d.put(v)
	return d.record(AuditWipe, v, "", fmt.Sprintf("%d bytes at epoch %d, by a majority of %d replicas",
		v.SizeBytes, v.Epoch, len(v.Replicas)))
}

func (f *Fail) op() string { return fmt.Sprintf("fail %s", f.Volume) }

func (f *Fail) apply(d *draft) error {
	v, err := d.edit(f.Volume)
	if err != nil {
		return err
	}
	switch {
	case v.Phase == PhaseDeleting || v.Phase == PhaseKept:
		return fmt.Errorf("volume is %s: %w", v.Phase, trivet.ErrInvalid)
	case v.Phase == PhaseFailed && v.Reason == f.Reason:
		return nil
	}
	v.Phase, v.Reason, v.Rollback, v.ThenDelete = PhaseFailed, f.Reason, nil, false
	d.put(v)
	return nil
}
