package engine

import (
	"encoding/binary"
	"errors"
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

	// Snapshots are the older generations that are kept, ascending, at most SnapshotsMax. A freeze is a commit that
	// appends the Generation so far and raises it by one; a snapshot that the next State leaves out is deleted, and
	// what only it showed is removed in the background. Committing both costs no more than another commit.
	Snapshots []Snapshot
}

func (s State) clone() State {
	s.Session, s.Config = slices.Clone(s.Session), slices.Clone(s.Config)
	s.Snapshots = append([]Snapshot(nil), s.Snapshots...) // nil when there are none
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
	return s.checkSnapshots()
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

	// layers, and that a sweep is owed, are facts of this replica, which no image carries. layers are never changed in
	// place, and there are none while restoring.
	layers []layer
	sweep  bool
}

// The volume record, version 3, big endian. crc is CRC32C over the volume ID (8) and all before it:
//
//	 0         1       2          4            12           16      24      32     40      48      56
//	+---------+-------+----------+------------+------------+-------+-------+------+-------+-------+
//	| version | flags | reserved | size bytes | generation | epoch | index | term | floor | bytes |
//	+---------+-------+----------+---+--------+----+-------+-+-----+--+----+---+--+-------+-------+
//	| replica length (2) | replica | length (4) | session | length (4) | config | coverage | more    |
//	+--------------------+---------+------------+---------+------------+--------+----------+---------+
//	more:
//	+------------+-----------------------------+------------+----------------------------------------+
//	| number (2) | of snapshots: ID, gen. (4)  | number (2) | of layers: from (4), base volume,      |
//	|            |                             |            | generation (4) and number of blocks    |
//	+------------+--------------+--------------+------------+----------------------------------------+
//	| crc (4)    |
//	+------------+
//
// flags: bit 0 = restoring; a coverage (coverage.go) has spans then, and only then; bit 1 = a sweep is owed. Reserved
// and unknown bits are zero. floor and bytes are those of the change journal (journal.go). A record that has no
// snapshots and layers and owes no sweep is of version 2, which ends with the coverage, so that older programs go on
// reading volumes that never had a snapshot. Version 1 had neither floor and bytes nor a coverage: its journal begins
// at its index, and of an interrupted Restore nothing is known.
const (
	recordVersion      byte = 3
	flagRestoring      byte = 1
	flagSweep          byte = 2
	recordFixedBytes        = 56
	recordV1FixedBytes      = 40
	recordBytesMin          = recordV1FixedBytes + 2 + 4 + 4 + 4
	recordBytesMax          = recordFixedBytes + 2 + 4 + 4 + 4 + replicaBytesMax + StateBytesMax + 2 +
		16*coverageSpansMax + 2 + snapshotBytes*SnapshotsMax + 2 + layerBytes*layersMax
)

func (r *record) encodedBytes() int {
	n := recordFixedBytes + 2 + 4 + 4 + 4 + len(r.replica) + len(r.state.Session) + len(r.state.Config) +
		r.have.encodedBytes()
	if r.version() > 2 {
		n += 2 + snapshotBytes*len(r.state.Snapshots) + 2 + layerBytes*len(r.layers)
	}
	return n
}

// version is the oldest that can say what is in the record.
func (r *record) version() byte {
	if len(r.state.Snapshots) == 0 && len(r.layers) == 0 && !r.sweep {
		return 2
	}
	return 3
}

// appendRecord appends the encoding of r as a record of the volume id.
func appendRecord(dst []byte, id trivet.VolumeID, r *record) []byte {
	be, start, s := binary.BigEndian, len(dst), &r.state
	var flags byte
	if r.restoring {
		flags |= flagRestoring
	}
	if r.sweep {
		flags |= flagSweep
	}
	dst = append(dst, r.version(), flags, 0, 0)
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
	if r.version() > 2 {
		dst = appendLayers(appendSnapshots(dst, s.Snapshots), r.layers)
	}
	return be.AppendUint32(dst, recordSum(id, dst[start:]))
}

// recordSum takes the sum over the volume's ID by itself: what crc32 is given is moved to the heap.
func recordSum(id trivet.VolumeID, body []byte) uint32 {
	sum := ^uint32(0)
	for shift := 56; shift >= 0; shift -= 8 {
		sum = castagnoli[byte(sum)^byte(id>>shift)] ^ sum>>8
	}
	return crc32.Update(^sum, castagnoli, body)
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
	flags := flagRestoring
	if body[0] > 2 {
		flags |= flagSweep
	}
	if body[0] == 0 || body[1]&^flags != 0 || body[2] != 0 || body[3] != 0 {
		return bad("version and flags %x", body[:4])
	}
	r := record{restoring: body[1]&flagRestoring != 0, sweep: body[1]&flagSweep != 0, state: State{
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
	ok5, ok6 := true, true
	if body[0] > 2 {
		r.state.Snapshots, rest, ok5 = cutItems(rest, snapshotBytes, SnapshotsMax, decodeSnapshot)
		r.layers, rest, ok6 = cutItems(rest, layerBytes, layersMax, decodeLayer)
	}
	if !ok1 || !ok2 || !ok3 || !ok4 || !ok5 || !ok6 || len(rest) != 0 ||
		len(replica) == 0 || len(replica) > replicaBytesMax {
		return bad("lengths do not add up")
	}
	r.replica = trivet.ReplicaID(replica)
	r.state.Session, r.state.Config = slices.Clone(session), slices.Clone(config)
	if err := errors.Join(r.state.check(), checkLayers(id, &r.state, r.layers)); err != nil {
		return bad("%v", err)
	}
	if body[0] > 2 && r.version() != body[0] || r.restoring && len(r.layers) > 0 {
		return bad("version %d, restoring %t with %d layers", body[0], r.restoring, len(r.layers))
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
