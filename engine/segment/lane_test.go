package segment

import (
	"fmt"
	"math/rand/v2"
	"runtime"
	"slices"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
)

// gateDir is a directory whose flushes wait for a token, once it is closed.
type gateDir struct {
	*MemDir
	tokens chan struct{}
}

type gateFile struct {
	File
	tokens chan struct{}
}

func (d *gateDir) Open(name string) (File, error) {
	f, err := d.MemDir.Open(name)
	return &gateFile{f, d.tokens}, err
}

func (d *gateDir) Create(name string, sizeBytes int64) (File, error) {
	f, err := d.MemDir.Create(name, sizeBytes)
	return &gateFile{f, d.tokens}, err
}

func (f *gateFile) Sync() error {
	<-f.tokens
	return f.File.Sync()
}

// gatedLog needs one token for each flush of the log from here on.
func gatedLog(t *testing.T, change func(*Options)) (*Log, *gateDir) {
	t.Helper()
	dir := &gateDir{NewMemDir(), make(chan struct{}, 100)}
	opts := testOptions(dir, 1)
	change(&opts)
	for range 2 * opts.Lanes {
		dir.tokens <- struct{}{}
	}
	require.NoError(t, Format(opts))
	l, err := Open(opts)
	require.NoError(t, err)
	require.Empty(t, dir.tokens)
	dir.tokens <- struct{}{} // the first write begins a segment
	return l, dir
}

// open lets all flushes pass.
func (d *gateDir) open() { close(d.tokens) }

// What comes while a flush is under way goes into the next one, of all groups together.
func TestGroupCommit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l, dir := gatedLog(t, func(o *Options) { o.Lanes, o.SegmentBytes = 1, 1<<20 })
		var tickets []*Ticket
		add := func(id trivet.VolumeID) {
			ticket, err := l.Group(id).AppendAsync([]Entry{testEntry(uint64(id), 1, 1, 50, 1)})
			require.NoError(t, err)
			tickets = append(tickets, ticket)
		}
		add(1)
		synctest.Wait() // the first is in its flush
		for id := trivet.VolumeID(2); id <= 41; id++ {
			add(id)
		}
		dir.tokens <- struct{}{}
		synctest.Wait()
		select {
		case <-tickets[0].Done():
		default:
			t.Fatal("the first is not answered by its flush")
		}
		select {
		case <-tickets[1].Done():
			t.Fatal("the second was answered before its flush")
		default:
		}
		dir.tokens <- struct{}{}
		synctest.Wait()
		for _, ticket := range tickets {
			require.NoError(t, ticket.Wait(t.Context()))
		}
		s := l.Stats()[0]
		assert.Equal(t, int64(2), s.Flushes)
		assert.Less(t, float64(s.WrittenBytes-2*pageBytes)/float64(s.EntryBytes), 1.10,
			"write amplification, without the beginning of the segment")
		dir.open()
		require.NoError(t, l.Close())
	})
}

// An idle lane marks its end once, within 100 ms, and then writes nothing.
func TestIdleMark(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l, _ := newTestLog(t)
		require.NoError(t, l.Group(1).Append([]Entry{testEntry(1, 1, 1, 10, 0)}))
		require.NoError(t, l.Group(1).Append([]Entry{testEntry(1, 2, 1, 10, 0)}))
		require.Zero(t, l.Stats()[1].Marks)
		<-time.After(100 * time.Millisecond)
		synctest.Wait()
		require.Equal(t, int64(1), l.Stats()[1].Marks)
		written := l.Stats()
		<-time.After(time.Hour)
		synctest.Wait()
		require.Equal(t, written, l.Stats())
		require.Zero(t, l.Stats()[0].WrittenBytes, "a lane that was never used")
		require.NoError(t, l.Group(1).Append([]Entry{testEntry(1, 3, 1, 10, 0)}))
		<-time.After(100 * time.Millisecond)
		synctest.Wait()
		require.Equal(t, int64(2), l.Stats()[1].Marks, "and again, whoever wrote")
		require.NoError(t, l.Close())
		require.Equal(t, int64(2), l.Stats()[1].Marks, "Close has nothing to add")
	})
}

// Restarts must not make files: neither with Hold nor without, be the end marked or not.
func TestRestartsMakeNoFiles(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := NewMemDir()
		opts := testOptions(dir, 1)
		require.NoError(t, Format(opts))
		for i := range uint64(40) {
			opts.Dir, opts.Hold = dir, i%2 == 0
			l, err := Open(opts)
			require.NoError(t, err)
			<-time.After(time.Second)
			l.Release()
			require.NoError(t, l.Group(trivet.VolumeID(i%2)).SetStable(Stable{Term: i}))
			if i%3 == 0 { // a crash before the mark
				crashed := dir.Crash(0, true, rand.New(rand.NewPCG(1, 1)))
				require.NoError(t, l.Close())
				dir = crashed
				continue
			}
			require.NoError(t, l.Close())
		}
		require.LessOrEqual(t, len(dir.files), 6)
	})
}

