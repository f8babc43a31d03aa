package iothrottle_test

import (
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/iothrottle"
)

const region = 64 << 20 / trivet.BlockSize

func order(t *testing.T, name string) iothrottle.FlushOrder {
	t.Helper()
	o, err := iothrottle.NewFlushOrder(name, 5*time.Second)
	require.NoError(t, err)
	return o
}

func drain(o iothrottle.FlushOrder, now time.Duration) []trivet.LBA {
	var lbas []trivet.LBA
	for {
		e, ok := o.Next(now)
		if !ok {
			return lbas
		}
		lbas = append(lbas, e.LBA)
	}
}

// TestFlushOrderLosesNothing adds and takes at random: each order gives back every extent exactly once.
func TestFlushOrderLosesNothing(t *testing.T) {
	t.Parallel()
	for _, name := range []string{iothrottle.OrderNoop, iothrottle.OrderDeadline, iothrottle.OrderFair} {
		for seed := range uint64(20) {
			rng := rand.New(rand.NewPCG(seed, 3))
			o, waiting := order(t, name), map[trivet.LBA]iothrottle.Extent{}
			for step := range 3000 {
				now := time.Duration(step) * 10 * time.Millisecond
				if rng.IntN(100) < 55 {
					e := iothrottle.Extent{
						LBA: trivet.LBA(rng.Uint64N(20) * rng.Uint64N(2*region)), BlockN: 1 + rng.IntN(16), Since: now,
					}
					if _, there := waiting[e.LBA]; !there {
						waiting[e.LBA] = e
						o.Add(e)
					}
				} else if e, ok := o.Next(now); ok {
					require.Equal(t, waiting[e.LBA], e, "%s, seed %d", name, seed)
					delete(waiting, e.LBA)
				}
				require.Equal(t, len(waiting), o.Len(), "%s, seed %d", name, seed)
			}
			require.Len(t, drain(o, 0), len(waiting))
		}
	}
}

func TestNoopIsFirstInFirstOut(t *testing.T) {
	t.Parallel()
	o, want := order(t, iothrottle.OrderNoop), []trivet.LBA{9, 3, 7, 1, 8}
	for _, lba := range want {
		o.Add(iothrottle.Extent{LBA: lba, BlockN: 1})
	}
	assert.Equal(t, want, drain(o, time.Hour))
}

// TestDeadlineGoesOneWay: by place, and what is added behind the head waits for the next round.
func TestDeadlineGoesOneWay(t *testing.T) {
	t.Parallel()
	o := order(t, iothrottle.OrderDeadline)
	for _, lba := range []trivet.LBA{500, 3 * region, 20, 10, region + 1} {
		o.Add(iothrottle.Extent{LBA: lba, BlockN: 1})
	}
	e, _ := o.Next(0)
	assert.EqualValues(t, 10, e.LBA)
	o.Add(iothrottle.Extent{LBA: 5, BlockN: 1})
	o.Add(iothrottle.Extent{LBA: 30, BlockN: 1})
	assert.Equal(t, []trivet.LBA{20, 30, 500, region + 1, 3 * region, 5}, drain(o, 0))
}

// TestDeadlineHolds: writes without end ahead of the head do not hold up what is behind it for longer than the
// deadline and one burst; with the sorted order alone they would for ever.
func TestDeadlineHolds(t *testing.T) {
	t.Parallel()
	o := order(t, iothrottle.OrderDeadline)
	now, next, longest := time.Duration(0), trivet.LBA(1000), time.Duration(0)
	for range 1000 {
		o.Add(iothrottle.Extent{LBA: next, BlockN: 1, Since: now})
		next++
	}
	o.Add(iothrottle.Extent{LBA: 1 << 40, BlockN: 1, Since: now}) // where the head never gets to
	o.Add(iothrottle.Extent{LBA: 7, BlockN: 1, Since: now})       // and one that comes first
	far := false
	for range 20_000 {
		now += 10 * time.Millisecond
		e, ok := o.Next(now)
		require.True(t, ok)
		far = far || e.LBA == 1<<40
		longest = max(longest, now-e.Since)
		o.Add(iothrottle.Extent{LBA: next, BlockN: 1, Since: now})
		next++
	}
	assert.True(t, far)
	// 1000 wait at 100 a second: 10 s is what first in, first out would take; all of them are late.
	assert.Less(t, longest, 16*time.Second)
}

// TestFairTakesTurns: a flood in one region leaves every other region its turns.
func TestFairTakesTurns(t *testing.T) {
	t.Parallel()
	o := order(t, iothrottle.OrderFair)
	for i := range 1000 {
		o.Add(iothrottle.Extent{LBA: trivet.LBA(2*region + i), BlockN: 1})
	}
	for _, r := range []int{0, 5, 9} {
		for i := range 40 {
			o.Add(iothrottle.Extent{LBA: trivet.LBA(r*region + i), BlockN: 1})
		}
	}
	got := drain(o, 0)
	require.Len(t, got, 1120)
	turns := map[trivet.LBA]int{}
	for _, lba := range got[:4*16] {
		turns[lba/region]++
	}
	assert.Equal(t, map[trivet.LBA]int{0: 16, 2: 16, 5: 16, 9: 16}, turns)
	last := slices.IndexFunc(got, func(lba trivet.LBA) bool { return lba == 9*region+39 })
	assert.Less(t, last, 3*4*16, "the flood has not held up the small ones")
	for _, r := range []trivet.LBA{0, 2, 5, 9} {
		var in []trivet.LBA
		for _, lba := range got {
			if lba/region == r {
				in = append(in, lba)
			}
		}
		assert.True(t, slices.IsSorted(in), "by place within region %d", r)
	}
}

func TestFlushOrderRefusals(t *testing.T) {
	t.Parallel()
	for name, deadline := range map[string]time.Duration{
		"cfq": time.Second, "": time.Second, iothrottle.OrderDeadline: 0,
	} {
		_, err := iothrottle.NewFlushOrder(name, deadline)
		require.ErrorIs(t, err, trivet.ErrInvalid)
	}
}
