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
	"time"

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
	mode      nbdMode

	sendMu sync.Mutex

	mu      sync.Mutex
	cookie  uint64
	waiting map[uint64]*nbdCalled
	err     error // why the connection is gone
	chunksN int   // with data
	holesN  int
}

type nbdCalled struct {
	off  int64
	p    []byte // receives the data of a read
	gotN int    // bytes of it
	err  error
	runs []trivet.Run
	done chan error
}

// nbdErrors is how the client reads the errors of the protocol back, so that it can stand in
// for a Device.
var nbdErrors = map[uint32]error{
	uint32(unix.EINVAL):    trivet.ErrInvalid,
	uint32(unix.ENOSPC):    trivet.ErrNoSpace,
	uint32(unix.EIO):       trivet.ErrUnavailable,
	uint32(unix.EPERM):     unix.EPERM,
	uint32(unix.EOVERFLOW): unix.EOVERFLOW,
}

// greetNBD reads the greeting and answers it.
func greetNBD(t *testing.T, conn net.Conn) {
	t.Helper()
	hello := make([]byte, 18)
	_, err := io.ReadFull(conn, hello)
	require.NoError(t, err)
	require.EqualValues(t, nbdFixedNewstyle|nbdNoZeroes, binary.BigEndian.Uint16(hello[16:]))
	writeBytes(t, conn, binary.BigEndian.AppendUint32(nil, nbdFixedNewstyle|nbdNoZeroes))
}

// goNBD negotiates simple replies with GO and starts to receive them.
func goNBD(t *testing.T, conn net.Conn, export string) *nbdClient {
	t.Helper()
	greetNBD(t, conn)
	return enterNBD(t, conn, export, nbdSimple)
}

// goNBDAs negotiates replies of a form, and base:allocation unless they are simple.
func goNBDAs(t *testing.T, conn net.Conn, export string, mode nbdMode) *nbdClient {
	t.Helper()
	greetNBD(t, conn)
	if mode != nbdSimple {
		option := uint32(nbdOptStructuredReply)
		if mode == nbdExtended {
			option = nbdOptExtended
		}
		askNBD(t, conn, option, nil, nbdRepAck)
		askNBD(t, conn, nbdOptSetMeta, nbdMetaData(export, nbdAllocation), nbdRepMeta, nbdRepAck)
	}
	return enterNBD(t, conn, export, mode)
}

// askNBD sends an option and checks the types of the replies.
func askNBD(t *testing.T, conn net.Conn, option uint32, data []byte, want ...uint32) {
	t.Helper()
	writeBytes(t, conn, nbdOption(option, data))
	for _, w := range want {
		kind, text := readOptionReply(t, conn, option)
		require.Equal(t, w, kind, "option %d: %q", option, text)
	}
}

