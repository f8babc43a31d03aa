package engine

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"io"
	"slices"
	"sync"

	"github.com/cockroachdb/pebble/v2"

	"github.com/trivet-csi/trivet"
)

// Image is a pinned, consistent image of a volume as a stream, for Restore elsewhere (image_format.go).
// It carries the State of its own moment (H7), what the volume and its snapshots show of the blocks
// that are wanted, and checksums of everything. A damaged block ends it with ErrCorrupt, so that damage never spreads
// (H21). It holds disk space that the volume gives up meanwhile, so Close it soon. Read and Close may be called
// concurrently.
type Image struct {
	e      *Engine
	volume trivet.VolumeID
	state  State
	size   int64

	mu   sync.Mutex
	snap *pebble.Snapshot // nil after Close
	hold *hold            // of what it refers to
	w    *walker          // at the first block of which nothing was sent, when run is not empty
	out  partWriter
	buf  []byte // produced, not read yet
	end  error  // what Read returns after buf

	needed *blockCursor
	run    extent              // what is left of the run that is being sent; its first block may be sent in part
	inside bool                // a version of run's first block is sent, another follows
	gens   []trivet.Generation // that the volume shows, newest first
	shown  []content           // of them
	all    []version           // of the walker's block that are to be sent, newest first
	items  []version           // what of all is not sent; none: it has nothing to send
	sent   bool                // all blocks are

	blocks    blockReader
	sum       *versionHash // of the versions since the last digest
	versionN  uint64
	rangeLen  int // bytes since the last digest
	lastRange bool
}

// Image pins an image that turns what a volume with that Want has into this one's content and State; nil
// wants everything. When the change journal does not reach back to an index that is wanted, or cannot
// be read, the blocks concerned are sent whole. ErrInvalid: the want is malformed, another volume's, or of
// a later index than this volume's. ErrUnavailable: Restoring. ErrNotFound: dropped.
func (v *Volume) Image(want []byte) (*Image, error) {
	i, err := v.image(want)
	if err != nil {
		return nil, fmt.Errorf("image of %s: %w", v.id, err)
	}
	return i, nil
}

func (v *Volume) image(wanted []byte) (_ *Image, err error) {
	if err := v.e.enter(); err != nil {
		return nil, err
	}
	defer v.e.exit()
	hold := v.e.live.hold() // before the snapshot
	defer func() {
		if err != nil {
			v.e.live.end(hold)
		}
	}()
	snap := v.e.db.NewSnapshot()
	w, r, err := v.pinnedWalk(snap)
	if err != nil {
		return nil, errors.Join(err, toErr(snap.Close()))
	}
	i := &Image{
		e: v.e, volume: v.id, state: r.state, snap: snap, hold: hold, w: w, sum: newVersionHash(),
		blocks: blockReader{e: v.e}, gens: r.state.shownGenerations(),
	}
	if err := i.begin(v, &r, wanted); err != nil {
		return nil, errors.Join(w.close(err), toErr(snap.Close()))
	}
	v.e.imagesMu.Lock()
	v.e.images[i] = struct{}{}
	v.e.imagesMu.Unlock()
	return i, nil
}

// begin finds out what is needed and makes the first part.
func (i *Image) begin(v *Volume, r *record, wanted []byte) error {
	have, err := v.wanted(wanted, r)
	if err != nil {
		return err
	}
	base, needed := i.difference(have, r)
	i.needed = needed.cursor()
	b := imageBegin{volume: v.id, base: base, record: record{replica: r.replica, state: r.state}}
	if b.estimateBytes, err = i.estimate(base, needed); err != nil {
		return err
	}
	i.size = int64(b.estimateBytes)
	i.buf = i.out.beginStream(&b)
	return nil
}

// wanted decodes a want of this volume and says what the other one has. Of a want that a newer program made,
// nothing is understood.
func (v *Volume) wanted(b []byte, r *record) (coverage, error) {
	if len(b) == 0 || b[0] > wantVersion {
		return wholly(0), nil
	}
	w, err := decodeWant(b)
	if err != nil {
		return nil, err
	}
	if w.volume != v.id || w.ceiling > r.state.AppliedIndex {
		return nil, fmt.Errorf("want of %s from index %d, have %s at %d: %w", w.volume, w.ceiling, v.id,
			r.state.AppliedIndex, trivet.ErrInvalid)
	}
	return w.have, nil
}

