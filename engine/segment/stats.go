package segment

// LaneStats describes one lane. Bytes and counts without another word are since Open.
type LaneStats struct {
	Segments int  // that hold something, the current one included
	Free     int  // files that wait to be used again
	Pinned   int  // segments with a pin
	Groups   int  // with entries or a Stable
	Making   bool // a file for a later segment is being made, now
	Entries  int64

	LiveBytes   int64 // of entries in segments, now
	CacheBytes  int64 // of entries in memory, now
	QueuedBytes int64 // now

	EntryBytes   int64 // data and payload that became durable
	StoredBytes  int64 // of blocks without an entry that did
	WrittenBytes int64 // to files; over EntryBytes and StoredBytes it is the write amplification
	MovedBytes   int64 // of it, entries carried forward
	Flushes      int64
	Marks        int64
	Rolls        int64 // segments begun
	Recycled     int64 // segments whose file became free
}

// Stats returns what each lane holds and has done.
func (l *Log) Stats() []LaneStats {
	out := make([]LaneStats, 0, len(l.lanes))
	for _, lane := range l.lanes {
		lane.mu.Lock()
		s := lane.stats
		s.Segments, s.Free, s.Entries = len(lane.segments), len(lane.free), lane.entriesN
		s.CacheBytes, s.QueuedBytes, s.Making = lane.cacheBytes, lane.queueBytes, lane.preparing
		for _, seg := range lane.segments {
			s.LiveBytes += seg.liveBytes
			if seg.pins > 0 {
				s.Pinned++
			}
		}
		for _, g := range lane.groups {
			if !g.accepted.pristine() {
				s.Groups++
			}
		}
		lane.mu.Unlock()
		out = append(out, s)
	}
	return out
}
