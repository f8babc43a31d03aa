package engine

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
)

// logEntry is what one index of the model's log does.
type logEntry struct {
	ops   []stampOp
	state State
}

// stampOp gives blocks a stamp, or takes them away when it is 0.
type stampOp struct {
	extent
	stamp uint32
}

// catchup is a log and what it makes of the blocks, three sources that have applied parts of it, and a
// target that is brought up now by entries and now by images.
type catchup struct {
	t   *testing.T
	rng *rand.Rand
	log []logEntry // of index 1 on
	at  [][]uint32 // stamps by index

	sources []*stampReplica
	target  *stampReplica

	known   []uint64 // index that the target may claim, by block
	ceiling uint64

	moved, cuts, crashes int
}

// stampReplica is one engine with the volume.
type stampReplica struct {
	fs  *vfs.MemFS
	cfg Config
	e   *Engine
	v   *Volume

	batch map[uint64]uint64 // the index of the batch that an index was applied in: as exact as a journal is
}

const (
	catchupBlocks    = 96
	catchupBlocksMax = 160
)

func (c *catchup) open(fs *vfs.MemFS) *stampReplica {
	r := &stampReplica{fs: fs, cfg: damageConfig(fs), batch: map[uint64]uint64{}}
	r.cfg.imageRangeBytes = 1 << (13 + c.rng.IntN(6))
	if c.rng.IntN(3) == 0 {
		r.cfg.JournalBytes = 400 + c.rng.Int64N(2000)
	}
	r.e, r.v = mustStore(c.t, r.cfg, catchupBlocks)
	return r
}

func newCatchup(t *testing.T, seed uint64) *catchup {
	c := &catchup{t: t, rng: rand.New(rand.NewPCG(seed, 77)), at: [][]uint32{make([]uint32, catchupBlocksMax)}}
	for range 3 {
		c.sources = append(c.sources, c.open(vfs.NewCrashableMem()))
	}
	c.target = c.open(vfs.NewCrashableMem())
	c.known = make([]uint64, catchupBlocksMax)
	return c
}

func (c *catchup) close() {
	for _, r := range append(c.sources, c.target) {
		require.NoError(c.t, r.e.Close())
	}
}

// grow adds an entry to the log: writes, discards, wipes, resizes and new generations.
func (c *catchup) grow() {
	st := State{SizeBytes: catchupBlocks * trivet.BlockSize}
	if len(c.log) > 0 {
		st = c.log[len(c.log)-1].state.clone()
	}
	st.AppliedIndex = uint64(len(c.log) + 1)
	st.AppliedTerm = 1 + st.AppliedIndex/10
	st.Epoch = trivet.Epoch(st.AppliedIndex / 7)
	st.Session = fmt.Appendf(nil, "session %d", st.AppliedIndex)
	var ops []stampOp
	now := slices.Clone(c.at[len(c.at)-1])
	switch c.rng.IntN(40) {
	case 0:
		st.SizeBytes = min(st.SizeBytes+8*trivet.BlockSize, catchupBlocksMax*trivet.BlockSize)
	case 1:
		st.Generation++
	case 2:
		ops = append(ops, stampOp{extent{0, st.SizeBytes / trivet.BlockSize}, 0})
	default:
		for range 1 + c.rng.IntN(3) {
			n := 1 + c.rng.Int64N(6)
			op := stampOp{extent: extent{trivet.LBA(c.rng.Int64N(st.SizeBytes/trivet.BlockSize - n + 1)), n}}
			if c.rng.IntN(4) > 0 {
				op.stamp = c.rng.Uint32() | 1
			}
			ops = append(ops, op)
		}
	}
	for _, op := range ops {
		for i := range op.n {
			now[int64(op.lba)+i] = op.stamp
		}
	}
	c.log, c.at = append(c.log, logEntry{ops, st}), append(c.at, now)
}

