package engine

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/engine/segment"
	"github.com/trivet-csi/trivet/replication/raftgroup"
)

// logConfig is that of an engine with a log in memory, which only Clean cleans.
func logConfig(t testing.TB, fs vfs.FS, dir segment.Dir) Config {
	t.Helper()
	cfg := Config{FS: fs, Dir: "disk", CacheBytes: 1 << 20, MemTableBytes: 256 << 10, CleanTarget: -1}
	if dir == nil {
		dir = raftgroup.LogDir(fs, "disk.log")
	}
	require.NoError(t, WithLog(&cfg, dir))
	return cfg
}

// write commits n blocks with the number x, by way of the log.
func write(t testing.TB, v *Volume, x uint32, lba, n trivet.LBA) {
	t.Helper()
	var p []byte
	for i := range n {
		p = append(p, numbered(x, lba+i)...)
	}
	b := v.NewBatch()
	require.NoError(t, WriteByLog(b, lba, p))
	st := v.State()
	st.AppliedIndex++
	require.NoError(t, b.Commit(st))
}

// settle makes everything durable and cuts the log of the volumes, so that only the engine keeps segments.
func settle(t testing.TB, vs ...*Volume) {
	t.Helper()
	for _, v := range vs {
		require.NoError(t, v.e.Flush())
		require.NoError(t, TrimLog(v))
		if v.e.log != nil { // tests look into its files; one may still be in the making
			require.Eventually(t, func() bool {
				return !slices.ContainsFunc(v.e.log.Stats(), func(s segment.LaneStats) bool { return s.Making })
			}, time.Minute, time.Millisecond)
		}
	}
}

// requireNumbers checks that blocks have the numbers that want tells.
func requireNumbers(t testing.TB, v *Volume, n trivet.LBA, want func(lba trivet.LBA) uint32) {
	t.Helper()
	all, one := make([]byte, n*trivet.BlockSize), make([]byte, trivet.BlockSize)
	require.NoError(t, v.ReadAt(all, 0))
	for lba := range n {
		require.NoError(t, v.ReadAt(one, lba))
		require.Equal(t, numbered(want(lba), lba), one, "block %d", lba)
		require.Equal(t, one, all[lba*trivet.BlockSize:(lba+1)*trivet.BlockSize])
	}
}

// churn fills the log with another volume until files were used again, so that whatever was given back is gone, and
// returns how many were.
func churn(t testing.TB, e *Engine) (recycled int64) {
	t.Helper()
	const id = damagedID + 9
	require.NoError(t, e.CreateVolume(id, "r", 64*trivet.BlockSize))
	v, err := e.OpenVolume(id)
	require.NoError(t, err)
	for i := range uint32(12) {
		write(t, v, i, 0, 60)
		settle(t, v)
		_, err := e.Clean()
		require.NoError(t, err)
	}
	require.NoError(t, e.DropVolume(id))
	require.NoError(t, e.log.Group(id).DeleteGroup())
	_, err = e.Clean()
	require.NoError(t, err)
	for _, s := range e.log.Stats() {
		recycled += s.Recycled
	}
	return recycled
}

func segmentsOf(e *Engine) map[segment.ID]int64 {
	e.live.mu.Lock()
	defer e.live.mu.Unlock()
	out := map[segment.ID]int64{}
	for id, s := range e.live.segs {
		out[id] = s.blockN
	}
	return out
}

