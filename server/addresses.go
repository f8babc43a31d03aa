package server

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"sync"

	"github.com/trivet-csi/trivet"
)

// addresses is the address book of the transport: where each node listens. The catalogue and the
// seeds feed it. It is kept in a file, because after a restart of the whole cluster the catalogue
// can be read only once its members have found each other. A wrong address does no harm: the node
// that answers must show the certificate of the node that was asked for.
type addresses struct {
	path string

	mu    sync.Mutex
	known map[trivet.NodeID]string
}

// openAddresses reads the file, which need not exist. A damaged file is ignored after the error is
// returned once: seeds and catalogue fill the book again.
func openAddresses(path string) (*addresses, error) {
	a := &addresses{path: path, known: map[trivet.NodeID]string{}}
	text, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return a, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read address book: %w", err)
	}
	if err := json.Unmarshal(text, &a.known); err != nil {
		a.known = map[trivet.NodeID]string{}
	}
	return a, nil
}

// Address implements transport.AddressBook.
func (a *addresses) Address(node trivet.NodeID) string {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.known[node]
}

// all returns a copy.
func (a *addresses) all() map[trivet.NodeID]string {
	a.mu.Lock()
	defer a.mu.Unlock()
	return maps.Clone(a.known)
}

// learn adds or replaces addresses and saves the book when it changed.
func (a *addresses) learn(learned map[trivet.NodeID]string) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	changed := false
	for node, addr := range learned {
		if addr != "" && a.known[node] != addr {
			a.known[node] = addr
			changed = true
		}
	}
	if !changed {
		return nil
	}
	text, err := json.MarshalIndent(a.known, "", "  ")
	if err != nil {
		return fmt.Errorf("save address book: %w", err)
	}
	if err := writeFile(a.path, text); err != nil {
		return fmt.Errorf("save address book: %w", err)
	}
	return nil
}

// writeFile replaces a file so that a crash leaves the old or the new content, durable on return.
func writeFile(path string, content []byte) (err error) {
	f, err := os.CreateTemp(filepath.Dir(path), filepath.Base(path)+".*.tmp")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			os.Remove(f.Name()) //nolint:errcheck // the first error matters
		}
	}()
	if _, err = f.Write(content); err == nil {
		err = f.Sync()
	}
	if closeErr := f.Close(); err == nil {
		err = closeErr
	}
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		return err
	}
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	defer dir.Close()
	return dir.Sync()
}
