package node

import (
	"fmt"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller/meta"
	"github.com/trivet-csi/trivet/replication"
)

// agentBench is an agent of node n1 over a fake catalogue and a fake host, within a bubble.
type agentBench struct {
	cat   *fakeCatalogue
	host  *fakeHost
	agent *Agent
	cfg   agentConfig

	damage damages // of the disk

	mu     sync.Mutex
	fatal  []error
	verify error
}

func newAgentBench(nodes int) *agentBench {
	b := &agentBench{cat: newFakeCatalogue(), host: newFakeHost()}
	for n := 2; n <= nodes; n++ {
		b.cat.addNode(n)
	}
	b.cfg = agentConfig{
		ID: "n1", ParkAfter: -1,
		Self: meta.Node{
			ID: "n1", Address: "10.0.0.1:7000", Incarnation: testUUID(0x301),
		},
		Usage: func() ([]meta.Disk, error) {
			return []meta.Disk{{ID: testDisk(1), Path: "/d", SizeBytes: 1 << 40, FreeBytes: 1 << 40}}, nil
		},
		Verify: func() error {
			b.mu.Lock()
			defer b.mu.Unlock()
			return b.verify
		},
		Disks:   map[trivet.DiskID]replication.Disk{testDisk(1): {ID: testDisk(1)}},
		Damages: map[trivet.DiskID]*damages{testDisk(1): &b.damage},
		Fatal: func(err error) {
			b.mu.Lock()
			defer b.mu.Unlock()
			b.fatal = append(b.fatal, err)
		},
	}
	return b
}

func (b *agentBench) start() { b.agent = openAgent(b.cfg, b.cat, b.host) }

func (b *agentBench) fatals() []error {
	b.mu.Lock()
	defer b.mu.Unlock()
	return append([]error(nil), b.fatal...)
}

// bench runs f in a bubble with a started agent and closes it.
func bench(t *testing.T, nodes int, f func(t *testing.T, b *agentBench)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		b := newAgentBench(nodes)
		b.start()
		defer func() { b.agent.close() }()
		synctest.Wait()
		f(t, b)
	})
}

// settle lets the agent do what it has to do, retries included.
func settle() {
	time.Sleep(time.Minute) // of the bubble's clock
	synctest.Wait()
}

const vol = trivet.VolumeID(7)

// ready brings a volume with n replicas up to the point where n1 leads.
func (b *agentBench) ready(t *testing.T, n int) *fakeReplica {
	t.Helper()
	b.cat.addVolume(vol, n, nil)
	for i := 2; i <= n; i++ {
		b.cat.report(vol, i, meta.ReplicaReady)
	}
	settle()
	require.Equal(t, meta.PhaseAvailable, b.cat.volume(vol).Phase)
	r := b.host.replica(vol)
	require.NotNil(t, r)
	r.lead(true)
	settle()
	require.Equal(t, testReplica(int(vol)<<4|1), b.cat.volume(vol).Leader)
	return r
}

func TestAgentRegistersAndKeepsItsLease(t *testing.T) {
	t.Parallel()
	bench(t, 1, func(t *testing.T, b *agentBench) {
		for range 10 {
			n, ok := b.cat.Local().Node("n1")
			require.True(t, ok)
			require.True(t, n.Alive(time.Now()))
			time.Sleep(leaseLen)
			synctest.Wait()
		}
		registered := b.cat.count(func(c meta.Command) bool { return c.RegisterNode != nil })
		assert.Equal(t, 1, registered)

		b.cat.setDown(true)
		time.Sleep(2 * leaseLen)
		n, _ := b.cat.Local().Node("n1")
		assert.False(t, n.Alive(time.Now()))
		b.cat.setDown(false)
		time.Sleep(renewEvery)
		synctest.Wait()
		n, _ = b.cat.Local().Node("n1")
		assert.True(t, n.Alive(time.Now()))
		assert.Empty(t, b.fatals())
	})
}

// I9: when another process registers as this node, this one stops.
func TestAgentStopsWhenAnotherProcessIsThisNode(t *testing.T) {
	t.Parallel()
	bench(t, 1, func(t *testing.T, b *agentBench) {
		n, _ := b.cat.Local().Node("n1")
		n.Incarnation = testUUID(0x3ff)
		b.cat.must(meta.Command{RegisterNode: &meta.RegisterNode{Node: n}})
		settle()
		require.Len(t, b.fatals(), 1)
		assert.ErrorIs(t, b.fatals()[0], trivet.ErrFenced)
	})
}

