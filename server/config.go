package server

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"path/filepath"
	"strings"
	"time"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/cache"
	"github.com/trivet-csi/trivet/controller"
	"github.com/trivet-csi/trivet/node"
	"github.com/trivet-csi/trivet/node/blockdev"
	"github.com/trivet-csi/trivet/replication"
	"github.com/trivet-csi/trivet/replication/raftgroup"
	"github.com/trivet-csi/trivet/replication/transport"
)

// RunDirName is the run directory below DataDir, unless Config.RunDir says otherwise.
const RunDirName = "run"

// Config is what a server is told. DefaultConfig fills in what has a default.
type Config struct {
	Node      trivet.NodeID // name of this machine; must be the one in its certificate
	Zone      string        // failure domain, optional
	Rack      string        // failure domain within the zone, optional
	DataDir   string        // the server's own state: identity, catalogue, addresses
	Disks     []string      // directories that keep replicas; default DataDir/disk
	Listen    string        // host:port of the one TCP port; port 0 picks one (tests)
	Advertise string        // host:port under which the other nodes reach it; default: Listen's
	CertsDir  string        // folder with ca.crt, node.crt and node.key
	Seeds     []string      // host:port of other servers, to find the cluster by
	CSI       string        // unix:// endpoint of the CSI services; empty = none
	Register  string        // kubelet's plugins_registry, to register CSI there; empty = no registration
	Version   string        // of the binary, as CSI reports it
	RunDir    string        // FUSE mount points and records of what is attached; default DataDir/run

	// MaxVolumes bounds the volumes attached to a node through CSI at a time; 0 = as many as its kernel makes devices.
	MaxVolumes int64
	// SnapshotTopology is that of driver.Config; no flag sets it.
	SnapshotTopology bool

	// Attach is the kind of the kernel devices of volumes, as blockdev.ParseKind reads it.
	Attach string
	// KeeperSocket is that of the keeper, by which kernel devices outlive this server; empty = none. StartKeeper,
	// unless nil, is called when no keeper answers there, and starts one.
	KeeperSocket string
	StartKeeper  func() error
	// DetachOnStop makes Close take every volume off the machine; by default a device that survives stays
	// for the next server.
	DetachOnStop bool
	// CacheDir is where writeBack volumes keep what is acknowledged and not committed yet, so that it outlives this
	// process: it must be on a tmpfs that outlives it too. CacheOff: there is none, such volumes are written through.
	CacheDir string
	// CacheBytes bounds the caches of all volumes together, from 512 KiB; 0 = none.
	CacheBytes int64
	// ReplayBytes bounds the overlays of all volumes together that are attached here to be read, into which their
	// journals are replayed; 0 = 256 MiB, else at least 4 MiB.
	ReplayBytes int64

	// LogLanes and LogSegmentBytes are the shape of the logs on disks that this server formats; 0 = by the
	// size of the disk (node.DiskConfig). Throw-away clusters take less, to start faster.
	LogLanes        int
	LogSegmentBytes int64

	// MetricsAddr is host:port of an HTTP listener without TLS that answers GET /metrics for Prometheus, and nothing
	// else; empty = none. What it tells are numbers, names of volumes and nodes: neither contents nor secrets.
	MetricsAddr string

	// Timing of every Raft group. The zero value takes raftgroup's defaults.
	Timing raftgroup.Timing
	// IOTimeout bounds how long one request waits for a leader; 0 = 60 s.
	IOTimeout time.Duration

	// ParkAfter is how long the replicas of a detached volume run on; 0 = 30 s, negative = for good.
	ParkAfter time.Duration
	// Lease is that of node.Config; no flag sets it.
	Lease time.Duration
	// ScrubEvery is how often each volume is read and compared on all its replicas; 0 = 7 days, negative = only when
	// asked.
	ScrubEvery time.Duration

	// OverlapFlush lets a leader send entries while its own disk still flushes them; nothing is acknowledged or applied
	// before it is as durable as without (docs/decisions/0012).
	OverlapFlush bool
	// CatchUpBytesPerSecond bounds what all replicas of this node together pull from other nodes, when they
	// were away for longer than a log keeps, or are new; 0 = no limit, else at least 64 KiB. The catalogue,
	// which is small, is not counted.
	CatchUpBytesPerSecond int64
	// ReplaceAfter is how long a node may be dead, or a disk away, before its replicas are replaced by new
	// ones elsewhere; 0 = 10 min. It counts on the node that leads the catalogue.
	ReplaceAfter time.Duration

	// Network replaces the TLS connections between nodes, in tests of three servers in one process.
	// The administration port stays as it is. Nil = TLS.
	Network transport.Network
	Logger  *slog.Logger // nil = silent
	// Fatal is called when going on would risk data: an I/O error of a disk, a broken invariant. It
	// should end the process. Required.
	Fatal func(error)
}

// CacheOff is the CacheDir of a server that keeps no write-back caches.
const CacheOff = "off"

const (
	cacheDirDefault   = "/dev/shm/trivet"
	cacheBytesDefault = 256 << 20
)

