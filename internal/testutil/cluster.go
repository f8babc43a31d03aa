// Package testutil starts real clusters for tests: servers in this process, on loopback, with
// certificates and directories of their own. It is for tests above package server; those below have
// the seams named in their packages.
package testutil

import (
	"context"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/api"
	"github.com/trivet-csi/trivet/internal/pki"
	"github.com/trivet-csi/trivet/server"
)

// readyTimeout bounds the start of a cluster on a busy machine.
const readyTimeout = 90 * time.Second

// lease is longer than a busy machine stands still: no node counts as down because of that.
const lease = 2 * time.Minute

// ShortLease gives a server the lease that it has outside tests, for those in which a node has to be found dead.
func ShortLease(_ int, cfg *server.Config) { cfg.Lease = 0 }

// Cluster is a number of servers in this process.
type Cluster struct {
	tb      testing.TB
	dir     string
	host    string
	ca      *pki.CA
	configs []server.Config
	servers []*server.Server
	admins  []api.AdminClient
}

// StartCluster starts n servers, bears the cluster on the first and waits until all are up and up to
// three of them voters. Everything is stopped at the end of the test. adjust may change a server's
// configuration before it starts.
func StartCluster(tb testing.TB, n int, adjust func(i int, cfg *server.Config)) *Cluster {
	tb.Helper()
	// Sockets need short paths, shorter than t.TempDir's of a test with a long name.
	dir, err := os.MkdirTemp("", "trivet-test-")
	require.NoError(tb, err)
	tb.Cleanup(func() { require.NoError(tb, os.RemoveAll(dir)) })
	ca, err := pki.NewCA(trivet.ClusterID(trivet.NewUUID()), pki.For(pki.CAValidity))
	require.NoError(tb, err)
	c := &Cluster{tb: tb, dir: dir, host: Loopback(), ca: ca}
	c.issue("client", pki.RoleClient, "test")
	for i := range n {
		cfg := c.config(i)
		if adjust != nil {
			adjust(i, &cfg)
		}
		s, err := server.Open(tb.Context(), cfg)
		require.NoError(tb, err)
		cfg.Listen, cfg.Advertise = s.Address(), s.Address() // a restart keeps the address
		c.configs, c.servers = append(c.configs, cfg), append(c.servers, s)
		c.admins = append(c.admins, c.dial(s.Address()))
		tb.Cleanup(func() { require.NoError(tb, c.servers[i].Close()) })
	}
	_, err = c.admins[0].InitCluster(tb.Context(), &api.InitClusterRequest{})
	require.NoError(tb, err)
	c.AwaitUp(n)
	return c
}

// Loopback returns an IPv4 address of this machine that hardly anybody else uses. A server that is stopped and is to
// listen at the same port again finds it free there; that of 127.0.0.1 may be another test's by then.
func Loopback() string {
	n := rand.Uint32() //nolint:gosec // nobody has to guess it
	return net.IPv4(127, byte(1+n>>16%254), byte(n>>8), byte(1+n%254)).String()
}

func (c *Cluster) config(i int) server.Config {
	name := fmt.Sprintf("node-%d", i)
	c.issue(filepath.Join(name, "certs"), pki.RoleNode, name)
	cfg := server.DefaultConfig()
	cfg.Node, cfg.Listen = trivet.NodeID(name), net.JoinHostPort(c.host, "0")
	cfg.DataDir, cfg.CertsDir = c.Path(name, "data"), c.Path(name, "certs")
	cfg.CSI = c.CSI(i)
	cfg.LogLanes, cfg.LogSegmentBytes = 2, 16<<20 // quick to make
	cfg.Lease = lease
	log := slog.NewTextHandler(logWriter{c.tb}, &slog.HandlerOptions{Level: slog.LevelWarn})
	cfg.Logger = slog.New(log)
	cfg.Fatal = func(err error) { c.tb.Errorf("%s would stop: %v", name, err) }
	for _, s := range c.servers {
		cfg.Seeds = append(cfg.Seeds, s.Address())
	}
	return cfg
}

func (c *Cluster) issue(dir string, role pki.Role, name string) {
	c.tb.Helper()
	pair, err := c.ca.Issue(pki.Identity{Cluster: c.ca.Cluster(), Role: role, Name: name}, pki.For(pki.LeafValidity))
	require.NoError(c.tb, err)
	require.NoError(c.tb, pki.Write(c.Path(dir), c.ca.CertPEM(), pair))
}

func (c *Cluster) dial(address string) api.AdminClient {
	c.tb.Helper()
	creds, err := pki.Open(c.Path("client"), pki.RoleClient, nil)
	require.NoError(c.tb, err)
	conn, err := grpc.NewClient("passthrough:///"+address,
		grpc.WithTransportCredentials(credentials.NewTLS(creds.ClientConfig("", "h2"))))
	require.NoError(c.tb, err)
	c.tb.Cleanup(func() { conn.Close() })
	return api.NewAdminClient(conn)
}

// Path returns a path below the cluster's folder.
func (c *Cluster) Path(names ...string) string {
	return filepath.Join(append([]string{c.dir}, names...)...)
}

// CSI returns the CSI endpoint of server i.
func (c *Cluster) CSI(i int) string { return "unix://" + c.Path(fmt.Sprintf("csi-%d.sock", i)) }

// Admin returns a client of server i's administration API.
func (c *Cluster) Admin(i int) api.AdminClient { return c.admins[i] }

// Config returns the configuration that server i was started with.
func (c *Cluster) Config(i int) server.Config { return c.configs[i] }

// Metrics returns host:port of server i's metrics, or "".
func (c *Cluster) Metrics(i int) string { return c.servers[i].MetricsAddress() }

// Stop closes server i.
func (c *Cluster) Stop(i int) {
	c.tb.Helper()
	require.NoError(c.tb, c.servers[i].Close())
}

// Start starts server i again, at its old address.
func (c *Cluster) Start(i int) {
	c.tb.Helper()
	s, err := server.Open(c.tb.Context(), c.configs[i])
	require.NoError(c.tb, err)
	c.servers[i] = s
}

// AwaitUp waits until n nodes are up and min(n, 3) of them vote.
func (c *Cluster) AwaitUp(n int) {
	c.tb.Helper()
	ctx, cancel := context.WithTimeout(c.tb.Context(), readyTimeout)
	defer cancel()
	last := ""
	for {
		resp, err := c.admins[0].ListNodes(ctx, &api.ListNodesRequest{})
		up, voters := 0, 0
		for _, node := range resp.GetNodes() {
			if node.GetState() == "Up" && len(node.GetDisks()) > 0 {
				up++
			}
			if node.GetRole() != "Learner" {
				voters++
			}
		}
		if err == nil && up == n && voters == min(n, 3) {
			return
		}
		if err != nil {
			last = err.Error()
		}
		select {
		case <-ctx.Done():
			require.FailNow(c.tb, "cluster not ready", "%d of %d nodes up, %d vote; last error: %s", up, n, voters, last)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// logWriter writes a server's log lines to the test's log.
type logWriter struct{ tb testing.TB }

// Write implements io.Writer.
func (w logWriter) Write(p []byte) (int, error) {
	w.tb.Log(string(p[:len(p)-1])) //nolint:forbidigo // a log line, without its newline
	return len(p), nil
}