// Blocks are in the log and nowhere else, and stay readable when the log has cut its entries, over restarts too.
func TestBlocksStandInTheLog(t *testing.T) {
	mem := vfs.NewMem()
	e, v := mustStore(t, logConfig(t, mem, nil), 256)
	write(t, v, 1, 0, 200)
	write(t, v, 2, 50, 10)
	settle(t, v)
	stored, err := e.db.EstimateDiskUsage(volumeBlocks(v.id))
	require.NoError(t, err)
	require.Less(t, stored, uint64(200*100), "only the map")
	used, err := v.UsedBytes()
	require.NoError(t, err)
	require.InDelta(t, 200*trivet.BlockSize, used, 200*100)
	want := func(lba trivet.LBA) uint32 {
		if lba >= 50 && lba < 60 {
			return 2
		}
		return 1
	}
	requireNumbers(t, v, 200, want)
	for range 3 {
		require.NoError(t, e.Close())
		e, err = Open(logConfig(t, mem, nil))
		require.NoError(t, err)
		v, err = e.OpenVolume(damagedID)
		require.NoError(t, err)
		require.NoError(t, CheckLive(e))
		requireNumbers(t, v, 200, want)
	}
	require.NoError(t, e.Close())
}

func TestReferRefusesWrongPlaces(t *testing.T) {
	e, v := mustStore(t, logConfig(t, vfs.NewMem(), nil), 16)
	defer func() { require.NoError(t, e.Close()) }()
	g := e.log.Group(damagedID)
	require.NoError(t, g.Append([]segment.Entry{{Index: 1, Term: 1, Payload: numbered(1, 0)}}))
	at, err := g.Locate(1)
	require.NoError(t, err)
	b := v.NewBatch()
	require.ErrorIs(t, b.Refer(0, numbered(1, 0), at, 1), trivet.ErrInvalid)
	require.ErrorIs(t, b.Refer(0, numbered(1, 0), at, trivet.BlockSize), trivet.ErrInvalid, "beyond the payload")
	require.ErrorIs(t, b.Refer(0, numbered(1, 0), at, -trivet.BlockSize), trivet.ErrInvalid)
	require.ErrorIs(t, b.Refer(0, make([]byte, 2*trivet.BlockSize), at, 0), trivet.ErrInvalid)
	gone := at
	gone.Segment += 1 << 20
	require.ErrorIs(t, b.Refer(0, numbered(1, 0), gone, 0), trivet.ErrNotFound)
	require.NoError(t, b.Refer(0, numbered(1, 0), at, 0))
	require.NoError(t, b.Close())
	require.ErrorIs(t, b.Refer(0, numbered(1, 0), at, 0), trivet.ErrClosed)
	e.log.Unpin(at.Segment)
	_, err = e.Clean()
	require.NoError(t, err)
	require.NoError(t, CheckLive(e))
}

// A segment without live blocks is given back only once the store on disk has no block in it either: a crash brings
// that
// one back, and the log may be cut by then.
func TestSegmentStaysUntilMapIsDurable(t *testing.T) {
	mem := vfs.NewCrashableMem()
	e, v := mustStore(t, logConfig(t, mem, nil), 64)
	write(t, v, 1, 0, 40)
	settle(t, v)
	first := segmentsOf(e)
	write(t, v, 2, 0, 40)
	require.NoError(t, TrimLog(v))
	for id := range first {
		require.NoError(t, e.log.Pin(id), "still there")
		e.log.Unpin(id)
	}
	require.Zero(t, e.live.release(e.flushed.Load()), "not durable")
	after, err := Open(logConfig(t, mem.CrashClone(vfs.CrashCloneCfg{}), nil))
	require.NoError(t, err)
	old, err := after.OpenVolume(damagedID)
	require.NoError(t, err)
	require.EqualValues(t, 1, old.State().AppliedIndex)
	requireNumbers(t, old, 40, func(trivet.LBA) uint32 { return 1 })
	require.NoError(t, CheckLive(after))
	require.NoError(t, after.Close())
	stats, err := e.Clean()
	require.NoError(t, err)
	require.Positive(t, stats.Released)
	require.NoError(t, e.Close())
}

