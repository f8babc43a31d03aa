package main

import (
	"fmt"

	"github.com/trivet-csi/trivet/api"
)

// cacheView is the cache of a volume in `trivet volume explain -o json`. Counts are those of the window, but of
// byEviction those since the volume was opened.
type cacheView struct {
	Node           string    `json:"node"`
	Mode           string    `json:"mode"`
	Eviction       string    `json:"eviction"`
	SizeBytes      int64     `json:"sizeBytes"`
	DirtyBytes     int64     `json:"dirtyBytes"`
	CleanBytes     int64     `json:"cleanBytes"`
	Hits           uint64    `json:"hits"`
	Misses         uint64    `json:"misses"`
	ByEviction     []hitView `json:"byEviction"`
	Writes         uint64    `json:"writes"`
	Merged         uint64    `json:"merged"`
	WriteBacks     uint64    `json:"writeBacks"`
	WriteBackBytes uint64    `json:"writeBackBytes"`
	ReadAheadBytes uint64    `json:"readAheadBytes"`
	Delayed        uint64    `json:"delayed"`
	Stalled        uint64    `json:"stalled"`
	FlushBytes     int64     `json:"flushBytes,omitempty"`
	FlushDepth     int64     `json:"flushDepth,omitempty"`
	ReadAheadLimit int64     `json:"readAheadLimit,omitempty"`
	Adaptive       bool      `json:"adaptive"`
}

type hitView struct {
	Eviction string `json:"eviction"`
	Hits     uint64 `json:"hits"`
	Misses   uint64 `json:"misses"`
}

func cacheOf(c *api.CacheReport) *cacheView {
	if c == nil {
		return nil
	}
	v := &cacheView{
		Node: c.GetNode(), Mode: c.GetMode(), Eviction: c.GetEviction(), SizeBytes: c.GetSizeBytes(),
		DirtyBytes: c.GetDirtyBytes(), CleanBytes: c.GetCleanBytes(), Hits: c.GetHits(), Misses: c.GetMisses(),
		ByEviction: []hitView{}, Writes: c.GetWrites(), Merged: c.GetMerged(), WriteBacks: c.GetWriteBacks(),
		WriteBackBytes: c.GetWriteBackBytes(), ReadAheadBytes: c.GetReadAheadBytes(), Delayed: c.GetDelayed(),
		Stalled: c.GetStalled(), FlushBytes: c.GetFlushBytes(), FlushDepth: c.GetFlushDepth(),
		ReadAheadLimit: c.GetReadAheadLimit(), Adaptive: c.GetAdaptive(),
	}
	for _, h := range c.GetByEviction() {
		v.ByEviction = append(v.ByEviction, hitView{h.GetEviction(), h.GetHits(), h.GetMisses()})
	}
	return v
}

// cacheTable prints the cache in two columns.
func cacheTable(c *cacheView) table {
	t := table{header: []string{"CACHE", c.Mode + " on " + c.Node}}
	row := func(what, format string, args ...any) {
		t.rows = append(t.rows, []string{what, fmt.Sprintf(format, args...)})
	}
	row("dirty, clean, size", "%s, %s, %s", sizeText(c.DirtyBytes), sizeText(c.CleanBytes), sizeText(c.SizeBytes))
	row("read from it", "%s of %d blocks", percentText(c.Hits, c.Misses), c.Hits+c.Misses)
	for _, h := range c.ByEviction {
		now := ""
		if h.Eviction == c.Eviction {
			now = ", in force"
		}
		row("  since attached, "+h.Eviction, "%s of %d blocks%s", percentText(h.Hits, h.Misses), h.Hits+h.Misses, now)
	}
	row("read ahead", "%s", sizeText(int64(c.ReadAheadBytes)))
	if c.Writes+c.WriteBacks > 0 {
		row("writes, merged, held back, stopped", "%d, %d, %d, %d", c.Writes, c.Merged, c.Delayed, c.Stalled)
		row("written back", "%s in %d requests", sizeText(int64(c.WriteBackBytes)), c.WriteBacks)
	}
	if c.FlushDepth > 0 {
		how := "fixed"
		if c.Adaptive {
			how = "adaptive"
		}
		row("write-backs, read-ahead", "%d of up to %s, %s ahead, %s", c.FlushDepth, sizeText(c.FlushBytes),
			sizeText(c.ReadAheadLimit), how)
	}
	return t
}

func percentText(hits, misses uint64) string {
	if hits+misses == 0 {
		return "-"
	}
	return fmt.Sprintf("%.1f%%", 100*float64(hits)/float64(hits+misses))
}
