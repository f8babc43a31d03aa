package cache

import (
	"context"
	"fmt"

	"github.com/trivet-csi/trivet"
)

// Settings returns the settings in force.
func (d *Device) Settings() Settings {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.set
}

// HasFile reports whether the Device can be writeBack.
func (d *Device) HasFile() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.lock != nil
}

// Lost returns why the Device fails: fenced, or a lost write-back; nil while it is well.
func (d *Device) Lost() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.err
}

// Set changes the settings while I/O goes on. A change of Bytes drains the cache and holds writes meanwhile. It
// returns when the change is in force: after a switch away from writeBack, that is once nothing is dirty.
func (d *Device) Set(ctx context.Context, s Settings) error {
	if err := s.Validate(); err != nil {
		return err
	}
	d.closes.Lock()
	defer d.closes.Unlock()
	d.mu.Lock()
	old := d.set
	if d.err != nil {
		defer d.mu.Unlock()
		return d.err
	}
	slotN := 0
	if d.t != nil {
		slotN = d.t.m.slotN
	}
	if slotN == s.slots() {
		defer d.mu.Unlock()
		return d.setLocked(ctx, old, s)
	}
	d.mu.Unlock()
	return d.replace(ctx, s, nil)
}

// UseFile gives a Device without a file one, so that it can be writeBack. l must have been adopted at the Device's
// epoch; what is in it is dropped. It belongs to the Device, unless there is an error. Reads lose their cached blocks.
func (d *Device) UseFile(ctx context.Context, l *Locked) error {
	d.closes.Lock()
	defer d.closes.Unlock()
	if d.lock != nil {
		return fmt.Errorf("cache of %s has a file: %w", d.cfg.Volume, trivet.ErrExists)
	}
	d.mu.Lock()
	set := d.set
	d.mu.Unlock()
	return d.replace(ctx, set, func() { d.lock = l })
}

func (d *Device) setLocked(ctx context.Context, old, s Settings) error {
	if d.t != nil && old.Eviction != s.Eviction {
		if err := d.t.setPolicy(s.Eviction); err != nil {
			return err
		}
	}
	d.set = s
	if d.t != nil {
		d.t.dirty.byRegion(s.Order == OrderFair)
	}
	d.adaptLocked()
	if d.t != nil && (s.NoClean || s.Mode == WriteAround) && !old.NoClean {
		d.t.dropAllClean()
	}
	if old.Mode == WriteBack && s.Mode != WriteBack {
		return d.writtenBackLocked(ctx, d.seq)
	}
	return nil
}

// replace puts another table in place, empty. first runs while nothing uses either.
func (d *Device) replace(ctx context.Context, s Settings, first func()) error {
	release, err := d.Drain(ctx)
	if err != nil {
		return err
	}
	defer release()
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.err != nil {
		return d.err
	}
	old, lock := d.t, d.lock
	if old != nil {
		if err := old.m.close(); err != nil {
			return err
		}
	}
	d.t = nil
	if first != nil {
		first()
	}
	if err := d.begin(s); err != nil { // without memory: everything passes through, which is safe
		d.lock = lock
		return fmt.Errorf("give the cache of %s %d bytes: %w", d.cfg.Volume, s.Bytes, err)
	}
	d.set = s
	d.adaptLocked()
	return nil
}
