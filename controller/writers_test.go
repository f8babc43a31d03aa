package controller_test

import (
	"context"
	"testing"
	"testing/synctest"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller/meta"
)

// TestTwoWritersComeAndGo: who joins, and who leaves, waits for a fence at which the other goes on; a third is told of
// both.
func TestTwoWritersComeAndGo(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		b := newBench(t, 3)
		v := b.create(t, "x", nil)
		got, err := b.AttachBeside(soon(t), v.ID, "n1", "n2")
		require.NoError(t, err)
		assert.True(t, got.Usable("n1", 1))
		_, err = b.AttachBeside(soon(t), v.ID, "n3", "")
		require.ErrorIs(t, err, trivet.ErrInUse)

		b.agents.set(t, func() { b.agents.noFence = true })
		joined := make(chan error, 1)
		go func() {
			_, err := b.AttachBeside(soon(t), v.ID, "n2", "n1")
			joined <- err
		}()
		synctest.Wait()
		assert.Empty(t, joined, "n1 is not fenced from its epoch yet")
		b.agents.set(t, func() { b.agents.noFence = false })
		require.NoError(t, <-joined)
		v, err = b.Volume(soon(t), v.ID)
		require.NoError(t, err)
		assert.True(t, v.Usable("n1", 2) && v.Usable("n2", 2))
		assert.Equal(t, [meta.WritersMax]trivet.Epoch{1, 2}, v.Writers())
		_, err = b.Attach(soon(t), v.ID, "n3", meta.MultiNodeReader, false)
		require.ErrorIs(t, err, trivet.ErrInUse)
		require.ErrorContains(t, err, "n1, n2")
		require.ErrorContains(t, b.DeleteVolume(soon(t), v.ID), "n1, n2")

		b.agents.set(t, func() { b.agents.noFence = true })
		for range 2 { // a repeated call waits for the same fence
			ctx, cancel := context.WithCancel(t.Context())
			left := make(chan error, 1)
			go func() { left <- b.Detach(ctx, v.ID, "n1") }()
			synctest.Wait()
			assert.Empty(t, left, "it may write still")
			cancel()
			require.Error(t, <-left)
		}
		b.agents.set(t, func() { b.agents.noFence = false })
		require.NoError(t, b.Detach(soon(t), v.ID, "n1"))
		got, err = b.AttachBeside(soon(t), v.ID, "n1", "")
		require.NoError(t, err)
		assert.Equal(t, [meta.WritersMax]trivet.Epoch{4, 2}, got.Writers(), "n2 is writer 1 still")
		require.NoError(t, b.Detach(soon(t), v.ID, ""))
		v, err = b.Volume(soon(t), v.ID)
		require.NoError(t, err)
		assert.Empty(t, v.Holders())
		assert.Equal(t, trivet.Epoch(5), v.FencedEpoch)
	})
}

// TestWriterComesBack: a node that left, and comes back before it is fenced, waits for that.
func TestWriterComesBack(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		b := newBench(t, 3)
		v := b.create(t, "x", nil)
		for _, n := range []trivet.NodeID{"n1", "n2"} {
			_, err := b.AttachBeside(soon(t), v.ID, n, "")
			require.NoError(t, err)
		}
		b.agents.set(t, func() { b.agents.noFence = true })
		b.store.must(t, meta.Command{Detach: &meta.Detach{Volume: v.ID, Node: "n2"}})
		back := make(chan error, 1)
		go func() {
			_, err := b.AttachBeside(soon(t), v.ID, "n2", "")
			back <- err
		}()
		synctest.Wait()
		assert.Empty(t, back)
		b.agents.set(t, func() { b.agents.noFence = false })
		require.NoError(t, <-back)
	})
}
