package controller

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller/meta"
)

const (
	// DefaultReplaceAfter is how long a node may be dead, or a disk away, before its replicas are replaced.
	DefaultReplaceAfter = 10 * time.Minute
	// fillPatience is how long a fill may stand still at least, however short replaceAfter is: nodes tell how far it
	// is when they renew their leases, every 2 s, and a step may wait for its turn on a busy disk.
	fillPatience = 30 * time.Second

	// fillsPerNode and fillsPerCluster bound the replicas that are being filled at a time: those that a node
	// sends or receives, and all. Filling competes with the users' I/O for disks and network.
	fillsPerNode    = 2
	fillsPerCluster = 8

	// retryAfter is how long a node on which a replica did not come up is not tried again for that volume.
	retryAfter = time.Minute
)

// mendSettings bound what mend does.
type mendSettings struct {
	replaceAfter time.Duration
	perNode      int
	perCluster   int
	newID        func() trivet.ReplicaID
}

// mending is what mend decided.
type mending struct {
	commands []meta.Command             // in the order of their urgency, at most one for a volume
	blocked  map[trivet.VolumeID]string // why a volume that needs a change gets none now
}

// urgency orders the needs of different volumes.
type urgency int

const (
	giveUp urgency = iota // a replica that will never be filled: the volume cannot change otherwise
	excess                // more replicas than wanted
	fault                 // a faulted replica
	death                 // a replica on a dead node
	drain                 // a replica on a draining node
	lack                  // fewer replicas than wanted
	stray                 // no replica where it is attached
)

// need is a change that a volume needs.
type need struct {
	urgency
	volume  *meta.Volume
	replica *meta.Replica // to be given up or replaced; nil for excess and lack
}

// mend decides what is to be done in a cluster so that every volume has as many Ready replicas as are
// wanted, on nodes that are alive and not draining. It is pure: the same arguments, but for the new IDs,
// give the same answer; in a state in which nothing is to be done, or can be, there are no commands.
//
// A volume gets at most one change at a time, and none while the one before is under way (I11), except that
// a replica which is not filled is given up: one on a node that is dead, or that came no step further for replaceAfter
// although the group could fill it. What it needs is looked at in this order, and
// the first that can be done is done:
//
//  1. more replicas than wanted: one is removed. This comes first, so that nothing is replaced that goes anyway;
//  2. a faulted replica is replaced, on another node or else on its own. One whose disk is merely away gets
//     replaceAfter to come back;
//  3. a replica on a node that is dead for replaceAfter is replaced elsewhere;
//  4. a replica on a draining node is replaced elsewhere;
//  5. fewer replicas than wanted: one is added;
//  6. nothing else is to be done, and the volume is to have a replica where it is attached: one follows
//     (mend_local.go).
//
// None of this happens unless a majority of the volume's replicas is Ready on living nodes, and a removal
// leaves such a majority: automation never takes a group below its quorum. (Adding does not either: a
// majority h of n stays one of n+1 when the new one is well.)
//
// A node is dead since its lease ran out, but not before this mender began to lead: after an outage of the
// catalogue itself all leases are old, and the nodes need time to renew them.
func mend(s *meta.State, h *history, set mendSettings, now time.Time) mending {
	m := newMendPass(s, h, set, now)
	var needs []need
	volumes := s.Volumes()
	for i := range volumes {
		v := &volumes[i]
		m.countFill(v)
		if c, ok := m.moveLeader(v); ok {
			m.out.commands = append(m.out.commands, c)
		} else if c, ok := m.leadLocally(v); ok {
			m.out.commands = append(m.out.commands, c)
		} else {
			needs = append(needs, m.needsOf(v)...)
		}
	}
	m.load = LoadOf(volumes)
	m.out.commands = append(m.out.commands, m.orphans(s)...)
	slices.SortStableFunc(needs, func(a, b need) int { return cmp.Compare(a.urgency, b.urgency) })
	met := map[trivet.VolumeID]bool{}
	for _, n := range needs {
		id := n.volume.ID
		if met[id] {
			continue
		}
		c, err := m.meet(n)
		if err == nil {
			m.out.commands = append(m.out.commands, c)
			met[id] = true
			delete(m.out.blocked, id)
		} else if _, said := m.out.blocked[id]; !said {
			m.out.blocked[id] = err.Error()
		}
	}
	return m.out
}

