package pki_test

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/internal/pki"
)

const protoIssuer = "http/1.1"

// csrOf returns a request made by hand, in PEM.
func csrOf(t *testing.T, key crypto.Signer, template *x509.CertificateRequest) []byte {
	t.Helper()
	der, err := x509.CreateCertificateRequest(rand.Reader, template, key)
	require.NoError(t, err)
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der})
}

func ecKey(t *testing.T, curve elliptic.Curve) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(curve, rand.Reader)
	require.NoError(t, err)
	return key
}

func parseCert(t *testing.T, certPEM []byte) *x509.Certificate {
	t.Helper()
	block, _ := pem.Decode(certPEM)
	require.NotNil(t, block)
	cert, err := x509.ParseCertificate(block.Bytes)
	require.NoError(t, err)
	return cert
}

func nodeID(cluster trivet.ClusterID, name string) pki.Identity {
	return pki.Identity{Cluster: cluster, Role: pki.RoleNode, Name: name}
}

// A request that was signed gives a pair like one that was issued.
func TestSign(t *testing.T) {
	ca := newCA(t, clusterA)
	keyPEM, csrPEM, err := pki.NewRequest()
	require.NoError(t, err)
	certPEM, err := ca.Sign(csrPEM, nodeID(clusterA, "n1"), pki.For(time.Hour))
	require.NoError(t, err)
	p := &pki.Pair{Identity: nodeID(clusterA, "n1"), CertPEM: certPEM, KeyPEM: keyPEM}
	require.NoError(t, p.Verify(ca.CertPEM()))

	issued, signed := parseCert(t, issue(t, ca, pki.RoleNode, "n1", pki.For(time.Hour)).CertPEM), parseCert(t, certPEM)
	assert.Equal(t, issued.ExtKeyUsage, signed.ExtKeyUsage)
	assert.Equal(t, issued.KeyUsage, signed.KeyUsage)
	assert.Equal(t, issued.Subject.String(), signed.Subject.String())

	_, edKey, err := ed25519.GenerateKey(rand.Reader)
	require.NoError(t, err)
	for _, key := range []crypto.Signer{edKey, ecKey(t, elliptic.P384())} {
		_, err := ca.Sign(csrOf(t, key, &x509.CertificateRequest{}), nodeID(clusterA, "n1"), pki.For(time.Hour))
		require.NoError(t, err)
	}
}

// Nothing that a request asks for counts, except its key.
func TestSignTakesOnlyTheKey(t *testing.T) {
	ca := newCA(t, clusterA)
	uri, err := url.Parse("trivet://" + string(clusterA) + "/client/admin")
	require.NoError(t, err)
	isCA, err := asn1.Marshal(struct{ IsCA bool }{true})
	require.NoError(t, err)
	key := ecKey(t, elliptic.P256())
	csr := csrOf(t, key, &x509.CertificateRequest{
		Subject: pkix.Name{CommonName: "client admin"}, DNSNames: []string{"n9"}, URIs: []*url.URL{uri},
		ExtraExtensions: []pkix.Extension{{Id: asn1.ObjectIdentifier{2, 5, 29, 19}, Critical: true, Value: isCA}},
	})
	certPEM, err := ca.Sign(csr, nodeID(clusterA, "n1"), pki.For(time.Hour))
	require.NoError(t, err)
	cert := parseCert(t, certPEM)
	info, err := pki.Inspect(certPEM)
	require.NoError(t, err)
	assert.Equal(t, nodeID(clusterA, "n1"), info.Identity)
	assert.Equal(t, "node n1", cert.Subject.CommonName)
	assert.Empty(t, cert.DNSNames)
	assert.False(t, cert.IsCA)
	assert.True(t, key.PublicKey.Equal(cert.PublicKey))
}

