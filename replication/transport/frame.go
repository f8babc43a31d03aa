package transport

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"

	"github.com/trivet-csi/trivet"
)

// frameType says what a frame is.
type frameType uint8

// The frame types. The client of a connection sends requests and cancels, its server replies and
// errors, and both send fragments and pings. Pings need no answer: each end wants to see bytes from
// time to time.
const (
	frameRequest  frameType = 1 // body: Message.Body
	frameReply    frameType = 2 // body: Message.Body
	frameError    frameType = 3 // body: encodeError
	frameCancel   frameType = 4 // the caller of id gave up; no body; no fragment of id follows
	framePing     frameType = 5 // no body
	frameFragment frameType = 6 // body: the next piece of a message whose first piece went before
)

// firstPiece is set in the type of a request, reply or error when its body goes on in fragments.
const firstPiece = 0x80

const (
	frameHeaderBytes = 28       // the fixed part of a frame
	fragmentBytes    = 64 << 10 // the most of a body that one frame has
	pieceWordBytes   = 4        // total or offset

	// frameBytesMax bounds a frame, and so what an urgent frame waits for when one is being written.
	frameBytesMax = frameHeaderBytes + 2*255 + pieceWordBytes + fragmentBytes
)

// frame is a frame, or a message of several:
//
//	 0        4        8      9      10        11      12         20         28
//	+--------+--------+------+------+---------+-------+----------+----------+------+----+------+
//	| length | crc    | type | kind | fromLen | toLen | id       | group    | from | to | body |
//	| u32    | u32    | u8   | u8   | u8      | u8    | u64      | u64      |      |    |      |
//	+--------+--------+------+------+---------+-------+----------+----------+------+----+------+
//
// Integers are big endian. length counts the whole frame, itself included, and is at most
// frameBytesMax. crc is the CRC32C of everything else, length included. id ties a reply, error,
// cancel or fragment to its request and is unique among the outstanding requests of a connection.
//
// A body of more than fragmentBytes goes in pieces of that size, the last one shorter:
//
//	first, with firstPiece in type        further ones: kind, id and group as in the first
//	| header | from | to | total u32 | piece |        | header | offset u32 | piece |
//
// total is the size of the whole body. The pieces of one message go in order; those of others, and
// whole frames, may go between them.
type frame struct {
	typ frameType
	id  uint64
	msg Message
}

// castagnoli is the polynomial that CPUs have an instruction for.
var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// frameBytes returns the size of m as one frame, whatever its length.
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

// pieces returns in how many frames a body goes.
func pieces(bodyBytes int) int { return max(1, (bodyBytes+fragmentBytes-1)/fragmentBytes) }

// encodedBytes returns the size of m in frames.
func encodedBytes(m Message) int {
	n := pieces(len(m.Body))
	if n == 1 {
		return frameBytes(m)
	}
	return frameBytes(m) + (n-1)*frameHeaderBytes + n*pieceWordBytes
}

// encodeMessage fills buf, of encodedBytes(f.msg) bytes, with the frames of f one after another.
// REQUIRES: checkMessage(f.msg) is nil.
func encodeMessage(buf []byte, f frame) {
	m, body := f.msg, f.msg.Body
	if pieces(len(body)) == 1 {
		putFrame(buf, byte(f.typ), f.id, m, nil)
		return
	}
	var word [pieceWordBytes]byte
	binary.BigEndian.PutUint32(word[:], uint32(len(body)))
	m.Body = body[:fragmentBytes]
	n := putFrame(buf, byte(f.typ)|firstPiece, f.id, m, word[:])
	for off := fragmentBytes; off < len(body); off += fragmentBytes {
		binary.BigEndian.PutUint32(word[:], uint32(off))
		m = Message{Kind: m.Kind, Group: m.Group, Body: body[off:min(off+fragmentBytes, len(body))]}
		n += putFrame(buf[n:], byte(frameFragment), f.id, m, word[:])
	}
	if n != len(buf) {
		panic(fmt.Sprintf("transport: frames of %d bytes in a buffer of %d", n, len(buf)))
	}
}

// putFrame writes a frame at the head of buf and returns its size. word stands before the body.
func putFrame(buf []byte, typ byte, id uint64, m Message, word []byte) int {
	be := binary.BigEndian
	buf = buf[:frameBytes(m)+len(word)]
	be.PutUint32(buf[0:], uint32(len(buf)))
	buf[8], buf[9] = typ, byte(m.Kind)
	buf[10], buf[11] = byte(len(m.From)), byte(len(m.To))
	be.PutUint64(buf[12:], id)
	be.PutUint64(buf[20:], uint64(m.Group))
	n := frameHeaderBytes
	n += copy(buf[n:], m.From)
	n += copy(buf[n:], m.To)
	n += copy(buf[n:], word)
	copy(buf[n:], m.Body)
	be.PutUint32(buf[4:], frameCRC(buf[:frameHeaderBytes], buf[frameHeaderBytes:]))
	return len(buf)
}

// firstFrame returns the first of the frames in buf.
func firstFrame(buf []byte) []byte { return buf[:binary.BigEndian.Uint32(buf)] }

// frameCRC is the checksum of a frame: everything but the checksum itself.
func frameCRC(header, rest []byte) uint32 {
	crc := crc32.Update(0, castagnoli, header[0:4])
	crc = crc32.Update(crc, castagnoli, header[8:])
	return crc32.Update(crc, castagnoli, rest)
}

// header is the fixed part of a frame, checked.
type header struct {
	typ         frameType
	first       bool // of several
	kind        Kind
	fromN, toN  int
	id          uint64
	group       trivet.VolumeID
	pieceN      int // bytes of body, without the word before it
	crc, before uint32
}

// decodeHeader checks the fixed part of a frame: nothing is allocated for a length that is too large.
func decodeHeader(b *[frameHeaderBytes]byte) (header, error) {
	be := binary.BigEndian
	h := header{
		typ: frameType(b[8] &^ firstPiece), first: b[8]&firstPiece != 0, kind: Kind(b[9]),
		fromN: int(b[10]), toN: int(b[11]), id: be.Uint64(b[12:]), group: trivet.VolumeID(be.Uint64(b[20:])),
		crc: be.Uint32(b[4:]), before: crc32.Update(crc32.Update(0, castagnoli, b[0:4]), castagnoli, b[8:]),
	}
	length := be.Uint32(b[0:])
	least := frameHeaderBytes + h.fromN + h.toN
	if h.first || h.typ == frameFragment {
		least += pieceWordBytes
	}
	if length > frameBytesMax || int(length) < least || int(length)-least > fragmentBytes {
		return header{}, fmt.Errorf("frame of %d bytes, want %d to %d: %w",
			length, least, least+fragmentBytes, trivet.ErrCorrupt)
	}
	h.pieceN = int(length) - least
	bare := h.typ == frameCancel || h.typ == framePing
	switch {
	case h.typ < frameRequest || h.typ > frameFragment || h.first && h.typ > frameError:
		return header{}, fmt.Errorf("frame of type %#x: %w", b[8], trivet.ErrCorrupt)
	case bare && length != frameHeaderBytes:
		return header{}, fmt.Errorf("frame of type %d and %d bytes, want %d: %w",
			h.typ, length, frameHeaderBytes, trivet.ErrCorrupt)
	case h.first && h.pieceN != fragmentBytes, h.typ == frameFragment && (h.pieceN == 0 || least != frameHeaderBytes+4):
		return header{}, fmt.Errorf("fragment of %d bytes, want %d in all but the last: %w",
			h.pieceN, fragmentBytes, trivet.ErrCorrupt)
	}
	return h, nil
}
