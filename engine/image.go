package engine

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"hash/crc32"
	"io"
	"sync"

	"github.com/cockroachdb/pebble/v2"

	"github.com/trivet-csi/trivet"
)

// The image stream, version 1, big endian. Records are of fixed size per kind and counted beforehand,
// so the length of the whole is known before the first byte is sent:
//
//	header, 44 bytes
//	+----------+-------------+-----------+-----------+----------------+------------------+-----+
//	| "TRVIMG" | version (2) | volume(8) | blocks (8)| tombstones (8) | state length (4) | ... |
//	+----------+-------------+-----------+-----------+----------------+------------------+-----+
//	... reserved, zero (4) | CRC32C of the header (4)
//	state: the volume record of the source, as stored (it has its own CRC)
//	records, in the order of block keys: LBA up, then generation down
//	+----------+----------------+---------+---------+-----------------------+---------------------+
//	| kind (1) | generation (4) | LBA (8) | sum (4) | CRC32C of the 17 (4)  | data, 4096, or none |
//	+----------+----------------+---------+---------+-----------------------+---------------------+
//	trailer, 41 bytes
//	+----------+---------------------+--------------------------------------------------------------+
//	| 0xff (1) | records (8)         | SHA-256 of header, state, each record's 21 bytes, the 9 (32) |
//	+----------+---------------------+--------------------------------------------------------------+
//
// kind and sum are those of the stored value; the sum covers the data, its volume and LBA. Nothing
// follows the trailer.
const (
	imageMagic           = "TRVIMG"
	imageVersion         = 1
	imageHeaderBytes     = 44
	imageRecordHeadBytes = 1 + 4 + 8 + 4 + 4
	imageTrailerKind     = 0xff
	imageTrailerBytes    = 1 + 8 + sha256.Size
)

// imageHeader is the decoded header.
type imageHeader struct {
	volume     trivet.VolumeID
	blockN     uint64
	tombstoneN uint64
	stateBytes uint32
}

// size is the length of the whole stream in bytes.
func (h *imageHeader) size() int64 {
	return imageHeaderBytes + int64(h.stateBytes) +
		int64(h.blockN)*(imageRecordHeadBytes+trivet.BlockSize) +
		int64(h.tombstoneN)*imageRecordHeadBytes + imageTrailerBytes
}

func appendImageHeader(dst []byte, h *imageHeader) []byte {
	be, start := binary.BigEndian, len(dst)
	dst = be.AppendUint16(append(dst, imageMagic...), imageVersion)
	dst = be.AppendUint64(dst, uint64(h.volume))
	dst = be.AppendUint64(dst, h.blockN)
	dst = be.AppendUint64(dst, h.tombstoneN)
	dst = be.AppendUint32(dst, h.stateBytes)
	dst = be.AppendUint32(dst, 0)
	return be.AppendUint32(dst, crc32.Checksum(dst[start:], castagnoli))
}

// decodeImageHeader returns ErrCorrupt for what appendImageHeader does not make, or what no volume can
// have, and ErrInvalid for a newer version.
func decodeImageHeader(b []byte) (imageHeader, error) {
	be := binary.BigEndian
	if len(b) != imageHeaderBytes || string(b[:6]) != imageMagic {
		return imageHeader{}, fmt.Errorf("image header: not an image: %w", trivet.ErrCorrupt)
	}
	stored, got := be.Uint32(b[40:]), crc32.Checksum(b[:40], castagnoli)
	if stored != got {
		return imageHeader{}, fmt.Errorf("image header: checksum %08x stored, %08x computed: %w", stored, got,
			trivet.ErrCorrupt)
	}
	if v := be.Uint16(b[6:]); v > imageVersion {
		return imageHeader{}, fmt.Errorf("image header: version %d is newer than %d, which this program knows: %w",
			v, imageVersion, trivet.ErrInvalid)
	}
	h := imageHeader{
		volume:     trivet.VolumeID(be.Uint64(b[8:])),
		blockN:     be.Uint64(b[16:]),
		tombstoneN: be.Uint64(b[24:]),
		stateBytes: be.Uint32(b[32:]),
	}
	// Each block may have as many versions as there are generations; more than this is nonsense.
	const recordsMax = 1 << 48
	if be.Uint16(b[6:]) == 0 || be.Uint32(b[36:]) != 0 || h.blockN > recordsMax || h.tombstoneN > recordsMax ||
		h.stateBytes < recordBytesMin || h.stateBytes > recordBytesMax {
		return imageHeader{}, fmt.Errorf("image header %x: values out of range: %w", b, trivet.ErrCorrupt)
	}
	return h, nil
}

