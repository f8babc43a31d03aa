package engine

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"slices"

	"github.com/trivet-csi/trivet"
)

// StateBytesMax bounds Session and Config of a State together, in bytes.
const StateBytesMax = 1 << 20

// replicaBytesMax is the longest ReplicaID in bytes.
const replicaBytesMax = 255

// State is the replicated state of a volume besides its blocks; it is committed with each Batch.
type State struct {
	SizeBytes    int64             // a multiple of BlockSize; only grows
	Generation   trivet.Generation // blocks written after this commit belong to it; only rises
	Epoch        trivet.Epoch      // only rises (I7)
	AppliedIndex uint64            // last log entry whose effects the blocks show; only rises
	AppliedTerm  uint64            // and its term
	Session      []byte            // replication's sequence window, opaque
	Config       []byte            // last applied Raft configuration, opaque
}

func (s State) clone() State {
	s.Session, s.Config = slices.Clone(s.Session), slices.Clone(s.Config)
	return s
}

// check returns ErrInvalid for a State that no volume can have.
func (s State) check() error {
	switch {
	case s.SizeBytes <= 0 || s.SizeBytes%trivet.BlockSize != 0 || s.SizeBytes > trivet.VolumeSizeMax:
		return fmt.Errorf("size of %d bytes: want whole blocks, at most %d bytes: %w", s.SizeBytes,
			int64(trivet.VolumeSizeMax), trivet.ErrInvalid)
	case len(s.Session)+len(s.Config) > StateBytesMax:
		return fmt.Errorf("session of %d and configuration of %d bytes: want at most %d together: %w",
			len(s.Session), len(s.Config), StateBytesMax, trivet.ErrInvalid)
	}
	return nil
}

// record is what the volume key holds: the State, whose replica this is, and whether a Restore is
// under way. While restoring, state is the one from before, kept as the floor for index and epoch.
type record struct {
	replica   trivet.ReplicaID
	restoring bool
	state     State
}

// The volume record, version 1, big endian. crc is CRC32C over the volume ID (8) and all before it:
//
//	 0         1       2          4            12           16      24      32      40
//	+---------+-------+----------+------------+------------+-------+-------+-------+
//	| version | flags | reserved | size bytes | generation | epoch | index | term  |
//	+---------+-------+----------+---+--------+----+-------+-+-----+--+----+---+---+
//	| replica length (2) | replica | length (4)   | session | length (4) | config | crc (4) |
//	+--------------------+---------+--------------+---------+------------+--------+---------+
//
// flags: bit 0 = restoring. Reserved and unknown bits are zero.
const (
	recordVersion    byte = 1
	flagRestoring    byte = 1
	recordFixedBytes      = 40
	recordBytesMin        = recordFixedBytes + 2 + 4 + 4 + 4
	recordBytesMax        = recordBytesMin + replicaBytesMax + StateBytesMax
)

func (r *record) encodedBytes() int {
	return recordBytesMin + len(r.replica) + len(r.state.Session) + len(r.state.Config)
}

// appendRecord appends the encoding of r as a record of the volume id.
func appendRecord(dst []byte, id trivet.VolumeID, r *record) []byte {
	be, start, s := binary.BigEndian, len(dst), &r.state
	var flags byte
	if r.restoring {
		flags |= flagRestoring
	}
	dst = append(dst, recordVersion, flags, 0, 0)
	dst = be.AppendUint64(dst, uint64(s.SizeBytes))
	dst = be.AppendUint32(dst, uint32(s.Generation))
	dst = be.AppendUint64(dst, uint64(s.Epoch))
	dst = be.AppendUint64(dst, s.AppliedIndex)
	dst = be.AppendUint64(dst, s.AppliedTerm)
	dst = append(be.AppendUint16(dst, uint16(len(r.replica))), r.replica...)
	dst = append(be.AppendUint32(dst, uint32(len(s.Session))), s.Session...)
	dst = append(be.AppendUint32(dst, uint32(len(s.Config))), s.Config...)
	return be.AppendUint32(dst, recordSum(id, dst[start:]))
}

func recordSum(id trivet.VolumeID, body []byte) uint32 {
	var v [8]byte
	binary.BigEndian.PutUint64(v[:], uint64(id))
	return crc32.Update(crc32.Update(0, castagnoli, v[:]), castagnoli, body)
}

// decodeRecord returns ErrCorrupt for anything that appendRecord does not make for this volume, and
// ErrInvalid for the record of a newer version. The result shares no memory with b.
func decodeRecord(id trivet.VolumeID, b []byte) (record, error) {
	bad := func(format string, args ...any) (record, error) {
		return record{}, fmt.Errorf("record of %s: %s: %w", id, fmt.Sprintf(format, args...), trivet.ErrCorrupt)
	}
	if len(b) < recordBytesMin || len(b) > recordBytesMax {
		return bad("%d bytes, want %d to %d", len(b), recordBytesMin, recordBytesMax)
	}
	be := binary.BigEndian
	body, stored := b[:len(b)-4], be.Uint32(b[len(b)-4:])
	if got := recordSum(id, body); got != stored {
		return bad("checksum %08x stored, %08x computed", stored, got)
	}
	if body[0] > recordVersion {
		return record{}, fmt.Errorf("record of %s: version %d is newer than %d, which this program knows: %w",
			id, body[0], recordVersion, trivet.ErrInvalid)
	}
	if body[0] != recordVersion || body[1]&^flagRestoring != 0 || body[2] != 0 || body[3] != 0 {
		return bad("version and flags %x", body[:4])
	}
	r := record{restoring: body[1]&flagRestoring != 0, state: State{
		SizeBytes:    int64(be.Uint64(body[4:])),
		Generation:   trivet.Generation(be.Uint32(body[12:])),
		Epoch:        trivet.Epoch(be.Uint64(body[16:])),
		AppliedIndex: be.Uint64(body[24:]),
		AppliedTerm:  be.Uint64(body[32:]),
	}}
	rest := body[recordFixedBytes:]
	replica, rest, ok1 := cutField(rest, 2)
	session, rest, ok2 := cutField(rest, 4)
	config, rest, ok3 := cutField(rest, 4)
	if !ok1 || !ok2 || !ok3 || len(rest) != 0 || len(replica) == 0 || len(replica) > replicaBytesMax {
		return bad("lengths do not add up")
	}
	r.replica = trivet.ReplicaID(replica)
	r.state.Session, r.state.Config = slices.Clone(session), slices.Clone(config)
	if err := r.state.check(); err != nil {
		return bad("%v", err)
	}
	return r, nil
}

// cutField cuts a field with its length in front, lenBytes wide (2 or 4), off b.
func cutField(b []byte, lenBytes int) (field, rest []byte, ok bool) {
	if len(b) < lenBytes {
		return nil, nil, false
	}
	var n uint64
	for _, c := range b[:lenBytes] {
		n = n<<8 | uint64(c)
	}
	b = b[lenBytes:]
	if n > uint64(len(b)) {
		return nil, nil, false
	}
	if n == 0 {
		return nil, b, true
	}
	return b[:n], b[n:], true
}
