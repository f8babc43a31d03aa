package engine

import (
	"math/rand/v2"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
)

// The sum of a block in one volume follows from that in another, without the data: CRC is linear.
func TestSumFollowsFromAnotherVolume(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	data := make([]byte, trivet.BlockSize)
	for range 200 {
		for i := range data {
			data[i] = byte(rng.Uint32())
		}
		a, b := trivet.VolumeID(rng.Uint64()), trivet.VolumeID(rng.Uint64())
		lba := trivet.LBA(rng.Uint64N(lbaMax))
		require.Equal(t, BlockSum(b, lba, data), BlockSum(a, lba, data)^sumDelta(a, b))
		require.Equal(t, BlockSum(b, lba, nil), BlockSum(a, lba, nil)^sumDelta(a, b), "of a tombstone")
	}
	require.Zero(t, sumDelta(7, 7))
	require.NotZero(t, sumDelta(7, 8))
}

// Which versions of a block are garbage.
func TestNeeded(t *testing.T) {
	data, tomb := []byte{kindRef}, []byte{kindTombstone}
	below := []layer{{from: 0, base: Base{9, 1}, blockN: 1}}
	back := []layer{{from: 8, base: Base{1, 3}, blockN: lbaMax}}
	for name, c := range map[string]struct {
		vs     []version
		asked  []trivet.Generation
		layers []layer
		want   []bool
	}{
		"the live one alone": {
			[]version{{5, data}, {3, data}, {0, data}}, []trivet.Generation{Live}, nil, []bool{true, false, false},
		},
		"what a snapshot shows": {
			[]version{{5, data}, {3, data}, {0, data}}, []trivet.Generation{Live, 4}, nil, []bool{true, true, false},
		},
		"nothing at all": {[]version{{5, data}}, []trivet.Generation{4}, nil, []bool{false}},
		"a tombstone that hides": {
			[]version{{5, tomb}, {3, data}}, []trivet.Generation{Live, 3}, nil, []bool{true, true},
		},
		"a tombstone over nothing": {
			[]version{{5, tomb}, {3, data}}, []trivet.Generation{Live}, nil, []bool{false, false},
		},
		"a tombstone over another": {
			[]version{{5, tomb}, {3, tomb}, {1, data}}, []trivet.Generation{Live, 4, 2}, nil, []bool{false, true, true},
		},
		"a tombstone over another volume": {[]version{{5, tomb}}, []trivet.Generation{Live}, below, []bool{true}},
		"left behind by a rollback": {
			[]version{{9, data}, {7, data}, {2, data}}, []trivet.Generation{Live, 3}, back, []bool{true, false, true},
		},
		"a rollback that shows through": {
			[]version{{7, data}, {2, data}}, []trivet.Generation{Live, 3}, back, []bool{false, true},
		},
	} {
		assert.Equal(t, c.want, needed(c.vs, c.asked, c.layers, nil), name)
	}
}

// What is taken out of a set is out, of its long extents too.
func TestBlockSetRemove(t *testing.T) {
	s := new(BlockSet)
	s.add(extent{10, 5})
	s.add(extent{1000, 3 * longExtentN})
	s.remove(extent{12, 2})
	s.remove(extent{1000 + longExtentN, longExtentN})
	var got []extent
	for lba, n := range s.Extents() {
		got = append(got, extent{lba, n})
	}
	require.Equal(t, []extent{{10, 2}, {14, 1}, {1000, longExtentN}, {1000 + 2*longExtentN, longExtentN}}, got)
}
