package segment

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"

	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
)

// journal is what a workload has asked for and what was acknowledged. The states of a group are numbered;
// after a crash it must be in one from the last acknowledged to the last issued (nothing unacknowledged is
// half there).
type journal struct {
	mu     sync.Mutex
	states map[trivet.VolumeID][]*model
	acked  map[trivet.VolumeID]int
	pins   []pinned
}

// pinned is a payload that stands pinned.
type pinned struct {
	place Place
	want  []byte
}

func newJournal() *journal {
	return &journal{states: map[trivet.VolumeID][]*model{}, acked: map[trivet.VolumeID]int{}}
}

func (j *journal) current(id trivet.VolumeID) *model {
	if j.states[id] == nil {
		j.states[id] = []*model{newModel()}
	}
	return j.states[id][len(j.states[id])-1]
}

// claim is what a disk must hold.
type claim struct {
	from, to map[trivet.VolumeID]int
	pins     []pinned
}

func (j *journal) claim() claim {
	j.mu.Lock()
	defer j.mu.Unlock()
	c := claim{map[trivet.VolumeID]int{}, map[trivet.VolumeID]int{}, slices.Clone(j.pins)}
	for id, states := range j.states {
		c.from[id], c.to[id] = j.acked[id], len(states)-1
	}
	return c
}

// check opens a disk and compares it with a claim.
func (j *journal) check(dir *MemDir, c claim, seed uint64) error {
	opts := testOptions(dir, seed)
	opts.Hold = true
	l, err := Open(opts)
	if err != nil {
		return err
	}
	defer l.Close()
	for id, from := range c.from {
		j.mu.Lock()
		states := j.states[id]
		j.mu.Unlock()
		g := l.Group(id)
		var errs error
		found := false
		for n := c.to[id]; n >= from && !found; n-- {
			err := states[n].matches(g)
			found = err == nil
			errs = errors.Join(errs, err)
		}
		if !found {
			return fmt.Errorf("group %d is in none of the states %d to %d: %w", id, from, c.to[id], errs)
		}
	}
	for _, p := range c.pins {
		if err := l.Pin(p.place.Segment); err != nil {
			return err
		}
		if err := p.check(l); err != nil {
			return err
		}
	}
	l.Release()
	return nil
}

func (p pinned) check(l *Log) error {
	got := make([]byte, p.place.Bytes)
	if err := l.ReadAt(p.place.Segment, got, p.place.Off); err != nil {
		return err
	}
	if !bytes.Equal(got, p.want) {
		return fmt.Errorf("payload at %d of %v has changed", p.place.Off, p.place.Segment)
	}
	return nil
}

const crashGroups = 6

// workload runs n random operations in bursts on several groups, with restarts, and stops at the first
// error.
func workload(j *journal, dir *MemDir, seed uint64, n int, hook func(MemOp) MemFault) (l *Log, err error) {
	rng := rand.New(rand.NewPCG(seed, 1))
	opts := testOptions(dir, seed)
	if err := Format(opts); err != nil {
		return nil, err
	}
	dir.SetHook(hook)
	defer dir.SetHook(nil)
	if l, err = Open(opts); err != nil {
		return nil, err
	}
	for done := 0; done < n && err == nil; {
		burst := 1 + rng.IntN(4)
		done += burst
		err = j.burst(rng, l, burst)
		if err == nil && rng.IntN(3) == 0 {
			err = j.movePins(rng, l)
		}
		if err == nil && rng.IntN(60) == 0 {
			l, err = j.reopen(l, opts)
		}
	}
	return l, errors.Join(err, l.Close())
}

// burst issues operations and then waits for all.
func (j *journal) burst(rng *rand.Rand, l *Log, n int) error {
	type wait struct {
		id     trivet.VolumeID
		state  int
		ticket *Ticket
	}
	var waits []wait
	for range n {
		id := trivet.VolumeID(1 + rng.IntN(crashGroups))
		if id < 3 && rng.IntN(10) > 0 {
			id += 2
		}
		j.mu.Lock()
		next := j.current(id).clone()
		o := randomOp(rng, next, id < 3)
		o.apply(next)
		j.states[id] = append(j.states[id], next) // before the call: it may be on the disk while it runs
		state := len(j.states[id]) - 1
		j.mu.Unlock()
		ticket, err := o.start(l.Group(id))
		if err != nil {
			return err
		}
		waits = append(waits, wait{id, state, ticket})
	}
	for _, w := range waits {
		if err := w.ticket.Err(); err != nil {
			return err
		}
		j.mu.Lock()
		j.acked[w.id] = max(j.acked[w.id], w.state)
		j.mu.Unlock()
	}
	return nil
}

