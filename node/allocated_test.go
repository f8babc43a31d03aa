package node

import (
	"context"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller/meta"
	"github.com/trivet-csi/trivet/internal/faultdev"
	"github.com/trivet-csi/trivet/internal/stage"
	"github.com/trivet-csi/trivet/iothrottle"
)

// holes is a disk of which only the first block holds data.
type holes struct{ trivet.Device }

func (holes) Allocated(_ context.Context, off, n int64, runs []trivet.Run) (int, error) {
	if off > 0 || n == trivet.BlockSize || len(runs) == 1 {
		runs[0] = trivet.Run{LenBytes: n, Allocated: off == 0}
		return 1, nil
	}
	runs[0] = trivet.Run{LenBytes: trivet.BlockSize, Allocated: true}
	runs[1] = trivet.Run{LenBytes: n - trivet.BlockSize}
	return 2, nil
}

// TestPathTellsWhatIsAllocated: every stage of a data path passes the question on, for readers and writers; a disk that
// cannot tell holds data everywhere.
func TestPathTellsWhatIsAllocated(t *testing.T) {
	t.Parallel()
	for name, tc := range map[string]struct {
		bottom   trivet.Device
		readOnly bool
		want     []trivet.Run
	}{
		"a disk that cannot tell": {faultdev.NewMem(1 << 20), false, []trivet.Run{{LenBytes: 1 << 20, Allocated: true}}},
		"writer": {holes{faultdev.NewMem(1 << 20)}, false, []trivet.Run{
			{LenBytes: 4096, Allocated: true}, {LenBytes: 1<<20 - 4096},
		}},
		"reader": {holes{faultdev.NewMem(1 << 20)}, true, []trivet.Run{
			{LenBytes: 4096, Allocated: true}, {LenBytes: 1<<20 - 4096},
		}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			with := shared{scheduler: iothrottle.NewScheduler(), stages: stage.NewRegistry()}
			v := &meta.Volume{ID: vol, Attached: &meta.Attachment{Node: "n1", Epoch: 1, ReadOnly: tc.readOnly}}
			all := newCaches(&Config{})
			stages := with.stages.Open(v.ID)
			cached, err := all.open(probeStage(tc.bottom, stages, stage.Replication), v, &attached{epoch: 1},
				cacheMeters(stages))
			require.NoError(t, err)
			p, err := stack(all.follow(cached, v, 1), v, &with, stages)
			require.NoError(t, err)
			var device trivet.Device = p // as the NBD server has it
			runs := make([]trivet.Run, 8)
			n, err := device.(trivet.Allocator).Allocated(t.Context(), 0, 1<<20, runs)
			require.NoError(t, err)
			require.Equal(t, tc.want, runs[:n])
			p.cache.end()
			p.close()
		})
	}
}
