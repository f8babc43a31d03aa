package server

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"github.com/trivet-csi/trivet"
)

const (
	ownerFile = "owner.json"
	lockFile  = "lock"

	// placeFile is where `trivet kube place` writes before the first server starts (deploy/chart, --place-file).
	placeFile = "place.json"
)

// owner is what the server's data directory says about whose it is.
type owner struct {
	Cluster trivet.ClusterID `json:"cluster"`
	Node    trivet.NodeID    `json:"node"`
}

// dataDir is the server's own directory: whose it is, the catalogue and the address book. It is
// locked for as long as the process runs, so that no two servers use one (I9).
type dataDir struct {
	path string
	lock *os.File
}

// openDataDir makes the directory or checks that it belongs to this node of this cluster (H11).
func openDataDir(path string, want owner) (_ *dataDir, err error) {
	if err := os.MkdirAll(path, 0o700); err != nil {
		return nil, fmt.Errorf("data directory: %w", err)
	}
	lock, err := os.OpenFile(filepath.Join(path, lockFile), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("data directory: %w", err)
	}
	defer func() {
		if err != nil {
			_ = unlock(lock) // the first error counts
		}
	}()
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		return nil, fmt.Errorf("data directory %s: another server uses it (%w): %w", path, err, trivet.ErrInUse)
	}
	text, err := os.ReadFile(filepath.Join(path, ownerFile))
	if errors.Is(err, fs.ErrNotExist) {
		return newDataDir(path, want, lock)
	}
	if err != nil {
		return nil, fmt.Errorf("data directory: %w", err)
	}
	var got owner
	if err := json.Unmarshal(text, &got); err != nil {
		return nil, fmt.Errorf("data directory %s: %s is damaged (%w): %w", path, ownerFile, err, trivet.ErrCorrupt)
	}
	if got != want {
		return nil, fmt.Errorf("data directory %s belongs to node %s of cluster %s; the certificate is of node %s of "+
			"cluster %s; give the right --data or --certs: %w",
			path, got.Node, got.Cluster, want.Node, want.Cluster, trivet.ErrInvalid)
	}
	return &dataDir{path: path, lock: lock}, nil
}

// newDataDir claims an empty directory. One that holds something else is refused: it may be a typo.
func newDataDir(path string, want owner, lock *os.File) (*dataDir, error) {
	entries, err := os.ReadDir(path)
	if err != nil {
		return nil, fmt.Errorf("data directory: %w", err)
	}
	for _, e := range entries {
		name := e.Name()
		known := name == lockFile || name == placeFile || name == "lost+found" || filepath.Ext(name) == ".tmp"
		if !known && !e.IsDir() {
			return nil, fmt.Errorf("data directory %s: holds %q and is not Trivet's; give an empty one: %w", path, name,
				trivet.ErrInvalid)
		}
	}
	text, err := json.MarshalIndent(want, "", "  ")
	if err != nil {
		return nil, fmt.Errorf("data directory: %w", err)
	}
	if err := writeFile(filepath.Join(path, ownerFile), append(text, '\n')); err != nil {
		return nil, fmt.Errorf("data directory: %w", err)
	}
	return &dataDir{path: path, lock: lock}, nil
}

func (d *dataDir) join(names ...string) string {
	return filepath.Join(append([]string{d.path}, names...)...)
}

// close gives the directory up.
func (d *dataDir) close() error { return unlock(d.lock) }

// unlock gives the flock up and closes the file. Not by closing alone: a child that is between fork and exec holds the
// descriptor, and so the lock, a moment longer.
func unlock(lock *os.File) error {
	_ = syscall.Flock(int(lock.Fd()), syscall.LOCK_UN) // if it fails, closing does it
	return lock.Close()
}
