package raftgroup

import (
	"log/slog"
	"testing"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/hashicorp/raft"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/engine/segment"
)

// handMachine stands at 3, and at the snapshot's index once it is restored.
type handMachine struct {
	*fakeMachine
	restoring bool
}

func (m *handMachine) Restoring() bool { return m.restoring }

func (m *handMachine) Applied() (uint64, uint64) {
	if m.index < testRecord(10).machine {
		return m.index, 1
	}
	return m.index, 2
}

// handGroup opens the stores of a group, without a library.
func handGroup(t *testing.T, fs vfs.FS, dir string, m StateMachine) *Group {
	t.Helper()
	return handGroupOn(t, fs, dir, mustOpenLog(t, LogDir(fs, dir+"-log")), m)
}

// handGroupOn is handGroup on a log of the caller's.
func handGroupOn(t *testing.T, fs vfs.FS, dir string, log *segment.Log, m StateMachine) *Group {
	t.Helper()
	cfg := Config{Group: logGroup, Replica: idA, FS: fs, Dir: dir, Log: log, Machine: m, OverlapFlush: true}
	g := &Group{
		cfg:  cfg.withDefaults(),
		addr: address(idA, "a"),
		log:  slog.New(slog.DiscardHandler), catch: newCatchUp(), guard: &diskGuard{fatal: func(err error) { t.Error(err) }},
	}
	require.NoError(t, g.openStores())
	return g
}

// mustCreate makes a group without members, and its disk's log.
func mustCreate(t *testing.T, fs vfs.FS, dir string) {
	t.Helper()
	log := mustOpenLog(t, LogDir(fs, dir+"-log"))
	require.NoError(t, Create(Config{Group: logGroup, Replica: idA, FS: fs, Dir: dir, Log: log}, nil))
	require.NoError(t, log.Close())
}

func (g *Group) closeStores(t *testing.T) {
	t.Helper()
	require.NoError(t, g.cfg.Log.Close())
	g.guard.close()
}

func entries(from, to, termFrom5 uint64) []*raft.Log {
	var out []*raft.Log
	for i := from; i <= to; i++ {
		e := &raft.Log{Index: i, Term: 1, Data: []byte("x")}
		if i >= 5 {
			e.Term = termFrom5
		}
		if i == 1 {
			e.Type = raft.LogConfiguration
			e.Data = raft.EncodeConfiguration(toConfiguration(testRecord(10).config.members))
		}
		out = append(out, e)
	}
	return out
}

// The hand-over, with a crash before any change that it makes: log and state are either what they were,
// or those of the snapshot, or the state is restored and Open does the rest. Term and vote stay. What the
// log holds beyond the snapshot stays if it follows from it, and goes if it does not.
func TestHandOver(t *testing.T) {
	rec := testRecord(10) // term 2, machine 9
	for name, row := range map[string]struct {
		log         []*raft.Log
		snapshot    bool // at 10 already, and the log begins after it
		first, last uint64
	}{
		"short log":          {entries(1, 6, 1), false, 11, 10},
		"log ends there":     {entries(1, 10, 2), false, 1, 10},
		"log goes on":        {entries(1, 15, 2), false, 1, 15},
		"other log":          {entries(1, 15, 1), false, 11, 10},
		"log begins there":   {entries(11, 15, 2), true, 11, 15},
		"log is empty there": {nil, true, 11, 10},
	} {
		t.Run(name, func(t *testing.T) {
			atEveryCrash(t, func(t *testing.T, n, percent int) bool {
				mem, dir := memDir(t)
				mustCreate(t, mem, dir)
				m := &handMachine{fakeMachine: &fakeMachine{index: 3}}
				g := handGroup(t, mem, dir, m)
				require.NoError(t, g.stable.setTerm(2))
				require.NoError(t, g.stable.SetUint64([]byte(keyLastVoteTerm), 2))
				require.NoError(t, g.stable.Set([]byte(keyLastVoteCand), []byte("b")))
				if row.snapshot {
					m.index = rec.machine
					require.NoError(t, g.snaps.put(rec))
					require.NoError(t, g.store.install(rec.index, rec.config))
				}
				if row.log != nil {
					require.NoError(t, g.store.StoreLogs(row.log))
				}
				g.closeStores(t)

				was := m.index
				fs := newCrashAt(mem, n, percent, 1)
				at, restoring := uint64(0), false
				fs.onCrash = func() { at, restoring = m.index, m.restoring }
				g = handGroup(t, fs, dir, m)
				r := installRecord{term: 3, rec: rec}
				require.NoError(t, g.beginInstall(r))
				if !g.restored(rec) {
					m.restoring = true
					require.NoError(t, writeFile(fs, dir, "elsewhere", nil)) // a change in the midst of a restore
					m.index, m.restoring = rec.machine, false
				}
				require.NoError(t, g.finishInstall(r))
				checkHandOver(t, g, row.first, row.last)
				g.closeStores(t)
				after := fs.crashed()
				if after == nil {
					return false
				}

				m.index, m.restoring = at, restoring
				g = handGroup(t, after, dir, m)
				owing, err := g.resumeInstall()
				require.NoError(t, err)
				require.Equal(t, restoring, owing)
				if owing { // it pulls on
					m.index, m.restoring = rec.machine, false
					require.NoError(t, g.finishInstall(r))
				}
				require.NoError(t, g.checkState())
				_, pending, err := g.pending()
				require.NoError(t, err)
				require.False(t, pending)
				if m.index == was && !row.snapshot { // nothing was restored
					first, last := g.seglog.bounds()
					require.Equal(t, []uint64{1, uint64(len(row.log))}, []uint64{first, last})
					require.Zero(t, g.snaps.record().index)
				} else if _, last := g.seglog.bounds(); !row.snapshot || g.stable.record().term == 3 {
					checkHandOver(t, g, row.first, row.last)
				} else {
					require.Equal(t, row.last, last)
				}
				require.Equal(t, "b", g.stable.record().candidate, "the vote is gone")
				g.closeStores(t)
				return true
			})
		})
	}
}