func TestSignRefuses(t *testing.T) {
	ca := newCA(t, clusterA)
	_, good, err := pki.NewRequest()
	require.NoError(t, err)
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	require.NoError(t, err)
	block, _ := pem.Decode(csrOf(t, ecKey(t, elliptic.P256()), &x509.CertificateRequest{}))
	block.Bytes[len(block.Bytes)-1] ^= 1 // the signature is last
	for name, csr := range map[string][]byte{
		"rsa":             csrOf(t, rsaKey, &x509.CertificateRequest{}),
		"p-224":           csrOf(t, ecKey(t, elliptic.P224()), &x509.CertificateRequest{}),
		"p-521":           csrOf(t, ecKey(t, elliptic.P521()), &x509.CertificateRequest{}),
		"wrong signature": pem.EncodeToMemory(block),
		"empty":           nil,
		"no pem":          []byte("hello"),
		"two":             append(bytes.Clone(good), good...),
		"another type":    issue(t, ca, pki.RoleNode, "n1", pki.For(time.Hour)).CertPEM,
		"garbage inside":  pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: []byte("x")}),
		"too large":       append(bytes.Clone(good), strings.Repeat("\n", pki.RequestBytesMax)...),
	} {
		_, err := ca.Sign(csr, nodeID(clusterA, "n1"), pki.For(time.Hour))
		require.ErrorIs(t, err, trivet.ErrInvalid, name)
		require.ErrorIs(t, pki.CheckRequest(csr), trivet.ErrInvalid, name)
	}
	require.NoError(t, pki.CheckRequest(good))
	for name, id := range map[string]pki.Identity{
		"other cluster": nodeID(clusterB, "n1"), "no name": nodeID(clusterA, ""),
		"ca": {Cluster: clusterA, Role: pki.RoleCA, Name: "n1"},
	} {
		_, err := ca.Sign(good, id, pki.For(time.Hour))
		require.ErrorIs(t, err, trivet.ErrInvalid, name)
	}
	_, err = ca.Sign(good, nodeID(clusterA, "n1"), pki.For(2*pki.CAValidity))
	require.ErrorIs(t, err, trivet.ErrInvalid)
	v := ca.Within(pki.For(2 * pki.CAValidity))
	certPEM, err := ca.Sign(good, nodeID(clusterA, "n1"), v)
	require.NoError(t, err, "as long as the ca")
	assert.Equal(t, parseCert(t, ca.CertPEM()).NotAfter, parseCert(t, certPEM).NotAfter)
}

// A certificate of one role is worthless in the place of another.
func TestRolesDoNotMix(t *testing.T) {
	ca := newCA(t, clusterA)
	pair := func(role pki.Role) tls.Certificate {
		return keyPair(t, issue(t, ca, role, "n2", pki.For(time.Hour)))
	}
	issuer, node, client := pair(pki.RoleIssuer), pair(pki.RoleNode), pair(pki.RoleClient)

	server := open(t, dirOf(t, ca, pki.RoleNode, "n1", pki.For(time.Hour)), pki.RoleNode).ServerConfig(protocols())
	for _, proto := range []string{protoPeer, protoAdmin} {
		out := connect(t, server, dialTLS(t, rogue(&issuer, proto)))
		require.ErrorContains(t, out.server, "incompatible key usage", "an issuer calls nobody")
		assert.Zero(t, out.payload)
	}
	// Should the usages ever change, the role alone must do: a server whose protocol names no issuer.
	asServer := func(cert tls.Certificate, proto string) *tls.Config {
		return &tls.Config{Certificates: []tls.Certificate{cert}, NextProtos: []string{proto}}
	}
	toNode := open(t, dirOf(t, ca, pki.RoleClient, "c1", pki.For(time.Hour)), pki.RoleClient).ClientConfig("", protoAdmin)
	out := connect(t, asServer(issuer, protoAdmin), dialTLS(t, toNode))
	require.ErrorContains(t, out.client, "has role issuer, want one of [node]", "an issuer is no node")
	assert.Zero(t, out.payload)

	toIssuer, err := pki.IssuerClientConfig(ca.CertPEM(), protoIssuer)
	require.NoError(t, err)
	out = connect(t, asServer(node, protoIssuer), dialTLS(t, toIssuer))
	require.ErrorContains(t, out.client, "has role node, want one of [issuer]", "a node is no issuer")
	assert.Zero(t, out.payload)
	out = connect(t, asServer(client, protoIssuer), dialTLS(t, toIssuer))
	require.ErrorContains(t, out.client, "incompatible key usage", "a client is no issuer")
	assert.Zero(t, out.payload)
	_, err = pki.Open(dirOf(t, ca, pki.RoleIssuer, "n1", pki.For(time.Hour)), pki.RoleNode, nil)
	require.ErrorIs(t, err, trivet.ErrNotFound)
}

