package replication

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"sync/atomic"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/engine"
	"github.com/trivet-csi/trivet/engine/segment"
	"github.com/trivet-csi/trivet/internal/stage"
	"github.com/trivet-csi/trivet/replication/raftgroup"
)

// machine applies the log of a group to one engine.Volume. Each call of Apply is one engine batch, or one up to each
// mark, which holds blocks, applied index, epoch, size, session window and members together (H2); an entry that makes
// or drops a snapshot, or rolls back to one, is a batch of its own. Blocks are not copied: the engine refers to them
// where they stand in the log.
//
// Apply, Restore and Image are called by one goroutine of the group; the rest may be called by anyone.
type machine struct {
	id  trivet.VolumeID
	eng *engine.Engine
	vol *engine.Volume

	applies *stage.Meter // batches of entries; nil = not measured
	markers *markers     // views for scrubs; nil = none are taken

	// Owned by the applying goroutine.
	core core
	reqs []request // scratch

	view atomic.Pointer[engine.State] // as of the last commit; never changed in place
	// newest is the index of the newest entry that a read may have seen the effect of: it rises before the
	// commit, view after it.
	newest atomic.Uint64
	// restored is true while blocks may be newer than newest, at the end of a Restore.
	restored atomic.Bool

	marks *marks // where this replica is to pin what it has

	// A discard under a snapshot costs a tombstone of about 32 bytes for each stored block, twice if the entry has written
	// that, and a batch of the engine is bounded: by 256 MiB, which 8 million blocks are. So an entry that discards more
	// blocks than zeroBlocksMax stands alone, as does any wipe, and is applied in pieces of so many, with a commit between
	// two of them once the batch has zeroBytesMax. What comes of it does not depend on where it is cut.
	zeroBlocksMax int64
	zeroBytesMax  int
}

const (
	zeroBlocksShare = 256 // of the bytes of a batch: a block each
	zeroBytesShare  = 4
)

var _ raftgroup.StateMachine = (*machine)(nil)

// newMachine resumes where the volume's last committed batch left it.
func newMachine(id trivet.VolumeID, eng *engine.Engine, vol *engine.Volume) (*machine, error) {
	m := &machine{id: id, eng: eng, vol: vol}
	m.zeroBlocksMax, m.zeroBytesMax = int64(eng.BatchBytesMax()/zeroBlocksShare), eng.BatchBytesMax()/zeroBytesShare
	m.marks = newMarks(id, func() (markedImage, error) { return vol.Image(nil) })
	if err := m.load(); err != nil {
		return nil, err
	}
	return m, nil
}

func (m *machine) load() error {
	st := m.vol.State()
	m.core = core{epoch: st.Epoch, sizeBytes: st.SizeBytes, generation: st.Generation, snapshots: st.Snapshots}
	if err := m.core.loadSessions(st.Session); err != nil {
		return fmt.Errorf("load state of %s at index %d: %w", m.id, st.AppliedIndex, err)
	}
	m.newest.Store(max(m.newest.Load(), st.AppliedIndex))
	m.view.Store(&st)
	return nil
}

// Apply implements raftgroup.StateMachine; the result of a proposal is a []result, one per request.
// An error is damage or a failing disk: the replica must stop, because skipping an entry that the
// others applied would make it differ for ever.
func (m *machine) Apply(entries []raftgroup.Entry) ([]any, error) {
	defer m.applies.Begin().End()
	results := make([]any, len(entries))
	applied := m.view.Load().AppliedIndex
	first := 0
	for first < len(entries) && entries[first].Index <= applied {
		first++ // delivered again after a restart (H3)
	}
	st := *m.view.Load()
	for first < len(entries) {
		n := m.together(entries[first:])
		var err error
		if st, n, err = m.applyBatch(st, entries[first:first+n], results[first:first+n]); err != nil {
			return nil, err
		}
		first += n
	}
	return results, nil
}

// together returns how many entries go into one batch: those up to one that stands alone, or that one. The blocks of
// a batch belong to the generation with which it began, and there is room for zeroBlocksMax tombstones.
func (m *machine) together(entries []raftgroup.Entry) int {
	n, zeroN := 0, int64(0)
	for ; n < len(entries) && !standsAlone(entries[n].Data); n++ {
		if zeroN += m.zeroes(entries[n].Data); zeroN > m.zeroBlocksMax {
			break
		}
	}
	return max(n, 1)
}

