package segment

import (
	"cmp"
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
	req := &request{
		records: []*record{r}, refs: []*ref{nil}, ticket: &Ticket{done: make(chan struct{})}, stored: &at,
	}
	if err := l.lanes[len(l.lanes)-1].submitBlocks(req); err != nil {
		return Place{}, err
	}
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
				Entries: s.live, EntryBytes: s.liveBytes, Pins: s.pins,
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

// ReadyBytes is FreeBytes as far as every lane has as much: a lane cannot use the files of another.
func (l *Log) ReadyBytes() int64 {
	least := -1
	for _, lane := range l.lanes {
		lane.mu.Lock()
		lane.collectLocked()
		if n := len(lane.free); least < 0 || n < least {
			least = n
		}
		lane.mu.Unlock()
	}
	return int64(least*len(l.lanes)) * l.shape.segmentBytes
}

// Buffer returns n bytes that begin at a page, so that ReadAt reads into them without a copy.
func Buffer(n int64) []byte { return alignedBytes(n) }
