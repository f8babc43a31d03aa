// Package meta is the catalogue of a cluster as a pure state machine: what nodes, disks, volumes,
// replicas and attachments there are, what is wanted of them and what is so. Commands go in, a
// result and a new revision come out; there is no clock, no I/O and no randomness here, so that
// every member of the meta group computes the same state from the same log.
//
// controller wraps it in a Raft group and is the only writer of commands on behalf of users; node
// agents read it and report through it what they did. Times, IDs and placements are chosen by the
// proposer and travel in the command.
package meta

import (
	"maps"
	"slices"
	"time"

	"github.com/trivet-csi/trivet"
)

// Revision counts the commands that changed the catalogue. Every record carries the revision of its last change; a
// command may name the revision it was decided on and is refused when the record has moved on.
type Revision uint64

// Phase is where a volume stands in its life.
type Phase string

// The phases. Creating turns into Available once every replica is ready; Failed can be reached
// from anywhere but Deleting and carries a reason. A volume keeps its name until it is Deleting, so
// one that was recycled is Available under its old name. A volume that is deleted while it has snapshots is Kept, and
// Deleting once the last of them is gone.
const (
	PhaseCreating  Phase = "Creating"  // replicas are being made; no I/O yet
	PhaseAvailable Phase = "Available" // ready, never bound or recycled
	PhaseBound     Phase = "Bound"     // claimed: attached at least once, or claimed by a CSI CreateVolume
	PhaseReleased  Phase = "Released"  // its claim is gone; the reclaim policy decides what follows
	PhaseRecycling Phase = "Recycling" // being wiped, then Available
	PhaseDeleting  Phase = "Deleting"  // replicas are being removed, then the record goes
	PhaseFailed    Phase = "Failed"    // needs an operator; see Reason
	PhaseKept      Phase = "Kept"      // deleted, and its name is free: its replicas stay for its snapshots
	PhaseRestoring Phase = "Restoring" // brought back to a snapshot in place; then as it was before
)

// ReclaimPolicy says what happens to a released volume.
type ReclaimPolicy string

// The reclaim policies.
const (
	ReclaimDelete  ReclaimPolicy = "delete"
	ReclaimRetain  ReclaimPolicy = "retain"
	ReclaimRecycle ReclaimPolicy = "recycle"
)

// AccessMode says who may attach a volume.
type AccessMode string

// The access modes of this version. The first three bind the volume to one node; the first allows one
// consumer there, the second several (Kubernetes ReadWriteOncePod and ReadWriteOnce). MultiNodeReader
// lets several nodes read, and none write (ReadOnlyMany). MultiNodeMultiWriter lets two nodes read and write, which is
// what the live migration of a virtual machine needs (ReadWriteMany of a raw block volume).
const (
	SingleNodeSingleWriter AccessMode = "SingleNodeSingleWriter"
	SingleNodeMultiWriter  AccessMode = "SingleNodeMultiWriter"
	SingleNodeReader       AccessMode = "SingleNodeReader"
	MultiNodeReader        AccessMode = "MultiNodeReader"
	MultiNodeMultiWriter   AccessMode = "MultiNodeMultiWriter"
)

// Reads reports whether the mode allows nothing but reading.
func (m AccessMode) Reads() bool { return m == SingleNodeReader || m == MultiNodeReader }

// shares reports whether nodes may be attached together by the mode.
func (m AccessMode) shares() bool { return m == MultiNodeReader || m == MultiNodeMultiWriter }

// Node is a machine of the cluster.
type Node struct {
	ID      trivet.NodeID `json:"id"`
	Address string        `json:"address"` // host:port of its server
	Zone    string        `json:"zone,omitempty"`
	Rack    string        `json:"rack,omitempty"` // within its zone
	// ZoneSet and RackSet: PlaceNode said so, and what the node says of itself does not count.
	ZoneSet     bool             `json:"zoneSet,omitempty"`
	RackSet     bool             `json:"rackSet,omitempty"`
	MetaReplica trivet.ReplicaID `json:"metaReplica,omitempty"` // its member of the meta group
	Incarnation string           `json:"incarnation"`           // UUID drawn at each process start
	LeaseUntil  time.Time        `json:"leaseUntil"`            // node lease; expired = considered down
	Disks       []Disk           `json:"disks"`
	// Cordoned nodes get no new replicas and keep no leadership that another can take; Draining ones are
	// cordoned, and their replicas move elsewhere.
	Cordoned bool `json:"cordoned,omitempty"`
	Draining bool `json:"draining,omitempty"`
	// Replaced are the incarnations before this one, newest last, at most replacedMax: a late
	// registration of an old process must not fence the new one.
	Replaced []string `json:"replaced,omitempty"`
	// Fills are what this node says of replicas that are being filled on it, as of its last renewal.
	Fills    []Fill   `json:"fills,omitempty"`
	Revision Revision `json:"revision"`
}

