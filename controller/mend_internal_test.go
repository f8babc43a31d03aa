package controller

import (
	"fmt"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller/meta"
)

// mendBench is a catalogue of n1 to n5, a disk each, with volume 1 Ready on n1 to n3, attached to n1 and
// led there.
type mendBench struct {
	t   *testing.T
	m   *meta.Machine
	now time.Time
	h   *history
	set mendSettings
}

func newMendBench(t *testing.T) *mendBench {
	t.Helper()
	b := &mendBench{t: t, m: meta.NewMachine(nil), now: time.Date(2026, 11, 25, 0, 0, 0, 0, time.UTC)}
	b.h = newHistory(b.now.Add(-time.Hour))
	b.set = defaultMendSettings(time.Minute)
	b.do(meta.Command{InitCluster: &meta.InitCluster{Cluster: testCluster, Time: b.now}})
	for n := 1; n <= 5; n++ {
		b.node(n, b.now.Add(time.Second), true)
	}
	b.volume(1, 1, 2, 3)
	b.do(meta.Command{Attach: &meta.Attach{Volume: 1, Node: "n1", Mode: meta.SingleNodeMultiWriter}})
	b.do(meta.Command{ReportLeader: &meta.ReportLeader{Volume: 1, Replica: volumeReplica(11)}})
	return b
}

func (b *mendBench) do(c meta.Command) {
	b.t.Helper()
	require.NoError(b.t, b.m.Apply(c).Err)
}

func benchNode(n int) trivet.NodeID { return trivet.NodeID(fmt.Sprintf("n%d", n)) }

// node registers a node with more room the higher its number.
func (b *mendBench) node(n int, lease time.Time, disk bool) {
	b.t.Helper()
	nd := meta.Node{ID: benchNode(n), Address: "a:1", Incarnation: testUUID(0xf, n), LeaseUntil: lease}
	if disk {
		nd.Disks = []meta.Disk{{ID: trivet.DiskID(testUUID(0xd, n)), SizeBytes: 1 << 40, FreeBytes: int64(n) << 34}}
	}
	old, known := b.m.State().Node(nd.ID)
	if known && lease.Before(old.LeaseUntil) { // a lease never gets shorter, but for a new process
		nd.Incarnation = testUUID(0xf, 100+n)
	}
	b.do(meta.Command{RegisterNode: &meta.RegisterNode{Node: nd}})
}

// volume makes a volume that is Ready on some nodes; replica 10*id+n is on node n.
func (b *mendBench) volume(id int, nodes ...int) {
	b.t.Helper()
	v := meta.Volume{
		ID: trivet.VolumeID(id), Name: fmt.Sprint("v", id), SizeBytes: 1 << 30, Reclaim: meta.ReclaimDelete, Created: b.now,
	}
	for _, n := range nodes {
		v.Replicas = append(v.Replicas, meta.Replica{
			ID: volumeReplica(10*id + n), Node: benchNode(n), Disk: trivet.DiskID(testUUID(0xd, n)), State: meta.ReplicaCreating,
		})
	}
	b.do(meta.Command{CreateVolume: &meta.CreateVolume{Volume: v}})
	for _, r := range v.Replicas {
		b.do(meta.Command{ReportReplica: &meta.ReportReplica{Volume: v.ID, Replica: r.ID, State: meta.ReplicaReady}})
	}
}

func (b *mendBench) report(n int, state meta.ReplicaState, reason string) {
	b.t.Helper()
	b.do(meta.Command{ReportReplica: &meta.ReportReplica{
		Volume: 1, Replica: volumeReplica(n), State: state, Reason: reason,
	}})
}

func (b *mendBench) dead(n int, ago time.Duration) { b.node(n, b.now.Add(-ago), true) }

func (b *mendBench) cordon(n int, drain bool) {
	b.do(meta.Command{CordonNode: &meta.CordonNode{Node: benchNode(n), Cordoned: true, Draining: drain}})
}

func (b *mendBench) count(n int) {
	b.do(meta.Command{SetReplicas: &meta.SetReplicas{Volume: 1, Count: n}})
}

