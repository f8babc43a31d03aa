package raftgroup

import (
	"errors"
	"fmt"
	"slices"
	"sync"

	"github.com/hashicorp/raft"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/internal/stage"
)

// groupConfig is one configuration and the index of its entry.
type groupConfig struct {
	index   uint64
	members []Member
}

// logStore is the library's LogStore over the group's log. It knows the configurations in the log (the
// library tells nobody their indexes). What was stored last is read from the memory of the shared log.
type logStore struct {
	log      *groupLog
	guard    *diskGuard
	overlap  bool // Config.OverlapFlush
	durable  *durability
	onAppend func() // called after entries were stored, without locks

	leads, follows *stage.Meter // appends until they are on stable storage; nil = not measured

	mu       sync.Mutex
	configs  []groupConfig // of the log, in order; before them the one of the snapshot
	appended int64         // bytes stored since Open, as entryBytes counts them
	cut      bool          // a tail was deleted and nothing stored in its place yet
}

var (
	_ raft.LogStore          = (*logStore)(nil)
	_ raft.MonotonicLogStore = (*logStore)(nil)
)

// newLogStore takes the log over. base is the configuration of the snapshot. It returns ErrCorrupt
// when a configuration in the log cannot be read, unless it is in holes: the library would panic on it.
func newLogStore(log *groupLog, guard *diskGuard, base groupConfig, overlap bool, holes ...uint64) (*logStore, error) {
	s := &logStore{log: log, guard: guard, overlap: overlap}
	_, last := log.bounds()
	// An earlier run in this process may have left appends in the queue: they are no more durable for that.
	if err := log.TruncateSuffix(last + 1); err != nil {
		return nil, err
	}
	s.durable = newDurability(guard, last)
	return s, s.loadConfigs(base, holes...)
}

