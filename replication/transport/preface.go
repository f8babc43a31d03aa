package transport

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"io"

	"github.com/trivet-csi/trivet"
)

// The wire versions that this build speaks. Version 1, whose frames could be as large as a message, was
// in no release.
const (
	versionOldest = 2
	versionNewest = 2
)

// prefaceBytes is the size of a preface; prefaceMagic its first bytes.
const (
	prefaceBytes = 20
	prefaceMagic = "TVP\n"
)

// preface is the first thing either end sends after the TLS handshake, the client first:
//
//	 0       4        6        8             16     20
//	+-------+--------+--------+-------------+------+
//	| magic | oldest | newest | incarnation | crc  |   big endian
//	| TVP\n | u16    | u16    | u64         | u32  |   crc: CRC32C of the bytes before
//	+-------+--------+--------+-------------+------+
//
// oldest and newest are the wire versions that the sender speaks; both ends use the highest they
// share. The incarnation is drawn at random by every process.
type preface struct {
	oldest, newest uint16
	incarnation    uint64
}

func encodePreface(p preface) []byte {
	b := append(make([]byte, 0, prefaceBytes), prefaceMagic...)
	b = binary.BigEndian.AppendUint16(b, p.oldest)
	b = binary.BigEndian.AppendUint16(b, p.newest)
	b = binary.BigEndian.AppendUint64(b, p.incarnation)
	return binary.BigEndian.AppendUint32(b, crc32.Checksum(b, castagnoli))
}

// readPreface reads the far end's preface. It returns ErrCorrupt when it is none and ErrInvalid
// when the versions have nothing in common.
func readPreface(r io.Reader) (preface, error) {
	var b [prefaceBytes]byte
	if _, err := io.ReadFull(r, b[:]); err != nil {
		return preface{}, fmt.Errorf("read preface: %w", err)
	}
	if string(b[:4]) != prefaceMagic {
		return preface{}, fmt.Errorf("preface begins with %q, want %q: %w", b[:4], prefaceMagic, trivet.ErrCorrupt)
	}
	be := binary.BigEndian
	if got, want := crc32.Checksum(b[:16], castagnoli), be.Uint32(b[16:]); got != want {
		return preface{}, fmt.Errorf("preface with checksum %08x, computed %08x: %w", want, got, trivet.ErrCorrupt)
	}
	p := preface{oldest: be.Uint16(b[4:]), newest: be.Uint16(b[6:]), incarnation: be.Uint64(b[8:])}
	if p.oldest > versionNewest || p.newest < versionOldest {
		return p, fmt.Errorf("peer speaks versions %d to %d, we %d to %d: %w",
			p.oldest, p.newest, versionOldest, versionNewest, trivet.ErrInvalid)
	}
	return p, nil
}