// says returns what mend decides, in short: "v1 +n4-n3" adds on n4 in place of the one on n3.
func (b *mendBench) says() string {
	b.t.Helper()
	out, s := "", b.m.State()
	b.h.observe(s, b.now)
	plan := mend(s, b.h, b.set, b.now)
	for _, c := range plan.commands {
		switch {
		case c.AddReplica != nil:
			v, _ := s.Volume(c.AddReplica.Volume)
			out += fmt.Sprintf("%s +%s", v.Name, c.AddReplica.Replica.Node)
			if old := v.Replica(c.AddReplica.Replica.Replaces); old != nil {
				out += "-" + string(old.Node)
			}
			require.Equal(b.t, v.Revision, c.AddReplica.IfRevision)
		case c.RemoveReplica != nil:
			v, _ := s.Volume(c.RemoveReplica.Volume)
			out += fmt.Sprintf("%s -%s", v.Name, v.Replica(c.RemoveReplica.Replica).Node)
			require.Equal(b.t, v.Revision, c.RemoveReplica.IfRevision)
		case c.WantLeader != nil:
			v, _ := s.Volume(c.WantLeader.Volume)
			out += fmt.Sprintf("%s leader %s", v.Name, v.Replica(c.WantLeader.Replica).Node)
		}
		out += "; "
		b.do(c)
	}
	for _, v := range s.Volumes() {
		if why, ok := plan.blocked[v.ID]; ok {
			out += fmt.Sprintf("%s waits: %s; ", v.Name, why)
		}
	}
	return out
}

// mendCase is what is decided in a situation, in short.
type mendCase struct {
	name string
	do   func(b *mendBench)
	want string
}

func runMendCases(t *testing.T, cases []mendCase) {
	t.Helper()
	for _, tc := range cases {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			b := newMendBench(t)
			tc.do(b)
			assert.Equal(t, tc.want, b.says())
		})
	}
}

func TestMendReplaces(t *testing.T) {
	t.Parallel()
	absent := meta.ReasonDiskAbsent + testUUID(0xd, 3)
	runMendCases(t, []mendCase{
		{"all is well", func(*mendBench) {}, ""},
		{"just dead", func(b *mendBench) { b.dead(3, 59*time.Second) }, ""},
		{"dead for long", func(b *mendBench) { b.dead(3, time.Minute) }, "v1 +n5-n3; "},
		{"dead for long, a new leader", func(b *mendBench) {
			b.dead(3, time.Hour)
			b.h = newHistory(b.now.Add(-59 * time.Second))
		}, ""},
		{"two dead", func(b *mendBench) {
			b.dead(3, time.Hour)
			b.dead(2, time.Hour)
		}, "v1 waits: no majority of its replicas is ready on living nodes: unavailable; "},
		{"faulted", func(b *mendBench) { b.report(13, meta.ReplicaFaulted, "rotten") }, "v1 +n5-n3; "},
		{"disk away", func(b *mendBench) { b.report(13, meta.ReplicaFaulted, absent) }, ""},
		{"disk away for long", func(b *mendBench) {
			b.report(13, meta.ReplicaFaulted, absent)
			b.h.observe(b.m.State(), b.now.Add(-time.Minute))
		}, "v1 +n5-n3; "},
		{"disk away and back and away", func(b *mendBench) {
			b.report(13, meta.ReplicaFaulted, absent)
			b.h.observe(b.m.State(), b.now.Add(-time.Minute))
			b.report(13, meta.ReplicaReady, "")
			b.h.observe(b.m.State(), b.now.Add(-30*time.Second))
			b.report(13, meta.ReplicaFaulted, absent)
		}, ""},
		{"faulted, only its own node has room", func(b *mendBench) {
			b.report(13, meta.ReplicaFaulted, "wiped")
			b.cordon(4, false)
			b.node(5, b.now.Add(time.Second), false)
		}, "v1 +n3-n3; "},
		{"faulted, only its own node is left, which is cordoned", func(b *mendBench) {
			b.report(13, meta.ReplicaFaulted, "wiped")
			b.cordon(4, false)
			b.cordon(5, false)
			b.cordon(3, false)
		}, "v1 waits: place 1 replicas of 1073741824 bytes: 0 of 4 nodes qualify; cordoned: n4, n5; with a replica of it: " +
			"n1, n2: no space left; nor on its own node: place 1 replicas of 1073741824 bytes: 0 of 1 nodes qualify; " +
			"cordoned: n3: no space left; "},
		{"faulted, the others are merely busy", func(b *mendBench) {
			b.report(13, meta.ReplicaFaulted, "wiped")
			b.h.tried[attempt{1, "n4"}], b.h.tried[attempt{1, "n5"}] = b.now, b.now
		}, "v1 waits: place 1 replicas of 1073741824 bytes: 0 of 4 nodes qualify; with a replica of it: n1, n2; " +
			"busy or tried lately: n4, n5: no space left; "},
		{"tried there lately", func(b *mendBench) {
			b.report(13, meta.ReplicaFaulted, "rotten")
			b.h.tried[attempt{1, "n5"}] = b.now.Add(-59 * time.Second)
		}, "v1 +n4-n3; "},
		{"drain", func(b *mendBench) { b.cordon(3, true) }, "v1 +n5-n3; "},
		{"cordon", func(b *mendBench) { b.cordon(3, false) }, ""},
		{"drain, nowhere to go", func(b *mendBench) {
			b.cordon(3, true)
			b.cordon(4, false)
			b.dead(5, time.Second)
		}, "v1 waits: place 1 replicas of 1073741824 bytes: 0 of 4 nodes qualify; down: n5; cordoned: n4; with a replica " +
			"of it: n1, n2: no space left; "},
		{"drain, and one is faulted", func(b *mendBench) {
			b.cordon(2, true)
			b.report(13, meta.ReplicaFaulted, "rotten")
		}, "v1 +n5-n3; "},
		{"one cannot be replaced, another can", func(b *mendBench) {
			b.count(5)
			b.volume(2, 1, 2, 3, 4, 5)
			b.cordon(4, true)
			b.do(meta.Command{ReportReplica: &meta.ReportReplica{
				Volume: 2, Replica: volumeReplica(25), State: meta.ReplicaFaulted, Reason: "wiped",
			}})
		}, "v2 +n5-n5; v1 +n5; "},
	})
}

