package blockdev

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"sync"
	"time"
	"unicode/utf8"

	"github.com/trivet-csi/trivet"
)

const (
	nbdWorkersN = 32
	nbdQueueN   = 8
	nbdSmallN   = nbdWorkersN + nbdQueueN
	nbdLargeN   = 8

	nbdReaderBytes = 64 << 10

	// nbdRunsMax bounds the answer to one block status request; the client asks for the rest.
	nbdRunsMax = 512
)

// nbdConn serves the requests of one client: one goroutine reads them, a fixed number of workers
// carries them out and replies in whatever order they finish.
//
// The reader takes the buffer of a request before it queues it, so a worker never waits for one and
// always gets done; when all buffers are out the client waits, and only this client: they are its own.
type nbdConn struct {
	conn     io.ReadWriteCloser
	r        *bufio.Reader
	stall    func(time.Time) error // sets the deadline of reads; nil: there is none
	out      *nbdWriter
	device   trivet.Device
	readOnly bool
	mode     nbdMode
	canState bool // block status was negotiated
	pool     *bufPool
	queue    chan nbdTask
	calls    chan *nbdCall // free ones; more than can be in use
}

// nbdTask is a request, or a part of one that is longer than a buffer.
type nbdTask struct {
	req  nbdRequest
	buf  *buffer  // data of a write, room for those of a read or status; else nil
	call *nbdCall // of a part
}

// nbdCall is a request in several parts.
type nbdCall struct {
	req nbdRequest

	mu    sync.Mutex
	leftN int // parts without an outcome, and one for the reader while it still adds
	err   error
}

func newNBDConn(conn io.ReadWriteCloser, r *bufio.Reader, e *nbdExport, h *nbdHandshake) *nbdConn {
	c := &nbdConn{
		conn: conn, r: r, out: newNBDWriter(conn, h.mode), device: e.device, readOnly: e.readOnly, mode: h.mode,
		canState: h.status, queue: make(chan nbdTask, nbdQueueN),
		calls: make(chan *nbdCall, nbdWorkersN+nbdQueueN+2),
	}
	for range cap(c.calls) {
		c.calls <- &nbdCall{}
	}
	if d, ok := conn.(interface{ SetReadDeadline(t time.Time) error }); ok {
		c.stall = d.SetReadDeadline
	}
	return c
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
	for {
		req, err := c.readRequest()
		if err != nil {
			return err
		}
		if req.command == nbdCmdDisconnect {
			return nil
		}
		payload := req.payloadBytes(c.mode)
		if payload > nbdPayloadMax {
			return fmt.Errorf("nbd payload of %d bytes: most is %d: %w", payload, nbdPayloadMax, trivet.ErrInvalid)
		}
		if err := req.check(c.mode, c.readOnly, c.canState, c.device.Size()); err != nil {
			if err := c.skip(int64(payload)); err != nil {
				return err
			}
			c.out.fail(&req, err)
			continue
		}
		if err := c.take(ctx, req); err != nil {
			return err
		}
	}
}

// readRequest reads the header of a request. A client may be silent for ever between two requests, but
// not within one.
func (c *nbdConn) readRequest() (nbdRequest, error) {
	n := c.mode.requestBytes()
	if c.r.Buffered() == 0 {
		if _, err := c.r.Peek(1); err != nil {
			return nbdRequest{}, fmt.Errorf("read nbd request: %w", err)
		}
	}
	if c.hurry(n) {
		defer c.noHurry()
	}
	b, err := c.r.Peek(n)
	if err != nil {
		return nbdRequest{}, fmt.Errorf("read nbd request: %w", err)
	}
	req, err := parseNBDRequest(c.mode, b)
	if err != nil {
		return req, err
	}
	_, err = c.r.Discard(n)
	return req, err
}

// hurry sets a deadline for the next n bytes unless they are here. When it returns true the caller
// clears it with noHurry.
func (c *nbdConn) hurry(n int) bool {
	if c.stall == nil || c.r.Buffered() >= n {
		return false
	}
	_ = c.stall(time.Now().Add(nbdStallWait)) // a closed connection: the read tells
	return true
}

func (c *nbdConn) noHurry() { _ = c.stall(time.Time{}) }

