package main

import (
	"testing"

	"github.com/stretchr/testify/require"
)

// TestSignTest compares with the binomial distribution, as tables have it.
func TestSignTest(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		k, n int
		want float64
	}{
		{10, 10, 2.0 / 1024},
		{0, 10, 2.0 / 1024},
		{9, 10, 22.0 / 1024},
		{8, 10, 112.0 / 1024},
		{5, 10, 1},
		{4, 9, 1},
		{0, 0, 1},
	} {
		require.InDelta(t, tc.want, signTest(tc.k, tc.n), 1e-12, "%d of %d", tc.k, tc.n)
	}
}

func TestPairsTable(t *testing.T) {
	t.Parallel()
	c := &comparison{job: jobs[0], with: []float64{2, 3, 1, 4}, without: []float64{1, 2, 2, 4}}
	got := pairsMarkdown(&options{pairs: 4, toggle: "adaptive=on,off"}, []*comparison{c})
	want := "| J1, 4 KiB random writes, 32 outstanding | 1.250 | 0.500, 2.000 | 2 of 3 | 1.000 |"
	require.Contains(t, got, want)
}
