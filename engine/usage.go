package engine

import (
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/engine/segment"
)

const (
	// The reserve is what Trivet leaves free on a disk, so that flushes and compactions, and new segments of the
	// log, which is on the same filesystem, never meet its end: the larger of 5 % and 2 GiB, but at most 10 %,
	// or a small disk would be all reserve (H26).
	reserveDivisor    = 20
	reserveBytesMin   = 2 << 30
	reserveCapDivisor = 10

	// HasRoom asks the filesystem again after this time, or this many bytes written.
	spaceAgeMax   = time.Second
	spaceBytesMax = 64 << 20

	// tightSegments is how many segments' worth of room may be left before cleaning is no longer held back.
	tightSegments = 8

	// shrinkFiles is how many files of the log are given back to the filesystem at one look.
	shrinkFiles = 8
)

// Usage is the space of the disk in bytes.
type Usage struct {
	TotalBytes   int64
	FreeBytes    int64 // what this process may still write
	ReserveBytes int64 // kept free: new data may take FreeBytes less this
}

// LogLeaves is what the log leaves free of a disk of totalBytes when it makes new files: half of the reserve. Entries
// that are under way when the reserve is reached, and cleaning, go on making files; the flush of the map that would
// give space back must not find the disk full then, for Pebble does not recover from that.
func LogLeaves(totalBytes int64) int64 { return reserve(totalBytes) / 2 }

// reserve of a disk of totalBytes.
func reserve(totalBytes int64) int64 {
	return min(max(totalBytes/reserveDivisor, reserveBytesMin), totalBytes/reserveCapDivisor)
}

// space knows how full the disk is.
type space struct {
	fs       vfs.FS
	dir      string
	memBytes func() uint64 // what waits in memory to be written
	log      *segment.Log  // its free files are room, too, where every lane has some; may be nil
	tight    func(bool)    // told at each look whether room runs out; may be nil

	mu      sync.Mutex
	left    int64 // bytes that may be written: at the last look, less what was written since
	since   int64 // written since the last look
	all     int64 // and since Open
	looked  time.Time
	unknown bool // the filesystem cannot tell: no limit
}

func newSpace(fs vfs.FS, dir string, memBytes func() uint64) *space {
	return &space{fs: fs, dir: dir, memBytes: memBytes}
}

func (s *space) usage() (Usage, error) {
	d, err := s.fs.GetDiskUsage(s.dir)
	if err != nil {
		return Usage{}, err
	}
	total, free := int64(d.TotalBytes), int64(d.AvailBytes)
	if s.log != nil {
		free += s.log.ReadyBytes() // the log keeps its files, and writes blocks into them again
	}
	return Usage{TotalBytes: total, FreeBytes: free, ReserveBytes: reserve(total)}, nil
}

func (s *space) wrote(n int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.left -= n
	s.since += n
	s.all += n
	if s.tight != nil && s.since >= spaceBytesMax { // a replica that does not lead is not asked for room
		s.lookLocked()
	}
}

// total is how many bytes were written since Open, as wrote was told.
func (s *space) total() int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.all
}

func (s *space) hasRoom(n int64) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.looked.IsZero() || s.since >= spaceBytesMax || time.Since(s.looked) >= spaceAgeMax {
		s.lookLocked()
	}
	return s.unknown || n <= s.left
}

// lookLocked asks the filesystem: a system call that reads no disk. On an error there is no room:
// a disk that cannot even tell its size is no place for new data.
func (s *space) lookLocked() {
	u, err := s.usage()
	s.unknown = errors.Is(err, vfs.ErrUnsupported)
	s.left = 0
	if err == nil {
		s.left = u.FreeBytes - u.ReserveBytes - int64(s.memBytes())
		if s.log != nil && s.left < tightSegments*s.log.SegmentBytes() {
			s.shrinkLocked(u)
		}
	}
	if s.tight != nil {
		s.tight(!s.unknown && s.left < tightSegments*s.log.SegmentBytes())
	}
	s.since, s.looked = 0, time.Now()
}

// shrinkLocked has a lane of the log that has more free files than the others give them back: they are room for all
// lanes then. A few at a time, since each costs a journal entry of the filesystem.
func (s *space) shrinkLocked(u Usage) {
	if s.log.FreeBytes() <= s.log.ReadyBytes() {
		return
	}
	if _, err := s.log.Shrink(shrinkFiles); err != nil {
		return // the next look tries again, and the disk's own writes meet what is wrong with it
	}
	if now, err := s.usage(); err == nil {
		s.left += now.FreeBytes - u.FreeBytes
	}
}

// Usage asks the filesystem how full the disk is. It fails on filesystems that cannot tell.
func (e *Engine) Usage() (Usage, error) {
	if err := e.enter(); err != nil {
		return Usage{}, fmt.Errorf("usage of engine: %w", err)
	}
	defer e.exit()
	e.space.hasRoom(0) // which looks, and gives back what the log has too much of when the disk is full
	u, err := e.space.usage()
	if err != nil {
		return Usage{}, fmt.Errorf("usage of engine: %w", err)
	}
	return u, nil
}

// HasRoom reports whether n bytes more may be accepted without touching the reserve. Ask it before a
// write is proposed, and refuse with ErrNoSpace; discards, zeroes and drops need no room. It is cheap,
// at most a second or 64 MiB of writes old, and counts what waits in memory. After Close: false.
func (e *Engine) HasRoom(n int64) bool {
	if err := e.enter(); err != nil {
		return false
	}
	defer e.exit()
	return e.space.hasRoom(n)
}

// LogUsage says what the segments of the disk's log are used for, in bytes. All but FreeBytes add up to the segments
// that hold something.
type LogUsage struct {
	LiveBytes     int64 // blocks of volumes, written in their current generation
	SnapshotBytes int64 // blocks of older generations; a volume still shows those that it has not written since
	RetainedBytes int64 // entries that the log keeps for itself, beyond the blocks above: at least
	GarbageBytes  int64 // the rest: overwritten, heads, padding, and what is not written yet of current segments
	FreeBytes     int64 // files that wait to be used again
	Segments      int
}

// LogUsage counts now. Without a log everything is zero.
func (e *Engine) LogUsage() (u LogUsage) {
	if e.live == nil || e.enter() != nil {
		return u
	}
	defer e.exit()
	infos := e.log.Segments()
	u.FreeBytes, u.Segments = e.log.FreeBytes(), len(infos)
	l := e.live
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, v := range l.vols {
		for _, p := range v.pages {
			u.LiveBytes += int64(p.n) * trivet.BlockSize
		}
		u.SnapshotBytes += v.blockN * trivet.BlockSize
	}
	u.SnapshotBytes -= u.LiveBytes
	all := int64(0)
	for _, x := range infos {
		all += e.log.SegmentBytes()
		if s := l.segs[x.ID]; s != nil {
			x.EntryBytes -= s.blockN * trivet.BlockSize // as if entries had all the live blocks of their segment
		}
		u.RetainedBytes += max(x.EntryBytes, 0)
	}
	u.GarbageBytes = all - u.LiveBytes - u.SnapshotBytes - u.RetainedBytes
	return u
}

// WrittenBytes is what the store itself has written to the disk since Open: tables and their metadata, what compactions
// write again included; what is in the log is not.
func (e *Engine) WrittenBytes() int64 {
	if err := e.enter(); err != nil {
		return 0
	}
	defer e.exit()
	m := e.db.Metrics()
	n := int64(0)
	for i := range m.Levels {
		n += int64(m.Levels[i].TableBytesFlushed + m.Levels[i].TableBytesCompacted)
	}
	return n
}
