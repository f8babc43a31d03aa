package meta

import (
	"fmt"
	"time"
	"unicode/utf8"

	"github.com/trivet-csi/trivet"
)

// Limits of what a record may hold, so that a command cannot make the catalogue unbounded.
const (
	reasonBytesMax = 1024
	textBytesMax   = 1024 // addresses, paths, parameter values
	disksMax       = 64   // per node
	paramsMax      = 64   // per volume
	labelsMax      = 64   // per volume
	replacedMax    = 8    // remembered incarnations per node
	replicasMax    = 6    // per volume: five, and the one that replaces another
	retiredMax     = 32   // per volume
	readersMax     = 256  // nodes that read a volume at a time
	snapshotsMax   = 1000 // per volume; its group keeps 1024
)

// operation is what each field of Command can do. All are pure.
type operation interface {
	op() string           // name and ids, for the front of an error
	validate() error      // what can be said without the state
	apply(d *draft) error // changes d, or returns an error and leaves it to be thrown away
}

// operation returns the one field that is set.
func (c *Command) operation() (operation, error) {
	var set []operation
	add(&set, c.InitCluster)
	add(&set, c.RegisterNode)
	add(&set, c.RenewLease)
	add(&set, c.CreateVolume)
	add(&set, c.ReportReplica)
	add(&set, c.Attach)
	add(&set, c.TakeOver)
	add(&set, c.Detach)
	add(&set, c.ReportFence)
	add(&set, c.ReportLeader)
	add(&set, c.WantLeader)
	add(&set, c.Release)
	add(&set, c.Reclaim)
	add(&set, c.ReportWiped)
	add(&set, c.Fail)
	add(&set, c.AddReplica)
	add(&set, c.RemoveReplica)
	add(&set, c.SetReplicas)
	add(&set, c.CordonNode)
	add(&set, c.PlaceNode)
	add(&set, c.ForgetNode)
	add(&set, c.SetParams)
	add(&set, c.SetLabels)
	add(&set, c.CreateSnapshot)
	add(&set, c.ReportSnapshot)
	add(&set, c.DeleteSnapshot)
	add(&set, c.ReportFlattened)
	add(&set, c.Restore)
	add(&set, c.ReportRolledBack)
	add(&set, c.StartScrub)
	add(&set, c.ReportScrub)
	add(&set, c.GrowVolume)
	add(&set, c.ReportSize)
	add(&set, c.RecoverVolume)
	add(&set, c.RecoverCatalogue)
	add(&set, c.ReportRecovered)
	add(&set, c.CreateSnapshotGroup)
	add(&set, c.BeginSnapshotGroup)
	add(&set, c.ReportSnapshotGroup)
	add(&set, c.DeleteSnapshotGroup)
	if len(set) != 1 {
		return nil, fmt.Errorf("command with %d operations, want exactly one: %w", len(set), trivet.ErrInvalid)
	}
	return set[0], nil
}

func add[T any, P interface {
	*T
	operation
}](set *[]operation, p P) {
	if p != nil {
		*set = append(*set, p)
	}
}

// Op returns the operation and what it is about, for logs and errors, such as
// "attach vol-0000000000000007 to n1".
func (c Command) Op() string {
	o, err := c.operation()
	if err != nil {
		return "command"
	}
	return o.op()
}

// Validate returns ErrInvalid unless exactly one field is set and its contents make sense by
// themselves. Apply validates too.
func (c Command) Validate() error {
	o, err := c.operation()
	if err != nil {
		return err
	}
	if err := firstError(c.validateStamp(), o.validate()); err != nil {
		return fmt.Errorf("%s: %w", o.op(), err)
	}
	return nil
}

func (i *InitCluster) validate() error {
	return firstError(validateUUID("cluster", string(i.Cluster)), validateTime("time", i.Time))
}

func (r *RegisterNode) validate() error {
	n := &r.Node
	if n.MetaReplica != "" {
		if err := validateUUID("meta replica", string(n.MetaReplica)); err != nil {
			return err
		}
	}
	if n.Address == "" {
		return fmt.Errorf("address is empty: %w", trivet.ErrInvalid)
	}
	return firstError(
		trivet.ValidateNodeID(string(n.ID)),
		validateText("address", n.Address, textBytesMax),
		validateText("zone", n.Zone, trivet.NameBytesMax),
		validateText("rack", n.Rack, trivet.NameBytesMax),
		validateUUID("incarnation", n.Incarnation),
		validateTime("lease", n.LeaseUntil),
		validateDisks(n.Disks),
	)
}

func (r *RenewLease) validate() error {
	return firstError(
		trivet.ValidateNodeID(string(r.Node)),
		validateUUID("incarnation", r.Incarnation),
		validateTime("lease", r.Until),
		validateDisks(r.Disks),
		validateFills(r.Fills),
	)
}

