package engine

import (
	"bytes"
	"errors"
	"io"
	"testing"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
)

// readUntil reads at most n bytes of a stream.
func readUntil(r io.Reader, n int) ([]byte, error) {
	b, err := io.ReadAll(io.LimitReader(r, int64(n)))
	return b, err
}

var errSource = errors.New("the source died")

// broken ends with errSource instead of io.EOF.
func broken(b []byte) io.Reader { return io.MultiReader(bytes.NewReader(b), failingReader{}) }

type failingReader struct{}

func (failingReader) Read([]byte) (int, error) { return 0, errSource }

// pair is a source with 512 blocks at index 16, and a target that has the first 8 commits of it.
type pair struct {
	e, e2  *Engine
	src, v *Volume
}

func newPair(t *testing.T, rangeBytes int) *pair {
	t.Helper()
	p := &pair{}
	cfg := damageConfig(vfs.NewMem())
	cfg.imageRangeBytes = rangeBytes
	p.e, p.src = mustStore(t, cfg, 512)
	p.e2, p.v = mustStore(t, damageConfig(vfs.NewMem()), 512)
	for i := range trivet.LBA(16) {
		require.NoError(t, writeNumbered(p.src, uint32(100+i), i*32, 32))
		if i < 8 {
			require.NoError(t, writeNumbered(p.v, uint32(100+i), i*32, 32))
		}
	}
	t.Cleanup(func() { require.NoError(t, errors.Join(p.e.Close(), p.e2.Close())) })
	return p
}

func (p *pair) stream(t *testing.T) []byte {
	t.Helper()
	i, err := p.src.Image(p.v.Want())
	require.NoError(t, err)
	return mustReadAll(t, i)
}

func (p *pair) have(t *testing.T) coverage {
	t.Helper()
	w, err := decodeWant(p.v.Want())
	require.NoError(t, err)
	return w.have
}

func (p *pair) requireSame(t *testing.T) {
	t.Helper()
	a, err := p.src.Digest()
	require.NoError(t, err)
	b, err := p.v.Digest()
	require.NoError(t, err)
	require.Equal(t, a, b)
}

// What is not in the store as it was sent is not claimed, and comes again: a byte that flips between the
// write and the check (H21).
func TestRestoreReadsBack(t *testing.T) {
	for name, damage := range map[string]func(p *pair, key []byte) error{
		"a flipped byte": func(p *pair, key []byte) error {
			b := make([]byte, dataValueBytes)
			putData(b, numbered(9, 300), place(key))
			b[1000] ^= 4
			return p.e2.db.Set(key, b, pebble.NoSync)
		},
		"another block with a good sum": func(p *pair, key []byte) error {
			b := make([]byte, dataValueBytes)
			putData(b, numbered(9, 300), place(key))
			return p.e2.db.Set(key, b, pebble.NoSync)
		},
		"a lost write": func(p *pair, key []byte) error { return p.e2.db.Delete(key, pebble.NoSync) },
		"a version too many": func(p *pair, _ []byte) error {
			key := appendBlockKey(nil, damagedID, 300, 7)
			b := make([]byte, dataValueBytes)
			putData(b, numbered(9, 300), place(key))
			return p.e2.db.Set(key, b, pebble.NoSync)
		},
	} {
		t.Run(name, func(t *testing.T) {
			p := newPair(t, 64<<10)
			image := p.stream(t)
			key := appendBlockKey(nil, damagedID, 300, 0)
			done := false
			err := p.v.Restore(&watched{r: bytes.NewReader(image), before: func() {
				if done {
					return
				}
				_, closer, err := p.e2.db.Get(key)
				if err != nil {
					return // block 300 is not there yet
				}
				require.NoError(t, closer.Close())
				done = true
				require.NoError(t, damage(p, key))
			}})
			require.True(t, done)
			require.ErrorIs(t, err, trivet.ErrCorrupt)
			require.True(t, p.v.Restoring())
			have := p.have(t)
			require.Zero(t, have.lowest(300, 301), "%v", have)
			require.Equal(t, uint64(16), have.lowest(0, 256), "unchanged, before the first damage")
			require.Equal(t, uint64(8), have.lowest(400, 512), "not reached")
			again := p.stream(t)
			require.Less(t, len(again), len(image))
			require.NoError(t, p.v.Restore(bytes.NewReader(again)))
			p.requireSame(t)
		})
	}
}

