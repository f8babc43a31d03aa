package controller

import (
	"fmt"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller/meta"
	"github.com/trivet-csi/trivet/replication/raftgroup"
)

func testUUID(kind, n int) string { return fmt.Sprintf("%08x-0000-4000-8000-%012x", kind, n) }

func metaReplica(n int) trivet.ReplicaID { return trivet.ReplicaID(testUUID(0xc, n)) }

func volumeReplica(n int) trivet.ReplicaID { return trivet.ReplicaID(testUUID(0xe, n)) }

// testState has nodes n1 to n5 with live leases (but n5) and volume 1 on n1 to n3.
func testState(t *testing.T, now time.Time) *meta.State {
	t.Helper()
	m := meta.NewMachine(nil)
	apply := func(c meta.Command) { require.NoError(t, m.Apply(c).Err) }
	apply(meta.Command{InitCluster: &meta.InitCluster{Cluster: testCluster, Time: now}})
	for n := 1; n <= 5; n++ {
		until := now.Add(time.Minute)
		if n == 5 {
			until = now
		}
		apply(meta.Command{RegisterNode: &meta.RegisterNode{Node: meta.Node{
			ID: trivet.NodeID(fmt.Sprintf("n%d", n)), Address: "a:1", Incarnation: testUUID(0xf, n), LeaseUntil: until,
			MetaReplica: metaReplica(n), Disks: []meta.Disk{{ID: trivet.DiskID(testUUID(0xd, n)), SizeBytes: 1 << 30}},
		}}})
	}
	v := meta.Volume{ID: 1, Name: "v", SizeBytes: 4096, Reclaim: meta.ReclaimDelete}
	for n := 1; n <= 3; n++ {
		v.Replicas = append(v.Replicas, meta.Replica{
			ID: volumeReplica(n), Node: trivet.NodeID(fmt.Sprintf("n%d", n)), Disk: trivet.DiskID(testUUID(0xd, n)),
			State: meta.ReplicaCreating,
		})
	}
	apply(meta.Command{CreateVolume: &meta.CreateVolume{Volume: v}})
	return m.State()
}

