package replication_test

import (
	"context"
	"math/rand/v2"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/engine"
	"github.com/trivet-csi/trivet/internal/sim"
	"github.com/trivet-csi/trivet/replication"
	"github.com/trivet-csi/trivet/replication/transport"
)

// scrubAll scrubs the whole volume through whoever leads, and adds up what was found.
func scrubAll(ctx context.Context, leader func() (*replication.Replica, error), o replication.ScrubOptions) (
	sum replication.ScrubRange, err error,
) {
	for !sum.Done {
		r, err := leader()
		if err != nil {
			return sum, err
		}
		got, err := r.ScrubRange(ctx, o)
		if err != nil {
			return sum, err
		}
		sum.CheckedBytes += got.CheckedBytes
		sum.Found, sum.Repaired, sum.Left = sum.Found+got.Found, sum.Repaired+got.Repaired, sum.Left+got.Left
		sum.Findings, sum.Absent = append(sum.Findings, got.Findings...), append(sum.Absent, got.Absent...)
		sum.Next, sum.Done, o.From = got.Next, got.Done, got.Next
	}
	return sum, nil
}

func mustScrub(t *testing.T, c *sim.Cluster, o replication.ScrubOptions) replication.ScrubRange {
	t.Helper()
	sum, err := scrubAll(t.Context(), func() (*replication.Replica, error) {
		_, r, err := c.Leader(t.Context())
		return r, err
	}, o)
	require.NoError(t, err)
	return sum
}

// scrubMeanwhile starts what mustScrub does. What it returns waits for the end.
func scrubMeanwhile(t *testing.T, c *sim.Cluster) (wait func() replication.ScrubRange) {
	t.Helper()
	done := make(chan error, 1)
	var sum replication.ScrubRange
	go func() {
		var err error
		sum, err = scrubAll(t.Context(), func() (*replication.Replica, error) {
			_, r, err := c.Leader(t.Context())
			return r, err
		}, replication.ScrubOptions{})
		done <- err
	}()
	return func() replication.ScrubRange {
		t.Helper()
		require.NoError(t, <-done)
		return sum
	}
}

// A scrub finds flipped bits where nobody reads, on any replica, and repairs them; the next one finds nothing.
func TestScrubRepairsMedia(t *testing.T) {
	inCluster(t, sim.ClusterConfig{}, func(t *testing.T, c *sim.Cluster, v *replication.Volume) {
		writeStamped(t, c, v, 256, 1)
		seed := rand.Uint64()
		t.Logf("seed %d", seed)
		rnd := rand.New(rand.NewPCG(seed, 0))
		flips := int64(0)
		for lba := range trivet.LBA(256) {
			if rnd.IntN(4) > 0 {
				mustRot(t, c.Nodes()[rnd.IntN(3)], lba, 1)
				flips++
			}
		}
		before := mustScrub(t, c, replication.ScrubOptions{Verify: true})
		assert.Equal(t, flips, before.Found)
		assert.Equal(t, flips, before.Left)
		assert.Len(t, before.Findings, 32)
		sum := mustScrub(t, c, replication.ScrubOptions{})
		assert.Equal(t, flips, sum.Found)
		assert.Equal(t, flips, sum.Repaired)
		assert.Zero(t, sum.Left)
		assert.EqualValues(t, 3*256*trivet.BlockSize, sum.CheckedBytes)
		assert.Zero(t, mustScrub(t, c, replication.ScrubOptions{}).Found)
		requireStamped(t, v, 256, 1)
		requireEqualReplicas(t, c)
	})
}

// A rate is kept to, by each replica on its own disk.
func TestScrubKeepsToItsRate(t *testing.T) {
	inCluster(t, sim.ClusterConfig{}, func(t *testing.T, c *sim.Cluster, v *replication.Volume) {
		writeStamped(t, c, v, 256, 1)
		began := time.Now()
		mustScrub(t, c, replication.ScrubOptions{RateBytes: 64 << 10})
		assert.Less(t, time.Since(began), time.Minute, "a burst of a MiB is all that there is")
		writeStamped(t, c, v, 256, 2)
		require.NoError(t, c.Fence(t.Context(), 2))
		_, r := mustLeader(t, c)
		require.NoError(t, r.Resize(t.Context(), 4*sizeBytes))
		grown := mustOpen(t, c, sim.ClientNode, 2)
		defer func() { require.NoError(t, grown.Close()) }()
		require.NoError(t, grown.SetSize(4*sizeBytes))
		var p []byte
		for lba := range trivet.LBA(512) {
			p = append(p, stamped(lba+256, 2)...)
		}
		require.NoError(t, grown.WriteAt(t.Context(), p, sizeBytes))
		began = time.Now()
		mustScrub(t, c, replication.ScrubOptions{RateBytes: 64 << 10})
		assert.GreaterOrEqual(t, time.Since(began), 30*time.Second)
		assert.Less(t, time.Since(began), time.Minute)
	})
}

