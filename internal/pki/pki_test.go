package pki_test

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/internal/pki"
)

const (
	clusterA trivet.ClusterID = "0a0a0a0a-0000-4000-8000-00000000000a"
	clusterB trivet.ClusterID = "0b0b0b0b-0000-4000-8000-00000000000b"
)

func newCA(t *testing.T, cluster trivet.ClusterID) *pki.CA {
	t.Helper()
	ca, err := pki.NewCA(cluster, pki.For(pki.CAValidity))
	require.NoError(t, err)
	return ca
}

func issue(t *testing.T, ca *pki.CA, role pki.Role, name string, v pki.Validity) *pki.Pair {
	t.Helper()
	p, err := ca.Issue(pki.Identity{Cluster: ca.Cluster(), Role: role, Name: name}, v)
	require.NoError(t, err)
	return p
}

// dirOf returns a new directory with a certificate of ca.
func dirOf(t *testing.T, ca *pki.CA, role pki.Role, name string, v pki.Validity) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "pki")
	require.NoError(t, pki.Write(dir, ca.CertPEM(), issue(t, ca, role, name, v)))
	return dir
}

func open(t *testing.T, dir string, role pki.Role) *pki.Credentials {
	t.Helper()
	c, err := pki.Open(dir, role, nil)
	require.NoError(t, err)
	return c
}

func TestIdentity(t *testing.T) {
	id := pki.Identity{Cluster: clusterA, Role: pki.RoleNode, Name: "node-1.example.com"}
	assert.Equal(t, "trivet://0a0a0a0a-0000-4000-8000-00000000000a/node/node-1.example.com", id.String())
	got, err := pki.ParseIdentity(id.String())
	require.NoError(t, err)
	assert.Equal(t, id, got)
	for _, s := range []string{
		"", "trivet://", "https://0a0a0a0a-0000-4000-8000-00000000000a/node/n1",
		"trivet://0a0a0a0a-0000-4000-8000-00000000000a/node", "trivet://x/node/n1",
		"trivet://0a0a0a0a-0000-4000-8000-00000000000a/root/n1", "trivet://0a0a0a0a-0000-4000-8000-00000000000a/node/",
		"trivet://0a0a0a0a-0000-4000-8000-00000000000a/node/N1", "trivet://0a0a0a0a-0000-4000-8000-00000000000a/node/a/b",
	} {
		_, err := pki.ParseIdentity(s)
		require.ErrorIs(t, err, trivet.ErrInvalid, "%q", s)
	}
}

func TestIssueRefuses(t *testing.T) {
	ca := newCA(t, clusterA)
	now := time.Now()
	for _, tt := range []struct {
		name string
		id   pki.Identity
		v    pki.Validity
	}{
		{"other cluster", pki.Identity{Cluster: clusterB, Role: pki.RoleNode, Name: "n1"}, pki.For(time.Hour)},
		{"ca role", pki.Identity{Cluster: clusterA, Role: pki.RoleCA, Name: "n1"}, pki.For(time.Hour)},
		{"unknown role", pki.Identity{Cluster: clusterA, Role: "root", Name: "n1"}, pki.For(time.Hour)},
		{"bad name", pki.Identity{Cluster: clusterA, Role: pki.RoleNode, Name: "a/b"}, pki.For(time.Hour)},
		{"outlives ca", pki.Identity{Cluster: clusterA, Role: pki.RoleNode, Name: "n1"}, pki.For(2 * pki.CAValidity)},
		{
			"ends before it begins",
			pki.Identity{Cluster: clusterA, Role: pki.RoleNode, Name: "n1"},
			pki.Validity{From: now, Until: now.Add(-time.Second)},
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := ca.Issue(tt.id, tt.v)
			require.ErrorIs(t, err, trivet.ErrInvalid)
		})
	}
	_, err := pki.NewCA("no-uuid", pki.For(time.Hour))
	require.ErrorIs(t, err, trivet.ErrInvalid)
}

func TestCAFiles(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "new", "dir")
	ca := newCA(t, clusterA)
	require.NoError(t, pki.WriteCA(dir, ca))
	info, err := os.Stat(filepath.Join(dir, "ca.key"))
	require.NoError(t, err)
	assert.Equal(t, os.FileMode(0o600), info.Mode().Perm())

	got, err := pki.LoadCA(dir)
	require.NoError(t, err)
	assert.Equal(t, ca.CertPEM(), got.CertPEM())
	assert.Equal(t, clusterA, got.Cluster())
	issue(t, got, pki.RoleNode, "n1", pki.For(time.Hour))

	before, err := os.ReadFile(filepath.Join(dir, "ca.key"))
	require.NoError(t, err)
	require.ErrorIs(t, pki.WriteCA(dir, newCA(t, clusterA)), trivet.ErrExists)
	after, err := os.ReadFile(filepath.Join(dir, "ca.key"))
	require.NoError(t, err)
	assert.Equal(t, before, after)

	// A certificate alone is in the way too, and no key must appear beside it.
	require.NoError(t, os.Remove(filepath.Join(dir, "ca.key")))
	require.ErrorIs(t, pki.WriteCA(dir, newCA(t, clusterA)), trivet.ErrExists)
	assert.NoFileExists(t, filepath.Join(dir, "ca.key"))
	_, err = pki.LoadCA(dir)
	require.ErrorIs(t, err, trivet.ErrNotFound)

	// A leaf in the CA's place is no CA.
	leaf := issue(t, ca, pki.RoleNode, "n1", pki.For(time.Hour))
	other := t.TempDir()
	require.NoError(t, os.WriteFile(filepath.Join(other, "ca.crt"), leaf.CertPEM, 0o600))
	require.NoError(t, os.WriteFile(filepath.Join(other, "ca.key"), leaf.KeyPEM, 0o600))
	_, err = pki.LoadCA(other)
	require.ErrorIs(t, err, trivet.ErrInvalid)
}

