package raftgroup

import (
	"context"
	"fmt"
	"sync"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/engine/segment"
	"github.com/trivet-csi/trivet/internal/stage"
)

// Durability at message boundaries (Config.OverlapFlush).
//
// The library flushes a leader's log before it sends anything, so that a write waits for two disks one
// after the other. With OverlapFlush, StoreLogs returns once the entries are queued in the log, and the library
// believes that they are on disk. That belief is held back wherever it would leave the process, until the disk
// has caught up. These places are the gates; docs/models shows that each is needed and that they suffice.
//
//	1  a follower's answer to AppendEntries waits for its own log (instance.onAppend)
//	2  an answer that arrives at a leader waits for the leader's own log (peerTransport.AppendEntries)
//	3  the commit index that a leader sends is no higher than what it has on disk (peerTransport.AppendEntries)
//	4  an entry is applied only when this replica has it on disk (fsm.ApplyBatch)
//
// Votes and terms are flushed at once, as ever; they stand in the same queue, so all before them is flushed too. So
// are configuration entries, everything while a group has one voter, truncations and resets.

// errReplaced is the outcome of a wait for an entry that was truncated, overwritten or reset meanwhile. Whoever
// waited for it has nothing to tell anybody: what it knew is not so any more.
var errReplaced = fmt.Errorf("entry was replaced before it was durable: %w", trivet.ErrUnavailable)

// durability knows how far a group's log is on stable storage. A wait is for the entry that stands at an index
// when the wait begins, not for the index.
type durability struct {
	guard *diskGuard

	mu       sync.Mutex
	mark     uint64 // entries up to here are on stable storage
	pending  []queued
	waiters  map[*waiter]struct{}
	draining bool
}

// queued is one append that the log has taken and not confirmed.
type queued struct {
	last   uint64
	ticket *segment.Ticket
	write  uint64 // of the guard
	spent  stage.Span
}

// waiter waits for one entry.
type waiter struct {
	index    uint64
	replaced bool
}

func newDurability(guard *diskGuard, mark uint64) *durability {
	return &durability{guard: guard, mark: mark, waiters: make(map[*waiter]struct{})}
}

// queue takes note of an append from index first to last, which replaces what stood there, and which a ticket
// of the log stands for. The disk guard watches it. spent is told when the append is over.
func (d *durability) queue(first, last uint64, ticket *segment.Ticket, spent stage.Span) error {
	write, err := d.guard.begin()
	if err != nil {
		spent.End()
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.cutLocked(first)
	d.pending = append(d.pending, queued{last, ticket, write, spent})
	if !d.draining {
		d.draining = true
		go d.drain() // ends with the last ticket; the log answers all of them, at the latest when it closes
	}
	return nil
}

// stored takes note of an append from index first to last that is on stable storage, and so is all before it.
func (d *durability) stored(first, last uint64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.cutLocked(first)
	d.mark = last
}

// cut takes note that the entries from index on are gone, or will be replaced.
func (d *durability) cut(index uint64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.cutLocked(index)
}

// reset takes note that a snapshot up to index stands in for the whole log. What was waited for is gone.
func (d *durability) reset(index uint64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.cutLocked(0)
	d.mark = index
}

// cutLocked rewinds the mark: a write that is still queued for a replaced entry proves nothing about its
// successor.
func (d *durability) cutLocked(index uint64) {
	before := index - min(index, 1)
	d.mark = min(d.mark, before)
	for i := range d.pending {
		d.pending[i].last = min(d.pending[i].last, before)
	}
	for w := range d.waiters {
		if w.index >= index {
			w.replaced = true
		}
	}
}

// drain tells the guard of the end of each append, in order, until there is none.
func (d *durability) drain() {
	for {
		d.mu.Lock()
		d.raiseLocked()
		if len(d.pending) == 0 {
			d.draining = false
			d.mu.Unlock()
			return
		}
		q := d.pending[0]
		d.mu.Unlock()
		err := q.ticket.Err()
		d.guard.end(q.write)
		q.spent.End()
		if err != nil {
			d.guard.fail(fmt.Errorf("store entries: %w", err))
		}
		d.mu.Lock()
		d.raiseLocked()
		d.pending = d.pending[1:]
		d.mu.Unlock()
	}
}

// raiseLocked raises the mark by the appends that the log has confirmed. Tickets come true in order; a failed one
// raises nothing, nor do those after it, because the log refuses all that follows.
func (d *durability) raiseLocked() {
	for _, q := range d.pending {
		select {
		case <-q.ticket.Done():
		default:
			return
		}
		if q.ticket.Err() != nil {
			return
		}
		d.mark = max(d.mark, q.last)
	}
}

// ticketLocked returns the ticket of the append that the entry at index came with; nil when none is pending.
func (d *durability) ticketLocked(index uint64) *segment.Ticket {
	for _, q := range d.pending {
		if q.last >= index {
			return q.ticket
		}
	}
	return nil
}

// index returns up to where the log is on stable storage.
func (d *durability) index() uint64 {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.raiseLocked()
	return d.mark
}

// wait returns nil once the entry that is now at index is on stable storage. errReplaced: it never will be;
// another error: the disk failed, or the context ended.
func (d *durability) wait(ctx context.Context, index uint64) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if index <= d.mark {
		return nil
	}
	w := &waiter{index: index}
	d.waiters[w] = struct{}{}
	defer delete(d.waiters, w)
	for {
		d.raiseLocked()
		ticket := d.ticketLocked(index)
		switch {
		case w.replaced:
			return errReplaced
		case index <= d.mark:
			return nil
		case ticket == nil:
			return fmt.Errorf("entry %d is not in the log: %w", index, errReplaced)
		}
		d.mu.Unlock()
		err := ticket.Wait(ctx)
		d.mu.Lock()
		if err != nil && !w.replaced {
			return fmt.Errorf("wait for entry %d to be durable: %w", index, err)
		}
	}
}
