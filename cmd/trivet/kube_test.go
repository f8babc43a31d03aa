package main

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	authv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/internal/kube"
	"github.com/trivet-csi/trivet/internal/pki"
	"github.com/trivet-csi/trivet/server"
)

// onNode is an API server to which every token is that of a pod on the node.
type onNode string

func (n onNode) ReviewToken(context.Context, string, string) (*authv1.TokenReviewStatus, error) {
	return &authv1.TokenReviewStatus{
		Authenticated: true, Audiences: []string{kube.Audience}, User: authv1.UserInfo{
			Username: "system:serviceaccount:ns:trivet-node",
			Extra:    map[string]authv1.ExtraValue{"authentication.kubernetes.io/node-name": {string(n)}},
		},
	}, nil
}

// Node implements kube.NodeReader.
func (n onNode) Node(_ context.Context, name string) (*corev1.Node, error) {
	return &corev1.Node{ObjectMeta: metav1.ObjectMeta{Labels: map[string]string{"rack": "rack-of-" + name}}}, nil
}

// freeAddress returns an address that nobody listens on. It is one of the machine's own that other tests do not use, or
// they could take the port before it is listened on, or while a server is replaced.
func freeAddress(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", fmt.Sprintf("127.%d.%d.%d:0", 1+rand.IntN(254), rand.IntN(256), 1+rand.IntN(254)))
	require.NoError(t, err)
	defer l.Close()
	return l.Addr().String()
}

// TestIssuerAndEnroll runs the two commands against each other: an operator's CA, the issuer with it, a
// node that gets a certificate, and what `cert show` says of the folders.
func TestIssuerAndEnroll(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	path := func(name string) string { return filepath.Join(dir, name) }
	_, err := run(t, "cert", "ca", "--dir", path("ca"))
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(path("token"), []byte("t"), 0o600))
	issuer := issuerFlags{
		ca: path("ca"), listen: freeAddress(t), namespace: "ns", nodeAccount: "trivet-node", clientDir: path("client"),
		clientName: "csi-controller", validity: time.Hour, labels: kube.PlaceLabels{Rack: "rack"},
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- issuer.run(ctx, onNode("n1"), slog.New(slog.DiscardHandler)) }()

	enroll := []string{
		"cert", "enroll", "--issuer", "https://" + issuer.listen, "--ca", path("ca/ca.crt"), "--token", path("token"),
		"--dir", path("n1"), "--log-level", "error",
	}
	_, err = run(t, append(enroll, "--node", "n1")...)
	require.NoError(t, err)
	_, err = run(t, append(enroll, "--node", "n2")...)
	require.ErrorIs(t, err, trivet.ErrInvalid, "the folder is n1's")

	place := []string{
		"kube", "place", "--issuer", "https://" + issuer.listen, "--ca", path("ca/ca.crt"), "--token", path("token"),
		"--node", "n1", "--log-level", "error",
	}
	_, err = run(t, append(place, "--file", path("place.json"))...)
	require.NoError(t, err)
	cfg := server.Config{Zone: "z", Rack: "r"}
	require.NoError(t, takePlace(&cfg, path("place.json")))
	assert.Equal(t, server.Config{Zone: "z", Rack: "rack-of-n1"}, cfg, "what the file does not say stays")
	require.ErrorContains(t, takePlace(&cfg, path("nowhere")), "--place-file: ")
	_, err = run(t, place...)
	require.ErrorContains(t, err, "--file is missing")

	out, err := run(t, "cert", "show", "--dir", path("n1"), "-o", "json")
	require.NoError(t, err)
	var views []certView
	require.NoError(t, json.Unmarshal([]byte(out), &views))
	require.Len(t, views, 1)
	assert.Equal(t, pki.RoleNode, views[0].Role)
	assert.Equal(t, "n1", views[0].Name)
	out, err = run(t, "cert", "show", "--dir", path("client"))
	require.NoError(t, err)
	assert.Contains(t, out, "csi-controller")
	out, err = run(t, "cert", "show", "--dir", path("ca"))
	require.NoError(t, err)
	assert.Contains(t, out, string(views[0].Cluster))

	// --renew goes on until it is told to stop.
	renewing, stop := context.WithCancel(t.Context())
	root := newRoot()
	root.SetArgs(append(enroll, "--node", "n1", "--renew"))
	stopped := make(chan error, 1)
	go func() { stopped <- root.ExecuteContext(renewing) }()
	stop()
	require.NoError(t, <-stopped)
	cancel()
	require.NoError(t, <-ended)
}

// cert show is a probe: it succeeds only when the server could start.
func TestCertShowFails(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	_, err := run(t, "cert", "show", "--dir", dir)
	require.ErrorIs(t, err, trivet.ErrNotFound)
	assert.ErrorContains(t, err, dir)

	ca, err := pki.NewCA(trivet.ClusterID(trivet.NewUUID()), pki.For(time.Hour))
	require.NoError(t, err)
	now := time.Now()
	expired, err := ca.Issue(pki.Identity{Cluster: ca.Cluster(), Role: pki.RoleNode, Name: "n1"},
		pki.Validity{From: now.Add(-2 * time.Hour), Until: now.Add(-time.Hour)})
	require.NoError(t, err)
	require.NoError(t, pki.Write(dir, ca.CertPEM(), expired))
	out, err := run(t, "cert", "show", "--dir", dir)
	require.ErrorContains(t, err, "expired")
	assert.Contains(t, out, "n1", "what it is, all the same")

	require.NoError(t, os.Remove(filepath.Join(dir, "node.key")))
	_, err = run(t, "cert", "show", "--dir", dir)
	require.ErrorIs(t, err, trivet.ErrInvalid)
}

func TestKubeUsage(t *testing.T) {
	t.Parallel()
	for _, args := range [][]string{
		{"kube", "init"},
		{"kube", "init", "--server", "x:1"}, // this is no pod
		{"kube", "issuer", "--validity", "1m"},
		{"kube", "issuer"},
		{"csi-controller", "--rack-label", "example.com/rack"},
		{"csi-controller", "--node-labels", "--rack-label", "a b"},
		{"csi-controller", "--node-labels"}, // this is no pod
		{"csi-controller", "--failover", "--failover-after", "0s"},
		{"cert", "enroll"},
		{"cert", "enroll", "--issuer", "http://x", "--ca", "c", "--token", "t", "--dir", "d", "--node", "n1"},
		{"cert", "enroll", "--issuer", "https://x", "--ca", "c", "--token", "t", "--dir", "d", "--node", "N1"},
	} {
		_, err := run(t, args...)
		var usage usageError
		assert.ErrorAs(t, err, &usage, "%q", args)
	}
}
