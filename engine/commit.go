package engine

import (
	"fmt"
	"time"

	"github.com/cockroachdb/pebble/v2"
)

// apply commits a batch to memory. REQUIRES: entered.
func (e *Engine) apply(b *pebble.Batch) error {
	if err := e.health.check(); err != nil {
		return err
	}
	n := b.Len()
	if err := e.applyInTurn(b); err != nil {
		return toErr(err)
	}
	e.space.wrote(int64(n))
	e.committed.Add(1)
	return nil
}

// applyInTurn is db.Apply, one at a time.
//
// Pebble puts a batch into the memtable first and lets readers see it afterwards. A flush between the two keeps of two
// versions of a key the newer only, which nobody may see yet (v2.1.7: compactions ask for snapshots, not for the
// visible sequence number): a reader gets what stood there before both, though the older of the two was acknowledged
// and read. A memtable is flushed once another takes its place; so that happens only here and in rotate, when every
// batch is seen. For the same reason Pebble's own FlushDelayDeleteRange is off: see flushSoon.
func (e *Engine) applyInTurn(b *pebble.Batch) error {
	if err := e.takeTurn(); err != nil {
		return err
	}
	defer func() { <-e.turn }()
	if err := e.awaitLevel0(); err != nil {
		return err
	}
	return e.db.Apply(b, pebble.NoSync)
}

// takeTurn waits for the turn, which the caller gives back. An engine that has failed may never give it back.
func (e *Engine) takeTurn() error {
	select {
	case e.turn <- struct{}{}:
		return nil
	case <-e.health.failed:
		return e.health.check()
	}
}

// rotate begins the flush of all that was applied; done is closed at its end. db.Flush would wait for ever once the
// disk has failed: Pebble tries again without end.
func (e *Engine) rotate() (done <-chan struct{}, err error) {
	if err := e.takeTurn(); err != nil {
		return nil, err
	}
	defer func() { <-e.turn }()
	if err := e.awaitLevel0(); err != nil {
		return nil, err
	}
	return e.db.AsyncFlush()
}

// Flush makes every batch committed before the call durable. It costs nothing when they are. It
// returns the engine's failure, if that comes first; the batches may then be lost.
func (e *Engine) Flush() error {
	if err := e.enterWrite(); err != nil {
		return fmt.Errorf("flush engine: %w", err)
	}
	defer e.exit()
	if err := e.flush(); err != nil {
		return fmt.Errorf("flush engine: %w", err)
	}
	return nil
}

// flush is Flush. REQUIRES: entered, or Close.
func (e *Engine) flush() error {
	target := e.committed.Load()
	if e.flushed.Load() >= target {
		return nil
	}
	done, err := e.rotate()
	if err != nil {
		return toErr(err)
	}
	select {
	case <-done:
	case <-e.health.failed:
		return e.health.check()
	}
	for {
		old := e.flushed.Load()
		if old >= target || e.flushed.CompareAndSwap(old, target) {
			return nil
		}
	}
}

// flushSoon has what is committed now, and in the next moments, on disk within rangeDelFlush. Whoever adds a range
// deletion to a batch calls it: only once that is in a table do compactions give its space back.
func (e *Engine) flushSoon() {
	if !e.flushDue.CompareAndSwap(false, true) {
		return
	}
	time.AfterFunc(rangeDelFlush, func() {
		e.flushDue.Store(false)
		_ = e.Flush() // closed meanwhile, or failed: others are told
	})
}
