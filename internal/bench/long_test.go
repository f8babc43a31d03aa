package main

import (
	"errors"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// TestRunsAreLong: a run that is too short to count is made again, longer, and the next begins with that length.
func TestRunsAreLong(t *testing.T) {
	t.Parallel()
	const second = time.Second
	for name, tt := range map[string]struct {
		perSec int64 // of all copies
		copies int
		leastB int64
		want   []time.Duration // lengths of the runs of two rounds
		short  bool
	}{
		"long enough":     {100, 1, 400, []time.Duration{4 * second, 4 * second}, false},
		"to be longer":    {80, 1, 400, []time.Duration{4 * second, 7 * second, 7 * second}, false},
		"for each copy":   {240, 3, 400, []time.Duration{4 * second, 7 * second, 7 * second}, false},
		"a little longer": {99, 1, 400, []time.Duration{4 * second, 6 * second, 6 * second}, false},
		"far too slow":    {1, 1, 400, []time.Duration{4 * second, 12 * second, 12 * second}, true},
		"standing still":  {0, 1, 400, []time.Duration{4 * second, 12 * second, 12 * second}, true},
		"not asked":       {0, 1, 0, []time.Duration{4 * second, 4 * second}, false},
	} {
		s, got := newStretch(4*second), []time.Duration(nil)
		for range 2 {
			r, err := s.untilLong(tt.leastB, tt.copies, func(d time.Duration) (result, error) {
				got = append(got, d)
				return result{writtenB: tt.perSec * int64(d/second), opsN: int64(len(got))}, nil
			})
			require.NoError(t, err)
			require.Equal(t, tt.short, r.short, name)
			require.EqualValues(t, len(got), r.opsN, "the last run counts: %s", name)
		}
		require.Equal(t, tt.want, got, name)
	}
	_, err := newStretch(second).untilLong(1, 1, func(time.Duration) (result, error) { return result{}, errors.New("no") })
	require.Error(t, err)
}

// TestLeastBytes: it is J1 and J4 that a cache could make faster than it is.
func TestLeastBytes(t *testing.T) {
	t.Parallel()
	o := options{cacheMiB: 64}
	for i := range jobs {
		want := int64(0)
		if jobs[i].id == "J1" || jobs[i].id == "J4" {
			want = 192 << 20
			require.Contains(t, jobs[i].args, "--end_fsync=1", "the drain is a part of it")
		}
		require.Equal(t, want, o.leastBytes(&jobs[i]), jobs[i].id)
	}
}

func TestReportMarksShortRuns(t *testing.T) {
	t.Parallel()
	r := exampleReport()
	require.NotContains(t, r.markdown("x.svg"), "†")
	r.by["a & b"]["J1"].results[1].short = true
	text := r.markdown("x.svg")
	require.Contains(t, text, "| a & b | 50/s† (0.50)")
	require.Contains(t, text, "† A run wrote less")
}
