package segment

import (
	"fmt"
	"strconv"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
)

// Appends of 4 KiB entries to real files, each group waiting for its own. entries/s counts all groups;
// write-amp is bytes written over bytes of entries.
func BenchmarkAppend(b *testing.B) {
	for _, c := range []struct{ groupsN, entriesN, lanes int }{{64, 1, 1}, {64, 1, 4}, {8, 64, 4}, {1, 1, 1}} {
		b.Run(fmt.Sprintf("groups=%d/entries=%d/lanes=%d", c.groupsN, c.entriesN, c.lanes), func(b *testing.B) {
			dir := NewOSDir(b.TempDir() + "/log")
			opts := Options{Dir: dir, Disk: testDisk, Lanes: c.lanes}
			require.NoError(b, Format(opts))
			l, err := Open(opts)
			require.NoError(b, err)
			payload := alignedBytes(pageBytes)
			var wg sync.WaitGroup
			b.ResetTimer()
			for id := range c.groupsN {
				wg.Go(func() { appendMany(b, l.Group(trivet.VolumeID(id)), payload, c.entriesN, b.N/c.groupsN+1) })
			}
			wg.Wait()
			b.StopTimer()
			var written, entries int64
			for _, s := range l.Stats() {
				written, entries = written+s.WrittenBytes, entries+s.EntryBytes
			}
			require.NoError(b, l.Close())
			b.ReportMetric(float64(entries/pageBytes)/b.Elapsed().Seconds(), "entries/s")
			b.ReportMetric(float64(written)/float64(entries), "write-amp")
		})
	}
}

// appendMany appends n batches of entries, and trims what is a few batches old.
func appendMany(b *testing.B, g *Group, payload []byte, entriesN, n int) {
	b.Helper()
	next := uint64(1)
	for i := range n {
		entries := make([]Entry, entriesN)
		for k := range entries {
			entries[k] = Entry{Index: next, Term: 1, Payload: payload}
			next++
		}
		if err := g.Append(entries); err != nil {
			b.Error(err)
			return
		}
		if i%64 == 63 {
			if err := g.TrimPrefix(next - 1 - uint64(entriesN)); err != nil {
				b.Error(err)
				return
			}
		}
	}
}

// BenchmarkCreate makes new segments of the usual size, which a log that grows waits for.
func BenchmarkCreate(b *testing.B) {
	dir := NewOSDir(b.TempDir())
	b.SetBytes(64 << 20)
	for i := range b.N {
		f, err := dir.Create("segment-"+strconv.Itoa(i%8), 64<<20)
		require.NoError(b, err)
		require.NoError(b, f.Close())
	}
}
