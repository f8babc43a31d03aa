package server

import (
	"net/http"
	"net/http/httptest"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet/cache"
	"github.com/trivet-csi/trivet/internal/stage"
)

// collecting is a Collector that does one thing.
type collecting func(out chan<- prometheus.Metric)

func (c collecting) Describe(chan<- *prometheus.Desc) {}

func (c collecting) Collect(out chan<- prometheus.Metric) { c(out) }

// textOf returns what a scrape gets of a Collector.
func textOf(t *testing.T, c collecting) string {
	t.Helper()
	registry := prometheus.NewRegistry()
	require.NoError(t, registry.Register(c))
	w := httptest.NewRecorder()
	ask := httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/", http.NoBody)
	promhttp.HandlerFor(registry, promhttp.HandlerOpts{}).ServeHTTP(w, ask)
	return w.Body.String()
}

func TestDeviceMetrics(t *testing.T) {
	t.Parallel()
	of := func(d *stage.DeviceSummary) string {
		return textOf(t, func(out chan<- prometheus.Metric) { deviceMetrics(out, "v", d) })
	}
	body := of(&stage.DeviceSummary{Path: "/dev/loop1", Tells: true, Repeated: 7, Refused: 2})
	require.Contains(t, body, `trivet_device_resent_requests_total{result="repeated",volume="v"} 7`+"\n")
	require.Contains(t, body, `trivet_device_resent_requests_total{result="refused",volume="v"} 2`+"\n")
	require.Empty(t, of(nil))
	require.Empty(t, of(&stage.DeviceSummary{Path: "/dev/nbd1"}), "nobody knows")
}

func TestCacheMetrics(t *testing.T) {
	t.Parallel()
	s := cache.Stats{
		Mode: cache.WriteBack, Bytes: 1 << 20, DirtyBytes: 8192, CleanBytes: 4096, Writes: 7, Merged: 3, WriteBacks: 2,
		WriteBackBytes: 12288, ReadAheadBlocks: 2, Delayed: 5, Stalled: 1,
	}
	s.ByEviction[1] = cache.HitRate{Hits: 11, Misses: 4}
	body := textOf(t, func(out chan<- prometheus.Metric) { cacheMetrics(out, "v", &s) })
	for _, line := range []string{
		`trivet_cache_info{mode="writeBack",volume="v"} 1`,
		`trivet_cache_bytes{state="dirty",volume="v"} 8192`,
		`trivet_cache_bytes{state="clean",volume="v"} 4096`,
		`trivet_cache_read_blocks_total{eviction="lfu",result="hit",volume="v"} 11`,
		`trivet_cache_read_blocks_total{eviction="lfu",result="miss",volume="v"} 4`,
		`trivet_cache_writes_total{volume="v"} 7`,
		`trivet_cache_merged_writes_total{volume="v"} 3`,
		`trivet_cache_write_back_bytes_total{volume="v"} 12288`,
		`trivet_cache_read_ahead_bytes_total{volume="v"} 8192`,
		`trivet_cache_held_writes_total{how="delayed",volume="v"} 5`,
		`trivet_cache_held_writes_total{how="stalled",volume="v"} 1`,
	} {
		assert.Contains(t, body, line+"\n")
	}
	assert.NotContains(t, body, `eviction="lru"`, "never in force")
}
