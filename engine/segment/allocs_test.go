//go:build !race

package segment

import (
	"math"
	"testing"

	"github.com/stretchr/testify/require"
)

// TestAppendAllocatesLittle: the request, with its ticket and record, and the reference that stays. What a batch is
// made of is the lane's.
func TestAppendAllocatesLittle(t *testing.T) {
	require.Zero(t, testing.AllocsPerRun(100, func() { _ = recordSum(nil, 1, 2, 3) }))
	l, _ := newTestLog(t, func(o *Options) { o.SegmentBytes = 16 << 20 })
	g, entries := l.Group(1), make([]Entry, 1)
	payload, index := alignedBytes(pageBytes), uint64(0)
	allocs := math.Inf(1)
	for range 5 { // the least: marks and files in the making count, too, now and then
		allocs = min(allocs, testing.AllocsPerRun(100, func() {
			index++
			entries[0] = Entry{Index: index, Term: 1, Payload: payload}
			if err := g.Append(entries); err != nil {
				t.Error(err)
			}
		}))
	}
	f, err := NewMemDir().Create("f", 1<<20)
	require.NoError(t, err)
	b := alignedBytes(2 * pageBytes)
	disk := testing.AllocsPerRun(500, func() { _ = writeDurable(f, b, 0) })
	require.LessOrEqual(t, allocs-disk, 2.0, "the disk in memory takes %g", disk)
}