// TestAuthorize: what a node may say (S4). n1 to n3 have a replica of volume 1, n4 has not; n9 is not
// registered.
func TestAuthorize(t *testing.T) {
	t.Parallel()
	s := testState(t, time.Now())
	register := func(n int) meta.Command {
		return meta.Command{RegisterNode: &meta.RegisterNode{Node: meta.Node{
			ID: trivet.NodeID(fmt.Sprintf("n%d", n)), Address: "a:1", Incarnation: testUUID(0xf, 99),
		}}}
	}
	for _, tc := range []struct {
		name    string
		c       meta.Command
		may     []trivet.NodeID
		mustNot []trivet.NodeID
	}{
		{"init", meta.Command{InitCluster: &meta.InitCluster{Cluster: testCluster}}, nil, []trivet.NodeID{"n1", "n9"}},
		{"register", register(1), []trivet.NodeID{"n1"}, []trivet.NodeID{"n2", "n9"}},
		{"register a new one", register(9), []trivet.NodeID{"n9", "n2"}, []trivet.NodeID{"n8"}},
		{
			"renew",
			meta.Command{RenewLease: &meta.RenewLease{Node: "n1", Incarnation: testUUID(0xf, 1)}},
			[]trivet.NodeID{"n1"},
			[]trivet.NodeID{"n2", "n9"},
		},
		{
			"take over",
			meta.Command{TakeOver: &meta.TakeOver{Volume: 1, Node: "n4"}},
			[]trivet.NodeID{"n4"},
			[]trivet.NodeID{"n1", "n9"},
		},
		{
			"replica",
			meta.Command{ReportReplica: &meta.ReportReplica{
				Volume: 1, Replica: volumeReplica(2), State: meta.ReplicaReady,
			}},
			[]trivet.NodeID{"n2"},
			[]trivet.NodeID{"n1", "n4", "n9"},
		},
		{
			"leader",
			meta.Command{ReportLeader: &meta.ReportLeader{Volume: 1, Replica: volumeReplica(2)}},
			[]trivet.NodeID{"n2"},
			[]trivet.NodeID{"n1", "n4"},
		},
		{
			"fence",
			meta.Command{ReportFence: &meta.ReportFence{Volume: 1, Epoch: 1}},
			[]trivet.NodeID{"n1", "n2", "n3"},
			[]trivet.NodeID{"n4", "n9"},
		},
		{
			"wiped",
			meta.Command{ReportWiped: &meta.ReportWiped{Volume: 1, Epoch: 1}},
			[]trivet.NodeID{"n1", "n2", "n3"},
			[]trivet.NodeID{"n4", "n9"},
		},
		{
			"attach",
			meta.Command{Attach: &meta.Attach{Volume: 1, Node: "n4", Mode: meta.SingleNodeReader}},
			[]trivet.NodeID{"n1", "n4"},
			[]trivet.NodeID{"n9"},
		},
		{
			"size",
			meta.Command{ReportSize: &meta.ReportSize{Volume: 1, SizeBytes: 4096}},
			[]trivet.NodeID{"n1", "n2", "n3"},
			[]trivet.NodeID{"n4", "n9"},
		},
		{
			"recovered",
			meta.Command{ReportRecovered: &meta.ReportRecovered{Volume: 1, Replica: volumeReplica(1)}},
			[]trivet.NodeID{"n1"},
			[]trivet.NodeID{"n2", "n4", "n9"},
		},
		{
			"audited in its own name",
			meta.Command{By: "n4", Release: &meta.Release{Volume: 1}},
			[]trivet.NodeID{"n4"},
			[]trivet.NodeID{"n1", "n9"},
		},
		{"release", meta.Command{Release: &meta.Release{Volume: 1}}, []trivet.NodeID{"n1", "n4"}, []trivet.NodeID{"n9"}},
		{
			"want leader",
			meta.Command{WantLeader: &meta.WantLeader{Volume: 1, Replica: volumeReplica(1)}},
			[]trivet.NodeID{"n4"},
			[]trivet.NodeID{"n9"},
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			require.NoError(t, tc.c.Validate())
			for _, from := range tc.may {
				require.NoError(t, authorize(s, from, tc.c), from)
			}
			for _, from := range tc.mustNot {
				require.ErrorIs(t, authorize(s, from, tc.c), trivet.ErrInvalid, from)
			}
		})
	}
}

