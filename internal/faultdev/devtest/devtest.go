// Package devtest checks any trivet.Device against a byte-array model of the contract in
// trivet.Device. Every stage of the data path runs it:
//
//	devtest.TestDevice(t, cache.New(faultdev.NewMem(16<<20), opts))
//
// It uses exported behaviour only and never looks at the clock, so it runs in a synctest bubble.
package devtest

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
)

// Options tunes a run. The zero value gives the defaults.
type Options struct {
	// Seed of the random part. 0 means 1: failures repeat by themselves.
	Seed uint64

	// OpsN is the number of random requests. 0 means 1000, or 200 with -short.
	OpsN int

	// SpanBytes is how much of the device, from its beginning, the random part uses. 0 means
	// 4 MiB or the size, whichever is less.
	SpanBytes int64

	// RequestBytesMax is the longest read or write. 0 means 1 MiB.
	RequestBytesMax int64
}

func (o Options) withDefaults(sizeBytes int64) Options {
	if o.Seed == 0 {
		o.Seed = 1
	}
	if o.OpsN == 0 {
		o.OpsN = 1000
		if testing.Short() {
			o.OpsN = 200
		}
	}
	if o.SpanBytes == 0 {
		o.SpanBytes = 4 << 20
	}
	o.SpanBytes = min(o.SpanBytes, sizeBytes)
	if o.RequestBytesMax == 0 {
		o.RequestBytesMax = 1 << 20
	}
	o.RequestBytesMax = min(o.RequestBytesMax, o.SpanBytes)
	return o
}

// TestDevice is Run with default options.
func TestDevice(t *testing.T, dev trivet.Device) {
	t.Helper()
	Run(t, dev, Options{})
}

// Run checks dev. REQUIRES: dev was never written, holds at least 256 KiB, and nobody else uses
// it. Afterwards its contents are arbitrary.
func Run(t *testing.T, dev trivet.Device, opts Options) {
	t.Helper()
	size := dev.Size()
	require.Zero(t, size%trivet.BlockSize, "size %d is not in whole blocks", size)
	require.GreaterOrEqual(t, size, int64(256<<10), "devtest needs a larger device")
	opts = opts.withDefaults(size)
	m := &model{dev: dev, opts: opts, mem: make([]byte, opts.SpanBytes)}
	for _, step := range []struct {
		name string
		run  func(*testing.T)
	}{
		{"fresh device reads as zeroes", m.fresh},
		{"bounds", m.bounds},
		{"last block", m.lastBlock},
		{"discard aligns inwards", m.discardInwards},
		{"buffers stay the caller's", m.buffers},
		{"order of write and trim", m.writeTrimWrite},
		{"random requests", m.random},
		{"disjoint concurrent requests", m.disjoint},
		{"overlapping writes keep blocks whole", m.overlapping},
		{"ended context", m.endedContext},
	} {
		t.Log("devtest: " + step.name) // no t.Run: it is forbidden in a synctest bubble
		step.run(t)
	}
}

// model is the device under test beside what its first SpanBytes must read as.
type model struct {
	dev  trivet.Device
	opts Options
	mem  []byte
}

func (m *model) write(t *testing.T, p []byte, off int64) {
	t.Helper()
	require.NoError(t, m.dev.WriteAt(t.Context(), p, off), "write %d bytes at %d", len(p), off)
	copy(m.mem[off:], p)
}

func (m *model) zero(off, n int64) { clear(m.mem[off : off+n]) }

func (m *model) check(t *testing.T, off, n int64, msg string) {
	t.Helper()
	got := garbage(n)
	require.NoError(t, m.dev.ReadAt(t.Context(), got, off), "%s: read %d bytes at %d", msg, n, off)
	requireSame(t, m.mem[off:off+n], got, off, msg)
}

func (m *model) fresh(t *testing.T) {
	t.Helper()
	m.check(t, 0, m.opts.RequestBytesMax, "fresh")
}

