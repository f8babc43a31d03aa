package raftgroup

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"

	"github.com/trivet-csi/trivet"
)

// openLog reads the segments of a log back. Whatever was acknowledged is there, or it returns
// ErrCorrupt and changes nothing: only a last batch that no later write and no mark vouches for may
// be cut off as torn (H23).
func openLog(opts logOptions) (*segmentLog, error) {
	l := &segmentLog{opts: opts, first: 1, dirty: make(chan struct{}, 1)}
	if err := l.recover(); err != nil {
		for _, s := range l.segments {
			err = errors.Join(err, s.f.Close())
		}
		if l.mark != nil {
			err = errors.Join(err, l.mark.close())
		}
		return nil, fmt.Errorf("open log of %s: %w", opts.group, err)
	}
	l.stop, l.done = make(chan struct{}), make(chan struct{})
	go l.markLoop()
	return l, nil
}

// scanned is one segment as found on disk.
type scanned struct {
	*segmentFile
	info  segmentInfo
	bytes []byte // nil once its records are taken over
}

func (l *segmentLog) recover() error {
	mark, b, err := openSlots(l.opts.fs, l.opts.dir, fileMark, magicMark)
	if isNotExist(err) {
		return fmt.Errorf("file %s is gone: %w", fileMark, trivet.ErrCorrupt)
	}
	if err != nil {
		return err
	}
	l.mark = mark
	d := decoder{b: b}
	markSeq, markEnd := d.u64(), int64(d.u64())
	if err := d.finish("mark"); err != nil {
		return err
	}
	seqs, err := l.list()
	if err != nil {
		return err
	}
	torn, err := l.load(seqs, markSeq, markEnd)
	if err != nil {
		return err
	}
	if slices.ContainsFunc(l.refs, func(r ref) bool { return r.seg == nil }) {
		return fmt.Errorf("entries %d and on are in segments that are gone: %w", l.first, trivet.ErrCorrupt)
	}
	if torn {
		// Never append after the remains of a torn batch: parts of it may look whole.
		if err := l.roll(); err != nil {
			return err
		}
	}
	return l.removeUnused()
}

// list returns the sequence numbers of the segments, which must be consecutive.
func (l *segmentLog) list() ([]uint64, error) {
	names, err := l.opts.fs.List(l.opts.dir)
	if err != nil {
		return nil, err
	}
	var seqs []uint64
	for _, name := range names {
		hex, ok := strings.CutPrefix(name, segmentPrefix)
		if !ok {
			continue
		}
		seq, err := strconv.ParseUint(hex, 16, 64)
		if err != nil || segmentName(seq) != name {
			return nil, fmt.Errorf("file %s is no segment: %w", name, trivet.ErrCorrupt)
		}
		seqs = append(seqs, seq)
	}
	slices.Sort(seqs)
	for i, seq := range seqs {
		if seq != seqs[0]+uint64(i) {
			return nil, fmt.Errorf("segment %d is gone: %w", seqs[0]+uint64(i), trivet.ErrCorrupt)
		}
	}
	return seqs, nil
}

// load reads all segments and rebuilds the index. torn says that a torn batch follows the end.
func (l *segmentLog) load(seqs []uint64, markSeq uint64, markEnd int64) (torn bool, err error) {
	var cur, next *scanned
	for i, seq := range seqs {
		if next, err = l.scan(seq); err != nil {
			return false, err
		}
		if next == nil { // a segment that a crash cut short before its header was durable
			if i != len(seqs)-1 || seq <= markSeq {
				return false, fmt.Errorf("segment %d has no header: %w", seq, trivet.ErrCorrupt)
			}
			if err := removeFile(l.opts.fs, l.opts.dir, segmentName(seq)); err != nil {
				return false, err
			}
			break
		}
		l.segments = append(l.segments, next.segmentFile)
		if cur != nil {
			if err := l.replay(cur, next.info.prevEnd); err != nil {
				return false, err
			}
		} else {
			// Entries of segments that were removed: a later record must have dropped them.
			l.first = next.info.first
			l.refs = make([]ref, next.info.last+1-next.info.first)
		}
		if first, last := l.bounds(); first != next.info.first || last != next.info.last {
			return false, fmt.Errorf("segment %d begins at entries %d to %d, log has %d to %d: %w",
				seq, next.info.first, next.info.last, first, last, trivet.ErrCorrupt)
		}
		cur = next
	}
	if cur == nil || cur.seq < markSeq {
		return false, fmt.Errorf("segment %d is gone: %w", max(markSeq, 1), trivet.ErrCorrupt)
	}
	l.tail = cur.segmentFile
	if cur.seq > markSeq {
		markEnd = 0
	}
	return l.replayTail(cur, markEnd)
}