// mendPass is one evaluation of mend.
type mendPass struct {
	s     *meta.State
	set   mendSettings
	h     *history
	now   time.Time
	nodes []meta.Node
	byID  map[trivet.NodeID]*meta.Node
	load  map[trivet.DiskID]Load
	fills map[trivet.NodeID]int // replicas that a node sends or receives
	all   int                   // of the cluster
	out   mending
}

func newMendPass(s *meta.State, h *history, set mendSettings, now time.Time) *mendPass {
	m := &mendPass{
		s: s, set: set, h: h, now: now, nodes: s.Nodes(), byID: map[trivet.NodeID]*meta.Node{},
		fills: map[trivet.NodeID]int{}, out: mending{blocked: map[trivet.VolumeID]string{}},
	}
	for i := range m.nodes {
		m.byID[m.nodes[i].ID] = &m.nodes[i]
	}
	return m
}

// countFill counts the replica of v that is being filled, if any.
func (m *mendPass) countFill(v *meta.Volume) {
	if r := v.Change(); r != nil && r.State != meta.ReplicaLeaving {
		m.all++
		m.fills[r.Node]++
		m.fills[m.source(v)]++
	}
}

// source returns the node that fills new replicas of v: the leader's, as far as is known.
func (m *mendPass) source(v *meta.Volume) trivet.NodeID {
	if r := v.Replica(v.Leader); r != nil && m.well(r) {
		return r.Node
	}
	for i := range v.Replicas {
		if m.well(&v.Replicas[i]) {
			return v.Replicas[i].Node
		}
	}
	return ""
}

func (m *mendPass) alive(id trivet.NodeID) bool {
	n := m.byID[id]
	return n != nil && n.Alive(m.now)
}

// dead reports whether a node is down for so long that it is not expected back.
func (m *mendPass) dead(id trivet.NodeID) bool {
	n := m.byID[id]
	if n == nil || n.Alive(m.now) {
		return n == nil
	}
	since := n.LeaseUntil
	if since.Before(m.h.since) {
		since = m.h.since
	}
	return m.now.Sub(since) >= m.set.replaceAfter
}

func (m *mendPass) cordoned(id trivet.NodeID) bool { n := m.byID[id]; return n != nil && n.Cordoned }

func (m *mendPass) draining(id trivet.NodeID) bool { n := m.byID[id]; return n != nil && n.Draining }

// well reports whether a replica votes, its node is alive, and has the disk: a node that comes back without
// it registers that before its agent gets to report the replica as faulted.
func (m *mendPass) well(r *meta.Replica) bool {
	return r.State == meta.ReplicaReady && m.alive(r.Node) && m.diskOf(r) != nil
}

// diskOf returns the disk of a replica, or nil when its node has none such.
func (m *mendPass) diskOf(r *meta.Replica) *meta.Disk {
	n := m.byID[r.Node]
	if n == nil {
		return nil
	}
	for i := range n.Disks {
		if n.Disks[i].ID == r.Disk {
			return &n.Disks[i]
		}
	}
	return nil
}

// majority reports whether more than half of the replicas of v are well.
func (m *mendPass) majority(v *meta.Volume) bool {
	well := 0
	for i := range v.Replicas {
		if m.well(&v.Replicas[i]) {
			well++
		}
	}
	return 2*well > len(v.Replicas)
}

// needsOf returns the changes that v needs, the most urgent first.
func (m *mendPass) needsOf(v *meta.Volume) []need {
	switch v.Phase {
	case meta.PhaseAvailable, meta.PhaseBound, meta.PhaseReleased, meta.PhaseKept:
	case meta.PhaseCreating, meta.PhaseRecycling, meta.PhaseDeleting, meta.PhaseFailed, meta.PhaseRestoring:
		return nil
	}
	if r := v.Change(); r != nil {
		if r.State != meta.ReplicaLeaving && (m.dead(r.Node) || m.stuck(v, r)) {
			return []need{{giveUp, v, r}}
		}
		return nil
	}
	if len(v.Replicas) > v.Want() {
		return []need{{excess, v, nil}}
	}
	var out []need
	for i := range v.Replicas {
		switch r := &v.Replicas[i]; {
		case m.lost(r):
			out = append(out, need{fault, v, r})
		case m.dead(r.Node):
			out = append(out, need{death, v, r})
		case m.draining(r.Node):
			out = append(out, need{drain, v, r})
		}
	}
	if len(v.Replicas) < v.Want() {
		out = append(out, need{lack, v, nil})
	}
	if len(out) == 0 && m.isStray(v) {
		out = append(out, need{stray, v, nil})
	}
	slices.SortStableFunc(out, func(a, b need) int { return cmp.Compare(a.urgency, b.urgency) })
	return out
}

