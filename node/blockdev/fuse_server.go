package blockdev

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/node/keeper"
)

const (
	// fuseWorkersN requests may wait in the Device at once: all that the kernel keeps in flight,
	// and a few for what it does not count, such as FSYNC.
	fuseWorkersN = maxBackground + 4

	// fuseQueueN requests more are taken from the kernel before the reader stops.
	fuseQueueN = 8

	fuseSmallN = fuseWorkersN + fuseQueueN
	fuseLargeN = 12 // long requests in flight, one of them being read
)

// errAborted is why an attachment is dead whose connection the kernel or an administrator cut.
var errAborted = errors.New("fuse connection was aborted")

// fuseServer answers the kernel's requests to the one file. One goroutine reads; it answers
// what needs no Device itself and hands the rest to a fixed number of workers, so a request
// that waits, for up to a minute, never keeps the reader from the next.
//
// The reader sits in the runtime's poller. A blocking raw read on a locked thread was measured
// to be quicker, but it stops the garbage collector, and with it the whole process, until the
// next request comes; as an ordinary system call it costs two thread switches a request.
type fuseServer struct {
	conn    *os.File // /dev/fuse, non-blocking, for reading
	replyFD int      // a duplicate of its descriptor for replies; lives until the workers have ended
	device  trivet.Device
	shared  bool // see Config; set before start
	log     *slog.Logger
	pool    *bufPool

	queue  chan fuseTask
	inited chan struct{} // closed when the kernel's INIT is answered
	ended  chan struct{} // closed when the connection is gone and all goroutines have ended
	cancel context.CancelCauseFunc

	facts keeper.Facts // set before inited is closed; of the owner alone afterwards

	opensN   atomic.Int64 // open descriptors of the file
	repeated atomic.Uint64
	refused  atomic.Uint64
	stopOnce sync.Once
	stopping atomic.Bool // the end of the connection is our own wish
	leaving  atomic.Bool // what we do not answer, another process will
	muted    atomic.Bool // nothing is answered any more
	failed   atomic.Pointer[error]
}

// fuseTask is a request on its way to a worker.
type fuseTask struct {
	req fuseRequest
	buf *buffer // data of a WRITE; nil otherwise
}

// newFuseServer takes over fd, an open /dev/fuse in non-blocking mode, also when it fails. Call
// start to serve it.
func newFuseServer(fd int, dev trivet.Device, buffers *Buffers, log *slog.Logger) (*fuseServer, error) {
	conn := os.NewFile(uintptr(fd), fusePath)
	replyFD, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		_ = conn.Close() // nothing was written
		return nil, fmt.Errorf("duplicate fuse connection: %w", err)
	}
	pool, err := buffers.newPool()
	if err != nil {
		_, _ = conn.Close(), unix.Close(replyFD) // nothing was written
		return nil, err
	}
	return &fuseServer{
		conn: conn, replyFD: replyFD, device: dev, log: log, pool: pool,
		queue: make(chan fuseTask, fuseQueueN), inited: make(chan struct{}), ended: make(chan struct{}),
	}, nil
}

// start begins to serve. The goroutines end when the connection does: see stop.
func (s *fuseServer) start(ctx context.Context) {
	ctx, s.cancel = context.WithCancelCause(ctx)
	var wg sync.WaitGroup
	for range fuseWorkersN {
		wg.Go(func() {
			for t := range s.queue {
				s.serve(ctx, t)
				s.pool.put(t.buf)
			}
		})
	}
	go func() {
		err := s.readLoop(ctx)
		if !s.stopping.Load() {
			s.fail(err)
		}
		if !s.leaving.Load() {
			s.cancel(err)
		}
		close(s.queue)
		wg.Wait()
		close(s.ended)
	}()
}

// stop closes the connection, which fails what the kernel still waits for, ends the requests in
// the Device and waits for all goroutines. Further calls do nothing.
func (s *fuseServer) stop() (err error) {
	s.stopping.Store(true)
	s.stopOnce.Do(func() {
		err = s.conn.Close() // the reader wakes
		if s.cancel != nil { // started
			s.cancel(trivet.ErrClosed)
			<-s.ended
		}
		err = errors.Join(err, unix.Close(s.replyFD), s.pool.close())
	})
	return err
}