// Queued entries are read from memory at once, and a ticket is for its own write, though its entry was
// overwritten meanwhile.
func TestAsync(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l, dir := gatedLog(t, func(*Options) {})
		g := l.Group(1)
		old, err := g.AppendAsync([]Entry{testEntry(1, 1, 1, 10, 1), testEntry(1, 2, 1, 10, 1)})
		require.NoError(t, err)
		synctest.Wait()
		next, err := g.AppendAsync([]Entry{testEntry(3, 2, 2, 10, 1)})
		require.NoError(t, err)
		got, err := g.Read(2)
		require.NoError(t, err)
		require.True(t, sameEntry(got, testEntry(3, 2, 2, 10, 1)))
		require.Zero(t, g.DurableLast())
		_, err = g.Locate(2)
		require.ErrorIs(t, err, trivet.ErrPending)
		none, err := g.TruncateSuffixAsync(9)
		require.NoError(t, err)
		dir.tokens <- struct{}{}
		synctest.Wait()
		require.NoError(t, old.Wait(t.Context()))
		require.Equal(t, uint64(2), g.DurableLast(), "entry 2 of term 1")
		for _, ticket := range []*Ticket{next, none} {
			select {
			case <-ticket.Done():
				t.Fatal("nothing of the second batch is durable")
			default:
			}
		}
		_, err = g.Locate(2)
		require.ErrorIs(t, err, trivet.ErrPending, "entry 2 of term 2")
		dir.open()
		require.NoError(t, next.Wait(t.Context()))
		require.NoError(t, none.Wait(t.Context()))
		require.NoError(t, l.Close())
	})
}

// A full queue makes the next caller wait, and no longer than that.
func TestQueueIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l, dir := gatedLog(t, func(o *Options) { o.Lanes, o.QueueBytes = 1, 4*pageBytes })
		done := make(chan uint64, 10)
		add := func(i uint64) {
			_, err := l.Group(1).AppendAsync([]Entry{testEntry(i, i, 1, 10, 1)})
			assert.NoError(t, err)
			done <- i
		}
		add(1)
		synctest.Wait() // the writer has it
		var wg sync.WaitGroup
		wg.Go(func() {
			for i := uint64(2); i <= 10; i++ {
				add(i)
			}
		})
		synctest.Wait()
		require.Len(t, done, 5, "one in its flush, and the one that fills the queue of four pages")
		dir.open()
		wg.Wait()
		require.Len(t, done, 10)
		require.NoError(t, l.Close())
	})
}

// cockroach #63302: a cache that answers with the entry that was overwritten.
func TestCacheForgetsASuffix(t *testing.T) {
	l, _ := newTestLog(t, func(o *Options) { o.CacheBytes = 1 << 20 })
	g := l.Group(1)
	m := newModel()
	do := func(o op) {
		ticket, err := o.start(g)
		require.NoError(t, err)
		require.NoError(t, ticket.Err())
		o.apply(m)
		require.NoError(t, m.matches(g), o.what)
	}
	do(appendOp([]Entry{testEntry(1, 1, 1, 10, 1), testEntry(1, 2, 1, 10, 1)}))
	do(appendOp([]Entry{testEntry(1, 3, 1, 10, 0)}))
	do(appendOp([]Entry{testEntry(3, 2, 2, 10, 1)}))
	do(truncateOp(2))
	do(appendOp([]Entry{testEntry(5, 2, 3, 10, 1)}))
	do(resetOp(2))
	do(appendOp([]Entry{testEntry(7, 2, 4, 10, 1)}))
	require.Equal(t, int64(pageBytes+10), l.Stats()[1].CacheBytes, "the cache holds what the log does")
}

