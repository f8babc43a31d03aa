package server_test

import (
	"crypto/tls"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/api"
	"github.com/trivet-csi/trivet/controller"
	"github.com/trivet-csi/trivet/internal/pki"
	"github.com/trivet-csi/trivet/replication/raftgroup"
	"github.com/trivet-csi/trivet/replication/transport"
	"github.com/trivet-csi/trivet/server"
)

// certs makes a CA and writes certificates of it.
type certs struct {
	t  *testing.T
	ca *pki.CA
}

func newCerts(t *testing.T) certs {
	t.Helper()
	ca, err := pki.NewCA(trivet.ClusterID(trivet.NewUUID()), pki.For(pki.CAValidity))
	require.NoError(t, err)
	return certs{t, ca}
}

// dir writes a certificate into a new folder and returns it.
func (c certs) dir(role pki.Role, name string) string {
	c.t.Helper()
	pair, err := c.ca.Issue(pki.Identity{Cluster: c.ca.Cluster(), Role: role, Name: name}, pki.For(pki.LeafValidity))
	require.NoError(c.t, err)
	dir := c.t.TempDir()
	require.NoError(c.t, pki.Write(dir, c.ca.CertPEM(), pair))
	return dir
}

func (c certs) config(node string) server.Config {
	cfg := server.DefaultConfig()
	cfg.Node, cfg.Listen, cfg.DataDir = trivet.NodeID(node), "127.0.0.1:0", filepath.Join(c.t.TempDir(), "data")
	cfg.CertsDir = c.dir(pki.RoleNode, node)
	cfg.LogLanes, cfg.LogSegmentBytes = 1, 8<<20
	cfg.Fatal = func(err error) { c.t.Errorf("fatal: %v", err) }
	return cfg
}

func open(t *testing.T, cfg server.Config) *server.Server {
	t.Helper()
	s, err := server.Open(t.Context(), cfg)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, s.Close()) })
	return s
}

func TestOpenRefuses(t *testing.T) {
	t.Parallel()
	c := newCerts(t)
	used := c.config("node-1")
	s, err := server.Open(t.Context(), used)
	require.NoError(t, err)
	require.NoError(t, s.Close())

	tests := []struct {
		name   string
		change func(cfg *server.Config)
		want   error
		says   string
	}{
		{"no node", func(cfg *server.Config) { cfg.Node = "" }, trivet.ErrInvalid, "node"},
		{"node with a slash", func(cfg *server.Config) { cfg.Node = "a/b" }, trivet.ErrInvalid, "a/b"},
		{"another node's certificate", func(cfg *server.Config) { cfg.Node = "node-2" }, trivet.ErrInvalid, "node-1"},
		{"no certificates", func(cfg *server.Config) { cfg.CertsDir = t.TempDir() }, trivet.ErrNotFound, "--certs"},
		{"another node's data", func(cfg *server.Config) {
			cfg.Node, cfg.CertsDir = "node-2", c.dir(pki.RoleNode, "node-2")
		}, trivet.ErrInvalid, "belongs to node node-1"},
		{"another cluster's certificate", func(cfg *server.Config) {
			cfg.CertsDir = newCerts(t).dir(pki.RoleNode, "node-1")
		}, trivet.ErrInvalid, "belongs to node node-1 of cluster " + string(c.ca.Cluster())},
		{
			"advertise nothing reachable", func(cfg *server.Config) { cfg.Advertise = "0.0.0.0:7400" }, trivet.ErrInvalid,
			"--advertise",
		},
		{"seed without a port", func(cfg *server.Config) { cfg.Seeds = []string{"host"} }, trivet.ErrInvalid, "host:port"},
		{"csi endpoint over tcp", func(cfg *server.Config) { cfg.CSI = "tcp://:1" }, trivet.ErrInvalid, "unix://"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			cfg := used
			tt.change(&cfg)
			_, err := server.Open(t.Context(), cfg)
			require.ErrorIs(t, err, tt.want)
			assert.ErrorContains(t, err, tt.says)
		})
	}
}

// TestOneServerForEachDirectory: a second server, or one on a copy of the disk, does not start (H11, I9).
func TestOneServerForEachDirectory(t *testing.T) {
	t.Parallel()
	c := newCerts(t)
	cfg := c.config("node-1")
	s := open(t, cfg)
	_, err := server.Open(t.Context(), cfg)
	require.ErrorIs(t, err, trivet.ErrInUse)

	require.NoError(t, s.Close()) // or files would come and go while they are copied
	other := cfg
	other.DataDir = filepath.Join(t.TempDir(), "data")
	require.NoError(t, os.CopyFS(other.DataDir, os.DirFS(cfg.DataDir)))
	open(t, cfg)
	_, err = server.Open(t.Context(), other)
	require.Error(t, err)
	assert.ErrorContains(t, err, "cop", "the message says that it is a copy")

	full := c.config("node-1")
	require.NoError(t, os.MkdirAll(full.DataDir, 0o700))
	require.NoError(t, os.WriteFile(filepath.Join(full.DataDir, "thesis.txt"), []byte("x"), 0o600))
	_, err = server.Open(t.Context(), full)
	require.ErrorIs(t, err, trivet.ErrInvalid)
	assert.ErrorContains(t, err, "thesis.txt")
}

func dialWith(t *testing.T, address string, config *tls.Config) api.AdminClient {
	t.Helper()
	conn, err := grpc.NewClient("passthrough:///"+address, grpc.WithTransportCredentials(credentials.NewTLS(config)))
	require.NoError(t, err)
	t.Cleanup(func() { conn.Close() })
	return api.NewAdminClient(conn)
}

