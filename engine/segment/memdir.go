package segment

import (
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"slices"
	"sync"
)

// memUnitBytes is a sector: the smallest part of a write that a crash of a MemDir keeps or loses.
const memUnitBytes = 512

// MemOp is one operation on a MemDir.
type MemOp struct {
	Kind  MemOpKind
	Name  string
	Off   int64 // bytes; of a read or write
	Bytes int   // of a read or write
}

// MemOpKind says what an operation does.
type MemOpKind int

// The operations. MemCreate comes three times for a file: before its name appears, before its bytes are
// written, and before both are durable.
const (
	MemCreate MemOpKind = iota + 1
	MemWrite
	MemSync
	MemRead
)

// MemFault is what a hook does to an operation; the zero value lets it happen.
type MemFault struct {
	Err   error
	Short bool // a write or read handles half of its bytes, then fails with Err or io.ErrShortWrite
}

// MemDir is a directory in memory for tests. It can crash as a machine does, losing any part of what was
// not synced, and fail. It is safe for concurrent use.
type MemDir struct {
	mu    sync.Mutex
	hook  func(MemOp) MemFault
	files map[string]*memFile
}

type memPage = [pageBytes]byte

// memFile holds pages that are never changed in place, so that a copy of a disk is cheap.
type memFile struct {
	dir     *MemDir
	name    string
	current []*memPage
	synced  []*memPage
	dirty   []memWrite // since the last sync, in order
	named   bool       // its name is durable
}

type memWrite struct {
	off int64
	b   []byte
}

// NewMemDir returns an empty directory.
func NewMemDir() *MemDir { return &MemDir{files: map[string]*memFile{}} }

// SetHook has f called before every operation, one at a time; nil ends that. f must not use the directory
// but by CrashLocked.
func (d *MemDir) SetHook(f func(MemOp) MemFault) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.hook = f
}

// Crash returns the directory as a power cut at this moment would leave it: all that was synced, and of
// each sector written since, in order of the writes, percent of a hundred. With pages the unit is 4 KiB.
func (d *MemDir) Crash(percent int, pages bool, rng *rand.Rand) *MemDir {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.CrashLocked(percent, pages, rng)
}

// CrashLocked is Crash for use within a hook.
func (d *MemDir) CrashLocked(percent int, pages bool, rng *rand.Rand) *MemDir {
	unit := memUnitBytes
	if pages {
		unit = pageBytes
	}
	out := NewMemDir()
	var names []string
	for name := range d.files {
		names = append(names, name)
	}
	slices.Sort(names) // a seed must give the same crash again
	for _, name := range names {
		f := d.files[name]
		if !f.named && rng.IntN(100) >= percent {
			continue
		}
		left := &memFile{dir: out, name: name, current: slices.Clone(f.synced), named: true}
		if len(f.synced) < len(f.current) { // created and never synced: it may have any length
			left.current = slices.Clone(f.current[:rng.IntN(len(f.current)+1)])
		}
		for _, w := range f.dirty {
			for at := 0; at < len(w.b); at += unit {
				if rng.IntN(100) < percent {
					left.put(w.b[at:min(at+unit, len(w.b))], w.off+int64(at))
				}
			}
		}
		left.synced = slices.Clone(left.current)
		out.files[name] = left
	}
	return out
}

// Flip changes one bit of a stored byte, as rot does.
func (d *MemDir) Flip(name string, off int64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	f := d.files[name]
	p := *f.current[off/pageBytes]
	p[off%pageBytes] ^= 1 << (off % 8)
	f.current[off/pageBytes] = &p
	f.synced = slices.Clone(f.current)
}

// Clone returns a copy with everything synced.
func (d *MemDir) Clone() *MemDir { return d.Crash(100, true, rand.New(rand.NewPCG(0, 0))) }

// put writes b at off; what lies beyond the end is lost.
func (f *memFile) put(b []byte, off int64) {
	for len(b) > 0 && off < int64(len(f.current))*pageBytes {
		p := *f.current[off/pageBytes]
		n := copy(p[off%pageBytes:], b)
		f.current[off/pageBytes] = &p
		b, off = b[n:], off+int64(n)
	}
}

func (d *MemDir) faultLocked(op MemOp) MemFault {
	if d.hook == nil {
		return MemFault{}
	}
	return d.hook(op)
}

// Make implements Dir.
func (d *MemDir) Make() error { return nil }

