package vm

import (
	"fmt"
	"io"
	"os"
	"path"
	"strings"
)

// cpioTrailer is the name of the entry that ends an archive.
const cpioTrailer = "TRAILER!!!"

// cpioWriter writes an archive in the "newc" format, the one an initramfs has to have (kernel document
// driver-api/early-userspace/buffer-format.rst). An entry is
//
//	"070701" | 13 fields of 8 hex digits | name, NUL, padding to 4 bytes | data, padding to 4 bytes
//
// with the fields ino, mode, uid, gid, nlink, mtime, filesize, devmajor, devminor, rdevmajor,
// rdevminor, namesize, check. Owner is root and time zero, so the same input gives the same bytes.
type cpioWriter struct {
	w    io.Writer
	ino  uint32
	dirs map[string]bool // already in the archive
	err  error           // of the first write that failed; all later ones do nothing
}

func newCPIO(w io.Writer) *cpioWriter {
	return &cpioWriter{w: w, dirs: map[string]bool{"": true}}
}

// The types of files, as stat(2) has them.
const (
	cpioDir     = 0o040000
	cpioRegular = 0o100000
	cpioLink    = 0o120000
)

// dir adds a folder and those above it; one that is there already is no error.
func (c *cpioWriter) dir(name string) {
	name = strings.Trim(path.Clean("/"+name), "/")
	if c.dirs[name] {
		return
	}
	if up := path.Dir(name); up != "." {
		c.dir(up)
	}
	c.dirs[name] = true
	c.entry(name, cpioDir|0o755, nil)
}

// file adds a regular file and the folders above it.
func (c *cpioWriter) file(name string, perm os.FileMode, data []byte) {
	name = strings.Trim(path.Clean("/"+name), "/")
	if up := path.Dir(name); up != "." {
		c.dir(up)
	}
	c.entry(name, cpioRegular|uint32(perm.Perm()), data)
}

// link adds a symbolic link to target.
func (c *cpioWriter) link(name, target string) {
	name = strings.Trim(path.Clean("/"+name), "/")
	if up := path.Dir(name); up != "." {
		c.dir(up)
	}
	c.entry(name, cpioLink|0o777, []byte(target))
}

// close ends the archive and returns the first error of all.
func (c *cpioWriter) close() error {
	c.entry(cpioTrailer, 0, nil)
	if c.err != nil {
		return fmt.Errorf("write initramfs: %w", c.err)
	}
	return nil
}

func (c *cpioWriter) entry(name string, mode uint32, data []byte) {
	if c.err != nil {
		return
	}
	if name != cpioTrailer {
		c.ino++
	}
	fields := [13]uint32{c.ino, mode, 0, 0, 1, 0, uint32(len(data)), 0, 0, 0, 0, uint32(len(name) + 1), 0}
	head := []byte("070701")
	for _, f := range fields {
		head = fmt.Appendf(head, "%08X", f)
	}
	head = append(append(head, name...), 0)
	c.write(pad4(head))
	c.write(data)
	c.write(make([]byte, -len(data)&3))
}

func (c *cpioWriter) write(b []byte) {
	if c.err == nil {
		_, c.err = c.w.Write(b)
	}
}

// pad4 appends zeroes up to a multiple of four.
func pad4(b []byte) []byte { return append(b, make([]byte, -len(b)&3)...) }