// TestAuthorizeMembers: n4 fills a replica of volume 1 and one of n3's is retired. A member's node may say
// that another one votes or has left; whatever else is for the replica's own node to say.
func TestAuthorizeMembers(t *testing.T) {
	t.Parallel()
	m := meta.NewMachine(testState(t, time.Now()))
	apply := func(c meta.Command) { require.NoError(t, m.Apply(c).Err) }
	report := func(n int, state meta.ReplicaState) meta.Command {
		return meta.Command{ReportReplica: &meta.ReportReplica{Volume: 1, Replica: volumeReplica(n), State: state}}
	}
	add := func(n int, replaces trivet.ReplicaID) meta.Command {
		v, _ := m.State().Volume(1)
		return meta.Command{AddReplica: &meta.AddReplica{Volume: 1, IfRevision: v.Revision, Replica: meta.Replica{
			ID: volumeReplica(n), Node: trivet.NodeID(fmt.Sprintf("n%d", n)), Disk: trivet.DiskID(testUUID(0xd, n)),
			Replaces: replaces,
		}}}
	}
	for n := 1; n <= 3; n++ {
		apply(report(n, meta.ReplicaReady))
	}
	apply(add(5, volumeReplica(3)))
	apply(report(5, meta.ReplicaFilling))
	apply(report(5, meta.ReplicaReady))
	apply(report(3, meta.ReplicaLeft))
	apply(add(4, ""))
	apply(report(4, meta.ReplicaFilling))
	for _, tc := range []struct {
		n     int
		state meta.ReplicaState
		may   string // of n1 to n5, which nodes
	}{
		{4, meta.ReplicaReady, "n1 n2 n4 n5"},
		{4, meta.ReplicaLeft, "n1 n2 n4 n5"},
		{4, meta.ReplicaFilling, "n4"},
		{4, meta.ReplicaFaulted, "n4"},
		{1, meta.ReplicaReady, "n1 n2 n4 n5"}, // said again
		{1, meta.ReplicaLeft, "n1 n2 n4 n5"},
		{1, meta.ReplicaFaulted, "n1"},
		{3, meta.ReplicaRemoved, "n3"},
		{3, meta.ReplicaReady, "n3"},
		{3, meta.ReplicaLeft, "n1 n2 n3 n4 n5"},
	} {
		may := ""
		for n := 1; n <= 5; n++ {
			if node := fmt.Sprintf("n%d", n); authorize(m.State(), trivet.NodeID(node), report(tc.n, tc.state)) == nil {
				may += " " + node
			}
		}
		require.Equal(t, " "+tc.may, may, "replica %d %s", tc.n, tc.state)
	}
	differs := report(4, meta.ReplicaFaulted)
	differs.ReportReplica.Reason = "differs"
	require.NoError(t, authorize(m.State(), "n1", differs), "whether a new one is equal is for the leader to say")
	require.ErrorIs(t, authorize(m.State(), "n3", differs), trivet.ErrInvalid)
	differs.ReportReplica.Replica = volumeReplica(1)
	require.ErrorIs(t, authorize(m.State(), "n2", differs), trivet.ErrInvalid, "of a voter it is not")
	apply(report(1, meta.ReplicaFaulted))
	require.ErrorIs(t, authorize(m.State(), "n2", report(1, meta.ReplicaReady)), trivet.ErrInvalid,
		"that a lost replica is back is for its node to say")
}

func TestNextChange(t *testing.T) {
	t.Parallel()
	now := time.Now()
	s := testState(t, now)
	voter := func(n int) raftgroup.Member {
		return raftgroup.Member{Replica: metaReplica(n), Node: trivet.NodeID(fmt.Sprintf("n%d", n))}
	}
	learner := func(n int) raftgroup.Member {
		m := voter(n)
		m.Learner = true
		return m
	}
	old := func(m raftgroup.Member, n int) raftgroup.Member { // an earlier replica of the node
		m.Replica = trivet.ReplicaID(testUUID(0xb, n))
		return m
	}
	for _, tc := range []struct {
		name    string
		members []raftgroup.Member
		want    string
	}{
		{"one", []raftgroup.Member{voter(1)}, ""},
		{"second", []raftgroup.Member{voter(1), learner(2)}, "promote n2"},
		{"third", []raftgroup.Member{learner(3), voter(1), voter(2)}, "promote n3"},
		{"fourth stays a learner", []raftgroup.Member{voter(1), voter(2), voter(3), learner(4)}, ""},
		{"dead stays a learner", []raftgroup.Member{voter(1), learner(5)}, ""},
		{"unregistered stays a learner", []raftgroup.Member{voter(1), learner(9)}, ""},
		{"an older replica stays a learner", []raftgroup.Member{voter(1), old(learner(2), 2)}, ""},
		{"successor is promoted first", []raftgroup.Member{voter(1), voter(2), old(voter(3), 3), learner(3)}, "promote n3"},
		{"then the old one goes", []raftgroup.Member{voter(1), voter(2), old(voter(3), 3), voter(3)}, "remove old n3"},
		{"an old learner goes at once", []raftgroup.Member{voter(1), old(learner(3), 3), learner(3)}, "remove old n3"},
		{"an old voter without successor stays", []raftgroup.Member{voter(1), voter(2), old(voter(3), 3)}, ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			c, ok := nextChange(s, tc.members, 3, now)
			got := ""
			switch {
			case ok && c.remove:
				got = "remove "
			case ok:
				got = "promote "
			}
			if ok {
				for n := 1; n <= 5; n++ {
					if c.replica == trivet.ReplicaID(testUUID(0xb, n)) {
						got += "old "
					}
				}
				got += string(c.node)
			}
			require.Equal(t, tc.want, got)
		})
	}
}
