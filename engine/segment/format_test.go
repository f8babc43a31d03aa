package segment

import (
	"encoding/hex"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
)

var rewrite = flag.Bool("rewrite", false, "write the golden files anew")

// dump is hex.Dump without the lines of zeroes.
func dump(b []byte) string {
	var out strings.Builder
	for line := range strings.Lines(hex.Dump(b)) {
		if !strings.Contains(line, strings.Repeat("00 ", 8)+" "+strings.Repeat("00 ", 8)) {
			out.WriteString(line)
		}
	}
	fmt.Fprintf(&out, "%d bytes\n", len(b))
	return out.String()
}

// golden compares bytes with a file of testdata, which holds them in hex.
func golden(t *testing.T, name string, got []byte) []byte {
	t.Helper()
	path := filepath.Join("testdata", name+".hex")
	if *rewrite {
		require.NoError(t, os.WriteFile(path, []byte(dump(got)), 0o600))
	}
	text, err := os.ReadFile(path)
	require.NoError(t, err)
	require.Equal(t, string(text), dump(got))
	return got
}

func goldenHeader() segmentHeader {
	disk, _ := parseDisk(testDisk)
	return segmentHeader{
		disk: disk, lane: 1, lanes: 4, number: 0x0102, incarnation: 0x1122334455667788, segmentBytes: 64 << 20,
		prevEnd: 0x3fff000, checkpointBytes: 136, checkpointSum: 0xaabbccdd,
	}
}

func goldenGroups() []groupCheckpoint {
	return []groupCheckpoint{
		{group: 1, state: groupState{first: 1, stable: Stable{Term: 7, VoteTerm: 6, Vote: "node-a"}}},
		{group: 0x0908070605040302, state: groupState{first: 5, refs: []*ref{
			{term: 2, typ: 1, durable: true, at: place{number: 3, off: 0x1040, head: 80, page: 2, payload: 8192}},
			{term: 7, typ: 0, durable: true, at: place{number: 4, off: 0x2040, head: 64}},
		}}},
	}
}

func goldenRecords() []*record {
	entry := &record{
		kind: kindEntry, typ: 3, group: 0x11, index: 42, term: 7, data: []byte("command"),
		blocks:  []BlockInfo{{LBA: 0x1000, CRC: 0xc0ffee00}, {LBA: 0x1001, CRC: 0xc0ffee01}},
		payload: make([]byte, 2*pageBytes),
	}
	entry.payload[0], entry.payload[2*pageBytes-1] = 0xf1, 0xf2
	moved := *entry
	moved.kind, moved.index, moved.blocks, moved.payload = kindMove, 41, nil, nil
	out := []*record{
		entry, &moved,
		{kind: kindTruncate, group: 0x11, index: 43},
		{kind: kindTrim, group: 0x11, index: 40},
		{kind: kindReset, group: 0x15, index: 100},
		{kind: kindStable, group: 0x15, index: 8, term: 9, data: []byte("node-b")},
		{kind: kindDelete, group: 0x19},
	}
	for _, r := range out {
		r.sum = bodySum(r.data, r.payload)
	}
	return out
}

func encodeGoldenBatch(records []*record) ([]byte, []place) {
	_, total := batchBytes(records)
	b := alignedBytes(total)
	h := batchHeader{number: 0x0102, incarnation: 0x1122334455667788, off: 0x3000, durable: 0x3000}
	return b, encodeBatch(nil, b, h, records)
}

// The formats of version 1, byte for byte.
func TestGoldenFormats(t *testing.T) {
	page := make([]byte, pageBytes)
	goldenHeader().encode(page)
	h, err := decodeSegmentHeader(golden(t, "header", page))
	require.NoError(t, err)
	require.Equal(t, goldenHeader(), h)

	groups, err := decodeCheckpoint(golden(t, "checkpoint", appendCheckpoint(nil, goldenGroups())))
	require.NoError(t, err)
	require.Equal(t, goldenGroups(), groups)

	b, places := encodeGoldenBatch(goldenRecords())
	checkBatch(t, golden(t, "batch", b), goldenRecords(), places)

	mark, _ := encodeGoldenBatch(nil)
	require.Len(t, mark, pageBytes)
	checkBatch(t, golden(t, "mark", mark), nil, nil)
}