func TestCacheIsBounded(t *testing.T) {
	l, dir := newTestLog(t, func(o *Options) { o.CacheBytes = 2 * 8 * pageBytes })
	reads := 0
	dir.SetHook(func(op MemOp) MemFault {
		if op.Kind == MemRead {
			reads++
		}
		return MemFault{}
	})
	g := l.Group(1)
	for i := uint64(1); i <= 100; i++ {
		require.NoError(t, g.Append([]Entry{testEntry(i, i, 1, 0, 1)}))
		require.LessOrEqual(t, l.Stats()[1].CacheBytes, int64(8*pageBytes))
	}
	for i := uint64(93); i <= 100; i++ {
		_, err := g.Read(i)
		require.NoError(t, err)
	}
	dir.SetHook(nil)
	require.Zero(t, reads, "the newest are in memory")
	require.NoError(t, g.TrimPrefix(100))
	require.Zero(t, l.Stats()[1].CacheBytes)
	g.lane.mu.Lock()
	defer g.lane.mu.Unlock()
	require.LessOrEqual(t, len(g.lane.fifo), 1024)
}

// H25: whoever changes a buffer after Append does not get wrong bytes served, neither from memory nor disk.
func TestChangedBufferIsSeen(t *testing.T) {
	l, _ := newTestLog(t, func(o *Options) { o.CacheBytes = 1 << 20 })
	e := testEntry(1, 1, 1, 10, 1)
	require.NoError(t, l.Group(1).Append([]Entry{e}))
	e.Payload[7] ^= 1
	_, err := l.Group(1).Read(1)
	require.ErrorIs(t, err, trivet.ErrCorrupt)
	e.Payload[7] ^= 1
	e.Data[7] ^= 1
	_, err = l.Group(1).Read(1)
	require.ErrorIs(t, err, trivet.ErrCorrupt)
}

func TestChangedBufferInTheQueueIsSeen(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l, dir := gatedLog(t, func(*Options) {})
		_, err := l.Group(1).AppendAsync([]Entry{testEntry(1, 1, 1, 10, 1)})
		require.NoError(t, err)
		synctest.Wait()
		e := testEntry(1, 2, 1, 10, 1)
		_, err = l.Group(1).AppendAsync([]Entry{e})
		require.NoError(t, err)
		e.Payload[7] ^= 1
		dir.open()
		require.NoError(t, l.Close())
		l, err = Open(testOptions(dir.MemDir, 3))
		require.NoError(t, err)
		_, err = l.Group(1).Read(2)
		require.ErrorIs(t, err, trivet.ErrCorrupt)
		require.NoError(t, l.Close())
	})
}

// fillSegments appends and trims one group until its lane has begun n segments more.
func fillSegments(t *testing.T, g *Group, n uint64) {
	t.Helper()
	for until := curNumber(g) + n; curNumber(g) < until; {
		_, last := g.FirstLast()
		require.NoError(t, g.Append([]Entry{testEntry(last, last+1, 1, 20, 2)}))
		require.NoError(t, g.TrimPrefix(last))
	}
}

// A pin keeps a segment, over restarts with Hold, and nothing else does.
func TestPins(t *testing.T) {
	l, dir := newTestLog(t)
	busy := l.Group(2)
	want := testEntry(2, 1, 1, 20, 2)
	require.NoError(t, busy.Append([]Entry{want}))
	place, err := busy.Locate(1)
	require.NoError(t, err)
	p := pinned{place, want.Payload}
	fillSegments(t, busy, 12)
	require.NoError(t, p.check(l))
	require.Equal(t, 1, l.Stats()[0].Pinned)
	require.Positive(t, l.Stats()[0].Recycled)
	require.NoError(t, l.Close())

	opts := testOptions(dir, 2)
	opts.Hold = true
	l = mustOpen(t, opts)
	busy = l.Group(2)
	before := l.Stats()[0].Segments
	fillSegments(t, busy, 3)
	require.Zero(t, l.Stats()[0].Recycled, "nothing is used again before Release")
	require.GreaterOrEqual(t, l.Stats()[0].Segments, before+3)
	require.NoError(t, l.Pin(place.Segment))
	l.Release()
	fillSegments(t, busy, 8)
	require.NoError(t, p.check(l))

	l.Unpin(place.Segment)
	require.Panics(t, func() { l.Unpin(place.Segment) })
	fillSegments(t, busy, 2)
	require.ErrorIs(t, l.Pin(place.Segment), trivet.ErrNotFound)
	require.ErrorIs(t, p.check(l), trivet.ErrNotFound)
	require.ErrorIs(t, l.Pin(segmentID(15, 1)), trivet.ErrNotFound)
	require.ErrorIs(t, l.ReadAt(place.Segment, make([]byte, 5), 0), trivet.ErrInvalid)
}

// slowDir is a directory whose next read waits until it is let go.
type slowDir struct {
	*MemDir
	arm     bool
	reached chan struct{}
	leave   chan struct{}
}

type slowFile struct {
	File
	dir *slowDir
}