// Whoever sends a token must know that an issuer of this cluster gets it.
func TestIssuerClientRefuses(t *testing.T) {
	ca, caB, impostor := newCA(t, clusterA), newCA(t, clusterB), newCA(t, clusterA)
	client, err := pki.IssuerClientConfig(ca.CertPEM(), protoIssuer)
	require.NoError(t, err)
	serve := func(ca *pki.CA) *tls.Config {
		cfg, err := ca.IssuerServerConfig("issuer", time.Hour, protoIssuer)
		require.NoError(t, err)
		return cfg
	}
	tls12 := serve(ca)
	tls12.MinVersion, tls12.MaxVersion = tls.VersionTLS12, tls.VersionTLS12
	old := serve(ca)
	expired := keyPair(t, issue(t, ca, pki.RoleIssuer, "issuer",
		pki.Validity{From: time.Now().Add(-2 * time.Hour), Until: time.Now().Add(-time.Hour)}))
	old.GetCertificate = func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return &expired, nil }
	for _, tt := range []struct {
		name   string
		server *tls.Config
		want   string
	}{
		{"wrong ca", serve(impostor), "unknown authority"},
		{"other cluster", serve(caB), "is of cluster " + string(clusterB)},
		{"tls 1.2", tls12, "protocol version"},
		{"expired", old, "expired: at"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			out := connect(t, tt.server, dialTLS(t, client))
			require.ErrorContains(t, out.client, tt.want)
			assert.Zero(t, out.payload)
		})
	}
	out := connect(t, serve(ca), dialTLS(t, client))
	require.NoError(t, out.client, "control")
	assert.Equal(t, 1, out.payload)
	both := append(impostor.CertPEM(), ca.CertPEM()...)
	rotating, err := pki.IssuerClientConfig(both, protoIssuer)
	require.NoError(t, err)
	require.NoError(t, connect(t, serve(ca), dialTLS(t, rotating)).client, "during a rotation")
	_, err = pki.IssuerClientConfig(issue(t, ca, pki.RoleNode, "n1", pki.For(time.Hour)).CertPEM)
	require.ErrorIs(t, err, trivet.ErrInvalid)
}

// An issuer that runs for years does not serve an expired certificate.
func TestIssuerRenewsItself(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ca := newCA(t, clusterA)
		cfg, err := ca.IssuerServerConfig("issuer", time.Hour)
		require.NoError(t, err)
		first, err := cfg.GetCertificate(nil)
		require.NoError(t, err)
		again, err := cfg.GetCertificate(nil)
		require.NoError(t, err)
		assert.Same(t, first, again)
		for range 10 {
			time.Sleep(50 * time.Minute) //nolint:forbidigo // the bubble's clock
			now, err := cfg.GetCertificate(nil)
			require.NoError(t, err)
			assert.True(t, time.Now().Before(now.Leaf.NotAfter))
		}
	})
	_, err := newCA(t, clusterA).IssuerServerConfig("", time.Hour)
	require.ErrorIs(t, err, trivet.ErrInvalid)
}

