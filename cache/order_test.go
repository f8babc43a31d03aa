package cache_test

import (
	"context"
	"encoding/binary"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/cache"
	"github.com/trivet-csi/trivet/internal/faultdev"
)

// TestFlushCoversWhatWasAcknowledged runs every sequence of up to six operations on two blocks (H15): writes, a
// discard, flushes that go on in the background, and the end of the write-backs that are held below. Operations that
// have to wait go on beside those that follow. A flush that returned must leave below nothing older than what was
// acknowledged before it began; and in the end each block holds one of the newest operations.
func TestFlushCoversWhatWasAcknowledged(t *testing.T) {
	t.Parallel()
	longest := 6
	if testing.Short() {
		longest = 4
	}
	path := file(t)
	synctest.Test(t, func(t *testing.T) {
		o := &interleaving{t: t, mem: faultdev.NewMem(1 << 20)}
		o.disk = faultdev.Wrap(o.mem)
		o.d = open(t, path, o.disk, config(cache.WriteBack, small))
		n := 0
		var extend func(prefix string)
		extend = func(prefix string) {
			for _, op := range "abdfr" {
				s := prefix + string(op)
				o.run(s)
				if n++; len(s) < longest {
					extend(s)
				}
			}
		}
		extend("")
		require.NoError(t, o.d.Detach(t.Context()))
		t.Logf("%d sequences", n)
	})
}

// interleaving is one sequence under way. Blocks hold the number of the operation that wrote them.
type interleaving struct {
	t    *testing.T
	mem  *faultdev.Mem
	disk *faultdev.Device
	d    *cache.Device

	mu    sync.Mutex
	clock int
	opN   uint64
	ops   []blockOp
}

type blockOp struct {
	id         uint64 // what the blocks hold then; 0 = zeroes
	blocks     [2]bool
	begin, end int // end 0: under way
}

func (o *interleaving) tick() int { o.clock++; return o.clock }

func (o *interleaving) run(sequence string) {
	ctx := o.t.Context()
	o.ops = []blockOp{{blocks: [2]bool{true, true}, begin: 0, end: 1}}
	o.clock = 1
	require.NoError(o.t, o.d.Discard(ctx, 0, 2*trivet.BlockSize))
	gate := o.disk.Hold(faultdev.OfKind(faultdev.Write))
	var wg sync.WaitGroup
	for _, c := range sequence {
		switch c {
		case 'a':
			o.launch(&wg, [2]bool{true, false}, true)
		case 'b':
			o.launch(&wg, [2]bool{true, true}, true)
		case 'd':
			o.launch(&wg, [2]bool{true, false}, false)
		case 'f':
			wg.Go(func() { o.flush(sequence) })
		case 'r':
			gate.Open()
			gate = o.disk.Hold(faultdev.OfKind(faultdev.Write))
		}
		synctest.Wait()
	}
	gate.Open()
	o.disk.Heal()
	wg.Wait()
	o.flush(sequence)
	for b := range 2 {
		p := block(1)
		require.NoError(o.t, o.d.ReadAt(ctx, p, int64(b)*trivet.BlockSize))
		o.judge(sequence, "read", b, binary.LittleEndian.Uint64(p), o.clock+1)
	}
	o.disk.Forget()
}

func (o *interleaving) launch(wg *sync.WaitGroup, blocks [2]bool, write bool) {
	o.mu.Lock()
	op := blockOp{blocks: blocks, begin: o.tick()}
	if write {
		o.opN++
		op.id = o.opN
	}
	i := len(o.ops)
	o.ops = append(o.ops, op)
	o.mu.Unlock()
	wg.Go(func() {
		n := int64(trivet.BlockSize)
		if blocks[1] {
			n *= 2
		}
		var err error
		if write {
			p := make([]byte, n)
			for off := int64(0); off < n; off += trivet.BlockSize {
				binary.LittleEndian.PutUint64(p[off:], op.id)
			}
			err = o.d.WriteAt(context.Background(), p, 0)
		} else {
			err = o.d.Discard(context.Background(), 0, n)
		}
		require.NoError(o.t, err)
		o.mu.Lock()
		o.ops[i].end = o.tick()
		o.mu.Unlock()
	})
}

func (o *interleaving) flush(sequence string) {
	o.mu.Lock()
	began := o.tick()
	o.mu.Unlock()
	require.NoError(o.t, o.d.Flush(context.Background()))
	for b := range 2 {
		p := block(1)
		require.NoError(o.t, o.mem.ReadAt(context.Background(), p, int64(b)*trivet.BlockSize))
		o.judge(sequence, "flush", b, binary.LittleEndian.Uint64(p), began)
	}
}

