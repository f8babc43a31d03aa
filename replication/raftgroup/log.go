package raftgroup

import (
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/hashicorp/raft"

	"github.com/trivet-csi/trivet"
)

const magicMark = "trvtmrk\x01"

// markDelay is how long the log stays idle before its end is marked as durable.
const markDelay = 100 * time.Millisecond

// logOptions say where a log lives.
type logOptions struct {
	fs           vfs.FS
	dir          string
	group        trivet.VolumeID
	segmentBytes int64
	onError      func(error) // told of failed background writes
}

// segmentLog is the log of one group: a run of entries in segment files (record.go), with the place
// of each in memory. An append returns once it is on stable storage. It replaces raft-wal v0.4.0,
// which cannot be read again after a truncation and a restart (its issue #31) and takes rot in the
// last segment for a torn tail. engine/segment will replace it in turn.
//
// Appends, truncations and trims must not run at the same time as each other; read and bounds may
// run at any time.
type segmentLog struct {
	opts logOptions

	wmu sync.Mutex // held by the one writer, over its disk I/O; what mu guards is changed under both
	buf []byte

	mu       sync.RWMutex // readers hold it over their disk read, so that no file is closed under them
	tail     *segmentFile // the last of segments
	segments []*segmentFile
	first    uint64 // of the log, or the next index when it is empty
	refs     []ref  // of first, first+1, …
	closed   bool

	mark  *slotFile // nil while creating
	dirty chan struct{}
	stop  chan struct{}
	done  chan struct{}
}

// segmentFile is one open file of the log.
type segmentFile struct {
	f    vfs.File
	seq  uint64
	end  int64  // bytes that are valid, and durable
	last uint64 // highest index that a record of it carries
}

// ref is where an entry stands.
type ref struct {
	seg  *segmentFile
	off  int64
	n    int64 // bytes of the record
	term uint64
	typ  raft.LogType
}

func segmentName(seq uint64) string { return fmt.Sprintf("%s%016x", segmentPrefix, seq) }

// createLog makes the first segment, durably. The caller closes the log; it has no mark.
func createLog(opts logOptions) (*segmentLog, error) {
	l := &segmentLog{opts: opts, first: 1}
	if err := l.roll(); err != nil {
		return nil, err
	}
	return l, nil
}

// bounds returns the indexes of the first and last entry; last is first-1 when there is none.
func (l *segmentLog) bounds() (first, last uint64) {
	l.mu.RLock()
	defer l.mu.RUnlock()
	return l.first, l.first + uint64(len(l.refs)) - 1
}

// term returns the term of an entry; false when the log does not hold it.
func (l *segmentLog) term(index uint64) (uint64, bool) {
	l.mu.RLock()
	defer l.mu.RUnlock()
	if index < l.first || index-l.first >= uint64(len(l.refs)) {
		return 0, false
	}
	return l.refs[index-l.first].term, true
}

// configIndexes returns the indexes of the configuration entries.
func (l *segmentLog) configIndexes() []uint64 {
	l.mu.RLock()
	defer l.mu.RUnlock()
	var out []uint64
	for i, r := range l.refs {
		if r.typ == raft.LogConfiguration {
			out = append(out, l.first+uint64(i))
		}
	}
	return out
}

// sizeAfter returns the bytes that the entries after index take.
func (l *segmentLog) sizeAfter(index uint64) int64 {
	l.mu.RLock()
	defer l.mu.RUnlock()
	var n int64
	for i, r := range l.refs {
		if l.first+uint64(i) > index {
			n += r.n
		}
	}
	return n
}

// read decodes an entry into out, with data of its own. It returns exactly raft.ErrLogNotFound for
// an entry that the log does not hold, and ErrCorrupt, never that one, for one that is damaged.
func (l *segmentLog) read(index uint64, out *raft.Log) error {
	l.mu.RLock()
	defer l.mu.RUnlock()
	if l.closed {
		return fmt.Errorf("read entry %d: %w", index, trivet.ErrClosed)
	}
	if index < l.first || index-l.first >= uint64(len(l.refs)) {
		return raft.ErrLogNotFound
	}
	at := l.refs[index-l.first]
	b := make([]byte, at.n)
	err := readFull(at.seg.f, b, at.off)
	var r record
	if err == nil {
		r, _, err = decodeRecord(b, l.opts.group, at.seg.seq, at.off)
	}
	if err == nil && (r.kind != kindEntry || r.index != index || r.term != at.term) {
		err = fmt.Errorf("record at %d is entry %d of term %d: %w", at.off, r.index, r.term, trivet.ErrCorrupt)
	}
	if err != nil {
		return fmt.Errorf("read entry %d of %s in segment %d: %w", index, l.opts.group, at.seg.seq, err)
	}
	*out = raft.Log{Index: r.index, Term: r.term, Type: r.typ, Data: r.data}
	return nil
}

