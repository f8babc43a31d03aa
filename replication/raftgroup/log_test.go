package raftgroup

import (
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/hashicorp/raft"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
)

const logGroup = trivet.VolumeID(0x11)

func testLogOptions(fs vfs.FS) logOptions {
	return logOptions{fs: fs, dir: "/disk/v", group: logGroup, segmentBytes: 2048}
}

// newTestLog makes and opens a log.
func newTestLog(t *testing.T, fs vfs.FS) *segmentLog {
	t.Helper()
	require.NoError(t, makeDir(fs, "/disk/v"))
	require.NoError(t, createSlots(fs, "/disk/v", fileMark, magicMark, put64(nil, 0, 0)))
	l, err := createLog(testLogOptions(fs))
	require.NoError(t, err)
	require.NoError(t, l.close())
	l, err = openLog(testLogOptions(fs))
	require.NoError(t, err)
	return l
}

// logModel is what a log should hold.
type logModel struct {
	first   uint64
	entries []raft.Log
}

func (m logModel) last() uint64 { return m.first + uint64(len(m.entries)) - 1 }

func (m logModel) clone() logModel {
	return logModel{m.first, append([]raft.Log(nil), m.entries...)}
}

// matches returns "" when the log holds exactly what the model does.
func (m logModel) matches(l *segmentLog) string {
	first, last := l.bounds()
	if len(m.entries) == 0 {
		if last >= first {
			return fmt.Sprintf("has entries %d to %d, want none", first, last)
		}
		return ""
	}
	if first != m.first || last != m.last() {
		return fmt.Sprintf("has entries %d to %d, want %d to %d", first, last, m.first, m.last())
	}
	for _, want := range m.entries {
		var got raft.Log
		if err := l.read(want.Index, &got); err != nil {
			return err.Error()
		}
		if got.Index != want.Index || got.Term != want.Term || got.Type != want.Type || !bytes.Equal(got.Data, want.Data) {
			return fmt.Sprintf("entry %d is %v, want %v", want.Index, got, want)
		}
	}
	var e raft.Log
	for _, index := range []uint64{0, m.first - 1, m.last() + 1} {
		if err := l.read(index, &e); err != raft.ErrLogNotFound { //nolint:errorlint // identity is the contract
			return fmt.Sprintf("read of missing entry %d: %v", index, err)
		}
	}
	return ""
}

// logStep makes one random change of a log and of its model.
func logStep(rng *rand.Rand, l *segmentLog, m *logModel, term *uint64) error {
	switch op := rng.IntN(20); {
	case op < 13:
		var batch []*raft.Log
		next := m.last() + 1
		if len(m.entries) == 0 && rng.IntN(2) == 0 {
			next += uint64(rng.IntN(5))
		}
		if len(m.entries) == 0 {
			m.first = next
		}
		for range 1 + rng.IntN(4) {
			if rng.IntN(5) == 0 {
				*term++
			}
			e := raft.Log{Index: next, Term: *term, Data: make([]byte, rng.IntN(300)), Type: raft.LogCommand}
			if rng.IntN(8) == 0 {
				e.Type = raft.LogNoop
			}
			for i := range e.Data {
				e.Data[i] = byte(rng.Uint32())
			}
			batch = append(batch, &e)
			m.entries = append(m.entries, e)
			next++
		}
		return l.append(batch)
	case op < 16:
		if len(m.entries) < 2 {
			return nil
		}
		last := m.first + uint64(rng.IntN(len(m.entries)-1))
		m.entries = m.entries[:last+1-m.first]
		*term++
		return l.truncate(last)
	case op < 19:
		if len(m.entries) < 2 {
			return nil
		}
		first := m.first + 1 + uint64(rng.IntN(len(m.entries)-1))
		m.entries = m.entries[first-m.first:]
		m.first = first
		return l.trim(first)
	default:
		next := m.last() + 1 + uint64(rng.IntN(10))
		*m = logModel{first: next}
		return l.reset(next)
	}
}