func (d *slowDir) Open(name string) (File, error) {
	f, err := d.MemDir.Open(name)
	return &slowFile{f, d}, err
}

func (d *slowDir) Create(name string, sizeBytes int64) (File, error) {
	f, err := d.MemDir.Create(name, sizeBytes)
	return &slowFile{f, d}, err
}

func (f *slowFile) ReadAt(p []byte, off int64) (int, error) {
	if f.dir.arm {
		f.dir.arm = false
		close(f.dir.reached)
		<-f.dir.leave
	}
	return f.File.ReadAt(p, off)
}

// A read that is overtaken by the recycling of its segment must not find another life's bytes.
func TestReadHoldsItsSegment(t *testing.T) {
	dir := &slowDir{MemDir: NewMemDir(), reached: make(chan struct{}), leave: make(chan struct{})}
	opts := testOptions(dir, 1)
	require.NoError(t, Format(opts))
	l := mustOpen(t, opts)
	g := l.Group(2)
	want := testEntry(2, 1, 1, 50, 1)
	require.NoError(t, g.Append([]Entry{want}))
	dir.arm = true
	got := make(chan Entry, 1)
	go func() {
		e, err := g.Read(1)
		assert.NoError(t, err)
		got <- e
	}()
	<-dir.reached
	fillSegments(t, g, 8)
	close(dir.leave)
	require.True(t, sameEntry(want, <-got))
}

// Groups that fall asleep with an entry each must not hold a segment each.
func TestIdleGroupsAreCarriedForward(t *testing.T) {
	l, dir := newTestLog(t)
	busy := l.Group(2)
	for id := trivet.VolumeID(4); id <= 40; id += 2 {
		require.NoError(t, l.Group(id).Append([]Entry{testEntry(uint64(id), 7, 1, 20, 1)}))
		require.NoError(t, l.Group(id).SetStable(Stable{Term: 5, VoteTerm: 5, Vote: id.String()}))
		fillSegments(t, busy, 2)
	}
	fillSegments(t, busy, 8)
	s := l.Stats()[0]
	require.Positive(t, s.MovedBytes)
	require.LessOrEqual(t, s.Segments, 14, "19 sleepers; one segment takes over the entry of one")
	require.Less(t, s.MovedBytes, s.WrittenBytes/4)
	for range 2 {
		for id := trivet.VolumeID(4); id <= 40; id += 2 {
			m := &model{7, []Entry{testEntry(uint64(id), 7, 1, 20, 1)}, Stable{5, 5, id.String()}}
			require.NoError(t, m.matches(l.Group(id)))
		}
		require.NoError(t, l.Close())
		l = mustOpen(t, testOptions(dir, 8))
	}
}

// A damaged entry is not carried forward and its segment stays, to be repaired or examined.
func TestDamageIsNotCarried(t *testing.T) {
	l, dir := newTestLog(t)
	idle := l.Group(4)
	require.NoError(t, idle.Append([]Entry{testEntry(1, 1, 1, 20, 1), testEntry(3, 2, 1, 20, 1)}))
	place, err := idle.Locate(1)
	require.NoError(t, err)
	l.Unpin(place.Segment)
	_, name, _ := end(idle)
	dir.Flip(name, place.Off+9)
	fillSegments(t, l.Group(2), 10)
	_, err = idle.Read(1)
	require.ErrorIs(t, err, trivet.ErrCorrupt)
	_, err = idle.Read(2)
	require.NoError(t, err)
	require.NoError(t, l.Pin(place.Segment), "the segment is still there")
	require.NoError(t, l.Close())
	l = mustOpen(t, testOptions(dir, 8))
	_, err = l.Group(4).Read(1)
	require.ErrorIs(t, err, trivet.ErrCorrupt)
}

// More entries than a checkpoint holds are refused, before anything is written.
func TestTooManyEntries(t *testing.T) {
	l, dir := newTestLog(t)
	g := l.Group(2)
	var err error
	n := uint64(0)
	for err == nil {
		n++
		err = g.Append([]Entry{testEntry(n, n, 1, 0, 0)})
	}
	require.ErrorIs(t, err, trivet.ErrNoSpace)
	require.Greater(t, n, uint64(500))
	require.NoError(t, l.failure())
	require.NoError(t, g.TrimPrefix(n/2))
	require.NoError(t, g.Append([]Entry{testEntry(n, n, 1, 0, 0)}))
	require.NoError(t, l.Close())
	first, last := mustOpen(t, testOptions(dir, 2)).Group(2).FirstLast()
	require.Equal(t, []uint64{n/2 + 1, n}, []uint64{first, last})
}

