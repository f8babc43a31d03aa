package segment

import (
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"hash/crc32"
	"strings"

	"github.com/trivet-csi/trivet"
)

// A segment is a file of fixed size. All numbers are little endian; everything marked "page" begins at a
// multiple of 4096 bytes, so that it can be read and written with O_DIRECT.
//
//	+----------------+ 0
//	| segment header | one page
//	+----------------+ 4096
//	| checkpoint     | checkpoint.go, padded to a page
//	+----------------+ start of the batches
//	| batch          | one group commit: one write and one flush
//	| batch          |
//	| …              | then whatever the file held before: of another incarnation, so it counts as nothing
//	+----------------+ segment bytes
//
//	segment header, 128 bytes, the rest of its page is zero
//	  0 magic and version (8)
//	  8 disk UUID (16)
//	 24 lane u32
//	 28 lanes u32: of the log, fixed at format
//	 32 number u64: rises by one in each lane, from 1
//	 40 incarnation u64: drawn at random each time that a file becomes a segment
//	 48 segment bytes u64
//	 56 previous end u64: where the segment before ended, and was durable; 0 = there was none
//	 64 checkpoint bytes u32
//	 68 checkpoint crc32c u32
//	 72 data lanes u32: 1 when the last lane holds blocks without entries, else 0
//	 76 zero (48)
//	124 crc32c u32 over the rest
//
//	batch, padded to a page: header, records one after the other, page, payloads one after the other
//	batch header, 64 bytes
//	  0 magic and version (8)
//	  8 number u64       \
//	 16 incarnation u64   | its place: a copy of it elsewhere is not taken for it (H24)
//	 24 offset u64       /
//	 32 durable u64: everything before this offset was on stable storage when the batch was made
//	 40 bytes u32: of the batch
//	 44 head bytes u32: header and records, without padding
//	 48 records u32: 0 = an end mark, written alone by a lane that fell idle
//	 52 zero (8)
//	 60 crc32c u32 over the rest
//
//	record, padded with zeroes to 8 bytes
//	  0 crc32c u32 over number, incarnation, offset of the record, and what follows up to the data
//	  4 kind u8: entry, move, truncate, trim, reset, stable, delete or blocks
//	  5 type u8: of the entry, for the caller
//	  6 zero u16
//	  8 group u64: of blocks, their volume
//	 16 index u64: of the entry | first to drop | last to drop | next | term of the vote | 0
//	 24 term u64: of the entry | current term
//	 32 blocks u32: described blocks; 0, or one for each 4096 bytes of payload
//	 36 data bytes u32
//	 40 payload page u32: payload offset in the segment / 4096; 0 = no payload
//	 44 payload bytes u32, a multiple of 4096
//	 48 body crc32c u32 over data and payload
//	 52 zero u32
//	 56 blocks: LBA u64, crc32c u32 each, as the caller gave them
//	 .. data: of the entry | candidate of the vote
//
// The records of a batch stand together and the payloads behind them, so that a batch of n entries of one
// block takes n pages and little more, and every block can be read in place.
const (
	pageBytes = trivet.BlockSize

	magicSegment = "trvtseg\x01"
	magicBatch   = "trvtbat\x01"

	segmentHeaderBytes = 128
	batchHeaderBytes   = 64
	recordHeaderBytes  = 56
	blockInfoBytes     = 12

	dataBytesMax = 16 << 20
	voteBytesMax = 255
	lanesMax     = 16

	kindEntry    = 1
	kindMove     = 2 // an entry again, copied out of a segment that is to be recycled
	kindTruncate = 3
	kindTrim     = 4
	kindReset    = 5
	kindStable   = 6
	kindDelete   = 7
	kindBlocks   = 8 // of a volume, without an entry, in a data lane
)

var (
	crcTable = crc32.MakeTable(crc32.Castagnoli)
	le       = binary.LittleEndian
)

func checksum(b []byte) uint32 { return crc32.Checksum(b, crcTable) }

func alignUp(n, to int64) int64 { return (n + to - 1) / to * to }

// diskUUID is the binary form of a trivet.DiskID.
type diskUUID [16]byte

func parseDisk(id trivet.DiskID) (diskUUID, error) {
	var u diskUUID
	if err := trivet.ValidateUUID(string(id)); err != nil {
		return u, err
	}
	b, err := hex.DecodeString(strings.ReplaceAll(string(id), "-", ""))
	copy(u[:], b)
	return u, err
}

