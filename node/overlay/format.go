package overlay

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"

	"github.com/trivet-csi/trivet"
)

// The file of an overlay, version 1, little endian. It never leaves the boot of the machine that wrote it.
//
//	page 0               header
//	page 1 + 65c         heads of the slots of chunk c, 64 of 64 bytes
//	pages 2 + 65c to …   data of these slots, one block each
//
// Header:
//
//	 0 magic "TRVTOVL1" | 8 version u32 | 12 crc32c u32 of bytes 8–11 and 16–23 | 16 volume u64
//	64 commit u64: heads with a higher sequence do not count | 72 full u32: a write was refused
//
// Head of a slot; of two of the same block the higher sequence counts:
//
//	0 sequence u64, zero: free | 8 LBA u64 | 16 crc32c u32 of the data | 20 crc32c u32 of bytes 0–19 | 24 zeroes
const (
	formatVersion = 1
	magic         = "TRVTOVL1"
	pageBytes     = trivet.BlockSize

	commitAt = 64
	fullAt   = 72

	chunkSlotN = 64
	headBytes  = 64
	headEnd    = 24 // of what is used of a head
	chunkBytes = (1 + chunkSlotN) * pageBytes
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// encodeHeader returns page 0 of an empty overlay.
func encodeHeader(volume trivet.VolumeID) []byte {
	b := make([]byte, pageBytes)
	copy(b, magic)
	binary.LittleEndian.PutUint32(b[8:], formatVersion)
	binary.LittleEndian.PutUint64(b[16:], uint64(volume))
	binary.LittleEndian.PutUint32(b[12:], headerCRC(b))
	return b
}

func headerCRC(b []byte) uint32 {
	return crc32.Update(crc32.Checksum(b[8:12], castagnoli), castagnoli, b[16:24])
}

// decodeHeader reads page 0 of the overlay of a volume. ErrInvalid: a newer version wrote it, or it is another
// volume's. ErrCorrupt: damage.
func decodeHeader(b []byte, volume trivet.VolumeID) (commit uint64, full bool, err error) {
	le := binary.LittleEndian
	if len(b) < pageBytes || string(b[:8]) != magic {
		return 0, false, fmt.Errorf("it is no overlay: %w", trivet.ErrCorrupt)
	}
	if v := le.Uint32(b[8:]); v != formatVersion { // before the checksum, which another version may take elsewhere
		return 0, false, fmt.Errorf("format version %d, this program reads %d: %w", v, formatVersion, trivet.ErrInvalid)
	}
	if want, got := le.Uint32(b[12:]), headerCRC(b); want != got {
		return 0, false, fmt.Errorf("header checksum %08x, computed %08x: %w", want, got, trivet.ErrCorrupt)
	}
	if of := trivet.VolumeID(le.Uint64(b[16:])); of != volume {
		return 0, false, fmt.Errorf("it is of %s, not of %s: %w", of, volume, trivet.ErrInvalid)
	}
	return le.Uint64(b[commitAt:]), le.Uint32(b[fullAt:]) != 0, nil
}

// head says what a slot holds.
type head struct {
	seq uint64
	lba trivet.LBA
	crc uint32 // of the data
}

func (h head) encode(b []byte) {
	le := binary.LittleEndian
	le.PutUint64(b, h.seq)
	le.PutUint64(b[8:], uint64(h.lba))
	le.PutUint32(b[16:], h.crc)
	le.PutUint32(b[20:], crc32.Checksum(b[:20], castagnoli))
}

// decodeHead returns a zero head for a free slot, ErrCorrupt for a damaged one.
func decodeHead(b []byte) (head, error) {
	le := binary.LittleEndian
	h := head{seq: le.Uint64(b), lba: trivet.LBA(le.Uint64(b[8:])), crc: le.Uint32(b[16:])}
	if h.seq == 0 {
		return head{}, nil
	}
	if want, got := le.Uint32(b[20:]), crc32.Checksum(b[:20], castagnoli); want != got {
		return head{}, fmt.Errorf("head checksum %08x, computed %08x: %w", want, got, trivet.ErrCorrupt)
	}
	return h, nil
}

// chunkAt returns where a chunk begins.
func chunkAt(chunk int64) int64 { return pageBytes + chunk*chunkBytes }

// headAt returns where the head of a slot is.
func headAt(slot int32) int64 {
	return chunkAt(int64(slot)/chunkSlotN) + int64(slot)%chunkSlotN*headBytes
}

// dataAt returns where the data of a slot are.
func dataAt(slot int32) int64 {
	return chunkAt(int64(slot)/chunkSlotN) + pageBytes + int64(slot)%chunkSlotN*pageBytes
}