func TestLeafFiles(t *testing.T) {
	ca := newCA(t, clusterA)
	dir := dirOf(t, ca, pki.RoleNode, "n1", pki.For(time.Hour))
	for name, mode := range map[string]os.FileMode{"ca.crt": 0o644, "node.crt": 0o644, "node.key": 0o600} {
		info, err := os.Stat(filepath.Join(dir, name))
		require.NoError(t, err)
		assert.Equal(t, mode, info.Mode().Perm(), name)
	}
	entries, err := os.ReadDir(dir)
	require.NoError(t, err)
	assert.Len(t, entries, 3, "no temporary files stay")

	err = pki.Write(dir, ca.CertPEM(), issue(t, ca, pki.RoleNode, "n1", pki.For(time.Hour)))
	require.ErrorIs(t, err, trivet.ErrExists)
	assert.ErrorContains(t, err, "node.key")
	err = pki.Write(dir, newCA(t, clusterA).CertPEM(), issue(t, ca, pki.RoleClient, "c1", pki.For(time.Hour)))
	require.ErrorIs(t, err, trivet.ErrExists, "another ca.crt")
	require.NoError(t, pki.Write(dir, ca.CertPEM(), issue(t, ca, pki.RoleClient, "c1", pki.For(time.Hour))),
		"a second role beside the first")
	assert.Equal(t, "c1", open(t, dir, pki.RoleClient).Identity().Name)
	assert.Equal(t, "n1", open(t, dir, pki.RoleNode).Identity().Name)
}

func TestOpenRefuses(t *testing.T) {
	caA, caB := newCA(t, clusterA), newCA(t, clusterB)
	_, err := pki.Open(t.TempDir(), pki.RoleNode, nil)
	require.ErrorIs(t, err, trivet.ErrNotFound)

	write := func(caPEM, cert, key []byte) string {
		dir := t.TempDir()
		for name, b := range map[string][]byte{"ca.crt": caPEM, "node.crt": cert, "node.key": key} {
			require.NoError(t, os.WriteFile(filepath.Join(dir, name), b, 0o600))
		}
		return dir
	}
	n1 := issue(t, caA, pki.RoleNode, "n1", pki.For(time.Hour))
	n2 := issue(t, caA, pki.RoleNode, "n2", pki.For(time.Hour))
	client := issue(t, caA, pki.RoleClient, "c1", pki.For(time.Hour))
	for name, dir := range map[string]string{
		"another's key":       write(caA.CertPEM(), n1.CertPEM, n2.KeyPEM),
		"ca of other cluster": write(caB.CertPEM(), n1.CertPEM, n1.KeyPEM),
		"cas of two clusters": write(append(caA.CertPEM(), caB.CertPEM()...), n1.CertPEM, n1.KeyPEM),
		"client as node":      write(caA.CertPEM(), client.CertPEM, client.KeyPEM),
		"leaf as ca":          write(n2.CertPEM, n1.CertPEM, n1.KeyPEM),
		"empty ca":            write(nil, n1.CertPEM, n1.KeyPEM),
		"garbage":             write(caA.CertPEM(), []byte("x"), n1.KeyPEM),
	} {
		_, err := pki.Open(dir, pki.RoleNode, nil)
		require.ErrorIs(t, err, trivet.ErrInvalid, name)
	}
}

func TestRenewRefuses(t *testing.T) {
	ca := newCA(t, clusterA)
	dir := dirOf(t, ca, pki.RoleNode, "n1", pki.For(time.Hour))
	require.ErrorIs(t, pki.Renew(dir, issue(t, ca, pki.RoleNode, "n2", pki.For(time.Hour))), trivet.ErrInvalid)
	require.ErrorIs(t, pki.Renew(dir, issue(t, ca, pki.RoleClient, "c1", pki.For(time.Hour))), trivet.ErrNotFound)
	leaf := issue(t, ca, pki.RoleNode, "n1", pki.For(time.Hour))
	require.ErrorIs(t, pki.ReplaceBundle(dir, leaf.CertPEM), trivet.ErrInvalid)
}
