package controller

import (
	"fmt"
	"math/rand"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller/meta"
)

// mendSim is a cluster in simulated time: the real catalogue, the real mend, and agents that do what
// they are told when they happen to get to it. Nodes die and return, disks are lost or away for a while,
// replicas rot, operators drain nodes and change their minds about numbers.
type mendSim struct {
	t     *testing.T
	r     *rand.Rand
	seed  int64
	m     *meta.Machine
	now   time.Time
	h     *history
	set   mendSettings
	down  map[trivet.NodeID]bool
	disks map[trivet.NodeID]trivet.DiskID // what is in the node's slot; "" = away
	old   map[trivet.NodeID]trivet.DiskID // what was there before it was taken away
	ids   int
	moves int // commands that mend gave
	fills int // replicas that were filled
}

const simReplaceAfter = time.Minute

func newMendSim(t *testing.T, seed int64) *mendSim {
	t.Helper()
	s := &mendSim{
		t: t, r: rand.New(rand.NewSource(seed)), seed: seed, m: meta.NewMachine(nil),
		now: time.Date(2026, 11, 25, 0, 0, 0, 0, time.UTC), down: map[trivet.NodeID]bool{},
		disks: map[trivet.NodeID]trivet.DiskID{}, old: map[trivet.NodeID]trivet.DiskID{},
	}
	s.h = newHistory(s.now)
	s.set = mendSettings{replaceAfter: simReplaceAfter, perNode: 2, perCluster: 8, newID: func() trivet.ReplicaID {
		return trivet.ReplicaID(s.id(0xe))
	}}
	s.must(meta.Command{InitCluster: &meta.InitCluster{Cluster: testCluster, Time: s.now}})
	for n := range 4 + s.r.Intn(4) {
		id := trivet.NodeID(fmt.Sprintf("n%d", n))
		s.disks[id] = trivet.DiskID(s.id(0xd))
		s.register(id)
	}
	for v := range 2 + s.r.Intn(8) {
		s.createVolume(v + 1)
	}
	return s
}

func (s *mendSim) id(kind int) string { s.ids++; return testUUID(kind, s.ids) }

func (s *mendSim) must(c meta.Command) {
	s.t.Helper()
	require.NoError(s.t, s.m.Apply(c).Err, "seed %d", s.seed)
}

func (s *mendSim) register(id trivet.NodeID) {
	n := meta.Node{ID: id, Address: "a:1", Incarnation: s.id(0xf), LeaseUntil: s.now.Add(6 * time.Second)}
	n.Zone = fmt.Sprintf("z%d", int(id[1]-'0')%3)
	if d := s.disks[id]; d != "" {
		n.Disks = []meta.Disk{{ID: d, SizeBytes: 1 << 40, FreeBytes: 1<<39 + s.r.Int63n(1<<30)}}
	}
	s.must(meta.Command{RegisterNode: &meta.RegisterNode{Node: n}})
}

func (s *mendSim) createVolume(n int) {
	count := []int{1, 3, 3, 5}[s.r.Intn(4)]
	nodes := s.m.State().Nodes()
	if len(nodes) < count {
		count = 3
	}
	placed, err := Place(nodes, PlaceRequest{
		SizeBytes: gibForTests, Replicas: count, Load: LoadOf(s.m.State().Volumes()),
	}, s.now)
	require.NoError(s.t, err)
	for i := range placed {
		placed[i].ID = s.set.newID()
	}
	s.must(meta.Command{CreateVolume: &meta.CreateVolume{Volume: meta.Volume{
		ID: trivet.VolumeID(n), Name: fmt.Sprintf("v%d", n), SizeBytes: gibForTests, Reclaim: meta.ReclaimDelete,
		Created: s.now, Replicas: placed,
	}}})
	for _, r := range placed {
		s.must(s.report(trivet.VolumeID(n), r.ID, meta.ReplicaReady, ""))
	}
	if s.r.Intn(2) == 0 {
		s.must(meta.Command{Attach: &meta.Attach{
			Volume: trivet.VolumeID(n), Node: placed[0].Node, Mode: meta.SingleNodeMultiWriter,
		}})
		s.must(meta.Command{ReportLeader: &meta.ReportLeader{Volume: trivet.VolumeID(n), Replica: placed[0].ID}})
	}
}

const gibForTests = 1 << 30

