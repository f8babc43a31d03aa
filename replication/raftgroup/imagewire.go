package raftgroup

import (
	"fmt"

	"github.com/trivet-csi/trivet"
)

// The bodies of the messages of a catch-up (catchup.go, source.go), framed as those of wire.go.

// fetchAsk tells a follower that it lacks entries which the leader's log no longer has, and must pull the
// state up to rec at least.
type fetchAsk struct {
	term uint64 // of the leader
	rec  snapshotRecord
}

func (r fetchAsk) encode() []byte {
	return sealBody(append(put64([]byte{wireVersion}, r.term), r.rec.encode()...))
}

func decodeFetchAsk(body []byte) (fetchAsk, error) {
	d, err := openBody("fetch", body)
	if err != nil {
		return fetchAsk{}, err
	}
	r := fetchAsk{term: d.u64()}
	if r.rec, d.b, err = decodeSnapshot(d.b); err != nil {
		return fetchAsk{}, err
	}
	if r.rec.term > r.term {
		return fetchAsk{}, fmt.Errorf("fetch state of term %d, in term %d: %w", r.rec.term, r.term, trivet.ErrInvalid)
	}
	return r, d.finish("fetch")
}

// fetchReply says how far the follower is. done means that its state and log go up to the entry at, and
// that it runs. A term above the asker's means that it asks in vain.
type fetchReply struct {
	term uint64
	done bool
	at   logPosition
}

func (r fetchReply) encode() []byte {
	b := put64([]byte{wireVersion}, r.term, r.at.term, r.at.index)
	return sealBody(append(b, bit(r.done, 1)))
}

func decodeFetchReply(body []byte) (fetchReply, error) {
	d, err := openBody("fetch reply", body)
	if err != nil {
		return fetchReply{}, err
	}
	r := fetchReply{term: d.u64(), at: logPosition{term: d.u64(), index: d.u64()}}
	flags := d.u8()
	r.done = flags == 1
	if flags > 1 || r.done && (r.at.index == 0 || r.at.term == 0) {
		return fetchReply{}, fmt.Errorf("fetch reply: flags %d at %d of term %d: %w",
			flags, r.at.index, r.at.term, trivet.ErrInvalid)
	}
	return r, d.finish("fetch reply")
}

// imageOpen asks for an image of what the machine with that Want lacks.
type imageOpen struct{ want []byte }

func (r imageOpen) encode() []byte { return sealBody(append([]byte{wireVersion}, r.want...)) }

func decodeImageOpen(body []byte) (imageOpen, error) {
	d, err := openBody("image open", body)
	if err != nil {
		return imageOpen{}, err
	}
	if len(d.b) > WantBytesMax {
		return imageOpen{}, fmt.Errorf("image open: want of %d bytes, at most %d are allowed: %w",
			len(d.b), WantBytesMax, trivet.ErrInvalid)
	}
	if len(d.b) == 0 {
		return imageOpen{}, nil
	}
	return imageOpen{want: d.b}, nil
}

// imageOpened describes an image that is open: its number at the source, what it stands for, and how
// long it will be, about, in pieces of which size.
type imageOpened struct {
	id        uint64
	sizeBytes int64 // an estimate
	pieceN    int   // bytes of every piece but the last
	rec       snapshotRecord
}

func (r imageOpened) encode() []byte {
	b := put32(put64([]byte{wireVersion}, r.id, uint64(r.sizeBytes)), uint32(r.pieceN))
	return sealBody(append(b, r.rec.encode()...))
}

func decodeImageOpened(body []byte) (imageOpened, error) {
	d, err := openBody("image opened", body)
	if err != nil {
		return imageOpened{}, err
	}
	r := imageOpened{id: d.u64(), sizeBytes: int64(d.u64()), pieceN: int(d.u32())}
	if r.rec, d.b, err = decodeSnapshot(d.b); err != nil {
		return imageOpened{}, err
	}
	if r.sizeBytes < 0 || r.pieceN <= 0 || r.pieceN > pieceBytesMax {
		return imageOpened{}, fmt.Errorf("image of %d bytes in pieces of %d: %w", r.sizeBytes, r.pieceN, trivet.ErrInvalid)
	}
	return r, d.finish("image opened")
}

// keepAlive as an offset asks for nothing, and keeps the image open.
const keepAlive = ^uint64(0)

// imageRead asks for the piece of an image at an offset; imagePiece is the answer. The same piece may be
// asked for again.
type imageRead struct{ id, offset uint64 }

func (r imageRead) encode() []byte { return sealBody(put64([]byte{wireVersion}, r.id, r.offset)) }

func decodeImageRead(body []byte) (imageRead, error) {
	d, err := openBody("image read", body)
	if err != nil {
		return imageRead{}, err
	}
	r := imageRead{id: d.u64(), offset: d.u64()}
	return r, d.finish("image read")
}

// imagePiece carries its own offset, so that a piece is never taken for another (H24).
type imagePiece struct {
	offset uint64
	last   bool // nothing follows
	data   []byte
}

func (r imagePiece) encode() []byte {
	b := append(make([]byte, 0, 16+len(r.data)), wireVersion)
	b = append(put64(b, r.offset), bit(r.last, 1))
	return sealBody(append(b, r.data...))
}

// decodeImagePiece shares the memory of body.
func decodeImagePiece(body []byte) (imagePiece, error) {
	d, err := openBody("image piece", body)
	if err != nil {
		return imagePiece{}, err
	}
	r := imagePiece{offset: d.u64()}
	flags := d.u8()
	r.last = flags == 1
	r.data = d.bytes(len(d.b))
	if flags > 1 || d.bad || len(r.data) > pieceBytesMax {
		return imagePiece{}, fmt.Errorf("image piece at %d: flags %d, %d bytes: %w",
			r.offset, flags, len(r.data), trivet.ErrInvalid)
	}
	return r, nil
}

// imageClose lets an image go. restored says that the follower has it all: its source keeps the log from
// there on for a while, until the follower was heard of again.
type imageClose struct {
	id       uint64
	restored bool
}

func (r imageClose) encode() []byte {
	return sealBody(append(put64([]byte{wireVersion}, r.id), bit(r.restored, 1)))
}

func decodeImageClose(body []byte) (imageClose, error) {
	d, err := openBody("image close", body)
	if err != nil {
		return imageClose{}, err
	}
	r := imageClose{id: d.u64()}
	flags := d.u8()
	r.restored = flags == 1
	if flags > 1 {
		return imageClose{}, fmt.Errorf("image close: flags %d: %w", flags, trivet.ErrInvalid)
	}
	return r, d.finish("image close")
}
