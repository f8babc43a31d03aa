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
		for i, at := range row.at {
			moves[len(moves)-1-i].old = at // the other way round
		}
		order := new(mover).byPlace(moves)
		require.Equal(t, row.want, together(order), name)
		for i, want := range row.at {
			require.Equal(t, want, ref{order[i].seg, order[i].page}, name)
			require.Equal(t, want, moves[order[i].move].old, name)
		}
	}
}
