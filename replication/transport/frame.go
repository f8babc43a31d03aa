package transport

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"io"

	"github.com/trivet-csi/trivet"
)

// frameType says what a frame is.
type frameType uint8

// The frame types. The client of a connection sends requests and cancels, its server replies and
// errors, and both send pings, which need no answer: each end wants to see bytes from time to time.
const (
	frameRequest frameType = 1 // body: Message.Body
	frameReply   frameType = 2 // body: Message.Body
	frameError   frameType = 3 // body: encodeError
	frameCancel  frameType = 4 // the caller of id gave up; no body
	framePing    frameType = 5 // no body
)

// frameHeaderBytes is the fixed part of a frame.
const frameHeaderBytes = 28

// frame is a decoded frame:
//
//	 0        4        8      9      10        11      12         20         28
//	+--------+--------+------+------+---------+-------+----------+----------+------+----+------+
//	| length | crc    | type | kind | fromLen | toLen | id       | group    | from | to | body |
//	| u32    | u32    | u8   | u8   | u8      | u8    | u64      | u64      |      |    |      |
//	+--------+--------+------+------+---------+-------+----------+----------+------+----+------+
//
// Integers are big endian. length counts the whole frame, itself included, and is at most
// MessageBytesMax. crc is the CRC32C of everything else, length included. id ties a reply, error
// or cancel to its request and is unique among the outstanding requests of a connection.
type frame struct {
	typ frameType
	id  uint64
	msg Message
}

// castagnoli is the polynomial that CPUs have an instruction for.
var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// frameBytes returns the size of m as a frame.
func frameBytes(m Message) int { return frameHeaderBytes + len(m.From) + len(m.To) + len(m.Body) }

// checkMessage returns ErrInvalid when m cannot be sent.
func checkMessage(m Message) error {
	if n := frameBytes(m); n > MessageBytesMax {
		return fmt.Errorf("message of %d bytes, at most %d are allowed: %w", n, MessageBytesMax, trivet.ErrInvalid)
	}
	if len(m.From) > 255 || len(m.To) > 255 {
		return fmt.Errorf("replica ids of %d and %d bytes, at most 255 are allowed: %w",
			len(m.From), len(m.To), trivet.ErrInvalid)
	}
	return nil
}

// encodeFrame fills buf, of frameBytes(f.msg) bytes. REQUIRES: checkMessage(f.msg) is nil.
func encodeFrame(buf []byte, f frame) {
	be := binary.BigEndian
	be.PutUint32(buf[0:], uint32(len(buf)))
	buf[8], buf[9] = byte(f.typ), byte(f.msg.Kind)
	buf[10], buf[11] = byte(len(f.msg.From)), byte(len(f.msg.To))
	be.PutUint64(buf[12:], f.id)
	be.PutUint64(buf[20:], uint64(f.msg.Group))
	n := frameHeaderBytes
	n += copy(buf[n:], f.msg.From)
	n += copy(buf[n:], f.msg.To)
	n += copy(buf[n:], f.msg.Body)
	if n != len(buf) {
		panic(fmt.Sprintf("transport: frame of %d bytes in a buffer of %d", n, len(buf)))
	}
	be.PutUint32(buf[4:], frameCRC(buf[:frameHeaderBytes], buf[frameHeaderBytes:]))
}

// frameCRC is the checksum of a frame: everything but the checksum itself.
func frameCRC(header, rest []byte) uint32 {
	crc := crc32.Update(0, castagnoli, header[0:4])
	crc = crc32.Update(crc, castagnoli, header[8:])
	return crc32.Update(crc, castagnoli, rest)
}

// readFrame reads one frame. The body is freshly allocated and belongs to the caller; nothing is
// allocated before the length is checked. Anything malformed is ErrCorrupt, after which the stream
// is of no more use. A stream that ends between frames returns io.EOF as it is.
func readFrame(r io.Reader) (frame, error) {
	var header [frameHeaderBytes]byte
	if _, err := io.ReadFull(r, header[:]); err != nil {
		return frame{}, err
	}
	f, restBytes, err := decodeHeader(&header)
	if err != nil {
		return frame{}, err
	}
	rest := make([]byte, restBytes)
	if _, err := io.ReadFull(r, rest); err != nil {
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		return frame{}, err
	}
	if got, want := frameCRC(header[:], rest), binary.BigEndian.Uint32(header[4:]); got != want {
		return frame{}, fmt.Errorf("frame with checksum %08x, computed %08x: %w", want, got, trivet.ErrCorrupt)
	}
	fromEnd := int(header[10])
	toEnd := fromEnd + int(header[11])
	f.msg.From = trivet.ReplicaID(rest[:fromEnd])
	f.msg.To = trivet.ReplicaID(rest[fromEnd:toEnd])
	f.msg.Body = rest[toEnd:]
	return f, nil
}

// decodeHeader checks the fixed part and returns it with the number of bytes that follow.
func decodeHeader(b *[frameHeaderBytes]byte) (frame, int, error) {
	be := binary.BigEndian
	length := be.Uint32(b[0:])
	f := frame{
		typ: frameType(b[8]),
		id:  be.Uint64(b[12:]),
		msg: Message{Kind: Kind(b[9]), Group: trivet.VolumeID(be.Uint64(b[20:]))},
	}
	least := frameHeaderBytes + int(b[10]) + int(b[11])
	if length > MessageBytesMax || int(length) < least {
		return frame{}, 0, fmt.Errorf("frame of %d bytes, want %d to %d: %w",
			length, least, MessageBytesMax, trivet.ErrCorrupt)
	}
	if f.typ < frameRequest || f.typ > framePing {
		return frame{}, 0, fmt.Errorf("frame of type %d, want %d to %d: %w",
			f.typ, frameRequest, framePing, trivet.ErrCorrupt)
	}
	if f.typ >= frameCancel && length != frameHeaderBytes {
		return frame{}, 0, fmt.Errorf("frame of type %d and %d bytes, want %d: %w",
			f.typ, length, frameHeaderBytes, trivet.ErrCorrupt)
	}
	return f, int(length) - frameHeaderBytes, nil
}