func TestAgentStopsWhenItsDiskIsTaken(t *testing.T) {
	t.Parallel()
	for _, sentinel := range []error{trivet.ErrFenced, trivet.ErrInvalid} {
		bench(t, 1, func(t *testing.T, b *agentBench) {
			b.mu.Lock()
			b.verify = fmt.Errorf("disk: %w", sentinel)
			b.mu.Unlock()
			settle()
			require.Len(t, b.fatals(), 1)
		})
	}
}

// A disk ID that another node has is a cloned machine: stop at once (H11).
func TestAgentStopsWhenItsDiskIsAnotherNodes(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		b := newAgentBench(1)
		b.cat.must(meta.Command{RegisterNode: &meta.RegisterNode{Node: meta.Node{
			ID: "n9", Address: "10.0.0.9:1", Incarnation: testUUID(9), Disks: []meta.Disk{{ID: testDisk(1), Path: "/d"}},
		}}})
		b.start()
		defer b.agent.close()
		settle()
		require.NotEmpty(t, b.fatals())
		assert.ErrorIs(t, b.fatals()[0], trivet.ErrInUse)
	})
}

func TestAgentLifeOfAReplica(t *testing.T) {
	t.Parallel()
	bench(t, 3, func(t *testing.T, b *agentBench) {
		b.ready(t, 3)
		b.cat.must(meta.Command{Release: &meta.Release{Volume: vol, Discard: true}})
		settle()
		assert.False(t, b.host.has(vol))
		assert.Equal(t, meta.ReplicaRemoved, b.cat.volume(vol).Replicas[0].State)
		b.cat.report(vol, 2, meta.ReplicaRemoved)
		b.cat.report(vol, 3, meta.ReplicaRemoved)
		settle()
		assert.Equal(t, 1, b.host.createdN())
		b.agent.mu.Lock()
		defer b.agent.mu.Unlock()
		assert.Empty(t, b.agent.workers, "no worker outlives its volume")
	})
}

// H10: a replica that was ready and whose data is gone is reported, and never made anew.
func TestAgentNeverRecreatesALostReplica(t *testing.T) {
	t.Parallel()
	for _, loss := range []error{trivet.ErrNotFound, trivet.ErrCorrupt} {
		synctest.Test(t, func(t *testing.T) {
			b := newAgentBench(3)
			b.cat.addNode(1)
			b.cat.addVolume(vol, 3, nil)
			for i := 1; i <= 3; i++ {
				b.cat.report(vol, i, meta.ReplicaReady)
			}
			b.host.lost[vol] = fmt.Errorf("its log is gone: %w", loss)
			b.cfg.Self.Incarnation = testUUID(0x400)
			b.start()
			defer b.agent.close()
			settle()
			r := b.cat.volume(vol).Replicas[0]
			assert.Equal(t, meta.ReplicaFaulted, r.State)
			assert.Contains(t, r.Reason, "its log is gone")
			assert.Zero(t, b.host.createdN())
		})
	}
}

// H10, the narrow way: the local copy still shows Creating what was ready and then wiped.
func TestAgentCreatesByLinearizableRead(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		b := newAgentBench(1)
		b.cat.addNode(1)
		b.cat.addVolume(vol, 1, nil)
		b.cat.freeze(true)
		b.cat.report(vol, 1, meta.ReplicaReady)
		b.cfg.Self.Incarnation = testUUID(0x400)
		b.start()
		defer b.agent.close()
		settle()
		assert.Zero(t, b.host.createdN())
		b.cat.freeze(false)
		settle()
		assert.Zero(t, b.host.createdN())
		assert.Equal(t, meta.ReplicaFaulted, b.cat.volume(vol).Replicas[0].State)
	})
}