// A pair in memory dials as a pair in a directory does.
func TestPairClientConfig(t *testing.T) {
	ca := newCA(t, clusterA)
	server := open(t, dirOf(t, ca, pki.RoleNode, "n1", pki.For(time.Hour)), pki.RoleNode).ServerConfig(protocols())
	p := issue(t, ca, pki.RoleClient, "job", pki.For(time.Hour))
	cfg, err := p.ClientConfig(ca.CertPEM(), "n1", protoAdmin)
	require.NoError(t, err)
	out := connect(t, server, dialTLS(t, cfg))
	require.NoError(t, out.client)
	assert.Equal(t, p.Identity, out.seen)
	other, err := p.ClientConfig(ca.CertPEM(), "n2", protoAdmin)
	require.NoError(t, err)
	require.ErrorContains(t, connect(t, server, dialTLS(t, other)).client, "server is node n1, want n2")
	_, err = p.ClientConfig(newCA(t, clusterB).CertPEM(), "n1", protoAdmin)
	require.ErrorIs(t, err, trivet.ErrInvalid)
}

func TestVerify(t *testing.T) {
	ca := newCA(t, clusterA)
	now := time.Now()
	good := issue(t, ca, pki.RoleNode, "n1", pki.For(time.Hour))
	require.NoError(t, good.Verify(ca.CertPEM()))
	other := issue(t, ca, pki.RoleNode, "n2", pki.For(time.Hour))
	client := issue(t, ca, pki.RoleClient, "n1", pki.For(time.Hour))
	n1 := func(certPEM, keyPEM []byte) pki.Pair {
		return pki.Pair{Identity: good.Identity, CertPEM: certPEM, KeyPEM: keyPEM}
	}
	for _, tt := range []struct {
		name string
		pair pki.Pair
		ca   []byte
		want string
	}{
		{"another key", n1(good.CertPEM, other.KeyPEM), ca.CertPEM(), "match"},
		{"another node", n1(other.CertPEM, other.KeyPEM), ca.CertPEM(), "n2"},
		{"another role", n1(client.CertPEM, client.KeyPEM), ca.CertPEM(), "client"},
		{"no key", n1(good.CertPEM, nil), ca.CertPEM(), "key"},
		{"impostor", *good, newCA(t, clusterA).CertPEM(), "unknown authority"},
		{"other cluster", *good, newCA(t, clusterB).CertPEM(), string(clusterB)},
		{"expired", *issue(t, ca, pki.RoleNode, "n1",
			pki.Validity{From: now.Add(-2 * time.Hour), Until: now.Add(-time.Hour)}), ca.CertPEM(), "expired: at"},
		{"no ca", *good, nil, "no certificate"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			err := tt.pair.Verify(tt.ca)
			require.ErrorIs(t, err, trivet.ErrInvalid)
			assert.ErrorContains(t, err, tt.want)
		})
	}
}

func TestInstall(t *testing.T) {
	ca := newCA(t, clusterA)
	dir := filepath.Join(t.TempDir(), "new", "dir")
	first := issue(t, ca, pki.RoleNode, "n1", pki.For(time.Hour))
	require.NoError(t, pki.Install(dir, ca.CertPEM(), first))
	creds := open(t, dir, pki.RoleNode)
	info, err := os.Stat(filepath.Join(dir, "node.key"))
	require.NoError(t, err)
	assert.Equal(t, os.FileMode(0o600), info.Mode().Perm())

	// Renewal with another bundle, and what a crash in the middle of one leaves: a key that does not fit.
	both := append(ca.CertPEM(), newCA(t, clusterA).CertPEM()...)
	require.NoError(t, os.WriteFile(filepath.Join(dir, "node.key"), issue(t, ca, pki.RoleNode, "n1",
		pki.For(time.Hour)).KeyPEM, 0o600))
	require.NoError(t, pki.Install(dir, both, issue(t, ca, pki.RoleNode, "n1", pki.For(2*time.Hour))))
	assert.WithinDuration(t, time.Now().Add(2*time.Hour), creds.Expires(), time.Minute)
	got, err := pki.ReadBundle(dir)
	require.NoError(t, err)
	assert.Equal(t, both, got)

	before := contents(t, dir)
	otherCA := newCA(t, clusterB)
	unfit := issue(t, ca, pki.RoleNode, "n1", pki.For(time.Hour))
	unfit.KeyPEM = first.KeyPEM
	for name, err := range map[string]error{
		"another node":     pki.Install(dir, ca.CertPEM(), issue(t, ca, pki.RoleNode, "n2", pki.For(time.Hour))),
		"another cluster":  pki.Install(dir, otherCA.CertPEM(), issue(t, otherCA, pki.RoleNode, "n1", pki.For(time.Hour))),
		"a role beside it": pki.Install(dir, otherCA.CertPEM(), issue(t, otherCA, pki.RoleClient, "c", pki.For(time.Hour))),
		"does not fit":     pki.Install(dir, ca.CertPEM(), unfit),
		"wrong ca":         pki.Install(dir, newCA(t, clusterA).CertPEM(), first),
	} {
		require.ErrorIs(t, err, trivet.ErrInvalid, name)
		assert.Equal(t, before, contents(t, dir), name)
	}
	require.NoError(t, os.WriteFile(filepath.Join(dir, "node.crt"), []byte("x"), 0o600))
	err = pki.Install(dir, ca.CertPEM(), first)
	require.ErrorIs(t, err, trivet.ErrInvalid, "what is not ours is not overwritten")
	assert.ErrorContains(t, err, "node.crt")
}

