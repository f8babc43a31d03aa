package blockdev

import (
	"encoding/binary"
	"errors"
	"testing"
	"unsafe"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/trivet-csi/trivet"
)

// TestUring passes numbers through an eventfd, more than the queues have entries, so that all indexes wrap.
func TestUring(t *testing.T) {
	for _, flags := range []uint32{0, uringSQE128} {
		r, err := openUring(4, flags)
		if errors.Is(err, trivet.ErrUnavailable) {
			t.Skip(err)
		}
		require.NoError(t, err)
		event, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
		require.NoError(t, err)
		var got [1]uint64
		for i := range uint64(50) {
			putRead(r.push(), event, unsafe.Pointer(&got), 8, 1000+i)
			require.NoError(t, r.enter(0))
			_, _, ok := r.pop()
			require.False(t, ok, "nothing to read yet")
			_, err := unix.Write(event, binary.NativeEndian.AppendUint64(nil, i+1))
			require.NoError(t, err)
			for !ok {
				require.NoError(t, r.enter(1))
				var data uint64
				var result int32
				if data, result, ok = r.pop(); ok {
					require.Equal(t, 1000+i, data)
					require.EqualValues(t, 8, result)
				}
			}
			require.Equal(t, i+1, got[0])
		}
		for range 4 {
			require.NotNil(t, r.push())
		}
		require.Nil(t, r.push(), "full")
		require.NoError(t, unix.Close(event))
		require.NoError(t, r.close())
	}
}

func TestUringRefusesABadCommand(t *testing.T) {
	r, err := openUring(4, uringSQE128)
	if errors.Is(err, trivet.ErrUnavailable) {
		t.Skip(err)
	}
	require.NoError(t, err)
	defer func() { require.NoError(t, r.close()) }()
	putCmd(r.push(), -1, ublkGetFeatures, 7)
	require.NoError(t, r.enter(1))
	data, result, ok := r.pop()
	require.True(t, ok)
	require.EqualValues(t, 7, data)
	require.Equal(t, -int32(unix.EBADF), result)
}

// TestUblkLayout holds the sizes of the kernel's structs, by which it encodes its commands.
func TestUblkLayout(t *testing.T) {
	t.Parallel()
	require.EqualValues(t, 32, unsafe.Sizeof(ublkCtrlCmd{}))
	require.EqualValues(t, 16, unsafe.Offsetof(ublkCtrlCmd{}.data))
	require.EqualValues(t, 64, unsafe.Sizeof(ublkInfo{}))
	require.EqualValues(t, 24, unsafe.Offsetof(ublkInfo{}.flags))
	require.EqualValues(t, 16, unsafe.Sizeof(ublkIOCmd{}))
	require.EqualValues(t, 24, unsafe.Offsetof(ublkParams{}.sectors))
	require.EqualValues(t, 40, unsafe.Offsetof(ublkParams{}.discardAlignment))
	require.EqualValues(t, 120, unsafe.Sizeof(uringParams{}))
	for op, want := range map[uint32]uint32{
		ublkAddDev: 0xc0207504, ublkGetFeatures: 0x80207513, ublkGetDevInfo: 0x80207502, ublkStartDev: 0xc0207506,
		ublkFetch: 0xc0107520, ublkCommit: 0xc0107521, ublkUpdateSize: 0xc0207515, ublkDelDevAsync: 0x80207514,
	} {
		require.Equal(t, want, op)
	}
}

// TestOwnThread checks that the thread of a queue ends with it, which is how the driver sees its death.
func TestOwnThread(t *testing.T) {
	for range 20 { // some of these goroutines may start on the main thread
		tid := make(chan int)
		go onOwnThread(func() { tid <- unix.Gettid() })
		id := <-tid
		require.NotEqual(t, unix.Getpid(), id)
		require.Eventually(t, func() bool { return unix.Tgkill(unix.Getpid(), id, 0) != nil }, waitLong, waitTick)
	}
}
