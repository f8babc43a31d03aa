package replication

import (
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"testing"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/engine"
	"github.com/trivet-csi/trivet/replication/raftgroup"
)

const (
	twinBlocks = 64
	twinBytes  = twinBlocks * trivet.BlockSize
)

// testMachine is a machine on an engine of its own.
type testMachine struct {
	*machine
	fs *vfs.MemFS
}

func openTestMachine(t *testing.T, fs *vfs.MemFS) *testMachine {
	t.Helper()
	return openSizedMachine(t, fs, twinBytes, 0)
}

// openSizedMachine opens one of a volume of a size, whose batches are bounded; 0: as ever.
func openSizedMachine(t *testing.T, fs *vfs.MemFS, sizeBytes int64, batchBytesMax int) *testMachine {
	t.Helper()
	eng, err := engine.Open(engine.Config{
		FS: fs, Dir: "engine", CacheBytes: 1 << 20, MemTableBytes: 1 << 20, BatchBytesMax: batchBytesMax,
	})
	require.NoError(t, err)
	require.NoError(t, eng.CreateVolume(testVolume, "r1", sizeBytes))
	vol, err := eng.OpenVolume(testVolume)
	require.NoError(t, err)
	m, err := newMachine(testVolume, eng, vol)
	require.NoError(t, err)
	tm := &testMachine{machine: m, fs: fs}
	return tm
}

func newTestMachine(t *testing.T) *testMachine {
	t.Helper()
	m := openTestMachine(t, vfs.NewCrashableMem())
	t.Cleanup(func() { require.NoError(t, m.eng.Close()) })
	return m
}

// crash loses a share of what was not synced and starts anew.
func (m *testMachine) crash(t *testing.T, rnd *rand.Rand, unsyncedPercent int) {
	t.Helper()
	after := m.fs.CrashClone(vfs.CrashCloneCfg{UnsyncedDataPercent: unsyncedPercent, RNG: rnd})
	require.NoError(t, m.eng.Close())
	*m = *openTestMachine(t, after)
}

func (m *testMachine) digest(t *testing.T) [32]byte {
	t.Helper()
	d, err := m.vol.Digest()
	require.NoError(t, err)
	return d
}

// randomLog is a log as leaders would make it: retried and stale copies, fences, resizes, wipes,
// membership changes and terms that rise.
func randomLog(rnd *rand.Rand, n int) []raftgroup.Entry {
	var entries []raftgroup.Entry
	var sent []request
	epoch, next, size := trivet.Epoch(0), uint64(1), uint64(twinBytes)
	index, term := uint64(0), uint64(1)
	one := func() request {
		switch k := rnd.IntN(100); {
		case k < 1 || epoch == 0:
			if rnd.IntN(4) > 0 || epoch == 0 {
				epoch += trivet.Epoch(1 + rnd.IntN(2))
				next = 1
			}
			return sealed(request{op: opFence, epoch: epoch})
		case k < 3:
			size = min(max(size+uint64(rnd.IntN(3)-1)*4*trivet.BlockSize, trivet.BlockSize), 2*twinBytes)
			return sealed(request{op: opResize, arg: size})
		case k < 4:
			return sealed(request{op: opWipe, epoch: epoch - trivet.Epoch(rnd.IntN(2)) + 1})
		case k < 25 && len(sent) > 0:
			return sent[len(sent)-1-rnd.IntN(min(len(sent), 30))]
		}
		low := next - min(next-1, rnd.Uint64N(8))
		lba, blockN := trivet.LBA(rnd.IntN(twinBlocks+4)), 1+rnd.IntN(6)
		r := zeroReq(opDiscard, epoch, next, low, lba, uint64(blockN))
		if rnd.IntN(4) > 0 {
			r = writeReq(epoch, next, low, lba, block(blockN, byte(rnd.Uint32())))
		}
		next += 1 + rnd.Uint64N(2)
		sent = append(sent, r)
		return r
	}
	for range n {
		index += 1 + rnd.Uint64N(2) // no-ops of leaders do not reach the machine
		term += rnd.Uint64N(8) / 7
		e := raftgroup.Entry{Index: index, Term: term}
		if rnd.IntN(20) == 0 {
			learner := trivet.ReplicaID(fmt.Sprint(index))
			e.Members = []raftgroup.Member{{Replica: "r1", Node: "a"}, {Replica: learner, Learner: true}}
		} else {
			var reqs []request
			for range 1 + rnd.IntN(5) {
				reqs = append(reqs, one())
			}
			switch rnd.IntN(16) { // these stand alone
			case 0:
				reqs = []request{freezeReq(epoch, 1+rnd.Uint64N(12))}
			case 1:
				reqs = []request{sealed(request{op: opDrop, arg: 1 + rnd.Uint64N(12)})}
			case 2:
				reqs = []request{sealed(request{op: opRollback, epoch: epoch, arg: 1 + rnd.Uint64N(12)})}
			}
			e.Data = appendEntry(nil, testVolume, reqs)
		}
		entries = append(entries, e)
	}
	return entries
}

