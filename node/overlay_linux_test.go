package node

import (
	"context"
	"crypto/sha256"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller/meta"
)

// contents reads the volume below whatever is above it on node i.
func (c *cluster) contents(i int) []byte {
	c.t.Helper()
	d := c.nodes[i].mounts.attacher.get(vol).path
	b := make([]byte, d.Size())
	for off := 0; off < len(b); off += 1 << 20 {
		require.NoError(c.t, d.ReadAt(c.t.Context(), b[off:off+1<<20], int64(off)))
	}
	return b
}

// turnBack makes the volume hold what it held at some time before. REQUIRES: attached to node i, and not used.
func (c *cluster) turnBack(i int, b []byte) {
	c.t.Helper()
	m := c.nodes[i].mounts
	unlock, err := m.ops.try(vol)
	require.NoError(c.t, err)
	at, err := m.openHeld(c.t.Context(), vol)
	unlock()
	require.NoError(c.t, err)
	for off := 0; off < len(b); off += 1 << 20 {
		require.NoError(c.t, at.path.WriteAt(c.t.Context(), b[off:off+1<<20], int64(off)))
	}
	require.NoError(c.t, at.path.Flush(c.t.Context()))
}

// upToRead is up for a pod that reads.
func (u *consumer) upToRead(fsType string) error {
	u.c.t.Helper()
	ctx, cancel := context.WithTimeout(u.c.t.Context(), 2*time.Minute)
	defer cancel()
	for range 2 {
		r := StageRequest{Volume: vol, StagingPath: u.staging, FSType: fsType, ReadOnly: true}
		if fsType == "xfs" { // the nodes of this test have one kernel, which mounts no UUID twice
			r.MountFlags = []string{optionNoUUID}
		}
		if err := u.n.Stage(ctx, r); err != nil {
			return err
		}
	}
	return u.n.Publish(ctx, PublishRequest{
		Volume: vol, StagingPath: u.staging, TargetPath: u.target, FSType: fsType, ReadOnly: true, Mode: meta.MultiNodeReader,
	})
}

// TestReadersReplayTheJournal: two nodes read a volume whose filesystem was in use when its snapshot was taken. Both
// show all that was synced by then, though each without writing to the volume; a node without room for the journal
// says so.
func TestReadersReplayTheJournal(t *testing.T) {
	for _, fs := range []struct {
		name      string
		sizeBytes int64
	}{{"ext4", 96 << 20}, {"xfs", 320 << 20}} {
		t.Run(fs.name, func(t *testing.T) {
			if _, err := exec.LookPath("mkfs." + fs.name); err != nil {
				t.Skip("needs mkfs." + fs.name)
			}
			c := newCluster(t, 2)
			c.create(1, fs.sizeBytes)
			c.attach(1)
			u := c.consumer(1)
			u.up(fs.name)
			mustWriteSynced(t, u.file("f"), content())
			snapshot := c.contents(1)
			u.down()
			c.detach()
			c.attach(1)
			c.turnBack(1, snapshot)
			c.detach()

			var readers []*consumer
			for i := 1; i <= 2; i++ {
				c.cat.must(meta.Command{Attach: &meta.Attach{Volume: vol, Node: testNodeID(i), Mode: meta.MultiNodeReader}})
				readers = append(readers, c.consumer(i))
			}
			o := readers[1].n.mounts.attacher.overlays
			readers[1].n.mounts.attacher.overlays = newOverlays(&Config{RunDir: c.path(2, "run"), ReplayBytes: 64 << 10})
			err := readers[1].upToRead(fs.name)
			require.ErrorIs(t, err, trivet.ErrNoSpace)
			require.ErrorContains(t, err, "attach it once for writing")
			readers[1].n.mounts.attacher.overlays = o
			for i, u := range readers {
				require.NoError(t, u.upToRead(fs.name))
				got, err := os.ReadFile(u.file("f"))
				require.NoError(t, err)
				assert.Equal(t, content(), got)
				require.ErrorIs(t, os.WriteFile(u.file("g"), nil, 0o600), unix.EROFS)
				bytes, has := u.n.OverlayBytes(vol)
				t.Logf("node %d: %d KiB of overlay", i+1, bytes>>10)
				require.True(t, has)
				require.Positive(t, bytes, "nothing was replayed: this shows nothing")
				require.Equal(t, sha256.Sum256(snapshot), sha256.Sum256(c.contents(i+1)), "the volume has changed")
			}
			for i, u := range readers {
				require.NoError(t, u.n.Unpublish(t.Context(), vol, u.target))
				require.NoError(t, u.n.Unstage(t.Context(), vol, u.staging))
				left, err := os.ReadDir(filepath.Join(c.path(i+1, "run"), "overlays"))
				require.NoError(t, err)
				require.Empty(t, left)
				require.Zero(t, u.n.mounts.attacher.overlays.memory.UsedBytes())
			}
			c.requireNothingMounted()
			require.Equal(t, sha256.Sum256(snapshot), sha256.Sum256(c.contents(1)))
			c.detach()
			c.remove()
		})
	}
}
