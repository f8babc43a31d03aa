package blockdev

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/internal/faultdev"
)

// nbdClient is a small NBD client, and a trivet.Device. Several requests may be under way.
type nbdClient struct {
	conn      net.Conn
	sizeBytes int64
	flags     uint16

	sendMu sync.Mutex

	mu      sync.Mutex
	cookie  uint64
	waiting map[uint64]*nbdCall
	err     error // why the connection is gone
}

type nbdCall struct {
	p    []byte // receives the data of a read
	done chan error
}

// nbdErrors is how the client reads the errors of the protocol back, so that it can stand in
// for a Device.
var nbdErrors = map[uint32]error{
	uint32(unix.EINVAL): trivet.ErrInvalid,
	uint32(unix.ENOSPC): trivet.ErrNoSpace,
	uint32(unix.EIO):    trivet.ErrUnavailable,
}

// goNBD negotiates with GO and starts to receive replies.
func goNBD(t *testing.T, conn net.Conn, export string) *nbdClient {
	t.Helper()
	hello := make([]byte, 18)
	_, err := io.ReadFull(conn, hello)
	require.NoError(t, err)
	require.EqualValues(t, nbdFixedNewstyle|nbdNoZeroes, binary.BigEndian.Uint16(hello[16:]))
	writeBytes(t, conn, binary.BigEndian.AppendUint32(nil, nbdFixedNewstyle|nbdNoZeroes))
	writeBytes(t, conn, nbdOption(nbdOptGo, nbdInfoData(export, nbdInfoBlockSize)))
	c := &nbdClient{conn: conn, waiting: map[uint64]*nbdCall{}}
	for {
		kind, data := readOptionReply(t, conn, nbdOptGo)
		if kind == nbdRepAck {
			break
		}
		require.EqualValues(t, nbdRepInfo, kind)
		switch binary.BigEndian.Uint16(data) {
		case nbdInfoExport:
			c.sizeBytes, c.flags = int64(binary.BigEndian.Uint64(data[2:])), binary.BigEndian.Uint16(data[10:])
		case nbdInfoBlockSize:
			require.EqualValues(t, 4096, binary.BigEndian.Uint32(data[2:]))
			require.EqualValues(t, 4096, binary.BigEndian.Uint32(data[6:]))
			require.EqualValues(t, 1<<20, binary.BigEndian.Uint32(data[10:]))
		}
	}
	go c.receive()
	return c
}

// nbdOption builds an option.
func nbdOption(option uint32, data []byte) []byte {
	b := binary.BigEndian.AppendUint64(nil, nbdOptionMagic)
	b = binary.BigEndian.AppendUint32(b, option)
	b = binary.BigEndian.AppendUint32(b, uint32(len(data)))
	return append(b, data...)
}

// nbdInfoData builds the data of INFO and GO.
func nbdInfoData(name string, wanted ...uint16) []byte {
	b := binary.BigEndian.AppendUint32(nil, uint32(len(name)))
	b = append(b, name...)
	b = binary.BigEndian.AppendUint16(b, uint16(len(wanted)))
	for _, w := range wanted {
		b = binary.BigEndian.AppendUint16(b, w)
	}
	return b
}

func readOptionReply(t *testing.T, r io.Reader, option uint32) (kind uint32, data []byte) {
	t.Helper()
	head := make([]byte, 20)
	_, err := io.ReadFull(r, head)
	require.NoError(t, err)
	require.Equal(t, uint64(nbdReplyMagic), binary.BigEndian.Uint64(head))
	require.Equal(t, option, binary.BigEndian.Uint32(head[8:]))
	data = make([]byte, binary.BigEndian.Uint32(head[16:]))
	_, err = io.ReadFull(r, data)
	require.NoError(t, err)
	return binary.BigEndian.Uint32(head[12:]), data
}

func writeBytes(t *testing.T, w io.Writer, b []byte) {
	t.Helper()
	_, err := w.Write(b)
	require.NoError(t, err)
}

