package transport

import (
	"bytes"
	"context"
	"encoding/binary"
	"io"
	"runtime"
	"testing"
	"testing/synctest"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
)

func newTestQueue() *sendQueue { return newSendQueue(&bufferPool{}, 1<<20) }

// popID pops a frame and returns its header, false when there is none.
func popID(t *testing.T, q *sendQueue) (header, bool) {
	t.Helper()
	p := q.pop()
	if p.of == nil {
		return header{}, false
	}
	h, err := decodeHeader((*[frameHeaderBytes]byte)(p.bytes))
	require.NoError(t, err)
	q.done(p)
	return h, true
}

// drained pops everything and returns the IDs of the frames in order.
func drained(t *testing.T, q *sendQueue) (ids []uint64) {
	t.Helper()
	for {
		h, ok := popID(t, q)
		if !ok {
			return ids
		}
		ids = append(ids, h.id)
	}
}

// bulk is a request of a group with so many bytes.
func bulk(id uint64, group trivet.VolumeID, bodyBytes int) frame {
	return frame{typ: frameRequest, id: id, msg: Message{Group: group, Body: make([]byte, bodyBytes)}}
}

func TestQueueOrder(t *testing.T) {
	q := newTestQueue()
	for id := range uint64(3) {
		require.True(t, q.trySend(laneBulk, frame{typ: frameRequest, id: 100 + id}))
		require.True(t, q.trySend(laneUrgent, frame{typ: frameRequest, id: id}))
	}
	assert.Equal(t, []uint64{0, 1, 2, 100, 101, 102}, drained(t, q), "urgent first, each lane in order")
	assert.Zero(t, q.used)

	// Bulk is not starved by a stream of urgent frames.
	for id := range uint64(3 * urgentRunMax) {
		require.True(t, q.trySend(laneUrgent, frame{typ: frameRequest, id: id}))
	}
	require.True(t, q.trySend(laneBulk, frame{typ: frameRequest, id: 1000}))
	assert.EqualValues(t, 1000, drained(t, q)[urgentRunMax])
}

func TestQueueBounds(t *testing.T) {
	q := newTestQueue()
	require.True(t, q.trySend(laneBulk, bulk(1, 1, 2<<20)), "larger than the room, but the lane is empty")
	require.False(t, q.trySend(laneBulk, bulk(2, 1, 0)))
	require.True(t, q.trySend(laneUrgent, frame{typ: frameRequest, id: 3}), "the other lane has its own room")

	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err := q.send(ctx, t.Context(), laneBulk, bulk(4, 1, 0))
	require.ErrorIs(t, err, context.Canceled)
	_, err = q.send(t.Context(), ctx, laneBulk, bulk(5, 1, 0))
	require.ErrorIs(t, err, context.Canceled)
	first := drained(t, q)
	assert.Equal(t, []uint64{3, 1}, first[:2])
	assert.Zero(t, q.used)
	assert.Empty(t, q.flows)

	// One group fills half of the lane; those with nothing there still find room, within bounds.
	const piece = 64 << 10
	n := uint64(0)
	for ; q.trySend(laneBulk, bulk(n, 1, piece)); n++ {
	}
	assert.EqualValues(t, 7, n, "of 1 MiB")
	for g := trivet.VolumeID(2); q.trySend(laneBulk, bulk(uint64(g), g, piece)); g++ {
		n++
	}
	assert.EqualValues(t, 31, n, "of twice 1 MiB")
}

// A sender without room waits until the writer made some.
func TestQueueWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		q := newTestQueue()
		require.True(t, q.trySend(laneBulk, bulk(1, 1, fragmentBytes)))
		q.max[laneBulk] = 1
		sent := make(chan error, 1)
		go func() {
			_, err := q.send(t.Context(), t.Context(), laneBulk, bulk(2, 1, 0))
			sent <- err
		}()
		synctest.Wait()
		assert.Empty(t, sent)
		out := q.pop()
		synctest.Wait()
		assert.Empty(t, sent, "the frame being written still counts")
		q.done(out)
		require.NoError(t, <-sent)
		assert.Equal(t, []uint64{2}, drained(t, q))
	})
}

func TestQueueAbort(t *testing.T) {
	q := newTestQueue()
	a, err := q.send(t.Context(), t.Context(), laneBulk, bulk(1, 1, 0))
	require.NoError(t, err)
	b, err := q.send(t.Context(), t.Context(), laneBulk, bulk(2, 1, 0))
	require.NoError(t, err)
	u, err := q.send(t.Context(), t.Context(), laneUrgent, bulk(3, 1, 0))
	require.NoError(t, err)
	for _, out := range []*outgoing{a, u} {
		started, finished := q.abort(out)
		require.False(t, started || finished)
	}
	p := q.pop()
	require.Same(t, b, p.of)
	started, finished := q.abort(b)
	require.True(t, started && finished, "the writer has it")
	q.done(p)
	assert.Zero(t, q.used, "the room of a dropped frame is free again")
	assert.Nil(t, q.pop().of)

	// Of a message in pieces the rest is not sent, and the buffer stays until the writer is done with it.
	c, err := q.send(t.Context(), t.Context(), laneBulk, bulk(4, 1, 3*fragmentBytes))
	require.NoError(t, err)
	p = q.pop()
	started, finished = q.abort(c)
	require.True(t, started && !finished)
	assert.NotZero(t, q.used[laneBulk])
	assert.NotNil(t, c.buf)
	q.done(p)
	assert.Nil(t, q.pop().of)
	assert.Zero(t, q.used)
	q.mustSend(laneUrgent, frame{typ: frameCancel, id: 4})
	assert.Equal(t, []uint64{4}, drained(t, q))
}