// TestImageKeepsWhatItRefersTo: neither overwriting, nor cleaning, nor a drop takes blocks from under an image (H6).
func TestImageKeepsWhatItRefersTo(t *testing.T) {
	e, v := mustStore(t, logConfig(t, vfs.NewMem(), nil), 64)
	defer func() { require.NoError(t, e.Close()) }()
	write(t, v, 1, 0, 60)
	settle(t, v)
	i, err := v.Image(nil)
	require.NoError(t, err)
	write(t, v, 2, 0, 30)
	require.NoError(t, e.DropVolume(damagedID))
	require.NoError(t, e.log.Group(damagedID).DeleteGroup())
	require.Positive(t, churn(t, e))
	image, err := io.ReadAll(i)
	require.NoError(t, err)
	require.NoError(t, i.Close())
	_, err = e.Clean()
	require.NoError(t, err)
	require.Empty(t, segmentsOf(e))
	require.NoError(t, e.CreateVolume(damagedID, "r2", 64*trivet.BlockSize))
	w, err := e.OpenVolume(damagedID)
	require.NoError(t, err)
	require.NoError(t, w.Restore(bytes.NewReader(image)))
	requireNumbers(t, w, 60, func(trivet.LBA) uint32 { return 1 })
	require.NoError(t, CheckLive(e))
	for id := range segmentsOf(e) {
		require.EqualValues(t, 1, id&0xff, "restored blocks are in the data lane, and in %v", id)
	}
}

// TestRestoreCountsOnce: a part of an image without blocks, which follows one that was full with the last block, takes
// nothing away from segments.
func TestRestoreCountsOnce(t *testing.T) {
	cfg := logConfig(t, vfs.NewMem(), nil)
	cfg.imageRangeBytes = trivet.BlockSize // so that every block is a part, and an empty one comes last
	e, v := mustStore(t, cfg, 64)
	defer func() { require.NoError(t, e.Close()) }()
	e2, w := mustStore(t, logConfig(t, vfs.NewMem(), nil), 64)
	defer func() { require.NoError(t, e2.Close()) }()
	write(t, v, 1, 0, 64)
	write(t, w, 1, 0, 64)
	write(t, v, 2, 60, 4)
	image, err := v.Image(w.Want())
	require.NoError(t, err)
	require.NoError(t, w.Restore(image))
	require.NoError(t, image.Close())
	require.NoError(t, CheckLive(e2))
	requireNumbers(t, w, 64, func(lba trivet.LBA) uint32 { return 1 + uint32(lba/60) })
}

// TestCleaningEmptiesSegments: half of the blocks of every segment are overwritten; cleaning brings what is left
// together, in the order of blocks, and the segments come back.
func TestCleaningEmptiesSegments(t *testing.T) {
	e, v := mustStore(t, logConfig(t, vfs.NewMem(), nil), 1024)
	defer func() { require.NoError(t, e.Close()) }()
	write(t, v, 1, 0, 1000)
	for lba := trivet.LBA(0); lba < 1000; lba += 2 {
		write(t, v, 2, lba, 1)
	}
	settle(t, v)
	before := len(segmentsOf(e))
	var copied int64
	for range 100 {
		stats, err := e.Clean()
		require.NoError(t, err)
		require.NoError(t, CheckLive(e))
		copied += stats.CopiedBytes
		if stats.CopiedBytes == 0 {
			break
		}
	}
	require.Positive(t, copied)
	require.Less(t, len(segmentsOf(e)), before*3/4)
	requireNumbers(t, v, 1000, func(lba trivet.LBA) uint32 { return 1 + uint32((lba+1)%2) })
	used, capacity := 1000.0, 0.0
	for range segmentsOf(e) {
		capacity += testSegmentBytes / trivet.BlockSize
	}
	t.Logf("%d segments, then %d; %.0f %% of their space is live", before, len(segmentsOf(e)), 100*used/capacity)
	require.Greater(t, used/capacity, 0.6)
}

