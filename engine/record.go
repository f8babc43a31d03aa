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

// record is what the volume key holds: the State, whose replica this is, how far the change journal
// reaches, and whether a Restore is under way. While restoring, state is the one from before, with index
// and epoch raised to what the Restore was moving to: the floor for any other image.
type record struct {
	replica   trivet.ReplicaID
	restoring bool
	state     State
	journal   journal
	have      coverage // set while restoring only, and never changed in place
}

// The volume record, version 2, big endian. crc is CRC32C over the volume ID (8) and all before it:
//
//	 0         1       2          4            12           16      24      32     40      48      56
//	+---------+-------+----------+------------+------------+-------+-------+------+-------+-------+
//	| version | flags | reserved | size bytes | generation | epoch | index | term | floor | bytes |
//	+---------+-------+----------+---+--------+----+-------+-+-----+--+----+---+--+-------+-------+
//	| replica length (2) | replica | length (4) | session | length (4) | config | coverage | crc (4) |
//	+--------------------+---------+------------+---------+------------+--------+----------+---------+
//
// flags: bit 0 = restoring; a coverage (coverage.go) has spans then, and only then. Reserved and unknown
// bits are zero. floor and bytes are those of the change journal (journal.go). Version 1 had neither
// these two nor a coverage: its journal begins at its index, and of an interrupted Restore nothing is known.
const (
	recordVersion      byte = 2
	flagRestoring      byte = 1
	recordFixedBytes        = 56
	recordV1FixedBytes      = 40
	recordBytesMin          = recordV1FixedBytes + 2 + 4 + 4 + 4
	recordBytesMax          = recordFixedBytes + 2 + 4 + 4 + 4 + replicaBytesMax + StateBytesMax + 2 + 16*coverageSpansMax
)

func (r *record) encodedBytes() int {
	return recordFixedBytes + 2 + 4 + 4 + 4 + len(r.replica) + len(r.state.Session) + len(r.state.Config) +
		r.have.encodedBytes()
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
	dst = be.AppendUint64(dst, r.journal.floor)
	dst = be.AppendUint64(dst, uint64(r.journal.bytes))
	dst = append(be.AppendUint16(dst, uint16(len(r.replica))), r.replica...)
	dst = append(be.AppendUint32(dst, uint32(len(s.Session))), s.Session...)
	dst = append(be.AppendUint32(dst, uint32(len(s.Config))), s.Config...)
	dst = r.have.append(dst)
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
	if body[0] == 0 || body[1]&^flagRestoring != 0 || body[2] != 0 || body[3] != 0 {
		return bad("version and flags %x", body[:4])
	}
	r := record{restoring: body[1]&flagRestoring != 0, state: State{
		SizeBytes:    int64(be.Uint64(body[4:])),
		Generation:   trivet.Generation(be.Uint32(body[12:])),
		Epoch:        trivet.Epoch(be.Uint64(body[16:])),
		AppliedIndex: be.Uint64(body[24:]),
		AppliedTerm:  be.Uint64(body[32:]),
	}}
	rest := body[recordV1FixedBytes:]
	if r.journal.floor = r.state.AppliedIndex; body[0] > 1 {
		if len(body) < recordFixedBytes {
			return bad("%d bytes are too few", len(b))
		}
		r.journal = journal{be.Uint64(body[40:]), int64(be.Uint64(body[48:]))}
		rest = body[recordFixedBytes:]
	}
	replica, rest, ok1 := cutField(rest, 2)
	session, rest, ok2 := cutField(rest, 4)
	config, rest, ok3 := cutField(rest, 4)
	ok4 := true
	if body[0] > 1 {
		r.have, rest, ok4 = cutCoverage(rest)
	} else if r.restoring {
		r.have = wholly(0)
	}
	if !ok1 || !ok2 || !ok3 || !ok4 || len(rest) != 0 || len(replica) == 0 || len(replica) > replicaBytesMax {
		return bad("lengths do not add up")
	}
	r.replica = trivet.ReplicaID(replica)
	r.state.Session, r.state.Config = slices.Clone(session), slices.Clone(config)
	if err := r.state.check(); err != nil {
		return bad("%v", err)
	}
	if r.restoring != (r.have != nil) || r.have.ceiling() > r.state.AppliedIndex || r.journal.bytes < 0 {
		return bad("restoring %t, coverage %v at index %d, journal of %d bytes", r.restoring, r.have,
			r.state.AppliedIndex, r.journal.bytes)
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
