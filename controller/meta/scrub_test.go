package meta_test

import (
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller/meta"
)

func startScrub(id int, pass uint64, verify bool, rate int64) meta.Command {
	return meta.Command{StartScrub: &meta.StartScrub{
		Volume: trivet.VolumeID(id), Pass: pass, Verify: verify, RateBytes: rate, Time: day,
	}}
}

// TestScrubPass: a pass is counted range by range, each once however often it is reported, and its figures stay when it
// is over. The volume's revision does not move.
func TestScrubPass(t *testing.T) {
	t.Parallel()
	m := cluster(t)
	mustApply(t, m, meta.Command{CreateVolume: &meta.CreateVolume{Volume: volume(1, meta.ReclaimDelete, 1)}})
	require.ErrorIs(t, m.Apply(startScrub(1, 1, false, 0)).Err, trivet.ErrInvalid, "it is being made")
	revision := mustApply(t, m, report(1, 1, meta.ReplicaReady)).Volume.Revision
	require.ErrorIs(t, m.Apply(startScrub(2, 1, false, 0)).Err, trivet.ErrNotFound)
	require.ErrorIs(t, m.Apply(startScrub(1, 2, false, 0)).Err, trivet.ErrPending, "the first is the next")

	v := mustApply(t, m, startScrub(1, 1, false, 5)).Volume
	require.True(t, v.Scrubbing())
	before := m.State()
	mustApply(t, m, startScrub(1, 1, false, 5))
	require.Same(t, before, m.State(), "the same again")
	require.EqualValues(t, 9, mustApply(t, m, startScrub(1, 1, false, 9)).Volume.Scrub.RateBytes)

	ranged := func(pass uint64, from, next trivet.LBA, done bool) meta.Command {
		return meta.Command{ReportScrub: &meta.ReportScrub{
			Volume: 1, Pass: pass, From: from, Next: next, Done: done, Time: day.Add(time.Hour), CheckedBytes: 10, Found: 2,
			Repaired: 1, Left: 1, Findings: []string{"something"}, Absent: []trivet.NodeID{"n2"},
		}}
	}
	for range 2 { // the second is late
		v = mustApply(t, m, ranged(1, 0, 100, false)).Volume
		assert.EqualValues(t, 2, v.Scrub.Found)
		assert.EqualValues(t, 100, v.Scrub.Next)
	}
	mustApply(t, m, ranged(2, 100, 200, false)) // of another pass
	mustApply(t, m, ranged(1, 50, 200, false))
	v = mustApply(t, m, ranged(1, 100, 0, true)).Volume
	want := &meta.Scrub{
		Pass: 1, RateBytes: 9, Started: day, Ended: day.Add(time.Hour), CheckedBytes: 20, Found: 4, Repaired: 2, Left: 2,
		Findings: []string{"something", "something"}, Absent: []trivet.NodeID{"n2"}, LastStarted: day,
		LastEnded: day.Add(time.Hour),
	}
	assert.Equal(t, want, v.Scrub)
	assert.Equal(t, revision, v.Revision)
	mustApply(t, m, ranged(1, 0, 100, false))
	read, err := meta.DecodeImage(mustImage(t, m.State()))
	require.NoError(t, err)
	assert.Equal(t, m.State(), read)

	v = mustApply(t, m, startScrub(1, 2, true, 0)).Volume
	assert.Equal(t, day, v.Scrub.LastStarted)
	assert.Zero(t, v.Scrub.Found)
	require.ErrorIs(t, m.Apply(startScrub(1, 2, false, 0)).Err, trivet.ErrPending)
	require.ErrorIs(t, m.Apply(startScrub(1, 3, false, 0)).Err, trivet.ErrPending, "a verify is not given up")
	v = mustApply(t, m, ranged(2, 0, 0, true)).Volume
	assert.Equal(t, day, v.Scrub.LastStarted, "a verify is no scrub")
	mustApply(t, m, startScrub(1, 3, false, 0))
	require.ErrorIs(t, m.Apply(startScrub(1, 4, false, 0)).Err, trivet.ErrPending)
	v = mustApply(t, m, startScrub(1, 4, true, 0)).Volume
	assert.True(t, v.Scrub.Verify, "a scrub gives way")
}

// TestScrubRefuses: what cannot be said of a pass.
func TestScrubRefuses(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]meta.Command{
		"no pass":   startScrub(1, 0, false, 0),
		"a rate":    startScrub(1, 1, false, -1),
		"no volume": startScrub(0, 1, false, 0),
		"backwards": {ReportScrub: &meta.ReportScrub{Volume: 1, Pass: 1, From: 7, Next: 7}},
		"a count":   {ReportScrub: &meta.ReportScrub{Volume: 1, Pass: 1, Next: 7, Left: -1}},
		"a text":    {ReportScrub: &meta.ReportScrub{Volume: 1, Pass: 1, Next: 7, Findings: []string{"\xff"}}},
		"too much":  {ReportScrub: &meta.ReportScrub{Volume: 1, Pass: 1, Next: 7, Findings: make([]string, 33)}},
		"a node":    {ReportScrub: &meta.ReportScrub{Volume: 1, Pass: 1, Next: 7, Absent: []trivet.NodeID{"/"}}},
	} {
		require.ErrorIs(t, c.Validate(), trivet.ErrInvalid, name)
	}
}