// The same log gives the same digest, however it was cut into batches, whatever crashed on the way,
// and whichever entries were delivered again (H2, H3, I4). At every step the twin that was restored
// from an image agrees as well.
func TestMachineTwins(t *testing.T) {
	t.Parallel()
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 3))
	log := randomLog(rnd, 600)
	calm, rough, third := newTestMachine(t), newTestMachine(t), newTestMachine(t)
	want := map[uint64][]any{} // results by index
	for at := 0; at < len(log); at++ {
		res, err := calm.Apply(log[at : at+1])
		require.NoError(t, err)
		want[log[at].Index] = res
	}
	for at := 0; at < len(log); {
		n := min(1+rnd.IntN(20), len(log)-at)
		res, err := rough.Apply(log[at : at+n])
		require.NoError(t, err)
		for i := range n {
			if res[i] != nil {
				assert.Equal(t, want[log[at+i].Index][0], res[i], "result of index %d", log[at+i].Index)
			}
		}
		at += n
		switch rnd.IntN(6) {
		case 0:
			index, err := rough.Flush()
			require.NoError(t, err)
			applied, _ := rough.Applied()
			require.Equal(t, applied, index)
		case 1:
			rough.crash(t, rnd, rnd.IntN(101))
			at = again(log, rough, rnd)
		case 2:
			ours, _ := rough.Applied()
			if theirs, _ := third.Applied(); theirs <= ours { // rough may have gone back in a crash
				restoreFrom(t, third, rough)
				require.Equal(t, rough.digest(t), third.digest(t))
			}
		}
	}
	require.Equal(t, calm.digest(t), rough.digest(t))
	restoreFrom(t, third, rough)
	res, err := third.Apply(log[len(log)-50:])
	require.NoError(t, err)
	assert.Equal(t, make([]any, 50), res, "nothing is applied twice")
	require.Equal(t, calm.digest(t), third.digest(t))
}

// again returns a position in the log at or before the first entry that m has not applied.
func again(log []raftgroup.Entry, m *testMachine, rnd *rand.Rand) int {
	applied, _ := m.Applied()
	at := 0
	for at < len(log) && log[at].Index <= applied {
		at++
	}
	return at - rnd.IntN(min(at, 10)+1)
}

func restoreFrom(t *testing.T, to, from *testMachine) {
	t.Helper()
	img, err := from.Image(nil)
	require.NoError(t, err)
	b, err := io.ReadAll(img)
	require.NoError(t, err)
	require.NoError(t, img.Close())
	require.NoError(t, to.Restore(bytes.NewReader(b)))
	wantIndex, wantTerm := from.Applied()
	index, term := to.Applied()
	require.Equal(t, []uint64{wantIndex, wantTerm}, []uint64{index, term})
}

