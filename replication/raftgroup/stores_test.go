package raftgroup

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/raft"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/engine/segment"
)

const (
	idA = trivet.ReplicaID("aaaaaaaa-0000-4000-8000-000000000000")
	idB = trivet.ReplicaID("bbbbbbbb-0000-4000-8000-000000000000")
)

func newTestStable(t *testing.T, dir segment.Dir) *stableStore {
	t.Helper()
	return newStableStore(newGroupLog(mustOpenLog(t, dir), logGroup), &diskGuard{})
}

func votePair(t *testing.T, s *stableStore) (uint64, string) {
	t.Helper()
	term, err := s.GetUint64([]byte(keyLastVoteTerm))
	if err != nil {
		require.EqualError(t, err, "not found")
	}
	cand, err2 := s.Get([]byte(keyLastVoteCand))
	if err2 != nil {
		require.EqualError(t, err2, "not found")
	}
	require.Equal(t, err == nil, err2 == nil, "one half of a vote")
	return term, string(cand)
}

func TestStableStore(t *testing.T) {
	dir := segment.NewMemDir()
	s := newTestStable(t, dir)
	for _, key := range []string{keyCurrentTerm, keyLastVoteTerm} {
		_, err := s.GetUint64([]byte(key))
		require.EqualError(t, err, "not found", "the library compares the text")
	}
	_, err := s.Get([]byte(keyLastVoteCand))
	require.EqualError(t, err, "not found")

	require.NoError(t, s.SetUint64([]byte(keyCurrentTerm), 4))
	require.NoError(t, s.SetUint64([]byte(keyLastVoteTerm), 4))
	term, cand := votePair(t, s)
	require.Zero(t, term, "no vote before its candidate is there")
	require.Empty(t, cand)
	require.NoError(t, s.Set([]byte(keyLastVoteCand), []byte("x")))
	require.NoError(t, s.SetUint64([]byte(keyCurrentTerm), 3), "a lower term is not an error")

	s = newTestStable(t, dir.Crash(0, false, rand.New(rand.NewPCG(1, 1))))
	term, cand = votePair(t, s)
	require.Equal(t, uint64(4), term)
	require.Equal(t, "x", cand)
	term, err = s.GetUint64([]byte(keyCurrentTerm))
	require.NoError(t, err)
	require.Equal(t, uint64(4), term, "but it is not taken back")
	require.Error(t, s.Set([]byte("other"), nil))
	require.Error(t, s.SetUint64([]byte("other"), 1))
	require.Error(t, s.Set([]byte(keyLastVoteCand), []byte("y")), "a vote without a term")
}

// D5: a crash before any change of the disk between term, vote term and candidate leaves the old
// vote or the new one, never the term of one with the candidate of the other, and the current term
// is never behind a vote. Then the library answers rightly: a vote recorded for this term goes to
// its candidate alone, and without one the log decides, for a stale candidate and a fresh one.
func TestVoteIsNeverTorn(t *testing.T) {
	for _, percent := range []int{0, 30, 100} {
		n := 0
		for tornVote(t, n, percent) {
			n++
		}
		require.Greater(t, n, 3, "changes of the disk")
	}
}

