package pki

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/trivet-csi/trivet"
)

// The names of the files.
const (
	caCertFile = "ca.crt"
	caKeyFile  = "ca.key"
)

// Modes: certificates are public, keys are for their owner alone.
const (
	dirMode  fs.FileMode = 0o700
	certMode fs.FileMode = 0o644
	keyMode  fs.FileMode = 0o600
)

// leafFiles returns the names of a role's certificate and key.
func leafFiles(role Role) (certName, keyName string) {
	return string(role) + ".crt", string(role) + ".key"
}

// WriteCA writes ca.crt and ca.key into dir, which it makes if need be. It returns ErrExists, and
// changes nothing, when either is there already: a second CA would cut off every certificate of the
// first.
func WriteCA(dir string, ca *CA) error {
	keyPEM, err := ca.KeyPEM()
	if err != nil {
		return err
	}
	err = writeNew(dir, []file{{caKeyFile, keyPEM, keyMode}, {caCertFile, ca.CertPEM(), certMode}})
	if err != nil {
		return fmt.Errorf("write ca of cluster %s: %w", ca.Cluster(), err)
	}
	return nil
}

// LoadCA reads what WriteCA wrote. It returns ErrNotFound when a file is missing and ErrInvalid when
// the files are no CA's.
func LoadCA(dir string) (*CA, error) {
	certPEM, err := readFile(dir, caCertFile)
	if err != nil {
		return nil, fmt.Errorf("load ca: %w", err)
	}
	keyPEM, err := readFile(dir, caKeyFile)
	if err != nil {
		return nil, fmt.Errorf("load ca: %w", err)
	}
	ca, err := ParseCA(certPEM, keyPEM)
	if err != nil {
		return nil, fmt.Errorf("load ca from %s: %w", dir, err)
	}
	return ca, nil
}

// Write writes ca.crt and the pair, as <role>.crt and <role>.key, into dir, which it makes if need
// be. It returns ErrExists, and changes nothing, when the certificate, the key or another ca.crt is
// there already.
func Write(dir string, caPEM []byte, p *Pair) error {
	certName, keyName := leafFiles(p.Identity.Role)
	files := []file{{keyName, p.KeyPEM, keyMode}, {certName, p.CertPEM, certMode}}
	switch old, err := os.ReadFile(filepath.Join(dir, caCertFile)); {
	case errors.Is(err, fs.ErrNotExist):
		files = append(files, file{caCertFile, caPEM, certMode})
	case err != nil:
		return fmt.Errorf("write %s: %w", p.Identity, err)
	case !bytes.Equal(old, caPEM):
		return fmt.Errorf("write %s: %s is of another ca: %w",
			p.Identity, filepath.Join(dir, caCertFile), trivet.ErrExists)
	}
	if err := writeNew(dir, files); err != nil {
		return fmt.Errorf("write %s: %w", p.Identity, err)
	}
	return nil
}

// Renew puts a new pair of the same identity in place of the old one. Running processes take it up
// by themselves. It returns ErrNotFound when there is none and ErrInvalid when it is of another.
func Renew(dir string, p *Pair) error {
	certName, keyName := leafFiles(p.Identity.Role)
	oldPEM, err := readFile(dir, certName)
	if err != nil {
		return fmt.Errorf("renew %s: %w", p.Identity, err)
	}
	old, err := parseCerts(oldPEM)
	if err != nil {
		return fmt.Errorf("renew %s: %w", p.Identity, err)
	}
	if id, err := identityIn(old[0]); err != nil || id != p.Identity {
		return fmt.Errorf("renew %s: %s is of %s: %w",
			p.Identity, filepath.Join(dir, certName), id, trivet.ErrInvalid)
	}
	return replace(dir, p.Identity.String(), []file{{keyName, p.KeyPEM, keyMode}, {certName, p.CertPEM, certMode}})
}

// ReplaceBundle puts new CA certificates in place of ca.crt: for a rotation first old and new
// together, then, once every certificate was renewed, the new one alone. It returns ErrInvalid
// unless all are CAs of one cluster.
func ReplaceBundle(dir string, caPEM []byte) error {
	if _, _, err := parseBundle(caPEM); err != nil {
		return fmt.Errorf("replace ca bundle: %w", err)
	}
	return replace(dir, "ca bundle", []file{{caCertFile, caPEM, certMode}})
}

// file is one file to write.
type file struct {
	name string
	data []byte
	mode fs.FileMode
}

// writeNew writes files that must not exist, all or, errors permitting, none.
func writeNew(dir string, files []file) error {
	if err := os.MkdirAll(dir, dirMode); err != nil {
		return err
	}
	for _, f := range files {
		path := filepath.Join(dir, f.name)
		if _, err := os.Lstat(path); err == nil {
			return fmt.Errorf("%s: %w", path, trivet.ErrExists)
		} else if !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	for i, f := range files {
		err := put(dir, f, os.Link) // link, unlike rename, never overwrites
		if err == nil {
			continue
		}
		for _, done := range files[:i] {
			err = errors.Join(err, os.Remove(filepath.Join(dir, done.name)))
		}
		if errors.Is(err, fs.ErrExist) {
			return fmt.Errorf("%s: %w", filepath.Join(dir, f.name), trivet.ErrExists)
		}
		return err
	}
	return syncDir(dir)
}

// replace overwrites files, each atomically.
func replace(dir, what string, files []file) error {
	for _, f := range files {
		if err := put(dir, f, os.Rename); err != nil {
			return fmt.Errorf("replace %s: %w", what, err)
		}
	}
	if err := syncDir(dir); err != nil {
		return fmt.Errorf("replace %s: %w", what, err)
	}
	return nil
}

// put writes f durably under a temporary name and moves it into place by link or rename.
func put(dir string, f file, place func(from, to string) error) error {
	tmp, err := os.CreateTemp(dir, "."+f.name+".*")
	if err != nil {
		return err
	}
	defer func() { _ = os.Remove(tmp.Name()) }() // gone already after a rename
	_, err = tmp.Write(f.data)
	err = errors.Join(err, tmp.Chmod(f.mode), tmp.Sync(), tmp.Close())
	if err != nil {
		return err
	}
	return place(tmp.Name(), filepath.Join(dir, f.name))
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// readFile reads a file of dir. A missing one is ErrNotFound.
func readFile(dir, name string) ([]byte, error) {
	path := filepath.Join(dir, name)
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%s: %w", path, trivet.ErrNotFound)
	}
	return b, err
}
