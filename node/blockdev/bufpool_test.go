package blockdev

import (
	"context"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/trivet-csi/trivet/internal/faultdev"
)

// TestStuckVolumesDoNotTakeAllBuffers: a Device that answers nothing holds the whole reserve, and another
// attachment still reads and writes, in long requests too.
func TestStuckVolumesDoNotTakeAllBuffers(t *testing.T) {
	t.Parallel()
	buffers := new(Buffers)
	stuckDev := faultdev.Wrap(faultdev.NewMem(256 << 20))
	stuck := newFakeKernelWith(t, stuckDev, buffers)
	good := newFakeKernelWith(t, faultdev.Wrap(faultdev.NewMem(64<<20)), buffers)
	gate := stuckDev.Hold(faultdev.OfKind(faultdev.Write))
	const long = 512 << 10 // half of the longest: a socket takes no more in one piece
	require.NoError(t, unix.SetsockoptInt(stuck.fd, unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, 4<<20))
	require.NoError(t, unix.SetsockoptInt(good.fd, unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, 4<<20))
	data := make([]byte, long)
	for i := range fuseLargeN + ownLargeN - 1 { // the last own one is the reader's
		stuck.send(fuseMessage(opWrite, uint64(i+1), ioArgs(uint64(i)*long, long, data...)...))
		<-gate.Arrived()
	}
	require.Empty(t, buffers.pool.large, "the reserve is used up")
	for i := range 8 {
		errno, _ := good.call(opWrite, ioArgs(uint64(i)*long, long, data...)...)
		require.Zero(t, errno)
		errno, body := good.call(opRead, ioArgs(uint64(i)*long, 64<<10)...)
		require.Zero(t, errno)
		require.Len(t, body, 64<<10)
	}
	gate.Open()
}

// TestBuffersOfManyAttachments: what an attachment adds to the node's memory is small.
func TestBuffersOfManyAttachments(t *testing.T) {
	t.Parallel()
	buffers := new(Buffers)
	for range 20 {
		p, err := buffers.newPool()
		require.NoError(t, err)
		require.Less(t, len(p.arena), 23<<20/10, "locked bytes of an idle attachment")
		b, err := p.get(context.Background(), 1)
		require.NoError(t, err)
		require.ErrorContains(t, p.close(), "in use")
		p.put(b)
		require.NoError(t, p.close())
	}
	require.Less(t, len(buffers.pool.arena), 15<<20)
}
