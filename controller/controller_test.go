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

// bench is a controller over a catalogue in memory, with agents that do as they are told.
type bench struct {
	*controller.Controller
	store  *memory
	agents *agents
}

func newBench(t *testing.T, nodes int) *bench {
	t.Helper()
	store := newMemory(t, nodes)
	return &bench{controller.New(store), store, startAgents(t, store)}
}

// inBubble runs f with time that passes only when everybody waits.
func inBubble(t *testing.T, f func(t *testing.T)) {
	t.Helper()
	t.Parallel()
	synctest.Test(t, f)
}

func soon(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func (b *bench) create(t *testing.T, name string, params map[string]string) meta.Volume {
	t.Helper()
	v, err := b.CreateVolume(soon(t), controller.CreateRequest{Name: name, RequiredBytes: gib, Params: params})
	require.NoError(t, err)
	return v
}

func TestCreateIsIdempotent(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		b := newBench(t, 3)
		v := b.create(t, "pvc-1", nil)
		assert.Equal(t, meta.PhaseBound, v.Phase)
		assert.Equal(t, gib, v.SizeBytes)
		assert.Len(t, v.Replicas, 3)
		again := b.create(t, "pvc-1", map[string]string{
			"REPLICAS": "3", "csi.storage.k8s.io/pvc/name": "claim", "csi.storage.k8s.io/pv/name": "pv",
		})
		assert.Equal(t, v, again)
		assert.Len(t, b.store.Local().Volumes(), 1)

		for name, r := range map[string]controller.CreateRequest{
			"other parameters": {RequiredBytes: gib, Params: map[string]string{"replicas": "1"}},
			"larger":           {RequiredBytes: 2 * gib},
			"smaller":          {RequiredBytes: gib / 4, LimitBytes: gib / 2},
		} {
			r.Name = "pvc-1"
			_, err := b.CreateVolume(soon(t), r)
			require.ErrorIs(t, err, trivet.ErrExists, name)
		}
		for name, r := range map[string]controller.CreateRequest{
			"within the range": {RequiredBytes: gib / 2, LimitBytes: 2 * gib},
			"no range":         {},
		} {
			r.Name = "pvc-1"
			got, err := b.CreateVolume(soon(t), r)
			require.NoError(t, err, name)
			assert.Equal(t, v.ID, got.ID, name)
		}
	})
}

func TestCreateUnclaimedThenClaimed(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		b := newBench(t, 3)
		r := controller.CreateRequest{Name: "static", Unclaimed: true}
		v, err := b.CreateVolume(soon(t), r)
		require.NoError(t, err)
		assert.Equal(t, meta.PhaseAvailable, v.Phase)
		assert.Equal(t, int64(controller.DefaultVolumeBytes), v.SizeBytes)
		r.Unclaimed = false
		v, err = b.CreateVolume(soon(t), r)
		require.NoError(t, err)
		assert.Equal(t, meta.PhaseBound, v.Phase)
	})
}

// TestCreateWhileMembersChange: the same create again finds its volume also when that has two or four
// replicas by now, or two on one node, and when the nodes would not have room for another one.
func TestCreateWhileMembersChange(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		b := newBench(t, 4)
		v := b.create(t, "pvc-1", nil)
		free := trivet.NodeID("")
		for n := 1; n <= 4; n++ {
			if v.ReplicaOn(nodeID(n)) == nil {
				free = nodeID(n)
			}
		}
		nd, _ := b.store.Local().Node(free)
		b.store.must(t, meta.Command{AddReplica: &meta.AddReplica{
			Volume: v.ID, IfRevision: v.Revision,
			Replica: meta.Replica{ID: trivet.ReplicaID(uuid(0xe, 1)), Node: free, Disk: nd.Disks[0].ID},
		}})
		for n := 1; n <= 4; n++ {
			b.store.must(t, meta.Command{CordonNode: &meta.CordonNode{Node: nodeID(n), Cordoned: true}})
		}
		again := b.create(t, "pvc-1", nil)
		assert.Equal(t, v.ID, again.ID)
		assert.Len(t, again.Replicas, 4)
		_, err := b.CreateVolume(soon(t), controller.CreateRequest{Name: "pvc-2", RequiredBytes: gib})
		require.ErrorIs(t, err, trivet.ErrNoSpace)
		require.ErrorContains(t, err, "cordoned: n1, n2, n3, n4")
	})
}

