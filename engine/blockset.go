package engine

import (
	"cmp"
	"iter"
	"slices"

	"github.com/RoaringBitmap/roaring/v2/roaring64"

	"github.com/trivet-csi/trivet"
)

// longExtentN is the number of blocks from which an extent is kept as such and not as bits: what it
// takes to keep and to walk a wiped volume must not grow with the volume. It is two containers of the bitmap.
const longExtentN = 1 << 17

// BlockSet is a set of blocks. The zero value is empty. It is not safe for concurrent use.
type BlockSet struct {
	bits  roaring64.Bitmap
	long  []extent // sealed: sorted, apart from each other and from bits
	dirty bool     // long is not sealed
}

func (s *BlockSet) add(x extent) {
	if x.n < longExtentN {
		s.bits.AddRange(uint64(x.lba), uint64(x.lba)+uint64(x.n))
		s.dirty = s.dirty || len(s.long) > 0
		return
	}
	if k := len(s.long); k > 0 && s.long[k-1].contains(x) {
		return
	}
	s.long = append(s.long, x)
	s.dirty = true
}

// remove takes the blocks of an extent out.
func (s *BlockSet) remove(x extent) {
	s.seal()
	s.bits.RemoveRange(uint64(x.lba), uint64(x.end()))
	out := make([]extent, 0, len(s.long)+1)
	for _, l := range s.long {
		if head := int64(min(l.end(), max(x.lba, l.lba)) - l.lba); head > 0 {
			out = append(out, extent{l.lba, head})
		}
		if from := max(l.lba, min(l.end(), x.end())); from < l.end() {
			out = append(out, extent{from, int64(l.end() - from)})
		}
	}
	s.long = out
}

// seal restores the invariant of long.
func (s *BlockSet) seal() {
	if !s.dirty {
		return
	}
	s.dirty = false
	s.long = mergeExtents(s.long)
	for _, x := range s.long {
		s.bits.RemoveRange(uint64(x.lba), uint64(x.end()))
	}
}

// Len is the number of blocks in the set.
func (s *BlockSet) Len() int64 {
	s.seal()
	n := int64(s.bits.GetCardinality())
	for _, x := range s.long {
		n += x.n
	}
	return n
}

// Contains reports whether a block is in the set.
func (s *BlockSet) Contains(lba trivet.LBA) bool {
	for _, x := range s.long {
		if x.contains(extent{lba, 1}) {
			return true
		}
	}
	return s.bits.Contains(uint64(lba))
}

// Extents yields the set as runs of blocks (first block, number of blocks) that rise and do not overlap.
// The set must not be changed meanwhile.
func (s *BlockSet) Extents() iter.Seq2[trivet.LBA, int64] {
	return func(yield func(trivet.LBA, int64) bool) {
		c := s.cursor()
		for x, ok := c.next(); ok; x, ok = c.next() {
			if !yield(x.lba, x.n) {
				return
			}
		}
	}
}

// blockCursor walks a set in the order of its blocks.
type blockCursor struct {
	bits roaring64.IntPeekable64
	long []extent // what is left of them
}

func (s *BlockSet) cursor() *blockCursor {
	s.seal()
	return &blockCursor{bits: s.bits.Iterator(), long: s.long}
}

// next returns the next run. Runs may touch where the set keeps them in different ways.
func (c *blockCursor) next() (extent, bool) {
	if len(c.long) > 0 && (!c.bits.HasNext() || trivet.LBA(c.bits.PeekNext()) > c.long[0].lba) {
		x := c.long[0]
		c.long = c.long[1:]
		return x, true
	}
	if !c.bits.HasNext() {
		return extent{}, false
	}
	x := extent{trivet.LBA(c.bits.Next()), 1}
	for c.bits.HasNext() && trivet.LBA(c.bits.PeekNext()) == x.end() {
		c.bits.Next()
		x.n++
	}
	return x, true
}

// extent is a run of blocks.
type extent struct {
	lba trivet.LBA
	n   int64
}

func (x extent) end() trivet.LBA { return x.lba + trivet.LBA(x.n) }

func (x extent) contains(y extent) bool { return x.lba <= y.lba && y.end() <= x.end() }

// mergeExtents sorts xs and joins those that touch or overlap, in place.
func mergeExtents(xs []extent) []extent {
	slices.SortFunc(xs, func(a, b extent) int { return cmp.Compare(a.lba, b.lba) })
	out := xs[:0]
	for _, x := range xs {
		if k := len(out); k > 0 && x.lba <= out[k-1].end() {
			out[k-1].n = int64(max(out[k-1].end(), x.end()) - out[k-1].lba)
			continue
		}
		out = append(out, x)
	}
	return out
}
