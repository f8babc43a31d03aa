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
	"time"

	"github.com/trivet-csi/trivet"
)

// ioBufferBytes is the size of the buffers that gather small frames, and the most that is written
// under one deadline.
const ioBufferBytes = 64 << 10

// errHungUp is part of the cause when the far end closed the connection between two frames.
var errHungUp = errors.New("closed by the far end")

// stream is what both ends of a connection have in common: a queue and a goroutine for writing,
// deadlines that tell a dead connection from an idle one, and one way to end.
type stream struct {
	peers *Peers
	node  trivet.NodeID // at the far end, by its certificate
	conn  *tls.Conn
	queue *sendQueue
	in    *frameReader // of the goroutine in readLoop
	began time.Time

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
	return s
}

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
	case errors.Is(err, io.EOF):
		return fmt.Errorf("connection with %s: %w: %w", s.node, errHungUp, trivet.ErrUnavailable)
	default:
		return fmt.Errorf("connection with %s: %w: %w", s.node, err, trivet.ErrUnavailable)
	}
}

// readLoop hands every message to handle until reading or handle fails, and ends the connection.
func (s *stream) readLoop(begin func(frame, int) (bool, error), handle func(frame) error) {
	defer s.peers.absent(s) // not when the handlers have returned too: that may be long after
	heard := func() { s.peers.live.heard(s.record, s.incarnation) }
	r := bufio.NewReaderSize(deadlineConn{s.conn, s.peers.limits.DeadAfter, heard}, ioBufferBytes)
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

// writeLoop writes what is queued, pings, and looks from time to time whether the far end may still
// take part. It returns when the connection ended.
func (s *stream) writeLoop() {
	limits := s.peers.limits
	w := bufio.NewWriterSize(deadlineConn{s.conn, limits.DeadAfter, nil}, ioBufferBytes)
	recheck := time.NewTicker(limits.RecheckEvery)
	defer recheck.Stop()
	ping := time.NewTicker(limits.PingEvery)
	defer ping.Stop()
	for {
		if err := s.writeQueued(w); err != nil {
			s.fail(s.broken(err))
			return
		}
		select {
		case <-s.queue.wake:
		case <-ping.C:
			s.queue.trySend(laneUrgent, frame{typ: framePing}) // no room: the writing will show
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

// writeQueued writes everything that is queued.
func (s *stream) writeQueued(w *bufio.Writer) error {
	for {
		p := s.queue.pop()
		if p.of == nil {
			return w.Flush()
		}
		_, err := w.Write(p.bytes)
		s.peers.stats.sent(len(p.bytes))
		s.queue.done(p)
		if err != nil {
			return err
		}
	}
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
