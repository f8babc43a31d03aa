package cache_test

import (
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/cache"
	"github.com/trivet-csi/trivet/internal/faultdev"
)

const region = 64 << 20 / trivet.BlockSize

// orderLab is a cache that writes back one block at a time, large enough that nothing is written back before a flush.
func orderLab(t *testing.T, o cache.Order) *lab {
	t.Helper()
	cfg := config(cache.WriteBack, 64<<20)
	cfg.Order, cfg.Depth = o, 1
	l := &lab{t: t, path: file(t), mem: faultdev.NewMem(1 << 30)}
	l.disk = faultdev.Wrap(l.mem)
	l.Device = open(t, l.path, l.disk, cfg)
	t.Cleanup(func() { _ = l.Abandon() })
	return l
}

// flushed writes the blocks one after the other, flushes, and returns in which order they came to the disk.
func (l *lab) flushed(lbas ...int64) []int64 {
	l.t.Helper()
	l.disk.Forget()
	for _, lba := range lbas {
		l.write(lba, 1, 1)
	}
	require.NoError(l.t, l.Flush(l.t.Context()))
	var got []int64
	for _, op := range l.disk.Ops() {
		if op.Kind == faultdev.Write {
			got = append(got, op.OffBytes/trivet.BlockSize)
		}
	}
	return got
}

// TestOrderOfWriteBacks: what the disk sees in each order, changed while the cache is in use.
func TestOrderOfWriteBacks(t *testing.T) {
	t.Parallel()
	l := orderLab(t, cache.OrderNoop)
	written := []int64{500, 3 * region, 20, 10, region + 1}
	require.Equal(t, written, l.flushed(written...), "as they were written")

	set := l.Settings()
	set.Order = cache.OrderDeadline
	require.NoError(t, l.Set(t.Context(), set))
	require.Equal(t, []int64{3 * region, 10, 20, 500, region + 1}, l.flushed(written...),
		"by place, on from where the last write-back ended, and again from the front")
	require.Equal(t, []int64{region + 9, 5, 30, 700}, l.flushed(30, 700, 5, region+9))

	set.Order = cache.OrderFair
	for i := range int64(3) {
		l.write(2*region+2*i, 1, 1) // dirty when the order changes
	}
	require.NoError(t, l.Set(t.Context(), set))
	require.Equal(t, []int64{2 * region, 2*region + 2, 2*region + 4, 6, 10, region + 1}, l.flushed(10, 6, region+1))
}

// TestFairIsNotHeldUpByAFlood: a flood of writes to one region leaves every other one its turns; by age alone they
// would come last.
func TestFairIsNotHeldUpByAFlood(t *testing.T) {
	t.Parallel()
	l := orderLab(t, cache.OrderFair)
	var lbas []int64
	for i := range int64(600) {
		lbas = append(lbas, 2*region+2*i)
	}
	for i := range int64(5) {
		lbas = append(lbas, 2*i, 9*region+2*i)
	}
	got := l.flushed(lbas...)
	require.Len(t, got, len(lbas))
	for i, lba := range got {
		switch {
		case i < 256, i >= 266:
			require.EqualValues(t, 2, lba/region, "write-back %d", i)
		default:
			require.NotEqual(t, int64(2), lba/region, "write-back %d: one turn of the flood is over", i)
		}
	}
}

func TestUnknownOrder(t *testing.T) {
	t.Parallel()
	cfg := config(cache.WriteBack, small)
	cfg.Order = "cfq"
	require.ErrorIs(t, cfg.Validate(), trivet.ErrInvalid)
}
