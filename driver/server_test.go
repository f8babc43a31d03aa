package driver_test

import (
	"context"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/driver"
	"github.com/trivet-csi/trivet/node"
)

// Bounds for what a server does on its own time; no test asserts how long it takes.
const (
	waitMax   = time.Minute
	pollEvery = 5 * time.Millisecond
)

func config(t *testing.T) driver.Config {
	t.Helper()
	return driver.Config{
		Endpoint:   "unix://" + filepath.Join(t.TempDir(), "csi.sock"),
		Controller: newFakeController(),
		Node:       newFakeNode(),
		Changes:    newFakeChanges(),
		Ready:      func() bool { return true },
		Version:    "1",
	}
}

func TestConfigValidate(t *testing.T) {
	t.Parallel()
	withInfo := func(i node.Info) func(*driver.Config) {
		return func(c *driver.Config) { c.Node.(*fakeNode).info = i }
	}
	for name, change := range map[string]func(*driver.Config){
		"Controller":                 func(c *driver.Config) { c.Controller = nil },
		"Node":                       func(c *driver.Config) { c.Node = nil },
		"Changes":                    func(c *driver.Config) { c.Changes = nil },
		"Ready":                      func(c *driver.Config) { c.Ready = nil },
		"Version":                    func(c *driver.Config) { c.Version = "" },
		"StopTimeout":                func(c *driver.Config) { c.StopTimeout = -1 },
		`endpoint ""`:                func(c *driver.Config) { c.Endpoint = "" },
		`endpoint "/csi/csi.sock"`:   func(c *driver.Config) { c.Endpoint = "/csi/csi.sock" },
		`endpoint "tcp://`:           func(c *driver.Config) { c.Endpoint = "tcp://0.0.0.0:1" },
		`endpoint "unix://csi.sock"`: func(c *driver.Config) { c.Endpoint = "unix://csi.sock" },
		`endpoint "unix:///a/../b"`:  func(c *driver.Config) { c.Endpoint = "unix:///a/../b" },
		"at most":                    func(c *driver.Config) { c.Endpoint = "unix:///" + strings.Repeat("x", 108) },
		"node name":                  withInfo(node.Info{Node: "UPPER"}),
		"topology value may have":    withInfo(node.Info{Node: trivet.NodeID(strings.Repeat("a.", 40) + "a")}),
		"zone":                       withInfo(node.Info{Node: "a", Zone: "a b"}),
		"MaxVolumes":                 withInfo(node.Info{Node: "a", MaxVolumes: -1}),
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			cfg := config(t)
			change(&cfg)
			_, err := driver.Open(t.Context(), cfg)
			require.ErrorIs(t, err, trivet.ErrInvalid)
			require.ErrorContains(t, err, name)
		})
	}
}

// leaveStaleSocket makes a socket on which nobody listens.
func leaveStaleSocket(t *testing.T, path string) {
	t.Helper()
	l, err := net.Listen("unix", path) //nolint:noctx // a fixture
	require.NoError(t, err)
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	require.NoError(t, l.Close())
}

func TestSocket(t *testing.T) {
	t.Parallel()
	cfg := config(t)
	path := strings.TrimPrefix(cfg.Endpoint, "unix://")

	// What a crashed process leaves behind: a socket nobody listens on, under both names.
	for _, p := range []string{path, filepath.Join(filepath.Dir(path), "."+filepath.Base(path)+".new")} {
		leaveStaleSocket(t, p)
	}
	s, err := driver.Open(t.Context(), cfg)
	require.NoError(t, err)
	info, err := os.Lstat(path)
	require.NoError(t, err)
	assert.Equal(t, fs.ModeSocket|0o600, info.Mode())
	entries, err := os.ReadDir(filepath.Dir(path))
	require.NoError(t, err)
	assert.Len(t, entries, 1, "nothing beside the socket")

	_, err = driver.Open(t.Context(), cfg)
	require.ErrorIs(t, err, trivet.ErrInUse, "a live server keeps its socket")
	select {
	case <-s.Done():
		t.Fatal("the server stopped")
	default:
	}
	require.NoError(t, s.Close())
	require.NoError(t, s.Close())
	<-s.Done()
	_, err = os.Lstat(path)
	require.ErrorIs(t, err, fs.ErrNotExist)
}

// TestSocketPathTaken: what is not a socket is not ours to remove.
func TestSocketPathTaken(t *testing.T) {
	t.Parallel()
	cfg := config(t)
	path := strings.TrimPrefix(cfg.Endpoint, "unix://")
	require.NoError(t, os.WriteFile(path, []byte("precious"), 0o600))
	_, err := driver.Open(t.Context(), cfg)
	require.ErrorIs(t, err, trivet.ErrExists)
	data, err := os.ReadFile(path)
	require.NoError(t, err)
	assert.Equal(t, "precious", string(data))
}

// TestGracefulStop: Close waits for the call under way, which gets its answer.
func TestGracefulStop(t *testing.T) {
	t.Parallel()
	cfg := config(t)
	s, err := driver.Open(t.Context(), cfg)
	require.NoError(t, err)
	client := csi.NewControllerClient(dial(t, cfg.Endpoint))

	entered, leave := make(chan struct{}), make(chan struct{})
	cfg.Controller.(*fakeController).on("CreateVolume", func(context.Context, any) error {
		close(entered)
		<-leave
		return nil
	})
	answer := make(chan error, 1)
	go func() { _, err := client.CreateVolume(t.Context(), createReq("a")); answer <- err }()
	<-entered
	closed := make(chan error, 1)
	go func() { closed <- s.Close() }()
	require.Eventually(t, func() bool { // new calls are refused from now on
		_, err := client.ControllerGetCapabilities(t.Context(), &csi.ControllerGetCapabilitiesRequest{})
		return status.Code(err) == codes.Unavailable
	}, waitMax, pollEvery)
	close(leave)
	require.NoError(t, <-answer)
	require.NoError(t, <-closed)
}

// TestForcedStop: a call that does not end is cut off after StopTimeout.
func TestForcedStop(t *testing.T) {
	t.Parallel()
	cfg := config(t)
	cfg.StopTimeout = time.Nanosecond
	entered := make(chan struct{})
	cfg.Controller.(*fakeController).on("CreateVolume", func(ctx context.Context, _ any) error {
		close(entered)
		<-ctx.Done()
		return ctx.Err()
	})
	s, err := driver.Open(t.Context(), cfg)
	require.NoError(t, err)
	client := csi.NewControllerClient(dial(t, cfg.Endpoint))
	answer := make(chan error, 1)
	go func() { _, err := client.CreateVolume(t.Context(), createReq("a")); answer <- err }()
	<-entered
	require.NoError(t, s.Close())
	requireCode(t, codes.Unavailable, <-answer)
}
