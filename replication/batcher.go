package replication

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/internal/stage"
)

const (
	// entriesInFlight bounds the entries of a volume that are proposed and not yet applied.
	entriesInFlight = 16
	// eagerInFlight is how many entries may be on their way before one that is not full waits for more. The second one
	// waits, too, until it has as many requests as are on their way, or those are through: their clients come again
	// one after the other, and each would have an entry of its own. So a busy volume fills its entries, and an
	// idle one never waits.
	eagerInFlight = 2
	// queueRequests and queueBytes bound what waits for a place in an entry.
	queueRequests = 1024
	queueBytes    = 16 << 20
)

// proposeFunc is raftgroup.Group.Propose.
type proposeFunc func(ctx context.Context, data []byte) (any, error)

// batcher gathers the requests of a leader into log entries. It exists as long as its replica runs;
// while the replica does not lead, it refuses everything.
type batcher struct {
	id      trivet.VolumeID
	ctx     context.Context // ends with close
	cancel  context.CancelFunc
	propose proposeFunc
	workers sync.WaitGroup // one per entry in flight
	waiting *stage.Meter   // what is in queue; nil = not measured

	mu        sync.Mutex
	closed    bool
	leading   bool
	term      uint64 // while leading
	queue     []*pending
	queueData int // bytes of data in queue
	inFlightN int
	underway  int                 // requests in these
	byKey     map[seqKey]*pending // queued or in flight, with a sequence
}

// seqKey names a request of a session.
type seqKey struct {
	epoch trivet.Epoch
	seq   uint64
}

// pending is a request on its way into the log.
type pending struct {
	req  request
	term uint64        // of the leader that took it
	came time.Duration // stage.Now, when it was queued
	sent *batch        // nil while queued; under batcher.mu
	done chan struct{}
	err  error // valid once done is closed
}

// batch is the entry that a pending request went into. encoded is closed when the bytes of the
// requests have been copied: their owners may have them back.
type batch struct {
	ps      []*pending
	encoded chan struct{}
}

func newBatcher(ctx context.Context, id trivet.VolumeID, propose proposeFunc) *batcher {
	ctx, cancel := context.WithCancel(ctx)
	return &batcher{id: id, ctx: ctx, cancel: cancel, propose: propose, byKey: make(map[seqKey]*pending)}
}

// submit puts req into the log and waits until it is applied. It returns the term in which it was
// taken. ErrNotLeader: this copy was never proposed. ErrUnavailable and context errors: outcome
// unknown. A second copy of a request that is still on its way joins the first one. req.data is
// not used after submit returns.
func (b *batcher) submit(ctx context.Context, req *request) (term uint64, err error) {
	p, owner, err := b.enqueue(req)
	if err != nil {
		return 0, err
	}
	select {
	case <-p.done:
		return p.term, p.err
	case <-ctx.Done():
	}
	if owner {
		b.abandon(p)
	}
	return p.term, fmt.Errorf("wait for the log: %w", ctx.Err())
}

// enqueue returns the pending request, and whether it is req itself rather than an earlier copy.
func (b *batcher) enqueue(req *request) (p *pending, owner bool, err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	switch {
	case b.closed:
		return nil, false, fmt.Errorf("replica is closing: %w", trivet.ErrUnavailable)
	case !b.leading:
		return nil, false, trivet.ErrNotLeader
	}
	key := seqKey{req.epoch, req.seq}
	if p := b.byKey[key]; p != nil {
		return p, false, nil
	}
	if len(b.queue) >= queueRequests || b.queueData+len(req.data) > queueBytes {
		return nil, false, fmt.Errorf("queue is full with %d requests and %d bytes: %w",
			len(b.queue), b.queueData, trivet.ErrUnavailable)
	}
	p = &pending{req: *req, term: b.term, came: stage.Now(), done: make(chan struct{})}
	b.waiting.Enter()
	b.byKey[key] = p
	b.queue = append(b.queue, p)
	b.queueData += len(req.data)
	b.dispatchLocked()
	return p, true, nil
}

// abandon is called when the owner of p gives up. A request still in the queue is taken out; one
// that is being encoded is waited for, so that its bytes are free when submit returns. It ends for
// copies that joined it, too: their clients ask again.
func (b *batcher) abandon(p *pending) {
	b.mu.Lock()
	sent := p.sent
	if i := slices.Index(b.queue, p); i >= 0 {
		b.queue = slices.Delete(b.queue, i, i+1)
		b.queueData -= len(p.req.data)
		b.waiting.LeaveSince(p.came)
		b.finishLocked(p, fmt.Errorf("the first copy's client gave up: %w", trivet.ErrUnavailable))
	}
	b.mu.Unlock()
	if sent != nil {
		<-sent.encoded
	}
}

// setLeader is told of every change of leadership. Requests that were queued under another term
// fail at once: their clients have the time to ask the new leader, and no queue outlives a term (H39).
func (b *batcher) setLeader(leading bool, term uint64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if leading == b.leading && (!leading || term == b.term) {
		return
	}
	b.leading, b.term = leading, term
	b.failQueueLocked(fmt.Errorf("leadership was lost with the request in the queue: %w", trivet.ErrNotLeader))
}

// leads reports whether submit would take a request.
func (b *batcher) leads() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.leading && !b.closed
}

