package node

import (
	"fmt"
	"sync"

	"github.com/trivet-csi/trivet"
)

// keyLock lets one operation at a time work on a volume and refuses the others, as CSI wants it:
// whoever is refused asks again.
type keyLock struct {
	mu   sync.Mutex
	held map[trivet.VolumeID]struct{}
}

// try returns the function that gives id free again, or ErrPending.
func (k *keyLock) try(id trivet.VolumeID) (func(), error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if _, busy := k.held[id]; busy {
		return nil, fmt.Errorf("another operation works on %s: %w", id, trivet.ErrPending)
	}
	if k.held == nil {
		k.held = make(map[trivet.VolumeID]struct{})
	}
	k.held[id] = struct{}{}
	return func() {
		k.mu.Lock()
		defer k.mu.Unlock()
		delete(k.held, id)
	}, nil
}