func TestMendCounts(t *testing.T) {
	t.Parallel()
	runMendCases(t, []mendCase{
		{"more", func(b *mendBench) { b.count(5) }, "v1 +n5; "},
		{"fewer: not where it is attached, the fullest disk", func(b *mendBench) { b.count(1) }, "v1 -n2; "},
		{"fewer: the one on a cordoned node", func(b *mendBench) { b.cordon(3, false); b.count(1) }, "v1 -n3; "},
		{"fewer: one that drains rather than be moved", func(b *mendBench) { b.cordon(3, true); b.count(1) }, "v1 -n3; "},
		{"fewer: one of two in a zone", func(b *mendBench) {
			for n, zone := range map[int]string{1: "a", 2: "b", 3: "a"} {
				nd, _ := b.m.State().Node(benchNode(n))
				nd.Zone = zone
				b.do(meta.Command{RegisterNode: &meta.RegisterNode{Node: nd}})
			}
			b.count(1)
		}, "v1 -n3; "},
		{"fewer: the one whose disk is gone before one that drains", func(b *mendBench) {
			b.cordon(2, true)
			b.node(3, b.now.Add(time.Second), false)
			b.count(1)
		}, "v1 -n3; "},
		{"fewer: the dead one", func(b *mendBench) { b.dead(3, time.Second); b.count(1) }, "v1 -n3; "},
		{"fewer: the faulted one rather than the dead", func(b *mendBench) {
			b.do(meta.Command{SetReplicas: &meta.SetReplicas{Volume: 1, Count: 3}})
			b.volume(2, 1, 2, 3, 4, 5)
			b.dead(3, time.Second)
			b.do(meta.Command{ReportReplica: &meta.ReportReplica{
				Volume: 2, Replica: volumeReplica(24), State: meta.ReplicaFaulted, Reason: "rotten",
			}})
			b.do(meta.Command{SetReplicas: &meta.SetReplicas{Volume: 2, Count: 3}})
		}, "v2 -n4; "},
		{"a disk that is gone, not reported yet, does not count", func(b *mendBench) {
			b.node(2, b.now.Add(time.Second), false)
			b.node(3, b.now.Add(time.Second), false)
			b.count(1)
		}, "v1 waits: no majority of its replicas is ready on living nodes: unavailable; "},
		{"joins where it is dead", func(b *mendBench) {
			b.count(5)
			b.says()
			b.dead(5, time.Hour)
		}, "v1 -n5; "},
		{"joins where it died just now", func(b *mendBench) {
			b.count(5)
			b.says()
			b.dead(5, time.Second)
		}, ""},
	})
}