// The log against a slice, with a restart now and then.
func TestLogModel(t *testing.T) {
	steps := 20_000
	if testing.Short() {
		steps = 2000
	}
	rng := rand.New(rand.NewPCG(1, 1))
	fs := vfs.NewCrashableMem()
	l := newTestLog(t, fs)
	m, term := logModel{first: 1}, uint64(1)
	for i := range steps {
		require.NoError(t, logStep(rng, l, &m, &term), "step %d", i)
		if i%10 == 0 {
			require.Empty(t, m.matches(l), "step %d", i)
		}
		if rng.IntN(50) == 0 {
			require.NoError(t, l.close())
			var err error
			l, err = openLog(testLogOptions(fs))
			require.NoError(t, err, "step %d", i)
			require.Empty(t, m.matches(l), "step %d after a restart", i)
		}
		if rng.IntN(50) == 0 { // power cut between two operations: all was durable
			fs = fs.CrashClone(vfs.CrashCloneCfg{UnsyncedDataPercent: 50, RNG: rng})
			require.NoError(t, l.close())
			var err error
			l, err = openLog(testLogOptions(fs))
			require.NoError(t, err, "step %d", i)
			require.Empty(t, m.matches(l), "step %d after a crash", i)
		}
	}
	require.NoError(t, l.close())
}

// A crash before every change that a workload makes: the log holds what was acknowledged, and of the
// operation under way a part of it or nothing.
func TestLogCrash(t *testing.T) {
	atEveryCrash(t, func(t *testing.T, n, percent int) bool {
		mem := vfs.NewCrashableMem()
		l := newTestLog(t, mem)
		require.NoError(t, l.close())
		fs := newCrashAt(mem, n, percent, 7)
		l, err := openLog(testLogOptions(fs))
		require.NoError(t, err)
		rng := rand.New(rand.NewPCG(3, 3))
		m, term := logModel{first: 1}, uint64(1)
		before := m.clone()
		steps := 60
		for range steps {
			before = m.clone()
			require.NoError(t, logStep(rng, l, &m, &term))
			if fs.crashed() != nil {
				break
			}
		}
		require.NoError(t, l.close())
		after := fs.crashed()
		if after == nil {
			return false
		}
		l, err = openLog(testLogOptions(after))
		require.NoError(t, err, "crash %d", n)
		checkCrashed(t, l, before, m)
		// And it goes on from there.
		_, last := l.bounds()
		next := last + 1
		require.NoError(t, l.append([]*raft.Log{{Index: next, Term: term + 9, Data: []byte("on")}}))
		require.NoError(t, l.close())
		l, err = openLog(testLogOptions(after))
		require.NoError(t, err)
		var e raft.Log
		require.NoError(t, l.read(next, &e))
		require.Equal(t, "on", string(e.Data))
		require.NoError(t, l.close())
		return true
	})
}

// checkCrashed accepts the state before an operation, after it, or after a part of an append.
func checkCrashed(t *testing.T, l *segmentLog, before, after logModel) {
	t.Helper()
	var why []string
	for n := len(before.entries); n <= max(len(before.entries), len(after.entries)); n++ {
		m := before.clone()
		if n > len(before.entries) {
			m = logModel{after.first, after.entries[:n]}
		}
		diff := m.matches(l)
		if diff == "" {
			return
		}
		why = append(why, diff)
	}
	if diff := after.matches(l); diff != "" {
		require.Fail(t, "neither before nor after", "%v; %s", why, diff)
	}
}

// image of a disk, to see that nothing changed and to damage it.
func diskBytes(t *testing.T, fs *vfs.MemFS) map[string][]byte {
	t.Helper()
	names, err := fs.List("/disk/v")
	require.NoError(t, err)
	out := map[string][]byte{}
	for _, name := range names {
		f, err := fs.Open("/disk/v/" + name)
		require.NoError(t, err)
		b, err := io.ReadAll(f)
		require.NoError(t, err)
		require.NoError(t, f.Close())
		out[name] = b
	}
	return out
}

