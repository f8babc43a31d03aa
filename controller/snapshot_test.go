package controller_test

import (
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller"
	"github.com/trivet-csi/trivet/controller/meta"
)

// copyBench is a cluster of four nodes with a volume of 2 GiB on three of them.
type copyBench struct {
	store  *memory
	agents *agents
	ctrl   *controller.Controller
	v      meta.Volume
}

func newCopyBench(t *testing.T) *copyBench {
	t.Helper()
	b := &copyBench{store: newMemory(t, 4)}
	b.agents, b.ctrl = startAgents(t, b.store), controller.New(b.store)
	var err error
	b.v, err = b.ctrl.CreateVolume(t.Context(), controller.CreateRequest{
		Name: "v", RequiredBytes: 2 * gib, Params: map[string]string{"iopsLimit": "500"},
	})
	require.NoError(t, err)
	return b
}

// mustSnapshot makes one.
func (b *copyBench) mustSnapshot(t *testing.T, name string) meta.Snapshot {
	t.Helper()
	s, err := b.ctrl.CreateSnapshot(t.Context(), b.v.ID, name)
	require.NoError(t, err)
	return s
}

func TestCreateSnapshot(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		b := newCopyBench(t)
		s := b.mustSnapshot(t, "s")
		assert.Equal(t, meta.SnapshotReady, s.State)
		assert.Equal(t, 2*gib, s.SizeBytes)
		assert.Equal(t, s, b.mustSnapshot(t, "s"))
		_, err := b.ctrl.CreateSnapshot(t.Context(), 99, "t")
		require.ErrorIs(t, err, trivet.ErrNotFound)
		_, err = b.ctrl.CreateSnapshot(t.Context(), b.v.ID, "clone/x")
		require.ErrorIs(t, err, trivet.ErrInvalid, "such names are ours")
		other, err := b.ctrl.CreateVolume(t.Context(), controller.CreateRequest{Name: "w"})
		require.NoError(t, err)
		_, err = b.ctrl.CreateSnapshot(t.Context(), other.ID, "s")
		require.ErrorIs(t, err, trivet.ErrExists)

		b.agents.set(t, func() { b.agents.noFence = true })
		_, err = b.ctrl.CreateSnapshot(soon(t), b.v.ID, "late")
		require.ErrorIs(t, err, trivet.ErrUnavailable)
		b.agents.set(t, func() { b.agents.noFence = false })
		b.mustSnapshot(t, "late")

		require.NoError(t, b.ctrl.DeleteSnapshot(t.Context(), s.ID))
		require.NoError(t, b.ctrl.DeleteSnapshot(t.Context(), s.ID))
		_, err = b.ctrl.Snapshot(t.Context(), s.ID)
		require.ErrorIs(t, err, trivet.ErrNotFound)
	})
}

// The volume changes between the read and the proposal: the snapshot is made all the same.
func TestCreateSnapshotOfABusyVolume(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		b := newCopyBench(t)
		n := 0
		b.store.before = func(c meta.Command) bool {
			if c.CreateSnapshot != nil && n < 3 {
				n++
				_, err := b.store.apply(meta.Command{WantLeader: &meta.WantLeader{
					Volume: b.v.ID, Replica: b.v.Replicas[n%2].ID,
				}})
				assert.NoError(t, err)
			}
			return true
		}
		b.mustSnapshot(t, "s")
		require.Equal(t, 3, n)
	})
}

func TestRestoreToAVolume(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		b := newCopyBench(t)
		s := b.mustSnapshot(t, "s")
		require.NoError(t, b.ctrl.DeleteVolume(t.Context(), b.v.ID), "it stays for its snapshot")
		req := controller.CreateRequest{Name: "r", Source: controller.CopyOf{Snapshot: s.ID}}
		r, err := b.ctrl.CreateVolume(t.Context(), req)
		require.NoError(t, err)
		assert.Equal(t, 2*gib, r.SizeBytes)
		assert.Equal(t, b.v.Params, r.Params)
		require.Len(t, r.Replicas, 3)
		for i, x := range r.Replicas {
			assert.Equal(t, b.v.Replicas[i].Disk, x.Disk, "beside the source's")
		}
		again, err := b.ctrl.CreateVolume(t.Context(), req)
		require.NoError(t, err)
		assert.Equal(t, r.ID, again.ID)
		req.Source = controller.CopyOf{}
		_, err = b.ctrl.CreateVolume(t.Context(), req)
		require.ErrorIs(t, err, trivet.ErrExists, "it is another request")

		larger := controller.CreateRequest{Name: "l", RequiredBytes: 3 * gib, Source: controller.CopyOf{Snapshot: s.ID}}
		l, err := b.ctrl.CreateVolume(t.Context(), larger)
		require.NoError(t, err)
		assert.Equal(t, 3*gib, l.SizeBytes)
		for name, bad := range map[string]controller.CreateRequest{
			"small": {Name: "x", RequiredBytes: gib, Source: controller.CopyOf{Snapshot: s.ID}},
			"limit": {Name: "x", LimitBytes: gib, Source: controller.CopyOf{Snapshot: s.ID}},
		} {
			_, err := b.ctrl.CreateVolume(t.Context(), bad)
			require.ErrorIs(t, err, trivet.ErrOutOfRange, name)
			require.ErrorContains(t, err, "2147483648", name)
		}
		_, err = b.ctrl.CreateVolume(t.Context(), ofSnapshot("x", 99))
		require.ErrorIs(t, err, trivet.ErrNotFound)
	})
}

