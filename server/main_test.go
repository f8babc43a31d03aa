package server_test

import (
	"context"
	"log/slog"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"testing"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/server"
)

// childEnv makes the test binary run as a server instead of as a test, so that a test can kill a real
// process. Its value is the fields of a configuration, separated by newlines.
const childEnv = "TRIVET_TEST_SERVER"

func TestMain(m *testing.M) {
	if spec := os.Getenv(childEnv); spec != "" {
		os.Exit(runChild(strings.Split(spec, "\n")))
	}
	os.Exit(m.Run())
}

// childSpec is the value of childEnv for a configuration.
func childSpec(cfg *server.Config) string {
	return strings.Join(append([]string{
		string(cfg.Node), cfg.DataDir, cfg.CertsDir, cfg.Listen, cfg.RunDir, cfg.KeeperSocket, cfg.CSI, cfg.MetricsAddr,
	}, cfg.Seeds...), "\n")
}

func runChild(spec []string) int {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	log := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelInfo}))
	cfg := server.DefaultConfig()
	cfg.Node, cfg.DataDir, cfg.CertsDir = trivet.NodeID(spec[0]), spec[1], spec[2]
	cfg.Listen, cfg.RunDir, cfg.KeeperSocket, cfg.CSI = spec[3], spec[4], spec[5], spec[6]
	cfg.MetricsAddr, cfg.Seeds, cfg.Logger = spec[7], spec[8:], log
	cfg.LogLanes, cfg.LogSegmentBytes = 2, 16<<20
	if dir := os.Getenv(cacheDirEnv); dir != "" {
		cfg.CacheDir = dir
	}
	cfg.Fatal = func(err error) {
		log.Error("fatal", "err", err)
		os.Exit(3)
	}
	s, err := server.Open(ctx, cfg)
	if err != nil {
		log.Error("open", "err", err)
		return 1
	}
	<-ctx.Done()
	if err := s.Close(); err != nil {
		log.Error("close", "err", err)
		return 1
	}
	return 0
}
