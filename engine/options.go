package engine

import (
	"math"
	"time"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/bloom"
)

const (
	cacheBytesDefault    = 64 << 20
	memTableBytesDefault = 64 << 20
	// memTableRefBytes is the default where blocks stand in the log: references of 640 MiB of random writes. The log is
	// cut, and so the map flushed, before.
	memTableRefBytes = 16 << 20
	memTableN        = 4 // memtables in memory before writes stall

	tableBlockBytesDefault = 16 << 10 // three or four blocks of ours

	indexBlockBytes   = 256 << 10
	l0TableBytes      = 16 << 20
	l0RefTableBytes   = 2 << 20 // a compaction of writes in order rewrites few tables of the next level
	tableBytesMax     = 128 << 20
	baseLevelBytes    = 256 << 20
	baseRefLevelBytes = 16 << 20 // some 400 000 references
	l0CompactSublevel = 4        // Pebble counts twice the sublevels: two overlapping tables
	l0RefSublevel     = 12
	l0StopSublevel    = 64
	bytesPerSync      = 1 << 20
	openFilesMax      = 1024
	bloomBitsPerKey   = 10
	rangeDelFlush     = 10 * time.Second
)

// options are Pebble's options for 4 KiB values and no log of its own. The defaults cost 2.6 times
// the write volume and 3 times the CPU of a set like this one (design.md, section 8):
//
//   - a large memtable and base level: fewer rewrites of a block, and overwrites die in memory;
//   - no compression: device blocks are mostly incompressible or compressed by their owner, zeroes are
//     not stored at all, and the CPU is worth more;
//   - 16 KiB table blocks: a cold 4 KiB read costs at most one 16 KiB read, the index stays 0.2 %;
//   - bloom filters over volume and LBA, on all levels: blocks never written are common in thin volumes;
//   - no compactions because of reads: an idle volume costs no writes;
//   - for references, which are small and are flushed each time that the log is cut, six overlapping tables in level 0
//     and a small base level: with two tables and a large one, every second flush was merged with a whole map;
//   - range deletions reach the disk within 10 s, since only then a discard gives space back; flushSoon sees to that.
func options(cfg Config, h *health) *pebble.Options {
	o := &pebble.Options{
		BytesPerSync:                bytesPerSync,
		CacheSize:                   cfg.CacheBytes,
		CompactionConcurrencyRange:  func() (lower, upper int) { return 1, 3 },
		Comparer:                    newComparer(),
		DisableWAL:                  true, // the Raft log is the log
		EventListener:               h.listener(),
		FlushSplitBytes:             l0TableBytes,
		FormatMajorVersion:          pebble.FormatTableFormatV6, // the first with a checksum in the footer
		FS:                          cfg.FS,
		L0CompactionThreshold:       l0CompactSublevel,
		L0StopWritesThreshold:       math.MaxInt, // awaitLevel0 does that
		LBaseMaxBytes:               baseLevelBytes,
		Logger:                      h,
		MaxOpenFiles:                openFilesMax,
		MemTableSize:                uint64(cfg.MemTableBytes),
		MemTableStopWritesThreshold: memTableN,
	}
	o.Experimental.ReadSamplingMultiplier = -1
	o.Experimental.CompactionScheduler = h.compactions
	o.ApplyCompressionSettings(func() pebble.DBCompressionSettings { return pebble.DBCompressionNone })
	size := int64(l0TableBytes)
	if cfg.Log != nil {
		size = l0RefTableBytes
		o.FlushSplitBytes = size
		o.L0CompactionThreshold, o.LBaseMaxBytes = l0RefSublevel, baseRefLevelBytes
	}
	for i := range o.Levels {
		o.Levels[i].BlockSize = cfg.tableBlockBytes
		o.Levels[i].IndexBlockSize = indexBlockBytes
		o.Levels[i].FilterPolicy = politeFilter{bloom.FilterPolicy(bloomBitsPerKey)}
		o.TargetFileSizes[i] = size
		size = min(2*size, tableBytesMax)
	}
	return o
}
