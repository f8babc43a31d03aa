package replication

import (
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/engine"
	"github.com/trivet-csi/trivet/replication/raftgroup"
)

func freezeReq(epoch trivet.Epoch, id uint64) request {
	return sealed(request{op: opFreeze, epoch: epoch, arg: id})
}

func entryOf(index uint64, reqs ...request) raftgroup.Entry {
	return raftgroup.Entry{Index: index, Term: 1, Data: appendEntry(nil, testVolume, reqs)}
}

// A snapshot shows what was before its place in the log and nothing after it, however entries are gathered into calls
// of Apply: replicas must not differ.
func TestFreezeDividesTheLog(t *testing.T) {
	t.Parallel()
	all := []raftgroup.Entry{
		entryOf(1, sealed(request{op: opFence, epoch: 1})),
		entryOf(2, writeReq(1, 1, 1, 5, block(1, 1))),
		entryOf(3, freezeReq(1, 70)),
		entryOf(4, writeReq(1, 2, 1, 5, block(1, 2)), writeReq(1, 3, 1, 6, block(1, 3))),
		entryOf(5, freezeReq(1, 71)),
		entryOf(6, freezeReq(1, 71)),
		entryOf(7, zeroReq(opDiscard, 1, 4, 1, 5, 1)),
	}
	whole := newTestMachine(t)
	_, err := whole.Apply(all)
	require.NoError(t, err)
	for _, cut := range []int{1, 2, 3, 4, 5, 6, 7} {
		m := newTestMachine(t)
		results, err := m.Apply(all[:cut])
		require.NoError(t, err)
		rest, err := m.Apply(all[cut:])
		require.NoError(t, err)
		results = append(results, rest...)
		require.Equal(t, result{out: outApplied, epoch: 1, sizeBytes: twinBytes, generation: 1},
			results[4].([]result)[0])
		require.Equal(t, outDuplicate, results[5].([]result)[0].out)
		require.Equal(t, trivet.Generation(1), results[5].([]result)[0].generation)

		st := m.vol.State()
		require.Equal(t, trivet.Generation(2), st.Generation)
		require.Equal(t, []engine.Snapshot{{ID: 70, Generation: 0}, {ID: 71, Generation: 1}}, st.Snapshots)
		require.Equal(t, *m.view.Load(), st)
		for gen, want := range map[trivet.Generation][]byte{
			0: block(1, 1), 1: block(1, 2), engine.Live: make([]byte, trivet.BlockSize),
		} {
			p := make([]byte, trivet.BlockSize)
			require.NoError(t, m.vol.ReadAtGeneration(p, 5, gen))
			require.Equal(t, want, p, "generation %d", gen)
		}
		require.Equal(t, whole.digest(t), m.digest(t), "cut at %d", cut)
	}
}

// What a snapshot is survives a restart of the machine, and a drop takes it out for good.
func TestDropSnapshot(t *testing.T) {
	t.Parallel()
	m := newTestMachine(t)
	_, err := m.Apply([]raftgroup.Entry{entryOf(1, freezeReq(0, 70)), entryOf(2, freezeReq(0, 71))})
	require.NoError(t, err)
	m.machine, err = newMachine(testVolume, m.eng, m.vol)
	require.NoError(t, err)
	shown := m.view.Load().Snapshots
	_, err = m.Apply([]raftgroup.Entry{
		entryOf(3, sealed(request{op: opDrop, arg: 70})), entryOf(4, sealed(request{op: opDrop, arg: 70})),
	})
	require.NoError(t, err)
	require.Equal(t, []engine.Snapshot{{ID: 71, Generation: 1}}, m.vol.State().Snapshots)
	require.Equal(t, []engine.Snapshot{{ID: 70, Generation: 0}, {ID: 71, Generation: 1}}, shown, "a view changed in place")
}

func TestFreezeOfTooMany(t *testing.T) {
	t.Parallel()
	c := core{sizeBytes: trivet.BlockSize, win: newWindow()}
	for i := range uint64(engine.SnapshotsMax) {
		res, _ := c.step(&request{op: opFreeze, arg: 1 + i})
		require.Equal(t, outApplied, res.out)
	}
	req := request{op: opFreeze, arg: 5000}
	res, _ := c.step(&req)
	require.ErrorIs(t, res.err(&req), trivet.ErrNoSpace)
}

// A request that changes the generation of blocks shares its entry with no other.
func TestFreezeBesideOthersIsDamage(t *testing.T) {
	t.Parallel()
	for _, reqs := range [][]request{
		{freezeReq(1, 7), writeReq(1, 1, 1, 0, block(1, 1))},
		{writeReq(1, 1, 1, 0, block(1, 1)), sealed(request{op: opDrop, arg: 7})},
	} {
		_, err := decodeEntry(nil, testVolume, appendEntry(nil, testVolume, reqs))
		require.ErrorIs(t, err, trivet.ErrCorrupt)
	}
	_, err := decodeEntry(nil, testVolume, appendEntry(nil, testVolume, []request{freezeReq(1, 7)}))
	require.NoError(t, err)
}

// A rollback divides the log as a freeze does.
func TestRollbackDividesTheLog(t *testing.T) {
	t.Parallel()
	all := []raftgroup.Entry{
		entryOf(1, sealed(request{op: opFence, epoch: 1})),
		entryOf(2, writeReq(1, 1, 1, 5, block(1, 1))),
		entryOf(3, freezeReq(1, 70)),
		entryOf(4, writeReq(1, 2, 1, 5, block(1, 2))),
		entryOf(5, sealed(request{op: opRollback, epoch: 1, arg: 70})),
		entryOf(6, writeReq(1, 3, 1, 6, block(1, 3))),
	}
	whole := newTestMachine(t)
	_, err := whole.Apply(all)
	require.NoError(t, err)
	for cut := 1; cut < len(all); cut++ {
		m := newTestMachine(t)
		for _, part := range [][]raftgroup.Entry{all[:cut], all[cut:]} {
			_, err := m.Apply(part)
			require.NoError(t, err)
		}
		p := make([]byte, 2*trivet.BlockSize)
		require.NoError(t, m.vol.ReadAt(p, 5))
		require.Equal(t, append(block(1, 1), block(1, 3)...), p)
		require.Equal(t, whole.digest(t), m.digest(t), "cut at %d", cut)
	}
}

// A node asks for a freeze on its holder's behalf, and gets nothing else that way: a wipe least of all.
func TestFreezeOverTheWireIsAFreeze(t *testing.T) {
	t.Parallel()
	for _, op := range []opCode{opWrite, opFence, opWipe, opDrop, opRollback} {
		_, err := new(Host).freeze(t.Context(), "n1", testVolume, &request{op: op, epoch: 1, arg: 7})
		require.ErrorIs(t, err, trivet.ErrInvalid, "%s", op)
	}
}