// FillsMax is how many fills a node may tell of.
const FillsMax = 64

// Fill is how far a replica is that is being filled.
type Fill struct {
	Replica trivet.ReplicaID `json:"replica"`
	// Progress is another number whenever it came a step further: bytes or entries arrived, entries were applied,
	// blocks were compared. It means nothing else.
	Progress uint64 `json:"progress"`
}

// Alive reports whether the node's lease has not run out at now.
func (n *Node) Alive(now time.Time) bool { return now.Before(n.LeaseUntil) }

// Disk is a directory that a node gives to Trivet.
type Disk struct {
	ID        trivet.DiskID `json:"id"`
	Path      string        `json:"path"`
	SizeBytes int64         `json:"sizeBytes"`
	FreeBytes int64         `json:"freeBytes"` // what volumes may still use: the engine's reserve is taken off
}

// ReplicaState is what an agent reported of a replica.
type ReplicaState string

// The replica states.
const (
	ReplicaCreating ReplicaState = "Creating" // wanted; the agent has not made it yet
	ReplicaReady    ReplicaState = "Ready"    // made and durable: from now on its absence is a fault
	ReplicaFaulted  ReplicaState = "Faulted"  // lost, damaged or on a wiped disk; see Reason
	ReplicaRemoved  ReplicaState = "Removed"  // the agent has removed it (phase Deleting, or Retired)

	// A replica that is added to a volume goes Joining → Filling → Ready, one that is taken away
	// Leaving → Left, and is then Retired. At most one replica of a volume is in these states.
	ReplicaJoining ReplicaState = "Joining" // wanted in addition; the agent has not made it yet
	ReplicaFilling ReplicaState = "Filling" // made; the leader adds it as a learner, fills and promotes it
	ReplicaLeaving ReplicaState = "Leaving" // the leader takes it out of the group
	ReplicaLeft    ReplicaState = "Left"    // no member of the group any more: only reported, see Volume.Retired
)

// ReasonDiskAbsent begins the reason of a replica that is Faulted because its disk is not among those of
// its node. It is the one fault that heals by itself: when the disk is back, so is the replica.
const ReasonDiskAbsent = "disk is not on the node: "

// ReasonDiskDamaged begins the reason of a replica that is Faulted for damage on its disk. It runs on and votes
// until it is replaced: most of it is good, and what is bad is never served.
const ReasonDiskDamaged = "disk is damaged: "

// Changing reports whether a replica in that state is on its way into the group or out of it.
func (s ReplicaState) Changing() bool {
	return s == ReplicaJoining || s == ReplicaFilling || s == ReplicaLeaving
}

// Replica is one copy of a volume.
type Replica struct {
	ID     trivet.ReplicaID `json:"id"`
	Node   trivet.NodeID    `json:"node"`
	Disk   trivet.DiskID    `json:"disk"`
	State  ReplicaState     `json:"state"`
	Reason string           `json:"reason,omitempty"`
	// Replaces names the replica that becomes Leaving once this one is Ready.
	Replaces trivet.ReplicaID `json:"replaces,omitempty"`
}

// Attachment is the right of one node to do I/O on a volume.
type Attachment struct {
	Node     trivet.NodeID `json:"node"`
	Mode     AccessMode    `json:"mode"`
	ReadOnly bool          `json:"readOnly,omitempty"`
	Epoch    trivet.Epoch  `json:"epoch"` // epoch granted to the node; usable once Volume.FencedEpoch has reached it
	// Incarnation is the process of the node to which Epoch was granted: the one registered when it
	// was attached or taken over. Any other process of that node must TakeOver first.
	Incarnation string `json:"incarnation,omitempty"`

	// Of a MultiNodeMultiWriter: Writer is its number, 0 or 1; Since the epoch at which its session began, 0 = Epoch; With
	// the only other node that may write beside it, empty = whichever comes.
	Writer int           `json:"writer,omitempty"`
	Since  trivet.Epoch  `json:"since,omitempty"`
	With   trivet.NodeID `json:"with,omitempty"`
}

