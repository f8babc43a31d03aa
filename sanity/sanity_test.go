package sanity

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/kubernetes-csi/csi-test/v5/pkg/sanity"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// TestCheckPath: a target on which nothing is mounted is a failure, not a directory.
func TestCheckPath(t *testing.T) {
	t.Parallel()
	kind, err := checkPath(filepath.Join(t.TempDir(), "absent"))
	require.NoError(t, err)
	assert.Equal(t, sanity.PathIsNotFound, kind)

	_, err = checkPath(t.TempDir())
	require.ErrorContains(t, err, "nothing is mounted")

	kind, err = checkPath("/proc")
	require.NoError(t, err)
	assert.Equal(t, sanity.PathIsDir, kind)
}

func TestMountsUnder(t *testing.T) {
	t.Parallel()
	mounts, err := mountsUnder("/proc")
	require.NoError(t, err)
	assert.Contains(t, mounts, "/proc")
	mounts, err = mountsUnder("/pro")
	require.NoError(t, err)
	assert.Empty(t, mounts, "a name that begins alike is another directory")
	dir := t.TempDir()
	require.NoError(t, os.Mkdir(filepath.Join(dir, "a"), 0o700))
	mounts, err = mountsUnder(dir)
	require.NoError(t, err)
	assert.Empty(t, mounts)
}

func TestReasonsToSkip(t *testing.T) {
	t.Parallel()
	for reason, want := range map[string]bool{
		"CreateSnapshot not supported":                              false,
		"ListSnapshots not supported":                               false,
		"GroupControllerService not supported":                      false,
		"Volume Cloning not supported":                              false,
		"NodeExpandVolume not supported":                            false,
		"SNAPSHOT_ACCESSIBILITY_CONSTRAINTS not supported":          false,
		"Modify volume not supported":                               false,
		"NodeGetStorageHealth not supported":                        false,
		"No MaxVolumesPerNode":                                      true,
		"testnodevolumeattachlimit not enabled":                     true,
		"ListVolumes not supported":                                 false,
		"GetCapacity not supported":                                 false,
		"ControllerPublishVolume not supported":                     false,
		"NodeStageVolume not supported":                             false,
		"ControllerPublishVolume.readonly field not supported":      false,
		"Service does not have single node multi writer capability": false,
		"Controller Publish, UnpublishVolume not supported":         false,
		"prefix ListSnapshots not supported":                        false,
	} {
		assert.Equal(t, want, later.MatchString(reason), reason)
	}
}
