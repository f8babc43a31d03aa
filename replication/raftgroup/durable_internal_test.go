package raftgroup

import (
	"context"
	"fmt"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/raft"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet/engine/segment"
	"github.com/trivet-csi/trivet/replication/transport"
)

// slowDir is a disk whose flushes wait while it is closed.
type slowDir struct {
	mu   sync.Mutex
	gate chan struct{}
}

// newSlowLog returns a log on such a disk.
func newSlowLog(t *testing.T) (*segment.Log, *slowDir) {
	t.Helper()
	dir, slow := segment.NewMemDir(), &slowDir{}
	log := mustOpenLog(t, slowed{dir, slow})
	return log, slow
}

// shut makes flushes wait until open is called.
func (s *slowDir) shut() (open func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	gate := make(chan struct{})
	s.gate = gate
	return sync.OnceFunc(func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.gate = nil
		close(gate)
	})
}

func (s *slowDir) wait() {
	s.mu.Lock()
	gate := s.gate
	s.mu.Unlock()
	if gate != nil {
		<-gate
	}
}

// slowed wraps the files of a segment.Dir.
type slowed struct {
	segment.Dir
	slow *slowDir
}

func (d slowed) Create(name string, sizeBytes int64) (segment.File, error) {
	f, err := d.Dir.Create(name, sizeBytes)
	return slowFile{f, d.slow}, err
}

func (d slowed) Open(name string) (segment.File, error) {
	f, err := d.Dir.Open(name)
	return slowFile{f, d.slow}, err
}

type slowFile struct {
	segment.File
	slow *slowDir
}

func (f slowFile) Sync() error {
	f.slow.wait()
	return f.File.Sync()
}

func overlapping(t *testing.T, log *segment.Log, names ...string) *logStore {
	t.Helper()
	s, err := newLogStore(newGroupLog(log, logGroup), &diskGuard{}, groupConfig{}, true)
	require.NoError(t, err)
	require.NoError(t, s.StoreLog(configEntry(1, names...)))
	return s
}

func someEntries(term uint64, indexes ...uint64) (out []*raft.Log) {
	for _, i := range indexes {
		out = append(out, &raft.Log{Index: i, Term: term, Data: fmt.Appendf(nil, "%d in %d", i, term)})
	}
	return out
}

// ended reports whether f returns while the bubble has nothing else to do.
func ended(f func() error) (wait func() error, done bool) {
	result := make(chan error, 1)
	go func() { result <- f() }()
	synctest.Wait()
	return func() error { return <-result }, len(result) == 1
}

// What may overlap does not wait for the disk; configurations and the entries of a lone voter do.
func TestOverlapStoresAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log, slow := newSlowLog(t)
		s := overlapping(t, log, "a", "b", "c")
		open := slow.shut()
		defer open()
		require.NoError(t, s.StoreLogs(someEntries(1, 2, 3)))
		require.Equal(t, uint64(1), s.durable.index())
		last, err := s.LastIndex()
		require.NoError(t, err)
		require.Equal(t, uint64(3), last)
		wait, done := ended(func() error { return s.StoreLog(configEntry(4, "a")) })
		require.False(t, done, "a configuration")
		open()
		require.NoError(t, wait())
		require.Equal(t, uint64(4), s.durable.index(), "and all before it")
		open = slow.shut()
		defer open()
		wait, done = ended(func() error { return s.StoreLogs(someEntries(1, 5)) })
		require.False(t, done, "of a lone voter")
		open()
		require.NoError(t, wait())
		require.NoError(t, log.Close())
	})
}

// A wait is for the entry, not for its index: what replaces it has to come to the disk itself.
func TestDurableRewinds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log, slow := newSlowLog(t)
		s := overlapping(t, log, "a", "b", "c")
		require.NoError(t, s.StoreLogs(someEntries(1, 2, 3)))
		require.NoError(t, s.durable.wait(t.Context(), 3))
		require.NoError(t, s.DeleteRange(3, 3))
		require.Equal(t, uint64(2), s.durable.index())
		open := slow.shut()
		defer open()
		require.NoError(t, s.StoreLogs(someEntries(2, 3)))
		wait, done := ended(func() error { return s.durable.wait(t.Context(), 3) })
		require.False(t, done, "the entry of term 2 is not on disk")
		require.NoError(t, s.durable.wait(t.Context(), 2))
		short, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		require.ErrorIs(t, s.durable.wait(short, 3), context.DeadlineExceeded)
		open()
		require.NoError(t, wait())
		require.Equal(t, uint64(3), s.durable.index())
		require.ErrorIs(t, s.durable.wait(t.Context(), 4), errReplaced, "not in the log at all")
		require.NoError(t, log.Close())
	})
}

