package replication

import (
	"bytes"
	"encoding/hex"
	"testing"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/engine"
	"github.com/trivet-csi/trivet/replication/raftgroup"
)

func scrubMessages() (requests []scrubRequest, replies []scrubReply) {
	items := []scrubItem{
		{engine.BlockVersion{LBA: 7, Generation: 3, Sum: 0xdeadbeef}, itemHas},
		{engine.BlockVersion{LBA: lbaMax - 1}, itemDamaged},
	}
	requests = []scrubRequest{
		{op: scrubProbe},
		{op: scrubFetch, items: items},
		{op: scrubCheck, repair: true, index: 1 << 40, rate: 1 << 30},
		{op: scrubReadAt, index: 9, lba: 5, blockN: 16},
	}
	replies = []scrubReply{
		{more: true},
		{index: 5, blockN: 1, found: 2, repaired: 3, left: 4, next: 6, state: [32]byte{1}, blocks: [32]byte{2}},
		{items: items, data: block(1, 3)},
	}
	return requests, replies
}

func TestScrubMessages(t *testing.T) {
	t.Parallel()
	requests, replies := scrubMessages()
	for _, want := range requests {
		b := want.append(nil)
		got, err := decodeScrubRequest(b)
		require.NoError(t, err)
		assert.Equal(t, want, got)
		for _, bad := range [][]byte{b[:len(b)-1], append(bytes.Clone(b), 0), nil} {
			_, err := decodeScrubRequest(bad)
			require.ErrorIs(t, err, trivet.ErrInvalid)
		}
	}
	for _, want := range replies {
		got, err := decodeScrubReply(want.append(nil))
		require.NoError(t, err)
		assert.Equal(t, want, got)
		_, err = decodeScrubReply(want.append(nil)[:scrubReplyBytes-1])
		require.ErrorIs(t, err, trivet.ErrCorrupt)
	}
	for _, bad := range []scrubRequest{
		{op: 0},
		{op: scrubDone + 1},
		{op: scrubProbe, lba: lbaMax + 1},
		{op: scrubProbe, blockN: -1},
		{op: scrubProbe, rate: -1},
		{op: scrubFetch, items: []scrubItem{{flag: itemFlagEnd}}},
	} {
		_, err := decodeScrubRequest(bad.append(nil))
		require.ErrorIs(t, err, trivet.ErrInvalid)
	}
	for _, bad := range []scrubReply{{found: -1}, {next: lbaMax + 1}, {items: []scrubItem{{flag: itemFlagEnd}}}} {
		_, err := decodeScrubReply(bad.append(nil))
		require.ErrorIs(t, err, trivet.ErrCorrupt)
	}
	items := requests[1].items
	require.NoError(t, checkFetched(items, &replies[2]))
	require.ErrorIs(t, checkFetched(items[:1], &replies[2]), trivet.ErrCorrupt)
	require.ErrorIs(t, checkFetched([]scrubItem{items[1], items[0]}, &replies[2]), trivet.ErrCorrupt)
	require.ErrorIs(t, checkFetched(items, &scrubReply{items: items}), trivet.ErrCorrupt)
}

func FuzzScrubRequest(f *testing.F) {
	requests, _ := scrubMessages()
	for _, r := range requests {
		f.Add(r.append(nil))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		if r, err := decodeScrubRequest(b); err == nil {
			require.Equal(t, b, r.append(nil))
		}
	})
}

func FuzzScrubReply(f *testing.F) {
	_, replies := scrubMessages()
	for _, r := range replies {
		f.Add(r.append(nil))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		if r, err := decodeScrubReply(b); err == nil {
			require.Equal(t, b, r.append(nil))
		}
	})
}

// A marker changes nothing but the applied index, splits what is applied together, and shows exactly what came before
// it, wherever in a batch of entries it stands. Delivered again it takes no view: what it stood for is past.
func TestMachineMarks(t *testing.T) {
	t.Parallel()
	m := openTestMachine(t, vfs.NewCrashableMem())
	defer func() { require.NoError(t, m.eng.Close()) }()
	m.markers = newMarkers(m.vol)
	defer m.markers.close()
	entry := func(index uint64, rs ...request) raftgroup.Entry {
		return raftgroup.Entry{Index: index, Term: 1, Data: appendEntry(nil, testVolume, rs)}
	}
	marker := sealed(request{op: opScrub, lba: 2, arg: 10})
	entries := []raftgroup.Entry{
		entry(1, sealed(request{op: opFence, epoch: 1})),
		entry(2, writeReq(1, 1, 1, 3, block(1, 7))),
		entry(3, marker),
		entry(4, writeReq(1, 2, 1, 4, block(1, 8)), writeReq(1, 3, 1, 3, block(1, 9))),
	}
	results, err := m.Apply(entries)
	require.NoError(t, err)
	marked, ok := results[2].([]result)
	require.True(t, ok)
	assert.EqualValues(t, 3, marked[0].index)
	require.NoError(t, marked[0].err(&marker))
	applied := func() uint64 { return m.view.Load().AppliedIndex }
	assert.EqualValues(t, 4, applied())
	k, err := m.markers.find(t.Context(), 3, applied)
	require.NoError(t, err)
	versions, next, err := k.view.Versions(0, 100)
	require.NoError(t, err)
	assert.EqualValues(t, 12, next)
	assert.Equal(t, []engine.BlockVersion{{LBA: 3, Sum: engine.BlockSum(testVolume, 3, block(1, 7))}}, versions)
	assert.EqualValues(t, 3, k.view.Index())

	_, err = m.Apply(entries)
	require.NoError(t, err)
	again, err := m.markers.find(t.Context(), 3, applied)
	require.NoError(t, err)
	assert.Same(t, k, again)
	_, err = m.markers.find(t.Context(), 2, applied)
	require.ErrorIs(t, err, trivet.ErrNotFound)
	_, err = m.markers.find(t.Context(), 4, applied)
	require.ErrorIs(t, err, trivet.ErrNotFound, "it was no marker")
}

// A marker is an entry like any other: golden bytes, and nothing but what it may say.
func TestMarkerEntry(t *testing.T) {
	t.Parallel()
	marker := sealed(request{op: opScrub, lba: 11, arg: 9})
	b := appendEntry(nil, testVolume, []request{marker})
	got, err := decodeEntry(nil, testVolume, b)
	require.NoError(t, err)
	require.Len(t, got, 1)
	require.Empty(t, got[0].data)
	got[0].data = nil
	assert.Equal(t, []request{marker}, got)
	assert.Equal(t, "14000000daf17546"+
		"000000000000000000000000000000000000000000000000000000000000000b0000000000000009",
		hex.EncodeToString(b[entryHeaderBytes:]))
	for name, bad := range map[string]request{
		"no blocks":    {op: opScrub, lba: 11},
		"past the end": {op: opScrub, lba: lbaMax - 1, arg: 2},
		"beyond":       {op: opScrub, lba: lbaMax, arg: 1},
		"an epoch":     {op: opScrub, arg: 1, epoch: 1},
		"a sequence":   {op: opScrub, arg: 1, seq: 1, low: 1},
		"data":         {op: opScrub, arg: 1, data: block(1, 1)},
	} {
		require.ErrorIs(t, bad.check(), trivet.ErrInvalid, name)
	}
	fence := request{op: opFence, epoch: 1, lba: 1}
	require.ErrorIs(t, fence.check(), trivet.ErrInvalid, "no other names a block without a session")
	assert.Equal(t, "scrub", opScrub.String())
}
