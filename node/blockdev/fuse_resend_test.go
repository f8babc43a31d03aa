package blockdev

import (
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/trivet-csi/trivet/internal/faultdev"
	"github.com/trivet-csi/trivet/node/keeper"
)

// requireResend takes the next message, which has to be the notification.
func (k *fakeKernel) requireResend() {
	k.t.Helper()
	unique, kind, _ := k.receive()
	require.Zero(k.t, unique, "a request was answered before the kernel was asked")
	require.Equal(k.t, unix.Errno(1<<32-notifyResend), kind&(1<<32-1))
}

// TestResendComesBeforeReading: requests that wait for the next server are not read before the kernel was asked for
// those that the last one had read, or it would send them once more while they are carried out.
func TestResendComesBeforeReading(t *testing.T) {
	t.Parallel()
	k := newIdleKernel(t, faultdev.Wrap(faultdev.NewMem(1<<20)), nil)
	k.send(fuseMessage(opGetattr, 1, make([]byte, 16)))
	require.NoError(t, k.server.goOn(t.Context(), keeper.Facts{}))
	k.requireResend()
	unique, errno, _ := k.receive()
	require.EqualValues(t, 1, unique)
	require.Zero(t, errno)

	// The order cannot be seen from outside each time; that nothing is read when it cannot be asked can.
	k = newIdleKernel(t, faultdev.Wrap(faultdev.NewMem(1<<20)), nil)
	deaf, err := unix.Open("/dev/null", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	require.NoError(t, err)
	require.NoError(t, unix.Dup3(deaf, k.server.replyFD, unix.O_CLOEXEC))
	require.NoError(t, unix.Close(deaf))
	require.ErrorIs(t, k.server.goOn(t.Context(), keeper.Facts{}), unix.EBADF)
	require.Nil(t, k.server.cancel, "it reads already")
}
