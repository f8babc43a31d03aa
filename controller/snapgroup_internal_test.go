package controller

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller/meta"
)

// A node freezes a group, and says what became of it, in its own name; whoever is registered may ask for one.
func TestAuthorizeGroups(t *testing.T) {
	t.Parallel()
	s := testState(t, time.Now())
	for name, c := range map[string]meta.Command{
		"begin": {BeginSnapshotGroup: &meta.BeginSnapshotGroup{Group: 1, Node: "n4", Incarnation: testUUID(3, 4)}},
		"report": {ReportSnapshotGroup: &meta.ReportSnapshotGroup{
			Group: 1, Node: "n4", Incarnation: testUUID(3, 4), State: meta.GroupFailed, Reason: "x",
		}},
	} {
		require.NoError(t, c.Validate(), name)
		require.NoError(t, authorize(s, "n4", c), name)
		for _, from := range []trivet.NodeID{"n1", "n9"} {
			require.ErrorIs(t, authorize(s, from, c), trivet.ErrInvalid, name)
		}
	}
	c := meta.Command{DeleteSnapshotGroup: &meta.DeleteSnapshotGroup{Group: 1}}
	require.NoError(t, authorize(s, "n1", c))
	require.ErrorIs(t, authorize(s, "n9", c), trivet.ErrInvalid)
}