// err returns why the attachment is dead, or nil.
func (s *fuseServer) err() error {
	if p := s.failed.Load(); p != nil {
		return *p
	}
	return nil
}

// fail makes every later request fail with EIO. The first reason stays.
func (s *fuseServer) fail(err error) {
	if s.failed.CompareAndSwap(nil, &err) {
		s.log.Warn("attachment is dead, all further requests fail", "err", err)
	}
}

// readLoop reads requests until the connection ends, and returns why it did.
func (s *fuseServer) readLoop(ctx context.Context) error {
	inline := make([]byte, fuseInlineBytes)
	buf, err := s.pool.get(ctx, requestBytesMax)
	if err != nil {
		return err
	}
	defer func() { s.pool.put(buf) }()
	for {
		n, err := s.read(buf.withHeader(fuseWriteHead, requestBytesMax))
		if err != nil {
			return err
		}
		req, err := decodeFuse(buf.withHeader(fuseWriteHead, requestBytesMax)[:n])
		if errors.Is(err, trivet.ErrCorrupt) {
			return err
		} else if err != nil {
			s.log.Warn("fuse request refused", "err", err)
			s.reply(inline[:fuseReplyBytes], req.unique, toErrno(err))
			continue
		}
		switch {
		case req.resent() && !s.mayRepeat(req):
			s.reply(inline[:fuseReplyBytes], req.unique, unix.EIO)
		case req.toDevice():
			buf, err = s.handOver(ctx, req, buf)
			if err != nil {
				return err
			}
		default:
			s.answer(inline, req)
		}
	}
}

// read reads one request into b.
func (s *fuseServer) read(b []byte) (int, error) {
	for {
		n, err := s.conn.Read(b)
		switch {
		case err == nil:
			return n, nil
		case errors.Is(err, unix.ENOENT): // the request was withdrawn while we took it
		case errors.Is(err, unix.ENODEV):
			return 0, errAborted
		default: // os.ErrClosed after stop
			return 0, fmt.Errorf("read fuse request: %w", err)
		}
	}
}

// handOver queues a request for the workers and returns the buffer to read the next one into.
// Short data are copied, so that the long buffers serve long requests only.
func (s *fuseServer) handOver(ctx context.Context, req fuseRequest, buf *buffer) (*buffer, error) {
	next, t := buf, fuseTask{req: req}
	t.req.data = nil
	if req.op == opWrite {
		other, err := s.pool.get(ctx, req.lenBytes)
		switch {
		case err != nil:
			return buf, err
		case other.small:
			copy(other.payload(req.lenBytes), req.data)
			t.buf = other
		default:
			t.buf, next = buf, other
		}
	}
	s.queue <- t // workers only end after the reader
	return next, nil
}

// answer handles a request that needs no Device. It never blocks.
func (s *fuseServer) answer(b []byte, req fuseRequest) {
	clear(b)
	body := b[fuseReplyBytes:]
	n, errno := 0, unix.Errno(0)
	switch req.op {
	case opForget, opBatchForget: // have no reply
		return
	case opInit:
		if req.major != fuseMajor {
			errno = unix.EPROTO
			break
		}
		n = putInit(body, req)
		s.reply(b[:fuseReplyBytes+n], req.unique, 0)
		s.initDone(req, factsOf(body))
		return
	case opGetattr:
		n = putAttr(body, s.device.Size())
	case opSetattr:
		if req.mode&^setattrTimes != 0 {
			errno = unix.EPERM
			break
		}
		n = putAttr(body, s.device.Size())
	case opOpen:
		s.opensN.Add(1)
		n = putOpen(body)
	case opRelease:
		s.opensN.Add(-1)
	case opStatfs:
		n = putStatfs(body, s.device.Size())
	case opFlush, opDestroy, opAccess:
	default: // INTERRUPT too: on ENOSYS the kernel sends no more, and waits for the request itself
		errno = unix.ENOSYS
	}
	s.reply(b[:fuseReplyBytes+n], req.unique, errno)
}