func appendImageRecordHead(dst []byte, kind byte, bk blockKey, sum uint32) []byte {
	be, start := binary.BigEndian, len(dst)
	dst = be.AppendUint32(append(dst, kind), uint32(bk.gen))
	dst = be.AppendUint64(dst, uint64(bk.lba))
	dst = be.AppendUint32(dst, sum)
	return be.AppendUint32(dst, crc32.Checksum(dst[start:], castagnoli))
}

// decodeImageRecordHead is the inverse; it returns ErrCorrupt for anything else. REQUIRES: len(b) is
// imageRecordHeadBytes.
func decodeImageRecordHead(b []byte, id trivet.VolumeID) (kind byte, bk blockKey, sum uint32, err error) {
	be := binary.BigEndian
	stored, got := be.Uint32(b[17:]), crc32.Checksum(b[:17], castagnoli)
	bk = blockKey{volume: id, gen: trivet.Generation(be.Uint32(b[1:])), lba: trivet.LBA(be.Uint64(b[5:]))}
	if stored != got || (b[0] != kindData && b[0] != kindTombstone) || bk.lba >= lbaMax {
		return 0, bk, 0, fmt.Errorf("image record %x: checksum %08x computed: %w", b, got, trivet.ErrCorrupt)
	}
	return b[0], bk, be.Uint32(b[13:]), nil
}

// Image is a pinned, consistent image of a volume as a stream of exact size, for Restore elsewhere. It
// carries the State of its own moment (H7), all generations, and checksums of everything. A damaged
// block ends it with ErrCorrupt, so that damage never spreads (H21). It holds disk space that the
// volume gives up meanwhile, so Close it soon. Read and Close may be called concurrently.
type Image struct {
	e      *Engine
	volume trivet.VolumeID
	state  State
	size   int64

	mu      sync.Mutex
	snap    *pebble.Snapshot // nil after Close
	it      *pebble.Iterator
	sum     hash.Hash
	buf     []byte // produced, not read yet
	scratch []byte
	recordN uint64
	sent    int64
	end     error // what Read returns after buf
}

// Image pins an image of the volume. It reads the whole volume once, to count and to verify:
// ErrCorrupt when a block is damaged. ErrUnavailable: Restoring. ErrNotFound: dropped.
func (v *Volume) Image() (*Image, error) {
	i, err := v.image()
	if err != nil {
		return nil, fmt.Errorf("image of %s: %w", v.id, err)
	}
	return i, nil
}

func (v *Volume) image() (*Image, error) {
	if err := v.e.enter(); err != nil {
		return nil, err
	}
	defer v.e.exit()
	snap := v.e.db.NewSnapshot()
	it, r, err := v.pinned(snap)
	if err != nil {
		return nil, errors.Join(err, toErr(snap.Close()))
	}
	h := imageHeader{volume: v.id, stateBytes: uint32(r.encodedBytes())}
	if err := h.count(it); err != nil {
		return nil, errors.Join(closeIter(it, err), toErr(snap.Close()))
	}
	i := &Image{e: v.e, volume: v.id, state: r.state, size: h.size(), snap: snap, it: it, sum: sha256.New()}
	i.scratch = appendRecord(appendImageHeader(nil, &h), v.id, &r)
	i.sum.Write(i.scratch) //nolint:errcheck // a hash never fails
	i.buf, i.sent = i.scratch, int64(len(i.scratch))
	it.First()
	v.e.imagesMu.Lock()
	v.e.images[i] = struct{}{}
	v.e.imagesMu.Unlock()
	return i, nil
}

