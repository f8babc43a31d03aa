package main

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
)

// blockBytes is the unit of the volumes and of the check.
const blockBytes = 4096

// A stamped block says what it is, so that a block in a wrong place, of another volume or with a single wrong
// byte is known for what it is without any history. Little endian:
//
//	| magic 8 | volume 8 | lba 8 | attachment 8 | sequence 8 | filler 4052 | CRC32C of all before 4 |
//
// The filler follows from the sequence. A block of zeroes was never written, or was trimmed.
const (
	stampMagic  = "TRVCHAOS"
	stampCRCOff = blockBytes - 4
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// stamp is the content of a written block. Sequence is unique in its volume and never 0.
type stamp struct {
	Volume     int
	LBA        int
	Attachment int // which attachment of the volume the writer had
	Sequence   uint64
}

// fill writes the block of s to p. REQUIRES: len(p) == blockBytes.
func (s stamp) fill(p []byte) {
	copy(p, stampMagic)
	for i, v := range []uint64{uint64(s.Volume), uint64(s.LBA), uint64(s.Attachment), s.Sequence} {
		binary.LittleEndian.PutUint64(p[8+8*i:], v)
	}
	x := s.Sequence
	for off := 40; off+8 <= stampCRCOff; off += 8 {
		x = x*6364136223846793005 + 1442695040888963407 // Knuth's MMIX generator: any mixing will do
		binary.LittleEndian.PutUint64(p[off:], x)
	}
	binary.LittleEndian.PutUint32(p[stampCRCOff-4:], uint32(x))
	binary.LittleEndian.PutUint32(p[stampCRCOff:], crc32.Checksum(p[:stampCRCOff], castagnoli))
}

// readStamp returns what is in a block that was read at lba of volume. A block of zeroes has the sequence 0. The
// error says how the block is wrong; the store must never let that happen.
func readStamp(p []byte, volume, lba int) (stamp, error) {
	if len(bytes.TrimLeft(p, "\x00")) == 0 {
		return stamp{Volume: volume, LBA: lba}, nil
	}
	if !bytes.HasPrefix(p, []byte(stampMagic)) {
		return stamp{}, fmt.Errorf("not a stamped block: begins with %x", p[:16])
	}
	field := func(i int) uint64 { return binary.LittleEndian.Uint64(p[8+8*i:]) }
	s := stamp{Volume: int(field(0)), LBA: int(field(1)), Attachment: int(field(2)), Sequence: field(3)}
	want := crc32.Checksum(p[:stampCRCOff], castagnoli)
	if got := binary.LittleEndian.Uint32(p[stampCRCOff:]); got != want {
		return s, fmt.Errorf("torn or damaged block of %+v: CRC %08x, computed %08x", s, got, want)
	}
	if s.Volume != volume || s.LBA != lba {
		return s, fmt.Errorf("block of volume %d lba %d in the place of volume %d lba %d", s.Volume, s.LBA, volume, lba)
	}
	if s.Sequence == 0 {
		return s, errors.New("stamped block without a sequence")
	}
	return s, nil
}