func validateFills(fills []Fill) error {
	if len(fills) > FillsMax {
		return fmt.Errorf("%d fills, at most %d are told: %w", len(fills), FillsMax, trivet.ErrInvalid)
	}
	for _, f := range fills {
		if err := validateUUID("replica", string(f.Replica)); err != nil {
			return err
		}
	}
	return nil
}

func (c *CreateVolume) validate() error {
	v := &c.Volume
	if err := validateSize(v.SizeBytes); err != nil {
		return err
	}
	if n := len(v.Replicas); n != 0 && v.Source == nil {
		if err := validateCount(n); err != nil {
			return err
		}
	}
	return firstError(
		v.Source.validate(len(v.Replicas), v.WantReplicas),
		validateParams(v.Params),
		validateLabels(v.Labels),
		validateVolume(v.ID),
		trivet.ValidateName(v.Name),
		validatePolicy(v.Reclaim),
		validateText("request", v.Request, textBytesMax),
		validateTime("created", v.Created),
		validateReplicas(v.Replicas),
	)
}

func validateReplicas(rs []Replica) error {
	ids, nodes := map[trivet.ReplicaID]bool{}, map[trivet.NodeID]bool{}
	for _, r := range rs {
		if err := firstError(
			validateUUID("replica", string(r.ID)),
			trivet.ValidateNodeID(string(r.Node)),
			validateUUID("disk", string(r.Disk)),
		); err != nil {
			return err
		}
		if r.State != ReplicaCreating || r.Reason != "" || r.Replaces != "" {
			return fmt.Errorf("replica %s: state %q, want %s: %w", r.ID, r.State, ReplicaCreating, trivet.ErrInvalid)
		}
		if ids[r.ID] || nodes[r.Node] {
			return fmt.Errorf("replica %s on %s: replica or node named twice: %w", r.ID, r.Node, trivet.ErrInvalid)
		}
		ids[r.ID], nodes[r.Node] = true, true
	}
	return nil
}

func (r *ReportReplica) validate() error {
	switch r.State {
	case ReplicaReady, ReplicaFaulted, ReplicaRemoved, ReplicaFilling, ReplicaLeft:
	case ReplicaCreating, ReplicaJoining, ReplicaLeaving:
		return fmt.Errorf("state %s cannot be reported, only wanted: a replica is never made again under its name: %w",
			r.State, trivet.ErrInvalid)
	default:
		return fmt.Errorf("state %q is unknown: %w", r.State, trivet.ErrInvalid)
	}
	return firstError(
		validateVolume(r.Volume),
		validateUUID("replica", string(r.Replica)),
		validateText("reason", r.Reason, reasonBytesMax),
	)
}

func (a *Attach) validate() error {
	switch a.Mode {
	case SingleNodeSingleWriter, SingleNodeMultiWriter, SingleNodeReader, MultiNodeReader:
		if a.With != "" {
			return fmt.Errorf("%s together with %s: %w", a.Mode, a.With, trivet.ErrInvalid)
		}
	case MultiNodeMultiWriter:
		if a.ReadOnly || a.With == a.Node {
			return fmt.Errorf("%s, read-only %t, together with %q: %w", a.Mode, a.ReadOnly, a.With, trivet.ErrInvalid)
		}
	default:
		return fmt.Errorf("access mode %q is unknown: %w", a.Mode, trivet.ErrInvalid)
	}
	if a.With != "" {
		if err := trivet.ValidateNodeID(string(a.With)); err != nil {
			return err
		}
	}
	return firstError(validateVolume(a.Volume), trivet.ValidateNodeID(string(a.Node)))
}

func (t *TakeOver) validate() error {
	if t.Incarnation != "" {
		if err := validateUUID("incarnation", t.Incarnation); err != nil {
			return err
		}
	}
	return firstError(validateVolume(t.Volume), trivet.ValidateNodeID(string(t.Node)))
}

func (d *Detach) validate() error {
	if d.Node == "" {
		if !d.IfLease.IsZero() {
			return fmt.Errorf("a lease without its node: %w", trivet.ErrInvalid)
		}
		return validateVolume(d.Volume)
	}
	return firstError(validateVolume(d.Volume), trivet.ValidateNodeID(string(d.Node)))
}

func (r *ReportFence) validate() error {
	return firstError(validateVolume(r.Volume), validateEpoch(r.Epoch))
}

func (r *ReportLeader) validate() error {
	return firstError(validateVolume(r.Volume), validateUUID("replica", string(r.Replica)))
}

func (w *WantLeader) validate() error {
	return firstError(validateVolume(w.Volume), validateUUID("replica", string(w.Replica)))
}

func (r *Release) validate() error { return validateVolume(r.Volume) }

func (r *Reclaim) validate() error {
	return firstError(validateVolume(r.Volume), validatePolicy(r.Policy))
}

func (r *ReportWiped) validate() error {
	return firstError(validateVolume(r.Volume), validateEpoch(r.Epoch))
}

