package pki

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/trivet-csi/trivet"
)

// Credentials are the certificates of one directory: who we are and whom we trust. They follow the
// files: every use looks whether the files changed, and reads them again if so. Files that do not fit
// together, as in the middle of a renewal, or that name another identity, leave the old ones in use.
// Safe for concurrent use.
type Credentials struct {
	dir      string
	identity Identity // fixed at Open
	log      *slog.Logger

	mu      sync.Mutex
	current *material
	seen    [3]fileState // of the files when last read, successfully or not
}

// material is one consistent reading of the files. It is never changed.
type material struct {
	pair  tls.Certificate
	roots *x509.CertPool
}

// fileState tells one version of a file from the next.
type fileState struct {
	info fs.FileInfo // nil when missing
}

// Open reads ca.crt and the certificate and key of a role from dir. It returns ErrNotFound when a
// file is missing and ErrInvalid when they do not fit together. A certificate that has expired is no
// error here: it may be renewed in place. A nil logger discards.
func Open(dir string, role Role, log *slog.Logger) (*Credentials, error) {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	c := &Credentials{dir: dir, identity: Identity{Role: role}, log: log}
	c.seen = c.look()
	m, id, err := c.read()
	if err != nil {
		return nil, fmt.Errorf("open certificates of role %s: %w", role, err)
	}
	c.current, c.identity = m, id
	return c, nil
}

// Identity returns who the own certificate speaks for.
func (c *Credentials) Identity() Identity { return c.identity }

// Expires returns the end of the own certificate's validity.
func (c *Credentials) Expires() time.Time { return c.use().pair.Leaf.NotAfter }

// use returns the material to use now, read again if the files changed. The lock spans reading three
// small files: handshakes during a renewal wait for it rather than read them too.
func (c *Credentials) use() *material {
	seen := c.look()
	c.mu.Lock()
	defer c.mu.Unlock()
	if sameFiles(seen, c.seen) {
		return c.current
	}
	c.seen = seen
	m, id, err := c.read()
	if err == nil && id != c.identity {
		err = fmt.Errorf("certificate is of %s, was of %s: %w", id, c.identity, trivet.ErrInvalid)
	}
	if err != nil {
		c.log.Warn("changed certificates not usable, keeping the old", "dir", c.dir, "err", err)
		return c.current
	}
	c.log.Info("certificates reloaded", "dir", c.dir, "expires", m.pair.Leaf.NotAfter)
	c.current = m
	return m
}

// look returns the state of the three files.
func (c *Credentials) look() (seen [3]fileState) {
	certName, keyName := leafFiles(c.identity.Role)
	for i, name := range []string{caCertFile, certName, keyName} {
		if info, err := os.Stat(filepath.Join(c.dir, name)); err == nil {
			seen[i].info = info
		}
	}
	return seen
}

func sameFiles(a, b [3]fileState) bool {
	for i := range a {
		x, y := a[i].info, b[i].info
		if (x == nil) != (y == nil) {
			return false
		}
		if x != nil && (!os.SameFile(x, y) || !x.ModTime().Equal(y.ModTime()) || x.Size() != y.Size()) {
			return false
		}
	}
	return true
}

// read reads the files and checks that they fit together and are of the role.
func (c *Credentials) read() (*material, Identity, error) {
	certName, keyName := leafFiles(c.identity.Role)
	var (
		files pems
		paths [3]string
	)
	for i, name := range []string{caCertFile, certName, keyName} {
		b, err := readFile(c.dir, name)
		if err != nil {
			return nil, Identity{}, err
		}
		files[i], paths[i] = b, filepath.Join(c.dir, name)
	}
	m, id, err := newMaterial(files, paths)
	if err == nil && id.Role != c.identity.Role {
		err = fmt.Errorf("%s is of %s, want role %s: %w", paths[1], id, c.identity.Role, trivet.ErrInvalid)
	}
	return m, id, err
}

// pems are a CA bundle, a certificate and its key.
type pems [3][]byte

// inMemory is how errors name pems that are not files.
var inMemory = [3]string{"ca bundle", "certificate", "key"}

// newMaterial checks that a bundle, a certificate and a key fit together, and returns whose they are.
// Errors name them as names does.
func newMaterial(p pems, names [3]string) (*material, Identity, error) {
	roots, cluster, err := parseBundle(p[0])
	if err != nil {
		return nil, Identity{}, fmt.Errorf("%s: %w", names[0], err)
	}
	pair, err := tls.X509KeyPair(p[1], p[2])
	if err != nil {
		return nil, Identity{}, fmt.Errorf("%s: %w: %w", names[1], err, trivet.ErrInvalid)
	}
	id, err := identityIn(pair.Leaf)
	if err != nil {
		return nil, Identity{}, fmt.Errorf("%s: %w", names[1], err)
	}
	if id.Cluster != cluster {
		return nil, Identity{}, fmt.Errorf("%s is of %s, the ca of cluster %s: %w", names[1], id, cluster,
			trivet.ErrInvalid)
	}
	return &material{pair: pair, roots: roots}, id, nil
}

// parseBundle returns the CAs in a PEM file, which must all be of one cluster.
func parseBundle(b []byte) (*x509.CertPool, trivet.ClusterID, error) {
	certs, err := parseCerts(b)
	if err != nil {
		return nil, "", err
	}
	pool := x509.NewCertPool()
	var cluster trivet.ClusterID
	for _, cert := range certs {
		id, err := identityIn(cert)
		if err != nil {
			return nil, "", err
		}
		if id.Role != RoleCA || !cert.IsCA {
			return nil, "", fmt.Errorf("certificate of %s is no ca's: %w", id, trivet.ErrInvalid)
		}
		if cluster != "" && id.Cluster != cluster {
			return nil, "", fmt.Errorf("cas of clusters %s and %s: %w", cluster, id.Cluster, trivet.ErrInvalid)
		}
		cluster = id.Cluster
		pool.AddCert(cert)
	}
	return pool, cluster, nil
}

// parseCerts returns the certificates in a PEM file, at least one.
func parseCerts(b []byte) ([]*x509.Certificate, error) {
	var certs []*x509.Certificate
	for {
		block, rest := pem.Decode(b)
		if block == nil {
			break
		}
		b = rest
		if block.Type != "CERTIFICATE" {
			continue
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, errors.Join(err, trivet.ErrInvalid)
		}
		certs = append(certs, cert)
	}
	if len(certs) == 0 {
		return nil, fmt.Errorf("no certificate in %d bytes: %w", len(b), trivet.ErrInvalid)
	}
	return certs, nil
}