// enterNBD sends GO and starts to receive replies.
func enterNBD(t *testing.T, conn net.Conn, export string, mode nbdMode) *nbdClient {
	t.Helper()
	writeBytes(t, conn, nbdOption(nbdOptGo, nbdInfoData(export, nbdInfoBlockSize)))
	c := &nbdClient{conn: conn, mode: mode, waiting: map[uint64]*nbdCalled{}}
	for {
		kind, data := readOptionReply(t, conn, nbdOptGo)
		if kind == nbdRepAck {
			break
		}
		require.EqualValues(t, nbdRepInfo, kind, "%s", data)
		switch binary.BigEndian.Uint16(data) {
		case nbdInfoExport:
			c.sizeBytes, c.flags = int64(binary.BigEndian.Uint64(data[2:])), binary.BigEndian.Uint16(data[10:])
		case nbdInfoBlockSize:
			require.EqualValues(t, 4096, binary.BigEndian.Uint32(data[2:]))
			require.EqualValues(t, 4096, binary.BigEndian.Uint32(data[6:]))
			require.EqualValues(t, 32<<20, binary.BigEndian.Uint32(data[10:]))
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

// nbdMetaData builds the data of LIST_META_CONTEXT and SET_META_CONTEXT.
func nbdMetaData(name string, queries ...string) []byte {
	b := binary.BigEndian.AppendUint32(nil, uint32(len(name)))
	b = append(b, name...)
	b = binary.BigEndian.AppendUint32(b, uint32(len(queries)))
	for _, q := range queries {
		b = binary.BigEndian.AppendUint32(b, uint32(len(q)))
		b = append(b, q...)
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
	if c.mode != nbdSimple {
		return c.receiveChunk()
	}
	head := make([]byte, nbdSimpleBytes)
	if _, err := io.ReadFull(c.conn, head); err != nil {
		return err
	}
	if magic := binary.BigEndian.Uint32(head); magic != nbdSimpleMagic {
		return fmt.Errorf("reply magic %#x", magic)
	}
	call, err := c.called(binary.BigEndian.Uint64(head[8:]), true)
	if err != nil {
		return err
	}
	var result error
	if code := binary.BigEndian.Uint32(head[4:]); code != 0 {
		result = fmt.Errorf("nbd error %d: %w", code, nbdErrors[code])
	} else if len(call.p) > 0 {
		if _, err := io.ReadFull(c.conn, call.p); err != nil {
			call.done <- err
			return err
		}
	}
	call.done <- result
	return nil
}

// called finds the request of a cookie, and forgets it if it is over.
func (c *nbdClient) called(cookie uint64, over bool) (*nbdCalled, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	call := c.waiting[cookie]
	if call == nil {
		return nil, fmt.Errorf("reply to unknown cookie %d", cookie)
	}
	if over {
		delete(c.waiting, cookie)
	}
	return call, nil
}

func (c *nbdClient) receiveChunk() error {
	head := make([]byte, nbdChunkBytes)
	magic := uint32(nbdChunkMagic)
	if c.mode == nbdExtended {
		head, magic = make([]byte, nbdExtChunkBytes), nbdExtChunkMagic
	}
	if _, err := io.ReadFull(c.conn, head); err != nil {
		return err
	}
	if got := binary.BigEndian.Uint32(head); got != magic {
		return fmt.Errorf("chunk magic %#x", got)
	}
	n := uint64(binary.BigEndian.Uint32(head[16:]))
	if c.mode == nbdExtended {
		n = binary.BigEndian.Uint64(head[24:])
	}
	payload := make([]byte, n)
	if _, err := io.ReadFull(c.conn, payload); err != nil {
		return err
	}
	done := binary.BigEndian.Uint16(head[4:])&nbdChunkDone != 0
	call, err := c.called(binary.BigEndian.Uint64(head[8:]), done)
	if err != nil {
		return err
	}
	if c.mode == nbdExtended && binary.BigEndian.Uint64(head[16:]) != uint64(call.off) {
		return fmt.Errorf("chunk of offset %d, asked for %d", binary.BigEndian.Uint64(head[16:]), call.off)
	}
	c.takeChunk(call, binary.BigEndian.Uint16(head[6:]), payload)
	if done {
		if call.err == nil && call.gotN != len(call.p) {
			call.err = fmt.Errorf("read of %d bytes got %d", len(call.p), call.gotN)
		}
		call.done <- call.err
	}
	return nil
}

func (c *nbdClient) takeChunk(call *nbdCalled, kind uint16, b []byte) {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch kind {
	case nbdChunkNone:
	case nbdChunkData:
		c.chunksN++
		call.gotN += copy(call.p[int64(binary.BigEndian.Uint64(b))-call.off:], b[8:])
	case nbdChunkHole:
		c.holesN++
		n := int64(binary.BigEndian.Uint32(b[8:]))
		at := int64(binary.BigEndian.Uint64(b)) - call.off
		clear(call.p[at : at+n])
		call.gotN += int(n)
	case nbdChunkStatus:
		for b = b[4:]; len(b) > 0; b = b[8:] {
			state := binary.BigEndian.Uint32(b[4:])
			call.runs = append(call.runs, trivet.Run{LenBytes: int64(binary.BigEndian.Uint32(b)), Allocated: state == 0})
		}
	case nbdChunkStatusExt:
		for b = b[8:]; len(b) > 0; b = b[16:] {
			state := binary.BigEndian.Uint64(b[8:])
			call.runs = append(call.runs, trivet.Run{LenBytes: int64(binary.BigEndian.Uint64(b)), Allocated: state == 0})
		}
	case nbdChunkError:
		code := binary.BigEndian.Uint32(b)
		call.err = fmt.Errorf("nbd error %d, %s: %w", code, b[6:6+binary.BigEndian.Uint16(b[4:])], nbdErrors[code])
	default:
		call.err = fmt.Errorf("chunk of type %#x", kind)
	}
}

// start sends a request; the channel yields its outcome.
func (c *nbdClient) start(command, flags uint16, off, n int64, data, into []byte) <-chan error {
	return c.begin(command, flags, off, n, data, into).done
}

func (c *nbdClient) begin(command, flags uint16, off, n int64, data, into []byte) *nbdCalled {
	call := &nbdCalled{off: off, p: into, done: make(chan error, 1)}
	c.sendMu.Lock()
	defer c.sendMu.Unlock()
	c.mu.Lock()
	c.cookie++
	cookie := c.cookie
	if c.err != nil {
		call.done <- c.err
		c.mu.Unlock()
		return call
	}
	c.waiting[cookie] = call
	c.mu.Unlock()
	if c.mode == nbdExtended && command == nbdCmdWrite {
		flags |= nbdFlagPayloadLen
	}
	head := nbdHeader(command, flags, cookie, uint64(off), uint32(n))
	if c.mode == nbdExtended {
		head = nbdExtHeader(command, flags, cookie, uint64(off), uint64(n))
	}
	// A write error shows as the end of the connection in receive, too.
	_, _ = c.conn.Write(append(head, data...))
	return call
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

// nbdExtHeader builds the extended header of a request.
func nbdExtHeader(command, flags uint16, cookie, off, n uint64) []byte {
	b := binary.BigEndian.AppendUint32(nil, nbdExtendedMagic)
	b = binary.BigEndian.AppendUint16(b, flags)
	b = binary.BigEndian.AppendUint16(b, command)
	b = binary.BigEndian.AppendUint64(b, cookie)
	b = binary.BigEndian.AppendUint64(b, off)
	return binary.BigEndian.AppendUint64(b, n)
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
	return startNBDWith(t, sizeBytes, func(*NBDConfig) {})
}

// startNBDWith starts a server whose configuration adjust may change.
func startNBDWith(t *testing.T, sizeBytes int64, adjust func(*NBDConfig)) *nbdRig {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	// Not t.TempDir: its path may be too long for a socket.
	dir, err := os.MkdirTemp("", "nbd")
	require.NoError(t, err)
	r := &nbdRig{
		socket: filepath.Join(dir, "s"), dev: faultdev.Wrap(faultdev.NewMem(sizeBytes)), cancel: cancel,
		done: make(chan error, 1),
	}
	ln, err := ListenNBD(ctx, r.socket)
	require.NoError(t, err)
	cfg := NBDConfig{Export: "vol-1", Device: r.dev, wait: time.Hour} // however slow the machine is
	adjust(&cfg)
	go func() { r.done <- ServeNBD(ctx, ln, cfg) }()
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
	conn, err := net.Dial("unix", r.socket)
	require.NoError(t, err)
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}