// receive hands replies to those who wait until the connection ends.
func (c *nbdClient) receive() {
	var err error
	for err == nil {
		err = c.receiveOne()
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.err = err
	for _, call := range c.waiting {
		call.done <- err
	}
}

func (c *nbdClient) receiveOne() error {
	head := make([]byte, nbdSimpleBytes)
	if _, err := io.ReadFull(c.conn, head); err != nil {
		return err
	}
	if magic := binary.BigEndian.Uint32(head); magic != nbdSimpleMagic {
		return fmt.Errorf("reply magic %#x", magic)
	}
	cookie := binary.BigEndian.Uint64(head[8:])
	c.mu.Lock()
	call := c.waiting[cookie]
	delete(c.waiting, cookie)
	c.mu.Unlock()
	if call == nil {
		return fmt.Errorf("reply to unknown cookie %d", cookie)
	}
	var result error
	if code := binary.BigEndian.Uint32(head[4:]); code != 0 {
		result = fmt.Errorf("nbd error %d: %w", code, nbdErrors[code])
	} else if len(call.p) > 0 {
		if _, err := io.ReadFull(c.conn, call.p); err != nil {
			return err
		}
	}
	call.done <- result
	return nil
}

// start sends a request; the channel yields its outcome.
func (c *nbdClient) start(command, flags uint16, off, n int64, data, into []byte) <-chan error {
	call := &nbdCall{p: into, done: make(chan error, 1)}
	c.sendMu.Lock()
	defer c.sendMu.Unlock()
	c.mu.Lock()
	c.cookie++
	cookie := c.cookie
	if c.err != nil {
		call.done <- c.err
		c.mu.Unlock()
		return call.done
	}
	c.waiting[cookie] = call
	c.mu.Unlock()
	// A write error shows as the end of the connection in receive, too.
	_, _ = c.conn.Write(append(nbdHeader(command, flags, cookie, uint64(off), uint32(n)), data...))
	return call.done
}

// nbdHeader builds the header of a request.
func nbdHeader(command, flags uint16, cookie, off uint64, n uint32) []byte {
	b := binary.BigEndian.AppendUint32(nil, nbdRequestMagic)
	b = binary.BigEndian.AppendUint16(b, flags)
	b = binary.BigEndian.AppendUint16(b, command)
	b = binary.BigEndian.AppendUint64(b, cookie)
	b = binary.BigEndian.AppendUint64(b, off)
	return binary.BigEndian.AppendUint32(b, n)
}

func (c *nbdClient) Size() int64 { return c.sizeBytes }

func (c *nbdClient) ReadAt(_ context.Context, p []byte, off int64) error {
	if err := trivet.CheckRange(off, int64(len(p)), c.sizeBytes); err != nil {
		return err // the protocol has one error for both kinds
	}
	return <-c.start(nbdCmdRead, 0, off, int64(len(p)), nil, p)
}

func (c *nbdClient) WriteAt(_ context.Context, p []byte, off int64) error {
	if err := trivet.CheckRange(off, int64(len(p)), c.sizeBytes); err != nil {
		return err
	}
	return <-c.start(nbdCmdWrite, 0, off, int64(len(p)), p, nil)
}

func (c *nbdClient) Discard(_ context.Context, off, n int64) error {
	if off < 0 || n < 0 {
		return trivet.ErrInvalid
	}
	first, blocksN := trivet.AlignInwards(off, n)
	return <-c.start(nbdCmdTrim, 0, int64(first)*trivet.BlockSize, blocksN*trivet.BlockSize, nil, nil)
}

func (c *nbdClient) WriteZeroes(_ context.Context, off, n int64) error {
	if err := trivet.CheckRange(off, n, c.sizeBytes); err != nil {
		return err
	}
	return <-c.start(nbdCmdWriteZeroes, 0, off, n, nil, nil)
}

func (c *nbdClient) Flush(context.Context) error { return <-c.start(nbdCmdFlush, 0, 0, 0, nil, nil) }

// nbdRig is a running server.
type nbdRig struct {
	socket string
	dev    *faultdev.Device
	cancel context.CancelFunc
	done   chan error
}

func startNBD(t *testing.T, sizeBytes int64) *nbdRig {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	// Not t.TempDir: its path may be too long for a socket.
	dir, err := os.MkdirTemp("", "nbd")
	require.NoError(t, err)
	r := &nbdRig{
		socket: filepath.Join(dir, "s"), dev: faultdev.Wrap(faultdev.NewMem(sizeBytes)), cancel: cancel,
		done: make(chan error, 1),
	}
	ln, err := listenUnix(ctx, r.socket) // so that it listens when startNBD returns
	require.NoError(t, err)
	require.NoError(t, ln.Close())
	go func() { r.done <- ServeNBD(ctx, r.socket, "vol-1", r.dev, nil) }()
	t.Cleanup(func() {
		r.dev.Heal()
		r.stop(t)
		require.NoError(t, os.RemoveAll(dir))
	})
	return r
}

// stop ends the server and checks that it ended well.
func (r *nbdRig) stop(t *testing.T) {
	t.Helper()
	r.cancel()
	require.NoError(t, <-r.done)
	r.done <- nil
	require.NoFileExists(t, r.socket)
}

func (r *nbdRig) dial(t *testing.T) net.Conn {
	t.Helper()
	var conn net.Conn
	require.Eventually(t, func() bool {
		var err error
		conn, err = net.Dial("unix", r.socket)
		return err == nil
	}, 10e9, 1e6)
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}