// tornVote crashes before change n of the disk; false when there were not so many.
func tornVote(t *testing.T, n, percent int) bool {
	dir := segment.NewMemDir()
	s := newTestStable(t, dir)
	require.NoError(t, s.SetUint64([]byte(keyCurrentTerm), 3))
	require.NoError(t, s.SetUint64([]byte(keyLastVoteTerm), 3))
	require.NoError(t, s.Set([]byte(keyLastVoteCand), []byte("old")))
	var after *segment.MemDir
	var crashed atomic.Bool
	count := 0
	rng := rand.New(rand.NewPCG(uint64(n), uint64(percent)))
	dir.SetHook(func(op segment.MemOp) (f segment.MemFault) {
		if op.Kind == segment.MemRead {
			return f
		}
		if count == n {
			after = dir.CrashLocked(percent, false, rng)
			crashed.Store(true)
		}
		count++
		return f
	})
	// raft.go:1690 and persistVote, raft.go:2153.
	require.NoError(t, s.SetUint64([]byte(keyCurrentTerm), 5))
	require.NoError(t, s.SetUint64([]byte(keyLastVoteTerm), 5))
	require.NoError(t, s.Set([]byte(keyLastVoteCand), []byte("new")))
	granted := !crashed.Load()
	dir.SetHook(nil)
	if after == nil {
		return false
	}
	s = newTestStable(t, after)
	term, cand := votePair(t, s)
	switch cand {
	case "old":
		require.Equal(t, uint64(3), term)
		require.False(t, granted)
	case "new":
		require.Equal(t, uint64(5), term)
	default:
		require.Fail(t, "vote for nobody", "%q", cand)
	}
	current, err := s.GetUint64([]byte(keyCurrentTerm))
	require.NoError(t, err)
	require.GreaterOrEqual(t, current, term)
	return true
}

// A vote that was given is on the disk: whatever a crash right after it loses, the candidate is known.
func TestVoteIsDurable(t *testing.T) {
	dir := segment.NewMemDir()
	s := newTestStable(t, dir)
	for term := uint64(2); term < 40; term++ {
		require.NoError(t, s.SetUint64([]byte(keyCurrentTerm), term))
		after := newTestStable(t, dir.Crash(0, false, rand.New(rand.NewPCG(term, 1))))
		require.Equal(t, term, after.record().term)
		require.NoError(t, s.SetUint64([]byte(keyLastVoteTerm), term))
		require.NoError(t, s.Set([]byte(keyLastVoteCand), fmt.Append(nil, "c", term)))
		after = newTestStable(t, dir.Crash(0, false, rand.New(rand.NewPCG(term, 2))))
		require.Equal(t, s.record(), after.record())
	}
}

func TestGuard(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var fatal, stalls atomic.Int32
		d := &diskGuard{fatal: func(error) { fatal.Add(1) }, onStall: func() { stalls.Add(1) }}
		require.NoError(t, d.run("quick", func() error { return nil }))
		elapse(time.Minute)
		require.False(t, d.stalled())
		// Many short writes that overlap are no stall.
		for range 100 {
			a, err := d.begin()
			require.NoError(t, err)
			elapse(30 * time.Millisecond)
			b, err := d.begin()
			require.NoError(t, err)
			d.end(a)
			elapse(30 * time.Millisecond)
			require.False(t, d.stalled())
			d.end(b)
		}
		require.Zero(t, stalls.Load())
		hung, err := d.begin()
		require.NoError(t, err)
		elapse(stallQuiet)
		synctest.Wait()
		require.True(t, d.stalled())
		require.Equal(t, int32(1), stalls.Load())
		d.end(hung)
		require.False(t, d.stalled())
		require.Equal(t, int32(2), stalls.Load())
		require.Zero(t, fatal.Load())
		bad := errors.New("bad")
		require.ErrorIs(t, d.run("fails", func() error { return bad }), bad)
		require.Equal(t, int32(1), fatal.Load())
		ran := false
		require.ErrorIs(t, d.run("later", func() error { ran = true; return nil }), bad)
		require.False(t, ran, "nothing is written after a failure")
		require.Equal(t, int32(1), fatal.Load())
	})
}

func TestGuardFatal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var fatal atomic.Int32
		d := &diskGuard{fatal: func(error) { fatal.Add(1) }}
		_, err := d.begin()
		require.NoError(t, err)
		elapse(stallFatal - time.Millisecond)
		require.Zero(t, fatal.Load())
		elapse(time.Millisecond)
		synctest.Wait()
		require.Equal(t, int32(1), fatal.Load())
		d.close()
		_, err = d.begin()
		require.Error(t, err)
	})
}

