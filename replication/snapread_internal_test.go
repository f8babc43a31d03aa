package replication

import (
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/engine"
)

func TestExtentsOnTheWire(t *testing.T) {
	t.Parallel()
	xs := []engine.Extent{{LBA: 5, BlockN: 2}, {LBA: 7, BlockN: 1}, {LBA: 20, BlockN: 10}}
	b := appendExtents(nil, xs, 30)
	got, next, err := decodeExtents(b, 5, 64)
	require.NoError(t, err)
	require.Equal(t, xs, got)
	require.Equal(t, trivet.LBA(30), next)
	for name, bad := range map[string][]byte{
		"empty": {}, "cut": b[:len(b)-1], "version": append([]byte{9}, b[1:]...),
		"beyond next":  appendExtents(nil, xs, 29),
		"overlapping":  appendExtents(nil, []engine.Extent{{LBA: 5, BlockN: 3}, {LBA: 7, BlockN: 1}}, 30),
		"before":       appendExtents(nil, []engine.Extent{{LBA: 4, BlockN: 3}}, 30),
		"of nothing":   appendExtents(nil, []engine.Extent{{LBA: 5}}, 30),
		"no progress":  appendExtents(nil, nil, 5),
		"too far":      appendExtents(nil, nil, 65),
		"huge":         appendExtents(nil, []engine.Extent{{LBA: 6, BlockN: 1 << 62}}, 30),
		"negative end": appendExtents(nil, []engine.Extent{{LBA: 1 << 63, BlockN: 20}}, 30),
	} {
		_, _, err := decodeExtents(bad, 5, 64)
		require.ErrorIs(t, err, trivet.ErrCorrupt, name)
	}
}

func FuzzDecodeExtents(f *testing.F) {
	f.Add(appendExtents(nil, []engine.Extent{{LBA: 5, BlockN: 2}, {LBA: 20, BlockN: 10}}, 30))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		xs, next, err := decodeExtents(b, 5, 1<<20)
		if err != nil {
			require.ErrorIs(t, err, trivet.ErrCorrupt)
			return
		}
		require.Equal(t, b, appendExtents(nil, xs, next))
	})
}