// judge fails unless some operation that may have left value is not strictly before one that was acknowledged by then.
func (o *interleaving) judge(sequence, what string, b int, value uint64, then int) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for _, x := range o.ops {
		if x.id != value || !x.blocks[b] {
			continue
		}
		newer := false
		for _, y := range o.ops {
			if y.blocks[b] && y.end != 0 && y.end < then && x.end != 0 && x.end < y.begin {
				newer = true
			}
		}
		if !newer {
			return
		}
	}
	o.t.Fatalf("sequence %q: at the %s block %d holds operation %d; all: %+v", sequence, what, b, value, o.ops)
}

// TestSecondWriteBackWaitsForTheFirst: two write-backs of one block are never under way together, or the older one
// could land last (H39).
func TestSecondWriteBackWaitsForTheFirst(t *testing.T) {
	t.Parallel()
	path := file(t)
	synctest.Test(t, func(t *testing.T) {
		mem := faultdev.NewMem(1 << 20)
		disk := faultdev.Wrap(mem)
		d := open(t, path, disk, config(cache.WriteBack, small))
		gate := disk.Hold(faultdev.OfKind(faultdev.Write))
		ctx := t.Context()
		require.NoError(t, d.WriteAt(ctx, block(1), 0))
		flushed := make(chan error, 2)
		go func() { flushed <- d.Flush(ctx) }()
		<-gate.Arrived()
		require.NoError(t, d.WriteAt(ctx, block(2), 0))
		go func() { flushed <- d.Flush(ctx) }()
		synctest.Wait()
		require.Equal(t, 1, disk.Count(faultdev.Write))
		require.Empty(t, flushed, "neither is committed")
		holds(t, d, 0, 2)
		gate.Open()
		require.NoError(t, <-flushed)
		require.NoError(t, <-flushed)
		require.Equal(t, 2, disk.Count(faultdev.Write))
		holds(t, mem, 0, 2)
		require.NoError(t, d.Detach(ctx))
	})
}

// TestWriteTrimWrite: a discard keeps its place between the writes before and after it, in each mode (H19).
func TestWriteTrimWrite(t *testing.T) {
	t.Parallel()
	for _, mode := range cache.Modes() {
		for _, zeroes := range []bool{false, true} {
			for step := range 8 { // which of the steps are followed by a flush
				l := newLab(t, config(mode, small))
				trim := l.Discard
				if zeroes {
					trim = l.WriteZeroes
				}
				ctx := t.Context()
				l.write(1, 1, 3)
				if step&1 != 0 {
					require.NoError(t, l.Flush(ctx))
				}
				require.NoError(t, trim(ctx, 2*trivet.BlockSize, trivet.BlockSize))
				holds(t, l, 2, 0)
				if step&2 != 0 {
					require.NoError(t, l.Flush(ctx))
				}
				l.write(3, 2, 1)
				if step&4 != 0 {
					require.NoError(t, l.Flush(ctx))
				}
				require.NoError(t, l.Abandon())
				cfg := config(mode, small)
				d := open(t, l.path, l.mem, cfg)
				for lba, want := range []byte{1: 1, 2: 0, 3: 2} {
					holds(t, d, int64(lba), want)
				}
				require.NoError(t, d.Detach(ctx))
				for lba, want := range []byte{1: 1, 2: 0, 3: 2} {
					holds(t, l.mem, int64(lba), want)
				}
			}
		}
	}
}

// TestFailedDiscardKeepsTheBlocks: a block whose discard failed is still what was acknowledged.
func TestFailedDiscardKeepsTheBlocks(t *testing.T) {
	t.Parallel()
	l := newLab(t, config(cache.WriteBack, small))
	l.write(1, 1, 1)
	l.disk.FailNth(faultdev.Discard, 1, trivet.ErrUnavailable)
	require.ErrorIs(t, l.Discard(t.Context(), trivet.BlockSize, trivet.BlockSize), trivet.ErrUnavailable)
	holds(t, l, 1, 1)
	require.NoError(t, l.Flush(t.Context()))
	holds(t, l.mem, 1, 1)
}

