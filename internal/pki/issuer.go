package pki

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"sync"
	"time"
)

// IssuerServerConfig returns the configuration of the listener at which a CA hands out certificates:
// TLS 1.3, with a certificate of role issuer that the CA gives itself and renews, each valid for
// validity. It asks for no certificate, for those who come have none yet: whoever serves there must
// find out who they are by other means.
func (ca *CA) IssuerServerConfig(name string, validity time.Duration, protocols ...string) (*tls.Config, error) {
	s := &selfIssued{ca: ca, id: Identity{Cluster: ca.Cluster(), Role: RoleIssuer, Name: name}, validity: validity}
	if _, err := s.certificate(); err != nil { // an error of the configuration shows now, not at the first client
		return nil, err
	}
	cfg := baseConfig()
	cfg.NextProtos = protocols
	cfg.GetCertificate = func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return s.certificate() }
	return cfg, nil
}

// IssuerClientConfig returns the configuration to dial an issuer of the cluster whose CAs are in caPEM,
// whatever its address. The handshake fails unless the far end proves to be one: only then may a
// secret be sent to it. It returns ErrInvalid when caPEM holds no CA.
func IssuerClientConfig(caPEM []byte, protocols ...string) (*tls.Config, error) {
	roots, cluster, err := parseBundle(caPEM)
	if err != nil {
		return nil, fmt.Errorf("trust the issuer: ca bundle: %w", err)
	}
	cfg := baseConfig()
	cfg.NextProtos = protocols
	// No name in a certificate is a host name, so crypto/tls cannot do the check.
	cfg.InsecureSkipVerify = true
	cfg.VerifyConnection = func(cs tls.ConnectionState) error {
		_, err := trust{cluster, roots}.verify(cs, x509.ExtKeyUsageServerAuth, []Role{RoleIssuer})
		return err
	}
	return cfg, nil
}

// selfIssued is a certificate that its CA renews when it is asked for and has aged.
type selfIssued struct {
	ca       *CA
	id       Identity
	validity time.Duration

	mu      sync.Mutex
	current *tls.Certificate
	renewAt time.Time
}

// certificate returns the certificate to use now.
func (s *selfIssued) certificate() (*tls.Certificate, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.current != nil && time.Now().Before(s.renewAt) {
		return s.current, nil
	}
	p, err := s.ca.Issue(s.id, s.ca.Within(For(s.validity)))
	if err != nil {
		return nil, err
	}
	pair, err := tls.X509KeyPair(p.CertPEM, p.KeyPEM)
	if err != nil {
		return nil, fmt.Errorf("use certificate of %s: %w", s.id, err)
	}
	s.current, s.renewAt = &pair, infoOf(pair.Leaf, s.id).RenewAt()
	return s.current, nil
}
