package driver

import (
	"fmt"
	"sync"

	"github.com/trivet-csi/trivet"
)

// inflight lets one call at a time work on a volume. The orchestrator is to call again when it
// hears ABORTED, so nobody queues here.
type inflight struct {
	mu   sync.Mutex
	keys map[string]struct{} // of the calls under way
}

func newInflight() *inflight { return &inflight{keys: make(map[string]struct{})} }

// start claims key, or returns ErrPending when a call holds it. The caller must call done when its
// work has ended, not merely when nobody waits for it any more.
func (f *inflight) start(key string) (done func(), err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if _, busy := f.keys[key]; busy {
		return nil, fmt.Errorf("another call works on %q: %w", key, trivet.ErrPending)
	}
	f.keys[key] = struct{}{}
	return func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		delete(f.keys, key)
	}, nil
}