// After a standstill of the machine, in which no time passed for the disk, a write that ends soon is not taken for
// hung; one that does not is.
func TestGuardOutlastsAStandstill(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var fatal atomic.Int32
		d := &diskGuard{fatal: func(error) { fatal.Add(1) }}
		standstill := func(id uint64) {
			d.mu.Lock()
			defer d.mu.Unlock()
			d.starts[id] = d.starts[id].Add(-time.Minute)
		}
		id, err := d.begin()
		require.NoError(t, err)
		elapse(stallQuiet + 2*stallTick)
		standstill(id)
		elapse(3 * stallTick)
		require.Zero(t, fatal.Load())
		d.end(id)
		elapse(time.Minute)
		require.Zero(t, fatal.Load())

		id, err = d.begin()
		require.NoError(t, err)
		standstill(id)
		elapse(stallFatal - time.Millisecond)
		require.Zero(t, fatal.Load(), "no tick of the one before counts")
		elapse(time.Millisecond)
		synctest.Wait()
		require.Equal(t, int32(1), fatal.Load())
	})
}

func testRecord(index uint64) snapshotRecord {
	return snapshotRecord{
		index: index, term: 2, machine: index - 1,
		config: groupConfig{1, []Member{{Replica: idA, Node: "a"}, {Replica: idB, Node: "b", Learner: true}}},
	}
}

// A crash before any change leaves the old record or the new one.
func TestSnapshotStoreCrash(t *testing.T) {
	atEveryCrash(t, func(t *testing.T, n, percent int) bool {
		mem, dir := memDir(t)
		s, err := openSnapshots(mem, dir, &diskGuard{})
		require.NoError(t, err)
		require.NoError(t, s.put(testRecord(10)))
		fs := newCrashAt(mem, n, percent, 9)
		s, err = openSnapshots(fs, dir, &diskGuard{})
		require.NoError(t, err)
		require.NoError(t, s.put(testRecord(20)))
		after := fs.crashed()
		if after == nil {
			return false
		}
		s, err = openSnapshots(after, dir, &diskGuard{})
		require.NoError(t, err)
		require.Contains(t, []uint64{10, 20}, s.record().index)
		require.Equal(t, testRecord(s.record().index), s.record())
		return true
	})
}

// fakeMachine is as much of a state machine as the snapshot store needs.
type fakeMachine struct {
	StateMachine
	index   uint64
	flushed uint64
	results int
	err     error
	images  int
	got     []Entry
}

type fakeImage struct{ m *fakeMachine }

func (i fakeImage) Read([]byte) (int, error) { return 0, errors.New("not read here") }
func (i fakeImage) Close() error             { i.m.images--; return nil }
func (i fakeImage) Size() int64              { return 123 }

func (m *fakeMachine) Applied() (uint64, uint64)   { return m.index, 2 }
func (m *fakeMachine) Flush() (uint64, error)      { return m.flushed, m.err }
func (m *fakeMachine) Want() []byte                { return nil }
func (m *fakeMachine) Image([]byte) (Image, error) { m.images++; return fakeImage{m}, m.err }
func (m *fakeMachine) Apply(e []Entry) ([]any, error) {
	m.got = append(m.got, e...)
	m.index = e[len(e)-1].Index
	return make([]any, len(e)+m.results), m.err
}

func newTestSnapshots(t *testing.T, m *fakeMachine) (*snapshotStore, *fsm, *[]error) {
	t.Helper()
	fs, dir := memDir(t)
	s, err := openSnapshots(fs, dir, &diskGuard{})
	require.NoError(t, err)
	var fatal []error
	s.fsm = &fsm{
		durable: newDurability(&diskGuard{}, 1<<20),
		machine: m, failed: func() error { return nil }, fatal: func(err error) { fatal = append(fatal, err) },
		config: testRecord(9).config,
	}
	return s, s.fsm, &fatal
}

