package node

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller/meta"
	"github.com/trivet-csi/trivet/replication"
)

// addFresh creates a volume with three replicas, which all are ready, at the present time of the bubble.
func addFresh(b *agentBench, id trivet.VolumeID) {
	v := meta.Volume{
		ID: id, Name: id.String(), SizeBytes: 64 << 20, Reclaim: meta.ReclaimDelete, Request: "r", Created: time.Now(),
	}
	for i := 1; i <= 3; i++ {
		v.Replicas = append(v.Replicas, meta.Replica{
			ID: testReplica(int(id)<<4 | i), Node: testNodeID(i), Disk: testDisk(i), State: meta.ReplicaCreating,
		})
	}
	b.cat.must(meta.Command{CreateVolume: &meta.CreateVolume{Volume: v}})
	for i := 2; i <= 3; i++ {
		b.cat.report(id, i, meta.ReplicaReady)
	}
	settle()
}

func inScrubBench(t *testing.T, every, park time.Duration, f func(t *testing.T, b *agentBench)) {
	t.Helper()
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		b := newAgentBench(3)
		b.cfg.ScrubEvery, b.cfg.ParkAfter = every, park
		b.start()
		defer func() { b.agent.close() }()
		synctest.Wait()
		f(t, b)
	})
}

func mustStartScrub(b *agentBench, id trivet.VolumeID, verify bool, rate int64) {
	pass := uint64(1)
	if v := b.cat.volume(id); v.Scrub != nil {
		pass = v.Scrub.Pass + 1
	}
	b.cat.must(meta.Command{StartScrub: &meta.StartScrub{
		Volume: id, Pass: pass, Verify: verify, RateBytes: rate, Time: time.Now(),
	}})
}

// Each volume is scrubbed when it is due, by the node that leads it, from the first block to the last, and then not
// before it is due again.
func TestAgentScrubsWhatIsDue(t *testing.T) {
	inScrubBench(t, 10*time.Minute, -1, func(t *testing.T, b *agentBench) {
		addFresh(b, vol)
		r := b.host.replica(vol)
		require.NotNil(t, r)
		r.mu.Lock()
		r.scrubN = 3
		r.mu.Unlock()
		r.lead(true)
		settle()
		require.Empty(t, r.scrubbed(), "it is not due")
		for range 10 {
			settle()
		}
		require.Equal(t, []replication.ScrubOptions{
			{From: 0, RateBytes: 1 << 20}, {From: 1, RateBytes: 1 << 20}, {From: 2, RateBytes: 1 << 20},
		}, r.scrubbed())
		s := b.cat.volume(vol).Scrub
		assert.EqualValues(t, 1, s.Pass)
		assert.False(t, s.Running)
		assert.EqualValues(t, 3, s.Found)
		assert.EqualValues(t, 3, s.Repaired)
		assert.EqualValues(t, 9*trivet.BlockSize, s.CheckedBytes)
		assert.Equal(t, []string{"a block", "a block", "a block"}, s.Findings)
		assert.Equal(t, s.Started, s.LastStarted)
		for range 10 {
			settle()
		}
		assert.EqualValues(t, 2, b.cat.volume(vol).Scrub.Pass)
		assert.Len(t, r.scrubbed(), 6)
	})
}

// A pass goes on where it stood: after errors, another leader's work, and a restart of the process.
func TestAgentResumesAScrub(t *testing.T) {
	inScrubBench(t, 0, -1, func(t *testing.T, b *agentBench) {
		addFresh(b, vol)
		r := b.host.replica(vol)
		r.mu.Lock()
		r.scrubN, r.scrubErr = 5, trivet.ErrUnavailable
		r.mu.Unlock()
		r.lead(true)
		mustStartScrub(b, vol, true, 7)
		settle()
		require.Empty(t, r.scrubbed())
		r.lead(false)
		b.cat.must(meta.Command{ReportScrub: &meta.ReportScrub{Volume: vol, Pass: 1, Next: 3, Found: 1, Time: time.Now()}})
		r.failScrubs(nil)
		settle()
		require.Empty(t, r.scrubbed(), "it is led from elsewhere")
		b.agent.close()
		b.start()
		settle()
		r.lead(true)
		settle()
		assert.Equal(t, []replication.ScrubOptions{
			{From: 3, RateBytes: 7, Verify: true}, {From: 4, RateBytes: 7, Verify: true},
		}, r.scrubbed())
		assert.EqualValues(t, 3, b.cat.volume(vol).Scrub.Found)
		assert.Zero(t, b.cat.volume(vol).Scrub.LastEnded, "it was no scrub")
	})
}

// A parked group is woken for its pass, and parked again.
func TestScrubWakesAParkedGroup(t *testing.T) {
	inScrubBench(t, 0, 30*time.Second, func(t *testing.T, b *agentBench) {
		addFresh(b, vol)
		settle()
		require.Nil(t, b.host.replica(vol), "parked")
		mustStartScrub(b, vol, false, 0)
		settle()
		r := b.host.replica(vol)
		require.NotNil(t, r, "woken")
		require.True(t, b.cat.volume(vol).Scrub.Running)
		r.lead(true)
		settle()
		require.False(t, b.cat.volume(vol).Scrub.Running)
		settle()
		require.Nil(t, b.host.replica(vol), "parked again")
	})
}

// Passes that are due come one after the other, those that somebody asks for at once.
func TestScrubsTakeTurns(t *testing.T) {
	inScrubBench(t, 10*time.Minute, -1, func(t *testing.T, b *agentBench) {
		for i := range trivet.VolumeID(3) {
			addFresh(b, vol+i)
			b.host.replica(vol + i).failScrubs(trivet.ErrUnavailable)
			b.host.replica(vol + i).lead(true)
		}
		running := func() (n int) {
			for i := range trivet.VolumeID(3) {
				v := b.cat.volume(vol + i)
				if v.Scrubbing() {
					n++
				}
			}
			return n
		}
		for range 30 {
			settle()
		}
		require.Equal(t, 1, running())
		mustStartScrub(b, vol+2, true, 0)
		settle()
		require.Equal(t, 2, running())
		for i := range trivet.VolumeID(3) {
			b.host.replica(vol + i).failScrubs(nil)
		}
		for range 5 {
			settle()
		}
		require.Zero(t, running())
		for i := range trivet.VolumeID(3) {
			require.NotNil(t, b.cat.volume(vol+i).Scrub)
		}
	})
}

// A replica that was away for one of several ranges that make one report took no part in all of it.
func TestScrubReportsWhoWasAway(t *testing.T) {
	t.Parallel()
	p := progress{since: time.Now().Add(time.Hour)}
	for i, absent := range [][]trivet.NodeID{nil, {"n2"}, {"n2", "n3"}, nil} {
		over, err := p.add(t.Context(), &replication.ScrubRange{Next: trivet.LBA(i + 1), Absent: absent})
		require.NoError(t, err)
		require.False(t, over)
	}
	require.Equal(t, []trivet.NodeID{"n2", "n3"}, p.report.Absent)
	require.EqualValues(t, 4, p.report.Next)
}