// apply brings a replica n entries on, in batches of any size.
func (c *catchup) apply(r *stampReplica, n int) {
	at := int(r.v.State().AppliedIndex)
	end := min(at+n, len(c.log))
	for at < end {
		b := r.v.NewBatch()
		gen := r.v.State().Generation
		for more := true; more && at < end; at++ {
			for _, op := range c.log[at].ops {
				require.NoError(c.t, op.addTo(b))
			}
			// A batch belongs to the generation that it began in.
			more = c.rng.IntN(3) > 0 && c.log[at].state.Generation == gen
		}
		for i := int(r.v.State().AppliedIndex); i < at; i++ {
			r.batch[uint64(i)+1] = uint64(at)
		}
		require.NoError(c.t, b.Commit(c.log[at-1].state))
	}
	if c.rng.IntN(4) == 0 {
		require.NoError(c.t, r.e.Flush())
	}
}

func (op stampOp) addTo(b *Batch) error {
	if op.stamp == 0 {
		return b.Zero(op.lba, op.n)
	}
	var p []byte
	for i := range op.n {
		p = append(p, numbered(op.stamp, op.lba+trivet.LBA(i))...)
	}
	return b.Write(op.lba, p)
}

// needs is, by the model and the bounds of the source's journal, what an image must carry.
func (c *catchup) needs(src *stampReplica) (blocks, bytes int) {
	applied, floor := src.v.State().AppliedIndex, src.v.recordNow().journal.floor
	versions := src.versions(c.t)
	for lba := range catchupBlocksMax {
		need := c.known[lba] == 0 || c.known[lba] < floor
		for i := applied; i > 0 && src.batch[i] > c.known[lba] && !need; i-- {
			for _, op := range c.log[i-1].ops {
				need = need || op.contains(extent{trivet.LBA(lba), 1})
			}
		}
		if need {
			blocks++
			bytes += imageAbsentBytes + versions[lba]*imageVersionBytesMax
		}
	}
	return blocks, bytes
}

// versions counts the stored versions of each block.
func (r *stampReplica) versions(t *testing.T) []int {
	t.Helper()
	out := make([]int, catchupBlocksMax)
	for bk := range r.newest(t, false) {
		out[bk.lba]++
	}
	return out
}

// newest reads what the store has, past the check that the volume may be read: all versions, or the newest.
func (r *stampReplica) newest(t *testing.T, only bool) map[blockKey]uint32 {
	t.Helper()
	out := map[blockKey]uint32{}
	it, err := r.e.db.NewIter(nil)
	require.NoError(t, err)
	lower, _ := volumeBlocks(damagedID)
	last := trivet.LBA(lbaMax)
	for ok := it.SeekGE(lower); ok && it.Key()[0] == tableBlock; ok = it.Next() {
		bk, err := decodeBlockKey(it.Key())
		require.NoError(t, err)
		data, _, err := (&blockReader{e: r.e}).at(it, bk)
		require.NoError(t, err)
		if only && bk.lba == last {
			continue
		}
		last = bk.lba
		stamp := uint32(0)
		if data != nil {
			stamp = binary.BigEndian.Uint32(data)
		}
		out[bk] = stamp
	}
	require.NoError(t, it.Close())
	return out
}

// checkClaims: a block that is claimed as of an index has what it had there, or at an index up to the ceiling.
func (c *catchup) checkClaims() {
	w, err := decodeWant(c.target.v.Want())
	require.NoError(c.t, err)
	require.LessOrEqual(c.t, w.ceiling, c.ceiling)
	stamps := make([]uint32, catchupBlocksMax)
	for bk, stamp := range c.target.newest(c.t, true) {
		stamps[bk.lba] = stamp
	}
	for lba := range catchupBlocksMax {
		claim := w.have.lowest(trivet.LBA(lba), trivet.LBA(lba)+1)
		require.LessOrEqual(c.t, claim, c.known[lba], "block %d", lba)
		ok := claim == 0
		for i := claim; i <= w.ceiling && !ok; i++ {
			ok = c.at[i][lba] == stamps[lba]
		}
		require.True(c.t, ok, "block %d is claimed as of %d, ceiling %d, and has %x", lba, claim, w.ceiling, stamps[lba])
	}
}

// complete returns up to which block a stream that breaks off is complete, by its parts, and up to which it is
// by the digest before the last.
func complete(t *testing.T, b []byte) (to, digested trivet.LBA) {
	t.Helper()
	ir, err := newImageReader(bytes.NewReader(b))
	if err != nil {
		return 0, 0
	}
	last := trivet.LBA(0)
	for {
		p, err := ir.next()
		if err != nil {
			return to, digested
		}
		if to = max(to, p.to); p.kind == partDigest {
			digested, last = last, p.to
		}
	}
}