// append writes entries that follow the last one. An empty log takes any first index.
func (l *segmentLog) append(entries []*raft.Log) error {
	if len(entries) == 0 {
		return nil
	}
	l.wmu.Lock()
	defer l.wmu.Unlock()
	first, last := l.bounds()
	next := last + 1
	var records []record
	if last < first && entries[0].Index != next {
		next = entries[0].Index
		records = append(records, record{kind: kindReset, index: next})
	}
	for _, e := range entries {
		if e.Index != next || e.Index == 0 {
			return fmt.Errorf("append entry %d of %s: want index %d: %w", e.Index, l.opts.group, next, trivet.ErrInvalid)
		}
		if len(e.Extensions) > 0 || len(e.Data) > recordDataMax {
			return fmt.Errorf("append entry %d of %s: %d bytes of data, %d of extensions: %w",
				e.Index, l.opts.group, len(e.Data), len(e.Extensions), trivet.ErrInvalid)
		}
		records = append(records, record{kind: kindEntry, typ: e.Type, index: e.Index, term: e.Term, data: e.Data})
		next++
	}
	return l.write(records)
}

// truncate drops the entries after last.
func (l *segmentLog) truncate(last uint64) error {
	l.wmu.Lock()
	defer l.wmu.Unlock()
	begin, end := l.bounds()
	if last >= end {
		return nil
	}
	if last < begin {
		return fmt.Errorf("truncate to entry %d of %s: first is %d: %w", last, l.opts.group, begin, trivet.ErrInvalid)
	}
	return l.write([]record{{kind: kindTruncate, index: last}})
}

// trim drops the entries before first, and the files that hold nothing else.
func (l *segmentLog) trim(first uint64) error {
	l.wmu.Lock()
	defer l.wmu.Unlock()
	begin, end := l.bounds()
	if first <= begin {
		return nil
	}
	if first > end {
		return fmt.Errorf("trim to entry %d of %s: last is %d: %w", first, l.opts.group, end, trivet.ErrInvalid)
	}
	if err := l.write([]record{{kind: kindTrim, index: first}}); err != nil {
		return err
	}
	return l.removeUnused()
}

// reset drops all entries; the next one has the given index.
func (l *segmentLog) reset(next uint64) error {
	l.wmu.Lock()
	defer l.wmu.Unlock()
	if err := l.write([]record{{kind: kindReset, index: next}}); err != nil {
		return err
	}
	return l.removeUnused()
}

// write appends one batch, flushes it and then shows it to readers.
func (l *segmentLog) write(records []record) error {
	if l.closed {
		return trivet.ErrClosed
	}
	var size int64
	for _, r := range records {
		size += recordSize(len(r.data))
	}
	if l.tail.end > segmentHeader && l.tail.end+size > l.opts.segmentBytes {
		if err := l.roll(); err != nil {
			return err
		}
	}
	start := l.tail.end
	b := l.buf[:0]
	refs := make([]ref, 0, len(records))
	for _, r := range records {
		off := start + int64(len(b))
		r.batch = uint32(len(b))
		b = appendRecord(b, l.opts.group, l.tail.seq, off, r)
		refs = append(refs, ref{seg: l.tail, off: off, n: recordSize(len(r.data)), term: r.term, typ: r.typ})
	}
	if l.buf = b; cap(b) > appendBytesMax {
		l.buf = nil // do not keep the memory of a rare big batch
	}
	if _, err := l.tail.f.WriteAt(b, start); err != nil {
		return err
	}
	if err := l.tail.f.SyncData(); err != nil {
		return err
	}
	l.mu.Lock()
	l.tail.end = start + int64(len(b))
	for i, r := range records {
		l.applyLocked(r, refs[i])
	}
	l.mu.Unlock()
	select {
	case l.dirty <- struct{}{}:
	default:
	}
	return nil
}

