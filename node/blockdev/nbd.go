package blockdev

import (
	"bufio"
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
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
	// nbdClientsMax clients are served at once; more are refused at the end of their handshake. Each has
	// buffers of its own, so that a client which stalls in mid-request starves nobody else.
	nbdClientsMax = 16

	// nbdGreetedMax connections negotiate at once. Who they are is not known yet, so none of them may
	// keep others out: one more ends the oldest.
	nbdGreetedMax = 64

	// nbdHandshakeWait is how long a client may take to negotiate, TLS included.
	nbdHandshakeWait = 10 * time.Second

	// nbdAcceptPause is how long to wait when the process is out of descriptors.
	nbdAcceptPause = 100 * time.Millisecond
)

// NBDConfig says what to serve, and how it is called.
type NBDConfig struct {
	// Export is the export's name; clients may also ask for the default export.
	Export string

	// Device to serve. The caller keeps it open until ServeNBD has returned. If it is an Allocator,
	// block status tells clients what is not allocated.
	Device trivet.Device

	// ReadOnly refuses, with EPERM, whatever changes the Device.
	ReadOnly bool

	// TLS is what clients must start before anything else; it decides who may. Nil: without TLS, which
	// only a unix socket may do.
	TLS *tls.Config

	// Logger; nil discards.
	Logger *slog.Logger

	wait time.Duration // for a handshake; 0 = nbdHandshakeWait
}

// ServeNBD serves a Device to the NBD clients of a listener until ctx ends; then it returns nil, with
// all requests ended. It closes ln in any case. ErrInvalid for a configuration that cannot be.
//
// The protocol is the fixed newstyle with structured replies, extended headers, base:allocation and
// TLS as clients like it. Requests are whole 4 KiB blocks, reads and writes of at most 32 MiB. A client
// that breaks the protocol, or stalls within a request, loses its connection; others do not notice.
func ServeNBD(ctx context.Context, ln net.Listener, cfg NBDConfig) error {
	defer ln.Close() //nolint:errcheck // at the latest; acceptLoop reports
	switch {
	case len(cfg.Export) > nbdNameBytesMax:
		return fmt.Errorf("serve nbd: export name of %d bytes: %w", len(cfg.Export), trivet.ErrInvalid)
	case cfg.TLS == nil && ln.Addr().Network() != "unix":
		return fmt.Errorf("serve nbd at %s: without tls on a network: %w", ln.Addr(), trivet.ErrInvalid)
	}
	log := cfg.Logger
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	s := &nbdServer{
		export: nbdExport{name: cfg.Export, device: cfg.Device, readOnly: cfg.ReadOnly}, tls: cfg.TLS,
		log:   log.With("component", "nbd", "volume", cfg.Export),
		slots: make(chan struct{}, nbdClientsMax), wait: cfg.wait,
	}
	defer context.AfterFunc(ctx, func() { _ = ln.Close() })() // Accept tells
	s.log.Info("nbd server listens", "address", ln.Addr().String(), "tls", cfg.TLS != nil)
	if err := s.acceptLoop(ctx, ln); err != nil {
		return fmt.Errorf("serve nbd on %s: %w", ln.Addr(), err)
	}
	return nil
}

// nbdServer serves one Device to several connections.
type nbdServer struct {
	export nbdExport
	tls    *tls.Config
	log    *slog.Logger
	slots  chan struct{} // one token a client
	wait   time.Duration // for a handshake; 0 = nbdHandshakeWait

	mu      sync.Mutex
	greeted []net.Conn // that negotiate; the oldest first
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
		s.greet(conn)
		wg.Go(func() { s.handle(connCtx, conn) })
	}
}

// greet notes that conn negotiates, at the expense of the oldest if there are too many.
func (s *nbdServer) greet(conn net.Conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.greeted) == nbdGreetedMax {
		s.log.Warn("nbd client in its handshake dropped: too many", "max", nbdGreetedMax)
		_ = s.greeted[0].Close() // its goroutine notices
		s.greeted = append(s.greeted[:0], s.greeted[1:]...)
	}
	s.greeted = append(s.greeted, conn)
}

// ungreet notes that conn does not negotiate any more.
func (s *nbdServer) ungreet(conn net.Conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i, c := range s.greeted {
		if c == conn {
			s.greeted = append(s.greeted[:i], s.greeted[i+1:]...)
			return
		}
	}
}

// admit takes the token of a client.
func (s *nbdServer) admit() error {
	select {
	case s.slots <- struct{}{}:
		return nil
	default:
		return fmt.Errorf("%d clients are connected, the most there may be: %w", nbdClientsMax, trivet.ErrUnavailable)
	}
}

// handle serves one connection to its end.
func (s *nbdServer) handle(ctx context.Context, conn net.Conn) {
	defer context.AfterFunc(ctx, func() { _ = conn.Close() })() // ends reads and writes
	err := s.serveConn(ctx, conn)
	_ = conn.Close() // may be closed already
	if err != nil && ctx.Err() == nil {
		s.log.Warn("nbd connection closed", "client", conn.RemoteAddr().String(), "err", err)
	}
}

func (s *nbdServer) serveConn(ctx context.Context, conn net.Conn) error {
	defer s.ungreet(conn)
	if err := conn.SetDeadline(time.Now().Add(cmp.Or(s.wait, nbdHandshakeWait))); err != nil {
		return fmt.Errorf("set deadline: %w", err)
	}
	stream, r := conn, bufio.NewReaderSize(conn, nbdReaderBytes)
	admitted := false
	h := &nbdHandshake{export: &s.export, rw: readWriter{r, conn}, admit: func() error {
		if err := s.admit(); err != nil {
			return err
		}
		admitted = true
		return nil
	}}
	if s.tls != nil {
		h.startTLS = func() (io.ReadWriter, error) {
			if n := r.Buffered(); n > 0 { // said in the open, before TLS: it may be anybody's
				return nil, fmt.Errorf("%d bytes before the tls handshake: %w", n, trivet.ErrInvalid)
			}
			secure := tls.Server(conn, s.tls)
			if err := secure.HandshakeContext(ctx); err != nil {
				return nil, err
			}
			stream = secure
			r.Reset(secure)
			return readWriter{r, secure}, nil
		}
	}
	ready, err := h.negotiate()
	if admitted {
		defer func() { <-s.slots }()
	}
	if err != nil || !ready {
		return err
	}
	s.ungreet(conn)
	if err := conn.SetDeadline(time.Time{}); err != nil {
		return fmt.Errorf("clear deadline: %w", err)
	}
	c := newNBDConn(stream, r, &s.export, h)
	if c.pool, err = newBufPool(nbdSmallN, nbdLargeN); err != nil {
		return err
	}
	return errors.Join(c.serve(ctx), c.pool.close())
}

// readWriter reads from one place and writes to another.
type readWriter struct {
	io.Reader
	io.Writer
}

// ListenNBD listens on a unix socket for ServeNBD. The socket is for this user only (mode 0600) and
// goes when the listener is closed. A socket that nobody listens on is replaced; with a listener it is
// ErrInUse, and anything else in its place is ErrExists.
func ListenNBD(ctx context.Context, socket string) (net.Listener, error) {
	ln, err := listenUnix(ctx, socket)
	if err != nil {
		return nil, fmt.Errorf("listen for nbd on %s: %w", socket, err)
	}
	return ln, nil
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
