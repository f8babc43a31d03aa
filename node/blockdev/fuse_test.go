package blockdev

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/internal/faultdev"
)

func TestToErrno(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		err  error
		want unix.Errno
	}{
		{nil, 0},
		{trivet.ErrInvalid, unix.EINVAL},
		{trivet.ErrOutOfRange, unix.EINVAL},
		{trivet.ErrNotFound, unix.ENODEV},
		{trivet.ErrExists, unix.EIO},
		{trivet.ErrInUse, unix.EIO},
		{trivet.ErrFenced, unix.EIO},
		{trivet.ErrPending, unix.EIO},
		{trivet.ErrNoSpace, unix.ENOSPC},
		{trivet.ErrNotLeader, unix.EIO},
		{trivet.ErrUnavailable, unix.EIO},
		{trivet.ErrCorrupt, unix.EIO},
		{trivet.ErrClosed, unix.EIO},
		{context.Canceled, unix.EIO},
		{context.DeadlineExceeded, unix.EIO},
		{errors.New("anything else"), unix.EIO},
		{fmt.Errorf("write block 7 of v1: %w", trivet.ErrNoSpace), unix.ENOSPC},
		{errors.Join(trivet.ErrNoSpace, trivet.ErrFenced), unix.EIO},
	} {
		require.Equal(t, c.want, toErrno(c.err), "%v", c.err)
	}
}

// fuseMessage builds a request as the kernel does.
func fuseMessage(op uint32, unique uint64, args ...any) []byte {
	b := append([]byte(nil), make([]byte, fuseHeadBytes)...)
	for _, a := range args {
		switch a := a.(type) {
		case uint32:
			b = binary.NativeEndian.AppendUint32(b, a)
		case uint64:
			b = binary.NativeEndian.AppendUint64(b, a)
		case []byte:
			b = append(b, a...)
		}
	}
	binary.NativeEndian.PutUint32(b, uint32(len(b)))
	binary.NativeEndian.PutUint32(b[4:], op)
	binary.NativeEndian.PutUint64(b[8:], unique)
	return b
}

func ioArgs(off uint64, n uint32, data ...byte) []any {
	return []any{uint64(0), off, n, uint32(0), uint64(0), uint32(0), uint32(0), data}
}

func TestDecodeFuse(t *testing.T) {
	t.Parallel()
	r, err := decodeFuse(fuseMessage(opWrite, 1<<63|5, ioArgs(8192, 3, 'a', 'b', 'c')...))
	require.NoError(t, err)
	require.Equal(t, fuseRequest{op: opWrite, unique: 1<<63 | 5, offBytes: 8192, lenBytes: 3, data: []byte("abc")}, r)

	long := fuseMessage(opRead, 7, ioArgs(0, 1)...)
	long = append(long, 0)
	for name, c := range map[string]struct {
		b    []byte
		want error
	}{
		"empty":                     {nil, trivet.ErrCorrupt},
		"half a header":             {make([]byte, 39), trivet.ErrCorrupt},
		"length does not match":     {long, trivet.ErrCorrupt},
		"arguments missing":         {fuseMessage(opRead, 7, uint64(0)), trivet.ErrInvalid},
		"read too long":             {fuseMessage(opRead, 7, ioArgs(0, requestBytesMax+1)...), trivet.ErrInvalid},
		"offset beyond int64":       {fuseMessage(opRead, 7, ioArgs(1<<63, 1)...), trivet.ErrInvalid},
		"end beyond int64":          {fuseMessage(opRead, 7, ioArgs(1<<63-1, 1)...), trivet.ErrInvalid},
		"write says less than sent": {fuseMessage(opWrite, 7, ioArgs(0, 1, 1, 2)...), trivet.ErrInvalid},
		"write says more than sent": {fuseMessage(opWrite, 7, ioArgs(0, 3, 1, 2)...), trivet.ErrInvalid},
		"fallocate overflows": {
			fuseMessage(opFallocate, 7, uint64(0), uint64(1)<<62, uint64(1)<<63, uint32(3), uint32(0)), trivet.ErrInvalid,
		},
	} {
		r, err := decodeFuse(c.b)
		require.ErrorIs(t, err, c.want, name)
		if errors.Is(c.want, trivet.ErrInvalid) {
			require.EqualValues(t, 7, r.unique, "%s: can be answered", name)
		}
	}
}

