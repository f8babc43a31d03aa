package sim

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"sync"

	"github.com/trivet-csi/trivet"
)

// version counts the writes issued to one block; 0 is its state at birth, zeroes.
type version int

// A block of data is stamped, so that whatever is read can be told to be some write to this very block:
//
//	0       8      16      24        32              4092     4096
//	+-------+------+-------+---------+---------------+---------+
//	| volume| lba  | epoch | version | filler        | crc32c  |   big endian
//	+-------+------+-------+---------+---------------+---------+
const (
	stampBytes = 32
	sumAt      = trivet.BlockSize - 4
)

// stamp fills a block.
func stamp(p []byte, lba trivet.LBA, epoch trivet.Epoch, v version) {
	binary.BigEndian.PutUint64(p[0:], uint64(volumeID))
	binary.BigEndian.PutUint64(p[8:], uint64(lba))
	binary.BigEndian.PutUint64(p[16:], uint64(epoch))
	binary.BigEndian.PutUint64(p[24:], uint64(v))
	x := uint64(lba)<<32 ^ uint64(v)*0x9E3779B97F4A7C15
	for i := stampBytes; i < sumAt-4; i += 8 {
		x ^= x << 13
		x ^= x >> 7
		x ^= x << 17
		binary.BigEndian.PutUint64(p[i:], x)
	}
	binary.BigEndian.PutUint32(p[sumAt:], crc32.Checksum(p[:sumAt], crc32.MakeTable(crc32.Castagnoli)))
}

func stampedVersion(p []byte) version { return version(binary.BigEndian.Uint64(p[24:])) }

// write is one change issued to a block.
type write struct {
	zero  bool // discard or write-zeroes
	epoch trivet.Epoch
	back  bool    // roll back to a snapshot, which shows the block as
	was   version // that version stamped it; 0: zeroes

	contend bool // may begin while another change to a block is under way, if the oracle is shared
	era     int
}

// history is all that was asked of one block.
//
// At most one change to a block is under way at a time, so versions are in order of issue, and a change
// that ended without an answer precedes the next one: should it take effect later all the same, a read
// finds a version below the floor (H39).
type history struct {
	writes []write // version v is writes[v-1]
	acked  version // highest acknowledged
	seen   version // highest that a read has returned
	busy   int     // changes that are under way

	// Where two write, changes to a block may be under way together, and one that ended without an answer may take
	// effect after later ones of the other writer: for as long as that may be, a block has no floor, and its order is
	// for porcupine to judge.
	overlap bool // of those under way, two were at a time
	mixed   bool // nobody knows which of two is the last
	open    int  // era in which a change was left without an answer; 0: none
}

// oracle knows what every block may hold. It is safe for concurrent use.
type oracle struct {
	shared bool // two write

	mu     sync.Mutex
	era    int // counts the epochs from which no earlier change can take effect any more
	blocks []history
}

// shows returns what a version of the block reads as: the version that is stamped in it, 0 for zeroes.
func (h *history) shows(v version) version {
	if v == 0 {
		return 0
	}
	switch w := h.writes[v-1]; {
	case w.zero:
		return 0
	case w.back:
		return w.was
	}
	return v
}

// newEra says that no change which began before takes effect any more.
func (o *oracle) newEra() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.era++
}

func newOracle(blockN int) *oracle { return &oracle{blocks: make([]history, blockN)} }

// begin reserves [lba, lba+n) and issues the next version of each block. ok is false when one is busy, and w may not
// contend for it.
func (o *oracle) begin(lba trivet.LBA, n int, w write) (versions []version, ok bool) {
	return o.beginEach(lba, n, func(int) write { return w })
}

// beginEach is begin of a change that is another one for each block.
func (o *oracle) beginEach(lba trivet.LBA, n int, of func(i int) write) (versions []version, ok bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for i := range n {
		if o.blocks[int(lba)+i].busy > 0 && (!o.shared || !of(i).contend) {
			return nil, false
		}
	}
	for i := range n {
		h := &o.blocks[int(lba)+i]
		if h.busy++; h.busy > 1 {
			h.overlap, h.mixed = true, true
		}
		w := of(i)
		w.era = o.era
		h.writes = append(h.writes, w)
		versions = append(versions, version(len(h.writes)))
	}
	return versions, true
}