// pins are what an entry asks this replica to keep a view of: it ends the batch.
type pins struct {
	mark  uint64 // name of one that is awaited here; 0: none
	scrub change // effectMark, when there is one
}

func (p *pins) any() bool { return p.mark != 0 || p.scrub.effect == effectMark }

// applyBatch applies entries to st as one batch: all of them, or those up to one at which this replica is to pin
// what it has. It returns the state, and how many they were.
func (m *machine) applyBatch(st engine.State, entries []raftgroup.Entry, results []any) (
	_ engine.State, n int, err error,
) {
	batch := m.vol.NewBatch()
	defer func() {
		if e := batch.Close(); err == nil && e != nil {
			err = fmt.Errorf("apply to %s: %w", m.id, e)
		}
	}()
	before := st
	var pin pins
	for ; n < len(entries) && !pin.any(); n++ {
		e := &entries[n]
		if e.Index <= st.AppliedIndex {
			return st, n, fmt.Errorf("apply to %s: index %d follows %d: %w", m.id, e.Index, st.AppliedIndex, trivet.ErrCorrupt)
		}
		st.AppliedIndex, st.AppliedTerm = e.Index, e.Term
		if e.Data == nil {
			st.Config = appendMembers(nil, e.Members)
			continue
		}
		first := &before
		if n > 0 {
			first = nil
		}
		if results[n], pin, err = m.applyEntry(&batch, e, first); err != nil {
			return st, n, err
		}
	}
	st.Epoch, st.SizeBytes = m.core.epoch, m.core.sizeBytes
	st.Generation, st.Snapshots = m.core.generation, m.core.snapshots
	st.Session = m.core.appendSessions(nil)
	m.newest.Store(st.AppliedIndex)
	if err := batch.Commit(st); err != nil {
		return st, n, fmt.Errorf("apply to %s up to index %d: %w", m.id, st.AppliedIndex, err)
	}
	// Before view: who can see that this index is applied finds what was pinned at it.
	if pin.mark != 0 {
		m.marks.pin(pin.mark, st.AppliedIndex)
	}
	if pin.scrub.effect == effectMark {
		m.markers.take(st.AppliedIndex, pin.scrub.lba, pin.scrub.blockN)
	}
	m.view.Store(&st)
	return st, n, nil
}

// applyEntry adds an entry to a batch, and says what to pin after it. before is the state as it was committed last,
// when the entry is the batch's first.
func (m *machine) applyEntry(to **engine.Batch, e *raftgroup.Entry, before *engine.State) (
	_ []result, pin pins, err error,
) {
	reqs, err := decodeEntry(m.reqs[:0], m.id, e.Data)
	if err != nil {
		return nil, pin, fmt.Errorf("apply index %d of %s: %w", e.Index, m.id, err)
	}
	stored := e.Stored // where the data of all writes stand, one behind the other; else the engine takes a copy
	if stored.Bytes != int64(len(e.Data)-payloadAt(e.Data)) {
		stored = segment.Place{}
	}
	out, skip := make([]result, len(reqs)), int64(0)
	for i := range reqs {
		res, ch := m.core.step(&reqs[i])
		out[i] = res
		if reqs[i].op == opMark && m.marks.awaits(reqs[i].arg) {
			pin.mark = reqs[i].arg
		}
		at := skip
		skip += int64(len(reqs[i].data))
		switch ch.effect {
		case effectWrite:
			err = (*to).Refer(ch.lba, reqs[i].data, stored, at)
		case effectZero:
			err = m.zero(to, ch.lba, ch.blockN, e.Index, before)
		case effectMark:
			pin.scrub, out[i].index = ch, e.Index
		case effectBack:
			err = (*to).Rollback(ch.generation)
		case effectNone:
		}
		if err != nil {
			return nil, pin, fmt.Errorf("apply index %d of %s: %w", e.Index, m.id, err)
		}
	}
	clear(reqs) // e.Data is valid during Apply only
	m.reqs = reqs
	return out, pin, nil
}

