package segment

import (
	"errors"
	"fmt"
	"io"

	"github.com/trivet-csi/trivet"
)

// ID names a segment of the log for ever: it is never used again when the file is recycled.
type ID uint64

func segmentID(lane int, number uint64) ID { return ID(number<<8 | uint64(lane)) }

// String returns lane and number.
func (s ID) String() string { return fmt.Sprintf("segment %d of lane %d", s>>8, s&0xff) }

// Place is where the payload of an entry stands.
type Place struct {
	Segment ID
	Off     int64 // bytes, a multiple of 4096
	Bytes   int64
}

// ErrMemory is in the chain of an ErrCorrupt for an entry that was changed in memory: what the disk has of it was not
// looked at.
var ErrMemory = errors.New("changed in memory")

// Read returns an entry, from memory or from the disk. The slices belong to the log and must not be changed.
// It returns ErrNotFound for an entry that the log does not hold, and ErrCorrupt, with group, index and both
// checksums, for one that is damaged.
func (g *Group) Read(index uint64) (Entry, error) {
	e, err := g.read(index)
	if err != nil {
		return Entry{}, fmt.Errorf("read entry %d of %s: %w", index, g.id, err)
	}
	return e, nil
}

func (g *Group) read(index uint64) (Entry, error) {
	l := g.lane
	l.mu.Lock()
	at, err := g.lookLocked(index)
	if err != nil {
		l.mu.Unlock()
		return Entry{}, err
	}
	if r := at.entry; r != nil {
		l.mu.Unlock()
		// Shared with whoever appended it: checked again, so that a changed buffer is never served (H25).
		err := r.checkBody()
		if err != nil {
			err = fmt.Errorf("%w: %w", ErrMemory, err)
		}
		return r.entry(), err
	}
	where, seg := at.at, l.segments[at.at.number]
	if seg == nil {
		l.mu.Unlock()
		return Entry{}, fmt.Errorf("%v is gone: %w", segmentID(l.id, where.number), trivet.ErrCorrupt)
	}
	seg.pins++ // else the file could be recycled under the read
	term, typ := at.term, at.typ
	l.mu.Unlock()

	r, err := l.readRecord(seg, where)
	l.mu.Lock()
	defer l.mu.Unlock()
	l.unpinLocked(seg)
	if err != nil {
		if l.closed && !errors.Is(err, trivet.ErrCorrupt) {
			return Entry{}, fmt.Errorf("%v: %w", err, trivet.ErrClosed)
		}
		return Entry{}, err
	}
	if r.group != g.id || r.index != index || r.term != term || r.typ != typ {
		return Entry{}, fmt.Errorf("at %d of segment %d is entry %d of term %d of %s, want term %d: %w",
			where.off, where.number, r.index, r.term, r.group, term, trivet.ErrCorrupt)
	}
	return r.entry(), nil
}

func (g *Group) lookLocked(index uint64) (*ref, error) {
	if err := g.lane.usableLocked(); err != nil {
		return nil, err
	}
	at := g.accepted.at(index)
	if at == nil {
		return nil, trivet.ErrNotFound
	}
	return at, nil
}

func (r *record) entry() Entry {
	return Entry{Index: r.index, Term: r.term, Type: r.typ, Data: r.data, Payload: r.payload, Blocks: r.blocks}
}

// readHead reads the record of an entry from a pinned segment, without its payload and without a look at its body.
func (l *lane) readHead(seg *segment, where place) (*record, error) {
	begin := int64(where.off) / pageBytes * pageBytes
	end := alignUp(int64(where.off)+int64(where.head), pageBytes)
	if size := l.log.shape.segmentBytes; end > size || int64(where.page)*pageBytes+int64(where.payload) > size {
		return nil, fmt.Errorf("record at %d of segment %d passes its end: %w", where.off, seg.number, trivet.ErrCorrupt)
	}
	head := alignedBytes(end - begin)
	if err := readFull(seg.file, head, begin); err != nil {
		return nil, fmt.Errorf("segment %d at %d: %w", seg.number, begin, err)
	}
	r, at, err := decodeRecord(head[int64(where.off)-begin:], seg.number, seg.incarnation, int64(where.off))
	if err != nil {
		return nil, fmt.Errorf("segment %d: %w", seg.number, err)
	}
	if at != where || r.kind != kindEntry && r.kind != kindMove {
		return nil, fmt.Errorf("record of kind %d at %+v of segment %d, want %+v: %w",
			r.kind, at, seg.number, where, trivet.ErrCorrupt)
	}
	return &r, nil
}

