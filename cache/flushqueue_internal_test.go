package cache

import (
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
)

// TestQueueLosesNothing: each order gives back every block of a collection exactly once, and allocates nothing.
func TestQueueLosesNothing(t *testing.T) {
	t.Parallel()
	for _, o := range Orders() {
		q := newFlushQueue(time.Second)
		for seed := range uint64(50) {
			r := rand.New(rand.NewPCG(seed, 3))
			q.begin(o)
			want := map[trivet.LBA]bool{}
			for range r.IntN(400) {
				if lba := trivet.LBA(r.Uint64N(9 * regionBlocks)); !want[lba] {
					want[lba] = true
					q.add(due{lba: lba, turn: int32(lba / regionBlocks), since: time.Duration(len(want)) * time.Millisecond})
				}
			}
			q.arrange()
			for now := time.Duration(0); ; now += 20 * time.Millisecond {
				d, ok := q.next(now)
				if !ok {
					break
				}
				require.True(t, want[d.lba], "%s, seed %d: block %d twice", o, seed, d.lba)
				delete(want, d.lba)
				if r.IntN(3) > 0 {
					q.flew(d.lba + 1)
				}
			}
			require.Empty(t, want, "%s, seed %d", o, seed)
		}
	}
}

func TestQueueAllocatesNothing(t *testing.T) {
	q := newFlushQueue(time.Second)
	for _, o := range Orders() {
		require.Zero(t, testing.AllocsPerRun(100, func() {
			q.begin(o)
			for i := range trivet.LBA(100) {
				q.add(due{lba: i * 7919 % 101})
			}
			q.arrange()
			for _, ok := q.next(time.Hour); ok; _, ok = q.next(time.Hour) {
				q.flew(5)
			}
		}), o)
	}
}

// TestLateBlocksComeFirst: what has been dirty for two deadlines is not held up by what lies before it, and one burst
// goes on from there.
func TestLateBlocksComeFirst(t *testing.T) {
	t.Parallel()
	q := newFlushQueue(time.Second)
	q.begin(OrderDeadline)
	q.add(due{lba: 5000, since: 0})
	for i := range trivet.LBA(100) {
		q.add(due{lba: 10 * i, since: 2 * time.Second})
		q.add(due{lba: 6000 + i*10, since: 2 * time.Second})
	}
	q.arrange()
	var got []trivet.LBA
	for range 30 {
		d, ok := q.next(2*time.Second + time.Millisecond)
		require.True(t, ok)
		q.flew(d.lba + 1)
		got = append(got, d.lba)
	}
	require.EqualValues(t, 5000, got[0])
	require.True(t, slices.IsSorted(got), "the sweep goes on from there: %v", got)
	q.burst = 0 // of what follows all are late: the oldest of them is at the beginning
	d, ok := q.next(time.Hour)
	require.True(t, ok)
	require.Zero(t, d.lba)
}

// TestRegionsFollowTheList: random changes of the dirty list are followed by the lists of regions, in the same order.
func TestRegionsFollowTheList(t *testing.T) {
	t.Parallel()
	for seed := range uint64(30) {
		r := rand.New(rand.NewPCG(seed, 9))
		const n = 60
		d := newDirtySlots(make([]trivet.LBA, n))
		if seed%2 == 0 {
			d.byRegion(true)
		}
		in := map[int32]bool{}
		for range 500 {
			s := int32(r.IntN(n))
			switch {
			case in[s]:
				d.remove(s)
				delete(in, s)
			case r.IntN(4) == 0 && d.n > 0: // takes the place of another slot of the same block
				old := d.head
				d.lba[s] = d.lba[old]
				d.replace(old, s)
				delete(in, old)
				in[s] = true
			case r.IntN(3) == 0 && d.n > 0:
				d.lba[s] = trivet.LBA(r.Uint64N(5 * regionBlocks))
				after := d.tail
				for range r.IntN(d.n + 1) {
					after = d.prev[after]
				}
				d.insertAfter(s, after)
				in[s] = true
			default:
				d.lba[s] = trivet.LBA(r.Uint64N(5 * regionBlocks))
				d.pushBack(s)
				in[s] = true
			}
		}
		d.byRegion(true)
		want := map[uint64][]int32{}
		for s := d.head; s != none; s = d.next[s] {
			number := uint64(d.lba[s] / regionBlocks)
			want[number] = append(want[number], s)
		}
		got := map[uint64][]int32{}
		for x := d.regions.first; x != nil; x = x.after {
			require.Same(t, x, x.after.before)
			require.NotContains(t, got, x.number)
			for s := x.head; s != none; s = x.next[s] {
				got[x.number] = append(got[x.number], s)
			}
			require.Len(t, got[x.number], x.n)
			if x.after == d.regions.first {
				break
			}
		}
		require.Equal(t, want, got, "seed %d", seed)
		require.Len(t, d.regions.at, len(want))
	}
}
