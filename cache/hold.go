package cache

import (
	"context"
	"fmt"
	"sync"
	"time"
)

// Drain writes everything back, holds writes, discards and write-zeroes from then on, writes back the rest, and
// flushes. What is below is then all that was ever acknowledged, until release is called. An error leaves nothing held.
func (d *Device) Drain(ctx context.Context) (release func(), err error) {
	if err := d.drain(ctx); err != nil { // most of it, while writes go on
		return nil, err
	}
	let, err := d.Hold(ctx)
	if err != nil {
		return nil, err
	}
	return func() { let() }, nil
}

// Hold is Drain for whoever has drained just now: writes are held from the start. release may be called twice, and
// returns for how long they were held.
func (d *Device) Hold(ctx context.Context) (release func() time.Duration, err error) {
	start := d.now()
	d.mu.Lock()
	d.holdN++
	for d.activeN > 0 && err == nil {
		err = d.waitLocked(ctx)
	}
	d.mu.Unlock()
	if err == nil {
		err = d.drain(ctx)
	}
	if err == nil {
		err = d.next.Flush(ctx)
	}
	var once sync.Once
	var held time.Duration
	release = func() time.Duration {
		once.Do(func() {
			d.mu.Lock()
			d.holdN--
			d.changed.fire()
			d.mu.Unlock()
			held = d.now() - start
		})
		return held
	}
	if err != nil {
		release()
		return nil, fmt.Errorf("drain the cache of %s: %w", d.cfg.Volume, err)
	}
	return release, nil
}

// drain waits until all that is acknowledged at the moment is below.
func (d *Device) drain(ctx context.Context) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.writtenBackLocked(ctx, d.seq)
}