func (s *fuseServer) initDone(req fuseRequest, facts keeper.Facts) {
	select {
	case <-s.inited:
		s.log.Warn("kernel sent a second fuse init")
	default:
		s.facts = facts
		close(s.inited)
	}
	s.log.Debug("fuse connection is up", "minor", req.minor, "async_dio", req.flags&initAsyncDIO != 0)
}

// serve handles a request to the Device and replies.
func (s *fuseServer) serve(ctx context.Context, t fuseTask) {
	var err error
	var n int64
	buf := t.buf
	if err = s.err(); err == nil {
		if buf == nil {
			buf, err = s.pool.get(ctx, readBytes(t.req))
			defer s.pool.put(buf)
		}
		if err == nil {
			n, err = s.do(ctx, t.req, buf)
		}
		if errors.Is(err, trivet.ErrFenced) {
			s.fail(err)
		}
	}
	if err != nil {
		s.logRequest(t.req, err)
		// EIO for all once dead; and there may be no buffer, if that was the error.
		var head [fuseReplyBytes]byte
		errno := toErrno(err)
		if s.err() != nil {
			errno = unix.EIO
		}
		s.reply(head[:], t.req.unique, errno)
		return
	}
	s.reply(buf.withHeader(fuseReplyBytes, n), t.req.unique, 0)
}

// do carries out a request; buf holds its data, or receives them. It returns the length of the
// reply's payload.
func (s *fuseServer) do(ctx context.Context, r fuseRequest, buf *buffer) (int64, error) {
	switch r.op {
	case opRead:
		n := min(r.lenBytes, max(s.device.Size()-r.offBytes, 0)) // a read across the end is short
		if n == 0 {
			return 0, nil
		}
		return n, s.device.ReadAt(ctx, buf.payload(n), r.offBytes)
	case opWrite:
		if err := s.device.WriteAt(ctx, buf.payload(r.lenBytes), r.offBytes); err != nil {
			return 0, err
		}
		clear(buf.payload(fuseReplyBytes))
		return int64(putWritten(buf.payload(fuseReplyBytes), r.lenBytes)), nil
	case opFsync:
		return 0, s.device.Flush(ctx)
	case opFallocate:
		switch r.mode {
		case fallocDiscard:
			return 0, s.device.Discard(ctx, r.offBytes, r.lenBytes)
		case fallocZero:
			return 0, s.device.WriteZeroes(ctx, r.offBytes, r.lenBytes)
		}
		return 0, fmt.Errorf("fallocate mode %#x: %w", r.mode, trivet.ErrInvalid)
	}
	return 0, fmt.Errorf("fuse opcode %d: %w", r.op, trivet.ErrInvalid)
}

func readBytes(r fuseRequest) int64 {
	if r.op == opRead {
		return r.lenBytes
	}
	return 0
}

func (s *fuseServer) logRequest(r fuseRequest, err error) {
	s.log.Debug("request failed", "opcode", r.op, "off", r.offBytes, "len", r.lenBytes, "err", err)
}

// reply completes the header in front of b and sends it. A reply never blocks: the kernel
// copies it to pages that wait for it.
func (s *fuseServer) reply(b []byte, unique uint64, errno unix.Errno) {
	if s.muted.Load() {
		return
	}
	if errno != 0 {
		b = b[:fuseReplyBytes]
	}
	putFuseHeader(b, len(b), uint32(errno), unique)
	for {
		_, err := unix.Write(s.replyFD, b)
		switch {
		case err == unix.EINTR:
			continue
		case err == nil, err == unix.ENOENT: // ENOENT: the request was withdrawn or aborted
			return
		case err == unix.ENODEV, s.stopping.Load(): // the reader sees it too
			return
		case errno != unix.EIO: // a reply the kernel finds fault with: do not leave it waiting
			s.log.Error("fuse reply refused", "err", err)
			errno, b = unix.EIO, b[:fuseReplyBytes]
			putFuseHeader(b, len(b), uint32(errno), unique)
		default:
			return
		}
	}
}
