package sanity

import (
	"encoding/binary"
	"os"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// counter is a block volume in use that holds a number in its first block.
type counter struct {
	t      *testing.T
	f      *os.File
	handle string
	undo   func()
}

func (p *plugin) counter(name string, source *csi.VolumeContentSource) *counter {
	p.t.Helper()
	c := &counter{t: p.t, handle: p.create(name, "", volumeBytes, source)}
	var target string
	target, c.undo = p.use(c.handle, "")
	var err error
	c.f, err = os.OpenFile(target, os.O_RDWR|syscall.O_DSYNC, 0)
	require.NoError(p.t, err)
	return c
}

// set returns once the number is acknowledged, on a majority of disks.
func (c *counter) set(n uint64) error {
	block := make([]byte, 4096)
	binary.LittleEndian.PutUint64(block, n)
	_, err := c.f.WriteAt(block, 0)
	return err
}

func (c *counter) get() uint64 {
	c.t.Helper()
	block := make([]byte, 4096)
	_, err := c.f.ReadAt(block, 0)
	require.NoError(c.t, err)
	return binary.LittleEndian.Uint64(block)
}

func (c *counter) close() {
	c.t.Helper()
	assert.NoError(c.t, c.f.Close())
	c.undo()
}

// TestGroupIsAPointInTime: a program counts on two volumes in turn, and waits for each number to be acknowledged before
// it writes the next one. Whatever the moment, the first volume is ahead of the second by one or not at all; so it has
// to be in the restored group.
func TestGroupIsAPointInTime(t *testing.T) {
	if testing.Short() {
		t.Skip("needs a cluster for some seconds; not with -short")
	}
	p := openPlugin(t)
	first, second := p.counter("first", nil), p.counter("second", nil)
	var written atomic.Uint64
	warm, stop, stopped := make(chan struct{}), make(chan struct{}), make(chan error, 1)
	go func() { // ends with stop, or with the first write that fails
		const enough = 20
		for n := uint64(1); ; n++ {
			for _, c := range []*counter{first, second} {
				if err := c.set(n); err != nil {
					stopped <- err
					return
				}
			}
			if written.Store(n); n == enough {
				close(warm)
			}
			select {
			case <-stop:
				stopped <- nil
				return
			default:
			}
		}
	}()
	select {
	case <-warm:
	case err := <-stopped:
		require.NoError(t, err)
	}
	before := written.Load()
	group := csi.NewGroupControllerClient(p.conn)
	made, err := group.CreateVolumeGroupSnapshot(t.Context(), &csi.CreateVolumeGroupSnapshotRequest{
		Name: "group", SourceVolumeIds: []string{first.handle, second.handle},
	})
	after := written.Load()
	close(stop)
	require.NoError(t, <-stopped)
	require.NoError(t, err)
	g := made.GetGroupSnapshot()
	require.True(t, g.GetReadyToUse())
	first.close()
	second.close()

	was := map[string]uint64{}
	var ids []string
	for _, s := range g.GetSnapshots() {
		require.Equal(t, g.GetGroupSnapshotId(), s.GetGroupSnapshotId())
		ids = append(ids, s.GetSnapshotId())
		c := p.counter("of-"+s.GetSnapshotId(), ofSnapshot(s.GetSnapshotId()))
		was[s.GetSourceVolumeId()] = c.get()
		c.close()
	}
	a, b := was[first.handle], was[second.handle]
	require.True(t, a == b || a == b+1, "the first volume shows %d, the second %d", a, b)
	require.GreaterOrEqual(t, b, before, "what was acknowledged before the call is in it")
	require.LessOrEqual(t, a, after+1, "what was begun after the answer is not")

	_, err = p.DeleteSnapshot(t.Context(), &csi.DeleteSnapshotRequest{SnapshotId: ids[0]})
	require.Error(t, err, "it goes with its group alone")
	_, err = group.DeleteVolumeGroupSnapshot(t.Context(), &csi.DeleteVolumeGroupSnapshotRequest{
		GroupSnapshotId: g.GetGroupSnapshotId(), SnapshotIds: ids,
	})
	require.NoError(t, err)
	list, err := p.ListSnapshots(t.Context(), &csi.ListSnapshotsRequest{})
	require.NoError(t, err)
	require.Empty(t, list.GetEntries())
}
