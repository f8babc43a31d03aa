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

// TestResentRequests: with another writer beside, what reads or flushes is repeated, what changes the device is not.
func TestResentRequests(t *testing.T) {
	t.Parallel()
	fallocate := []any{uint64(0), uint64(4096), uint64(4096), uint32(fallocZero), uint32(0)}
	block := make([]byte, 4096)
	for shared, want := range map[bool]struct {
		changed unix.Errno // answer to what changes the device
		resent  Resent
		ops     int
	}{
		false: {0, Resent{Repeated: 4}, 4},
		true:  {unix.EIO, Resent{Repeated: 2, Refused: 2}, 2},
	} {
		k := newIdleKernel(t, faultdev.Wrap(faultdev.NewMem(1<<20)), nil)
		k.server.shared = shared
		require.NoError(t, k.server.goOn(t.Context(), keeper.Facts{}))
		k.requireResend()
		for i, req := range []struct {
			op   uint32
			args []any
			want unix.Errno
		}{
			{opWrite, ioArgs(0, 4096, block...), want.changed},
			{opFallocate, fallocate, want.changed},
			{opRead, ioArgs(0, 4096), 0},
			{opFsync, []any{make([]byte, 16)}, 0},
		} {
			k.send(fuseMessage(req.op, fuseResent|uint64(i+1), req.args...))
			unique, errno, _ := k.receive()
			require.Equal(t, fuseResent|uint64(i+1), unique)
			require.Equal(t, req.want, errno, "shared %t, opcode %d", shared, req.op)
		}
		d := &fuseDev{server: k.server}
		require.Equal(t, want.resent, d.resent())
		require.Len(t, k.dev.Ops(), want.ops)
		errno, _ := k.call(opWrite, ioArgs(0, 4096, block...)...)
		require.Zero(t, errno, "a new one")
		require.Equal(t, want.resent, d.resent())
	}
}

func TestPreferenceOfSharedDevices(t *testing.T) {
	t.Parallel()
	kept := new(keeper.Client)
	require.Equal(t, KindNBD, preferenceFor(&Config{})[0])
	require.Equal(t, KindNBD, preferenceFor(&Config{Keeper: kept})[0])
	require.Equal(t, KindNBD, preferenceFor(&Config{Shared: true})[0], "without a keeper none outlives the process")
	require.Equal(t, KindFUSE, preferenceFor(&Config{Shared: true, Keeper: kept})[0])
	for _, kind := range preferenceShared {
		_, ok := transportOf(kind).(fuseTransport)
		require.Equal(t, ok, tells(kind))
	}
}
