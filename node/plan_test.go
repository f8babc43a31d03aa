package node

import (
	"testing"

	"github.com/stretchr/testify/assert"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller/meta"
	"github.com/trivet-csi/trivet/replication"
	"github.com/trivet-csi/trivet/replication/raftgroup"
)

// planVolume has a replica on each of n1, n2 and n3, of which n1 is ours: r1 on disk d1.
func planVolume(edit func(*meta.Volume)) *meta.Volume {
	v := &meta.Volume{
		ID: 7, SizeBytes: 1 << 20, Phase: meta.PhaseBound, Leader: "r1", LeaderTerm: 3,
		Attached: &meta.Attachment{Node: "n9"},
		Replicas: []meta.Replica{
			{ID: "r1", Node: "n1", Disk: "d1", State: meta.ReplicaReady},
			{ID: "r2", Node: "n2", Disk: "d2", State: meta.ReplicaReady},
			{ID: "r3", Node: "n3", Disk: "d3", State: meta.ReplicaReady},
		},
	}
	if edit != nil {
		edit(v)
	}
	return v
}

func running(leads bool) local {
	return local{
		disks: map[trivet.DiskID]bool{"d1": true}, onDisk: []placed{{"d1", "r1"}}, running: true,
		status: replication.ReplicaStatus{
			Replica: "r1",
			Status: raftgroup.Status{IsLeader: leads, Term: 3, Members: []raftgroup.Member{
				{Replica: "r1", Node: "n1"}, {Replica: "r2", Node: "n2"}, {Replica: "r3", Node: "n3", Learner: true},
			}},
		},
	}
}

func notRunning(onDisk ...placed) local {
	return local{disks: map[trivet.DiskID]bool{"d1": true}, onDisk: onDisk}
}

// touched is running, with replica id touched by damage on its disk.
func touched(id trivet.ReplicaID) local {
	l := running(false)
	l.damage = map[trivet.ReplicaID]string{id: "rot"}
	return l
}

// TestPlanParking: a replica sleeps exactly while nobody needs the volume's group.
func TestPlanParking(t *testing.T) {
	t.Parallel()
	detached := func(edit func(*meta.Volume)) *meta.Volume {
		return planVolume(func(v *meta.Volume) {
			v.Attached, v.Epoch, v.FencedEpoch = nil, 4, 4
			if edit != nil {
				edit(v)
			}
		})
	}
	park := []action{{verb: doPark, disk: "d1", id: "r1"}}
	open := []action{{verb: doOpen, disk: "d1", id: "r1"}}
	here := placed{"d1", "r1"}
	awake := notRunning(here)
	awake.awake = true
	for _, tt := range []struct {
		name string
		v    *meta.Volume
		l    local
		want []action
	}{
		{"nobody needs it", detached(nil), running(false), park},
		{"nobody needs its leader", detached(nil), running(true), park},
		{"it sleeps", detached(nil), notRunning(here), nil},
		{"it sleeps, but its data is not there", detached(nil), notRunning(), open},
		{"parking is off", detached(nil), awake, open},
		{"attached", planVolume(nil), notRunning(here), open},
		{"being detached", detached(func(v *meta.Volume) { v.Detaching = "n9" }), notRunning(here), open},
		{"to be fenced", detached(func(v *meta.Volume) { v.FencedEpoch = 3 }), notRunning(here), open},
		{"to be wiped", detached(func(v *meta.Volume) { v.Phase = meta.PhaseRecycling }), notRunning(here), open},
		{"another leader is wanted", detached(func(v *meta.Volume) { v.WantLeader = "r2" }), notRunning(here), open},
		{"new", detached(func(v *meta.Volume) { v.Phase = meta.PhaseAvailable }), notRunning(here), nil},
		{"released", detached(func(v *meta.Volume) { v.Phase = meta.PhaseReleased }), running(false), park},
		{"failed", detached(func(v *meta.Volume) { v.Phase = meta.PhaseFailed }), notRunning(here), open},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			assert.Equal(t, tt.want, plan("n1", tt.v, tt.l))
		})
	}
}

