package raftgroup

import (
	"errors"
	"fmt"
	"sync"

	"github.com/hashicorp/raft"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/engine/segment"
)

const (
	keyCurrentTerm  = "CurrentTerm"
	keyLastVoteTerm = "LastVoteTerm"
	keyLastVoteCand = "LastVoteCand"
)

// errKeyNotFound has the text by which the library knows a missing key (api.go:519).
var errKeyNotFound = errors.New("not found")

// stableRecord is all that the library keeps in its stable store.
type stableRecord struct {
	term, voteTerm uint64
	candidate      string // an address; empty = never voted
}

func (r stableRecord) stable() segment.Stable {
	return segment.Stable{Term: r.term, VoteTerm: r.voteTerm, Vote: r.candidate}
}

// stableStore is the library's StableStore over the group's log. The term of a vote is held back until its
// candidate follows, so both reach the disk in one record or not at all: with two records a crash
// between them made a replica grant a vote to a candidate with a stale log (D5).
type stableStore struct {
	log   *groupLog
	guard *diskGuard
	onSet func() // called after a change of term, without locks

	// turn is held over a write: votes are rare, and must not pass each other. It is a channel, not a mutex,
	// because the clock of a synctest bubble stands still while somebody waits for a mutex.
	turn chan struct{}

	mu       sync.Mutex
	rec      stableRecord
	voteTerm uint64 // given by SetUint64, waits for its candidate; 0 = none
}

var _ raft.StableStore = (*stableStore)(nil)

func newStableStore(log *groupLog, guard *diskGuard) *stableStore {
	s := log.Stable()
	return &stableStore{
		log: log, guard: guard, turn: make(chan struct{}, 1),
		rec: stableRecord{term: s.Term, voteTerm: s.VoteTerm, candidate: s.Vote},
	}
}

func (s *stableStore) record() stableRecord {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.rec
}

// GetUint64 implements raft.StableStore.
func (s *stableStore) GetUint64(key []byte) (uint64, error) {
	rec := s.record()
	switch {
	case string(key) == keyCurrentTerm && rec.term > 0:
		return rec.term, nil
	case string(key) == keyLastVoteTerm && rec.candidate != "":
		return rec.voteTerm, nil
	}
	return 0, errKeyNotFound
}

// Get implements raft.StableStore.
func (s *stableStore) Get(key []byte) ([]byte, error) {
	if rec := s.record(); string(key) == keyLastVoteCand && rec.candidate != "" {
		return []byte(rec.candidate), nil
	}
	return nil, errKeyNotFound
}

// SetUint64 implements raft.StableStore.
func (s *stableStore) SetUint64(key []byte, v uint64) error {
	switch string(key) {
	case keyLastVoteTerm:
		s.mu.Lock()
		s.voteTerm = v
		s.mu.Unlock()
		return nil
	case keyCurrentTerm:
		if err := s.setTerm(v); err != nil {
			return err
		}
		if s.onSet != nil {
			s.onSet()
		}
		return nil
	}
	return fmt.Errorf("stable store: no key %q: %w", key, trivet.ErrInvalid)
}

// setTerm raises the current term. A lower one is kept from the disk: the library's heartbeat
// handler runs beside its main goroutine, and the loser of their race must not take back a term in
// which this replica may have voted.
func (s *stableStore) setTerm(v uint64) error {
	s.turn <- struct{}{}
	defer func() { <-s.turn }()
	rec := s.record()
	if v <= rec.term {
		return nil
	}
	rec.term = v
	err := s.write(rec)
	if s.guard.failed() != nil {
		return nil // the library panics on an error; of a failed group nothing leaves any more (diskGuard)
	}
	return err
}

// Set implements raft.StableStore.
func (s *stableStore) Set(key, v []byte) error {
	if string(key) != keyLastVoteCand {
		return fmt.Errorf("stable store: no key %q: %w", key, trivet.ErrInvalid)
	}
	s.turn <- struct{}{}
	defer func() { <-s.turn }()
	s.mu.Lock()
	term := s.voteTerm
	rec := stableRecord{term: max(s.rec.term, term), voteTerm: term, candidate: string(v)}
	s.voteTerm = 0
	s.mu.Unlock()
	if term == 0 {
		return fmt.Errorf("stable store: vote for %q without a term: %w", v, trivet.ErrInvalid)
	}
	return s.write(rec)
}

// write makes a record durable and then visible. REQUIRES: turn.
func (s *stableStore) write(rec stableRecord) error {
	err := s.guard.run("write term and vote", func() error { return s.log.SetStable(rec.stable()) })
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.rec = rec
	return nil
}
