package segment

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"slices"

	"github.com/trivet-csi/trivet"
)

// candidate is a file found at Open.
type candidate struct {
	slot
	lane   int
	number uint64 // of the slot
	size   int64
	head   *segmentHeader // nil when it cannot be read
}

// recover finds the lanes and brings each up to its end. It flushes, and writes nothing.
func (l *Log) recover() (err error) {
	all, err := l.candidates()
	defer func() {
		if err != nil { // files are closed as they were only read
			for _, c := range all {
				err = errors.Join(err, c.file.Close())
			}
		}
	}()
	if err == nil {
		err = l.findShape(all)
	}
	if err != nil {
		return err
	}
	// A process that died while it made a file may have left its name in a cache only.
	if err := l.opts.Dir.Sync(); err != nil {
		return err
	}
	buf := alignedBytes(l.shape.segmentBytes)
	for i := range int(l.shape.lanes) {
		lane := newLane(l, i)
		var own []*candidate
		for _, c := range all {
			if c.lane == i {
				own = append(own, c)
			}
		}
		if err := lane.recover(own, buf); err != nil {
			return fmt.Errorf("lane %d: %w", i, err)
		}
		l.lanes = append(l.lanes, lane)
	}
	return nil
}

// candidates opens every segment file and reads its header.
func (l *Log) candidates() ([]*candidate, error) {
	names, err := l.opts.Dir.List()
	if err != nil {
		return nil, err
	}
	slices.Sort(names)
	var out []*candidate
	page := alignedBytes(pageBytes)
	for _, name := range names {
		lane, number, ok := parseSlotName(name)
		if !ok {
			continue
		}
		f, err := l.opts.Dir.Open(name)
		if err != nil {
			return out, fmt.Errorf("file %s: %w", name, err)
		}
		c := &candidate{slot: slot{name: name, file: f}, lane: lane, number: number}
		out = append(out, c)
		if c.size, err = f.Size(); err != nil {
			return out, fmt.Errorf("file %s: %w", name, err)
		}
		if c.size < pageBytes {
			continue
		}
		if err := readFull(f, page, 0); err != nil {
			return out, fmt.Errorf("file %s: %w", name, err)
		}
		if h, err := decodeSegmentHeader(page); err == nil {
			c.head = &h
		}
	}
	return out, nil
}

// findShape learns what Format fixed, in which all headers must agree.
func (l *Log) findShape(all []*candidate) error {
	if len(all) == 0 {
		return fmt.Errorf("no segment files: %w", trivet.ErrNotFound)
	}
	disk, _ := parseDisk(l.opts.Disk) // Validate looked at it
	for _, c := range all {
		if c.head == nil {
			continue
		}
		s := shape{disk: c.head.disk, lanes: c.head.lanes, data: c.head.data, segmentBytes: c.head.segmentBytes}
		switch {
		case s.disk != disk:
			return fmt.Errorf("file %s belongs to disk %x, not %x: %w", c.name, s.disk, disk, trivet.ErrInvalid)
		case l.shape != shape{} && l.shape != s || int(c.head.lane) != c.lane:
			return fmt.Errorf("file %s is of lane %d of %+v, want lane %d of %+v: %w",
				c.name, c.head.lane, s, c.lane, l.shape, trivet.ErrCorrupt)
		case c.size != s.segmentBytes:
			return fmt.Errorf("file %s has %d bytes, want %d: %w", c.name, c.size, s.segmentBytes, trivet.ErrCorrupt)
		}
		l.shape = s
	}
	if l.shape == (shape{}) {
		return fmt.Errorf("no segment header of %d can be read: %w", len(all), trivet.ErrCorrupt)
	}
	return nil
}