// FuzzDecodeFuse: whatever the bytes, no panic, and what is accepted is within bounds.
func FuzzDecodeFuse(f *testing.F) {
	f.Add(fuseMessage(opWrite, 1, ioArgs(4096, 3, 1, 2, 3)...))
	f.Add(fuseMessage(opRead, 2, ioArgs(1<<62, requestBytesMax)...))
	f.Add(fuseMessage(opFallocate, 3, uint64(0), uint64(1)<<62, uint64(1)<<62, uint32(3), uint32(0)))
	f.Add(fuseMessage(opInit, 4, uint32(7), uint32(45), uint32(1<<17), uint32(0xffffffff), uint32(0xff)))
	f.Add(fuseMessage(opSetattr, 5, make([]byte, 88)))
	f.Add([]byte{40})
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := decodeFuse(b)
		if err != nil {
			require.True(t, errors.Is(err, trivet.ErrInvalid) || errors.Is(err, trivet.ErrCorrupt))
			return
		}
		require.GreaterOrEqual(t, r.offBytes, int64(0))
		require.GreaterOrEqual(t, r.lenBytes, int64(0))
		require.GreaterOrEqual(t, r.offBytes+r.lenBytes, r.offBytes, "no overflow")
		if r.op == opRead || r.op == opWrite {
			require.LessOrEqual(t, r.lenBytes, int64(requestBytesMax))
		}
		if r.op == opWrite {
			require.Len(t, r.data, int(r.lenBytes))
		}
	})
}

// fakeKernel is the other end of a fuseServer's connection: a socket that keeps messages apart,
// as /dev/fuse does.
type fakeKernel struct {
	t      *testing.T
	fd     int
	server *fuseServer
	dev    *faultdev.Device // nil if the server has another
}

func newFakeKernel(t *testing.T, sizeBytes int64) *fakeKernel {
	t.Helper()
	return newFakeKernelOver(t, faultdev.Wrap(faultdev.NewMem(sizeBytes)))
}

func newFakeKernelOver(t *testing.T, dev trivet.Device) *fakeKernel {
	t.Helper()
	return newFakeKernelWith(t, dev, nil)
}

func newFakeKernelWith(t *testing.T, dev trivet.Device, buffers *Buffers) *fakeKernel {
	t.Helper()
	k := newIdleKernel(t, dev, buffers)
	k.server.start(t.Context())
	return k
}

// newIdleKernel returns one whose server is not started.
func newIdleKernel(t *testing.T, dev trivet.Device, buffers *Buffers) *fakeKernel {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	require.NoError(t, err)
	require.NoError(t, unix.SetNonblock(fds[1], true))
	timeout := unix.Timeval{Sec: 60}
	require.NoError(t, unix.SetsockoptTimeval(fds[0], unix.SOL_SOCKET, unix.SO_RCVTIMEO, &timeout))
	k := &fakeKernel{t: t, fd: fds[0]}
	k.dev, _ = dev.(*faultdev.Device)
	k.server, err = newFuseServer(fds[1], dev, buffers, slog.New(slog.DiscardHandler))
	require.NoError(t, err)
	t.Cleanup(func() {
		if k.dev != nil {
			k.dev.Heal()
		}
		require.NoError(t, k.server.stop())
		require.NoError(t, unix.Close(k.fd))
	})
	return k
}

func (k *fakeKernel) send(b []byte) {
	k.t.Helper()
	_, err := unix.Write(k.fd, b)
	require.NoError(k.t, err)
}

// receive returns the next reply.
func (k *fakeKernel) receive() (unique uint64, errno unix.Errno, body []byte) {
	k.t.Helper()
	b := make([]byte, fuseReplyBytes+requestBytesMax)
	n, err := unix.Read(k.fd, b)
	for errors.Is(err, unix.EINTR) { // the runtime's own signals: the descriptor blocks
		n, err = unix.Read(k.fd, b)
	}
	require.NoError(k.t, err, "no reply came")
	require.GreaterOrEqual(k.t, n, fuseReplyBytes)
	require.EqualValues(k.t, n, binary.NativeEndian.Uint32(b))
	return binary.NativeEndian.Uint64(b[8:]), unix.Errno(-int32(binary.NativeEndian.Uint32(b[4:]))), b[fuseReplyBytes:n]
}

