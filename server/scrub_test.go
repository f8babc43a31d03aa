package server_test

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/api"
	"github.com/trivet-csi/trivet/internal/testutil"
	"github.com/trivet-csi/trivet/server"
)

// flipOne changes a bit of the block of b on the disk of a server, in the one place where it is.
func flipOne(t *testing.T, dir string, b byte) {
	t.Helper()
	names, err := filepath.Glob(filepath.Join(dir, "log", "*"))
	require.NoError(t, err)
	hits := 0
	for _, name := range names {
		data, err := os.ReadFile(name)
		require.NoError(t, err)
		for off := 0; off+trivet.BlockSize <= len(data); off += trivet.BlockSize {
			if bytes.Equal(data[off:off+trivet.BlockSize], pattern(b)) {
				f, err := os.OpenFile(name, os.O_WRONLY, 0)
				require.NoError(t, err)
				_, err = f.WriteAt([]byte{b ^ 1}, int64(off+99))
				require.NoError(t, err)
				require.NoError(t, f.Close())
				hits++
			}
		}
	}
	require.Equal(t, 1, hits, "block of %d in %s", b, dir)
}

// TestScrubAndVerify: a bit that has flipped on one disk of three is found by a verify, repaired by a scrub, and
// gone; the volume may be parked, and rests again afterwards.
func TestScrubAndVerify(t *testing.T) {
	t.Parallel()
	c := testutil.StartCluster(t, 3, func(_ int, cfg *server.Config) { cfg.ParkAfter = 2 * time.Second })
	create(t, c, "v")
	client, stop := serveNBD(t, c, 0, "v")
	for b := byte(1); b <= 8; b++ {
		mustWrite(t, client, int64(b), b)
	}
	require.NoError(t, client.flush())
	await := func(pass uint64) *api.ScrubStatus {
		var st *api.ScrubStatus
		require.Eventually(t, func() bool {
			var err error
			st, err = c.Admin(1).GetScrub(t.Context(), &api.VolumeRequest{Name: "v"})
			return err == nil && st.GetPass() == pass && !st.GetRunning()
		}, time.Minute, 20*time.Millisecond)
		return st
	}
	run := func(verify bool) *api.ScrubStatus {
		repaired := int64(0)
		for try := 0; ; try++ {
			st, err := c.Admin(1).ScrubVolume(t.Context(), &api.ScrubVolumeRequest{Name: "v", Verify: verify})
			require.NoError(t, err)
			done := await(st.GetPass())
			repaired += done.GetRepaired()
			done.Repaired = repaired
			if len(done.GetAbsent()) == 0 {
				return done
			}
			require.Less(t, try, 5, "%v", done) // a node that stands still for long takes no part
		}
	}
	clean := run(true)
	require.Zero(t, clean.GetFound(), "%v", clean)
	require.EqualValues(t, 3*8*trivet.BlockSize, clean.GetCheckedBytes())

	// The block is part of an entry of the log: who reads that has it repaired, and a replica that wakes does. So it stays
	// awake, in use.
	flipOne(t, filepath.Join(c.Config(2).DataDir, "disk"), 5)
	found := run(true)
	require.EqualValues(t, 1, found.GetFound())
	require.EqualValues(t, 1, found.GetLeft())
	require.Equal(t, []string{"block 5 is damaged on node-2"}, found.GetFindings())
	repaired := run(false)
	require.EqualValues(t, 1, repaired.GetRepaired())
	require.Zero(t, repaired.GetLeft())
	require.NotEmpty(t, repaired.GetLastScrub())
	stop()
	awaitParked(t, c, "v")
	require.Zero(t, run(true).GetFound(), "it wakes for that")
	awaitParked(t, c, "v")

	_, err := c.Admin(0).ScrubVolume(t.Context(), &api.ScrubVolumeRequest{Name: "v", RateBytes: -1})
	require.Error(t, err)
	_, err = c.Admin(0).ScrubVolume(t.Context(), &api.ScrubVolumeRequest{Name: "nobody"})
	require.Error(t, err)
	client, stop = serveNBD(t, c, 2, "v")
	for b := byte(1); b <= 8; b++ {
		requireBlock(t, client, int64(b), b)
	}
	stop()
}