func TestMendLeads(t *testing.T) {
	t.Parallel()
	runMendCases(t, []mendCase{
		{"leads on a cordoned node that holds it", func(b *mendBench) { b.cordon(1, false) }, ""},
		{"leads on a draining node that holds it", func(b *mendBench) { b.cordon(1, true) }, "v1 leader n2; "},
		{"leads on a cordoned node that does not", func(b *mendBench) {
			b.cordon(2, false)
			b.do(meta.Command{ReportLeader: &meta.ReportLeader{Volume: 1, Replica: volumeReplica(12)}})
		}, "v1 leader n1; "},
		{"no leader for a dead or cordoned node", func(b *mendBench) {
			b.cordon(1, true)
			b.cordon(2, false)
			b.dead(3, time.Second)
			b.cordon(4, false)
			b.cordon(5, false)
		}, "v1 waits: place 1 replicas of 1073741824 bytes: 0 of 4 nodes qualify; down: n3; cordoned: n2, n4, n5: " +
			"no space left; "},
		{"released volumes are mended, failed ones are not", func(b *mendBench) {
			b.volume(2, 1, 3, 4)
			b.do(meta.Command{Fail: &meta.Fail{Volume: 2, Reason: "x"}})
			b.dead(3, time.Hour)
		}, "v1 +n5-n3; "},
	})
}

// TestMendDrainsLeaderThenReplica: leadership goes at once, the replica in its turn, and the wish for a
// leader is not said again and again.
func TestMendDrainsLeaderThenReplica(t *testing.T) {
	t.Parallel()
	b := newMendBench(t)
	b.cordon(1, true)
	assert.Equal(t, "v1 leader n2; ", b.says())
	assert.Equal(t, "v1 +n5-n1; ", b.says(), "though the leader has not moved yet")
	assert.Empty(t, b.says())
	b.do(meta.Command{ReportLeader: &meta.ReportLeader{Volume: 1, Replica: volumeReplica(12)}})
	assert.Empty(t, b.says())
	b.cordon(2, true) // the one that leads now is to go as well, while the other fills
	assert.Equal(t, "v1 leader n3; ", b.says())
}

// TestMendLimits: no node sends or receives more than its share, and the most urgent come first.
func TestMendLimits(t *testing.T) {
	t.Parallel()
	b := newMendBench(t)
	for id := 2; id <= 6; id++ {
		b.volume(id, 1, 2, 3)
		leader := volumeReplica(10*id + 1 + id%2)
		b.do(meta.Command{ReportLeader: &meta.ReportLeader{Volume: trivet.VolumeID(id), Replica: leader}})
	}
	b.cordon(3, true)
	b.do(meta.Command{ReportReplica: &meta.ReportReplica{
		Volume: 6, Replica: volumeReplica(63), State: meta.ReplicaFaulted, Reason: "rotten",
	}})
	// v6 first, though it is the last; led on n1 are v1, v2, v4 and v6, of which two may fill.
	assert.Equal(t, "v6 +n5-n3; v1 +n5-n3; v3 +n4-n3; v5 +n4-n3; "+
		"v2 waits: waits its turn: node n1 fills 2 replicas: operation pending; "+
		"v4 waits: waits its turn: node n1 fills 2 replicas: operation pending; ", b.says())

	b = newMendBench(t)
	b.set.perNode, b.set.perCluster = 3, 2
	for id := 2; id <= 4; id++ {
		b.volume(id, 1, 2, 3)
	}
	b.cordon(3, true)
	assert.Equal(t, "v1 +n5-n3; v2 +n5-n3; v3 waits: waits its turn: 2 replicas are being filled: operation pending; "+
		"v4 waits: waits its turn: 2 replicas are being filled: operation pending; ", b.says())

	b = newMendBench(t)
	b.set.perNode = 1
	b.volume(2, 1, 2, 3)
	b.cordon(3, true)
	assert.Equal(t, "v1 +n5-n3; v2 waits: waits its turn: node n1 fills 1 replicas: operation pending; ", b.says())
}
