package sanity

import (
	"context"
	"fmt"
	"log/slog"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/api"
	"github.com/trivet-csi/trivet/internal/pki"
	"github.com/trivet-csi/trivet/server"
)

const (
	nodesN = 3

	// startTimeout bounds the birth of the cluster.
	startTimeout = time.Minute

	// protocolHTTP2 is the TLS protocol name of the administration API (RFC 9113).
	protocolHTTP2 = "h2"
)

// startCluster starts three servers in this process, makes a cluster of them and returns the CSI
// endpoint of the first. They are closed at the end of the test, and must then have nothing mounted.
func startCluster(t *testing.T) (endpoint string) {
	t.Helper()
	dir := t.TempDir()
	failOnLeftMounts(t, dir)
	ca, err := pki.NewCA(trivet.ClusterID(trivet.NewUUID()), pki.For(pki.CAValidity))
	require.NoError(t, err)
	var addresses []string
	for i := range nodesN {
		addresses = append(addresses, startServer(t, dir, ca, i, addresses))
	}
	clientDir := filepath.Join(dir, "client")
	writeCert(t, ca, clientDir, pki.RoleClient, "sanity")
	bear(t, clientDir, addresses[0])
	return csiEndpoint(dir, 0)
}

func csiEndpoint(dir string, i int) string { return fmt.Sprintf("unix://%s/csi-%d.sock", dir, i) }

// startServer starts one server and returns its address.
func startServer(t *testing.T, dir string, ca *pki.CA, i int, seeds []string) string {
	t.Helper()
	name := fmt.Sprintf("sanity-%d", i)
	home := filepath.Join(dir, name)
	cfg := server.DefaultConfig()
	cfg.Node, cfg.Zone = trivet.NodeID(name), fmt.Sprintf("zone-%d", i)
	cfg.DataDir, cfg.CertsDir = filepath.Join(home, "data"), filepath.Join(home, "certs")
	cfg.Listen, cfg.Seeds, cfg.CSI = "127.0.0.1:0", seeds, csiEndpoint(dir, i)
	cfg.Logger = slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelWarn}))
	cfg.Fatal = func(err error) { panic(err) }
	writeCert(t, ca, cfg.CertsDir, pki.RoleNode, name)
	s, err := server.Open(t.Context(), cfg)
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, s.Close()) })
	return s.Address()
}

func writeCert(t *testing.T, ca *pki.CA, dir string, role pki.Role, name string) {
	t.Helper()
	pair, err := ca.Issue(pki.Identity{Cluster: ca.Cluster(), Role: role, Name: name}, pki.For(pki.LeafValidity))
	require.NoError(t, err)
	require.NoError(t, pki.Write(dir, ca.CertPEM(), pair))
}

// bear makes the cluster and waits until every node is a voting member of it.
func bear(t *testing.T, certs, address string) {
	t.Helper()
	creds, err := pki.Open(certs, pki.RoleClient, nil)
	require.NoError(t, err)
	conn, err := grpc.NewClient("passthrough:///"+address,
		grpc.WithTransportCredentials(credentials.NewTLS(creds.ClientConfig("", protocolHTTP2))))
	require.NoError(t, err)
	defer func() { assert.NoError(t, conn.Close()) }()
	admin := api.NewAdminClient(conn)
	ctx, cancel := context.WithTimeout(t.Context(), startTimeout)
	defer cancel()
	_, err = admin.InitCluster(ctx, &api.InitClusterRequest{})
	require.NoError(t, err)
	const poll = 100 * time.Millisecond
	require.Eventually(t, func() bool { return votersUp(ctx, admin) == nodesN }, startTimeout, poll)
}

func votersUp(ctx context.Context, admin api.AdminClient) int {
	resp, err := admin.ListNodes(ctx, &api.ListNodesRequest{})
	if err != nil {
		return 0 // no leader yet
	}
	n := 0
	for _, node := range resp.GetNodes() {
		if node.GetState() == "Up" && node.GetRole() != "Learner" {
			n++
		}
	}
	return n
}
