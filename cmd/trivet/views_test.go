package main

import (
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet/api"
)

// TestListShowsAllReaders, and what an older server says.
func TestListShowsAllReaders(t *testing.T) {
	t.Parallel()
	for want, v := range map[string]*api.Volume{
		"":                  {},
		"a":                 {AttachedNode: "a"},
		"b":                 {AttachedNode: "b", AttachedNodes: []string{"b"}},
		"a,b,c (read-only)": {AttachedNode: "a", AttachedNodes: []string{"a", "b", "c"}, AttachedReadOnly: true},
	} {
		rows := volumeTable([]volumeView{volumeOf(v)}).rows
		assert.Equal(t, want, rows[0][len(rows[0])-1])
	}
}

// TestExplainShowsTheCache: what an operator looks for is in the table.
func TestExplainShowsTheCache(t *testing.T) {
	t.Parallel()
	require.Nil(t, reportOf(&api.VolumeReport{}).Cache)
	view := reportOf(&api.VolumeReport{Cache: &api.CacheReport{
		Node: "n1", Mode: "writeBack", Eviction: "lfu", SizeBytes: 64 << 20, DirtyBytes: 3 << 20, CleanBytes: 5 << 20,
		Hits: 30, Misses: 10, Writes: 900, Merged: 800, WriteBacks: 100, WriteBackBytes: 2 << 20, Delayed: 7, Stalled: 2,
		ByEviction: []*api.HitCount{{Eviction: "lru", Hits: 1, Misses: 3}, {Eviction: "lfu", Hits: 9, Misses: 1}},
		FlushBytes: 96 << 10, FlushDepth: 24, ReadAheadLimit: 512 << 10, Adaptive: true,
	}})
	got := cacheTable(view.Cache)
	assert.Equal(t, []string{"CACHE", "writeBack on n1"}, got.header)
	assert.Equal(t, [][]string{
		{"dirty, clean, size", sizeText(3<<20) + ", " + sizeText(5<<20) + ", " + sizeText(64<<20)},
		{"read from it", "75.0% of 40 blocks"},
		{"  since attached, lru", "25.0% of 4 blocks"},
		{"  since attached, lfu", "90.0% of 10 blocks, in force"},
		{"read ahead", sizeText(0)},
		{"writes, merged, held back, stopped", "900, 800, 7, 2"},
		{"written back", sizeText(2<<20) + " in 100 requests"},
		{
			"write-backs, read-ahead",
			"24 of up to " + sizeText(96<<10) + ", " + sizeText(512<<10) + " ahead, adaptive",
		},
	}, got.rows)
}

func TestExplainShowsTheDevice(t *testing.T) {
	t.Parallel()
	view := reportOf(&api.VolumeReport{Devices: []*api.DeviceReport{
		{Node: "n1", Path: "/dev/loop3", Tells: true, Repeated: 4, Refused: 1}, {Node: "n2", Path: "/dev/nbd0"},
	}})
	require.Len(t, view.Devices, 2)
	assert.Equal(t, "device: /dev/loop3 on n1; sent again by the kernel after a resume: 4 requests repeated, 1 refused\n",
		view.Devices[0].text())
	assert.Equal(t, "device: /dev/nbd0 on n2\n", view.Devices[1].text())
}