// TestCleaningLosesToAWrite: a block that is written while cleaning copies it stays as it was written (compare and
// set). The account tells so of a sealed segment, the map of others, where the write may stand as well.
func TestCleaningLosesToAWrite(t *testing.T) {
	for name, meanwhile := range map[string]func(v *Volume, b *Batch) error{
		"write": func(_ *Volume, b *Batch) error { return WriteByLog(b, 3, numbered(9, 3)) },
		"value": func(_ *Volume, b *Batch) error { return b.Write(3, numbered(9, 3)) },
		"zero":  func(_ *Volume, b *Batch) error { return b.Zero(3, 1) },
	} {
		for _, sealed := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s/sealed=%t", name, sealed), func(t *testing.T) {
				e, v := mustStore(t, logConfig(t, vfs.NewMem(), nil), 16)
				defer func() { require.NoError(t, e.Close()) }()
				write(t, v, 1, 0, 10)
				moves, err := (&mover{e: e}).inPlace(damagedID, blocksFrom(0, 10), allSegments(e))
				require.NoError(t, err)
				if sealed {
					leave(t, v, moves[0].old.seg)
				}
				m := &mover{e: e, turn: atOnce}
				moves, payload, err := m.gather(v, moves, bySegment(allSegments(e)))
				require.NoError(t, err)
				require.Len(t, moves, 10)
				b := v.NewBatch()
				require.NoError(t, meanwhile(v, b))
				st := v.State()
				st.AppliedIndex++
				require.NoError(t, b.Commit(st))
				require.NoError(t, m.store(v, moves, payload))
				require.NoError(t, CheckLive(e))
				p := make([]byte, trivet.BlockSize)
				require.NoError(t, v.ReadAt(p, 3))
				want := numbered(9, 3)
				if name == "zero" {
					want = make([]byte, trivet.BlockSize)
				}
				require.Equal(t, want, p)
				require.NoError(t, v.ReadAt(p, 4))
				require.Equal(t, numbered(1, 4), p)
				left, err := (&mover{e: e}).inPlace(damagedID, blocksFrom(4, 6), map[uint32]*segLive{1: {id: moves[0].old.seg}})
				require.NoError(t, err)
				require.Empty(t, left, "the others have moved")
			})
		}
	}
}

// TestGatherLeavesWhatIsGone: of what cleaning meant to copy, it reads what is still there.
func TestGatherLeavesWhatIsGone(t *testing.T) {
	for _, sealed := range []bool{false, true} {
		e, v := mustStore(t, logConfig(t, vfs.NewMem(), nil), 16)
		write(t, v, 1, 0, 10)
		moves, err := (&mover{e: e}).inPlace(damagedID, blocksFrom(0, 10), allSegments(e))
		require.NoError(t, err)
		in := bySegment(allSegments(e))
		if sealed {
			leave(t, v, moves[0].old.seg)
		}
		write(t, v, 2, 3, 2)
		before := moves[0].old.seg
		moves, payload, err := (&mover{e: e, turn: atOnce}).gather(v, moves, in)
		require.NoError(t, err)
		at := map[trivet.LBA]int{}
		for i, m := range moves {
			at[m.bk.lba] = i
		}
		for lba := range trivet.LBA(10) {
			i, ok := at[lba]
			rewritten := lba == 3 || lba == 4
			if sealed {
				require.Equal(t, !rewritten, ok, lba)
			}
			if ok {
				x := uint32(1)
				if rewritten { // in the same segment, which the map says
					require.Equal(t, before, moves[i].old.seg)
					x = 2
				}
				require.Equal(t, numbered(x, lba), payload[i*trivet.BlockSize:][:trivet.BlockSize])
			}
		}
		require.NoError(t, e.Close())
	}
}