// readRecord reads an entry from a pinned segment and checks it against its own checksums.
func (l *lane) readRecord(seg *segment, where place) (*record, error) {
	r, err := l.readHead(seg, where)
	if err != nil {
		return nil, err
	}
	if where.payload > 0 {
		// One behind the other, for Entry.Whole, and the payload at a page.
		dataBytes := int64(len(r.data))
		skip := alignUp(dataBytes, pageBytes)
		b := alignedBytes(skip + int64(where.payload))
		copy(b[skip-dataBytes:], r.data)
		r.data, r.payload = b[skip-dataBytes:skip], b[skip:]
		payloadAt := int64(where.page) * pageBytes
		if err := readFull(seg.file, r.payload, payloadAt); err != nil {
			return nil, fmt.Errorf("segment %d at %d: %w", seg.number, payloadAt, err)
		}
	}
	if err := r.checkBody(); err != nil {
		return nil, fmt.Errorf("segment %d: %w", seg.number, err)
	}
	return r, nil
}

// readFull fills b. A file that ends before that is damage, not an I/O error.
func readFull(f io.ReaderAt, b []byte, off int64) error {
	n, err := f.ReadAt(b, off)
	switch {
	case n == len(b):
		return nil
	case errors.Is(err, io.EOF) || err == nil:
		return fmt.Errorf("file ends after %d of %d bytes at %d: %w", n, len(b), off, trivet.ErrCorrupt)
	}
	return err
}

// Locate returns where the payload of an entry stands, and pins its segment, so that the blocks stay where
// they are until Unpin. ErrNotFound: no such entry; ErrPending: it is not on the disk yet; ErrCorrupt: its
// segment is lost.
func (g *Group) Locate(index uint64) (Place, error) {
	l := g.lane
	l.mu.Lock()
	defer l.mu.Unlock()
	at, err := g.lookLocked(index)
	if err == nil && !at.durable {
		err = trivet.ErrPending
	}
	var seg *segment
	if err == nil {
		if seg = l.segments[at.at.number]; seg == nil {
			err = fmt.Errorf("segment %d is gone: %w", at.at.number, trivet.ErrCorrupt)
		}
	}
	if err != nil {
		return Place{}, fmt.Errorf("locate entry %d of %s: %w", index, g.id, err)
	}
	seg.pins++
	return Place{
		Segment: segmentID(l.id, seg.number), Off: int64(at.at.page) * pageBytes, Bytes: int64(at.at.payload),
	}, nil
}

// find returns a segment and its lane, with the lane's mu held when err is nil.
func (l *Log) find(id ID) (*lane, *segment, error) {
	n := int(id & 0xff)
	if n >= len(l.lanes) {
		return nil, nil, fmt.Errorf("%v: %w", id, trivet.ErrNotFound)
	}
	lane := l.lanes[n]
	lane.mu.Lock()
	if err := lane.usableLocked(); err != nil {
		lane.mu.Unlock()
		return nil, nil, err
	}
	s := lane.segments[uint64(id>>8)]
	if s == nil {
		lane.mu.Unlock()
		return nil, nil, fmt.Errorf("%v: %w", id, trivet.ErrNotFound)
	}
	return lane, s, nil
}

// Pin keeps a segment from being recycled until as many Unpins. ErrNotFound: it has been.
func (l *Log) Pin(id ID) error {
	lane, s, err := l.find(id)
	if err != nil {
		return fmt.Errorf("pin: %w", err)
	}
	defer lane.mu.Unlock()
	s.pins++
	return nil
}

// Unpin takes back one Pin or Locate. It panics when there is none. On a closed or failed log it does
// nothing.
func (l *Log) Unpin(id ID) {
	lane, s, err := l.find(id)
	if err != nil {
		if errors.Is(err, trivet.ErrNotFound) {
			panic("segment: unpin: " + err.Error())
		}
		return
	}
	defer lane.mu.Unlock()
	lane.unpinLocked(s)
}

// ReadAt reads len(p) bytes at off of a segment in place, both multiples of 4096, without checking them: the
// caller has their checksum. It returns ErrNotFound when the segment was recycled. A p that begins at a
// page is read into directly.
func (l *Log) ReadAt(id ID, p []byte, off int64) error {
	if len(p)%pageBytes != 0 || off%pageBytes != 0 || off < 0 || off+int64(len(p)) > l.shape.segmentBytes {
		return fmt.Errorf("read %d bytes at %d of %v: %w", len(p), off, id, trivet.ErrInvalid)
	}
	lane, s, err := l.find(id)
	if err != nil {
		return fmt.Errorf("read: %w", err)
	}
	s.pins++
	lane.mu.Unlock()
	b := p
	if !isAligned(p) {
		b = alignedBytes(int64(len(p)))
	}
	err = readFull(s.file, b, off)
	lane.mu.Lock()
	lane.unpinLocked(s)
	lane.mu.Unlock()
	if err != nil {
		return fmt.Errorf("read %d bytes at %d of %v: %w", len(p), off, id, err)
	}
	if !isAligned(p) {
		copy(p, b)
	}
	return nil
}
