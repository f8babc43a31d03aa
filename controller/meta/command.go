package meta

import (
	"time"

	"github.com/trivet-csi/trivet"
)

// Command is one change of the catalogue: exactly one field is set. Decode and Validate refuse
// anything else.
//
// Commands may arrive twice, and late: a proposer that got no answer proposes again. Each is
// therefore harmless the second time, either because it states a fact or because it names the
// epoch, revision or incarnation that it was decided on and is refused or without effect once
// that has passed. A command that is refused or without effect does not raise the revision.
type Command struct {
	InitCluster   *InitCluster   `json:"initCluster,omitempty"`
	RegisterNode  *RegisterNode  `json:"registerNode,omitempty"`
	RenewLease    *RenewLease    `json:"renewLease,omitempty"`
	CreateVolume  *CreateVolume  `json:"createVolume,omitempty"`
	ReportReplica *ReportReplica `json:"reportReplica,omitempty"`
	Attach        *Attach        `json:"attach,omitempty"`
	TakeOver      *TakeOver      `json:"takeOver,omitempty"`
	Detach        *Detach        `json:"detach,omitempty"`
	ReportFence   *ReportFence   `json:"reportFence,omitempty"`
	ReportLeader  *ReportLeader  `json:"reportLeader,omitempty"`
	WantLeader    *WantLeader    `json:"wantLeader,omitempty"`
	Release       *Release       `json:"release,omitempty"`
	Reclaim       *Reclaim       `json:"reclaim,omitempty"`
	ReportWiped   *ReportWiped   `json:"reportWiped,omitempty"`
	Fail          *Fail          `json:"fail,omitempty"`
	AddReplica    *AddReplica    `json:"addReplica,omitempty"`
	RemoveReplica *RemoveReplica `json:"removeReplica,omitempty"`
	SetReplicas   *SetReplicas   `json:"setReplicas,omitempty"`
	CordonNode    *CordonNode    `json:"cordonNode,omitempty"`
	PlaceNode     *PlaceNode     `json:"placeNode,omitempty"`
	SetParams     *SetParams     `json:"setParams,omitempty"`
	SetLabels     *SetLabels     `json:"setLabels,omitempty"`

	CreateSnapshot   *CreateSnapshot   `json:"createSnapshot,omitempty"`
	ReportSnapshot   *ReportSnapshot   `json:"reportSnapshot,omitempty"`
	DeleteSnapshot   *DeleteSnapshot   `json:"deleteSnapshot,omitempty"`
	ReportFlattened  *ReportFlattened  `json:"reportFlattened,omitempty"`
	Restore          *Restore          `json:"restore,omitempty"`
	ReportRolledBack *ReportRolledBack `json:"reportRolledBack,omitempty"`
	ForgetNode       *ForgetNode       `json:"forgetNode,omitempty"`
	StartScrub       *StartScrub       `json:"startScrub,omitempty"`
	ReportScrub      *ReportScrub      `json:"reportScrub,omitempty"`
	GrowVolume       *GrowVolume       `json:"growVolume,omitempty"`
	ReportSize       *ReportSize       `json:"reportSize,omitempty"`
	RecoverVolume    *RecoverVolume    `json:"recoverVolume,omitempty"`

	ReportRecovered  *ReportRecovered  `json:"reportRecovered,omitempty"`
	RecoverCatalogue *RecoverCatalogue `json:"recoverCatalogue,omitempty"`

	CreateSnapshotGroup *CreateSnapshotGroup `json:"createSnapshotGroup,omitempty"`
	BeginSnapshotGroup  *BeginSnapshotGroup  `json:"beginSnapshotGroup,omitempty"`
	ReportSnapshotGroup *ReportSnapshotGroup `json:"reportSnapshotGroup,omitempty"`
	DeleteSnapshotGroup *DeleteSnapshotGroup `json:"deleteSnapshotGroup,omitempty"`

	// Time and By say when and by which node a command was proposed that leaves an audit record (Audited). They
	// are no operations.
	Time time.Time     `json:"time,omitzero"`
	By   trivet.NodeID `json:"by,omitempty"`
}

// InitCluster names the cluster; the first command ever. Same cluster again: no effect.
type InitCluster struct {
	Cluster trivet.ClusterID `json:"cluster"`
	Time    time.Time        `json:"time"`
}

