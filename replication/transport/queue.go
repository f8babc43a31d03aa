package transport

import (
	"context"
	"sync"

	"github.com/trivet-csi/trivet"
)

// lane is the class of a message in a sendQueue.
type lane int

const (
	laneUrgent lane = iota // heartbeats, votes, control frames; written first
	laneBulk
	laneN
)

const (
	// urgentRunMax is how many urgent frames go in a row while bulk waits.
	urgentRunMax = 64

	// quantumBytes is what a group may write before the next one's turn. It is at least the largest
	// frame, so that every turn sends something (see flow).
	quantumBytes = frameBytesMax
)

// outgoing is an encoded message on its way to the writer, of one frame or several.
type outgoing struct {
	lane  lane
	group trivet.VolumeID
	buf   []byte // from the pool

	rest    []byte // under sendQueue.mu: frames that the writer has not taken
	started bool   // under sendQueue.mu: it took one
	dropped bool   // under sendQueue.mu: no more of it is to be written
}

// piece is one frame that the writer took.
type piece struct {
	of    *outgoing
	bytes []byte
}

// flow is what one group has in the bulk lane. The flows take turns by deficit round robin (M.
// Shreedhar, G. Varghese, "Efficient fair queueing using deficit round robin", SIGCOMM 1995): each
// turn adds a quantum to what the group may write, and what it does not use for want of a frame that
// fits is kept while something is queued. So a group with a deep queue holds the others up by a
// quantum each.
type flow struct {
	queue   []*outgoing // in order
	deficit int         // bytes
	topped  bool        // the quantum of this turn was added
	used    int64       // bytes reserved, queued or not yet
}

// sendQueue holds the encoded messages of one connection until its writer takes them, bounded in bytes
// per lane, and in the bulk lane per group. In the urgent lane, and within a group, they keep their
// order. The writer takes one frame at a time, so that an urgent one waits for one frame at most.
type sendQueue struct {
	pool *bufferPool
	max  [laneN]int64 // bytes
	wake chan struct{}
	kick func() // called after something was queued; signal, or what writes at once

	mu     sync.Mutex
	urgent []*outgoing
	flows  map[trivet.VolumeID]*flow // those that use something
	turns  []*flow                   // those that have something queued; the first one's turn it is
	used   [laneN]int64              // bytes reserved, queued or not yet
	space  chan struct{}             // closed when bytes were freed; nil when nobody waits
	run    int                       // urgent frames taken in a row
}

func newSendQueue(pool *bufferPool, bulkBytesMax int64) *sendQueue {
	q := &sendQueue{
		pool: pool, max: [laneN]int64{urgentQueueBytesMax, bulkBytesMax},
		wake: make(chan struct{}, 1), flows: map[trivet.VolumeID]*flow{},
	}
	q.kick = q.signal
	return q
}

// send encodes f and queues it, waiting for room until ctx or conn end; it then returns that
// context's error. The queue does not refer to f's body afterwards.
func (q *sendQueue) send(ctx, conn context.Context, l lane, f frame) (*outgoing, error) {
	n := encodedBytes(f.msg)
	for {
		space := q.reserve(l, f.msg.Group, int64(n))
		if space == nil {
			break
		}
		select {
		case <-space:
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-conn.Done():
			return nil, conn.Err()
		}
	}
	return q.push(l, f, n), nil
}

// trySend is send without waiting. It reports whether there was room.
func (q *sendQueue) trySend(l lane, f frame) bool {
	n := encodedBytes(f.msg)
	ok := q.reserve(l, f.msg.Group, int64(n)) == nil
	if ok {
		q.push(l, f, n)
	}
	return ok
}

// mustSend is send past the bounds, for the cancel of a message that was begun: the message itself
// has its room, so there are few.
func (q *sendQueue) mustSend(l lane, f frame) {
	n := encodedBytes(f.msg)
	q.mu.Lock()
	q.takeLocked(l, f.msg.Group, int64(n))
	q.mu.Unlock()
	q.push(l, f, n)
}

// reserve takes n bytes of a lane's room and returns nil, or returns a channel that is closed when it
// is worth trying again.
func (q *sendQueue) reserve(l lane, group trivet.VolumeID, n int64) <-chan struct{} {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.hasRoomLocked(l, group, n) {
		q.takeLocked(l, group, n)
		return nil
	}
	if q.space == nil {
		q.space = make(chan struct{})
	}
	return q.space
}

// hasRoomLocked reports whether a message of n bytes may be queued. One larger than the room passes
// when the lane is empty. One group may fill half of the bulk lane only. A group that has nothing in a
// full lane may enter all the same, until the lane is full twice over: else it would wait for the
// others' queues before its turns could count.
func (q *sendQueue) hasRoomLocked(l lane, group trivet.VolumeID, n int64) bool {
	if q.used[l] == 0 {
		return true
	}
	if l == laneUrgent {
		return q.used[l]+n <= q.max[l]
	}
	f := q.flows[group]
	if f == nil {
		return q.used[l]+n <= 2*q.max[l]
	}
	return q.used[l]+n <= q.max[l] && f.used+n <= q.max[l]/2
}

