package segment

import (
	"fmt"

	"github.com/trivet-csi/trivet"
)

// decodeRecord reads the record that begins at off of a segment, without its payload, and returns it with
// its place. data is a part of b. The body checksum is not looked at: see record.checkBody. No length of
// the record is trusted before it is within b and its checksum is right.
func decodeRecord(b []byte, number, incarnation uint64, off int64) (record, place, error) {
	if len(b) < recordHeaderBytes {
		return record{}, place{}, fmt.Errorf("record at %d: %d bytes: %w", off, len(b), trivet.ErrCorrupt)
	}
	blocksN, dataBytes := int64(le.Uint32(b[32:])), int64(le.Uint32(b[36:]))
	blocksEnd := recordHeaderBytes + blocksN*blockInfoBytes
	if dataBytes > dataBytesMax || blocksEnd+dataBytes > int64(len(b)) {
		return record{}, place{}, fmt.Errorf("record at %d: %d blocks, %d bytes of data in %d bytes: %w",
			off, blocksN, dataBytes, len(b), trivet.ErrCorrupt)
	}
	want, got := le.Uint32(b), recordSum(b[4:blocksEnd], number, incarnation, uint32(off))
	if got != want {
		return record{}, place{}, fmt.Errorf("record at %d: checksum %08x, stored %08x: %w",
			off, got, want, trivet.ErrCorrupt)
	}
	r := record{
		kind: b[4], typ: b[5], group: trivet.VolumeID(le.Uint64(b[8:])),
		index: le.Uint64(b[16:]), term: le.Uint64(b[24:]), sum: le.Uint32(b[48:]),
		data: b[blocksEnd : blocksEnd+dataBytes : blocksEnd+dataBytes],
	}
	at := place{number: number, off: uint32(off), page: le.Uint32(b[40:]), payload: le.Uint32(b[44:])}
	carries := r.kind == kindEntry || r.kind == kindMove || r.kind == kindBlocks
	switch {
	case r.kind < kindEntry || r.kind > kindBlocks,
		r.kind == kindBlocks && (blocksN == 0 || dataBytes > 0),
		!carries && (at.payload > 0 || blocksN > 0),
		at.payload%pageBytes != 0 || (at.payload == 0) != (at.page == 0),
		blocksN != 0 && blocksN != int64(at.payload)/pageBytes,
		r.kind == kindStable && dataBytes > voteBytesMax:
		return record{}, place{}, fmt.Errorf("record at %d: impossible values: %w", off, trivet.ErrCorrupt)
	}
	if blocksN > 0 {
		r.blocks = make([]BlockInfo, blocksN)
		for i := range r.blocks {
			p := b[recordHeaderBytes+i*blockInfoBytes:]
			r.blocks[i] = BlockInfo{LBA: trivet.LBA(le.Uint64(p)), CRC: le.Uint32(p[8:])}
		}
	}
	head := alignUp(blocksEnd+dataBytes, 8)
	if head > int64(len(b)) {
		return record{}, place{}, fmt.Errorf("record at %d: padding is cut: %w", off, trivet.ErrCorrupt)
	}
	at.head = uint32(head)
	return r, at, nil
}

// checkBody returns ErrCorrupt, with both checksums, unless data and payload are what was written.
func (r *record) checkBody() error {
	if got := bodySum(r.data, r.payload); got != r.sum {
		return fmt.Errorf("entry %d of term %d of %s: checksum %08x, stored %08x: %w",
			r.index, r.term, r.group, got, r.sum, trivet.ErrCorrupt)
	}
	return nil
}

// found is one record of a batch.
type found struct {
	record
	at  place
	bad error // its body is damaged
}

// decodeBatch reads the records of the batch that begins b. An error means that the heads cannot be
// trusted; damage of a body is told with its record.
func decodeBatch(b []byte, h batchHeader) ([]found, error) {
	if int64(len(b)) < int64(h.bytes) {
		return nil, fmt.Errorf("batch at %d: %d bytes of %d: %w", h.off, len(b), h.bytes, trivet.ErrCorrupt)
	}
	b = b[:h.bytes]
	pos, page := int64(batchHeaderBytes), alignUp(int64(h.head), pageBytes)
	out := make([]found, 0, h.recordsN) // decodeBatchHeader bounded it by the bytes there are
	for range h.recordsN {
		r, at, err := decodeRecord(b[pos:h.head], h.number, h.incarnation, h.off+pos)
		if err != nil {
			return nil, err
		}
		if n := int64(at.payload); n > 0 {
			if h.off+page != int64(at.page)*pageBytes || page+n > int64(len(b)) {
				return nil, fmt.Errorf("record at %d: payload at page %d: %w", at.off, at.page, trivet.ErrCorrupt)
			}
			r.payload = b[page : page+n : page+n]
			page += n
		}
		pos += int64(at.head)
		out = append(out, found{record: r, at: at, bad: r.checkBody()})
	}
	if pos != int64(h.head) || page != int64(len(b)) {
		return nil, fmt.Errorf("batch at %d: records end at %d and %d, want %d and %d: %w",
			h.off, pos, page, h.head, h.bytes, trivet.ErrCorrupt)
	}
	return out, nil
}