func TestPlanReplica(t *testing.T) {
	t.Parallel()
	ours := func(do verb) []action { return []action{{verb: do, disk: "d1", id: "r1"}} }
	state := func(s meta.ReplicaState, p meta.Phase) *meta.Volume {
		return planVolume(func(v *meta.Volume) { v.Replicas[0].State, v.Phase = s, p })
	}
	faulted := func(reason string) *meta.Volume {
		return planVolume(func(v *meta.Volume) {
			v.Replicas[0].State, v.Replicas[0].Reason = meta.ReplicaFaulted, reason
		})
	}
	noDisk := local{disks: map[trivet.DiskID]bool{"d9": true}}
	for _, tt := range []struct {
		name string
		v    *meta.Volume
		l    local
		want []action
	}{
		{"make what is wanted", state(meta.ReplicaCreating, meta.PhaseCreating), notRunning(), ours(doCreate)},
		{"half made", state(meta.ReplicaCreating, meta.PhaseCreating), notRunning(placed{"d1", "r1"}), ours(doCreate)},
		{"not for a failed volume", state(meta.ReplicaCreating, meta.PhaseFailed), notRunning(), nil},
		{"open a ready one", state(meta.ReplicaReady, meta.PhaseBound), notRunning(placed{"d1", "r1"}), ours(doOpen)},
		{
			"open, even if it was not found: open says what is wrong", state(meta.ReplicaReady, meta.PhaseBound),
			notRunning(), ours(doOpen),
		},
		{"open one of a failed volume", state(meta.ReplicaReady, meta.PhaseFailed), notRunning(), ours(doOpen)},
		{"faulted stays out", faulted("its log is gone"), notRunning(placed{"d1", "r1"}), nil},
		{
			"faulted for its disk, which is back", faulted(meta.ReasonDiskAbsent + "d1"), notRunning(placed{"d1", "r1"}),
			ours(doRevive),
		},
		{"faulted for its disk, still away", faulted(meta.ReasonDiskAbsent + "d1"), noDisk, nil},
		{
			"disk is away", state(meta.ReplicaReady, meta.PhaseBound), noDisk,
			[]action{{verb: doFault, disk: "d1", id: "r1", reason: meta.ReasonDiskAbsent + "d1"}},
		},
		{
			"disk was wiped before it was made", state(meta.ReplicaCreating, meta.PhaseCreating), noDisk,
			[]action{{verb: doFault, disk: "d1", id: "r1", reason: meta.ReasonDiskAbsent + "d1"}},
		},
		{"delete", state(meta.ReplicaReady, meta.PhaseDeleting), running(true), ours(doDestroy)},
		{"delete one never made", state(meta.ReplicaCreating, meta.PhaseDeleting), notRunning(), ours(doDestroy)},
		{"delete a faulted one", state(meta.ReplicaFaulted, meta.PhaseDeleting), notRunning(), ours(doDestroy)},
		{"delete without the disk", state(meta.ReplicaReady, meta.PhaseDeleting), noDisk, ours(doRemoved)},
		{"deleted here, others are not", state(meta.ReplicaRemoved, meta.PhaseDeleting), notRunning(), nil},
		{
			"touched by damage", state(meta.ReplicaReady, meta.PhaseBound), touched("r1"),
			[]action{{verb: doFault, disk: "d1", id: "r1", reason: "rot"}},
		},
		{
			"touched while it is filled", state(meta.ReplicaFilling, meta.PhaseBound), touched("r1"),
			[]action{{verb: doFault, disk: "d1", id: "r1", reason: "rot"}},
		},
		{"touched on its way out", state(meta.ReplicaLeaving, meta.PhaseBound), touched("r1"), nil},
		{"another one is touched", state(meta.ReplicaReady, meta.PhaseBound), touched("r0"), nil},
		{"touched, and said so", faulted(damageReason + "rot"), touched("r1"), nil},
		{
			"touched, and leads", faulted(damageReason + "rot"), running(true),
			[]action{{verb: doMove, disk: "d1", id: "r1", target: "r2"}},
		},
		{
			"touched, and nobody needs it", planVolume(func(v *meta.Volume) {
				v.Attached, v.Epoch, v.FencedEpoch = nil, 4, 4
				v.Replicas[0].State = meta.ReplicaFaulted
			}), running(true), ours(doPark),
		},
		{"nothing to do for a follower", state(meta.ReplicaReady, meta.PhaseBound), running(false), nil},
		{"nothing to do for a leader", state(meta.ReplicaReady, meta.PhaseBound), running(true), nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			assert.Equal(t, tt.want, plan("n1", tt.v, tt.l))
		})
	}
}

