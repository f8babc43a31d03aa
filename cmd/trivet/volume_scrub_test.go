package main

import (
	"bytes"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet/api"
)

func TestShowScrub(t *testing.T) {
	t.Parallel()
	var out bytes.Buffer
	o := &options{output: outputTable}
	require.NoError(t, o.showScrub(&out, &api.ScrubStatus{Name: "db"}))
	assert.Contains(t, out.String(), "never")
	out.Reset()
	st := &api.ScrubStatus{
		Name: "db", Pass: 3, Verify: true, Running: true, Started: "2026-11-26T01:00:00Z", CheckedBytes: 3 << 30, Found: 2,
		Repaired: 1, Left: 1, Findings: []string{"block 5 is damaged on n2"}, Absent: []string{"n3"},
	}
	require.NoError(t, o.showScrub(&out, st))
	for _, word := range []string{"verify", "running since 2026-11-26T01:00:00Z", "found: block 5", "absent: n3"} {
		assert.Contains(t, out.String(), word)
	}
	out.Reset()
	st.Running, st.Ended = false, "2026-11-26T02:00:00Z"
	o.output = outputJSON
	require.NoError(t, o.showScrub(&out, st))
	assert.Contains(t, out.String(), `"left": 1`)
	assert.Contains(t, out.String(), `"running": false`)
}

// The exit status of a verify: what differs, and what nobody has compared, is a failure.
func TestVerdict(t *testing.T) {
	t.Parallel()
	require.NoError(t, verdict(&api.ScrubStatus{Name: "db"}))
	require.ErrorContains(t, verdict(&api.ScrubStatus{Name: "db", Found: 2}), "2 blocks")
	require.ErrorContains(t, verdict(&api.ScrubStatus{Name: "db", Absent: []string{"n3"}}), "n3 did not take part")
}
