package transport

import (
	"context"
	"math/bits"
	"sync"
)

// lane is the class of a frame in a sendQueue.
type lane int

const (
	laneUrgent lane = iota // heartbeats, votes, control frames; written first
	laneBulk
	laneN
)

// urgentRunMax is how many urgent frames go in a row while bulk waits.
const urgentRunMax = 64

// outFrame is an encoded frame on its way to the writer.
type outFrame struct {
	lane lane
	buf  []byte // from the pool

	queued  bool // under sendQueue.mu: in the queue; false once the writer took it
	dropped bool // under sendQueue.mu: not to be written
}

// sendQueue holds the encoded frames of one connection until its writer takes them, bounded in bytes
// per lane. Within a lane, frames keep their order.
type sendQueue struct {
	pool *bufferPool
	max  [laneN]int64 // bytes
	wake chan struct{}

	mu     sync.Mutex
	frames [laneN][]*outFrame
	used   [laneN]int64  // bytes reserved, queued or not yet
	space  chan struct{} // closed when bytes were freed; nil when nobody waits
	run    int           // urgent frames taken in a row
}

func newSendQueue(pool *bufferPool, bulkBytesMax int64) *sendQueue {
	return &sendQueue{
		pool: pool, max: [laneN]int64{urgentQueueBytesMax, bulkBytesMax},
		wake: make(chan struct{}, 1),
	}
}

// send encodes f and queues it, waiting for room until ctx or conn end; it then returns that
// context's error. The frame does not refer to f's body afterwards.
func (q *sendQueue) send(ctx, conn context.Context, l lane, f frame) (*outFrame, error) {
	n := frameBytes(f.msg)
	for {
		space := q.reserve(l, int64(n))
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
	n := frameBytes(f.msg)
	ok := q.reserve(l, int64(n)) == nil
	if ok {
		q.push(l, f, n)
	}
	return ok
}

// reserve takes n bytes of a lane's room and returns nil, or returns a channel that is closed when
// it is worth trying again. A frame larger than the room passes when the lane is empty.
func (q *sendQueue) reserve(l lane, n int64) <-chan struct{} {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.used[l] == 0 || q.used[l]+n <= q.max[l] {
		q.used[l] += n
		return nil
	}
	if q.space == nil {
		q.space = make(chan struct{})
	}
	return q.space
}

// push encodes f outside the lock and queues it. REQUIRES: n bytes are reserved.
func (q *sendQueue) push(l lane, f frame, n int) *outFrame {
	out := &outFrame{lane: l, buf: q.pool.get(n), queued: true}
	encodeFrame(out.buf, f)
	q.mu.Lock()
	q.frames[l] = append(q.frames[l], out)
	q.mu.Unlock()
	q.signal()
	return out
}

func (q *sendQueue) signal() {
	select {
	case q.wake <- struct{}{}:
	default: // the writer has not yet seen the last signal
	}
}

// abort takes a frame out of the queue and reports whether it was still there. If not, the writer
// has it and it is sent before anything queued from now on.
func (q *sendQueue) abort(f *outFrame) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	if f.queued {
		f.dropped = true
	}
	return f.queued
}

// pop returns the next frame to write, nil when there is none. The caller gives it back with done.
func (q *sendQueue) pop() *outFrame {
	q.mu.Lock()
	defer q.mu.Unlock()
	for {
		l := laneUrgent
		if len(q.frames[laneUrgent]) == 0 || q.run >= urgentRunMax && len(q.frames[laneBulk]) > 0 {
			l = laneBulk
		}
		if len(q.frames[l]) == 0 {
			q.run = 0
			return nil
		}
		out := q.frames[l][0]
		q.frames[l][0] = nil
		q.frames[l] = q.frames[l][1:]
		q.run++
		if l == laneBulk {
			q.run = 0
		}
		out.queued = false
		if !out.dropped {
			return out
		}
		q.freeLocked(out)
	}
}

// done gives back a frame that was written.
func (q *sendQueue) done(f *outFrame) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.freeLocked(f)
}

func (q *sendQueue) freeLocked(f *outFrame) {
	q.used[f.lane] -= int64(len(f.buf))
	q.pool.put(f.buf)
	f.buf = nil
	if q.space != nil {
		close(q.space)
		q.space = nil
	}
}

// bufferPool keeps buffers for outgoing frames, by powers of two of their size. Incoming bodies are
// not pooled: they belong to the handlers.
type bufferPool struct {
	classes [24]sync.Pool // of *[]byte; class i has buffers of 1<<i bytes
}

// bufferClassMin is the smallest class, 256 bytes: most frames without data fit.
const bufferClassMin = 8

func bufferClass(n int) int { return max(bits.Len(uint(n-1)), bufferClassMin) }

// get returns a buffer of n bytes with arbitrary content. REQUIRES: 0 < n <= MessageBytesMax.
func (p *bufferPool) get(n int) []byte {
	c := bufferClass(n)
	if b, ok := p.classes[c].Get().(*[]byte); ok {
		return (*b)[:n]
	}
	return make([]byte, n, 1<<c)
}

// put takes back a buffer of get.
func (p *bufferPool) put(b []byte) {
	full := b[:cap(b)]
	p.classes[bufferClass(cap(b))].Put(&full)
}