// H1: the record of a snapshot is not written before the state behind it is seen to be durable.
func TestSnapshotNeedsDurableState(t *testing.T) {
	m := &fakeMachine{index: 9, flushed: 8}
	s, f, fatal := newTestSnapshots(t, m)
	take := func() error {
		snap, err := f.Snapshot()
		require.NoError(t, err)
		sink, err := s.Create(1, 10, 2, toConfiguration(testRecord(9).config.members), 1, nil)
		require.NoError(t, err)
		if err := snap.Persist(sink); err != nil {
			require.NoError(t, sink.Cancel())
			return err
		}
		return sink.Close()
	}
	require.ErrorIs(t, take(), trivet.ErrCorrupt)
	require.Len(t, *fatal, 1)
	list, err := s.List()
	require.NoError(t, err)
	require.Empty(t, list)
	sink, err := s.Create(1, 10, 2, toConfiguration(testRecord(9).config.members), 1, nil)
	require.NoError(t, err)
	require.Error(t, sink.Close(), "closed without Persist")
	m.flushed = 9
	require.NoError(t, take())
	list, err = s.List()
	require.NoError(t, err)
	require.Len(t, list, 1)
	require.Equal(t, uint64(10), list[0].Index)
	require.Equal(t, uint64(9), s.record().machine)
}

// H7: what is shown says the index that it stands at, also when that is beyond the recorded one. Only
// who pulls an image pins one: what the library opens costs nothing.
func TestImagePinsTheMachine(t *testing.T) {
	m := &fakeMachine{flushed: 9}
	s, f, _ := newTestSnapshots(t, m)
	_, _, err := s.Open("x")
	require.ErrorIs(t, err, trivet.ErrNotFound)
	_, _, err = s.image(nil)
	require.ErrorIs(t, err, trivet.ErrUnavailable, "nothing was applied")
	m.index = 9
	_, rec, err := s.image(nil)
	require.NoError(t, err)
	require.Equal(t, []uint64{9, 9}, []uint64{rec.index, rec.machine}, "no snapshot was recorded yet")
	require.Equal(t, testRecord(9).config, rec.config)
	require.NoError(t, s.put(testRecord(10))) // entry 10 is a no-op
	meta, r, err := s.Open("x")
	require.NoError(t, err)
	require.Equal(t, uint64(10), meta.Index)
	require.NoError(t, r.Close())
	require.Equal(t, 1, m.images)
	_, rec, err = s.image(nil)
	require.NoError(t, err)
	require.Equal(t, testRecord(10), rec, "the recorded index, as nothing was applied since")
	m.index = 14
	img, rec, err := s.image(nil)
	require.NoError(t, err)
	require.Equal(t, []uint64{14, 14}, []uint64{rec.index, rec.machine})
	require.Equal(t, 3, m.images)
	require.NoError(t, img.Close())
	f.setMixed(true)
	_, _, err = s.image(nil)
	require.ErrorIs(t, err, trivet.ErrUnavailable, "in the middle of a restore")
	require.Equal(t, 2, m.images)
}

func TestFSM(t *testing.T) {
	m := &fakeMachine{index: 9}
	_, f, fatal := newTestSnapshots(t, m)
	conf := raft.EncodeConfiguration(toConfiguration(testRecord(9).config.members))
	out := f.ApplyBatch([]*raft.Log{
		{Index: 8, Term: 2, Data: []byte("old")},
		{Index: 10, Term: 2, Data: []byte("new")},
		{Index: 12, Term: 2, Type: raft.LogConfiguration, Data: conf},
	})
	require.Equal(t, []any{nil, nil, nil}, out)
	require.Len(t, m.got, 2, "an entry at or below the applied index is skipped (H3)")
	require.Equal(t, "new", string(m.got[0].Data))
	require.Nil(t, m.got[1].Data)
	require.Equal(t, testRecord(9).config.members, m.got[1].Members)
	require.Equal(t, uint64(12), f.config.index)
	require.Empty(t, *fatal)
	m.err = errors.New("bad")
	out = f.ApplyBatch([]*raft.Log{{Index: 13, Term: 2}})
	require.Equal(t, []any{errDead}, out)
	require.Len(t, *fatal, 1)
	m.err = nil
	require.Equal(t, []any{errDead}, f.ApplyBatch([]*raft.Log{{Index: 14, Term: 2}}), "nothing is applied after a failure")
	require.Len(t, m.got, 3)
	_, err := f.Snapshot()
	require.Error(t, err)
	require.Error(t, f.Restore(nil))
}