// zeroes returns how many blocks an encoded entry discards, at most.
func (m *machine) zeroes(b []byte) (n int64) {
	for i := range requestsIn(b) {
		switch op, blockN := headerOf(b, i); op {
		case opDiscard, opWriteZeroes:
			n += int64(min(blockN, lbaMax))
		case opWipe:
			n += m.zeroBlocksMax + 1 // how large the volume is then, the entries before say
		}
	}
	return n
}

// zero adds a discard to a batch, in pieces. What is too much is committed before the entry is applied to its end, with
// the state from before the entry. After a crash in between the entry is applied once more, from its beginning, and
// does the same; a reader may see some of its blocks before others, as of any discard that is larger than an atomic
// write.
func (m *machine) zero(to **engine.Batch, lba trivet.LBA, blockN int64, index uint64, before *engine.State) error {
	for blockN > 0 {
		n := min(blockN, m.zeroBlocksMax)
		if (*to).Bytes() >= m.zeroBytesMax && before != nil {
			m.newest.Store(index)
			if err := (*to).CommitPart(*before); err != nil {
				return err
			}
			*to = m.vol.NewBatch()
		}
		if err := (*to).Zero(lba, n); err != nil {
			return err
		}
		lba, blockN = lba+trivet.LBA(n), blockN-n
	}
	return nil
}

// Applied implements raftgroup.StateMachine.
func (m *machine) Applied() (index, term uint64) {
	st := m.view.Load()
	return st.AppliedIndex, st.AppliedTerm
}

// Flush implements raftgroup.StateMachine. The index is read back from what the disk has, not
// remembered: the log is cut by it (H1).
func (m *machine) Flush() (uint64, error) {
	if err := m.eng.Flush(); err != nil {
		return 0, fmt.Errorf("flush %s: %w", m.id, err)
	}
	st, err := m.vol.DurableState()
	if err != nil {
		return 0, fmt.Errorf("flush %s: %w", m.id, err)
	}
	return st.AppliedIndex, nil
}

// Want implements raftgroup.StateMachine.
func (m *machine) Want() []byte { return m.vol.Want() }

// Image implements raftgroup.StateMachine.
func (m *machine) Image(want []byte) (raftgroup.Image, error) {
	img, err := m.vol.Image(want)
	if err != nil {
		return nil, fmt.Errorf("image of %s: %w", m.id, err)
	}
	return img, nil
}

// Restore implements raftgroup.StateMachine. After an error from the middle nothing counts as applied any more,
// as after a restart; a refused image changes nothing.
func (m *machine) Restore(r io.Reader) error {
	before := m.view.Load().Epoch
	if m.vol.Restoring() {
		before = 0 // what an interrupted Restore was moving to counts for nothing; the engine knows what does
	}
	m.restored.Store(true)
	defer m.restored.Store(false)
	if err := m.vol.Restore(r); err != nil {
		err = fmt.Errorf("restore %s: %w", m.id, err)
		if m.vol.Restoring() {
			err = errors.Join(err, m.load())
		}
		return err
	}
	if err := m.load(); err != nil {
		return err
	}
	if m.core.epoch < before { // I7: a fence that this replica has seen was committed
		return fmt.Errorf("restore %s: image has epoch %d, replica has %d: %w", m.id, m.core.epoch, before, trivet.ErrCorrupt)
	}
	return nil
}

// Restoring implements raftgroup.StateMachine.
func (m *machine) Restoring() bool { return m.vol.Restoring() }

// membersVersion begins the encoding of members in engine.State.Config: version, count, and per member
// a flag (1 = learner), replica and node, each string after its length in two bytes.
const membersVersion = 1

func appendMembers(dst []byte, ms []raftgroup.Member) []byte {
	dst = append(dst, membersVersion)
	dst = binary.BigEndian.AppendUint16(dst, uint16(len(ms)))
	for _, m := range ms {
		var flag byte
		if m.Learner {
			flag = 1
		}
		dst = append(dst, flag)
		dst = appendString(dst, string(m.Replica))
		dst = appendString(dst, string(m.Node))
	}
	return dst
}

func appendString(dst []byte, s string) []byte {
	dst = binary.BigEndian.AppendUint16(dst, uint16(len(s)))
	return append(dst, s...)
}
