package replication_test

import (
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/internal/sim"
	"github.com/trivet-csi/trivet/replication"
	"github.com/trivet-csi/trivet/replication/raftgroup"
)

// rotInLeader has one follower miss writes, and an entry of them rot in the log of the leader, which has it on its disk
// only. It returns the leader, its replica before that, and the follower, which is down.
func rotInLeader(t *testing.T, c *sim.Cluster, v *replication.Volume) (
	leader *sim.Node, before *replication.Replica, late *sim.Node,
) {
	t.Helper()
	ctx := t.Context()
	writeStamped(t, c, v, 64, 1)
	leader, _ = mustLeader(t, c)
	late = followersOf(c, leader)[0]
	require.NoError(t, late.Crash(ctx, sim.CrashOptions{}))
	for lba := range trivet.LBA(32) {
		require.NoError(t, v.WriteAt(ctx, stamped(lba, 2), int64(lba)*trivet.BlockSize))
	}
	require.NoError(t, leader.Stop())
	require.NoError(t, leader.Start(ctx)) // nothing of its log is in memory now
	now, r := mustLeader(t, c)
	for now != leader {
		_ = r.TransferTo(ctx, leader.ReplicaID()) // until it has caught up
		require.NoError(t, sim.Sleep(ctx, 100*time.Millisecond))
		now, r = mustLeader(t, c)
	}
	require.Equal(t, stamped(31, 2), mustRead(t, v, 31*trivet.BlockSize, 1), "it has applied all")
	mustRot(t, leader, 7, 2)
	return leader, r, late
}

// A leader that cannot read an entry of its own log when a follower lacks it is suspect: it leads no more, and is
// opened again with a log that begins behind that entry, as it would be after a restart. Its process, and the volume,
// go on.
func TestLeaderWithRottenEntry(t *testing.T) {
	inCluster(t, sim.ClusterConfig{}, func(t *testing.T, c *sim.Cluster, v *replication.Volume) {
		ctx := t.Context()
		leader, before, late := rotInLeader(t, c, v)
		mustScrub(t, c, replication.ScrubOptions{Verify: true})
		checked := before.Integrity().CheckedBytes
		require.Positive(t, checked)
		require.NoError(t, late.Start(ctx))
		requireEventually(t, "the replica is opened again", func() bool {
			r, ok := leader.Replica()
			return ok && r != before
		})
		require.NoError(t, v.WriteAt(ctx, stamped(40, 3), 40*trivet.BlockSize))
		r, ok := leader.Replica()
		require.True(t, ok)
		assert.GreaterOrEqual(t, r.Integrity().CheckedBytes, checked, "it counts on")
		sum := mustScrub(t, c, replication.ScrubOptions{})
		assert.Equal(t, sum.Found, sum.Repaired, "the block that stands in that entry, unless a catch-up has met it before")
		assert.Zero(t, mustScrub(t, c, replication.ScrubOptions{}).Found)
		requireEqualReplicas(t, c)
		requireStamped(t, v, 32, 2)
		assert.False(t, c.Damaged(), "nothing was lost")
	})
}

// lazyFlush says, when told to, that the state is not durable.
type lazyFlush struct {
	raftgroup.StateMachine
	lies *atomic.Bool
}

func (m lazyFlush) Flush() (uint64, error) {
	index, err := m.StateMachine.Flush()
	if m.lies.Load() {
		index--
	}
	return index, err
}

// When the state cannot stand in for the damaged entry, it may be the only copy of an acknowledged write: the replica
// is not opened again and reported as damaged, nothing is cut, and the others go on.
func TestLeaderWithRottenEntryThatIsNeeded(t *testing.T) {
	var lies atomic.Bool
	cfg := sim.ClusterConfig{WrapMachine: func(m raftgroup.StateMachine) raftgroup.StateMachine {
		return lazyFlush{m, &lies}
	}}
	inCluster(t, cfg, func(t *testing.T, c *sim.Cluster, v *replication.Volume) {
		ctx := t.Context()
		leader, _, late := rotInLeader(t, c, v)
		leader.Excuse()
		lies.Store(true)
		require.NoError(t, late.Start(ctx))
		requireEventually(t, "damage is reported", c.Damaged)
		_, ok := leader.Replica()
		assert.False(t, ok)
		assert.True(t, leader.Up(), "its process goes on")
		require.NoError(t, v.WriteAt(ctx, stamped(40, 3), 40*trivet.BlockSize))
		requireStamped(t, v, 32, 2)
	})
}

func requireEventually(t *testing.T, what string, done func() bool) {
	t.Helper()
	for began := time.Now(); !done(); {
		require.Less(t, time.Since(began), time.Minute, what)
		require.NoError(t, sim.Sleep(t.Context(), 100*time.Millisecond))
	}
}
