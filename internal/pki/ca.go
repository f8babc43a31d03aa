// Package pki makes and checks the certificates of a cluster. Every connection is TLS 1.3 with both
// ends authenticated; who the other end is stands in its certificate as an Identity, not as a DNS
// name, so addresses may change freely.
//
// A cluster has one CA (its bundle may hold the old and the new one during a rotation). NewCA and
// Issue make certificates, WriteCA and Write keep them in a directory:
//
//	ca.crt                   the CA's certificate, or several
//	ca.key                   its key, where certificates are issued only
//	node.crt, node.key       of a node
//	client.crt, client.key   of a client
//
// Where no key may travel, NewRequest makes one with a request for a certificate, Sign answers it, and
// Install keeps the result; IssuerServerConfig and IssuerClientConfig are the two ends of the
// connection that carries them.
//
// Open reads such a directory back, follows later changes of the files, and hands out tls.Config
// values. The checks are: the chain leads to a CA of the own cluster, the certificate names the same
// cluster and is valid now, its role is allowed for the negotiated protocol, and, when dialling, it
// names the node that was meant. Session tickets are off, so every connection is checked in full.
//
// Left to the caller: revocation. A node that was removed keeps its certificate until it expires;
// who is a member is the catalogue's knowledge.
package pki

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"time"

	"github.com/trivet-csi/trivet"
)

// How long certificates are valid by default.
const (
	CAValidity   = 10 * 365 * 24 * time.Hour
	LeafValidity = 365 * 24 * time.Hour
)

// skewAllowance dates certificates back, for machines whose clock is behind the issuer's.
const skewAllowance = 5 * time.Minute

// Validity is the time in which a certificate is valid, to the second.
type Validity struct{ From, Until time.Time }

// For returns a validity of d from now, and from a little earlier for clocks that are behind.
func For(d time.Duration) Validity {
	now := time.Now()
	return Validity{From: now.Add(-skewAllowance), Until: now.Add(d)}
}

// CA signs certificates of one cluster. It is safe for concurrent use.
type CA struct {
	identity Identity
	cert     *x509.Certificate
	key      crypto.Signer
}

// Pair is a certificate and its key, as PEM.
type Pair struct {
	Identity Identity
	CertPEM  []byte
	KeyPEM   []byte // PKCS #8; secret
}

// NewCA makes the CA of a cluster, with a new key. It returns ErrInvalid when the cluster is no UUID.
func NewCA(cluster trivet.ClusterID, v Validity) (*CA, error) {
	id := Identity{Cluster: cluster, Role: RoleCA, Name: "ca"}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("make ca key of cluster %s: %w", cluster, err)
	}
	template, err := newTemplate(id, v)
	if err != nil {
		return nil, fmt.Errorf("make ca: %w", err)
	}
	template.IsCA = true
	template.MaxPathLenZero = true // signs leaves only
	template.KeyUsage = x509.KeyUsageCertSign
	cert, err := sign(template, template, key.Public(), key)
	if err != nil {
		return nil, fmt.Errorf("make ca of cluster %s: %w", cluster, err)
	}
	return &CA{identity: id, cert: cert, key: key}, nil
}

// Cluster returns the cluster whose certificates the CA signs.
func (ca *CA) Cluster() trivet.ClusterID { return ca.identity.Cluster }

// CertPEM returns the CA's certificate.
func (ca *CA) CertPEM() []byte { return encodeCert(ca.cert) }

// KeyPEM returns the CA's key, PKCS #8. Whoever has it is the cluster's master.
func (ca *CA) KeyPEM() ([]byte, error) {
	b, err := encodeKey(ca.key)
	if err != nil {
		return nil, fmt.Errorf("encode key of the ca of cluster %s: %w", ca.Cluster(), err)
	}
	return b, nil
}

// Within returns v, ended early where it would outlive the CA.
func (ca *CA) Within(v Validity) Validity {
	if v.Until.After(ca.cert.NotAfter) {
		v.Until = ca.cert.NotAfter
	}
	return v
}

