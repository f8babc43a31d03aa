package controller_test

import (
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller"
	"github.com/trivet-csi/trivet/controller/meta"
)

// The same request for a copy gives the same volume, whatever has become of the source since: it has other parameters,
// it is larger, it is gone.
func TestCopyAgain(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		b := newCopyBench(t)
		s := b.mustSnapshot(t, "s")
		requests := []controller.CreateRequest{
			{Name: "plain", Source: controller.CopyOf{Volume: b.v.ID}},
			{Name: "sized", Source: controller.CopyOf{Volume: b.v.ID}, RequiredBytes: 2 * gib},
			{Name: "with", Source: controller.CopyOf{Volume: b.v.ID}, Params: map[string]string{"replicas": "3"}},
			ofSnapshot("of", s.ID),
		}
		made := make([]meta.Volume, len(requests))
		again := func(when string) {
			t.Helper()
			for i, r := range requests {
				v, err := b.ctrl.CloneVolume(t.Context(), r)
				require.NoError(t, err, "%s: %s", r.Name, when)
				if made[i].ID == 0 {
					made[i] = v
				}
				require.Equal(t, made[i].ID, v.ID, "%s: %s", r.Name, when)
			}
		}
		again("the first time")
		assert.Equal(t, b.v.Params, made[0].Params)
		again("at once")
		_, err := b.ctrl.SetParams(t.Context(), b.v.ID, map[string]string{"iopsLimit": "900"})
		require.NoError(t, err)
		_, err = b.ctrl.ResizeVolume(t.Context(), b.v.ID, 3*gib)
		require.NoError(t, err)
		again("the source has changed")
		require.NoError(t, b.ctrl.DeleteSnapshot(t.Context(), s.ID))
		require.NoError(t, b.ctrl.DeleteVolume(t.Context(), b.v.ID))
		again("the source is gone")

		for _, r := range []controller.CreateRequest{
			{Name: "plain"},
			{Name: "plain", Source: controller.CopyOf{Snapshot: s.ID}},
			{Name: "plain", Source: controller.CopyOf{Volume: b.v.ID}, Params: map[string]string{"replicas": "3"}},
			{Name: "plain", Source: controller.CopyOf{Volume: b.v.ID}, RequiredBytes: 4 * gib},
			{Name: "with", Source: controller.CopyOf{Volume: b.v.ID}, Params: map[string]string{"replicas": "1"}},
		} {
			_, err = b.ctrl.CloneVolume(t.Context(), r)
			require.ErrorIs(t, err, trivet.ErrExists, "%+v", r)
		}
	})
}

// A copy that could not be made is dropped by the call that waits for it, though another has begun it. That is nothing
// that the caller did wrong, and the next call makes it elsewhere.
func TestCopyBegunByAnotherCall(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		b := newCopyBench(t)
		s := b.mustSnapshot(t, "s")
		bad := b.v.Replicas[0].Node
		b.agents.set(t, func() { b.agents.dead[bad] = true })
		_, err := b.ctrl.CreateVolume(soon(t), ofSnapshot("c", s.ID))
		require.ErrorIs(t, err, trivet.ErrUnavailable)
		b.agents.set(t, func() { b.agents.dead[bad], b.agents.faulty[bad] = false, true })
		_, err = b.ctrl.CreateVolume(t.Context(), ofSnapshot("c", s.ID))
		require.ErrorIs(t, err, trivet.ErrUnavailable)
		v, err := b.ctrl.CreateVolume(t.Context(), ofSnapshot("c", s.ID))
		require.NoError(t, err)
		require.Len(t, v.Replicas, 2)
		require.Nil(t, v.ReplicaOn(bad))
	})
}

// A copy lies where its source lies. Among those places the leader goes where the pod will be.
func TestCopyInATopology(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		b := newCopyBench(t)
		s := b.mustSnapshot(t, "s")
		node := func(n trivet.NodeID) []map[string]string {
			return []map[string]string{{controller.TopologyNode: string(n)}}
		}
		for _, r := range b.v.Replicas {
			req := ofSnapshot("preferred-"+string(r.Node), s.ID)
			req.Preferred = append(node("n9"), node(r.Node)...)
			v, err := b.ctrl.CreateVolume(t.Context(), req)
			require.NoError(t, err)
			require.Len(t, v.Replicas, 3)
			require.Equal(t, r.Node, v.Replicas[0].Node)

			req = ofSnapshot("required-"+string(r.Node), s.ID)
			req.Requisite, req.Params = node(r.Node), map[string]string{"replicas": "1"}
			v, err = b.ctrl.CreateVolume(t.Context(), req)
			require.NoError(t, err)
			require.Len(t, v.Replicas, 1)
			require.Equal(t, r.Node, v.Replicas[0].Node)
		}
		req := ofSnapshot("elsewhere", s.ID)
		req.Requisite = node(spare(&b.v))
		_, err := b.ctrl.CreateVolume(t.Context(), req)
		require.ErrorIs(t, err, trivet.ErrNoSpace)
		require.ErrorContains(t, err, "topology")
	})
}

// A request that can never be granted makes no snapshot of the volume that it names.
func TestRefusedCloneFreezesNothing(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		b := newCopyBench(t)
		b.store.before = func(c meta.Command) bool {
			assert.Nil(t, c.CreateSnapshot)
			return true
		}
		of := controller.CopyOf{Volume: b.v.ID}
		_, err := b.ctrl.CloneVolume(t.Context(), controller.CreateRequest{Name: "c", Source: of, RequiredBytes: gib})
		require.ErrorIs(t, err, trivet.ErrOutOfRange)
		_, err = b.ctrl.CloneVolume(t.Context(), controller.CreateRequest{
			Name: "c", Source: of, Params: map[string]string{"replcias": "3"},
		})
		require.ErrorIs(t, err, trivet.ErrInvalid)
	})
}

// A snapshot that was deleted, and stays for a clone alone, is nothing that a new volume can be made of.
func TestCopyOfADeletedSnapshot(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		b := newCopyBench(t)
		b.agents.set(t, func() { b.agents.noFlatten = true })
		s := b.mustSnapshot(t, "s")
		_, err := b.ctrl.CreateVolume(t.Context(), ofSnapshot("first", s.ID))
		require.NoError(t, err)
		require.NoError(t, b.ctrl.DeleteSnapshot(t.Context(), s.ID))
		_, err = b.ctrl.Snapshot(t.Context(), s.ID)
		require.NoError(t, err, "the first copy needs it")
		_, err = b.ctrl.CreateVolume(t.Context(), ofSnapshot("second", s.ID))
		require.ErrorIs(t, err, trivet.ErrNotFound)
	})
}