// tamper makes a replica's map another one than the log says, as a bug or a lost write would.
func tamper(t *testing.T, n *sim.Node, f func(b *engine.Batch), state func(*engine.State)) {
	t.Helper()
	vol := mustBlocks(t, n)
	b := vol.NewBatch()
	f(b)
	st := vol.State()
	if state != nil {
		state(&st)
	}
	require.NoError(t, b.Commit(st))
	require.NoError(t, n.Spec().Disk.Engine.Flush())
}

// Replicas whose maps differ are compared block by block, and the minority takes what the majority has: a block that it
// lacks, one too many, one with other data. Verify tells, and changes nothing.
func TestScrubMajorityDecides(t *testing.T) {
	inCluster(t, sim.ClusterConfig{}, func(t *testing.T, c *sim.Cluster, v *replication.Volume) {
		writeStamped(t, c, v, 100, 1)
		leader, _ := mustLeader(t, c)
		others := followersOf(c, leader)
		tamper(t, leader, func(b *engine.Batch) {
			require.NoError(t, b.Zero(20, 2))
			require.NoError(t, b.Write(30, stamped(30, 9)))
		}, nil)
		tamper(t, others[0], func(b *engine.Batch) { require.NoError(t, b.Write(200, stamped(200, 9))) }, nil)

		sum := mustScrub(t, c, replication.ScrubOptions{Verify: true})
		assert.EqualValues(t, 4, sum.Found)
		assert.EqualValues(t, 4, sum.Left)
		assert.Contains(t, sum.Findings, "block 30 on "+string(leader.ID())+" is not what the majority has")
		assert.Contains(t, sum.Findings, "block 200 on "+string(others[0].ID())+" is not what the majority has")
		assert.Equal(t, stamped(30, 9), mustRead(t, v, 30*trivet.BlockSize, 1), "nothing was changed")

		sum = mustScrub(t, c, replication.ScrubOptions{})
		assert.EqualValues(t, 4, sum.Found)
		assert.EqualValues(t, 4, sum.Repaired)
		assert.Zero(t, sum.Left)
		requireStamped(t, v, 100, 1)
		assert.Zero(t, mustScrub(t, c, replication.ScrubOptions{}).Found)
		requireEqualReplicas(t, c)
		require.NoError(t, leader.Crash(t.Context(), sim.CrashOptions{})) // the repair was flushed
		require.NoError(t, leader.Start(t.Context()))
		requireEqualReplicas(t, c)
	})
}

// Three replicas with three contents: nobody is right, and nothing is changed.
func TestScrubWithoutMajority(t *testing.T) {
	inCluster(t, sim.ClusterConfig{}, func(t *testing.T, c *sim.Cluster, v *replication.Volume) {
		writeStamped(t, c, v, 10, 1)
		for i, n := range c.Nodes() {
			tamper(t, n, func(b *engine.Batch) { require.NoError(t, b.Write(5, stamped(5, uint32(20+i)))) }, nil)
		}
		sum := mustScrub(t, c, replication.ScrubOptions{})
		assert.EqualValues(t, 1, sum.Found)
		assert.EqualValues(t, 1, sum.Left)
		assert.Zero(t, sum.Repaired)
		assert.Equal(t, []string{"block 5 is different on all replicas"}, sum.Findings)
	})
}

// Of two replicas that differ while the third is away, nobody can say which is right: the absent one counts.
func TestScrubCountsTheAbsent(t *testing.T) {
	inCluster(t, sim.ClusterConfig{}, func(t *testing.T, c *sim.Cluster, v *replication.Volume) {
		writeStamped(t, c, v, 10, 1)
		leader, _ := mustLeader(t, c)
		others := followersOf(c, leader)
		require.NoError(t, others[0].Crash(t.Context(), sim.CrashOptions{}))
		tamper(t, others[1], func(b *engine.Batch) { require.NoError(t, b.Write(5, stamped(5, 9))) }, nil)
		sum := mustScrub(t, c, replication.ScrubOptions{})
		assert.EqualValues(t, 1, sum.Found)
		assert.EqualValues(t, 1, sum.Left)
		assert.Zero(t, sum.Repaired)
		require.NoError(t, others[0].Start(t.Context()))
		require.NoError(t, c.Converge(t.Context()))
		assert.EqualValues(t, 1, mustScrub(t, c, replication.ScrubOptions{}).Repaired)
		requireStamped(t, v, 10, 1)
	})
}