// readFull fills p, in time.
func (c *nbdConn) readFull(p []byte) error {
	if c.hurry(len(p)) {
		defer c.noHurry()
	}
	_, err := io.ReadFull(c.r, p)
	return err
}

// discard drops n bytes, in time.
func (c *nbdConn) discard(n int) error {
	if c.hurry(n) {
		defer c.noHurry()
	}
	_, err := c.r.Discard(n)
	return err
}

// skip drops the payload of a refused request, which keeps the stream in step.
func (c *nbdConn) skip(n int64) error {
	for n > 0 {
		piece := min(n, requestBytesMax)
		if err := c.discard(int(piece)); err != nil {
			return fmt.Errorf("skip data of a refused nbd request: %w", err)
		}
		n -= piece
	}
	return nil
}

// take queues a request that passed its checks: whole, or cut to the length of a buffer.
func (c *nbdConn) take(ctx context.Context, req nbdRequest) error {
	switch {
	case req.lenBytes <= requestBytesMax, req.command != nbdCmdRead && req.command != nbdCmdWrite:
		return c.takePart(ctx, req, nil)
	case req.command == nbdCmdRead && c.mode == nbdSimple:
		return c.takePart(ctx, req, nil) // one reply has all the data: a worker sends it piece by piece
	}
	call := <-c.calls // never waits: see its capacity
	call.req, call.leftN, call.err = req, 1, nil
	for part := req; part.lenBytes > 0; {
		rest := part.lenBytes - min(part.lenBytes, requestBytesMax)
		part.lenBytes -= rest
		call.mu.Lock()
		call.leftN++
		call.mu.Unlock()
		if err := c.takePart(ctx, part, call); err != nil {
			return err // the connection ends, and call with it
		}
		part.offBytes += part.lenBytes
		part.lenBytes = rest
	}
	c.donePart(ctx, call, nil)
	return nil
}

// takePart gets a buffer, reads the data of a write, and queues.
func (c *nbdConn) takePart(ctx context.Context, req nbdRequest, call *nbdCall) error {
	n := int64(0)
	switch req.command {
	case nbdCmdRead, nbdCmdWrite:
		n = int64(min(req.lenBytes, requestBytesMax)) //nolint:gosec // bounded
	case nbdCmdBlockStatus:
		n = smallBytes
	default:
		c.queue <- nbdTask{req: req, call: call} // workers only end after the reader
		return nil
	}
	buf, err := c.pool.get(ctx, n)
	if err != nil {
		return err
	}
	if req.command == nbdCmdWrite {
		if err := c.readFull(buf.payload(n)); err != nil {
			c.pool.put(buf)
			return fmt.Errorf("read data of an nbd write: %w", err)
		}
	}
	c.queue <- nbdTask{req: req, buf: buf, call: call}
	return nil
}

// do carries out one request or part, and replies.
func (c *nbdConn) do(ctx context.Context, t nbdTask) {
	defer c.pool.put(t.buf)
	if t.req.command == nbdCmdRead && t.req.lenBytes > requestBytesMax {
		c.stream(ctx, &t)
		return
	}
	err := c.call(ctx, &t)
	if t.call != nil {
		if err == nil && t.req.command == nbdCmdRead {
			c.out.data(&t.call.req, &t.req, t.buf, int64(t.req.lenBytes), false)
		}
		c.donePart(ctx, t.call, err)
		return
	}
	if err == nil && t.req.flags&nbdFlagFUA != 0 {
		err = c.durable(ctx, &t.req)
	}
	switch {
	case err != nil:
		c.out.fail(&t.req, err)
	case t.req.command == nbdCmdRead && t.req.lenBytes > 0:
		c.out.data(&t.req, &t.req, t.buf, int64(t.req.lenBytes), true)
	case t.req.command == nbdCmdBlockStatus:
		c.status(ctx, &t)
	default:
		c.out.ok(&t.req)
	}
}

