package raftgroup

import (
	"errors"
	"fmt"

	"github.com/hashicorp/raft"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/engine/segment"
)

const (
	// recordBytes bounds what the shared log writes beside the data of one of our entries, padding included
	// (engine/segment/format.go, recordHeaderBytes).
	recordBytes = 64
	pageBytes   = trivet.BlockSize

	// batchSlack is what an Append needs beside its records: the header of the batch and the padding to a page.
	batchSlack = 2 * pageBytes

	// verifyN is how many entries are read at a time when a group opens.
	verifyN = 8
)

// groupLog is one group's part of the disk's log, in the library's terms. It has no state and no lock of
// its own. The log owns the bytes of entries from the append on (H25). What the library has as one piece of data is
// kept in two, the blocks at its end as payload, where they can be read in place (docs/decisions/0021).
type groupLog struct {
	*segment.Group
	disk     *segment.Log
	id       trivet.VolumeID
	payload  func(data []byte) int // Config.PayloadAt, may be nil
	batchMax int64                 // bytes of records that one Append takes
	entryMax int                   // bytes of data that one entry may have
}

func newGroupLog(log *segment.Log, id trivet.VolumeID) *groupLog {
	batchMax := log.AppendBytesMax() - batchSlack
	return &groupLog{
		Group: log.Group(id), disk: log, id: id, batchMax: batchMax, entryMax: int(min(EntryBytesMax, batchMax-recordBytes)),
	}
}

// entryBytes is what an entry counts for: what it would take of the disk if it came alone.
func entryBytes(dataBytes int) int64 {
	return (recordBytes + int64(dataBytes) + pageBytes - 1) / pageBytes * pageBytes
}

// pristine reports that the log knows nothing of the group.
func (l *groupLog) pristine() bool {
	first, last := l.bounds()
	return first == 1 && last == 0 && l.Stable() == segment.Stable{}
}

// bounds returns the indexes of the first and last entry; last is first-1 when there is none.
func (l *groupLog) bounds() (first, last uint64) { return l.FirstLast() }

// term returns the term of an entry; false when the log does not hold it.
func (l *groupLog) term(index uint64) (uint64, bool) {
	term, _, err := l.TermType(index)
	return term, err == nil
}

// sizeAfter returns what the entries after index count for, in bytes.
func (l *groupLog) sizeAfter(index uint64) int64 { return l.BytesAfter(index) }

// read reads an entry into out. The data belongs to the log and is never to be written to. It returns
// exactly raft.ErrLogNotFound for an entry that the log does not hold, and ErrCorrupt, never that one,
// for one that is damaged.
func (l *groupLog) read(index uint64, out *raft.Log) error {
	e, err := l.Read(index)
	switch {
	case errors.Is(err, trivet.ErrNotFound):
		return raft.ErrLogNotFound
	case err != nil:
		return err
	}
	*out = raft.Log{Index: e.Index, Term: e.Term, Type: raft.LogType(e.Type), Data: e.Whole()}
	return nil
}

// append writes entries, and returns once they are on stable storage. A first index within the log replaces
// the entries from there on.
//
// What is too much for one Append of the log goes in several. A crash between them leaves a prefix, of which
// nobody was told, and never a hole: the first one drops the tail that is replaced, in the same step.
func (l *groupLog) append(entries []*raft.Log) error {
	n := l.fits(entries)
	if n == len(entries) { // as nearly always: then the log writes them on this goroutine, when it is not writing
		part, err := l.part(entries)
		if err != nil {
			return err
		}
		return l.Append(part)
	}
	tickets, err := l.queue(entries)
	for _, t := range tickets { // after an error, too: what was taken must not come to the disk later
		if failed := t.Err(); failed != nil {
			err = failed // of a failed disk, which counts more than a full one
		}
	}
	return err
}

// queue is append without the wait: the tickets are for parts of the entries, in order.
func (l *groupLog) queue(entries []*raft.Log) (tickets []*segment.Ticket, err error) {
	for len(entries) > 0 && err == nil {
		n := l.fits(entries)
		var part []segment.Entry
		if part, err = l.part(entries[:n]); err != nil {
			break
		}
		var t *segment.Ticket
		if t, err = l.AppendAsync(part); err == nil {
			tickets = append(tickets, t)
			entries = entries[n:]
		}
	}
	return tickets, err
}

// fits returns how many of the entries, at least one, go into one Append of the log.
func (l *groupLog) fits(entries []*raft.Log) int {
	bytes := int64(0)
	for n, e := range entries {
		bytes += recordBytes + int64(len(e.Data))
		if n > 0 && bytes > l.batchMax {
			return n
		}
	}
	return len(entries)
}

// mend puts one entry that is damaged back in its place, durably.
func (l *groupLog) mend(e *raft.Log) error {
	part, err := l.part([]*raft.Log{e})
	if err != nil {
		return err
	}
	return l.Mend(part[0])
}

// part returns entries as the log takes them.
func (l *groupLog) part(entries []*raft.Log) ([]segment.Entry, error) {
	part := make([]segment.Entry, 0, len(entries))
	for _, e := range entries {
		if len(e.Extensions) > 0 {
			return nil, fmt.Errorf("append entry %d of %s: %d bytes of extensions: %w",
				e.Index, l.id, len(e.Extensions), trivet.ErrInvalid)
		}
		at := l.payloadAt(e)
		part = append(part, segment.Entry{
			Index: e.Index, Term: e.Term, Type: byte(e.Type), Data: e.Data[:at], Payload: e.Data[at:],
		})
	}
	return part, nil
}

// payloadAt returns where the blocks begin that an entry's data ends with.
func (l *groupLog) payloadAt(e *raft.Log) int {
	n := len(e.Data)
	if l.payload == nil || e.Type != raft.LogCommand || n < pageBytes {
		return n
	}
	if at := l.payload(e.Data); at >= 0 && at < n && (n-at)%pageBytes == 0 {
		return at
	}
	return n
}

// locate returns where the payload of an entry stands, and pins it; false when it has none, or the log does not have
// that entry, or not yet on the disk.
func (l *groupLog) locate(index, term uint64) (segment.Place, bool) {
	if has, ok := l.term(index); !ok || has != term {
		return segment.Place{}, false
	}
	at, err := l.Locate(index)
	if err != nil {
		return segment.Place{}, false
	}
	if at.Bytes == 0 {
		l.disk.Unpin(at.Segment)
		return segment.Place{}, false
	}
	return at, true
}
