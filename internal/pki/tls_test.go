package pki_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"math/big"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/internal/pki"
)

// The protocols of the test server: peers are nodes, admins are clients or nodes.
const (
	protoPeer  = "test-peer"
	protoAdmin = "test-admin"
)

func protocols() pki.Protocols {
	return pki.Protocols{protoPeer: {pki.RoleNode}, protoAdmin: {pki.RoleClient, pki.RoleNode}}
}

// outcome is what the two ends of one connection saw.
type outcome struct {
	server  error // of the handshake
	client  error // of handshake, sending and receiving one byte
	payload int   // bytes that reached the server's application
	seen    pki.Identity
}

// connect lets client speak one byte to a server of server over a loopback socket.
func connect(t *testing.T, server *tls.Config, client func(net.Conn) error) outcome {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer l.Close()
	var out outcome
	done := make(chan struct{})
	go func() {
		defer close(done)
		conn, err := l.Accept()
		if err != nil {
			out.server = err
			return
		}
		defer conn.Close()
		s := tls.Server(conn, server)
		if out.server = s.HandshakeContext(t.Context()); out.server != nil {
			return
		}
		out.seen, _ = pki.IdentityOf(s.ConnectionState())
		b := make([]byte, 1)
		out.payload, _ = s.Read(b)
		_, _ = s.Write(b)
	}()
	conn, err := net.Dial("tcp", l.Addr().String())
	require.NoError(t, err)
	out.client = client(conn)
	_ = conn.Close()
	<-done
	return out
}

// dialTLS is a client of connect.
func dialTLS(t *testing.T, cfg *tls.Config) func(net.Conn) error {
	return func(conn net.Conn) error {
		c := tls.Client(conn, cfg)
		if err := c.HandshakeContext(t.Context()); err != nil {
			return err
		}
		b := []byte("x")
		if _, err := c.Write(b); err != nil {
			return err
		}
		_, err := c.Read(b)
		return err
	}
}

// selfSigned returns a certificate that claims an identity on nobody's authority.
func selfSigned(t *testing.T, claim string) tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	uri, err := url.Parse(claim)
	require.NoError(t, err)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "node n1"}, URIs: []*url.URL{uri},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	require.NoError(t, err)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// keyPair returns a pair as crypto/tls takes it.
func keyPair(t *testing.T, p *pki.Pair) tls.Certificate {
	t.Helper()
	pair, err := tls.X509KeyPair(p.CertPEM, p.KeyPEM)
	require.NoError(t, err)
	return pair
}

// rogue returns a client configuration that checks nothing and presents the certificate as it is.
func rogue(cert *tls.Certificate, protos ...string) *tls.Config {
	cfg := &tls.Config{InsecureSkipVerify: true, NextProtos: protos}
	if cert != nil {
		// Unlike Certificates, this sends it even when the server's list of CAs does not match.
		cfg.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return cert, nil }
	}
	return cfg
}

