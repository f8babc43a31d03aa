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
)

// cacheCollector collects the metrics of one cache.
type cacheCollector cache.Stats

func (c *cacheCollector) Describe(chan<- *prometheus.Desc) {}

func (c *cacheCollector) Collect(out chan<- prometheus.Metric) {
	cacheMetrics(out, "v", (*cache.Stats)(c))
}

func TestCacheMetrics(t *testing.T) {
	t.Parallel()
	s := cache.Stats{
		Mode: cache.WriteBack, Bytes: 1 << 20, DirtyBytes: 8192, CleanBytes: 4096, Writes: 7, Merged: 3, WriteBacks: 2,
		WriteBackBytes: 12288, ReadAheadBlocks: 2, Delayed: 5, Stalled: 1,
	}
	s.ByEviction[1] = cache.HitRate{Hits: 11, Misses: 4}
	registry := prometheus.NewRegistry()
	require.NoError(t, registry.Register((*cacheCollector)(&s)))
	w := httptest.NewRecorder()
	ask := httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/", http.NoBody)
	promhttp.HandlerFor(registry, promhttp.HandlerOpts{}).ServeHTTP(w, ask)
	body := w.Body.String()
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
