package segment

import (
	"fmt"
	"math"
	"slices"
	"sync"
	"time"

	"github.com/trivet-csi/trivet"
)

// markDelay is how long a lane stays idle before it marks its end as durable. With the write of the mark
// it stays below the 100 ms in which rot of the last batch passes for a torn tail.
const markDelay = 50 * time.Millisecond

// batchBytesMax bounds a group commit, so that a burst does not make one flush that everybody waits for. A single
// larger Append goes alone.
const batchBytesMax = 8 << 20

// buffersRetainedN is how many requests or records the buffers of a lane may have room for, to be kept for the next
// batch.
const buffersRetainedN = 4 << 10

// lane is a chain of segments with one writer at a time. What is queued while a batch is flushed goes into the
// next one (group commit).
type lane struct {
	log  *Log
	id   int
	wake chan struct{} // holds one token
	turn chan struct{} // holds a token while somebody is the writer: run, or who waits for its own append
	idle *time.Timer   // until the end is marked
	room *sync.Cond    // of mu: the queue got shorter, a new file is there or failed, or the lane ended

	// The writer's own. It changes pos and begun with mu.
	buf    []byte
	pos    int64      // end of the batches in cur: all before it is durable
	marked bool       // nothing was written since the end was marked
	begun  bool       // cur was begun by this process
	taken  []*request // buffers of a batch
	batch  []*record
	places []place

	mu         sync.Mutex // held briefly, never over disk I/O
	closed     bool
	hold       bool
	queue      []*request
	queueBytes int64
	takenBytes int64 // of requests that were taken from the queue and are not answered yet
	writing    bool  // there are such
	groups     map[trivet.VolumeID]*Group
	entriesN   int64 // accepted

	segments    map[uint64]*segment // by number
	cur         *segment
	free        []*slot  // files without a segment
	unusedN     int      // the fewest of them since the last giveUp
	broken      []string // names of files that a crash left unfinished
	slots       uint64   // every slot number is below it
	preparing   bool     // a file is being made
	prepareErr  error    // of the last one
	preparedAt  time.Time
	collectable bool // a segment may have become free

	fifo       []*ref // of entries in memory, oldest first, from gone on; those without an entry count as gone
	gone       int    // the first of fifo
	cachedN    int
	cacheBytes int64
	stats      LaneStats
}

// slot is a file that may become a segment.
type slot struct {
	name string
	file File
}

// segment is a file with a part of the log. Fields below the blank line are guarded by the lane's mu.
type segment struct {
	slot
	number, incarnation uint64

	live      int   // entries of durable states that stand in it
	liveBytes int64 // of them
	pins      int
}

// request is one call: its records go into one batch.
type request struct {
	group   *Group
	records []*record
	refs    []*ref // of the records that carry an entry, nil of the others
	head    int64  // bytes of the records in a batch, without payload
	payload int64  // bytes
	ticket  Ticket
	stored  *Place // of blocks without an entry: where they came to stand, pinned

	first   record     // the memory of the first record, which an entry in memory keeps
	own     [2]*record // of records and refs, while they are few
	ownRefs [2]*ref
}

func newLane(log *Log, id int) *lane {
	l := &lane{
		log: log, id: id, wake: make(chan struct{}, 1), turn: make(chan struct{}, 1), idle: time.NewTimer(markDelay),
		groups: map[trivet.VolumeID]*Group{}, segments: map[uint64]*segment{}, hold: log.opts.Hold, collectable: true,
	}
	l.room = sync.NewCond(&l.mu)
	return l
}

func (l *lane) groupLocked(id trivet.VolumeID) *Group {
	g := l.groups[id]
	if g == nil {
		g = &Group{id: id, lane: l, accepted: newState(), durable: newState()}
		l.groups[id] = g
	}
	return g
}

// usableLocked returns why nothing can be done any more.
func (l *lane) usableLocked() error {
	if err := l.log.failure(); err != nil {
		return err
	}
	if l.closed {
		return fmt.Errorf("segment log: %w", trivet.ErrClosed)
	}
	return nil
}

func (l *lane) wakeUp() {
	select {
	case l.wake <- struct{}{}:
	default:
	}
}

// wakeAll lets everybody see that the log has failed.
func (l *lane) wakeAll() {
	l.mu.Lock()
	l.room.Broadcast()
	l.mu.Unlock()
	l.wakeUp()
}

// waitRoomLocked waits until the queue is below its bound. A request larger than the bound goes alone.
func (l *lane) waitRoomLocked() error {
	limit := l.log.opts.QueueBytes / int64(len(l.log.lanes))
	for {
		if err := l.usableLocked(); err != nil {
			return err
		}
		if l.queueBytes <= limit || len(l.queue) == 0 {
			return nil
		}
		l.room.Wait()
	}
}

// checkpointBytesLocked bounds the checkpoint of a segment that begins when so many entries more are there.
func (l *lane) checkpointBytesLocked(entriesN int64) int64 {
	return checkpointHeaderBytes + int64(len(l.groups))*groupBytesMax + (l.entriesN+entriesN)*entryRefBytes
}

