package raftgroup

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/raft"
	"github.com/stretchr/testify/require"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/replication/transport"
)

// BeatsBody is the body of a KindHeartbeats with the AppendEntries that these messages are.
func BeatsBody(messages ...transport.Message) []byte {
	var beats []beat
	for _, m := range messages {
		beats = append(beats, beat{group: m.Group, from: m.From, to: m.To, body: m.Body})
	}
	return encodeBeats(beats)
}

// BeatAnswers reads the answer to BeatsBody: of each beat the term and whether it succeeded, or the error.
func BeatAnswers(body []byte) (terms []uint64, ok []bool, errs []error, err error) {
	answers, err := decodeBeatAnswers("peer", body)
	for _, a := range answers {
		r := appendReply{}
		if a.err == nil {
			if r, err = decodeAppendReply(a.body); err != nil {
				return nil, nil, nil, err
			}
		}
		terms, ok, errs = append(terms, r.term), append(ok, r.success), append(errs, a.err)
	}
	return terms, ok, errs, err
}

// HeartbeatBody is a heartbeat of a term.
func HeartbeatBody(term uint64) []byte { return mustAppend(&raft.AppendEntriesRequest{Term: term}) }

func mustAppend(r *raft.AppendEntriesRequest) []byte {
	b, err := encodeAppend(r)
	if err != nil {
		panic(err)
	}
	return b
}

// BeatN returns how many beats a KindHeartbeats has.
func BeatN(body []byte) int {
	beats, err := decodeBeats(body)
	if err != nil {
		panic(err)
	}
	return len(beats)
}

func testBeats() []beat {
	return []beat{
		{group: 0x0102030405060708, from: idA, to: idB, body: HeartbeatBody(9)},
		{group: 3, from: idB, to: idA, body: mustAppend(&raft.AppendEntriesRequest{
			Term: 4, PrevLogEntry: 7, PrevLogTerm: 3, LeaderCommitIndex: 6,
		})},
	}
}

func testBeatAnswers() []beatAnswer {
	return []beatAnswer{
		{body: appendReply{9, 44, true, false, 77, time.Second}.encode()},
		{err: fmt.Errorf("replica: %w", trivet.ErrNotFound)},
	}
}

func TestBeatsGolden(t *testing.T) {
	for name, got := range map[string][]byte{
		"heartbeats": encodeBeats(testBeats()), "heartbeats-reply": encodeBeatAnswers(testBeatAnswers()),
	} {
		path := filepath.Join("testdata", "v1", name+".hex")
		if *rewrite {
			require.NoError(t, os.WriteFile(path, []byte(hex.Dump(got)), 0o644))
		}
		want, err := os.ReadFile(path)
		require.NoError(t, err)
		require.Equal(t, string(want), hex.Dump(got), name)
	}
	beats, err := decodeBeats(encodeBeats(testBeats()))
	require.NoError(t, err)
	require.Equal(t, testBeats(), beats)
	require.Len(t, beats[0].body, emptyAppendBytes)
	answers, err := decodeBeatAnswers("b", encodeBeatAnswers(testBeatAnswers()))
	require.NoError(t, err)
	require.Equal(t, testBeatAnswers()[0], answers[0])
	require.ErrorIs(t, answers[1].err, trivet.ErrNotFound)
	require.NotErrorIs(t, answers[1].err, trivet.ErrUnavailable)
	require.EqualError(t, answers[1].err, "node b: replica: "+trivet.ErrNotFound.Error())
}

func TestBeatsRefuse(t *testing.T) {
	for name, whole := range map[string][]byte{
		"beats": encodeBeats(testBeats()), "answers": encodeBeatAnswers(testBeatAnswers()),
	} {
		decode := func(b []byte) error {
			if name == "beats" {
				_, err := decodeBeats(b)
				return err
			}
			_, err := decodeBeatAnswers("b", b)
			return err
		}
		require.NoError(t, decode(whole))
		for i := range whole {
			b := bytes.Clone(whole)
			b[i] ^= 0x10
			require.Error(t, decode(b), "%s, byte %d", name, i)
			require.Error(t, decode(whole[:i]), "%s, %d bytes", name, i)
			if i > 0 && i < len(whole)-crcBytes {
				require.Error(t, decode(sealBody(bytes.Clone(whole[:i]))), "%s, %d bytes with their checksum", name, i)
			}
		}
		many := put16([]byte{wireVersion}, beatsMax+1)
		require.ErrorIs(t, decode(sealBody(append(many, make([]byte, 64<<10)...))), trivet.ErrInvalid, name)
	}
	// A flag that is neither, and an error that is none.
	for _, b := range [][]byte{{2, 0, 0}, {1, 1, 0, 9}} {
		_, err := decodeBeatAnswers("b", sealBody(append(put16([]byte{wireVersion}, 1), b...)))
		require.Error(t, err)
	}
}