func (s *mendSim) report(v trivet.VolumeID, r trivet.ReplicaID, state meta.ReplicaState, reason string) meta.Command {
	return meta.Command{ReportReplica: &meta.ReportReplica{Volume: v, Replica: r, State: state, Reason: reason}}
}

// well counts the replicas of v that are Ready on nodes that are up, of how many.
func (s *mendSim) well(v *meta.Volume) (well, all int) {
	for _, r := range v.Replicas {
		if r.State == meta.ReplicaLeaving {
			continue
		}
		if r.State != meta.ReplicaJoining && r.State != meta.ReplicaFilling {
			all++
		}
		n, _ := s.m.State().Node(r.Node)
		if r.State == meta.ReplicaReady && n.Alive(s.now) && len(n.Disks) > 0 && n.Disks[0].ID == r.Disk {
			well++
		}
	}
	return well, all
}

// check applies a command that changes members, and requires that it takes no volume below its majority.
func (s *mendSim) check(c meta.Command, id trivet.VolumeID) {
	s.t.Helper()
	before, ok := s.m.State().Volume(id)
	s.must(c)
	after, still := s.m.State().Volume(id)
	require.True(s.t, ok && still)
	well, all := s.well(&before)
	had := 2*well > all
	well, all = s.well(&after)
	require.False(s.t, had && 2*well <= all, "seed %d: %s took a majority away: %+v", s.seed, c.Op(), after.Replicas)
	changing := 0
	for _, r := range after.Replicas {
		if r.State.Changing() {
			changing++
		}
	}
	require.LessOrEqual(s.t, changing, 1, "seed %d: %s", s.seed, c.Op())
}

// mend lets a mender decide and carries out what it says, all of it or a part. It returns how much that was.
func (s *mendSim) mend() int {
	s.t.Helper()
	s.h.observe(s.m.State(), s.now)
	plan := mend(s.m.State(), s.h, s.set, s.now)
	seen := map[trivet.VolumeID]bool{}
	for _, c := range plan.commands {
		var id trivet.VolumeID
		switch {
		case c.AddReplica != nil:
			id = c.AddReplica.Volume
			s.h.tried[attempt{id, c.AddReplica.Replica.Node}] = s.now
		case c.RemoveReplica != nil:
			id = c.RemoveReplica.Volume
		case c.WantLeader != nil:
			id = c.WantLeader.Volume
		}
		require.False(s.t, seen[id], "seed %d: two changes of one volume", s.seed)
		seen[id] = true
		s.check(c, id)
	}
	s.bounded()
	s.moves += len(plan.commands)
	return len(plan.commands)
}

// bounded requires that no more is filled at a time than may be.
func (s *mendSim) bounded() {
	s.t.Helper()
	targets, all := map[trivet.NodeID]int{}, 0
	for _, v := range s.m.State().Volumes() {
		if r := v.Change(); r != nil && r.State != meta.ReplicaLeaving {
			targets[r.Node]++
			all++
		}
	}
	require.LessOrEqual(s.t, all, s.set.perCluster, "seed %d", s.seed)
	for n, fills := range targets {
		require.LessOrEqual(s.t, fills, s.set.perNode, "seed %d: node %s", s.seed, n)
	}
}

// agents lets every agent that is up do each thing it has to do with the chance of one in odds.
func (s *mendSim) agents(odds int) {
	s.t.Helper()
	for _, n := range s.m.State().Nodes() {
		if !s.down[n.ID] {
			s.must(meta.Command{RenewLease: &meta.RenewLease{
				Node: n.ID, Incarnation: n.Incarnation, Until: s.now.Add(6 * time.Second), Disks: n.Disks,
			}})
		}
	}
	for _, v := range s.m.State().Volumes() {
		for _, r := range append(slices.Clone(v.Replicas), v.Retired...) {
			if s.r.Intn(odds) == 0 {
				s.act(v.ID, r.ID, odds > 1)
			}
		}
		if s.r.Intn(odds) == 0 {
			s.lead(v.ID)
		}
	}
}

