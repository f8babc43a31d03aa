package replication_test

import (
	"errors"
	"math/rand/v2"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/engine"
	"github.com/trivet-csi/trivet/engine/segment"
	"github.com/trivet-csi/trivet/internal/sim"
	"github.com/trivet-csi/trivet/replication"
	"github.com/trivet-csi/trivet/replication/raftgroup"
	"github.com/trivet-csi/trivet/replication/transport"
)

// onOneNode runs f in a bubble with a machine that has the only replica of a volume.
func onOneNode(t *testing.T, f func(t *testing.T, c *sim.Cluster, n *sim.Node)) {
	t.Helper()
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		c, err := sim.NewCluster(t.Context(), sim.ClusterConfig{Replicas: 1, SizeBytes: sizeBytes, Heartbeat: heartbeat})
		require.NoError(t, err)
		defer func() {
			assert.NoError(t, c.Close())
			assert.NoError(t, errors.Join(c.Failures()...))
		}()
		f(t, c, c.Nodes()[0])
	})
}

// reboot starts the machine anew without its replica.
func reboot(t *testing.T, n *sim.Node) {
	t.Helper()
	require.NoError(t, n.Stop())
	require.NoError(t, n.Boot())
}

func TestOneReplica(t *testing.T) {
	onOneNode(t, func(t *testing.T, c *sim.Cluster, n *sim.Node) {
		ctx := t.Context()
		require.NoError(t, c.Fence(ctx, 1))
		v := mustOpen(t, c, n.ID(), 1)
		defer func() { require.NoError(t, v.Close()) }()
		require.NoError(t, v.WriteAt(ctx, fill(4, 5), 0))
		require.NoError(t, n.Crash(ctx, sim.CrashOptions{}))
		require.NoError(t, n.Start(ctx))
		require.NoError(t, c.Fence(ctx, 2))
		again := mustOpen(t, c, n.ID(), 2)
		defer func() { require.NoError(t, again.Close()) }()
		assert.Equal(t, fill(4, 5), mustRead(t, again, 0, 4))
	})
}

func TestReplicaLifecycle(t *testing.T) {
	onOneNode(t, func(t *testing.T, c *sim.Cluster, n *sim.Node) {
		ctx, h, spec := t.Context(), n.Host(), n.Spec()
		require.NoError(t, h.OpenReplica(ctx, spec), "it runs")
		require.NoError(t, h.CreateReplica(ctx, spec), "it is there")
		changed := spec
		changed.Replica = "11111111-0000-4000-8000-000000000001"
		changed.Members = []raftgroup.Member{{Replica: changed.Replica, Node: n.ID()}}
		require.ErrorIs(t, h.OpenReplica(ctx, changed), trivet.ErrExists)
		require.ErrorIs(t, h.CreateReplica(ctx, changed), trivet.ErrCorrupt, "the group is another's")
		require.ErrorIs(t, h.DestroyReplica(ctx, changed), trivet.ErrExists)
		_, ok := h.Replica(c.Volume())
		require.True(t, ok, "it still runs")

		require.NoError(t, h.DestroyReplica(ctx, spec))
		require.NoError(t, h.DestroyReplica(ctx, spec))
		require.ErrorIs(t, h.OpenReplica(ctx, spec), trivet.ErrNotFound)
		_, ok = h.Replica(c.Volume())
		require.False(t, ok)
		require.NoError(t, h.CreateReplica(ctx, changed))
		require.NoError(t, h.OpenReplica(ctx, changed))
		r, ok := h.Replica(c.Volume())
		require.True(t, ok)
		assert.Zero(t, r.Status().Epoch, "a new life knows nothing of the old one")
		require.ErrorIs(t, h.CreateReplica(ctx, replication.ReplicaSpec{}), trivet.ErrInvalid)
	})
}

