package meta

import (
	"fmt"
	"slices"
	"time"

	"github.com/trivet-csi/trivet"
)

// Machine applies commands one after the other. Every State it hands out stays as it is. A Machine
// is not safe for concurrent use; its States are.
type Machine struct{ state *State }

// NewMachine returns a Machine that goes on from s; nil means from the empty catalogue.
func NewMachine(s *State) *Machine {
	if s == nil {
		s = &State{}
	}
	return &Machine{state: s}
}

// State returns the catalogue as it is now.
func (m *Machine) State() *State { return m.state }

// Apply applies c and returns the same result on every member. It never panics, whatever c holds.
func (m *Machine) Apply(c Command) Result {
	next, res := m.state.Apply(c)
	m.state = next
	return res
}

// Apply returns the catalogue after c, which is s itself when c was refused or without effect.
func (s *State) Apply(c Command) (*State, Result) {
	refuse := func(err error) (*State, Result) { return s, Result{Revision: s.revision, Err: err} }
	if err := c.Validate(); err != nil {
		return refuse(err)
	}
	o, err := c.operation()
	if err != nil {
		return refuse(err)
	}
	if s.cluster == "" && c.InitCluster == nil {
		return refuse(fmt.Errorf("%s: cluster is not initialised: %w", o.op(), trivet.ErrInvalid))
	}
	d := &draft{State: *s, at: instant(c.Time), by: c.By}
	d.revision++
	if err := o.apply(d); err != nil {
		return refuse(fmt.Errorf("%s: %w", o.op(), err))
	}
	next := s
	if d.changed {
		next = &d.State
	}
	return next, next.result(d)
}

func (s *State) result(d *draft) Result {
	res := Result{Revision: s.revision}
	if v, ok := s.Volume(d.volumeID); ok {
		res.Volume = &v
	}
	if n, ok := s.Node(d.nodeID); ok {
		res.Node = &n
	}
	if snap, ok := s.Snapshot(d.snapshotID); ok {
		res.Snapshot = &snap
	}
	if g, ok := s.SnapshotGroup(d.groupID); ok {
		res.Group = &g
	}
	return res
}

// draft is the state that a command is making. It shares every record and map with the state before
// and must copy before it changes: put… and edit… do.
type draft struct {
	State
	changed  bool
	at       time.Time       // when the command was proposed, zero if it does not say
	by       trivet.NodeID   // who did, if it says
	volumeID trivet.VolumeID // what the result is about
	nodeID   trivet.NodeID

	snapshotID trivet.SnapshotID
	groupID    trivet.SnapshotGroupID
}

// edit returns a copy of the volume to be changed and put back.
func (d *draft) edit(id trivet.VolumeID) (*Volume, error) {
	v, ok := d.Volume(id)
	if !ok {
		return nil, fmt.Errorf("volume is unknown: %w", trivet.ErrNotFound)
	}
	d.volumeID = id
	return &v, nil
}

// put stores a changed volume. The draft owns v from here on.
func (d *draft) put(v *Volume) {
	v.Revision = d.revision
	d.volumes = d.volumes.with(v.ID, v)
	d.changed = true
}

func (d *draft) putNode(n *Node) {
	n.Revision = d.revision
	nodes := make(map[trivet.NodeID]*Node, len(d.nodes)+1)
	for id, other := range d.nodes {
		nodes[id] = other
	}
	nodes[n.ID] = n
	d.nodes, d.nodeID, d.changed = nodes, n.ID, true
}

// instant brings a time to the one form that survives JSON, so that a state made from commands
// equals one read from an image.
func instant(t time.Time) time.Time { return t.Round(0).UTC() }

func (i *InitCluster) op() string { return fmt.Sprintf("initialise cluster %s", i.Cluster) }

func (i *InitCluster) apply(d *draft) error {
	switch d.cluster {
	case i.Cluster:
		return nil
	case "":
		d.cluster, d.created, d.changed = i.Cluster, instant(i.Time), true
		return nil
	default:
		return fmt.Errorf("this is cluster %s: %w", d.cluster, trivet.ErrExists)
	}
}

func (r *RegisterNode) op() string { return fmt.Sprintf("register node %s", r.Node.ID) }