func TestAgentDiskAwayAndBack(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		b := newAgentBench(1)
		b.cat.addNode(1)
		b.cat.addVolume(vol, 1, nil)
		b.cat.report(vol, 1, meta.ReplicaReady)
		b.host.made[vol] = testReplica(int(vol)<<4 | 1)
		disks := b.cfg.Disks
		b.cfg.Disks, b.cfg.Self.Incarnation = nil, testUUID(0x400)
		b.start()
		settle()
		assert.Equal(t, meta.ReplicaFaulted, b.cat.volume(vol).Replicas[0].State)
		b.agent.close()

		b.cfg.Disks, b.cfg.Self.Incarnation = disks, testUUID(0x401)
		b.start()
		defer b.agent.close()
		settle()
		assert.Equal(t, meta.ReplicaReady, b.cat.volume(vol).Replicas[0].State)
		assert.NotNil(t, b.host.replica(vol))
	})
}

// H35: what the local copy does not know is removed only if the catalogue once knew it.
func TestAgentStrays(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name    string
		prepare func(b *agentBench)
		gone    bool
	}{
		{"deleted while the node was down", func(b *agentBench) {
			b.cat.addNode(1)
			b.cat.addVolume(vol, 1, nil)
			b.cat.must(meta.Command{Release: &meta.Release{Volume: vol, Discard: true}})
			b.cat.report(vol, 1, meta.ReplicaRemoved)
		}, true},
		{"never heard of", func(*agentBench) {}, false},
		{"created, but the local copy lags", func(b *agentBench) {
			b.cat.addNode(1)
			b.cat.freeze(true)
			b.cat.addVolume(vol, 1, nil)
			b.cat.report(vol, 1, meta.ReplicaReady)
		}, false},
		{"catalogue cannot be read", func(b *agentBench) {
			b.cat.addNode(1)
			b.cat.addVolume(vol, 1, nil)
			b.cat.must(meta.Command{Release: &meta.Release{Volume: vol, Discard: true}})
			b.cat.report(vol, 1, meta.ReplicaRemoved)
			b.cat.setDown(true)
		}, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				b := newAgentBench(1)
				id := testReplica(int(vol)<<4 | 1)
				b.host.made[vol] = id
				b.cfg.OnDisk = map[trivet.VolumeID][]placed{vol: {{testDisk(1), id}}}
				b.cfg.Self.Incarnation = testUUID(0x400)
				tt.prepare(b)
				b.start()
				defer func() { b.agent.close() }()
				settle()
				assert.Equal(t, tt.gone, !b.host.has(vol))
			})
		})
	}
}

func TestAgentFences(t *testing.T) {
	t.Parallel()
	bench(t, 3, func(t *testing.T, b *agentBench) {
		r := b.ready(t, 3)
		r.lead(false)
		b.cat.must(meta.Command{Attach: &meta.Attach{Volume: vol, Node: "n2", Mode: meta.SingleNodeMultiWriter}})
		settle()
		assert.Zero(t, b.cat.volume(vol).FencedEpoch, "only the leader fences")

		r.failFences(trivet.ErrUnavailable)
		r.lead(true)
		settle()
		assert.Zero(t, b.cat.volume(vol).FencedEpoch, "nothing is reported that is not committed")

		r.failFences(nil)
		settle()
		v := b.cat.volume(vol)
		assert.True(t, v.Usable("n2", 1))
		b.cat.must(meta.Command{Detach: &meta.Detach{Volume: vol}})
		settle()
		fenced, _ := r.epochs()
		assert.Equal(t, []trivet.Epoch{1, 2}, fenced)
		v = b.cat.volume(vol)
		assert.Empty(t, v.Holder())
	})
}

func TestAgentRecycles(t *testing.T) {
	t.Parallel()
	bench(t, 1, func(t *testing.T, b *agentBench) {
		r := b.ready(t, 1)
		b.cat.must(meta.Command{Fail: &meta.Fail{Volume: vol, Reason: "test"}})
		b.cat.must(meta.Command{Reclaim: &meta.Reclaim{Volume: vol, Policy: meta.ReclaimRecycle}})
		settle()
		v := b.cat.volume(vol)
		assert.Equal(t, meta.PhaseAvailable, v.Phase)
		assert.Equal(t, v.Epoch, v.FencedEpoch)
		fenced, wiped := r.epochs()
		assert.Equal(t, []trivet.Epoch{1}, fenced)
		assert.Equal(t, []trivet.Epoch{1}, wiped)
	})
}

