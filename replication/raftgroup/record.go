package raftgroup

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"

	"github.com/hashicorp/raft"

	"github.com/trivet-csi/trivet"
)

// A segment is a file of records after a header. All numbers are little endian.
//
//	header, 64 bytes
//	 0 magic and version (8)
//	 8 group u64
//	16 sequence u64: also in the name
//	24 previous end u64: length in bytes that is valid of the segment before; 0 = there was none
//	32 first u64   \ the log when the segment began; last = first-1 when it was empty
//	40 last u64    /
//	48 zero (12)
//	60 crc32c u32 over the rest
//
//	record, padded with zeroes to 8 bytes
//	 0 crc32c u32 over group, sequence, offset of the record, and all that follows up to the padding
//	 4 length u32 of data
//	 8 kind u8: entry, truncate, trim or reset
//	 9 type u8: raft.LogType of an entry
//	10 zero u16
//	12 batch u32: bytes from the start of the batch to this record
//	16 index u64: of the entry | new last index | new first index | next index
//	24 term u64: of the entry
//	32 data
//
// A batch is written and flushed whole before the next begins, so a record tells that everything
// before its batch was durable: that is how rot is told from a torn tail (H23). Group, sequence
// and offset in the checksum keep a record from being taken for one of another place (H24).
const (
	magicSegment  = "trvtlog\x01"
	segmentHeader = 64
	recordHeader  = 32
	recordDataMax = EntryBytesMax + configBytesMax
	recordAlign   = 8
	kindEntry     = 1
	kindTruncate  = 2
	kindTrim      = 3
	kindReset     = 4
)

type segmentInfo struct {
	group       trivet.VolumeID
	seq         uint64
	prevEnd     int64
	first, last uint64
}

func (s segmentInfo) encode() []byte {
	b := make([]byte, 0, segmentHeader)
	b = append(b, magicSegment...)
	b = put64(b, uint64(s.group), s.seq, uint64(s.prevEnd), s.first, s.last)
	b = append(b, make([]byte, segmentHeader-4-len(b))...)
	return put32(b, checksum(b))
}

func decodeSegmentInfo(b []byte) (segmentInfo, error) {
	if len(b) < segmentHeader || string(b[:8]) != magicSegment {
		return segmentInfo{}, fmt.Errorf("segment header: no %q in %d bytes: %w", magicSegment[:7], len(b), trivet.ErrCorrupt)
	}
	b = b[:segmentHeader]
	want, got := binary.LittleEndian.Uint32(b[segmentHeader-4:]), checksum(b[:segmentHeader-4])
	if got != want {
		return segmentInfo{}, fmt.Errorf("segment header: checksum %08x, stored %08x: %w", got, want, trivet.ErrCorrupt)
	}
	d := decoder{b: b[8:]}
	s := segmentInfo{group: trivet.VolumeID(d.u64()), seq: d.u64(), prevEnd: int64(d.u64()), first: d.u64(), last: d.u64()}
	if s.first == 0 || s.last+1 < s.first || s.prevEnd < 0 || string(s.encode()) != string(b) {
		return segmentInfo{}, fmt.Errorf("segment header: entries %d to %d: %w", s.first, s.last, trivet.ErrCorrupt)
	}
	return s, nil
}

// record is one decoded record. data is a part of the input.
type record struct {
	kind        byte
	typ         raft.LogType
	batch       uint32
	index, term uint64
	data        []byte
}

func recordSize(dataBytes int) int64 {
	return int64(recordHeader+dataBytes+recordAlign-1) &^ (recordAlign - 1)
}

func recordSum(group trivet.VolumeID, seq uint64, off int64, body []byte) uint32 {
	var place [24]byte
	binary.LittleEndian.PutUint64(place[0:], uint64(group))
	binary.LittleEndian.PutUint64(place[8:], seq)
	binary.LittleEndian.PutUint64(place[16:], uint64(off))
	return crc32.Update(checksum(place[:]), crcTable(), body)
}

// appendRecord appends r as it stands at offset off of segment seq.
func appendRecord(b []byte, group trivet.VolumeID, seq uint64, off int64, r record) []byte {
	start := len(b)
	b = put32(b, 0)
	b = put32(b, uint32(len(r.data)))
	b = append(b, r.kind, byte(r.typ), 0, 0)
	b = put32(b, r.batch)
	b = put64(b, r.index, r.term)
	b = append(b, r.data...)
	binary.LittleEndian.PutUint32(b[start:], recordSum(group, seq, off, b[start+4:]))
	pad := recordSize(len(r.data)) - int64(len(b)-start)
	return append(b, make([]byte, pad)...)
}

// decodeRecord reads the record at the head of b, which stands at offset off of segment seq, and
// returns its size with the padding.
func decodeRecord(b []byte, group trivet.VolumeID, seq uint64, off int64) (record, int64, error) {
	if len(b) < recordHeader {
		return record{}, 0, fmt.Errorf("record at %d: %d bytes left: %w", off, len(b), trivet.ErrCorrupt)
	}
	d := decoder{b: b[4:]}
	n := int(d.u32())
	r := record{kind: d.u8(), typ: raft.LogType(d.u8())}
	zero := d.u16()
	r.batch, r.index, r.term = d.u32(), d.u64(), d.u64()
	size := recordSize(n)
	if n > recordDataMax || size > int64(len(b)) || r.kind < kindEntry || r.kind > kindReset || zero != 0 ||
		int64(r.batch) > off-segmentHeader {
		return record{}, 0, fmt.Errorf("record at %d: kind %d, %d bytes of %d: %w", off, r.kind, n, len(b), trivet.ErrCorrupt)
	}
	r.data = d.bytes(n)
	want, got := binary.LittleEndian.Uint32(b), recordSum(group, seq, off, b[4:recordHeader+n])
	if want != got {
		return record{}, 0, fmt.Errorf("record at %d: checksum %08x, stored %08x: %w", off, got, want, trivet.ErrCorrupt)
	}
	for _, c := range b[recordHeader+n : size] {
		if c != 0 {
			return record{}, 0, fmt.Errorf("record at %d: padding is not zero: %w", off, trivet.ErrCorrupt)
		}
	}
	return r, size, nil
}
