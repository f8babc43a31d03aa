package node

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller/meta"
)

// A filesystem in use grows with its volume: ext4 and xfs on a device of the kernel, while a program writes and syncs.
func TestEndToEndGrow(t *testing.T) {
	for fsType, tool := range map[string]string{"ext4": "resize2fs", "xfs": "xfs_growfs"} {
		t.Run(fsType, func(t *testing.T) {
			if _, err := exec.LookPath(tool); err != nil {
				t.Skip(err)
			}
			growInUse(t, fsType)
		})
	}
}

func growInUse(t *testing.T, fsType string) {
	t.Helper()
	const began, grown = 320 << 20, 640 << 20 // xfs takes no less than 300 MB
	c := newCluster(t, 1)
	c.create(1, began)
	c.attach(1)
	u := c.consumer(1)
	u.up(fsType)
	before, err := u.n.Stats(t.Context(), vol, u.target)
	require.NoError(t, err)

	stop, writing := make(chan struct{}), new(sync.WaitGroup)
	writing.Go(func() {
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			default:
				mustWriteSynced(t, u.file("f"), append(content(), byte(i)))
			}
		}
	})
	c.cat.must(meta.Command{GrowVolume: &meta.GrowVolume{Volume: vol, SizeBytes: grown}})
	c.await("the group has grown", func() bool { return c.cat.volume(vol).SizeBytes == grown })
	if _, err := u.n.Expand(t.Context(), vol, u.target, grown); errors.Is(err, ErrUnsupported) {
		require.ErrorContains(t, err, "CAP_SYS_RESOURCE")
		close(stop)
		writing.Wait()
		awaitGrown(t, u.n)
		assert.EqualValues(t, grown, sizeOfDevice(t, u.n.Device(vol)), "the device has grown all the same")
		u.down()
		u.up(fsType)
		u.down()
		t.Skip("no CAP_SYS_RESOURCE: ", err)
	}
	for range 2 {
		size, err := u.n.Expand(t.Context(), vol, u.target, grown)
		require.NoError(t, err)
		assert.EqualValues(t, grown, size)
	}
	close(stop)
	writing.Wait()
	awaitGrown(t, u.n)
	assert.EqualValues(t, grown, sizeOfDevice(t, u.n.Device(vol)))
	after, err := u.n.Stats(t.Context(), vol, u.target)
	require.NoError(t, err)
	assert.Greater(t, after.TotalBytes, before.TotalBytes+(grown-began)*8/10)

	big := bytes.Repeat([]byte{7}, began) // more than there was room for
	mustWriteSynced(t, u.file("big"), big)
	u.down()
	u.up(fsType) // which checks the filesystem
	got, err := os.ReadFile(u.file("big"))
	require.NoError(t, err)
	assert.True(t, bytes.Equal(big, got))
	u.down()
	_, err = u.n.Expand(t.Context(), vol, u.target, 0)
	require.ErrorIs(t, err, trivet.ErrNotFound)
	c.detach()
	c.remove()
}

// awaitGrown waits until the node is done with growing devices, or what is asked of it next may be put off.
func awaitGrown(t *testing.T, n *clusterNode) {
	t.Helper()
	require.Eventually(t, func() bool { return len(n.mounts.growing.list()) == 0 }, time.Minute, time.Millisecond)
}

func sizeOfDevice(t *testing.T, path string) int64 {
	t.Helper()
	f, err := os.Open(path)
	require.NoError(t, err)
	n, err := f.Seek(0, 2)
	require.NoError(t, err)
	require.NoError(t, f.Close())
	return n
}
