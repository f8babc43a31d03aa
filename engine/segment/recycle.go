package segment

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"syscall"
	"time"

	"github.com/trivet-csi/trivet"
)

// keepRecent is how many segments before the current one are never emptied by carrying entries forward:
// most of what they hold will be trimmed soon.
const keepRecent = 2

// prepareEvery is how often at most a full disk is asked again for a new file by entries that it refuses.
const prepareEvery = time.Second

// admitLocked returns once so many bytes of entries are sure to find a place, ErrNoSpace when there is no room
// for the file that they would need. So a full disk refuses entries while the log still works: what trims
// it, terms and votes have an eighth of a segment to themselves, and garbage is recycled (H26).
func (l *lane) admitLocked(bytes int64) error {
	for {
		if err := l.usableLocked(); err != nil {
			return err
		}
		if l.fitsLocked(bytes) {
			return nil
		}
		l.collectLocked()
		switch full := errors.Is(l.prepareErr, syscall.ENOSPC) || errors.Is(l.prepareErr, syscall.EDQUOT); {
		case l.fitsLocked(bytes):
			return nil
		case l.preparing:
			l.room.Wait()
		case full && time.Since(l.preparedAt) < prepareEvery:
			return fmt.Errorf("lane %d: %v: %w", l.id, l.prepareErr, trivet.ErrNoSpace)
		case l.prepareErr != nil && !full:
			return nil // the writer tries again, and fails for good
		default:
			l.prepareLocked(l.begun)
		}
	}
}

// fitsLocked reports that the current segment and the files that are ready have room for what waits and for
// so many bytes more. Of a new segment it counts what checkpoint, carried entries and a last batch that does not
// fit leave.
func (l *lane) fitsLocked(bytes int64) bool {
	size := l.log.shape.segmentBytes
	each := size - pageBytes - alignUp(l.checkpointBytesLocked(0), pageBytes) - size/8 - size/4
	room := int64(len(l.free)) * max(each, 0)
	if l.begun {
		room += size - l.pos
	}
	return l.takenBytes+l.queueBytes+bytes+2*pageBytes <= room-size/8
}

// roll begins the next segment. Until its header and checkpoint are durable the one before stays whole and
// is what recovery finds; from then on recovery needs this one only.
func (l *lane) roll() error {
	next, err := l.takeFree()
	if err != nil {
		return fmt.Errorf("lane %d: new segment: %w", l.id, err)
	}
	h := segmentHeader{lane: uint32(l.id), number: l.cur.number + 1, incarnation: l.log.incarnation(), prevEnd: l.pos}
	pos, err := activate(next.file, l.log.shape, h, l.checkpoint())
	if err != nil {
		return fmt.Errorf("lane %d: %w", l.id, err)
	}
	seg := &segment{slot: *next, number: h.number, incarnation: h.incarnation}
	l.mu.Lock()
	l.segments[seg.number], l.cur, l.pos, l.begun = seg, seg, pos, true
	l.collectable = true
	l.stats.Rolls++
	l.stats.WrittenBytes += pos
	l.mu.Unlock()
	l.marked = true // the checkpoint says all that was before
	return l.carryForward()
}

// checkpoint returns the durable states of all groups. The writer alone changes them, so they stay as they
// are until it has written the checkpoint.
func (l *lane) checkpoint() []groupCheckpoint {
	l.mu.Lock()
	defer l.mu.Unlock()
	var out []groupCheckpoint
	for id, g := range l.groups {
		if !g.durable.pristine() {
			out = append(out, groupCheckpoint{group: id, state: g.durable})
		}
	}
	slices.SortFunc(out, func(a, b groupCheckpoint) int { return cmp.Compare(a.group, b.group) })
	return out
}

// takeFree returns a file for the next segment: a recycled one, else a new one. What failed while nobody
// waited for it is tried once more, without asking for room: a disk was full.
func (l *lane) takeFree() (*slot, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for tried := false; ; {
		l.collectLocked()
		switch {
		case len(l.free) > 0:
			s := l.free[0]
			l.free = l.free[1:]
			l.unusedN = min(l.unusedN, len(l.free))
			return s, nil
		case l.preparing:
		case tried:
			return nil, l.prepareErr
		default:
			tried = true
			l.prepareLocked(false)
		}
		l.room.Wait()
	}
}

// collectLocked frees the files of segments that hold no entry of a durable state and that nobody pins.
// The states in memory are those that recovery would find, so it does not need the files either.
func (l *lane) collectLocked() {
	if !l.collectable || l.hold {
		return
	}
	l.collectable = false
	var gone []*segment
	for _, s := range l.segments {
		if s.live == 0 && s.pins == 0 && s != l.cur {
			gone = append(gone, s)
		}
	}
	slices.SortFunc(gone, func(a, b *segment) int { return cmp.Compare(a.number, b.number) })
	for _, s := range gone {
		delete(l.segments, s.number)
		l.free = append(l.free, &slot{name: s.name, file: s.file})
	}
	l.stats.Recycled += int64(len(gone))
}