// TestSealed: a segment with an entry that the log still keeps may be emptied, but is not sealed: the entry may be
// applied yet, and its blocks stand there too.
func TestSealed(t *testing.T) {
	e, v := mustStore(t, logConfig(t, vfs.NewMem(), nil), 1024)
	defer func() { require.NoError(t, e.Close()) }()
	write(t, v, 1, 0, 200)
	for id := trivet.VolumeID(100); id < 110; id++ { // one of each lane, at least
		require.NoError(t, e.log.Group(id).Append([]segment.Entry{{Index: 1, Term: 1, Data: []byte("not applied")}}))
	}
	for lba := trivet.LBA(0); lba < 200; lba += 2 {
		write(t, v, 2, lba, 1)
	}
	settle(t, v)
	entries := map[segment.ID]int{}
	for _, x := range e.log.Segments() {
		entries[x.ID] = x.Entries
	}
	newCleaner(e, cleanTargetMax).victims()
	seen := map[bool]bool{}
	for id, s := range e.live.segs {
		seen[s.sealed] = true
		require.False(t, s.sealed && entries[id] > 0, id)
	}
	require.True(t, seen[true], "some are sealed")
}

func blocksFrom(lba, n trivet.LBA) (blocks []victimBlock) {
	for i := range n {
		blocks = append(blocks, victimBlock{lba + i, 0})
	}
	return blocks
}

// allSegments has all segments that something refers to, as victims.
func allSegments(e *Engine) map[uint32]*segLive {
	all := map[uint32]*segLive{}
	for _, s := range e.live.segs {
		all[s.ord] = s
	}
	return all
}

// leave writes until the lane of a segment has left it, and seals it.
func leave(t *testing.T, v *Volume, id segment.ID) {
	t.Helper()
	s := v.e.live.segs[id]
	require.NotNil(t, s)
	for current := true; current; {
		write(t, v, 1, 12, 4)
		current = slices.ContainsFunc(v.e.log.Segments(), func(x segment.Info) bool { return x.ID == id && x.Current })
	}
	s.sealed = true
}

// TestReadsWhileCleaning: reads and the background run against each other; every read gives whole, current bytes,
// though what it looked up may be recycled before it gets there.
func TestReadsWhileCleaning(t *testing.T) {
	cfg := logConfig(t, vfs.NewMem(), nil)
	cfg.CleanTarget = 0.9
	e, v := mustStore(t, cfg, 256)
	defer func() { require.NoError(t, e.Close()) }()
	rounds := 300
	if testing.Short() {
		rounds = 40
	}
	write(t, v, 1, 0, 256)
	e.clean.pressure.Store(true) // at full speed
	var round atomic.Uint32
	var done atomic.Bool
	var wg sync.WaitGroup
	for k := range 2 {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(7, uint64(k)))
			p := make([]byte, 16*trivet.BlockSize)
			for !done.Load() {
				lba := trivet.LBA(rng.IntN(240))
				low := round.Load()
				err := v.ReadAt(p, lba)
				high := round.Load() + 1
				for i := 0; i < 16 && err == nil; i++ {
					b := p[i*trivet.BlockSize : (i+1)*trivet.BlockSize]
					x := uint32(b[0])<<24 | uint32(b[1])<<16 | uint32(b[2])<<8 | uint32(b[3])
					if !bytes.Equal(b, numbered(x, lba+trivet.LBA(i))) || x > high+1 {
						err = errors.New("wrong bytes")
					}
				}
				if err != nil {
					t.Errorf("read %d in rounds %d to %d: %v", lba, low, high, err)
					return
				}
			}
		})
	}
	rng := rand.New(rand.NewPCG(8, 8))
	for i := range rounds {
		round.Store(uint32(i))
		for range 4 {
			lba := trivet.LBA(rng.IntN(250))
			write(t, v, uint32(i+2), lba, 6)
		}
		if i%5 == 0 {
			settle(t, v)
			e.clean.poke()
		}
	}
	settle(t, v)
	_, err := e.Clean()
	done.Store(true)
	wg.Wait()
	require.NoError(t, err)
	recycled := int64(0)
	for _, s := range e.log.Stats() {
		recycled += s.Recycled
	}
	require.Positive(t, recycled)
}

