package engine

import (
	"bytes"
	"errors"
	"fmt"

	"github.com/cockroachdb/pebble/v2"

	"github.com/trivet-csi/trivet"
)

// Extent is a run of blocks, as Allocated and Delta list them.
type Extent struct {
	LBA    trivet.LBA
	BlockN int64
}

// One call of Allocated or Delta ends when it has looked at so many blocks, or found so many extents.
const (
	extentsLookN = 16 << 10
	extentsMaxN  = 1024
)

// Allocated lists, in order, the runs of blocks that hold data in a generation (Live, or one that a snapshot holds),
// among the blockN blocks from lba on. next is where to ask again: a call looks at no more than some thousand
// blocks that are stored, so it takes milliseconds. At lba+blockN all is listed. Extents of two calls may touch.
// ErrOutOfRange: beyond the size of the volume; ErrNotFound: no snapshot holds the generation; else as ReadAt. A block
// that was written with zeroes holds none.
func (v *Volume) Allocated(gen trivet.Generation, lba trivet.LBA, blockN int64) ([]Extent, trivet.LBA, error) {
	out, next, err := v.extents(lba, blockN, []trivet.Generation{gen}, func(w *walker) bool {
		return w.content(gen) != nil
	})
	if err != nil {
		return nil, lba, fmt.Errorf("allocated blocks of %s, generation %d, from %d: %w", v.id, gen, lba, err)
	}
	return out, next, nil
}

// Delta lists, in order, the runs of blocks in which a generation may hold something else than an earlier one did;
// else as Allocated. Nothing that differs is left out. A block that was written again with what it had is listed, and
// while a restored volume is flattened, blocks that only moved may be.
func (v *Volume) Delta(from, to trivet.Generation, lba trivet.LBA, blockN int64) ([]Extent, trivet.LBA, error) {
	out, next, err := v.extents(lba, blockN, []trivet.Generation{from, to}, func(w *walker) bool {
		a, b := w.content(from), w.content(to)
		return a != b && (a == nil || b == nil || !bytes.Equal(a.val, b.val))
	})
	if err != nil {
		return nil, lba, fmt.Errorf("changes of %s, generations %d to %d, from %d: %w", v.id, from, to, lba, err)
	}
	return out, next, nil
}

// content is what a generation shows of the block; nil: zeroes.
func (w *walker) content(gen trivet.Generation) *version {
	x := w.shown(gen)
	if x != nil && x.isTombstone() {
		return nil
	}
	return x
}

func (v *Volume) extents(lba trivet.LBA, blockN int64, gens []trivet.Generation, has func(*walker) bool) (
	out []Extent, next trivet.LBA, err error,
) {
	if lba >= lbaMax || blockN < 0 || blockN > lbaMax {
		return nil, lba, trivet.ErrOutOfRange
	}
	if err := trivet.CheckRange(int64(lba)*trivet.BlockSize, blockN*trivet.BlockSize, v.size.Load()); err != nil {
		return nil, lba, err
	}
	if err := v.e.enter(); err != nil {
		return nil, lba, err
	}
	defer v.e.exit()
	snap := v.e.db.NewSnapshot()
	defer func() { err = errors.Join(err, toErr(snap.Close())) }()
	end := lba + trivet.LBA(blockN)
	w, err := v.walkAt(snap, lba, end, gens...)
	if err != nil {
		return nil, lba, err
	}
	defer func() { err = w.close(err) }()
	for range extentsLookN {
		ok, err := w.next()
		switch k := len(out); {
		case err != nil:
			return nil, lba, err
		case !ok:
			return out, end, nil
		case !has(w):
		case k > 0 && out[k-1].LBA+trivet.LBA(out[k-1].BlockN) == w.lba:
			out[k-1].BlockN++
		case k == extentsMaxN:
			return out, w.lba, nil
		default:
			out = append(out, Extent{w.lba, 1})
		}
	}
	return out, w.lba + 1, nil
}

// walkAt is a walker over some of the volume's blocks, for one who looks at generations of it.
func (v *Volume) walkAt(snap *pebble.Snapshot, lba, end trivet.LBA, gens ...trivet.Generation) (*walker, error) {
	it, err := v.view(snap, &pebble.IterOptions{
		LowerBound: appendBlockPrefix(nil, v.id, lba), UpperBound: appendBlockPrefix(nil, v.id, end),
	})
	if err != nil {
		return nil, err
	}
	r, err := readRecord(snap, nil, v.id)
	if err == nil && r.restoring {
		err = fmt.Errorf("restore is not complete: %w", trivet.ErrUnavailable)
	}
	for _, gen := range gens {
		if err == nil {
			err = r.state.mayLookAt(gen)
		}
	}
	if err != nil {
		return nil, closeIter(it, err)
	}
	return walk(snap, v.id, r.layers, lba, end, it)
}

// mayLookAt returns ErrNotFound for a generation that is not kept.
func (s *State) mayLookAt(gen trivet.Generation) error {
	if gen == Live {
		return nil
	}
	if _, ok := s.snapshotAt(gen); !ok {
		return fmt.Errorf("no snapshot holds generation %d: %w", gen, trivet.ErrNotFound)
	}
	return nil
}
