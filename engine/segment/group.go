package segment

import (
	"context"
	"fmt"
	"slices"
	"sync"

	"github.com/trivet-csi/trivet"
)

// Entry is one Raft log entry.
type Entry struct {
	Index uint64
	Term  uint64
	Type  byte // the caller's

	// Data is packed beside the record header, at most 16 MiB. Payload is aligned on the disk, a
	// multiple of 4096 bytes, so that its blocks can be read in place. Either may be empty.
	Data    []byte
	Payload []byte

	// Blocks describes the payload, one for each 4096 bytes, or is empty.
	Blocks []BlockInfo
}

// Whole returns Data and Payload as one slice, without a copy when they lie one behind the other in memory: so do those
// that Read returns, and those that were cut out of one slice. It must not be changed.
func (e *Entry) Whole() []byte {
	d, p := e.Data, e.Payload
	switch {
	case len(p) == 0:
		return d
	case len(d) == 0:
		return p
	case cap(d)-len(d) >= len(p) && &d[:len(d)+1][len(d)] == &p[0]:
		return d[: len(d)+len(p) : len(d)+len(p)]
	}
	return append(slices.Clip(d), p...)
}

// Ticket waits for one change to be on stable storage: for that very write, whatever happens to its
// index later.
type Ticket struct {
	mu   sync.Mutex
	over bool
	err  error         // once over
	done chan struct{} // once somebody waits
}

func (t *Ticket) finish(err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.over, t.err = true, err
	if t.done != nil {
		close(t.done)
	}
}

// Done is closed when the outcome is known.
func (t *Ticket) Done() <-chan struct{} {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.done == nil {
		t.done = make(chan struct{})
		if t.over {
			close(t.done)
		}
	}
	return t.done
}

// outcome returns what Err does, if that is known.
func (t *Ticket) outcome() (known bool, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.over, t.err
}