// Damage of the map costs no segment: what it referred to is not known, so everything stays.
func TestDamagedMapKeepsEverything(t *testing.T) {
	mem := vfs.NewMem()
	e, v := mustStore(t, logConfig(t, mem, nil), 64)
	write(t, v, 1, 0, 60)
	bad := make([]byte, refValueBytes)
	bad[0] = kindRef // refers to nothing
	require.NoError(t, e.db.Set(appendBlockKey(nil, damagedID, 7, 0), bad, pebble.NoSync))
	settle(t, v)
	require.NoError(t, e.Close())
	e, err := Open(logConfig(t, mem, nil))
	require.NoError(t, err)
	defer func() { require.NoError(t, e.Close()) }()
	v, err = e.OpenVolume(damagedID)
	require.NoError(t, err)
	before := segmentsOf(e)
	require.NotEmpty(t, before)
	require.ErrorIs(t, v.ReadAt(make([]byte, trivet.BlockSize), 7), trivet.ErrCorrupt)
	write(t, v, 2, 0, 60)
	settle(t, v)
	churn(t, e)
	for id := range before {
		require.NoError(t, e.log.Pin(id))
		e.log.Unpin(id)
	}
	requireNumbers(t, v, 60, func(trivet.LBA) uint32 { return 2 })
	require.NoError(t, e.DropVolume(damagedID), "the way out: the replica is made anew")
}

// What the segments are used for adds up, at every stage of a block's life.
func TestLogUsage(t *testing.T) {
	e, v := mustStore(t, logConfig(t, vfs.NewMem(), nil), 64)
	defer func() { require.NoError(t, e.Close()) }()
	check := func(live, snapshot int64) LogUsage {
		t.Helper()
		u := e.LogUsage()
		require.Equal(t, live*trivet.BlockSize, u.LiveBytes)
		require.Equal(t, snapshot*trivet.BlockSize, u.SnapshotBytes)
		sum := u.LiveBytes + u.SnapshotBytes + u.RetainedBytes + u.GarbageBytes
		require.Equal(t, int64(u.Segments)*testSegmentBytes, sum)
		return u
	}
	check(0, 0)
	write(t, v, 1, 0, 40)
	write(t, v, 2, 0, 40)
	u := check(40, 0)
	require.GreaterOrEqual(t, u.RetainedBytes, int64(40*trivet.BlockSize), "entries of the first")
	settle(t, v)
	require.Less(t, check(40, 0).RetainedBytes, u.RetainedBytes)
	st := v.State()
	st.Snapshots = []Snapshot{{ID: 1, Generation: st.Generation}} // else what the next one hides is swept
	st.Generation++
	require.NoError(t, v.NewBatch().Commit(st))
	check(0, 40) // nothing of the new generation is there yet; all is read, and belongs to the older one
	write(t, v, 3, 0, 10)
	check(10, 40)
	require.NoError(t, e.DropVolume(damagedID))
	check(0, 0)
}

// TestBackgroundCleans: nobody asks, no segment ever empties by itself, and still the space stays near the target.
func TestBackgroundCleans(t *testing.T) {
	cfg := logConfig(t, vfs.NewMem(), nil)
	cfg.CleanTarget = 0.7
	e, v := mustStore(t, cfg, 512)
	defer func() { require.NoError(t, e.Close()) }()
	write(t, v, 1, 0, 512)
	for lba := trivet.LBA(0); lba < 512; lba += 2 {
		write(t, v, 2, lba, 1)
	}
	settle(t, v)
	write(t, v, 3, 0, 1)
	require.Eventually(t, func() bool {
		settle(t, v)
		u := e.LogUsage()
		return u.LiveBytes >= int64(u.Segments-4)*testSegmentBytes*6/10 // less what is current or retained
	}, time.Minute, 20*time.Millisecond)
	stored := int64(0)
	for _, s := range e.log.Stats() {
		stored += s.StoredBytes
	}
	require.Positive(t, stored)
}