// DefaultConfig returns a Config with every default that does not depend on another field.
func DefaultConfig() Config {
	return Config{
		Listen: "0.0.0.0:7400", IOTimeout: time.Minute, Version: "unknown", Logger: slog.New(slog.DiscardHandler),
		ReplaceAfter: controller.DefaultReplaceAfter, Attach: string(blockdev.KindAuto),
		CacheDir: cacheDirDefault, CacheBytes: cacheBytesDefault, OverlapFlush: true,
	}
}

// Validate fills in the defaults that depend on other fields and returns ErrInvalid, naming the
// field, when something is missing or malformed.
func (c *Config) Validate() error {
	if err := trivet.ValidateNodeID(string(c.Node)); err != nil {
		return fmt.Errorf("node: %w", err)
	}
	if c.DataDir == "" {
		return fmt.Errorf("data directory is missing: %w", trivet.ErrInvalid)
	}
	if c.CertsDir == "" {
		return fmt.Errorf("certificate folder is missing: %w", trivet.ErrInvalid)
	}
	if c.Fatal == nil {
		return fmt.Errorf("fatal: %w", errors.Join(errors.New("function is missing"), trivet.ErrInvalid))
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	if len(c.Disks) == 0 {
		c.Disks = []string{filepath.Join(c.DataDir, "disk")}
	}
	if c.RunDir == "" {
		c.RunDir = filepath.Join(c.DataDir, RunDirName)
	}
	if err := c.checkCache(); err != nil {
		return err
	}
	if c.ReplayBytes != 0 && c.ReplayBytes < node.ReplayBytesMin {
		return fmt.Errorf("replay memory of %d bytes: want at least %d: %w", c.ReplayBytes, node.ReplayBytesMin,
			trivet.ErrInvalid)
	}
	if c.Advertise == "" {
		c.Advertise = c.Listen
	}
	if _, err := blockdev.ParseKind(c.Attach); err != nil {
		return fmt.Errorf("attach: %w", err)
	}
	if c.KeeperSocket != "" && !filepath.IsAbs(c.KeeperSocket) {
		return fmt.Errorf("keeper socket %q: want an absolute path: %w", c.KeeperSocket, trivet.ErrInvalid)
	}
	if c.CSI != "" && !strings.HasPrefix(c.CSI, "unix://") {
		return fmt.Errorf("csi endpoint %q: want unix:///path: %w", c.CSI, trivet.ErrInvalid)
	}
	if c.Register != "" && c.CSI == "" {
		return fmt.Errorf("kubelet's plugin directory %q is given, but no csi endpoint to register: %w", c.Register,
			trivet.ErrInvalid)
	}
	if c.CatchUpBytesPerSecond != 0 && c.CatchUpBytesPerSecond < replication.CatchUpBytesPerSecondMin {
		return fmt.Errorf("catch-up bandwidth of %d bytes a second: want 0 or at least %d: %w", c.CatchUpBytesPerSecond,
			replication.CatchUpBytesPerSecondMin, trivet.ErrInvalid)
	}
	if c.MaxVolumes < 0 {
		return fmt.Errorf("max volumes %d: want zero or more: %w", c.MaxVolumes, trivet.ErrInvalid)
	}
	if c.ReplaceAfter < 0 {
		return fmt.Errorf("replace after %v: want zero or more: %w", c.ReplaceAfter, trivet.ErrInvalid)
	}
	addrs := append([]string{c.Listen, c.Advertise}, c.Seeds...)
	if c.MetricsAddr != "" {
		addrs = append(addrs, c.MetricsAddr)
	}
	for _, addr := range addrs {
		if _, _, err := net.SplitHostPort(addr); err != nil {
			return fmt.Errorf("address %q: want host:port: %w", addr, trivet.ErrInvalid)
		}
	}
	host, _, err := net.SplitHostPort(c.Advertise)
	if err != nil {
		return err
	}
	if ip := net.ParseIP(host); host == "" || (ip != nil && ip.IsUnspecified()) {
		return fmt.Errorf("advertised address %q: other nodes cannot reach it; set --advertise: %w", c.Advertise,
			trivet.ErrInvalid)
	}
	return nil
}

// checkCache settles where caches are. A default that is not there means no write-back caches; a directory that was
// asked for must do.
func (c *Config) checkCache() error {
	if c.CacheBytes < 0 {
		return fmt.Errorf("cache memory of %d bytes: want zero or more: %w", c.CacheBytes, trivet.ErrInvalid)
	}
	if c.CacheDir == "" {
		c.CacheDir = CacheOff
	}
	if c.CacheDir == CacheOff {
		return nil
	}
	if !filepath.IsAbs(c.CacheDir) {
		return fmt.Errorf("cache directory %q: want an absolute path: %w", c.CacheDir, trivet.ErrInvalid)
	}
	err := cache.CheckDir(c.CacheDir)
	if err != nil && c.CacheDir == cacheDirDefault {
		c.Logger.Warn("no write-back caches: give a directory on a tmpfs", "err", err)
		c.CacheDir = CacheOff
		return nil
	}
	if err != nil {
		return fmt.Errorf("%w; give one that is, or %q", err, CacheOff)
	}
	return nil
}