type segmentHeader struct {
	disk                diskUUID
	lane, lanes, data   uint32
	number, incarnation uint64
	segmentBytes        int64
	prevEnd             int64
	checkpointBytes     uint32
	checkpointSum       uint32
}

// start returns the offset of the first batch.
func (h segmentHeader) start() int64 { return pageBytes + alignUp(int64(h.checkpointBytes), pageBytes) }

// encode fills b, the first page of a segment.
func (h segmentHeader) encode(b []byte) {
	clear(b[:pageBytes])
	copy(b, magicSegment)
	copy(b[8:], h.disk[:])
	le.PutUint32(b[24:], h.lane)
	le.PutUint32(b[28:], h.lanes)
	le.PutUint64(b[32:], h.number)
	le.PutUint64(b[40:], h.incarnation)
	le.PutUint64(b[48:], uint64(h.segmentBytes))
	le.PutUint64(b[56:], uint64(h.prevEnd))
	le.PutUint32(b[64:], h.checkpointBytes)
	le.PutUint32(b[68:], h.checkpointSum)
	le.PutUint32(b[72:], h.data)
	le.PutUint32(b[124:], checksum(b[:124]))
}

func decodeSegmentHeader(b []byte) (segmentHeader, error) {
	if len(b) < segmentHeaderBytes || string(b[:8]) != magicSegment {
		return segmentHeader{}, fmt.Errorf("segment header: no magic: %w", trivet.ErrCorrupt)
	}
	if want, got := le.Uint32(b[124:]), checksum(b[:124]); got != want {
		return segmentHeader{}, fmt.Errorf("segment header: checksum %08x, stored %08x: %w", got, want, trivet.ErrCorrupt)
	}
	h := segmentHeader{
		lane: le.Uint32(b[24:]), lanes: le.Uint32(b[28:]),
		number: le.Uint64(b[32:]), incarnation: le.Uint64(b[40:]),
		segmentBytes: int64(le.Uint64(b[48:])), prevEnd: int64(le.Uint64(b[56:])),
		checkpointBytes: le.Uint32(b[64:]), checkpointSum: le.Uint32(b[68:]), data: le.Uint32(b[72:]),
	}
	copy(h.disk[:], b[8:])
	switch {
	case h.lanes == 0 || h.lanes > lanesMax || h.lane >= h.lanes || h.data > 1 || h.data >= h.lanes || h.number == 0,
		h.segmentBytes < segmentBytesMin || h.segmentBytes > segmentBytesMax || h.segmentBytes%pageBytes != 0,
		h.prevEnd < 0 || h.prevEnd > h.segmentBytes || h.prevEnd%pageBytes != 0,
		int64(h.checkpointBytes) > h.segmentBytes/2:
		return segmentHeader{}, fmt.Errorf("segment header: impossible values %+v: %w", h, trivet.ErrCorrupt)
	}
	return h, nil
}

// place is where an entry stands in a segment.
type place struct {
	number  uint64
	off     uint32 // bytes from the start of the segment to the record
	head    uint32 // bytes of the record
	page    uint32 // 4 KiB pages to the payload
	payload uint32 // bytes of payload
}

// bytes is what the entry takes of its segment.
func (p place) bytes() int64 { return int64(p.head) + int64(p.payload) }

type batchHeader struct {
	number, incarnation   uint64
	off, durable          int64
	bytes, head, recordsN uint32
}

func (h batchHeader) encode(b []byte) {
	clear(b[:batchHeaderBytes])
	copy(b, magicBatch)
	le.PutUint64(b[8:], h.number)
	le.PutUint64(b[16:], h.incarnation)
	le.PutUint64(b[24:], uint64(h.off))
	le.PutUint64(b[32:], uint64(h.durable))
	le.PutUint32(b[40:], h.bytes)
	le.PutUint32(b[44:], h.head)
	le.PutUint32(b[48:], h.recordsN)
	le.PutUint32(b[60:], checksum(b[:60]))
}

