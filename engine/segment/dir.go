package segment

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"unsafe"
)

// Dir is the directory of a log: OSDir on a machine, MemDir in tests.
type Dir interface {
	// Make makes the directory, if it is not there. Only Format calls it: a log that is in use must not make
	// its directory again, on the filesystem beneath the one that went away.
	Make() error

	// List returns the names of all files.
	List() ([]string, error)

	// Create makes a file of sizeBytes zeroes, in place of one of that name, and returns it once the
	// bytes and the name are on stable storage.
	Create(name string, sizeBytes int64) (File, error)

	// Open opens an existing file.
	Open(name string) (File, error)

	// Remove removes a file that is closed. After a crash it may be there again, as it was.
	Remove(name string) error

	// Sync returns once the names of all files are on stable storage.
	Sync() error
}

// File is one segment file. Offsets and lengths are multiples of 4096 and buffers come from alignedBytes,
// as O_DIRECT demands. ReadAt may be called at the same time as everything else.
type File interface {
	io.ReaderAt
	io.WriterAt

	// Sync returns once everything written before the call is on stable storage.
	Sync() error

	// Size returns the length in bytes.
	Size() (int64, error)

	// Close closes the file.
	Close() error
}

// alignedBytes returns n bytes that begin at a page, for O_DIRECT.
func alignedBytes(n int64) []byte {
	b := make([]byte, n+pageBytes)
	skip := 0
	if rest := uintptr(unsafe.Pointer(unsafe.SliceData(b))) % pageBytes; rest != 0 {
		skip = int(pageBytes - rest)
	}
	return b[skip : skip+int(n) : skip+int(n)]
}

func isAligned(b []byte) bool {
	return len(b)%pageBytes == 0 && uintptr(unsafe.Pointer(unsafe.SliceData(b)))%pageBytes == 0
}

// OSDir is a directory of the operating system; its parent must be durable.
// Files are opened with O_DIRECT where the filesystem takes it.
type OSDir struct {
	path string
}

// NewOSDir returns the directory at path.
func NewOSDir(path string) *OSDir { return &OSDir{path: path} }

// Leave returns an Options.Room that answers "no space" rather than take the filesystem's free space below so many
// bytes, which somebody else on it cannot do without.
func (d *OSDir) Leave(bytes int64) func(fileBytes int64) error {
	return func(fileBytes int64) error {
		free, err := freeBytes(d.path)
		if err == nil && free-fileBytes < bytes {
			err = &os.PathError{Op: "make a file beside what must stay free", Path: d.path, Err: syscall.ENOSPC}
		}
		return err
	}
}

// Make implements Dir.
func (d *OSDir) Make() error { return os.MkdirAll(d.path, 0o750) }

// List implements Dir. A directory that is not there has no files.
func (d *OSDir) List() ([]string, error) {
	entries, err := os.ReadDir(d.path)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names, nil
}

// createChunkBytes is how much of a new file is written at once.
const (
	createChunkBytes = 1 << 20
	fileMode         = 0o640
)

// zeroPages is what new files are written with.
var zeroPages = sync.OnceValue(func() []byte { return alignedBytes(createChunkBytes) })

// Create implements Dir. The zeroes are written, not only set aside: a write into space that was set aside makes the
// filesystem convert it, which costs a journal commit with every flush. They go past the page cache: through it,
// copying them was a tenth of what random writes cost.
func (d *OSDir) Create(name string, sizeBytes int64) (File, error) {
	path := filepath.Join(d.path, name)
	f, err := openDirect(path, os.O_CREATE|os.O_TRUNC)
	if err != nil {
		return nil, err
	}
	err = setAside(f, sizeBytes)
	zeroes := zeroPages()
	for off := int64(0); off < sizeBytes && err == nil; off += int64(len(zeroes)) {
		_, err = f.WriteAt(zeroes[:min(int64(len(zeroes)), sizeBytes-off)], off)
	}
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return nil, errors.Join(err, os.Remove(path)) // a disk that is full may need the room
	}
	if err := d.Sync(); err != nil {
		return nil, err
	}
	return d.Open(name)
}

// Remove implements Dir.
func (d *OSDir) Remove(name string) error { return os.Remove(filepath.Join(d.path, name)) }

// Sync implements Dir, for the directory and its own name.
func (d *OSDir) Sync() error {
	for _, dir := range []string{d.path, filepath.Dir(d.path)} {
		if err := syncDir(dir); err != nil {
			return fmt.Errorf("sync directory: %w", err)
		}
	}
	return nil
}

// Open implements Dir.
func (d *OSDir) Open(name string) (File, error) {
	path := filepath.Join(d.path, name)
	f, err := openDirect(path, 0)
	if err != nil {
		return nil, err
	}
	return &osFile{File: f}, nil
}

func syncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// osFile is a file opened by OSDir.
type osFile struct {
	*os.File
}

// Sync implements File. The size of a segment file never changes, so its data suffice.
func (f *osFile) Sync() error { return syncData(f.File) }

// Size implements File.
func (f *osFile) Size() (int64, error) {
	info, err := f.Stat()
	if err != nil {
		return 0, err
	}
	return info.Size(), nil
}