// close fails everything and waits for the entries in flight; REQUIRES: the group ends their Propose,
// because its context ends or the group is closed.
func (b *batcher) close() {
	b.mu.Lock()
	b.closed = true
	b.failQueueLocked(fmt.Errorf("replica is closing: %w", trivet.ErrUnavailable))
	b.mu.Unlock()
	b.cancel()
	b.workers.Wait()
}

func (b *batcher) failQueueLocked(err error) {
	for _, p := range b.queue {
		b.waiting.LeaveSince(p.came)
		b.finishLocked(p, err)
	}
	b.queue, b.queueData = nil, 0
}

func (b *batcher) finishLocked(p *pending, err error) {
	if key := (seqKey{p.req.epoch, p.req.seq}); b.byKey[key] == p {
		delete(b.byKey, key)
	}
	p.err = err
	close(p.done)
}

func (b *batcher) dispatchLocked() {
	for !b.closed && len(b.queue) > 0 && b.inFlightN < entriesInFlight && b.ripeLocked() {
		bt := b.takeLocked()
		b.inFlightN++
		b.underway += len(bt.ps)
		b.workers.Go(func() { b.run(bt) })
	}
}

// ripeLocked reports whether the next entry should wait no longer.
func (b *batcher) ripeLocked() bool {
	switch {
	case b.inFlightN == 0, b.queueData >= entryDataMax, len(b.queue) >= entryRequestsMax:
		return true
	}
	return b.inFlightN < eagerInFlight && len(b.queue) >= b.underway
}

// takeLocked moves as many requests as one entry holds from the queue into a batch.
func (b *batcher) takeLocked() *batch {
	n, dataN := 0, 0
	for n < len(b.queue) && n < entryRequestsMax && dataN+len(b.queue[n].req.data) <= entryDataMax {
		dataN += len(b.queue[n].req.data)
		n++
	}
	bt := &batch{ps: slices.Clone(b.queue[:n]), encoded: make(chan struct{})}
	now := stage.Now()
	for _, p := range bt.ps {
		p.sent = bt
		b.waiting.Leave(now - p.came)
	}
	b.queue = slices.Delete(b.queue, 0, n)
	b.queueData -= dataN
	return bt
}

// run carries one batch through the log.
func (b *batcher) run(bt *batch) {
	entry, kept, errs := b.encode(bt.ps)
	close(bt.encoded)
	if len(kept) > 0 {
		results, err := proposeEntry(b.ctx, b.propose, entry, len(kept))
		for i, at := range kept {
			if errs[at] = err; err == nil {
				errs[at] = results[i].err(&bt.ps[at].req)
			}
		}
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	for i, p := range bt.ps {
		b.finishLocked(p, errs[i])
	}
	b.inFlightN--
	b.underway -= len(bt.ps)
	b.dispatchLocked()
}

// proposeEntry proposes an entry of requestN requests. Its error is ErrNotLeader when nothing was done,
// else ErrUnavailable: whatever went wrong, the entry may be in the log.
func proposeEntry(ctx context.Context, propose proposeFunc, entry []byte, requestN int) ([]result, error) {
	out, err := propose(ctx, entry)
	switch {
	case errors.Is(err, trivet.ErrNotLeader), errors.Is(err, trivet.ErrUnavailable):
		return nil, err
	case err != nil:
		return nil, fmt.Errorf("propose: %v: %w", err, trivet.ErrUnavailable)
	}
	results, ok := out.([]result)
	if !ok || len(results) != requestN {
		return nil, fmt.Errorf("entry of %d requests was skipped by the state machine (%T): %w",
			requestN, out, trivet.ErrUnavailable)
	}
	return results, nil
}

// encode copies the requests into an entry and verifies the copies, so that what is checked is what
// is proposed (H25). It returns which requests are in the entry, and the errors of those that are not.
func (b *batcher) encode(ps []*pending) (entry []byte, kept []int, errs []error) {
	errs = make([]error, len(ps))
	reqs := make([]request, 0, len(ps))
	for i, p := range ps {
		reqs = append(reqs, p.req)
		kept = append(kept, i)
	}
	for len(reqs) > 0 {
		entry = appendEntry(make([]byte, 0, entrySize(reqs)), b.id, reqs)
		bad, err := firstDamaged(entry, b.id, len(reqs))
		if bad < 0 {
			return entry, kept, errs
		}
		errs[kept[bad]] = err
		reqs = append(reqs[:bad], reqs[bad+1:]...)
		kept = append(kept[:bad], kept[bad+1:]...)
	}
	return nil, nil, errs
}

func entrySize(reqs []request) int {
	n := entryHeaderBytes
	for i := range reqs {
		n += headerBytes + len(reqs[i].data)
	}
	return n
}

// firstDamaged returns the position of the first of n requests in an entry made by appendEntry whose
// checksum does not match, or -1.
func firstDamaged(entry []byte, id trivet.VolumeID, n int) (int, error) {
	heads, data := entry[entryHeaderBytes:], entry[entryHeaderBytes+headerBytes*n:]
	for i := range n {
		var r request
		size, err := r.readHeader(heads[headerBytes*i:])
		if err != nil {
			return i, err
		}
		r.data, data = data[:size], data[size:]
		if err := r.verify(id); err != nil {
			return i, err
		}
	}
	return -1, nil
}
