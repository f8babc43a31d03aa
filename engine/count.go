package engine

import (
	"errors"
	"fmt"

	"github.com/cockroachdb/pebble/v2"

	"github.com/trivet-csi/trivet"
)

// referredAt returns where the block under the iterator stands in the log; the zero value when it stands in the store.
func referredAt(it *pebble.Iterator) (ref, error) {
	val, err := it.ValueAndErr()
	if err != nil {
		return ref{}, toErr(err)
	}
	if !isRef(val) {
		return ref{}, nil
	}
	bk, err := decodeBlockKey(it.Key())
	if err != nil {
		return ref{}, err
	}
	at, _, err := decodeRef(val, bk)
	return at, err
}

// eachRef calls f with every block between two keys that stands in the log, in the order of keys.
func (e *Engine) eachRef(lower, upper []byte, f func(bk blockKey, at ref) error) (err error) {
	it, err := e.db.NewIter(&pebble.IterOptions{LowerBound: lower, UpperBound: upper})
	if err != nil {
		return toErr(err)
	}
	defer func() { err = closeIter(it, err) }()
	for ok := it.First(); ok; ok = it.Next() {
		at, err := referredAt(it)
		if err != nil {
			return err
		}
		if at == (ref{}) {
			continue
		}
		bk, err := decodeBlockKey(it.Key())
		if err != nil {
			return err
		}
		if err := f(bk, at); err != nil {
			return err
		}
	}
	return toErr(it.Error())
}

// countAll makes the account of everything that the store refers to, and pins it. It reads the whole map: 0.4 µs a
// block
// (docs/decisions/0022). Where the map is damaged nobody knows what it refers to, so then every segment that there
// is stays, for good; the volumes that can be read work.
func (e *Engine) countAll() error {
	ids, err := e.volumes()
	if err != nil && !errors.Is(err, trivet.ErrCorrupt) {
		return err
	}
	damaged := err
	for _, id := range ids {
		if err := e.countVolume(id); err != nil {
			if !errors.Is(err, trivet.ErrCorrupt) {
				return err
			}
			damaged = errors.Join(damaged, fmt.Errorf("%s: %w", id, err))
		}
	}
	if damaged != nil {
		e.health.log.Error("the map is damaged: no segment of the log is given back until it is repaired and the engine "+
			"opened again", "err", damaged)
		e.live.keepAll()
	}
	return nil
}

func (e *Engine) countVolume(id trivet.VolumeID) error {
	r, recErr := readRecord(e.db, nil, id)
	if recErr != nil && !errors.Is(recErr, trivet.ErrCorrupt) && !errors.Is(recErr, trivet.ErrInvalid) {
		return recErr
	}
	usable := recErr == nil && !r.restoring
	v := &volLive{gen: r.state.Generation, whole: usable, pages: map[uint32]*livePage{}}
	lower, upper := volumeBlocks(id)
	err := e.eachRef(lower, upper, func(bk blockKey, at ref) error {
		s, err := e.live.found(at)
		if err != nil {
			return err
		}
		v.blockN++
		if usable && bk.gen == v.gen {
			v.swap(bk.lba, s.ord)
		} else {
			v.whole = false
		}
		return nil
	})
	v.whole = v.whole && err == nil
	e.live.mu.Lock()
	defer e.live.mu.Unlock()
	e.live.vols[id] = v
	return err
}

// found counts one reference of a volume that is being counted. A segment that the log has lost is remembered as such:
// what it had is damaged, as reads will tell.
func (l *live) found(at ref) (*segLive, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	s, err := l.segLocked(at.seg)
	if errors.Is(err, trivet.ErrNotFound) {
		s, err = l.addLocked(at.seg), nil
		s.lost = true
	}
	if err != nil {
		return nil, err
	}
	s.blockN++
	l.blockN++
	return s, nil
}

// countPages finds out anew, block by block, where the blocks of a volume stand whose counts are right, after a
// Restore has replaced them one by one. Nothing else changes the volume meanwhile.
func (e *Engine) countPages(id trivet.VolumeID, gen trivet.Generation) error {
	if e.live == nil {
		return nil
	}
	v := &volLive{gen: gen, whole: true, pages: map[uint32]*livePage{}}
	lower, upper := volumeBlocks(id)
	err := e.eachRef(lower, upper, func(bk blockKey, at ref) error {
		e.live.mu.Lock()
		s := e.live.segs[at.seg]
		e.live.mu.Unlock()
		if s == nil {
			return fmt.Errorf("block %d of %s refers to %v, which is not counted: %w", bk.lba, id, at.seg, trivet.ErrCorrupt)
		}
		if bk.gen == gen {
			v.swap(bk.lba, s.ord)
		} else {
			v.whole = false
		}
		return nil
	})
	if err == nil {
		e.live.setPages(id, v)
	}
	return err
}

// references returns all that a volume refers to, for its end; nil when live knows by itself. When the map cannot be
// read, nothing that it may refer to is given back any more. REQUIRES: nothing changes the volume meanwhile.
func (e *Engine) references(id trivet.VolumeID) []ref {
	if e.live == nil || e.live.isWhole(id) {
		return nil
	}
	gone := []ref{}
	lower, upper := volumeBlocks(id)
	err := e.eachRef(lower, upper, func(_ blockKey, at ref) error {
		gone = append(gone, at)
		return nil
	})
	if err != nil {
		e.health.log.Error("what a dropped volume refers to is not known: no segment of the log is given back", "volume", id,
			"err", err)
		e.live.keepAll()
	}
	return gone
}