// prepareAheadLocked has a file made before the current segment is full, when none can be recycled: to write
// 64 MiB of zeroes takes longer than anybody should wait for an append.
func (l *lane) prepareAheadLocked() {
	if l.pos < l.log.shape.segmentBytes/2 || l.closed {
		return
	}
	if l.collectLocked(); len(l.free) == 0 {
		l.prepareLocked(true)
	}
}

// prepareLocked starts the making of a file, if that is not under way, and if there is room for it where it asks.
func (l *lane) prepareLocked(ask bool) {
	if l.preparing {
		return
	}
	l.preparing = true
	var name string
	if n := len(l.broken); n > 0 {
		name, l.broken = l.broken[n-1], l.broken[:n-1]
	} else {
		name = slotName(l.id, l.slots)
		l.slots++
	}
	l.log.wg.Go(func() {
		f, err := l.makeFile(name, ask)
		l.mu.Lock()
		defer l.mu.Unlock()
		if err != nil {
			err = fmt.Errorf("create %s: %w", name, err)
			l.broken = append(l.broken, name)
		} else {
			l.free = append(l.free, &slot{name: name, file: f})
		}
		l.preparing, l.prepareErr, l.preparedAt = false, err, time.Now()
		l.room.Broadcast()
	})
}

func (l *lane) makeFile(name string, ask bool) (File, error) {
	size := l.log.shape.segmentBytes
	if room := l.log.opts.Room; ask && room != nil {
		if err := room(size); err != nil {
			return nil, err
		}
	}
	return l.log.opts.Dir.Create(name, size)
}

// carryForward copies the few entries that keep old segments from being recycled into the new one, so that
// a group that stays behind does not hold a whole segment for each of its entries. The copies are records of
// the log; when they are durable the old places are not needed any more, and a crash before that leaves the
// old ones in force. What cannot be read stays where it is: damage is never spread, nor dropped.
func (l *lane) carryForward() error {
	var reqs []*request
	var records []*record
	for _, c := range l.carryCandidates() {
		r, err := l.readRecord(c.seg, c.where)
		l.mu.Lock()
		l.unpinLocked(c.seg)
		l.mu.Unlock()
		if err != nil || r.group != c.group.id || r.index != c.index || r.term != c.at.term {
			continue
		}
		r.kind = kindMove
		records = append(records, r)
		if _, total := batchBytes(records); total > l.log.shape.appendMax() || l.pos+total > l.log.shape.segmentBytes {
			records = records[:len(records)-1]
			continue
		}
		reqs = append(reqs, &request{group: c.group, records: []*record{r}, refs: []*ref{c.at}})
	}
	if len(reqs) == 0 {
		return nil
	}
	_, total := batchBytes(records)
	return l.writeBatch(reqs, records, total)
}

// carried is an entry that should move.
type carried struct {
	group *Group
	index uint64
	at    *ref
	where place
	seg   *segment // pinned
}

// carryCandidates chooses the entries of the emptiest old segments, up to carryMax bytes, and pins their
// segments once for each.
func (l *lane) carryCandidates() []carried {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.hold {
		return nil
	}
	var old []*segment
	for _, s := range l.segments {
		if s.live > 0 && s.pins == 0 && s.number+keepRecent < l.cur.number {
			old = append(old, s)
		}
	}
	slices.SortFunc(old, func(a, b *segment) int {
		return cmp.Or(cmp.Compare(a.liveBytes, b.liveBytes), cmp.Compare(a.number, b.number))
	})
	budget := l.log.shape.carryMax()
	chosen := map[uint64]*segment{}
	for _, s := range old {
		if budget -= s.liveBytes; budget < 0 {
			break
		}
		chosen[s.number] = s
	}
	var out []carried
	if len(chosen) == 0 {
		return nil
	}
	for _, g := range l.groups {
		for i, at := range g.durable.refs {
			if s := chosen[at.at.number]; s != nil {
				s.pins++
				out = append(out, carried{group: g, index: g.durable.first + uint64(i), at: at, where: at.at, seg: s})
			}
		}
	}
	slices.SortFunc(out, func(a, b carried) int {
		return cmp.Or(cmp.Compare(a.group.id, b.group.id), cmp.Compare(a.index, b.index))
	})
	return out
}

func (l *lane) unpinLocked(s *segment) {
	if s.pins == 0 {
		panic(fmt.Sprintf("segment: segment %d of lane %d is unpinned too often", s.number, l.id))
	}
	if s.pins--; s.pins == 0 {
		l.collectable = true
	}
}

// closeFiles closes all files. The writer and the makers of files have ended.
func (l *lane) closeFiles() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	var err error
	for _, s := range l.segments {
		err = errors.Join(err, s.file.Close())
	}
	for _, s := range l.free {
		err = errors.Join(err, s.file.Close())
	}
	return err
}
