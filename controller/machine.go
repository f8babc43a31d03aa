package controller

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/cockroachdb/pebble/v2/vfs"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller/meta"
	"github.com/trivet-csi/trivet/replication/raftgroup"
)

// machine is the catalogue as the state machine of a Raft group. The state is in memory; Flush
// writes it to one file as a whole, and after a restart the log above that file's index is applied
// again. So state and applied index are always of one piece (H2), and the log is never cut above
// what the file was seen to hold (H1).
type machine struct {
	fs  vfs.FS
	dir string

	fileMu  sync.Mutex // held while the file is written; taken before mu
	flushed uint64     // index that was read back from the file

	mu      sync.Mutex
	now     snapshot
	moved   chan struct{} // closed when now.index changes
	changed chan struct{} // closed when now.state changes
}

var _ raftgroup.StateMachine = (*machine)(nil)

// newMachine returns a machine with the empty catalogue. load puts it in order.
func newMachine(fs vfs.FS, dir string) *machine {
	return &machine{
		fs: fs, dir: dir, now: snapshot{state: &meta.State{}}, moved: make(chan struct{}), changed: make(chan struct{}),
	}
}

// load takes the state from the file, if there is one.
func (m *machine) load() error {
	m.fileMu.Lock()
	defer m.fileMu.Unlock()
	s, err := m.readBack()
	if errors.Is(err, trivet.ErrNotFound) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("load catalogue from %s: %w", m.dir, err)
	}
	m.flushed = s.index
	m.publish(s)
	return nil
}

func (m *machine) readBack() (snapshot, error) {
	b, err := readFile(m.fs, m.dir, snapshotFile)
	if err != nil {
		return snapshot{}, err
	}
	return decodeSnapshot(b)
}

// publish makes s what readers see.
func (m *machine) publish(s snapshot) {
	m.mu.Lock()
	defer m.mu.Unlock()
	before := m.now
	m.now = s
	if before.index != s.index {
		close(m.moved)
		m.moved = make(chan struct{})
	}
	if before.state != s.state {
		close(m.changed)
		m.changed = make(chan struct{})
	}
}

func (m *machine) view() snapshot {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.now
}

func (m *machine) changedChan() <-chan struct{} {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.changed
}

// waitIndex returns the state once it holds everything up to index.
func (m *machine) waitIndex(ctx context.Context, index uint64) (*meta.State, error) {
	for {
		m.mu.Lock()
		now, moved := m.now, m.moved
		m.mu.Unlock()
		if now.index >= index {
			return now.state, nil
		}
		select {
		case <-moved:
		case <-ctx.Done():
			return nil, fmt.Errorf("local copy is at index %d, not %d (%v): %w",
				now.index, index, context.Cause(ctx), trivet.ErrUnavailable)
		}
	}
}

// forget begins anew, with the empty catalogue, for another member. REQUIRES: no group runs it.
func (m *machine) forget() {
	m.fileMu.Lock()
	defer m.fileMu.Unlock()
	m.flushed = 0
	m.publish(snapshot{state: &meta.State{}})
}

// Apply implements raftgroup.StateMachine. Its results are meta.Results. A command that cannot be
// decoded was written by a newer program: the member must stop rather than skip it, or its state
// would differ from the others'.
func (m *machine) Apply(entries []raftgroup.Entry) ([]any, error) {
	now := m.view() // Apply and Restore alone change it, and never at once
	machine := meta.NewMachine(now.state)
	results := make([]any, len(entries))
	for i, e := range entries {
		if e.Index <= now.index {
			continue
		}
		if e.Members == nil {
			c, err := meta.Decode(e.Data)
			if err != nil {
				return nil, fmt.Errorf("apply catalogue entry %d: %w", e.Index, err)
			}
			results[i] = machine.Apply(c)
		}
		now.index, now.term = e.Index, e.Term
	}
	now.state = machine.State()
	m.publish(now)
	return results, nil
}

// Applied implements raftgroup.StateMachine.
func (m *machine) Applied() (index, term uint64) {
	now := m.view()
	return now.index, now.term
}

// Flush implements raftgroup.StateMachine.
func (m *machine) Flush() (uint64, error) {
	m.fileMu.Lock()
	defer m.fileMu.Unlock()
	now := m.view()
	if now.index == m.flushed {
		return m.flushed, nil
	}
	if err := m.write(now); err != nil {
		return 0, fmt.Errorf("flush catalogue at index %d: %w", now.index, err)
	}
	return m.flushed, nil
}

// write makes s durable and checks that it can be read again.
func (m *machine) write(s snapshot) error {
	b, err := s.encode()
	if err != nil {
		return err
	}
	if err := writeFile(m.fs, m.dir, snapshotFile, b); err != nil {
		return err
	}
	back, err := m.readBack()
	if err != nil {
		return err
	}
	if back.index != s.index || back.term != s.term {
		return fmt.Errorf("read back index %d of term %d, wrote %d of %d: %w",
			back.index, back.term, s.index, s.term, trivet.ErrCorrupt)
	}
	m.flushed = back.index
	return nil
}

// image is an encoded snapshot.
type image struct{ *bytes.Reader }

func (image) Close() error { return nil }

// Size returns the length in bytes, whatever was read of it.
func (i image) Size() int64 { return i.Reader.Size() }

// Want implements raftgroup.StateMachine: always everything, which is little.
func (m *machine) Want() []byte { return nil }

// Image implements raftgroup.StateMachine.
func (m *machine) Image([]byte) (raftgroup.Image, error) {
	b, err := m.view().encode()
	if err != nil {
		return nil, fmt.Errorf("image of the catalogue: %w", err)
	}
	return image{bytes.NewReader(b)}, nil
}

// Restore implements raftgroup.StateMachine. The file is replaced in one step, so an interrupted
// Restore leaves the old state, whole.
func (m *machine) Restore(r io.Reader) error {
	b, err := readAll(r)
	if err != nil {
		return fmt.Errorf("restore catalogue: %w", err)
	}
	s, err := decodeSnapshot(b)
	if err != nil {
		return fmt.Errorf("restore catalogue: %w", err)
	}
	m.fileMu.Lock()
	defer m.fileMu.Unlock()
	if err := m.write(s); err != nil {
		return fmt.Errorf("restore catalogue at index %d: %w", s.index, err)
	}
	m.publish(s)
	return nil
}

// Restoring implements raftgroup.StateMachine: never, see Restore.
func (m *machine) Restoring() bool { return false }