// act does what is to be done with one replica: by its own node, or by the leader, which a group has while
// most of its voters are up.
func (s *mendSim) act(id trivet.VolumeID, replica trivet.ReplicaID, mayFail bool) {
	v, _ := s.m.State().Volume(id)
	r := v.Replica(replica)
	if r == nil {
		i := slices.IndexFunc(v.Retired, func(r meta.Replica) bool { return r.ID == replica })
		if i >= 0 && !s.down[v.Retired[i].Node] && s.disks[v.Retired[i].Node] == v.Retired[i].Disk {
			s.must(s.report(id, replica, meta.ReplicaRemoved, ""))
		}
		return
	}
	up, present := !s.down[r.Node], s.disks[r.Node] == r.Disk
	well, all := s.well(&v)
	quorum := 2*well > all
	switch {
	case r.State == meta.ReplicaLeaving:
		if quorum {
			s.check(s.report(id, replica, meta.ReplicaLeft, ""), id)
		}
	case !up:
	case r.State == meta.ReplicaFaulted:
		if present && r.Reason == meta.ReasonDiskAbsent+string(r.Disk) && v.ReplicaOn(r.Node).ID == r.ID {
			s.must(s.report(id, replica, meta.ReplicaReady, ""))
		}
	case !present:
		s.must(s.report(id, replica, meta.ReplicaFaulted, meta.ReasonDiskAbsent+string(r.Disk)))
	case mayFail && r.State.Changing() && s.r.Intn(8) == 0:
		s.must(s.report(id, replica, meta.ReplicaFaulted, "no luck"))
	case r.State == meta.ReplicaJoining:
		s.must(s.report(id, replica, meta.ReplicaFilling, ""))
	case r.State == meta.ReplicaFilling && quorum:
		s.check(s.report(id, replica, meta.ReplicaReady, ""), id)
		s.fills++
	}
}

// lead moves the leadership as it is wanted, and off nodes that are down.
func (s *mendSim) lead(id trivet.VolumeID) {
	v, _ := s.m.State().Volume(id)
	if v.Holder() == "" {
		return
	}
	to := v.Replica(v.WantLeader)
	if to == nil || s.down[to.Node] {
		to = nil
		if l := v.Replica(v.Leader); l != nil && !s.down[l.Node] && l.State != meta.ReplicaLeaving {
			return
		}
		for i := range v.Replicas {
			if r := &v.Replicas[i]; r.State == meta.ReplicaReady && !s.down[r.Node] {
				to = r
			}
		}
	}
	if to != nil {
		s.must(meta.Command{ReportLeader: &meta.ReportLeader{Volume: id, Replica: to.ID}})
	}
}

// spare reports whether every volume keeps a majority without what is on a node, when all nodes that are
// down come back: otherwise nobody could repair it, and the test would mean nothing.
func (s *mendSim) spare(id trivet.NodeID) bool {
	for _, v := range s.m.State().Volumes() {
		kept, all := 0, 0
		for _, r := range v.Replicas {
			all++
			if r.State == meta.ReplicaReady && r.Node != id && s.disks[r.Node] == r.Disk {
				kept++
			}
		}
		if v.ReplicaOn(id) != nil && 2*kept <= all {
			return false
		}
	}
	return true
}

// nemesis does one bad thing, or undoes one.
func (s *mendSim) nemesis() {
	s.t.Helper()
	nodes := s.m.State().Nodes()
	n := nodes[s.r.Intn(len(nodes))].ID
	volumes := s.m.State().Volumes()
	v := volumes[s.r.Intn(len(volumes))]
	switch s.r.Intn(8) {
	case 0:
		s.down[n] = true
	case 1, 2:
		if s.down[n] {
			delete(s.down, n)
			s.register(n)
		}
	case 3: // a new disk in place of the old one
		if s.disks[n] != "" && s.spare(n) {
			s.disks[n] = trivet.DiskID(s.id(0xd))
			s.again(n)
		}
	case 4: // a disk is away, or back
		if was, away := s.old[n]; away {
			s.disks[n] = was
			delete(s.old, n)
			s.again(n)
		} else if s.disks[n] != "" && s.spare(n) {
			s.old[n], s.disks[n] = s.disks[n], ""
			s.again(n)
		}
	case 5:
		if r := v.ReplicaOn(n); r != nil && r.State == meta.ReplicaReady && !s.down[n] && s.spare(n) {
			s.must(s.report(v.ID, r.ID, meta.ReplicaFaulted, "rotten"))
		}
	case 6:
		on := s.r.Intn(2) == 0
		s.must(meta.Command{CordonNode: &meta.CordonNode{Node: n, Cordoned: on, Draining: on && s.r.Intn(2) == 0}})
	case 7:
		s.must(meta.Command{SetReplicas: &meta.SetReplicas{Volume: v.ID, Count: []int{1, 3, 5}[s.r.Intn(3)]}})
	}
}

