package kube_test

import (
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/internal/kube"
	"github.com/trivet-csi/trivet/internal/pki"
	"github.com/trivet-csi/trivet/server"
)

// startServers starts real servers that are not a cluster yet, each knowing the ones before it.
func startServers(t *testing.T, ca *pki.CA, names ...string) []*server.Server {
	t.Helper()
	dir, err := os.MkdirTemp("", "trivet-kube-") // shorter than t.TempDir: there will be sockets
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, os.RemoveAll(dir)) })
	var (
		servers []*server.Server
		seeds   []string
	)
	for _, name := range names {
		p, err := ca.Issue(pki.Identity{Cluster: ca.Cluster(), Role: pki.RoleNode, Name: name}, pki.For(time.Hour))
		require.NoError(t, err)
		certs := filepath.Join(dir, name, "certs")
		require.NoError(t, pki.Write(certs, ca.CertPEM(), p))
		cfg := server.DefaultConfig()
		cfg.Node, cfg.Listen, cfg.DataDir, cfg.CertsDir = trivet.NodeID(name), "127.0.0.1:0", filepath.Join(dir, name), certs
		cfg.Seeds, cfg.Logger = seeds, slog.New(slog.DiscardHandler)
		cfg.LogLanes, cfg.LogSegmentBytes = 1, 8<<20
		cfg.Fatal = func(err error) { t.Errorf("%s would stop: %v", name, err) }
		s, err := server.Open(t.Context(), cfg)
		require.NoError(t, err)
		t.Cleanup(func() { require.NoError(t, s.Close()) })
		servers, seeds = append(servers, s), append(seeds, s.Address())
	}
	return servers
}

// patient is Admins that ask until all servers have greeted: one that a busy machine keeps from it for askTimeout is
// taken for away, and then another one would be chosen.
type patient struct {
	*kube.Admins

	t    *testing.T
	dead string // an address where nobody is at home
}

func (p patient) Ask(ctx context.Context) (answers []kube.Answer, err error) {
	require.Eventually(p.t, func() bool {
		answers, err = p.Admins.Ask(ctx)
		return err != nil || slices.IndexFunc(answers, func(a kube.Answer) bool {
			return a.Node == "" && a.Address != p.dead
		}) < 0
	}, time.Minute, time.Millisecond)
	return answers, err
}

// TestInitRealServers is what `trivet kube init` does, against real servers over mutual TLS: the CA, the
// birth, and a Job that is run again, with all that it knew and with nothing.
func TestInitRealServers(t *testing.T) {
	if testing.Short() {
		t.Skip("-short: starts servers")
	}
	s := newAPIServer(t)
	a, err := ensure(t, s)
	require.NoError(t, err)
	servers := startServers(t, a.CA, "n2", "n1")
	const dead = "127.0.0.1:1" // an address of the Service where nobody is at home
	admins, err := kube.NewAdmins(a, dead, servers[0].Address(), servers[1].Address())
	require.NoError(t, err)
	all := patient{Admins: admins, t: t, dead: dead}

	answers, err := all.Ask(t.Context())
	require.NoError(t, err)
	require.Len(t, answers, 3)
	for _, answer := range answers {
		want := map[string]trivet.NodeID{servers[0].Address(): "n2", servers[1].Address(): "n1"}[answer.Address]
		assert.Equal(t, want, answer.Node, answer.Address)
		assert.False(t, answer.Member)
		assert.Error(t, answer.Err)
	}
	require.ErrorIs(t, admins.Init(t.Context(), servers[0].Address(), "n1"), trivet.ErrUnavailable,
		"an address that is another node's now")

	b, err := kube.Bear(within(t, 3*time.Minute), a.CA.Cluster(), s.client(), all, nil)
	require.NoError(t, err)
	assert.Equal(t, kube.Birth{Cluster: a.CA.Cluster(), Node: "n1", Now: true}, b)
	require.ErrorIs(t, admins.Init(t.Context(), servers[1].Address(), "n1"), trivet.ErrExists)

	// All notes are lost, the cluster is not.
	s.setData(map[string]string{})
	b, err = kube.Bear(within(t, 3*time.Minute), a.CA.Cluster(), s.client(), all, nil)
	require.NoError(t, err)
	assert.False(t, b.Now)
	assert.Equal(t, string(a.CA.Cluster()), s.data()[kube.KeyBorn])

	// Servers of another cluster are none of ours: no birth there.
	other := newCA(t)
	strangers, err := kube.NewAdmins(&kube.Authority{CA: other, BundlePEM: other.CertPEM()}, servers[0].Address())
	require.NoError(t, err)
	answers, err = strangers.Ask(t.Context())
	require.NoError(t, err)
	assert.Empty(t, answers[0].Node)
}

func TestNewAdminsRefuses(t *testing.T) {
	t.Parallel()
	ca := newCA(t)
	a := &kube.Authority{CA: ca, BundlePEM: ca.CertPEM()}
	for _, names := range [][]string{nil, {"host"}, {":7400"}, {"a:1", "b"}} {
		_, err := kube.NewAdmins(a, names...)
		require.ErrorIs(t, err, trivet.ErrInvalid, names)
	}
	nobody, err := kube.NewAdmins(a, "no-such-host.invalid:7400")
	require.NoError(t, err)
	_, err = nobody.Ask(within(t, time.Minute))
	require.ErrorContains(t, err, "no-such-host.invalid")
}