func TestCreateRefuses(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		b := newBench(t, 3)
		for _, tc := range []struct {
			name string
			r    controller.CreateRequest
			want error
			text string
		}{
			{"no name", controller.CreateRequest{}, trivet.ErrInvalid, "name is empty"},
			{"bad name", controller.CreateRequest{Name: "a/b"}, trivet.ErrInvalid, "forbidden"},
			{
				"unknown key",
				controller.CreateRequest{Name: "x", Params: map[string]string{"colour": "red"}},
				trivet.ErrInvalid, `"colour"`,
			},
			{"negative", controller.CreateRequest{Name: "x", RequiredBytes: -1}, trivet.ErrInvalid, "-1"},
			{
				"above the limit",
				controller.CreateRequest{Name: "x", RequiredBytes: 2, LimitBytes: 1},
				trivet.ErrOutOfRange, "limit of 1",
			},
			{
				"no block fits",
				controller.CreateRequest{Name: "x", RequiredBytes: 1, LimitBytes: 4095},
				trivet.ErrOutOfRange, "4095",
			},
			{"above 64 TiB", controller.CreateRequest{Name: "x", RequiredBytes: 65 << 40}, trivet.ErrOutOfRange, "at most"},
			{
				"beyond every disk",
				controller.CreateRequest{Name: "x", RequiredBytes: 101 * gib},
				trivet.ErrOutOfRange, "largest disk has 107374182400",
			},
			{
				"more than is free",
				controller.CreateRequest{Name: "x", RequiredBytes: 90 * gib},
				trivet.ErrNoSpace, "0 of 3 nodes qualify; too little room: n1",
			},
			{
				"too few nodes",
				controller.CreateRequest{Name: "x", Params: map[string]string{"replicas": "5"}},
				trivet.ErrNoSpace, "3 of 3 nodes qualify",
			},
		} {
			_, err := b.CreateVolume(soon(t), tc.r)
			require.ErrorIs(t, err, tc.want, tc.name)
			require.ErrorContains(t, err, tc.text, tc.name)
		}
		assert.Empty(t, b.store.Local().Volumes())
	})
}

func TestCreateWithoutQuorumGoesOnLater(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		b := newBench(t, 3)
		b.store.setDown(true)
		r := controller.CreateRequest{Name: "x"}
		_, err := b.CreateVolume(soon(t), r)
		require.ErrorIs(t, err, trivet.ErrUnavailable)
		b.store.setDown(false)

		// The agents make nothing: the call runs out of time, the record stays, and a second call
		// finds it.
		b.agents.set(t, func() { b.agents.dead = map[trivet.NodeID]bool{"n1": true, "n2": true, "n3": true} })
		_, err = b.CreateVolume(soon(t), r)
		require.ErrorIs(t, err, trivet.ErrUnavailable)
		require.NotErrorIs(t, err, context.DeadlineExceeded)
		require.Len(t, b.store.Local().Volumes(), 1)
		made := b.store.Local().Volumes()[0]
		b.agents.set(t, func() { clear(b.agents.dead) })
		v, err := b.CreateVolume(soon(t), r)
		require.NoError(t, err)
		assert.Equal(t, made.ID, v.ID)
	})
}

