package transport

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"io"

	"github.com/trivet-csi/trivet"
)

// assembliesMax bounds the messages of one connection of which pieces are missing. A sender of ours
// has one for each group with something queued, all of them within its Limits.QueueBytesMax.
const assembliesMax = 1024

// assembly is a message of which pieces are missing.
type assembly struct {
	f      frame
	total  int // of the body, bytes
	filled int
	body   []byte // nil: nobody wants it, and its pieces are only checked
}

// frameReader reads the frames of a connection and puts fragmented messages together. A piece is read
// straight to its place. Nothing is allocated for a message before begin agreed to its size. It is not
// safe for concurrent use: the goroutine that reads has it.
type frameReader struct {
	r     io.Reader
	count func(frameBytes int) // called for every frame

	// begin is asked at the first piece of a message whether its total bytes may be allocated. Without
	// wanted the rest is read and forgotten; an error ends the connection.
	begin func(f frame, total int) (wanted bool, err error)

	parts   map[uint64]*assembly // by id
	bytes   int64                // of the bodies in parts
	scratch []byte               // where unwanted pieces go
	header  [frameHeaderBytes]byte
}

func newFrameReader(r io.Reader, begin func(frame, int) (bool, error), count func(int)) *frameReader {
	return &frameReader{r: r, begin: begin, count: count, parts: map[uint64]*assembly{}}
}

// next returns the next whole message or control frame. Its body is freshly allocated and belongs to
// the caller. Anything malformed is ErrCorrupt, after which the stream is of no more use. A stream
// that ends between frames returns io.EOF as it is.
func (r *frameReader) next() (frame, error) {
	for {
		if _, err := io.ReadFull(r.r, r.header[:]); err != nil {
			return frame{}, err
		}
		h, err := decodeHeader(&r.header)
		if err != nil {
			return frame{}, err
		}
		f, whole, err := r.frame(h)
		if err != nil {
			return frame{}, unexpectedEOF(err)
		}
		if whole {
			return f, nil
		}
	}
}

// drop forgets a message of which pieces are missing, and reports whether there was one. wanted is
// what begin said of it.
func (r *frameReader) drop(id uint64) (wanted, ok bool) {
	a := r.parts[id]
	if a == nil {
		return false, false
	}
	delete(r.parts, id)
	r.bytes -= int64(len(a.body))
	return a.body != nil, true
}

// frame reads the rest of a frame, and reports whether it is, or completes, something whole.
func (r *frameReader) frame(h header) (frame, bool, error) {
	switch {
	case h.typ == frameFragment:
		return r.fragment(h)
	case h.typ <= frameError && r.parts[h.id] != nil:
		return frame{}, false, fmt.Errorf("message %d begins again: %w", h.id, trivet.ErrCorrupt)
	case h.first:
		return frame{}, false, r.first(h)
	}
	rest := make([]byte, h.fromN+h.toN+h.pieceN)
	sum, err := r.read(rest, h.before)
	if err == nil {
		err = r.check(h, sum, len(rest))
	}
	return newFrame(h, rest[:h.fromN+h.toN], rest[h.fromN+h.toN:]), true, err
}

// first reads the first of several pieces.
func (r *frameReader) first(h header) error {
	lead := make([]byte, h.fromN+h.toN+pieceWordBytes)
	sum, err := r.read(lead, h.before)
	if err != nil {
		return err
	}
	a := &assembly{f: newFrame(h, lead, nil), total: int(binary.BigEndian.Uint32(lead[h.fromN+h.toN:]))}
	switch most := MessageBytesMax - frameBytes(a.f.msg); {
	case a.total <= fragmentBytes || a.total > most:
		return fmt.Errorf("message of %d bytes in fragments, want %d to %d: %w",
			a.total, fragmentBytes+1, most, trivet.ErrCorrupt)
	case len(r.parts) >= assembliesMax:
		return fmt.Errorf("%d messages are incomplete, at most that many may be: %w", len(r.parts), trivet.ErrCorrupt)
	}
	wanted, err := r.begin(a.f, a.total)
	if err != nil {
		return err
	}
	if wanted {
		a.body = make([]byte, a.total)
		r.bytes += int64(a.total)
	}
	r.parts[h.id] = a
	return r.piece(a, h, sum, len(lead))
}

// fragment reads a further piece, and returns the message when it was the last.
func (r *frameReader) fragment(h header) (frame, bool, error) {
	a := r.parts[h.id]
	if a == nil || a.f.msg.Kind != h.kind || a.f.msg.Group != h.group {
		return frame{}, false, fmt.Errorf("fragment of message %d, kind %d, group %d, which is not under way: %w",
			h.id, h.kind, h.group, trivet.ErrCorrupt)
	}
	var word [pieceWordBytes]byte
	sum, err := r.read(word[:], h.before)
	if err != nil {
		return frame{}, false, err
	}
	offset := int(binary.BigEndian.Uint32(word[:]))
	if want := min(fragmentBytes, a.total-a.filled); offset != a.filled || h.pieceN != want {
		return frame{}, false, fmt.Errorf("fragment of %d bytes at %d of message %d, want %d at %d: %w",
			h.pieceN, offset, h.id, want, a.filled, trivet.ErrCorrupt)
	}
	if err := r.piece(a, h, sum, len(word)); err != nil || a.filled < a.total {
		return frame{}, false, err
	}
	r.drop(h.id)
	a.f.msg.Body = a.body
	return a.f, a.body != nil, nil
}

// piece reads a piece to its place. leadN bytes of the frame were read after its header.
func (r *frameReader) piece(a *assembly, h header, sum uint32, leadN int) error {
	dst := r.scratch
	if a.body != nil {
		dst = a.body[a.filled : a.filled+h.pieceN]
	} else if dst == nil {
		r.scratch = make([]byte, fragmentBytes)
		dst = r.scratch
	}
	sum, err := r.read(dst[:h.pieceN], sum)
	if err != nil {
		return err
	}
	a.filled += h.pieceN
	return r.check(h, sum, leadN+h.pieceN)
}

// read fills b and returns the checksum with b added.
func (r *frameReader) read(b []byte, sum uint32) (uint32, error) {
	if _, err := io.ReadFull(r.r, b); err != nil {
		return 0, err
	}
	return crc32.Update(sum, castagnoli, b), nil
}

// check compares the checksum of a frame that is completely read, and counts it.
func (r *frameReader) check(h header, sum uint32, restN int) error {
	if sum != h.crc {
		return fmt.Errorf("frame with checksum %08x, computed %08x: %w", h.crc, sum, trivet.ErrCorrupt)
	}
	r.count(frameHeaderBytes + restN)
	return nil
}

// newFrame returns a frame of its parts; ids begins with from and to.
func newFrame(h header, ids, body []byte) frame {
	return frame{typ: h.typ, id: h.id, msg: Message{
		Kind: h.kind, Group: h.group, Body: body,
		From: trivet.ReplicaID(ids[:h.fromN]), To: trivet.ReplicaID(ids[h.fromN : h.fromN+h.toN]),
	}}
}

// unexpectedEOF is err for a stream that ends within a frame.
func unexpectedEOF(err error) error {
	if err == io.EOF { //nolint:errorlint // as io.ReadFull returns it
		return io.ErrUnexpectedEOF
	}
	return err
}