// Volume is the catalogue's record of a volume.
type Volume struct {
	ID        trivet.VolumeID   `json:"id"`
	Name      string            `json:"name"`
	SizeBytes int64             `json:"sizeBytes"` // committed by the volume's own group (apply_grow.go)
	Phase     Phase             `json:"phase"`
	Reason    string            `json:"reason,omitempty"`  // of PhaseFailed; kept until it is Available again
	Claimed   bool              `json:"claimed,omitempty"` // has an owner: Creating turns into Bound, not Available
	Reclaim   ReclaimPolicy     `json:"reclaim"`
	Params    map[string]string `json:"params,omitempty"` // canonical parameters (see controller/params.go)
	Labels    map[string]string `json:"labels,omitempty"` // for people and for selectors; nothing here goes by them
	Request   string            `json:"request"`          // fingerprint of the create request, for idempotency
	Created   time.Time         `json:"created"`
	Replicas  []Replica         `json:"replicas"`
	// WantReplicas is how many Ready replicas the volume should have; 0 (an older record) = as many as it has.
	WantReplicas int `json:"wantReplicas,omitempty"`
	// WantSizeBytes is the size that the volume is to have; 0 = the one it has.
	WantSizeBytes int64 `json:"wantSizeBytes,omitempty"`
	// StartSizeBytes is the size with which it began, see Start; 0 = the one it has.
	StartSizeBytes int64 `json:"startSizeBytes,omitempty"`
	// ThenDelete says of a Recycling volume that it is deleted once it is wiped (ParamReclaimWipe).
	ThenDelete bool `json:"thenDelete,omitempty"`
	// Recover names the replica that has to become the only voter of the group (apply_recover.go); empty = none.
	Recover trivet.ReplicaID `json:"recover,omitempty"`
	// Retired are replicas that left the group and whose data is still to be removed.
	Retired []Replica `json:"retired,omitempty"`

	// Epoch is the highest epoch reserved; FencedEpoch the highest that the volume's own group has
	// committed. Attached is nil when no node holds the volume. A detach reserves an epoch too, so
	// FencedEpoch == Epoch and Attached == nil means: nobody can write.
	Epoch       trivet.Epoch `json:"epoch"`
	FencedEpoch trivet.Epoch `json:"fencedEpoch"`
	Attached    *Attachment  `json:"attached,omitempty"`
	// Also are further nodes that read beside the one in Attached, in the order in which they came, or the one that
	// writes beside it. All of them, Attached included, are MultiNodeReader then, or MultiNodeMultiWriter, and have
	// the same epoch.
	Also []Attachment `json:"also,omitempty"`
	// Detaching names the node whose attachment ends when the fence of Epoch is committed.
	Detaching trivet.NodeID `json:"detaching,omitempty"`
	// Leaving names the node whose attachment, as one of two writers, ends when the fence of Epoch is committed.
	Leaving trivet.NodeID `json:"leaving,omitempty"`

	// WantLeader asks the leader's agent to move leadership there; empty = leave it.
	WantLeader trivet.ReplicaID `json:"wantLeader,omitempty"`
	// Leader is the replica whose agent last reported that it leads: for display only.
	Leader     trivet.ReplicaID `json:"leader,omitempty"`
	LeaderTerm uint64           `json:"leaderTerm,omitempty"` // Raft term of that report; 0 = not given

	// Source is what the volume began as a copy of; nil = nothing, it began empty.
	Source *Source `json:"source,omitempty"`
	// Rollback is set in PhaseRestoring, and only then.
	Rollback *Rollback `json:"rollback,omitempty"`
	// Scrub is of the newest pass; nil before the first. It changes without a new Revision.
	Scrub *Scrub `json:"scrub,omitempty"`

	Revision Revision `json:"revision"`
}

// Usable reports whether node may do I/O on v at epoch: it holds the attachment with that epoch,
// and the volume's group has fenced everything older.
func (v *Volume) Usable(node trivet.NodeID, epoch trivet.Epoch) bool {
	held := v.GrantOf(node)
	return held != nil && held.Epoch == epoch && v.FencedEpoch == epoch
}