// S1 and S15, seen from the server: who may not speak gets no byte through.
func TestServerRefuses(t *testing.T) {
	caA, caB := newCA(t, clusterA), newCA(t, clusterB)
	impostor := newCA(t, clusterA) // same cluster ID, other key
	server := open(t, dirOf(t, caA, pki.RoleNode, "n1", pki.For(time.Hour)), pki.RoleNode).ServerConfig(protocols())
	pair := func(ca *pki.CA, role pki.Role, v pki.Validity) *tls.Certificate {
		p := keyPair(t, issue(t, ca, role, "n2", v))
		return &p
	}
	now := time.Now()
	self := selfSigned(t, "trivet://"+string(clusterA)+"/node/n2")
	noURI := selfSigned(t, "https://example.com/n2")
	tls12 := rogue(pair(caA, pki.RoleNode, pki.For(time.Hour)), protoPeer)
	tls12.MaxVersion = tls.VersionTLS12
	for _, tt := range []struct {
		name   string
		client func(net.Conn) error
		want   string // in the server's error
	}{
		{"plaintext", func(c net.Conn) error {
			if _, err := c.Write([]byte("GET / HTTP/1.1\r\n\r\n")); err != nil {
				return err
			}
			_, err := c.Read(make([]byte, 1))
			if err == nil {
				_, err = tls.Client(c, rogue(nil)).Read(make([]byte, 1)) // an alert came; no more may
			}
			return err
		}, "first record does not look like a TLS handshake"},
		{"tls 1.2", dialTLS(t, tls12), "unsupported versions"},
		{"no certificate", dialTLS(t, rogue(nil, protoPeer)), "didn't provide a certificate"},
		{"wrong ca", dialTLS(t, rogue(pair(impostor, pki.RoleNode, pki.For(time.Hour)), protoPeer)), "unknown authority"},
		{
			"other cluster", dialTLS(t, rogue(pair(caB, pki.RoleNode, pki.For(time.Hour)), protoPeer)),
			"is of cluster " + string(clusterB) + ", want " + string(clusterA),
		},
		{"expired", dialTLS(t, rogue(pair(caA, pki.RoleNode,
			pki.Validity{From: now.Add(-2 * time.Hour), Until: now.Add(-time.Hour)}), protoPeer)), "expired: at"},
		{"not yet valid", dialTLS(t, rogue(pair(caA, pki.RoleNode,
			pki.Validity{From: now.Add(time.Hour), Until: now.Add(2 * time.Hour)}), protoPeer)), "not yet valid: from"},
		{
			"client on peer port", dialTLS(t, rogue(pair(caA, pki.RoleClient, pki.For(time.Hour)), protoPeer)),
			"has role client, want one of [node]",
		},
		{"self-signed with a real name", dialTLS(t, rogue(&self, protoPeer)), "unknown authority"},
		{"no identity", dialTLS(t, rogue(&noURI, protoPeer)), "want trivet://"},
		{"no protocol", dialTLS(t, rogue(pair(caA, pki.RoleNode, pki.For(time.Hour)))), `negotiated protocol ""`},
		{"unknown protocol", dialTLS(t, rogue(pair(caA, pki.RoleNode, pki.For(time.Hour)), "h2")), "application protocols"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			out := connect(t, server, tt.client)
			require.ErrorContains(t, out.server, tt.want)
			require.Error(t, out.client)
			assert.Zero(t, out.payload)
		})
	}
	t.Run("control", func(t *testing.T) { // the same with nothing wrong
		out := connect(t, server, dialTLS(t, rogue(pair(caA, pki.RoleNode, pki.For(time.Hour)), protoPeer)))
		require.NoError(t, out.server)
		require.NoError(t, out.client)
		assert.Equal(t, 1, out.payload)
		assert.Equal(t, pki.Identity{Cluster: clusterA, Role: pki.RoleNode, Name: "n2"}, out.seen)
		out = connect(t, server, dialTLS(t, rogue(pair(caA, pki.RoleClient, pki.For(time.Hour)), protoAdmin)))
		require.NoError(t, out.client, "a client on the admin port")
		assert.Equal(t, pki.RoleClient, out.seen.Role)
	})
}

// S1 and S15, seen from the client: it sends nothing to a server that is not the one it meant.
func TestClientRefuses(t *testing.T) {
	caA, caB := newCA(t, clusterA), newCA(t, clusterB)
	impostor := newCA(t, clusterA)
	client := open(t, dirOf(t, caA, pki.RoleNode, "n2", pki.For(time.Hour)), pki.RoleNode)
	server := func(cert tls.Certificate) *tls.Config {
		return &tls.Config{
			Certificates: []tls.Certificate{cert}, ClientAuth: tls.RequestClientCert, NextProtos: []string{protoPeer},
		}
	}
	node := func(ca *pki.CA, name string, v pki.Validity) *tls.Config {
		return server(keyPair(t, issue(t, ca, pki.RoleNode, name, v)))
	}
	now := time.Now()
	tls12 := node(caA, "n1", pki.For(time.Hour))
	tls12.MaxVersion = tls.VersionTLS12
	for _, tt := range []struct {
		name   string
		server *tls.Config
		want   string
	}{
		{"tls 1.2", tls12, "protocol version"},
		{"wrong ca", node(impostor, "n1", pki.For(time.Hour)), "unknown authority"},
		{"other cluster", node(caB, "n1", pki.For(time.Hour)), "is of cluster " + string(clusterB)},
		{"other node", node(caA, "n3", pki.For(time.Hour)), "server is node n3, want n1"},
		{"expired", node(caA, "n1", pki.Validity{From: now.Add(-2 * time.Hour), Until: now.Add(-time.Hour)}), "expired: at"},
		{
			"not yet valid", node(caA, "n1", pki.Validity{From: now.Add(time.Hour), Until: now.Add(2 * time.Hour)}),
			"not yet valid: from",
		},
		{"self-signed", server(selfSigned(t, "trivet://"+string(clusterA)+"/node/n1")), "unknown authority"},
		{
			"client as server", server(keyPair(t, issue(t, caA, pki.RoleClient, "n1", pki.For(time.Hour)))),
			"incompatible key usage",
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			out := connect(t, tt.server, dialTLS(t, client.ClientConfig("n1", protoPeer)))
			require.ErrorContains(t, out.client, tt.want)
			assert.Zero(t, out.payload)
		})
	}
	out := connect(t, node(caA, "n1", pki.For(time.Hour)), dialTLS(t, client.ClientConfig("n1", protoPeer)))
	require.NoError(t, out.client, "control")
	out = connect(t, node(caA, "n3", pki.For(time.Hour)), dialTLS(t, client.ClientConfig("", protoPeer)))
	require.NoError(t, out.client, "any node")
}

