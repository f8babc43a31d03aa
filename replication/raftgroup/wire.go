package raftgroup

import (
	"encoding/binary"
	"fmt"
	"time"

	"github.com/hashicorp/raft"

	"github.com/trivet-csi/trivet"
)

// The bodies of Raft messages. Each begins with a version byte and ends with a CRC32C over all
// before it: TLS guards the wire, this guards the memory on both sides. Sender and receiver are in
// the message's header and never in the body, so a body cannot claim to be from someone else.
// Nothing is allocated for a length before the body is seen to have that many bytes.

const (
	wireVersion = 1
	crcBytes    = 4
)

func sealBody(b []byte) []byte { return put32(b, checksum(b)) }

func openBody(what string, b []byte) (*decoder, error) {
	if len(b) < 1+crcBytes {
		return nil, fmt.Errorf("%s: %d bytes: %w", what, len(b), trivet.ErrInvalid)
	}
	body, sum := b[:len(b)-crcBytes], binary.LittleEndian.Uint32(b[len(b)-crcBytes:])
	if got := checksum(body); got != sum {
		return nil, fmt.Errorf("%s: checksum %08x, sent %08x: %w", what, got, sum, trivet.ErrCorrupt)
	}
	if body[0] != wireVersion {
		return nil, fmt.Errorf("%s: version %d, want %d: %w", what, body[0], wireVersion, trivet.ErrInvalid)
	}
	return &decoder{b: body[1:]}, nil
}

// encodeAppend: term, previous index and term, leader's commit, n u32, then per entry term u64,
// type u8, length u32, data. Their indexes follow from the previous one.
func encodeAppend(r *raft.AppendEntriesRequest) ([]byte, error) {
	return appendAppend(make([]byte, 0, appendBytes(r)), r)
}

// encodeEmptyAppend is encodeAppend of a request without entries, in which nothing can be wrong.
func encodeEmptyAppend(r *raft.AppendEntriesRequest) []byte {
	b := append(make([]byte, 0, emptyAppendBytes), wireVersion)
	b = put64(b, r.Term, r.PrevLogEntry, r.PrevLogTerm, r.LeaderCommitIndex)
	return sealBody(put32(b, 0))
}

// appendBytes is at least the size of what encodeAppend returns.
func appendBytes(r *raft.AppendEntriesRequest) int {
	size := 64
	for _, e := range r.Entries {
		size += 13 + len(e.Data)
	}
	return size
}

// appendAppend is encodeAppend into the empty slice b.
func appendAppend(b []byte, r *raft.AppendEntriesRequest) ([]byte, error) {
	b = append(b, wireVersion)
	b = put64(b, r.Term, r.PrevLogEntry, r.PrevLogTerm, r.LeaderCommitIndex)
	b = put32(b, uint32(len(r.Entries)))
	for i, e := range r.Entries {
		if e.Index != r.PrevLogEntry+1+uint64(i) {
			return nil, fmt.Errorf("entry %d after %d: %w", e.Index, r.PrevLogEntry+uint64(i), trivet.ErrInvalid)
		}
		b = put64(b, e.Term)
		b = append(b, byte(e.Type))
		b = put32(b, uint32(len(e.Data)))
		b = append(b, e.Data...)
	}
	return sealBody(b), nil
}

// decodeAppend checks all that the library would panic on. Entries share the memory of body.
func decodeAppend(body []byte) (*raft.AppendEntriesRequest, error) {
	d, err := openBody("append entries", body)
	if err != nil {
		return nil, err
	}
	r := &raft.AppendEntriesRequest{
		Term: d.u64(), PrevLogEntry: d.u64(), PrevLogTerm: d.u64(), LeaderCommitIndex: d.u64(),
	}
	n := d.u32()
	if n > appendEntriesMax || r.Term == 0 || r.PrevLogTerm > r.Term || r.PrevLogEntry+uint64(n) < r.PrevLogEntry {
		return nil, fmt.Errorf("append %d entries after %d of term %d, in term %d: %w",
			n, r.PrevLogEntry, r.PrevLogTerm, r.Term, trivet.ErrInvalid)
	}
	prev := r.PrevLogTerm
	for i := range uint64(n) {
		e := &raft.Log{Index: r.PrevLogEntry + 1 + i, Term: d.u64(), Type: raft.LogType(d.u8())}
		e.Data = d.bytes(int(d.u32()))
		if d.bad || e.Term < prev || e.Term > r.Term {
			return nil, fmt.Errorf("append entry %d of term %d, after term %d, in term %d: %w",
				e.Index, e.Term, prev, r.Term, trivet.ErrInvalid)
		}
		if err := checkEntry(e); err != nil {
			return nil, err
		}
		prev = e.Term
		r.Entries = append(r.Entries, e)
	}
	return r, d.finish("append entries")
}

// checkEntry returns ErrInvalid for an entry that no leader of ours sends.
func checkEntry(e *raft.Log) error {
	switch e.Type {
	case raft.LogCommand, raft.LogNoop, raft.LogBarrier:
		if len(e.Data) > EntryBytesMax {
			return fmt.Errorf("entry %d has %d bytes, at most %d are allowed: %w",
				e.Index, len(e.Data), EntryBytesMax, trivet.ErrInvalid)
		}
		return nil
	case raft.LogConfiguration:
		if _, err := decodeConfiguration(e.Data); err != nil {
			return fmt.Errorf("entry %d: %w", e.Index, err)
		}
		return nil
	}
	return fmt.Errorf("entry %d has type %d: %w", e.Index, e.Type, trivet.ErrInvalid)
}

// appendReply answers AppendEntries.
type appendReply struct {
	term, lastLog  uint64
	success        bool
	noRetryBackoff bool
	stamp          uint64        // the follower's clock, to be returned with TimeoutNow
	promise        time.Duration // after success: it helps no other leader for so long
}