func TestAgentMovesLeadership(t *testing.T) {
	t.Parallel()
	bench(t, 3, func(t *testing.T, b *agentBench) {
		r := b.ready(t, 3)
		want := testReplica(int(vol)<<4 | 2)
		b.cat.must(meta.Command{WantLeader: &meta.WantLeader{Volume: vol, Replica: want}})
		settle()
		assert.False(t, r.Status().IsLeader)
		assert.Equal(t, want, b.cat.volume(vol).WantLeader, "cleared by the new leader's node, not by us")
	})
}

// One volume that hangs holds up no other.
func TestAgentStuckVolume(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		b := newAgentBench(1)
		b.host.blockOn = 8
		b.cat.addNode(1)
		b.cfg.Self.Incarnation = testUUID(0x400)
		b.start()
		defer func() { b.agent.close() }()
		b.cat.addVolume(8, 1, nil)
		<-b.host.createIn
		b.cat.addVolume(vol, 1, nil)
		synctest.Wait()
		assert.Equal(t, meta.PhaseAvailable, b.cat.volume(vol).Phase)
		assert.Equal(t, meta.PhaseCreating, b.cat.volume(8).Phase)
	})
}

// TestAgentParks: the replica of a detached volume is stopped after a while, and started by an attach.
func TestAgentParks(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		b := newAgentBench(1)
		b.cfg.ParkAfter = 30 * time.Second
		b.start()
		defer func() { b.agent.close() }()
		synctest.Wait()
		b.cat.addVolume(7, 1, nil)
		synctest.Wait()
		require.Nil(t, b.host.replica(7), "made, and not started before anybody needs it")
		b.cat.must(meta.Command{Attach: &meta.Attach{Volume: 7, Node: "n1", Mode: meta.SingleNodeSingleWriter}})
		synctest.Wait()
		r := b.host.replica(7)
		require.NotNil(t, r)
		r.lead(true)
		synctest.Wait()
		b.cat.must(meta.Command{Detach: &meta.Detach{Volume: 7, Node: "n1"}})
		synctest.Wait()
		require.NotNil(t, b.host.replica(7))
		<-time.After(29 * time.Second)
		synctest.Wait()
		require.NotNil(t, b.host.replica(7), "it may be attached elsewhere in a moment")
		<-time.After(2 * time.Second)
		synctest.Wait()
		require.Nil(t, b.host.replica(7))
		<-time.After(time.Hour)
		b.cat.must(meta.Command{Attach: &meta.Attach{Volume: 7, Node: "n1", Mode: meta.SingleNodeSingleWriter}})
		synctest.Wait()
		require.NotNil(t, b.host.replica(7))
	})
}

// TestAgentStandsWhereTheCatalogueSays, and says itself again where it stands as soon as it may.
func TestAgentStandsWhereTheCatalogueSays(t *testing.T) {
	t.Parallel()
	bench(t, 1, func(t *testing.T, b *agentBench) {
		n := &Node{cfg: Config{ID: "n1", Zone: b.cfg.Self.Zone, Rack: b.cfg.Self.Rack, Catalogue: b.cat}}
		stands := func(zone, rack string) {
			t.Helper()
			time.Sleep(renewEvery)
			synctest.Wait()
			self, ok := b.cat.Local().Node("n1")
			require.True(t, ok)
			assert.Equal(t, [2]string{zone, rack}, [2]string{self.Zone, self.Rack}, "the catalogue")
			assert.Equal(t, [2]string{zone, rack}, [2]string{n.Info().Zone, n.Info().Rack}, "what kubelet is told")
		}
		registered := func() int { return b.cat.count(func(c meta.Command) bool { return c.RegisterNode != nil }) }
		stands("", "")
		b.cat.must(meta.Command{PlaceNode: &meta.PlaceNode{Node: "n1", Zone: new("west"), Rack: new("r7")}})
		stands("west", "r7")
		assert.Equal(t, 1, registered())
		b.cat.must(meta.Command{PlaceNode: &meta.PlaceNode{Node: "n1", Own: true}})
		stands("", "")
		stands("", "")
		assert.Equal(t, 2, registered())
		assert.Empty(t, b.fatals())
	})
}