func diskOf(t *testing.T, files map[string][]byte) *vfs.MemFS {
	t.Helper()
	fs := vfs.NewCrashableMem()
	require.NoError(t, makeDir(fs, "/disk/v"))
	for name, b := range files {
		require.NoError(t, writeFile(fs, "/disk/v", name, bytes.Clone(b)))
	}
	return fs
}

// H23: one flipped bit anywhere in what was acknowledged is damage, never the end of the log, and
// the files are left as they are. The log was not even closed: its last batch is what a power cut
// leaves. Only rot within that last batch may be taken for a torn one, and then only before the mark
// was written.
func TestLogRot(t *testing.T) {
	mem := vfs.NewCrashableMem()
	l := newTestLog(t, mem)
	for i := range uint64(16) {
		require.NoError(t, l.append([]*raft.Log{{Index: i + 1, Term: 1, Data: make([]byte, 150)}}))
	}
	lastBatch := recordSize(150)
	unmarked := diskBytes(t, mem)
	require.NoError(t, l.writeMark())
	marked := diskBytes(t, mem)
	tail := segmentName(l.tail.seq)
	end := int64(len(unmarked[tail]))
	require.Greater(t, end, segmentHeader+3*lastBatch, "the last segment must hold several batches")
	require.Greater(t, l.tail.seq, uint64(1))
	require.NoError(t, l.close())

	flip := func(files map[string][]byte, name string, at int) (*vfs.MemFS, map[string][]byte) {
		damaged := map[string][]byte{}
		for k, v := range files {
			damaged[k] = v
		}
		damaged[name] = bytes.Clone(files[name])
		damaged[name][at] ^= 0x10
		return diskOf(t, damaged), damaged
	}
	for name, b := range unmarked {
		if !strings.HasPrefix(name, segmentPrefix) {
			continue
		}
		for at := 0; at < len(b); at += 7 {
			fs, damaged := flip(unmarked, name, at)
			l, err := openLog(testLogOptions(fs))
			if name == tail && int64(at) >= end-lastBatch {
				require.NoError(t, err, "rot at %d of %s looks like a torn batch", at, name)
				_, last := l.bounds()
				require.Equal(t, uint64(15), last)
				require.NoError(t, l.close())
				continue
			}
			require.ErrorIs(t, err, trivet.ErrCorrupt, "rot at %d of %s", at, name)
			require.NotErrorIs(t, err, raft.ErrLogNotFound)
			require.Equal(t, damaged, diskBytes(t, fs), "a refused log must not be changed")
		}
	}
	for at := 0; at < len(marked[tail]); at += 7 {
		fs, _ := flip(marked, tail, at)
		_, err := openLog(testLogOptions(fs))
		require.ErrorIs(t, err, trivet.ErrCorrupt, "rot at %d of the marked tail", at)
	}
}

// A segment, or the mark, that is gone is damage too.
func TestLogLostFile(t *testing.T) {
	mem := vfs.NewCrashableMem()
	l := newTestLog(t, mem)
	for i := range uint64(40) {
		require.NoError(t, l.append([]*raft.Log{{Index: i + 1, Term: 1, Data: make([]byte, 150)}}))
	}
	require.NoError(t, l.close())
	files := diskBytes(t, mem)
	require.Greater(t, len(files), 3)
	for name := range files {
		rest := map[string][]byte{}
		for k, v := range files {
			if k != name {
				rest[k] = v
			}
		}
		_, err := openLog(testLogOptions(diskOf(t, rest)))
		require.ErrorIs(t, err, trivet.ErrCorrupt, "without %s", name)
	}
}