// A group with 16 MiB queued holds up one that comes later by one quantum.
func TestQueueFairness(t *testing.T) {
	q := newSendQueue(&bufferPool{}, 64<<20)
	const a, b, c = trivet.VolumeID(1), trivet.VolumeID(2), trivet.VolumeID(3)
	for id := range uint64(16) {
		require.True(t, q.trySend(laneBulk, bulk(id, a, 1<<20)))
	}
	_, ok := popID(t, q)
	require.True(t, ok)
	require.True(t, q.trySend(laneBulk, bulk(100, b, 4<<10)))
	require.True(t, q.trySend(laneBulk, bulk(200, c, 4<<10)))
	before := 0
	for {
		h, ok := popID(t, q)
		require.True(t, ok)
		if h.id == 100 {
			break
		}
		require.Equal(t, a, h.group)
		before += h.pieceN
	}
	assert.LessOrEqual(t, before, quantumBytes)
	h, _ := popID(t, q)
	assert.EqualValues(t, 200, h.id)
	assert.Len(t, q.turns, 1)

	// Bytes count, not frames: a group of small frames gets as much as one of large ones.
	sent := map[trivet.VolumeID]int{}
	for id := range uint64(1000) {
		require.True(t, q.trySend(laneBulk, bulk(1000+id, b, 4<<10)))
	}
	for range 300 {
		h, ok := popID(t, q)
		require.True(t, ok)
		sent[h.group] += h.pieceN
	}
	assert.InDelta(t, sent[a], sent[b], 2*quantumBytes)
	assert.Greater(t, sent[b], 1<<20)

	// Within a group, order is kept to the end.
	var last uint64
	for {
		h, ok := popID(t, q)
		if !ok {
			break
		}
		if h.group == a {
			require.GreaterOrEqual(t, h.id, last)
			last = h.id
		}
	}
	assert.EqualValues(t, 15, last)
	assert.Empty(t, q.flows)
	assert.Zero(t, q.used)
}

// An urgent frame waits for the frame that is being written, not for its message.
func TestQueueUrgentOvertakesPieces(t *testing.T) {
	q := newTestQueue()
	require.True(t, q.trySend(laneBulk, bulk(1, 1, 1<<20)))
	for range 3 {
		p := q.pop()
		assert.LessOrEqual(t, len(p.bytes), frameBytesMax)
		q.done(p)
	}
	require.True(t, q.trySend(laneUrgent, frame{typ: frameRequest, id: 2}))
	h, _ := popID(t, q)
	assert.EqualValues(t, 2, h.id)
	assert.Len(t, drained(t, q), 16-3)
}

// interleave writes the frames of messages in turn.
func interleave(messages ...[]byte) (out []byte) {
	for more := true; more; {
		more = false
		for i, m := range messages {
			if len(m) > 0 {
				f := firstFrame(m)
				out, messages[i], more = append(out, f...), m[len(f):], true
			}
		}
	}
	return out
}

func TestAssemble(t *testing.T) {
	long := func(id uint64, n int) frame {
		body := bytes.Repeat([]byte{byte(id), 1, 2}, n/3+1)[:n]
		return frame{typ: frameReply, id: id, msg: Message{Kind: 9, Group: 8, From: "x", To: "yy", Body: body}}
	}
	want := []frame{
		long(1, 3*fragmentBytes), long(2, fragmentBytes+1), long(3, 10), long(4, MessageBytesMax-frameHeaderBytes-3),
		long(5, fragmentBytes),
	}
	var all [][]byte
	for _, f := range want {
		all = append(all, encoded(f))
	}
	stream := interleave(all...)
	counted := 0
	r := newFrameReader(bytes.NewReader(stream), takeAll, func(n int) { counted += n })
	got := map[uint64]frame{}
	for range want {
		f, err := r.next()
		require.NoError(t, err)
		got[f.id] = f
	}
	for _, f := range want {
		assert.True(t, assert.ObjectsAreEqual(f, got[f.id]), "message %d", f.id)
	}
	assert.Equal(t, len(stream), counted)
	assert.Empty(t, r.parts)
	assert.Zero(t, r.bytes)
}

