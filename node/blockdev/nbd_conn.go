package blockdev

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/trivet-csi/trivet"
)

// The transmission phase of the NBD protocol with simple replies. All integers are big endian.
//
//	request   0x25609513 u32 | flags u16 | command u16 | cookie u64 | offset u64 | length u32 | data of a write
//	reply     0x67446698 u32 | error u32 | cookie u64 | data of a read
const (
	nbdRequestMagic = 0x25609513
	nbdSimpleMagic  = 0x67446698
	nbdRequestBytes = 28
	nbdSimpleBytes  = 16

	nbdCmdRead        = 0
	nbdCmdWrite       = 1
	nbdCmdDisconnect  = 2
	nbdCmdFlush       = 3
	nbdCmdTrim        = 4
	nbdCmdWriteZeroes = 6

	nbdFlagFUA    = 1 << 0
	nbdFlagNoHole = 1 << 1

	nbdWorkersN = 32
	nbdQueueN   = 8
	nbdSmallN   = nbdWorkersN + nbdQueueN
	nbdLargeN   = 8

	nbdReaderBytes = 64 << 10

	// nbdSkipMax is how much of a write that is too long is read and dropped in order to refuse
	// it politely; the protocol's default maximum. With more the client is cut off.
	nbdSkipMax = 32 << 20
)

// nbdRequest is one request.
type nbdRequest struct {
	flags, command uint16
	cookie         uint64
	offBytes       uint64
	lenBytes       uint32
}

// parseNBDRequest decodes a request's header. An error means that the stream is out of step.
func parseNBDRequest(b *[nbdRequestBytes]byte) (nbdRequest, error) {
	if magic := binary.BigEndian.Uint32(b[:]); magic != nbdRequestMagic {
		return nbdRequest{}, fmt.Errorf("nbd request: magic %#x: %w", magic, trivet.ErrInvalid)
	}
	return nbdRequest{
		flags:    binary.BigEndian.Uint16(b[4:]),
		command:  binary.BigEndian.Uint16(b[6:]),
		cookie:   binary.BigEndian.Uint64(b[8:]),
		offBytes: binary.BigEndian.Uint64(b[16:]),
		lenBytes: binary.BigEndian.Uint32(b[24:]),
	}, nil
}

// nbdConn serves the requests of one client: one goroutine reads them, a fixed number of
// workers carries them out and replies in whatever order they finish.
type nbdConn struct {
	conn   io.ReadWriteCloser
	r      *bufio.Reader
	device trivet.Device
	pool   *bufPool
	queue  chan nbdTask

	writeMu sync.Mutex // held over the write of one reply: only this client can make it slow
}

type nbdTask struct {
	req nbdRequest
	buf *buffer // data of a write; nil otherwise
}

func newNBDConn(conn io.ReadWriteCloser, dev trivet.Device) *nbdConn {
	return &nbdConn{
		conn: conn, r: bufio.NewReaderSize(conn, nbdReaderBytes), device: dev, queue: make(chan nbdTask, nbdQueueN),
	}
}

// serve serves requests until the client leaves, breaks the protocol, or ctx ends and somebody
// closes the connection. A client that says goodbye gets its replies first; with any other end
// the requests in the Device are cancelled. When serve returns all buffers are back in the pool.
func (c *nbdConn) serve(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var wg sync.WaitGroup
	for range nbdWorkersN {
		wg.Go(func() {
			for t := range c.queue {
				c.do(ctx, t)
			}
		})
	}
	err := c.readLoop(ctx)
	if err != nil {
		cancel()
		_ = c.conn.Close() // a worker may be stuck in a reply
	}
	close(c.queue)
	wg.Wait()
	return err
}

func (c *nbdConn) readLoop(ctx context.Context) error {
	var head [nbdRequestBytes]byte
	for {
		if _, err := io.ReadFull(c.r, head[:]); err != nil {
			return fmt.Errorf("read nbd request: %w", err)
		}
		req, err := parseNBDRequest(&head)
		if err != nil {
			return err
		}
		switch {
		case req.command == nbdCmdDisconnect:
			return nil
		case req.command == nbdCmdWrite && req.lenBytes > requestBytesMax:
			err = c.refuseLong(req)
		case req.command == nbdCmdWrite:
			err = c.takeWrite(ctx, req)
		default:
			c.queue <- nbdTask{req: req} // workers only end after the reader
		}
		if err != nil {
			return err
		}
	}
}

