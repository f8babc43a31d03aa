package cache

import (
	"context"
	"errors"
	"fmt"

	"github.com/trivet-csi/trivet"
)

// Close writes back what is dirty, as long as ctx allows, and stops. The file goes if nothing is left in it; else it
// stays for the next attachment, and Close returns why. After a fence nothing is left. Idempotent.
func (d *Device) Close(ctx context.Context) error { return d.shut(ctx, true, false) }

// Detach is Close for good: what could not be written back goes with the file, and the log says how much that was.
func (d *Device) Detach(ctx context.Context) error { return d.shut(ctx, true, true) }

// Abandon stops at once and leaves the file as it is for a successor, as the death of the process would.
func (d *Device) Abandon() error {
	ctx, cancel := context.WithCancel(d.life)
	cancel()
	return d.shut(ctx, false, false)
}

func (d *Device) shut(ctx context.Context, drain, remove bool) error {
	d.closes.Lock()
	defer d.closes.Unlock()
	d.mu.Lock()
	if d.closed {
		d.mu.Unlock()
		return nil
	}
	var why error
	if drain {
		why = d.writtenBackLocked(ctx, d.seq)
	}
	d.closed = true
	if d.err == nil {
		d.err = fmt.Errorf("cache of %s: %w", d.cfg.Volume, trivet.ErrClosed)
	}
	d.changed.fire()
	for d.activeN > 0 && d.waitLocked(ctx) == nil {
	}
	busy := d.activeN > 0
	d.mu.Unlock()

	d.end(trivet.ErrClosed)
	_ = d.group.Wait() // they return nil

	d.mu.Lock()
	defer d.mu.Unlock()
	left := 0
	var errs []error
	if d.t != nil {
		left = d.t.dirty.n + d.t.flyingN
		if d.fenced {
			left = 0
		}
		if !busy { // or the one that is still copying would fault; the memory goes with the process
			errs = append(errs, d.t.m.close())
			d.t = nil
		}
	}
	switch {
	case left > 0 && !remove:
		d.log.Warn("acknowledged writes stay in the cache for the next attachment",
			"bytes", int64(left)*trivet.BlockSize, "err", why)
		why = fmt.Errorf("close the cache of %s with %d dirty blocks: %w", d.cfg.Volume, left, reason(why))
	case left > 0:
		d.log.Error("dropping acknowledged writes that could not be written back before the volume was detached",
			"bytes", int64(left)*trivet.BlockSize, "err", why)
		why = fmt.Errorf("detach %s: %d blocks lost: %w", d.cfg.Volume, left, reason(why))
	default:
		why = nil
	}
	if d.lock != nil {
		if remove || left == 0 && drain {
			errs = append(errs, d.lock.Remove())
		} else {
			errs = append(errs, d.lock.Close())
		}
	}
	if !drain {
		why = nil
	}
	return errors.Join(append(errs, why)...)
}

func reason(err error) error {
	if err == nil {
		return trivet.ErrUnavailable
	}
	return err
}