// TestFirstLostWriteBackPoisons: every later flush and write fails, reads go on, and only a new attachment starts
// well; a successor that the kernel has not noticed does not (H14).
func TestFirstLostWriteBackPoisons(t *testing.T) {
	t.Parallel()
	l := newLab(t, config(cache.WriteBack, small))
	ctx := t.Context()
	l.write(1, 1, 1)
	l.write(9, 2, 1)
	l.disk.FailNth(faultdev.Write, 1, trivet.ErrUnavailable)
	for range 3 {
		require.ErrorIs(t, l.Flush(ctx), trivet.ErrUnavailable)
		require.ErrorIs(t, l.WriteAt(ctx, block(3), 0), trivet.ErrUnavailable)
		require.ErrorIs(t, l.Discard(ctx, 0, trivet.BlockSize), trivet.ErrUnavailable)
	}
	holds(t, l, 1, 1)
	_, err := l.Drain(ctx)
	require.ErrorIs(t, err, trivet.ErrUnavailable)
	require.NoError(t, l.Abandon())

	cfg := config(cache.WriteBack, small)
	cfg.Epoch, cfg.Resume = 2, true
	next := openAfter(t, l.path, l.disk, cfg, 1)
	holds(t, next, 1, 1)
	require.Error(t, next.Flush(ctx), "the kernel device lives on, and so does its loss")
	require.Error(t, next.WriteAt(ctx, block(3), 0))
	require.NoError(t, next.Abandon())

	cfg.Epoch, cfg.Resume = 3, false
	next = openAfter(t, l.path, l.disk, cfg, 2)
	require.NoError(t, next.Flush(ctx))
	holds(t, l.mem, 1, 1)
	holds(t, l.mem, 9, 2)
	require.NoError(t, next.Detach(ctx))
}

// openAfter opens a mapping file as a process does that finds current in the catalogue and raises it to cfg.Epoch.
func openAfter(t testing.TB, path string, next trivet.Device, cfg cache.Config, current trivet.Epoch) *cache.Device {
	t.Helper()
	l, err := cache.Lock(path)
	require.NoError(t, err)
	require.NoError(t, l.Adopt(cfg.Cluster, cfg.Volume, current))
	d, err := cache.Open(next, l, cfg)
	require.NoError(t, err)
	return d
}

// TestWhoseBlocks: what was acknowledged at epoch 5 is written back by whoever raised 5 to 6 directly, and by nobody
// else (H13).
func TestWhoseBlocks(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		name           string
		died           bool // another process adopted at 5, raised to 6, and died before it opened the file
		current, epoch trivet.Epoch
		kept           bool
	}{
		{"raised once", false, 5, 6, true},
		{"the same epoch", false, 5, 5, true},
		{"attached elsewhere and back", false, 8, 8, false},
		{"attached elsewhere and back, raised", false, 8, 9, false},
		{"raised by somebody without the lock", false, 6, 7, false},
		{"somebody came in between", false, 5, 7, false},
		{"one died in between", true, 6, 7, true},
		{"one died before it raised", true, 5, 6, true},
		{"one died in between, then elsewhere", true, 8, 9, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			cfg := config(cache.WriteBack, small)
			cfg.Epoch = 5
			l := newLab(t, cfg)
			l.write(1, 1, 1)
			require.NoError(t, l.Abandon())
			if tc.died {
				k, err := cache.Lock(l.path)
				require.NoError(t, err)
				require.NoError(t, k.Adopt(cluster, volume, 5))
				require.NoError(t, k.Close())
			}
			var log strings.Builder
			cfg.Epoch, cfg.Logger = tc.epoch, slog.New(slog.NewTextHandler(&log, nil))
			d := openAfter(t, l.path, l.disk, cfg, tc.current)
			require.NoError(t, d.Flush(t.Context()))
			want := byte(0)
			if tc.kept {
				want = 1
			}
			holds(t, d, 1, want)
			holds(t, l.mem, 1, want)
			require.Equal(t, !tc.kept, strings.Contains(log.String(), "dropping acknowledged writes"), log.String())
			require.NoError(t, d.Detach(t.Context()))
		})
	}
}

// TestRefused: what is not ours is left alone.
func TestRefused(t *testing.T) {
	t.Parallel()
	cfg := config(cache.WriteBack, small)
	cfg.Epoch = 5
	l := newLab(t, cfg)
	l.write(1, 1, 1)
	_, err := cache.Lock(l.path)
	require.ErrorIs(t, err, trivet.ErrInUse)
	require.NoError(t, l.Abandon())
	k, err := cache.Lock(l.path)
	require.NoError(t, err)
	require.ErrorIs(t, k.Adopt(cluster, volume+1, 5), trivet.ErrInvalid)
	require.ErrorIs(t, k.Adopt("other", volume, 5), trivet.ErrInvalid)
	require.ErrorIs(t, k.Adopt(cluster, volume, 4), trivet.ErrInvalid, "newer than the catalogue")
	n, err := k.Dirty()
	require.NoError(t, err)
	require.EqualValues(t, trivet.BlockSize, n)
	require.NoError(t, k.Close())
}

