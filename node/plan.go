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

	doJoin    verb = "join"    // make an empty replica of a group that there is, then report it Filling
	doLearner verb = "learner" // add target to the group, without a vote
	doPromote verb = "promote" // give target a vote once it has everything, then report it Ready
	doShrink  verb = "shrink"  // take target out of the group, then report it Left
	doEvict   verb = "evict"   // take a learner out of the group that the catalogue does not know
	doRetire  verb = "retire"  // remove what has left the group, then report it Removed

	doFreeze verb = "freeze"        // make snapshot in the group, then report it Ready
	doDrop   verb = "drop-snapshot" // have the group forget snapshot, then report it Removed
	doBack   verb = "roll-back"     // have the group show snapshot again, then report it
	doFlat   verb = "flattened"     // report that it needs no blocks of another volume any more

	doRecover verb = "recover" // make it the only voter of its group, then report it

	doGrow verb = "grow" // commit the size in the group, then report it
)

// action is one step towards what the catalogue wants.
type action struct {
	verb   verb
	disk   trivet.DiskID
	id     trivet.ReplicaID
	target trivet.ReplicaID // of doMove and of changes of the group
	epoch  trivet.Epoch     // of doFence and doWipe

	writers replication.Writers // of doFence; zero: one, whose session begins with epoch
	term    uint64              // of doLead
	reason  string              // of doFault

	snapshot  trivet.SnapshotID
	sizeBytes int64 // of doGrow
}

// placed is a replica found on a disk.
type placed struct {
	disk trivet.DiskID
	id   trivet.ReplicaID
}

// local is what the machine has of one volume.
type local struct {
	disks   map[trivet.DiskID]bool      // the node's disks
	onDisk  []placed                    // replicas of the volume on them
	ignored map[placed]bool             // strays that were looked at and left alone
	awake   bool                        // replicas run whether anybody needs them or not
	lost    map[placed]bool             // leaving replicas whose data is gone
	avoid   map[trivet.NodeID]bool      // nodes that should not lead: cordoned, or not alive
	damage  map[trivet.ReplicaID]string // replicas that damage on their disk has touched, and why
	running bool
	status  replication.ReplicaStatus // when running, of whichever replica of the volume does

	copies copies
}

// plan says what this node has to do now for a volume, in order. v is nil when the catalogue does
// not know the volume. It is pure: no clock, no I/O. It is asked again after every change and after
// every attempt, until it returns nothing.
func plan(node trivet.NodeID, v *meta.Volume, l local) []action {
	if v == nil {
		return planStrays(l, nil)
	}
	var acts []action
	known := make(map[trivet.ReplicaID]bool)
	for _, r := range v.Retired {
		if r.Node == node {
			known[r.ID] = true
			switch {
			case l.disks[r.Disk]:
				acts = append(acts, action{verb: doRetire, disk: r.Disk, id: r.ID})
			case v.Phase == meta.PhaseDeleting: // as of any other: should the disk come back, it is a stray
				acts = append(acts, action{verb: doRemoved, disk: r.Disk, id: r.ID})
			}
		}
	}
	for i := range v.Replicas {
		if r := &v.Replicas[i]; r.Node == node {
			known[r.ID] = true
			acts = append(acts, planOwn(v, r, l)...)
		}
	}
	return append(acts, planStrays(l, known)...)
}

// concerns reports whether a volume is any business of node's, which has these disks.
func concerns(node trivet.NodeID, disks map[trivet.DiskID]bool, v *meta.Volume) bool {
	return v.ReplicaOn(node) != nil || slices.ContainsFunc(v.Retired, func(r meta.Replica) bool {
		return r.Node == node && (disks[r.Disk] || v.Phase == meta.PhaseDeleting)
	})
}

// planStrays asks for a look at every replica on disk that is not known to belong here. Nothing is ever
// removed on the strength of the local copy of the catalogue: it may lag behind (H35).
func planStrays(l local, known map[trivet.ReplicaID]bool) []action {
	var acts []action
	for _, p := range l.onDisk {
		if !known[p.id] && !l.ignored[p] {
			acts = append(acts, action{verb: doStray, disk: p.disk, id: p.id})
		}
	}
	return acts
}

