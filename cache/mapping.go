package cache

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"os"
	"sync"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/trivet-csi/trivet"
)

// mapping is the memory of a cache: slots of one block each with a header, in the layout of format.go. Whoever is
// killed leaves it as it is after the last store, for interrupts are precise: of one thread's stores a successor sees
// a prefix in program order, and between threads the locks of Device order them. So the order of stores is all that
// matters here; there are no caches to flush as with persistent memory.
type mapping struct {
	b     []byte
	slotN int
	data  int64 // offset of slot 0's data

	// trace, in tests, is held around each store: a crash point (crashpoint_test.go).
	trace sync.Locker
}

// newMapping maps slotN slots of f, or anonymous memory if f is nil. The pages are there when it returns: a full
// tmpfs is an error here and not a SIGBUS later. ErrNoSpace: no memory.
func newMapping(f *os.File, slotN int) (*mapping, error) {
	size := fileBytes(slotN)
	flags, fd := unix.MAP_SHARED, -1
	if f == nil {
		flags = unix.MAP_PRIVATE | unix.MAP_ANONYMOUS
	} else {
		fd = int(f.Fd())
		if err := reserve(f, slotN); err != nil {
			return nil, err
		}
	}
	b, err := unix.Mmap(fd, 0, int(size), unix.PROT_READ|unix.PROT_WRITE, flags)
	if err != nil {
		return nil, fmt.Errorf("map %d bytes of cache: %w", size, err)
	}
	m := &mapping{b: b, slotN: slotN, data: dataOff(slotN)}
	m.settle()
	return m, nil
}

// reserve gives the file its size and pages. Only the used ranges: the gap before the data stays a hole.
func reserve(f *os.File, slotN int) error {
	if err := f.Truncate(fileBytes(slotN)); err != nil {
		return fmt.Errorf("size of %s: %w", f.Name(), err)
	}
	ranges := [][2]int64{ // the larger first: tmpfs refuses at once what it can never hold
		{dataOff(slotN), int64(slotN) * trivet.BlockSize},
		{0, slotsAt + int64(slotN)*slotHeadBytes},
	}
	for _, r := range ranges {
		if r[1] == 0 {
			continue
		}
		if err := unix.Fallocate(int(f.Fd()), 0, r[0], r[1]); err != nil {
			if err == unix.ENOSPC || err == unix.ENOMEM { //nolint:errorlint // a bare errno
				return fmt.Errorf("reserve %d slots in %s: %w: %w", slotN, f.Name(), err, trivet.ErrNoSpace)
			}
			return fmt.Errorf("reserve %d slots in %s: %w", slotN, f.Name(), err)
		}
	}
	return nil
}

// settle asks for huge pages, maps every page and keeps them in memory, as far as the machine allows: a process
// that the kernel writes back to must not wait for memory. Each of these may be refused, at the cost of speed.
func (m *mapping) settle() {
	_ = unix.Madvise(m.b, unix.MADV_HUGEPAGE)
	if data := m.b[m.data:]; len(data) > 0 {
		_ = unix.Madvise(data, unix.MADV_POPULATE_WRITE)
		_ = unix.Mlock(data)
	}
	_ = unix.Mlock(m.b[:slotsAt+m.slotN*slotHeadBytes])
}

func (m *mapping) close() error {
	if m == nil || m.b == nil {
		return nil
	}
	b := m.b
	m.b = nil
	return unix.Munmap(b)
}

// block returns the data of a slot.
func (m *mapping) block(slot int32) []byte {
	off := m.data + int64(slot)*trivet.BlockSize
	return m.b[off : off+trivet.BlockSize : off+trivet.BlockSize]
}

func (m *mapping) head(slot int32) []byte {
	off := slotsAt + int(slot)*slotHeadBytes
	return m.b[off : off+slotHeadBytes : off+slotHeadBytes]
}

// begin and end stand around each store, for the test that stops after the nth.
func (m *mapping) begin() {
	if m.trace != nil {
		m.trace.Lock()
	}
}

func (m *mapping) end() {
	if m.trace != nil {
		m.trace.Unlock()
	}
}

