package replication_test

import (
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/internal/sim"
	"github.com/trivet-csi/trivet/replication"
	"github.com/trivet-csi/trivet/replication/transport"
)

// allocated lists the blocks that hold data, asking again and again with room for few runs.
func allocated(t *testing.T, v *replication.Volume, room int) (held []int64) {
	t.Helper()
	runs := make([]trivet.Run, room)
	for off := int64(0); off < v.Size(); {
		n, err := v.Allocated(t.Context(), off, v.Size()-off, runs)
		require.NoError(t, err)
		require.Positive(t, n)
		for _, r := range runs[:n] {
			require.Positive(t, r.LenBytes)
			for at := off; r.Allocated && at < off+r.LenBytes; at += trivet.BlockSize {
				held = append(held, at/trivet.BlockSize)
			}
			off += r.LenBytes
		}
		require.LessOrEqual(t, off, v.Size())
	}
	return held
}

// Which blocks hold data is told as of now, from any node and over a change of leader.
func TestAllocated(t *testing.T) {
	inCluster(t, sim.ClusterConfig{}, func(t *testing.T, c *sim.Cluster, v *replication.Volume) {
		ctx := t.Context()
		require.Empty(t, allocated(t, v, 4))
		for _, lba := range []int64{0, 3, 4, 9} {
			require.NoError(t, v.WriteAt(ctx, fill(1, 7), lba*trivet.BlockSize))
		}
		for _, room := range []int{1, 2, 3, 50} {
			require.Equal(t, []int64{0, 3, 4, 9}, allocated(t, v, room))
		}
		require.NoError(t, v.Discard(ctx, 3*trivet.BlockSize, trivet.BlockSize))
		require.NoError(t, v.WriteAt(ctx, fill(1, 7), v.Size()-trivet.BlockSize))
		want := []int64{0, 4, 9, v.Size()/trivet.BlockSize - 1}
		require.Equal(t, want, allocated(t, v, 2))
		leader, _ := mustLeader(t, c)
		require.NoError(t, leader.Crash(ctx, sim.CrashOptions{}))
		require.Equal(t, want, allocated(t, v, 2))
		require.NoError(t, leader.Start(ctx))
		runs := make([]trivet.Run, 1)
		_, err := v.Allocated(ctx, 0, v.Size()+trivet.BlockSize, runs)
		require.ErrorIs(t, err, trivet.ErrOutOfRange)
		_, err = v.Allocated(ctx, 1, trivet.BlockSize, runs)
		require.ErrorIs(t, err, trivet.ErrInvalid)
		require.NoError(t, c.Fence(ctx, 2))
		_, err = v.Allocated(ctx, 0, v.Size(), runs)
		require.ErrorIs(t, err, trivet.ErrFenced)
	})
}

// A replica that is behind is not asked, whatever it may read: a block that was written would be skipped.
func TestAllocatedIsOfTheLeader(t *testing.T) {
	inCluster(t, sim.ClusterConfig{}, func(t *testing.T, c *sim.Cluster, _ *replication.Volume) {
		v, leader, beside := relaxed(t, c, trivet.ReadEventual)
		defer func() { require.NoError(t, v.Close()) }()
		release := hold(c, beside)
		require.NoError(t, v.WriteAt(t.Context(), fill(1, 1), 0))
		assert.Equal(t, []int64{0}, allocated(t, v, 4))
		release()

		// Cut off from the others, a leader that was deposed gives no answer that is used.
		pass := c.Net.Lose(func(e transport.Envelope) bool {
			return e.From == leader.ID() && e.Message.Kind < transport.KindVolumeWrite
		})
		require.NoError(t, v.WriteAt(t.Context(), fill(1, 1), 5*trivet.BlockSize))
		assert.Equal(t, []int64{0, 5}, allocated(t, v, 4))
		pass()
	})
}