// stuck reports whether a replica that joins or is filled came no step further for replaceAfter, or fillPatience when
// that is longer, and the others are not to blame: a majority of them is well, so that there is a leader to fill it.
func (m *mendPass) stuck(v *meta.Volume, r *meta.Replica) bool {
	step, ok := m.h.fills[r.ID]
	if !ok || m.now.Sub(step.since) < max(m.set.replaceAfter, fillPatience) {
		return false
	}
	well, voters := 0, 0
	for i := range v.Replicas {
		if q := &v.Replicas[i]; q.ID != r.ID {
			voters++
			if m.well(q) {
				well++
			}
		}
	}
	return 2*well > voters
}

// lost reports whether a replica is faulted and not expected back.
func (m *mendPass) lost(r *meta.Replica) bool {
	if r.State != meta.ReplicaFaulted || !strings.HasPrefix(r.Reason, meta.ReasonDiskAbsent) {
		return r.State == meta.ReplicaFaulted
	}
	seen, ok := m.h.faulted[r.ID]
	return ok && m.now.Sub(seen) >= m.set.replaceAfter
}

// meet returns the command that meets a need, or an error that says why there is none now.
func (m *mendPass) meet(n need) (meta.Command, error) {
	if n.urgency == giveUp {
		return removal(n.volume, n.replica), nil
	}
	if !m.majority(n.volume) {
		return meta.Command{}, fmt.Errorf("no majority of its replicas is ready on living nodes: %w", trivet.ErrUnavailable)
	}
	if err := copying(m.s, n.volume); err != nil && (n.urgency == excess || n.urgency == drain) {
		return meta.Command{}, err
	}
	switch n.urgency {
	case excess:
		return removal(n.volume, m.leastUse(n.volume)), nil
	case lack:
		return m.add(n.volume, nil)
	case stray:
		return m.follow(n.volume)
	case giveUp, fault, death, drain:
	}
	return m.add(n.volume, n.replica)
}

func removal(v *meta.Volume, r *meta.Replica) meta.Command {
	return meta.Command{RemoveReplica: &meta.RemoveReplica{Volume: v.ID, Replica: r.ID, IfRevision: v.Revision}}
}

// leastUse chooses the replica to be removed: a faulted one, one that is not well, one on a draining or
// cordoned node, one that shares its zone with others, one that is not where the volume is attached, one on
// the fullest disk.
//
// That leaves a majority as there was one: h well ones of n, h > n/2, without one that is not are h of n-1;
// and where all are well, so are those that remain.
func (m *mendPass) leastUse(v *meta.Volume) *meta.Replica {
	all := make([]*meta.Replica, len(v.Replicas))
	for i := range v.Replicas {
		all[i] = &v.Replicas[i]
	}
	holder, zones := v.Holder(), zonesOf(m.nodes, v.Replicas)
	sharing := func(r *meta.Replica) int {
		if n := m.byID[r.Node]; n != nil {
			return zones[n.Zone]
		}
		return 0
	}
	return slices.MinFunc(all, func(a, b *meta.Replica) int {
		return cmp.Or(
			-compareBool(a.State == meta.ReplicaFaulted, b.State == meta.ReplicaFaulted),
			compareBool(m.well(a), m.well(b)),
			-compareBool(m.draining(a.Node), m.draining(b.Node)),
			-compareBool(m.cordoned(a.Node), m.cordoned(b.Node)),
			-cmp.Compare(sharing(a), sharing(b)),
			compareBool(a.Node == holder, b.Node == holder),
			cmp.Compare(m.freeOn(a), m.freeOn(b)),
			cmp.Compare(a.ID, b.ID),
		)
	})
}

// freeOn returns the free bytes of a replica's disk.
func (m *mendPass) freeOn(r *meta.Replica) int64 {
	if d := m.diskOf(r); d != nil {
		return d.FreeBytes
	}
	return 0
}

// add places one more replica of v, in place of old unless that is nil.
func (m *mendPass) add(v *meta.Volume, old *meta.Replica) (meta.Command, error) {
	where, err := m.place(v, old)
	if err != nil {
		return meta.Command{}, err
	}
	return m.addAt(v, old, where)
}

