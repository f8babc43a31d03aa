package raftgroup

import (
	"context"
	"fmt"
	"time"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/replication/transport"
)

// Coalesced heartbeats. Those of all groups to one node travel as one message, their answers as one reply (pace.go
// says when). The receiver treats every one as if it had come alone (Mux.handle: H37, D9).
const (
	beatWaitMax      = 50 * time.Millisecond // or a quarter of a Heartbeat: then a group has no answer this time
	beatsMax         = 256                   // in one message
	beatErrorTextMax = 128                   // bytes of the text of one answer's error
	beatHandlersMax  = 4096                  // being handled, of all nodes

	// emptyAppendBytes is the size of an encoded AppendEntries without entries.
	emptyAppendBytes = 1 + 4*8 + 4 + crcBytes
)

// beat is one heartbeat on its way.
type beat struct {
	group    trivet.VolumeID
	from, to trivet.ReplicaID
	body     []byte // encodeAppend
}

func (b beat) encodedBytes() int { return 8 + 2 + len(b.from) + 2 + len(b.to) + 2 + len(b.body) }

// message is the beat as a message of its own.
func (b beat) message() transport.Message {
	return transport.Message{Kind: transport.KindAppendEntries, Group: b.group, From: b.from, To: b.to, Body: b.body}
}

// beatAnswer is the answer to a beat: the body of a reply, or an error.
type beatAnswer struct {
	body []byte
	err  error
}

// sendBeats sends beats to a node and returns their answers. A lone one goes as a message of its own.
func (m *Mux) sendBeats(ctx context.Context, node trivet.NodeID, beats []beat) []beatAnswer {
	if len(beats) == 1 {
		reply, err := m.net.Call(ctx, node, beats[0].message())
		return []beatAnswer{{reply.Body, err}}
	}
	reply, err := m.net.Call(ctx, node, transport.Message{Kind: transport.KindHeartbeats, Body: encodeBeats(beats)})
	var answers []beatAnswer
	if err == nil {
		answers, err = decodeBeatAnswers(node, reply.Body)
	}
	if err == nil && len(answers) != len(beats) {
		err = fmt.Errorf("%d heartbeats have %d answers: %w", len(beats), len(answers), trivet.ErrCorrupt)
	}
	if err != nil {
		answers = make([]beatAnswer, len(beats))
		for i := range answers {
			answers[i].err = err
		}
	}
	return answers
}

// handleBeats answers a message of many beats. Each is handled as if it had come alone: the quick ones at once, the
// rest beside each other; one that takes too long is answered "unavailable" and its handler's context ends.
func (m *Mux) handleBeats(ctx context.Context, from trivet.NodeID, msg transport.Message) (transport.Message, error) {
	beats, err := decodeBeats(msg.Body)
	if err != nil {
		return transport.Message{}, err
	}
	type numbered struct {
		i int
		beatAnswer
	}
	answers := make([]beatAnswer, len(beats))
	done := make(chan numbered, len(beats))
	running := 0
	for i, b := range beats {
		if body, ok := m.quickBeat(from, b); ok {
			answers[i].body = body
			continue
		}
		answers[i].err = fmt.Errorf("no answer of group %s within %s: %w", b.group, beatWaitMax, trivet.ErrUnavailable)
		select {
		case m.beatSlots <- struct{}{}:
		default:
			continue // others hang, and this node must not fill up with them
		}
		running++
		go func() { // ends with ctx at the latest, as all that a group waits for does
			defer func() { <-m.beatSlots }()
			body, err := m.handleBeat(ctx, from, b)
			done <- numbered{i, beatAnswer{body, err}}
		}()
	}
	if running == 0 {
		return transport.Message{Body: encodeBeatAnswers(answers)}, nil
	}
	timer := time.NewTimer(beatWaitMax)
	defer timer.Stop()
	for range running {
		select {
		case a := <-done:
			answers[a.i] = a.beatAnswer
			continue
		case <-timer.C:
		case <-ctx.Done():
		}
		break
	}
	return transport.Message{Body: encodeBeatAnswers(answers)}, nil
}

