// Package server is one `trivet server`: it opens the disks, the port, the catalogue, the node and
// CSI in order, wires them together and closes them in reverse. It decides nothing itself but how a
// server finds and joins its cluster (join.go); the administration API (admin.go) only translates.
//
// It guarantees that everything that listens on TCP demands a certificate of the own cluster, that a
// data directory is used by one process of one node, and that Close leaves no goroutine behind, nor any
// mount or loop device, except those that the next server is to go on with (Config.KeeperSocket).
package server

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/keepalive"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/api"
	"github.com/trivet-csi/trivet/controller"
	"github.com/trivet-csi/trivet/driver"
	"github.com/trivet-csi/trivet/internal/pki"
	"github.com/trivet-csi/trivet/internal/stage"
	"github.com/trivet-csi/trivet/node"
	"github.com/trivet-csi/trivet/node/blockdev"
	"github.com/trivet-csi/trivet/node/keeper"
	"github.com/trivet-csi/trivet/replication/raftgroup"
	"github.com/trivet-csi/trivet/replication/transport"
)

// metaDir is the catalogue's, in the data directory.
const metaDir = "meta"

// adminStreamsMax bounds the calls that one administration connection may have under way.
const adminStreamsMax = 64

// pingMin is the shortest pause between the keepalive pings of a client; faster ones are cut off.
const pingMin = 5 * time.Second

// Server is one running `trivet server`.
type Server struct {
	cfg     Config
	log     *slog.Logger
	cluster trivet.ClusterID
	creds   *pki.Credentials
	dir     *dataDir
	book    *addresses
	disks   []*node.Disk
	port    *port
	peers   *transport.Peers // nil when Config.Network is given
	network transport.Network
	mux     *raftgroup.Mux
	grpc    *grpc.Server
	stages  *stage.Registry
	metrics *metricsServer // nil without an address

	damaged    error // why the catalogue was not opened at the start; not changed afterwards
	catalogue  *controller.Catalogue
	controller *controller.Controller

	cancel context.CancelFunc // ends group
	group  errgroup.Group     // join loop, gRPC and the port

	calls    context.Context // of what a call does after its own has ended; ends with the catalogue
	endCalls context.CancelFunc

	joinMu sync.Mutex // one birth or joining at a time

	mu     sync.Mutex
	member *member // nil until the server is a member of a cluster
	closed bool
}

// member is what runs only on a member of a cluster.
type member struct {
	keeper *keeper.Client // nil without a socket
	node   *node.Node
	csi    *driver.Server // nil without an endpoint
}

// Open starts a server. It returns once the server listens and, if it was a member of a cluster
// before, once its replicas are starting; whether the cluster has a quorum is another matter. ctx
// bounds the start only.
func Open(ctx context.Context, cfg Config) (*Server, error) {
	if err := cfg.Validate(); err != nil {
		return nil, fmt.Errorf("server config: %w", err)
	}
	s := &Server{cfg: cfg, log: cfg.Logger.With("node", string(cfg.Node)), stages: stage.NewRegistry()}
	//nolint:forbidigo // ended by Close
	s.calls, s.endCalls = context.WithCancel(context.Background())
	if err := s.open(ctx); err != nil {
		return nil, errors.Join(fmt.Errorf("start server %s: %w", cfg.Node, err), s.Close())
	}
	return s, nil
}

func (s *Server) open(ctx context.Context) error {
	for _, step := range []func(context.Context) error{
		s.openIdentity, s.openDisks, s.openPort, s.openCatalogue,
	} {
		if err := step(ctx); err != nil {
			return err
		}
	}
	//nolint:forbidigo // the server's own lifetime, ended by Close
	life, cancel := context.WithCancel(context.Background())
	s.cancel = cancel
	s.group.Go(func() error { s.port.serve(); return nil })
	s.group.Go(func() error { return s.grpc.Serve(s.port.admin) })
	if s.catalogue.Opened() {
		if err := s.becomeMember(ctx); err != nil {
			return err
		}
	}
	s.group.Go(func() error { s.stayJoined(life); return nil })
	s.group.Go(func() error { s.learnAddresses(life); return nil })
	if err := s.openMetrics(ctx); err != nil {
		return err
	}
	mender := controller.NewMender(s.catalogue, s.cfg.Node, s.cfg.ReplaceAfter, s.log)
	s.group.Go(func() error { mender.Run(life); return nil })
	return nil
}