// Who waits for an entry that is replaced while it is queued hears so, and nothing is taken for durable by the write
// of what was replaced.
func TestDurableWaitsDieWithTheirEntry(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log, slow := newSlowLog(t)
		s := overlapping(t, log, "a", "b", "c")
		for name, replace := range map[string]func(){
			"cut": func() { s.durable.cut(3) }, "reset": func() { s.durable.reset(1) },
		} {
			open := slow.shut()
			require.NoError(t, s.StoreLogs(someEntries(1, 2, 3)))
			second, _ := ended(func() error { return s.durable.wait(t.Context(), 2) })
			third, _ := ended(func() error { return s.durable.wait(t.Context(), 3) })
			replace()
			if name == "cut" { // and something else takes its place, and comes to the disk
				require.NoError(t, s.StoreLogs(someEntries(2, 3)))
			}
			open()
			require.ErrorIs(t, third(), errReplaced, name)
			if err := second(); name == "cut" {
				require.NoError(t, err)
			} else {
				require.ErrorIs(t, err, errReplaced)
			}
			synctest.Wait()
			if name == "reset" {
				require.Equal(t, uint64(1), s.durable.index())
			}
			require.NoError(t, s.DeleteRange(2, 3))
		}
		require.NoError(t, log.Close())
	})
}

// What an earlier run of the group left in the queue is no more durable for a restart (docs/models).
func TestDurableAfterRestart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log, slow := newSlowLog(t)
		s := overlapping(t, log, "a", "b", "c")
		open := slow.shut()
		defer open()
		require.NoError(t, s.StoreLogs(someEntries(1, 2)))
		wait, done := ended(func() error {
			_, err := newLogStore(newGroupLog(log, logGroup), &diskGuard{}, groupConfig{}, true)
			return err
		})
		require.False(t, done)
		open()
		require.NoError(t, wait())
		require.NoError(t, log.Close())
	})
}

// D8 and H28 for appends that nobody waits for: the guard sees one that hangs, and one that fails.
func TestOverlapIsGuarded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log, slow := newSlowLog(t)
		fatal := make(chan error, 1)
		s := overlapping(t, log, "a", "b", "c")
		s.guard.fatal = func(err error) { fatal <- err }
		open := slow.shut()
		defer open()
		require.NoError(t, s.StoreLogs(someEntries(1, 2)))
		time.Sleep(stallQuiet + time.Millisecond)
		require.True(t, s.guard.stalled())
		open()
		require.NoError(t, s.durable.wait(t.Context(), 2))
		synctest.Wait()
		require.False(t, s.guard.stalled())
		open = slow.shut()
		defer open()
		require.NoError(t, s.StoreLogs(someEntries(1, 3)))
		time.Sleep(stallFatal + time.Millisecond)
		require.ErrorContains(t, <-fatal, "hangs")
		open()
		require.NoError(t, log.Close())
	})
}

// Gate 3: a leader tells nobody of a commit that its own disk has not seen.
func TestGate3(t *testing.T) {
	var sent []*raft.AppendEntriesRequest
	n := &beatNet{answer: func(_ context.Context, m transport.Message) (transport.Message, error) {
		r, err := decodeAppend(m.Body)
		sent = append(sent, r)
		return transport.Message{Body: appendReply{term: 1, success: true}.encode()}, err
	}}
	g := &Group{
		cfg: Config{
			Group: logGroup, Network: &Mux{net: n}, BootTime: func() time.Duration { return 0 },
		}.withDefaults(),
		guard: &diskGuard{}, lease: newLeaseTable(), store: &logStore{durable: newDurability(&diskGuard{}, 5)},
	}
	tr := &peerTransport{g: g, ctx: t.Context()}
	for _, commit := range []uint64{4, 5, 9} {
		req := &raft.AppendEntriesRequest{Term: 1, PrevLogEntry: 5, PrevLogTerm: 1, LeaderCommitIndex: commit}
		err := tr.AppendEntries(raft.ServerID(idB), address(idB, "b"), req, &raft.AppendEntriesResponse{})
		require.NoError(t, err)
		require.Equal(t, min(commit, 5), sent[len(sent)-1].LeaderCommitIndex)
	}
}

// A catch-up that finds the snapshot's entry in the log takes neither the entry for durable, when the leader asks
// whether it is there, nor ends before it is: the state would be ahead of its log after a crash (H4, docs/models).
func TestCatchUpWaitsForKeptLog(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		rec := testRecord(10) // term 2
		log, slow := newSlowLog(t)
		fs, dir := memDir(t)
		require.NoError(t, Create(Config{Group: logGroup, Replica: idA, FS: fs, Dir: dir, Log: log}, nil))
		g := handGroupOn(t, fs, dir, log, &handMachine{fakeMachine: &fakeMachine{index: rec.machine}})
		require.NoError(t, g.stable.setTerm(3))
		require.NoError(t, g.store.StoreLog(configEntry(1, "a", "b", "c")))
		open := slow.shut()
		defer open()
		require.NoError(t, g.store.StoreLogs(entries(2, 10, 2)))

		g.inst = &instance{g: g}
		fetch := func() fetchReply {
			b, err := g.onFetch("leader", fetchAsk{term: 3, rec: rec}.encode())
			require.NoError(t, err)
			r, err := decodeFetchReply(b)
			require.NoError(t, err)
			return r
		}
		require.False(t, fetch().done, "it is in the queue only")
		wait, done := ended(func() error { return g.finishInstall(installRecord{term: 3, rec: rec}) })
		require.False(t, done)
		open()
		require.NoError(t, wait())
		require.Equal(t, fetchReply{term: 3, done: true, at: logPosition{term: rec.term, index: rec.index}}, fetch())
		g.closeStores(t)
	})
}
