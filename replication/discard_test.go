package replication

import (
	"math/rand/v2"
	"testing"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/replication/raftgroup"
)

const (
	wideBlocks = 9 << 10 // a tombstone for each is more than a batch of wideBatch takes
	wideBatch  = 256 << 10
)

// mustApply applies requests as one entry, which must all take effect.
func (m *testMachine) mustApply(t *testing.T, index uint64, reqs ...request) {
	t.Helper()
	res, err := m.Apply([]raftgroup.Entry{{Index: index, Term: 1, Data: appendEntry(nil, testVolume, reqs)}})
	require.NoError(t, err)
	outs, ok := res[0].([]result)
	require.True(t, ok)
	for i, r := range outs {
		require.Equal(t, outApplied, r.out, "request %d", i)
	}
}

// wideMachine is a machine with a snapshot of a volume that is full of data. Its next index and sequence are returned.
func wideMachine(t *testing.T) (m *testMachine, index, seq uint64) {
	t.Helper()
	m = openSizedMachine(t, vfs.NewCrashableMem(), wideBlocks*trivet.BlockSize, wideBatch)
	m.mustApply(t, 1, sealed(request{op: opFence, epoch: 1}))
	const n = 16
	index, seq = 2, 1
	for lba := 0; lba < wideBlocks; lba += n {
		m.mustApply(t, index, writeReq(1, seq, seq, trivet.LBA(lba), block(n, byte(lba/n)|1)))
		index, seq = index+1, seq+1
	}
	m.mustApply(t, index, freezeReq(1, 7))
	return m, index + 1, seq
}

// notUnderRace skips, with -short, what one goroutine does for a minute under the race detector.
func notUnderRace(t *testing.T) {
	t.Helper()
	if testing.Short() {
		t.Skip("one goroutine, whose work make test checks")
	}
}

// A discard, a zeroing or a wipe of more stored blocks than one batch of the engine takes is applied in pieces: all of
// its blocks read as zeroes afterwards, what follows it in its entry comes after it, and the snapshot shows what it
// did. It used to stop the replica, and every other one.
func TestMachineCutsDiscards(t *testing.T) {
	t.Parallel()
	notUnderRace(t)
	for _, op := range []opCode{opDiscard, opWriteZeroes, opWipe} {
		t.Run(op.String(), func(t *testing.T) {
			t.Parallel()
			m, index, seq := wideMachine(t)
			defer func() { require.NoError(t, m.eng.Close()) }()
			all := sealed(request{op: opWipe, epoch: 1})
			if op != opWipe {
				all = zeroReq(op, 1, seq+1, seq, 0, wideBlocks)
			}
			m.mustApply(t, index, writeReq(1, seq, seq, 40, block(2, 0x77)), all, writeReq(1, seq+2, seq, 50, block(1, 0x99)))
			p, zero := make([]byte, trivet.BlockSize), make([]byte, trivet.BlockSize)
			for lba := range trivet.LBA(wideBlocks) {
				require.NoError(t, m.vol.ReadAt(p, lba))
				if lba == 50 {
					require.Equal(t, block(1, 0x99), p)
				} else {
					require.Equal(t, zero, p, "block %d", lba)
				}
			}
			require.NoError(t, m.vol.ReadAtGeneration(p, 40, 0))
			assert.Equal(t, block(16, 40/16|1)[40%16*trivet.BlockSize:][:trivet.BlockSize], p)
			applied, _ := m.Applied()
			assert.Equal(t, index, applied)
		})
	}
}