// openIdentity reads the certificate and takes the data directory.
func (s *Server) openIdentity(context.Context) error {
	creds, err := pki.Open(s.cfg.CertsDir, pki.RoleNode, s.log)
	if err != nil {
		return fmt.Errorf("%w; --certs names the folder with ca.crt, node.crt and node.key", err)
	}
	id := creds.Identity()
	if id.Name != string(s.cfg.Node) {
		return fmt.Errorf("the certificate in %s is of node %q, not of %q; give the right --node or --certs: %w",
			s.cfg.CertsDir, id.Name, s.cfg.Node, trivet.ErrInvalid)
	}
	s.creds, s.cluster = creds, id.Cluster
	if s.dir, err = openDataDir(s.cfg.DataDir, owner{Cluster: id.Cluster, Node: s.cfg.Node}); err != nil {
		return err
	}
	s.book, err = openAddresses(s.dir.join("addresses.json"))
	return err
}

// openDisks opens each disk, formatting an empty directory first.
func (s *Server) openDisks(context.Context) error {
	for _, dir := range s.cfg.Disks {
		dir, err := filepath.Abs(dir)
		if err != nil {
			return err
		}
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return fmt.Errorf("disk: %w", err)
		}
		cfg := node.DiskConfig{
			Dir: dir, Cluster: s.cluster, Node: s.cfg.Node, LogLanes: s.cfg.LogLanes,
			LogSegmentBytes: s.cfg.LogSegmentBytes, Logger: s.log, Fatal: s.cfg.Fatal,
		}
		if _, err := node.FormatDisk(cfg); err != nil && !errors.Is(err, trivet.ErrExists) {
			return err
		}
		d, err := node.OpenDisk(cfg)
		if err != nil {
			return err
		}
		s.disks = append(s.disks, d)
	}
	return nil
}

// openPort listens and makes the network between nodes.
func (s *Server) openPort(ctx context.Context) error {
	var lc net.ListenConfig
	l, err := lc.Listen(ctx, "tcp", s.cfg.Listen)
	if err != nil {
		return err
	}
	if _, port, err := net.SplitHostPort(s.cfg.Advertise); err == nil && port == "0" {
		s.cfg.Advertise = l.Addr().String()
	}
	s.port = &port{
		listener: l, peerALPN: transport.ALPN, admin: newConnListener(l.Addr()), log: s.log, conns: map[net.Conn]struct{}{},
		config: s.creds.ServerConfig(pki.Protocols{
			transport.ALPN: {pki.RoleNode}, alpnGRPC: {pki.RoleNode, pki.RoleClient},
		}),
	}
	s.grpc = grpc.NewServer(grpc.Creds(shaken{}), grpc.MaxConcurrentStreams(adminStreamsMax), grpc.WaitForHandlers(true),
		grpc.ChainUnaryInterceptor(authorizeUnary, driver.Intercept(s.log), s.membersOnly),
		grpc.ChainStreamInterceptor(authorizeStream, driver.InterceptStream(s.log)),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: pingMin, PermitWithoutStream: true}))
	api.RegisterAdminServer(s.grpc, &admin{s: s})
	if s.network = s.cfg.Network; s.network == nil {
		if err := s.openPeers(); err != nil {
			return err
		}
	}
	s.port.peer = s.servePeer
	return nil
}

// openCatalogue prepares the catalogue, and starts it if this server is a member already.
func (s *Server) openCatalogue(ctx context.Context) error {
	s.mux = raftgroup.NewMux(s.network)
	cat, err := controller.NewCatalogue(controller.CatalogueConfig{
		Node: s.cfg.Node, Cluster: s.cluster, Dir: s.dir.join(metaDir), Network: s.network, Mux: s.mux,
		Timing: s.cfg.Timing, Logger: s.log, Fatal: s.cfg.Fatal,
	})
	if err != nil {
		return err
	}
	s.catalogue, s.controller = cat, controller.New(cat)
	driver.RegisterController(s.grpc, s.controller, s.ready, s.cfg.Version, s.cfg.MaxVolumes)
	driver.RegisterSnapshotMetadata(s.grpc, changes{s})
	if !cat.Joined() {
		return nil
	}
	if err = cat.Open(ctx); errors.Is(err, trivet.ErrCorrupt) {
		// Its volumes need a catalogue, and this node can have one again: joinAt sets the damaged one aside.
		s.damaged = fmt.Errorf("the catalogue of this node, in %s, is damaged and is not used; the node joins anew when a "+
			"server of the cluster answers (--seed): %w", s.dir.join(metaDir), err)
		s.log.Error("the catalogue of this node is damaged", "err", s.damaged)
		return nil
	}
	return err
}

// ready reports whether CSI calls can be served.
func (s *Server) ready() bool { return s.started() && s.catalogue.Leader() != "" }

