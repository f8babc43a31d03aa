package meta_test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller/meta"
)

// forcedDetaches makes n audit records.
func forcedDetaches(t *testing.T, m *meta.Machine, n int) {
	t.Helper()
	for range n {
		mustApply(t, m, attach(1, false, 0))
		v, _ := m.State().Volume(1)
		mustApply(t, m, meta.Command{Time: day.Add(time.Duration(v.Epoch) * time.Second), By: "n2", Detach: &meta.Detach{
			Volume: 1, Node: "n1", Forced: true,
		}})
		mustApply(t, m, meta.Command{ReportFence: &meta.ReportFence{Volume: 1, Epoch: v.Epoch + 1}})
	}
}

// The catalogue keeps the newest records, and the hash of the one before them: they can be verified still.
func TestAuditIsARing(t *testing.T) {
	t.Parallel()
	const kept, more = 1024, 10
	m := attachable(t)
	forcedDetaches(t, m, 3)
	anchor := m.State().Audit().Records[2]
	early := m.State()
	forcedDetaches(t, m, kept+more-3)
	a := m.State().Audit()
	require.Len(t, a.Records, kept)
	assert.EqualValues(t, more+1, a.Records[0].Seq)
	require.NoError(t, a.Verify())
	seq, hash := a.Head()
	assert.EqualValues(t, kept+more, seq)
	assert.Equal(t, a.Records[kept-1].Hash, hash)
	assert.Equal(t, anchor, early.Audit().Records[2], "a state that was handed out never changes")
	require.Len(t, early.Audit().Records, 3)

	s, err := meta.DecodeImage(mustImage(t, m.State()))
	require.NoError(t, err)
	assert.Equal(t, a, s.Audit())
}

// Two futures of one state share nothing.
func TestAuditForks(t *testing.T) {
	t.Parallel()
	m := attachable(t)
	forcedDetaches(t, m, 5)
	one, two := meta.NewMachine(m.State()), meta.NewMachine(m.State())
	forcedDetaches(t, one, 1)
	forcedDetaches(t, two, 1)
	mustApply(t, two, meta.Command{Time: day, Release: &meta.Release{Volume: 1, Discard: true}})
	require.NoError(t, one.State().Audit().Verify())
	require.NoError(t, two.State().Audit().Verify())
	assert.Len(t, one.State().Audit().Records, 6)
	assert.Len(t, two.State().Audit().Records, 7)
}

// A record that was changed, left out or put in is found, and so is a chain that was made anew, by whoever has
// written a head down.
func TestAuditTampered(t *testing.T) {
	t.Parallel()
	m := attachable(t)
	forcedDetaches(t, m, 5)
	whole := m.State().Audit()
	for name, change := range map[string]func(a *meta.Audit){
		"detail":   func(a *meta.Audit) { a.Records[2].Detail = "nothing happened" },
		"time":     func(a *meta.Audit) { a.Records[2].Time = a.Records[2].Time.Add(1) },
		"by":       func(a *meta.Audit) { a.Records[2].By = "n3" },
		"node":     func(a *meta.Audit) { a.Records[2].Node = "n3" },
		"volume":   func(a *meta.Audit) { a.Records[2].Volume = 7 },
		"name":     func(a *meta.Audit) { a.Records[2].Name = "x" },
		"kind":     func(a *meta.Audit) { a.Records[2].Kind = meta.AuditWipe },
		"last":     func(a *meta.Audit) { a.Records[4].Detail = "x" },
		"left out": func(a *meta.Audit) { a.Records = append(a.Records[:2:2], a.Records[3:]...) },
		"oldest":   func(a *meta.Audit) { a.Records = a.Records[1:] },
		"base":     func(a *meta.Audit) { a.Base = "00" },
		"twice":    func(a *meta.Audit) { a.Records = append(a.Records, a.Records[4]) },
		"swapped":  func(a *meta.Audit) { a.Records[1], a.Records[2] = a.Records[2], a.Records[1] },
	} {
		a := meta.Audit{Base: whole.Base, Records: append([]meta.AuditRecord{}, whole.Records...)}
		change(&a)
		require.ErrorIs(t, a.Verify(), trivet.ErrCorrupt, name)
	}
	body := string(mustImage(t, m.State())[16:])
	body = body[:len(body)-4]
	bad := strings.Replace(body, `"kind":"forced-detach"`, `"kind":"wipe"`, 1)
	require.NotEqual(t, body, bad)
	_, err := meta.DecodeImage(framed([]byte(bad)))
	require.ErrorIs(t, err, trivet.ErrCorrupt)
	require.ErrorContains(t, err, "audit")
}

// A command that is refused, or has no effect, leaves no record.
func TestAuditOfWhatHappened(t *testing.T) {
	t.Parallel()
	m := attachable(t)
	mustApply(t, m, attach(1, false, 0))
	for i, c := range []meta.Command{
		{Time: day, Release: &meta.Release{Volume: 1, Discard: true}},                          // attached
		{Time: day, Detach: &meta.Detach{Volume: 1, Node: "n2", Forced: true}},                 // not there
		{Time: day, ReportWiped: &meta.ReportWiped{Volume: 1, Epoch: 1}},                       // not Recycling
		{Time: day, Detach: &meta.Detach{Volume: 1, Node: "n1"}},                               // let go
		{Time: day, Reclaim: &meta.Reclaim{Volume: 1, Policy: meta.ReclaimDelete}},             // Bound
		{Time: day, ReportReplica: report(1, 1, meta.ReplicaRemoved).ReportReplica},            // not Deleting
		{Time: day, Release: &meta.Release{Volume: 1, Discard: true, IfRevision: 1}, By: "n3"}, // stale
	} {
		m.Apply(c)
		assert.Empty(t, m.State().Audit().Records, fmt.Sprint(i))
	}
}
