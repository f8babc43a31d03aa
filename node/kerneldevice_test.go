package node

import (
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet/controller/meta"
	"github.com/trivet-csi/trivet/internal/stage"
)

// TestStagesKnowTheDevice: whoever looks at a volume sees its kernel device and what was sent to it again, also after a
// resume, and only as long as it is there.
func TestStagesKnowTheDevice(t *testing.T) {
	t.Parallel()
	b := newMountBench(t)
	b.survive = true
	stages := stage.NewRegistry()
	b.mounts.attacher.shared.stages = stages
	seen := func() *stage.DeviceSummary { return stages.Volumes()[0].Device() }
	b.grant("n1", meta.SingleNodeMultiWriter, false)
	path, err := b.mounts.attach(t.Context(), vol)
	require.NoError(t, err)
	require.Equal(t, &stage.DeviceSummary{Path: path, Tells: true, Repeated: 5, Refused: 2}, seen())
	require.NoError(t, b.mounts.attacher.release(t.Context(), vol))
	require.Nil(t, seen())

	a, at := b.mounts.attacher, b.mounts.attacher.get(vol)
	a.resume = a.show
	require.NoError(t, a.resumeKernel(t.Context(), vol, at, ""))
	require.NotNil(t, seen())
	require.NoError(t, b.mounts.detach(t.Context(), vol))
	require.Nil(t, seen())
}