// A replica whose state differs, and not its blocks, is reported as damaged: no repair makes that right.
func TestScrubAccusesAnotherState(t *testing.T) {
	inCluster(t, sim.ClusterConfig{}, func(t *testing.T, c *sim.Cluster, v *replication.Volume) {
		writeStamped(t, c, v, 10, 1)
		leader, _ := mustLeader(t, c)
		odd := followersOf(c, leader)[0]
		odd.Excuse()
		require.NoError(t, odd.Tamper(func(st *engine.State) { st.SizeBytes += trivet.BlockSize }))
		require.NoError(t, odd.Crash(t.Context(), sim.CrashOptions{}))
		require.NoError(t, odd.Start(t.Context()))
		require.NoError(t, c.Converge(t.Context()))
		sum := mustScrub(t, c, replication.ScrubOptions{})
		assert.EqualValues(t, 1, sum.Found)
		assert.Zero(t, sum.Repaired)
		assert.EqualValues(t, 1, sum.Left)
		assert.Contains(t, sum.Findings, "the state of the replica on "+string(odd.ID())+" is not that of the majority")
		assert.True(t, c.Damaged())
	})
}

// With one replica away the others are scrubbed, with two nothing is; and the one that returns is found out.
func TestScrubWithAbsentReplicas(t *testing.T) {
	inCluster(t, sim.ClusterConfig{}, func(t *testing.T, c *sim.Cluster, v *replication.Volume) {
		ctx := t.Context()
		writeStamped(t, c, v, 64, 1)
		leader, r := mustLeader(t, c)
		others := followersOf(c, leader)
		mustRot(t, leader, 1, 1)
		mustRot(t, others[0], 2, 1)
		require.NoError(t, others[0].Crash(ctx, sim.CrashOptions{}))
		sum := mustScrub(t, c, replication.ScrubOptions{})
		assert.EqualValues(t, 1, sum.Found)
		assert.EqualValues(t, 1, sum.Repaired)
		assert.Equal(t, []trivet.NodeID{others[0].ID()}, sum.Absent)
		_, err := mustReplica(t, others[1]).ScrubRange(ctx, replication.ScrubOptions{})
		require.ErrorIs(t, err, trivet.ErrNotLeader)
		require.NoError(t, others[1].Crash(ctx, sim.CrashOptions{}))
		_, err = r.ScrubRange(ctx, replication.ScrubOptions{})
		require.Error(t, err)
		require.NoError(t, others[1].Start(ctx))
		_ = others[0] // its block 2 is in an entry of its log: it is refused when it starts, and would be replaced
	})
}

// A replica that runs, and does not know what a scrub is, would stop when it applies a marker: so there is none.
func TestScrubNeedsEverybodyToKnowIt(t *testing.T) {
	inCluster(t, sim.ClusterConfig{}, func(t *testing.T, c *sim.Cluster, v *replication.Volume) {
		writeStamped(t, c, v, 4, 1)
		leader, r := mustLeader(t, c)
		old := followersOf(c, leader)[0]
		stop := c.Net.Lose(func(e transport.Envelope) bool { // as if it had no handler for it
			return e.To == old.ID() && e.Message.Kind == transport.KindVolumeScrub && !e.Reply
		})
		before := r.Status().Applied
		_, err := r.ScrubRange(t.Context(), replication.ScrubOptions{})
		require.ErrorIs(t, err, trivet.ErrInvalid)
		require.ErrorContains(t, err, "upgrade that node first")
		assert.Equal(t, before, r.Status().Applied, "no marker was written")
		stop()
		assert.True(t, mustScrub(t, c, replication.ScrubOptions{}).Done)
	})
}