// I3: a machine that answers too little, or stands elsewhere than its last entry, is stopped.
func TestFSMChecksTheMachine(t *testing.T) {
	m := &fakeMachine{index: 9, results: 1}
	_, f, fatal := newTestSnapshots(t, m)
	require.Equal(t, []any{errDead}, f.ApplyBatch([]*raft.Log{{Index: 10, Term: 2}}))
	require.Len(t, *fatal, 1)
	m = &fakeMachine{index: 9}
	_, f, fatal = newTestSnapshots(t, m)
	require.Equal(t, []any{errDead}, f.ApplyBatch([]*raft.Log{{Index: 10, Term: 3}}), "applied under term 2")
	require.Len(t, *fatal, 1)
}

// D1, D2, D7 and the rest of what the adapters rely on.
func TestRaftConfig(t *testing.T) {
	cfg := Config{Replica: idA, Timing: Timing{Heartbeat: time.Second}}.withDefaults()
	c := raftConfig(cfg)
	require.NoError(t, raft.ValidateConfig(c))
	require.False(t, c.RestoreCommittedLogs, "D1, D2")
	require.True(t, c.NoSnapshotRestoreOnStart)
	require.False(t, c.BatchApplyCh, "an enqueue timeout must mean: not applied")
	require.False(t, c.ShutdownOnRemove)
	require.False(t, c.PreVoteDisabled)
	require.Equal(t, 32, c.MaxAppendEntries)
	require.Equal(t, time.Second, c.CommitTimeout)
	for _, d := range []time.Duration{c.HeartbeatTimeout / 10, c.ElectionTimeout, c.LeaderLeaseTimeout} {
		require.Greater(t, d, 24*time.Hour, "the library wakes up for nothing: pace.go")
	}
	require.Nil(t, c.NotifyCh, "it blocks the library when it is not read")
	_, err := (&peerTransport{}).AppendEntriesPipeline("", "")
	require.Equal(t, raft.ErrPipelineReplicationNotSupported, err, "D7")
	var _ raft.WithPreVote = (*peerTransport)(nil)
}

func TestConfigValidate(t *testing.T) {
	good := Config{
		Replica: idA, Dir: "/d", Log: &segment.Log{}, Network: &Mux{}, Machine: &fakeMachine{}, Fatal: func(error) {},
	}
	require.NoError(t, good.Validate())
	for name, change := range map[string]func(*Config){
		"replica": func(c *Config) { c.Replica = "x" },
		"dir":     func(c *Config) { c.Dir = "" },
		"log":     func(c *Config) { c.Log = nil },
		"network": func(c *Config) { c.Network = nil },
		"machine": func(c *Config) { c.Machine = nil },
		"fatal":   func(c *Config) { c.Fatal = nil },
		"lease":   func(c *Config) { c.Timing = Timing{Heartbeat: time.Second, Lease: time.Second} },
		"beat":    func(c *Config) { c.Timing.Heartbeat = time.Millisecond },
		"bytes":   func(c *Config) { c.SnapshotBytes = -1 },
		"cut":     func(c *Config) { c.CutBytes = -1 },
		"tell":    func(c *Config) { c.TellCommit = time.Millisecond - 1 },
	} {
		c := good
		change(&c)
		require.ErrorIs(t, c.Validate(), trivet.ErrInvalid, name)
	}
}