// RegisterNode adds a node or updates its address, zone, disks, incarnation and lease. A process
// registers at every start. ErrFenced for a node that was forgotten.
// A disk ID that moved to another node is refused with ErrInUse. An
// incarnation that another one has replaced is refused with ErrFenced, however late it comes.
// Attachments stay: a new process takes them over one by one (TakeOver). A cordoned node stays so.
type RegisterNode struct {
	// Node is what it says of itself: Revision, Replaced, Fills, Cordoned, Draining, ZoneSet and RackSet are ignored, and
	// Zone or Rack where PlaceNode has said another.
	Node Node `json:"node"`
}

// RenewLease extends a node's lease and updates its disks' free space and how far its fills are. A wrong incarnation is
// refused with ErrFenced: another process runs as that node. Until never moves backwards. Disks
// that the node did not register are refused with ErrNotFound.
type RenewLease struct {
	Node        trivet.NodeID `json:"node"`
	Incarnation string        `json:"incarnation"`
	Until       time.Time     `json:"until"`
	Disks       []Disk        `json:"disks"`
	// Fills takes the place of Node.Fills. One of a replica that is not being filled there means nothing.
	Fills []Fill `json:"fills,omitempty"`
}

// CreateVolume adds a volume in PhaseCreating, placed by the proposer. The same name and Request
// again returns the existing volume; another Request gives ErrExists; a used ID gives ErrExists,
// for ever (H35). Claim binds an existing Available volume of that name. A Released volume of that
// name gives ErrExists (it keeps somebody's data), a Recycling one ErrPending. A volume being
// deleted no longer holds its name. An unknown node or disk gives ErrNotFound. The number of replicas
// is the number wanted from then on (SetReplicas); without any, only an existing volume is returned or
// claimed, and ErrNotFound when there is none.
//
// A volume with a Source begins with what its snapshot shows: ErrNotFound when that is unknown, ErrPending while it
// is Creating, ErrInvalid when it is Deleting or Failed, ErrOutOfRange when the volume would be smaller. Each of
// its replicas lies on the disk of a Ready one of the snapshot's volume, else ErrPending: they have moved. It may
// begin with fewer than WantReplicas, which is given then.
type CreateVolume struct {
	// ID, Name, SizeBytes, Reclaim, Params, Labels, Request, Created, Replicas (state Creating), Source (Snapshot)
	Volume Volume `json:"volume"`
	// Claim makes it Bound (not Available) once its replicas are ready: CSI creates for a claim.
	Claim bool `json:"claim,omitempty"`
}

// ReportReplica says what an agent found or did. What it does depends on the state in the catalogue:
//
//	Ready    of Creating, Faulted: it is. The last one of a volume in PhaseCreating makes it Available (or
//	         Bound). Of Filling: it votes and has everything; the one that it replaces becomes Leaving.
//	         Of Joining: ErrInvalid, nobody has made it.
//	Faulted  of Creating, Ready: it is. Of Joining: retired at once. Of Filling: Leaving.
//	Filling  of Joining: it is made, and empty. Of Creating: ErrInvalid.
//	Left     of Leaving: no member of the group any more; it moves to Volume.Retired. Of others: ErrInvalid.
//	Removed  of a retired one: it is forgotten. In PhaseDeleting of any: the last one removes the volume's
//	         record; the ID stays used for ever. In another phase: ErrInvalid.
//
// Everything else is late and without effect: whatever but Removed in PhaseDeleting or of a retired one,
// and Removed or Left of one that is forgotten. Creating is always ErrInvalid, and nothing leads back to
// Joining or Filling: a replica that was made is never made again under its name (H10).
type ReportReplica struct {
	Volume  trivet.VolumeID  `json:"volume"`
	Replica trivet.ReplicaID `json:"replica"`
	State   ReplicaState     `json:"state"`
	Reason  string           `json:"reason,omitempty"`
}

// Attach reserves the next epoch for a node. A MultiNodeReader that joins others is given theirs.
// Refused with ErrInUse (naming the holders) while another node holds the volume, unless all only read by
// MultiNodeReader, or is Detaching; with ErrExists when the same node holds it with other arguments;
// ErrNoSpace beyond the number of readers there may be; ErrInvalid unless the volume is Available or Bound
// (ErrPending while Creating). The same again: no effect, returns the volume as it is. An Available volume
// becomes Bound. ErrPending while the node's own earlier attachment is still Detaching or Leaving.
// A MultiNodeMultiWriter joins one that there is, unless either names another node than the other's; both are given the
// next epoch, and the one that there was keeps its session.
type Attach struct {
	Volume   trivet.VolumeID `json:"volume"`
	Node     trivet.NodeID   `json:"node"` // must be registered
	Mode     AccessMode      `json:"mode"`
	ReadOnly bool            `json:"readOnly,omitempty"` // implied by the modes that only read
	// Epoch is the epoch asked for: one above the Volume.Epoch that the proposer saw. ErrPending
	// when that is no longer the next, so a late copy attaches nothing. 0 = whichever is next.
	Epoch trivet.Epoch `json:"epoch,omitempty"`
	// With names the only other node that may write beside this one, for a MultiNodeMultiWriter; empty: whichever comes.
	With trivet.NodeID `json:"with,omitempty"`
	// IfRevision is what Epoch is for a MultiNodeReader, who may join others without a new epoch: ErrPending
	// when the volume has changed since. 0 = not checked.
	IfRevision Revision `json:"ifRevision,omitempty"`
}