// difference returns what can be built on, of what the other volume has, and which blocks it needs then.
func (i *Image) difference(have coverage, r *record) (coverage, *BlockSet) {
	base, since := wholly(0), uint64(0)
	for k, s := range have {
		if s.index > 0 && s.index >= r.journal.floor {
			base = base.set(have.start(k), s.end, s.index)
			if since == 0 || s.index < since {
				since = s.index
			}
		}
	}
	needed := new(BlockSet)
	if since > 0 {
		err := readJournal(i.snap, i.volume, since, func(index uint64, x extent) { base.cut(x, index, needed.add) })
		if err != nil { // it only saves work
			base, needed = wholly(0), new(BlockSet)
		}
	}
	for k, s := range base {
		if s.index == 0 {
			needed.add(extent{base.start(k), int64(s.end - base.start(k))})
		}
	}
	return base, needed
}

// cut calls add with the parts of x that c claims below an index.
func (c coverage) cut(x extent, index uint64, add func(extent)) {
	for k, s := range c {
		from, to := max(x.lba, c.start(k)), min(x.end(), s.end)
		if from < to && s.index < index {
			add(extent{from, int64(to - from)})
		}
	}
}

// estimate is about how long the stream will be: from the index of the tables where all is sent, as if no
// block that changed had been discarded elsewhere, and never more than the source has, so that a
// wipe of a large volume is not taken for a large image.
func (i *Image) estimate(base coverage, needed *BlockSet) (uint64, error) {
	used := func(start, end trivet.LBA) (uint64, error) {
		lower, upper := appendBlockPrefix(nil, i.volume, start), appendBlockPrefix(nil, i.volume, end)
		n, err := i.e.db.EstimateDiskUsage(lower, upper)
		return n + uint64(i.e.live.blocksIn(i.volume, start, end))*imageVersionBytesMax, toErr(err)
	}
	n, all := uint64(0), int64(0)
	for k, s := range base {
		if s.index > 0 {
			continue
		}
		all += int64(s.end - base.start(k))
		bytes, err := used(base.start(k), s.end)
		if err != nil {
			return 0, err
		}
		n += bytes
	}
	changedN := min(needed.Len()-all, i.state.SizeBytes/trivet.BlockSize)
	has, err := used(0, lbaMax)
	if err != nil {
		return 0, err
	}
	has += i.e.db.Metrics().MemTable.Size
	return min(n+uint64(changedN)*imageVersionBytesMax, has), nil
}

// Size estimates the bytes of the whole stream, for progress.
func (i *Image) Size() int64 { return i.size }

// State that the image carries. The slices are the image's.
func (i *Image) State() State { return i.state }

// Read implements io.Reader. ErrCorrupt: a block is damaged, the stream is not complete. ErrClosed after
// Close, of the image or the engine.
func (i *Image) Read(p []byte) (n int, err error) {
	if err := i.e.enter(); err != nil {
		return 0, fmt.Errorf("read image of %s: %w", i.volume, err)
	}
	defer i.e.exit()
	i.mu.Lock()
	defer i.mu.Unlock()
	for n < len(p) {
		if len(i.buf) == 0 {
			if i.end == nil {
				i.end = i.produce()
			}
			if len(i.buf) == 0 {
				break
			}
		}
		c := copy(p[n:], i.buf)
		i.buf, n = i.buf[c:], n+c
	}
	if n > 0 || len(p) == 0 {
		return n, nil
	}
	if errors.Is(i.end, io.EOF) {
		return 0, io.EOF
	}
	return 0, fmt.Errorf("read image of %s: %w", i.volume, i.end)
}

// produce puts the next part into buf. It returns io.EOF with the last one.
func (i *Image) produce() error {
	switch {
	case i.snap == nil:
		return trivet.ErrClosed
	case i.lastRange:
		i.buf = i.out.end()
		return io.EOF
	case !i.inside && (i.sent || i.rangeLen >= i.e.imageRangeBytes):
		i.buf = i.out.digest(i.at(), i.versionN, i.sum.Sum(nil))
		i.sum.Reset()
		i.versionN, i.rangeLen, i.lastRange = 0, 0, i.sent
		return nil
	}
	return i.produceBlocks()
}

// at is one past the last block that is sent, or needs not be.
func (i *Image) at() trivet.LBA {
	if i.sent {
		return lbaMax
	}
	return i.run.lba
}

// produceBlocks makes one part of blocks. A run of absent blocks costs one item, however long.
func (i *Image) produceBlocks() error {
	i.out.beginBlocks()
	for i.out.len() < min(imagePartBytes, i.e.imageRangeBytes) {
		if i.run.n == 0 {
			next, ok := i.needed.next()
			if !ok {
				i.sent = true
				break
			}
			i.run = next
			if err := i.goTo(next.lba); err != nil {
				return err
			}
		}
		if err := i.produceItem(); err != nil {
			return err
		}
	}
	i.buf = i.out.endBlocks(i.at())
	i.rangeLen += len(i.buf)
	return nil
}

