package main

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"sync/atomic"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/replication/raftgroup"
)

// forgetful is a state machine that knows how far it is and nothing else: it stands for an engine that
// stores no values, so that what remains is the log and the network.
type forgetful struct{ at, term atomic.Uint64 }

var _ raftgroup.StateMachine = (*forgetful)(nil)

// Apply implements raftgroup.StateMachine.
func (f *forgetful) Apply(entries []raftgroup.Entry) ([]any, error) {
	last := entries[len(entries)-1]
	f.at.Store(last.Index)
	f.term.Store(last.Term)
	return make([]any, len(entries)), nil
}

// Applied implements raftgroup.StateMachine.
func (f *forgetful) Applied() (index, term uint64) { return f.at.Load(), f.term.Load() }

// Flush implements raftgroup.StateMachine. There is nothing to make durable; the process is never restarted.
func (f *forgetful) Flush() (uint64, error) { return f.at.Load(), nil }

// Want implements raftgroup.StateMachine.
func (f *forgetful) Want() []byte { return nil }

// Image implements raftgroup.StateMachine.
func (f *forgetful) Image([]byte) (raftgroup.Image, error) {
	b := binary.BigEndian.AppendUint64(nil, f.at.Load())
	return image{bytes.NewReader(binary.BigEndian.AppendUint64(b, f.term.Load()))}, nil
}

// Restore implements raftgroup.StateMachine.
func (f *forgetful) Restore(r io.Reader) error {
	b, err := io.ReadAll(r)
	if err != nil {
		return err
	}
	if len(b) != 16 {
		return fmt.Errorf("image of %d bytes: %w", len(b), trivet.ErrCorrupt)
	}
	f.at.Store(binary.BigEndian.Uint64(b))
	f.term.Store(binary.BigEndian.Uint64(b[8:]))
	return nil
}

// Restoring implements raftgroup.StateMachine.
func (f *forgetful) Restoring() bool { return false }

type image struct{ *bytes.Reader }

// Close implements io.Closer.
func (image) Close() error { return nil }
