package stage_test

import (
	"encoding/json"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet/internal/stage"
)

// TestWatchSeesTheCache: counts are those of the window, levels those at its end, and rates by policy those since the
// cache was opened; all of it survives the way through JSON, by which nodes answer.
func TestWatchSeesTheCache(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := stage.NewRegistry()
		v := r.Open(vol)
		w, err := r.Watch(t.Context(), vol, time.Second)
		require.NoError(t, err)
		require.Nil(t, w.Cache)

		counts := stage.CacheCounts{
			Mode: "writeBack", Eviction: "lru", SizeBytes: 1 << 20, DirtyBytes: 4096, Writes: 100, WriteBacks: 10,
			ByEviction: []stage.HitCounts{{Eviction: "lru", Hits: 30, Misses: 10}},
		}
		start := time.Now()
		v.SetCache(func() stage.CacheCounts {
			c := counts
			if time.Since(start) > 500*time.Millisecond {
				c.DirtyBytes, c.Writes, c.WriteBacks, c.Stalled = 8192, 150, 14, 1
				c.ByEviction = []stage.HitCounts{{"lru", 33, 10}, {"fifo", 4, 5}}
			}
			return c
		})
		w, err = r.Watch(t.Context(), vol, time.Second)
		require.NoError(t, err)
		b, err := json.Marshal(w)
		require.NoError(t, err)
		var got stage.Window
		require.NoError(t, json.Unmarshal(b, &got))
		want := stage.CacheSummary{
			CacheCounts: stage.CacheCounts{
				Mode: "writeBack", Eviction: "lru", SizeBytes: 1 << 20, DirtyBytes: 8192, Writes: 50, WriteBacks: 4, Stalled: 1,
				ByEviction: []stage.HitCounts{{"lru", 33, 10}, {"fifo", 4, 5}},
			},
			Hits: 7, Misses: 5,
		}
		require.NotNil(t, got.Cache)
		assert.Equal(t, want, *got.Cache)
		v.SetCache(nil)
		w, err = r.Watch(t.Context(), vol, time.Second)
		require.NoError(t, err)
		require.Nil(t, w.Cache)
	})
}

func TestWatchSeesTheDevice(t *testing.T) {
	t.Parallel()
	r := stage.NewRegistry()
	v := r.Open(1)
	defer v.Close()
	v.SetDevice(func() stage.DeviceSummary { return stage.DeviceSummary{Path: "/dev/loop1", Tells: true, Repeated: 3} })
	w, err := r.Watch(t.Context(), 1, time.Millisecond)
	require.NoError(t, err)
	require.Equal(t, &stage.DeviceSummary{Path: "/dev/loop1", Tells: true, Repeated: 3}, w.Device)
	v.SetDevice(nil)
	w, err = r.Watch(t.Context(), 1, time.Millisecond)
	require.NoError(t, err)
	require.Nil(t, w.Device)
	(*stage.Volume)(nil).SetDevice(nil)
}
