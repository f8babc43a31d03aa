package engine

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"

	"github.com/trivet-csi/trivet"
)

// imageReader decodes an image stream part by part and verifies all of it. After an error it is of no
// further use.
type imageReader struct {
	r     io.Reader
	begin imageBegin
	sum   uint32 // of the part before
	partN uint64

	at     trivet.LBA  // items at and after it are of blocks that have none yet
	last   blockKey    // the item before, when inside
	inside bool        // the item before was a version, so that another of its block may follow
	to     trivet.LBA  // of the part before
	digest uint64      // versions since the digest before
	since  int         // bytes since it
	ended  bool        // the end was read
	body   []byte      // of the part
	items  []imageItem // scratch
	key    [blockKeyBytes]byte
}

// imageItem is a version of a block (kindData, kindTombstone) or a run of blocks that have none (itemAbsent).
type imageItem struct {
	kind   byte
	lba    trivet.LBA
	blockN int64 // itemAbsent only; else 1
	gen    trivet.Generation
	sum    uint32
	data   []byte // kindData only
}

// imagePart is a decoded part: blocks, when items is not nil, else a digest, or neither at the end. It is
// valid until the next one is read.
type imagePart struct {
	kind     byte
	to       trivet.LBA
	items    []imageItem
	versionN uint64
	digest   [32]byte
}

// newImageReader reads the first part. ErrInvalid: another version.
func newImageReader(r io.Reader) (*imageReader, error) {
	ir := &imageReader{r: r}
	var head [imageHeadBytes]byte
	if err := ir.full(head[:]); err != nil {
		return nil, err
	}
	if string(head[:6]) != imageMagic {
		return nil, fmt.Errorf("%x is no image: %w", head, trivet.ErrCorrupt)
	}
	if v := binary.BigEndian.Uint16(head[6:]); v != imageVersion {
		return nil, fmt.Errorf("image has version %d, this program knows %d: %w", v, imageVersion, trivet.ErrInvalid)
	}
	ir.sum = crc32.Checksum(head[:], castagnoli)
	kind, body, err := ir.part()
	if err != nil {
		return nil, err
	}
	if kind != partBegin {
		return nil, fmt.Errorf("image begins with part %#x: %w", kind, trivet.ErrCorrupt)
	}
	return ir, ir.decodeBegin(body)
}

func (ir *imageReader) decodeBegin(body []byte) error {
	be := binary.BigEndian
	b := imageBegin{volume: trivet.VolumeID(be.Uint64(body)), estimateBytes: be.Uint64(body[8:])}
	base, rest, ok := cutCoverage(body[beginFixedBytes:])
	if !ok || base == nil {
		return fmt.Errorf("image of %s: what it builds on: %w", b.volume, trivet.ErrCorrupt)
	}
	rec, err := decodeRecord(b.volume, rest)
	if err != nil {
		return err
	}
	if rec.restoring || rec.sweep || len(rec.layers) > 0 || base.ceiling() > rec.state.AppliedIndex {
		return fmt.Errorf("image of %s at index %d builds on %d, restoring %t: %w", b.volume, rec.state.AppliedIndex,
			base.ceiling(), rec.restoring, trivet.ErrCorrupt)
	}
	b.base, b.record = base, rec
	ir.begin = b
	return nil
}

// full fills b; a stream that ends before is cut off, which is ErrCorrupt.
func (ir *imageReader) full(b []byte) error {
	_, err := io.ReadFull(ir.r, b)
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return fmt.Errorf("image is cut off after %d parts: %w", ir.partN, trivet.ErrCorrupt)
	}
	return err
}

// partBounds are the bounds of the body of each kind of part.
func partBounds(kind byte) (atLeast, atMost uint32) {
	switch kind {
	case partBegin:
		return beginFixedBytes + 2 + recordBytesMin, beginFixedBytes + 2 + 16*coverageSpansMax + recordBytesMax
	case partBlocks:
		return blocksFixedBytes, imagePartBytesMax
	case partDigest:
		return digestBytes, digestBytes
	case partEnd:
		return endBytes, endBytes
	}
	return 1, 0
}

// part reads one part and checks its sum. The body is valid until the next.
func (ir *imageReader) part() (kind byte, body []byte, err error) {
	head := [partHeadBytes]byte{}
	if err := ir.full(head[:]); err != nil {
		return 0, nil, err
	}
	kind = head[0]
	n := binary.BigEndian.Uint32(head[1:])
	if low, high := partBounds(kind); n < low || n > high {
		return 0, nil, fmt.Errorf("image part %d: kind %#x, %d bytes: %w", ir.partN, kind, n, trivet.ErrCorrupt)
	}
	size := partHeadBytes + int(n) + partSumBytes
	if cap(ir.body) < size {
		ir.body = make([]byte, size)
	}
	b := ir.body[:size]
	copy(b, head[:])
	if err := ir.full(b[partHeadBytes:]); err != nil {
		return 0, nil, err
	}
	sealed := b[:size-partSumBytes]
	stored, got := binary.BigEndian.Uint32(b[size-partSumBytes:]), partSum(ir.sum, sealed)
	if stored != got {
		return 0, nil, fmt.Errorf("image part %d: checksum %08x stored, %08x computed: %w", ir.partN, stored, got,
			trivet.ErrCorrupt)
	}
	ir.sum = got
	ir.partN++
	return kind, sealed[partHeadBytes:], nil
}

