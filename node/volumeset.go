package node

import (
	"maps"
	"slices"
	"sync"

	"github.com/trivet-csi/trivet"
)

// volumeSet is a set of volumes that waits for one goroutine to look at them. The zero value must not be used.
type volumeSet struct {
	poked chan struct{} // capacity 1: something was added

	mu  sync.Mutex
	ids map[trivet.VolumeID]struct{}
}

func newVolumeSet() *volumeSet {
	return &volumeSet{poked: make(chan struct{}, 1), ids: make(map[trivet.VolumeID]struct{})}
}

func (s *volumeSet) add(id trivet.VolumeID) {
	s.mu.Lock()
	s.ids[id] = struct{}{}
	s.mu.Unlock()
	select {
	case s.poked <- struct{}{}:
	default: // it is going to be looked at anyway
	}
}

func (s *volumeSet) list() []trivet.VolumeID {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Sorted(maps.Keys(s.ids))
}

func (s *volumeSet) has(id trivet.VolumeID) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	_, ok := s.ids[id]
	return ok
}

func (s *volumeSet) done(id trivet.VolumeID) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.ids, id)
}