func (q *sendQueue) takeLocked(l lane, group trivet.VolumeID, n int64) {
	q.used[l] += n
	if l != laneBulk {
		return
	}
	f := q.flows[group]
	if f == nil {
		f = &flow{}
		q.flows[group] = f
	}
	f.used += n
}

// push encodes f outside the lock and queues it. REQUIRES: n bytes are reserved.
func (q *sendQueue) push(l lane, f frame, n int) *outgoing {
	out := &outgoing{lane: l, group: f.msg.Group, buf: q.pool.get(n)}
	encodeMessage(out.buf, f)
	q.mu.Lock()
	out.rest = out.buf
	if l == laneUrgent {
		q.urgent = append(q.urgent, out)
	} else {
		fl := q.flows[out.group]
		if fl.queue = append(fl.queue, out); len(fl.queue) == 1 {
			q.turns = append(q.turns, fl)
		}
	}
	q.mu.Unlock()
	q.kick()
	return out
}

func (q *sendQueue) signal() {
	select {
	case q.wake <- struct{}{}:
	default: // the writer has not yet seen the last signal
	}
}

// waiting reports whether there is a frame to write.
func (q *sendQueue) waiting() bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.skipUrgentLocked()
	return len(q.urgent) > 0 || q.hasBulkLocked()
}

// abort keeps what the writer has not taken of a message from being written. It reports whether the
// writer took some of it, and whether it took all. What is queued from now on is sent after that.
func (q *sendQueue) abort(out *outgoing) (started, finished bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	finished = len(out.rest) == 0
	if !finished {
		out.dropped = true
	}
	return out.started, finished
}

// pop returns the next frame to write; of is nil when there is none. The caller gives it back with
// done, before the next pop.
func (q *sendQueue) pop() piece {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.skipUrgentLocked()
	if len(q.urgent) > 0 && (q.run < urgentRunMax || !q.hasBulkLocked()) {
		q.run++
		out := q.urgent[0]
		q.urgent[0] = nil
		q.urgent = q.urgent[1:]
		return out.takeLocked()
	}
	q.run = 0
	if !q.hasBulkLocked() {
		return piece{}
	}
	return q.popBulkLocked()
}

// hasBulkLocked makes the first of turns one with a frame to write, and reports whether there is one.
func (q *sendQueue) hasBulkLocked() bool {
	for len(q.turns) > 0 {
		f := q.turns[0]
		for len(f.queue) > 0 && f.queue[0].dropped {
			out := f.queue[0]
			f.shift()
			q.freeLocked(out)
		}
		if len(f.queue) > 0 {
			return true
		}
		q.leaveLocked()
	}
	return false
}

// popBulkLocked returns the next frame of the bulk lane. REQUIRES: hasBulkLocked.
func (q *sendQueue) popBulkLocked() piece {
	for {
		f := q.turns[0]
		if !f.topped {
			f.deficit += quantumBytes
			f.topped = true
		}
		out := f.queue[0]
		if n := len(firstFrame(out.rest)); f.deficit >= n {
			f.deficit -= n
			p := out.takeLocked()
			if len(out.rest) == 0 {
				if f.shift(); len(f.queue) == 0 {
					q.leaveLocked()
				}
			}
			return p
		}
		f.topped = false
		q.turns[0] = nil
		q.turns = append(q.turns[1:], f)
		q.hasBulkLocked()
	}
}

// leaveLocked takes the first of turns, which has nothing queued, out of them. It keeps no deficit: who
// was idle has no claim to a burst.
func (q *sendQueue) leaveLocked() {
	f := q.turns[0]
	f.deficit, f.topped = 0, false
	q.turns[0] = nil
	q.turns = q.turns[1:]
}

func (q *sendQueue) skipUrgentLocked() {
	for len(q.urgent) > 0 && q.urgent[0].dropped {
		out := q.urgent[0]
		q.urgent[0] = nil
		q.urgent = q.urgent[1:]
		q.freeLocked(out)
	}
}

func (f *flow) shift() {
	f.queue[0] = nil
	f.queue = f.queue[1:]
}

// takeLocked takes the next frame of a message.
func (o *outgoing) takeLocked() piece {
	p := piece{of: o, bytes: firstFrame(o.rest)}
	o.rest = o.rest[len(p.bytes):]
	o.started = true
	return p
}

// done gives back a frame that was written.
func (q *sendQueue) done(p piece) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if len(p.of.rest) == 0 {
		q.freeLocked(p.of)
	}
}

func (q *sendQueue) freeLocked(out *outgoing) {
	n := int64(len(out.buf))
	q.used[out.lane] -= n
	if out.lane == laneBulk {
		f := q.flows[out.group]
		if f.used -= n; f.used == 0 {
			delete(q.flows, out.group)
		}
	}
	q.pool.put(out.buf)
	out.buf = nil
	if q.space != nil {
		close(q.space)
		q.space = nil
	}
}
