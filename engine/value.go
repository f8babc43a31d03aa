package engine

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"hash/crc32"

	"github.com/trivet-csi/trivet"
)

// Values of block keys, version 1, big endian. The sum is CRC32C over the data, then volume (8) and
// LBA (8), so that a block found at the wrong place does not verify (H24):
//
//	 0      1           5                     4101
//	+------+-----------+---------------------+
//	| 0x01 | sum       | data, 4096 bytes    |   a block
//	+------+-----------+---------------------+
//	| 0x02 | sum       |                         a tombstone: reads as zeroes, hides older generations
//	+------+-----------+------------+---------+
//	| 0x04 | sum       | segment (8)| page (4)|  a block whose data stand in the disk's log, from byte 4096 * page
//	+------+-----------+------------+---------+  of that segment on; since version 3 of the store
//
// 0x03 is no value, but an item of an image.
//
// The first byte is format and kind at once; other layouts take other bytes.
const (
	kindData      byte = 0x01
	kindTombstone byte = 0x02
	kindRef       byte = 0x04

	valueHeadBytes = 1 + 4
	dataValueBytes = valueHeadBytes + trivet.BlockSize
	refValueBytes  = valueHeadBytes + 8 + 4
)

var (
	castagnoli = crc32.MakeTable(crc32.Castagnoli)
	zeroBlock  [trivet.BlockSize]byte
)

// BlockError says which block is damaged and how. errors.Is(err, trivet.ErrCorrupt) holds.
type BlockError struct {
	Volume trivet.VolumeID
	LBA    trivet.LBA
	Stored uint32 // checksum found beside the data
	Actual uint32 // checksum of the data found
	Reason string // what is wrong, when it is not the checksum
}

// Error implements error.
func (e *BlockError) Error() string {
	if e.Reason != "" {
		return fmt.Sprintf("block %d of %s: %s: %v", e.LBA, e.Volume, e.Reason, trivet.ErrCorrupt)
	}
	return fmt.Sprintf("block %d of %s: checksum %08x stored, %08x computed: %v",
		e.LBA, e.Volume, e.Stored, e.Actual, trivet.ErrCorrupt)
}

// Unwrap returns trivet.ErrCorrupt.
func (e *BlockError) Unwrap() error { return trivet.ErrCorrupt }

// BlockSum is the checksum that the engine keeps beside a block: CRC32C over data, volume and LBA.
func BlockSum(id trivet.VolumeID, lba trivet.LBA, data []byte) uint32 {
	var k [blockPrefixBytes]byte
	return sumAt(data, place(appendBlockPrefix(k[:0], id, lba)))
}

// sumAt is BlockSum with volume and LBA as the block key has them. It does not allocate.
func sumAt(data, at []byte) uint32 {
	return crc32.Update(crc32.Update(0, castagnoli, data), castagnoli, at)
}

// putData fills v, of dataValueBytes, with the value of a block and returns its sum.
func putData(v, data, at []byte) uint32 {
	sum := sumAt(data, at)
	v[0] = kindData
	binary.BigEndian.PutUint32(v[1:], sum)
	copy(v[valueHeadBytes:], data)
	return sum
}

// putTombstone fills v, of valueHeadBytes, with the value of a tombstone and returns its sum.
func putTombstone(v, at []byte) uint32 {
	sum := sumAt(nil, at)
	v[0] = kindTombstone
	binary.BigEndian.PutUint32(v[1:], sum)
	return sum
}

// decodeValue checks the value found at block key k. data is nil for a tombstone, else 4 KiB of v.
// It returns a *BlockError for anything that putData and putTombstone do not make for that key.
// REQUIRES: bk is k decoded.
func decodeValue(v, k []byte, bk blockKey) (data []byte, sum uint32, err error) {
	bad := func(format string, args ...any) error {
		return &BlockError{Volume: bk.volume, LBA: bk.lba, Reason: fmt.Sprintf(format, args...)}
	}
	if len(v) < valueHeadBytes {
		return nil, 0, bad("value of %d bytes is too short", len(v))
	}
	want := valueHeadBytes
	switch v[0] {
	case kindData:
		want = dataValueBytes
	case kindTombstone:
	default:
		return nil, 0, bad("unknown value format %#x", v[0])
	}
	if len(v) != want {
		return nil, 0, bad("value of format %#x has %d bytes, want %d", v[0], len(v), want)
	}
	sum = binary.BigEndian.Uint32(v[1:])
	if got := sumAt(v[valueHeadBytes:], place(k)); got != sum {
		return nil, 0, &BlockError{Volume: bk.volume, LBA: bk.lba, Stored: sum, Actual: got}
	}
	if v[0] == kindTombstone {
		return nil, sum, nil
	}
	return v[valueHeadBytes:], sum, nil
}

func isZero(p []byte) bool { return bytes.Equal(p, zeroBlock[:len(p)]) }
