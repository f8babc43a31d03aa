package meta_test

import (
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller/meta"
)

// TestAccessModes is the rule of the access modes, all pairs: who may attach while somebody else, or the same
// node, holds the volume. docs/access-modes.md has it for people.
func TestAccessModes(t *testing.T) {
	t.Parallel()
	modes := []meta.AccessMode{
		meta.SingleNodeSingleWriter, meta.SingleNodeMultiWriter, meta.SingleNodeReader, meta.MultiNodeReader,
		meta.MultiNodeMultiWriter,
	}
	for _, held := range modes {
		for _, wanted := range modes {
			for _, readOnly := range []bool{false, true} {
				if readOnly && held == meta.MultiNodeMultiWriter {
					continue // both write: refused by Validate
				}
				m := attachable(t)
				mustApply(t, m, meta.Command{Attach: &meta.Attach{Volume: 1, Node: "n1", Mode: held, ReadOnly: readOnly}})
				wantOther, wantSame := trivet.ErrInUse, trivet.ErrExists
				if held == wanted && (held == meta.MultiNodeReader || held == meta.MultiNodeMultiWriter) {
					wantOther = nil
				}
				// Not to write is said twice by the modes that only read.
				if held == wanted && (!readOnly || held.Reads()) {
					wantSame = nil
				}
				other := m.Apply(meta.Command{Attach: &meta.Attach{Volume: 1, Node: "n2", Mode: wanted}})
				require.ErrorIs(t, other.Err, wantOther, "n2 wants %s while n1 has %s, read-only %t", wanted, held, readOnly)
				if wantOther != nil {
					require.ErrorContains(t, other.Err, "held by node n1")
				}
				same := m.Apply(meta.Command{Attach: &meta.Attach{Volume: 1, Node: "n1", Mode: wanted}})
				require.ErrorIs(t, same.Err, wantSame, "n1 wants %s and has %s, read-only %t", wanted, held, readOnly)
			}
		}
	}
}

// attachable is a cluster with a volume that can be attached.
func attachable(t *testing.T) *meta.Machine {
	t.Helper()
	m := cluster(t)
	mustApply(t, m, meta.Command{CreateVolume: &meta.CreateVolume{Volume: volume(1, meta.ReclaimDelete, 1)}})
	mustApply(t, m, report(1, 1, meta.ReplicaReady))
	return m
}

func TestReadersAreBounded(t *testing.T) {
	t.Parallel()
	m := attachable(t)
	const most = 256
	for n := 1; n <= most+1; n++ {
		if n > 3 {
			mustApply(t, m, meta.Command{RegisterNode: &meta.RegisterNode{Node: node(n)}})
		}
		res := m.Apply(meta.Command{Attach: &meta.Attach{Volume: 1, Node: nodeID(n), Mode: meta.MultiNodeReader}})
		if n > most {
			require.ErrorIs(t, res.Err, trivet.ErrNoSpace)
			break
		}
		require.NoError(t, res.Err)
	}
	v, _ := m.State().Volume(1)
	require.Len(t, v.Holders(), most)
	_, err := meta.DecodeImage(mustImage(t, m.State()))
	require.NoError(t, err)
}

// TestAs: a node sees its own attachment first, and a change of what it sees changes nothing else.
func TestAs(t *testing.T) {
	t.Parallel()
	m := attachable(t)
	for _, n := range []int{3, 1, 2} {
		mustApply(t, m, meta.Command{Attach: &meta.Attach{Volume: 1, Node: nodeID(n), Mode: meta.MultiNodeReader}})
	}
	v, _ := m.State().Volume(1)
	require.Equal(t, []trivet.NodeID{"n3", "n1", "n2"}, v.Holders())
	for n, others := range map[trivet.NodeID][]trivet.NodeID{
		"n3": {"n1", "n2"}, "n1": {"n3", "n2"}, "n2": {"n1", "n3"}, "n9": {"n3", "n1", "n2"},
	} {
		seen := v.As(n)
		if n == "n9" {
			assert.Nil(t, seen.Attached)
		} else {
			require.NotNil(t, seen.Attached)
			assert.Equal(t, n, seen.Attached.Node)
			seen.Attached.Epoch = 77
		}
		var got []trivet.NodeID
		for i := range seen.Also {
			got = append(got, seen.Also[i].Node)
			seen.Also[i].Epoch = 77
		}
		assert.Equal(t, others, got, "%s", n)
		assert.True(t, v.Holds("n3") && !v.Holds("n9"))
		assert.Equal(t, trivet.Epoch(1), v.GrantOf("n3").Epoch)
		assert.Equal(t, trivet.Epoch(1), v.GrantOf("n2").Epoch)
		assert.Nil(t, v.GrantOf("n9"))
	}
}

// TestWritersAreTwo: a third is refused, whatever it asks for, with the names of both; so is whoever was not named.
func TestWritersAreTwo(t *testing.T) {
	t.Parallel()
	const two = meta.MultiNodeMultiWriter
	m := attachable(t)
	mustApply(t, m, meta.Command{Attach: &meta.Attach{Volume: 1, Node: "n1", Mode: two}})
	mustApply(t, m, meta.Command{Attach: &meta.Attach{Volume: 1, Node: "n3", Mode: two}})
	for _, mode := range []meta.AccessMode{
		meta.SingleNodeSingleWriter, meta.SingleNodeMultiWriter, meta.SingleNodeReader, meta.MultiNodeReader, two,
	} {
		res := m.Apply(meta.Command{Attach: &meta.Attach{Volume: 1, Node: "n2", Mode: mode}})
		require.ErrorIs(t, res.Err, trivet.ErrInUse, "%s", mode)
		require.ErrorContains(t, res.Err, "held by nodes n1, n3", "%s", mode)
	}
	v, _ := m.State().Volume(1)
	require.Equal(t, [meta.WritersMax]trivet.Epoch{1, 2}, v.Writers())
	_, err := meta.DecodeImage(mustImage(t, m.State()))
	require.NoError(t, err)
	for _, bad := range []meta.Attach{
		{Volume: 1, Node: "n2", Mode: two, ReadOnly: true},
		{Volume: 1, Node: "n2", Mode: two, With: "n2"},
		{Volume: 1, Node: "n2", Mode: meta.SingleNodeMultiWriter, With: "n3"},
		{Volume: 1, Node: "n2", Mode: two, With: "no node"},
	} {
		_, err := meta.Command{Attach: &bad}.Encode()
		require.ErrorIs(t, err, trivet.ErrInvalid, "%+v", bad)
	}
}
