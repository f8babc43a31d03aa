package engine

import (
	"encoding/binary"
	"fmt"
	"math"

	"github.com/cockroachdb/pebble/v2"

	"github.com/trivet-csi/trivet"
)

// Keys, big endian, so that byte order is the order of volumes, blocks and (newest first) generations:
//
//	 0      1                9                17           21
//	+------+----------------+----------------+------------+
//	| 0x01 |                                                 store format record
//	+------+----------------+
//	| 0x02 | volume         |                                volume record: State and more
//	+------+----------------+----------------+------------+
//	| 0x03 | volume         | LBA            | ^generation |  block
//	+------+----------------+----------------+------------+
//	 ------------- prefix (bloom filter) ----
//	+------+----------------+----------------+
//	| 0x04 | volume         | applied index  |               change journal
//	+------+----------------+----------------+
const (
	tableFormat  byte = 0x01
	tableVolume  byte = 0x02
	tableBlock   byte = 0x03
	tableJournal byte = 0x04
	tableEnd     byte = 0x05

	volumeKeyBytes   = 1 + 8
	blockPrefixBytes = 1 + 8 + 8
	blockKeyBytes    = blockPrefixBytes + 4

	// lbaMax is the first block number that no volume has.
	lbaMax = trivet.VolumeSizeMax / trivet.BlockSize
)

// comparerName is stored in every table file and never changes meaning.
const comparerName = "trivet.volume-lba-generation.v1"

func appendVolumeKey(dst []byte, id trivet.VolumeID) []byte {
	return binary.BigEndian.AppendUint64(append(dst, tableVolume), uint64(id))
}

func appendBlockPrefix(dst []byte, id trivet.VolumeID, lba trivet.LBA) []byte {
	dst = binary.BigEndian.AppendUint64(append(dst, tableBlock), uint64(id))
	return binary.BigEndian.AppendUint64(dst, uint64(lba))
}

func appendBlockKey(dst []byte, id trivet.VolumeID, lba trivet.LBA, gen trivet.Generation) []byte {
	return binary.BigEndian.AppendUint32(appendBlockPrefix(dst, id, lba), ^uint32(gen))
}

func appendJournalKey(dst []byte, id trivet.VolumeID, index uint64) []byte {
	dst = binary.BigEndian.AppendUint64(append(dst, tableJournal), uint64(id))
	return binary.BigEndian.AppendUint64(dst, index)
}

// volumeBlocks are the bounds [lower, upper) of all block keys of a volume.
func volumeBlocks(id trivet.VolumeID) (lower, upper []byte) { return volumeRange(tableBlock, id) }

// volumeJournal are the bounds of the keys of its journal.
func volumeJournal(id trivet.VolumeID) (lower, upper []byte) { return volumeRange(tableJournal, id) }

func volumeRange(table byte, id trivet.VolumeID) (lower, upper []byte) {
	lower = binary.BigEndian.AppendUint64([]byte{table}, uint64(id))
	if id == math.MaxUint64 {
		return lower, []byte{table + 1}
	}
	return lower, binary.BigEndian.AppendUint64([]byte{table}, uint64(id)+1)
}

// decodeJournalKey returns ErrCorrupt for anything that appendJournalKey does not make.
func decodeJournalKey(k []byte) (id trivet.VolumeID, index uint64, err error) {
	if len(k) != journalKeyBytes || k[0] != tableJournal {
		return 0, 0, fmt.Errorf("journal key %x: want %d bytes of table %#x: %w", k, journalKeyBytes, tableJournal,
			trivet.ErrCorrupt)
	}
	return trivet.VolumeID(binary.BigEndian.Uint64(k[1:])), binary.BigEndian.Uint64(k[9:]), nil
}

// decodeVolumeKey returns ErrCorrupt for anything that appendVolumeKey does not make.
func decodeVolumeKey(k []byte) (trivet.VolumeID, error) {
	if len(k) != volumeKeyBytes || k[0] != tableVolume {
		return 0, fmt.Errorf("volume key %x: want %d bytes of table %#x: %w", k, volumeKeyBytes, tableVolume,
			trivet.ErrCorrupt)
	}
	return trivet.VolumeID(binary.BigEndian.Uint64(k[1:])), nil
}

// blockKey is a decoded block key.
type blockKey struct {
	volume trivet.VolumeID
	lba    trivet.LBA
	gen    trivet.Generation
}

// decodeBlockKey returns ErrCorrupt for anything that appendBlockKey does not make.
func decodeBlockKey(k []byte) (blockKey, error) {
	if len(k) != blockKeyBytes || k[0] != tableBlock {
		return blockKey{}, fmt.Errorf("block key %x: want %d bytes of table %#x: %w", k, blockKeyBytes, tableBlock,
			trivet.ErrCorrupt)
	}
	bk := blockKey{
		volume: trivet.VolumeID(binary.BigEndian.Uint64(k[1:])),
		lba:    trivet.LBA(binary.BigEndian.Uint64(k[9:])),
		gen:    trivet.Generation(^binary.BigEndian.Uint32(k[17:])),
	}
	if bk.lba >= lbaMax {
		return blockKey{}, fmt.Errorf("block key %x: block %d is beyond the largest volume: %w", k, bk.lba,
			trivet.ErrCorrupt)
	}
	return bk, nil
}

// place is the part of a block key that its checksum covers: volume and LBA. REQUIRES: a block key.
func place(k []byte) []byte { return k[1:blockPrefixBytes] }

// newComparer orders keys by bytes and splits block keys before the generation, so that one bloom
// filter entry stands for all generations of a block. Pebble's rule that a prefix stripped of leading
// bytes is a prefix too does not hold; it matters to ingested tables with synthetic prefixes only.
func newComparer() *pebble.Comparer {
	c := *pebble.DefaultComparer
	c.Name = comparerName
	c.Split = splitKey
	c.ImmediateSuccessor = prefixSuccessor
	return &c
}

func splitKey(k []byte) int {
	if len(k) > blockPrefixBytes && k[0] == tableBlock {
		return blockPrefixBytes
	}
	return len(k)
}

// prefixSuccessor appends the smallest prefix greater than the prefix p.
func prefixSuccessor(dst, p []byte) []byte {
	if len(p) < blockPrefixBytes || p[0] != tableBlock {
		return append(append(dst, p...), 0)
	}
	// Anything that continues a whole block prefix is no prefix, so count up instead. The table byte
	// is never 0xff, so something is left to count.
	for p[len(p)-1] == 0xff {
		p = p[:len(p)-1]
	}
	dst = append(dst, p...)
	dst[len(dst)-1]++
	return dst
}
