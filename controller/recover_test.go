package controller_test

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller"
	"github.com/trivet-csi/trivet/controller/meta"
)

// recoverable has a volume with five replicas, of which those on n1, n2 and n3 are lost.
func recoverable(t *testing.T) (*controller.Controller, *memory, trivet.VolumeID) {
	t.Helper()
	store := newMemory(t, 5)
	a := startAgents(t, store)
	c := controller.New(store)
	v, err := c.CreateVolume(t.Context(), controller.CreateRequest{
		Name: "db", RequiredBytes: gib, Params: map[string]string{"replicas": "5"},
	})
	require.NoError(t, err)
	a.set(t, func() { a.dead[nodeID(1)], a.dead[nodeID(2)], a.dead[nodeID(3)] = true, true, true })
	for n := 1; n <= 3; n++ {
		down := testNode(n, time.Now())
		down.Incarnation, down.LeaseUntil = uuid(0xf, 100+n), time.Now().Add(-time.Duration(n)*time.Hour)
		store.must(t, meta.Command{RegisterNode: &meta.RegisterNode{Node: down}})
	}
	return c, store, v.ID
}

// logsAt answers where the logs of n4 and n5 end.
func logsAt(four, five [2]uint64) func(context.Context, trivet.NodeID, trivet.VolumeID) (uint64, uint64, error) {
	return func(_ context.Context, node trivet.NodeID, _ trivet.VolumeID) (uint64, uint64, error) {
		switch node {
		case "n4":
			return four[0], four[1], nil
		case "n5":
			return five[0], five[1], nil
		}
		return 0, 0, fmt.Errorf("asked %s: %w", node, trivet.ErrUnavailable)
	}
}

// The newest log is that of the higher term, whatever its length, as in an election.
func TestRecoverFromTheNewestLog(t *testing.T) {
	t.Parallel()
	for want, logs := range map[trivet.NodeID][2][2]uint64{
		"n4": {{3, 10}, {2, 99}},
		"n5": {{3, 10}, {3, 11}},
	} {
		c, store, id := recoverable(t)
		ask := logsAt(logs[0], logs[1])
		plan, err := c.RecoverVolume(t.Context(), id, false, ask)
		require.NoError(t, err)
		assert.Equal(t, want, plan.Survivor.Node)
		assert.Len(t, plan.Lost, 4)
		v, _ := store.Local().Volume(id)
		assert.Len(t, v.Replicas, 5, "nothing is done without consent")

		done, err := c.RecoverVolume(t.Context(), id, true, ask)
		require.NoError(t, err)
		require.Len(t, done.Volume.Replicas, 1)
		assert.Equal(t, want, done.Volume.Replicas[0].Node)
		assert.Equal(t, done.Survivor.Replica, done.Volume.Recover)
		assert.InDelta(t, 3*time.Hour, time.Since(done.Since), float64(time.Minute), "the first that was gone")
		assert.Contains(t, done.Warning(), "last known to live at")
		audit := store.Local().Audit()
		last := audit.Records[len(audit.Records)-1]
		assert.Equal(t, meta.AuditRecover, last.Kind)
		assert.Equal(t, want, last.Node)
		require.NoError(t, audit.Verify())
		_, err = c.RecoverVolume(t.Context(), id, true, ask)
		require.ErrorIs(t, err, trivet.ErrInvalid, "it has its majority")
	}
}

func TestRecoverRefuses(t *testing.T) {
	t.Parallel()
	c, store, id := recoverable(t)
	ask := logsAt([2]uint64{1, 1}, [2]uint64{1, 1})
	_, err := c.RecoverVolume(t.Context(), 4711, true, ask)
	require.ErrorIs(t, err, trivet.ErrNotFound)
	deaf := func(context.Context, trivet.NodeID, trivet.VolumeID) (uint64, uint64, error) {
		return 0, 0, trivet.ErrUnavailable
	}
	_, err = c.RecoverVolume(t.Context(), id, true, deaf)
	require.ErrorIs(t, err, trivet.ErrUnavailable, "one that lives and is not heard may have the newest log")

	back := testNode(3, time.Now())
	back.Incarnation = uuid(0xf, 200)
	store.must(t, meta.Command{RegisterNode: &meta.RegisterNode{Node: back}})
	_, err = c.RecoverVolume(t.Context(), id, true, ask)
	require.ErrorIs(t, err, trivet.ErrInvalid)
	require.ErrorContains(t, err, "3 of its 5 replicas live")
	for n := 3; n <= 5; n++ {
		down := testNode(n, time.Now())
		down.Incarnation, down.LeaseUntil = uuid(0xf, 300+n), time.Now().Add(-time.Hour)
		store.must(t, meta.Command{RegisterNode: &meta.RegisterNode{Node: down}})
	}
	_, err = c.RecoverVolume(t.Context(), id, true, ask)
	require.ErrorIs(t, err, trivet.ErrUnavailable)
	v, _ := store.Local().Volume(id)
	assert.Len(t, v.Replicas, 5)
}