// What is left of a replica that lost a half never votes and is never made anew under the same name
// (H4, H10, H11).
func TestReplicaContradictions(t *testing.T) {
	groupDir := func(n *sim.Node, c *sim.Cluster) string { return n.Spec().Disk.Dir + "/groups/" + c.Volume().String() }
	tests := []struct {
		name         string
		spoil        func(t *testing.T, c *sim.Cluster, n *sim.Node, s *replication.ReplicaSpec)
		open, create error
		words        string // in the message of OpenReplica
	}{
		{"blocks gone", func(t *testing.T, c *sim.Cluster, _ *sim.Node, s *replication.ReplicaSpec) {
			require.NoError(t, s.Disk.Engine.DropVolume(c.Volume()))
		}, trivet.ErrNotFound, trivet.ErrCorrupt, "replace it by a replica with a new ID"},
		{"log gone", func(t *testing.T, c *sim.Cluster, n *sim.Node, s *replication.ReplicaSpec) {
			require.NoError(t, s.Disk.FS.RemoveAll(groupDir(n, c)))
		}, trivet.ErrNotFound, trivet.ErrCorrupt, "replace it by a replica with a new ID"},
		{"log of another replica", func(t *testing.T, c *sim.Cluster, n *sim.Node, s *replication.ReplicaSpec) {
			cfg := raftgroup.Config{
				Group: c.Volume(), Replica: s.Replica, FS: s.Disk.FS, Dir: groupDir(n, c), Log: s.Disk.Log,
			}
			require.NoError(t, raftgroup.Destroy(cfg))
			cfg.Replica = "11111111-0000-4000-8000-000000000001"
			require.NoError(t, raftgroup.Create(cfg, []raftgroup.Member{{Replica: cfg.Replica, Node: n.ID()}}))
		}, trivet.ErrCorrupt, trivet.ErrCorrupt, "check that the right disk is mounted"},
		{"blocks of another replica", func(t *testing.T, c *sim.Cluster, _ *sim.Node, s *replication.ReplicaSpec) {
			require.NoError(t, s.Disk.Engine.DropVolume(c.Volume()))
			require.NoError(t, s.Disk.Engine.CreateVolume(c.Volume(), "11111111-0000-4000-8000-000000000001", sizeBytes))
		}, trivet.ErrCorrupt, trivet.ErrExists, "check that the right disk is mounted"},
		{"both gone", func(t *testing.T, c *sim.Cluster, n *sim.Node, s *replication.ReplicaSpec) {
			require.NoError(t, s.Disk.Engine.DropVolume(c.Volume()))
			require.NoError(t, s.Disk.FS.RemoveAll(groupDir(n, c)))
		}, trivet.ErrNotFound, trivet.ErrCorrupt, "replace it by a replica with a new ID if it was ready before"},
		{"all gone", func(t *testing.T, c *sim.Cluster, n *sim.Node, s *replication.ReplicaSpec) {
			require.NoError(t, s.Disk.Engine.DropVolume(c.Volume()))
			require.NoError(t, s.Disk.FS.RemoveAll(groupDir(n, c)))
			require.NoError(t, s.Disk.Log.Group(c.Volume()).DeleteGroup())
		}, trivet.ErrNotFound, nil, "replace it by a replica with a new ID if it was ready before"},
		{"entries, term and vote gone", func(t *testing.T, c *sim.Cluster, _ *sim.Node, s *replication.ReplicaSpec) {
			require.NoError(t, s.Disk.Log.Group(c.Volume()).DeleteGroup())
		}, trivet.ErrCorrupt, nil, "replace it by a replica with a new ID"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			onOneNode(t, func(t *testing.T, c *sim.Cluster, n *sim.Node) {
				ctx := t.Context()
				require.NoError(t, c.Fence(ctx, 1))
				reboot(t, n)
				s := n.Spec()
				tt.spoil(t, c, n, &s)
				err := n.Host().OpenReplica(ctx, s)
				require.ErrorIs(t, err, tt.open)
				assert.Contains(t, err.Error(), tt.words)
				assert.Contains(t, err.Error(), c.Volume().String())
				require.ErrorIs(t, n.Host().CreateReplica(ctx, s), tt.create)
			})
		})
	}
}

// Creating and destroying may be cut off by a crash before any operation on the disk, with any share
// of the unsynced writes kept, and are then done again.
func TestReplicaLifecycleCrashes(t *testing.T) {
	if testing.Short() {
		t.Skip("tries every operation")
	}
	const calm = time.Second
	rnd := rand.New(rand.NewPCG(1, 1))
	onOneNode(t, func(t *testing.T, c *sim.Cluster, n *sim.Node) {
		ctx := t.Context()
		crashDuring := func(ops, keptPercent int, do func() error) (finished bool) {
			done := make(chan error, 1)
			go func() { done <- do() }()
			began := time.Now()
			require.NoError(t, n.Crash(ctx, sim.CrashOptions{Rand: rnd, UnsyncedPercent: keptPercent, Ops: ops, Wait: calm}))
			<-done // whatever a dead machine says
			require.NoError(t, n.Boot())
			return time.Since(began) >= calm
		}
		for _, kept := range []int{0, 50, 100} {
			for ops := 1; ; ops++ {
				h, s := n.Host(), n.Spec()
				finished := crashDuring(ops, kept, func() error { return h.DestroyReplica(ctx, s) })
				require.NoError(t, n.Host().DestroyReplica(ctx, n.Spec()), "destroy, crash before operation %d", ops)
				h, s = n.Host(), n.Spec()
				finished = crashDuring(ops, kept, func() error { return h.CreateReplica(ctx, s) }) && finished
				require.NoError(t, n.Host().CreateReplica(ctx, n.Spec()), "create, crash before operation %d", ops)
				require.NoError(t, n.Host().OpenReplica(ctx, n.Spec()), "open, crash before operation %d", ops)
				require.NoError(t, c.Fence(ctx, 1))
				if finished {
					require.Greater(t, ops, 10, "no operation was hit")
					break
				}
			}
		}
	})
}

