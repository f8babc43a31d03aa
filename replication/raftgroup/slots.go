package raftgroup

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/cockroachdb/pebble/v2/vfs"

	"github.com/trivet-csi/trivet"
)

// slotFile keeps one small record in two copies. An update writes and syncs the first copy, then
// the second, so a crash tears one of them at most, and rot of either loses nothing: both hold
// the same once an update has returned.
//
//	offset 0     copy A, a frame (encode.go) over sequence u64 | record
//	offset 4096  copy B
type slotFile struct {
	f     vfs.File
	magic string
	seq   uint64
}

const (
	slotStride   = 4096
	slotBytesMax = slotStride - frameOverhead - 8
)

// createSlots makes the file durable with a first record.
func createSlots(fs vfs.FS, dir, name, magic string, record []byte) error {
	b := make([]byte, 2*slotStride)
	one := sealFrame(magic, append(put64(nil, 1), record...))
	copy(b, one)
	copy(b[slotStride:], one)
	return writeFile(fs, dir, name, b)
}

// openSlots returns the file and its record. It returns ErrCorrupt when neither copy can be read,
// and makes a damaged or older copy whole before it returns.
func openSlots(fs vfs.FS, dir, name, magic string) (*slotFile, []byte, error) {
	raw, err := readFile(fs, dir, name, 2*slotStride)
	if err != nil {
		return nil, nil, err
	}
	seq, record, whole, err := decodeSlots(magic, raw)
	if err != nil {
		return nil, nil, fmt.Errorf("file %s: %w", name, err)
	}
	f, err := fs.OpenReadWrite(fs.PathJoin(dir, name), writeCategory)
	if err != nil {
		return nil, nil, err
	}
	s := &slotFile{f: f, magic: magic, seq: seq}
	if !whole {
		if err := s.write(record); err != nil {
			return nil, nil, errors.Join(err, f.Close())
		}
	}
	return s, record, nil
}

// decodeSlots returns the newest of the two copies; whole says that they are equal.
func decodeSlots(magic string, raw []byte) (seq uint64, record []byte, whole bool, err error) {
	copyAt := func(off int) ([]byte, error) {
		if off >= len(raw) {
			return nil, fmt.Errorf("no copy at %d: %w", off, trivet.ErrCorrupt)
		}
		p, _, err := openFrame(magic, raw[off:min(off+slotStride, len(raw))])
		if err == nil && len(p) < 8 {
			err = fmt.Errorf("copy at %d has %d bytes: %w", off, len(p), trivet.ErrCorrupt)
		}
		return p, err
	}
	a, errA := copyAt(0)
	b, errB := copyAt(slotStride)
	switch {
	case errA != nil && errB != nil:
		return 0, nil, false, errA
	case errA != nil:
		a = b
	case errB == nil && binary.LittleEndian.Uint64(b) > binary.LittleEndian.Uint64(a):
		a, b = b, a
	}
	return binary.LittleEndian.Uint64(a), a[8:], errA == nil && errB == nil && bytes.Equal(a, b), nil
}

// write makes record durable. After an error the file must not be used again.
func (s *slotFile) write(record []byte) error {
	if len(record) > slotBytesMax {
		return fmt.Errorf("record of %d bytes, at most %d fit: %w", len(record), slotBytesMax, trivet.ErrInvalid)
	}
	s.seq++
	one := sealFrame(s.magic, append(put64(nil, s.seq), record...))
	for _, off := range []int64{0, slotStride} {
		if _, err := s.f.WriteAt(one, off); err != nil {
			return err
		}
		if err := s.f.Sync(); err != nil {
			return err
		}
	}
	return nil
}

func (s *slotFile) close() error { return s.f.Close() }