// A client's certificate must not be enough for a name that only its role tells from a node's.
func TestPeerNode(t *testing.T) {
	ca := newCA(t, clusterA)
	server := open(t, dirOf(t, ca, pki.RoleNode, "n1", pki.For(time.Hour)), pki.RoleNode)
	state := func(role pki.Role) tls.ConnectionState {
		leaf, err := x509.ParseCertificate(keyPair(t, issue(t, ca, role, "n2", pki.For(time.Hour))).Certificate[0])
		require.NoError(t, err)
		return tls.ConnectionState{Version: tls.VersionTLS13, PeerCertificates: []*x509.Certificate{leaf}}
	}
	node, err := server.PeerNode(state(pki.RoleNode))
	require.NoError(t, err)
	assert.EqualValues(t, "n2", node)
	_, err = server.PeerNode(state(pki.RoleClient))
	require.ErrorContains(t, err, "has role client")
	_, err = server.PeerNode(tls.ConnectionState{Version: tls.VersionTLS13})
	require.ErrorIs(t, err, trivet.ErrInvalid)
}

// S2: a rotation of leaf and CA under running servers and clients, then the old ones are worthless.
func TestRotation(t *testing.T) {
	oldCA, newerCA := newCA(t, clusterA), newCA(t, clusterA)
	n1 := dirOf(t, oldCA, pki.RoleNode, "n1", pki.For(time.Hour))
	n2 := dirOf(t, oldCA, pki.RoleNode, "n2", pki.For(time.Hour))
	server, client := open(t, n1, pki.RoleNode), open(t, n2, pki.RoleNode)
	serverCfg, clientCfg := server.ServerConfig(protocols()), client.ClientConfig("n1", protoPeer)
	ok := func(step string) {
		t.Helper()
		require.NoError(t, connect(t, serverCfg, dialTLS(t, clientCfg)).client, step)
	}
	oldLeaf := keyPair(t, issue(t, oldCA, pki.RoleNode, "n2", pki.For(time.Hour)))
	both := append(oldCA.CertPEM(), newerCA.CertPEM()...)
	ok("before")
	for _, dir := range []string{n1, n2} {
		require.NoError(t, pki.ReplaceBundle(dir, both))
		ok("bundle of both")
	}
	longer := pki.For(48 * time.Hour)
	require.NoError(t, pki.Renew(n1, issue(t, newerCA, pki.RoleNode, "n1", longer)))
	ok("server renewed")
	assert.WithinDuration(t, longer.Until, server.Expires(), time.Second)
	require.NoError(t, pki.Renew(n2, issue(t, newerCA, pki.RoleNode, "n2", longer)))
	ok("client renewed")
	out := connect(t, serverCfg, dialTLS(t, rogue(&oldLeaf, protoPeer)))
	require.NoError(t, out.client, "old leaf, old ca still trusted")
	for _, dir := range []string{n1, n2} {
		require.NoError(t, pki.ReplaceBundle(dir, newerCA.CertPEM()))
		ok("new ca alone")
	}
	require.ErrorContains(t, connect(t, serverCfg, dialTLS(t, rogue(&oldLeaf, protoPeer))).server, "unknown authority")
	leaf, err := x509.ParseCertificate(oldLeaf.Certificate[0])
	require.NoError(t, err)
	_, err = server.PeerNode(tls.ConnectionState{Version: tls.VersionTLS13, PeerCertificates: []*x509.Certificate{leaf}})
	require.ErrorIs(t, err, trivet.ErrInvalid, "an old session is found out too")
}