// TestPortRefuses: who may call what, and that nobody without a certificate of the cluster gets as far
// as a call (S1, S4, S15). The positive control is the client that may.
func TestPortRefuses(t *testing.T) {
	t.Parallel()
	c := newCerts(t)
	s := open(t, c.config("node-1"))
	config := func(c certs, role pki.Role, name string) *tls.Config {
		creds, err := pki.Open(c.dir(role, name), role, nil)
		require.NoError(t, err)
		return creds.ClientConfig("", "h2")
	}
	client := dialWith(t, s.Address(), config(c, pki.RoleClient, "ops"))
	node := dialWith(t, s.Address(), config(c, pki.RoleNode, "node-2"))

	_, err := node.CreateVolume(t.Context(), &api.CreateVolumeRequest{Name: "v", SizeBytes: 1 << 20})
	require.Equal(t, codes.PermissionDenied, status.Code(err), "a node's certificate makes no volumes")
	_, err = client.Join(t.Context(), &api.JoinRequest{Node: "ops", Address: "127.0.0.1:1"})
	require.Equal(t, codes.PermissionDenied, status.Code(err), "a client joins no cluster")
	_, err = node.Join(t.Context(), &api.JoinRequest{Node: "node-3", Address: "127.0.0.1:1"})
	require.Equal(t, codes.PermissionDenied, status.Code(err), "a node joins under its own name only")
	_, err = node.Join(t.Context(), &api.JoinRequest{Node: "node-2", Address: "nonsense"})
	require.Equal(t, codes.InvalidArgument, status.Code(err))
	_, err = node.Join(t.Context(), &api.JoinRequest{Node: "node-2", Address: "127.0.0.1:1"})
	require.NoError(t, err)
	_, err = client.InitCluster(t.Context(), &api.InitClusterRequest{})
	require.NoError(t, err, "the positive control")

	stranger := newCerts(t)
	refused := map[string]*tls.Config{
		"another cluster":      config(stranger, pki.RoleClient, "ops"),
		"no certificate":       {InsecureSkipVerify: true, NextProtos: []string{"h2"}, MinVersion: tls.VersionTLS13},
		"a client as a peer":   withProtocol(config(c, pki.RoleClient, "ops"), "trivet-peer/1"),
		"an unknown protocol":  withProtocol(config(c, pki.RoleNode, "node-2"), "http/1.1"),
		"TLS 1.2, if it could": withVersion(config(c, pki.RoleClient, "ops"), tls.VersionTLS12),
	}
	for name, cfg := range refused {
		conn, err := (&tls.Dialer{Config: cfg}).DialContext(t.Context(), "tcp", s.Address())
		if err == nil { // TLS 1.3 clients learn of a refusal with their first read
			_, err = conn.Read(make([]byte, 1))
			conn.Close()
		}
		require.Error(t, err, name)
	}
	var d net.Dialer
	conn, err := d.DialContext(t.Context(), "tcp", s.Address())
	require.NoError(t, err)
	defer conn.Close()
	_, err = conn.Write([]byte("GET / HTTP/1.1\r\n\r\n"))
	require.NoError(t, err)
	n, err := conn.Read(make([]byte, 512))
	require.LessOrEqual(t, n, 7, "plaintext gets a TLS alert and nothing else")
	if n > 0 {
		_, err = conn.Read(make([]byte, 1))
	}
	require.Error(t, err)
}

func withProtocol(cfg *tls.Config, name string) *tls.Config {
	cfg = cfg.Clone()
	cfg.NextProtos = []string{name}
	return cfg
}

func withVersion(cfg *tls.Config, v uint16) *tls.Config {
	cfg = cfg.Clone()
	cfg.MinVersion, cfg.MaxVersion = v, v
	return cfg
}

// TestJoinGoesOnAfterACrash: a server died after it had made its empty replica of the meta group and
// before the cluster had added it. Its next start must ask again.
func TestJoinGoesOnAfterACrash(t *testing.T) {
	t.Parallel()
	c := newCerts(t)
	first := open(t, c.config("node-1"))
	creds, err := pki.Open(c.dir(pki.RoleClient, "ops"), pki.RoleClient, nil)
	require.NoError(t, err)
	client := dialWith(t, first.Address(), creds.ClientConfig("", "h2"))
	_, err = client.InitCluster(t.Context(), &api.InitClusterRequest{})
	require.NoError(t, err)

	cfg := c.config("node-2")
	cfg.Seeds = []string{first.Address()}
	hub := transport.NewMemory(1)
	network := hub.Node("node-2")
	cat, err := controller.NewCatalogue(controller.CatalogueConfig{
		Node: "node-2", Cluster: c.ca.Cluster(), Dir: filepath.Join(cfg.DataDir, "meta"), Network: network,
		Mux: raftgroup.NewMux(network), Fatal: cfg.Fatal,
	})
	require.NoError(t, err)
	_, err = cat.Prepare(t.Context())
	require.NoError(t, err)
	require.NoError(t, cat.Close())
	require.NoError(t, hub.Close())

	open(t, cfg)
	require.Eventually(t, func() bool {
		resp, err := client.ListNodes(t.Context(), &api.ListNodesRequest{})
		return err == nil && len(resp.GetNodes()) == 2 && resp.GetNodes()[1].GetState() == "Up"
	}, time.Minute, 50*time.Millisecond)
}