// After a torn batch nothing is appended in its place: what was left of it must not come to life
// behind a new entry.
func TestLogTornBatchStaysDead(t *testing.T) {
	mem := vfs.NewCrashableMem()
	l := newTestLog(t, mem)
	require.NoError(t, l.append([]*raft.Log{{Index: 1, Term: 1, Data: make([]byte, 40)}}))
	at := l.tail.end
	require.NoError(t, l.append([]*raft.Log{
		{Index: 2, Term: 1, Data: make([]byte, 40)}, {Index: 3, Term: 1, Data: make([]byte, 40)},
	}))
	files := diskBytes(t, mem)
	require.NoError(t, l.close())
	files[segmentName(1)][at+recordHeader] ^= 1 // the first record of the batch did not reach the disk
	fs := diskOf(t, files)
	l, err := openLog(testLogOptions(fs))
	require.NoError(t, err)
	_, last := l.bounds()
	require.Equal(t, uint64(1), last)
	require.NoError(t, l.append([]*raft.Log{{Index: 2, Term: 1, Data: bytes.Repeat([]byte{9}, 40)}}))
	require.NoError(t, l.close())
	l, err = openLog(testLogOptions(fs))
	require.NoError(t, err)
	_, last = l.bounds()
	require.Equal(t, uint64(2), last)
	require.NoError(t, l.close())
}

// A crash between the new segment's name and its header leaves a file that counts for nothing; the
// same file before another one, or before the mark, is damage.
func TestLogSegmentWithoutHeader(t *testing.T) {
	mem := vfs.NewCrashableMem()
	l := newTestLog(t, mem)
	for i := range uint64(20) {
		require.NoError(t, l.append([]*raft.Log{{Index: i + 1, Term: 1, Data: make([]byte, 150)}}))
	}
	seq := l.tail.seq
	require.NoError(t, l.close())
	files := diskBytes(t, mem)
	files[segmentName(seq+1)] = make([]byte, 30)
	l, err := openLog(testLogOptions(diskOf(t, files)))
	require.NoError(t, err)
	_, last := l.bounds()
	require.Equal(t, uint64(20), last)
	require.NoError(t, l.close())
	for _, lost := range []uint64{seq, 1} {
		files := diskBytes(t, mem)
		files[segmentName(lost)] = make([]byte, 30)
		_, err = openLog(testLogOptions(diskOf(t, files)))
		require.ErrorIs(t, err, trivet.ErrCorrupt, "segment %d of %d", lost, seq)
	}
}

// Segments of another group, or under another number, are refused (H24).
func TestLogForeignSegment(t *testing.T) {
	mem := vfs.NewCrashableMem()
	l := newTestLog(t, mem)
	require.NoError(t, l.append([]*raft.Log{{Index: 1, Term: 1, Data: []byte("x")}}))
	require.NoError(t, l.close())
	opts := testLogOptions(mem)
	opts.group++
	_, err := openLog(opts)
	require.ErrorIs(t, err, trivet.ErrCorrupt)
	files := diskBytes(t, mem)
	files[segmentName(2)] = files[segmentName(1)]
	_, err = openLog(testLogOptions(diskOf(t, files)))
	require.ErrorIs(t, err, trivet.ErrCorrupt)
}

func TestLogRefusesGaps(t *testing.T) {
	l := newTestLog(t, vfs.NewCrashableMem())
	defer func() { require.NoError(t, l.close()) }()
	require.NoError(t, l.append([]*raft.Log{{Index: 5, Term: 1}, {Index: 6, Term: 1}}))
	require.ErrorIs(t, l.append([]*raft.Log{{Index: 8, Term: 1}}), trivet.ErrInvalid)
	require.ErrorIs(t, l.append([]*raft.Log{{Index: 6, Term: 1}}), trivet.ErrInvalid)
	require.ErrorIs(t, l.trim(9), trivet.ErrInvalid)
	require.ErrorIs(t, l.truncate(3), trivet.ErrInvalid)
}

