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

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
)

func encoded(f frame) []byte {
	b := make([]byte, encodedBytes(f.msg))
	encodeMessage(b, f)
	return b
}

// takeAll agrees to every message.
func takeAll(frame, int) (bool, error) { return true, nil }

func newReader(r io.Reader) *frameReader { return newFrameReader(r, takeAll, func(int) {}) }

// readFrame reads one message.
func readFrame(r io.Reader) (frame, error) { return newReader(r).next() }

// goldenFrames are one frame of each type, whose bytes of version 2 are in testdata.
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
		"fragments": {typ: frameReply, id: 5, msg: Message{
			Kind: KindVolumeRead, Group: 6, From: "a", To: "b", Body: bytes.Repeat([]byte{7}, fragmentBytes+9),
		}},
		"ping": {typ: framePing},
	}
}

func TestFrameGolden(t *testing.T) {
	for name, f := range goldenFrames() {
		golden(t, "frame_v2_"+name+".hex", abridged(encoded(f)))
		got, err := readFrame(bytes.NewReader(encoded(f)))
		require.NoError(t, err)
		if f.msg.Body == nil {
			f.msg.Body = []byte{}
		}
		assert.Equal(t, f, got, name)
	}
	golden(t, "preface_v2.hex", encodePreface(preface{oldest: 2, newest: 2, incarnation: 0x2122232425262728}))
}

// abridged replaces the piece of a long first frame by its first 64 bytes.
func abridged(b []byte) []byte {
	if first := firstFrame(b); len(first) > fragmentBytes {
		return append(bytes.Clone(first[:len(first)-fragmentBytes+64]), b[len(first):]...)
	}
	return b
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
		"length over limit":     change(func(b []byte) { be.PutUint32(b, frameBytesMax+1) }),
		"length 4 GiB":          change(func(b []byte) { be.PutUint32(b, 1<<32-1) }),
		"length zero":           change(func(b []byte) { be.PutUint32(b, 0) }),
		"shorter than its ids":  change(func(b []byte) { be.PutUint32(b, frameHeaderBytes+17) }),
		"type zero":             change(func(b []byte) { b[8] = 0 }),
		"unknown type":          change(func(b []byte) { b[8] = byte(frameFragment) + 1 }),
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
		// With right checksums the fuzzer gets past them.
		for _, fix := range []bool{false, true} {
			in := bytes.Clone(b)
			for rest := in; fix && len(rest) >= frameHeaderBytes; {
				n := binary.BigEndian.Uint32(rest)
				if uint64(n) > uint64(len(rest)) || n < frameHeaderBytes {
					break
				}
				binary.BigEndian.PutUint32(rest[4:], frameCRC(rest[:frameHeaderBytes], rest[frameHeaderBytes:n]))
				rest = rest[n:]
			}
			fuzzStream(t, in)
		}
	})
}

// fuzzStream reads messages until something is wrong.
func fuzzStream(t *testing.T, in []byte) {
	t.Helper()
	var agreed int64
	begin := func(_ frame, total int) (bool, error) {
		require.LessOrEqual(t, total, MessageBytesMax)
		if agreed += int64(total); agreed > 4*MessageBytesMax {
			return false, nil
		}
		return true, nil
	}
	read := 0
	r := newFrameReader(bytes.NewReader(in), begin, func(n int) { read += n })
	for {
		start := read
		got, err := r.next()
		if err != nil {
			return
		}
		require.NoError(t, checkMessage(got.msg))
		if got.typ == frameError {
			_, _ = decodeError("n1", got.msg.Body)
		}
		if out := encoded(got); read-start == len(out) {
			require.Equal(t, in[start:read], out, "what was read encodes to the same bytes")
		} else {
			require.NotEmpty(t, r.parts, "other frames came between, and those are still incomplete, or it was not alone")
		}
		if got.typ == frameCancel {
			r.drop(got.id)
		}
	}
}

func FuzzReadPreface(f *testing.F) {
	f.Add(encodePreface(preface{oldest: 2, newest: 2, incarnation: 9}))
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
	}{{2, 2, true}, {1, 9, true}, {0, 2, true}, {3, 9, false}, {0, 1, false}} {
		_, err := readPreface(bytes.NewReader(encodePreface(preface{oldest: tt.oldest, newest: tt.newest})))
		if tt.ok {
			require.NoError(t, err, "%d to %d", tt.oldest, tt.newest)
		} else {
			require.ErrorIs(t, err, trivet.ErrInvalid, "%d to %d", tt.oldest, tt.newest)
		}
	}
	good := encodePreface(preface{oldest: 2, newest: 2})
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

func TestBufferPool(t *testing.T) {
	var p bufferPool
	for _, n := range []int{1, 28, 256, 257, 4096, 1 << 20, MessageBytesMax, 2*MessageBytesMax - 1} {
		b := p.get(n)
		assert.Len(t, b, n)
		p.put(b)
		assert.Len(t, p.get(n), n)
	}
}

// A buffer has room for what it is asked for and at most a quarter more, and comes back to its own class.
func TestBufferClass(t *testing.T) {
	before := -1
	for n := 1; n < 2*MessageBytesMax; n += 1 + n/1000 {
		class, size := bufferClass(n)
		require.GreaterOrEqual(t, size, n)
		require.LessOrEqual(t, size, max(n+n/4, 256), "for %d", n)
		require.GreaterOrEqual(t, class, before)
		before = class
		again, same := bufferClass(size)
		require.Equal(t, []int{class, size}, []int{again, same}, "for %d", n)
	}
	require.Less(t, before, len(bufferPool{}.classes))
}