func (r appendReply) encode() []byte {
	b := put64([]byte{wireVersion}, r.term, r.lastLog, r.stamp, uint64(r.promise))
	return sealBody(append(b, bit(r.success, 1)|bit(r.noRetryBackoff, 2)))
}

func decodeAppendReply(body []byte) (appendReply, error) {
	d, err := openBody("append entries reply", body)
	if err != nil {
		return appendReply{}, err
	}
	r := appendReply{term: d.u64(), lastLog: d.u64(), stamp: d.u64(), promise: time.Duration(d.u64())}
	flags := d.u8()
	r.success, r.noRetryBackoff = flags&1 != 0, flags&2 != 0
	if flags > 3 || r.promise < 0 {
		return appendReply{}, fmt.Errorf("append entries reply: flags %d, promise %v: %w",
			flags, r.promise, trivet.ErrInvalid)
	}
	return r, d.finish("append entries reply")
}

// voteRequest is a RequestVote or a RequestPreVote.
type voteRequest struct {
	term, lastIndex, lastTerm uint64
	why                       candidacy
}

func (r voteRequest) encode() []byte {
	b := put64([]byte{wireVersion}, r.term, r.lastIndex, r.lastTerm)
	return sealBody(append(b, byte(r.why)))
}

func decodeVote(body []byte) (voteRequest, error) {
	d, err := openBody("vote request", body)
	if err != nil {
		return voteRequest{}, err
	}
	r := voteRequest{term: d.u64(), lastIndex: d.u64(), lastTerm: d.u64()}
	r.why = candidacy(d.u8())
	if r.why > byProof || r.lastTerm >= r.term && !d.bad {
		return voteRequest{}, fmt.Errorf("vote request in term %d, log ends in term %d, candidacy %d: %w",
			r.term, r.lastTerm, r.why, trivet.ErrInvalid)
	}
	return r, d.finish("vote request")
}

// verdict answers a vote request, and other messages that ask for a yes.
type verdict struct {
	term uint64
	yes  bool
}

func (r verdict) encode() []byte {
	return sealBody(append(put64([]byte{wireVersion}, r.term, 0), bit(r.yes, 1)))
}

func decodeVerdict(body []byte) (verdict, error) {
	d, err := openBody("verdict", body)
	if err != nil {
		return verdict{}, err
	}
	r := verdict{term: d.u64()}
	unused, flags := d.u64(), d.u8()
	r.yes = flags == 1
	if flags > 1 || unused != 0 {
		return verdict{}, fmt.Errorf("verdict: flags %d, unused %d: %w", flags, unused, trivet.ErrInvalid)
	}
	return r, d.finish("verdict")
}

// timeoutNow asks a follower to stand for election.
type timeoutNow struct {
	term  uint64 // of the leader that asks
	stamp uint64 // newest appendReply.stamp of the follower
}

func (r timeoutNow) encode() []byte {
	return sealBody(put64([]byte{wireVersion}, r.term, r.stamp))
}

func decodeTimeoutNow(body []byte) (timeoutNow, error) {
	d, err := openBody("timeout now", body)
	if err != nil {
		return timeoutNow{}, err
	}
	r := timeoutNow{term: d.u64(), stamp: d.u64()}
	return r, d.finish("timeout now")
}

// logPosition is the end of a log.
type logPosition struct{ term, index uint64 }

// newer reports whether a vote would go to the log that ends at p rather than to that at q (Raft,
// section 5.4.1).
func (p logPosition) newer(q logPosition) bool {
	return p.term > q.term || p.term == q.term && p.index > q.index
}

// standingRequest asks a voter where it stands (failover.go), and standing is its answer.
type standingRequest struct {
	term uint64 // of the leader that is said to be gone
}

type standing struct {
	term   uint64
	log    logPosition
	proven bool // it knows that the leader of the asked term is gone
}

func (r standingRequest) encode() []byte { return sealBody(put64([]byte{wireVersion}, r.term)) }

func decodeStandingRequest(body []byte) (standingRequest, error) {
	d, err := openBody("standing request", body)
	if err != nil {
		return standingRequest{}, err
	}
	r := standingRequest{term: d.u64()}
	return r, d.finish("standing request")
}

func (s standing) encode() []byte {
	b := put64([]byte{wireVersion}, s.term, s.log.term, s.log.index)
	return sealBody(append(b, bit(s.proven, 1)))
}

func decodeStanding(body []byte) (standing, error) {
	d, err := openBody("standing", body)
	if err != nil {
		return standing{}, err
	}
	s := standing{term: d.u64(), log: logPosition{term: d.u64(), index: d.u64()}}
	flags := d.u8()
	s.proven = flags == 1
	if flags > 1 {
		return standing{}, fmt.Errorf("standing: flags %d: %w", flags, trivet.ErrInvalid)
	}
	return s, d.finish("standing")
}

// transferNotice announces whom a leader hands over to.
type transferNotice struct {
	term uint64 // of the leader
	to   trivet.ReplicaID
}

func (n transferNotice) encode() []byte {
	return sealBody(append(put64([]byte{wireVersion}, n.term), n.to...))
}

func decodeTransferNotice(body []byte) (transferNotice, error) {
	d, err := openBody("transfer notice", body)
	if err != nil {
		return transferNotice{}, err
	}
	n := transferNotice{term: d.u64(), to: trivet.ReplicaID(d.b)}
	if err := validateReplicaID(n.to); err != nil || d.bad {
		return transferNotice{}, fmt.Errorf("transfer notice: to %q: %w", string(n.to), trivet.ErrInvalid)
	}
	return n, nil
}
