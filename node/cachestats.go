package node

import (
	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/cache"
	"github.com/trivet-csi/trivet/internal/stage"
)

// cacheMeters returns what measures the cache of a data path.
func cacheMeters(stages *stage.Volume) cache.Meters {
	if stages == nil {
		return cache.Meters{} // a nil *stage.Meter would not be a nil Meter
	}
	return cache.Meters{
		Own: stages.Meter(stage.Cache), Room: stages.Meter(stage.CacheRoom), WriteBack: stages.Meter(stage.WriteBack),
	}
}

// counts returns what the cache has counted, in the words of package stage.
func (f *caching) counts() stage.CacheCounts {
	s, set := f.Stats(), f.Settings()
	c := stage.CacheCounts{
		Mode: string(s.Mode), Eviction: string(set.Eviction), SizeBytes: s.Bytes, DirtyBytes: s.DirtyBytes,
		CleanBytes: s.CleanBytes, Writes: s.Writes, Merged: s.Merged, WriteBacks: s.WriteBacks,
		WriteBackBytes: s.WriteBackBytes, ReadAheadBytes: s.ReadAheadBlocks * trivet.BlockSize, Delayed: s.Delayed,
		Stalled: s.Stalled, Adaptive: s.Adaptive, FlushBytes: s.FlushBytes, FlushDepth: int64(s.FlushDepth),
		ReadAheadLimit: s.ReadAheadBytes,
	}
	if c.Eviction == "" {
		c.Eviction = string(cache.LRU)
	}
	for i, e := range cache.Evictions() {
		if h := s.ByEviction[i]; h.Hits+h.Misses > 0 {
			c.ByEviction = append(c.ByEviction, stage.HitCounts{Eviction: string(e), Hits: h.Hits, Misses: h.Misses})
		}
	}
	return c
}