// roomForLocked returns ErrNoSpace when the checkpoint of a new segment could not hold more entries. Entries
// leave a sixteenth to terms and votes of new groups.
func (l *lane) roomForLocked(entriesN int64) error {
	limit := l.log.shape.checkpointMax()
	if entriesN > 0 {
		limit -= limit / 16
	}
	if l.checkpointBytesLocked(entriesN) > limit {
		return fmt.Errorf("lane %d holds %d entries of %d groups, trim some: %w",
			l.id, l.entriesN, len(l.groups), trivet.ErrNoSpace)
	}
	return nil
}

// acceptLocked takes a checked request: from here on readers see it. Whoever calls sees to it that a writer does,
// by wakeUp or commitNow.
func (l *lane) acceptLocked(req *request) {
	for i, r := range req.records {
		at, g := req.refs[i], req.group
		if g == nil {
			continue
		}
		if at != nil {
			l.forgetLocked(at) // of one that is mended
			at.entry = r
			l.fifo = append(l.fifo, at)
			l.cachedN++
			l.cacheBytes += int64(len(r.data) + len(r.payload))
		}
		before := len(g.accepted.refs)
		for _, d := range g.accepted.apply(r, at) {
			l.forgetLocked(d)
		}
		l.entriesN += int64(len(g.accepted.refs) - before)
	}
	for _, r := range req.records {
		req.head, req.payload = req.head+r.headBytes(), req.payload+int64(len(r.payload))
	}
	l.queue = append(l.queue, req)
	l.queueBytes += req.head + req.payload
}

// forgetLocked drops the content of an entry from memory. It hangs on the entry, not on its index, so an
// entry that took the place of another can never be answered with the older one (cockroach #63302).
func (l *lane) forgetLocked(at *ref) {
	if at.entry != nil {
		l.cacheBytes -= int64(len(at.entry.data) + len(at.entry.payload))
		l.cachedN--
		at.entry = nil
	}
}

// evictLocked brings the memory of durable entries below its bound.
func (l *lane) evictLocked() {
	limit := l.log.opts.CacheBytes / int64(len(l.log.lanes))
	for l.gone < len(l.fifo) {
		at := l.fifo[l.gone]
		if at.entry != nil && (l.cacheBytes <= limit || !at.durable) {
			break
		}
		l.forgetLocked(at)
		l.gone++
	}
	switch {
	case len(l.fifo)-l.gone > 2*l.cachedN+1024:
		l.fifo, l.gone = slices.DeleteFunc(l.fifo, func(at *ref) bool { return at.entry == nil }), 0
	case 2*l.gone >= len(l.fifo): // not each time: what stays is moved
		l.fifo, l.gone = slices.Delete(l.fifo, 0, l.gone), 0
	}
}

// start begins to make a file for the first write, and starts the writer.
func (l *lane) start() {
	l.mu.Lock()
	if l.collectLocked(); len(l.free) == 0 && !l.hold {
		l.prepareLocked(false) // before anybody writes, who would make one of his own
	}
	l.mu.Unlock()
	l.log.wg.Go(l.run)
}

// run is the writer for whoever does not wait, or came while another one wrote.
func (l *lane) run() {
	defer l.idle.Stop()
	for {
		stopping := false
		select {
		case <-l.log.stop:
			stopping = true
		default:
		}
		l.turn <- struct{}{}
		for wrote := true; wrote; {
			wrote = l.commitSome()
		}
		if stopping {
			l.mark() // and the turn is nobody's any more
			return
		}
		<-l.turn
		select {
		case <-l.wake:
		case <-l.idle.C:
			l.markIdle()
		case <-l.log.stop:
		}
	}
}

// commitNow has what is queued written by the calling goroutine, which is going to wait for it anyway, if no batch is
// being written: to wake the writer, and to be woken by it, costs more than a small batch. Else the writer does it.
func (l *lane) commitNow() {
	select {
	case l.turn <- struct{}{}:
	default:
		l.wakeUp()
		return
	}
	l.commitSome()
	<-l.turn
	l.mu.Lock()
	more := len(l.queue) > 0
	l.mu.Unlock()
	if more { // it came meanwhile, and may have found the turn taken, or did not fit
		l.wakeUp()
	}
}

// commitSome commits one batch of what is queued, and reports whether there was anything. REQUIRES: the turn.
func (l *lane) commitSome() bool {
	reqs := l.take()
	if len(reqs) == 0 {
		return false
	}
	l.commit(reqs)
	l.releaseBuffers()
	l.idle.Reset(markDelay)
	return true
}

// releaseBuffers lets go of what a batch was made of, and of buffers that a large one made large. REQUIRES: the turn.
func (l *lane) releaseBuffers() {
	clear(l.taken)
	clear(l.batch)
	l.taken, l.batch = l.taken[:0], l.batch[:0]
	if cap(l.taken) > buffersRetainedN || cap(l.batch) > buffersRetainedN {
		l.taken, l.batch, l.places = nil, nil, nil
	}
}

