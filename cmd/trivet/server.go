package main

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"runtime/debug"

	"github.com/spf13/cobra"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/internal/kube"
	"github.com/trivet-csi/trivet/internal/procs"
	"github.com/trivet-csi/trivet/server"
)

func newServer(o *options) *cobra.Command {
	cfg := server.DefaultConfig()
	var (
		node, placeFile string
		logLevel        string
		logJSON         bool
		catchUp         string
		keeper          string
		memory, replay  string
	)
	cmd := &cobra.Command{
		Use:   "server",
		Short: "Run a node: its replicas, its attached volumes, its share of the catalogue and CSI",
		Args:  exactArgs(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			log, err := newLogger(logLevel, logJSON)
			if err != nil {
				return err
			}
			if cfg.CatchUpBytesPerSecond, err = parseRate(catchUp); err != nil {
				return err
			}
			if cfg.CacheBytes, err = parseMemory(memory); err != nil {
				return err
			}
			if cfg.ReplayBytes, err = parseSize(replay); err != nil {
				return usageError{fmt.Errorf("--replay-memory: %w", err)}
			}
			if err := takePlace(&cfg, placeFile); err != nil {
				return err
			}
			cfg.Node, cfg.CertsDir, cfg.Logger, cfg.Version = trivet.NodeID(node), o.certs, log, version
			if cfg.KeeperSocket, cfg.StartKeeper, err = keeperOf(keeper, runDirOf(&cfg)); err != nil {
				return err
			}
			cfg.Fatal = func(err error) {
				log.Error("stopping: going on would risk data", "err", err)
				os.Exit(1)
			}
			return runServer(cmd.Context(), cfg)
		},
	}
	host, err := os.Hostname()
	if err != nil {
		host = ""
	}
	f := cmd.Flags()
	f.StringVar(&node, "node", envOr("TRIVET_NODE", host), "name of this node, as in its certificate (TRIVET_NODE)")
	f.StringVar(&cfg.Zone, "zone", envOr("TRIVET_ZONE", ""), "failure domain of this node (TRIVET_ZONE)")
	f.StringVar(&cfg.Rack, "rack", envOr("TRIVET_RACK", ""), "failure domain of this node within its zone (TRIVET_RACK)")
	f.StringVar(&placeFile, "place-file", "",
		"file with zone and rack, from trivet kube place; what it says goes before --zone and --rack")
	f.Int64Var(&cfg.MaxVolumes, "max-volumes", 0,
		"volumes that CSI may attach to a node at a time, the same on all nodes (0: as many as the kernel makes devices)")
	f.StringVar(&cfg.DataDir, "data", "/var/lib/trivet", "directory of the server's own state")
	f.StringArrayVar(&cfg.Disks, "disk", nil, "directory that keeps replicas; several may be given (default DATA/disk)")
	f.StringVar(&cfg.Listen, "listen", cfg.Listen, "host:port to listen on")
	f.StringVar(&cfg.Advertise, "advertise", "", "host:port under which other nodes reach this one (default: --listen)")
	f.StringArrayVar(&cfg.Seeds, "seed", nil, "host:port of another server; several may be given")
	f.StringVar(&cfg.CSI, "csi", "", "serve CSI on this endpoint, as unix:///csi/csi.sock")
	f.StringVar(&cfg.Register, "register", "",
		"register the --csi endpoint with the kubelet in this directory, as /var/lib/kubelet/plugins_registry")
	f.StringVar(&cfg.RunDir, "run-dir", "", "directory for FUSE mount points and records (default DATA/run)")
	f.StringVar(&cfg.Attach, "attach", cfg.Attach, "kind of the kernel devices of volumes: auto, ublk, nbd or fuse")
	f.StringVar(&keeper, "keeper", "",
		"socket of the `trivet keeper` that keeps kernel devices while this server restarts; auto: start one if none runs")
	f.BoolVar(&cfg.DetachOnStop, "detach-on-stop", false,
		"take every volume off the machine when the server stops, instead of leaving it to the next server")
	f.StringVar(&cfg.CacheDir, "cache-dir", cfg.CacheDir,
		"directory on a tmpfs of the host for write-back caches, which outlive this process; \"off\": none")
	f.StringVar(&memory, "cache-memory", "256Mi", "memory for the caches of all volumes together, as 1Gi (0: none)")
	f.StringVar(&replay, "replay-memory", "256Mi",
		"memory for the replay of journals of volumes that are attached read-only, of all together, from 4Mi")
	f.DurationVar(&cfg.IOTimeout, "io-timeout", cfg.IOTimeout, "how long a request waits for a leader before it fails")
	f.DurationVar(&cfg.ParkAfter, "park-after", 0,
		"stop the replicas of a volume this long after it was detached (default 30s; negative: never)")
	f.DurationVar(&cfg.ScrubEvery, "scrub-every", 0,
		"read and compare all replicas of each volume this often (default 168h; negative: only when asked)")
	f.DurationVar(&cfg.ReplaceAfter, "replace-after", cfg.ReplaceAfter,
		"replace the replicas of a node that is dead, or of a disk that is away, for this long")
	f.DurationVar(&cfg.Timing.Heartbeat, "heartbeat", 0,
		"a follower gives up on a silent leader after 1 to 1.5 of these (default 1s)")
	f.BoolVar(&cfg.OverlapFlush, "overlap-flush", cfg.OverlapFlush,
		"let a leader send entries while its own disk still flushes them; =false does one after the other")
	f.StringVar(&catchUp, "catch-up-bandwidth", "0",
		"bytes per second, as 100Mi, that replicas here together pull from other nodes to catch up (0: no limit)")
	f.StringVar(&cfg.MetricsAddr, "metrics-addr", "",
		"host:port for Prometheus, plain HTTP, as 127.0.0.1:7480 (default: no metrics)")
	f.StringVar(&logLevel, "log-level", "info", "debug, info, warn or error")
	f.BoolVar(&logJSON, "log-json", false, "log as JSON")
	return cmd
}