// TakeOver reserves the next epoch for a new process of the node that already holds the volume. A
// MultiNodeReader keeps its epoch, which is the others' too: it has written nothing to be fenced from. The other of two
// writers goes on at the new epoch.
// ErrFenced when the node does not hold it (stop for good), or when Incarnation is given and is not
// the one the node registered. No effect when that process holds the attachment already.
type TakeOver struct {
	Volume      trivet.VolumeID `json:"volume"`
	Node        trivet.NodeID   `json:"node"`
	Incarnation string          `json:"incarnation,omitempty"` // "" = not checked: every copy raises the epoch
}

// Detach ends the attachment of Node (all when empty) and, unless others remain, who all read, reserves an
// epoch that fences it; the other of two writers goes on at that. Not attached or unknown: no effect.
type Detach struct {
	Volume trivet.VolumeID `json:"volume"`
	Node   trivet.NodeID   `json:"node,omitempty"`
	// Epoch names the attachment to end, so a late copy does not end the next one. 0 = any.
	Epoch trivet.Epoch `json:"epoch,omitempty"`
	// IfRevision is what Epoch is for one of several readers, who come and go at one epoch: ErrPending when
	// the volume has changed since. 0 = not checked.
	IfRevision Revision `json:"ifRevision,omitempty"`
	// Forced says that the node did not let go of the volume: for the audit.
	Forced bool `json:"forced,omitempty"`
	// IfLease is the lease of Node that had run out when this was decided, for those who may take a volume from
	// a node only while it is away: ErrPending when the node has renewed it since. Zero = not checked.
	IfLease time.Time `json:"ifLease,omitzero"`
}

// ReportFence says that the volume's own group has committed Epoch as its fence. Older than
// FencedEpoch, or an unknown volume: no effect. Newer than the reserved Epoch: ErrInvalid.
type ReportFence struct {
	Volume trivet.VolumeID `json:"volume"`
	Epoch  trivet.Epoch    `json:"epoch"`
}

// ReportLeader records which replica leads, and clears WantLeader when it is the wanted one.
// ErrNotFound when the volume has no such replica. A Term below the recorded one: no effect.
type ReportLeader struct {
	Volume  trivet.VolumeID  `json:"volume"`
	Replica trivet.ReplicaID `json:"replica"`
	Term    uint64           `json:"term,omitempty"` // Raft term in which it leads; 0 = not compared
}

// WantLeader asks for leadership at a replica of the volume. ErrNotFound when it has none such,
// ErrInvalid when that one is Joining, Filling or Leaving. No effect when it is recorded as leader already.
type WantLeader struct {
	Volume  trivet.VolumeID  `json:"volume"`
	Replica trivet.ReplicaID `json:"replica"`
}

// Release ends the claim: Bound or Available turns into Released and the reclaim policy is applied
// at once (delete: Deleting, recycle: Recycling with a reserved epoch, retain: stays Released).
// Creating becomes Deleting whatever the policy, as it never held data; Failed becomes Deleting or,
// with another policy than delete, Released for an operator to judge. ErrInUse (naming the node)
// while attached or Detaching. Already Released, Deleting, Recycling or unknown: no effect.
// Discard overrides the policy with delete (`trivet volume delete`), also for what is Released or
// Recycling. Where ParamReclaimWipe says so, Deleting comes after Recycling, unless SkipWipe.
type Release struct {
	Volume  trivet.VolumeID `json:"volume"`
	Discard bool            `json:"discard,omitempty"`
	// SkipWipe deletes without the wipe that ParamReclaimWipe asks for: its group may never do it.
	SkipWipe bool `json:"skipWipe,omitempty"`
	// IfRevision is the Volume.Revision that this was decided on; ErrPending when the volume has
	// changed since. 0 = whatever it is now.
	IfRevision Revision `json:"ifRevision,omitempty"`
}