// A disk without room for another file refuses entries in time: the log is not poisoned, terms, votes and trims
// still reach the disk, and what they free is used again. With room again it goes on by itself (H26).
func TestFullDiskRefusesEntries(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l, dir := newTestLog(t)
		g, idle := l.Group(2), l.Group(4)
		require.NoError(t, g.Append([]Entry{testEntry(1, 1, 1, 0, 1)}))
		dir.SetHook(func(op MemOp) MemFault {
			if op.Kind == MemCreate {
				return MemFault{Err: syscall.ENOSPC}
			}
			return MemFault{}
		})
		n := uint64(1)
		fill := func() {
			for err := error(nil); err == nil; {
				err = g.Append([]Entry{testEntry(n+1, n+1, 1, 0, 1)})
				if err == nil {
					n++
				} else {
					require.ErrorIs(t, err, trivet.ErrNoSpace)
				}
			}
			require.NoError(t, l.Err())
		}
		fill()
		require.ErrorIs(t, idle.Append([]Entry{testEntry(1, 1, 1, 0, 1)}), trivet.ErrNoSpace)
		for term := range uint64(3) { // with the trim this is what is kept for them here
			require.NoError(t, idle.SetStable(Stable{Term: term + 1, VoteTerm: term + 1, Vote: "n"}))
		}
		before := n
		require.NoError(t, g.TrimPrefix(n-1))
		fill()
		require.Greater(t, n, before, "what was trimmed is used again")

		dir.SetHook(nil)
		require.ErrorIs(t, g.Append([]Entry{testEntry(n+1, n+1, 1, 0, 1)}), trivet.ErrNoSpace, "it was just asked")
		<-time.After(prepareEvery)
		for range 40 {
			require.NoError(t, g.Append([]Entry{testEntry(n+1, n+1, 1, 0, 1)}))
			n++
		}
		require.NoError(t, l.Close())
		l = mustOpen(t, testOptions(dir, 2))
		_, last := l.Group(2).FirstLast()
		require.Equal(t, n, last)
		require.Equal(t, uint64(3), l.Group(4).Stable().Term)
		require.NoError(t, l.Close())
	})
}

// What the writer holds in its hands counts as taken, though it has left the queue and is not on the disk.
func TestAdmissionCountsWhatIsWritten(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l, dir := newTestLog(t)
		g := l.Group(2)
		require.NoError(t, g.Append([]Entry{testEntry(1, 1, 1, 0, 1)}))
		synctest.Wait() // for the files that are made at the start: the hook stops all that use the directory
		lane := g.lane
		fits := func() (bytes int64) {
			lane.mu.Lock()
			defer lane.mu.Unlock()
			for lane.fitsLocked(bytes + 1) {
				bytes++
			}
			return bytes
		}
		before := fits()
		gate := make(chan struct{})
		open := sync.OnceFunc(func() { close(gate) })
		defer open()
		dir.SetHook(func(op MemOp) MemFault {
			if op.Kind == MemWrite {
				<-gate
			}
			return MemFault{}
		})
		ticket, err := g.AppendAsync([]Entry{testEntry(2, 2, 1, 0, 2)})
		require.NoError(t, err)
		synctest.Wait()
		require.Less(t, fits(), before-2*pageBytes)
		open()
		require.NoError(t, ticket.Err())
		require.NoError(t, l.Close())
	})
}

// Who is answered finds nothing counted as taken any more that is on the disk and counted there: on a disk that is
// nearly full the next entry would be refused.
func TestAnsweredIsNotTaken(t *testing.T) {
	l, _ := newTestLog(t)
	g := l.Group(2)
	last := uint64(0)
	for range 200 {
		g.lane.turn <- struct{}{} // so that all go in one batch
		var tickets []*Ticket
		for range 100 {
			last++
			ticket, err := g.AppendAsync([]Entry{testEntry(last, last, 1, 0, 0)})
			require.NoError(t, err)
			tickets = append(tickets, ticket)
		}
		<-g.lane.turn
		for answered := false; !answered; { // awake, or the writer is done with the others too
			select {
			case <-tickets[0].Done():
				answered = true
			default:
				runtime.Gosched()
			}
		}
		g.lane.mu.Lock()
		taken := g.lane.takenBytes
		g.lane.mu.Unlock()
		require.Zero(t, taken)
		require.NoError(t, g.TrimPrefix(last))
	}
}