func (f *Fail) validate() error {
	if f.Reason == "" {
		return fmt.Errorf("reason is empty: %w", trivet.ErrInvalid)
	}
	return firstError(validateVolume(f.Volume), validateText("reason", f.Reason, reasonBytesMax))
}

func (a *AddReplica) validate() error {
	r := &a.Replica
	if r.State != "" || r.Reason != "" {
		return fmt.Errorf("replica %s: state %q, want none: %w", r.ID, r.State, trivet.ErrInvalid)
	}
	if a.IfRevision == 0 {
		return fmt.Errorf("replica %s: no revision that it was decided on: %w", r.ID, trivet.ErrInvalid)
	}
	if r.Replaces != "" {
		if err := validateUUID("replaced replica", string(r.Replaces)); err != nil {
			return err
		}
		if r.Replaces == r.ID {
			return fmt.Errorf("replica %s replaces itself: %w", r.ID, trivet.ErrInvalid)
		}
	}
	return firstError(
		validateVolume(a.Volume),
		validateUUID("replica", string(r.ID)),
		trivet.ValidateNodeID(string(r.Node)),
		validateUUID("disk", string(r.Disk)),
	)
}

func (r *RemoveReplica) validate() error {
	return firstError(validateVolume(r.Volume), validateUUID("replica", string(r.Replica)))
}

func (s *SetReplicas) validate() error {
	return firstError(validateVolume(s.Volume), validateCount(s.Count))
}

func (c *CordonNode) validate() error {
	if c.Draining && !c.Cordoned {
		return fmt.Errorf("draining but not cordoned: %w", trivet.ErrInvalid)
	}
	return trivet.ValidateNodeID(string(c.Node))
}

func (p *PlaceNode) validate() error {
	if p.Own != (p.Zone == nil && p.Rack == nil) {
		return fmt.Errorf("want a zone, a rack, or that the node says both itself: %w", trivet.ErrInvalid)
	}
	for _, f := range []struct {
		name  string
		value *string
	}{{"zone", p.Zone}, {"rack", p.Rack}} {
		if f.value == nil {
			continue
		}
		if err := validateText(f.name, *f.value, trivet.NameBytesMax); err != nil {
			return err
		}
	}
	return trivet.ValidateNodeID(string(p.Node))
}

// validateCount refuses numbers of replicas that a volume is not meant to have: even ones tolerate no
// more faults than one less.
func validateCount(n int) error {
	if n != 1 && n != 3 && n != 5 {
		return fmt.Errorf("%d replicas: want 1, 3 or 5: %w", n, trivet.ErrInvalid)
	}
	return nil
}

func validateVolume(id trivet.VolumeID) error {
	if id == trivet.MetaGroup {
		return fmt.Errorf("volume id is zero: %w", trivet.ErrInvalid)
	}
	return nil
}

func validateEpoch(e trivet.Epoch) error {
	if e == 0 {
		return fmt.Errorf("epoch is zero: %w", trivet.ErrInvalid)
	}
	return nil
}

func validatePolicy(p ReclaimPolicy) error {
	switch p {
	case ReclaimDelete, ReclaimRetain, ReclaimRecycle:
		return nil
	default:
		return fmt.Errorf("reclaim policy %q is unknown: %w", p, trivet.ErrInvalid)
	}
}

func validateDisks(disks []Disk) error {
	if len(disks) > disksMax {
		return fmt.Errorf("%d disks, at most %d are allowed: %w", len(disks), disksMax, trivet.ErrInvalid)
	}
	seen := map[trivet.DiskID]bool{}
	for _, d := range disks {
		if err := firstError(validateUUID("disk", string(d.ID)), validateText("path", d.Path, textBytesMax)); err != nil {
			return err
		}
		if d.SizeBytes < 0 || d.FreeBytes < 0 {
			return fmt.Errorf("disk %s: size %d, free %d bytes: %w", d.ID, d.SizeBytes, d.FreeBytes, trivet.ErrInvalid)
		}
		if seen[d.ID] {
			return fmt.Errorf("disk %s is named twice: %w", d.ID, trivet.ErrInvalid)
		}
		seen[d.ID] = true
	}
	return nil
}

// validateText refuses what JSON could not carry unchanged.
func validateText(what, s string, bytesMax int) error {
	if len(s) > bytesMax || !utf8.ValidString(s) {
		return fmt.Errorf("%s: want valid UTF-8 of at most %d bytes: %w", what, bytesMax, trivet.ErrInvalid)
	}
	return nil
}

// validateTime refuses years that RFC 3339, and so JSON, cannot carry.
func validateTime(what string, t time.Time) error {
	if y := t.UTC().Year(); y < 1 || y > 9998 {
		return fmt.Errorf("%s: year %d: %w", what, y, trivet.ErrInvalid)
	}
	return nil
}

func validateUUID(what, s string) error {
	if err := trivet.ValidateUUID(s); err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	return nil
}

func firstError(errs ...error) error {
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}