// The largest message fits in one frame, so it is urgent.
func TestBeatsAreUrgent(t *testing.T) {
	beats := make([]beat, beatsMax)
	answers := make([]beatAnswer, beatsMax)
	for i := range beats {
		beats[i] = testBeats()[0]
		answers[i].err = errors.New(string(bytes.Repeat([]byte("x"), 1000)))
	}
	require.LessOrEqual(t, len(encodeBeats(beats)), 64<<10)
	require.LessOrEqual(t, len(encodeBeatAnswers(answers)), 64<<10)
}

func FuzzBeats(f *testing.F) {
	f.Add(encodeBeats(testBeats()))
	f.Add(encodeBeatAnswers(testBeatAnswers()))
	f.Fuzz(func(t *testing.T, b []byte) {
		for _, fix := range []bool{false, true} {
			in := bytes.Clone(b)
			if fix && len(in) > crcBytes {
				in = sealBody(in[:len(in)-crcBytes])
			}
			if beats, err := decodeBeats(in); err == nil {
				require.Equal(t, in, encodeBeats(beats))
			}
			if answers, err := decodeBeatAnswers("b", in); err == nil {
				require.LessOrEqual(t, len(answers), beatsMax)
				_ = encodeBeatAnswers(answers)
			}
		}
	})
}

// beatNet is a network that notes what it is asked to send.
type beatNet struct {
	transport.Network
	mu     sync.Mutex
	sent   []transport.Message
	answer func(ctx context.Context, m transport.Message) (transport.Message, error)
}

func (n *beatNet) Call(ctx context.Context, _ trivet.NodeID, m transport.Message) (transport.Message, error) {
	n.mu.Lock()
	n.sent = append(n.sent, m)
	n.mu.Unlock()
	return n.answer(ctx, m)
}

func (n *beatNet) kinds() (out []transport.Kind) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, m := range n.sent {
		out = append(out, m.Kind)
	}
	n.sent = nil
	return out
}

// Each beat of a message has its own answer; a lone one goes as it always went; a useless reply is everybody's error.
func TestSendBeats(t *testing.T) {
	n := &beatNet{}
	n.answer = func(_ context.Context, m transport.Message) (transport.Message, error) {
		if m.Kind == transport.KindAppendEntries {
			return transport.Message{Body: []byte("alone")}, nil
		}
		beats, err := decodeBeats(m.Body)
		var answers []beatAnswer
		for _, b := range beats {
			a := beatAnswer{body: []byte(b.group.String())}
			if b.group == 3 {
				a = beatAnswer{err: trivet.ErrNotFound}
			}
			answers = append(answers, a)
		}
		return transport.Message{Body: encodeBeatAnswers(answers)}, err
	}
	m := &Mux{net: n}
	var beats []beat
	for g := range trivet.VolumeID(beatsMax) {
		beats = append(beats, beat{group: g, from: idA, to: idB, body: HeartbeatBody(1)})
	}
	got := m.sendBeats(t.Context(), "b", beats[:1])
	require.Equal(t, []beatAnswer{{body: []byte("alone")}}, got)
	require.Equal(t, []transport.Kind{transport.KindAppendEntries}, n.kinds())

	got = m.sendBeats(t.Context(), "b", beats)
	require.Len(t, got, len(beats))
	for i, a := range got {
		if i == 3 {
			require.ErrorIs(t, a.err, trivet.ErrNotFound)
			continue
		}
		require.NoError(t, a.err)
		require.Equal(t, beats[i].group.String(), string(a.body))
	}
	require.Equal(t, []transport.Kind{transport.KindHeartbeats}, n.kinds())

	n.answer = func(context.Context, transport.Message) (transport.Message, error) {
		return transport.Message{Body: encodeBeatAnswers(make([]beatAnswer, 3))}, nil
	}
	for _, a := range m.sendBeats(t.Context(), "b", beats[:2]) {
		require.ErrorIs(t, a.err, trivet.ErrCorrupt)
	}
}