// take returns the oldest requests of the queue, as many as fit into one batch. They are the buffer's, until the next
// take. REQUIRES: the turn.
func (l *lane) take() []*request {
	l.mu.Lock()
	defer l.mu.Unlock()
	n, head, payload, bytes := 0, int64(batchHeaderBytes), int64(0), int64(0)
	limit := min(l.log.shape.appendMax(), batchBytesMax)
	for ; n < len(l.queue); n++ {
		req := l.queue[n]
		head, payload = head+req.head, payload+req.payload
		if n > 0 && alignUp(head, pageBytes)+payload > limit {
			break
		}
		bytes += req.head + req.payload
	}
	l.taken = append(l.taken[:0], l.queue[:n]...)
	if l.queue = slices.Delete(l.queue, 0, n); len(l.queue) == 0 && cap(l.queue) > buffersRetainedN {
		l.queue = nil
	}
	l.queueBytes -= bytes
	l.takenBytes, l.writing = bytes, n > 0
	l.room.Broadcast()
	return l.taken
}

// commit makes requests durable and answers them.
func (l *lane) commit(reqs []*request) {
	err := l.log.failure()
	if err == nil {
		if err = l.write(reqs); err != nil {
			err = l.log.fail(err)
		}
	}
	l.mu.Lock()
	l.takenBytes, l.writing = 0, false // first: whoever is answered must not be refused room that this batch takes twice
	l.mu.Unlock()
	for _, req := range reqs {
		req.ticket.finish(err)
	}
}

// held tells that the mark must wait for Release: it would need a new file, with each restart one more.
func (l *lane) held() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.hold && !l.begun
}

// markIdle marks the end, unless that must wait.
func (l *lane) markIdle() {
	if l.held() {
		return
	}
	l.turn <- struct{}{}
	l.mark()
	<-l.turn
}

// mark writes the end mark of a lane that is idle. REQUIRES: the turn.
func (l *lane) mark() {
	if l.marked || l.log.failure() != nil {
		return
	}
	if err := l.write(nil); err != nil {
		_ = l.log.fail(err) // nobody waits for a mark
	}
}

// write writes one batch, flushes it, and brings the durable state up to it. A new segment is begun when
// the batch does not fit, and for the first one after Open: where the log ends, remains of a torn batch may
// stand, and if another batch were torn over them, sectors of both could pass for a whole one.
func (l *lane) write(reqs []*request) error {
	records := l.batch[:0]
	for _, req := range reqs {
		records = append(records, req.records...)
	}
	l.batch = records
	_, total := batchBytes(records)
	if !l.begun || l.pos+total > l.log.shape.segmentBytes {
		if err := l.roll(); err != nil {
			return err
		}
	}
	if l.pos+total > l.log.shape.segmentBytes { // appendMax and checkpointMax exclude it
		panic(fmt.Sprintf("segment: batch of %d bytes at %d of a new segment", total, l.pos))
	}
	return l.writeBatch(reqs, records, total)
}

func (l *lane) writeBatch(reqs []*request, records []*record, total int64) error {
	if int64(len(l.buf)) < total {
		l.buf = alignedBytes(min(total*2, max(total, l.log.shape.appendMax())))
	}
	b := l.buf[:total]
	h := batchHeader{number: l.cur.number, incarnation: l.cur.incarnation, off: l.pos, durable: l.pos}
	l.places = encodeBatch(l.places[:0], b, h, records)
	places := l.places
	if err := writeDurable(l.cur.file, b, l.pos); err != nil {
		return fmt.Errorf("lane %d: write segment %d at %d: %w", l.id, l.cur.number, l.pos, err)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.pos += total
	l.marked = len(records) == 0
	l.stats.WrittenBytes += total
	l.stats.Flushes++
	if l.marked {
		l.stats.Marks++
	}
	for _, req := range reqs {
		for i, r := range req.records {
			if req.stored != nil {
				*req.stored = l.keepLocked(r, places[i])
				continue
			}
			l.settleLocked(req.group, r, req.refs[i], places[i])
		}
		places = places[len(req.records):]
	}
	l.evictLocked()
	l.prepareAheadLocked()
	return nil
}

// settleLocked brings the durable state of a group up to one record that stands at a place.
func (l *lane) settleLocked(g *Group, r *record, at *ref, where place) {
	switch r.kind {
	case kindEntry:
		at.at, at.durable = where, true
		l.countLocked(at, 1)
		l.stats.EntryBytes += int64(len(r.data) + len(r.payload))
	case kindMove:
		l.countLocked(at, -1)
		at.at = where
		l.countLocked(at, 1)
		l.stats.MovedBytes += where.bytes()
	}
	for _, d := range g.durable.apply(r, at) {
		l.countLocked(d, -1)
	}
}

// countLocked adds an entry to the account of its segment, or takes it off.
func (l *lane) countLocked(at *ref, n int) {
	s := l.segments[at.at.number]
	if s == nil {
		return // lost: Read says so
	}
	s.live += n
	s.liveBytes += int64(n) * at.at.bytes()
	switch {
	case s.live < 0:
		panic(fmt.Sprintf("segment: %d live entries in segment %d", s.live, s.number))
	case s.live == 0:
		l.collectable = true
	case s.live > math.MaxInt32:
		panic("segment: too many entries in a segment")
	}
}
