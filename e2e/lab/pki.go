package lab

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"time"
)

// certValidity is longer than any lab lives.
const certValidity = 7 * 24 * time.Hour

// authority is the cluster's certificate authority. It signs servers and clients alike; what a client
// may do follows from its name and groups.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	pem  []byte
}

// pair is a certificate and its key, in PEM.
type pair struct {
	cert, key []byte
}

// subject says whose certificate it is: name and groups as the API server reads them, and the
// addresses and names at which it serves, if it does.
type subject struct {
	name   string
	groups []string
	hosts  []string
}

func newAuthority() (*authority, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("make key of authority: %w", err)
	}
	template := &x509.Certificate{
		Subject:               pkix.Name{CommonName: "trivet-e2e"},
		IsCA:                  true,
		BasicConstraintsValid: true,
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature,
	}
	if err := setTimes(template); err != nil {
		return nil, err
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return nil, fmt.Errorf("sign certificate of authority: %w", err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("read certificate of authority: %w", err)
	}
	return &authority{cert: cert, key: key, pem: certPEM(der)}, nil
}

// issue makes a key and its certificate.
func (a *authority) issue(s subject) (pair, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return pair{}, fmt.Errorf("make key of %s: %w", s.name, err)
	}
	template := &x509.Certificate{
		Subject:     pkix.Name{CommonName: s.name, Organization: s.groups},
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}
	if len(s.hosts) > 0 {
		template.ExtKeyUsage = append(template.ExtKeyUsage, x509.ExtKeyUsageServerAuth)
	}
	for _, h := range s.hosts {
		if ip := net.ParseIP(h); ip != nil {
			template.IPAddresses = append(template.IPAddresses, ip)
		} else {
			template.DNSNames = append(template.DNSNames, h)
		}
	}
	if err := setTimes(template); err != nil {
		return pair{}, err
	}
	der, err := x509.CreateCertificate(rand.Reader, template, a.cert, key.Public(), a.key)
	if err != nil {
		return pair{}, fmt.Errorf("sign certificate of %s: %w", s.name, err)
	}
	text, err := keyPEM(key)
	if err != nil {
		return pair{}, err
	}
	return pair{cert: certPEM(der), key: text}, nil
}

func setTimes(c *x509.Certificate) error {
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	if err != nil {
		return fmt.Errorf("make serial number: %w", err)
	}
	c.SerialNumber = serial
	c.NotBefore = time.Now().Add(-time.Hour) // clocks differ, though hardly on one machine
	c.NotAfter = time.Now().Add(certValidity)
	return nil
}

func certPEM(der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}

func keyPEM(key *ecdsa.PrivateKey) ([]byte, error) {
	der, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		return nil, fmt.Errorf("encode key: %w", err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: der}), nil
}

// credentials writes certificates and kubeconfigs below one folder.
type credentials struct {
	dir string
	ca  *authority
}

func (c credentials) path(name string) string { return filepath.Join(c.dir, name) }

// makeCredentials makes the authority, the key of service account tokens and what the control plane
// needs. The folder is readable by root only.
func makeCredentials(dir string) (credentials, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return credentials{}, fmt.Errorf("make folder of certificates: %w", err)
	}
	ca, err := newAuthority()
	if err != nil {
		return credentials{}, err
	}
	c := credentials{dir: dir, ca: ca}
	if err := writeFile(c.path("ca.crt"), ca.pem, 0o644); err != nil {
		return c, err
	}
	if err := c.writeTokenKey(); err != nil {
		return c, err
	}
	for file, s := range map[string]subject{
		"apiserver": {name: "kube-apiserver", hosts: []string{
			apiAddress, hostAddress, "kubernetes", "kubernetes.default", "kubernetes.default.svc",
			"kubernetes.default.svc." + clusterDomain,
		}},
		"etcd":           {name: "etcd", hosts: []string{hostAddress}},
		"controller":     {name: "kube-controller-manager", hosts: []string{hostAddress}},
		"scheduler":      {name: "kube-scheduler", hosts: []string{hostAddress}},
		"etcd-client":    {name: "kube-apiserver-etcd-client"},
		"kubelet-client": {name: "kube-apiserver-kubelet-client", groups: []string{"system:masters"}},
	} {
		if err := c.writePair(file, s); err != nil {
			return c, err
		}
	}
	for file, s := range map[string]subject{
		"admin":              {name: "lab-admin", groups: []string{"system:masters"}},
		"dns":                {name: "lab-dns", groups: []string{"system:masters"}},
		"controller-manager": {name: "system:kube-controller-manager"},
		"kube-scheduler":     {name: "system:kube-scheduler"},
	} {
		if err := c.writeKubeconfig(c.path(file+".kubeconfig"), s); err != nil {
			return c, err
		}
	}
	return c, nil
}

func (c credentials) writePair(file string, s subject) error {
	p, err := c.ca.issue(s)
	if err != nil {
		return err
	}
	if err := writeFile(c.path(file+".crt"), p.cert, 0o644); err != nil {
		return err
	}
	return writeFile(c.path(file+".key"), p.key, 0o600)
}

// writeTokenKey makes the key pair of service account tokens.
func (c credentials) writeTokenKey() error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return fmt.Errorf("make key of tokens: %w", err)
	}
	text, err := keyPEM(key)
	if err != nil {
		return err
	}
	public, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		return fmt.Errorf("encode public key of tokens: %w", err)
	}
	if err := writeFile(c.path("tokens.key"), text, 0o600); err != nil {
		return err
	}
	return writeFile(c.path("tokens.pub"), pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: public}), 0o644)
}

// writeKubeconfig writes a kubeconfig that needs no other file. It is JSON, which is YAML as well.
func (c credentials) writeKubeconfig(path string, s subject) error {
	p, err := c.ca.issue(s)
	if err != nil {
		return err
	}
	type named map[string]any
	text, err := json.MarshalIndent(map[string]any{
		"apiVersion": "v1", "kind": "Config", "current-context": "lab",
		"clusters": []named{{"name": "lab", "cluster": map[string]any{
			"server": apiURL, "certificate-authority-data": c.ca.pem,
		}}},
		"users": []named{{"name": s.name, "user": map[string]any{
			"client-certificate-data": p.cert, "client-key-data": p.key,
		}}},
		"contexts": []named{{"name": "lab", "context": map[string]any{"cluster": "lab", "user": s.name}}},
	}, "", "  ")
	if err != nil {
		return fmt.Errorf("encode kubeconfig of %s: %w", s.name, err)
	}
	return writeFile(path, append(text, '\n'), 0o600)
}
