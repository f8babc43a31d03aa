package node

import (
	"context"
	"fmt"
	"sync"

	"github.com/trivet-csi/trivet"
)

// keyLock lets one operation at a time work on a volume and refuses the others, as CSI wants it:
// whoever is refused asks again.
type keyLock struct {
	mu   sync.Mutex
	held map[trivet.VolumeID]chan struct{} // closed when it is given free
}

// try returns the function that gives id free again, or ErrPending.
func (k *keyLock) try(id trivet.VolumeID) (func(), error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if _, busy := k.held[id]; busy {
		return nil, fmt.Errorf("another operation works on %s: %w", id, trivet.ErrPending)
	}
	if k.held == nil {
		k.held = make(map[trivet.VolumeID]chan struct{})
	}
	free := make(chan struct{})
	k.held[id] = free
	return func() {
		k.mu.Lock()
		defer k.mu.Unlock()
		delete(k.held, id)
		close(free)
	}, nil
}

// wait is try for who knows that the other operation is short: ErrPending not before ctx has ended.
func (k *keyLock) wait(ctx context.Context, id trivet.VolumeID) (func(), error) {
	for {
		k.mu.Lock()
		free := k.held[id]
		k.mu.Unlock()
		if free != nil {
			select {
			case <-free:
			case <-ctx.Done():
				return k.try(id)
			}
		}
		if unlock, err := k.try(id); err == nil || ctx.Err() != nil {
			return unlock, err
		}
	}
}