// planOwn is the work for one of the volume's replicas on this node. Only the latest runs here: one
// before it is Faulted, or on its way out, and has its successor in it (meta.Volume.ReplicaOn).
func planOwn(v *meta.Volume, r *meta.Replica, l local) []action {
	latest := v.ReplicaOn(r.Node).ID == r.ID
	if l.copies.flat[r.ID] {
		return []action{{verb: doFlat, disk: r.Disk, id: r.ID}}
	}
	switch other := l.status.Replica; {
	case !latest && v.Phase != meta.PhaseDeleting:
		return nil
	case l.running && latest && other != r.ID && v.Phase != meta.PhaseDeleting:
		l.running = false
		return append([]action{{verb: doPark, id: other}}, planReplica(v, r, l)...)
	}
	return planReplica(v, r, l)
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
		if present && strings.HasPrefix(r.Reason, meta.ReasonDiskAbsent) {
			return one(doRevive)
		}
		switch { // one that was touched by damage runs on (damage.go)
		case l.running && !l.awake && restful(v):
			return one(doPark)
		case l.running && l.status.IsLeader:
			return planLeader(v, r, l)
		}
		return nil
	case v.Recover == r.ID && present:
		return one(doRecover)
	case r.State == meta.ReplicaLeaving && (!present || l.lost[placed{r.Disk, r.ID}]):
		return nil // it goes; nobody needs to be told that it is gone
	case !present:
		return []action{{verb: doFault, disk: r.Disk, id: r.ID, reason: meta.ReasonDiskAbsent + string(r.Disk)}}
	case l.damage[r.ID] != "" && r.State != meta.ReplicaLeaving:
		return []action{{verb: doFault, disk: r.Disk, id: r.ID, reason: l.damage[r.ID]}}
	case r.State == meta.ReplicaCreating && v.Phase == meta.PhaseCreating:
		return one(doCreate)
	case r.State == meta.ReplicaCreating:
		return nil
	case r.State == meta.ReplicaJoining:
		return one(doJoin)
	case !l.awake && restful(v) && l.running:
		return one(doPark)
	case !l.awake && restful(v) && slices.Contains(l.onDisk, placed{r.Disk, r.ID}):
		return nil
	case !l.running:
		return one(doOpen) // which finds out if its data is not there
	case l.status.IsLeader:
		return planLeader(v, r, l)
	}
	return nil
}

// restful reports whether nobody needs the volume's group: it is attached nowhere, nobody waits for a
// fence, a wipe or another leader, neither its members nor its size change, and no scrub is under way. Every node comes
// to the same answer by itself.
func restful(v *meta.Volume) bool {
	switch v.Phase {
	case meta.PhaseAvailable, meta.PhaseBound, meta.PhaseReleased, meta.PhaseKept:
		return v.Holder() == "" && v.FencedEpoch >= v.Epoch && v.WantLeader == "" &&
			v.Change() == nil && !v.Growing() && v.Recover == "" && !v.Scrubbing()
	default:
		return false
	}
}

// planLeader is the work of the node whose replica leads the volume's group.
func planLeader(v *meta.Volume, r *meta.Replica, l local) []action {
	var acts []action
	st := l.status
	if v.FencedEpoch < v.Epoch {
		acts = append(acts, action{verb: doFence, disk: r.Disk, id: r.ID, epoch: v.Epoch, writers: writersOf(v)})
	}
	acts = append(acts, planSnapshots(v, r, l)...)
	if v.Phase == meta.PhaseRecycling {
		acts = append(acts, action{verb: doWipe, disk: r.Disk, id: r.ID, epoch: v.Epoch})
	}
	acts = append(acts, planSize(v, r, l)...)
	if v.Phase == meta.PhaseRestoring {
		acts = append(acts, action{verb: doBack, disk: r.Disk, id: r.ID, epoch: v.Epoch, snapshot: v.Rollback.Snapshot})
	}
	if st.Term >= v.LeaderTerm && (v.Leader != r.ID || v.WantLeader == r.ID) {
		acts = append(acts, action{verb: doLead, disk: r.Disk, id: r.ID, term: st.Term})
	}
	if to := heir(v, r, l); to != "" {
		acts = append(acts, action{verb: doMove, disk: r.Disk, id: r.ID, target: to})
	}
	return append(acts, planMembers(v, r, st)...)
}

