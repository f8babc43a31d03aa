package engine

import (
	"encoding/binary"
	"errors"
	"fmt"
	"syscall"

	"github.com/cockroachdb/pebble/v2"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/engine/segment"
)

// ref is where a block stands in the disk's log. The zero value is nowhere.
type ref struct {
	seg  segment.ID
	page uint32 // of the segment, in blocks
}

// refAt is the place of the block that begins so many bytes into a payload.
func refAt(p segment.Place, skip int64) ref {
	return ref{p.Segment, uint32((p.Off + skip) / trivet.BlockSize)}
}

// then is the place of the block so many further.
func (r ref) then(blockN int) ref { return ref{r.seg, r.page + uint32(blockN)} }

func (r ref) off() int64 { return int64(r.page) * trivet.BlockSize }

// putRef fills v, of refValueBytes, with the value of a block that stands in the log.
func putRef(v []byte, sum uint32, at ref) {
	v[0] = kindRef
	binary.BigEndian.PutUint32(v[1:], sum)
	binary.BigEndian.PutUint64(v[5:], uint64(at.seg))
	binary.BigEndian.PutUint32(v[13:], at.page)
}

func isRef(v []byte) bool { return len(v) > 0 && v[0] == kindRef }

// decodeRef is the inverse of putRef. It returns a *BlockError for anything that putRef does not make.
func decodeRef(v []byte, bk blockKey) (at ref, sum uint32, err error) {
	if len(v) != refValueBytes || v[0] != kindRef {
		return ref{}, 0, &BlockError{
			Volume: bk.volume, LBA: bk.lba,
			Reason: fmt.Sprintf("value of format %#x has %d bytes, want %d", kindRef, len(v), refValueBytes),
		}
	}
	at = ref{segment.ID(binary.BigEndian.Uint64(v[5:])), binary.BigEndian.Uint32(v[13:])}
	if at.page == 0 || at.seg == 0 { // the first page of a segment is its header
		return ref{}, 0, &BlockError{Volume: bk.volume, LBA: bk.lba, Reason: "refers to no block"}
	}
	return at, binary.BigEndian.Uint32(v[1:]), nil
}

// windowBlockN is how many blocks are read at once where they stand one behind the other.
const windowBlockN = 32

// blockReader fetches the blocks that an iterator of a held view passes (live.hold), so that none of them can be
// recycled. It belongs to one goroutine. The zero value, with an engine, is ready.
type blockReader struct {
	e    *Engine
	buf  []byte // aligned; made when the first block in the log is met
	from ref    // where buf was read from
	n    int    // blocks in it
	last ref    // the block before
}

// at returns the block under the iterator, whose key is bk, verified. data is valid until the next call or
// until the iterator moves, and nil for a tombstone.
func (r *blockReader) at(it *pebble.Iterator, bk blockKey) (data []byte, sum uint32, err error) {
	val, err := it.ValueAndErr()
	if err != nil {
		return nil, 0, toErr(err)
	}
	return r.value(val, it.Key(), bk)
}

// value is at, of a key and a value that were read.
func (r *blockReader) value(val, key []byte, bk blockKey) (data []byte, sum uint32, err error) {
	if !isRef(val) {
		return decodeValue(val, key, bk)
	}
	at, sum, err := decodeRef(val, bk)
	if err != nil {
		return nil, 0, err
	}
	data, err = r.fetch(at, sum, bk, place(key))
	return data, sum, err
}

func (r *blockReader) fetch(at ref, sum uint32, bk blockKey, key []byte) ([]byte, error) {
	if r.buf == nil {
		r.buf = segment.Buffer(windowBlockN * trivet.BlockSize)
	}
	ahead := at == r.last.then(1)
	r.last = at
	if data := r.inWindow(at); data != nil && sumAt(data, key) == sum {
		return data, nil
	}
	n := 1
	if ahead {
		n = windowBlockN
	}
	if err := r.fill(at, n); err != nil {
		return nil, blockErr(err, bk)
	}
	data := r.inWindow(at)
	if got := sumAt(data, key); got != sum {
		return nil, &BlockError{Volume: bk.volume, LBA: bk.lba, Stored: sum, Actual: got}
	}
	return data, nil
}

func (r *blockReader) inWindow(at ref) []byte {
	if at.seg != r.from.seg || at.page < r.from.page || int(at.page-r.from.page) >= r.n {
		return nil
	}
	return r.buf[int64(at.page-r.from.page)*trivet.BlockSize:][:trivet.BlockSize]
}

// fill reads up to n blocks into the window. What cannot be read ahead is not missed.
func (r *blockReader) fill(at ref, n int) error {
	n = int(min(int64(n), r.e.log.SegmentBytes()/trivet.BlockSize-int64(at.page)))
	if n <= 0 {
		return fmt.Errorf("%v has no block %d: %w", at.seg, at.page, trivet.ErrCorrupt)
	}
	r.from, r.n = at, 0
	err := r.e.log.ReadAt(at.seg, r.buf[:n*trivet.BlockSize], at.off())
	if err != nil && n > 1 {
		n = 1
		err = r.e.log.ReadAt(at.seg, r.buf[:trivet.BlockSize], at.off())
	}
	if err == nil {
		r.n = n
	}
	return err
}

// storeChunkBytes bounds what is put into the log at once by the engine itself.
const storeChunkBytes = 1 << 20

// storeBlocks puts blocks of a volume into data segments of the log, durably, and calls got with the place of each
// run of them, in order: of payload, from block i on. The segment is pinned until got returns.
func (e *Engine) storeBlocks(id trivet.VolumeID, infos []segment.BlockInfo, payload []byte,
	got func(i int, at segment.Place) error,
) error {
	if len(infos) == 0 {
		return nil
	}
	most := int(min(storeChunkBytes, e.log.StoreBytesMax()) / trivet.BlockSize)
	for i := 0; i < len(infos); i += most {
		n := min(most, len(infos)-i)
		at, err := e.log.Store(id, infos[i:i+n], payload[i*trivet.BlockSize:(i+n)*trivet.BlockSize])
		if err != nil {
			return err
		}
		err = got(i, at)
		e.log.Unpin(at.Segment)
		if err != nil {
			return err
		}
	}
	return nil
}

// blockErr says of which block an error is that reading the log gave.
func blockErr(err error, bk blockKey) error {
	// A sector that cannot be read any more is as good as one with flipped bits; others of the disk may be whole.
	if errIsGone(err) || errors.Is(err, syscall.EIO) {
		return &BlockError{Volume: bk.volume, LBA: bk.lba, Reason: err.Error()}
	}
	return fmt.Errorf("block %d of %s: %w", bk.lba, bk.volume, err)
}