// contents returns the files of a directory.
func contents(t *testing.T, dir string) map[string]string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	require.NoError(t, err)
	files := map[string]string{}
	for _, e := range entries {
		b, err := os.ReadFile(filepath.Join(dir, e.Name()))
		require.NoError(t, err)
		files[e.Name()] = string(b)
	}
	return files
}

func TestHeld(t *testing.T) {
	ca := newCA(t, clusterA)
	_, err := pki.Held(t.TempDir())
	require.ErrorIs(t, err, trivet.ErrNotFound)

	dir := dirOf(t, ca, pki.RoleNode, "n1", pki.For(time.Hour))
	require.NoError(t, pki.Write(dir, ca.CertPEM(), issue(t, ca, pki.RoleClient, "c1", pki.For(time.Hour))))
	held, err := pki.Held(dir)
	require.NoError(t, err)
	require.Len(t, held, 2, "a ca's certificate alone is not a ca")
	assert.Equal(t, nodeID(clusterA, "n1"), held[0].Identity)
	assert.Equal(t, "c1", held[1].Identity.Name)

	caDir := t.TempDir()
	require.NoError(t, pki.WriteCA(caDir, ca))
	held, err = pki.Held(caDir)
	require.NoError(t, err)
	require.Len(t, held, 1)
	assert.Equal(t, pki.RoleCA, held[0].Identity.Role)
	require.NoError(t, held[0].Verify(ca.CertPEM()))

	public := t.TempDir()
	require.NoError(t, os.WriteFile(filepath.Join(public, "ca.crt"), ca.CertPEM(), 0o600))
	_, err = pki.Held(public)
	require.ErrorIs(t, err, trivet.ErrNotFound)
	require.NoError(t, os.WriteFile(filepath.Join(public, "node.crt"), []byte("x"), 0o600))
	_, err = pki.Held(public)
	require.ErrorIs(t, err, trivet.ErrInvalid)
}

// FuzzCheckRequest feeds what strangers may send: it must not panic, and what it lets through can be signed.
func FuzzCheckRequest(f *testing.F) {
	_, csrPEM, err := pki.NewRequest()
	require.NoError(f, err)
	f.Add(csrPEM)
	f.Add([]byte("-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n"))
	ca, err := pki.NewCA(clusterA, pki.For(pki.CAValidity))
	require.NoError(f, err)
	f.Fuzz(func(t *testing.T, b []byte) {
		if err := pki.CheckRequest(b); err != nil {
			require.ErrorIs(t, err, trivet.ErrInvalid)
			return
		}
		certPEM, err := ca.Sign(b, nodeID(clusterA, "n1"), pki.For(time.Hour))
		require.NoError(t, err)
		info, err := pki.Inspect(certPEM)
		require.NoError(t, err)
		require.Equal(t, nodeID(clusterA, "n1"), info.Identity)
	})
}
