package raftgroup

import (
	"bytes"
	"errors"
	"testing"

	"github.com/hashicorp/raft"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/engine/segment"
)

// payloadByHead is a PayloadAt: the first byte says how long the head is.
func payloadByHead(b []byte) int { return int(b[0]) }

func command(index uint64, head, pagesN int) *raft.Log {
	data := bytes.Repeat([]byte{byte(index)}, head+pagesN*pageBytes)
	data[0] = byte(head)
	return &raft.Log{Index: index, Term: 1, Type: raft.LogCommand, Data: data}
}

// placed is a machine that reads the blocks of each entry where they stand.
type placed struct {
	fakeMachine
	log   *segment.Log
	found [][]byte // nil for an entry that was given no place
	held  []segment.ID
	fail  error
	term  uint64
}

func (m *placed) Apply(entries []Entry) ([]any, error) {
	for _, e := range entries {
		var p []byte
		if e.Stored.Bytes > 0 {
			p = make([]byte, e.Stored.Bytes)
			if err := m.log.ReadAt(e.Stored.Segment, p, e.Stored.Off); err != nil {
				return nil, err
			}
			m.held = append(m.held, e.Stored.Segment)
		}
		m.found = append(m.found, p)
	}
	m.index, m.term = entries[len(entries)-1].Index, entries[len(entries)-1].Term
	return make([]any, len(entries)), m.fail
}

func (m *placed) Applied() (index, term uint64) { return m.index, m.term }

// TestApplyTellsWhereBlocksStand: the blocks of an entry stand aligned in the log, the library sees entries in one
// piece
// all the same, and the machine is told the place, pinned for as long as it applies and no longer.
func TestApplyTellsWhereBlocksStand(t *testing.T) {
	dir := LogDir(nil, t.TempDir())
	opts := testLogOptions(dir)
	opts.SegmentBytes = 256 << 10
	require.NoError(t, segment.Format(opts))
	log, err := segment.Open(opts)
	require.NoError(t, err)
	defer func() { require.NoError(t, log.Close()) }()
	g := newGroupLog(log, logGroup)
	g.payload = payloadByHead
	s, err := newLogStore(g, &diskGuard{}, groupConfig{}, false)
	require.NoError(t, err)
	entries := []*raft.Log{
		command(1, 1, 2),
		command(2, 100, 0),
		{Index: 3, Term: 1, Type: raft.LogNoop},
		command(4, 200, 3),
		command(5, 7, 1),
		command(6, 9, 1),
	}
	entries[4].Data = entries[4].Data[:len(entries[4].Data)-1] // no whole blocks
	entries[5].Data[0] = 255                                   // beyond what it is
	require.NoError(t, s.StoreLogs(entries))
	for _, want := range entries {
		var got raft.Log
		require.NoError(t, s.GetLog(want.Index, &got))
		require.True(t, bytes.Equal(want.Data, got.Data))
	}

	m := &placed{log: log}
	var fatal error
	f := &fsm{
		machine: m, failed: func() error { return nil }, fatal: func(err error) { fatal = err }, durable: s.durable, log: g,
	}
	pins := func() (n int) {
		for _, x := range log.Segments() {
			n += x.Pins
		}
		return n
	}
	commands := []*raft.Log{entries[0], entries[1], entries[3], entries[4], entries[5]}
	f.ApplyBatch(commands)
	require.NoError(t, fatal)
	require.Equal(t, [][]byte{entries[0].Data[1:], nil, entries[3].Data[200:], nil, nil}, m.found)
	require.Len(t, m.held, 2)
	require.Zero(t, pins())

	// An entry that the log has of another term, or not at all, as behind a snapshot, has no place.
	m.found = nil
	f.ApplyBatch([]*raft.Log{{Index: 7, Term: 1, Data: command(7, 3, 1).Data}})
	require.Equal(t, [][]byte{nil}, m.found)
	_, ok := g.locate(1, 2)
	require.False(t, ok, "another term")

	m.fail = errors.New("failed")
	require.NoError(t, s.StoreLogs([]*raft.Log{command(8, 3, 1)}[:0]))
	f.ApplyBatch([]*raft.Log{{Index: 8, Term: 2, Type: raft.LogCommand, Data: []byte{0}}})
	require.ErrorIs(t, fatal, m.fail)
	require.Zero(t, pins())
	require.Equal(t, trivet.BlockSize, pageBytes)
}
