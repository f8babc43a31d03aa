package raftgroup_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"reflect"
	"slices"
	"sync"

	"github.com/cockroachdb/pebble/v2/vfs"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/replication/raftgroup"
)

// kv is a state machine that is durable when flushed, and not before. A command is "key=value"; its
// result is the value that was there. Its images leave out what a machine has, and a Restore that was
// interrupted goes on where it stood.
type kv struct {
	fs  vfs.FS
	dir string

	lieOnFlush bool // claim to have flushed without doing so (H1)

	mu      sync.Mutex
	state   kvState
	history map[uint64]string // index to "term data" of every entry seen in this life
	failure error             // of the next Apply
	gate    chan struct{}     // not nil: Restore waits for it
	onRow   func(n int)       // called for every row that Restore has taken, without locks
	rows    int               // that Restore has taken, in this life
	// applyGate, when not nil, holds every Apply.
	applyGate chan struct{}
}

type kvState struct {
	Index, Term uint64
	Data        map[string]string
	Changed     map[string]uint64 // index of the last change
	Members     []raftgroup.Member
	Partial     *kvPartial `json:",omitempty"` // a Restore was begun
}

// kvPartial is how far a Restore got: keys up to Key are at least as of entry Target, the others of Index.
type kvPartial struct {
	Key    string
	Target uint64
}

// kvWant is what kv says that it has.
type kvWant struct {
	Index   uint64
	Partial *kvPartial `json:",omitempty"`
}

// kvHead is the first line of an image, and kvRow each further one.
type kvHead struct {
	Index, Term uint64
	Members     []raftgroup.Member
	For         *kvWant
}

type kvRow struct {
	K, V    string
	Changed uint64
}

const (
	kvFile    = "state"
	kvSaveRow = 32 // rows after which a Restore notes how far it got
)

func openKV(fs vfs.FS, dir string) (*kv, error) {
	if err := fs.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	if err := syncDir(fs, fs.PathDir(dir)); err != nil {
		return nil, err
	}
	m := &kv{fs: fs, dir: dir, history: map[uint64]string{}, state: newKVState()}
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

func newKVState() kvState {
	return kvState{Data: map[string]string{}, Changed: map[string]uint64{}}
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
			m.state.Changed[string(k)] = e.Index
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

func (m *kv) wantLocked() *kvWant { return &kvWant{m.state.Index, m.state.Partial} }

func (m *kv) Want() []byte {
	m.mu.Lock()
	defer m.mu.Unlock()
	b, err := json.Marshal(m.wantLocked())
	if err != nil {
		panic(err)
	}
	return b
}

// lacks reports whether a machine with that want lacks the newest value of a key.
func (w *kvWant) lacks(key string, changed uint64) bool {
	if w == nil {
		return true
	}
	if w.Partial != nil && key <= w.Partial.Key {
		return changed > w.Partial.Target
	}
	return changed > w.Index
}

func (m *kv) Image(want []byte) (raftgroup.Image, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	var w *kvWant
	if len(want) > 0 {
		w = new(kvWant)
		if err := json.Unmarshal(want, w); err != nil {
			return nil, err
		}
	}
	var out bytes.Buffer
	enc := json.NewEncoder(&out)
	if err := enc.Encode(kvHead{m.state.Index, m.state.Term, m.state.Members, w}); err != nil {
		return nil, err
	}
	for _, k := range slices.Sorted(maps.Keys(m.state.Data)) {
		if changed := m.state.Changed[k]; w.lacks(k, changed) {
			if err := enc.Encode(kvRow{k, m.state.Data[k], changed}); err != nil {
				return nil, err
			}
		}
	}
	return kvImage{bytes.NewReader(out.Bytes()), int64(out.Len())}, nil
}

// Restore marks itself, then changes the state row by row, then clears the mark.
func (m *kv) Restore(r io.Reader) error {
	m.mu.Lock()
	gate := m.gate
	m.mu.Unlock()
	if gate != nil {
		<-gate
	}
	dec := json.NewDecoder(r)
	var head kvHead
	if err := dec.Decode(&head); err != nil {
		return err
	}
	if err := m.beginRestore(head); err != nil {
		return err
	}
	for n := 1; ; n++ {
		var row kvRow
		err := dec.Decode(&row)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
		if err := m.takeRow(row, head.Index, n); err != nil {
			return err
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.state.Index, m.state.Term, m.state.Members, m.state.Partial = head.Index, head.Term, head.Members, nil
	return m.saveLocked()
}

func (m *kv) beginRestore(head kvHead) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if head.Index < m.state.Index {
		return fmt.Errorf("image at %d, machine at %d: %w", head.Index, m.state.Index, trivet.ErrInvalid)
	}
	if w := m.wantLocked(); head.For != nil && !reflect.DeepEqual(head.For, w) {
		return fmt.Errorf("image for %v, machine wants %v: %w", head.For, w, trivet.ErrInvalid)
	}
	if p := m.state.Partial; p != nil && head.For != nil && head.Index < p.Target {
		return fmt.Errorf("image at %d, restore of %d was begun: %w", head.Index, p.Target, trivet.ErrInvalid)
	}
	if head.For == nil {
		index, term := m.state.Index, m.state.Term
		m.state = newKVState()
		m.state.Index, m.state.Term = index, term
	}
	if m.state.Partial == nil {
		m.state.Partial = &kvPartial{}
	}
	return m.saveLocked()
}

func (m *kv) takeRow(row kvRow, index uint64, n int) error {
	m.mu.Lock()
	m.state.Data[row.K], m.state.Changed[row.K] = row.V, row.Changed
	m.rows++
	if row.K >= m.state.Partial.Key {
		m.state.Partial = &kvPartial{row.K, index}
	}
	var err error
	if n%kvSaveRow == 0 {
		err = m.saveLocked()
	}
	hook := m.onRow
	m.mu.Unlock()
	if hook != nil {
		hook(n)
	}
	return err
}

func (m *kv) Restoring() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.state.Partial != nil
}

// taken returns how many rows Restore has taken in this life.
func (m *kv) taken() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.rows
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