// end releases what begin reserved; acked says that the change was acknowledged.
func (o *oracle) end(lba trivet.LBA, n int, acked bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for i := range n {
		h := &o.blocks[int(lba)+i]
		h.busy--
		switch {
		case !acked && o.shared:
			h.open = o.era
		case acked && !h.overlap: // the newest is the one that ends
			h.acked, h.mixed = version(len(h.writes)), false
			if h.writes[h.acked-1].era > h.open {
				h.open = 0
			}
		}
		h.overlap = h.overlap && h.busy > 0
	}
}

// floors returns, before a read, the lowest version that each block may be found at: what was
// acknowledged, and what an earlier read has returned.
func (o *oracle) floors(lba trivet.LBA, n int) []version {
	o.mu.Lock()
	defer o.mu.Unlock()
	out := make([]version, n)
	for i := range out {
		h := &o.blocks[int(lba)+i]
		if out[i] = max(h.acked, h.seen); h.mixed || h.open > 0 {
			out[i] = 0
		}
	}
	return out
}

// check judges what a read returned, given the floors from before it.
func (o *oracle) check(lba trivet.LBA, p []byte, floors []version) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	for i, floor := range floors {
		h := &o.blocks[int(lba)+i]
		v, err := h.find(p[i*trivet.BlockSize:(i+1)*trivet.BlockSize], lba+trivet.LBA(i), floor)
		if err != nil {
			return err
		}
		h.seen = max(h.seen, v)
	}
	return nil
}

// find returns the version that block p is, or why it is none that may be there.
func (h *history) find(p []byte, lba trivet.LBA, floor version) (version, error) {
	return h.findUpTo(p, lba, floor, version(len(h.writes)))
}

// findUpTo is find among versions up to one: the lowest that reads as p.
func (h *history) findUpTo(p []byte, lba trivet.LBA, floor, issued version) (version, error) {
	stamped, err := h.stampOf(p, lba)
	if err != nil {
		return 0, err
	}
	for v := floor; v <= issued; v++ {
		if h.shows(v) == stamped {
			return v, nil
		}
	}
	switch {
	case stamped == 0:
		return 0, fmt.Errorf("block %d is zero, want version %d to %d: acknowledged data is lost", lba, floor, issued)
	case stamped > issued:
		return 0, fmt.Errorf("block %d holds version %d, want %d to %d: it was written later", lba, stamped, floor, issued)
	}
	return 0, fmt.Errorf("block %d holds version %d, want %d to %d: an acknowledged write is lost", lba, stamped, floor,
		issued)
}

// stampOf returns the version that is stamped in block p, 0 for zeroes, or why nobody has written it.
func (h *history) stampOf(p []byte, lba trivet.LBA) (version, error) {
	if isZero(p) {
		return 0, nil
	}
	v := stampedVersion(p)
	epoch := trivet.Epoch(binary.BigEndian.Uint64(p[16:]))
	switch {
	case binary.BigEndian.Uint32(p[sumAt:]) != crc32.Checksum(p[:sumAt], crc32.MakeTable(crc32.Castagnoli)):
		return 0, fmt.Errorf("block %d is torn or mixed up: its checksum does not match", lba)
	case binary.BigEndian.Uint64(p[0:]) != uint64(volumeID) || binary.BigEndian.Uint64(p[8:]) != uint64(lba):
		return 0, fmt.Errorf("block %d holds another block's data: %x", lba, p[:stampBytes])
	case v < 1 || v > version(len(h.writes)) || h.shows(v) != v || h.writes[v-1].epoch != epoch:
		return 0, fmt.Errorf("block %d holds version %d of epoch %d, which was never issued", lba, v, epoch)
	}
	return v, nil
}

func isZero(p []byte) bool {
	for _, b := range p {
		if b != 0 {
			return false
		}
	}
	return true
}
