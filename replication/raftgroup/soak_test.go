package raftgroup_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/replication/raftgroup"
	"github.com/trivet-csi/trivet/replication/transport"
)

// TestSoak runs a group of three under random partitions, losses, delays, crashes with lost writes,
// restarts and transfers, with snapshots so small that they happen all the time. Every value whose
// Propose returned must be there in the end, no two replicas may have applied different entries, and
// no read that a gate allowed may miss a value acknowledged before it.
func TestSoak(t *testing.T) {
	seeds := 20
	if testing.Short() {
		seeds = 4
	}
	for seed := range seeds {
		t.Run(fmt.Sprint("seed=", seed), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { soak(t, uint64(seed), seed%2 == 1) })
		})
	}
}

// writer proposes rising values of one key on whoever leads, and reads them behind the gate.
type writer struct {
	c     *cluster
	key   string
	acked int // under mu of soakRun
	tried int
}

type soakRun struct {
	mu     sync.Mutex
	groups map[string]*raftgroup.Group
	kvs    map[string]*kv
	done   int
	reads  int
}

func (s *soakRun) set(n *node) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.groups[n.name], s.kvs[n.name] = n.group, n.machine
}

func (s *soakRun) pick(rng *rand.Rand) (*raftgroup.Group, *kv) {
	s.mu.Lock()
	defer s.mu.Unlock()
	name := string(rune('a' + rng.IntN(3)))
	return s.groups[name], s.kvs[name]
}

func (s *soakRun) step(t *testing.T, ctx context.Context, w *writer, rng *rand.Rand) {
	g, m := s.pick(rng)
	if g == nil {
		pass(50 * time.Millisecond)
		return
	}
	s.mu.Lock()
	floor := w.acked
	s.mu.Unlock()
	if _, err := g.ReadGate(); err == nil {
		var got int
		fmt.Sscan(m.get(w.key), &got)
		s.mu.Lock()
		s.reads++
		s.mu.Unlock()
		require.GreaterOrEqual(t, got, floor, "stale read of %s", w.key)
		require.LessOrEqual(t, got, w.tried, "read of %s from the future", w.key)
	}
	w.tried++
	call, cancel := context.WithTimeout(ctx, 3*heartbeat)
	defer cancel()
	if _, err := g.Propose(call, fmt.Appendf(nil, "%s=%d", w.key, w.tried)); err == nil {
		s.mu.Lock()
		w.acked = w.tried
		s.done++
		s.mu.Unlock()
		return
	}
	pass(time.Duration(rng.IntN(200)) * time.Millisecond)
}

func soak(t *testing.T, seed uint64, overlap bool) {
	rng := rand.New(rand.NewPCG(seed, 1))
	c := newCluster(t, "a", "b", "c")
	c.net.SetDefaultFaults(transport.Faults{
		Drop: rng.Float64() * 0.05, Duplicate: rng.Float64() * 0.2,
		Delay: transport.Exponential(5*time.Millisecond, time.Second),
	})
	snapshotBytes := int64(128<<10 + rng.IntN(1<<20))
	c.configure = func(cfg *raftgroup.Config) { cfg.SnapshotBytes, cfg.OverlapFlush = snapshotBytes, overlap }
	run := &soakRun{groups: map[string]*raftgroup.Group{}, kvs: map[string]*kv{}}
	for _, n := range c.nodes {
		require.NoError(t, raftgroup.Create(n.config(), members("a", "b", "c")))
		n.mustOpen()
		run.set(n)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	var writers []*writer
	for k := range 3 {
		w := &writer{c: c, key: fmt.Sprint("key", k)}
		writers = append(writers, w)
		own := rand.New(rand.NewPCG(seed, uint64(k+2)))
		wg.Go(func() {
			for ctx.Err() == nil {
				run.step(t, ctx, w, own)
			}
		})
	}
	for range 60 {
		disturb(t, c, run, rng)
		pass(time.Duration(rng.IntN(1500)) * time.Millisecond)
	}
	cancel()
	wg.Wait()
	c.net.HealAll()
	c.net.ClearFaults()
	c.net.SetDefaultFaults(transport.Faults{})
	for _, n := range c.nodes {
		if n.group == nil {
			n.mustOpen()
		}
	}
	c.converge()
	leader := c.leader()
	for _, w := range writers {
		var got int
		fmt.Sscan(leader.machine.get(w.key), &got)
		require.GreaterOrEqual(t, got, w.acked, "lost an acknowledged value of %s", w.key)
	}
	t.Logf("seed %d: %d writes, %d reads", seed, run.done, run.reads)
	require.Greater(t, run.done, 15, "activity floor")
	require.Greater(t, run.reads, 10, "activity floor")
}

func disturb(t *testing.T, c *cluster, run *soakRun, rng *rand.Rand) {
	n := c.nodes[string(rune('a'+rng.IntN(3)))]
	other := c.nodes[string(rune('a'+rng.IntN(3)))]
	switch rng.IntN(11) {
	case 0:
		c.net.Isolate(trivet.NodeID(n.name))
	case 1:
		if n != other {
			c.net.Cut(trivet.NodeID(n.name), trivet.NodeID(other.name))
		}
	case 2, 3, 8, 9:
		c.net.HealAll()
	case 4:
		if n.group != nil {
			n.crash(rng.IntN(101), rng)
			run.set(n)
		}
	case 5:
		if n.group != nil {
			n.die()
			run.set(n)
		}
	case 6, 10:
		for _, m := range c.nodes {
			if m.group == nil {
				m.mustOpen()
				run.set(m)
			}
		}
	case 7:
		if n.group != nil {
			ctx, cancel := context.WithTimeout(t.Context(), heartbeat)
			_ = n.group.TransferTo(ctx, replicaID(other.name)) // mostly not the leader
			cancel()
		}
	}
}
