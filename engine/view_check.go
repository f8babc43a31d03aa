package engine

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"slices"

	"github.com/trivet-csi/trivet"
)

// Checked is what Check found.
type Checked struct {
	// State is SHA-256 over the volume's State, Blocks over LBA and checksum of each block of the run that reads as
	// other than never written, and Older over what the snapshots show of it, and no more than they. All are the same on
	// all replicas at the same index, whatever these have swept or flattened.
	State, Blocks, Older [32]byte
	BlockN               int64      // versions of blocks, of all generations, whose data were read
	Bad                  []BadBlock // of them, those that are not what the map says
}

// Check reads every version of every block of the run that somebody may look at, in the volume, in its snapshots or in
// a clone of one that was deleted, and compares it with the checksum that the map has for it: so bits that have flipped
// where nobody reads are found. Of a volume that lies upon another one, or was set back, it reads what shows through.
// Digests are made of the map's checksums: damaged data do not change them. turn, when not nil, is called before each
// piece is read, with its bytes at most; its error ends Check. ErrCorrupt: the map itself is damaged. ErrClosed: the
// view is. ErrUnavailable: the volume beneath is being restored.
func (w *View) Check(ctx context.Context, turn func(ctx context.Context, bytes int64) error) (Checked, error) {
	c := checker{
		w: w, blocks: blockReader{e: w.v.e}, gens: w.state.shownGenerations(), sums: sha256.New(), older: sha256.New(),
		next: w.run.lba,
	}
	for !c.done {
		if err := ctx.Err(); err != nil {
			return Checked{}, err
		}
		if turn != nil {
			if err := turn(ctx, viewPieceN*trivet.BlockSize); err != nil {
				return Checked{}, err
			}
		}
		if err := c.piece(); err != nil {
			return Checked{}, fmt.Errorf("check %d blocks at %d of %s: %w", w.run.n, w.run.lba, w.v.id, err)
		}
	}
	if err := c.followMoved(ctx, turn); err != nil {
		return Checked{}, fmt.Errorf("check moved blocks of %s: %w", w.v.id, err)
	}
	h := sha256.New()
	hashState(h, &w.state)
	c.out.State, c.out.Blocks = [32]byte(h.Sum(nil)), [32]byte(c.sums.Sum(nil))
	c.out.Older = [32]byte(c.older.Sum(nil))
	return c.out, nil
}

// movedTries is how often Check looks for blocks that cleaning has moved while it looked for others. What is moved
// after that was read, and written anew, seconds ago.
const movedTries = 3

// followMoved reads what cleaning has put elsewhere since the view was taken once more, where it stands now: the places
// that the view has are about to be given up, and nobody has read the new ones.
func (c *checker) followMoved(ctx context.Context, turn func(ctx context.Context, bytes int64) error) error {
	for range movedTries {
		xs := c.w.takeMoved()
		if len(xs) == 0 {
			return nil
		}
		for _, x := range xs {
			for n := int64(0); n < x.n; n += viewPieceN {
				piece := min(viewPieceN, x.n-n)
				if turn != nil {
					if err := turn(ctx, piece*trivet.BlockSize); err != nil {
						return err
					}
				}
				bad, err := c.w.v.damaged(x.lba+trivet.LBA(n), piece)
				if err != nil {
					return err
				}
				c.addBad(bad)
			}
		}
	}
	return nil
}

// addBad adds damaged blocks, which take the places of those that were found where the view has them.
func (c *checker) addBad(bad []BadBlock) {
	for _, b := range bad {
		i := slices.IndexFunc(c.out.Bad, func(x BadBlock) bool { return x.BlockVersion == b.BlockVersion })
		if i < 0 {
			c.out.Bad = append(c.out.Bad, b)
		} else {
			c.out.Bad[i] = b
		}
	}
}

// checker is a Check under way.
type checker struct {
	w           *View
	blocks      blockReader
	gens        []trivet.Generation // that the volume shows
	sums, older hash.Hash
	out         Checked
	next        trivet.LBA // block to go on at
	done        bool

	shown []content // buffers
	buf   []byte
}

// walk opens a walker over the run from a block on. REQUIRES: entered; w.mu.
func (w *View) walk(lba trivet.LBA) (*walker, error) {
	if w.snap == nil {
		return nil, trivet.ErrClosed
	}
	return walk(w.snap, w.v.id, w.layers, max(lba, w.run.lba), w.run.end(), nil)
}

// piece checks the next viewPieceN versions, and those of the block that they end in.
func (c *checker) piece() (err error) {
	if err := c.w.v.e.enter(); err != nil {
		return err
	}
	defer c.w.v.e.exit()
	c.w.mu.Lock() // the view stays open; others wait for a piece
	defer c.w.mu.Unlock()
	at, err := c.w.walk(c.next)
	if err != nil {
		return err
	}
	defer func() { err = at.close(err) }()
	for n := 0; n < viewPieceN; n += max(len(at.vs), 1) {
		ok, err := at.next()
		if err != nil {
			return err
		}
		if !ok {
			c.done = true
			return nil
		}
		if err := c.block(at); err != nil {
			return err
		}
		c.next = at.lba + 1
	}
	return nil
}