// Reclaim applies a policy to a Released (or Failed) volume by hand: delete, recycle (wipe, then
// Available), or retain (Available again with its data). ErrInUse while attached; ErrInvalid in
// another phase, or when a replica that recycle or retain needs was never made or is removed.
type Reclaim struct {
	Volume     trivet.VolumeID `json:"volume"`
	Policy     ReclaimPolicy   `json:"policy"`
	IfRevision Revision        `json:"ifRevision,omitempty"` // as in Release
}

// ReportWiped says that the leader's agent fenced at Epoch and wiped a Recycling volume; it becomes
// Available, and keeps its name. Epoch is the one that the recycling reserved (Volume.Epoch while
// Recycling): a late report of an earlier wipe must not pass for this one, or data would leak to
// the next owner (S13). Any other epoch or phase: no effect.
type ReportWiped struct {
	Volume trivet.VolumeID `json:"volume"`
	Epoch  trivet.Epoch    `json:"epoch"` // must be set
}

// Fail moves a volume to PhaseFailed with a reason. An attachment stays. A volume being deleted does
// not fail (ErrInvalid): its removal only waits.
type Fail struct {
	Volume trivet.VolumeID `json:"volume"`
	Reason string          `json:"reason"`
}

// AddReplica adds a replica in state Joining. Refused with ErrPending when the volume has changed since
// IfRevision, while another replica of it is Joining, Filling or Leaving (never two changes at once, I11),
// or while it is Creating; with ErrInvalid in another phase than Available, Bound or Released, on a
// cordoned node, or when it replaces one that is neither Ready nor Faulted; with ErrExists on a node that
// has a live replica already, except that a Faulted one may be replaced on its own node; with ErrNotFound
// for an unknown volume, node, disk or replaced replica. The same replica again: no effect.
type AddReplica struct {
	Volume  trivet.VolumeID `json:"volume"`
	Replica Replica         `json:"replica"` // ID, Node, Disk, Replaces; State and Reason must be empty
	// IfRevision is the Volume.Revision that this was decided on. It must be set: a late copy would make
	// a replica again that has come and gone (H10).
	IfRevision Revision `json:"ifRevision"`
}

// RemoveReplica takes a replica out of its volume: Leaving until its group has let it go, then retired.
// A Joining one, which is no member yet, is retired at once. ErrPending and phases as for AddReplica, but
// a replica that is Joining or Filling may itself be removed, which gives that change up. ErrInvalid when
// it is the last Ready one, or when those that remain would not have a majority of Ready ones on disks that
// are there. No effect when it is Leaving or retired; ErrNotFound when the volume has no such replica.
type RemoveReplica struct {
	Volume     trivet.VolumeID  `json:"volume"`
	Replica    trivet.ReplicaID `json:"replica"`
	IfRevision Revision         `json:"ifRevision,omitempty"` // as in Release
}

// SetReplicas says how many Ready replicas a volume should have: 1, 3 or 5. What is missing or too many
// is added or removed one by one, by whoever looks after the cluster. ErrInvalid while it is Deleting.
type SetReplicas struct {
	Volume trivet.VolumeID `json:"volume"`
	Count  int             `json:"count"`
}

// CordonNode says whether a node may get new replicas (Cordoned) and whether those it has should move
// elsewhere (Draining, which implies Cordoned). Both false: an ordinary node. ErrNotFound.
type CordonNode struct {
	Node     trivet.NodeID `json:"node"`
	Cordoned bool          `json:"cordoned"`
	Draining bool          `json:"draining,omitempty"`
}

// PlaceNode says in which zone and rack a node stands, from then on and whatever it says of itself when it registers
// again: someone moved the machine, or gave it another label, without its restart. Replicas stay where they are.
// ErrNotFound. Nothing that is not so already: no effect.
type PlaceNode struct {
	Node trivet.NodeID `json:"node"`
	// Zone and Rack, "" for none; nil: as it is.
	Zone *string `json:"zone,omitempty"`
	Rack *string `json:"rack,omitempty"`
	// Own has the node say both itself again: it registers anew. Neither Zone nor Rack then.
	Own bool `json:"own,omitempty"`
}