// List implements Dir.
func (d *MemDir) List() ([]string, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	var names []string
	for name := range d.files {
		names = append(names, name)
	}
	slices.Sort(names)
	return names, nil
}

// Create implements Dir.
func (d *MemDir) Create(name string, sizeBytes int64) (File, error) {
	f := &memFile{dir: d, name: name}
	for step := range 3 {
		d.mu.Lock()
		fault := d.faultLocked(MemOp{Kind: MemCreate, Name: name})
		if fault.Err != nil || fault.Short {
			d.mu.Unlock()
			return nil, fmt.Errorf("create %s: %w", name, faultErr(fault, io.ErrShortWrite))
		}
		switch step {
		case 0:
			d.files[name] = f
		case 1:
			for range sizeBytes / pageBytes {
				f.current = append(f.current, new(memPage))
			}
		case 2:
			f.synced, f.named = slices.Clone(f.current), true
		}
		d.mu.Unlock()
	}
	return f, nil
}

// Remove implements Dir. It is durable at once.
func (d *MemDir) Remove(name string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if fault := d.faultLocked(MemOp{Kind: MemSync, Name: name}); fault.Err != nil {
		return fmt.Errorf("remove %s: %w", name, fault.Err)
	}
	delete(d.files, name)
	return nil
}

func faultErr(f MemFault, short error) error {
	if f.Err != nil {
		return f.Err
	}
	return short
}

// Sync implements Dir. It makes the names durable, not what is in the files.
func (d *MemDir) Sync() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if fault := d.faultLocked(MemOp{Kind: MemSync}); fault.Err != nil {
		return fault.Err
	}
	for _, f := range d.files {
		f.named = true
	}
	return nil
}

// Open implements Dir.
func (d *MemDir) Open(name string) (File, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	f, ok := d.files[name]
	if !ok {
		return nil, &os.PathError{Op: "open", Path: name, Err: os.ErrNotExist}
	}
	return f, nil
}

// ReadAt implements File.
func (f *memFile) ReadAt(p []byte, off int64) (int, error) {
	f.dir.mu.Lock()
	defer f.dir.mu.Unlock()
	fault := f.dir.faultLocked(MemOp{Kind: MemRead, Name: f.name, Off: off, Bytes: len(p)})
	if fault.Err != nil && !fault.Short {
		return 0, fault.Err
	}
	want := p
	if fault.Short {
		want = p[:len(p)/2]
	}
	n := 0
	for n < len(want) && off < int64(len(f.current))*pageBytes {
		c := copy(want[n:], f.current[off/pageBytes][off%pageBytes:])
		n, off = n+c, off+int64(c)
	}
	if n < len(p) {
		return n, faultErr(fault, io.EOF)
	}
	return n, nil
}

// WriteAt implements File.
func (f *memFile) WriteAt(p []byte, off int64) (int, error) {
	if !isAligned(p) || off%pageBytes != 0 {
		return 0, &os.PathError{Op: "write", Path: f.name, Err: os.ErrInvalid}
	}
	f.dir.mu.Lock()
	defer f.dir.mu.Unlock()
	fault := f.dir.faultLocked(MemOp{Kind: MemWrite, Name: f.name, Off: off, Bytes: len(p)})
	if fault.Err != nil && !fault.Short {
		return 0, fault.Err
	}
	w := p
	if fault.Short {
		w = p[:len(p)/2/memUnitBytes*memUnitBytes]
	}
	f.dirty = append(f.dirty, memWrite{off: off, b: slices.Clone(w)})
	f.put(w, off)
	if fault.Short {
		return len(w), faultErr(fault, io.ErrShortWrite)
	}
	return len(w), nil
}

// Sync implements File. A sync that fails may have made anything durable, or nothing.
func (f *memFile) Sync() error {
	f.dir.mu.Lock()
	defer f.dir.mu.Unlock()
	if fault := f.dir.faultLocked(MemOp{Kind: MemSync, Name: f.name}); fault.Err != nil {
		return fault.Err
	}
	f.synced, f.dirty = slices.Clone(f.current), nil
	return nil
}

// Size implements File.
func (f *memFile) Size() (int64, error) {
	f.dir.mu.Lock()
	defer f.dir.mu.Unlock()
	return int64(len(f.current)) * pageBytes, nil
}

// Close implements File.
func (f *memFile) Close() error { return nil }