// Wait returns nil once the change is on stable storage, or why it never will be known to be: the error
// of a poisoned log. A context error ends the wait only.
func (t *Ticket) Wait(ctx context.Context) error {
	if known, err := t.outcome(); known {
		return err
	}
	select {
	case <-t.Done():
		_, err := t.outcome()
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Err waits for the outcome, and returns what Wait does.
func (t *Ticket) Err() error {
	if known, err := t.outcome(); known { // whoever wrote the batch itself needs no channel
		return err
	}
	<-t.Done()
	_, err := t.outcome()
	return err
}

// Group is the log of one group. It is safe for concurrent use; changes take effect in the order in which
// the calls are accepted. Reads see accepted changes, durable or not, but for Stable.
type Group struct {
	id   trivet.VolumeID
	lane *lane

	// Guarded by the lane's mu. The writer alone changes durable.
	accepted groupState
	durable  groupState
}

// Append adds entries with rising indexes, each one above the last. An empty log takes any first index. A
// first index within the log replaces the entries from there on, in one step. It returns once they are on
// stable storage. The log keeps Data, Payload and Blocks: the caller must never change them again; a
// change shows as ErrCorrupt (H25).
//
// It returns ErrInvalid for entries that do not follow or are together larger than a quarter of a segment, and
// ErrNoSpace when the lane holds too many entries, or the disk has no room for another file and what is there
// is nearly used up; then nothing was done, and trimming makes room.
func (g *Group) Append(entries []Entry) error {
	t, err := g.append(entries)
	if err != nil {
		return err
	}
	g.lane.commitNow()
	return t.Err()
}

// AppendAsync is Append without the wait: Read finds the entries at once, and the ticket waits for the
// disk. It blocks while Options.QueueBytes are queued, and while a file that it needs is being made.
func (g *Group) AppendAsync(entries []Entry) (*Ticket, error) {
	t, err := g.append(entries)
	if err == nil {
		g.lane.wakeUp()
	}
	return t, err
}

// append is AppendAsync, but for the writer, which has not been told yet.
func (g *Group) append(entries []Entry) (*Ticket, error) {
	req := &request{group: g}
	records := req.own[:0]
	if len(entries) > len(req.own) {
		records = make([]*record, 0, len(entries)+1)
	}
	for i := range entries {
		r := &req.first
		if i > 0 {
			r = new(record)
		}
		if err := entries[i].record(g.id, r); err != nil {
			return nil, err
		}
		if i > 0 && (r.index != records[i-1].index+1 || r.term < records[i-1].term) {
			return nil, fmt.Errorf("append to %s: entry %d of term %d after entry %d of term %d: %w",
				g.id, r.index, r.term, records[i-1].index, records[i-1].term, trivet.ErrInvalid)
		}
		records = append(records, r)
	}
	_, total := batchBytes(records)
	if total+recordHeaderBytes > g.lane.log.shape.appendMax() {
		return nil, fmt.Errorf("append to %s: %d bytes, at most %d: %w",
			g.id, total, g.lane.log.shape.appendMax(), trivet.ErrInvalid)
	}
	return g.submit("append to", req, func() ([]*record, error) {
		if len(records) == 0 {
			return nil, nil
		}
		if err := g.lane.admitLocked(total); err != nil {
			return nil, err
		}
		if err := g.lane.roomForLocked(int64(len(records))); err != nil {
			return nil, err
		}
		return g.followLocked(records)
	})
}

// record checks an entry by itself, and fills the record of it.
func (e *Entry) record(group trivet.VolumeID, r *record) error {
	if len(e.Data) > dataBytesMax || len(e.Payload)%pageBytes != 0 ||
		len(e.Blocks) != 0 && len(e.Blocks) != len(e.Payload)/pageBytes {
		return fmt.Errorf("append entry %d of %s: %d bytes of data, %d of payload, %d blocks: %w",
			e.Index, group, len(e.Data), len(e.Payload), len(e.Blocks), trivet.ErrInvalid)
	}
	*r = record{
		kind: kindEntry, typ: e.Type, group: group, index: e.Index, term: e.Term,
		blocks: e.Blocks, data: e.Data, payload: e.Payload, sum: bodySum(e.Data, e.Payload),
	}
	return nil
}

// followLocked returns the records that put entries behind, or in place of, what the log holds.
func (g *Group) followLocked(records []*record) ([]*record, error) {
	first, s := records[0], &g.accepted
	if s.at(first.index) == nil || first.index == 0 {
		return records, s.check(first)
	}
	if before := s.at(first.index - 1); before != nil && before.term > first.term {
		return nil, fmt.Errorf("append to %s: entry %d of term %d after term %d: %w",
			g.id, first.index, first.term, before.term, trivet.ErrInvalid)
	}
	drop := &record{kind: kindTruncate, group: g.id, index: first.index}
	drop.sum = bodySum(nil, nil)
	return append([]*record{drop}, records...), nil
}

// submit queues req with the records that plan returns, called with the lane's mu. None = nothing to do. A writer has
// to be told.
func (g *Group) submit(what string, req *request, plan func() ([]*record, error)) (*Ticket, error) {
	l := g.lane
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := l.waitRoomLocked(); err != nil {
		return nil, fmt.Errorf("%s %s: %w", what, g.id, err)
	}
	records, err := plan()
	if err != nil {
		return nil, fmt.Errorf("%s %s: %w", what, g.id, err)
	}
	t := &req.ticket
	if len(records) == 0 {
		// Whoever asks for nothing may still rely on what came before.
		if n := len(l.queue); n > 0 {
			return &l.queue[n-1].ticket, nil
		}
		if !l.writing {
			t.finish(nil)
			return t, nil
		}
	}
	req.records, req.refs = records, req.ownRefs[:0]
	if len(records) > len(req.ownRefs) {
		req.refs = make([]*ref, 0, len(records))
	}
	req.refs = req.refs[:len(records)]
	for i, r := range records {
		switch r.kind {
		case kindEntry:
			req.refs[i] = &ref{term: r.term, typ: r.typ}
		case kindMove: // of Mend
			req.refs[i] = g.accepted.at(r.index)
		}
	}
	l.acceptLocked(req)
	return t, nil
}

// change submits one record unless skip says that there is nothing to do, and tells the writer.
func (g *Group) change(what string, r *record, skip func() bool) (*Ticket, error) {
	t, err := g.queue(what, r, skip)
	if err == nil {
		g.lane.wakeUp()
	}
	return t, err
}

// queue is change, but for the writer, which has not been told yet.
func (g *Group) queue(what string, r *record, skip func() bool) (*Ticket, error) {
	r.group, r.sum = g.id, bodySum(r.data, nil)
	return g.submit(what, &request{group: g}, func() ([]*record, error) {
		if skip != nil && skip() {
			return nil, nil
		}
		if r.kind == kindStable {
			if err := g.lane.roomForLocked(0); err != nil {
				return nil, err
			}
		}
		return []*record{r}, g.accepted.check(r)
	})
}

func (g *Group) changeNow(what string, r *record, skip func() bool) error {
	t, err := g.queue(what, r, skip)
	if err != nil {
		return err
	}
	g.lane.commitNow()
	return t.Err()
}

// TruncateSuffix drops the entries from index on, durably. Beyond the last there is nothing to do; at or
// below the first the log becomes empty.
func (g *Group) TruncateSuffix(from uint64) error {
	r, skip := g.truncation(from)
	return g.changeNow("truncate", r, skip)
}

// TruncateSuffixAsync is TruncateSuffix without the wait.
func (g *Group) TruncateSuffixAsync(from uint64) (*Ticket, error) {
	r, skip := g.truncation(from)
	return g.change("truncate", r, skip)
}

func (g *Group) truncation(from uint64) (r *record, skip func() bool) {
	r = &record{kind: kindTruncate, index: from}
	return r, func() bool {
		r.index = max(from, g.accepted.first)
		return r.index > g.accepted.last()
	}
}

// TrimPrefix drops the entries up to index, durably. Below the first there is nothing to do; at or beyond the
// last the log becomes empty, and its next index stays.
func (g *Group) TrimPrefix(to uint64) error {
	r := &record{kind: kindTrim, index: to}
	return g.changeNow("trim", r, func() bool {
		r.index = min(to, g.accepted.last())
		return r.index < g.accepted.first
	})
}

// Reset drops all entries, durably; an empty log then reports next as its first index.
func (g *Group) Reset(next uint64) error {
	return g.changeNow("reset", &record{kind: kindReset, index: next}, nil)
}

// SetStable replaces term and vote together, durably. Neither term may go back: ErrInvalid.
func (g *Group) SetStable(s Stable) error {
	r := &record{kind: kindStable, index: s.VoteTerm, term: s.Term, data: []byte(s.Vote)}
	if err := s.check(); err != nil {
		return fmt.Errorf("set term of %s: %w", g.id, err)
	}
	return g.changeNow("set term of", r, nil)
}

// DeleteGroup forgets the group, durably: entries, term and vote. The handle is then that of a new group.
func (g *Group) DeleteGroup() error {
	return g.changeNow("delete", &record{kind: kindDelete}, g.accepted.pristine)
}

// Stable returns the term and vote that are on stable storage.
func (g *Group) Stable() Stable {
	g.lane.mu.Lock()
	defer g.lane.mu.Unlock()
	return g.durable.stable
}

// FirstLast returns the indexes of the first and last entry; last is first-1 when there is none.
func (g *Group) FirstLast() (first, last uint64) {
	g.lane.mu.Lock()
	defer g.lane.mu.Unlock()
	return g.accepted.first, g.accepted.last()
}

// DurableLast returns the index of the last entry on stable storage; 0 when there is none.
func (g *Group) DurableLast() uint64 {
	g.lane.mu.Lock()
	defer g.lane.mu.Unlock()
	if len(g.durable.refs) == 0 {
		return 0
	}
	return g.durable.last()
}

// TermType returns term and type of an entry without reading it; ErrNotFound when the log does not hold it.
func (g *Group) TermType(index uint64) (term uint64, typ byte, err error) {
	g.lane.mu.Lock()
	defer g.lane.mu.Unlock()
	at := g.accepted.at(index)
	if at == nil {
		return 0, 0, fmt.Errorf("entry %d of %s: %w", index, g.id, trivet.ErrNotFound)
	}
	return at.term, at.typ, nil
}

// BytesAfter returns what the entries after an index take of the disk, each counted in whole pages: that is
// what a lone one takes, and of many together it is not much more.
func (g *Group) BytesAfter(index uint64) int64 {
	g.lane.mu.Lock()
	defer g.lane.mu.Unlock()
	s := &g.accepted
	skip := uint64(0)
	if index >= s.first {
		skip = min(index-s.first+1, uint64(len(s.refs)))
	}
	var sum int64
	for _, at := range s.refs[skip:] {
		bytes := at.at.bytes()
		if !at.durable {
			bytes = at.entry.headBytes() + int64(len(at.entry.payload))
		}
		sum += alignUp(bytes, pageBytes)
	}
	return sum
}
