package node

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet/node/blockdev"
)

func TestMaxVolumesFollowsTheMachine(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "ublks_max")
	require.EqualValues(t, ublkDefault, ublkLimit(path), "not loaded")
	for text, want := range map[string]int64{"128\n": 128, "0\n": ublkDefault, "many": ublkDefault} {
		require.NoError(t, os.WriteFile(path, []byte(text), 0o600))
		require.Equal(t, want, ublkLimit(path), text)
	}
	c := Config{Attach: blockdev.KindUblk}
	require.Positive(t, c.maxVolumes())
	c.MaxVolumes = 7
	require.EqualValues(t, 7, c.maxVolumes(), "an operator knows better")
	c = Config{Attach: blockdev.KindFUSE}
	require.Zero(t, c.maxVolumes())
}