// call sends a request and returns the reply to it.
func (k *fakeKernel) call(op uint32, args ...any) (unix.Errno, []byte) {
	k.t.Helper()
	k.send(fuseMessage(op, 77, args...))
	unique, errno, body := k.receive()
	require.EqualValues(k.t, 77, unique)
	return errno, body
}

func TestFuseInit(t *testing.T) {
	t.Parallel()
	k := newFakeKernel(t, 1<<20)
	errno, body := k.call(opInit, uint32(7), uint32(45), uint32(131072), ^uint32(0), ^uint32(0))
	require.Zero(t, errno)
	require.Len(t, body, 64)
	<-k.server.inited
	u32 := binary.NativeEndian.Uint32
	require.EqualValues(t, 7, u32(body))
	require.EqualValues(t, 41, u32(body[4:]))
	flags := u32(body[12:])
	require.NotZero(t, flags&initAsyncDIO, "without it reads are ten times slower")
	require.Zero(t, flags&(1<<16), "WRITEBACK_CACHE would make the kernel trust its own size")
	require.EqualValues(t, 64, binary.NativeEndian.Uint16(body[16:]), "max_background")
	require.EqualValues(t, 1<<20, u32(body[20:]), "max_write")
	require.EqualValues(t, 256, binary.NativeEndian.Uint16(body[28:]), "max_pages")
	require.EqualValues(t, init2HasResend, u32(body[32:]))
}

func TestFuseInitOfAnOldKernel(t *testing.T) {
	t.Parallel()
	k := newFakeKernel(t, 1<<20)
	_, body := k.call(opInit, uint32(7), uint32(31), uint32(0), uint32(initAsyncRead), uint32(0))
	require.EqualValues(t, 31, binary.NativeEndian.Uint32(body[4:]))
	require.EqualValues(t, initAsyncRead, binary.NativeEndian.Uint32(body[12:]), "only what was offered")
	errno, _ := k.call(opInit, uint32(8), uint32(0), uint32(0), uint32(0), uint32(0))
	require.Equal(t, unix.EPROTO, errno)
}

func TestFuseRequests(t *testing.T) {
	t.Parallel()
	k := newFakeKernel(t, 1<<20)
	data := bytes.Repeat([]byte{9}, 32<<10) // longer than a small buffer
	errno, body := k.call(opWrite, ioArgs(4096, uint32(len(data)), data...)...)
	require.Zero(t, errno)
	require.EqualValues(t, len(data), binary.NativeEndian.Uint32(body))
	errno, body = k.call(opRead, ioArgs(4096, uint32(len(data)))...)
	require.Zero(t, errno)
	require.True(t, bytes.Equal(data, body))
	errno, body = k.call(opRead, ioArgs(1<<20, 4096)...)
	require.Zero(t, errno)
	require.Empty(t, body, "end of file")
	errno, _ = k.call(opRead, ioArgs(1, 4096)...)
	require.Equal(t, unix.EINVAL, errno)

	errno, _ = k.call(opFsync, uint64(0), uint32(0), uint32(0))
	require.Zero(t, errno)
	require.Equal(t, 1, k.dev.Count(faultdev.Flush))
	errno, _ = k.call(opFallocate, uint64(0), uint64(4096), uint64(8192), uint32(fallocDiscard), uint32(0))
	require.Zero(t, errno)
	errno, _ = k.call(opFallocate, uint64(0), uint64(4096), uint64(8192), uint32(fallocZero), uint32(0))
	require.Zero(t, errno)
	require.Equal(t, 1, k.dev.Count(faultdev.Discard))
	require.Equal(t, 1, k.dev.Count(faultdev.WriteZeroes))
	errno, _ = k.call(opFallocate, uint64(0), uint64(4096), uint64(8192), uint32(0), uint32(0))
	require.Equal(t, unix.EINVAL, errno, "never ENOSYS or EOPNOTSUPP: the kernel would stop asking")

	errno, body = k.call(opGetattr, uint64(0), uint64(0))
	require.Zero(t, errno)
	require.Zero(t, binary.NativeEndian.Uint64(body), "valid for no time: the size may grow")
	require.EqualValues(t, 1<<20, binary.NativeEndian.Uint64(body[24:]))
	_, body = k.call(opOpen, uint32(2), uint32(0))
	require.EqualValues(t, openFlags, binary.NativeEndian.Uint32(body[8:]))
	require.EqualValues(t, 1, k.server.opensN.Load())
	_, body = k.call(opStatfs)
	require.Len(t, body, 80)
	require.EqualValues(t, 4096, binary.NativeEndian.Uint32(body[40:]))
	for _, op := range []uint32{opFlush, opAccess, opRelease, opDestroy} {
		errno, _ = k.call(op)
		require.Zero(t, errno, "opcode %d", op)
	}
	for _, op := range []uint32{1, 22, opInterrupt, 39, 40, 46, 4711} {
		errno, _ = k.call(op, make([]byte, 64))
		require.Equal(t, unix.ENOSYS, errno, "opcode %d", op)
	}
	k.send(fuseMessage(opForget, 1, uint64(1)))
	errno, _ = k.call(opRead, uint64(0)) // cut short
	require.Equal(t, unix.EINVAL, errno)
}

