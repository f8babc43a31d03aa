package node

import (
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller/meta"
)

// A leader refuses what the disk of another replica has no room for, before that is at its end (H26).
func TestRoomElsewhere(t *testing.T) {
	cat := newFakeCatalogue()
	for n := 1; n <= 4; n++ {
		cat.addNode(n)
	}
	cat.addVolume(vol, 3, nil)
	for n := 1; n <= 3; n++ {
		cat.report(vol, n, meta.ReplicaReady)
	}
	now := time.Now()
	left := func(n int, free int64, until time.Time) {
		node, ok := cat.Local().Node(testNodeID(n))
		require.True(t, ok)
		node.LeaseUntil, node.Incarnation = until, trivet.NewUUID()
		node.Disks[0].FreeBytes = free
		cat.must(meta.Command{RegisterNode: &meta.RegisterNode{Node: node}})
	}
	room := roomElsewhere(cat)
	require.NoError(t, room(vol))
	assert.Zero(t, testing.AllocsPerRun(100, func() { _ = room(vol) }), "asked for each write")

	left(4, 0, now.Add(time.Hour))
	require.NoError(t, room(vol), "not one of its disks")
	left(2, 0, now.Add(time.Hour))
	err := room(vol)
	require.ErrorIs(t, err, trivet.ErrNoSpace)
	require.ErrorContains(t, err, "of n2 is full")
	require.NoError(t, room(vol+1), "of an unknown volume nothing is known")
	left(2, 1<<20, now.Add(time.Hour))
	require.NoError(t, room(vol), "it has room again, and nobody had to be restarted")

	left(3, 0, now.Add(-time.Hour))
	require.NoError(t, room(vol), "a node that is down holds nobody up")
	left(3, 0, now.Add(time.Hour))
	require.ErrorIs(t, room(vol), trivet.ErrNoSpace)
	cat.report(vol, 3, meta.ReplicaFaulted)
	require.NoError(t, room(vol), "nor does a replica that is lost")
}