// handleBeat answers one beat.
func (m *Mux) handleBeat(ctx context.Context, from trivet.NodeID, b beat) ([]byte, error) {
	if len(b.body) != emptyAppendBytes {
		return nil, fmt.Errorf("heartbeat of %d bytes, want %d: %w", len(b.body), emptyAppendBytes, trivet.ErrInvalid)
	}
	ctx, cancel := context.WithTimeout(ctx, m.beatWait(b))
	defer cancel()
	reply, err := m.handle(ctx, from, b.message())
	return reply.Body, err
}

// quickBeat answers a beat that needs no waiting; see Group.quickBeat.
func (m *Mux) quickBeat(from trivet.NodeID, b beat) ([]byte, bool) {
	m.mu.RLock()
	g := m.routes[route{b.group, b.to}]
	m.mu.RUnlock()
	if g == nil {
		return nil, false
	}
	return g.quickBeat(from, b)
}

// beatWait returns how long a beat may take.
func (m *Mux) beatWait(b beat) time.Duration {
	m.mu.RLock()
	defer m.mu.RUnlock()
	if g := m.routes[route{b.group, b.to}]; g != nil {
		return min(g.cfg.Timing.Heartbeat/4, beatWaitMax)
	}
	return beatWaitMax
}

// encodeBeats returns the body of a KindHeartbeats: n u16, then per beat group u64, from, to and body,
// each with its length u16 before it.
// REQUIRES: at most beatsMax beats, of emptyAppendBytes each.
func encodeBeats(beats []beat) []byte {
	size := 1 + 2 + crcBytes
	for _, b := range beats {
		size += b.encodedBytes()
	}
	out := append(make([]byte, 0, size), wireVersion)
	out = put16(out, len(beats))
	for _, b := range beats {
		out = put64(out, uint64(b.group))
		out = putString(putString(out, string(b.from)), string(b.to))
		out = append(put16(out, len(b.body)), b.body...)
	}
	return sealBody(out)
}

// decodeBeats is the inverse of encodeBeats. The beats share the memory of body.
func decodeBeats(body []byte) ([]beat, error) {
	d, err := openBody("heartbeats", body)
	if err != nil {
		return nil, err
	}
	n := int(d.u16())
	if n > beatsMax {
		return nil, fmt.Errorf("%d heartbeats, at most %d are allowed: %w", n, beatsMax, trivet.ErrInvalid)
	}
	var beats []beat
	for range n {
		b := beat{group: trivet.VolumeID(d.u64()), from: trivet.ReplicaID(d.str()), to: trivet.ReplicaID(d.str())}
		b.body = d.bytes(int(d.u16()))
		if d.bad {
			break
		}
		beats = append(beats, b)
	}
	return beats, d.finish("heartbeats")
}

// encodeBeatAnswers returns the body of the reply: n u16, then per beat, in order, a byte that is 1 for
// an error, and with its length u16 before it the body of the answer, or what transport.EncodeError
// returns.
func encodeBeatAnswers(answers []beatAnswer) []byte {
	out := put16([]byte{wireVersion}, len(answers))
	for _, a := range answers {
		b := a.body
		if a.err != nil {
			b = transport.EncodeError(a.err, beatErrorTextMax)
		}
		out = append(out, bit(a.err != nil, 1))
		out = append(put16(out, len(b)), b...)
	}
	return sealBody(out)
}

// decodeBeatAnswers is the inverse of encodeBeatAnswers, for a reply of a node.
func decodeBeatAnswers(node trivet.NodeID, body []byte) ([]beatAnswer, error) {
	d, err := openBody("heartbeat answers", body)
	if err != nil {
		return nil, err
	}
	n := int(d.u16())
	if n > beatsMax {
		return nil, fmt.Errorf("%d heartbeat answers, at most %d are allowed: %w", n, beatsMax, trivet.ErrInvalid)
	}
	var answers []beatAnswer
	for range n {
		failed := d.u8()
		a := beatAnswer{body: d.bytes(int(d.u16()))}
		if d.bad {
			break
		}
		switch failed {
		case 0:
		case 1:
			if a.err, err = transport.DecodeError(node, a.body); err != nil {
				return nil, fmt.Errorf("heartbeat answers: %w", err)
			}
			a.body = nil
		default:
			return nil, fmt.Errorf("heartbeat answers: flag %d: %w", failed, trivet.ErrInvalid)
		}
		answers = append(answers, a)
	}
	return answers, d.finish("heartbeat answers")
}

func put16(b []byte, n int) []byte { return append(b, byte(n), byte(n>>8)) }