// call passes a request to the Device; t.buf holds its data, or receives them.
func (c *nbdConn) call(ctx context.Context, t *nbdTask) error {
	off, n := int64(t.req.offBytes), int64(t.req.lenBytes) //nolint:gosec // within the Device: check
	switch t.req.command {
	case nbdCmdRead:
		return c.device.ReadAt(ctx, t.buf.payload(n), off)
	case nbdCmdWrite:
		return c.device.WriteAt(ctx, t.buf.payload(n), off)
	case nbdCmdFlush:
		return c.device.Flush(ctx)
	case nbdCmdTrim:
		return c.device.Discard(ctx, off, n)
	case nbdCmdWriteZeroes:
		return c.device.WriteZeroes(ctx, off, n)
	}
	return nil // CACHE is advice; block status follows
}

// durable is the flush that FUA asks for, after the effect.
func (c *nbdConn) durable(ctx context.Context, r *nbdRequest) error {
	switch r.command {
	case nbdCmdWrite, nbdCmdTrim, nbdCmdWriteZeroes:
		return c.device.Flush(ctx)
	}
	return nil
}

// donePart notes the outcome of a part and, if it was the last, replies.
func (c *nbdConn) donePart(ctx context.Context, call *nbdCall, err error) {
	call.mu.Lock()
	if call.err == nil {
		call.err = err
	}
	call.leftN--
	last, err := call.leftN == 0, call.err
	call.mu.Unlock()
	if !last {
		return
	}
	req := call.req
	c.calls <- call
	if err == nil && req.flags&nbdFlagFUA != 0 {
		err = c.durable(ctx, &req)
	}
	if err != nil {
		c.out.fail(&req, err)
		return
	}
	c.out.ok(&req)
}

// stream answers a read that is longer than a buffer with one simple reply. The header says that all
// went well, so when a later piece cannot be read there is nothing left but to hang up (proto.md,
// "Simple reply message").
func (c *nbdConn) stream(ctx context.Context, t *nbdTask) {
	off, left := int64(t.req.offBytes), int64(t.req.lenBytes) //nolint:gosec // within the Device: check
	n := min(left, requestBytesMax)
	if err := c.device.ReadAt(ctx, t.buf.payload(n), off); err != nil {
		c.out.fail(&t.req, err)
		return
	}
	c.out.alone(func() error {
		b := t.buf.withHeader(nbdSimpleBytes, n)
		c.out.putHeader(b[:nbdSimpleBytes], &t.req, 0, true, 0, 0)
		for {
			if err := c.out.raw(b); err != nil {
				return err
			}
			off, left = off+n, left-n
			if left == 0 {
				return nil
			}
			n = min(left, requestBytesMax)
			b = t.buf.payload(n)
			if err := c.device.ReadAt(ctx, b, off); err != nil {
				return err
			}
		}
	})
}

// status answers a block status request. Without an Allocator everything is data.
func (c *nbdConn) status(ctx context.Context, t *nbdTask) {
	off, n := int64(t.req.offBytes), int64(t.req.lenBytes) //nolint:gosec // within the Device: check
	if c.mode != nbdExtended {
		n = min(n, math.MaxUint32&^(trivet.BlockSize-1))
	}
	var whole [1]trivet.Run
	whole[0] = trivet.Run{LenBytes: n, Allocated: true}
	runs := whole[:]
	if a, ok := c.device.(trivet.Allocator); ok {
		runsN := nbdRunsMax
		if t.req.flags&nbdFlagReqOne != 0 {
			runsN = 1
		}
		found := make([]trivet.Run, runsN)
		got, err := a.Allocated(ctx, off, n, found)
		if err == nil && (got <= 0 || got > len(found)) {
			err = errors.New("allocated blocks: no answer")
		}
		if err != nil {
			c.out.fail(&t.req, err)
			return
		}
		runs = found[:got]
	}
	c.out.status(&t.req, runs, t.buf.payload(smallBytes))
}

// zeroes is what allZero compares with.
var zeroes [64 << 10]byte

// allZero tells whether all of b is zero. It looks at the first bytes first, which differ in most data.
func allZero(b []byte) bool {
	for len(b) > 0 {
		n := min(len(b), len(zeroes))
		if !bytes.Equal(b[:n], zeroes[:n]) {
			return false
		}
		b = b[n:]
	}
	return true
}

// validPrefix returns the first bytes of s, at most n, without half a character at the end.
func validPrefix(s string, n int) string {
	if len(s) <= n {
		return s
	}
	for n > 0 && !utf8.RuneStart(s[n]) {
		n--
	}
	return s[:n]
}