// TestCreateMovesAway: a replica that cannot be made, or whose node dies, is not waited for. The
// half-made volume is removed, not left behind.
func TestCreateMovesAway(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		b := newBench(t, 5)
		v := b.create(t, "probe", nil)
		victim := v.Replicas[1].Node
		b.agents.set(t, func() { b.agents.faulty[victim] = true })
		for _, name := range []string{"a", "b", "c"} {
			v = b.create(t, name, nil)
			assert.Nil(t, v.ReplicaOn(victim), name)
		}
		synctest.Wait() // the agents may still be removing what was half-made
		assert.Len(t, b.store.Local().Volumes(), 4, "nothing half-made is left")

		// Now one dies: its lease still runs for a while, and then the volume is made elsewhere.
		b.agents.set(t, func() { clear(b.agents.faulty) })
		for n := 1; n <= 5; n++ { // n3 loses its lease within the call
			lease := testNode(n, time.Now())
			lease.Incarnation = uuid(0xf, 100+n)
			if n == 3 {
				lease.LeaseUntil = time.Now().Add(5 * time.Second)
			}
			b.store.must(t, meta.Command{RegisterNode: &meta.RegisterNode{Node: lease}})
		}
		b.agents.set(t, func() { b.agents.dead["n3"] = true })
		start := time.Now()
		v, err := b.CreateVolume(soon(t), controller.CreateRequest{
			Name: "d", Preferred: []map[string]string{{controller.TopologyNode: "n3"}},
		})
		require.NoError(t, err)
		assert.Nil(t, v.ReplicaOn("n3"))
		assert.GreaterOrEqual(t, time.Since(start), 4*time.Second, "it was tried there first")
	})
}

func TestCreateGivesUpWhereNothingIsLeft(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		b := newBench(t, 3)
		b.agents.set(t, func() { b.agents.faulty["n2"] = true })
		_, err := b.CreateVolume(soon(t), controller.CreateRequest{Name: "x"})
		require.ErrorIs(t, err, trivet.ErrUnavailable, "n2 may be well again tomorrow")
		synctest.Wait()
		assert.Empty(t, b.store.Local().Volumes())
	})
}

func TestOneAtATime(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		b := newBench(t, 3)
		v := b.create(t, "x", nil)
		b.agents.set(t, func() { b.agents.noFence = true })
		first := make(chan error, 1)
		go func() {
			_, err := b.Attach(soon(t), v.ID, "n1", meta.SingleNodeMultiWriter, false)
			first <- err
		}()
		synctest.Wait()
		_, err := b.Attach(soon(t), v.ID, "n1", meta.SingleNodeMultiWriter, false)
		require.ErrorIs(t, err, trivet.ErrPending)
		require.ErrorIs(t, b.DeleteVolume(soon(t), v.ID), trivet.ErrPending)
		require.ErrorIs(t, b.Detach(soon(t), v.ID, "n1"), trivet.ErrPending)

		b.agents.set(t, func() { b.agents.dead = map[trivet.NodeID]bool{"n1": true, "n2": true, "n3": true} })
		second := make(chan error, 1)
		go func() {
			_, err := b.CreateVolume(soon(t), controller.CreateRequest{Name: "y"})
			second <- err
		}()
		synctest.Wait()
		_, err = b.CreateVolume(soon(t), controller.CreateRequest{Name: "y"})
		require.ErrorIs(t, err, trivet.ErrPending)
		require.ErrorIs(t, <-first, trivet.ErrUnavailable)
		require.ErrorIs(t, <-second, trivet.ErrUnavailable)
	})
}

