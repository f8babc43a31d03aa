package cache

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"

	"github.com/trivet-csi/trivet"
)

// The mapping file, version 1. It never leaves the machine that wrote it, so integers are in its byte order,
// little endian on all that Go and Trivet run on; words marked * are stored by one atomic instruction.
//
//	byte 0     header, copy A (128 bytes)    of two copies the valid one with the higher generation counts
//	byte 256   header, copy B
//	byte 1024  commit* u64                   slots with a higher sequence were never acknowledged
//	byte 4096  slot headers, 64 bytes each
//	dataOff    slot data, 4096 bytes each; dataOff is a multiple of 2 MiB, for hugepages
//
// Header copy:
//
//	 0 magic* "TRVTWBC1", stored last and cleared first; zero: no copy
//	 8 version u32 | 12 crc32c u32 of bytes 8–11 and 16–127
//	16 generation u64 | 24 volume u64 | 32 epoch u64 | 40 next epoch u64
//	48 slots u32 | 52 flags u32 (1 poisoned, 2 dropped) | 56 cluster UUID, 36 bytes | 92 zeroes
//
// Slot header:
//
//	0 state* u32, stored last: 0 free, 1 data | 4 crc32c u32 of bytes 8–35
//	8 LBA u64 | 16 sequence u64 | 24 volume u64 | 32 crc32c u32 of the data | 36 zeroes
const (
	formatVersion = 1
	pageBytes     = 4096

	headMagic  = uint64(0x3143425754565254) // "TRVTWBC1", little endian
	headCopyAt = 256                        // distance of the copies
	headBytes  = 128
	commitAt   = 1024

	slotsAt       = 4096
	slotHeadBytes = 64
	slotCheckEnd  = 36 // the slot header's own checksum covers bytes 8 to here
	dataAlign     = 2 << 20

	slotFree = uint32(0)
	slotData = uint32(1)

	flagPoisoned = uint32(1)
	flagDropped  = uint32(2)

	// slotsMax bounds what a header may claim: 1 TiB of cache.
	slotsMax = 1 << 28
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// header says whose blocks a mapping holds.
type header struct {
	generation uint64 // counts the changes of the header
	cluster    trivet.ClusterID
	volume     trivet.VolumeID
	epoch      trivet.Epoch // whose writes these are, or that have taken them over
	next       trivet.Epoch // the epoch that a successor was about to get; epoch itself: none
	slotN      uint32
	poisoned   bool // a write-back failed (H14)
	dropped    bool // the dirty blocks were given up: the volume belongs to another (H13)
}

// encode returns the copy as it stands in the file, its magic included.
func (h *header) encode() [headBytes]byte {
	var b [headBytes]byte
	le := binary.LittleEndian
	le.PutUint64(b[0:], headMagic)
	le.PutUint32(b[8:], formatVersion)
	le.PutUint64(b[16:], h.generation)
	le.PutUint64(b[24:], uint64(h.volume))
	le.PutUint64(b[32:], uint64(h.epoch))
	le.PutUint64(b[40:], uint64(h.next))
	le.PutUint32(b[48:], h.slotN)
	flags := uint32(0)
	if h.poisoned {
		flags |= flagPoisoned
	}
	if h.dropped {
		flags |= flagDropped
	}
	le.PutUint32(b[52:], flags)
	copy(b[56:92], h.cluster)
	le.PutUint32(b[12:], headCRC(b[:]))
	return b
}

func headCRC(b []byte) uint32 {
	return crc32.Update(crc32.Checksum(b[8:12], castagnoli), castagnoli, b[16:headBytes])
}

// decodeHeader reads page 0 of a mapping. The second result is false when no header was ever completed there, and
// so no write acknowledged. ErrInvalid: a newer version wrote it. ErrCorrupt: damage.
func decodeHeader(page []byte) (header, bool, error) {
	if len(page) < headCopyAt+headBytes {
		return header{}, false, nil
	}
	var best header
	found := false
	var bad error
	for at := 0; at <= headCopyAt; at += headCopyAt {
		b := page[at : at+headBytes]
		if binary.LittleEndian.Uint64(b) == 0 {
			continue
		}
		h, err := decodeCopy(b)
		switch {
		case err != nil:
			bad = err
		case !found || h.generation > best.generation:
			best, found = h, true
		}
	}
	if found {
		return best, true, nil
	}
	return header{}, false, bad
}

func decodeCopy(b []byte) (header, error) {
	le := binary.LittleEndian
	if m := le.Uint64(b); m != headMagic {
		return header{}, fmt.Errorf("magic %#x: not a cache of this program: %w", m, trivet.ErrCorrupt)
	}
	if v := le.Uint32(b[8:]); v != formatVersion { // before the checksum, which another version may take elsewhere
		return header{}, fmt.Errorf("format version %d, this program reads %d: %w", v, formatVersion, trivet.ErrInvalid)
	}
	if want, got := le.Uint32(b[12:]), headCRC(b); want != got {
		return header{}, fmt.Errorf("header checksum %08x, computed %08x: %w", want, got, trivet.ErrCorrupt)
	}
	flags := le.Uint32(b[52:])
	h := header{
		generation: le.Uint64(b[16:]), volume: trivet.VolumeID(le.Uint64(b[24:])), epoch: trivet.Epoch(le.Uint64(b[32:])),
		next: trivet.Epoch(le.Uint64(b[40:])), slotN: le.Uint32(b[48:]), cluster: trivet.ClusterID(b[56:92]),
		poisoned: flags&flagPoisoned != 0, dropped: flags&flagDropped != 0,
	}
	if h.slotN > slotsMax {
		return header{}, fmt.Errorf("header claims %d slots: %w", h.slotN, trivet.ErrCorrupt)
	}
	return h, nil
}

// dataOff returns where the data of slot 0 begins in a mapping of slotN slots.
func dataOff(slotN int) int64 {
	end := int64(slotsAt) + int64(slotN)*slotHeadBytes
	return (end + dataAlign - 1) / dataAlign * dataAlign
}

// fileBytes returns the size of a mapping of slotN slots.
func fileBytes(slotN int) int64 {
	if slotN == 0 {
		return pageBytes
	}
	return dataOff(slotN) + int64(slotN)*trivet.BlockSize
}
