package pki

import (
	"crypto/x509"
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"github.com/trivet-csi/trivet"
)

// Info is what a certificate says.
type Info struct {
	Identity Identity
	Serial   string // hexadecimal
	From     time.Time
	Until    time.Time
}

// RenewAt returns when the certificate is to be renewed: when a third of its validity is left.
func (i Info) RenewAt() time.Time { return i.Until.Add(-i.Until.Sub(i.From) / 3) }

// Inspect returns what a certificate says; of a bundle the first one's. Nothing is checked but the form:
// ErrInvalid when it is none of ours.
func Inspect(certPEM []byte) (Info, error) {
	certs, err := parseCerts(certPEM)
	if err != nil {
		return Info{}, fmt.Errorf("inspect certificate: %w", err)
	}
	id, err := identityIn(certs[0])
	if err != nil {
		return Info{}, fmt.Errorf("inspect certificate: %w", err)
	}
	return infoOf(certs[0], id), nil
}

func infoOf(cert *x509.Certificate, id Identity) Info {
	return Info{Identity: id, Serial: cert.SerialNumber.Text(16), From: cert.NotBefore, Until: cert.NotAfter}
}

// BundleCluster returns the cluster of the CAs in caPEM. It returns ErrInvalid unless they are CAs, at
// least one, and all of one cluster.
func BundleCluster(caPEM []byte) (trivet.ClusterID, error) {
	_, cluster, err := parseBundle(caPEM)
	return cluster, err
}

// Verify checks that a pair can be used now: the key belongs to the certificate, which speaks for
// p.Identity, is valid, and comes from a CA in caPEM with the usages of its role. All failures are
// ErrInvalid.
func (p *Pair) Verify(caPEM []byte) error {
	m, id, err := newMaterial(pems{caPEM, p.CertPEM, p.KeyPEM}, inMemory)
	if err != nil {
		return fmt.Errorf("verify %s: %w", p.Identity, err)
	}
	if id != p.Identity {
		return fmt.Errorf("verify %s: certificate is of %s: %w", p.Identity, id, trivet.ErrInvalid)
	}
	want := usages(id.Role)
	if id.Role == RoleCA {
		want = []x509.ExtKeyUsage{x509.ExtKeyUsageAny}
	}
	for _, usage := range want {
		if err := verifyChain(m.pair.Leaf, m.roots, usage, time.Now()); err != nil {
			return fmt.Errorf("verify %s: %w: %w", p.Identity, err, trivet.ErrInvalid)
		}
	}
	return nil
}

// ReadBundle returns ca.crt of dir. It returns ErrNotFound when there is none.
func ReadBundle(dir string) ([]byte, error) {
	b, err := readFile(dir, caCertFile)
	if err != nil {
		return nil, fmt.Errorf("read ca bundle: %w", err)
	}
	return b, nil
}

// ReadPair returns the certificate and key of a role in dir as they are; Verify tells whether they can
// be used. KeyPEM is empty when there is no key. It returns ErrNotFound when there is no certificate,
// and ErrInvalid when it is none of ours.
func ReadPair(dir string, role Role) (*Pair, error) {
	certName, keyName := leafFiles(role)
	certPEM, err := readFile(dir, certName)
	if err != nil {
		return nil, fmt.Errorf("read certificate of role %s: %w", role, err)
	}
	info, err := Inspect(certPEM)
	if err != nil {
		return nil, fmt.Errorf("read certificate of role %s: %s: %w", role, filepath.Join(dir, certName), err)
	}
	keyPEM, err := readFile(dir, keyName)
	if err != nil && !errors.Is(err, trivet.ErrNotFound) {
		return nil, fmt.Errorf("read key of %s: %w", info.Identity, err)
	}
	return &Pair{Identity: info.Identity, CertPEM: certPEM, KeyPEM: keyPEM}, nil
}

// Held returns the certificates with a key in dir, whatever their roles: of a node, a client, an issuer,
// and a CA. It returns ErrNotFound when there is none, and errors where ReadPair does.
func Held(dir string) ([]*Pair, error) {
	var held []*Pair
	for _, role := range append([]Role{RoleCA}, leafRoles...) {
		p, err := ReadPair(dir, role)
		switch {
		case errors.Is(err, trivet.ErrNotFound):
			continue
		case err != nil:
			return nil, err
		case role == RoleCA && len(p.KeyPEM) == 0: // everybody has the CA's certificate
			continue
		}
		held = append(held, p)
	}
	if len(held) == 0 {
		return nil, fmt.Errorf("%s holds no certificate of a node, client, issuer or ca: %w", dir, trivet.ErrNotFound)
	}
	return held, nil
}
