package controller

import (
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller/meta"
)

// tell has a node say how far a fill on it is.
func (b *mendBench) tell(n int, replica trivet.ReplicaID, progress uint64) {
	b.t.Helper()
	nd, ok := b.m.State().Node(benchNode(n))
	require.True(b.t, ok)
	b.do(meta.Command{RenewLease: &meta.RenewLease{
		Node: nd.ID, Incarnation: nd.Incarnation, Until: nd.LeaseUntil,
		Fills: []meta.Fill{{Replica: replica, Progress: progress}},
	}})
}

// filling returns the bench with a fifth replica that is being filled on n5, seen so at this moment.
func filling(t *testing.T, state meta.ReplicaState) (*mendBench, trivet.ReplicaID) {
	t.Helper()
	b := newMendBench(t)
	b.count(5)
	require.Equal(t, "v1 +n5; ", b.says())
	v, _ := b.m.State().Volume(1)
	id := v.Change().ID
	if state == meta.ReplicaFilling {
		b.do(meta.Command{ReportReplica: &meta.ReportReplica{Volume: 1, Replica: id, State: state}})
	}
	require.Empty(t, b.says())
	return b, id
}

// later lets time pass, in which all nodes but the silent renew their leases.
func (b *mendBench) later(d time.Duration, silent ...int) {
	b.now = b.now.Add(d)
	for n := 1; n <= 5; n++ {
		nd, _ := b.m.State().Node(benchNode(n))
		nd.LeaseUntil = b.now.Add(time.Second)
		quiet := false
		for _, s := range silent {
			quiet = quiet || s == n
		}
		if !quiet {
			b.do(meta.Command{RenewLease: &meta.RenewLease{
				Node: nd.ID, Incarnation: nd.Incarnation, Until: nd.LeaseUntil, Fills: nd.Fills,
			}})
		}
	}
}

// A replica that is made or filled and comes no step further for replaceAfter, a minute here, is given up.
func TestMendGivesUpWhatStandsStill(t *testing.T) {
	t.Parallel()
	for _, state := range []meta.ReplicaState{meta.ReplicaJoining, meta.ReplicaFilling} {
		b, _ := filling(t, state)
		b.later(59 * time.Second)
		assert.Empty(t, b.says())
		b.later(time.Second)
		assert.Equal(t, "v1 -n5; ", b.says(), state)
	}
}

// What counts is that it moves: however slowly, it is left alone, and each step counts from its own time.
func TestMendLeavesAloneWhatMoves(t *testing.T) {
	t.Parallel()
	b, id := filling(t, meta.ReplicaFilling)
	for i := range uint64(10) {
		b.later(45 * time.Second)
		b.tell(5, id, 1000-i)
		require.Empty(t, b.says())
	}
	b.later(59 * time.Second)
	b.tell(5, id, 1000-9) // the same again is no step
	require.Empty(t, b.says())
	b.later(time.Second)
	assert.Equal(t, "v1 -n5; ", b.says())
}

// A new leader of the catalogue has not seen since when it stands still, and begins to count.
func TestMendGivesUpPatiently(t *testing.T) {
	t.Parallel()
	b, _ := filling(t, meta.ReplicaFilling)
	b.later(time.Hour)
	b.h = newHistory(b.now)
	assert.Empty(t, b.says())
	b.later(time.Minute)
	assert.Equal(t, "v1 -n5; ", b.says())
}

// However short replaceAfter is, nodes are given the time to tell that it moves.
func TestMendGivesFillsTime(t *testing.T) {
	t.Parallel()
	b, _ := filling(t, meta.ReplicaFilling)
	b.set.replaceAfter = time.Second
	b.later(fillPatience - time.Second)
	assert.Empty(t, b.says())
	b.later(time.Second)
	assert.Equal(t, "v1 -n5; ", b.says())
}

// It is not to blame while the group cannot fill it: two of three voters are down.
func TestMendBlamesNobodyWithoutAQuorum(t *testing.T) {
	t.Parallel()
	b, _ := filling(t, meta.ReplicaFilling)
	b.later(2*time.Minute, 2, 3)
	assert.NotContains(t, b.says(), "-n5")
	b.later(time.Second, 3)
	assert.Equal(t, "v1 -n5; ", b.says(), "two of three will do")
}

// The node on which it stood still is not the next to be tried.
func TestMenderRemembersWhereItGaveUp(t *testing.T) {
	t.Parallel()
	b, id := filling(t, meta.ReplicaFilling)
	m := NewMender(nil, "n1", time.Minute, nil)
	v, _ := b.m.State().Volume(1)
	m.note(b.m.State(), b.h, removal(&v, v.Replica(id)), b.now)
	assert.Equal(t, b.now, b.h.tried[attempt{1, "n5"}])
	delete(b.h.tried, attempt{1, "n5"})
	m.note(b.m.State(), b.h, removal(&v, v.Replica(volumeReplica(12))), b.now)
	assert.Empty(t, b.h.tried, "one that goes because it is not wanted was no failure")
}
