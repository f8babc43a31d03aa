package cache

import (
	"math/bits"

	"github.com/trivet-csi/trivet"
)

// index finds the slot of a block: an open-addressing hash table with linear probing and deletion by shifting
// back (Knuth, TAOCP 3, 6.4, algorithm R). It is at most half full, never grows and never allocates.
type index struct {
	keys  []trivet.LBA
	slots []int32 // slot + 1; 0 = empty
	shift uint
}

func newIndex(slotN int) *index {
	n := 1 << bits.Len(uint(2*max(slotN, 1)))
	return &index{keys: make([]trivet.LBA, n), slots: make([]int32, n), shift: 64 - uint(bits.TrailingZeros(uint(n)))}
}

// home is Fibonacci hashing (TAOCP 3, 6.4): neighbours are spread apart.
func (x *index) home(lba trivet.LBA) int { return int(uint64(lba) * 0x9E3779B97F4A7C15 >> x.shift) }

// get returns the slot of lba, or none.
func (x *index) get(lba trivet.LBA) int32 {
	mask := len(x.slots) - 1
	for i := x.home(lba); x.slots[i] != 0; i = (i + 1) & mask {
		if x.keys[i] == lba {
			return x.slots[i] - 1
		}
	}
	return none
}

// put sets the slot of lba. REQUIRES: not more blocks than slots.
func (x *index) put(lba trivet.LBA, slot int32) {
	mask := len(x.slots) - 1
	i := x.home(lba)
	for x.slots[i] != 0 && x.keys[i] != lba {
		i = (i + 1) & mask
	}
	x.keys[i], x.slots[i] = lba, slot+1
}

// del forgets lba.
func (x *index) del(lba trivet.LBA) {
	mask := len(x.slots) - 1
	i := x.home(lba)
	for x.keys[i] != lba || x.slots[i] == 0 {
		if x.slots[i] == 0 {
			return
		}
		i = (i + 1) & mask
	}
	x.slots[i] = 0
	for j := (i + 1) & mask; x.slots[j] != 0; j = (j + 1) & mask {
		// What is at j may move to the hole at i unless its home lies cyclically within (i, j].
		if h := x.home(x.keys[j]); (j-h)&mask >= (j-i)&mask {
			x.keys[i], x.slots[i], x.slots[j] = x.keys[j], x.slots[j], 0
			i = j
		}
	}
}
