package transport

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"github.com/trivet-csi/trivet"
)

// ioBufferBytes is the size of the buffers that gather small frames, and the most that is written
// under one deadline.
const ioBufferBytes = 64 << 10

// readBufferBytes is what is read ahead of frames above a wire: the pieces of a message go straight to their place.
const readBufferBytes = 4 << 10

// writeNowBytesMax bounds what a goroutine writes of what others have queued meanwhile.
const writeNowBytesMax = 256 << 10

// errHungUp is part of the cause when the far end closed the connection, or its kernel did.
var errHungUp = errors.New("closed by the far end")

// stream is what both ends of a connection have in common: a queue, a goroutine for what cannot be written at once,
// deadlines that tell a dead connection from an idle one, and one way to end.
type stream struct {
	peers *Peers
	node  trivet.NodeID // at the far end, by its certificate
	conn  *tls.Conn
	queue *sendQueue
	in    *frameReader // of the goroutine in readLoop
	began time.Time

	wire *wire         // below conn; nil when it is another one
	turn sync.Mutex    // held by who writes: writeLoop, or who has just queued something
	w    *bufio.Writer // to conn, of who writes

	record      *record // of the far end's process; set before run
	incarnation uint64  // as its preface said; likewise

	ctx    context.Context // ends with the connection; its cause says why
	cancel context.CancelCauseFunc
}

func newStream(p *Peers, node trivet.NodeID, conn *tls.Conn) *stream {
	s := &stream{
		peers: p, node: node, conn: conn, began: time.Now(),
		queue: newSendQueue(&p.pool, p.limits.QueueBytesMax),
	}
	s.ctx, s.cancel = context.WithCancelCause(p.lifetime)
	s.wire, _ = conn.NetConn().(*wire)
	return s
}

// start is called when the prefaces are exchanged, before run.
func (s *stream) start() {
	limits := s.peers.limits
	if s.wire == nil {
		s.w = bufio.NewWriterSize(deadlineConn{s.conn, limits.DeadAfter, nil}, ioBufferBytes)
		return
	}
	s.w = bufio.NewWriterSize(s.conn, ioBufferBytes)
	s.wire.begin(limits.DeadAfter, s.heard)
	if s.wire.raw != nil {
		s.queue.kick = s.writeNow
	}
}

func (s *stream) heard() { s.peers.live.heard(s.record, s.incarnation) }

// fail ends the connection. The first cause stays; it wraps a sentinel.
func (s *stream) fail(cause error) {
	s.cancel(cause)
	// Not conn.Close: its farewell to a far end that does not read could block for seconds.
	_ = s.conn.NetConn().Close()
}

// cause returns why the connection ended. REQUIRES: it did.
func (s *stream) cause() error { return context.Cause(s.ctx) }

// broken returns the error of outstanding calls for what went wrong in reading or writing.
func (s *stream) broken(err error) error {
	switch {
	case s.ctx.Err() != nil: // a consequence of fail, not a cause
		return s.cause()
	case errors.Is(err, os.ErrDeadlineExceeded):
		s.peers.stats.timeouts.Add(1)
		return fmt.Errorf("connection with %s is dead, nothing moved for %s: %w",
			s.node, s.peers.limits.DeadAfter, trivet.ErrUnavailable)
	case errors.Is(err, trivet.ErrCorrupt):
		s.peers.stats.badFrames.Add(1)
		// The frame is what is corrupt, not what was asked for: hence not ErrCorrupt.
		return fmt.Errorf("connection with %s: %w: %w", s.node, err, trivet.ErrUnavailable)
	case errors.Is(err, io.EOF), errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.EPIPE):
		// A far end that closes the connection before it has read all resets it.
		return fmt.Errorf("connection with %s: %w: %w", s.node, errHungUp, trivet.ErrUnavailable)
	default:
		return fmt.Errorf("connection with %s: %w: %w", s.node, err, trivet.ErrUnavailable)
	}
}

// readLoop hands every message to handle until reading or handle fails, and ends the connection.
func (s *stream) readLoop(begin func(frame, int) (bool, error), handle func(frame) error) {
	defer s.peers.absent(s) // not when the handlers have returned too: that may be long after
	r := bufio.NewReaderSize(s.conn, readBufferBytes)
	if s.wire == nil {
		r = bufio.NewReaderSize(deadlineConn{s.conn, s.peers.limits.DeadAfter, s.heard}, ioBufferBytes)
	}
	s.in = newFrameReader(r, begin, s.peers.stats.received)
	for {
		f, err := s.in.next()
		if err == nil {
			err = handle(f)
		}
		if err != nil {
			s.fail(s.broken(err))
			return
		}
	}
}

