package pki

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"fmt"

	"github.com/trivet-csi/trivet"
)

// RequestBytesMax is the size of the largest certificate request that Sign looks at.
const RequestBytesMax = 16 << 10

// requestType is the PEM type of a PKCS #10 certificate request (RFC 7468, section 7).
const requestType = "CERTIFICATE REQUEST"

// NewRequest makes a key and a request for a certificate of it (PKCS #10), both as PEM. The request
// names nobody: who gets the certificate is for the signer to find out.
func NewRequest() (keyPEM, csrPEM []byte, err error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, fmt.Errorf("make certificate request: make key: %w", err)
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		return nil, nil, fmt.Errorf("make certificate request: %w", err)
	}
	if keyPEM, err = encodeKey(key); err != nil {
		return nil, nil, fmt.Errorf("make certificate request: encode key: %w", err)
	}
	return keyPEM, pem.EncodeToMemory(&pem.Block{Type: requestType, Bytes: der}), nil
}

// Sign makes a certificate of id for the key in a request. It takes nothing but the key from it: names,
// usages and extensions that it asks for count for nothing. It returns ErrInvalid when the request is
// not one, too large, not signed with its own key (so that nobody gets a certificate of a key he does
// not have) or of a key that is neither P-256, P-384 nor Ed25519, and where Issue does.
func (ca *CA) Sign(csrPEM []byte, id Identity, v Validity) (certPEM []byte, err error) {
	key, err := requestedKey(csrPEM)
	if err != nil {
		return nil, fmt.Errorf("sign request of %s: %w", id, err)
	}
	cert, err := ca.certify(id, v, key)
	if err != nil {
		return nil, fmt.Errorf("sign request of %s: %w", id, err)
	}
	return encodeCert(cert), nil
}

// CheckRequest returns ErrInvalid for a request that Sign would refuse, whoever sent it.
func CheckRequest(csrPEM []byte) error {
	_, err := requestedKey(csrPEM)
	return err
}

// requestedKey returns the public key in a request, whose sender has the private one.
func requestedKey(csrPEM []byte) (crypto.PublicKey, error) {
	if len(csrPEM) > RequestBytesMax {
		return nil, fmt.Errorf("request has %d bytes, at most %d are allowed: %w", len(csrPEM), RequestBytesMax,
			trivet.ErrInvalid)
	}
	block, rest := pem.Decode(csrPEM)
	if block == nil || block.Type != requestType || len(bytes.TrimSpace(rest)) > 0 {
		return nil, fmt.Errorf("want one PEM block %q and nothing else: %w", requestType, trivet.ErrInvalid)
	}
	csr, err := x509.ParseCertificateRequest(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("parse request: %w: %w", err, trivet.ErrInvalid)
	}
	switch key := csr.PublicKey.(type) { // before the signature: checking one of a huge RSA key is dear
	case ed25519.PublicKey:
	case *ecdsa.PublicKey:
		if key.Curve != elliptic.P256() && key.Curve != elliptic.P384() {
			return nil, fmt.Errorf("key on curve %s, want P-256, P-384 or Ed25519: %w", key.Params().Name,
				trivet.ErrInvalid)
		}
	default:
		return nil, fmt.Errorf("key of type %s, want P-256, P-384 or Ed25519: %w", csr.PublicKeyAlgorithm,
			trivet.ErrInvalid)
	}
	if err := csr.CheckSignature(); err != nil {
		return nil, fmt.Errorf("request is not signed with its own key: %w: %w", err, trivet.ErrInvalid)
	}
	return csr.PublicKey, nil
}