func (r *RegisterNode) apply(d *draft) error {
	n := r.Node.Clone()
	n.LeaseUntil = instant(n.LeaseUntil)
	n.Replaced, n.Fills, n.Cordoned, n.Draining, n.ZoneSet, n.RackSet = nil, nil, false, false, false, false
	if d.Forgotten(n.ID) {
		return fmt.Errorf("node was forgotten; `trivet node forget %s --allow` lets it join anew: %w", n.ID, trivet.ErrFenced)
	}
	for _, disk := range n.Disks {
		if owner := d.diskOwner(disk.ID); owner != "" && owner != n.ID {
			return fmt.Errorf("disk %s belongs to node %s: %w", disk.ID, owner, trivet.ErrInUse)
		}
	}
	if old, ok := d.Node(n.ID); ok {
		if slices.Contains(old.Replaced, n.Incarnation) {
			return fmt.Errorf("incarnation %s was replaced by %s: %w", n.Incarnation, old.Incarnation, trivet.ErrFenced)
		}
		n.Replaced, n.Cordoned, n.Draining = old.Replaced, old.Cordoned, old.Draining
		if n.ZoneSet = old.ZoneSet; n.ZoneSet {
			n.Zone = old.Zone
		}
		if n.RackSet = old.RackSet; n.RackSet {
			n.Rack = old.Rack
		}
		if old.Incarnation != n.Incarnation {
			n.Replaced = append(n.Replaced, old.Incarnation)
			n.Replaced = n.Replaced[max(0, len(n.Replaced)-replacedMax):]
		} else if old.LeaseUntil.After(n.LeaseUntil) {
			n.LeaseUntil = old.LeaseUntil // a late copy of this process's own registration
		}
	}
	d.putNode(&n)
	return nil
}

func (r *RenewLease) op() string { return fmt.Sprintf("renew lease of node %s", r.Node) }

func (r *RenewLease) apply(d *draft) error {
	n, ok := d.Node(r.Node)
	if !ok {
		return fmt.Errorf("node is unknown: %w", trivet.ErrNotFound)
	}
	if n.Incarnation != r.Incarnation {
		return fmt.Errorf("incarnation %s is not %s, which runs as this node: %w",
			r.Incarnation, n.Incarnation, trivet.ErrFenced)
	}
	d.nodeID = n.ID
	if until := instant(r.Until); until.After(n.LeaseUntil) {
		n.LeaseUntil = until
	}
	for _, disk := range r.Disks {
		i := slices.IndexFunc(n.Disks, func(have Disk) bool { return have.ID == disk.ID })
		if i < 0 {
			return fmt.Errorf("disk %s is not registered: %w", disk.ID, trivet.ErrNotFound)
		}
		n.Disks[i].SizeBytes, n.Disks[i].FreeBytes = disk.SizeBytes, disk.FreeBytes
	}
	n.Fills = slices.Clone(r.Fills)
	d.putNode(&n)
	return nil
}

func (c *CordonNode) op() string {
	switch {
	case c.Draining:
		return fmt.Sprintf("drain node %s", c.Node)
	case c.Cordoned:
		return fmt.Sprintf("cordon node %s", c.Node)
	}
	return fmt.Sprintf("uncordon node %s", c.Node)
}

func (c *CordonNode) apply(d *draft) error {
	n, ok := d.Node(c.Node)
	if !ok {
		return fmt.Errorf("node is unknown: %w", trivet.ErrNotFound)
	}
	d.nodeID = n.ID
	if n.Cordoned == c.Cordoned && n.Draining == c.Draining {
		return nil
	}
	n.Cordoned, n.Draining = c.Cordoned, c.Draining
	d.putNode(&n)
	return nil
}

func (p *PlaceNode) op() string { return fmt.Sprintf("place node %s", p.Node) }

func (p *PlaceNode) apply(d *draft) error {
	n, ok := d.Node(p.Node)
	if !ok {
		return fmt.Errorf("node is unknown: %w", trivet.ErrNotFound)
	}
	d.nodeID = n.ID
	before := n.Clone()
	if p.Own {
		n.ZoneSet, n.RackSet = false, false
	}
	if p.Zone != nil {
		n.Zone, n.ZoneSet = *p.Zone, true
	}
	if p.Rack != nil {
		n.Rack, n.RackSet = *p.Rack, true
	}
	if n.Zone == before.Zone && n.Rack == before.Rack && n.ZoneSet == before.ZoneSet && n.RackSet == before.RackSet {
		return nil
	}
	d.putNode(&n)
	return nil
}
