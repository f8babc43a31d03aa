package engine

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"io"

	"github.com/trivet-csi/trivet"
)

// imageReader decodes an image stream and verifies all of it.
type imageReader struct {
	r      io.Reader
	header imageHeader
	record record
	sum    hash.Hash
	last   [blockKeyBytes]byte // key of the record before
	key    [blockKeyBytes]byte
	n      imageHeader // counts so far
	head   [imageRecordHeadBytes]byte
	data   [trivet.BlockSize]byte
}

// newImageReader reads header and state.
func newImageReader(r io.Reader) (*imageReader, error) {
	ir := &imageReader{r: r, sum: sha256.New()}
	head := make([]byte, imageHeaderBytes)
	if err := ir.full(head); err != nil {
		return nil, err
	}
	h, err := decodeImageHeader(head)
	if err != nil {
		return nil, err
	}
	state := make([]byte, h.stateBytes) // decodeImageHeader has bounded it
	if err := ir.full(state); err != nil {
		return nil, err
	}
	if ir.record, err = decodeRecord(h.volume, state); err != nil {
		return nil, err
	}
	if ir.record.restoring {
		return nil, fmt.Errorf("image of a volume that was being restored: %w", trivet.ErrCorrupt)
	}
	ir.header = h
	ir.sum.Write(head)  //nolint:errcheck // a hash never fails
	ir.sum.Write(state) //nolint:errcheck // a hash never fails
	return ir, nil
}

// full fills b; a stream that ends before is cut off, which is ErrCorrupt.
func (ir *imageReader) full(b []byte) error {
	_, err := io.ReadFull(ir.r, b)
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return fmt.Errorf("image is cut off after %d records: %w", ir.n.blockN+ir.n.tombstoneN, trivet.ErrCorrupt)
	}
	return err
}

// next returns the next block; data is nil for a tombstone, else valid until the next call. io.EOF:
// the image is complete, verified, and nothing follows it.
func (ir *imageReader) next() (bk blockKey, data []byte, err error) {
	if ir.n.blockN+ir.n.tombstoneN == ir.header.blockN+ir.header.tombstoneN {
		return bk, nil, ir.trailer()
	}
	if err := ir.full(ir.head[:]); err != nil {
		return bk, nil, err
	}
	kind, bk, sum, err := decodeImageRecordHead(ir.head[:], ir.header.volume)
	if err != nil {
		return bk, nil, err
	}
	ir.sum.Write(ir.head[:]) //nolint:errcheck // a hash never fails
	key := appendBlockKey(ir.key[:0], bk.volume, bk.lba, bk.gen)
	s := &ir.record.state
	if bytes.Compare(ir.last[:], key) >= 0 || bk.gen > s.Generation ||
		bk.lba >= trivet.LBA(s.SizeBytes/trivet.BlockSize) {
		return bk, nil, fmt.Errorf("image record of block %d, generation %d: out of order or range: %w", bk.lba,
			bk.gen, trivet.ErrCorrupt)
	}
	ir.last = ir.key
	if kind == kindData {
		ir.n.blockN++
		data = ir.data[:]
		if err := ir.full(data); err != nil {
			return bk, nil, err
		}
	} else {
		ir.n.tombstoneN++
	}
	if got := sumAt(data, place(key)); got != sum {
		return bk, nil, &BlockError{Volume: bk.volume, LBA: bk.lba, Stored: sum, Actual: got}
	}
	return bk, data, nil
}

// trailer checks the end of the stream and returns io.EOF when all is well.
func (ir *imageReader) trailer() error {
	var b [imageTrailerBytes]byte
	if err := ir.full(b[:]); err != nil {
		return err
	}
	ir.sum.Write(b[:9]) //nolint:errcheck // a hash never fails
	n := ir.n.blockN + ir.n.tombstoneN
	if b[0] != imageTrailerKind || binary.BigEndian.Uint64(b[1:]) != n || ir.n.blockN != ir.header.blockN ||
		!bytes.Equal(ir.sum.Sum(nil), b[9:]) {
		return fmt.Errorf("image trailer %x after %d records: %w", b, n, trivet.ErrCorrupt)
	}
	switch _, err := io.ReadFull(ir.r, b[:1]); {
	case err == nil:
		return fmt.Errorf("image is followed by something else: %w", trivet.ErrCorrupt)
	case errors.Is(err, io.EOF):
		return io.EOF
	default:
		return err
	}
}
