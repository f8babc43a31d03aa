package engine

import (
	"encoding/binary"
	"hash/crc32"

	"github.com/trivet-csi/trivet"
)

// The image stream, version 2, big endian. After eight bytes it is a sequence of parts; the sum of each
// covers the sum of the part before (of the first: those eight bytes), so that parts that are lost,
// doubled or swapped are seen where they are:
//
//	+----------+-------------+        +----------+------------+------+-------------------------+
//	| "TRVIMG" | version (2) |  part: | kind (1) | length (4) | body | CRC32C, continued (4)   |
//	+----------+-------------+        +----------+------------+------+-------------------------+
//
//	begin, 0x01, the first part: what the image is, and what it builds on
//	+------------+--------------+-------------------------+--------------------------------------+
//	| volume (8) | estimate (8) | coverage (coverage.go)  | volume record of the source          |
//	+------------+--------------+-------------------------+--------------------------------------+
//	blocks, 0x02: items in the order of block keys, LBA up, then generation down
//	+--------+---------+      +----------+---------+----------------+---------+-----------------------+
//	| to (8) | items   |  of  | kind (1) | LBA (8) | generation (4) | sum (4) | data, 4096, or none   |
//	+--------+---------+      +----------+---------+----------------+---------+-----------------------+
//	                      or  | 0x03 (1) | LBA (8) | blocks (8)     |  none of these has a version
//	                          +----------+---------+----------------+
//	digest, 0x03: SHA-256 over the versions (versionHash) since the digest before
//	+--------+--------------+-------------+
//	| to (8) | versions (8) | SHA-256 (32)|
//	+--------+--------------+-------------+
//	end, 0x04, the last part; nothing follows
//	+-----------------+
//	| parts before (8)|
//	+-----------------+
//
// Where the coverage has index 0 the image has all blocks; elsewhere those that changed since. A block
// that has items has all its versions among them; what is between them stays as it is. `to` is one
// past the last block that is complete by then: 2^34 at the end. kind and sum of an item are those of
// the stored value; the sum covers the data, its volume and LBA.
const (
	imageMagic     = "TRVIMG"
	imageVersion   = 2
	imageHeadBytes = 8

	partBegin  byte = 0x01
	partBlocks byte = 0x02
	partDigest byte = 0x03
	partEnd    byte = 0x04

	itemAbsent byte = 0x03 // beside kindData and kindTombstone

	partHeadBytes    = 1 + 4
	partSumBytes     = 4
	beginFixedBytes  = 8 + 8
	blocksFixedBytes = 8
	digestBytes      = 8 + 8 + 32
	endBytes         = 8

	imageVersionHeadBytes = 1 + 8 + 4 + 4
	imageVersionBytesMax  = imageVersionHeadBytes + trivet.BlockSize
	imageAbsentBytes      = 1 + 8 + 8

	// A part of blocks is closed at this size. It is the unit of checking, of a batch, and of memory on both sides.
	imagePartBytes    = 1 << 20
	imagePartBytesMax = imagePartBytes + imageVersionBytesMax + blocksFixedBytes

	// A digest follows each 32 MiB of blocks; so much may have to be sent again after an interruption. The
	// restoring side flushes and reads back what it has then, and refuses more than twice that without one.
	imageRangeBytesDefault = 32 << 20
	imageRangeBytesMax     = 2*imageRangeBytesDefault + imagePartBytesMax
)

// imageBegin is the first part, decoded.
type imageBegin struct {
	volume        trivet.VolumeID
	estimateBytes uint64
	base          coverage
	record        record
}

// startsOver reports whether the image replaces everything in a volume that is half restored.
func (b *imageBegin) startsOver(restoring bool) bool { return restoring && b.base.ceiling() == 0 }

// partWriter makes the parts of a stream, one at a time in one buffer: what a call returns is valid until
// the next.
type partWriter struct {
	buf   []byte
	sum   uint32
	partN uint64
}

// beginStream makes the first bytes and the first part.
func (w *partWriter) beginStream(b *imageBegin) []byte {
	be := binary.BigEndian
	w.buf = be.AppendUint16(append(w.buf[:0], imageMagic...), imageVersion)
	w.sum = crc32.Checksum(w.buf, castagnoli)
	w.buf = append(w.buf, partBegin, 0, 0, 0, 0)
	w.buf = be.AppendUint64(w.buf, uint64(b.volume))
	w.buf = be.AppendUint64(w.buf, b.estimateBytes)
	w.buf = appendRecord(b.base.append(w.buf), b.volume, &b.record)
	return w.close(imageHeadBytes)
}

// close fills in the length of the part that starts at an offset of buf, and seals it.
func (w *partWriter) close(start int) []byte {
	p := w.buf[start:]
	binary.BigEndian.PutUint32(p[1:], uint32(len(p)-partHeadBytes))
	w.sum = partSum(w.sum, p)
	w.partN++
	w.buf = binary.BigEndian.AppendUint32(w.buf, w.sum)
	return w.buf
}

// partSum is the sum of a part, head and body, after a part with the sum before.
func partSum(before uint32, p []byte) uint32 {
	var b [4]byte
	binary.BigEndian.PutUint32(b[:], before)
	return crc32.Update(crc32.Update(0, castagnoli, b[:]), castagnoli, p)
}

func (w *partWriter) beginBlocks() {
	w.buf = append(w.buf[:0], partBlocks, 0, 0, 0, 0)
	w.buf = append(w.buf, make([]byte, blocksFixedBytes)...)
}

// len is the size of the part so far.
func (w *partWriter) len() int { return len(w.buf) }

func (w *partWriter) version(bk blockKey, sum uint32, data []byte) {
	be, kind := binary.BigEndian, kindData
	if data == nil {
		kind = kindTombstone
	}
	w.buf = be.AppendUint64(append(w.buf, kind), uint64(bk.lba))
	w.buf = be.AppendUint32(w.buf, uint32(bk.gen))
	w.buf = append(be.AppendUint32(w.buf, sum), data...)
}

func (w *partWriter) absent(lba trivet.LBA, blockN int64) {
	w.buf = binary.BigEndian.AppendUint64(append(w.buf, itemAbsent), uint64(lba))
	w.buf = binary.BigEndian.AppendUint64(w.buf, uint64(blockN))
}

func (w *partWriter) endBlocks(to trivet.LBA) []byte {
	binary.BigEndian.PutUint64(w.buf[partHeadBytes:], uint64(to))
	return w.close(0)
}

func (w *partWriter) digest(to trivet.LBA, versionN uint64, sum []byte) []byte {
	w.buf = append(w.buf[:0], partDigest, 0, 0, 0, 0)
	w.buf = binary.BigEndian.AppendUint64(w.buf, uint64(to))
	w.buf = binary.BigEndian.AppendUint64(w.buf, versionN)
	w.buf = append(w.buf, sum...)
	return w.close(0)
}

func (w *partWriter) end() []byte {
	w.buf = append(w.buf[:0], partEnd, 0, 0, 0, 0)
	w.buf = binary.BigEndian.AppendUint64(w.buf, w.partN)
	return w.close(0)
}
