package engine

import (
	"encoding/binary"
	"hash/crc32"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
)

// TestSnapshotsThatStay: which snapshots a commit deletes, however many both states begin with.
func TestSnapshotsThatStay(t *testing.T) {
	state := func(gens ...trivet.Generation) *State {
		s := &State{}
		for _, g := range gens {
			s.Snapshots = append(s.Snapshots, Snapshot{ID: uint64(g) + 100, Generation: g})
		}
		return s
	}
	for name, c := range map[string]struct {
		old, next *State
		sameN     int
		all       bool
	}{
		"none":           {state(), state(), 0, true},
		"the same":       {state(1, 2, 3), state(1, 2, 3), 3, true},
		"one more":       {state(1, 2), state(1, 2, 5), 2, true},
		"the first":      {state(), state(5), 0, true},
		"the oldest":     {state(1, 2, 3), state(2, 3), 0, false},
		"the newest":     {state(1, 2, 3), state(1, 2), 2, false},
		"the last":       {state(1), state(), 0, false},
		"one and more":   {state(1, 2, 3), state(1, 3, 4), 1, false},
		"one for others": {state(1, 2, 3), state(1, 2, 4, 5), 2, false},
	} {
		require.Equal(t, c.sameN, c.next.sameN(c.old), name)
		require.Equal(t, c.all, c.next.keepsAllOf(c.old), name)
	}
	renamed := state(1, 2)
	renamed.Snapshots[1].ID++
	require.Equal(t, 1, renamed.sameN(state(1, 2)))
	require.ErrorIs(t, renamed.snapshotsFollow(state(1, 2)), trivet.ErrInvalid)
	require.ErrorIs(t, state(1, 2, 4).snapshotsFollow(state(1, 2)), trivet.ErrInvalid, "of another generation than ends")
}

// TestRecordSum: the sum is CRC-32C over the volume's ID and the record, and takes no memory.
func TestRecordSum(t *testing.T) {
	body := []byte("a record of a volume, or not")
	for _, id := range []trivet.VolumeID{0, 1, 0x0123456789abcdef, ^trivet.VolumeID(0)} {
		whole := append(binary.BigEndian.AppendUint64(nil, uint64(id)), body...)
		require.Equal(t, crc32.Checksum(whole, castagnoli), recordSum(id, body))
	}
	require.Zero(t, testing.AllocsPerRun(100, func() { _ = recordSum(7, body) }))
}
