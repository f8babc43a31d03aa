package node

import (
	"errors"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet/controller/meta"
)

// copyBench is a mountBench whose volume began as a copy of another.
func copyBench(t *testing.T) *mountBench {
	t.Helper()
	b := newMountBench(t)
	b.cat.edit(vol, func(v *meta.Volume) {
		v.Source = &meta.Source{Snapshot: 7, Volume: 8, Generation: 1, Flattened: true}
	})
	b.grant("n1", meta.SingleNodeMultiWriter, false)
	return b
}

// A copy may be larger than its source, and nobody asks for its filesystem to be grown; and xfs does not mount two
// filesystems of the same UUID unless it is told to.
func TestStageOfACopy(t *testing.T) {
	t.Parallel()
	for name, tc := range map[string]struct {
		request func(*StageRequest)
		options []string
		grown   bool
	}{
		"ext4": {func(*StageRequest) {}, []string{"ext4", "noatime"}, true},
		"xfs":  {func(r *StageRequest) { r.FSType = "xfs" }, []string{"xfs", "noatime", "nouuid"}, true},
		"xfs, asked for": {func(r *StageRequest) {
			r.FSType, r.MountFlags = "xfs", []string{"nouuid"}
		}, []string{"xfs", "nouuid"}, true},
		"read-only": {func(r *StageRequest) {
			r.FSType, r.ReadOnly = "xfs", true
		}, []string{"xfs", "noatime", "nouuid", "ro"}, false},
		"read-only by flag": {func(r *StageRequest) { r.MountFlags = []string{"ro"} }, []string{"ext4", "ro"}, false},
		"block":             {func(r *StageRequest) { r.Block = true }, nil, false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := copyBench(t)
			r := stageReq()
			tc.request(&r)
			require.NoError(t, b.mounts.stage(t.Context(), r))
			assert.Equal(t, tc.options, b.mounter.options[stagingDir])
			assert.Equal(t, tc.grown, len(b.mounter.fsGrown) > 0)
		})
	}
	b := newMountBench(t)
	b.grant("n1", meta.SingleNodeMultiWriter, false)
	r := stageReq()
	r.FSType = "xfs"
	require.NoError(t, b.mounts.stage(t.Context(), r))
	assert.Equal(t, []string{"xfs", "noatime"}, b.mounter.options[stagingDir], "what is no copy is mounted once only")
	assert.Empty(t, b.mounter.fsGrown)
}

// What was not grown is not staged, and nothing of it stays mounted; what died between the mount and the growth is
// grown by the next call.
func TestStageOfACopyThatDoesNotGrow(t *testing.T) {
	t.Parallel()
	b := copyBench(t)
	fail := errors.New("no tool")
	b.mounter.growFailing = fail
	require.ErrorIs(t, b.mounts.stage(t.Context(), stageReq()), fail)
	_, mounted, err := b.mounter.Mounted(stagingDir)
	require.NoError(t, err)
	assert.False(t, mounted)
	err = b.mounts.publish(t.Context(), publishReq(targetA))
	require.ErrorIs(t, err, ErrNotStaged)

	b.mounter.growFailing = nil
	require.NoError(t, b.mounts.stage(t.Context(), stageReq()))
	require.NoError(t, b.mounts.publish(t.Context(), publishReq(targetA)))
	b.mounter.growFailing = fail
	require.ErrorIs(t, b.mounts.stage(t.Context(), stageReq()), fail)
	_, mounted, err = b.mounter.Mounted(stagingDir)
	require.NoError(t, err)
	assert.True(t, mounted, "it was mounted before, and is in use")
	b.mounter.growFailing = nil
	n := len(b.mounter.fsGrown)
	require.NoError(t, b.mounts.stage(t.Context(), stageReq()))
	assert.Len(t, b.mounter.fsGrown, n+1)
}
