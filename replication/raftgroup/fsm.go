package raftgroup

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/hashicorp/raft"

	"github.com/trivet-csi/trivet"
)

// fsm is the library's state machine over ours. Its entries are applied on the library's FSM
// goroutine; images are pinned on others.
type fsm struct {
	machine StateMachine
	fatal   func(error)
	failed  func() error // of the whole group
	durable *durability
	log     *groupLog // where entries stand; nil: it is not asked

	expected expected

	mu     sync.Mutex // held over Apply and Image, so that an image has the index that is read with it
	config groupConfig
	dead   bool
	mixed  bool // a Restore is under way, or one is due: there is no image to pin
}

var _ raft.BatchingFSM = (*fsm)(nil)

// errDead is the result of entries that were committed but not applied here: the machine failed.
var errDead = errors.New("state machine failed")

func (f *fsm) setConfig(c groupConfig) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.config = c
}

// Apply is never called by the library, which prefers ApplyBatch.
func (f *fsm) Apply(e *raft.Log) any { return f.ApplyBatch([]*raft.Log{e})[0] }

// ApplyBatch hands committed entries on and returns one result for each. After a failure it applies
// nothing more: a replica that misses one entry has diverged (raft-and-pebble.md, FSM errors).
func (f *fsm) ApplyBatch(logs []*raft.Log) []any {
	results := f.applyBatch(logs)
	f.expected.answer(logs, results)
	return results
}

func (f *fsm) applyBatch(logs []*raft.Log) []any {
	f.awaitDurable(logs)
	f.mu.Lock()
	defer f.mu.Unlock()
	results := make([]any, len(logs))
	if !f.dead && f.failed() == nil {
		err := f.applyLocked(logs, results)
		if err == nil {
			return results
		}
		f.dead = true
		f.fatal(err)
	}
	for i := range results {
		results[i] = errDead
	}
	return results
}

// expected are the proposals of this replica whose callers wait for the result of Apply, by the first byte of their
// data: what the library applies in the leader that took a proposal is that very slice, and nobody else has it.
type expected struct {
	mu sync.Mutex
	by map[*byte]chan any // each has room for the result
}

// expect returns where the result of applying data will come. Call forget when it is not waited for any more.
// REQUIRES: data is not empty.
func (f *fsm) expect(data []byte) <-chan any {
	e := &f.expected
	result := make(chan any, 1)
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.by == nil {
		e.by = make(map[*byte]chan any)
	}
	e.by[&data[0]] = result
	return result
}

func (f *fsm) forget(data []byte) {
	e := &f.expected
	e.mu.Lock()
	defer e.mu.Unlock()
	delete(e.by, &data[0])
}

func (e *expected) answer(logs []*raft.Log, results []any) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for i := range logs {
		if len(e.by) == 0 {
			return
		}
		if data := logs[i].Data; len(data) > 0 {
			if result := e.by[&data[0]]; result != nil {
				result <- results[i]
				delete(e.by, &data[0])
			}
		}
	}
}

// awaitDurable is gate 4 (durable.go): the state machine never gets ahead of the log on this disk (H4). A wait that
// fails means that the disk did, which the guard knows of before ApplyBatch asks it.
func (f *fsm) awaitDurable(logs []*raft.Log) {
	last := logs[len(logs)-1].Index
	if err := f.durable.wait(context.Background(), last); err != nil {
		f.fatal(fmt.Errorf("apply entries up to %d: %w", last, err))
	}
}

