package pki

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/trivet-csi/trivet"
)

// Install puts a pair and the CAs it is to trust into dir, which it makes if need be, whether or not
// there is an older pair: Write and Renew in one. Each file is replaced atomically, the certificate
// last; running processes take the pair up once all fit together, and after a crash in between Install
// may be called again. It returns ErrInvalid, and changes nothing, when the pair cannot be used with
// these CAs (see Verify) or when dir holds anything of another cluster or identity.
func Install(dir string, caPEM []byte, p *Pair) error {
	if err := p.Verify(caPEM); err != nil {
		return fmt.Errorf("install: %w", err)
	}
	if err := mayReplace(dir, p.Identity); err != nil {
		return fmt.Errorf("install %s: %w", p.Identity, err)
	}
	if err := os.MkdirAll(dir, dirMode); err != nil {
		return fmt.Errorf("install %s: %w", p.Identity, err)
	}
	certName, keyName := leafFiles(p.Identity.Role)
	files := []file{{keyName, p.KeyPEM, keyMode}, {certName, p.CertPEM, certMode}}
	if old, err := os.ReadFile(filepath.Join(dir, caCertFile)); err != nil || !bytes.Equal(old, caPEM) {
		files = append([]file{{caCertFile, caPEM, certMode}}, files...)
	}
	return replace(dir, p.Identity.String(), files)
}

// mayReplace returns ErrInvalid unless all that dir holds is of the identity's cluster and, for its
// role, of the identity itself.
func mayReplace(dir string, id Identity) error {
	bundle, err := readFile(dir, caCertFile)
	if err == nil {
		cluster, err := BundleCluster(bundle)
		if err != nil {
			return fmt.Errorf("%s: %w", filepath.Join(dir, caCertFile), err)
		}
		if cluster != id.Cluster {
			return fmt.Errorf("%s is of cluster %s: %w", filepath.Join(dir, caCertFile), cluster, trivet.ErrInvalid)
		}
	} else if !errors.Is(err, trivet.ErrNotFound) {
		return err
	}
	old, err := ReadPair(dir, id.Role)
	switch {
	case errors.Is(err, trivet.ErrNotFound):
		return nil
	case err != nil:
		return err
	case old.Identity != id:
		return fmt.Errorf("%s holds the certificate of %s: %w", dir, old.Identity, trivet.ErrInvalid)
	}
	return nil
}