func (m *model) bounds(t *testing.T) {
	t.Helper()
	const bs = trivet.BlockSize
	ctx, size := t.Context(), m.dev.Size()
	for _, c := range []struct {
		name   string
		off, n int64
		want   error
	}{
		{"unaligned offset", 512, bs, trivet.ErrInvalid},
		{"unaligned length", 0, 512, trivet.ErrInvalid},
		{"negative offset", -bs, bs, trivet.ErrInvalid},
		{"past the end", size, bs, trivet.ErrOutOfRange},
		{"across the end", size - bs, 2 * bs, trivet.ErrOutOfRange},
		{"end overflows", 1<<63 - bs, bs, trivet.ErrOutOfRange},
	} {
		p := bytes.Repeat([]byte{0xee}, int(c.n))
		require.ErrorIs(t, m.dev.ReadAt(ctx, p, c.off), c.want, "read: %s", c.name)
		require.ErrorIs(t, m.dev.WriteAt(ctx, p, c.off), c.want, "write: %s", c.name)
		require.ErrorIs(t, m.dev.WriteZeroes(ctx, c.off, c.n), c.want, "write zeroes: %s", c.name)
	}
	require.ErrorIs(t, m.dev.WriteZeroes(ctx, 0, -bs), trivet.ErrInvalid, "write zeroes: negative length")
	require.ErrorIs(t, m.dev.Discard(ctx, -1, bs), trivet.ErrInvalid, "discard: negative offset")
	require.ErrorIs(t, m.dev.Discard(ctx, 0, -1), trivet.ErrInvalid, "discard: negative length")
	require.NoError(t, m.dev.ReadAt(ctx, nil, 0), "empty read")
	require.NoError(t, m.dev.WriteAt(ctx, nil, size), "empty write at the end")
	m.check(t, 0, m.opts.RequestBytesMax, "refused requests must have no effect")
}

func (m *model) lastBlock(t *testing.T) {
	t.Helper()
	off := m.dev.Size() - trivet.BlockSize
	want := pattern(trivet.BlockSize, 7)
	require.NoError(t, m.dev.WriteAt(t.Context(), want, off))
	got := garbage(trivet.BlockSize)
	require.NoError(t, m.dev.ReadAt(t.Context(), got, off))
	requireSame(t, want, got, off, "last block")
	require.NoError(t, m.dev.Discard(t.Context(), off, trivet.BlockSize))
	require.NoError(t, m.dev.ReadAt(t.Context(), got, off))
	requireSame(t, make([]byte, trivet.BlockSize), got, off, "last block after discard")
}

// discardInwards is H18: a discard never touches a block that it does not cover whole.
func (m *model) discardInwards(t *testing.T) {
	t.Helper()
	const bs = trivet.BlockSize
	for _, c := range []struct{ off, n int64 }{
		{bs, 2 * bs},
		{bs + 1, 2 * bs},
		{bs - 1, 2 * bs},
		{bs, bs - 1},
		{bs + 512, 3 * bs},
		{2*bs - 1, 2},
		{0, 1},
		{3, 4*bs - 3},
		{bs, 0},
		{5*bs - 1, bs + 1},
	} {
		m.write(t, pattern(8*bs, byte(c.off)), 0)
		require.NoError(t, m.dev.Discard(t.Context(), c.off, c.n), "discard %d bytes at %d", c.n, c.off)
		first, blocksN := trivet.AlignInwards(c.off, c.n)
		m.zero(int64(first)*bs, blocksN*bs)
		m.check(t, 0, 8*bs, fmt.Sprintf("discard of %d bytes at %d", c.n, c.off))
	}
}

// buffers is H25: a device must not keep, or write to, what it was given.
func (m *model) buffers(t *testing.T) {
	t.Helper()
	const n = 16 * trivet.BlockSize
	p := pattern(n, 3)
	m.write(t, p, 0)
	requireSame(t, pattern(n, 3), p, 0, "a write must not change its buffer")
	for i := range p {
		p[i] = 0x55
	}
	m.check(t, 0, n, "the buffer of a write was used after the call")
	got := garbage(n)
	require.NoError(t, m.dev.ReadAt(t.Context(), got, 0))
	for i := range got {
		got[i] = 0xaa
	}
	m.check(t, 0, n, "the buffer of a read was kept by the device")
	require.NoError(t, m.dev.Flush(t.Context()))
	m.check(t, 0, n, "after flush")
}

