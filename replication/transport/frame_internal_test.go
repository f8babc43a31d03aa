package transport

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
)

func encoded(f frame) []byte {
	b := make([]byte, frameBytes(f.msg))
	encodeFrame(b, f)
	return b
}

// goldenFrames are one frame of each type, whose bytes of version 1 are in testdata.
func goldenFrames() map[string]frame {
	return map[string]frame{
		"request": {typ: frameRequest, id: 0x0102030405060708, msg: Message{
			Kind: KindAppendEntries, Group: 0x1112131415161718, From: "replica-a", To: "replica-b", Body: []byte("entries"),
		}},
		"reply": {typ: frameReply, id: 2, msg: Message{Kind: KindVolumeRead, Group: 3, Body: []byte("data")}},
		"error": {typ: frameError, id: 3, msg: Message{
			Kind: KindVolumeWrite, Body: encodeError(fmt.Errorf("write: %w", trivet.ErrFenced)),
		}},
		"cancel": {typ: frameCancel, id: 4},
		"ping":   {typ: framePing},
	}
}

func TestFrameGolden(t *testing.T) {
	for name, f := range goldenFrames() {
		golden(t, "frame_v1_"+name+".hex", encoded(f))
		got, err := readFrame(bytes.NewReader(encoded(f)))
		require.NoError(t, err)
		if f.msg.Body == nil {
			f.msg.Body = []byte{}
		}
		assert.Equal(t, f, got, name)
	}
	golden(t, "preface_v1.hex", encodePreface(preface{oldest: 1, newest: 1, incarnation: 0x2122232425262728}))
}

// golden compares with a file in testdata, which TRIVET_GOLDEN=1 rewrites.
func golden(t *testing.T, name string, got []byte) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if os.Getenv("TRIVET_GOLDEN") != "" {
		require.NoError(t, os.WriteFile(path, []byte(hex.Dump(got)), 0o644))
	}
	want, err := os.ReadFile(path)
	require.NoError(t, err)
	assert.Equal(t, string(want), hex.Dump(got), name)
}

func TestReadFrameRefuses(t *testing.T) {
	good := encoded(goldenFrames()["request"])
	change := func(f func(b []byte)) []byte {
		b := bytes.Clone(good)
		f(b)
		return b
	}
	be := binary.BigEndian
	ping := make([]byte, 2*frameHeaderBytes)
	copy(ping, encoded(frame{typ: framePing}))
	be.PutUint32(ping, uint32(len(ping)))
	for name, b := range map[string][]byte{
		"length over limit":     change(func(b []byte) { be.PutUint32(b, MessageBytesMax+1) }),
		"length 4 GiB":          change(func(b []byte) { be.PutUint32(b, 1<<32-1) }),
		"length zero":           change(func(b []byte) { be.PutUint32(b, 0) }),
		"shorter than its ids":  change(func(b []byte) { be.PutUint32(b, frameHeaderBytes+17) }),
		"type zero":             change(func(b []byte) { b[8] = 0 }),
		"unknown type":          change(func(b []byte) { b[8] = byte(framePing) + 1 }),
		"ping with body":        ping,
		"shorter than its body": change(func(b []byte) { be.PutUint32(b, uint32(len(b)-1)) }),
	} {
		_, err := readFrame(bytes.NewReader(b))
		require.ErrorIs(t, err, trivet.ErrCorrupt, name)
	}
	for i := range good { // every single byte counts
		_, err := readFrame(bytes.NewReader(change(func(b []byte) { b[i] ^= 0x40 })))
		require.Error(t, err, "byte %d", i)
	}
	for n := range good {
		_, err := readFrame(bytes.NewReader(good[:n]))
		if n == 0 {
			require.Equal(t, io.EOF, err)
			continue
		}
		require.ErrorIs(t, err, io.ErrUnexpectedEOF, "%d bytes", n)
	}
}