// movePins pins a payload, and lets an old one go.
func (j *journal) movePins(rng *rand.Rand, l *Log) error {
	j.mu.Lock()
	m := j.current(trivet.VolumeID(1 + rng.IntN(crashGroups)))
	var old pinned
	if len(j.pins) > 4 {
		old, j.pins = j.pins[0], slices.Clone(j.pins[1:])
	}
	id := trivet.VolumeID(0)
	for i, states := range j.states {
		if states[len(states)-1] == m {
			id = i
		}
	}
	j.mu.Unlock()
	if old.want != nil {
		if err := old.check(l); err != nil {
			return err
		}
		l.Unpin(old.place.Segment)
	}
	if len(m.entries) == 0 {
		return nil
	}
	e := m.entries[rng.IntN(len(m.entries))]
	place, err := l.Group(id).Locate(e.Index)
	if err != nil {
		return err
	}
	if len(e.Payload) == 0 {
		l.Unpin(place.Segment)
		return nil
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	j.pins = append(j.pins, pinned{place, e.Payload})
	return nil
}

// reopen closes the log and opens it again, holding what was pinned.
func (j *journal) reopen(l *Log, opts Options) (*Log, error) {
	if err := l.Close(); err != nil {
		return l, err
	}
	opts.Hold = true
	next, err := Open(opts)
	if err != nil {
		return l, err
	}
	for _, p := range j.claim().pins {
		if err := next.Pin(p.place.Segment); err != nil {
			return next, err
		}
	}
	next.Release()
	return next, nil
}

// photo is a disk right before one of its changes, as a crash there would leave it.
type photo struct {
	op      MemOp
	n       int
	percent int
	dir     *MemDir
	claim   claim
}

// A crash after every change of a workload of 500 operations, with none to all of the unsynced data kept, and
// a second crash right after the recovery: every acknowledged change is there, and nothing by halves.
func TestCrashAtEveryOperation(t *testing.T) {
	ops, seeds := 500, uint64(2)
	if testing.Short() {
		ops, seeds = 100, 1
	}
	for seed := uint64(1); seed <= seeds; seed++ {
		j, dir := newJournal(), NewMemDir()
		rng := rand.New(rand.NewPCG(seed, 2))
		var photos []photo
		n := 0
		l, err := workload(j, dir, seed, ops, func(op MemOp) MemFault {
			if op.Kind == MemRead {
				return MemFault{}
			}
			n++
			c := j.claim() // before the photo: what is acknowledged later need not be on it
			for percent := 0; percent <= 100; percent += 25 {
				photos = append(photos, photo{op, n, percent, dir.CrashLocked(percent, n%2 == 0, rng), c})
			}
			return MemFault{}
		})
		require.NoError(t, err)
		var moved, recycled int64
		for _, s := range l.Stats() {
			moved, recycled = moved+s.MovedBytes, recycled+s.Recycled
		}
		t.Logf("seed %d: %d changes, %d crashes; last run moved %d bytes, recycled %d", seed, n, len(photos), moved, recycled)
		require.Greater(t, n, 2*ops/5)
		checkPhotos(t, j, photos, seed)
	}
}

func checkPhotos(t *testing.T, j *journal, photos []photo, seed uint64) {
	t.Helper()
	for _, p := range photos {
		// What recovery has seen must stay, whatever a power cut right after it keeps.
		again := p.dir.Clone()
		err := j.check(p.dir, p.claim, seed+1)
		require.NoError(t, err, "seed %d, crash before change %d (%+v), %d %% kept", seed, p.n, p.op, p.percent)
		if p.n%7 == 0 {
			lost := again.Crash(0, true, rand.New(rand.NewPCG(seed, 3)))
			require.NoError(t, j.check(lost, p.claim, seed+2), "seed %d, second crash at %d", seed, p.n)
		}
	}
}

// Two batches of one shape are torn at one place, one after the other: the sectors that are left of both must not
// pass for one, half of this and half of that.
func TestTwoTornBatchesDoNotMix(t *testing.T) {
	// tear lets a batch of two entries be lost but for the given sectors, and returns the disk.
	tear := func(dir *MemDir, seed uint64, from, to int) *MemDir {
		l := mustOpen(t, testOptions(dir, seed))
		var torn memWrite
		var name string
		dir.SetHook(func(op MemOp) MemFault {
			if f := dir.files[op.Name]; op.Kind == MemSync && string(f.dirty[0].b[:8]) == magicBatch {
				torn, name = f.dirty[0], op.Name
				return MemFault{Err: syscall.EIO}
			}
			return MemFault{}
		})
		// The first record ends with the first sector.
		const dataBytes = memUnitBytes - batchHeaderBytes - recordHeaderBytes
		err := l.Group(2).Append([]Entry{testEntry(seed, 1, 1, dataBytes, 0), testEntry(seed, 2, 1, 600, 0)})
		require.ErrorIs(t, err, syscall.EIO)
		dir.SetHook(nil)
		dir = dir.Crash(0, true, rand.New(rand.NewPCG(1, 1)))
		dir.files[name].put(torn.b[from:min(to, len(torn.b))], torn.off+int64(from))
		dir.files[name].synced = slices.Clone(dir.files[name].current)
		return dir
	}
	dir := NewMemDir()
	require.NoError(t, Format(testOptions(dir, 1)))
	dir = tear(dir, 3, memUnitBytes, 1<<20)
	require.NoError(t, newModel().matches(mustOpen(t, testOptions(dir.Clone(), 4)).Group(2)))
	dir = tear(dir, 5, 0, memUnitBytes)
	require.NoError(t, newModel().matches(mustOpen(t, testOptions(dir, 6)).Group(2)))
}

// A recovered tail was perhaps never flushed by the process that wrote it. Once Open has shown it to
// somebody, it must survive a power cut.
func TestRecoveryFlushesWhatItFound(t *testing.T) {
	dir := NewMemDir()
	opts := testOptions(dir, 1)
	require.NoError(t, Format(opts))
	// A process that dies between its write and its flush: the write fails to be flushed.
	l := mustOpen(t, opts)
	dir.SetHook(func(op MemOp) MemFault {
		if f := dir.files[op.Name]; op.Kind == MemSync && string(f.dirty[0].b[:8]) == magicBatch {
			return MemFault{Err: syscall.EIO}
		}
		return MemFault{}
	})
	require.ErrorIs(t, l.Group(1).Append([]Entry{testEntry(1, 1, 1, 10, 1)}), syscall.EIO)
	dir.SetHook(nil)
	_ = l.Close() // poisoned
	l = mustOpen(t, opts)
	_, last := l.Group(1).FirstLast()
	require.Equal(t, uint64(1), last, "the kernel still has the write")
	after := dir.Crash(0, true, rand.New(rand.NewPCG(1, 1)))
	opts.Dir = after
	_, last = mustOpen(t, opts).Group(1).FirstLast()
	require.Equal(t, uint64(1), last)
}

// A process that dies while it makes a file leaves one whose name only the kernel knows. The next process
// uses it, so it must make the name durable.
func TestRecoveryKeepsNamesItFound(t *testing.T) {
	dir := NewMemDir()
	opts := testOptions(dir, 1)
	require.NoError(t, Format(opts))
	l := mustOpen(t, opts)
	creates := 0
	dir.SetHook(func(op MemOp) MemFault {
		if op.Kind == MemCreate {
			if creates++; creates >= 3 {
				return MemFault{Err: syscall.EIO} // before anything of it is durable
			}
		}
		return MemFault{}
	})
	g := l.Group(2)
	for i := uint64(1); l.failure() == nil; i++ {
		_ = g.Append([]Entry{testEntry(i, i, 1, 20, 2)}) // fails in the end
	}
	_ = l.Close() // poisoned
	require.Greater(t, creates, 3)
	dir.SetHook(nil)
	l = mustOpen(t, opts)
	g = l.Group(2)
	start := curNumber(g)
	for curNumber(g) == start {
		_, last := g.FirstLast()
		require.NoError(t, g.Append([]Entry{testEntry(last+1, last+1, 1, 20, 2)}))
	}
	_, want := g.FirstLast()
	opts.Dir = dir.Crash(0, true, rand.New(rand.NewPCG(1, 1)))
	_, last := mustOpen(t, opts).Group(2).FirstLast()
	require.Equal(t, want, last)
}

// Every operation fails once, in each way: the log is poisoned, Fatal hears of it once, later calls fail, and
// after a restart, with or without a crash, nothing acknowledged is lost (H28).
func TestFaultAtEveryOperation(t *testing.T) {
	ops := 60
	for name, fault := range map[string]MemFault{
		"EIO":         {Err: syscall.EIO},
		"ENOSPC":      {Err: syscall.ENOSPC},
		"short write": {Short: true},
		"torn EIO":    {Short: true, Err: syscall.EIO},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			poisonedN := 0
			for at := 0; ; at++ {
				j, dir := newJournal(), NewMemDir()
				n := 0
				l, err := workload(j, dir, 7, ops, func(op MemOp) MemFault {
					if op.Kind == MemRead || op.Kind == MemSync && fault.Err == nil {
						return MemFault{}
					}
					if n++; n == at+1 {
						return fault
					}
					return MemFault{}
				})
				if n <= at {
					require.NoError(t, err, "nothing has failed")
					break
				}
				if l != nil && l.failure() != nil {
					poisonedN++
					require.Error(t, err)
					checkPoisoned(t, l)
				}
				c := j.claim()
				c.pins = nil
				crashed := dir.Crash(at%5*25, at%2 == 0, rand.New(rand.NewPCG(uint64(at), 5)))
				require.NoError(t, j.check(crashed, c, 8), "fault at operation %d, then a crash", at)
				require.NoError(t, j.check(dir, c, 8), "fault at operation %d", at)
			}
			require.Greater(t, poisonedN, 20)
		})
	}
}

