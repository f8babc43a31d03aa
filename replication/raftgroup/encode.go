package raftgroup

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"

	"github.com/trivet-csi/trivet"
)

// All our formats are little endian, and checked by CRC32C.

func crcTable() *crc32.Table { return crc32.MakeTable(crc32.Castagnoli) }

func checksum(b []byte) uint32 { return crc32.Checksum(b, crcTable()) }

func put64(b []byte, vs ...uint64) []byte {
	for _, v := range vs {
		b = binary.LittleEndian.AppendUint64(b, v)
	}
	return b
}

func put32(b []byte, v uint32) []byte { return binary.LittleEndian.AppendUint32(b, v) }

func putString(b []byte, s string) []byte {
	b = binary.LittleEndian.AppendUint16(b, uint16(len(s)))
	return append(b, s...)
}

func putMembers(b []byte, members []Member) []byte {
	b = append(b, byte(len(members)))
	for _, m := range members {
		b = putString(b, string(m.Replica))
		b = putString(b, string(m.Node))
		b = append(b, bit(m.Learner, 1))
	}
	return b
}

func bit(on bool, value byte) byte {
	if on {
		return value
	}
	return 0
}

// decoder reads our encodings. After the first read past the end every read yields zero, and ok
// reports it; nothing is allocated for a length that the input does not have.
type decoder struct {
	b   []byte
	bad bool
}

func (d *decoder) bytes(n int) []byte {
	if d.bad || n < 0 || n > len(d.b) {
		d.bad = true
		return nil
	}
	out := d.b[:n:n]
	d.b = d.b[n:]
	return out
}

func (d *decoder) u8() byte {
	if b := d.bytes(1); b != nil {
		return b[0]
	}
	return 0
}

func (d *decoder) u16() uint16 {
	if b := d.bytes(2); b != nil {
		return binary.LittleEndian.Uint16(b)
	}
	return 0
}

func (d *decoder) u32() uint32 {
	if b := d.bytes(4); b != nil {
		return binary.LittleEndian.Uint32(b)
	}
	return 0
}

func (d *decoder) u64() uint64 {
	if b := d.bytes(8); b != nil {
		return binary.LittleEndian.Uint64(b)
	}
	return 0
}

func (d *decoder) str() string { return string(d.bytes(int(d.u16()))) }

// members reads what putMembers wrote; nil when empty.
func (d *decoder) members() []Member {
	n := int(d.u8())
	if n > MembersMax {
		d.bad = true
		return nil
	}
	var out []Member
	for range n {
		m := Member{Replica: trivet.ReplicaID(d.str()), Node: trivet.NodeID(d.str())}
		learner := d.u8()
		m.Learner = learner == 1
		if d.bad || learner > 1 {
			d.bad = true
			return nil
		}
		out = append(out, m)
	}
	return out
}

// finish returns ErrCorrupt unless everything was read, and no more.
func (d *decoder) finish(what string) error {
	if d.bad {
		return fmt.Errorf("%s: ends too early: %w", what, trivet.ErrCorrupt)
	}
	if len(d.b) != 0 {
		return fmt.Errorf("%s: %d bytes too many: %w", what, len(d.b), trivet.ErrCorrupt)
	}
	return nil
}

// A frame wraps one small record in a file of its own:
//
//	+----------------+------------+---------+------------------------+
//	| magic, version | length u32 | payload | crc32c of all the rest |
//	+----------------+------------+---------+------------------------+
//	  8 bytes          4            length    4

const (
	frameOverhead = 8 + 4 + 4
	frameBytesMax = 256 << 10
)

func sealFrame(magic string, payload []byte) []byte {
	b := make([]byte, 0, frameOverhead+len(payload))
	b = append(b, magic...)
	b = put32(b, uint32(len(payload)))
	b = append(b, payload...)
	return put32(b, checksum(b))
}

// openFrame returns the payload at the head of b, and what follows the frame.
func openFrame(magic string, b []byte) (payload, rest []byte, err error) {
	if len(b) < frameOverhead || string(b[:7]) != magic[:7] {
		return nil, nil, fmt.Errorf("no %s frame in %d bytes: %w", magic[:7], len(b), trivet.ErrCorrupt)
	}
	if b[7] != magic[7] {
		return nil, nil, fmt.Errorf("%s frame has version %d, want %d: %w", magic[:7], b[7], magic[7], trivet.ErrCorrupt)
	}
	n := binary.LittleEndian.Uint32(b[8:])
	if n > frameBytesMax || int(n) > len(b)-frameOverhead {
		return nil, nil, fmt.Errorf("%s frame claims %d of %d bytes: %w", magic[:7], n, len(b), trivet.ErrCorrupt)
	}
	end := 12 + int(n)
	want, got := binary.LittleEndian.Uint32(b[end:]), checksum(b[:end])
	if want != got {
		return nil, nil, fmt.Errorf("%s frame: checksum %08x, stored %08x: %w", magic[:7], got, want, trivet.ErrCorrupt)
	}
	return b[12:end:end], b[end+4:], nil
}