// recover brings the lane to the state of its newest checkpoint and what follows it.
func (l *lane) recover(own []*candidate, buf []byte) error {
	headed, err := l.sortOut(own, buf)
	if err != nil {
		return err
	}
	newest, floor, err := l.newest(headed, buf)
	if err != nil {
		return err
	}
	if err := l.register(headed, newest, buf); err != nil {
		return err
	}
	if err := readFull(newest.file, buf, 0); err != nil {
		return err
	}
	groups, err := decodeCheckpoint(buf[pageBytes : pageBytes+int64(newest.head.checkpointBytes)])
	if err != nil {
		return fmt.Errorf("segment %d: %w", newest.head.number, err)
	}
	for _, c := range groups {
		g := l.groupLocked(c.group)
		g.durable = c.state
	}
	if err := l.replay(buf, *newest.head, floor); err != nil {
		return fmt.Errorf("segment %d: %w", newest.head.number, err)
	}
	// What was read may be in a cache of the kernel or of the disk only, from a process that died before
	// its flush. From here on it counts, so it must stay.
	if err := newest.file.Sync(); err != nil {
		return fmt.Errorf("sync segment %d: %w", newest.head.number, err)
	}
	for _, g := range l.groups {
		g.accepted = groupState{first: g.durable.first, refs: slices.Clone(g.durable.refs), stable: g.durable.stable}
		l.entriesN += int64(len(g.accepted.refs))
		for _, at := range g.durable.refs {
			l.countLocked(at, 1)
		}
	}
	return nil
}

// sortOut deals with the files that have no readable header, and returns the others, highest number first.
// Such a file is a new one, one that a crash left half made, or a segment whose header is damaged: that
// one is known by its batches.
func (l *lane) sortOut(own []*candidate, buf []byte) ([]*candidate, error) {
	var headed []*candidate
	for _, c := range own {
		l.slots = max(l.slots, c.number+1)
		switch {
		case c.head != nil:
			headed = append(headed, c)
			continue
		case c.size != l.log.shape.segmentBytes:
			l.broken = append(l.broken, c.name)
			if err := c.file.Close(); err != nil {
				return nil, err
			}
			continue
		}
		if err := readFull(c.file, buf, 0); err != nil {
			return nil, fmt.Errorf("file %s: %w", c.name, err)
		}
		h := latestBatch(buf)
		if h.number == 0 {
			l.free = append(l.free, &slot{name: c.name, file: c.file})
			continue
		}
		l.segments[h.number] = &segment{slot: c.slot, number: h.number, incarnation: h.incarnation}
	}
	slices.SortFunc(headed, func(a, b *candidate) int { return cmp.Compare(b.head.number, a.head.number) })
	return headed, nil
}

// newest returns the segment to replay, and the position in it that the one after vouches for. A segment
// whose checkpoint does not stand is one whose beginning a crash interrupted: nothing was written behind
// it yet. If something was, it is damage.
func (l *lane) newest(headed []*candidate, buf []byte) (*candidate, int64, error) {
	floors := map[uint64]int64{}
	for _, c := range headed {
		if err := readFull(c.file, buf, 0); err != nil {
			return nil, 0, fmt.Errorf("segment %d: %w", c.head.number, err)
		}
		h := *c.head
		if checksum(buf[pageBytes:pageBytes+int64(h.checkpointBytes)]) == h.checkpointSum {
			for number := range l.segments {
				if number >= h.number {
					return nil, 0, fmt.Errorf("header of segment %d is damaged: %w", number, trivet.ErrCorrupt)
				}
			}
			return c, floors[h.number], nil
		}
		if _, found := provenEnd(buf, h); found {
			return nil, 0, fmt.Errorf("checkpoint of segment %d is damaged: %w", h.number, trivet.ErrCorrupt)
		}
		floors[h.number-1] = max(floors[h.number-1], h.prevEnd)
	}
	return nil, 0, fmt.Errorf("none of %d segments has a checkpoint: %w", len(headed), trivet.ErrCorrupt)
}

// register takes the segments up to the newest into the index; the rest are files to use again.
func (l *lane) register(headed []*candidate, newest *candidate, buf []byte) error {
	l.cur = &segment{slot: newest.slot, number: newest.head.number, incarnation: newest.head.incarnation}
	l.segments[l.cur.number] = l.cur
	for _, c := range headed {
		h := *c.head
		other := l.segments[h.number]
		if c == newest {
			continue
		}
		if h.number < l.cur.number && other == nil {
			l.segments[h.number] = &segment{slot: c.slot, number: h.number, incarnation: h.incarnation}
			continue
		}
		if h.number < l.cur.number {
			// Two of one number: one was interrupted when it began, and has nothing in it.
			if err := readFull(c.file, buf, 0); err != nil {
				return fmt.Errorf("file %s: %w", c.name, err)
			}
			if _, found := provenEnd(buf, h); found {
				l.free = append(l.free, &slot{name: other.name, file: other.file})
				l.segments[h.number] = &segment{slot: c.slot, number: h.number, incarnation: h.incarnation}
				continue
			}
		}
		l.free = append(l.free, &slot{name: c.name, file: c.file})
	}
	return nil
}

