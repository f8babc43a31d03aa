package driver

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"

	"github.com/trivet-csi/trivet"
)

const (
	// socketNewSuffix makes the name under which the socket is bound before it is given its mode.
	socketNewSuffix = ".new"

	// socketMode lets root only connect: kubelet and the sidecars run as root.
	socketMode = 0o600

	// streamsMax bounds the calls that one connection may have under way.
	streamsMax = 256

	// dialTimeout bounds the question whether somebody still listens on an old socket.
	dialTimeout = time.Second
)

// Server serves the three services on a socket from Open until Close.
type Server struct {
	cfg  Config
	path string
	log  *slog.Logger
	grpc *grpc.Server
	done chan struct{} // closed when serving has ended

	calls atomic.Uint64

	closeOnce sync.Once
	serveErr  error // set before done is closed
}

// Open makes the socket and serves on it. A socket left behind by a dead process is replaced;
// ErrInUse when a live one listens there, ErrExists when the path is something else than a socket,
// ErrInvalid for a bad Config.
func Open(ctx context.Context, cfg Config) (*Server, error) {
	if err := cfg.Validate(); err != nil {
		return nil, fmt.Errorf("open csi server: %w", err)
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.StopTimeout == 0 {
		cfg.StopTimeout = stopTimeoutDefault
	}
	path, err := socketPath(cfg.Endpoint)
	if err != nil {
		return nil, fmt.Errorf("open csi server: %w", err)
	}
	s := &Server{cfg: cfg, path: path, log: cfg.Logger, done: make(chan struct{})}
	s.grpc = grpc.NewServer(grpc.UnaryInterceptor(s.intercept), grpc.MaxConcurrentStreams(streamsMax))
	csi.RegisterIdentityServer(s.grpc, &identityServer{version: cfg.Version, ready: cfg.Ready})
	csi.RegisterControllerServer(s.grpc, newControllerServer(cfg.Controller, cfg.Node.Info().MaxVolumes))
	csi.RegisterNodeServer(s.grpc, newNodeServer(cfg.Node))
	l, err := listen(ctx, path)
	if err != nil {
		return nil, fmt.Errorf("open csi server: %w", err)
	}
	go func() {
		defer close(s.done)
		// ErrServerStopped: Close was faster than this goroutine; the listener is closed all the same.
		if err := s.grpc.Serve(l); !errors.Is(err, grpc.ErrServerStopped) {
			s.serveErr = err
		}
	}()
	s.log.InfoContext(ctx, "csi server listens", "endpoint", cfg.Endpoint)
	return s, nil
}

// Done is closed when the server has stopped serving, asked to or not.
func (s *Server) Done() <-chan struct{} { return s.done }

// Close stops accepting calls, waits up to StopTimeout for those under way, cuts off the rest and
// removes the socket. It returns what made the server stop by itself, if anything did.
func (s *Server) Close() error {
	s.closeOnce.Do(func() {
		timer := time.AfterFunc(s.cfg.StopTimeout, s.grpc.Stop)
		defer timer.Stop()
		s.grpc.GracefulStop()
		<-s.done
		s.removeSocket()
	})
	if s.serveErr != nil {
		return fmt.Errorf("serve csi on %s: %w", s.path, s.serveErr)
	}
	return nil
}

// removeSocket leaves nothing behind. A failure is of no consequence: the next Open replaces it.
func (s *Server) removeSocket() {
	if err := os.Remove(s.path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		s.log.Warn("remove csi socket", keyErr, err)
	}
}

// listen binds a socket of mode 0600 at path. It is bound under another name and renamed, so that
// nobody can connect before the mode is set, and a stale socket is replaced in one step.
func listen(ctx context.Context, path string) (net.Listener, error) {
	if err := checkStale(ctx, path); err != nil {
		return nil, err
	}
	name := path + socketNewSuffix
	if err := os.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("remove left-over socket: %w", err)
	}
	l, err := (&net.ListenConfig{}).Listen(ctx, "unix", name)
	if err != nil {
		return nil, err // names operation and path
	}
	if u, ok := l.(*net.UnixListener); ok {
		u.SetUnlinkOnClose(false) // it would unlink the name it was bound under
	}
	err = os.Chmod(name, socketMode)
	if err == nil {
		err = os.Rename(name, path)
	}
	if err != nil {
		return nil, errors.Join(err, l.Close(), os.Remove(name))
	}
	return l, nil
}

// checkStale returns nil when path is free or a socket on which nobody listens.
func checkStale(ctx context.Context, path string) error {
	info, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if info.Mode().Type() != fs.ModeSocket {
		return fmt.Errorf("%s is not a socket, it is left alone: %w", path, trivet.ErrExists)
	}
	conn, err := (&net.Dialer{Timeout: dialTimeout}).DialContext(ctx, "unix", path)
	if errors.Is(err, syscall.ECONNREFUSED) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("find out whether %s is in use: %w", path, err)
	}
	return errors.Join(fmt.Errorf("another process listens on %s: %w", path, trivet.ErrInUse), conn.Close())
}