// TestFenced: dirty blocks are dropped with a word, and every call fails from then on (H13).
func TestFenced(t *testing.T) {
	t.Parallel()
	var log strings.Builder
	cfg := config(cache.WriteBack, small)
	cfg.Logger = slog.New(slog.NewTextHandler(&log, nil))
	l := newLab(t, cfg)
	ctx := t.Context()
	l.write(1, 1, 1)
	l.write(50, 1, 2)
	l.disk.Inject(faultdev.Fault{Match: faultdev.OfKind(faultdev.Write), Err: trivet.ErrFenced})
	require.ErrorIs(t, l.Flush(ctx), trivet.ErrFenced)
	require.ErrorIs(t, l.WriteAt(ctx, block(1), 0), trivet.ErrFenced)
	require.ErrorIs(t, l.ReadAt(ctx, block(1), trivet.BlockSize), trivet.ErrFenced)
	require.ErrorIs(t, l.Discard(ctx, 0, trivet.BlockSize), trivet.ErrFenced)
	require.ErrorIs(t, l.WriteZeroes(ctx, 0, trivet.BlockSize), trivet.ErrFenced)
	require.Contains(t, log.String(), fmt.Sprintf("bytes=%d", 3*trivet.BlockSize))
	require.EqualValues(t, 3, l.Stats().LostBlocks)
	require.NoError(t, l.Abandon())
	l.disk.Heal()
	d := open(t, l.path, l.disk, config(cache.WriteBack, small))
	require.NoError(t, d.Flush(ctx))
	holds(t, l.mem, 1, 0)
	require.NoError(t, d.Detach(ctx))
}

// TestDeadline: a block that nobody flushes is written back when it is that old, and one that is written over and over
// as well.
func TestDeadline(t *testing.T) {
	t.Parallel()
	path := file(t)
	synctest.Test(t, func(t *testing.T) {
		mem := faultdev.NewMem(1 << 20)
		disk := faultdev.Wrap(mem)
		cfg := config(cache.WriteBack, small)
		cfg.Deadline = 5 * time.Second
		d := open(t, path, disk, cfg)
		for range 9 {
			require.NoError(t, d.WriteAt(t.Context(), blocks(1, 2), 0))
			time.Sleep(500 * time.Millisecond)
		}
		synctest.Wait()
		require.Zero(t, disk.Count(faultdev.Write))
		for range 2 {
			require.NoError(t, d.WriteAt(t.Context(), blocks(1, 2), 0))
			time.Sleep(500 * time.Millisecond)
		}
		synctest.Wait()
		require.Equal(t, 1, disk.Count(faultdev.Write))
		require.NoError(t, d.Detach(t.Context()))
	})
}

// TestWriteBacksAreMergedAndWhole: neighbours go together, sorted, and no write of up to 64 KiB is cut.
func TestWriteBacksAreMergedAndWhole(t *testing.T) {
	t.Parallel()
	l := newLab(t, config(cache.WriteBack, 4<<20)) // so that nothing leaves before the flush
	for _, w := range [][2]int64{{40, 8}, {32, 8}, {24, 8}, {0, 16}, {16, 8}, {48, 4}} {
		l.write(w[0], byte(w[0]), int(w[1]))
	}
	require.NoError(t, l.Flush(t.Context()))
	var got [][2]int64
	for _, op := range l.disk.Ops() {
		if op.Kind == faultdev.Write {
			got = append(got, [2]int64{op.OffBytes / trivet.BlockSize, op.LenBytes / trivet.BlockSize})
		}
	}
	require.ElementsMatch(t, [][2]int64{{0, 16}, {16, 16}, {32, 16}, {48, 4}}, got)
	require.EqualValues(t, 2, l.Stats().Merged)
}

// TestNothingComesBackToLife: once everything is below, no older block of a slot that was superseded, in whatever
// state, is left for a successor to find.
func TestNothingComesBackToLife(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		name string
		want byte // of the block, below, in the end
		run  func(l *lab, gate *faultdev.Gate)
	}{
		{"a dirty one", 2, func(l *lab, gate *faultdev.Gate) {
			gate.Open()
			l.write(1, 1, 1)
			l.write(1, 2, 1)
		}},
		{"one being written back", 2, func(l *lab, gate *faultdev.Gate) {
			l.write(1, 1, 1)
			flushed := make(chan error, 1)
			go func() { flushed <- l.Flush(context.Background()) }()
			<-gate.Arrived()
			l.write(1, 2, 1)
			gate.Open()
			require.NoError(l.t, <-flushed)
		}},
		{"one that was discarded", 0, func(l *lab, gate *faultdev.Gate) {
			gate.Open()
			l.write(1, 1, 1)
			require.NoError(l.t, l.Discard(context.Background(), trivet.BlockSize, trivet.BlockSize))
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			l := newLab(t, config(cache.WriteBack, small))
			tc.run(l, l.disk.Hold(faultdev.OfKind(faultdev.Write)))
			require.NoError(t, l.Flush(t.Context()))
			require.NoError(t, l.Abandon())
			k, err := cache.Lock(l.path)
			require.NoError(t, err)
			n, err := k.Dirty()
			require.NoError(t, err)
			require.Zero(t, n)
			require.NoError(t, k.Close())
			holds(t, l.mem, 1, tc.want)
		})
	}
}
