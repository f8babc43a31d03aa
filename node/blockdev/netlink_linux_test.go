package blockdev

import (
	"encoding/binary"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/trivet-csi/trivet"
)

const (
	waitLong = time.Minute
	waitTick = time.Millisecond
)

func TestAttributes(t *testing.T) {
	t.Parallel()
	b := appendAttr32(nil, 1, 7)
	b = appendAttr(b, 2, []byte("abcde")) // padded
	b = appendAttr(b, 3|unix.NLA_F_NESTED, appendAttr64(nil, 9, 1<<40))
	require.Zero(t, len(b)%4)
	v, ok := findAttr(b, 1)
	require.True(t, ok)
	require.EqualValues(t, 7, binary.NativeEndian.Uint32(v))
	v, ok = findAttr(b, 2)
	require.True(t, ok)
	require.Equal(t, "abcde", string(v))
	nested, ok := findAttr(b, 3)
	require.True(t, ok)
	v, ok = findAttr(nested, 9)
	require.True(t, ok)
	require.EqualValues(t, 1<<40, binary.NativeEndian.Uint64(v))
	_, ok = findAttr(b, 4)
	require.False(t, ok)
	for n := range len(b) { // whatever is cut off, nothing is read beyond
		_, _ = findAttr(b[:n], 4)
	}
	_, ok = findAttr([]byte{3, 0, 4, 0}, 4)
	require.False(t, ok, "shorter than its own head")
}

func TestParseNetlink(t *testing.T) {
	t.Parallel()
	message := func(kind uint16, seq uint32, body ...byte) []byte {
		b := binary.NativeEndian.AppendUint32(nil, uint32(unix.SizeofNlMsghdr+len(body)))
		b = binary.NativeEndian.AppendUint16(b, kind)
		b = binary.NativeEndian.AppendUint16(b, 0)
		b = binary.NativeEndian.AppendUint32(b, seq)
		b = binary.NativeEndian.AppendUint32(b, 0)
		return append(b, body...)
	}
	errno := func(seq uint32, e unix.Errno) []byte {
		return message(unix.NLMSG_ERROR, seq, binary.NativeEndian.AppendUint32(nil, uint32(-int32(e)))...)
	}
	c := &genlConn{family: 30, seq: 5}

	done, answer, err := c.parse(append(message(30, 5, 1, 1, 0, 0, 'o', 'k'), 0, 0)) // padded
	require.NoError(t, err)
	require.False(t, done, "the acknowledgement comes after")
	require.Equal(t, "ok", string(answer))

	done, _, err = c.parse(errno(5, 0))
	require.NoError(t, err)
	require.True(t, done)

	done, _, err = c.parse(errno(5, unix.EBUSY))
	require.ErrorIs(t, err, unix.EBUSY)
	require.True(t, done)

	done, answer, err = c.parse(append(errno(4, unix.EBUSY), message(30, 4, 1, 1, 0, 0, 'x')...))
	require.NoError(t, err, "the answer to an earlier request")
	require.False(t, done)
	require.Nil(t, answer)

	bad := message(30, 5, 1, 1, 0, 0)
	binary.NativeEndian.PutUint32(bad, 1000)
	_, _, err = c.parse(bad)
	require.ErrorIs(t, err, trivet.ErrCorrupt)
}

// TestGenl asks a family that every kernel has, and one that none has.
func TestGenl(t *testing.T) {
	t.Parallel()
	c, err := dialGenl("nlctrl")
	require.NoError(t, err)
	require.EqualValues(t, unix.GENL_ID_CTRL, c.family)
	c.close()
	c.close()
	_, err = dialGenl("trivet-no-such")
	require.ErrorIs(t, err, trivet.ErrUnavailable)
}