func TestAttachWaitsForTheFence(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		b := newBench(t, 3)
		v := b.create(t, "x", nil)
		_, err := b.Attach(soon(t), v.ID, "n9", meta.SingleNodeMultiWriter, false)
		require.ErrorIs(t, err, trivet.ErrNotFound)
		_, err = b.Attach(soon(t), 12345, "n1", meta.SingleNodeMultiWriter, false)
		require.ErrorIs(t, err, trivet.ErrNotFound)

		b.agents.set(t, func() { b.agents.noFence = true })
		_, err = b.Attach(soon(t), v.ID, "n1", meta.SingleNodeMultiWriter, false)
		require.ErrorIs(t, err, trivet.ErrUnavailable, "no quorum in the volume's group")
		b.agents.set(t, func() { b.agents.noFence = false })
		got, err := b.Attach(soon(t), v.ID, "n1", meta.SingleNodeMultiWriter, false)
		require.NoError(t, err)
		assert.True(t, got.Usable("n1", 1), "the second call goes on with the epoch of the first")

		_, err = b.Attach(soon(t), v.ID, "n1", meta.SingleNodeSingleWriter, false)
		require.ErrorIs(t, err, trivet.ErrExists)
		_, err = b.Attach(soon(t), v.ID, "n2", meta.SingleNodeMultiWriter, false)
		require.ErrorIs(t, err, trivet.ErrInUse)
		require.ErrorContains(t, err, "n1")

		// The detach is done only behind the fence, and until then n2 may not have it.
		b.agents.set(t, func() { b.agents.noFence = true })
		require.ErrorIs(t, b.Detach(soon(t), v.ID, "n1"), trivet.ErrUnavailable)
		_, err = b.Attach(soon(t), v.ID, "n2", meta.SingleNodeMultiWriter, false)
		require.ErrorIs(t, err, trivet.ErrInUse)
		require.ErrorContains(t, err, "n1")
		require.ErrorIs(t, b.DeleteVolume(soon(t), v.ID), trivet.ErrInUse)
		require.NoError(t, b.Detach(soon(t), v.ID, "n2"), "not attached there")
		require.ErrorIs(t, b.Detach(soon(t), v.ID, "n1"), trivet.ErrUnavailable, "repeated, it waits again")

		// The same node comes back: it waits for its own fence.
		back := make(chan error, 1)
		go func() {
			_, err := b.Attach(soon(t), v.ID, "n1", meta.SingleNodeMultiWriter, false)
			back <- err
		}()
		synctest.Wait()
		b.agents.set(t, func() { b.agents.noFence = false })
		require.NoError(t, <-back)
		require.NoError(t, b.Detach(soon(t), v.ID, ""))
		require.NoError(t, b.Detach(soon(t), v.ID, "n1"))
		require.NoError(t, b.Detach(soon(t), 12345, "n1"))
		got, err = b.Volume(soon(t), v.ID)
		require.NoError(t, err)
		assert.Empty(t, got.Holder())
		assert.Equal(t, got.Epoch, got.FencedEpoch)
	})
}

// TestLaggingCopy: this node's copy does not know yet what the leader has just done. A verb waits for
// it rather than conclude that the volume is gone or detached.
func TestLaggingCopy(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		b := newBench(t, 3)
		lag := func(verb func() error) {
			b.store.setLag(true)
			done := make(chan error, 1)
			go func() { done <- verb() }()
			synctest.Wait()
			select {
			case err := <-done:
				require.Fail(t, "did not wait", "%v", err)
			default:
			}
			b.store.setLag(false)
			require.NoError(t, <-done)
		}
		var v meta.Volume
		lag(func() (err error) {
			v, err = b.CreateVolume(soon(t), controller.CreateRequest{Name: "x"})
			return err
		})
		lag(func() error {
			_, err := b.Attach(soon(t), v.ID, "n1", meta.SingleNodeMultiWriter, false)
			return err
		})
		lag(func() error { return b.Detach(soon(t), v.ID, "n1") })
		lag(func() error { return b.DeleteVolume(soon(t), v.ID) })
	})
}

// TestDetachDuringTakeOver: the holder restarts between the read and the proposal of a detach. The
// detach must hit the new epoch too, or it would return with the node still attached.
func TestDetachDuringTakeOver(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		b := newBench(t, 3)
		v := b.create(t, "x", nil)
		_, err := b.Attach(soon(t), v.ID, "n1", meta.SingleNodeMultiWriter, false)
		require.NoError(t, err)
		once := true
		b.store.before = func(c meta.Command) bool {
			if c.Detach != nil && once {
				once = false
				b.store.must(t, meta.Command{TakeOver: &meta.TakeOver{Volume: v.ID, Node: "n1"}})
			}
			return true
		}
		require.NoError(t, b.Detach(soon(t), v.ID, "n1"))
		v, err = b.Volume(soon(t), v.ID)
		require.NoError(t, err)
		assert.Nil(t, v.Attached)
		assert.Equal(t, trivet.Epoch(3), v.FencedEpoch)
	})
}

