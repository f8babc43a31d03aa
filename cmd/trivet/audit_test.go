package main

import (
	"bytes"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/api"
	"github.com/trivet-csi/trivet/controller/meta"
)

// audited makes a catalogue in which n volumes were deleted.
func audited(t *testing.T, n int) meta.Audit {
	t.Helper()
	m := meta.NewMachine(nil)
	when := time.Date(2026, 11, 26, 2, 0, 0, 123, time.UTC)
	apply := func(c meta.Command) {
		res := m.Apply(c)
		require.NoError(t, res.Err)
	}
	const uuid = "00000001-0000-4000-8000-000000000001"
	apply(meta.Command{InitCluster: &meta.InitCluster{Cluster: uuid, Time: when}})
	apply(meta.Command{RegisterNode: &meta.RegisterNode{Node: meta.Node{
		ID: "n1", Address: "n1:1", Incarnation: uuid, LeaseUntil: when, Disks: []meta.Disk{{ID: uuid, Path: "/d"}},
	}}})
	for i := range n {
		v := meta.Volume{
			ID: trivet.VolumeID(i + 1), Name: "v", SizeBytes: 4096, Reclaim: meta.ReclaimDelete, Request: "r", Created: when,
			Replicas: []meta.Replica{{ID: uuid, Node: "n1", Disk: uuid, State: meta.ReplicaCreating}},
		}
		apply(meta.Command{CreateVolume: &meta.CreateVolume{Volume: v}})
		apply(meta.Command{Time: when, By: "n1", Release: &meta.Release{Volume: v.ID}})
	}
	return m.State().Audit()
}

func sent(a meta.Audit) *api.AuditLog {
	out := &api.AuditLog{Base: a.Base}
	for _, r := range a.Records {
		out.Records = append(out.Records, &api.AuditRecord{
			Seq: r.Seq, Time: r.Time.Format(time.RFC3339Nano), Kind: string(r.Kind), By: string(r.By), Volume: r.Volume.String(),
			Name: r.Name, Node: string(r.Node), Detail: r.Detail, Hash: r.Hash,
		})
	}
	return out
}

// What went over the wire is the same to the last bit, or no hash would hold.
func TestAuditIsVerifiedHere(t *testing.T) {
	t.Parallel()
	want := audited(t, 3)
	got, err := auditOf(sent(want))
	require.NoError(t, err)
	assert.Equal(t, want, got)
	require.NoError(t, verifyAudit(got, ""))
	require.NoError(t, verifyAudit(got, "2:"+want.Records[1].Hash))
	require.ErrorContains(t, verifyAudit(got, "2:"+want.Records[0].Hash), "not that of the anchor")
	require.ErrorContains(t, verifyAudit(got, "9:aa"), "not among those that are kept")
	require.ErrorAs(t, verifyAudit(got, "nonsense"), new(usageError))

	lagging, err := auditOf(sent(audited(t, 2)))
	require.NoError(t, err)
	require.NoError(t, sameAudit(got, lagging), "a copy may lag")
	other := sent(want)
	other.Records[1].Detail = "nothing"
	forged, err := auditOf(other)
	require.NoError(t, err)
	require.Error(t, verifyAudit(forged, ""))
	require.Error(t, sameAudit(got, forged))
	text := &bytes.Buffer{}
	require.NoError(t, (&options{output: outputTable}).show(text, nil, auditTable(got)))
	assert.Contains(t, text.String(), "2026-11-26T02:00:00Z")
	assert.Contains(t, text.String(), "was Creating")
}

// Nothing is given up by a slip of the hand.
func TestRecoveryIsConfirmed(t *testing.T) {
	t.Parallel()
	out := &bytes.Buffer{}
	require.NoError(t, confirm(strings.NewReader("db\n"), out, "volume", "db"))
	require.NoError(t, confirm(strings.NewReader("db"), out, "volume", "db"))
	for _, typed := range []string{"", "\n", "yes\n", "db2\n", "y\n"} {
		require.ErrorContains(t, confirm(strings.NewReader(typed), out, "volume", "db"), "nothing was changed", typed)
	}
	text := recoveryText(&api.RecoverVolumeResponse{
		Volume: &api.Volume{Name: "db", Id: "vol-1"}, Replica: "r", Node: "n1", LastIndex: 7, LastTerm: 3,
		Lost: []string{"q on n2 (Ready)"}, Warning: "it is lost",
	})
	for _, want := range []string{
		"db (vol-1)", "n1", "entry 7 of term 3", "given up for ever: q on n2", "WARNING: it is lost",
	} {
		assert.Contains(t, text, want)
	}
}
