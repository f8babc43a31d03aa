package controller_test

import (
	"context"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller"
	"github.com/trivet-csi/trivet/controller/meta"
)

func TestCreateSnapshotGroup(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		b, ctx := newCopyBench(t), t.Context()
		w, err := b.ctrl.CreateVolume(ctx, controller.CreateRequest{Name: "w"})
		require.NoError(t, err)
		_, err = b.ctrl.Attach(ctx, w.ID, "n2", meta.SingleNodeMultiWriter, false)
		require.NoError(t, err)
		both := []trivet.VolumeID{w.ID, b.v.ID}
		g, err := b.ctrl.CreateSnapshotGroup(ctx, "g", both)
		require.NoError(t, err)
		require.Equal(t, meta.GroupReady, g.State)
		require.Len(t, g.Snapshots, 2)
		assert.Equal(t, "g/w", g.Snapshots[0].Name)
		assert.Equal(t, meta.SnapshotReady, g.Snapshots[0].State)
		assert.EqualValues(t, 9, g.Held)
		again, err := b.ctrl.CreateSnapshotGroup(ctx, "g", []trivet.VolumeID{b.v.ID, w.ID})
		require.NoError(t, err)
		assert.Equal(t, g, again)
		_, err = b.ctrl.CreateSnapshotGroup(ctx, "g", both[:1])
		require.ErrorIs(t, err, trivet.ErrExists)
		_, err = b.ctrl.CreateSnapshotGroup(ctx, "h", []trivet.VolumeID{w.ID, 99})
		require.ErrorIs(t, err, trivet.ErrNotFound)
		_, err = b.ctrl.CreateSnapshotGroup(ctx, "h", nil)
		require.ErrorIs(t, err, trivet.ErrInvalid)
		require.ErrorIs(t, b.ctrl.DeleteSnapshot(ctx, g.Snapshots[0].ID), trivet.ErrInUse)
		one, err := b.ctrl.SnapshotGroup(ctx, g.ID)
		require.NoError(t, err)
		assert.Equal(t, g, one)
		all, err := b.ctrl.SnapshotGroups(ctx)
		require.NoError(t, err)
		assert.Len(t, all, 1)

		require.NoError(t, b.ctrl.DeleteSnapshotGroup(ctx, g.ID))
		require.NoError(t, b.ctrl.DeleteSnapshotGroup(ctx, g.ID))
		_, err = b.ctrl.SnapshotGroup(ctx, g.ID)
		require.ErrorIs(t, err, trivet.ErrNotFound)
		_, err = b.ctrl.SnapshotGroupByName(ctx, "g")
		require.ErrorIs(t, err, trivet.ErrNotFound)
		snaps, err := b.ctrl.Snapshots(ctx)
		require.NoError(t, err)
		require.Empty(t, snaps)
	})
}

// A group that failed says why, to everybody who asks for it again, until it is deleted.
func TestSnapshotGroupThatFails(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		b, ctx := newCopyBench(t), t.Context()
		b.agents.set(t, func() { b.agents.noGroups = true })
		for range 2 {
			g, err := b.ctrl.CreateSnapshotGroup(ctx, "g", []trivet.VolumeID{b.v.ID})
			require.ErrorIs(t, err, trivet.ErrUnavailable)
			require.ErrorContains(t, err, "node n9 does not answer")
			require.Equal(t, meta.GroupFailed, g.State)
		}
		g, err := b.ctrl.SnapshotGroupByName(ctx, "g")
		require.NoError(t, err)
		require.NoError(t, b.ctrl.DeleteSnapshotGroup(ctx, g.ID))
		b.agents.set(t, func() { b.agents.noGroups = false })
		_, err = b.ctrl.CreateSnapshotGroup(ctx, "g", []trivet.VolumeID{b.v.ID})
		require.NoError(t, err)
	})
}

// A volume that is on its way to a node is waited for: its epoch has to be fenced.
func TestSnapshotGroupWaitsForTheFence(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		b, ctx := newCopyBench(t), t.Context()
		b.agents.set(t, func() { b.agents.noFence = true })
		b.store.must(t, meta.Command{Attach: &meta.Attach{Volume: b.v.ID, Node: "n1", Mode: meta.SingleNodeMultiWriter}})
		_, err := b.ctrl.CreateSnapshotGroup(soon(t), "g", []trivet.VolumeID{b.v.ID})
		require.ErrorIs(t, err, trivet.ErrPending)
		done := make(chan error)
		go func() {
			ctx, cancel := context.WithTimeout(ctx, time.Minute)
			defer cancel()
			_, err := b.ctrl.CreateSnapshotGroup(ctx, "g", []trivet.VolumeID{b.v.ID})
			done <- err
		}()
		time.Sleep(time.Second)
		b.agents.set(t, func() { b.agents.noFence = false })
		require.NoError(t, <-done)
	})
}
