package sim

import (
	"math/rand/v2"
	"os"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/cockroachdb/pebble/v2/vfs"
)

// disk is the filesystem of one life of a machine. Everything that changes it is counted, so that the
// machine can be crashed between a write and its sync: those take no time in a bubble, and a crash
// between two of them would never be drawn by the clock. diskfault.go makes it slow and broken.
type disk struct {
	vfs.FS
	mem *vfs.MemFS
	lie atomic.Bool // files of Raft are not synced, whatever is asked for

	mu      sync.Mutex
	crashIn int // operations until crash is called; 0 = never
	crash   func()
	faults  diskFaults
}

func newDisk(mem *vfs.MemFS) *disk {
	d := &disk{FS: mem, mem: mem}
	d.faults.resume = make(chan struct{})
	return d
}

// arm makes crash run just before the n-th operation from now, once.
func (d *disk) arm(n int, crash func()) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.crashIn, d.crash = n, crash
}

// step is called before each operation that changes the disk. Its error is the operation's.
func (d *disk) step(name string, grows bool) error {
	d.mu.Lock()
	var crash func()
	if d.crashIn > 0 {
		if d.crashIn--; d.crashIn == 0 {
			crash = d.crash
		}
	}
	err := d.faults.drawLocked(name, grows)
	d.mu.Unlock()
	if crash != nil {
		crash()
	}
	return err
}

// afterCrash returns what the disk holds if power fails now: all that was synced, and each unsynced
// write with the given probability in per cent.
func (d *disk) afterCrash(rnd *rand.Rand, unsyncedPercent int) *vfs.MemFS {
	return d.mem.CrashClone(vfs.CrashCloneCfg{UnsyncedDataPercent: unsyncedPercent, RNG: rnd})
}

func (d *disk) wrap(name string, f vfs.File, err error) (vfs.File, error) {
	if err != nil {
		return nil, err
	}
	return &file{File: f, disk: d, name: name, raft: isLog(name) || strings.Contains(name, "/groups/")}, nil
}

// Create implements vfs.FS.
func (d *disk) Create(name string, c vfs.DiskWriteCategory) (vfs.File, error) {
	if err := d.step(name, true); err != nil {
		return nil, err
	}
	f, err := d.FS.Create(name, c)
	return d.wrap(name, f, err)
}

// OpenReadWrite implements vfs.FS.
func (d *disk) OpenReadWrite(name string, c vfs.DiskWriteCategory, opts ...vfs.OpenOption) (vfs.File, error) {
	if err := d.step(name, true); err != nil {
		return nil, err
	}
	f, err := d.FS.OpenReadWrite(name, c, opts...)
	return d.wrap(name, f, err)
}

// ReuseForWrite implements vfs.FS.
func (d *disk) ReuseForWrite(oldname, newname string, c vfs.DiskWriteCategory) (vfs.File, error) {
	if err := d.step(newname, false); err != nil {
		return nil, err
	}
	f, err := d.FS.ReuseForWrite(oldname, newname, c)
	return d.wrap(newname, f, err)
}

// OpenDir implements vfs.FS.
func (d *disk) OpenDir(name string) (vfs.File, error) {
	f, err := d.FS.OpenDir(name)
	return d.wrap(name, f, err)
}

// Link implements vfs.FS.
func (d *disk) Link(oldname, newname string) error {
	if err := d.step(newname, true); err != nil {
		return err
	}
	return d.FS.Link(oldname, newname)
}

// Remove implements vfs.FS.
func (d *disk) Remove(name string) error {
	if err := d.step(name, false); err != nil {
		return err
	}
	return d.FS.Remove(name)
}

// RemoveAll implements vfs.FS.
func (d *disk) RemoveAll(name string) error {
	if err := d.step(name, false); err != nil {
		return err
	}
	return d.FS.RemoveAll(name)
}

// Rename implements vfs.FS.
func (d *disk) Rename(oldname, newname string) error {
	if err := d.step(newname, false); err != nil {
		return err
	}
	return d.FS.Rename(oldname, newname)
}

// MkdirAll implements vfs.FS.
func (d *disk) MkdirAll(dir string, perm os.FileMode) error {
	if err := d.step(dir, true); err != nil {
		return err
	}
	return d.FS.MkdirAll(dir, perm)
}

// Unwrap implements vfs.FS.
func (d *disk) Unwrap() vfs.FS { return d.FS }

// file counts the operations on one file.
type file struct {
	vfs.File
	disk *disk
	name string
	raft bool // the log, or a group's own
}

// lies reports that a sync of the file does nothing.
func (f *file) lies() bool { return f.raft && f.disk.lie.Load() }

// grows reports that a write needs room: the log's files are written in place.
func (f *file) grows(off int64, n int) bool {
	if !isLog(f.name) {
		return true
	}
	st, err := f.Stat()
	return err != nil || off+int64(n) > st.Size()
}

// Write implements vfs.File.
func (f *file) Write(p []byte) (int, error) {
	if err := f.disk.step(f.name, true); err != nil {
		return 0, err
	}
	return f.File.Write(p)
}

// WriteAt implements vfs.File.
func (f *file) WriteAt(p []byte, off int64) (int, error) {
	if err := f.disk.step(f.name, f.grows(off, len(p))); err != nil {
		return 0, err
	}
	return f.File.WriteAt(p, off)
}

// Sync implements vfs.File.
func (f *file) Sync() error {
	if err := f.disk.step(f.name, false); err != nil || f.lies() {
		return err
	}
	return f.File.Sync()
}

// SyncData implements vfs.File.
func (f *file) SyncData() error {
	if isLog(f.name) {
		f.disk.slow()
	}
	if err := f.disk.step(f.name, false); err != nil || f.lies() {
		return err
	}
	return f.File.SyncData()
}

// SyncTo implements vfs.File.
func (f *file) SyncTo(length int64) (bool, error) {
	if err := f.disk.step(f.name, false); err != nil {
		return false, err
	}
	if f.lies() {
		return true, nil
	}
	return f.File.SyncTo(length)
}