// A full disk while much is queued: entries that were taken have a place, so nothing is poisoned.
func TestFullDiskNeverSurprisesTheWriter(t *testing.T) {
	l, dir := newTestLog(t)
	dir.SetHook(func(op MemOp) MemFault {
		if op.Kind == MemCreate {
			return MemFault{Err: syscall.ENOSPC}
		}
		return MemFault{}
	})
	var wg sync.WaitGroup
	for id := range trivet.VolumeID(16) {
		wg.Go(func() {
			var tickets []*Ticket
			for i := uint64(1); ; i++ {
				ticket, err := l.Group(id).AppendAsync([]Entry{testEntry(i, i, 1, 100, int(id%3))})
				if err != nil {
					assert.ErrorIs(t, err, trivet.ErrNoSpace)
					break
				}
				tickets = append(tickets, ticket)
			}
			for _, ticket := range tickets {
				assert.NoError(t, ticket.Err())
			}
		})
	}
	wg.Wait()
	require.NoError(t, l.Err())
	require.NoError(t, l.Close())
}

// Many goroutines on many groups, for the race detector; each group is its own goroutine's.
func TestConcurrency(t *testing.T) {
	l, dir := newTestLog(t, func(o *Options) { o.CacheBytes = 64 << 10 })
	models := make([]*model, 12)
	var wg sync.WaitGroup
	for i := range models {
		models[i] = newModel()
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(uint64(i), 8))
			g := l.Group(trivet.VolumeID(i))
			for range 150 {
				o := randomOp(rng, models[i], i < 2)
				ticket, err := o.start(g)
				if !assert.NoError(t, err) {
					return
				}
				o.apply(models[i])
				if rng.IntN(3) == 0 {
					assert.NoError(t, ticket.Err())
				}
				if !assert.NoError(t, sloppy(g, models[i], rng)) {
					return
				}
			}
		})
	}
	wg.Go(func() {
		for range 200 {
			l.Stats()
			l.Groups()
		}
	})
	wg.Wait()
	require.NoError(t, l.Close())
	l = mustOpen(t, testOptions(dir, 3))
	for i, m := range models {
		require.NoError(t, m.matches(l.Group(trivet.VolumeID(i))))
	}
}

// sloppy compares one entry and locates another.
func sloppy(g *Group, m *model, rng *rand.Rand) error {
	if len(m.entries) == 0 {
		return nil
	}
	want := m.entries[rng.IntN(len(m.entries))]
	got, err := g.Read(want.Index)
	if err == nil && !sameEntry(got, want) {
		err = fmt.Errorf("entry %d is not what was written", want.Index)
	}
	if place, lerr := g.Locate(want.Index); lerr == nil {
		g.lane.log.Unpin(place.Segment)
	}
	return err
}

func TestRefusals(t *testing.T) {
	dir := NewMemDir()
	opts := testOptions(dir, 1)
	_, err := Open(opts)
	require.ErrorIs(t, err, trivet.ErrNotFound)
	require.NoError(t, Format(opts))
	require.ErrorIs(t, Format(opts), trivet.ErrExists)
	other := opts
	other.Disk = "00000000-0000-4000-8000-000000000001"
	_, err = Open(other)
	require.ErrorIs(t, err, trivet.ErrInvalid, "H11")
	l := mustOpen(t, opts)
	g := l.Group(1)
	require.NoError(t, g.Append([]Entry{testEntry(1, 10, 5, 1, 0), testEntry(1, 11, 5, 1, 0)}))
	for name, entries := range map[string][]Entry{
		"gap":          {testEntry(1, 13, 5, 1, 0)},
		"hole":         {testEntry(1, 12, 5, 1, 0), testEntry(1, 14, 5, 1, 0)},
		"below":        {testEntry(1, 9, 5, 1, 0)},
		"term":         {testEntry(1, 12, 4, 1, 0)},
		"term inside":  {testEntry(1, 12, 6, 1, 0), testEntry(1, 13, 5, 1, 0)},
		"term over":    {testEntry(1, 11, 4, 1, 0)},
		"payload":      {{Index: 12, Term: 5, Payload: make([]byte, 100)}},
		"descriptions": {{Index: 12, Term: 5, Blocks: make([]BlockInfo, 1)}},
		"large":        {testEntry(1, 12, 5, 1, 4)},
	} {
		require.ErrorIs(t, g.Append(entries), trivet.ErrInvalid, name)
	}
	require.ErrorIs(t, l.Group(3).Append([]Entry{testEntry(1, 0, 1, 1, 0)}), trivet.ErrInvalid)
	require.NoError(t, g.SetStable(Stable{Term: 5, VoteTerm: 5, Vote: "a"}))
	require.ErrorIs(t, g.SetStable(Stable{Term: 4}), trivet.ErrInvalid)
	require.ErrorIs(t, g.SetStable(Stable{Term: 6, VoteTerm: 7}), trivet.ErrInvalid)
	require.NoError(t, g.TruncateSuffix(50))
	require.NoError(t, g.TrimPrefix(5))
	require.NoError(t, g.Append(nil))
	first, last := g.FirstLast()
	require.Equal(t, []uint64{10, 11}, []uint64{first, last})
	require.NoError(t, g.TrimPrefix(99))
	first, last = g.FirstLast()
	require.Equal(t, []uint64{12, 11}, []uint64{first, last})
	require.Equal(t, []trivet.VolumeID{1}, l.Groups())
	require.NoError(t, g.DeleteGroup())
	require.Empty(t, l.Groups())
	require.NoError(t, l.Close())
	require.NoError(t, l.Close())
	require.ErrorIs(t, g.Append([]Entry{testEntry(1, 1, 1, 1, 0)}), trivet.ErrClosed)
	_, err = g.Read(1)
	require.ErrorIs(t, err, trivet.ErrClosed)
}

