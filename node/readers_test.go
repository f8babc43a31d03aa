package node

import (
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller/meta"
)

// TestReaderAmongOthers: a node that reads beside others has a device that refuses writes, does not draw the
// leadership to itself, and is done with the volume when it leaves, though the epoch goes on.
func TestReaderAmongOthers(t *testing.T) {
	t.Parallel()
	b := newMountBench(t)
	b.mounts.attacher.follow = true
	b.grant("n2", meta.MultiNodeReader, false)
	b.grant("n1", meta.MultiNodeReader, false)
	_, err := b.mounts.attach(t.Context(), vol)
	require.NoError(t, err)
	device, _, readOnly, err := b.mounts.openNBD(t.Context(), vol)
	require.NoError(t, err)
	assert.True(t, readOnly)
	require.ErrorIs(t, device.WriteAt(t.Context(), make([]byte, trivet.BlockSize), 0), trivet.ErrInvalid)
	assert.Empty(t, b.cat.volume(vol).WantLeader)
	b.mounts.attacher.useNBD(vol, -1)

	n, _ := b.cat.Local().Node("n1") // a new process takes over, and disturbs nobody
	n.Incarnation = testUUID(0x302)
	b.cat.must(meta.Command{RegisterNode: &meta.RegisterNode{Node: n}})
	b.process(t, testUUID(0x302))
	b.mounts.attacher.follow = true
	_, err = b.mounts.attach(t.Context(), vol)
	require.NoError(t, err)
	assert.Equal(t, trivet.Epoch(1), b.cat.volume(vol).Epoch)
	assert.Equal(t, []trivet.NodeID{"n2", "n1"}, ptr(b.cat.volume(vol)).Holders())

	b.mounts.sweep()
	assert.False(t, b.group().isClosed())
	require.NoError(t, b.mounts.detach(t.Context(), vol))
	b.mounts.sweep()
	assert.False(t, b.group().isClosed(), "it is still attached here")
	b.cat.must(meta.Command{Detach: &meta.Detach{Volume: vol, Node: "n1"}})
	b.mounts.sweep()
	assert.True(t, b.group().isClosed())
	_, err = b.mounts.attach(t.Context(), vol)
	require.ErrorIs(t, err, trivet.ErrInUse)
	require.ErrorContains(t, err, "n2")
}

func ptr[T any](v T) *T { return &v }

// TestAuthorizerKnowsReaders: each of them may use their epoch, and nobody else.
func TestAuthorizerKnowsReaders(t *testing.T) {
	t.Parallel()
	b := newMountBench(t)
	b.grant("n2", meta.MultiNodeReader, false)
	b.grant("n1", meta.MultiNodeReader, false)
	may := Authorizer(b.cat)
	require.NoError(t, may("n1", vol, 1))
	require.NoError(t, may("n2", vol, 1))
	require.ErrorIs(t, may("n3", vol, 1), trivet.ErrFenced)
	b.cat.must(meta.Command{Detach: &meta.Detach{Volume: vol, Node: "n2"}})
	require.NoError(t, may("n1", vol, 1))
	require.ErrorIs(t, may("n2", vol, 1), trivet.ErrFenced)
}
