package blockdev

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/trivet-csi/trivet"
)

const (
	// nbdConnsMax connections are served at once; more are closed on arrival. Each has buffers
	// of its own, so that a client which stalls in mid-request starves nobody else.
	nbdConnsMax = 16

	// nbdHandshakeWait is how long a client may take to negotiate.
	nbdHandshakeWait = 10 * time.Second

	// nbdAcceptPause is how long to wait when the process is out of descriptors.
	nbdAcceptPause = 100 * time.Millisecond
)

// ServeNBD listens on a unix socket and serves dev under the name export, and as the default
// export, to NBD clients until ctx ends; then it returns nil, with all requests ended. The
// protocol is the fixed newstyle with simple replies; requests are whole 4 KiB blocks of at most
// 1 MiB. A client that breaks the protocol loses its connection; others do not notice.
//
// The socket is for this user only (mode 0600) and goes when ServeNBD returns. A socket that
// nobody listens on is replaced; with a listener it is ErrInUse, and anything else in its place
// is ErrExists. log may be nil.
func ServeNBD(ctx context.Context, socket, export string, dev trivet.Device, log *slog.Logger) error {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	if len(export) > nbdNameBytesMax {
		return fmt.Errorf("serve nbd: export name of %d bytes: %w", len(export), trivet.ErrInvalid)
	}
	ln, err := listenUnix(ctx, socket)
	if err != nil {
		return fmt.Errorf("serve nbd on %s: %w", socket, err)
	}
	log = log.With("component", "nbd", "volume", export)
	s := &nbdServer{export: nbdExport{name: export, device: dev}, log: log, slots: make(chan struct{}, nbdConnsMax)}
	defer context.AfterFunc(ctx, func() { _ = ln.Close() })() // Accept tells
	log.Info("nbd server listens", "socket", socket)
	if err := s.acceptLoop(ctx, ln); err != nil {
		return fmt.Errorf("serve nbd on %s: %w", socket, err)
	}
	return nil
}

// nbdServer serves one Device to several connections.
type nbdServer struct {
	export nbdExport
	log    *slog.Logger
	slots  chan struct{} // one token a connection
}

// acceptLoop serves connections until ctx ends or the listener fails, and waits for them.
func (s *nbdServer) acceptLoop(ctx context.Context, ln net.Listener) error {
	connCtx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	defer func() { _ = ln.Close() }() // removes the socket
	for {
		conn, err := ln.Accept()
		switch {
		case ctx.Err() != nil:
			if err == nil {
				_ = conn.Close() // it came too late
			}
			return nil
		case errors.Is(err, unix.EMFILE), errors.Is(err, unix.ENFILE), errors.Is(err, unix.ENOMEM):
			s.log.Warn("nbd server cannot accept now", "err", err)
			select {
			case <-time.After(nbdAcceptPause):
			case <-ctx.Done():
			}
			continue
		case err != nil:
			return fmt.Errorf("accept: %w", err)
		}
		select {
		case s.slots <- struct{}{}:
		default:
			s.log.Warn("nbd client refused: too many connections", "max", nbdConnsMax)
			_ = conn.Close() // nothing was written
			continue
		}
		wg.Go(func() {
			defer func() { <-s.slots }()
			s.handle(connCtx, conn)
		})
	}
}

// handle serves one connection to its end.
func (s *nbdServer) handle(ctx context.Context, conn net.Conn) {
	defer context.AfterFunc(ctx, func() { _ = conn.Close() })() // ends reads and writes
	err := s.serveConn(ctx, conn)
	_ = conn.Close() // may be closed already
	if err != nil && ctx.Err() == nil {
		s.log.Warn("nbd connection closed", "err", err)
	}
}

func (s *nbdServer) serveConn(ctx context.Context, conn net.Conn) error {
	if err := conn.SetDeadline(time.Now().Add(nbdHandshakeWait)); err != nil {
		return fmt.Errorf("set deadline: %w", err)
	}
	c := newNBDConn(conn, s.export.device)
	ready, err := s.export.negotiate(c.r, conn)
	if err != nil || !ready {
		return err
	}
	if err := conn.SetDeadline(time.Time{}); err != nil {
		return fmt.Errorf("clear deadline: %w", err)
	}
	if c.pool, err = newBufPool(nbdSmallN, nbdLargeN); err != nil {
		return err
	}
	return errors.Join(c.serve(ctx), c.pool.close())
}

// listenUnix listens on a unix socket of mode 0600. The folder is locked meanwhile, so that of
// two servers that find the same stale socket only one replaces it.
func listenUnix(ctx context.Context, socket string) (net.Listener, error) {
	dir, err := os.Open(filepath.Dir(socket))
	if err != nil {
		return nil, fmt.Errorf("open folder of the socket: %w", err)
	}
	defer func() { _ = dir.Close() }() // unlocks
	if err := unix.Flock(int(dir.Fd()), unix.LOCK_EX); err != nil {
		return nil, fmt.Errorf("lock folder of the socket: %w", err)
	}
	if err := removeStale(ctx, socket); err != nil {
		return nil, err
	}
	lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		var chmodErr error
		// Before bind: the socket file is born with this mode, never open for a moment.
		err := c.Control(func(fd uintptr) { chmodErr = unix.Fchmod(int(fd), 0o600) })
		return errors.Join(err, chmodErr)
	}}
	ln, err := lc.Listen(ctx, "unix", socket)
	if err != nil {
		return nil, fmt.Errorf("listen: %w", err)
	}
	return ln, nil
}

// removeStale removes the socket if nobody listens on it.
func removeStale(ctx context.Context, socket string) error {
	info, err := os.Lstat(socket)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("look for a stale socket: %w", err)
	}
	if info.Mode().Type() != os.ModeSocket {
		return fmt.Errorf("a file of mode %s is in its place: %w", info.Mode(), trivet.ErrExists)
	}
	conn, err := (&net.Dialer{}).DialContext(ctx, "unix", socket)
	if err == nil {
		_ = conn.Close() // nothing was written
		return fmt.Errorf("another process listens: %w", trivet.ErrInUse)
	}
	if !errors.Is(err, unix.ECONNREFUSED) {
		return fmt.Errorf("ask whether anybody listens: %w", err)
	}
	if err := os.Remove(socket); err != nil {
		return fmt.Errorf("remove stale socket: %w", err)
	}
	return nil
}
