package raftgroup

import (
	"errors"
	"fmt"
	"sync"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/hashicorp/raft"

	"github.com/trivet-csi/trivet"
)

const (
	magicStable = "trvtvot\x01"

	keyCurrentTerm  = "CurrentTerm"
	keyLastVoteTerm = "LastVoteTerm"
	keyLastVoteCand = "LastVoteCand"
)

// errKeyNotFound has the text by which the library knows a missing key (api.go:519).
var errKeyNotFound = errors.New("not found")

// stableRecord is all that the library keeps in its stable store.
//
//	term u64 | vote term u64 | candidate string
type stableRecord struct {
	term, voteTerm uint64
	candidate      string // an address; empty = never voted
}

func (r stableRecord) encode() []byte { return putString(put64(nil, r.term, r.voteTerm), r.candidate) }

func decodeStable(b []byte) (stableRecord, error) {
	d := decoder{b: b}
	r := stableRecord{term: d.u64(), voteTerm: d.u64(), candidate: d.str()}
	if err := d.finish("stable record"); err != nil {
		return stableRecord{}, err
	}
	if r.voteTerm > r.term {
		return stableRecord{}, fmt.Errorf("voted in term %d, after the current term %d: %w",
			r.voteTerm, r.term, trivet.ErrCorrupt)
	}
	return r, nil
}

// stableStore is the library's StableStore over one slot file. The term of a vote is held back
// until its candidate follows, so both reach the disk in one record or not at all: with two
// records a crash between them made a replica grant a vote to a candidate with a stale log (D5).
type stableStore struct {
	guard *diskGuard
	onSet func() // called after a change of term, without locks

	mu       sync.Mutex // spans disk I/O: votes are rare, and must not pass each other
	file     *slotFile
	rec      stableRecord
	voteTerm uint64 // given by SetUint64, waits for its candidate; 0 = none
}

var _ raft.StableStore = (*stableStore)(nil)

func openStable(fs vfs.FS, dir string, guard *diskGuard) (*stableStore, error) {
	f, b, err := openSlots(fs, dir, fileStable, magicStable)
	if isNotExist(err) {
		return nil, fmt.Errorf("file %s is gone: %w", fileStable, trivet.ErrCorrupt)
	}
	if err != nil {
		return nil, err
	}
	rec, err := decodeStable(b)
	if err != nil {
		return nil, errors.Join(err, f.close())
	}
	return &stableStore{guard: guard, file: f, rec: rec}, nil
}

func (s *stableStore) record() stableRecord {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.rec
}

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

func (s *stableStore) Get(key []byte) ([]byte, error) {
	if rec := s.record(); string(key) == keyLastVoteCand && rec.candidate != "" {
		return []byte(rec.candidate), nil
	}
	return nil, errKeyNotFound
}

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
	s.mu.Lock()
	defer s.mu.Unlock()
	if v <= s.rec.term {
		return nil
	}
	rec := s.rec
	rec.term = v
	err := s.writeLocked(rec)
	if s.guard.failed() != nil {
		return nil // the library panics on an error; of a failed group nothing leaves any more (diskGuard)
	}
	return err
}

func (s *stableStore) Set(key, v []byte) error {
	if string(key) != keyLastVoteCand {
		return fmt.Errorf("stable store: no key %q: %w", key, trivet.ErrInvalid)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.voteTerm == 0 {
		return fmt.Errorf("stable store: vote for %q without a term: %w", v, trivet.ErrInvalid)
	}
	rec := stableRecord{term: max(s.rec.term, s.voteTerm), voteTerm: s.voteTerm, candidate: string(v)}
	s.voteTerm = 0
	return s.writeLocked(rec)
}

func (s *stableStore) writeLocked(rec stableRecord) error {
	err := s.guard.run("write term and vote", func() error { return s.file.write(rec.encode()) })
	if err != nil {
		return err
	}
	s.rec = rec
	return nil
}

func (s *stableStore) close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.file.close()
}
