package replication

import (
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/engine"
)

func TestRunsOf(t *testing.T) {
	t.Parallel()
	const b = trivet.BlockSize
	extents := []engine.Extent{{LBA: 12, BlockN: 2}, {LBA: 14, BlockN: 1}, {LBA: 20, BlockN: 4}}
	all := []trivet.Run{
		{LenBytes: 2 * b},
		{LenBytes: 3 * b, Allocated: true},
		{LenBytes: 5 * b},
		{LenBytes: 4 * b, Allocated: true},
		{LenBytes: 6 * b},
	}
	for room := 1; room <= 6; room++ {
		runs := make([]trivet.Run, room)
		n := runsOf(10, 30, extents, runs)
		require.Equal(t, all[:min(room, len(all))], runs[:n])
	}
	runs := make([]trivet.Run, 2)
	require.Equal(t, 1, runsOf(10, 30, nil, runs))
	require.Equal(t, trivet.Run{LenBytes: 20 * b}, runs[0])
	require.Equal(t, 1, runsOf(12, 15, extents[:2], runs))
	require.Equal(t, trivet.Run{LenBytes: 3 * b, Allocated: true}, runs[0])
}

func FuzzAllocatedMessage(f *testing.F) {
	f.Add((&allocatedRequest{epoch: 3, lba: 5, blockN: 7}).append(nil))
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := decodeAllocated(b)
		if err != nil {
			require.ErrorIs(t, err, trivet.ErrInvalid)
			return
		}
		require.Equal(t, b, r.append(nil))
	})
}
