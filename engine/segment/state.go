package segment

import (
	"fmt"

	"github.com/trivet-csi/trivet"
)

// Stable is what Raft must never forget: the current term, and the vote with its term. The zero value is
// that of a group that has never voted.
type Stable struct {
	Term     uint64
	VoteTerm uint64
	Vote     string // the candidate, at most 255 bytes
}

func (s Stable) check() error {
	if s.VoteTerm > s.Term || len(s.Vote) > voteBytesMax {
		return fmt.Errorf("vote of %d bytes in term %d, current term %d: %w",
			len(s.Vote), s.VoteTerm, s.Term, trivet.ErrInvalid)
	}
	return nil
}

// ref is one entry of a group: where it stands, and its content while that is in memory. The accepted
// and the durable state of a group share it; the lane's mu guards it.
type ref struct {
	term    uint64
	typ     byte
	durable bool
	at      place   // valid once durable
	entry   *record // nil when evicted or forgotten; body checksum included
}

// groupState is the log of a group at one moment.
type groupState struct {
	first  uint64 // index of refs[0], or of the next entry when there is none
	refs   []*ref
	stable Stable
}

func newState() groupState { return groupState{first: 1} }

func (s *groupState) last() uint64 { return s.first + uint64(len(s.refs)) - 1 }

func (s *groupState) pristine() bool {
	return s.first == 1 && len(s.refs) == 0 && s.stable == Stable{}
}

// at returns the entry of an index, nil when there is none.
func (s *groupState) at(index uint64) *ref {
	if index < s.first || index-s.first >= uint64(len(s.refs)) {
		return nil
	}
	return s.refs[index-s.first]
}

// check returns ErrInvalid unless r may follow what the log holds.
func (s *groupState) check(r *record) error {
	var ok bool
	switch r.kind {
	case kindEntry:
		ok = r.index > 0 && r.index < 1<<63
		if n := len(s.refs); n > 0 {
			ok = ok && r.index == s.last()+1 && r.term >= s.refs[n-1].term
		}
	case kindMove:
		at := s.at(r.index)
		ok = at != nil && at.term == r.term && at.typ == r.typ
	case kindTruncate, kindTrim:
		ok = s.at(r.index) != nil
	case kindReset:
		ok = r.index > 0 && r.index < 1<<63
	case kindStable:
		next := Stable{Term: r.term, VoteTerm: r.index, Vote: string(r.data)}
		ok = next.check() == nil && next.Term >= s.stable.Term && next.VoteTerm >= s.stable.VoteTerm
	case kindDelete:
		ok = true
	}
	if !ok {
		return fmt.Errorf("%s: record kind %d of index %d, term %d does not follow entries %d to %d, stable %+v: %w",
			r.group, r.kind, r.index, r.term, s.first, s.last(), s.stable, trivet.ErrInvalid)
	}
	return nil
}

// apply changes the state by one checked record and returns the entries that it drops. at is the ref of
// an entry and nil for other kinds. A move changes nothing here: its ref stays.
func (s *groupState) apply(r *record, at *ref) (dropped []*ref) {
	switch r.kind {
	case kindEntry:
		if len(s.refs) == 0 {
			s.first = r.index
		}
		s.refs = append(s.refs, at)
	case kindTruncate:
		keep := r.index - s.first
		dropped = append(dropped, s.refs[keep:]...)
		clear(s.refs[keep:])
		s.refs = s.refs[:keep]
	case kindTrim:
		n := r.index + 1 - s.first
		dropped = append(dropped, s.refs[:n]...)
		clear(s.refs[:n])
		s.refs, s.first = s.refs[n:], r.index+1
	case kindReset:
		dropped = s.refs
		s.refs, s.first = nil, r.index
	case kindStable:
		s.stable = Stable{Term: r.term, VoteTerm: r.index, Vote: string(r.data)}
	case kindDelete:
		dropped = s.refs
		*s = newState()
	}
	return dropped
}