func checkBatch(t *testing.T, b []byte, want []*record, places []place) {
	t.Helper()
	h, err := decodeBatchHeader(b, 0x3000, 64<<20)
	require.NoError(t, err)
	require.Equal(t, int64(0x3000), h.durable)
	got, err := decodeBatch(b, h)
	require.NoError(t, err)
	require.Len(t, got, len(want))
	for i, r := range got {
		require.NoError(t, r.bad)
		require.Equal(t, places[i], r.at)
		require.True(t, sameEntry(want[i].entry(), r.entry()))
		require.Equal(t, []any{want[i].kind, want[i].group, want[i].sum}, []any{r.kind, r.group, r.sum})
		if r.at.payload > 0 {
			require.Equal(t, want[i].payload, b[int64(r.at.page)*pageBytes-h.off:][:r.at.payload], "read in place")
		}
	}
}

// Lengths that lie, with checksums that are right.
func TestDecodersRefuse(t *testing.T) {
	page := make([]byte, pageBytes)
	for name, change := range map[string]func(h *segmentHeader){
		"no lanes":       func(h *segmentHeader) { h.lanes = 0 },
		"lane":           func(h *segmentHeader) { h.lane = 4 },
		"number":         func(h *segmentHeader) { h.number = 0 },
		"huge":           func(h *segmentHeader) { h.segmentBytes = 1 << 40 },
		"odd size":       func(h *segmentHeader) { h.segmentBytes++ },
		"odd end":        func(h *segmentHeader) { h.prevEnd = 5 },
		"end":            func(h *segmentHeader) { h.prevEnd = h.segmentBytes + pageBytes },
		"big checkpoint": func(h *segmentHeader) { h.checkpointBytes = 1 << 31 },
	} {
		h := goldenHeader()
		change(&h)
		h.encode(page)
		_, err := decodeSegmentHeader(page)
		require.ErrorIs(t, err, trivet.ErrCorrupt, name)
	}
	records := goldenRecords()
	for name, change := range map[string]func(b []byte){
		"blocks": func(b []byte) { le.PutUint32(b[32:], 1<<31) },
		"data":   func(b []byte) { le.PutUint32(b[36:], 1<<31) },
		"cut":    func(b []byte) { le.PutUint32(b[36:], dataBytesMax) },
	} {
		n := records[0].headBytes()
		b := make([]byte, n)
		records[0].encode(b, 1, place{number: 1, off: 64, page: 2, payload: 2 * pageBytes})
		change(b)
		_, _, err := decodeRecord(b, 1, 1, 64)
		require.ErrorIs(t, err, trivet.ErrCorrupt, name)
	}
	good := appendCheckpoint(nil, goldenGroups())
	for name, change := range map[string]func(b []byte) []byte{
		"groups":  func(b []byte) []byte { le.PutUint32(b, 1<<31); return b },
		"entries": func(b []byte) []byte { le.PutUint32(b[8+32:], 1<<31); return b },
		"first":   func(b []byte) []byte { le.PutUint64(b[8+8:], 0); return b },
		"vote":    func(b []byte) []byte { le.PutUint16(b[8+36:], 1<<15); return b },
		"order":   func(b []byte) []byte { le.PutUint64(b[8:], 1<<63); return b },
		"cut":     func(b []byte) []byte { return b[:len(b)-1] },
		"more":    func(b []byte) []byte { return append(b, 0) },
		"empty":   func([]byte) []byte { return nil },
	} {
		_, err := decodeCheckpoint(change(slices.Clone(good)))
		require.ErrorIs(t, err, trivet.ErrCorrupt, name)
	}
}

// What decodes encodes to the same bytes.
func FuzzSegmentHeader(f *testing.F) {
	page := make([]byte, pageBytes)
	goldenHeader().encode(page)
	f.Add(page[:segmentHeaderBytes])
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) >= segmentHeaderBytes { // or no input passes the checksum
			le.PutUint32(b[124:], checksum(b[:124]))
		}
		h, err := decodeSegmentHeader(b)
		if err != nil {
			return
		}
		clear(b[72:124])
		le.PutUint32(b[124:], checksum(b[:124]))
		out := make([]byte, pageBytes)
		h.encode(out)
		require.Equal(t, b[:segmentHeaderBytes], out[:segmentHeaderBytes])
	})
}

func FuzzCheckpoint(f *testing.F) {
	f.Add(appendCheckpoint(nil, goldenGroups()))
	f.Add(appendCheckpoint(nil, nil))
	f.Fuzz(func(t *testing.T, b []byte) {
		groups, err := decodeCheckpoint(b)
		if err != nil {
			return
		}
		again, err := decodeCheckpoint(appendCheckpoint(nil, groups))
		require.NoError(t, err)
		require.Equal(t, groups, again)
	})
}

