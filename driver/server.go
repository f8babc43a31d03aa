package driver

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"

	"github.com/trivet-csi/trivet"
)

const (
	// socketNewPrefix and socketNewSuffix make the name under which a socket is bound before it is
	// given its mode. The dot keeps kubelet, which watches the directory of the registration socket,
	// from taking the name for a plugin (pluginwatcher/plugin_watcher.go, handleCreateEvent).
	socketNewPrefix = "."
	socketNewSuffix = ".new"

	// socketMode lets root only connect: kubelet and the sidecars run as root.
	socketMode = 0o600

	// pluginDirMode is that of kubelet's own folders.
	pluginDirMode = 0o750

	// streamsMax bounds the calls that one connection may have under way.
	streamsMax = 256

	// dialTimeout bounds the question whether somebody still listens on an old socket.
	dialTimeout = time.Second
)

// Server serves the three services on a socket from Open until Close, and registers them with the
// kubelet when it is told to.
type Server struct {
	log   *slog.Logger
	main  *socket
	stop  context.CancelFunc // ends what keeps the registration, and with it that
	kept  chan struct{}      // closed when it has ended
	ended error              // of the registration; set before kept is closed
}

// Open makes the socket and serves on it. A socket left behind by a dead process is replaced;
// ErrInUse when a live one listens there, ErrExists when the path is something else than a socket,
// ErrInvalid for a bad Config.
func Open(ctx context.Context, cfg Config) (*Server, error) {
	if err := cfg.Validate(); err != nil {
		return nil, fmt.Errorf("open csi server: %w", err)
	}
	cfg.Logger = orDiscard(cfg.Logger)
	g := grpc.NewServer(grpc.UnaryInterceptor(Intercept(cfg.Logger)), grpc.StreamInterceptor(InterceptStream(cfg.Logger)),
		grpc.MaxConcurrentStreams(streamsMax))
	registerController(g, cfg.Controller, &identityServer{
		version: cfg.Version, ready: func(context.Context) bool { return cfg.Ready() },
		snapshotTopology: cfg.SnapshotTopology,
	}, cfg.Node.Info().MaxVolumes)
	RegisterSnapshotMetadata(g, cfg.Changes)
	csi.RegisterNodeServer(g, newNodeServer(cfg.Node, cfg.Controller))
	s := &Server{log: cfg.Logger}
	err := makeFolder(&cfg)
	if err != nil {
		return nil, fmt.Errorf("open csi server: %w", err)
	}
	if s.main, err = serveSocket(ctx, g, cfg.Endpoint, cfg.StopTimeout, cfg.Logger); err != nil {
		return nil, fmt.Errorf("open csi server: %w", err)
	}
	s.log.InfoContext(ctx, "csi server listens", "endpoint", cfg.Endpoint)
	if cfg.RegisterDir == "" {
		return s, nil
	}
	r, err := register(ctx, &cfg)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open csi server: %w", err), s.main.close())
	}
	//nolint:forbidigo // the server's own lifetime, ended by Close
	life, stop := context.WithCancel(context.Background())
	s.stop, s.kept = stop, make(chan struct{})
	go func() {
		defer close(s.kept)
		s.ended = r.keep(life, &cfg)
	}()
	return s, nil
}

// makeFolder makes the folder of the socket below kubelet's plugins, which is the driver's to make. A
// folder anywhere else must be there.
func makeFolder(cfg *Config) error {
	path, err := socketPath(cfg.Endpoint)
	if err != nil || cfg.RegisterDir == "" {
		return err
	}
	return os.MkdirAll(filepath.Dir(path), pluginDirMode)
}

// RegisterController adds the Identity and Controller services to a gRPC server that has Intercept
// among its interceptors: that is how a server of the cluster answers a Proxy. ready and version are
// as in Config; maxVolumes bounds the volumes attached to one node, 0 = no bound.
func RegisterController(r grpc.ServiceRegistrar, c Controller, ready func() bool, version string, maxVolumes int64) {
	registerController(r, c, &identityServer{
		version: version, ready: func(context.Context) bool { return ready() },
	}, maxVolumes)
}

func registerController(r grpc.ServiceRegistrar, c Controller, id *identityServer, maxVolumes int64) {
	csi.RegisterIdentityServer(r, id)
	ctrl := newControllerServer(c, maxVolumes)
	csi.RegisterControllerServer(r, ctrl)
	csi.RegisterGroupControllerServer(r, &groupServer{ctrl: ctrl})
}

// Done is closed when the server has stopped serving, asked to or not.
func (s *Server) Done() <-chan struct{} { return s.main.done }

// Close stops accepting calls, waits up to StopTimeout for those under way, cuts off the rest and
// removes the sockets. It returns what made the server stop by itself, if anything did.
func (s *Server) Close() error {
	if s.stop != nil {
		s.stop() // first: kubelet then sends no new call
		<-s.kept
	}
	return errors.Join(s.ended, s.main.close())
}

// socket is a gRPC server on a unix socket.
type socket struct {
	path        string
	log         *slog.Logger
	grpc        *grpc.Server
	stopTimeout time.Duration
	done        chan struct{} // closed when serving has ended

	closeOnce sync.Once
	serveErr  error // set before done is closed
}

// serveSocket serves g on an endpoint until close.
func serveSocket(ctx context.Context, g *grpc.Server, endpoint string, stopTimeout time.Duration, log *slog.Logger,
) (*socket, error) {
	path, err := socketPath(endpoint)
	if err != nil {
		return nil, err
	}
	l, err := listen(ctx, path)
	if err != nil {
		return nil, err
	}
	s := &socket{path: path, log: log, grpc: g, stopTimeout: stopTimeout, done: make(chan struct{})}
	if s.stopTimeout == 0 {
		s.stopTimeout = stopTimeoutDefault
	}
	go func() {
		defer close(s.done)
		// ErrServerStopped: close was faster than this goroutine; the listener is closed all the same.
		if err := g.Serve(l); !errors.Is(err, grpc.ErrServerStopped) {
			s.serveErr = err
		}
	}()
	return s, nil
}

// close stops serving, as Server.Close says.
func (s *socket) close() error {
	s.closeOnce.Do(func() {
		timer := time.AfterFunc(s.stopTimeout, s.grpc.Stop)
		defer timer.Stop()
		s.grpc.GracefulStop()
		<-s.done
		// A failure is of no consequence: the next listen replaces it.
		if err := os.Remove(s.path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			s.log.Warn("remove csi socket", "path", s.path, keyErr, err)
		}
	})
	if s.serveErr != nil {
		return fmt.Errorf("serve on %s: %w", s.path, s.serveErr)
	}
	return nil
}

func orDiscard(log *slog.Logger) *slog.Logger {
	if log == nil {
		return slog.New(slog.DiscardHandler)
	}
	return log
}

// listen binds a socket of mode 0600 at path. It is bound under another name and renamed, so that
// nobody can connect before the mode is set, and a stale socket is replaced in one step.
func listen(ctx context.Context, path string) (net.Listener, error) {
	if err := checkStale(ctx, path); err != nil {
		return nil, err
	}
	name := filepath.Join(filepath.Dir(path), socketNewPrefix+filepath.Base(path)+socketNewSuffix)
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