// Issue makes a certificate with a new key. It returns ErrInvalid when the identity is malformed, of
// another cluster or a CA's, or when the certificate would outlive the CA.
func (ca *CA) Issue(id Identity, v Validity) (*Pair, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("issue %s: make key: %w", id, err)
	}
	cert, err := ca.certify(id, v, key.Public())
	if err != nil {
		return nil, fmt.Errorf("issue %s: %w", id, err)
	}
	keyPEM, err := encodeKey(key)
	if err != nil {
		return nil, fmt.Errorf("issue %s: encode key: %w", id, err)
	}
	return &Pair{Identity: id, CertPEM: encodeCert(cert), KeyPEM: keyPEM}, nil
}

// certify signs that the holder of a key is id. It returns ErrInvalid as Issue does.
func (ca *CA) certify(id Identity, v Validity, key crypto.PublicKey) (*x509.Certificate, error) {
	if id.Cluster != ca.identity.Cluster {
		return nil, fmt.Errorf("ca is of cluster %s: %w", ca.identity.Cluster, trivet.ErrInvalid)
	}
	if id.Role == RoleCA {
		return nil, fmt.Errorf("a ca signs no other: %w", trivet.ErrInvalid)
	}
	if v.Until.After(ca.cert.NotAfter) {
		return nil, fmt.Errorf("valid until %s, ca until %s: %w",
			stamp(v.Until), stamp(ca.cert.NotAfter), trivet.ErrInvalid)
	}
	template, err := newTemplate(id, v)
	if err != nil {
		return nil, err
	}
	template.KeyUsage = x509.KeyUsageDigitalSignature
	template.ExtKeyUsage = usages(id.Role)
	return sign(template, ca.cert, key, ca.key)
}

// usages returns what the certificates of a role may be used for: nodes call and serve, clients only
// call, an issuer only serves.
func usages(role Role) []x509.ExtKeyUsage {
	switch role {
	case RoleNode:
		return []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth}
	case RoleClient:
		return []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
	case RoleIssuer:
		return []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
	case RoleCA:
	}
	return nil
}

// ParseCA returns the CA of a certificate and key in PEM; of a bundle the first certificate counts. It
// returns ErrInvalid when they are no CA's or do not fit together.
func ParseCA(certPEM, keyPEM []byte) (*CA, error) {
	pair, err := tls.X509KeyPair(certPEM, keyPEM)
	if err != nil {
		return nil, fmt.Errorf("parse ca: %w: %w", err, trivet.ErrInvalid)
	}
	id, err := identityIn(pair.Leaf)
	if err != nil {
		return nil, fmt.Errorf("parse ca: %w", err)
	}
	key, ok := pair.PrivateKey.(crypto.Signer)
	if !ok || id.Role != RoleCA || !pair.Leaf.IsCA {
		return nil, fmt.Errorf("parse ca: certificate of %s is no ca's: %w", id, trivet.ErrInvalid)
	}
	return &CA{identity: id, cert: pair.Leaf, key: key}, nil
}

// newTemplate returns what all certificates have in common.
func newTemplate(id Identity, v Validity) (*x509.Certificate, error) {
	if err := id.Validate(); err != nil {
		return nil, err
	}
	if !v.From.Before(v.Until) {
		return nil, fmt.Errorf("identity %s: valid from %s until %s: %w",
			id, stamp(v.From), stamp(v.Until), trivet.ErrInvalid)
	}
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		return nil, fmt.Errorf("draw serial number: %w", err)
	}
	t := &x509.Certificate{
		SerialNumber:          serial.Add(serial, big.NewInt(1)), // RFC 5280: positive
		Subject:               pkix.Name{CommonName: string(id.Role) + " " + id.Name, Organization: []string{"trivet"}},
		NotBefore:             v.From,
		NotAfter:              v.Until,
		BasicConstraintsValid: true,
	}
	t.URIs = append(t.URIs, id.uri())
	return t, nil
}

func sign(template, parent *x509.Certificate, pub crypto.PublicKey, key crypto.Signer) (*x509.Certificate, error) {
	der, err := x509.CreateCertificate(rand.Reader, template, parent, pub, key)
	if err != nil {
		return nil, fmt.Errorf("sign: %w", err)
	}
	return x509.ParseCertificate(der)
}

func encodeCert(cert *x509.Certificate) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw})
}

func encodeKey(key crypto.Signer) ([]byte, error) {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), nil
}

// stamp is how times appear in errors.
func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339) }
