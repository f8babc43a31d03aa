package pki

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/trivet-csi/trivet"
)

// Protocols says which roles may speak which ALPN protocol to a server.
type Protocols map[string][]Role

// ServerConfig returns the configuration of a listener that serves the given protocols. It accepts
// TLS 1.3 only, with a certificate of the own cluster whose role may speak the negotiated protocol;
// a client that offers none of the protocols is refused. REQUIRES: the own role is RoleNode and
// protocols is not empty.
func (c *Credentials) ServerConfig(protocols Protocols) *tls.Config {
	allowed := maps.Clone(protocols)
	cfg := baseConfig()
	cfg.NextProtos = slices.Sorted(maps.Keys(allowed))
	// Any certificate passes crypto/tls; VerifyConnection, which it always calls, does the rest, as
	// in ClientConfig: one check for both ends, against the CAs of this moment.
	cfg.ClientAuth = tls.RequireAnyClientCert
	cfg.GetCertificate = func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return &c.use().pair, nil }
	cfg.VerifyConnection = func(cs tls.ConnectionState) error {
		roles, ok := allowed[cs.NegotiatedProtocol]
		if !ok {
			return fmt.Errorf("client negotiated protocol %q, want one of %q: %w",
				cs.NegotiatedProtocol, cfg.NextProtos, trivet.ErrInvalid)
		}
		_, err := c.verify(cs, x509.ExtKeyUsageClientAuth, roles)
		return err
	}
	return cfg
}

// ForeignServerConfig returns the configuration of a listener for a protocol whose clients know no
// ALPN, such as NBD. It accepts TLS 1.3 only, with a certificate of the own cluster and one of the
// given roles. A client that offers protocols is not refused: none is negotiated. REQUIRES: the own
// role is RoleNode.
func (c *Credentials) ForeignServerConfig(roles ...Role) *tls.Config {
	roles = slices.Clone(roles)
	cfg := baseConfig()
	cfg.ClientAuth = tls.RequireAnyClientCert // VerifyConnection does the rest, as in ServerConfig
	cfg.GetCertificate = func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return &c.use().pair, nil }
	cfg.VerifyConnection = func(cs tls.ConnectionState) error {
		_, err := c.verify(cs, x509.ExtKeyUsageClientAuth, roles)
		return err
	}
	return cfg
}

// ClientConfig returns the configuration to dial a node, whatever its address: the handshake fails
// unless the far end proves to be that node of the own cluster. An empty node means any node.
func (c *Credentials) ClientConfig(node trivet.NodeID, protocols ...string) *tls.Config {
	return clientConfig(c.use, c.identity.Cluster, node, protocols)
}

// ClientConfig is Credentials.ClientConfig for a pair in memory and the CAs in caPEM. It returns
// ErrInvalid when they do not fit together.
func (p *Pair) ClientConfig(caPEM []byte, node trivet.NodeID, protocols ...string) (*tls.Config, error) {
	m, _, err := newMaterial(pems{caPEM, p.CertPEM, p.KeyPEM}, inMemory)
	if err != nil {
		return nil, fmt.Errorf("use certificate of %s: %w", p.Identity, err)
	}
	return clientConfig(func() *material { return m }, p.Identity.Cluster, node, protocols), nil
}

// clientConfig returns a ClientConfig with the material that use returns at each handshake.
func clientConfig(use func() *material, cluster trivet.ClusterID, node trivet.NodeID, protocols []string) *tls.Config {
	cfg := baseConfig()
	cfg.NextProtos = slices.Clone(protocols)
	// No name in a certificate is a host name, so crypto/tls cannot do the check.
	cfg.InsecureSkipVerify = true
	cfg.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
		return &use().pair, nil
	}
	cfg.VerifyConnection = func(cs tls.ConnectionState) error {
		id, err := trust{cluster, use().roots}.verify(cs, x509.ExtKeyUsageServerAuth, []Role{RoleNode})
		if err != nil {
			return err
		}
		if node != "" && id.Name != string(node) {
			return fmt.Errorf("server is node %s, want %s: %w", id.Name, node, trivet.ErrInvalid)
		}
		return nil
	}
	return cfg
}

// PeerNode returns the node at the far end of a connection, checked again against the clock and
// the CAs of this moment, so that a long-lived connection can be ended when its certificate expired
// or its CA was removed. A far end that is no node is ErrInvalid.
func (c *Credentials) PeerNode(cs tls.ConnectionState) (trivet.NodeID, error) {
	id, err := c.verify(cs, x509.ExtKeyUsageClientAuth, []Role{RoleNode})
	if err != nil {
		return "", err
	}
	return trivet.NodeID(id.Name), nil
}

func baseConfig() *tls.Config {
	return &tls.Config{
		MinVersion:             tls.VersionTLS13,
		SessionTicketsDisabled: true, // no resumption, so no 0-RTT and no way around the checks
		// Full records from the start: the growing ones suit browsers, not bulk transfer.
		DynamicRecordSizingDisabled: true,
	}
}

// verify checks the far end's certificate against the own cluster and the CAs of this moment.
func (c *Credentials) verify(cs tls.ConnectionState, usage x509.ExtKeyUsage, roles []Role) (Identity, error) {
	return trust{c.identity.Cluster, c.use().roots}.verify(cs, usage, roles)
}

// trust is whose certificates are accepted.
type trust struct {
	cluster trivet.ClusterID
	roots   *x509.CertPool
}

// verify checks the far end's certificate and returns its identity. All failures are ErrInvalid.
func (t trust) verify(cs tls.ConnectionState, usage x509.ExtKeyUsage, roles []Role) (Identity, error) {
	id, err := IdentityOf(cs)
	if err != nil {
		return Identity{}, err
	}
	if cs.Version != tls.VersionTLS13 {
		return Identity{}, fmt.Errorf("peer %s speaks %s, want TLS 1.3: %w",
			id, tls.VersionName(cs.Version), trivet.ErrInvalid)
	}
	if id.Cluster != t.cluster {
		return Identity{}, fmt.Errorf("peer %s is of cluster %s, want %s: %w",
			id, id.Cluster, t.cluster, trivet.ErrInvalid)
	}
	if err := verifyChain(cs.PeerCertificates[0], t.roots, usage, time.Now()); err != nil {
		return Identity{}, fmt.Errorf("peer that calls itself %s: %w: %w", id, err, trivet.ErrInvalid)
	}
	if !slices.Contains(roles, id.Role) {
		return Identity{}, fmt.Errorf("peer %s has role %s, want one of %s: %w", id, id.Role, roles, trivet.ErrInvalid)
	}
	return id, nil
}

// verifyChain checks signature, validity and usage. Intermediates are ignored: our CAs sign leaves.
func verifyChain(leaf *x509.Certificate, roots *x509.CertPool, usage x509.ExtKeyUsage, now time.Time) error {
	_, err := leaf.Verify(x509.VerifyOptions{
		Roots: roots, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{usage},
	})
	invalid := x509.CertificateInvalidError{}
	if errors.As(err, &invalid) && invalid.Reason == x509.Expired {
		cert := invalid.Cert
		if now.Before(cert.NotBefore) {
			return fmt.Errorf("certificate of %s is not yet valid: from %s, now %s",
				cert.Subject.CommonName, stamp(cert.NotBefore), stamp(now))
		}
		return fmt.Errorf("certificate of %s expired: at %s, now %s",
			cert.Subject.CommonName, stamp(cert.NotAfter), stamp(now))
	}
	return err
}
