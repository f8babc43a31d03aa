package stage

// CacheCounts is what a cache has counted since it was opened, and what is so now.
type CacheCounts struct {
	Mode      string
	Eviction  string // in force
	SizeBytes int64  // of blocks that fit

	DirtyBytes, CleanBytes int64

	ByEviction []HitCounts // of each policy that was in force

	Writes, Merged             uint64 // in pieces of at most 64 KiB; that went below along with a neighbour
	WriteBacks, WriteBackBytes uint64
	ReadAheadBytes             uint64
	Delayed, Stalled           uint64 // writes slowed down as the cache filled, and that waited for room

	// What write-back and read-ahead work with at the moment.
	FlushBytes, FlushDepth, ReadAheadLimit int64
	Adaptive                               bool
}

// HitCounts counts blocks that were read under one eviction policy.
type HitCounts struct {
	Eviction     string `json:"eviction"`
	Hits, Misses uint64 `json:",omitempty"`
}

// Rate returns the share of the blocks that were found, and false if none were read.
func (h HitCounts) Rate() (float64, bool) {
	if h.Hits+h.Misses == 0 {
		return 0, false
	}
	return float64(h.Hits) / float64(h.Hits+h.Misses), true
}

// CacheSummary is what a cache did in a window, and how it was at the end. Counts are those of the window, but of
// ByEviction those since the cache was opened.
type CacheSummary struct {
	CacheCounts
	Hits, Misses uint64 // blocks read in the window
}

// SetCache says whose counts Watch reports as those of the volume's cache; nil = it has none.
func (v *Volume) SetCache(counts func() CacheCounts) {
	switch {
	case v == nil:
	case counts == nil:
		v.cache.Store(nil)
	default:
		v.cache.Store(&counts)
	}
}

// watchCache begins a window; what it returns ends it.
func (v *Volume) watchCache() func() *CacheSummary {
	counts := v.cache.Load()
	if counts == nil {
		return func() *CacheSummary { return nil }
	}
	before := (*counts)()
	return func() *CacheSummary {
		s := &CacheSummary{CacheCounts: (*counts)()}
		s.Hits, s.Misses = s.total()
		hits, misses := before.total()
		s.Hits, s.Misses = s.Hits-hits, s.Misses-misses
		for _, c := range []struct{ now, then *uint64 }{
			{&s.Writes, &before.Writes},
			{&s.Merged, &before.Merged},
			{&s.WriteBacks, &before.WriteBacks},
			{&s.WriteBackBytes, &before.WriteBackBytes},
			{&s.ReadAheadBytes, &before.ReadAheadBytes},
			{&s.Delayed, &before.Delayed},
			{&s.Stalled, &before.Stalled},
		} {
			*c.now -= *c.then
		}
		return s
	}
}

func (c *CacheCounts) total() (hits, misses uint64) {
	for _, h := range c.ByEviction {
		hits, misses = hits+h.Hits, misses+h.Misses
	}
	return hits, misses
}