func TestPlanLeader(t *testing.T) {
	t.Parallel()
	fence := action{verb: doFence, disk: "d1", id: "r1", epoch: 5}
	wipe := action{verb: doWipe, disk: "d1", id: "r1", epoch: 5}
	lead := action{verb: doLead, disk: "d1", id: "r1", term: 3}
	move := action{verb: doMove, disk: "d1", id: "r1", target: "r2"}
	for _, tt := range []struct {
		name string
		edit func(*meta.Volume)
		want []action
	}{
		{"fence a reserved epoch", func(v *meta.Volume) { v.Epoch, v.FencedEpoch = 5, 4 }, []action{fence}},
		{"fence is done", func(v *meta.Volume) { v.Epoch, v.FencedEpoch = 5, 5 }, nil},
		{"recycle: fence, then wipe", func(v *meta.Volume) {
			v.Phase, v.Epoch, v.FencedEpoch = meta.PhaseRecycling, 5, 4
		}, []action{fence, wipe}},
		{"recycle, fenced already", func(v *meta.Volume) {
			v.Phase, v.Epoch, v.FencedEpoch = meta.PhaseRecycling, 5, 5
		}, []action{wipe}},
		{"another led before", func(v *meta.Volume) { v.Leader, v.LeaderTerm = "r2", 2 }, []action{lead}},
		{"nobody led before", func(v *meta.Volume) { v.Leader, v.LeaderTerm = "", 0 }, []action{lead}},
		{"another leads in a later term", func(v *meta.Volume) { v.Leader, v.LeaderTerm = "r2", 4 }, nil},
		{"wanted here, is here", func(v *meta.Volume) { v.WantLeader = "r1" }, []action{lead}},
		{"wanted elsewhere", func(v *meta.Volume) { v.WantLeader = "r2" }, []action{move}},
		{"wanted at a learner", func(v *meta.Volume) { v.WantLeader = "r3" }, nil},
		{"wanted at a faulted one", func(v *meta.Volume) {
			v.WantLeader, v.Replicas[1].State = "r2", meta.ReplicaFaulted
		}, nil},
		{"everything at once, fence first", func(v *meta.Volume) {
			v.Epoch, v.FencedEpoch, v.Leader, v.LeaderTerm, v.WantLeader = 5, 3, "r2", 1, "r2"
		}, []action{fence, lead, move}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			assert.Equal(t, tt.want, plan("n1", planVolume(tt.edit), running(true)))
			assert.Empty(t, plan("n1", planVolume(tt.edit), running(false)), "a follower does none of this")
		})
	}
}

func TestPlanStrays(t *testing.T) {
	t.Parallel()
	stray := []action{{verb: doStray, disk: "d1", id: "r9"}}
	found := placed{"d1", "r9"}
	ignored := notRunning(found)
	ignored.ignored = map[placed]bool{found: true}
	elsewhere := planVolume(func(v *meta.Volume) { v.Replicas[0].Node = "n4" })
	withStray := running(false)
	withStray.onDisk = append(withStray.onDisk, found)
	for _, tt := range []struct {
		name string
		v    *meta.Volume
		l    local
		want []action
	}{
		{"unknown volume, nothing here", nil, notRunning(), nil},
		{"unknown volume, a replica here", nil, notRunning(found), stray},
		{"looked at before", nil, ignored, nil},
		{"known volume without a replica here", elsewhere, notRunning(found), stray},
		{"another replica of the volume beside ours", planVolume(nil), withStray, stray},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			assert.Equal(t, tt.want, plan("n1", tt.v, tt.l))
		})
	}
}