// takePlace reads where the node stands from a file, if one is named.
func takePlace(cfg *server.Config, file string) error {
	if file == "" {
		return nil
	}
	place, err := kube.ReadPlace(file)
	if err != nil {
		return usageError{fmt.Errorf("--place-file: %w", err)}
	}
	cfg.Zone, cfg.Rack = cmp.Or(place.Zone, cfg.Zone), cmp.Or(place.Rack, cfg.Rack)
	return nil
}

// runDirOf is the run directory that the server will use.
func runDirOf(cfg *server.Config) string {
	if cfg.RunDir != "" {
		return cfg.RunDir
	}
	return filepath.Join(cfg.DataDir, server.RunDirName)
}

// parseRate reads bytes per second as parseSize reads bytes; 0 means no limit.
func parseRate(s string) (int64, error) {
	if s == "0" {
		return 0, nil
	}
	n, err := parseSize(s)
	if err != nil {
		return 0, usageError{fmt.Errorf("--catch-up-bandwidth: %w", err)}
	}
	return n, nil
}

// parseMemory reads bytes as parseSize does; 0 means none.
func parseMemory(s string) (int64, error) {
	if s == "0" {
		return 0, nil
	}
	n, err := parseSize(s)
	if err != nil {
		return 0, usageError{fmt.Errorf("--cache-memory: %w", err)}
	}
	return n, nil
}

// serverGCPercent is how much garbage a server may hold beside what lives, most of which are its caches, of fixed
// size and without pointers: a collection costs little. With 100 half of a server's memory was garbage.
const serverGCPercent = 30

// runServer runs until ctx ends, then stops in good order.
func runServer(ctx context.Context, cfg server.Config) error {
	procs.AllowForDisks()
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(serverGCPercent)
	}
	s, err := server.Open(ctx, cfg)
	if err != nil {
		return err
	}
	cfg.Logger.Info("serving", "node", string(cfg.Node), "address", s.Address())
	<-ctx.Done()
	return s.Close()
}

func newLogger(level string, asJSON bool) (*slog.Logger, error) {
	var l slog.Level
	if err := l.UnmarshalText([]byte(level)); err != nil {
		return nil, usageError{fmt.Errorf("--log-level %q: want debug, info, warn or error", level)}
	}
	opts := &slog.HandlerOptions{Level: l}
	if asJSON {
		return slog.New(slog.NewJSONHandler(os.Stderr, opts)), nil
	}
	return slog.New(slog.NewTextHandler(os.Stderr, opts)), nil
}