// latestBatch returns the header of the batch with the highest segment number in a file whose own header
// cannot be read; the zero value when there is none.
func latestBatch(b []byte) batchHeader {
	var latest batchHeader
	for off := int64(pageBytes); off < int64(len(b)); off += pageBytes {
		if !beginsBatch(b[off:]) {
			continue
		}
		if h, err := decodeBatchHeader(b[off:], off, int64(len(b))); err == nil && h.number > latest.number {
			latest = h
		}
	}
	return latest
}

// beginsBatch reports whether b may be a batch. Of a page of blocks it is not worth an error that says why not: a start
// looks at all pages of the newest segments.
func beginsBatch(b []byte) bool { return bytes.HasPrefix(b, []byte(magicBatch)) }

// provenEnd returns the highest position in a segment that one of its batches names as durable. Batches
// are written one after the other, each flushed before the next is made, so the header of any later batch,
// torn as its batch may be, proves all that lies before it (H23).
func provenEnd(b []byte, seg segmentHeader) (end int64, found bool) {
	for off := seg.start(); off < int64(len(b)); off += pageBytes {
		if !beginsBatch(b[off:]) {
			continue
		}
		h, err := decodeBatchHeader(b[off:], off, int64(len(b)))
		if err == nil && h.number == seg.number && h.incarnation == seg.incarnation {
			end, found = max(end, h.durable), true
		}
	}
	return end, found
}

// replay applies the batches of the newest segment. What cannot be read is a torn tail when nothing vouches
// for it, and then it is cut with all that follows; else it is damage.
func (l *lane) replay(b []byte, seg segmentHeader, floor int64) error {
	proven, _ := provenEnd(b, seg)
	proven = max(proven, floor)
	l.pos, l.marked = seg.start(), true
	for l.pos < int64(len(b)) {
		h, records, err := l.batchAt(b, seg)
		if err == nil && l.pos >= proven {
			for _, r := range records {
				err = errors.Join(err, r.bad)
			}
		}
		if err != nil {
			if l.pos < proven {
				return fmt.Errorf("damaged at %d, was durable up to %d: %w", l.pos, proven, err)
			}
			break
		}
		for i := range records {
			if err := l.replayRecord(&records[i]); err != nil {
				return err
			}
		}
		l.pos += int64(h.bytes)
		l.marked = h.recordsN == 0
	}
	if l.pos < proven {
		return fmt.Errorf("ends at %d, was durable up to %d: %w", l.pos, proven, trivet.ErrCorrupt)
	}
	return nil
}

func (l *lane) batchAt(b []byte, seg segmentHeader) (batchHeader, []found, error) {
	h, err := decodeBatchHeader(b[l.pos:], l.pos, int64(len(b)))
	if err != nil {
		return h, nil, err
	}
	if h.number != seg.number || h.incarnation != seg.incarnation {
		return h, nil, fmt.Errorf("batch at %d is of segment %d: %w", l.pos, h.number, trivet.ErrCorrupt)
	}
	records, err := decodeBatch(b[l.pos:], h)
	return h, records, err
}

// replayRecord applies one record. A damaged body of an entry is left to Read, so that it harms no other
// group (H38); of a vote, nothing is left.
func (l *lane) replayRecord(r *found) error {
	switch {
	case (r.kind == kindBlocks) != l.log.isData(l.id),
		r.kind != kindBlocks && l.log.shape.laneOf(r.group) != l.id:
		return fmt.Errorf("record kind %d of %s is not of lane %d: %w", r.kind, r.group, l.id, trivet.ErrCorrupt)
	case r.kind == kindBlocks:
		return nil // whoever wanted them knows where they are, and checks them
	case r.bad != nil && r.kind != kindEntry && r.kind != kindMove:
		return r.bad
	}
	g := l.groupLocked(r.group)
	if err := g.durable.check(&r.record); err != nil {
		return fmt.Errorf("%v: %w", err, trivet.ErrCorrupt)
	}
	var at *ref
	switch r.kind {
	case kindEntry:
		at = &ref{term: r.term, typ: r.typ, durable: true, at: r.at}
	case kindMove:
		g.durable.at(r.index).at = r.at
	}
	g.durable.apply(&r.record, at)
	return nil
}