// logStore over a log: what the library is promised.
func TestLogStore(t *testing.T) {
	mem := vfs.NewCrashableMem()
	var fatal []error
	guard := &diskGuard{fatal: func(err error) { fatal = append(fatal, err) }}
	s, err := newLogStore(newTestLog(t, mem), guard, groupConfig{})
	require.NoError(t, err)
	require.True(t, s.IsMonotonic())
	first, err := s.FirstIndex()
	require.NoError(t, err)
	require.Zero(t, first)

	conf := func(index uint64, names ...string) *raft.Log {
		var m []Member
		for _, n := range names {
			m = append(m, Member{Replica: trivet.ReplicaID(strings.Repeat(n, 8) + "-0000-4000-8000-000000000000"), Node: "n"})
		}
		return &raft.Log{
			Index: index, Term: 1, Type: raft.LogConfiguration, Data: raft.EncodeConfiguration(toConfiguration(m)),
		}
	}
	require.NoError(t, s.StoreLogs([]*raft.Log{conf(1, "a"), {Index: 2, Term: 1, Data: []byte("two")}, conf(3, "a", "b")}))
	require.Len(t, s.latestConfig().members, 2)
	require.Equal(t, uint64(1), s.configAt(2).index)
	require.NoError(t, s.DeleteRange(3, 3))
	require.Equal(t, uint64(1), s.latestConfig().index, "a configuration that was cut off no longer rules")
	require.NoError(t, s.StoreLog(&raft.Log{Index: 3, Term: 2, Data: []byte("three")}))
	var e raft.Log
	require.NoError(t, s.GetLog(3, &e))
	require.Equal(t, "three", string(e.Data), "the cache must forget what was overwritten")
	require.NoError(t, s.DeleteRange(1, 2))
	require.Equal(t, uint64(1), s.latestConfig().index, "a configuration that was compacted still rules")
	require.Equal(t, raft.ErrLogNotFound, s.GetLog(2, &e))
	require.Equal(t, raft.ErrLogNotFound, s.GetLog(4, &e))
	require.Error(t, s.StoreLog(&raft.Log{Index: 4, Term: 2, Type: raft.LogConfiguration, Data: []byte("junk")}))
	require.Empty(t, fatal)

	// Damage at run time: the library gets no error that it panics on, and the group is dead.
	s.cache = nil
	data, err := mem.UnsafeGetFileDataBuffer("/disk/v/" + segmentName(s.log.tail.seq))
	require.NoError(t, err)
	data[s.log.refs[0].off+recordHeader] ^= 1
	require.ErrorIs(t, s.log.read(3, &e), trivet.ErrCorrupt)
	require.NotErrorIs(t, s.log.read(3, &e), raft.ErrLogNotFound)
	require.NoError(t, s.GetLog(3, &e))
	require.Len(t, fatal, 1)
	require.ErrorIs(t, fatal[0], trivet.ErrCorrupt)
	require.Error(t, s.StoreLog(&raft.Log{Index: 4, Term: 2}), "nothing is written after a failure")
	require.Error(t, s.DeleteRange(3, 3))
	require.NoError(t, s.log.close())
}

// The cache never holds more than its bound, and never an entry that is not in the log.
func TestLogStoreCache(t *testing.T) {
	mem := vfs.NewMem()
	s, err := newLogStore(newTestLog(t, mem), &diskGuard{}, groupConfig{})
	require.NoError(t, err)
	for i := range uint64(80) {
		require.NoError(t, s.StoreLog(&raft.Log{Index: i + 1, Term: 1, Data: bytes.Repeat([]byte{byte(i)}, 64<<10)}))
		require.LessOrEqual(t, s.cacheBytes, cacheBytesMax)
	}
	for i := range uint64(80) {
		var e raft.Log
		require.NoError(t, s.GetLog(i+1, &e))
		require.Equal(t, byte(i), e.Data[100])
	}
	require.NoError(t, s.log.close())
}