// addAt is add at a place that was chosen, if it is the volume's turn.
func (m *mendPass) addAt(v *meta.Volume, old *meta.Replica, where meta.Replica) (meta.Command, error) {
	source := m.source(v)
	switch {
	case m.all >= m.set.perCluster:
		return meta.Command{}, fmt.Errorf("waits its turn: %d replicas are being filled: %w", m.all, trivet.ErrPending)
	case m.fills[source] >= m.set.perNode:
		return meta.Command{}, fmt.Errorf("waits its turn: node %s fills %d replicas: %w",
			source, m.fills[source], trivet.ErrPending)
	}
	m.all++
	m.fills[where.Node]++
	m.fills[source]++
	addLoad(m.load, where.Disk, v.SizeBytes)
	r := meta.Replica{ID: m.set.newID(), Node: where.Node, Disk: where.Disk}
	if old != nil {
		r.Replaces = old.ID
	}
	return meta.Command{AddReplica: &meta.AddReplica{Volume: v.ID, Replica: r, IfRevision: v.Revision}}, nil
}

// place finds a disk for one more replica of v, on another node than that of the one it replaces; for a
// faulted one its own node will do when no other can take it. Nodes that are busy, or on which this volume's
// last attempt failed, are passed over for others that are as good, but they are no reason to fall back:
// then it waits.
func (m *mendPass) place(v *meta.Volume, old *meta.Replica) (meta.Replica, error) {
	req := m.placeRequest(v, old)
	elsewhere, own := m.nodes, trivet.NodeID("")
	if old != nil {
		own = old.Node
		elsewhere = slices.DeleteFunc(slices.Clone(m.nodes), func(n meta.Node) bool { return n.ID == own })
	}
	where, err := m.placeAmong(elsewhere, v, req)
	if err == nil || old == nil || old.State != meta.ReplicaFaulted || m.byID[own] == nil {
		return where, err
	}
	if _, waits := Place(elsewhere, req, m.now); waits == nil {
		return meta.Replica{}, err
	}
	back, ownErr := m.placeAmong([]meta.Node{*m.byID[own]}, v, req)
	if ownErr != nil {
		return meta.Replica{}, fmt.Errorf("%v; nor on its own node: %w", err, ownErr)
	}
	return back, nil
}

// placeRequest asks for a place for one more replica of v, in place of old unless that is nil.
func (m *mendPass) placeRequest(v *meta.Volume, old *meta.Replica) PlaceRequest {
	req := PlaceRequest{SizeBytes: v.SizeBytes, Replicas: 1, Load: m.load}
	if params, err := ParseParams(v.Params); err == nil { // which CreateVolume had checked
		req.Spread = params.Spread
	}
	for _, r := range v.Replicas {
		if old == nil || r.ID != old.ID {
			req.Beside = append(req.Beside, r)
		}
	}
	return req
}

// placeAmong places one replica on one of the nodes that are neither busy nor tried lately.
func (m *mendPass) placeAmong(nodes []meta.Node, v *meta.Volume, req PlaceRequest) (meta.Replica, error) {
	req.Avoid = map[trivet.NodeID]bool{}
	for _, n := range nodes {
		t, tried := m.h.tried[attempt{v.ID, n.ID}]
		lately := tried && m.now.Sub(t) < min(retryAfter, m.set.replaceAfter)
		if lately || m.fills[n.ID] >= m.set.perNode {
			req.Avoid[n.ID] = true
		}
	}
	got, err := Place(nodes, req, m.now)
	if err != nil {
		return meta.Replica{}, err
	}
	return got[0], nil
}

// moveLeader takes the leadership of an attached volume off a cordoned node when another ready replica on
// an ordinary living node can have it. The node that holds the attachment keeps it, for there it saves a
// network crossing, unless it is draining. A detached volume's group is parked: nobody leads it.
func (m *mendPass) moveLeader(v *meta.Volume) (meta.Command, bool) {
	leader := v.Replica(v.Leader)
	holder := v.Holder()
	if v.Phase != meta.PhaseBound || holder == "" || leader == nil || leader.State == meta.ReplicaLeaving ||
		!m.cordoned(leader.Node) || leader.Node == holder && !m.draining(leader.Node) {
		return meta.Command{}, false
	}
	able := func(r *meta.Replica) bool { return r != nil && m.well(r) && !m.cordoned(r.Node) }
	if able(v.Replica(v.WantLeader)) {
		return meta.Command{}, false // it is asked for
	}
	var best *meta.Replica
	for i := range v.Replicas {
		r := &v.Replicas[i]
		if able(r) && (best == nil || r.Node == holder || best.Node != holder && r.Node < best.Node) {
			best = r
		}
	}
	if best == nil {
		return meta.Command{}, false
	}
	return meta.Command{WantLeader: &meta.WantLeader{Volume: v.ID, Replica: best.ID}}, true
}