func TestValidate(t *testing.T) {
	good := testOptions(NewMemDir(), 1)
	require.NoError(t, good.Validate())
	for name, change := range map[string]func(*Options){
		"Dir":          func(o *Options) { o.Dir = nil },
		"Disk":         func(o *Options) { o.Disk = "x" },
		"Lanes":        func(o *Options) { o.Lanes = 17 },
		"SegmentBytes": func(o *Options) { o.SegmentBytes = 100_000 },
		"CacheBytes":   func(o *Options) { o.CacheBytes = -1 },
		"QueueBytes":   func(o *Options) { o.QueueBytes = -1 },
	} {
		o := good
		change(&o)
		err := o.Validate()
		require.ErrorIs(t, err, trivet.ErrInvalid, name)
		require.ErrorContains(t, err, name)
		require.ErrorIs(t, Format(o), trivet.ErrInvalid)
		_, err = Open(o)
		require.ErrorIs(t, err, trivet.ErrInvalid)
	}
}

// The real backend: the same model on real files.
func TestOSDir(t *testing.T) {
	dir := NewOSDir(t.TempDir() + "/log")
	opts := testOptions(dir, 1)
	require.NoError(t, Format(opts))
	l := mustOpen(t, opts)
	rng := rand.New(rand.NewPCG(1, 1))
	m := newModel()
	for i := range 300 {
		o := randomOp(rng, m, false)
		ticket, err := o.start(l.Group(5))
		require.NoError(t, err)
		o.apply(m)
		if i%10 == 0 {
			require.NoError(t, ticket.Err())
			require.NoError(t, m.matches(l.Group(5)))
		}
		if i%100 == 99 {
			require.NoError(t, l.Close())
			l = mustOpen(t, opts)
			require.NoError(t, m.matches(l.Group(5)))
		}
	}
	names, err := dir.List()
	require.NoError(t, err)
	require.True(t, slices.Contains(names, slotName(1, 0)))
	last := m.last()
	e := testEntry(1, last+1, 1000, 10, 2)
	require.NoError(t, l.Group(5).Append([]Entry{e}))
	place, err := l.Group(5).Locate(last + 1)
	require.NoError(t, err)
	for _, shift := range []int{0, 1} { // a buffer that does not begin at a page
		p := alignedBytes(3 * pageBytes)[shift : shift+2*pageBytes]
		require.NoError(t, l.ReadAt(place.Segment, p, place.Off))
		require.Equal(t, e.Payload, p)
	}
}

// What waits to be used again goes back to the filesystem, but for two files a lane; the log goes on, and opens again.
func TestShrink(t *testing.T) {
	synctest.Test(t, func(t *testing.T) { // no mark comes between two appends, and no file is being made when they count
		dir := NewMemDir()
		opts := testOptions(dir, 1)
		opts.Lanes = 1
		require.NoError(t, Format(opts))
		l := mustOpen(t, opts)
		g := l.Group(1)
		last := uint64(0)
		for range 40 {
			last++
			require.NoError(t, g.Append([]Entry{testEntry(1, last, 1, 0, 2)}))
		}
		require.NoError(t, g.TrimPrefix(last-1))
		synctest.Wait()
		before, err := dir.List()
		require.NoError(t, err)
		free := l.FreeBytes() / l.SegmentBytes()
		require.Greater(t, free, int64(shrinkKeep+3))
		bytes, err := l.Shrink(3)
		require.NoError(t, err)
		require.Equal(t, 3*l.SegmentBytes(), bytes)
		bytes, err = l.Shrink(1000)
		require.NoError(t, err)
		require.Equal(t, (free-shrinkKeep-3)*l.SegmentBytes(), bytes)
		after, err := dir.List()
		require.NoError(t, err)
		require.Len(t, after, len(before)-int(free)+shrinkKeep)
		for range 20 {
			last++
			require.NoError(t, g.Append([]Entry{testEntry(1, last, 1, 0, 2)}))
		}
		require.NoError(t, l.Close())
		l = mustOpen(t, opts)
		first, end := l.Group(1).FirstLast()
		require.Equal(t, []uint64{40, last}, []uint64{first, end})
		require.NoError(t, l.Close())
	})
}

