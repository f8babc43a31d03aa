package engine

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"io"
	"sync"

	"github.com/cockroachdb/pebble/v2"

	"github.com/trivet-csi/trivet"
)

// Image is a pinned, consistent image of a volume as a stream, for Restore elsewhere (image_format.go).
// It carries the State of its own moment (H7), all generations of the blocks that are wanted, and
// checksums of everything. A damaged block ends it with ErrCorrupt, so that damage never spreads (H21). It
// holds disk space that the volume gives up meanwhile, so Close it soon. Read and Close may be called
// concurrently.
type Image struct {
	e      *Engine
	volume trivet.VolumeID
	state  State
	size   int64

	mu   sync.Mutex
	snap *pebble.Snapshot // nil after Close
	hold *hold            // of what it refers to
	it   *pebble.Iterator // at the first key not sent, when run is not empty
	out  partWriter
	buf  []byte // produced, not read yet
	end  error  // what Read returns after buf

	needed *blockCursor
	run    extent // what is left of the run that is being sent; its first block may be sent in part
	inside bool   // a version of run's first block is sent, another follows
	sent   bool   // all blocks are

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
	it, r, err := v.pinned(snap)
	if err != nil {
		return nil, errors.Join(err, toErr(snap.Close()))
	}
	i := &Image{
		e: v.e, volume: v.id, state: r.state, snap: snap, hold: hold, it: it, sum: newVersionHash(),
		blocks: blockReader{e: v.e},
	}
	if err := i.begin(v, &r, wanted); err != nil {
		return nil, errors.Join(closeIter(it, err), toErr(snap.Close()))
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
				i.e.noteDamage(i.end)
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
			i.it.SeekGE(appendBlockPrefix(i.out.key[:0], i.volume, next.lba))
		}
		if err := i.produceItem(); err != nil {
			return err
		}
	}
	i.buf = i.out.endBlocks(i.at())
	i.rangeLen += len(i.buf)
	return nil
}

// produceItem appends the next version of a block of the run, or the blocks up to it that have none.
func (i *Image) produceItem() error {
	next := i.run.end()
	if i.it.Valid() {
		bk, err := decodeBlockKey(i.it.Key())
		if err != nil {
			return err
		}
		next = min(next, bk.lba)
		if next == i.run.lba {
			return i.produceVersion(bk)
		}
	} else if err := i.it.Error(); err != nil {
		return toErr(err)
	}
	i.out.absent(i.run.lba, int64(next-i.run.lba))
	i.run = extent{next, int64(i.run.end() - next)}
	return nil
}

func (i *Image) produceVersion(bk blockKey) error {
	data, sum, err := i.blocks.at(i.it, bk)
	if err != nil {
		return err
	}
	i.out.version(bk, sum, data)
	i.sum.add(bk, data == nil, sum)
	i.versionN++
	i.it.Next()
	i.inside = false
	if i.it.Valid() {
		next, err := decodeBlockKey(i.it.Key())
		if err != nil {
			return err
		}
		i.inside = next.lba == bk.lba
	} else if err := i.it.Error(); err != nil {
		return toErr(err) // or an older version might be left out
	}
	if !i.inside {
		i.run.lba++
		i.run.n--
	}
	return nil
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
	_ = i.it.Close() // repeats what Read has told
	err := toErr(i.snap.Close())
	i.e.live.end(i.hold)
	i.snap, i.it, i.buf, i.end = nil, nil, nil, trivet.ErrClosed
	return err
}