// applyLocked brings the index in memory up to one record. It trusts the record: recovery checks it
// before.
func (l *segmentLog) applyLocked(r record, at ref) {
	switch r.kind {
	case kindEntry:
		l.refs = append(l.refs, at)
		at.seg.last = max(at.seg.last, r.index)
	case kindTruncate:
		l.refs = l.refs[:r.index+1-l.first]
	case kindTrim:
		l.refs = append([]ref(nil), l.refs[r.index-l.first:]...)
		l.first = r.index
	case kindReset:
		l.refs, l.first = nil, r.index
	}
}

// roll starts a new segment, durably, before anything is written to it.
func (l *segmentLog) roll() error {
	info := segmentInfo{group: l.opts.group, seq: 1}
	if l.tail != nil {
		info.seq, info.prevEnd = l.tail.seq+1, l.tail.end
	}
	info.first, info.last = l.first, l.first+uint64(len(l.refs))-1
	path := l.opts.fs.PathJoin(l.opts.dir, segmentName(info.seq))
	there, err := fileExists(l.opts.fs, path)
	if err != nil {
		return err
	}
	if there {
		return fmt.Errorf("new segment %d: file is there already: %w", info.seq, trivet.ErrCorrupt)
	}
	f, err := l.opts.fs.OpenReadWrite(path, writeCategory)
	if err != nil {
		return err
	}
	// Not every filesystem can; it only spares allocations later.
	_ = f.Preallocate(0, l.opts.segmentBytes)
	_, err = f.WriteAt(info.encode(), 0)
	if err == nil {
		err = f.Sync()
	}
	if err == nil {
		err = syncDir(l.opts.fs, l.opts.dir)
	}
	if err != nil {
		return errors.Join(err, f.Close())
	}
	tail := &segmentFile{f: f, seq: info.seq, end: segmentHeader}
	l.mu.Lock()
	l.tail = tail
	l.segments = append(l.segments, tail)
	l.mu.Unlock()
	return nil
}

// removeUnused removes leading segments that hold no entry of the log. One at a time and durably,
// so that a crash leaves no gap, which would look like a lost file.
func (l *segmentLog) removeUnused() error {
	for {
		l.mu.RLock()
		seg := l.segments[0]
		keep := len(l.segments) == 1 || len(l.refs) > 0 && l.refs[0].seg.seq <= seg.seq
		l.mu.RUnlock()
		if keep {
			return nil
		}
		if err := removeFile(l.opts.fs, l.opts.dir, segmentName(seg.seq)); err != nil {
			return err
		}
		l.mu.Lock()
		l.segments = append([]*segmentFile(nil), l.segments[1:]...)
		err := seg.f.Close()
		l.mu.Unlock()
		if err != nil {
			return err
		}
	}
}

// markLoop notes the end of the log as durable whenever writes have paused: the last batch has no
// successor that would tell rot in it from a torn tail.
func (l *segmentLog) markLoop() {
	defer close(l.done)
	timer := time.NewTimer(markDelay)
	defer timer.Stop()
	for {
		select {
		case <-l.dirty:
		case <-l.stop:
			return
		}
		for before := int64(-1); ; {
			l.mu.RLock()
			now := l.tail.end
			l.mu.RUnlock()
			if now == before {
				break
			}
			before = now
			timer.Reset(markDelay)
			select {
			case <-timer.C:
			case <-l.stop:
				return
			}
		}
		if err := l.writeMark(); err != nil && l.opts.onError != nil {
			l.opts.onError(fmt.Errorf("mark the end of the log: %w", err))
		}
	}
}

func (l *segmentLog) writeMark() error {
	l.mu.RLock()
	b := put64(nil, l.tail.seq, uint64(l.tail.end))
	l.mu.RUnlock()
	return l.mark.write(b)
}

// close notes the end of the log and closes its files. It is idempotent.
func (l *segmentLog) close() error {
	l.wmu.Lock()
	defer l.wmu.Unlock()
	if l.closed {
		return nil
	}
	var err error
	if l.stop != nil {
		close(l.stop)
		<-l.done
		err = l.writeMark()
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.closed = true
	if l.mark != nil {
		err = errors.Join(err, l.mark.close())
	}
	for _, s := range l.segments {
		err = errors.Join(err, s.f.Close())
	}
	return err
}