// TestReadersComeAndGo: nodes that only read share an epoch, which is fenced when the last of them leaves.
func TestReadersComeAndGo(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		b := newBench(t, 3)
		v := b.create(t, "x", nil)
		for _, n := range []trivet.NodeID{"n1", "n2", "n3"} {
			got, err := b.Attach(soon(t), v.ID, n, meta.MultiNodeReader, false)
			require.NoError(t, err)
			assert.True(t, got.Usable(n, 1))
			assert.True(t, got.GrantOf(n).ReadOnly)
		}
		_, err := b.Attach(soon(t), v.ID, "n2", meta.SingleNodeMultiWriter, false)
		require.ErrorIs(t, err, trivet.ErrExists)
		once := true
		b.store.before = func(c meta.Command) bool { // another reader leaves between the read and the proposal
			if c.Detach != nil && once {
				once = false
				b.store.must(t, meta.Command{Detach: &meta.Detach{Volume: v.ID, Node: "n3"}})
			}
			return true
		}
		require.NoError(t, b.Detach(soon(t), v.ID, "n1"))
		v, err = b.Volume(soon(t), v.ID)
		require.NoError(t, err)
		assert.Equal(t, []trivet.NodeID{"n2"}, v.Holders())
		assert.Equal(t, trivet.Epoch(1), v.Epoch)
		require.NoError(t, b.Detach(soon(t), v.ID, "n1"), "it is gone")
		require.NoError(t, b.Detach(soon(t), v.ID, "n2"))
		v, err = b.Volume(soon(t), v.ID)
		require.NoError(t, err)
		assert.Empty(t, v.Holders())
		assert.Equal(t, trivet.Epoch(2), v.FencedEpoch)

		for _, n := range []trivet.NodeID{"n1", "n2"} {
			_, err = b.Attach(soon(t), v.ID, n, meta.MultiNodeReader, false)
			require.NoError(t, err)
		}
		require.NoError(t, b.Detach(soon(t), v.ID, ""), "all at once")
		v, err = b.Volume(soon(t), v.ID)
		require.NoError(t, err)
		assert.Empty(t, v.Holders())
		assert.Equal(t, trivet.Epoch(4), v.FencedEpoch)
	})
}

func TestDeleteByPolicy(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		b := newBench(t, 3)
		require.NoError(t, b.DeleteVolume(soon(t), 12345))
		for policy, want := range map[string]meta.Phase{
			"delete": "", "retain": meta.PhaseReleased, "recycle": meta.PhaseAvailable,
		} {
			v := b.create(t, policy, map[string]string{"reclaimPolicy": policy})
			_, err := b.Attach(soon(t), v.ID, "n2", meta.SingleNodeMultiWriter, false)
			require.NoError(t, err)
			err = b.DeleteVolume(soon(t), v.ID)
			require.ErrorIs(t, err, trivet.ErrInUse)
			require.ErrorContains(t, err, "n2")
			require.NoError(t, b.Detach(soon(t), v.ID, "n2"))
			require.NoError(t, b.DeleteVolume(soon(t), v.ID))
			got, err := b.Volume(soon(t), v.ID)
			if want == "" {
				require.ErrorIs(t, err, trivet.ErrNotFound)
				continue
			}
			require.NoError(t, err)
			assert.Equal(t, want, got.Phase)
			require.NoError(t, b.DeleteVolume(soon(t), v.ID), "again")
			same, err := b.VolumeByName(soon(t), policy)
			require.NoError(t, err)
			assert.Equal(t, got, same, "deleting again changes nothing")
			if policy == "retain" {
				require.NoError(t, b.Reclaim(soon(t), v.ID, meta.ReclaimRetain))
				require.ErrorIs(t, b.Reclaim(soon(t), v.ID, meta.ReclaimRetain), trivet.ErrInvalid)
			}
			require.NoError(t, b.Discard(soon(t), v.ID))
			_, err = b.Volume(soon(t), v.ID)
			require.ErrorIs(t, err, trivet.ErrNotFound)
		}
	})
}