// again registers a node whose disks have changed, if it is up; otherwise it does when it is.
func (s *mendSim) again(n trivet.NodeID) {
	if !s.down[n] {
		s.register(n)
	}
}

// settle ends the bad times: some nodes are dead or draining for good, but no more than can be made up for.
func (s *mendSim) settle() {
	for n, was := range s.old {
		s.disks[n] = was
		delete(s.old, n)
		s.again(n)
	}
	for _, n := range s.m.State().Nodes() {
		if s.down[n.ID] && (!s.spare(n.ID) || s.r.Intn(2) == 0) {
			delete(s.down, n.ID)
			s.register(n.ID)
		}
	}
	// Two that are dead for good may be too many together.
	for _, v := range s.m.State().Volumes() {
		for {
			well, all := 0, 0
			var dead trivet.NodeID
			for _, r := range v.Replicas {
				all++
				if r.State == meta.ReplicaReady && s.disks[r.Node] == r.Disk && !s.down[r.Node] {
					well++
				} else if s.down[r.Node] {
					dead = r.Node
				}
			}
			if 2*well > all || dead == "" {
				break
			}
			delete(s.down, dead)
			s.register(dead)
		}
	}
}

// useful returns the nodes on which replicas may stay.
func (s *mendSim) useful() map[trivet.NodeID]bool {
	out := map[trivet.NodeID]bool{}
	for _, n := range s.m.State().Nodes() {
		if !s.down[n.ID] && !n.Draining && len(n.Disks) > 0 {
			out[n.ID] = true
		}
	}
	return out
}

// requireMended requires that every volume has what is wanted, where it can stay, as far as there are nodes.
func (s *mendSim) requireMended() {
	s.t.Helper()
	useful := s.useful()
	open := 0 // nodes that take new replicas
	for n := range useful {
		if nd, _ := s.m.State().Node(n); !nd.Cordoned {
			open++
		}
	}
	for _, v := range s.m.State().Volumes() {
		ready, kept := 0, 0
		for _, r := range v.Replicas {
			if r.State == meta.ReplicaReady && useful[r.Node] {
				ready++
				if nd, _ := s.m.State().Node(r.Node); nd.Cordoned {
					kept++
				}
			}
		}
		require.GreaterOrEqual(s.t, ready, min(v.Want(), open+kept), "seed %d: %s wants %d of %d nodes: %+v", s.seed,
			v.Name, v.Want(), open, v.Replicas)
		if open+kept >= v.Want() {
			require.Len(s.t, v.Replicas, v.Want(), "seed %d: %s: %+v", s.seed, v.Name, v.Replicas)
		}
		require.Nil(s.t, v.Change(), "seed %d: %s: %+v", s.seed, v.Name, v.Replicas)
		if l := v.Replica(v.Leader); v.Holder() != "" && l != nil && open >= v.Want() {
			require.True(s.t, useful[l.Node], "seed %d: %s is led on %s", s.seed, v.Name, l.Node)
		}
	}
}

// TestMendEndsWell: whatever happened, volumes end with what is wanted of them; mend never takes a majority
// away, never begins a change while another is under way, keeps within its bounds, and then is quiet.
func TestMendEndsWell(t *testing.T) {
	t.Parallel()
	moves, fills, seeds := 0, 0, int64(60)
	if testing.Short() {
		seeds = 15
	}
	for seed := range seeds {
		s := newMendSim(t, seed)
		for range 200 {
			s.now = s.now.Add(time.Duration(s.r.Intn(4000)) * time.Millisecond)
			if s.r.Intn(4) == 0 {
				s.nemesis()
			}
			s.agents(3)
			if s.r.Intn(40) == 0 {
				s.h = newHistory(s.now) // another node leads the catalogue
			}
			s.mend()
		}
		s.settle()
		quiet := 0
		for step := 0; quiet < 60; step++ { // two minutes without a command
			require.Less(t, step, 3000, "seed %d: no end of changes", seed)
			s.now = s.now.Add(2 * time.Second)
			s.agents(1)
			if quiet++; s.mend() > 0 {
				quiet = 0
			}
		}
		s.requireMended()
		moves, fills = moves+s.moves, fills+s.fills
	}
	require.Greater(t, fills, 5*int(seeds), "too little happened for the test to mean anything")
	t.Logf("%d commands, %d replicas filled", moves, fills)
}