// writeTrimWrite is H19: trims keep their place between writes to the same blocks.
func (m *model) writeTrimWrite(t *testing.T) {
	t.Helper()
	const n = 4 * trivet.BlockSize
	for i := range 32 {
		m.write(t, pattern(n, byte(i)), 0)
		if i%2 == 0 {
			require.NoError(t, m.dev.Discard(t.Context(), 0, n))
		} else {
			require.NoError(t, m.dev.WriteZeroes(t.Context(), 0, n))
		}
		if i%3 == 0 {
			require.NoError(t, m.dev.Flush(t.Context()))
		}
		m.zero(0, n)
		m.check(t, 0, n, "after trim")
		m.write(t, pattern(n/2, byte(100+i)), n/4)
		m.check(t, 0, n, "write after trim")
	}
}

func (m *model) random(t *testing.T) {
	t.Helper()
	t.Logf("seed %d", m.opts.Seed)
	rng := rand.New(rand.NewPCG(m.opts.Seed, 0))
	for i := range m.opts.OpsN {
		off, n := m.extent(rng)
		msg := fmt.Sprintf("seed %d op %d", m.opts.Seed, i)
		switch r := rng.IntN(100); {
		case r < 40:
			m.write(t, randomBytes(rng, n), off)
		case r < 80:
			m.check(t, off, n, msg)
		case r < 87:
			off, n = off+rng.Int64N(trivet.BlockSize), max(0, n-rng.Int64N(2*trivet.BlockSize))
			n = min(n, m.opts.SpanBytes-off)
			require.NoError(t, m.dev.Discard(t.Context(), off, n), msg)
			first, blocksN := trivet.AlignInwards(off, n)
			if blocksN > 0 {
				m.zero(int64(first)*trivet.BlockSize, blocksN*trivet.BlockSize)
			}
		case r < 94:
			require.NoError(t, m.dev.WriteZeroes(t.Context(), off, n), msg)
			m.zero(off, n)
		default:
			require.NoError(t, m.dev.Flush(t.Context()), msg)
		}
	}
	m.checkAll(t)
}

// disjoint runs requests side by side, each worker on its own blocks, with flushes among them.
func (m *model) disjoint(t *testing.T) {
	t.Helper()
	const workersN = 8
	share := m.opts.SpanBytes / workersN / trivet.BlockSize * trivet.BlockSize
	var wg sync.WaitGroup
	errs := make([]error, workersN)
	for w := range workersN {
		wg.Go(func() { errs[w] = m.worker(t.Context(), w, int64(w)*share, share) })
	}
	wg.Wait()
	for w, err := range errs {
		require.NoError(t, err, "worker %d, seed %d", w, m.opts.Seed)
	}
	m.checkAll(t)
}

func (m *model) worker(ctx context.Context, w int, base, share int64) error {
	rng := rand.New(rand.NewPCG(m.opts.Seed, uint64(w+1)))
	for range max(m.opts.OpsN/20, 10) {
		n := (1 + rng.Int64N(min(share/trivet.BlockSize, 16))) * trivet.BlockSize
		off := base + rng.Int64N((share-n)/trivet.BlockSize+1)*trivet.BlockSize
		p := randomBytes(rng, n)
		if err := m.dev.WriteAt(ctx, p, off); err != nil {
			return fmt.Errorf("write %d bytes at %d: %w", n, off, err)
		}
		copy(m.mem[off:], p)
		if rng.IntN(4) == 0 {
			if err := m.dev.Flush(ctx); err != nil {
				return fmt.Errorf("flush: %w", err)
			}
		}
		got := garbage(n)
		if err := m.dev.ReadAt(ctx, got, off); err != nil {
			return fmt.Errorf("read %d bytes at %d: %w", n, off, err)
		}
		if !bytes.Equal(p, got) {
			return fmt.Errorf("read %d bytes at %d: not what was just written", n, off)
		}
	}
	return nil
}