// unexpected is the error for a frame that the far end must not send.
func unexpected(f frame) error {
	return fmt.Errorf("unexpected frame of type %d for request %d: %w", f.typ, f.id, trivet.ErrCorrupt)
}

// writeLoop writes what is queued and was not written at once, pings, and looks from time to time whether the far end
// may still take part. It returns when the connection ended.
func (s *stream) writeLoop() {
	limits := s.peers.limits
	recheck := time.NewTicker(limits.RecheckEvery)
	defer recheck.Stop()
	ping := time.NewTimer(s.peers.untilPing())
	defer ping.Stop()
	for {
		s.turn.Lock()
		_, err := s.writeQueued(true)
		s.turn.Unlock()
		if err != nil {
			s.fail(s.broken(err))
			return
		}
		select {
		case <-s.queue.wake:
		case <-ping.C:
			s.queue.trySend(laneUrgent, frame{typ: framePing}) // no room: the writing will show
			ping.Reset(s.peers.untilPing())
		case <-recheck.C:
			if err := s.recheck(); err != nil {
				s.fail(err)
				return
			}
		case <-s.ctx.Done():
			return
		}
	}
}

// writeNow writes what is queued on the goroutine that has just queued something, as far as that does not block: to
// wake another one for it costs more than a small message. What is left is for writeLoop.
func (s *stream) writeNow() {
	if !s.turn.TryLock() {
		s.queue.signal() // who writes may not have seen it
		return
	}
	all, err := s.writeQueued(false)
	s.turn.Unlock()
	switch {
	case err != nil:
		s.fail(s.broken(err))
	case !all || s.queue.waiting():
		s.queue.signal()
	}
}

// writeQueued writes everything that is queued and returns true; without wait, some of it, and none that would block.
// REQUIRES: turn.
func (s *stream) writeQueued(wait bool) (all bool, err error) {
	for written := 0; wait || written < writeNowBytesMax; {
		if s.wire != nil && s.wire.gathered() >= wireBufferBytes {
			if err := s.wire.flush(wait); err != nil || s.wire.gathered() > 0 {
				return false, err
			}
		}
		p := s.queue.pop()
		if p.of == nil {
			return s.flush(wait)
		}
		_, err := s.w.Write(p.bytes)
		written += len(p.bytes)
		s.peers.stats.sent(len(p.bytes))
		s.queue.done(p)
		if err != nil {
			return false, err
		}
	}
	_, err = s.flush(wait)
	return false, err
}

// flush hands everything that was written to the kernel, and reports whether it took it.
func (s *stream) flush(wait bool) (all bool, err error) {
	err = s.w.Flush()
	if err != nil || s.wire == nil {
		return true, err
	}
	err = s.wire.flush(wait)
	return s.wire.gathered() == 0, err
}

// recheck returns an error when the far end may no longer take part.
func (s *stream) recheck() error {
	node, err := s.peers.cfg.PeerNode(s.conn.ConnectionState())
	if err == nil && node != s.node {
		err = fmt.Errorf("it is node %s now", node)
	}
	if err != nil {
		s.peers.stats.refused.Add(1)
		return fmt.Errorf("connection with %s: no longer allowed: %w: %w", s.node, err, trivet.ErrUnavailable)
	}
	return nil
}

// deadlineConn gives every read and every piece of a write a deadline of its own, so that a slow
// connection lives as long as bytes move.
type deadlineConn struct {
	conn  net.Conn
	limit time.Duration
	heard func() // called for every read that brought something
}

// Read reads, with a deadline.
func (d deadlineConn) Read(b []byte) (int, error) {
	if err := d.conn.SetReadDeadline(time.Now().Add(d.limit)); err != nil {
		return 0, err
	}
	n, err := d.conn.Read(b)
	if n > 0 {
		d.heard()
	}
	return n, err
}

// Write writes all of b, each piece with a deadline.
func (d deadlineConn) Write(b []byte) (int, error) {
	written := 0
	for len(b) > 0 {
		if err := d.conn.SetWriteDeadline(time.Now().Add(d.limit)); err != nil {
			return written, err
		}
		n, err := d.conn.Write(b[:min(len(b), ioBufferBytes)])
		written += n
		if err != nil {
			return written, err
		}
		b = b[n:]
	}
	return written, nil
}