// SetParams changes parameters of a volume, all of them or none. Which keys there are and which may change is
// for the proposer to know; here they are text. What the volume was created with stays its Request: a create
// that is repeated still finds it. ErrInvalid while it is Deleting, and when it would have too many;
// ErrPending as in Release. Nothing that is not so already: no effect.
type SetParams struct {
	Volume     trivet.VolumeID   `json:"volume"`
	Params     map[string]string `json:"params"`               // canonical; an empty value removes the key
	IfRevision Revision          `json:"ifRevision,omitempty"` // as in Release
	// Replicas is that of SetReplicas, in the same step: 1, 3 or 5; 0 = as many as before.
	Replicas int `json:"replicas,omitempty"`
}

// SetLabels gives a volume labels and takes others away. Their syntax is for the proposer to know; here they are text,
// and the empty text is a value. ErrInvalid when it would have too many; ErrPending as in Release. Nothing that is not
// so already: no effect.
type SetLabels struct {
	Volume     trivet.VolumeID   `json:"volume"`
	Labels     map[string]string `json:"labels,omitempty"`
	Remove     []string          `json:"remove,omitempty"`     // keys; none of Labels
	IfRevision Revision          `json:"ifRevision,omitempty"` // as in Release
}

// ForgetNode takes a node that does not come back off the record. Its retired replicas, and what it had of volumes
// that are being deleted, are no longer waited for; its disks belong to nobody. Its name is remembered: a late
// registration, of a process that is still somewhere or of its certificate, is refused with ErrFenced until
// Allow. Refused with ErrInUse while its lease has not run out at Time, while a volume is attached to it or
// being detached from it, and while a volume that is not being deleted has a replica there that is not retired;
// ErrNotFound for an unknown node. Forgotten already: no effect.
type ForgetNode struct {
	Node trivet.NodeID `json:"node"`
	Time time.Time     `json:"time"` // of the proposer
	// Allow lets the name register again, as a new node. No effect when it is not forgotten.
	Allow bool `json:"allow,omitempty"`
}

// GrowVolume says how large a volume should be; its leader commits that in its group. ErrOutOfRange when it is, or is
// about to be, larger: nothing shrinks. The same size again: no effect. ErrPending while it is Creating and as in
// Release; ErrInvalid in another phase than Available, Bound or Released.
type GrowVolume struct {
	Volume     trivet.VolumeID `json:"volume"`
	SizeBytes  int64           `json:"sizeBytes"`            // whole blocks
	IfRevision Revision        `json:"ifRevision,omitempty"` // as in Release
}

// ReportSize says that the volume's own group has committed a size, whoever asked for it. Not above the recorded
// size, or an unknown volume: no effect.
type ReportSize struct {
	Volume    trivet.VolumeID `json:"volume"`
	SizeBytes int64           `json:"sizeBytes"`
}

// RecoverVolume makes one replica the only one of a volume, and gives up all others, for an operator who knows that
// a majority is lost for good (H34). An attachment ends, and another epoch is reserved. ErrPending when the volume has
// changed since IfRevision; ErrNotFound without such a replica; ErrInvalid when that is not Ready or Leaving, when it
// is the only one, or while the volume is Creating or Deleting. The same replica again, until it is reported: no
// effect.
type RecoverVolume struct {
	Volume     trivet.VolumeID  `json:"volume"`
	Replica    trivet.ReplicaID `json:"replica"`
	IfRevision Revision         `json:"ifRevision"`
	Detail     string           `json:"detail,omitempty"` // for the audit
}

// RecoverCatalogue says that the members of the meta group but those that are Kept were given up, by an operator who
// knows that a majority is lost for good (H34). Their nodes' members are struck from the record, so that nothing they
// say is taken for a member's. It is the first command of the member on Node that was made the only voter.
type RecoverCatalogue struct {
	Node   trivet.NodeID      `json:"node"`
	Kept   []trivet.ReplicaID `json:"kept"`             // members of the group now, the survivor among them
	Detail string             `json:"detail,omitempty"` // for the audit
}

// ReportRecovered says that the replica is the only voter of the volume's group now. Not asked for: no effect.
type ReportRecovered struct {
	Volume  trivet.VolumeID  `json:"volume"`
	Replica trivet.ReplicaID `json:"replica"`
}

// Result is what applying a command returned on every member alike.
type Result struct {
	Revision Revision
	Volume   *Volume        // the volume after the command, for commands about one; nil when it is gone, or on Err
	Node     *Node          // for commands about a node
	Snapshot *Snapshot      // for commands about a snapshot; nil when it is gone
	Group    *SnapshotGroup // for commands about a group of them; nil when it is gone
	Err      error          // wraps a sentinel; the state is then unchanged
}
