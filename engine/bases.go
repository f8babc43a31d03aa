package engine

import (
	"sync"

	"github.com/trivet-csi/trivet"
)

// bases counts, for the volumes of a disk, which of their generations lie beneath others. These are kept whatever the
// State says. It is made from the records by Open.
type bases struct {
	mu sync.Mutex
	n  map[Base]int
}

// add counts the volumes beneath a volume, or, with -1, counts them off. It returns those that lie beneath nothing
// more.
func (b *bases) add(id trivet.VolumeID, layers []layer, n int) (free []trivet.VolumeID) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, l := range layers {
		if l.base.Volume == id {
			continue // its own business
		}
		if b.n[l.base] += n; b.n[l.base] == 0 {
			delete(b.n, l.base)
			free = append(free, l.base.Volume)
		}
	}
	return free
}

// of appends the generations of a volume that lie beneath others.
func (b *bases) of(gens []trivet.Generation, id trivet.VolumeID) []trivet.Generation {
	b.mu.Lock()
	defer b.mu.Unlock()
	for base := range b.n {
		if base.Volume == id {
			gens = append(gens, base.Generation)
		}
	}
	return gens
}

// openBases counts what lies beneath what, and has swept and flattened what was not before the engine closed.
func (e *Engine) openBases() error {
	ids, err := e.volumes()
	if err != nil && !errIsGone(err) {
		return err
	}
	for _, id := range ids { // a record that is damaged says nothing, and its volume cannot be opened
		if r, err := readRecord(e.db, nil, id); err == nil {
			e.bases.add(id, r.layers, 1)
			if r.sweep || len(r.layers) > 0 {
				e.sweeper.owed(id)
			}
		}
	}
	return nil
}