// next returns the next part; io.EOF after the end, when nothing follows it.
func (ir *imageReader) next() (imagePart, error) {
	if ir.ended {
		if _, err := io.ReadFull(ir.r, ir.body[:1]); err != nil {
			return imagePart{}, err
		}
		return imagePart{}, fmt.Errorf("image is followed by something else: %w", trivet.ErrCorrupt)
	}
	kind, body, err := ir.part()
	if err != nil {
		return imagePart{}, err
	}
	switch kind {
	case partBlocks:
		return ir.blocks(body)
	case partDigest:
		return ir.digestPart(body)
	case partEnd:
		if binary.BigEndian.Uint64(body) != ir.partN-1 || ir.to != lbaMax || ir.since != 0 {
			return imagePart{}, fmt.Errorf("image ends after %d parts, at block %d: %w", ir.partN, ir.to, trivet.ErrCorrupt)
		}
		ir.ended = true
		return ir.next()
	}
	return imagePart{}, fmt.Errorf("image part %d: kind %#x again: %w", ir.partN, kind, trivet.ErrCorrupt)
}

func (ir *imageReader) digestPart(body []byte) (imagePart, error) {
	p := imagePart{
		kind: partDigest, to: trivet.LBA(binary.BigEndian.Uint64(body)), versionN: binary.BigEndian.Uint64(body[8:]),
		digest: [32]byte(body[16:]),
	}
	if p.to != ir.to || p.versionN != ir.digest || ir.to < ir.at {
		return imagePart{}, fmt.Errorf("image digest of %d versions up to block %d after %d up to %d: %w", p.versionN,
			p.to, ir.digest, ir.to, trivet.ErrCorrupt)
	}
	ir.digest, ir.since, ir.inside = 0, 0, false
	return p, nil
}

func (ir *imageReader) blocks(body []byte) (imagePart, error) {
	to := trivet.LBA(binary.BigEndian.Uint64(body))
	ir.items = ir.items[:0]
	for rest := body[blocksFixedBytes:]; len(rest) > 0; {
		x, n, ok := cutItem(rest)
		if !ok {
			return imagePart{}, fmt.Errorf("image part %d: item of kind %#x: %w", ir.partN, rest[0], trivet.ErrCorrupt)
		}
		if err := ir.take(&x); err != nil {
			return imagePart{}, err
		}
		ir.items = append(ir.items, x)
		rest = rest[n:]
	}
	split := ir.inside && to+1 == ir.at // the last block is not complete
	if to > lbaMax || to < ir.to || to < ir.at && !split || !split && ir.hole(to) {
		return imagePart{}, fmt.Errorf("image part %d: complete up to block %d after %d, %d: %w", ir.partN, to, ir.to,
			ir.at, trivet.ErrCorrupt)
	}
	ir.to, ir.at = to, max(ir.at, to)
	ir.inside = ir.inside && split
	if ir.since += len(body); ir.since > imageRangeBytesMax {
		return imagePart{}, fmt.Errorf("image part %d: no digest for %d bytes: %w", ir.partN, ir.since, trivet.ErrCorrupt)
	}
	return imagePart{kind: partBlocks, to: to, items: ir.items}, nil
}

// cutItem decodes the item at the start of b, which is n bytes long.
func cutItem(b []byte) (x imageItem, n int, ok bool) {
	be := binary.BigEndian
	if len(b) < min(imageVersionHeadBytes, imageAbsentBytes) {
		return x, 0, false
	}
	x = imageItem{kind: b[0], lba: trivet.LBA(be.Uint64(b[1:])), blockN: 1}
	if x.kind == itemAbsent {
		x.blockN = int64(be.Uint64(b[9:]))
		return x, imageAbsentBytes, true
	}
	x.gen, x.sum = trivet.Generation(be.Uint32(b[9:])), be.Uint32(b[13:])
	switch {
	case x.kind == kindTombstone:
		return x, imageVersionHeadBytes, true
	case x.kind == kindData && len(b) >= imageVersionBytesMax:
		x.data = b[imageVersionHeadBytes:imageVersionBytesMax:imageVersionBytesMax]
		return x, imageVersionBytesMax, true
	}
	return x, 0, false
}

// hole reports whether blocks from at up to one lack that the image should have all of.
func (ir *imageReader) hole(to trivet.LBA) bool {
	return ir.at < to && ir.begin.base.lowest(ir.at, to) == 0
}

// take checks an item against those before it and against the state.
func (ir *imageReader) take(x *imageItem) error {
	id, s := ir.begin.volume, &ir.begin.record.state
	bad := func(what string) error {
		return fmt.Errorf("image item of block %d, generation %d: %s: %w", x.lba, x.gen, what, trivet.ErrCorrupt)
	}
	if x.kind == itemAbsent {
		if x.blockN <= 0 || x.lba < ir.at || x.lba > lbaMax || x.blockN > int64(lbaMax-x.lba) || ir.hole(x.lba) {
			return bad("out of order or range")
		}
		ir.at, ir.inside = x.lba+trivet.LBA(x.blockN), false
		return nil
	}
	bk := blockKey{id, x.lba, x.gen}
	older := ir.inside && x.lba == ir.last.lba && x.gen < ir.last.gen
	if !older && (x.lba < ir.at || ir.hole(x.lba)) || x.gen > s.Generation ||
		x.lba >= trivet.LBA(s.SizeBytes/trivet.BlockSize) {
		return bad("out of order or range")
	}
	if got := sumAt(x.data, place(appendBlockKey(ir.key[:0], id, x.lba, x.gen))); got != x.sum {
		return &BlockError{Volume: id, LBA: x.lba, Stored: x.sum, Actual: got}
	}
	ir.at, ir.last, ir.inside = x.lba+1, bk, true
	ir.digest++
	return nil
}
