package engine

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"slices"

	"github.com/trivet-csi/trivet"
)

// coverageSpansMax bounds a coverage: what is beyond is given up, and transferred once more. With it a
// want has 535 bytes at most.
const coverageSpansMax = 32

// span says as of which applied index a volume has its blocks, from the end of the span before up to end.
type span struct {
	end   trivet.LBA
	index uint64 // 0 = nothing is known of these blocks
}

// coverage says for every block as of which applied index a volume has it; the last span ends at lbaMax.
//
// A claim of index i means: the block is as it was at some index from i up to the ceiling, which is the
// highest index that a Restore was moving to. So every claim may be lowered without harm, and an image
// that carries what changed since a claimed index, as of an index not below the ceiling, makes the
// block right.
type coverage []span

// wholly is the coverage of a volume that is at one index.
func wholly(index uint64) coverage { return coverage{{lbaMax, index}} }

// check returns ErrCorrupt for what set does not make.
func (c coverage) check() error {
	ok := len(c) > 0 && len(c) <= coverageSpansMax && c[len(c)-1].end == lbaMax
	for i := 1; ok && i < len(c); i++ {
		ok = c[i-1].end < c[i].end && c[i-1].index != c[i].index
	}
	if !ok || c[0].end == 0 {
		return fmt.Errorf("coverage %v: %w", c, trivet.ErrCorrupt)
	}
	return nil
}

// ceiling is the highest index claimed.
func (c coverage) ceiling() (index uint64) {
	for _, s := range c {
		index = max(index, s.index)
	}
	return index
}

// start is the first block of span i.
func (c coverage) start(i int) trivet.LBA {
	if i == 0 {
		return 0
	}
	return c[i-1].end
}

// lowest is the lowest index claimed from one block up to another. REQUIRES: from < to.
func (c coverage) lowest(from, to trivet.LBA) uint64 {
	i := 0
	for c[i].end <= from {
		i++
	}
	low := c[i].index
	for ; c[i].end < to; i++ {
		low = min(low, c[i+1].index)
	}
	return low
}

// covers reports whether c claims, everywhere, at least what base does.
func (c coverage) covers(base coverage) bool {
	for i, s := range base {
		if c.lowest(base.start(i), s.end) < s.index {
			return false
		}
	}
	return true
}

// set returns c with the blocks from one up to another at an index.
func (c coverage) set(from, to trivet.LBA, index uint64) coverage {
	out := make(coverage, 0, len(c)+2)
	add := func(start, end trivet.LBA, index uint64) {
		switch k := len(out); {
		case start >= end:
		case k > 0 && out[k-1].index == index:
			out[k-1].end = end
		default:
			out = append(out, span{end, index})
		}
	}
	for i, s := range c { // what lies before
		add(c.start(i), min(s.end, from), s.index)
	}
	add(from, to, index)
	for i, s := range c { // and after
		add(max(c.start(i), to), s.end, s.index)
	}
	for len(out) > coverageSpansMax {
		out = out.giveUpOne()
	}
	return out
}

// giveUpOne lowers the span whose loss costs the fewest blocks to its neighbour's index.
func (c coverage) giveUpOne() coverage {
	best, bestN := 0, trivet.LBA(lbaMax)+1
	for i := range c {
		lower := i > 0 && c[i-1].index < c[i].index || i+1 < len(c) && c[i+1].index < c[i].index
		if n := c[i].end - c.start(i); lower && n < bestN {
			best, bestN = i, n
		}
	}
	low := uint64(0) // the higher of the lower neighbours
	for _, i := range []int{best - 1, best + 1} {
		if i >= 0 && i < len(c) && c[i].index < c[best].index {
			low = max(low, c[i].index)
		}
	}
	out := slices.Clone(c)
	out[best].index = low
	joined := out[:0]
	for _, s := range out {
		if k := len(joined); k > 0 && joined[k-1].index == s.index {
			joined[k-1].end = s.end
			continue
		}
		joined = append(joined, s)
	}
	return joined
}

// A coverage is encoded, big endian, as the number of spans (2), then per span end (8) and index (8).
func (c coverage) encodedBytes() int { return 2 + 16*len(c) }

func (c coverage) append(dst []byte) []byte {
	dst = binary.BigEndian.AppendUint16(dst, uint16(len(c)))
	for _, s := range c {
		dst = binary.BigEndian.AppendUint64(dst, uint64(s.end))
		dst = binary.BigEndian.AppendUint64(dst, s.index)
	}
	return dst
}

// cutCoverage cuts an encoded coverage off b; none (no spans at all) is nil. ok is false for
// anything that append does not make of a coverage that check lets pass.
func cutCoverage(b []byte) (c coverage, rest []byte, ok bool) {
	if len(b) < 2 {
		return nil, nil, false
	}
	n := int(binary.BigEndian.Uint16(b))
	b = b[2:]
	if n == 0 {
		return nil, b, true
	}
	if n > coverageSpansMax || len(b) < 16*n {
		return nil, nil, false
	}
	c = make(coverage, n)
	for i := range c {
		c[i] = span{trivet.LBA(binary.BigEndian.Uint64(b)), binary.BigEndian.Uint64(b[8:])}
		b = b[16:]
	}
	return c, b, c.check() == nil
}

// A want, version 1, big endian, at most 535 bytes:
//
//	+-------------+-----------+-------------+----------+------------------------+
//	| version (1) | volume (8)| ceiling (8) | coverage | CRC32C of all this (4) |
//	+-------------+-----------+-------------+----------+------------------------+
const (
	wantVersion  byte = 1
	wantBytesMin      = 1 + 8 + 8 + 2 + 16 + 4
)

// want is what Volume.Want tells.
type want struct {
	volume  trivet.VolumeID
	ceiling uint64 // an image must be as of this index or later
	have    coverage
}

func appendWant(dst []byte, w *want) []byte {
	be, start := binary.BigEndian, len(dst)
	dst = be.AppendUint64(append(dst, wantVersion), uint64(w.volume))
	dst = w.have.append(be.AppendUint64(dst, w.ceiling))
	return be.AppendUint32(dst, crc32.Checksum(dst[start:], castagnoli))
}

// decodeWant returns ErrInvalid for what appendWant does not make.
func decodeWant(b []byte) (want, error) {
	be, bad := binary.BigEndian, fmt.Errorf("want %x: malformed: %w", b[:min(len(b), wantBytesMin)], trivet.ErrInvalid)
	if len(b) < wantBytesMin || be.Uint32(b[len(b)-4:]) != crc32.Checksum(b[:len(b)-4], castagnoli) {
		return want{}, bad
	}
	w := want{volume: trivet.VolumeID(be.Uint64(b[1:])), ceiling: be.Uint64(b[9:])}
	have, rest, ok := cutCoverage(b[17 : len(b)-4])
	if b[0] != wantVersion || !ok || have == nil || len(rest) != 0 || have.ceiling() > w.ceiling {
		return want{}, bad
	}
	w.have = have
	return w, nil
}

// Want says, for Image elsewhere, what this volume has: as of which applied index, block by block when
// a Restore was interrupted. It is at most 535 bytes, and true until the next commit or Restore.
func (v *Volume) Want() []byte {
	v.mu.Lock()
	defer v.mu.Unlock()
	return appendWant(nil, &want{v.id, v.rec.state.AppliedIndex, v.rec.covers()})
}

// covers is what the volume has.
func (r *record) covers() coverage {
	if r.restoring {
		return r.have
	}
	return wholly(r.state.AppliedIndex)
}
