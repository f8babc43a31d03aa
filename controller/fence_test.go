package controller_test

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller/meta"
)

// away lets the lease of a node run out.
func (b *bench) away(t *testing.T, n int) {
	t.Helper()
	node := testNode(n, time.Now())
	node.Incarnation, node.LeaseUntil = uuid(0xf, 500+n), time.Now().Add(time.Second)
	b.store.must(t, meta.Command{RegisterNode: &meta.RegisterNode{Node: node}})
	<-time.After(2 * time.Second) // of the bubble
}

// back renews it.
func (b *bench) back(t *testing.T, n int) {
	t.Helper()
	b.store.must(t, meta.Command{RenewLease: &meta.RenewLease{
		Node: nodeID(n), Incarnation: uuid(0xf, 500+n), Until: time.Now().Add(time.Hour),
	}})
}

// TestFenceAway: a volume is taken from a node whose lease has run out, behind the fence, and from no other.
func TestFenceAway(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		b := newBench(t, 3)
		v := b.create(t, "x", nil)
		_, err := b.Attach(soon(t), v.ID, "n1", meta.SingleNodeMultiWriter, false)
		require.NoError(t, err)

		_, err = b.FenceAway(soon(t), v.ID, "n1")
		require.ErrorIs(t, err, trivet.ErrInUse, "it lives")
		epoch, err := b.FenceAway(soon(t), v.ID, "n2")
		require.NoError(t, err, "not attached there")
		assert.Equal(t, trivet.Epoch(1), epoch)
		epoch, err = b.FenceAway(soon(t), 12345, "n1")
		require.NoError(t, err, "unknown")
		assert.Zero(t, epoch)

		b.away(t, 1)
		b.agents.set(t, func() { b.agents.noFence = true })
		_, err = b.FenceAway(soon(t), v.ID, "n1")
		require.ErrorIs(t, err, trivet.ErrUnavailable, "no quorum, no fence, no success")
		done := make(chan error, 1)
		go func() {
			_, err := b.FenceAway(soon(t), v.ID, "n1")
			done <- err
		}()
		synctest.Wait()
		assert.Empty(t, done, "repeated, it waits again")
		b.agents.set(t, func() { b.agents.noFence = false })
		require.NoError(t, <-done)
		got, err := b.Volume(soon(t), v.ID)
		require.NoError(t, err)
		assert.Empty(t, got.Holder())
		assert.Equal(t, trivet.Epoch(2), got.FencedEpoch)

		b.back(t, 1)
		_, err = b.Attach(soon(t), v.ID, "n1", meta.SingleNodeMultiWriter, false)
		require.NoError(t, err)
	})
}

// A node that is away gets no attachment, even if it had the volume last: whoever moves its pods would have to fence it
// once more, and the attacher asks for one when it finds that the volume was taken from there. What it holds it keeps.
func TestAttachToANodeThatIsAway(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		b := newBench(t, 3)
		v := b.create(t, "x", nil)
		attach := func() error {
			_, err := b.Attach(soon(t), v.ID, "n1", meta.SingleNodeMultiWriter, false)
			return err
		}
		require.NoError(t, attach())
		b.away(t, 1)
		require.NoError(t, attach(), "it has it already")
		_, err := b.FenceAway(soon(t), v.ID, "n1")
		require.NoError(t, err)
		err = attach()
		require.ErrorIs(t, err, trivet.ErrUnavailable)
		require.ErrorContains(t, err, "the node is away")
		_, err = b.Attach(soon(t), v.ID, "n2", meta.SingleNodeMultiWriter, false)
		require.NoError(t, err)
		require.NoError(t, b.Detach(soon(t), v.ID, "n2"))
		b.back(t, 1)
		require.NoError(t, attach())
	})
}

// TestFenceAwayMeetsAReturn: the node renews its lease between the read and the proposal. It keeps the volume.
func TestFenceAwayMeetsAReturn(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		b := newBench(t, 3)
		v := b.create(t, "x", nil)
		_, err := b.Attach(soon(t), v.ID, "n1", meta.SingleNodeMultiWriter, false)
		require.NoError(t, err)
		b.away(t, 1)
		once := true
		b.store.before = func(c meta.Command) bool {
			if c.Detach != nil && once {
				once = false
				b.back(t, 1)
			}
			return true
		}
		_, err = b.FenceAway(soon(t), v.ID, "n1")
		require.ErrorIs(t, err, trivet.ErrInUse)
		assert.False(t, once)
		got, err := b.Volume(soon(t), v.ID)
		require.NoError(t, err)
		require.NotNil(t, got.GrantOf("n1"))
		assert.Equal(t, trivet.Epoch(1), got.Epoch)
	})
}

// TestFenceAwayOfAReader: others go on reading, and the last one is fenced.
func TestFenceAwayOfAReader(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		b := newBench(t, 3)
		v := b.create(t, "x", nil)
		for _, n := range []trivet.NodeID{"n1", "n2"} {
			_, err := b.Attach(soon(t), v.ID, n, meta.MultiNodeReader, false)
			require.NoError(t, err)
		}
		b.away(t, 1)
		epoch, err := b.FenceAway(soon(t), v.ID, "n1")
		require.NoError(t, err)
		assert.Equal(t, trivet.Epoch(1), epoch)
		b.away(t, 2)
		epoch, err = b.FenceAway(soon(t), v.ID, "n2")
		require.NoError(t, err)
		assert.Equal(t, trivet.Epoch(2), epoch)
	})
}