func (f *fsm) applyLocked(logs []*raft.Log, results []any) error {
	applied, _ := f.machine.Applied()
	entries := make([]Entry, 0, len(logs))
	defer func() { f.unpin(entries) }()
	at := make([]int, 0, len(logs))
	config := f.config
	for i, e := range logs {
		if e.Index <= applied { // delivered again after a restart (H3)
			continue
		}
		entry := Entry{Index: e.Index, Term: e.Term, Data: e.Data}
		switch {
		case e.Type == raft.LogConfiguration:
			members, err := decodeConfiguration(e.Data)
			if err != nil {
				return fmt.Errorf("apply entry %d: %w", e.Index, err)
			}
			entry.Data, entry.Members = nil, members
			config = groupConfig{e.Index, members}
		case entry.Data == nil:
			entry.Data = []byte{}
		case f.log != nil && e.Type == raft.LogCommand:
			entry.Stored, _ = f.log.locate(e.Index, e.Term)
		}
		entries = append(entries, entry)
		at = append(at, i)
	}
	if len(entries) == 0 {
		return nil
	}
	out, err := f.machine.Apply(entries)
	last := entries[len(entries)-1]
	if err != nil {
		return fmt.Errorf("apply entries %d to %d: %w", entries[0].Index, last.Index, err)
	}
	if now, term := f.machine.Applied(); len(out) != len(entries) || now != last.Index || term != last.Term { // I3
		return fmt.Errorf("apply entries %d to %d: %d results for %d, applied index %d of term %d: %w",
			entries[0].Index, last.Index, len(out), len(entries), now, term, trivet.ErrCorrupt)
	}
	for i, r := range out {
		results[at[i]] = r
	}
	f.config = config
	return nil
}

// unpin gives back what locate has pinned: the machine has pins of its own by now.
func (f *fsm) unpin(entries []Entry) {
	for i := range entries {
		if entries[i].Stored.Bytes > 0 {
			f.log.disk.Unpin(entries[i].Stored.Segment)
		}
	}
}

// Snapshot is called between two batches: everything up to the snapshot's index is applied.
func (f *fsm) Snapshot() (raft.FSMSnapshot, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.dead {
		return nil, errDead
	}
	applied, _ := f.machine.Applied()
	return &fsmSnapshot{fsm: f, applied: applied}, nil
}

// Restore is never called: a pulled image is restored while the library is stopped (catchup.go), and
// NoSnapshotRestoreOnStart is set.
func (f *fsm) Restore(io.ReadCloser) error {
	return fmt.Errorf("restore through the library: %w", trivet.ErrInvalid)
}

// setMixed says whether the machine is between two states.
func (f *fsm) setMixed(on bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.mixed = on
}

// pin returns an image for a machine with that Want, the index and term that it stands at, and the
// configuration of that index. ErrUnavailable while there is no state to show.
func (f *fsm) pin(want []byte) (img Image, index, term uint64, config groupConfig, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	index, term = f.machine.Applied()
	switch {
	case f.dead:
		err = errDead
	case f.mixed || index == 0:
		err = fmt.Errorf("no state to show at index %d: %w", index, trivet.ErrUnavailable)
	default:
		img, err = f.machine.Image(want)
	}
	if err != nil {
		return nil, 0, 0, groupConfig{}, fmt.Errorf("pin an image: %w", err)
	}
	return img, index, term, f.config, nil
}

// fsmSnapshot is a promise that the state machine's own state will do as the snapshot.
type fsmSnapshot struct {
	fsm     *fsm
	applied uint64 // machine's index when the snapshot was taken
}

// Persist makes the state durable and reads back how far. Only then may the snapshot be recorded
// and the log be cut (H1).
func (s *fsmSnapshot) Persist(sink raft.SnapshotSink) error {
	flushed, err := s.fsm.machine.Flush()
	if err == nil && flushed < s.applied {
		err = fmt.Errorf("flush: durable index is %d, %d was applied: %w", flushed, s.applied, trivet.ErrCorrupt)
	}
	if err != nil {
		err = fmt.Errorf("persist snapshot: %w", err)
		s.fsm.fatal(err)
		return err
	}
	sink.(*snapshotSink).cover(s.applied)
	return nil
}

// Release has nothing to release.
func (s *fsmSnapshot) Release() {}
