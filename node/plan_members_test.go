package node

import (
	"testing"

	"github.com/stretchr/testify/assert"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller/meta"
	"github.com/trivet-csi/trivet/replication/raftgroup"
)

// TestPlanOwnReplica: what a node does with a replica of its own that comes or goes.
func TestPlanOwnReplica(t *testing.T) {
	t.Parallel()
	ours := func(do verb, id trivet.ReplicaID) []action { return []action{{verb: do, disk: "d1", id: id}} }
	with := func(s meta.ReplicaState, edit func(*meta.Volume)) *meta.Volume {
		return planVolume(func(v *meta.Volume) {
			v.Replicas[0].State = s
			if edit != nil {
				edit(v)
			}
		})
	}
	faultedAnd := func(disk trivet.DiskID, s meta.ReplicaState) *meta.Volume {
		return with(meta.ReplicaFaulted, func(v *meta.Volume) {
			v.Replicas[0].Reason = meta.ReasonDiskAbsent + "d1"
			v.Replicas = append(v.Replicas, meta.Replica{ID: "r4", Node: "n1", Disk: disk, State: s, Replaces: "r1"})
		})
	}
	retired := func(phase meta.Phase) *meta.Volume {
		return planVolume(func(v *meta.Volume) {
			v.Phase, v.Replicas = phase, v.Replicas[1:]
			v.Retired = []meta.Replica{{ID: "r1", Node: "n1", Disk: "d1", State: meta.ReplicaLeft}}
		})
	}
	here := notRunning(placed{"d1", "r1"})
	noDisk := local{disks: map[trivet.DiskID]bool{"d9": true}}
	both := local{disks: map[trivet.DiskID]bool{"d1": true, "d2": true}, onDisk: []placed{{"d1", "r1"}}}
	oldRuns := running(false)
	oldRuns.disks["d2"] = true
	gone := notRunning()
	gone.lost = map[placed]bool{{"d1", "r1"}: true}
	for _, tt := range []struct {
		name string
		v    *meta.Volume
		l    local
		want []action
	}{
		{"make what joins", with(meta.ReplicaJoining, nil), notRunning(), ours(doJoin, "r1")},
		{"half made", with(meta.ReplicaJoining, nil), here, ours(doJoin, "r1")},
		{
			"nowhere to make it", with(meta.ReplicaJoining, nil), noDisk,
			[]action{{verb: doFault, disk: "d1", id: "r1", reason: meta.ReasonDiskAbsent + "d1"}},
		},
		{"joins a volume that goes", with(meta.ReplicaJoining, func(v *meta.Volume) {
			v.Phase = meta.PhaseDeleting
		}), notRunning(), ours(doDestroy, "r1")},
		{"start what is to be filled", with(meta.ReplicaFilling, nil), here, ours(doOpen, "r1")},
		{"it is being filled", with(meta.ReplicaFilling, nil), running(false), nil},
		{"the leaving one is needed until it has left", with(meta.ReplicaLeaving, nil), here, ours(doOpen, "r1")},
		{"the leaving one runs", with(meta.ReplicaLeaving, nil), running(false), nil},
		{"the leaving one is gone with its disk", with(meta.ReplicaLeaving, nil), noDisk, nil},
		{"the leaving one has no data", with(meta.ReplicaLeaving, nil), gone, nil},
		{"retired", retired(meta.PhaseBound), here, ours(doRetire, "r1")},
		{"retired, and nothing is there", retired(meta.PhaseBound), notRunning(), ours(doRetire, "r1")},
		{"retired with its disk away", retired(meta.PhaseBound), noDisk, nil},
		{"retired of a volume that goes, disk away", retired(meta.PhaseDeleting), noDisk, ours(doRemoved, "r1")},
		{"the successor takes the disk", faultedAnd("d1", meta.ReplicaJoining), here, ours(doJoin, "r4")},
		{
			"the disk of the faulted one is back, but its successor is there", faultedAnd("d2", meta.ReplicaFilling), both,
			[]action{{verb: doOpen, disk: "d2", id: "r4"}},
		},
		{
			"the faulted one still runs", faultedAnd("d2", meta.ReplicaJoining), oldRuns,
			[]action{{verb: doPark, id: "r1"}, {verb: doJoin, disk: "d2", id: "r4"}},
		},
		{
			"both go with the volume", with(meta.ReplicaFaulted, func(v *meta.Volume) {
				v.Replicas = append(v.Replicas, meta.Replica{ID: "r4", Node: "n1", Disk: "d2", State: meta.ReplicaFilling})
				v.Phase = meta.PhaseDeleting
			}), both, append(ours(doDestroy, "r1"), action{verb: doDestroy, disk: "d2", id: "r4"}),
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			assert.Equal(t, tt.want, plan("n1", tt.v, tt.l))
		})
	}
}

