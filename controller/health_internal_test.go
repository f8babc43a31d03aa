package controller

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller/meta"
)

// health writes what is wrong with volume 1, in short.
func (b *mendBench) health() []string {
	b.t.Helper()
	s := b.m.State()
	v, ok := s.Volume(1)
	require.True(b.t, ok)
	found := newExamination(s, b.now).conditions(&v)
	var out []string
	for _, c := range found {
		require.NotEmpty(b.t, c.Message)
		out = append(out, string(c.Status)+" "+c.Reason)
	}
	return out
}

// TestHealthOf: what follows from the catalogue. Volume 1 is on n1 to n3, attached to n1.
func TestHealthOf(t *testing.T) {
	t.Parallel()
	away := func(nodes ...int) func(*mendBench) {
		return func(b *mendBench) {
			for _, n := range nodes {
				b.dead(n, time.Second)
			}
		}
	}
	fault := func(reason string, nodes ...int) func(*mendBench) {
		return func(b *mendBench) {
			for _, n := range nodes {
				b.report(10+n, meta.ReplicaFaulted, reason)
			}
		}
	}
	scrub := func(verify bool, left int64) func(*mendBench) {
		return func(b *mendBench) {
			b.do(meta.Command{StartScrub: &meta.StartScrub{Volume: 1, Pass: 1, Verify: verify, Time: b.now}})
			b.do(meta.Command{ReportScrub: &meta.ReportScrub{
				Volume: 1, Pass: 1, Next: 9, Time: b.now, Found: 3, Repaired: 3 - left, Left: left,
				Findings: []string{"block 7 is different on all replicas"},
			}})
		}
	}
	const (
		faulted, absent, down    = "Degraded ReplicaFaulted", "Degraded DiskAbsent", "Degraded NodeDown"
		missing, noQuorum, gone  = "Degraded ReplicasMissing", "Inaccessible NoQuorum", "DataLoss NoGoodCopy"
		holderDown, full, differ = "Degraded AttachedNodeDown", "Degraded DiskFull", "Degraded BlocksDiffer"
	)
	for _, tc := range []struct {
		name   string
		change func(*mendBench)
		want   []string
	}{
		{"well", func(*mendBench) {}, nil},
		{"another node away", away(4, 5), nil},
		{"a node away", away(3), []string{down}},
		{"two nodes away", away(2, 3), []string{down, noQuorum}},
		{"the holder's node away", away(1), []string{holderDown, down}},
		{"all away: the copies may be good", away(1, 2, 3), []string{holderDown, down, noQuorum}},
		{"a copy lost", fault("replica is gone", 3), []string{faulted, missing}},
		{"two copies lost: one may have it all", fault("replica is gone", 2, 3), []string{faulted, missing, noQuorum}},
		{"all copies lost", fault("replica is gone", 1, 2, 3), []string{faulted, missing, noQuorum, gone}},
		{"damaged copies run on", fault(meta.ReasonDiskDamaged+"rot", 2, 3), []string{faulted, missing}},
		{"all copies damaged", fault(meta.ReasonDiskDamaged+"rot", 1, 2, 3), []string{faulted, missing, gone}},
		{
			"all disks away: they may come back",
			fault(meta.ReasonDiskAbsent+"x", 1, 2, 3),
			[]string{absent, missing, noQuorum},
		},
		{"a disk away and not reported", func(b *mendBench) { b.node(3, b.now.Add(time.Second), false) }, []string{absent}},
		{"two disks away and not reported", func(b *mendBench) {
			b.node(2, b.now.Add(time.Second), false)
			b.node(3, b.now.Add(time.Second), false)
		}, []string{absent, noQuorum}},
		{"more wanted", func(b *mendBench) { b.count(5) }, []string{missing}},
		{"fewer wanted", func(b *mendBench) { b.count(1) }, nil},
		{"a disk full", func(b *mendBench) {
			b.do(meta.Command{RenewLease: &meta.RenewLease{
				Node: "n2", Incarnation: testUUID(0xf, 2), Until: b.now.Add(time.Second),
				Disks: []meta.Disk{{ID: trivet.DiskID(testUUID(0xd, 2)), Path: "/d", SizeBytes: 1 << 40}},
			}})
		}, []string{full}},
		{"a scrub that repaired all", scrub(false, 0), nil},
		{"a scrub that could not", scrub(false, 1), []string{"DataLoss BlocksLost"}},
		{"a verify", scrub(true, 3), []string{differ}},
		{"failed", func(b *mendBench) {
			b.do(meta.Command{Fail: &meta.Fail{Volume: 1, Reason: "wiped by hand"}})
		}, []string{"Inaccessible VolumeFailed"}},
		{"being deleted", func(b *mendBench) {
			fault("replica is gone", 1, 2, 3)(b)
			b.do(meta.Command{Detach: &meta.Detach{Volume: 1}})
			b.do(meta.Command{ReportFence: &meta.ReportFence{Volume: 1, Epoch: 2}})
			b.do(meta.Command{Release: &meta.Release{Volume: 1}})
		}, nil},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			b := newMendBench(t)
			tc.change(b)
			require.Equal(t, tc.want, b.health())
		})
	}
}

// TestHealthOfChange: a copy that is on its way in is no copy yet, and one on its way out is one still.
func TestHealthOfChange(t *testing.T) {
	t.Parallel()
	b := newMendBench(t)
	b.report(13, meta.ReplicaFaulted, "replica is gone")
	require.Equal(t, "v1 +n5-n3; ", b.says())
	v, _ := b.m.State().Volume(1)
	conditions := newExamination(b.m.State(), b.now).conditions(&v)
	require.Len(t, conditions, 2)
	require.Contains(t, conditions[1].Message, "2 of 3 replicas are ready: a replica is being made on n5")
	added := v.ReplicaOn("n5").ID
	for _, state := range []meta.ReplicaState{meta.ReplicaFilling, meta.ReplicaReady} {
		b.do(meta.Command{ReportReplica: &meta.ReportReplica{Volume: 1, Replica: added, State: state}})
	}
	require.Empty(t, b.health(), "the one that was lost is Leaving")
	b.dead(5, time.Second)
	b.dead(2, time.Second)
	require.Contains(t, b.health(), "Inaccessible NoQuorum")
}
