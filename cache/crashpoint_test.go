package cache

import (
	"context"
	"encoding/binary"
	"math/rand/v2"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/internal/faultdev"
)

const crashBlocks = 200

// crashPoints dies before every store to the mapping, in thought: it copies the mapping and the disk below as they are
// at that instant, lets a successor recover the copy, and compares. Stores are not reordered: a process that is killed
// leaves a prefix of each thread's stores, on a machine that goes on (see mapping).
type crashPoints struct {
	sync.Mutex // is mapping.trace
	t          *testing.T
	dev        *Device
	disk       *faultdev.Mem
	image      *mapping // of the instant
	below      []byte
	pointN     int
	dirtyN     int

	mu      sync.Mutex
	acked   [crashBlocks]uint64 // stamp of each block; 0 = zeroes
	pending pendingOp
}

type pendingOp struct {
	lba, n int
	stamp  uint64 // 0: discard
}

func (c *crashPoints) Lock() {
	c.Mutex.Lock()
	if !c.t.Failed() { // stores come from several goroutines, so a check cannot end the test
		c.check()
	}
}

// check recovers the image of this instant.
func (c *crashPoints) check() {
	c.pointN++
	image, live := c.image, c.dev.t.m
	copy(image.b, live.b[:slotsAt+live.slotN*slotHeadBytes])
	copy(image.b[image.data:], live.b[live.data:])
	c.mu.Lock()
	want, op := c.acked, c.pending
	c.mu.Unlock()
	got := c.stamps()
	t, err := newSlots(image, 7, LRU)
	if err != nil {
		panic(err) // of a policy that is not there
	}
	_, n, err := t.recover(0)
	if err != nil {
		c.t.Errorf("store %d: %v", c.pointN, err)
	}
	c.dirtyN += n
	for lba := range crashBlocks {
		if s := t.index.get(trivet.LBA(lba)); s != none {
			got[lba] = binary.LittleEndian.Uint64(image.block(s))
		}
	}
	newN := 0
	for lba := range crashBlocks {
		inside := lba >= op.lba && lba < op.lba+op.n
		switch {
		case inside && got[lba] == op.stamp:
			newN++
		case got[lba] != want[lba]:
			c.t.Errorf("store %d: block %d holds write %d, acknowledged %d, under way %+v", c.pointN, lba, got[lba],
				want[lba], op)
			return
		}
	}
	if op.stamp != 0 && op.n <= pieceBlocks && newN != 0 && newN != op.n {
		c.t.Errorf("store %d: %d blocks of write %+v", c.pointN, newN, op)
	}
}

func (c *crashPoints) stamps() [crashBlocks]uint64 {
	var got [crashBlocks]uint64
	p := c.below
	if err := c.disk.ReadAt(context.Background(), p, 0); err != nil {
		panic(err) // memory
	}
	for lba := range got {
		got[lba] = binary.LittleEndian.Uint64(p[lba*trivet.BlockSize:])
	}
	return got
}

func (c *crashPoints) do(op pendingOp, f func() error) {
	c.mu.Lock()
	c.pending = op
	c.mu.Unlock()
	require.NoError(c.t, f())
	c.mu.Lock()
	for lba := op.lba; lba < op.lba+op.n; lba++ {
		c.acked[lba] = op.stamp
	}
	c.pending = pendingOp{}
	c.mu.Unlock()
}

// TestCrashPoints: whatever the instant of death, the successor finds every acknowledged write, and the one under way
// whole or not at all.
func TestCrashPoints(t *testing.T) {
	t.Parallel()
	opsN := 500
	if testing.Short() {
		opsN = 50
	}
	disk := faultdev.NewMem(crashBlocks * trivet.BlockSize)
	c := &crashPoints{t: t, disk: disk}
	l, err := Lock(filepath.Join(t.TempDir(), "c"))
	require.NoError(t, err)
	c.dev, err = Open(disk, l, Config{
		Volume: 7, Epoch: 1, Deadline: 3 * time.Millisecond, Settings: Settings{Mode: WriteBack, Bytes: slotsMin * 4096},
	})
	require.NoError(t, err)
	m := c.dev.t.m
	c.image = &mapping{b: make([]byte, len(m.b)), slotN: m.slotN, data: m.data}
	c.below = make([]byte, crashBlocks*trivet.BlockSize)
	m.trace = c
	r := rand.New(rand.NewPCG(1, 1))
	ctx := t.Context()
	for i := range opsN {
		op := pendingOp{lba: r.IntN(crashBlocks), stamp: uint64(i + 1)}
		op.n = 1 + r.IntN(min(20, crashBlocks-op.lba))
		off, n := int64(op.lba)*trivet.BlockSize, int64(op.n)*trivet.BlockSize
		switch r.IntN(10) {
		case 0:
			op.stamp = 0
			c.do(op, func() error { return c.dev.Discard(ctx, off, n) })
		case 1:
			require.NoError(t, c.dev.Flush(ctx))
		default:
			p := make([]byte, n)
			for b := range op.n {
				binary.LittleEndian.PutUint64(p[b*trivet.BlockSize:], op.stamp)
			}
			c.do(op, func() error { return c.dev.WriteAt(ctx, p, off) })
		}
	}
	c.dev.mu.Lock()
	c.dev.t.m.trace = nil
	c.dev.mu.Unlock()
	require.NoError(t, c.dev.Detach(ctx))
	require.Greater(t, c.dirtyN, c.pointN, "nothing was dirty at the points")
	t.Logf("%d points, %d blocks recovered", c.pointN, c.dirtyN)
}

// TestHeaderChangesAtOnce: before every store of a change of the header, a successor reads the old one or the new one.
func TestHeaderChangesAtOnce(t *testing.T) {
	t.Parallel()
	m := &mapping{b: make([]byte, fileBytes(0))}
	old := header{generation: 4, volume: 7, epoch: 1, next: 2}
	m.writeHeader(&old)
	points := 0
	m.trace = lockFunc(func() {
		h, there, err := decodeHeader(m.b)
		require.NoError(t, err)
		require.True(t, there)
		require.Equal(t, trivet.Epoch(1), h.epoch)
		points++
	})
	for range 3 {
		now := old
		now.generation++
		now.epoch = 2
		m.writeHeader(&now)
		h, _, err := decodeHeader(m.b)
		require.NoError(t, err)
		require.Equal(t, trivet.Epoch(2), h.epoch)
		trace := m.trace
		m.trace = nil
		old.generation = now.generation + 1
		m.writeHeader(&old)
		m.trace = trace
	}
	require.Equal(t, 9, points)
}

type lockFunc func()

func (f lockFunc) Lock()   { f() }
func (f lockFunc) Unlock() {}