// A node of the source's that is down is done without, as long as a majority is there; the mender adds what is missing.
func TestRestoreWithoutANode(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		b := newCopyBench(t)
		s := b.mustSnapshot(t, "s")
		down := func(i int) {
			n, err := b.store.Read(t.Context())
			require.NoError(t, err)
			node, _ := n.Node(b.v.Replicas[i].Node)
			node.Incarnation, node.LeaseUntil = uuid(0xf0, i), time.Now().Add(-time.Minute)
			b.store.must(t, meta.Command{RegisterNode: &meta.RegisterNode{Node: node}})
		}
		down(0)
		r, err := b.ctrl.CreateVolume(t.Context(), ofSnapshot("r", s.ID))
		require.NoError(t, err)
		require.Len(t, r.Replicas, 2)
		require.Equal(t, 3, r.Want())
		down(1)
		_, err = b.ctrl.CreateVolume(t.Context(), ofSnapshot("q", s.ID))
		require.ErrorIs(t, err, trivet.ErrUnavailable)
		require.ErrorContains(t, err, "1 of the 3")
	})
}

// A clone of a volume is one of a hidden snapshot, which goes once it is flattened.
func TestCloneVolume(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		b := newCopyBench(t)
		b.agents.set(t, func() { b.agents.noFlatten = true })
		req := controller.CreateRequest{Name: "c", Source: controller.CopyOf{Volume: b.v.ID}}
		c, err := b.ctrl.CloneVolume(t.Context(), req)
		require.NoError(t, err)
		hidden := func() []meta.Snapshot {
			all, err := b.ctrl.Snapshots(t.Context())
			require.NoError(t, err)
			return all
		}
		require.Len(t, hidden(), 1)
		require.True(t, hidden()[0].Hidden())
		require.NoError(t, b.ctrl.DeleteSnapshot(t.Context(), hidden()[0].ID), "the clone needs it: no wait")
		again, err := b.ctrl.CloneVolume(t.Context(), req)
		require.NoError(t, err)
		require.Equal(t, c.ID, again.ID)
		_, err = b.ctrl.MoveReplica(t.Context(), b.v.ID, b.v.Replicas[0].Node, spare(&b.v))
		require.ErrorIs(t, err, trivet.ErrPending)
		require.ErrorContains(t, err, c.ID.String())

		b.agents.set(t, func() { b.agents.noFlatten = false })
		require.Eventually(t, func() bool { return len(hidden()) == 0 }, time.Minute, time.Millisecond)

		_, err = b.ctrl.CloneVolume(t.Context(), controller.CreateRequest{
			Name: "d", RequiredBytes: gib, Source: controller.CopyOf{Volume: b.v.ID},
		})
		require.ErrorIs(t, err, trivet.ErrOutOfRange)
		require.Eventually(t, func() bool { return len(hidden()) == 0 }, time.Minute, time.Millisecond, "it is of no use")
		_, err = b.ctrl.CloneVolume(t.Context(), controller.CreateRequest{Name: "e", Source: controller.CopyOf{Volume: 99}})
		require.ErrorIs(t, err, trivet.ErrNotFound)
	})
}

// spare returns the node without a replica of v.
func spare(v *meta.Volume) trivet.NodeID {
	for n := 1; n <= 4; n++ {
		if v.ReplicaOn(nodeID(n)) == nil {
			return nodeID(n)
		}
	}
	return ""
}

func TestRestoreInPlace(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		b := newCopyBench(t)
		s := b.mustSnapshot(t, "s")
		_, err := b.ctrl.Attach(t.Context(), b.v.ID, "n1", meta.SingleNodeMultiWriter, false)
		require.NoError(t, err)
		_, err = b.ctrl.RestoreInPlace(t.Context(), s.ID)
		require.ErrorIs(t, err, trivet.ErrInUse)
		require.NoError(t, b.ctrl.Detach(t.Context(), b.v.ID, "n1"))
		v, err := b.ctrl.RestoreInPlace(t.Context(), s.ID)
		require.NoError(t, err)
		require.Equal(t, meta.PhaseBound, v.Phase)
		_, err = b.ctrl.RestoreInPlace(t.Context(), 99)
		require.ErrorIs(t, err, trivet.ErrNotFound)

		// Without a quorum of its group it stays so, and is in nobody's hands.
		b.agents.set(t, func() { b.agents.noFence = true })
		_, err = b.ctrl.RestoreInPlace(soon(t), s.ID)
		require.ErrorIs(t, err, trivet.ErrUnavailable)
		_, err = b.ctrl.Attach(soon(t), b.v.ID, "n1", meta.SingleNodeMultiWriter, false)
		require.ErrorIs(t, err, trivet.ErrPending)
		require.ErrorIs(t, b.ctrl.DeleteVolume(soon(t), b.v.ID), trivet.ErrPending)
		_, err = b.ctrl.CreateSnapshot(soon(t), b.v.ID, "t")
		require.ErrorIs(t, err, trivet.ErrPending)
		b.agents.set(t, func() { b.agents.noFence = false })
		v, err = b.ctrl.RestoreInPlace(t.Context(), s.ID)
		require.NoError(t, err)
		require.Equal(t, meta.PhaseBound, v.Phase)
	})
}

func ofSnapshot(name string, id trivet.SnapshotID) controller.CreateRequest {
	return controller.CreateRequest{Name: name, Source: controller.CopyOf{Snapshot: id}}
}