// becomeMember starts what only a member of a cluster runs. REQUIRES: the catalogue is open.
func (s *Server) becomeMember(ctx context.Context) error {
	cfg := node.DefaultConfig()
	cfg.ID, cfg.Address, cfg.Zone, cfg.Incarnation = s.cfg.Node, s.cfg.Advertise, s.cfg.Zone, trivet.NewUUID()
	cfg.Rack, cfg.MaxVolumes = s.cfg.Rack, s.cfg.MaxVolumes
	cfg.MetaReplica, cfg.Disks, cfg.Catalogue = s.catalogue.Replica(), s.disks, s.catalogue
	cfg.Network, cfg.Mux, cfg.Timing, cfg.IOTimeout = s.network, s.mux, s.cfg.Timing, s.cfg.IOTimeout
	cfg.OverlapFlush, cfg.Stages = s.cfg.OverlapFlush, s.stages
	cfg.Logger, cfg.Fatal, cfg.CatchUpBytesPerSecond = s.log, s.cfg.Fatal, s.cfg.CatchUpBytesPerSecond
	cfg.Lease = s.cfg.Lease
	if s.cfg.ParkAfter != 0 {
		cfg.ParkAfter = s.cfg.ParkAfter
	}
	if s.cfg.ScrubEvery != 0 {
		cfg.ScrubEvery = s.cfg.ScrubEvery
	}
	var err error
	if cfg.RunDir, err = filepath.Abs(s.cfg.RunDir); err != nil {
		return err
	}
	cfg.Cluster, cfg.CacheBytes, cfg.ReplayBytes = s.cluster, s.cfg.CacheBytes, s.cfg.ReplayBytes
	if s.cfg.CacheDir != CacheOff { // a folder of its own: other servers of this machine may share the directory
		cfg.CacheDir = filepath.Join(s.cfg.CacheDir, string(s.cluster), string(s.cfg.Node))
	}
	if cfg.Attach, err = blockdev.ParseKind(s.cfg.Attach); err != nil {
		return err
	}
	m := &member{}
	if s.cfg.KeeperSocket != "" {
		m.keeper = keeper.NewClient(s.cfg.KeeperSocket, s.cfg.StartKeeper, s.log)
	}
	cfg.Keeper, cfg.DetachOnStop = m.keeper, s.cfg.DetachOnStop
	if m.node, err = node.Open(ctx, cfg); err != nil {
		return errors.Join(err, m.close())
	}
	if s.cfg.CSI != "" {
		m.csi, err = driver.Open(ctx, driver.Config{
			Endpoint: s.cfg.CSI, RegisterDir: s.cfg.Register, Controller: s.controller, Node: m.node,
			Changes: changes{s}, Version: s.cfg.Version, Logger: s.log, Ready: s.ready,
			SnapshotTopology: s.cfg.SnapshotTopology,
		})
		if err != nil {
			return errors.Join(err, m.close())
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return errors.Join(trivet.ErrClosed, m.close())
	}
	s.member = m
	return nil
}

func (m *member) close() error {
	var errs []error
	if m.csi != nil {
		errs = append(errs, m.csi.Close())
	}
	if m.node != nil {
		errs = append(errs, m.node.Close())
	}
	if m.keeper != nil {
		m.keeper.Close()
	}
	return errors.Join(errs...)
}

// node returns the running node, or ErrUnavailable before the server is a member of a cluster.
func (s *Server) node() (*node.Node, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.member == nil && s.damaged != nil {
		return nil, fmt.Errorf("%v: %w", s.damaged, trivet.ErrUnavailable)
	}
	if s.member == nil {
		return nil, fmt.Errorf("node %s is not a member of a cluster yet; run `trivet cluster init` on one node, and give "+
			"the others a --seed: %w", s.cfg.Node, trivet.ErrUnavailable)
	}
	return s.member.node, nil
}

// Address returns the host:port under which other nodes reach this server.
func (s *Server) Address() string { return s.cfg.Advertise }

// Close stops the server: CSI first, then what is attached, the replicas, the catalogue, the port and
// the disks. It is idempotent and returns every error.
func (s *Server) Close() error {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return nil
	}
	s.closed = true
	m := s.member
	s.mu.Unlock()

	var errs []error
	if s.cancel != nil {
		s.cancel()
	}
	if m != nil {
		errs = append(errs, m.close())
	}
	var stopped sync.WaitGroup
	if s.grpc != nil { // it waits for calls, of which some go on until the catalogue is closed
		stopped.Go(s.grpc.Stop)
	}
	if s.metrics != nil {
		errs = append(errs, s.metrics.close())
	}
	if s.catalogue != nil {
		errs = append(errs, s.catalogue.Close())
	}
	s.endCalls()
	stopped.Wait()
	if s.peers != nil {
		errs = append(errs, s.peers.Close())
	}
	if s.port != nil {
		s.port.close()
	}
	if err := s.group.Wait(); err != nil && !errors.Is(err, grpc.ErrServerStopped) && !errors.Is(err, net.ErrClosed) {
		errs = append(errs, err)
	}
	for _, d := range s.disks {
		errs = append(errs, d.Close())
	}
	if s.dir != nil {
		errs = append(errs, s.dir.close())
	}
	return errors.Join(errs...)
}
