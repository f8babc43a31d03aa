package engine

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/cockroachdb/pebble/v2"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/engine/segment"
)

// testSegmentBytes is small, so that tests fill, clean and recycle many segments.
const testSegmentBytes = 128 << 10

// WithLog gives an engine a log in a directory, formatted when there is none, which ends with the engine.
func WithLog(cfg *Config, dir segment.Dir) error {
	opts := segment.Options{
		Dir: dir, Disk: "6f1c0de0-1111-4222-8333-444455556666", Lanes: 1, DataLane: true, SegmentBytes: testSegmentBytes,
		CacheBytes: 1, Hold: true,
	}
	log, err := segment.Open(opts)
	if errors.Is(err, trivet.ErrNotFound) {
		if err = errors.Join(dir.Make(), segment.Format(opts)); err == nil {
			log, err = segment.Open(opts)
		}
	}
	cfg.Log, cfg.ownsLog = log, true
	return err
}

// WriteByLog appends whole blocks to the log, as entries of the volume's group, and has the batch refer to them
// there. So a
// test takes the way that a committed write takes. Without a log it is Write.
func WriteByLog(b *Batch, lba trivet.LBA, p []byte) error {
	log := b.v.e.log
	if log == nil || b.err != nil {
		return b.Write(lba, p)
	}
	g := log.Group(b.v.id)
	most := int(log.StoreBytesMax()/trivet.BlockSize) - 1
	for chunk := range slices.Chunk(p, most*trivet.BlockSize) {
		_, last := g.FirstLast()
		payload := slices.Clone(chunk) // the log keeps it
		if err := g.Append([]segment.Entry{{Index: last + 1, Term: 1, Payload: payload}}); err != nil {
			return err
		}
		at, err := g.Locate(last + 1)
		if err != nil {
			return err
		}
		err = b.Refer(lba, chunk, at, 0)
		log.Unpin(at.Segment)
		if err != nil {
			return err
		}
		lba += trivet.LBA(len(chunk) / trivet.BlockSize)
	}
	return nil
}

// TrimLog cuts the entries of a volume that WriteByLog made, all of them, whenever everything applied is durable
// (H1): so
// nothing but the engine's own pins keeps what it refers to.
func TrimLog(v *Volume) error {
	log := v.e.log
	if log == nil {
		return nil
	}
	g := log.Group(v.id)
	_, last := g.FirstLast()
	st, err := v.DurableState()
	if err != nil || st.AppliedIndex != v.State().AppliedIndex || last == 0 {
		return nil //nolint:nilerr // whoever commits next meets it
	}
	return g.TrimPrefix(last)
}

// Housekeep trims the log, and now and then cleans it, at moments that the applied index decides.
func Housekeep(v *Volume) error {
	if err := TrimLog(v); err != nil || v.e.live == nil || v.State().AppliedIndex%5 != 0 {
		return err
	}
	_, err := v.e.Clean()
	if v.e.health.check() == nil && !errors.Is(err, trivet.ErrClosed) {
		return err
	}
	return nil // whoever commits next meets it
}

// CheckLive compares the account of an engine at rest with what the store says, and sees that the log still has every
// segment that counts.
func CheckLive(e *Engine) error {
	l := e.live
	want := map[segment.ID]int64{}
	ids, err := e.volumes()
	if err != nil {
		return err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(ids) != len(l.vols) {
		return fmt.Errorf("%d volumes counted, there are %d", len(l.vols), len(ids))
	}
	for _, id := range ids {
		v, n, inPages := l.vols[id], int64(0), 0
		lower, upper := volumeBlocks(id)
		err := e.eachRef(lower, upper, func(bk blockKey, at ref) error {
			want[at.seg]++
			n++
			s := l.segs[at.seg]
			if ord := v.at(bk.lba); ord != 0 && bk.gen == v.gen {
				inPages++
				if s == nil || ord != s.ord {
					return fmt.Errorf("block %d of %s stands in %v, counted for %v", bk.lba, id, at.seg, l.byOrd[ord].id)
				}
			} else if v.whole {
				return fmt.Errorf("block %d of %s, generation %d, is not in its pages", bk.lba, id, bk.gen)
			}
			return nil
		})
		known := 0
		for _, p := range v.pages {
			known += p.n
		}
		if err != nil || n != v.blockN || known != inPages {
			return fmt.Errorf("%s: %d blocks in the log, %d counted; %d in pages, %d known: %w", id, n, v.blockN, inPages, known,
				err)
		}
	}
	for id, s := range l.segs {
		if s.blockN != want[id] || s.busy != 0 {
			return fmt.Errorf("%v: %d live blocks counted, %d are, %d claims", id, s.blockN, want[id], s.busy)
		}
		delete(want, id)
		if err := l.log.Pin(id); err != nil {
			return err
		}
		l.log.Unpin(id)
	}
	if len(want) > 0 {
		return fmt.Errorf("not counted at all: %v", want)
	}
	return nil
}

// LogOf returns the log of an engine.
func LogOf(e *Engine) *segment.Log { return e.log }

// SweepNow does all background work on generations.
func SweepNow(e *Engine) error { return e.Sweep(context.Background()) }

// SweepWhole sweeps all of a volume, whether it is owed or not.
func SweepWhole(v *Volume) error {
	v.owe(true, nil)
	return v.e.Sweep(context.Background())
}

// Versions counts the versions that the store has of all blocks of a volume, DataVersions those that are no tombstones.
func Versions(v *Volume) (n int, err error) {
	return countVersions(v, func(*pebble.Iterator) bool { return true })
}

// DataVersions: see Versions.
func DataVersions(v *Volume) (n int, err error) {
	return countVersions(v, func(it *pebble.Iterator) bool { return it.Value()[0] != kindTombstone })
}

func countVersions(v *Volume, which func(*pebble.Iterator) bool) (n int, err error) {
	lower, upper := volumeBlocks(v.id)
	it, err := v.e.db.NewIter(&pebble.IterOptions{LowerBound: lower, UpperBound: upper})
	if err != nil {
		return 0, err
	}
	for ok := it.First(); ok; ok = it.Next() {
		if which(it) {
			n++
		}
	}
	return n, it.Close()
}

// recordNow is the volume's record, which the background changes too.
func (v *Volume) recordNow() record {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.rec
}

// SweepOwed reports whether the volume's record says that a sweep is owed.
func SweepOwed(v *Volume) bool { return v.recordNow().sweep }

// SweepStep does one step of the background work on a volume.
func SweepStep(v *Volume) error {
	_, _, err := v.sweepSome()
	return err
}

// Dependants are the generations of a volume that lie beneath others.
func Dependants(e *Engine, id trivet.VolumeID) []trivet.Generation { return e.bases.of(nil, id) }

// Written is what was put into the store since it was opened: batches, and their bytes.
func Written(e *Engine) (batches, bytes int64) { return int64(e.committed.Load()), e.space.total() }

// StopSweeper ends the background work on generations; SweepNow does what it left.
func StopSweeper(e *Engine) { e.sweeper.stop() }
