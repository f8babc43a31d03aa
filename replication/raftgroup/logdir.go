package raftgroup

import (
	"errors"
	"fmt"

	"github.com/cockroachdb/pebble/v2/vfs"

	"github.com/trivet-csi/trivet/engine/segment"
)

// zeroChunkBytes is how much of a new file is written at once.
const zeroChunkBytes = 256 << 10

// LogDir returns a directory for a segment.Log on any filesystem: of the operating system's, when fs is nil or
// vfs.Default, with O_DIRECT; of another, such as a crashable one in memory, by its means.
func LogDir(fs vfs.FS, path string) segment.Dir {
	if fs == nil || fs == vfs.Default {
		return segment.NewOSDir(path)
	}
	return &fsDir{fs: fs, path: path}
}

// fsDir is a segment.Dir on a vfs.FS.
type fsDir struct {
	fs   vfs.FS
	path string
}

// Make implements segment.Dir.
func (d *fsDir) Make() error { return makeDir(d.fs, d.path) }

// List implements segment.Dir. A directory that is not there has no files.
func (d *fsDir) List() ([]string, error) {
	names, err := d.fs.List(d.path)
	if isNotExist(err) {
		return nil, nil
	}
	return names, err
}

// Create implements segment.Dir.
func (d *fsDir) Create(name string, sizeBytes int64) (segment.File, error) {
	f, err := d.fs.Create(d.fs.PathJoin(d.path, name), writeCategory)
	if err != nil {
		return nil, err
	}
	zeroes := make([]byte, min(zeroChunkBytes, sizeBytes))
	for left := sizeBytes; left > 0 && err == nil; left -= int64(len(zeroes)) {
		zeroes = zeroes[:min(int64(len(zeroes)), left)]
		_, err = f.Write(zeroes)
	}
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return nil, err
	}
	if err := d.Sync(); err != nil {
		return nil, err
	}
	return d.Open(name)
}

// Remove implements segment.Dir.
func (d *fsDir) Remove(name string) error { return d.fs.Remove(d.fs.PathJoin(d.path, name)) }

// Open implements segment.Dir.
func (d *fsDir) Open(name string) (segment.File, error) {
	path := d.fs.PathJoin(d.path, name)
	if _, err := d.fs.Stat(path); err != nil { // OpenReadWrite would make it
		return nil, err
	}
	f, err := d.fs.OpenReadWrite(path, writeCategory)
	if err != nil {
		return nil, err
	}
	return &fsFile{f}, nil
}

// Sync implements segment.Dir.
func (d *fsDir) Sync() error {
	for _, dir := range []string{d.path, d.fs.PathDir(d.path)} {
		if err := syncDir(d.fs, dir); err != nil {
			return fmt.Errorf("sync directory %s: %w", dir, err)
		}
	}
	return nil
}

// fsFile is a segment.File on a vfs.File.
type fsFile struct{ vfs.File }

// Sync implements segment.File.
func (f *fsFile) Sync() error { return f.SyncData() }

// Size implements segment.File.
func (f *fsFile) Size() (int64, error) {
	st, err := f.Stat()
	if err != nil {
		return 0, err
	}
	return st.Size(), nil
}