// Any bytes as a batch and as the whole of a segment.
func FuzzBatch(f *testing.F) {
	whole, _ := encodeGoldenBatch(goldenRecords())
	mark, _ := encodeGoldenBatch(nil)
	f.Add(whole, uint16(100), uint32(7))
	f.Add(mark, uint16(0), uint32(0))
	f.Fuzz(func(t *testing.T, b []byte, at uint16, value uint32) {
		const off = 0x3000
		b = slices.Clone(b)
		if int(at)+4 <= len(b) {
			le.PutUint32(b[at:], value)
		}
		if len(b) >= batchHeaderBytes {
			le.PutUint32(b[60:], checksum(b[:60]))
		}
		h, err := decodeBatchHeader(b, off, off+int64(len(b)))
		if err != nil {
			return
		}
		records, err := decodeBatch(b, h)
		if err != nil {
			return
		}
		for _, r := range records {
			if r.bad != nil {
				return
			}
		}
		require.LessOrEqual(t, len(records), len(b)/recordHeaderBytes)
		var again []*record
		for i := range records {
			again = append(again, &records[i].record)
		}
		head, total := batchBytes(again)
		require.Equal(t, []int64{int64(h.head), int64(h.bytes)}, []int64{head, total})
		out := alignedBytes(total)
		encodeBatch(nil, out, h, again)
		got, err := decodeBatch(out, h)
		require.NoError(t, err)
		for i := range got {
			require.True(t, sameEntry(records[i].entry(), got[i].entry()))
		}
	})
}

// Any bytes in place of a segment file: refused or read, never a panic.
func FuzzOpen(f *testing.F) {
	f.Add([]byte{1}, uint16(0))
	f.Add(goldenSegment(), uint16(4096))
	f.Fuzz(func(t *testing.T, b []byte, at uint16) {
		dir := NewMemDir()
		opts := testOptions(dir, 1)
		opts.Lanes = 1
		require.NoError(t, Format(opts))
		file := dir.files[slotName(0, 0)]
		file.put(b, int64(at))
		p := *file.current[0]
		le.PutUint32(p[124:], checksum(p[:124]))
		file.put(p[:], 0)
		l, err := Open(opts)
		if err != nil {
			return
		}
		defer l.Close()
		for _, id := range l.Groups() {
			g := l.Group(id)
			first, last := g.FirstLast()
			for i := first; i <= last && i < first+100; i++ {
				_, _ = g.Read(i) // whatever it says
			}
		}
	})
}

// goldenSegment is a checkpoint and a batch as they follow a header.
func goldenSegment() []byte {
	b := make([]byte, pageBytes)
	copy(b, appendCheckpoint(nil, goldenGroups()))
	batch, _ := encodeGoldenBatch(goldenRecords())
	return slices.Concat(b, batch)
}

func TestShortSumIsChecksum(t *testing.T) {
	for n := range 32 {
		b := make([]byte, n)
		for i := range b {
			b[i] = byte(i*37 + n)
		}
		require.Equal(t, checksum(b), shortSum(b), n)
	}
}

// TestLaneKeepsNoBatch: what was written is not kept in memory by the buffers of a batch, and large ones go.
func TestLaneKeepsNoBatch(t *testing.T) {
	l, _ := newTestLog(t, func(o *Options) { o.SegmentBytes = 16 << 20 })
	g, index := l.Group(1), uint64(0)
	appendN := func(n int) {
		entries := make([]Entry, n)
		for i := range entries {
			index++
			entries[i] = Entry{Index: index, Term: 1, Data: []byte("x")}
		}
		require.NoError(t, g.Append(entries))
	}
	lane := g.lane
	for _, n := range []int{3, 1, buffersRetainedN + 1, 2} {
		appendN(n)
		lane.turn <- struct{}{}
		batch, taken := lane.batch[:cap(lane.batch)], lane.taken[:cap(lane.taken)]
		kept := slices.ContainsFunc(batch, func(r *record) bool { return r != nil }) ||
			slices.ContainsFunc(taken, func(r *request) bool { return r != nil })
		<-lane.turn
		lane.mu.Lock()
		kept = kept || slices.ContainsFunc(lane.queue[:cap(lane.queue)], func(r *request) bool { return r != nil })
		lane.mu.Unlock()
		require.False(t, kept, "after %d entries", n)
		require.LessOrEqual(t, len(batch), buffersRetainedN)
	}
	first, last := g.FirstLast()
	require.Equal(t, uint64(1), first)
	require.Equal(t, index, last)
}
