package controller_test

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller"
	"github.com/trivet-csi/trivet/controller/meta"
)

// growable has a volume of 2 GiB on three nodes whose agents work.
func growable(t *testing.T) (*controller.Controller, *memory, *agents, trivet.VolumeID) {
	t.Helper()
	store := newMemory(t, 3)
	a := startAgents(t, store)
	c := controller.New(store)
	v, err := c.CreateVolume(t.Context(), controller.CreateRequest{Name: "db", RequiredBytes: 2 * gib})
	require.NoError(t, err)
	return c, store, a, v.ID
}

func TestResizeVolume(t *testing.T) {
	t.Parallel()
	c, _, _, id := growable(t)
	v, err := c.ResizeVolume(t.Context(), id, 3*gib-1)
	require.NoError(t, err)
	assert.Equal(t, 3*gib, v.SizeBytes, "whole MiB")
	assert.Equal(t, 2*gib, v.Start())
	again, err := c.ResizeVolume(t.Context(), id, 3*gib)
	require.NoError(t, err)
	assert.Equal(t, v, again)

	for name, tc := range map[string]struct {
		size int64
		want error
		says string
	}{
		"smaller":     {2 * gib, trivet.ErrOutOfRange, "has 3221225472 bytes and never shrinks"},
		"nothing":     {0, trivet.ErrInvalid, "more than zero"},
		"largest":     {1 << 60, trivet.ErrOutOfRange, "a volume has at most"},
		"beyond disk": {101 * gib, trivet.ErrOutOfRange, "disk of its replica on n"},
		"beyond free": {90 * gib, trivet.ErrNoSpace, "85899345920 bytes free"},
	} {
		_, err := c.ResizeVolume(t.Context(), id, tc.size)
		require.ErrorIs(t, err, tc.want, name)
		require.ErrorContains(t, err, tc.says, name)
	}
	_, err = c.ResizeVolume(t.Context(), 4711, gib)
	require.ErrorIs(t, err, trivet.ErrNotFound)
}

// ExpandVolume is what CSI asks: at least so much, and at most, whatever there is.
func TestExpandVolume(t *testing.T) {
	t.Parallel()
	c, _, _, id := growable(t)
	v, err := c.ExpandVolume(t.Context(), id, gib, 0)
	require.NoError(t, err)
	assert.Equal(t, 2*gib, v.SizeBytes, "large enough already")
	v, err = c.ExpandVolume(t.Context(), id, 4*gib, 5*gib)
	require.NoError(t, err)
	assert.Equal(t, 4*gib, v.SizeBytes)
	_, err = c.ExpandVolume(t.Context(), id, gib, 3*gib)
	require.ErrorIs(t, err, trivet.ErrOutOfRange)
	_, err = c.ExpandVolume(t.Context(), id, 5*gib, 3*gib)
	require.ErrorIs(t, err, trivet.ErrOutOfRange)
}

// A group without a quorum has not grown when the call ends; the wish stays, and once the group has a quorum the
// same call finds it done (failed expansion, H20).
func TestResizeWithoutQuorum(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		c, store, a, id := growable(t)
		a.set(t, func() { a.noFence = true })
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		_, err := c.ResizeVolume(ctx, id, 3*gib)
		require.ErrorIs(t, err, trivet.ErrUnavailable)
		v, _ := store.Local().Volume(id)
		assert.True(t, v.Growing())
		assert.Equal(t, 2*gib, v.SizeBytes, "what is not committed is not shown as the size")
		_, err = c.ResizeVolume(t.Context(), id, 2*gib)
		require.ErrorContains(t, err, "is growing to")
		a.set(t, func() { a.noFence = false })
		v, err = c.ResizeVolume(t.Context(), id, 3*gib)
		require.NoError(t, err)
		assert.Equal(t, 3*gib, v.SizeBytes)
	})
}

// The catalogue may change between read and proposal: the decision is made again.
func TestResizeOfWhatChanges(t *testing.T) {
	t.Parallel()
	c, store, _, id := growable(t)
	raced := false
	store.before = func(cmd meta.Command) bool {
		if cmd.GrowVolume != nil && !raced {
			raced = true
			v, _ := store.Local().Volume(id)
			store.must(t, meta.Command{SetParams: &meta.SetParams{Volume: v.ID, Params: map[string]string{"burst": "7"}}})
		}
		return true
	}
	v, err := c.ResizeVolume(t.Context(), id, 3*gib)
	require.NoError(t, err)
	assert.True(t, raced)
	assert.Equal(t, 3*gib, v.SizeBytes)
}

// A volume that is brought back to a snapshot, or recovered, is not asked to grow again and again, which would be one
// entry of the catalogue's log after the other.
func TestResizeOfWhatIsOccupied(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		b := newCopyBench(t)
		s := b.mustSnapshot(t, "s")
		b.agents.set(t, func() { b.agents.noFence = true })
		_, err := b.ctrl.RestoreInPlace(soon(t), s.ID)
		require.ErrorIs(t, err, trivet.ErrUnavailable)
		requireOneTry(t, b.store, func() error { _, err := b.ctrl.ExpandVolume(t.Context(), b.v.ID, 3*gib, 0); return err })
	})
	c, store, id := recoverable(t)
	_, err := c.RecoverVolume(t.Context(), id, true, logsAt([2]uint64{3, 10}, [2]uint64{2, 99}))
	require.NoError(t, err)
	requireOneTry(t, store, func() error { _, err := c.ExpandVolume(t.Context(), id, 3*gib, 0); return err })
	requireOneTry(t, store, func() error { _, err := c.CreateSnapshot(t.Context(), id, "s"); return err })
}

// requireOneTry stops the test unless call proposes one command, which is refused as ErrPending.
func requireOneTry(t *testing.T, store *memory, call func() error) {
	t.Helper()
	tries := 0
	store.before = func(c meta.Command) bool {
		if c.GrowVolume != nil || c.CreateSnapshot != nil {
			tries++
		}
		return tries < 3
	}
	require.ErrorIs(t, call(), trivet.ErrPending)
	require.Equal(t, 1, tries)
	store.before = nil
}

// Somebody who asks for less than what a volume is growing to already waits for that, unless it is too much for them.
func TestExpandToLessThanIsWanted(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		c, _, a, id := growable(t)
		a.set(t, func() { a.noFence = true })
		_, err := c.ExpandVolume(soon(t), id, 4*gib, 0)
		require.ErrorIs(t, err, trivet.ErrUnavailable)
		_, err = c.ExpandVolume(soon(t), id, 3*gib, 0)
		require.ErrorIs(t, err, trivet.ErrUnavailable)
		_, err = c.ExpandVolume(soon(t), id, 3*gib, 3*gib)
		require.ErrorIs(t, err, trivet.ErrOutOfRange)
		a.set(t, func() { a.noFence = false })
		v, err := c.ExpandVolume(t.Context(), id, 3*gib, 0)
		require.NoError(t, err)
		assert.Equal(t, 4*gib, v.SizeBytes)
	})
}