// A length that is too large must be refused before anything is allocated for it.
func TestReadFrameAllocatesNothingForRefused(t *testing.T) {
	b := encoded(frame{typ: frameRequest})
	binary.BigEndian.PutUint32(b, 1<<31)
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	_, err := readFrame(bytes.NewReader(b))
	runtime.ReadMemStats(&after)
	require.ErrorIs(t, err, trivet.ErrCorrupt)
	assert.Less(t, after.TotalAlloc-before.TotalAlloc, uint64(1<<20))
}

func TestCheckMessage(t *testing.T) {
	require.NoError(t, checkMessage(Message{Body: make([]byte, MessageBytesMax-frameHeaderBytes)}))
	require.ErrorIs(t, checkMessage(Message{Body: make([]byte, MessageBytesMax-frameHeaderBytes+1)}), trivet.ErrInvalid)
	require.ErrorIs(t, checkMessage(Message{From: trivet.ReplicaID(strings.Repeat("x", 256))}), trivet.ErrInvalid)
	require.ErrorIs(t, checkMessage(Message{To: trivet.ReplicaID(strings.Repeat("x", 256))}), trivet.ErrInvalid)
}

func FuzzReadFrame(f *testing.F) {
	for _, g := range goldenFrames() {
		f.Add(encoded(g))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		// With a right checksum the fuzzer gets past it.
		for _, fix := range []bool{false, true} {
			in := bytes.Clone(b)
			if fix && len(in) >= frameHeaderBytes {
				binary.BigEndian.PutUint32(in, uint32(len(in)))
				binary.BigEndian.PutUint32(in[4:], frameCRC(in[:frameHeaderBytes], in[frameHeaderBytes:]))
			}
			got, err := readFrame(bytes.NewReader(in))
			if err != nil {
				continue
			}
			require.LessOrEqual(t, frameBytes(got.msg), len(in))
			require.Equal(t, in[:frameBytes(got.msg)], encoded(got), "what was read encodes to the same bytes")
			if got.typ == frameError {
				_, _ = decodeError("n1", got.msg.Body)
			}
		}
	})
}

func FuzzReadPreface(f *testing.F) {
	f.Add(encodePreface(preface{oldest: 1, newest: 1, incarnation: 9}))
	f.Fuzz(func(t *testing.T, b []byte) {
		p, err := readPreface(bytes.NewReader(b))
		if err == nil {
			require.Equal(t, b[:prefaceBytes], encodePreface(p))
		}
	})
}

func TestPrefaceVersions(t *testing.T) {
	for _, tt := range []struct {
		oldest, newest uint16
		ok             bool
	}{{1, 1, true}, {1, 9, true}, {0, 1, true}, {2, 9, false}, {0, 0, false}} {
		_, err := readPreface(bytes.NewReader(encodePreface(preface{oldest: tt.oldest, newest: tt.newest})))
		if tt.ok {
			require.NoError(t, err, "%d to %d", tt.oldest, tt.newest)
		} else {
			require.ErrorIs(t, err, trivet.ErrInvalid, "%d to %d", tt.oldest, tt.newest)
		}
	}
	good := encodePreface(preface{oldest: 1, newest: 1})
	for i := range good {
		b := bytes.Clone(good)
		b[i] ^= 1
		_, err := readPreface(bytes.NewReader(b))
		require.ErrorIs(t, err, trivet.ErrCorrupt, "byte %d", i)
	}
}