// block checks what is shown of the walker's block.
func (c *checker) block(at *walker) error {
	c.shown = at.contents(c.shown[:0], c.w.asked)
	for i := range c.shown {
		x := c.shown[i].x
		again := slices.ContainsFunc(c.shown[:i], func(y content) bool { return y.x == x }) // rollbacks show one twice
		if x == nil || len(c.w.layers) > 0 && again {
			continue
		}
		if err := c.version(at, x); err != nil {
			return err
		}
	}
	if err := c.hash(c.sums, at, c.gens[:1]); err != nil {
		return err
	}
	return c.hash(c.older, at, c.gens[1:])
}

// hash adds what generations show of the walker's block to a digest.
func (c *checker) hash(h hash.Hash, at *walker, gens []trivet.Generation) (err error) {
	c.shown = at.contents(c.shown[:0], gens)
	if c.buf, err = appendShown(c.buf[:0], at.lba, c.shown, at.sumOf); err == nil {
		h.Write(c.buf) //nolint:errcheck // a hash never fails
	}
	return err
}

// version checks one version of the walker's block.
func (c *checker) version(at *walker, x *version) error {
	sum, err := at.sumOf(x)
	if err != nil {
		return err
	}
	c.out.BlockN++
	switch _, _, err := at.read(&c.blocks, x); {
	case err == nil:
		return nil
	case !errors.Is(err, trivet.ErrCorrupt):
		return err
	}
	if x == at.below {
		// The other volume has its own repaired. This one is given a version, as flattening would, at the first generation.
		c.out.Bad = append(c.out.Bad, BadBlock{BlockVersion: BlockVersion{at.lba, c.w.layers[0].from, sum}, view: c.w})
		return nil
	}
	c.out.Bad = append(c.out.Bad, newBadBlock(blockKey{at.id, at.lba, x.gen}, sum, x.val))
	return nil
}

// sumOf returns the checksum of a version of the block, which is data.
func (w *walker) sumOf(x *version) (uint32, error) {
	sum, _, err := sumOf(x.val, blockKey{w.id, w.lba, x.gen})
	return sum, err
}

// BlockVersion is what the map says of a block.
type BlockVersion struct {
	LBA        trivet.LBA
	Generation trivet.Generation
	Sum        uint32 // BlockSum of its data
}

// Versions lists what the volume shows of up to blockN blocks of the run that read as other than never written, from
// lba on, and says where to go on; the end of the run when there is no more. Nothing of the data is read.
func (w *View) Versions(lba trivet.LBA, blockN int) (out []BlockVersion, next trivet.LBA, err error) {
	out, next, err = w.versions(lba, blockN)
	if err != nil {
		return nil, 0, fmt.Errorf("list blocks of %s: %w", w.v.id, err)
	}
	return out, next, nil
}

func (w *View) versions(lba trivet.LBA, blockN int) (out []BlockVersion, next trivet.LBA, err error) {
	if err := w.v.e.enter(); err != nil {
		return nil, 0, err
	}
	defer w.v.e.exit()
	w.mu.Lock()
	defer w.mu.Unlock()
	at, err := w.walk(lba)
	if err != nil {
		return nil, 0, err
	}
	defer func() { err = at.close(err) }()
	for {
		ok, err := at.next()
		switch {
		case err != nil:
			return nil, 0, err
		case !ok:
			return out, w.run.end(), nil
		case len(out) >= blockN:
			return out, at.lba, nil
		}
		x := at.content(Live)
		if x == nil {
			continue
		}
		sum, err := at.sumOf(x)
		if err != nil {
			return nil, 0, err
		}
		out = append(out, BlockVersion{at.lba, x.gen, sum})
	}
}

// sumOf returns the checksum that a value says its block has, and whether it has data at all.
func sumOf(val []byte, bk blockKey) (sum uint32, isData bool, err error) {
	switch {
	case isRef(val):
		_, sum, err = decodeRef(val, bk)
		return sum, true, err
	case len(val) == dataValueBytes && val[0] == kindData:
		return binary.BigEndian.Uint32(val[1:]), true, nil
	}
	_, sum, err = decodeValue(val, appendBlockKey(nil, bk.volume, bk.lba, bk.gen), bk)
	return sum, false, err
}

// RunOf returns how many blocks from lba on hold up to versionN versions of blocks, those that show through from
// beneath included, and whether the run is the last: then it has everything there can be from lba on, and is as long. A
// run is of one block at least.
func (v *Volume) RunOf(lba trivet.LBA, versionN int) (blockN int64, last bool, err error) {
	blockN, last, err = v.runOf(lba, versionN)
	if err != nil {
		return 0, false, fmt.Errorf("run at %d of %s: %w", lba, v.id, err)
	}
	return blockN, last, nil
}

func (v *Volume) runOf(lba trivet.LBA, versionN int) (blockN int64, last bool, err error) {
	if lba >= lbaMax {
		return 0, false, trivet.ErrOutOfRange
	}
	if err := v.e.enter(); err != nil {
		return 0, false, err
	}
	defer v.e.exit()
	snap := v.e.db.NewSnapshot()
	defer func() { err = errors.Join(err, toErr(snap.Close())) }()
	w, err := v.walkAt(snap, lba, lbaMax)
	if err != nil {
		return 0, false, err
	}
	defer func() { err = w.close(err) }()
	for n := 0; ; {
		ok, err := w.next()
		if err != nil {
			return 0, false, err
		}
		if !ok {
			return int64(lbaMax - lba), true, nil
		}
		if n += max(len(w.vs), 1); n > versionN && w.lba > lba {
			return int64(w.lba - lba), false, nil
		}
	}
}