// Nothing is claimed before it was verified, whatever was written.
func TestRestoreClaimsWhatItVerified(t *testing.T) {
	p := newPair(t, 256<<10)
	image := p.stream(t)
	r := bytes.NewReader(image)
	seen := map[trivet.LBA]bool{}
	require.NoError(t, p.v.Restore(&watched{r: r, before: func() {
		ir, err := newImageReader(bytes.NewReader(image[:len(image)-r.Len()]))
		if err != nil {
			return
		}
		verified := trivet.LBA(0)
		for part, err := ir.next(); err == nil; part, err = ir.next() {
			if part.kind == partDigest {
				verified = part.to
			}
		}
		seen[verified] = true
		if verified < 512 {
			require.Equal(t, uint64(8), p.have(t).lowest(verified, 512), "verified up to %d", verified)
		}
	}}))
	require.Greater(t, len(seen), 3)
}

// watched calls before ahead of each read.
type watched struct {
	r      io.Reader
	before func()
}

func (w *watched) Read(p []byte) (int, error) {
	w.before()
	return w.r.Read(p)
}

// A byte that flips in the source ends the image; what arrived before it counts (H21).
func TestRestoreFromRottingSource(t *testing.T) {
	p := newPair(t, 64<<10)
	key := appendBlockKey(nil, damagedID, 400, 0)
	good, closer, err := p.e.db.Get(key)
	require.NoError(t, err)
	good = bytes.Clone(good)
	require.NoError(t, closer.Close())
	bad := bytes.Clone(good)
	bad[100] ^= 1
	require.NoError(t, p.e.db.Set(key, bad, pebble.NoSync))
	i, err := p.src.Image(p.v.Want())
	require.NoError(t, err)
	require.ErrorIs(t, p.v.Restore(i), trivet.ErrCorrupt)
	require.NoError(t, i.Close())
	have := p.have(t)
	require.Equal(t, uint64(8), have.lowest(400, 512))
	require.Equal(t, uint64(16), have.lowest(0, 380), "%v", have)
	require.NoError(t, p.e.db.Set(key, good, pebble.NoSync))
	require.NoError(t, p.v.Restore(bytes.NewReader(p.stream(t))))
	p.requireSame(t)
}

// A digest of the source that is not that of what it sent.
func TestRestoreComparesWithTheSource(t *testing.T) {
	_, v := mustStoreFor(t, 4)
	image := newTestStream().begin(wholly(0)).blocks(lbaMax, dataItem(0, 1), absentItem(1, lbaMax-1)).
		digest(lbaMax, dataVersion(2, 1)).end()
	require.ErrorIs(t, v.Restore(bytes.NewReader(image)), trivet.ErrCorrupt)
	require.True(t, v.Restoring())
	require.Equal(t, wholly(0), v.recordNow().have)
}

// mustStoreFor is a store with volume 1, as testImage has it.
func mustStoreFor(t *testing.T, blockN int64) (*Engine, *Volume) {
	t.Helper()
	e, err := Open(damageConfig(vfs.NewMem()))
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, e.Close()) })
	require.NoError(t, e.CreateVolume(1, "r", blockN*trivet.BlockSize))
	v, err := e.OpenVolume(1)
	require.NoError(t, err)
	return e, v
}

// An interrupted Restore goes on where it stopped, block for block when the engine lives on.
func TestRestoreGoesOn(t *testing.T) {
	p := newPair(t, 1<<20)
	whole := p.stream(t)
	require.Greater(t, len(whole), 256*trivet.BlockSize)
	require.Less(t, len(whole), 257*(trivet.BlockSize+imageVersionHeadBytes))
	err := p.v.Restore(broken(whole[:len(whole)-60]))
	require.ErrorIs(t, err, errSource)
	require.Equal(t, wholly(16), p.have(t), "all blocks are there, only the end is not")
	rest := p.stream(t)
	require.Less(t, len(rest), 1000)
	require.NoError(t, p.v.Restore(bytes.NewReader(rest)))
	p.requireSame(t)
}