// requireWins checks that what a round would take makes up for what its copies fill, or fits where copies go already.
func requireWins(t testing.TB, e *Engine) {
	t.Helper()
	const capacity = testSegmentBytes / trivet.BlockSize
	freed, blockN, room := int64(0), int64(0), int64(0)
	chosen := e.clean.victims()
	for _, s := range chosen {
		freed, blockN = freed+capacity-s.blockN, blockN+s.blockN
	}
	for _, x := range e.log.Segments() {
		if x.Data && x.Current {
			room = x.RoomBytes / trivet.BlockSize
		}
	}
	if freed < capacity {
		require.LessOrEqual(t, blockN, room, "%d segments win nothing", len(chosen))
	}
}

// TestCleaningOfAFullDiskEnds: a disk that runs full has everything cleaned that gives space, and nothing over and over
// again that does not.
func TestCleaningOfAFullDiskEnds(t *testing.T) {
	cfg := logConfig(t, vfs.NewMem(), nil)
	cfg.CleanTarget = 0.7
	e, v := mustStore(t, cfg, 512)
	defer func() { require.NoError(t, e.Close()) }()
	for live := trivet.LBA(1); live < testSegmentBytes/trivet.BlockSize; live += 3 {
		write(t, v, 1, 0, 256)
		for lba := trivet.LBA(0); lba < 256; lba += testSegmentBytes / trivet.BlockSize {
			write(t, v, 2, lba, live)
		}
		settle(t, v)
		e.clean.pressure.Store(true) // setPressure would have the background do it
		rounds := 0
		for ; rounds < 100; rounds++ {
			requireWins(t, e)
			stats, err := e.clean.round(t.Context(), false)
			require.NoError(t, err)
			if stats.CopiedBytes == 0 {
				break
			}
		}
		require.Less(t, rounds, 100, "blocks are copied for ever, %d of a segment rewritten", live)
		e.clean.pressure.Store(false)
		require.NoError(t, CheckLive(e))
		requireNumbers(t, v, 256, func(lba trivet.LBA) uint32 {
			return 1 + uint32(oneOf(lba%(testSegmentBytes/trivet.BlockSize) < live))
		})
	}
}

// TestCleaningWithoutRoom: on a disk that has no room for another file, cleaning says so and changes nothing; when
// there is room again it goes on (H26).
func TestCleaningWithoutRoom(t *testing.T) {
	dir := segment.NewMemDir()
	e, v := mustStore(t, logConfig(t, vfs.NewMem(), dir), 1024)
	defer func() { require.NoError(t, e.Close()) }()
	write(t, v, 1, 0, 1000)
	for lba := trivet.LBA(0); lba < 1000; lba += 2 {
		write(t, v, 2, lba, 1)
	}
	settle(t, v)
	var full atomic.Bool
	full.Store(true)
	dir.SetHook(func(op segment.MemOp) segment.MemFault {
		if op.Kind == segment.MemCreate && full.Load() {
			return segment.MemFault{Err: syscall.ENOSPC}
		}
		return segment.MemFault{}
	})
	want := func(lba trivet.LBA) uint32 { return 1 + uint32((lba+1)%2) }
	var err error
	for range 100 { // what files there are, it may use
		if _, err = e.Clean(); err != nil {
			break
		}
	}
	require.ErrorIs(t, err, trivet.ErrNoSpace)
	require.NoError(t, CheckLive(e))
	requireNumbers(t, v, 1000, want)
	full.Store(false)
	before := len(segmentsOf(e))
	require.Eventually(t, func() bool { // the log asks the disk again after a second
		stats, err := e.Clean()
		return err == nil && stats.Released > 0
	}, time.Minute, 50*time.Millisecond)
	require.NoError(t, CheckLive(e))
	requireNumbers(t, v, 1000, want)
	require.Less(t, len(segmentsOf(e)), before)
}

// atOnce is a turn that nobody else wants.
func atOnce(int) (func(), error) { return func() {}, nil }