// catchUp restores the target from a source, whole or in part, and may crash after it.
func (c *catchup) catchUp(src *stampReplica) {
	img, err := src.v.Image(c.target.v.Want())
	applied := src.v.State().AppliedIndex
	if applied < c.ceiling {
		require.ErrorIs(c.t, err, trivet.ErrInvalid)
		return
	}
	require.NoError(c.t, err)
	needBlocks, needBytes := c.needs(src)
	c.apply(src, c.rng.IntN(3)) // must not show (H6, H7)
	stream := mustReadAll(c.t, img)
	overhead := 4096 + needBytes/src.cfg.imageRangeBytes*100
	require.LessOrEqual(c.t, len(stream), needBytes+overhead, "%d blocks are needed", needBlocks)
	if c.rng.IntN(3) == 0 {
		c.moved += len(stream)
		require.NoError(c.t, c.target.v.Restore(iotestReader(c.rng, bytes.NewReader(stream))))
		c.restored(applied)
		return
	}
	cut := c.rng.IntN(len(stream) + 1)
	c.moved += cut
	c.cuts++
	require.ErrorIs(c.t, c.target.v.Restore(broken(stream[:cut])), errSource)
	to, digested := complete(c.t, stream[:cut])
	if _, err := newImageReader(bytes.NewReader(stream[:cut])); err != nil {
		return // it has not begun
	}
	before := slices.Clone(c.known)
	c.ceiling = applied
	for lba := range min(int(to), catchupBlocksMax) {
		c.known[lba] = applied
	}
	c.requireKnown()
	if c.rng.IntN(2) == 0 {
		c.crash(before, applied, digested)
	}
}

// restored: the target is at an index.
func (c *catchup) restored(applied uint64) {
	c.ceiling = applied
	for i := range c.known {
		c.known[i] = applied
	}
	c.requireKnown()
	for lba, want := range c.at[applied][:c.log[applied-1].state.SizeBytes/trivet.BlockSize] {
		p := make([]byte, trivet.BlockSize)
		require.NoError(c.t, c.target.v.ReadAt(p, trivet.LBA(lba)))
		require.Equal(c.t, want, binary.BigEndian.Uint32(p), "block %d at %d", lba, applied)
	}
}

// requireKnown: the target claims all that it may, unless there is too much to tell.
func (c *catchup) requireKnown() {
	c.t.Helper()
	have := covered(c.target.v)
	if len(have) >= coverageSpansMax-1 {
		return
	}
	for lba, want := range c.known {
		require.Equal(c.t, want, have.lowest(trivet.LBA(lba), trivet.LBA(lba)+1), "block %d of %v", lba, have)
	}
}

// covered is what a volume claims to have; the sweeper may be at work on it.
func covered(v *Volume) coverage {
	r := v.recordNow()
	return r.covers()
}

// crash loses what was not synced of the target. When it breaks into a Restore, what was verified and flushed stays
// claimed.
func (c *catchup) crash(before []uint64, applied uint64, digested trivet.LBA) {
	c.crashes++
	r := c.target
	old := covered(r.v)
	r.cfg.FS = r.fs.CrashClone(vfs.CrashCloneCfg{UnsyncedDataPercent: c.rng.IntN(101), RNG: c.rng})
	require.NoError(c.t, r.e.Close())
	r.fs = r.cfg.FS.(*vfs.MemFS) //nolint:forcetypeassert // of CrashClone
	r.e, r.v = mustStore(c.t, r.cfg, catchupBlocks)
	have := covered(r.v)
	require.True(c.t, old.covers(have), "%v after %v", have, old)
	for lba := range c.known {
		now := have.lowest(trivet.LBA(lba), trivet.LBA(lba)+1)
		if lba < int(digested) && len(have) < coverageSpansMax-1 {
			require.Equal(c.t, applied, now, "block %d", lba)
		} else if before != nil && len(have) < coverageSpansMax-1 {
			require.GreaterOrEqual(c.t, now, before[lba], "block %d", lba)
		}
		c.known[lba] = now
	}
	if !r.v.Restoring() {
		c.ceiling = r.v.State().AppliedIndex
	}
}