// An image that builds on what the volume has no more, or never had, is refused and changes nothing.
func TestRestoreRefusesOtherBase(t *testing.T) {
	p := newPair(t, 64<<10)
	first := p.stream(t) // builds on index 8
	require.ErrorIs(t, p.v.Restore(broken(first[:len(first)/2])), errSource)
	claimed := p.have(t)
	require.Len(t, claimed, 2)
	second := p.stream(t) // builds on what arrived of the first
	require.NoError(t, writeNumbered(p.src, 200, 0, 1))
	require.NoError(t, p.v.Restore(bytes.NewReader(first)), "what it builds on is still there")

	q := newPair(t, 64<<10)
	require.ErrorIs(t, q.v.Restore(bytes.NewReader(second)), trivet.ErrInvalid)
	require.False(t, q.v.Restoring())
	require.Equal(t, wholly(8), q.have(t))
	// The source is behind what the interrupted one was moving to.
	require.ErrorIs(t, q.v.Restore(broken(first[:len(first)/2])), errSource)
	cfg := damageConfig(vfs.NewMem())
	e3, behind := mustStore(t, cfg, 512)
	defer func() { require.NoError(t, e3.Close()) }()
	for i := range trivet.LBA(12) {
		require.NoError(t, writeNumbered(behind, uint32(100+i), i*32, 32))
	}
	_, err := behind.Image(q.v.Want())
	require.ErrorIs(t, err, trivet.ErrInvalid)
	require.Equal(t, claimed, q.have(t))

	// All of it is another thing: it begins anew, also when it stops half-way, and what the first one brought counts
	// for nothing.
	i, err := behind.Image(nil)
	require.NoError(t, err)
	all := mustReadAll(t, i)
	require.ErrorIs(t, q.v.Restore(broken(all[:len(all)/2])), errSource)
	require.LessOrEqual(t, q.have(t).ceiling(), uint64(12))
	require.Zero(t, q.have(t).lowest(0, lbaMax))
	i, err = behind.Image(q.v.Want())
	require.NoError(t, err)
	require.NoError(t, q.v.Restore(bytes.NewReader(mustReadAll(t, i))))
	require.False(t, q.v.Restoring())
	want, err := behind.Digest()
	require.NoError(t, err)
	got, err := q.v.Digest()
	require.NoError(t, err)
	require.Equal(t, want, got)
}

func TestImageOfOtherWants(t *testing.T) {
	p := newPair(t, 64<<10)
	items := func(w []byte) int {
		i, err := p.src.Image(w)
		require.NoError(t, err)
		n, err := readImage(mustReadAll(t, i))
		require.NoError(t, err)
		return n
	}
	require.Equal(t, 512+1, items(nil))
	require.Equal(t, 0, items(appendWant(nil, &want{damagedID, 16, wholly(16)})))
	require.Equal(t, 32, items(appendWant(nil, &want{damagedID, 15, wholly(15)})))
	require.Equal(t, 512+1, items([]byte{wantVersion + 1, 1, 2, 3}), "of a newer program")
	for name, w := range map[string][]byte{
		"malformed":      {wantVersion, 1, 2, 3},
		"another volume": appendWant(nil, &want{damagedID + 1, 1, wholly(1)}),
		"above ceiling":  appendWant(nil, &want{damagedID, 9, wholly(10)}),
		"from ahead":     appendWant(nil, &want{damagedID, 17, wholly(16)}),
	} {
		_, err := p.src.Image(w)
		require.ErrorIs(t, err, trivet.ErrInvalid, name)
	}
}

// What a disk must have room for is what the source has, not what was wiped.
func TestImageEstimates(t *testing.T) {
	p := newPair(t, 64<<10)
	size := func(w []byte) int64 {
		i, err := p.src.Image(w)
		require.NoError(t, err)
		defer func() { require.NoError(t, i.Close()) }()
		return i.Size()
	}
	require.NoError(t, p.e.db.Flush())
	require.InDelta(t, 512*trivet.BlockSize, size(nil), 100<<10)
	require.InDelta(t, 32*trivet.BlockSize, size(appendWant(nil, &want{damagedID, 15, wholly(15)})), 10<<10)
	b := p.src.NewBatch()
	require.NoError(t, b.Zero(0, 1<<30))
	st := p.src.State()
	st.AppliedIndex, st.SizeBytes = 17, 1<<42
	require.NoError(t, b.Commit(st))
	require.Less(t, size(p.v.Want()), int64(4<<20))
}