// TestDeleteWaits: a replica on a dead node keeps the delete waiting, but not the name.
func TestDeleteWaits(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		b := newBench(t, 5)
		v := b.create(t, "x", nil)
		b.agents.set(t, func() { b.agents.dead[v.Replicas[2].Node] = true })
		require.ErrorIs(t, b.DeleteVolume(soon(t), v.ID), trivet.ErrUnavailable)
		old, err := b.Volume(soon(t), v.ID)
		require.NoError(t, err)
		assert.Equal(t, meta.PhaseDeleting, old.Phase)
		fresh := make(chan meta.Volume, 1)
		go func() { //nolint:testifylint // it fails the test; the receive below then times the bubble out
			fresh <- b.create(t, "x", map[string]string{"replicas": "1"})
		}()
		synctest.Wait()
		b.agents.set(t, func() { clear(b.agents.dead) })
		require.NoError(t, b.DeleteVolume(soon(t), v.ID))
		assert.NotEqual(t, v.ID, (<-fresh).ID)
	})
}

func TestMoveLeader(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		b := newBench(t, 3)
		v := b.create(t, "x", map[string]string{"replicas": "1"})
		home := v.Replicas[0].Node
		require.NoError(t, b.MoveLeader(soon(t), v.ID, home))
		v, err := b.Volume(soon(t), v.ID)
		require.NoError(t, err)
		assert.Equal(t, v.Replicas[0].ID, v.Leader)
		require.ErrorIs(t, b.MoveLeader(soon(t), v.ID, "n9"), trivet.ErrNotFound)
		require.ErrorIs(t, b.MoveLeader(soon(t), 12345, home), trivet.ErrNotFound)
	})
}

func TestStatus(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		b := newBench(t, 3)
		b.create(t, "x", nil)
		st, err := b.Status(soon(t))
		require.NoError(t, err)
		assert.Equal(t, clusterID, st.Cluster)
		assert.Equal(t, map[meta.Phase]int{meta.PhaseBound: 1}, st.Volumes)
		assert.Empty(t, st.Down)
		assert.Zero(t, st.Degraded)
		<-time.After(2 * time.Hour) // of the bubble: every lease runs out
		st, err = b.Status(soon(t))
		require.NoError(t, err)
		assert.Equal(t, []trivet.NodeID{"n1", "n2", "n3"}, st.Down)
		assert.Equal(t, 1, st.Degraded)
		b.store.setDown(true)
		_, err = b.Status(soon(t))
		assert.ErrorIs(t, err, trivet.ErrUnavailable)
	})
}

func TestCapacity(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		b := newBench(t, 4)
		small := testNode(2, time.Now())
		small.Disks[0].FreeBytes = 10 * gib
		b.store.must(t, meta.Command{RegisterNode: &meta.RegisterNode{Node: small}})
		one := map[string]string{"replicas": "1"}
		for _, tc := range []struct {
			name               string
			params, segment    map[string]string
			available, largest int64
		}{
			{"cluster", nil, nil, 80 * gib, 80 * gib},
			{"one replica", one, nil, 250 * gib, 80 * gib},
			{"small node", one, map[string]string{controller.TopologyNode: "n2"}, 10 * gib, 10 * gib},
			{"small node, three replicas", nil, map[string]string{controller.TopologyNode: "n2"}, 10 * gib, 10 * gib},
			{"zone", nil, map[string]string{controller.TopologyZone: "z0"}, 80 * gib, 80 * gib},
			{"a replica in each zone", map[string]string{"spread": "zone"}, nil, 10 * gib, 10 * gib},
			{"no such zone", nil, map[string]string{controller.TopologyZone: "z9"}, 0, 0},
			{"too few nodes", map[string]string{"replicas": "5"}, nil, 0, 0},
		} {
			available, largest, err := b.Capacity(soon(t), tc.params, tc.segment)
			require.NoError(t, err, tc.name)
			assert.InDelta(t, tc.available, available, float64(gib), tc.name)
			assert.Equal(t, tc.largest, largest, tc.name)
		}
		_, _, err := b.Capacity(soon(t), map[string]string{"x": "y"}, nil)
		require.ErrorIs(t, err, trivet.ErrInvalid)
	})
}