// What does not fit to its message is a bad frame.
func TestAssembleRefuses(t *testing.T) {
	f := bulk(1, 2, 3*fragmentBytes)
	good := encoded(f)
	n := len(firstFrame(good))
	first, second := good[:n], firstFrame(good[n:])
	third := good[n+len(second):]
	reseal := func(b []byte, change func(b []byte)) []byte {
		b = bytes.Clone(b)
		change(b)
		be := binary.BigEndian
		be.PutUint32(b[4:], frameCRC(b[:frameHeaderBytes], b[frameHeaderBytes:]))
		return b
	}
	word := func(v uint32) func([]byte) {
		return func(b []byte) { binary.BigEndian.PutUint32(b[frameHeaderBytes:], v) }
	}
	shorter := reseal(second[:len(second)-1], func(b []byte) { binary.BigEndian.PutUint32(b, uint32(len(b))) })
	for name, stream := range map[string][]byte{
		"unknown message":       second,
		"finished message":      append(bytes.Clone(good), third...),
		"out of order":          append(bytes.Clone(first), third...),
		"offset wrong":          append(bytes.Clone(first), reseal(second, word(1))...),
		"twice":                 append(append(bytes.Clone(first), second...), second...),
		"begins again":          append(bytes.Clone(first), first...),
		"whole within":          append(bytes.Clone(first), encoded(bulk(1, 2, 5))...),
		"other group":           append(bytes.Clone(first), reseal(second, func(b []byte) { b[27]++ })...),
		"other kind":            append(bytes.Clone(first), reseal(second, func(b []byte) { b[9]++ })...),
		"overlong":              reseal(first, word(MessageBytesMax)),
		"4 GiB":                 reseal(first, word(1<<32-1)),
		"no need for fragments": reseal(first, word(fragmentBytes)),
		"short piece":           append(bytes.Clone(first), shorter...),
		"corrupt piece": append(bytes.Clone(first), func() []byte {
			b := bytes.Clone(second)
			b[len(b)-1] ^= 1
			return b
		}()...),
		"ping in fragments": reseal(encoded(frame{typ: framePing}), func(b []byte) { b[8] |= firstPiece }),
	} {
		r := newReader(bytes.NewReader(stream))
		var err error
		for err == nil {
			_, err = r.next()
		}
		require.ErrorIs(t, err, trivet.ErrCorrupt, name)
	}

	// Too many at once.
	var many []byte
	for id := range uint64(assembliesMax + 1) {
		binary.BigEndian.PutUint64(first[12:], id)
		many = append(many, reseal(first, func([]byte) {})...)
	}
	deny := func(frame, int) (bool, error) { return false, nil }
	_, err := newFrameReader(bytes.NewReader(many), deny, func(int) {}).next()
	require.ErrorContains(t, err, "1024 messages are incomplete")
}

// Nothing is allocated for a message that begin refuses, and its pieces are swallowed.
func TestAssembleUnwanted(t *testing.T) {
	deny := func(f frame, total int) (bool, error) {
		assert.Equal(t, 8<<20-frameHeaderBytes, total)
		return false, nil
	}
	stream := interleave(encoded(bulk(1, 2, 8<<20-frameHeaderBytes)), encoded(bulk(2, 2, 5)))
	r := newFrameReader(bytes.NewReader(stream), deny, func(int) {})
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	f, err := r.next()
	require.NoError(t, err)
	assert.EqualValues(t, 2, f.id)
	_, err = r.next()
	require.Equal(t, io.EOF, err, "the other one never shows")
	runtime.ReadMemStats(&after)
	assert.Less(t, after.TotalAlloc-before.TotalAlloc, uint64(1<<20))
	assert.Empty(t, r.parts)

	// A cancel makes its message unknown.
	r = newReader(bytes.NewReader(encoded(bulk(3, 2, 2*fragmentBytes))[:frameHeaderBytes+4+fragmentBytes]))
	_, err = r.next()
	require.Equal(t, io.EOF, err)
	assert.EqualValues(t, 2*fragmentBytes, r.bytes)
	wanted, ok := r.drop(3)
	assert.True(t, wanted && ok)
	_, ok = r.drop(3)
	assert.False(t, ok)
	assert.Zero(t, r.bytes)
}

// Incomplete replies are bounded, whatever the far end announces.
func TestClientBoundsReplies(t *testing.T) {
	p := &Peers{limits: Limits{HandlerBytesMax: MessageBytesMax}}
	c := &client{stream: &stream{peers: p, in: newReader(nil)}}
	wanted, err := c.begin(frame{typ: frameReply}, MessageBytesMax)
	require.NoError(t, err)
	require.True(t, wanted)
	c.in.bytes = 1
	_, err = c.begin(frame{typ: frameReply}, MessageBytesMax)
	require.ErrorIs(t, err, trivet.ErrCorrupt)
	_, err = c.begin(frame{typ: frameRequest}, 1)
	require.ErrorIs(t, err, trivet.ErrCorrupt)
	_, err = (&server{}).begin(frame{typ: frameReply}, 1)
	require.ErrorIs(t, err, trivet.ErrCorrupt)
}