// TestPlanMembers: what the leader does with replicas that come or go, and only the leader.
func TestPlanMembers(t *testing.T) {
	t.Parallel()
	do := func(do verb, target trivet.ReplicaID) []action {
		return []action{{verb: do, disk: "d1", id: "r1", target: target}}
	}
	state := func(i int, s meta.ReplicaState) func(*meta.Volume) {
		return func(v *meta.Volume) { v.Replicas[i].State = s }
	}
	for _, tt := range []struct {
		name string
		edit func(*meta.Volume)
		st   func(*local)
		want []action
	}{
		{"one that is being made", func(v *meta.Volume) {
			v.Replicas = append(v.Replicas, meta.Replica{ID: "r4", Node: "n4", Disk: "d4", State: meta.ReplicaJoining})
		}, nil, nil},
		{"one that is made", func(v *meta.Volume) {
			v.Replicas = append(v.Replicas, meta.Replica{ID: "r4", Node: "n4", Disk: "d4", State: meta.ReplicaFilling})
		}, nil, do(doLearner, "r4")},
		{"a learner", state(2, meta.ReplicaFilling), nil, do(doPromote, "r3")},
		{"one that votes, unreported", state(1, meta.ReplicaFilling), nil, do(doPromote, "r2")},
		{"one that leaves", state(1, meta.ReplicaLeaving), nil, do(doShrink, "r2")},
		{"one that has left, unreported", func(v *meta.Volume) {
			v.Replicas = append(v.Replicas, meta.Replica{ID: "r4", Node: "n4", Disk: "d4", State: meta.ReplicaLeaving})
		}, nil, do(doShrink, "r4")},
		{"a learner that nobody knows", func(v *meta.Volume) { v.Replicas = v.Replicas[:2] }, nil, do(doEvict, "r3")},
		{"a voter that nobody knows stays", func(v *meta.Volume) {
			v.Replicas = []meta.Replica{v.Replicas[0], v.Replicas[2]}
		}, nil, nil},
		{"it leaves itself", state(0, meta.ReplicaLeaving), nil, do(doMove, "r2")},
		{"it leaves itself, and leadership is wanted here", func(v *meta.Volume) {
			v.WantLeader, v.Replicas[0].State = "r1", meta.ReplicaLeaving
		}, nil, append([]action{{verb: doLead, disk: "d1", id: "r1", term: 3}}, do(doMove, "r2")...)},
		{"it leaves itself, and nobody can lead", func(v *meta.Volume) {
			v.Replicas[0].State, v.Replicas[1].State = meta.ReplicaLeaving, meta.ReplicaFaulted
		}, nil, nil},
		{"it leaves itself: the one that has most", state(0, meta.ReplicaLeaving), func(l *local) {
			l.status.Members[2].Learner = false
			l.status.Match = map[trivet.ReplicaID]uint64{"r2": 8, "r3": 9}
		}, do(doMove, "r3")},
		{"it leaves itself: but not to a cordoned node", state(0, meta.ReplicaLeaving), func(l *local) {
			l.status.Members[2].Learner = false
			l.status.Match = map[trivet.ReplicaID]uint64{"r2": 8, "r3": 9}
			l.avoid = map[trivet.NodeID]bool{"n3": true}
		}, do(doMove, "r2")},
		{"it leaves itself: past a cordoned node", state(0, meta.ReplicaLeaving), func(l *local) {
			l.status.Members[2].Learner = false
			l.status.Match = map[trivet.ReplicaID]uint64{"r2": 9, "r3": 8}
			l.avoid = map[trivet.NodeID]bool{"n2": true}
		}, do(doMove, "r3")},
		{"it leaves itself: to a cordoned node if there is no other", state(0, meta.ReplicaLeaving), func(l *local) {
			l.avoid = map[trivet.NodeID]bool{"n2": true, "n3": true}
		}, do(doMove, "r2")},
		{"it leaves itself: to where leadership is wanted", func(v *meta.Volume) {
			v.WantLeader, v.Replicas[0].State = "r3", meta.ReplicaLeaving
		}, func(l *local) {
			l.status.Members[2].Learner = false
			l.status.Match = map[trivet.ReplicaID]uint64{"r2": 9, "r3": 8}
		}, do(doMove, "r3")},
		{"nothing moves to one that leaves", func(v *meta.Volume) {
			v.WantLeader, v.Replicas[1].State = "r2", meta.ReplicaLeaving
		}, nil, do(doShrink, "r2")},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			l := running(true)
			if tt.st != nil {
				tt.st(&l)
			}
			assert.Equal(t, tt.want, plan("n1", planVolume(tt.edit), l))
			l.status.IsLeader = false
			assert.Empty(t, plan("n1", planVolume(tt.edit), l), "a follower does none of this")
		})
	}
}

// TestPlanWakesForChanges: no replica sleeps while members change, on whichever node.
func TestPlanWakesForChanges(t *testing.T) {
	t.Parallel()
	for _, s := range []meta.ReplicaState{meta.ReplicaJoining, meta.ReplicaFilling, meta.ReplicaLeaving} {
		v := planVolume(func(v *meta.Volume) {
			v.Attached, v.Epoch, v.FencedEpoch, v.Replicas[1].State = nil, 4, 4, s
		})
		assert.Equal(t, []action{{verb: doOpen, disk: "d1", id: "r1"}}, plan("n1", v, notRunning(placed{"d1", "r1"})), s)
		assert.Empty(t, plan("n1", v, running(false)), s)
	}
}

// A volume is reached wherever its leader may be.
func TestMayLead(t *testing.T) {
	t.Parallel()
	v := planVolume(func(v *meta.Volume) {
		v.Replicas[0].State, v.Replicas[1].State = meta.ReplicaLeaving, meta.ReplicaFilling
		v.Replicas = append(v.Replicas, meta.Replica{ID: "r4", Node: "n4", State: meta.ReplicaJoining})
	})
	assert.Equal(t, []raftgroup.Member{
		{Replica: "r1", Node: "n1"}, {Replica: "r2", Node: "n2"}, {Replica: "r3", Node: "n3"},
	}, mayLead(v))
}
