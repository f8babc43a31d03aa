package raftgroup

import (
	"errors"
	"fmt"
	"sync"

	"github.com/hashicorp/raft"

	"github.com/trivet-csi/trivet"
)

// cacheBytesMax bounds the entries of one group that are kept in memory for its followers and its
// own apply.
const cacheBytesMax = 2 << 20

// groupConfig is one configuration and the index of its entry.
type groupConfig struct {
	index   uint64
	members []Member
}

// logStore is the library's LogStore over a segmentLog. It keeps the newest entries in memory,
// knows the configurations in the log (the library tells nobody their indexes), and poisons itself
// on the first failed write.
type logStore struct {
	log      *segmentLog
	guard    *diskGuard
	onAppend func() // called after entries were stored, without locks

	mu         sync.Mutex
	configs    []groupConfig // of the log, in order; before them the one of the snapshot
	cache      []raft.Log    // the newest entries, in order; data is shared and never written to
	cacheBytes int
	appended   int64 // bytes of data stored since Open
}

var (
	_ raft.LogStore          = (*logStore)(nil)
	_ raft.MonotonicLogStore = (*logStore)(nil)
)

// newLogStore takes the log over. base is the configuration of the snapshot. It returns ErrCorrupt
// when a configuration in the log cannot be read: the library would panic on it.
func newLogStore(log *segmentLog, guard *diskGuard, base groupConfig) (*logStore, error) {
	s := &logStore{log: log, guard: guard}
	if base.index > 0 {
		s.configs = append(s.configs, base)
	}
	for _, index := range log.configIndexes() {
		if index <= base.index {
			continue
		}
		var e raft.Log
		if err := log.read(index, &e); err != nil {
			return nil, err
		}
		members, err := decodeConfiguration(e.Data)
		if err != nil {
			return nil, fmt.Errorf("entry %d of %s: %v: %w", index, log.opts.group, err, trivet.ErrCorrupt)
		}
		s.configs = append(s.configs, groupConfig{index, members})
	}
	return s, nil
}

// IsMonotonic tells the library that indexes have no gaps.
func (s *logStore) IsMonotonic() bool { return true }

// FirstIndex returns the index of the first entry, 0 when there is none.
func (s *logStore) FirstIndex() (uint64, error) {
	first, last := s.log.bounds()
	if last < first {
		return 0, nil
	}
	return first, nil
}

// LastIndex returns the index of the last entry, 0 when there is none.
func (s *logStore) LastIndex() (uint64, error) {
	first, last := s.log.bounds()
	if last < first {
		return 0, nil
	}
	return last, nil
}

// GetLog returns exactly raft.ErrLogNotFound for an entry that is not there: the library compares
// with == (replication.go:223). Damage is fatal, and the library never hears of it, as it panics on
// any other error (raft.go:1331): it gets an empty entry in a group that is dead (diskGuard).
func (s *logStore) GetLog(index uint64, out *raft.Log) error {
	if s.cached(index, out) {
		return nil
	}
	err := s.log.read(index, out)
	if err == nil || errors.Is(err, raft.ErrLogNotFound) || errors.Is(err, trivet.ErrClosed) {
		return err
	}
	s.guard.fail(err)
	if s.guard.failed() == nil { // closed meanwhile
		return err
	}
	*out = raft.Log{Index: index, Type: raft.LogNoop}
	return nil
}

func (s *logStore) cached(index uint64, out *raft.Log) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.cache) == 0 || index < s.cache[0].Index || index-s.cache[0].Index >= uint64(len(s.cache)) {
		return false
	}
	*out = s.cache[index-s.cache[0].Index]
	return true
}

// StoreLog stores one entry.
func (s *logStore) StoreLog(e *raft.Log) error { return s.StoreLogs([]*raft.Log{e}) }

// StoreLogs returns once the entries are on stable storage.
func (s *logStore) StoreLogs(entries []*raft.Log) error {
	var configs []groupConfig
	for _, e := range entries {
		if e.Type != raft.LogConfiguration {
			continue
		}
		members, err := decodeConfiguration(e.Data)
		if err != nil {
			return fmt.Errorf("store entry %d of %s: %w", e.Index, s.log.opts.group, err)
		}
		configs = append(configs, groupConfig{e.Index, members})
	}
	if err := s.guard.run("store entries", func() error { return s.log.append(entries) }); err != nil {
		return err
	}
	s.mu.Lock()
	s.configs = append(s.configs, configs...)
	for _, e := range entries {
		s.cache = append(s.cache, raft.Log{Index: e.Index, Term: e.Term, Type: e.Type, Data: e.Data})
		s.cacheBytes += len(e.Data)
		s.appended += recordSize(len(e.Data))
	}
	s.evictLocked()
	s.mu.Unlock()
	if s.onAppend != nil {
		s.onAppend()
	}
	return nil
}

func (s *logStore) evictLocked() {
	n := 0
	for n < len(s.cache) && s.cacheBytes > cacheBytesMax {
		s.cacheBytes -= len(s.cache[n].Data)
		n++
	}
	clear(s.cache[:n])
	s.cache = s.cache[n:]
}

// DeleteRange removes a prefix or a suffix, durably before it returns.
func (s *logStore) DeleteRange(lo, hi uint64) error {
	first, last := s.log.bounds()
	if lo > hi || last < first || hi < first || lo > last {
		return nil
	}
	if lo > first && hi < last {
		return fmt.Errorf("delete entries %d to %d of %s, has %d to %d: %w",
			lo, hi, s.log.opts.group, first, last, trivet.ErrInvalid)
	}
	s.forget(lo, hi)
	return s.guard.run("delete entries", func() error {
		switch {
		case lo <= first && hi >= last:
			return s.log.reset(last + 1)
		case lo <= first:
			return s.log.trim(hi + 1)
		default:
			return s.log.truncate(lo - 1)
		}
	})
}

// forget drops what is in memory of entries that are about to go. Before they go, so that nobody
// reads an entry from memory that its successor has replaced on disk.
func (s *logStore) forget(lo, hi uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	keep := s.cache[:0:0]
	s.cacheBytes = 0
	for _, e := range s.cache {
		if e.Index < lo || e.Index > hi {
			keep = append(keep, e)
			s.cacheBytes += len(e.Data)
		}
	}
	s.cache = keep
	if _, last := s.log.bounds(); hi < last {
		return // a prefix: its newest configuration still rules, whether or not its entry is there
	}
	for len(s.configs) > 0 && s.configs[len(s.configs)-1].index >= lo {
		s.configs = s.configs[:len(s.configs)-1]
	}
}

// install replaces the whole log by a snapshot that ends at index.
func (s *logStore) install(index uint64, base groupConfig) error {
	err := s.guard.run("reset log", func() error { return s.log.reset(index + 1) })
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.cache, s.cacheBytes, s.configs = nil, 0, []groupConfig{base}
	return nil
}

// latestConfig returns the newest configuration, committed or not.
func (s *logStore) latestConfig() groupConfig {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.configs) == 0 {
		return groupConfig{}
	}
	return s.configs[len(s.configs)-1]
}

// configAt returns the newest configuration whose entry is at or below index.
func (s *logStore) configAt(index uint64) groupConfig {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := len(s.configs) - 1; i >= 0; i-- {
		if s.configs[i].index <= index {
			return s.configs[i]
		}
	}
	return groupConfig{}
}

// appendedBytes returns the bytes stored since Open.
func (s *logStore) appendedBytes() int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.appended
}