func TestErrorsOverWire(t *testing.T) {
	all := append([]error{}, wireSentinels[:]...)
	for i, want := range all {
		got, err := decodeError("n2", encodeError(fmt.Errorf("do it: %w", want)))
		require.NoError(t, err)
		for j, other := range all {
			assert.Equal(t, i == j, errors.Is(got, other), "%v is %v", want, other)
		}
		assert.Equal(t, "node n2: do it: "+want.Error(), got.Error())
	}
	both, err := decodeError("n2", encodeError(fmt.Errorf("%w: %w", trivet.ErrNotLeader, context.Canceled)))
	require.NoError(t, err)
	require.ErrorIs(t, both, trivet.ErrNotLeader)
	require.ErrorIs(t, both, context.Canceled)

	// An error is passed on, over a second hop, with its sentinel.
	again, err := decodeError("n3", encodeError(both))
	require.NoError(t, err)
	require.ErrorIs(t, again, trivet.ErrNotLeader)

	long, err := decodeError("n2", encodeError(errors.New(strings.Repeat("é", errorTextBytesMax)+"\xff")))
	require.NoError(t, err)
	assert.LessOrEqual(t, len(long.Text), errorTextBytesMax)
	assert.NotContains(t, long.Text, "\uFFFD", "cut between characters")
	_, err = decodeError("n2", []byte{0, 0, 0})
	require.ErrorIs(t, err, trivet.ErrCorrupt)
}

// Every sentinel of the root package has a place in the wire format.
func TestWireSentinelsAreComplete(t *testing.T) {
	file, err := parser.ParseFile(token.NewFileSet(), filepath.Join("..", "..", "errors.go"), nil, 0)
	require.NoError(t, err)
	n := 0
	ast.Inspect(file, func(node ast.Node) bool {
		if spec, ok := node.(*ast.ValueSpec); ok && strings.HasPrefix(spec.Names[0].Name, "Err") {
			n++
		}
		return true
	})
	assert.Len(t, wireSentinels, n+2, "the sentinels of errors.go and two of context")
}

func newTestQueue() *sendQueue { return newSendQueue(&bufferPool{}, 1<<20) }

// drained pops everything and returns the IDs of the frames in order.
func drained(t *testing.T, q *sendQueue) (ids []uint64) {
	t.Helper()
	for {
		out := q.pop()
		if out == nil {
			return ids
		}
		f, err := readFrame(bytes.NewReader(out.buf))
		require.NoError(t, err)
		ids = append(ids, f.id)
		q.done(out)
	}
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
	big := frame{typ: frameRequest, id: 1, msg: Message{Body: make([]byte, 2<<20)}}
	require.True(t, q.trySend(laneBulk, big), "larger than the room, but the lane is empty")
	require.False(t, q.trySend(laneBulk, frame{typ: frameRequest, id: 2}))
	require.True(t, q.trySend(laneUrgent, frame{typ: frameRequest, id: 3}), "the other lane has its own room")

	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err := q.send(ctx, t.Context(), laneBulk, frame{typ: frameRequest})
	require.ErrorIs(t, err, context.Canceled)
	_, err = q.send(t.Context(), ctx, laneBulk, frame{typ: frameRequest})
	require.ErrorIs(t, err, context.Canceled)

	assert.Equal(t, []uint64{3, 1}, drained(t, q))
}

// A sender without room waits until the writer made some.
func TestQueueWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		q := newTestQueue()
		big := frame{typ: frameRequest, id: 1, msg: Message{Body: make([]byte, 1<<20)}}
		require.True(t, q.trySend(laneBulk, big))
		sent := make(chan error, 1)
		go func() {
			_, err := q.send(t.Context(), t.Context(), laneBulk, frame{typ: frameRequest, id: 2})
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
	a, err := q.send(t.Context(), t.Context(), laneBulk, frame{typ: frameRequest, id: 1})
	require.NoError(t, err)
	b, err := q.send(t.Context(), t.Context(), laneBulk, frame{typ: frameRequest, id: 2})
	require.NoError(t, err)
	require.True(t, q.abort(a))
	require.Same(t, b, q.pop())
	require.False(t, q.abort(b), "the writer has it")
	q.done(b)
	assert.Zero(t, q.used, "the room of a dropped frame is free again")
	assert.Nil(t, q.pop())
}

func TestBufferPool(t *testing.T) {
	var p bufferPool
	for _, n := range []int{1, 28, 256, 257, 4096, 1 << 20, MessageBytesMax} {
		b := p.get(n)
		assert.Len(t, b, n)
		p.put(b)
		assert.Len(t, p.get(n), n)
	}
}
