package raftgroup

import (
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/cockroachdb/pebble/v2/vfs"

	"github.com/trivet-csi/trivet"
)

// The names in a group's directory. Its log, term and vote are in the disk's log (engine/segment).
const (
	fileSuper      = "superblock"
	fileIncomplete = "incomplete" // a Create or Destroy is under way
	fileLock       = "lock"
	fileSnapshot   = "snapshot"
	fileInstall    = "install" // of which snapshot an image is being restored
	tmpSuffix      = ".tmp"
)

const writeCategory = vfs.WriteCategoryUnspecified

func isNotExist(err error) bool { return errors.Is(err, os.ErrNotExist) }

func fileExists(fs vfs.FS, name string) (bool, error) {
	_, err := fs.Stat(name)
	if isNotExist(err) {
		return false, nil
	}
	return err == nil, err
}

func syncDir(fs vfs.FS, dir string) error {
	d, err := fs.OpenDir(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// makeDir makes dir and its missing parents, durably.
func makeDir(fs vfs.FS, dir string) error {
	parent := fs.PathDir(dir)
	if parent == dir || parent == "." {
		return fs.MkdirAll(dir, 0o750)
	}
	ok, err := fileExists(fs, dir)
	if err != nil {
		return err
	}
	if !ok {
		if err := makeDir(fs, parent); err != nil {
			return err
		}
		if err := fs.MkdirAll(dir, 0o750); err != nil {
			return err
		}
	}
	// An existing directory may have been made just before a crash, so its entry is synced as well.
	return syncDir(fs, parent)
}

// writeFile replaces a file atomically and durably.
func writeFile(fs vfs.FS, dir, name string, b []byte) error {
	path := fs.PathJoin(dir, name)
	f, err := fs.Create(path+tmpSuffix, writeCategory)
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	if err := fs.Rename(path+tmpSuffix, path); err != nil {
		return err
	}
	return syncDir(fs, dir)
}

// readFile returns the content of a small file; ErrCorrupt when it is over limit bytes.
func readFile(fs vfs.FS, dir, name string, limit int64) ([]byte, error) {
	f, err := fs.Open(fs.PathJoin(dir, name))
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }() // only read
	b, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err != nil {
		return nil, err
	}
	if int64(len(b)) > limit {
		return nil, fmt.Errorf("file %s: over %d bytes: %w", name, limit, trivet.ErrCorrupt)
	}
	return b, nil
}

// removeFile removes a file durably; absent is success.
func removeFile(fs vfs.FS, dir, name string) error {
	if err := fs.Remove(fs.PathJoin(dir, name)); err != nil {
		if isNotExist(err) {
			return nil
		}
		return err
	}
	return syncDir(fs, dir)
}