func TestConfigValidate(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		net := transport.NewMemory(1)
		defer func() { require.NoError(t, net.Close()) }()
		node := net.Node("a")
		ok := replication.HostConfig{Network: node, Mux: raftgroup.NewMux(node), Fatal: func(error) {}}
		for name, spoil := range map[string]func(*replication.HostConfig){
			"Network":       func(c *replication.HostConfig) { c.Network = nil },
			"Mux":           func(c *replication.HostConfig) { c.Mux = nil },
			"Fatal":         func(c *replication.HostConfig) { c.Fatal = nil },
			"Timing":        func(c *replication.HostConfig) { c.Timing.Lease = -1 },
			"SnapshotBytes": func(c *replication.HostConfig) { c.SnapshotBytes = -1 },
			"CatchUpBytes":  func(c *replication.HostConfig) { c.CatchUpBytesPerSecond = 1 },
		} {
			cfg := ok
			spoil(&cfg)
			_, err := replication.NewHost(cfg)
			require.ErrorIs(t, err, trivet.ErrInvalid)
			assert.Contains(t, err.Error(), name)
		}
		h, err := replication.NewHost(ok)
		require.NoError(t, err)
		require.NoError(t, h.Close())
		require.NoError(t, h.Close())

		vol := replication.VolumeConfig{
			ID: 1, SizeBytes: sizeBytes, Epoch: 1, Network: node, Members: []raftgroup.Member{{Node: "a", Replica: "r"}},
		}
		for name, spoil := range map[string]func(*replication.VolumeConfig){
			"ID":        func(c *replication.VolumeConfig) { c.ID = 0 },
			"Epoch":     func(c *replication.VolumeConfig) { c.Epoch = 0 },
			"SizeBytes": func(c *replication.VolumeConfig) { c.SizeBytes = 5 },
			"Members":   func(c *replication.VolumeConfig) { c.Members = nil },
			"Network":   func(c *replication.VolumeConfig) { c.Network = nil },
			"IOTimeout": func(c *replication.VolumeConfig) { c.IOTimeout = -1 },
		} {
			cfg := vol
			spoil(&cfg)
			_, err := replication.OpenVolume(cfg)
			require.ErrorIs(t, err, trivet.ErrInvalid)
			assert.Contains(t, err.Error(), name)
		}
	})
}

// A machine may have a replica of the volume on each of two disks: one that runs, and one that has left the
// group. Destroying the latter leaves the former alone.
func TestDestroyLeavesReplicaOnOtherDisk(t *testing.T) {
	onOneNode(t, func(t *testing.T, _ *sim.Cluster, n *sim.Node) {
		ctx, old := t.Context(), n.Spec()
		old.Replica, old.Members, old.Disk.Dir = "11111111-0000-4000-8000-000000000001", nil, "/disk2"
		require.NoError(t, old.Disk.FS.MkdirAll(old.Disk.Dir, 0o700))
		eng, err := engine.Open(engine.Config{FS: old.Disk.FS, Dir: "/disk2/engine", Fatal: func(err error) { t.Error(err) }})
		require.NoError(t, err)
		defer func() { require.NoError(t, eng.Close()) }()
		opts := segment.Options{
			Dir: raftgroup.LogDir(old.Disk.FS, "/disk2/log"), Disk: "22222222-2222-4333-8444-555555555555", Lanes: 1,
			SegmentBytes: 64 << 10,
		}
		require.NoError(t, segment.Format(opts))
		log, err := segment.Open(opts)
		require.NoError(t, err)
		defer func() { require.NoError(t, log.Close()) }()
		old.Disk.Engine, old.Disk.Log = eng, log
		require.NoError(t, n.Host().CreateReplica(ctx, old))
		before, ok := n.Replica()
		require.True(t, ok)
		require.NoError(t, n.Host().DestroyReplica(ctx, old))
		after, ok := n.Replica()
		require.True(t, ok)
		assert.Same(t, before, after)
		require.NoError(t, after.Fence(ctx, 1), "it still runs")
	})
}