// decodeBatchHeader reads the header of a batch that stands at off; segmentBytes bounds it.
func decodeBatchHeader(b []byte, off, segmentBytes int64) (batchHeader, error) {
	if len(b) < batchHeaderBytes || string(b[:8]) != magicBatch {
		return batchHeader{}, fmt.Errorf("batch at %d: no magic: %w", off, trivet.ErrCorrupt)
	}
	if want, got := le.Uint32(b[60:]), checksum(b[:60]); got != want {
		return batchHeader{}, fmt.Errorf("batch at %d: checksum %08x, stored %08x: %w", off, got, want, trivet.ErrCorrupt)
	}
	h := batchHeader{
		number: le.Uint64(b[8:]), incarnation: le.Uint64(b[16:]),
		off: int64(le.Uint64(b[24:])), durable: int64(le.Uint64(b[32:])),
		bytes: le.Uint32(b[40:]), head: le.Uint32(b[44:]), recordsN: le.Uint32(b[48:]),
	}
	switch {
	case h.off != off || h.durable < 0 || h.durable > off,
		h.bytes == 0 || h.bytes%pageBytes != 0 || int64(h.bytes) > segmentBytes-off,
		h.head < batchHeaderBytes || h.head > h.bytes,
		int64(h.recordsN) > int64(h.head-batchHeaderBytes)/recordHeaderBytes:
		return batchHeader{}, fmt.Errorf("batch at %d: impossible values %+v: %w", off, h, trivet.ErrCorrupt)
	}
	return h, nil
}

// BlockInfo describes one block of an entry's payload. The log stores it and does not look at it.
type BlockInfo struct {
	LBA trivet.LBA
	CRC uint32 // of the caller's making, over whatever it covers
}

// record is one change of a group. data and payload are shared with whoever made it.
type record struct {
	kind, typ     byte
	group         trivet.VolumeID
	index, term   uint64
	blocks        []BlockInfo
	data, payload []byte
	sum           uint32 // body checksum
}

func bodySum(data, payload []byte) uint32 {
	return crc32.Update(checksum(data), crcTable, payload)
}

func (r *record) headBytes() int64 {
	return alignUp(recordHeaderBytes+int64(len(r.blocks))*blockInfoBytes+int64(len(r.data)), 8)
}

// batchBytes returns the size of the head and of the whole batch that would hold records.
func batchBytes(records []*record) (head, total int64) {
	head = batchHeaderBytes
	var payload int64
	for _, r := range records {
		head += r.headBytes()
		payload += int64(len(r.payload))
	}
	return head, alignUp(head, pageBytes) + payload
}

// encodeBatch fills b, which has the size that batchBytes gives, with a batch of records, and appends to places
// where each came to stand. h needs number, incarnation, offset and durable position.
func encodeBatch(places []place, b []byte, h batchHeader, records []*record) []place {
	head, _ := batchBytes(records)
	h.bytes, h.head, h.recordsN = uint32(len(b)), uint32(head), uint32(len(records))
	h.encode(b)
	pos, page := int64(batchHeaderBytes), alignUp(head, pageBytes)
	clear(b[head:page])
	for _, r := range records {
		n := r.headBytes()
		at := place{number: h.number, off: uint32(h.off + pos), head: uint32(n), payload: uint32(len(r.payload))}
		if at.payload > 0 {
			at.page = uint32((h.off + page) / pageBytes)
		}
		r.encode(b[pos:pos+n], h.incarnation, at)
		copy(b[page:], r.payload)
		pos, page = pos+n, page+int64(len(r.payload))
		places = append(places, at)
	}
	return places
}

func (r *record) encode(b []byte, incarnation uint64, at place) {
	clear(b[:recordHeaderBytes])
	b[4], b[5] = r.kind, r.typ
	le.PutUint64(b[8:], uint64(r.group))
	le.PutUint64(b[16:], r.index)
	le.PutUint64(b[24:], r.term)
	le.PutUint32(b[32:], uint32(len(r.blocks)))
	le.PutUint32(b[36:], uint32(len(r.data)))
	le.PutUint32(b[40:], at.page)
	le.PutUint32(b[44:], at.payload)
	le.PutUint32(b[48:], r.sum)
	pos := recordHeaderBytes
	for _, i := range r.blocks {
		le.PutUint64(b[pos:], uint64(i.LBA))
		le.PutUint32(b[pos+8:], i.CRC)
		pos += blockInfoBytes
	}
	le.PutUint32(b, recordSum(b[4:pos], at.number, incarnation, at.off))
	n := copy(b[pos:], r.data)
	clear(b[pos+n:])
}

func recordSum(head []byte, number, incarnation uint64, off uint32) uint32 {
	var where [20]byte
	le.PutUint64(where[0:], number)
	le.PutUint64(where[8:], incarnation)
	le.PutUint32(where[16:], off)
	return crc32.Update(shortSum(where[:]), crcTable, head)
}

// shortSum is checksum of a few bytes. Those that checksum is given are moved to the heap, since it calls the
// processor's way by a variable; these are not.
func shortSum(b []byte) uint32 {
	sum := ^uint32(0)
	for _, c := range b {
		sum = crcTable[byte(sum)^c] ^ sum>>8
	}
	return ^sum
}