// Damage in an entry stops the replica: skipping it would make the replica differ for ever.
func TestMachineRefusesDamage(t *testing.T) {
	t.Parallel()
	m := newTestMachine(t)
	fence := sealed(request{op: opFence, epoch: 1})
	good := appendEntry(nil, testVolume, []request{fence, writeReq(1, 1, 1, 0, block(1, 1))})
	bad := bytes.Clone(good)
	bad[len(bad)-100] ^= 4
	before := m.digest(t)
	_, err := m.Apply([]raftgroup.Entry{{Index: 1, Term: 1, Data: good}, {Index: 2, Term: 1, Data: bad}})
	require.ErrorIs(t, err, trivet.ErrCorrupt)
	assert.Equal(t, before, m.digest(t), "the whole batch is off")
	index, _ := m.Applied()
	assert.Zero(t, index)
}

// Indexes that do not rise are damage too (I3).
func TestMachineRefusesDisorder(t *testing.T) {
	t.Parallel()
	m := newTestMachine(t)
	data := appendEntry(nil, testVolume, []request{sealed(request{op: opFence, epoch: 1})})
	_, err := m.Apply([]raftgroup.Entry{{Index: 5, Term: 1, Data: data}, {Index: 5, Term: 1, Data: data}})
	require.ErrorIs(t, err, trivet.ErrCorrupt)
}

// A flush reads back what the disk has: without one, nothing may be cut from the log (H1).
func TestMachineFlush(t *testing.T) {
	t.Parallel()
	m := newTestMachine(t)
	data := appendEntry(nil, testVolume, []request{sealed(request{op: opFence, epoch: 1})})
	_, err := m.Apply([]raftgroup.Entry{{Index: 7, Term: 2, Data: data}})
	require.NoError(t, err)
	durable, err := m.vol.DurableState()
	require.NoError(t, err)
	assert.Zero(t, durable.AppliedIndex)
	index, err := m.Flush()
	require.NoError(t, err)
	assert.Equal(t, uint64(7), index)
	m.crash(t, rand.New(rand.NewPCG(1, 1)), 0)
	index, term := m.Applied()
	assert.Equal(t, []uint64{7, 2}, []uint64{index, term})
}

// The session window is part of what a crash keeps: a copy that comes after it is known (H3, H39).
func TestMachineSessionSurvives(t *testing.T) {
	t.Parallel()
	m := newTestMachine(t)
	first := writeReq(1, 1, 1, 3, block(1, 1))
	apply := func(index uint64, reqs ...request) []result {
		res, err := m.Apply([]raftgroup.Entry{{Index: index, Term: 1, Data: appendEntry(nil, testVolume, reqs)}})
		require.NoError(t, err)
		out, ok := res[0].([]result)
		require.True(t, ok)
		return out
	}
	apply(1, sealed(request{op: opFence, epoch: 1}), first, writeReq(1, 2, 1, 3, block(1, 2)))
	_, err := m.Flush()
	require.NoError(t, err)
	m.crash(t, rand.New(rand.NewPCG(1, 1)), 0)
	assert.Equal(t, outDuplicate, apply(2, first)[0].out)
	p := make([]byte, trivet.BlockSize)
	require.NoError(t, m.vol.ReadAt(p, 3))
	assert.Equal(t, block(1, 2), p)
}

// An image of a lower epoch never replaces a state that knows a fence (I7).
func TestMachineRestoreKeepsFence(t *testing.T) {
	t.Parallel()
	old, fenced := newTestMachine(t), newTestMachine(t)
	for i, m := range []*testMachine{old, fenced} {
		data := appendEntry(nil, testVolume, []request{sealed(request{op: opFence, epoch: trivet.Epoch(1 + i)})})
		_, err := m.Apply([]raftgroup.Entry{{Index: 7, Term: 2, Data: data}})
		require.NoError(t, err)
	}
	img, err := old.Image(nil)
	require.NoError(t, err)
	require.Error(t, fenced.Restore(img))
	require.NoError(t, img.Close())
	assert.Equal(t, trivet.Epoch(2), fenced.view.Load().Epoch)
}