// count verifies and counts all blocks.
func (h *imageHeader) count(it *pebble.Iterator) error {
	for ok := it.First(); ok; ok = it.Next() {
		bk, err := decodeBlockKey(it.Key())
		if err != nil {
			return err
		}
		data, _, err := blockAt(it, bk)
		if err != nil {
			return err
		}
		if data == nil {
			h.tombstoneN++
		} else {
			h.blockN++
		}
	}
	return toErr(it.Error())
}

// Size of the whole stream in bytes, exact.
func (i *Image) Size() int64 { return i.size }

// State that the image carries. The slices are the image's.
func (i *Image) State() State { return i.state }

// Read implements io.Reader. ErrCorrupt: a block is damaged, the stream is not complete and must not
// be used. ErrClosed after Close, of the image or the engine.
func (i *Image) Read(p []byte) (n int, err error) {
	if err := i.e.enter(); err != nil {
		return 0, fmt.Errorf("read image of %s: %w", i.volume, err)
	}
	defer i.e.exit()
	i.mu.Lock()
	defer i.mu.Unlock()
	for n < len(p) {
		if len(i.buf) == 0 {
			if i.end == nil {
				i.end = i.produce()
			}
			if len(i.buf) == 0 {
				break
			}
		}
		c := copy(p[n:], i.buf)
		i.buf, n = i.buf[c:], n+c
	}
	if n > 0 || len(p) == 0 {
		return n, nil
	}
	if errors.Is(i.end, io.EOF) {
		return 0, io.EOF
	}
	return 0, fmt.Errorf("read image of %s: %w", i.volume, i.end)
}

// produce puts the next record, or the trailer, into buf. It returns io.EOF with the trailer.
func (i *Image) produce() error {
	if i.snap == nil {
		return trivet.ErrClosed
	}
	if !i.it.Valid() {
		if err := i.it.Error(); err != nil {
			return toErr(err)
		}
		return i.produceTrailer()
	}
	bk, err := decodeBlockKey(i.it.Key())
	if err != nil {
		return err
	}
	data, sum, err := blockAt(i.it, bk)
	if err != nil {
		return err
	}
	kind := kindData
	if data == nil {
		kind = kindTombstone
	}
	i.scratch = appendImageRecordHead(i.scratch[:0], kind, bk, sum)
	i.sum.Write(i.scratch) //nolint:errcheck // a hash never fails
	i.scratch = append(i.scratch, data...)
	i.buf = i.scratch
	i.recordN++
	i.sent += int64(len(i.buf))
	i.it.Next()
	return nil
}

func (i *Image) produceTrailer() error {
	i.scratch = binary.BigEndian.AppendUint64(append(i.scratch[:0], imageTrailerKind), i.recordN)
	i.sum.Write(i.scratch) //nolint:errcheck // a hash never fails
	i.scratch = i.sum.Sum(i.scratch)
	i.sent += int64(len(i.scratch))
	if i.sent != i.size {
		// The snapshot is pinned, so this is no writer's doing: a scan lost or gained keys.
		return fmt.Errorf("%d bytes where %d were counted: %w", i.sent, i.size, trivet.ErrCorrupt)
	}
	i.buf = i.scratch
	return io.EOF
}

// Close unpins the image. Idempotent.
func (i *Image) Close() error {
	if err := i.e.enter(); err != nil {
		return nil // the engine's Close has unpinned it
	}
	defer i.e.exit()
	i.e.imagesMu.Lock()
	delete(i.e.images, i)
	i.e.imagesMu.Unlock()
	return i.unpin()
}

// unpin gives the snapshot back. REQUIRES: entered, or the engine's Close.
func (i *Image) unpin() error {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.snap == nil {
		return nil
	}
	_ = i.it.Close() // repeats what Read has told
	err := toErr(i.snap.Close())
	i.snap, i.it, i.buf, i.end = nil, nil, nil, trivet.ErrClosed
	return err
}
