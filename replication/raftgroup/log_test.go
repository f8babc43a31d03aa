package raftgroup

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"strings"
	"syscall"
	"testing"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/hashicorp/raft"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/engine/segment"
)

const (
	logGroup     = trivet.VolumeID(0x11)
	testDisk     = trivet.DiskID("11111111-2222-4333-8444-555555555555")
	testSegBytes = 64 << 10
)

func testLogOptions(dir segment.Dir) segment.Options {
	return segment.Options{Dir: dir, Disk: testDisk, Lanes: 1, SegmentBytes: testSegBytes, CacheBytes: 8 << 10}
}

// mustOpenLog opens the log of a disk, and formats it when it is new.
func mustOpenLog(t *testing.T, dir segment.Dir) *segment.Log {
	t.Helper()
	names, err := dir.List()
	require.NoError(t, err)
	if len(names) == 0 {
		require.NoError(t, segment.Format(testLogOptions(dir)))
	}
	l, err := segment.Open(testLogOptions(dir))
	require.NoError(t, err)
	t.Cleanup(func() { _ = l.Close() }) // what matters was closed and checked before
	return l
}

func newTestStore(t *testing.T, log *segment.Log, guard *diskGuard) *logStore {
	t.Helper()
	s, err := newLogStore(newGroupLog(log, logGroup), guard, groupConfig{}, false)
	require.NoError(t, err)
	return s
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

// matches returns "" when the store holds exactly what the model does.
func (m logModel) matches(s *logStore) string {
	first, err1 := s.FirstIndex()
	last, err2 := s.LastIndex()
	want := [2]uint64{m.first, m.last()}
	if len(m.entries) == 0 {
		want = [2]uint64{}
	}
	if got := [2]uint64{first, last}; err1 != nil || err2 != nil || got != want {
		return fmt.Sprintf("has entries %v, want %v (%v, %v)", got, want, err1, err2)
	}
	if begin, _ := s.log.bounds(); begin != m.first {
		return fmt.Sprintf("begins at %d, want %d", begin, m.first)
	}
	for _, want := range m.entries {
		var got raft.Log
		if err := s.GetLog(want.Index, &got); err != nil {
			return err.Error()
		}
		if got.Index != want.Index || got.Term != want.Term || got.Type != want.Type || !bytes.Equal(got.Data, want.Data) {
			return fmt.Sprintf("entry %d is %v, want %v", want.Index, got, want)
		}
	}
	var e raft.Log
	for _, index := range []uint64{0, m.first - 1, m.last() + 1} {
		if err := s.GetLog(index, &e); err != raft.ErrLogNotFound { //nolint:errorlint // identity is the contract
			return fmt.Sprintf("read of missing entry %d: %v", index, err)
		}
	}
	return ""
}

// append adds random entries from index on to a model, as a log that holds older ones would take them.
func (m *logModel) append(rng *rand.Rand, from uint64, term *uint64, bytesMax int) []*raft.Log {
	if len(m.entries) == 0 {
		m.first = from
	}
	m.entries = m.entries[:from-m.first]
	var batch []*raft.Log
	for range 1 + rng.IntN(6) {
		if rng.IntN(5) == 0 {
			*term++
		}
		e := raft.Log{Index: m.last() + 1, Term: *term, Data: make([]byte, rng.IntN(bytesMax)), Type: raft.LogCommand}
		if rng.IntN(8) == 0 {
			e.Type = raft.LogNoop
		}
		for i := range e.Data {
			e.Data[i] = byte(rng.Uint32())
		}
		m.entries = append(m.entries, e)
		batch = append(batch, &e)
	}
	return batch
}

// logStep makes one random change of a store and of its model.
func logStep(rng *rand.Rand, s *logStore, m *logModel, term *uint64) error {
	bytesMax := []int{300, 300, s.log.entryMax}[rng.IntN(3)]
	n := len(m.entries)
	switch op := rng.IntN(20); {
	case op < 10 || n < 2:
		next := m.last() + 1
		if n == 0 {
			next += uint64(rng.IntN(5))
		}
		return s.StoreLogs(m.append(rng, next, term, bytesMax))
	case op < 13: // over a tail, as it comes when a crash followed an append that nobody was told of
		*term++
		return s.StoreLogs(m.append(rng, m.first+1+uint64(rng.IntN(n-1)), term, bytesMax))
	case op < 16:
		from := m.first + 1 + uint64(rng.IntN(n-1))
		last := m.last()
		m.entries = m.entries[:from-m.first]
		*term++
		return s.DeleteRange(from, last)
	case op < 19:
		to := m.first + uint64(rng.IntN(n-1))
		was := m.first
		m.entries, m.first = m.entries[to+1-m.first:], to+1
		return s.DeleteRange(was-min(was, 3), to)
	default:
		index := m.last() + uint64(rng.IntN(10))
		*m = logModel{first: index + 1}
		return s.install(index, groupConfig{})
	}
}

// The LogStore row of the library's contracts, against a slice: each operation is whole and durable when it
// returns, so a crash at any moment within leaves what was before, what is after, or, of an append that was
// too much for one batch, a part without a hole. Every crash keeps another share of the unsynced data.
func TestLogModel(t *testing.T) {
	for seed := range uint64(6) {
		rng := rand.New(rand.NewPCG(seed, 21))
		dir := segment.NewMemDir()
		guard := &diskGuard{fatal: func(err error) { require.NoError(t, err) }}
		log := mustOpenLog(t, dir)
		s := newTestStore(t, log, guard)
		m, term := logModel{first: 1}, uint64(1)
		for step := range 300 {
			before := m.clone()
			var photo *segment.MemDir
			n, at, percent, pages := 0, rng.IntN(4), []int{0, 30, 70, 100}[rng.IntN(4)], rng.IntN(2) == 0
			crashRng := rand.New(rand.NewPCG(seed, uint64(step)))
			dir.SetHook(func(op segment.MemOp) (f segment.MemFault) {
				if op.Kind != segment.MemRead {
					if n == at {
						photo = dir.CrashLocked(percent, pages, crashRng)
					}
					n++
				}
				return f
			})
			require.NoError(t, logStep(rng, s, &m, &term))
			dir.SetHook(nil)
			require.Empty(t, m.matches(s), "seed %d, step %d", seed, step)
			if photo == nil {
				photo, before = dir.Crash(percent, true, crashRng), m // between two operations
			}
			left := mustOpenLog(t, photo)
			checkCrashed(t, newTestStore(t, left, guard), before, m)
			require.NoError(t, left.Close())
			if step%50 == 49 {
				require.NoError(t, log.Close())
				log = mustOpenLog(t, dir)
				s = newTestStore(t, log, guard)
				require.Empty(t, m.matches(s), "seed %d, step %d: after a restart", seed, step)
			}
		}
		require.NoError(t, log.Close())
	}
}

// checkCrashed accepts the state before an operation, after it, or after a part of an append.
func checkCrashed(t *testing.T, s *logStore, before, after logModel) {
	t.Helper()
	why := before.matches(s)
	if why == "" || after.matches(s) == "" {
		return
	}
	for n := len(after.entries) - 1; n > 0; n-- {
		if part := (logModel{after.first, after.entries[:n]}); part.matches(s) == "" {
			return
		}
	}
	require.Fail(t, "neither before nor after", "%s; %s", why, after.matches(s))
}

func configEntry(index uint64, names ...string) *raft.Log {
	var m []Member
	for _, n := range names {
		m = append(m, Member{Replica: trivet.ReplicaID(strings.Repeat(n, 8) + "-0000-4000-8000-000000000000"), Node: "n"})
	}
	return &raft.Log{
		Index: index, Term: 1, Type: raft.LogConfiguration, Data: raft.EncodeConfiguration(toConfiguration(m)),
	}
}

// What else the library is promised.
func TestLogStore(t *testing.T) {
	var fatal []error
	guard := &diskGuard{fatal: func(err error) { fatal = append(fatal, err) }}
	log := mustOpenLog(t, segment.NewMemDir())
	s := newTestStore(t, log, guard)
	require.False(t, s.IsMonotonic(), "D6")
	first, err := s.FirstIndex()
	require.NoError(t, err)
	require.Zero(t, first)

	require.NoError(t, s.StoreLogs([]*raft.Log{
		configEntry(1, "a"), {Index: 2, Term: 1, Data: []byte("two")}, configEntry(3, "a", "b"),
	}))
	require.Len(t, s.latestConfig().members, 2)
	require.Equal(t, uint64(1), s.configAt(2).index)
	require.NoError(t, s.DeleteRange(3, 3))
	require.Equal(t, uint64(1), s.latestConfig().index, "a configuration that was cut off no longer rules")
	require.NoError(t, s.StoreLog(&raft.Log{Index: 3, Term: 2, Data: []byte("three")}))
	var e raft.Log
	require.NoError(t, s.GetLog(3, &e))
	require.Equal(t, "three", string(e.Data), "the cache must forget what was overwritten (cockroach #63302)")
	require.NoError(t, s.DeleteRange(1, 2))
	require.Equal(t, uint64(1), s.latestConfig().index, "a configuration that was compacted still rules")
	require.Equal(t, raft.ErrLogNotFound, s.GetLog(2, &e))
	require.Equal(t, raft.ErrLogNotFound, s.GetLog(4, &e))
	require.Error(t, s.StoreLog(&raft.Log{Index: 4, Term: 2, Type: raft.LogConfiguration, Data: []byte("junk")}))
	require.NoError(t, s.DeleteRange(4, 3), "nothing")
	require.Empty(t, fatal)
	require.Equal(t, int64(pageBytes), s.log.sizeAfter(0))
	require.Zero(t, s.log.sizeAfter(3))
	require.Equal(t, int64(4*pageBytes), s.appendedBytes(), "what was cut off included")
	require.NoError(t, log.Close())
	require.ErrorIs(t, s.GetLog(3, &e), trivet.ErrClosed, "no damage")
	require.Empty(t, fatal)
}

// Damage at run time is never a missing entry; the library gets no error that it panics on, and the group is
// dead. Nothing is written after it.
func TestLogStoreDamage(t *testing.T) {
	var fatal []error
	guard := &diskGuard{fatal: func(err error) { fatal = append(fatal, err) }}
	dir := segment.NewMemDir()
	log := mustOpenLog(t, dir)
	s := newTestStore(t, log, guard)
	for i := range uint64(8) { // more than stays in memory
		require.NoError(t, s.StoreLog(&raft.Log{Index: i + 1, Term: 1, Data: bytes.Repeat([]byte{0xaa}, 4<<10)}))
	}
	names, err := dir.List()
	require.NoError(t, err)
	for _, name := range names {
		for at := int64(2 * pageBytes); at < testSegBytes; at += 256 {
			dir.Flip(name, at)
		}
	}
	var e raft.Log
	require.ErrorIs(t, s.log.read(1, &e), trivet.ErrCorrupt)
	require.NotErrorIs(t, s.log.read(1, &e), raft.ErrLogNotFound)
	require.NoError(t, s.GetLog(1, &e))
	require.Empty(t, e.Data)
	require.Len(t, fatal, 1)
	require.ErrorIs(t, fatal[0], trivet.ErrCorrupt)
	require.Error(t, s.StoreLog(&raft.Log{Index: 9, Term: 2}), "nothing is written after a failure")
	require.Error(t, s.DeleteRange(3, 8))
}

// What is told where somebody has the group opened again: damage on the disk is, a failed write and what was changed in
// memory stop the process.
func TestLogStoreSuspect(t *testing.T) {
	for name, inMemory := range map[string]bool{"disk": false, "memory": true} {
		t.Run(name, func(t *testing.T) {
			var fatal, rot []error
			guard := &diskGuard{
				fatal: func(err error) { fatal = append(fatal, err) }, rot: func(err error) { rot = append(rot, err) },
			}
			dir := segment.NewMemDir()
			s := newTestStore(t, mustOpenLog(t, dir), guard)
			first := bytes.Repeat([]byte{0xaa}, 4<<10)
			require.NoError(t, s.StoreLog(&raft.Log{Index: 1, Term: 1, Data: first}))
			if inMemory {
				first[0] ^= 1
			} else {
				for i := range uint64(7) { // more than stays in memory
					require.NoError(t, s.StoreLog(&raft.Log{Index: i + 2, Term: 1, Data: bytes.Repeat([]byte{0xaa}, 4<<10)}))
				}
				names, err := dir.List()
				require.NoError(t, err)
				for _, name := range names {
					for at := int64(2 * pageBytes); at < testSegBytes; at += 256 {
						dir.Flip(name, at)
					}
				}
			}
			var e raft.Log
			require.NoError(t, s.GetLog(1, &e))
			require.Empty(t, e.Data)
			require.Error(t, s.StoreLog(&raft.Log{Index: 9, Term: 2}), "dead either way")
			if inMemory {
				rot, fatal = fatal, rot
			}
			require.Len(t, rot, 1)
			require.Empty(t, fatal)
			require.ErrorIs(t, rot[0], trivet.ErrCorrupt)
		})
	}
}

// H25: the log owns the data of an entry once it is stored. Whoever changes it afterwards is found out, and
// the changed bytes are never served.
func TestLogStoreOwnsItsData(t *testing.T) {
	var fatal []error
	guard := &diskGuard{fatal: func(err error) { fatal = append(fatal, err) }}
	s := newTestStore(t, mustOpenLog(t, segment.NewMemDir()), guard)
	data := []byte("mine no more")
	require.NoError(t, s.StoreLog(&raft.Log{Index: 1, Term: 1, Data: data}))
	data[0] ^= 1
	var e raft.Log
	require.NoError(t, s.GetLog(1, &e))
	require.Empty(t, e.Data)
	require.Len(t, fatal, 1)
	require.ErrorIs(t, fatal[0], trivet.ErrCorrupt)
}

// H26: a disk without room for another segment makes no write fail that was begun, so the group lives on and
// goes on when there is room. But a follower that has deleted its tail for the entries that now have no place
// would go on with a wrong idea of its log (raft.go:1562): that one is dead.
func TestLogStoreWithoutRoom(t *testing.T) {
	var fatal []error
	guard := &diskGuard{fatal: func(err error) { fatal = append(fatal, err) }}
	dir := segment.NewMemDir()
	s := newTestStore(t, mustOpenLog(t, dir), guard)
	require.NoError(t, s.StoreLog(&raft.Log{Index: 1, Term: 1}))
	dir.SetHook(func(op segment.MemOp) (f segment.MemFault) {
		if op.Kind == segment.MemCreate {
			f.Err = syscall.ENOSPC
		}
		return f
	})
	last := uint64(1)
	fill := func() (err error) {
		for err == nil {
			err = s.StoreLog(&raft.Log{Index: last + 1, Term: 1, Data: make([]byte, 4000)})
			if err == nil {
				last++
			}
		}
		return err
	}
	require.ErrorIs(t, fill(), trivet.ErrNoSpace)
	require.NoError(t, guard.failed())
	before := last
	require.NoError(t, s.DeleteRange(1, last-1))
	require.ErrorIs(t, fill(), trivet.ErrNoSpace)
	require.Greater(t, last, before, "what was compacted is used again")
	require.Empty(t, fatal)

	require.NoError(t, s.DeleteRange(last, last))
	big := &raft.Log{Index: last, Term: 2, Data: make([]byte, s.log.entryMax)}
	require.ErrorIs(t, s.StoreLog(big), trivet.ErrNoSpace)
	require.Len(t, fatal, 1)
}

func TestLogStoreRefusesGaps(t *testing.T) {
	for _, bad := range [][]*raft.Log{
		{{Index: 8, Term: 1}},
		{{Index: 7, Term: 1}, {Index: 9, Term: 1}},
		{{Index: 7, Term: 0}},
		{{Index: 3, Term: 1}},
		{{Index: 7, Term: 1, Extensions: []byte{1}}},
		{{Index: 7, Term: 1, Data: make([]byte, testSegBytes)}},
	} {
		s := newTestStore(t, mustOpenLog(t, segment.NewMemDir()), &diskGuard{})
		require.NoError(t, s.StoreLogs([]*raft.Log{{Index: 5, Term: 1}, {Index: 6, Term: 1}}))
		require.ErrorIs(t, s.StoreLogs(bad), trivet.ErrInvalid)
		require.Error(t, s.StoreLogs([]*raft.Log{{Index: 7, Term: 1}}), "after that nothing is taken")
	}
	s := newTestStore(t, mustOpenLog(t, segment.NewMemDir()), &diskGuard{})
	require.NoError(t, s.StoreLogs([]*raft.Log{{Index: 5, Term: 1}, {Index: 6, Term: 1}, {Index: 7, Term: 1}}))
	require.ErrorIs(t, s.DeleteRange(6, 6), trivet.ErrInvalid, "a hole")
}

// What Create made of a group is not there for the next one of that name on the disk: neither entries nor
// vote (H10, H35).
func TestGroupMadeAgainStartsEmpty(t *testing.T) {
	fs := vfs.NewCrashableMem()
	log := mustOpenLog(t, LogDir(fs, "/disk/log"))
	cfg := Config{Group: logGroup, Replica: idA, FS: fs, Dir: "/disk/groups/v", Log: log}
	own := []Member{{Replica: idA, Node: "n"}}
	require.NoError(t, Create(cfg, own))
	g := newGroupLog(log, logGroup)
	require.NoError(t, g.append([]*raft.Log{{Index: 2, Term: 7}}))
	require.NoError(t, g.SetStable(segment.Stable{Term: 7, VoteTerm: 7, Vote: "somebody"}))
	require.NoError(t, fs.RemoveAll(cfg.Dir))
	require.ErrorIs(t, Create(cfg, own), trivet.ErrCorrupt, "it lost its directory, and must not begin anew (H10)")
	require.NoError(t, Destroy(cfg))
	require.True(t, g.pristine())

	cfg.Replica = idB
	require.NoError(t, Create(cfg, nil))
	first, last := g.bounds()
	require.Equal(t, []uint64{1, 0}, []uint64{first, last})
	require.Equal(t, segment.Stable{Term: 1}, g.Stable())
	require.NoError(t, Destroy(cfg))
	require.True(t, g.pristine())
	require.NoError(t, log.Close())
	require.True(t, newGroupLog(mustOpenLog(t, LogDir(fs, "/disk/log")), logGroup).pristine(), "after a restart")
}