// Writes go on while a volume is scrubbed, and win; nobody reads anything but what was written.
func TestScrubBesideWrites(t *testing.T) {
	inCluster(t, sim.ClusterConfig{}, func(t *testing.T, c *sim.Cluster, v *replication.Volume) {
		ctx := t.Context()
		writeStamped(t, c, v, 256, 1)
		for lba := range trivet.LBA(128) {
			mustRot(t, c.Nodes()[lba%3], 2*lba, 1)
		}
		errs := make(chan error, 1)
		go func() {
			for lba := range trivet.LBA(256) {
				if err := v.WriteAt(ctx, stamped(lba, 2), int64(lba)*trivet.BlockSize); err != nil {
					errs <- err
					return
				}
			}
			errs <- nil
		}()
		for range 3 {
			sum := mustScrub(t, c, replication.ScrubOptions{})
			assert.Zero(t, sum.Left)
		}
		require.NoError(t, <-errs)
		requireStamped(t, v, 256, 2)
		requireEqualReplicas(t, c)
		assert.Zero(t, mustScrub(t, c, replication.ScrubOptions{}).Found)
	})
}

// Cleaning moves blocks while a scrub is between its marker and the check, and all copies of them rot. They are looked
// at where they stand now: all are counted, and repaired by this very scrub.
func TestScrubBesideCleaning(t *testing.T) {
	inCluster(t, sim.ClusterConfig{SnapshotBytes: 64 << 10}, func(t *testing.T, c *sim.Cluster, v *replication.Volume) {
		ctx := t.Context()
		writeStamped(t, c, v, 256, 1)
		leader, _ := mustLeader(t, c)
		node := followersOf(c, leader)[0]
		release := c.Net.Hold(isScrub(replication.ScrubCheck, "", node.ID()))
		defer release()
		wait := scrubMeanwhile(t, c)
		requireEventually(t, "the check is held", func() bool { return c.Net.Held() > 0 })

		kept := func(lba trivet.LBA) bool { return lba%16 == 2 }
		for round := range uint32(6) { // what is not overwritten comes to stand alone in its segments, and is moved
			for lba := range trivet.LBA(256) {
				if !kept(lba) {
					require.NoError(t, v.WriteAt(ctx, stamped(lba, 2+round), int64(lba)*trivet.BlockSize))
				}
			}
		}
		flips, moved := int64(0), 0
		for lba := range trivet.LBA(256) {
			if !kept(lba) {
				continue
			}
			if mustCopies(t, node, stamped(lba, 1)) > 1 { // the view keeps the first
				moved++
			}
			_, err := node.Rot(stamped(lba, 1))
			require.NoError(t, err)
			flips++
		}
		require.Positive(t, moved, "cleaning was at work")
		release()
		sum := wait()
		assert.Equal(t, flips, sum.Found)
		assert.Equal(t, flips, sum.Repaired)
		assert.Zero(t, sum.Left)
		assert.Zero(t, mustScrub(t, c, replication.ScrubOptions{}).Found)
		requireEqualReplicas(t, c)
	})
}

func mustCopies(t *testing.T, n *sim.Node, block []byte) int {
	t.Helper()
	k, err := n.Copies(block)
	require.NoError(t, err)
	return k
}

// isScrub matches the messages of a scrub to or from a node that ask for something.
func isScrub(op byte, from, to trivet.NodeID) transport.Match {
	return func(e transport.Envelope) bool {
		return e.Message.Kind == transport.KindVolumeScrub && !e.Reply && e.Message.Body[1] == op &&
			(from == "" || e.From == from) && (to == "" || e.To == to)
	}
}

// A block differs on a replica that lags, and the others have been written to when it asks them for what the majority
// had. It is left at first; the range is looked at again, where nothing differs any more, and the scrub says so.
func TestScrubLooksAgain(t *testing.T) {
	inCluster(t, sim.ClusterConfig{}, func(t *testing.T, c *sim.Cluster, v *replication.Volume) {
		ctx := t.Context()
		writeStamped(t, c, v, 64, 1)
		leader, _ := mustLeader(t, c)
		late := followersOf(c, leader)[0]
		tamper(t, late, func(b *engine.Batch) { require.NoError(t, b.Write(30, stamped(30, 9))) }, nil)
		release := c.Net.Hold(isScrub(replication.ScrubFix, "", late.ID()))
		defer release()
		wait := scrubMeanwhile(t, c)
		requireEventually(t, "the repair is held", func() bool { return c.Net.Held() > 0 })

		stop := c.Net.Lose(func(e transport.Envelope) bool {
			return e.To == late.ID() && e.Message.Kind == transport.KindAppendEntries && !e.Reply
		})
		defer stop()
		require.NoError(t, v.WriteAt(ctx, stamped(30, 2), 30*trivet.BlockSize))
		requireEventually(t, "both others have applied it", func() bool {
			applied := map[uint64]int{}
			for _, n := range c.Nodes() {
				applied[mustReplica(t, n).Status().Applied]++
			}
			return len(applied) == 2 && applied[mustReplica(t, late).Status().Applied] == 1
		})
		asks := isScrub(replication.ScrubFetch, late.ID(), "")
		var asked atomic.Int32
		defer c.Net.Lose(func(e transport.Envelope) bool { // loses nothing: it counts
			if asks(e) {
				asked.Add(1)
			}
			return false
		})()
		release()
		requireEventually(t, "it asks both others", func() bool { return asked.Load() >= 2 })
		require.NoError(t, sim.Sleep(ctx, 200*time.Millisecond)) // and has told the leader
		stop()
		sum := wait()
		assert.Zero(t, sum.Left)
		assert.Zero(t, sum.Found, "it was written")
		requireEqualReplicas(t, c)
		assert.Equal(t, stamped(30, 2), mustRead(t, v, 30*trivet.BlockSize, 1))
	})
}