func checkHandOver(t *testing.T, g *Group, first, last uint64) {
	t.Helper()
	require.NoError(t, g.checkState())
	f, l := g.seglog.bounds()
	require.Equal(t, []uint64{first, last}, []uint64{f, l})
	require.Equal(t, testRecord(10), g.snaps.record())
	require.Equal(t, stableRecord{term: 3, voteTerm: 2, candidate: "b"}, g.stable.record())
	require.Equal(t, testRecord(10).config.members, g.store.latestConfig().members)
}

// Who makes contact as a leader is a source only in this replica's own term or a higher one.
func TestOldLeaderIsNoSource(t *testing.T) {
	fs, dir := memDir(t)
	mustCreate(t, fs, dir)
	g := handGroup(t, fs, dir, &handMachine{fakeMachine: &fakeMachine{index: 3}})
	defer g.closeStores(t)
	require.NoError(t, g.stable.setTerm(5))
	g.catch.active = true
	contact := func(term uint64, from raft.ServerAddress) raft.ServerAddress {
		b, err := encodeAppend(&raft.AppendEntriesRequest{Term: term})
		require.NoError(t, err)
		require.Error(t, g.noteLeader(from, b))
		return g.catch.leader
	}
	require.Empty(t, contact(4, "old"))
	require.Equal(t, raft.ServerAddress("now"), contact(5, "now"))
	require.Equal(t, raft.ServerAddress("next"), contact(7, "next"))
	require.Equal(t, raft.ServerAddress("next"), contact(6, "now"), "it knows of a newer one")
	require.Equal(t, uint64(7), g.term())
	b, err := g.onFetch("old", fetchAsk{term: 6, rec: snapshotRecord{
		index: 9, term: 6, machine: 9, config: testRecord(9).config,
	}}.encode())
	require.NoError(t, err)
	r, err := decodeFetchReply(b)
	require.NoError(t, err)
	require.Equal(t, fetchReply{term: 7}, r)
}

// What was restored is not done before the library runs.
func TestDoneOnlyWhenItRuns(t *testing.T) {
	fs, dir := memDir(t)
	mustCreate(t, fs, dir)
	g := handGroup(t, fs, dir, &handMachine{fakeMachine: &fakeMachine{index: 9}})
	defer g.closeStores(t)
	g.catch.active = true
	require.NoError(t, g.finishInstall(installRecord{term: 3, rec: testRecord(10)}))
	b, err := g.onFetch("now", fetchAsk{term: 3, rec: testRecord(10)}.encode())
	require.NoError(t, err)
	r, err := decodeFetchReply(b)
	require.NoError(t, err)
	require.Equal(t, fetchReply{term: 3}, r)
}

// I7: an image that would take state or snapshot back is refused before anything is pulled.
func TestImageBehindIsRefused(t *testing.T) {
	fs, dir := memDir(t)
	mustCreate(t, fs, dir)
	g := handGroup(t, fs, dir, &handMachine{fakeMachine: &fakeMachine{index: 9}})
	defer g.closeStores(t)
	require.NoError(t, g.snaps.put(testRecord(10))) // machine 9: entry 10 is a no-op
	require.NoError(t, g.notBehind(testRecord(10)))
	require.NoError(t, g.notBehind(testRecord(11)))
	require.ErrorIs(t, g.notBehind(testRecord(9)), trivet.ErrInvalid)
	sameState := testRecord(9)
	sameState.machine = 9
	require.ErrorIs(t, g.notBehind(sameState), trivet.ErrInvalid, "its log would begin before the snapshot")
	lessState := testRecord(11)
	lessState.machine = 8
	require.ErrorIs(t, g.notBehind(lessState), trivet.ErrInvalid)
}
