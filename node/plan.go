package node

import (
	"slices"
	"strings"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller/meta"
	"github.com/trivet-csi/trivet/replication"
	"github.com/trivet-csi/trivet/replication/raftgroup"
)

// verb is what an action does.
type verb string

// The verbs. Each is idempotent, so that an action interrupted at any point is simply done again.
const (
	doCreate  verb = "create"      // make the replica, then report it Ready
	doOpen    verb = "open"        // start it; report it Faulted if its data is not there
	doFault   verb = "fault"       // report it Faulted for the reason given
	doDestroy verb = "destroy"     // remove it, then report it Removed
	doRemoved verb = "removed"     // report it Removed: there is nothing to remove
	doStray   verb = "stray"       // found on disk but not in the catalogue: find out why
	doFence   verb = "fence"       // commit the epoch in the group, then report it
	doWipe    verb = "wipe"        // discard the content at the epoch, then report it
	doLead    verb = "report-lead" // say that this replica leads
	doMove    verb = "move-leader" // transfer leadership to target
	doRevive  verb = "revive"      // start a replica whose disk is back, then report it Ready
	doPark    verb = "park"        // stop it until somebody needs the volume
)

// reasonDiskAbsent is the reason under which a replica is reported Faulted because its disk is not
// among those of the node. It is the one fault that heals by itself: when the disk is back, the
// replica's log and data are what they were.
const reasonDiskAbsent = "disk is not on the node: "

// action is one step towards what the catalogue wants.
type action struct {
	verb   verb
	disk   trivet.DiskID
	id     trivet.ReplicaID
	target trivet.ReplicaID // of doMove
	epoch  trivet.Epoch     // of doFence and doWipe
	term   uint64           // of doLead
	reason string           // of doFault
}

// placed is a replica found on a disk.
type placed struct {
	disk trivet.DiskID
	id   trivet.ReplicaID
}

// local is what the machine has of one volume.
type local struct {
	disks   map[trivet.DiskID]bool // the node's disks
	onDisk  []placed               // replicas of the volume on them
	ignored map[placed]bool        // strays that were looked at and left alone
	awake   bool                   // replicas run whether anybody needs them or not
	running bool
	status  replication.ReplicaStatus // when running
}

// plan says what this node has to do now for a volume, in order. v is nil when the catalogue does
// not know the volume. It is pure: no clock, no I/O. It is asked again after every change and after
// every attempt, until it returns nothing.
func plan(node trivet.NodeID, v *meta.Volume, l local) []action {
	if v == nil {
		return planStrays(l, "")
	}
	r := v.ReplicaOn(node)
	if r == nil {
		return planStrays(l, "")
	}
	return append(planReplica(v, r, l), planStrays(l, r.ID)...)
}

// planStrays asks for a look at every replica on disk but the wanted one. Nothing is ever removed on
// the strength of the local copy of the catalogue: it may lag behind (H35).
func planStrays(l local, wanted trivet.ReplicaID) []action {
	var acts []action
	for _, p := range l.onDisk {
		if p.id != wanted && !l.ignored[p] {
			acts = append(acts, action{verb: doStray, disk: p.disk, id: p.id})
		}
	}
	return acts
}

func planReplica(v *meta.Volume, r *meta.Replica, l local) []action {
	one := func(do verb) []action { return []action{{verb: do, disk: r.Disk, id: r.ID}} }
	present := l.disks[r.Disk]
	switch {
	case r.State == meta.ReplicaRemoved:
		return nil
	case v.Phase == meta.PhaseDeleting && present:
		return one(doDestroy)
	case v.Phase == meta.PhaseDeleting:
		return one(doRemoved) // should the disk come back, its replica is a stray
	case r.State == meta.ReplicaFaulted:
		if present && strings.HasPrefix(r.Reason, reasonDiskAbsent) {
			return one(doRevive)
		}
		return nil
	case !present:
		return []action{{verb: doFault, disk: r.Disk, id: r.ID, reason: reasonDiskAbsent + string(r.Disk)}}
	case r.State == meta.ReplicaCreating && v.Phase == meta.PhaseCreating:
		return one(doCreate)
	case r.State == meta.ReplicaCreating:
		return nil
	case !l.awake && restful(v) && l.running:
		return one(doPark)
	case !l.awake && restful(v) && slices.Contains(l.onDisk, placed{r.Disk, r.ID}):
		return nil
	case !l.running:
		return one(doOpen) // which finds out if its data is not there
	case l.status.IsLeader:
		return planLeader(v, r, l.status)
	}
	return nil
}

// restful reports whether nobody needs the volume's group: it is attached nowhere, nobody waits for a
// fence, a wipe or another leader. Every node comes to the same answer by itself.
func restful(v *meta.Volume) bool {
	switch v.Phase {
	case meta.PhaseAvailable, meta.PhaseBound, meta.PhaseReleased:
		return v.Holder() == "" && v.FencedEpoch >= v.Epoch && v.WantLeader == ""
	default:
		return false
	}
}

// planLeader is the work of the node whose replica leads the volume's group.
func planLeader(v *meta.Volume, r *meta.Replica, st replication.ReplicaStatus) []action {
	var acts []action
	if v.FencedEpoch < v.Epoch {
		acts = append(acts, action{verb: doFence, disk: r.Disk, id: r.ID, epoch: v.Epoch})
	}
	if v.Phase == meta.PhaseRecycling {
		acts = append(acts, action{verb: doWipe, disk: r.Disk, id: r.ID, epoch: v.Epoch})
	}
	if st.Term >= v.LeaderTerm && (v.Leader != r.ID || v.WantLeader == r.ID) {
		acts = append(acts, action{verb: doLead, disk: r.Disk, id: r.ID, term: st.Term})
	}
	if v.WantLeader != r.ID && canLead(v, st, v.WantLeader) {
		acts = append(acts, action{verb: doMove, disk: r.Disk, id: r.ID, target: v.WantLeader})
	}
	return acts
}

// canLead reports whether id is a ready replica and a voter of the group.
func canLead(v *meta.Volume, st replication.ReplicaStatus, id trivet.ReplicaID) bool {
	if r := v.Replica(id); r == nil || r.State != meta.ReplicaReady {
		return false
	}
	return slices.ContainsFunc(st.Members, func(m raftgroup.Member) bool { return m.Replica == id && !m.Learner })
}

// membersOf returns the group's initial configuration: every replica in the catalogue's order, which
// is the same on every node.
func membersOf(v *meta.Volume) []raftgroup.Member {
	members := make([]raftgroup.Member, len(v.Replicas))
	for i, r := range v.Replicas {
		members[i] = raftgroup.Member{Replica: r.ID, Node: r.Node}
	}
	return members
}