// overlapping lets writers fight over the same blocks: each block must hold one write whole.
func (m *model) overlapping(t *testing.T) {
	t.Helper()
	const workersN, blocksN = 8, 16
	var wg sync.WaitGroup
	errs := make([]error, workersN)
	for w := range workersN {
		wg.Go(func() {
			p := bytes.Repeat([]byte{byte(w + 1)}, blocksN*trivet.BlockSize)
			for range 10 {
				if errs[w] = m.dev.WriteAt(t.Context(), p, 0); errs[w] != nil {
					return
				}
			}
		})
	}
	wg.Wait()
	for w, err := range errs {
		require.NoError(t, err, "worker %d", w)
	}
	got := garbage(blocksN * trivet.BlockSize)
	require.NoError(t, m.dev.ReadAt(t.Context(), got, 0))
	for b := range blocksN {
		block := got[b*trivet.BlockSize:][:trivet.BlockSize]
		require.True(t, block[0] >= 1 && block[0] <= workersN, "block %d holds %#x, which nobody wrote", b, block[0])
		require.Equal(t, bytes.Repeat(block[:1], trivet.BlockSize), block, "block %d is torn", b)
	}
	copy(m.mem, got)
}

// endedContext: a call with an ended context may fail, but then with that error, and a read must
// never claim success with the wrong bytes.
func (m *model) endedContext(t *testing.T) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	got := garbage(trivet.BlockSize)
	if err := m.dev.ReadAt(ctx, got, 0); err != nil {
		require.ErrorIs(t, err, context.Canceled)
	} else {
		requireSame(t, m.mem[:trivet.BlockSize], got, 0, "read with an ended context")
	}
	if err := m.dev.Flush(ctx); err != nil {
		require.ErrorIs(t, err, context.Canceled)
	}
	m.check(t, 0, trivet.BlockSize, "after an ended context")
	require.NoError(t, m.dev.Flush(t.Context()))
}

func (m *model) checkAll(t *testing.T) {
	t.Helper()
	for off := int64(0); off < m.opts.SpanBytes; off += m.opts.RequestBytesMax {
		m.check(t, off, min(m.opts.RequestBytesMax, m.opts.SpanBytes-off), "whole span")
	}
}

// extent draws whole blocks: mostly short, now and then up to RequestBytesMax.
func (m *model) extent(rng *rand.Rand) (off, n int64) {
	maxN := m.opts.RequestBytesMax / trivet.BlockSize
	if rng.IntN(8) > 0 {
		maxN = min(maxN, 16)
	}
	n = (1 + rng.Int64N(maxN)) * trivet.BlockSize
	return rng.Int64N((m.opts.SpanBytes-n)/trivet.BlockSize+1) * trivet.BlockSize, n
}

func requireSame(t *testing.T, want, got []byte, off int64, msg string) {
	t.Helper()
	if bytes.Equal(want, got) {
		return
	}
	for i := range want {
		if want[i] != got[i] {
			require.Failf(t, "wrong bytes", "%s: at byte %d (block %d): want %#x, got %#x",
				msg, off+int64(i), (off+int64(i))/trivet.BlockSize, want[i], got[i])
		}
	}
}

// pattern gives every block other bytes, so that a misplaced block shows.
func pattern(n int64, seed byte) []byte {
	p := make([]byte, n)
	for i := range p {
		p[i] = byte(i) ^ byte(i/trivet.BlockSize*37) ^ seed | 1
	}
	return p
}

func garbage(n int64) []byte { return bytes.Repeat([]byte{0xdb}, int(n)) }

func randomBytes(rng *rand.Rand, n int64) []byte {
	var seed [32]byte
	binary.LittleEndian.PutUint64(seed[:], rng.Uint64())
	p := make([]byte, n)
	_, _ = rand.NewChaCha8(seed).Read(p) // never fails
	return p
}