// A crash between two pieces leaves an entry that is not applied, and is applied once more: to the same end.
func TestMachineCutDiscardAfterCrash(t *testing.T) {
	t.Parallel()
	notUnderRace(t)
	m, index, seq := wideMachine(t)
	entry := []request{
		writeReq(1, seq, seq, 40, block(2, 0x77)), zeroReq(opDiscard, 1, seq+1, seq, 0, wideBlocks),
		writeReq(1, seq+2, seq, 50, block(1, 0x99)),
	}
	_, err := m.Flush()
	require.NoError(t, err)
	other := openSizedMachine(t, m.fs.CrashClone(vfs.CrashCloneCfg{}), wideBlocks*trivet.BlockSize, wideBatch)
	defer func() { require.NoError(t, other.eng.Close()) }()
	other.mustApply(t, index, entry...)

	before := *m.view.Load()
	batch := m.vol.NewBatch()
	require.NoError(t, batch.Write(40, block(2, 0x77)))
	require.NoError(t, m.zero(&batch, 0, wideBlocks/2, index, &before)) // it is committed at least once
	require.NoError(t, batch.Close())
	flushed, err := m.Flush()
	require.NoError(t, err)
	require.Equal(t, before.AppliedIndex, flushed, "the log is not cut behind the entry")
	p := make([]byte, trivet.BlockSize)
	require.NoError(t, m.vol.ReadAt(p, 0))
	require.Equal(t, make([]byte, trivet.BlockSize), p, "some of it is done")
	require.NoError(t, m.eng.Close())
	again := openSizedMachine(t, m.fs.CrashClone(vfs.CrashCloneCfg{}), wideBlocks*trivet.BlockSize, wideBatch)
	defer func() { require.NoError(t, again.eng.Close()) }()
	again.mustApply(t, index, entry...)
	require.Equal(t, other.digest(t), again.digest(t))
}

// However discards are cut, the same log gives the same state (H18), whatever crashed on the way.
func TestMachineTwinsWithCutDiscards(t *testing.T) {
	t.Parallel()
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 4))
	log := randomLog(rnd, 300)
	calm, rough := newTestMachine(t), newTestMachine(t)
	_, err := calm.Apply(log)
	require.NoError(t, err)
	for at := 0; at < len(log); {
		rough.zeroBlocksMax, rough.zeroBytesMax = 1+rnd.Int64N(4), 16
		n := min(1+rnd.IntN(20), len(log)-at)
		_, err := rough.Apply(log[at : at+n])
		require.NoError(t, err)
		at += n
		if rnd.IntN(6) == 0 {
			rough.crash(t, rnd, rnd.IntN(101))
			at = again(log, rough, rnd)
		}
	}
	require.Equal(t, calm.digest(t), rough.digest(t), "seed %d", seed)
}

// An entry that makes the volume grow, and is cut behind what it does to the new blocks, stops nobody; whether a write
// before the growth was within the volume does not depend on where it is cut, nor on a crash there.
func TestMachineCutsDiscardBehindGrowth(t *testing.T) {
	t.Parallel()
	const blockN = twinBytes / trivet.BlockSize
	entry := []request{
		writeReq(1, 20, 20, blockN+1, block(1, 0x11)), // refused: it comes before the growth
		sealed(request{op: opResize, arg: 2 * blockN * trivet.BlockSize}),
		writeReq(1, 21, 20, blockN+3, block(1, 0x22)),
		zeroReq(opDiscard, 1, 22, 20, 0, 4),
		zeroReq(opDiscard, 1, 23, 20, 4, 4),
	}
	apply := func(m *testMachine) []result {
		res, err := m.Apply([]raftgroup.Entry{{Index: 4, Term: 1, Data: appendEntry(nil, testVolume, entry)}})
		require.NoError(t, err)
		out, ok := res[0].([]result)
		require.True(t, ok)
		return out
	}
	open := func() *testMachine {
		m := newTestMachine(t)
		m.mustApply(t, 1, sealed(request{op: opFence, epoch: 1}))
		m.mustApply(t, 2, writeReq(1, 1, 1, 0, block(8, 0x33)))
		m.mustApply(t, 3, freezeReq(1, 7))
		m.zeroBlocksMax, m.zeroBytesMax = 4, 16
		return m
	}
	whole, cut := open(), open()
	whole.zeroBytesMax = 1 << 20
	want := apply(whole)
	require.Equal(t, outRange, want[0].out)

	before := *cut.view.Load()
	for i := range entry {
		cut.core.step(&entry[i])
	}
	batch := cut.vol.NewBatch()
	require.NoError(t, batch.Write(blockN+3, block(1, 0x22)))
	require.NoError(t, cut.zero(&batch, 0, 8, 4, &before)) // committed in between
	require.NoError(t, batch.Close())
	require.ErrorIs(t, cut.vol.ReadAt(make([]byte, trivet.BlockSize), blockN+3), trivet.ErrOutOfRange, "not yet")
	_, err := cut.Flush()
	require.NoError(t, err)
	cut.crash(t, rand.New(rand.NewPCG(1, 2)), 100)
	cut.zeroBlocksMax, cut.zeroBytesMax = 4, 16
	require.Equal(t, want, apply(cut))
	require.Equal(t, whole.digest(t), cut.digest(t))
}