// What no lane has needed between two calls of Trim goes back to the filesystem, a part of it at a time; what one may
// need stays.
func TestTrim(t *testing.T) {
	synctest.Test(t, func(t *testing.T) { // as TestShrink
		dir := NewMemDir()
		opts := testOptions(dir, 1)
		opts.Lanes = 1
		require.NoError(t, Format(opts))
		l := mustOpen(t, opts)
		g := l.Group(1)
		last := uint64(0)
		rolls := func() int64 { return l.Stats()[0].Rolls }
		fill := func(segments int64) {
			for end := rolls() + segments; rolls() < end; {
				last++
				require.NoError(t, g.Append([]Entry{testEntry(1, last, 1, 0, 2)}))
			}
			synctest.Wait()
		}
		fill(30)
		require.NoError(t, g.TrimPrefix(last))
		free := l.FreeBytes() / l.SegmentBytes()
		require.Greater(t, free, int64(20))
		bytes, left, err := l.Trim()
		require.NoError(t, err)
		require.Zero(t, bytes, "what was needed a moment ago")
		require.Equal(t, (free-trimKeep)*l.SegmentBytes(), left)

		fill(12) // and keeps them: these are needed
		unused := free - 12
		bytes, _, err = l.Trim()
		require.NoError(t, err)
		require.Equal(t, max(trimMin, unused/trimDivisor)*l.SegmentBytes(), bytes)

		require.NoError(t, g.TrimPrefix(last))
		for left = 1; left > 0; {
			_, left, err = l.Trim()
			require.NoError(t, err)
		}
		require.Equal(t, trimKeep*l.SegmentBytes(), l.FreeBytes())
		fill(3)
		require.NoError(t, l.Close())
		l = mustOpen(t, opts)
		_, end := l.Group(1).FirstLast()
		require.Equal(t, last, end)
		require.NoError(t, l.Close())
	})
}

// A file for entries to come leaves of the filesystem what must stay free.
func TestLeave(t *testing.T) {
	t.Parallel()
	dir := NewOSDir(t.TempDir())
	require.ErrorIs(t, dir.Leave(1<<60)(64<<10), syscall.ENOSPC)
	require.NoError(t, dir.Leave(1)(64<<10))
	require.ErrorIs(t, NewOSDir("/nowhere").Leave(1)(1), syscall.ENOENT)
}

// Where there is no room for entries to come, a lane still gets the files that it cannot do without: its first one
// after Open, or a log with a full disk would not even begin, and one for terms and votes that fill the last.
func TestRoomIsAskedForEntriesOnly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l, dir := newTestLog(t, func(o *Options) {
			o.Lanes = 1
			o.Room = func(int64) error { return syscall.ENOSPC }
		})
		n := uint64(0)
		fill := func(l *Log) {
			before := n
			for {
				if err := l.Group(1).Append([]Entry{testEntry(n+1, n+1, 1, 0, 1)}); err != nil {
					require.ErrorIs(t, err, trivet.ErrNoSpace)
					break
				}
				n++
			}
			require.Greater(t, n, before)
			<-time.After(2 * prepareEvery) // since the mark of the end, which asked too
			require.ErrorIs(t, l.Group(1).Append([]Entry{testEntry(n+1, n+1, 1, 0, 1)}), trivet.ErrNoSpace)
		}
		fill(l)
		names, err := dir.List()
		require.NoError(t, err)
		for term := range uint64(300) {
			require.NoError(t, l.Group(2).SetStable(Stable{Term: term + 1, VoteTerm: term + 1, Vote: "n"}))
		}
		require.NoError(t, l.Err())
		after, err := dir.List()
		require.NoError(t, err)
		require.Greater(t, len(after), len(names), "they took files")
		require.NoError(t, l.Close())

		opts := testOptions(dir, 2)
		opts.Room, opts.Hold = l.opts.Room, true
		l = mustOpen(t, opts)
		require.Equal(t, uint64(300), l.Group(2).Stable().Term)
		fill(l)
		require.NoError(t, l.Close())
	})
}