// More is written between the marker and the repair than a view keeps count of, so that nothing may be repaired by it.
// The blocks are not passed over: the range is looked at again.
func TestScrubThatLostCount(t *testing.T) {
	inCluster(t, sim.ClusterConfig{}, func(t *testing.T, c *sim.Cluster, v *replication.Volume) {
		ctx := t.Context()
		writeStamped(t, c, v, 64, 1)
		leader, _ := mustLeader(t, c)
		other := followersOf(c, leader)[0]
		tamper(t, other, func(b *engine.Batch) { require.NoError(t, b.Write(30, stamped(30, 9))) }, nil)
		release := c.Net.Hold(isScrub(replication.ScrubFix, "", other.ID()))
		defer release()
		wait := scrubMeanwhile(t, c)
		requireEventually(t, "the repair is held", func() bool { return c.Net.Held() > 0 })
		p := stamped(200, 2)
		for range 4096 + 10 {
			require.NoError(t, v.WriteAt(ctx, p, 200*trivet.BlockSize))
		}
		release()
		sum := wait()
		assert.EqualValues(t, 1, sum.Found)
		assert.EqualValues(t, 1, sum.Repaired)
		assert.Zero(t, sum.Left)
		requireStamped(t, v, 64, 1)
		requireEqualReplicas(t, c)
	})
}

// Cleaning moves a block while a replica asks the others for its data, and it is damaged where it stands now: it is not
// passed over, and the next look at the range repairs it there.
func TestRepairFollowsAMovedBlock(t *testing.T) {
	inCluster(t, sim.ClusterConfig{SnapshotBytes: 64 << 10}, func(t *testing.T, c *sim.Cluster, v *replication.Volume) {
		ctx := t.Context()
		writeStamped(t, c, v, 256, 1)
		leader, _ := mustLeader(t, c)
		node := followersOf(c, leader)[0]
		const lba = 18
		rotten := stamped(lba, 1)
		rotten[len(rotten)/2] ^= 1 // as Rot leaves it
		mustRot(t, node, lba, 1)
		release := c.Net.Hold(isScrub(replication.ScrubFetch, node.ID(), ""))
		defer release()
		wait := scrubMeanwhile(t, c)
		requireEventually(t, "it asks for the block", func() bool { return c.Net.Held() > 0 })

		_, err := node.Rot(rotten) // whole again, or cleaning would leave it where it is
		require.NoError(t, err)
		for round := range uint32(8) {
			for first := trivet.LBA(3); first+15 < 256; first += 16 {
				var p []byte
				for k := range trivet.LBA(15) {
					p = append(p, stamped(first+k, 2+round)...)
				}
				require.NoError(t, v.WriteAt(ctx, p, int64(first)*trivet.BlockSize))
			}
			_, err := node.Spec().Disk.Engine.Clean()
			require.NoError(t, err)
		}
		require.Greater(t, mustCopies(t, node, stamped(lba, 1)), 1, "cleaning was at work")
		_, err = node.Rot(stamped(lba, 1))
		require.NoError(t, err)
		release()
		sum := wait()
		assert.EqualValues(t, 1, sum.Found)
		assert.EqualValues(t, 1, sum.Repaired)
		assert.Zero(t, sum.Left)
		assert.Zero(t, mustScrub(t, c, replication.ScrubOptions{}).Found)
		requireEqualReplicas(t, c)
	})
}
