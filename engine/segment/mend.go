package segment

import (
	"fmt"

	"github.com/trivet-csi/trivet"
)

// Mend puts an entry that Read calls damaged in its place again, durably, from a copy that somebody else has: the
// record is written anew, as one that was moved (carryForward), and the old place counts no more. The log keeps Data,
// Payload and Blocks, as Append does.
//
// ErrNotFound: the log holds no such entry; ErrPending: it is not on the disk yet; ErrInvalid: e is another one, by its
// term, type or lengths, or by its checksum where the head of the damaged record can still be read; ErrNoSpace as
// Append. Then nothing was done.
func (g *Group) Mend(e Entry) error {
	req := &request{group: g}
	r := &req.first
	if err := e.record(g.id, r); err != nil {
		return err
	}
	r.kind = kindMove
	if err := g.matches(r); err != nil {
		return fmt.Errorf("mend entry %d of %s: %w", e.Index, g.id, err)
	}
	_, total := batchBytes([]*record{r})
	t, err := g.submit("mend", req, func() ([]*record, error) {
		if err := g.lane.admitLocked(total); err != nil {
			return nil, err
		}
		return []*record{r}, g.accepted.check(r)
	})
	if err != nil {
		return err
	}
	g.lane.commitNow()
	return t.Err()
}

// matches returns nil when r can be the entry that the log holds at its index.
func (g *Group) matches(r *record) error {
	l := g.lane
	l.mu.Lock()
	at, err := g.lookLocked(r.index)
	if err == nil && !at.durable {
		err = trivet.ErrPending
	}
	if err != nil {
		l.mu.Unlock()
		return err
	}
	where, seg := at.at, l.segments[at.at.number]
	same := at.term == r.term && at.typ == r.typ && int64(where.head) == r.headBytes() &&
		int(where.payload) == len(r.payload)
	if seg != nil {
		seg.pins++
	}
	l.mu.Unlock()
	if seg != nil {
		defer func() {
			l.mu.Lock()
			l.unpinLocked(seg)
			l.mu.Unlock()
		}()
	}
	if !same {
		return fmt.Errorf("term %d, type %d, %d bytes; the log has term %d, type %d, %d bytes: %w", r.term, r.typ,
			r.headBytes()+int64(len(r.payload)), at.term, at.typ, where.bytes(), trivet.ErrInvalid)
	}
	if seg == nil {
		return nil // lost with its segment
	}
	head, err := l.readHead(seg, where)
	if err == nil && head.sum != r.sum {
		return fmt.Errorf("checksum %08x, the damaged record was written with %08x: %w", r.sum, head.sum, trivet.ErrInvalid)
	}
	return nil
}