// scan opens one segment and reads it whole; nil when it has no header and no record.
func (l *segmentLog) scan(seq uint64) (*scanned, error) {
	f, err := l.opts.fs.OpenReadWrite(l.opts.fs.PathJoin(l.opts.dir, segmentName(seq)), writeCategory)
	if err != nil {
		return nil, err
	}
	b, err := io.ReadAll(f)
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	info, err := decodeSegmentInfo(b)
	if err == nil && (info.group != l.opts.group || info.seq != seq) {
		err = fmt.Errorf("segment %d is segment %d of %s: %w", seq, info.seq, info.group, trivet.ErrCorrupt)
	}
	if err != nil {
		err = errors.Join(fmt.Errorf("segment %d: %w", seq, err), f.Close())
		if findRecord(b, l.opts.group, seq, segmentHeader, 0) < 0 && !isSegmentHeader(b) {
			return nil, nil
		}
		return nil, err
	}
	return &scanned{segmentFile: &segmentFile{f: f, seq: seq, end: segmentHeader}, info: info, bytes: b}, nil
}

// isSegmentHeader reports that b begins with a whole header, be it of another segment.
func isSegmentHeader(b []byte) bool {
	_, err := decodeSegmentInfo(b)
	return err == nil
}

// replay takes over the records of a segment up to end, which its successor vouches for.
func (l *segmentLog) replay(s *scanned, end int64) error {
	if end < segmentHeader || end > int64(len(s.bytes)) {
		return fmt.Errorf("segment %d has %d bytes, its successor says %d: %w", s.seq, len(s.bytes), end, trivet.ErrCorrupt)
	}
	got, err := l.replayUntil(s, end)
	if err == nil && got != end {
		err = fmt.Errorf("record at %d passes the end: %w", got, trivet.ErrCorrupt)
	}
	if err != nil {
		return fmt.Errorf("segment %d of %d bytes: %w", s.seq, end, err)
	}
	s.bytes = nil
	return nil
}

// replayTail takes over the records of the last segment. What cannot be read is a torn last batch,
// unless the mark or a later batch says that it was durable.
func (l *segmentLog) replayTail(s *scanned, markEnd int64) (torn bool, err error) {
	end, err := l.replayUntil(s, int64(len(s.bytes)))
	if err == nil {
		if end < markEnd {
			return false, fmt.Errorf("segment %d ends at %d, mark says %d: %w", s.seq, end, markEnd, trivet.ErrCorrupt)
		}
		s.bytes = nil
		return false, nil
	}
	if !errors.Is(err, errUnreadable) {
		return false, fmt.Errorf("segment %d: %w", s.seq, err)
	}
	rest := s.bytes[end:]
	later := findRecord(s.bytes, l.opts.group, s.seq, end, end)
	s.bytes = nil
	if end < markEnd || later >= 0 {
		return false, fmt.Errorf("segment %d is damaged at %d, mark at %d, later record at %d: %w",
			s.seq, end, markEnd, later, errors.Join(err, trivet.ErrCorrupt))
	}
	// Space that was set aside and never written reads as zeroes.
	return slices.ContainsFunc(rest, func(c byte) bool { return c != 0 }), nil
}

// errUnreadable marks a record that does not pass its checksum, against one that does and
// contradicts the log.
var errUnreadable = errors.New("unreadable record")

// replayUntil applies records up to limit and returns the offset after the last whole one.
func (l *segmentLog) replayUntil(s *scanned, limit int64) (int64, error) {
	for s.end < limit {
		r, size, err := decodeRecord(s.bytes[s.end:limit], l.opts.group, s.seq, s.end)
		if err != nil {
			return s.end, errors.Join(err, errUnreadable)
		}
		if err := l.checkRecord(r); err != nil {
			return s.end, fmt.Errorf("record at %d: %w", s.end, err)
		}
		l.applyLocked(r, ref{seg: s.segmentFile, off: s.end, n: size, term: r.term, typ: r.typ})
		s.end += size
	}
	return s.end, nil
}

// checkRecord returns ErrCorrupt unless r may follow what the log holds.
func (l *segmentLog) checkRecord(r record) error {
	first, last := l.first, l.first+uint64(len(l.refs))-1
	var ok bool
	switch r.kind {
	case kindEntry:
		ok = r.index == last+1
		if n := len(l.refs); n > 0 && l.refs[n-1].seg != nil {
			ok = ok && r.term >= l.refs[n-1].term
		}
	case kindTruncate:
		ok = r.index >= first && r.index < last
	case kindTrim:
		ok = r.index > first && r.index <= last
	case kindReset:
		ok = r.index > 0
	}
	if !ok {
		return fmt.Errorf("kind %d of index %d, term %d does not follow entries %d to %d: %w",
			r.kind, r.index, r.term, first, last, trivet.ErrCorrupt)
	}
	return nil
}

// findRecord looks for a whole record at or after off whose batch began after durable, or at it when
// durable is 0, and returns its offset, or -1. The records of one batch reach the disk in any order,
// so one of the torn batch itself, which began at durable or before, proves nothing.
func findRecord(b []byte, group trivet.VolumeID, seq uint64, off, durable int64) int64 {
	for ; off+recordHeader <= int64(len(b)); off += recordAlign {
		if kind := b[off+8]; kind < kindEntry || kind > kindReset {
			continue
		}
		if batch := int64(binary.LittleEndian.Uint32(b[off+12:])); off-batch <= durable && durable > 0 {
			continue
		}
		if _, _, err := decodeRecord(b[off:], group, seq, off); err == nil {
			return off
		}
	}
	return -1
}
