package segment

import (
	"fmt"

	"github.com/trivet-csi/trivet"
)

// A checkpoint is all that a lane knows when a segment begins: recovery needs the newest one and the
// batches behind it, and no older segment. It is covered by the checksum in the segment header.
//
//	0 groups u32, zero u32
//	8 groups in ascending order, each
//	    0 group u64
//	    8 first u64: index of the first entry, or of the next one when there is none
//	   16 term u64
//	   24 term of the vote u64
//	   32 entries u32
//	   36 bytes of the candidate u16, zero u16
//	   40 candidate, padded with zeroes to 8 bytes
//	   .. entries, 40 bytes each
//	        0 segment number u64
//	        8 term u64
//	       16 offset of the record u32
//	       20 bytes of the record u32
//	       24 payload page u32
//	       28 payload bytes u32
//	       32 type u8, zero (7)
const (
	checkpointHeaderBytes = 8
	groupHeaderBytes      = 40
	entryRefBytes         = 40
	groupBytesMax         = groupHeaderBytes + voteBytesMax + 1
)

type groupCheckpoint struct {
	group trivet.VolumeID
	state groupState
}

func appendCheckpoint(b []byte, groups []groupCheckpoint) []byte {
	b = le.AppendUint32(b, uint32(len(groups)))
	b = le.AppendUint32(b, 0)
	for _, g := range groups {
		s := g.state
		b = le.AppendUint64(b, uint64(g.group))
		b = le.AppendUint64(b, s.first)
		b = le.AppendUint64(b, s.stable.Term)
		b = le.AppendUint64(b, s.stable.VoteTerm)
		b = le.AppendUint32(b, uint32(len(s.refs)))
		b = le.AppendUint32(b, uint32(len(s.stable.Vote)))
		b = append(b, s.stable.Vote...)
		for len(b)%8 != 0 {
			b = append(b, 0)
		}
		for _, r := range s.refs {
			b = le.AppendUint64(b, r.at.number)
			b = le.AppendUint64(b, r.term)
			b = le.AppendUint32(b, r.at.off)
			b = le.AppendUint32(b, r.at.head)
			b = le.AppendUint32(b, r.at.page)
			b = le.AppendUint32(b, r.at.payload)
			b = le.AppendUint64(b, uint64(r.typ))
		}
	}
	return b
}

// decodeCheckpoint reads a checkpoint whose checksum was right. It allocates for no more than b holds.
func decodeCheckpoint(b []byte) ([]groupCheckpoint, error) {
	bad := func(why string) ([]groupCheckpoint, error) {
		return nil, fmt.Errorf("checkpoint: %s: %w", why, trivet.ErrCorrupt)
	}
	if len(b) < checkpointHeaderBytes {
		return bad("too short")
	}
	groupsN := le.Uint32(b)
	b = b[checkpointHeaderBytes:]
	if int64(groupsN)*groupHeaderBytes > int64(len(b)) {
		return bad("too many groups")
	}
	out := make([]groupCheckpoint, 0, groupsN)
	for range groupsN {
		g, rest, err := decodeGroup(b)
		if err != nil {
			return nil, err
		}
		if n := len(out); n > 0 && out[n-1].group >= g.group {
			return bad("groups are not in order")
		}
		out, b = append(out, g), rest
	}
	if len(b) > 0 {
		return bad("bytes after the last group")
	}
	return out, nil
}

func decodeGroup(b []byte) (groupCheckpoint, []byte, error) {
	bad := func(why string) (groupCheckpoint, []byte, error) {
		return groupCheckpoint{}, nil, fmt.Errorf("checkpoint: %s: %w", why, trivet.ErrCorrupt)
	}
	if len(b) < groupHeaderBytes {
		return bad("group is cut")
	}
	g := groupCheckpoint{group: trivet.VolumeID(le.Uint64(b))}
	s := &g.state
	s.first, s.stable.Term, s.stable.VoteTerm = le.Uint64(b[8:]), le.Uint64(b[16:]), le.Uint64(b[24:])
	entriesN, voteBytes := int64(le.Uint32(b[32:])), int64(le.Uint16(b[36:]))
	b = b[groupHeaderBytes:]
	votePadded := alignUp(voteBytes, 8)
	if voteBytes > voteBytesMax || votePadded+entriesN*entryRefBytes > int64(len(b)) {
		return bad("group is cut")
	}
	if s.first == 0 || s.first+uint64(entriesN) < s.first || s.stable.check() != nil {
		return bad("impossible group")
	}
	s.stable.Vote = string(b[:voteBytes])
	b = b[votePadded:]
	refs := make([]ref, entriesN)
	for i := range refs {
		r := &refs[i]
		r.at.number, r.term = le.Uint64(b), le.Uint64(b[8:])
		r.at.off, r.at.head = le.Uint32(b[16:]), le.Uint32(b[20:])
		r.at.page, r.at.payload = le.Uint32(b[24:]), le.Uint32(b[28:])
		r.typ, r.durable = b[32], true
		if r.at.number == 0 || r.at.head < recordHeaderBytes || r.at.payload%pageBytes != 0 ||
			i > 0 && r.term < refs[i-1].term {
			return bad("impossible entry")
		}
		s.refs = append(s.refs, r)
		b = b[entryRefBytes:]
	}
	return g, b, nil
}
