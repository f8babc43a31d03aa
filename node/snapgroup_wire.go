package node

import (
	"encoding/binary"
	"fmt"
	"time"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller/meta"
)

// Bodies of KindSnapshotBarrier messages; their Group is zero. Big endian.
//
//	request                                              reply; n is zero but to a freeze
//	0         1      2      4         8       16    24   0         1      4   8
//	+---------+------+------+---------+-------+-----+    +---------+------+---+----------- n × ----------------------+
//	| version | step | zero | attempt | group | rev |    | version | zero | n | snapshot 8 | gen 8 | size 8 | held 8 |
//	+---------+------+------+---------+-------+-----+    +---------+------+---+--------------------------------------+
//
// rev is the revision of the catalogue that the receiver must know of, for a prepare; attempt counts from one how often
// writes are held for the group. held is in nanoseconds.
const (
	groupWireVersion  = 1
	groupMessageBytes = 24
	frozenHeadBytes   = 8
	frozenBytes       = 32
	frozenMax         = 64 // as many members as a group has
)

// barrierStep is what a coordinator asks of a holder.
type barrierStep uint8

const (
	stepPrepare barrierStep = 1 + iota // write caches back, while writes go on
	stepHold                           // hold writes
	stepFreeze                         // make the snapshots, and let writes go on
	stepRelease                        // let writes go on
	stepEnd
)

func (s barrierStep) String() string {
	return [...]string{"", "prepare", "hold", "freeze", "release"}[s]
}

type groupMessage struct {
	step     barrierStep
	group    trivet.SnapshotGroupID
	attempt  uint32
	revision meta.Revision
}

func (g groupMessage) encode() []byte {
	b := []byte{groupWireVersion, byte(g.step), 0, 0}
	b = binary.BigEndian.AppendUint32(b, g.attempt)
	b = binary.BigEndian.AppendUint64(b, uint64(g.group))
	return binary.BigEndian.AppendUint64(b, uint64(g.revision))
}

// decodeGroupMessage returns ErrInvalid for what encode does not write.
func decodeGroupMessage(b []byte) (groupMessage, error) {
	if len(b) != groupMessageBytes || b[0] != groupWireVersion || b[1] == 0 || b[1] >= byte(stepEnd) || b[2] != 0 || b[3] != 0 {
		return groupMessage{}, fmt.Errorf("message of %d bytes about a group of snapshots: want %d, version %d: %w", len(b),
			groupMessageBytes, groupWireVersion, trivet.ErrInvalid)
	}
	return groupMessage{
		step: barrierStep(b[1]), attempt: binary.BigEndian.Uint32(b[4:]), group: trivet.SnapshotGroupID(binary.BigEndian.Uint64(b[8:])),
		revision: meta.Revision(binary.BigEndian.Uint64(b[16:])),
	}, nil
}

func encodeFrozen(all []meta.FrozenMember) []byte {
	b := binary.BigEndian.AppendUint32([]byte{groupWireVersion, 0, 0, 0}, uint32(len(all)))
	for _, f := range all {
		b = binary.BigEndian.AppendUint64(b, uint64(f.Snapshot))
		b = binary.BigEndian.AppendUint64(b, uint64(f.Generation))
		b = binary.BigEndian.AppendUint64(b, uint64(f.SizeBytes))
		b = binary.BigEndian.AppendUint64(b, uint64(f.Held))
	}
	return b
}

// decodeFrozen returns ErrCorrupt for what encodeFrozen does not write.
func decodeFrozen(b []byte) ([]meta.FrozenMember, error) {
	if len(b) < frozenHeadBytes || binary.BigEndian.Uint32(b) != groupWireVersion<<24 {
		return nil, fmt.Errorf("reply of %d bytes about a group of snapshots: want version %d: %w", len(b), groupWireVersion,
			trivet.ErrCorrupt)
	}
	n := binary.BigEndian.Uint32(b[4:])
	if n > frozenMax || len(b) != frozenHeadBytes+int(n)*frozenBytes {
		return nil, fmt.Errorf("%d members in a reply of %d bytes: %w", n, len(b), trivet.ErrCorrupt)
	}
	var out []meta.FrozenMember
	for b = b[frozenHeadBytes:]; len(b) > 0; b = b[frozenBytes:] {
		generation, size, held := binary.BigEndian.Uint64(b[8:]), binary.BigEndian.Uint64(b[16:]), binary.BigEndian.Uint64(b[24:])
		if generation>>32 != 0 || size>>63 != 0 || held>>63 != 0 {
			return nil, fmt.Errorf("member of generation %d, size %d, held %d: %w", generation, size, held, trivet.ErrCorrupt)
		}
		out = append(out, meta.FrozenMember{
			Snapshot: trivet.SnapshotID(binary.BigEndian.Uint64(b)), Generation: trivet.Generation(generation),
			SizeBytes: int64(size), Held: time.Duration(held),
		})
	}
	return out, nil
}