func word32(b []byte) *uint32 { return (*uint32)(unsafe.Pointer(&b[0])) }
func word64(b []byte) *uint64 { return (*uint64)(unsafe.Pointer(&b[0])) }

// fill copies a block into a free slot and returns its checksum.
func (m *mapping) fill(slot int32, p []byte) uint32 {
	dst := m.block(slot)
	m.begin()
	copy(dst, p)
	m.end()
	return crc32.Checksum(dst, castagnoli)
}

// publish makes a filled slot hold a block. It counts once commit has reached its sequence.
func (m *mapping) publish(slot int32, volume trivet.VolumeID, lba trivet.LBA, seq uint64, crc uint32) {
	h := m.head(slot)
	m.begin()
	le := binary.LittleEndian
	le.PutUint64(h[8:], uint64(lba))
	le.PutUint64(h[16:], seq)
	le.PutUint64(h[24:], uint64(volume))
	le.PutUint32(h[32:], crc)
	le.PutUint32(h[4:], crc32.Checksum(h[8:slotCheckEnd], castagnoli))
	m.end()
	m.begin()
	atomic.StoreUint32(word32(h), slotData)
	m.end()
}

// invalidate makes a slot hold nothing.
func (m *mapping) invalidate(slot int32) {
	h := m.head(slot)
	m.begin()
	atomic.StoreUint32(word32(h), slotFree)
	m.end()
}

// commit makes every published slot up to seq count, in one store: a write of several blocks survives whole or not
// at all.
func (m *mapping) commit(seq uint64) {
	m.begin()
	atomic.StoreUint64(word64(m.b[commitAt:]), seq)
	m.end()
}

func (m *mapping) committed() uint64 { return atomic.LoadUint64(word64(m.b[commitAt:])) }

// writeHeader writes the copy that does not count at the moment; once it is complete it does.
func (m *mapping) writeHeader(h *header) {
	b := h.encode()
	at := int(h.generation%2) * headCopyAt
	m.begin()
	atomic.StoreUint64(word64(m.b[at:]), 0)
	m.end()
	m.begin()
	copy(m.b[at+8:at+headBytes], b[8:])
	m.end()
	m.begin()
	atomic.StoreUint64(word64(m.b[at:]), headMagic)
	m.end()
}

// slotState is a slot as recovery finds it.
type slotState struct {
	lba trivet.LBA
	seq uint64
	crc uint32
}

// read returns what a published slot holds; false if it is free. ErrCorrupt: its header or data is damaged, or
// belongs to another volume.
func (m *mapping) read(slot int32, volume trivet.VolumeID) (slotState, bool, error) {
	h := m.head(slot)
	if s := atomic.LoadUint32(word32(h)); s == slotFree {
		return slotState{}, false, nil
	} else if s != slotData {
		return slotState{}, true, fmt.Errorf("slot %d: state %d: %w", slot, s, trivet.ErrCorrupt)
	}
	le := binary.LittleEndian
	st := slotState{lba: trivet.LBA(le.Uint64(h[8:])), seq: le.Uint64(h[16:]), crc: le.Uint32(h[32:])}
	if want, got := le.Uint32(h[4:]), crc32.Checksum(h[8:slotCheckEnd], castagnoli); want != got {
		return st, true, fmt.Errorf("slot %d: header checksum %08x, computed %08x: %w", slot, want, got, trivet.ErrCorrupt)
	}
	if v := trivet.VolumeID(le.Uint64(h[24:])); v != volume {
		return st, true, fmt.Errorf("slot %d: block %d of %s, not of %s: %w", slot, st.lba, v, volume, trivet.ErrCorrupt)
	}
	if err := m.verify(slot, st.lba, st.crc); err != nil {
		return st, true, err
	}
	return st, true, nil
}

// verify compares a slot's data with its checksum (I12).
func (m *mapping) verify(slot int32, lba trivet.LBA, want uint32) error {
	if got := crc32.Checksum(m.block(slot), castagnoli); got != want {
		return fmt.Errorf("slot %d, block %d: checksum %08x, computed %08x: %w", slot, lba, want, got, trivet.ErrCorrupt)
	}
	return nil
}
