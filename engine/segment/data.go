package segment

import (
	"cmp"
	"errors"
	"fmt"
	"slices"

	"github.com/trivet-csi/trivet"
)

// isData reports whether a lane holds blocks without entries, and no groups.
func (l *Log) isData(lane int) bool { return lane >= int(l.shape.lanes-l.shape.data) }

// HasDataLane reports whether the log takes blocks without entries.
func (l *Log) HasDataLane() bool { return l.shape.data > 0 }

// SegmentBytes returns the size of a segment.
func (l *Log) SegmentBytes() int64 { return l.shape.segmentBytes }

// StoreBytesMax returns the most that one Store takes: as many blocks as fit, with their heads, where an Append does.
func (l *Log) StoreBytesMax() int64 {
	for n := l.shape.appendMax() / pageBytes; ; n-- {
		head := alignUp(batchHeaderBytes+recordHeaderBytes+n*blockInfoBytes, pageBytes)
		if head+n*pageBytes <= l.shape.appendMax() {
			return n * pageBytes
		}
	}
}

// Store puts blocks of a volume that have no entry into the data lane, described by one BlockInfo each, and returns
// where
// they stand once they are on stable storage. Their segment is pinned once for the caller, and nothing else keeps
// it: it
// is recycled after the Unpin. Blocks that a crash came before, or that nobody pins after a restart, are lost.
// Payload must not change before Store returns.
//
// ErrInvalid: there is no data lane, or the payload is no whole blocks or more than StoreBytesMax. ErrNoSpace: as of
// Append.
func (l *Log) Store(volume trivet.VolumeID, blocks []BlockInfo, payload []byte) (Place, error) {
	at, err := l.store(volume, blocks, payload)
	if err != nil {
		return Place{}, fmt.Errorf("store %d blocks of %s: %w", len(blocks), volume, err)
	}
	return at, nil
}

func (l *Log) store(volume trivet.VolumeID, blocks []BlockInfo, payload []byte) (at Place, err error) {
	if !l.HasDataLane() || len(payload) == 0 || len(payload) != len(blocks)*pageBytes ||
		int64(len(payload)) > l.StoreBytesMax() {
		return Place{}, fmt.Errorf("%d bytes, at most %d, data lane %t: %w", len(payload), l.StoreBytesMax(),
			l.HasDataLane(), trivet.ErrInvalid)
	}
	r := &record{kind: kindBlocks, group: volume, blocks: blocks, payload: payload, sum: bodySum(nil, payload)}
	req := &request{records: []*record{r}, refs: []*ref{nil}, stored: &at}
	lane := l.lanes[len(l.lanes)-1]
	if err := lane.submitBlocks(req); err != nil {
		return Place{}, err
	}
	lane.commitNow()
	if err := req.ticket.Err(); err != nil {
		return Place{}, err
	}
	return at, nil
}

func (l *lane) submitBlocks(req *request) error {
	_, total := batchBytes(req.records)
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := l.waitRoomLocked(); err != nil {
		return err
	}
	if err := l.admitLocked(total); err != nil {
		return err
	}
	l.acceptLocked(req)
	return nil
}

// keepLocked pins blocks that have become durable, for whoever stored them.
func (l *lane) keepLocked(r *record, where place) Place {
	l.segments[where.number].pins++
	l.stats.StoredBytes += int64(len(r.payload))
	return Place{
		Segment: segmentID(l.id, where.number), Off: int64(where.page) * pageBytes, Bytes: int64(where.payload),
	}
}

// Info describes a segment that holds something.
type Info struct {
	ID      ID
	Lane    int
	Data    bool // of the data lane
	Current bool // its lane writes to it
	Recent  bool // one of the newest of its lane: its entries will be trimmed soon, and are not carried forward

	Entries    int   // that the log keeps in it
	EntryBytes int64 // of them, records and payloads
	Pins       int
	RoomBytes  int64 // that its lane may still write to it, with the heads of batches
}

// roomLocked is what may still be written to a segment. REQUIRES: mu.
func (l *lane) roomLocked(s *segment) int64 {
	if s != l.cur || !l.begun {
		return 0
	}
	return max(l.log.shape.segmentBytes-l.pos, 0)
}

