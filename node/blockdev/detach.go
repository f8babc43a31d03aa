package blockdev

import (
	"context"
	"fmt"
)

// ending is one run of detach or release. done is closed when it is over; then err is set.
type ending struct {
	done chan struct{}
	err  error
}

// Detach writes back what the kernel holds, flushes the Device, and removes the block device
// and all traces of it. It returns ErrInUse, and leaves everything working, while the device is
// mounted in any mount namespace, bound to a pod, or open. If writing back fails on a live
// attachment it returns that error and leaves the attachment for another try; a dead one (see
// Err) is removed regardless. A second Detach returns nil.
//
// ctx ends the wait only: the removal goes on, and the next Detach joins it.
func (a *Attachment) Detach(ctx context.Context) error {
	a.mu.Lock()
	if a.closed {
		a.mu.Unlock()
		return nil
	}
	e := a.ending
	if e == nil {
		e = a.endLocked(context.WithoutCancel(ctx), "detach", a.detach)
	}
	a.mu.Unlock()
	select {
	case <-e.done:
		return e.err
	case <-ctx.Done():
		return fmt.Errorf("detach %s: %w", a.name, context.Cause(ctx))
	}
}

// endLocked starts to end the attachment by do.
func (a *Attachment) endLocked(ctx context.Context, op string, do func(context.Context) error) *ending {
	e := &ending{done: make(chan struct{})}
	a.ending = e
	go func() {
		err := do(ctx)
		a.mu.Lock()
		defer a.mu.Unlock()
		a.closed = err == nil
		a.ending = nil
		if err != nil {
			e.err = fmt.Errorf("%s %s: %w", op, a.name, err)
		}
		close(e.done)
	}()
	return e
}

// detach runs alone. Each step may be repeated after an error in a later one.
func (a *Attachment) detach(ctx context.Context) error {
	if err := a.dev.detach(ctx); err != nil {
		return err
	}
	a.log.Info("detached", "device", a.Path())
	return a.folder.remove()
}