// goTo has the walker at the first block at or after one, of which something is to be sent.
func (i *Image) goTo(lba trivet.LBA) error {
	if err := i.w.seek(lba); err != nil {
		return err
	}
	return i.advance()
}

// advance goes to the next block of which something is to be sent.
func (i *Image) advance() error {
	for {
		ok, err := i.w.next() // at lbaMax without items, when there is none
		if err != nil {
			return err
		}
		if i.gather(); !ok || len(i.items) > 0 {
			return nil
		}
	}
}

// gather lists what is to be sent of the walker's block: what the volume and its snapshots show and no more, as
// versions that need no layers. A version keeps its generation where that says which of them show it.
func (i *Image) gather() {
	i.all, i.shown = i.all[:0], i.w.contents(i.shown[:0], i.gens)
	if k := len(i.shown); k > 0 && i.shown[k-1].x == nil { // nothing is what is shown without any version
		i.shown = i.shown[:k-1]
	}
	for k := range i.shown {
		c := &i.shown[k]
		older, first := trivet.Generation(0), k == len(i.shown)-1 && c.oldest == i.gens[len(i.gens)-1]
		if !first { // the newest generation that must not show it
			older = i.gens[slices.Index(i.gens, c.oldest)+1]
		}
		x := version{gen: min(c.oldest, i.state.Generation)}
		if c.x != nil {
			x.val = c.x.val
			if c.x != i.w.below && c.x.gen <= c.oldest && (first || c.x.gen > older) {
				x.gen = c.x.gen
			}
		}
		i.all = append(i.all, x)
	}
	i.items = i.all
}

// produceItem appends the next version of a block of the run, or the blocks up to it that have none.
func (i *Image) produceItem() error {
	next := i.run.end()
	if len(i.items) > 0 {
		if next = min(next, i.w.lba); next == i.run.lba {
			return i.produceVersion()
		}
	}
	i.out.absent(i.run.lba, int64(next-i.run.lba))
	i.run = extent{next, int64(i.run.end() - next)}
	return nil
}

func (i *Image) produceVersion() error {
	x := &i.items[0]
	var data []byte
	var err error
	sum := BlockSum(i.volume, i.w.lba, nil) // of nothing
	if x.val != nil {
		if data, sum, err = i.w.read(&i.blocks, x); err != nil {
			return err
		}
	}
	bk := blockKey{i.volume, i.w.lba, x.gen}
	i.out.version(bk, sum, data)
	i.sum.add(bk, data == nil, sum)
	i.versionN++
	i.items = i.items[1:]
	if i.inside = len(i.items) > 0; i.inside {
		return nil
	}
	i.run.lba++
	i.run.n--
	return i.advance()
}

// versionHash is the digest of versions of blocks: of each LBA (8), generation (4), 1 for a tombstone, else 0,
// and the checksum that the source has (4).
type versionHash struct {
	hash.Hash
	scratch [17]byte // here, or each call would allocate it
}

func newVersionHash() *versionHash { return &versionHash{Hash: sha256.New()} }

func (h *versionHash) add(bk blockKey, tombstone bool, sum uint32) {
	b := &h.scratch
	binary.BigEndian.PutUint64(b[:], uint64(bk.lba))
	binary.BigEndian.PutUint32(b[8:], uint32(bk.gen))
	b[12] = 0
	if tombstone {
		b[12] = 1
	}
	binary.BigEndian.PutUint32(b[13:], sum)
	h.Write(b[:]) //nolint:errcheck // a hash never fails
}

// Close unpins the image. Idempotent.
func (i *Image) Close() error {
	if err := i.e.enter(); err != nil {
		return nil // the engine's Close has unpinned it
	}
	defer i.e.exit()
	i.e.imagesMu.Lock()
	delete(i.e.images, i)
	i.e.imagesMu.Unlock()
	return i.unpin()
}

// unpin gives the snapshot back. REQUIRES: entered, or the engine's Close.
func (i *Image) unpin() error {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.snap == nil {
		return nil
	}
	_ = i.w.close(nil) // repeats what Read has told
	err := toErr(i.snap.Close())
	i.e.live.end(i.hold)
	i.snap, i.w, i.buf, i.end = nil, nil, nil, trivet.ErrClosed
	return err
}
