package engine

import (
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet/engine/segment"
)

// TestTogether: blocks that stand near each other are read at once, never more than a read may take, never from two
// segments.
func TestTogether(t *testing.T) {
	const near, far = moveGapBlocks, moveGapBlocks + 1
	for name, row := range map[string]struct {
		at   []ref
		want int
	}{
		"one":          {[]ref{{1, 5}}, 1},
		"neighbours":   {[]ref{{1, 5}, {1, 6}, {1, 7}}, 3},
		"the same":     {[]ref{{1, 5}, {1, 5}, {1, 6}}, 3},
		"a small gap":  {[]ref{{1, 5}, {1, 5 + near}}, 2},
		"a large gap":  {[]ref{{1, 5}, {1, 5 + far}, {1, 6 + far}}, 1},
		"two segments": {[]ref{{1, 5}, {segment.ID(2), 6}}, 1},
		"as much as one read takes": {func() (at []ref) {
			for page := range uint32(moveReadBlocks + 10) {
				at = append(at, ref{1, page})
			}
			return at
		}(), moveReadBlocks},
	} {
		moves := make([]moving, len(row.at))
		order := make([]int, len(row.at))
		for i := range row.at {
			moves[i].old, order[i] = row.at[i], i
		}
		require.Equal(t, row.want, together(moves, order), name)
	}
}