func checkPoisoned(t *testing.T, l *Log) {
	t.Helper()
	g := l.Group(1)
	first := l.failure()
	require.ErrorIs(t, g.Append([]Entry{testEntry(1, 1, 1, 1, 0)}), first)
	require.ErrorIs(t, g.SetStable(Stable{Term: 99}), first)
	require.ErrorIs(t, g.TruncateSuffix(1), first)
	require.ErrorIs(t, g.TrimPrefix(1), first)
	require.ErrorIs(t, g.Reset(1), first)
	require.ErrorIs(t, g.DeleteGroup(), first)
	_, err := g.Read(1)
	require.ErrorIs(t, err, first)
	_, err = g.Locate(1)
	require.ErrorIs(t, err, first)
	require.ErrorIs(t, l.Pin(segmentID(0, 1)), first)
	require.ErrorIs(t, l.ReadAt(segmentID(0, 1), make([]byte, pageBytes), 0), first)
	require.ErrorIs(t, l.Close(), first)
}

// Fatal is called once, whatever fails afterwards; what was queued fails too, and nothing is written.
func TestFatalOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fatal := make(chan error, 10)
		l, dir := newTestLog(t, func(o *Options) { o.Fatal = func(err error) { fatal <- err } })
		require.NoError(t, l.Group(2).Append([]Entry{testEntry(0, 1, 1, 10, 0)}))
		synctest.Wait() // for the files that are made when a segment begins: the hook stops all that use the directory
		writes := 0
		block := make(chan struct{})
		dir.SetHook(func(op MemOp) MemFault {
			switch op.Kind {
			case MemWrite:
				writes++
				<-block
				return MemFault{Err: io.ErrClosedPipe}
			default:
				return MemFault{}
			}
		})
		var tickets []*Ticket
		for i := range uint64(5) { // they fit, so no file is made for them
			ticket, err := l.Group(2).AppendAsync([]Entry{testEntry(i, i+2, 1, 10, 0)})
			require.NoError(t, err)
			tickets = append(tickets, ticket)
		}
		close(block)
		for _, ticket := range tickets {
			require.ErrorIs(t, ticket.Err(), io.ErrClosedPipe)
		}
		require.ErrorIs(t, l.Group(3).Append([]Entry{testEntry(1, 1, 1, 1, 0)}), io.ErrClosedPipe, "the other lane too")
		require.ErrorIs(t, <-fatal, io.ErrClosedPipe)
		require.ErrorIs(t, l.Close(), io.ErrClosedPipe)
		require.Empty(t, fatal)
		dir.SetHook(nil)
		require.Equal(t, 1, writes)
	})
}