// GrantOf returns the attachment of node, or nil. It is a part of v.
func (v *Volume) GrantOf(node trivet.NodeID) *Attachment {
	if v.Attached != nil && v.Attached.Node == node {
		return v.Attached
	}
	for i := range v.Also {
		if v.Also[i].Node == node {
			return &v.Also[i]
		}
	}
	return nil
}

// Holders returns the nodes that are attached, the longest first, or the one that is still being
// detached; none when nobody can read or write.
func (v *Volume) Holders() []trivet.NodeID {
	var nodes []trivet.NodeID
	if first := v.Holder(); first != "" {
		nodes = append(nodes, first)
	}
	for _, a := range v.Also {
		nodes = append(nodes, a.Node)
	}
	if v.Leaving != "" {
		nodes = append(nodes, v.Leaving)
	}
	return nodes
}

// Holds reports whether node is attached or still being detached.
func (v *Volume) Holds(node trivet.NodeID) bool { return slices.Contains(v.Holders(), node) }

// As returns a copy of v as node sees it: Attached is the node's own attachment, if it has one, and Also
// are those of the others.
func (v *Volume) As(node trivet.NodeID) Volume {
	c := v.Clone()
	if c.Attached == nil || c.Attached.Node == node {
		return c
	}
	i := slices.IndexFunc(c.Also, func(a Attachment) bool { return a.Node == node })
	first := *c.Attached
	if i < 0 {
		c.Attached, c.Also = nil, append([]Attachment{first}, c.Also...)
		return c
	}
	own := c.Also[i]
	c.Attached, c.Also[i] = &own, first
	return c
}

// Replica returns the volume's replica of that ID, or nil.
func (v *Volume) Replica(id trivet.ReplicaID) *Replica {
	for i := range v.Replicas {
		if v.Replicas[i].ID == id {
			return &v.Replicas[i]
		}
	}
	return nil
}

// ReplicaOn returns the volume's replica on node, or nil. There is at most one, except that a Faulted or
// Leaving one may have its successor beside it; then it is the successor, which is the later in the list.
func (v *Volume) ReplicaOn(node trivet.NodeID) *Replica {
	for i := len(v.Replicas) - 1; i >= 0; i-- {
		if v.Replicas[i].Node == node {
			return &v.Replicas[i]
		}
	}
	return nil
}

// Change returns the replica that is Joining, Filling or Leaving, of which there is at most one, or nil.
func (v *Volume) Change() *Replica {
	for i := range v.Replicas {
		if v.Replicas[i].State.Changing() {
			return &v.Replicas[i]
		}
	}
	return nil
}

// Want returns how many Ready replicas the volume should have. For a record from before that was kept it
// is as many as there are, apart from the one that is on its way in or out.
func (v *Volume) Want() int {
	if v.WantReplicas > 0 {
		return v.WantReplicas
	}
	n := len(v.Replicas)
	if v.Change() != nil {
		n--
	}
	return max(n, 1)
}

// Holder returns the node that is attached, of several the longest, or that is still being detached, or ""
// when nobody can read or write.
func (v *Volume) Holder() trivet.NodeID {
	if v.Attached != nil {
		return v.Attached.Node
	}
	return v.Detaching
}

// Clone returns a copy that shares nothing with v.
func (v *Volume) Clone() Volume {
	c := *v
	c.Params = maps.Clone(v.Params)
	c.Labels = maps.Clone(v.Labels)
	c.Replicas = slices.Clone(v.Replicas)
	c.Retired = slices.Clone(v.Retired)
	c.Also = slices.Clone(v.Also)
	c.Source = v.Source.clone()
	if v.Rollback != nil {
		r := *v.Rollback
		c.Rollback = &r
	}
	c.Scrub = v.Scrub.clone()
	if v.Attached != nil {
		a := *v.Attached
		c.Attached = &a
	}
	return c
}

// Clone returns a copy that shares nothing with n.
func (n *Node) Clone() Node {
	c := *n
	c.Disks = slices.Clone(n.Disks)
	c.Replaced = slices.Clone(n.Replaced)
	c.Fills = slices.Clone(n.Fills)
	return c
}