func TestFuseEchoesTheResendBit(t *testing.T) {
	t.Parallel()
	k := newFakeKernel(t, 1<<20)
	k.send(fuseMessage(opRead, 1<<63|3, ioArgs(0, 4096)...))
	unique, errno, _ := k.receive()
	require.Zero(t, errno)
	require.Equal(t, uint64(1<<63|3), unique)
}

// TestFuseBlockedWorkers fills the workers with requests that wait; the reader goes on.
func TestFuseBlockedWorkers(t *testing.T) {
	t.Parallel()
	k := newFakeKernel(t, 1<<20)
	gate := k.dev.Hold(faultdev.OfKind(faultdev.Flush, faultdev.Write))
	for i := range uint64(maxBackground) {
		if i%2 == 0 {
			k.send(fuseMessage(opFsync, i, uint64(0), uint32(0), uint32(0)))
		} else {
			k.send(fuseMessage(opWrite, i, ioArgs(0, 4096, make([]byte, 4096)...)...))
		}
		<-gate.Arrived()
	}
	errno, _ := k.call(opGetattr, uint64(0), uint64(0))
	require.Zero(t, errno)
	errno, body := k.call(opRead, ioArgs(0, 64<<10)...)
	require.Zero(t, errno)
	require.Len(t, body, 64<<10)
	gate.Open()
	seen := map[uint64]bool{}
	for range maxBackground {
		unique, errno, _ := k.receive()
		require.Zero(t, errno)
		seen[unique] = true
	}
	require.Len(t, seen, maxBackground, "each request got its reply")
}

// TestFuseStopEndsWaitingRequests: stop cancels what waits in the Device.
func TestFuseStopEndsWaitingRequests(t *testing.T) {
	t.Parallel()
	k := newFakeKernel(t, 1<<20)
	gate := k.dev.Hold(nil)
	k.send(fuseMessage(opFsync, 1, uint64(0), uint32(0), uint32(0)))
	<-gate.Arrived()
	require.NoError(t, k.server.stop(), "all buffers are back")
	require.NoError(t, k.server.err(), "our own wish is no failure")
}

func TestFuseFailureSticks(t *testing.T) {
	t.Parallel()
	k := newFakeKernel(t, 1<<20)
	k.dev.FailNth(faultdev.Flush, 1, trivet.ErrFenced)
	errno, _ := k.call(opFsync, uint64(0), uint32(0), uint32(0))
	require.Equal(t, unix.EIO, errno)
	require.ErrorIs(t, k.server.err(), trivet.ErrFenced)
	errno, _ = k.call(opRead, ioArgs(0, 4096)...)
	require.Equal(t, unix.EIO, errno)
	errno, _ = k.call(opGetattr, uint64(0), uint64(0))
	require.Zero(t, errno, "the file can still be looked at, or detach could not work")
}