// heir returns to which replica r has to pass leadership, "" to none. Where it is wanted, if that can lead; a
// leader that is leaving or faulted passes it on in any case, to the one that has most of the log, and to one on a
// node that should not lead only if there is no other.
func heir(v *meta.Volume, r *meta.Replica, l local) trivet.ReplicaID {
	switch {
	case v.WantLeader != r.ID && canLead(v, l.status, v.WantLeader):
		return v.WantLeader
	case r.State != meta.ReplicaLeaving && r.State != meta.ReplicaFaulted:
		return ""
	}
	var best *meta.Replica
	for i := range v.Replicas {
		q := &v.Replicas[i]
		if q.ID == r.ID || !canLead(v, l.status, q.ID) {
			continue
		}
		switch {
		case best == nil, l.avoid[best.Node] && !l.avoid[q.Node]:
			best = q
		case l.avoid[best.Node] == l.avoid[q.Node] && l.status.Match[q.ID] > l.status.Match[best.ID]:
			best = q
		}
	}
	if best == nil {
		return ""
	}
	return best.ID
}

// planMembers is how the leader brings the group's configuration in line with the catalogue. It comes last: a
// change may have to wait, and what is before it must not.
func planMembers(v *meta.Volume, r *meta.Replica, st replication.ReplicaStatus) []action {
	var acts []action
	do := func(do verb, target trivet.ReplicaID) {
		acts = append(acts, action{verb: do, disk: r.Disk, id: r.ID, target: target})
	}
	for i := range v.Replicas {
		q := &v.Replicas[i]
		_, member := st.Member(q.ID)
		switch {
		case q.State == meta.ReplicaFilling && !member:
			do(doLearner, q.ID)
		case q.State == meta.ReplicaFilling:
			do(doPromote, q.ID) // a voter already is success
		case q.State == meta.ReplicaLeaving && q.ID != r.ID:
			do(doShrink, q.ID) // no member any more is success
		}
	}
	for _, m := range st.Members { // of a change that was given up while a leader was making it
		if m.Learner && v.Replica(m.Replica) == nil {
			do(doEvict, m.Replica)
		}
	}
	return acts
}

// canLead reports whether id is a ready replica and a voter of the group.
func canLead(v *meta.Volume, st replication.ReplicaStatus, id trivet.ReplicaID) bool {
	if r := v.Replica(id); r == nil || r.State != meta.ReplicaReady {
		return false
	}
	m, ok := st.Member(id)
	return ok && !m.Learner
}

// membersOf returns the group's initial configuration: every replica in the catalogue's order, which
// is the same on every node while the volume is being created, and must not be used later.
func membersOf(v *meta.Volume) []raftgroup.Member {
	members := make([]raftgroup.Member, len(v.Replicas))
	for i, r := range v.Replicas {
		members[i] = raftgroup.Member{Replica: r.ID, Node: r.Node}
	}
	return members
}

// mayLead returns the replicas at which the leader can be found: all but those that nobody has made yet. A
// Filling one may have its vote already, and a Leaving or Faulted one have it still.
func mayLead(v *meta.Volume) []raftgroup.Member {
	var members []raftgroup.Member
	for _, r := range v.Replicas {
		if r.State != meta.ReplicaJoining && r.State != meta.ReplicaRemoved {
			members = append(members, raftgroup.Member{Replica: r.ID, Node: r.Node})
		}
	}
	return members
}
