package raftgroup_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"sync"

	"github.com/cockroachdb/pebble/v2/vfs"

	"github.com/trivet-csi/trivet/replication/raftgroup"
)

// kv is a state machine that is durable when flushed, and not before. A command is "key=value"; its
// result is the value that was there.
type kv struct {
	fs  vfs.FS
	dir string

	lieOnFlush bool // claim to have flushed without doing so (H1)

	mu      sync.Mutex
	state   kvState
	history map[uint64]string // index to "term data" of every entry seen in this life
	failure error             // of the next Apply
	gate    chan struct{}     // not nil: Restore waits for it
	// applyGate, when not nil, holds every Apply.
	applyGate chan struct{}
}

type kvState struct {
	Index, Term uint64
	Data        map[string]string
	Members     []raftgroup.Member
}

const (
	kvFile      = "state"
	kvRestoring = "restoring"
)

func openKV(fs vfs.FS, dir string) (*kv, error) {
	if err := fs.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	if err := syncDir(fs, fs.PathDir(dir)); err != nil {
		return nil, err
	}
	m := &kv{fs: fs, dir: dir, history: map[uint64]string{}, state: kvState{Data: map[string]string{}}}
	f, err := fs.Open(fs.PathJoin(dir, kvFile))
	if errors.Is(err, os.ErrNotExist) {
		return m, nil
	}
	if err != nil {
		return nil, err
	}
	b, err := io.ReadAll(f)
	if err == nil {
		err = json.Unmarshal(b, &m.state)
	}
	return m, errors.Join(err, f.Close())
}

func syncDir(fs vfs.FS, dir string) error {
	d, err := fs.OpenDir(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

func (m *kv) Apply(entries []raftgroup.Entry) ([]any, error) {
	m.mu.Lock()
	hold := m.applyGate
	m.mu.Unlock()
	if hold != nil {
		<-hold
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.failure != nil {
		return nil, m.failure
	}
	out := make([]any, len(entries))
	for i, e := range entries {
		if e.Index <= m.state.Index {
			continue
		}
		if e.Members != nil {
			m.state.Members = e.Members
		} else {
			k, v, _ := bytes.Cut(e.Data, []byte("="))
			out[i] = m.state.Data[string(k)]
			m.state.Data[string(k)] = string(v)
		}
		m.state.Index, m.state.Term = e.Index, e.Term
		m.history[e.Index] = fmt.Sprintf("%d %s", e.Term, e.Data)
	}
	return out, nil
}

func (m *kv) Applied() (index, term uint64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.state.Index, m.state.Term
}

func (m *kv) Flush() (uint64, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.lieOnFlush {
		return m.state.Index, nil
	}
	return m.state.Index, m.saveLocked()
}

func (m *kv) saveLocked() error {
	b, err := json.Marshal(m.state)
	if err != nil {
		return err
	}
	return m.put(kvFile, b)
}

func (m *kv) put(name string, b []byte) error {
	path := m.fs.PathJoin(m.dir, name)
	f, err := m.fs.Create(path+".tmp", vfs.WriteCategoryUnspecified)
	if err != nil {
		return err
	}
	_, err = f.Write(bytes.Clone(b))
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	if err := m.fs.Rename(path+".tmp", path); err != nil {
		return err
	}
	return syncDir(m.fs, m.dir)
}

type kvImage struct {
	*bytes.Reader
	size int64
}

func (i kvImage) Size() int64  { return i.size }
func (i kvImage) Close() error { return nil }

func (m *kv) Want() []byte { return nil }

func (m *kv) Image([]byte) (raftgroup.Image, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	b, err := json.Marshal(m.state)
	return kvImage{bytes.NewReader(b), int64(len(b))}, err
}

// Restore marks itself, then replaces the state, then clears the mark.
func (m *kv) Restore(r io.Reader) error {
	m.mu.Lock()
	gate := m.gate
	m.mu.Unlock()
	if gate != nil {
		<-gate
	}
	if err := m.put(kvRestoring, nil); err != nil {
		return err
	}
	b, err := io.ReadAll(r)
	if err != nil {
		return err
	}
	state := kvState{}
	if err := json.Unmarshal(b, &state); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.state = state
	if err := m.saveLocked(); err != nil {
		return err
	}
	if err := m.fs.Remove(m.fs.PathJoin(m.dir, kvRestoring)); err != nil {
		return err
	}
	return syncDir(m.fs, m.dir)
}

func (m *kv) Restoring() bool {
	_, err := m.fs.Stat(m.fs.PathJoin(m.dir, kvRestoring))
	return err == nil
}

func (m *kv) get(k string) string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.state.Data[k]
}

func (m *kv) data() map[string]string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return maps.Clone(m.state.Data)
}

func (m *kv) seen() map[uint64]string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return maps.Clone(m.history)
}

func (m *kv) holdApply(gate chan struct{}) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.applyGate = gate
}

func (m *kv) fail(err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.failure = err
}