// Segments returns all segments that hold something or are pinned, and the current ones, in the order of their IDs.
func (l *Log) Segments() []Info {
	var out []Info
	for _, lane := range l.lanes {
		lane.mu.Lock()
		lane.collectLocked()
		for _, s := range lane.segments {
			out = append(out, Info{
				ID: segmentID(lane.id, s.number), Lane: lane.id, Data: l.isData(lane.id),
				Current: s == lane.cur, Recent: s.number+keepRecent >= lane.cur.number,
				Entries: s.live, EntryBytes: s.liveBytes, Pins: s.pins, RoomBytes: lane.roomLocked(s),
			})
		}
		lane.mu.Unlock()
	}
	slices.SortFunc(out, func(a, b Info) int { return cmp.Compare(a.ID, b.ID) })
	return out
}

// FreeBytes returns the size of the files that wait to be used again.
func (l *Log) FreeBytes() int64 {
	var n int64
	for _, lane := range l.lanes {
		lane.mu.Lock()
		lane.collectLocked()
		n += int64(len(lane.free)) * l.shape.segmentBytes
		lane.mu.Unlock()
	}
	return n
}

// ReadyBytes is what entries may still fill of the files that wait to be used again: as much as every lane for entries
// has, since a lane cannot use the files of another, and nobody knows in which lane a group of tomorrow will be. The
// data lane does not count: what is copied there has left another lane, and it takes its files from the reserve.
func (l *Log) ReadyBytes() int64 {
	least, n := -1, 0
	for i, lane := range l.lanes {
		if l.isData(i) {
			continue
		}
		lane.mu.Lock()
		lane.collectLocked()
		if n++; least < 0 || len(lane.free) < least {
			least = len(lane.free)
		}
		lane.mu.Unlock()
	}
	return int64(max(least, 0)*n) * l.shape.segmentBytes
}

// shrinkKeep is how many of its free files a lane keeps for itself.
const shrinkKeep = 2

// Shrink gives up to n files that wait to be used again back to the filesystem, where any lane may use the room, and
// returns how many bytes that are. It is for a disk without room: a new file costs more than an old one.
func (l *Log) Shrink(n int) (int64, error) {
	var bytes int64
	for _, lane := range l.lanes {
		k, err := lane.giveUp(func(free, _ int) int { return min(n, free-shrinkKeep) })
		n -= k
		if bytes += int64(k) * l.shape.segmentBytes; err != nil {
			return bytes, err
		}
	}
	return bytes, nil
}

const (
	// trimKeep is how many of its free files a lane keeps although it does not need them: the next segment waits for
	// none to be made.
	trimKeep = 1

	// Of what a lane has not needed, one Trim takes trimMin files or a part of trimDivisor, whichever is more: each
	// costs a journal entry of the filesystem.
	trimMin     = 4
	trimDivisor = 4
)

// Trim gives back to the filesystem files that no lane has needed since Trim was called the last time: filling a volume
// takes as many as it has data, and cleaning then moves that to the data lane. It returns how many bytes it gave back,
// and how many it may give back later, when it is called again and no lane has needed them by then.
func (l *Log) Trim() (bytes, left int64, err error) {
	for _, lane := range l.lanes {
		more := 0
		n, err := lane.giveUp(func(free, unused int) int {
			more = max(free-trimKeep, 0)
			return min(unused-trimKeep, max(trimMin, unused/trimDivisor))
		})
		bytes += int64(n) * l.shape.segmentBytes
		if left += int64(more-n) * l.shape.segmentBytes; err != nil {
			return bytes, left, err
		}
	}
	return bytes, left, nil
}

// giveUp removes as many files that wait to be used again as choose says, who is told how many there are, and how many
// of them were not needed since the last time. It returns how many are gone.
func (l *lane) giveUp(choose func(free, unused int) int) (n int, err error) {
	l.mu.Lock()
	l.collectLocked()
	var gone []*slot
	if k := choose(len(l.free), l.unusedN); k > 0 && !l.closed {
		gone = slices.Clone(l.free[:k])
		l.free = slices.Delete(l.free, 0, k)
	}
	l.unusedN = len(l.free)
	l.mu.Unlock()
	for i, s := range gone {
		if err := errors.Join(s.file.Close(), l.log.opts.Dir.Remove(s.name)); err != nil {
			return i, fmt.Errorf("remove log file %s: %w", s.name, err)
		}
	}
	return len(gone), nil
}

// Buffer returns n bytes that begin at a page, so that ReadAt reads into them without a copy.
func Buffer(n int64) []byte { return alignedBytes(n) }