// nullDevice does nothing, and allocates nothing.
type nullDevice struct{ trivet.Device }

func (nullDevice) WriteAt(context.Context, []byte, int64) error { return nil }
func (nullDevice) ReadAt(context.Context, []byte, int64) error  { return nil }
func (nullDevice) Size() int64                                  { return 1 << 20 }

// TestFuseNoAllocationPerRequest keeps the promise of bufPool. It must not run in parallel.
func TestFuseNoAllocationPerRequest(t *testing.T) {
	k := newFakeKernelWith(t, nullDevice{}, new(Buffers))
	reply := make([]byte, fuseReplyBytes+4096)
	for name, request := range map[string][]byte{
		"write":      fuseMessage(opWrite, 1, ioArgs(0, 4096, make([]byte, 4096)...)...),
		"long write": fuseMessage(opWrite, 1, ioArgs(0, 64<<10, make([]byte, 64<<10)...)...),
		"read":       fuseMessage(opRead, 1, ioArgs(0, 4096)...),
	} {
		perOp := testing.AllocsPerRun(500, func() {
			_, _ = unix.Write(k.fd, request)
			_, _ = unix.Read(k.fd, reply)
		})
		require.Zero(t, perOp, name) // the average is rounded down, so the runtime's own do not count
	}
}

func TestBufPool(t *testing.T) {
	t.Parallel()
	p, err := newBufPool(2, 1)
	require.NoError(t, err)
	a, err := p.get(t.Context(), 10)
	require.NoError(t, err)
	b, err := p.get(t.Context(), smallBytes)
	require.NoError(t, err)
	c, err := p.get(t.Context(), smallBytes+1)
	require.NoError(t, err)
	require.Len(t, c.payload(requestBytesMax), requestBytesMax)
	_, err = p.get(t.Context(), requestBytesMax+1)
	require.ErrorIs(t, err, trivet.ErrInvalid)
	for i := range a.mem { // buffers must not overlap
		a.mem[i] = 1
	}
	for i := range b.mem {
		b.mem[i] = 2
	}
	for i := range c.mem {
		c.mem[i] = 3
	}
	require.Equal(t, bytes.Repeat([]byte{1}, len(a.mem)), a.mem)
	require.Equal(t, bytes.Repeat([]byte{2}, len(b.mem)), b.mem)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err = p.get(ctx, 1)
	require.ErrorIs(t, err, context.Canceled)
	require.Error(t, p.close(), "never unmap what is in use")
	p.put(a)
	p.put(b)
	p.put(c)
	p.put(nil)
	require.NoError(t, p.close())
}

func TestParseMounts(t *testing.T) {
	t.Parallel()
	got := parseMounts(`24 27 0:6 / /dev rw,relatime - devtmpfs devtmpfs rw,size=1k
42 27 0:39 / /run/my\040dir/v\134x/device rw,nosuid shared:5 master:1 - fuse.trivet trivet:v1 rw,user_id=0
43 27 7:3 / /mnt rw - ext4 /dev/loop3 rw
44 27 0:6 /loop3 /pods/x/dev rw - devtmpfs devtmpfs rw
45 27 0:6 /loop33 /pods/y/dev rw - devtmpfs devtmpfs rw
junk
46 27 7:31 / /mnt2 rw - ext4 /dev/loop31 rw
47 27 7:3 /sub /mnt/\04 rw - ext4 /dev/loop3 rw
`)
	require.Len(t, got, 7)
	require.Equal(t, mountEntry{
		dev: "0:39", root: "/", point: `/run/my dir/v\x/device`, fstype: "fuse.trivet", source: "trivet:v1",
	}, got[1])
	var points []string
	for _, m := range usersOf(got, loopDevice{number: 3, major: 7, minor: 3}) {
		points = append(points, m.point)
	}
	require.Equal(t, []string{"/mnt", "/pods/x/dev", `/mnt/\04`}, points)
}