// Files that do not fit leave the old ones in use.
func TestReloadKeepsGood(t *testing.T) {
	ca := newCA(t, clusterA)
	dir := dirOf(t, ca, pki.RoleNode, "n1", pki.For(time.Hour))
	server := open(t, dir, pki.RoleNode)
	client := open(t, dirOf(t, ca, pki.RoleNode, "n2", pki.For(time.Hour)), pki.RoleNode).ClientConfig("n1", protoPeer)
	ok := func(step string) {
		t.Helper()
		require.NoError(t, connect(t, server.ServerConfig(protocols()), dialTLS(t, client)).client, step)
	}
	// By another file: one that is written to within the clock's tick of a filesystem may look unchanged.
	replace := func(name string, b []byte) {
		t.Helper()
		path := filepath.Join(dir, name)
		require.NoError(t, os.WriteFile(path+".new", b, 0o600))
		require.NoError(t, os.Rename(path+".new", path))
	}
	renewed := issue(t, ca, pki.RoleNode, "n1", pki.For(2*time.Hour))
	replace("node.key", renewed.KeyPEM)
	ok("new key, old certificate")
	assert.WithinDuration(t, time.Now().Add(time.Hour), server.Expires(), time.Minute)
	replace("node.crt", renewed.CertPEM)
	ok("both new")
	assert.WithinDuration(t, time.Now().Add(2*time.Hour), server.Expires(), time.Minute)

	other := issue(t, ca, pki.RoleNode, "n9", pki.For(time.Hour))
	replace("node.key", other.KeyPEM)
	replace("node.crt", other.CertPEM)
	ok("another identity is not taken up")
	require.NoError(t, os.Remove(filepath.Join(dir, "ca.crt")))
	ok("a file is missing")
}

// Nothing is resumed: neither end may skip the checks by an old ticket.
func TestNoResumption(t *testing.T) {
	ca := newCA(t, clusterA)
	server := open(t, dirOf(t, ca, pki.RoleNode, "n1", pki.For(time.Hour)), pki.RoleNode).ServerConfig(protocols())
	leaf := keyPair(t, issue(t, ca, pki.RoleNode, "n2", pki.For(time.Hour)))
	cfg := rogue(&leaf, protoPeer)
	cfg.ClientSessionCache = tls.NewLRUClientSessionCache(8)
	cfg.ServerName = "n1" // the key of the cache
	for range 3 {
		var resumed bool
		cfg.VerifyConnection = func(cs tls.ConnectionState) error {
			resumed = cs.DidResume
			return nil
		}
		require.NoError(t, connect(t, server, dialTLS(t, cfg)).client)
		assert.False(t, resumed)
	}
}

// A listener for a protocol without ALPN checks everything else (S1, S4, S15).
func TestForeignServer(t *testing.T) {
	caA, caB := newCA(t, clusterA), newCA(t, clusterB)
	server := open(t, dirOf(t, caA, pki.RoleNode, "n1", pki.For(time.Hour)), pki.RoleNode)
	pair := func(ca *pki.CA, role pki.Role, v pki.Validity) *tls.Certificate {
		p := keyPair(t, issue(t, ca, role, "x", v))
		return &p
	}
	past := pki.Validity{From: time.Now().Add(-2 * time.Hour), Until: time.Now().Add(-time.Hour)}
	tls12 := rogue(pair(caA, pki.RoleClient, pki.For(time.Hour)))
	tls12.MaxVersion = tls.VersionTLS12
	for name, tt := range map[string]struct {
		client *tls.Config
		want   string
	}{
		"client":         {rogue(pair(caA, pki.RoleClient, pki.For(time.Hour))), ""},
		"with protocols": {rogue(pair(caA, pki.RoleClient, pki.For(time.Hour)), "nbd"), ""},
		"other role":     {rogue(pair(caA, pki.RoleNode, pki.For(time.Hour))), "has role node, want one of [client]"},
		"no certificate": {rogue(nil), "didn't provide a certificate"},
		"other cluster":  {rogue(pair(caB, pki.RoleClient, pki.For(time.Hour))), "is of cluster"},
		"expired":        {rogue(pair(caA, pki.RoleClient, past)), "expired: at"},
		"tls 1.2":        {tls12, "unsupported versions"},
	} {
		out := connect(t, server.ForeignServerConfig(pki.RoleClient), dialTLS(t, tt.client))
		if tt.want == "" {
			require.NoError(t, out.server, name)
			require.NoError(t, out.client, name)
			continue
		}
		require.ErrorContains(t, out.server, tt.want, name)
		assert.Zero(t, out.payload, name)
	}
}