// iotestReader returns as much as it likes each time.
func iotestReader(rng *rand.Rand, r io.Reader) io.Reader { return &anyReader{rng, r} }

type anyReader struct {
	rng *rand.Rand
	r   io.Reader
}

func (a *anyReader) Read(p []byte) (int, error) {
	return a.r.Read(p[:min(len(p), 1+a.rng.IntN(9000))])
}

// TestCatchUp: any interleaving of entries, crashes and images from any source, broken off anywhere, moves no
// more than what changed plus what a lost journal forces, claims nothing that is not so, and ends with equal
// digests.
func TestCatchUp(t *testing.T) {
	seeds, steps := uint64(6), 120
	if testing.Short() {
		seeds = 3
	}
	for seed := range seeds {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			c := newCatchup(t, seed)
			defer c.close()
			// How much of the chance a step uses up hangs on what a crash leaves, so a seed is not the same each time: it
			// goes on until it has shown something.
			few := func() bool { return c.cuts <= 10 || c.crashes <= 5 }
			for i := 0; i < steps || few() && i < 10*steps; i++ {
				c.step()
				c.checkClaims()
			}
			require.False(t, few(), "%d interruptions, %d crashes: the test is void", c.cuts, c.crashes)
			src := c.sources[0]
			c.grow()
			c.apply(src, len(c.log))
			img, err := src.v.Image(c.target.v.Want())
			require.NoError(t, err)
			require.NoError(t, c.target.v.Restore(img))
			require.NoError(t, img.Close())
			a, err := src.v.Digest()
			require.NoError(t, err)
			b, err := c.target.v.Digest()
			require.NoError(t, err)
			require.Equal(t, a, b)
			t.Logf("%d bytes moved, %d interruptions, %d crashes", c.moved, c.cuts, c.crashes)
		})
	}
}

func (c *catchup) step() {
	switch k := c.rng.IntN(10); {
	case k < 4:
		for range 1 + c.rng.IntN(5) {
			c.grow()
		}
		for _, r := range c.sources {
			c.apply(r, c.rng.IntN(12))
		}
	case k < 6 && !c.target.v.Restoring():
		c.apply(c.target, c.rng.IntN(6))
		c.ceiling = c.target.v.State().AppliedIndex
		for i := range c.known {
			c.known[i] = c.ceiling
		}
	case k < 7:
		c.crash(nil, 0, 0)
	case k < 8 && !c.target.v.Restoring(): // what was restored is a source like any other
		i := c.rng.IntN(len(c.sources))
		c.target, c.sources[i] = c.sources[i], c.target
		c.ceiling = c.target.v.State().AppliedIndex
		for i := range c.known {
			c.known[i] = c.ceiling
		}
	default:
		c.catchUp(c.sources[c.rng.IntN(len(c.sources))])
	}
}

// All generations of a block arrive, also when they are more than one part holds, and replace all that was there.
func TestImageCarriesAllGenerations(t *testing.T) {
	c := newCatchup(t, 1)
	defer c.close()
	src := c.sources[0]
	src.e.imageRangeBytes = trivet.BlockSize // so that each version is a part
	for gen := range trivet.Generation(4) {
		require.NoError(t, writeNumbered(src.v, uint32(10+gen), 5, 3))
		st := src.v.State()
		st.Generation = gen + 1
		st.Snapshots = append(st.Snapshots, Snapshot{uint64(gen), gen})
		require.NoError(t, src.v.NewBatch().Commit(st))
		require.NoError(t, writeNumbered(c.target.v, uint32(90+gen), trivet.LBA(4+gen), 2))
		st = c.target.v.State()
		st.Generation = 2 * (gen + 1)
		require.NoError(t, c.target.v.NewBatch().Commit(st))
	}
	require.NoError(t, writeNumbered(src.v, 14, 0, 1)) // or the live state would have nothing new
	want := src.newest(t, false)
	require.Len(t, want, 13)
	img, err := src.v.Image(nil)
	require.NoError(t, err)
	require.NoError(t, c.target.v.Restore(img))
	require.NoError(t, img.Close())
	require.Equal(t, want, c.target.newest(t, false))
}