// takeWrite reads the data of a write and queues it.
func (c *nbdConn) takeWrite(ctx context.Context, req nbdRequest) error {
	buf, err := c.pool.get(ctx, int64(req.lenBytes))
	if err != nil {
		return err
	}
	if _, err := io.ReadFull(c.r, buf.payload(int64(req.lenBytes))); err != nil {
		c.pool.put(buf)
		return fmt.Errorf("read data of an nbd write: %w", err)
	}
	c.queue <- nbdTask{req: req, buf: buf}
	return nil
}

// refuseLong drops the data of a write that is too long, which keeps the stream in step.
func (c *nbdConn) refuseLong(req nbdRequest) error {
	if req.lenBytes > nbdSkipMax {
		return fmt.Errorf("nbd write of %d bytes: most is %d: %w", req.lenBytes, requestBytesMax, trivet.ErrInvalid)
	}
	if _, err := c.r.Discard(int(req.lenBytes)); err != nil {
		return fmt.Errorf("skip data of an nbd write: %w", err)
	}
	var head [nbdSimpleBytes]byte
	c.reply(head[:], req.cookie, unix.EINVAL)
	return nil
}

// do carries out one request and replies.
func (c *nbdConn) do(ctx context.Context, t nbdTask) {
	buf, n, err := t.buf, int64(0), error(nil)
	if t.req.command == nbdCmdRead && t.req.lenBytes <= requestBytesMax {
		n = int64(t.req.lenBytes)
	}
	if buf == nil {
		buf, err = c.pool.get(ctx, n)
	}
	defer func() { c.pool.put(buf) }()
	if err == nil {
		err = c.call(ctx, t.req, buf)
	}
	if err != nil {
		var head [nbdSimpleBytes]byte
		c.reply(head[:], t.req.cookie, toErrno(err))
		return
	}
	c.reply(buf.withHeader(nbdSimpleBytes, n), t.req.cookie, 0)
}

// call passes a request to the Device; buf holds its data, or receives them.
func (c *nbdConn) call(ctx context.Context, r nbdRequest, buf *buffer) error {
	known := uint16(nbdFlagFUA)
	if r.command == nbdCmdWriteZeroes {
		known |= nbdFlagNoHole // WriteZeroes never depends on it
	}
	if r.flags&^known != 0 {
		return fmt.Errorf("nbd command %d: flags %#x: %w", r.command, r.flags, trivet.ErrInvalid)
	}
	if r.command == nbdCmdFlush {
		return c.device.Flush(ctx)
	}
	off, n := int64(r.offBytes), int64(r.lenBytes)
	// Discard alone would align inwards: refuse here what the announced block size forbids.
	if err := trivet.CheckRange(off, n, c.device.Size()); err != nil {
		return fmt.Errorf("nbd command %d: %w", r.command, err)
	}
	switch r.command {
	case nbdCmdRead:
		if n > requestBytesMax {
			return fmt.Errorf("nbd read of %d bytes: most is %d: %w", n, requestBytesMax, trivet.ErrInvalid)
		}
		return c.device.ReadAt(ctx, buf.payload(n), off)
	case nbdCmdWrite:
		return c.durable(ctx, r, c.device.WriteAt(ctx, buf.payload(n), off))
	case nbdCmdTrim:
		return c.durable(ctx, r, c.device.Discard(ctx, off, n))
	case nbdCmdWriteZeroes:
		return c.durable(ctx, r, c.device.WriteZeroes(ctx, off, n))
	}
	return fmt.Errorf("nbd command %d: %w", r.command, trivet.ErrInvalid)
}

// durable adds the flush of a request that asks for FUA.
func (c *nbdConn) durable(ctx context.Context, r nbdRequest, err error) error {
	if err != nil || r.flags&nbdFlagFUA == 0 {
		return err
	}
	return c.device.Flush(ctx)
}

// reply completes the header in front of b and sends it. If that fails the connection is closed,
// which ends the reader too.
func (c *nbdConn) reply(b []byte, cookie uint64, errno unix.Errno) {
	binary.BigEndian.PutUint32(b, nbdSimpleMagic)
	binary.BigEndian.PutUint32(b[4:], nbdErrno(errno))
	binary.BigEndian.PutUint64(b[8:], cookie)
	c.writeMu.Lock()
	_, err := c.conn.Write(b)
	c.writeMu.Unlock()
	if err != nil {
		_ = c.conn.Close() // the reader reports
	}
}

// nbdErrno maps an errno to one that the protocol knows.
func nbdErrno(errno unix.Errno) uint32 {
	if errno != 0 && !errors.Is(errno, unix.EINVAL) && !errors.Is(errno, unix.ENOSPC) {
		return uint32(unix.EIO)
	}
	return uint32(errno)
}