// loadConfigs reads the configurations in the log anew, but for those in holes.
func (s *logStore) loadConfigs(base groupConfig, holes ...uint64) error {
	var configs []groupConfig
	if base.index > 0 {
		configs = append(configs, base)
	}
	first, last := s.log.bounds()
	for index := max(first, base.index+1); index <= last; index++ {
		_, typ, err := s.log.TermType(index)
		if err != nil {
			return err
		}
		if raft.LogType(typ) != raft.LogConfiguration || slices.Contains(holes, index) {
			continue
		}
		var e raft.Log
		if err := s.log.read(index, &e); err != nil {
			return err
		}
		members, err := decodeConfiguration(e.Data)
		if err != nil {
			return fmt.Errorf("entry %d of %s: %v: %w", index, s.log.id, err, trivet.ErrCorrupt)
		}
		configs = append(configs, groupConfig{index, members})
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.configs = configs
	return nil
}

// IsMonotonic says no, though indexes have no gaps: of a store that says yes the library empties the log
// under an installed snapshot and remembers a last entry that is gone (D6). No snapshot of ours passes
// through it, but this need not rest on that alone.
func (s *logStore) IsMonotonic() bool { return false }

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
// with == (replication.go:223). Damage ends this run of the group, and the library never hears of it, as it panics on
// any other error (raft.go:1331): it gets an empty entry in a group that is dead (diskGuard).
func (s *logStore) GetLog(index uint64, out *raft.Log) error {
	err := s.log.read(index, out)
	if err == nil || errors.Is(err, raft.ErrLogNotFound) || errors.Is(err, trivet.ErrClosed) {
		return err
	}
	s.met(err)
	if s.guard.failed() == nil { // closed meanwhile
		return err
	}
	*out = raft.Log{Index: index, Type: raft.LogNoop}
	return nil
}

// StoreLog stores one entry.
func (s *logStore) StoreLog(e *raft.Log) error { return s.StoreLogs([]*raft.Log{e}) }

// StoreLogs returns once the entries are on stable storage, or, with OverlapFlush, once they are queued
// (durable.go). Their data belongs to the log from then on.
//
// ErrNoSpace leaves the group alive, as nothing was written: a leader gives up leadership for it, and a
// follower answers that it could not. But a follower that has deleted a tail for these entries would go on
// with a wrong idea of its last one (raft.go:1562), so there it is fatal like any other error (H26).
func (s *logStore) StoreLogs(entries []*raft.Log) error {
	var configs []groupConfig
	for _, e := range entries {
		if e.Type != raft.LogConfiguration {
			continue
		}
		members, err := decodeConfiguration(e.Data)
		if err != nil {
			return fmt.Errorf("store entry %d of %s: %w", e.Index, s.log.id, err)
		}
		configs = append(configs, groupConfig{e.Index, members})
	}
	s.mu.Lock()
	cut := s.cut
	s.mu.Unlock()
	overlap := s.mayOverlap(configs)
	var full error
	err := s.guard.run("store entries", func() error {
		err := s.put(entries, overlap)
		if errors.Is(err, trivet.ErrNoSpace) && !cut {
			full, err = err, nil
		}
		return err
	})
	if err = errors.Join(err, full); err != nil {
		return err
	}
	s.stored(entries, configs)
	if s.onAppend != nil {
		s.onAppend()
	}
	return nil
}

// mayOverlap reports whether an append need not wait for the disk. A configuration must: it counts from the moment
// it is stored, and one that a crash takes back can leave a group that nobody can be elected in (docs/models). So
// must all that a single voter stores, since its word alone commits.
func (s *logStore) mayOverlap(configs []groupConfig) bool {
	return s.overlap && len(configs) == 0 && voterN(s.latestConfig().members) > 1
}

// put appends, and keeps durable true.
func (s *logStore) put(entries []*raft.Log, overlap bool) error {
	if len(entries) == 0 {
		return nil
	}
	first, last := entries[0].Index, entries[len(entries)-1].Index
	meter := s.follows
	if !entries[0].AppendedAt.IsZero() { // which the library sets in a leader, and nobody sends
		meter = s.leads
	}
	spent := meter.Begin()
	if !overlap {
		defer spent.End()
		s.durable.cut(first) // whether it succeeds or not: a failed one may be there after all
		err := s.log.append(entries)
		if err == nil {
			s.durable.stored(first, last)
		}
		return err
	}
	tickets, err := s.log.queue(entries)
	if err != nil {
		for _, t := range tickets {
			err = errors.Join(err, t.Err())
		}
		s.durable.cut(first)
		spent.End()
		return err
	}
	return s.durable.queue(first, last, tickets[len(tickets)-1], spent)
}

func (s *logStore) stored(entries []*raft.Log, configs []groupConfig) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.cut = false
	if len(entries) > 0 {
		s.dropConfigsLocked(entries[0].Index)
	}
	s.configs = append(s.configs, configs...)
	for _, e := range entries {
		s.appended += entryBytes(len(e.Data))
	}
}

// dropConfigsLocked forgets the configurations from an index on.
func (s *logStore) dropConfigsLocked(from uint64) {
	for len(s.configs) > 0 && s.configs[len(s.configs)-1].index >= from {
		s.configs = s.configs[:len(s.configs)-1]
	}
}

// DeleteRange removes a prefix or a suffix, durably before it returns, in one step: a hole would lose
// acknowledged entries (braft issue 119).
func (s *logStore) DeleteRange(lo, hi uint64) error {
	first, last := s.log.bounds()
	if lo > hi || last < first || hi < first || lo > last {
		return nil
	}
	if lo > first && hi < last {
		return fmt.Errorf("delete entries %d to %d of %s, has %d to %d: %w",
			lo, hi, s.log.id, first, last, trivet.ErrInvalid)
	}
	if hi >= last { // of a prefix the newest configuration still rules, whether or not its entry is there
		s.mu.Lock()
		s.dropConfigsLocked(lo)
		s.cut = true
		s.mu.Unlock()
	}
	return s.guard.run("delete entries", func() error {
		if lo <= first {
			return s.log.TrimPrefix(hi)
		}
		s.durable.cut(lo)
		return s.log.TruncateSuffix(lo)
	})
}

// install replaces the whole log by a snapshot that ends at index.
func (s *logStore) install(index uint64, base groupConfig) error {
	err := s.guard.run("reset log", func() error { return s.log.Reset(index + 1) })
	if err != nil {
		return err
	}
	s.durable.reset(index)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.configs, s.cut = []groupConfig{base}, false
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
