package replication

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"

	"github.com/trivet-csi/trivet"
)

// Bodies of the KindVolume* messages; the volume is the message's Group. Big endian. A request that
// has no room for its numbers, or a byte too many, is ErrInvalid; a reply ErrCorrupt.
//
//	write request                      read request
//	0         1      8        56       0         1       2      4        8       16      24      32
//	+---------+------+--------+------+ +---------+-------+------+--------+-------+-------+-------+
//	| version | zero | header | data | | version | level | zero | blockN | epoch | lba   | index |
//	+---------+------+--------+------+ +---------+-------+------+--------+-------+-------+-------+
//
//	reply to both
//	0         1      2          4        8      16      24      32
//	+---------+------+----------+--------+------+-------+-------+------+------+
//	| version | code | nodeSize | crc32c | term | epoch | index | node | data |
//	+---------+------+----------+--------+------+-------+-------+------+------+
//
// The header of a write is that of command.go. level is 0 for ReadStrong, 1 for ReadSession, 2 for
// ReadEventual; index is what the replica must have applied for a session. code is 0 (done) or 1 (ask the
// leader; node is who leads, when known). index of a reply is that of the newest entry whose effect the
// data can show. crc32c covers the data of a read with its volume and first block, so that a block that
// comes back is the block that was asked for (I12).
const (
	wireVersion      = 2
	writeHeaderBytes = 8 + headerBytes
	readRequestBytes = 32
	replyHeaderBytes = 32

	// readBytesMax is the largest read in one message.
	readBytesMax = 1 << 20

	codeDone      = 0
	codeNotLeader = 1
)

// appendWrite encodes a sealed request.
func appendWrite(dst []byte, req *request) []byte {
	at := len(dst)
	dst = append(dst, make([]byte, writeHeaderBytes)...)
	dst[at] = wireVersion
	req.putHeader(dst[at+8:])
	return append(dst, req.data...)
}

// decodeWrite is the inverse of appendWrite; req.data is a slice of b. It does not verify the checksum.
func decodeWrite(b []byte) (request, error) {
	if len(b) < writeHeaderBytes || !versionAndZeroes(b[:8]) {
		return request{}, fmt.Errorf("write message of %d bytes: want version %d: %w", len(b), wireVersion, trivet.ErrInvalid)
	}
	var r request
	n, err := r.readHeader(b[8:])
	if err != nil {
		return request{}, fmt.Errorf("write message: %v: %w", err, trivet.ErrInvalid)
	}
	if len(b) != writeHeaderBytes+n {
		return request{}, fmt.Errorf("write message has %d bytes of data, want %d: %w",
			len(b)-writeHeaderBytes, n, trivet.ErrInvalid)
	}
	if n > 0 {
		r.data = b[writeHeaderBytes:]
	}
	if err := r.check(); err != nil {
		return request{}, err
	}
	return r, nil
}

func versionAndZeroes(b []byte) bool {
	if b[0] != wireVersion {
		return false
	}
	for _, z := range b[1:] {
		if z != 0 {
			return false
		}
	}
	return true
}

// readLevel is a trivet.ReadConsistency on the wire.
type readLevel uint8

const (
	levelStrong readLevel = iota
	levelSession
	levelEventual
	levelEnd
)

// levelOf returns ErrInvalid for what is none of the three; "" is ReadStrong.
func levelOf(c trivet.ReadConsistency) (readLevel, error) {
	switch c {
	case "", trivet.ReadStrong:
		return levelStrong, nil
	case trivet.ReadSession:
		return levelSession, nil
	case trivet.ReadEventual:
		return levelEventual, nil
	}
	return 0, fmt.Errorf("read consistency %q is unknown: %w", c, trivet.ErrInvalid)
}

// readRequest asks for blockN blocks from lba.
type readRequest struct {
	level  readLevel
	blockN uint32
	epoch  trivet.Epoch
	lba    trivet.LBA
	index  uint64 // that the replica must have applied, with levelSession
}

func (r *readRequest) append(dst []byte) []byte {
	dst = append(dst, wireVersion, byte(r.level), 0, 0)
	dst = binary.BigEndian.AppendUint32(dst, r.blockN)
	dst = binary.BigEndian.AppendUint64(dst, uint64(r.epoch))
	dst = binary.BigEndian.AppendUint64(dst, uint64(r.lba))
	return binary.BigEndian.AppendUint64(dst, r.index)
}

func decodeRead(b []byte) (readRequest, error) {
	if len(b) != readRequestBytes || b[0] != wireVersion || b[2] != 0 || b[3] != 0 || b[1] >= byte(levelEnd) {
		return readRequest{}, fmt.Errorf("read message of %d bytes: want version %d, %d bytes: %w",
			len(b), wireVersion, readRequestBytes, trivet.ErrInvalid)
	}
	r := readRequest{
		level:  readLevel(b[1]),
		blockN: binary.BigEndian.Uint32(b[4:]),
		epoch:  trivet.Epoch(binary.BigEndian.Uint64(b[8:])),
		lba:    trivet.LBA(binary.BigEndian.Uint64(b[16:])),
		index:  binary.BigEndian.Uint64(b[24:]),
	}
	if r.blockN == 0 || r.blockN > readBytesMax/trivet.BlockSize || r.lba >= lbaMax {
		return readRequest{}, fmt.Errorf("read of %d blocks from %d: want 1 to %d: %w",
			r.blockN, r.lba, readBytesMax/trivet.BlockSize, trivet.ErrInvalid)
	}
	return r, nil
}

// reply answers a write or a read.
type reply struct {
	code  uint8
	term  uint64        // in which the replica answered
	epoch trivet.Epoch  // of the volume
	index uint64        // of the newest entry that the answer can show
	node  trivet.NodeID // of the leader, with codeNotLeader
	crc   uint32        // of data
	data  []byte
}

// newReadReply returns the bytes of a reply with room for n bytes of data, and that room.
func newReadReply(n int) (b, data []byte) {
	b = make([]byte, replyHeaderBytes+n)
	return b, b[replyHeaderBytes:]
}

// putHeader writes the header of r, and the node after it. REQUIRES: room for both.
func (r *reply) putHeader(b []byte) {
	b[0], b[1] = wireVersion, r.code
	binary.BigEndian.PutUint16(b[2:], uint16(len(r.node)))
	binary.BigEndian.PutUint32(b[4:], r.crc)
	binary.BigEndian.PutUint64(b[8:], r.term)
	binary.BigEndian.PutUint64(b[16:], uint64(r.epoch))
	binary.BigEndian.PutUint64(b[24:], r.index)
	copy(b[replyHeaderBytes:], r.node)
}

func (r *reply) append(dst []byte) []byte {
	at := len(dst)
	dst = append(dst, make([]byte, replyHeaderBytes+len(r.node))...)
	r.putHeader(dst[at:])
	return append(dst, r.data...)
}

// decodeReply is the inverse of append; data is a slice of b, with dataN bytes when code is codeDone.
func decodeReply(b []byte, dataN int) (reply, error) {
	if len(b) < replyHeaderBytes || b[0] != wireVersion || b[1] > codeNotLeader {
		return reply{}, fmt.Errorf("reply of %d bytes: want version %d: %w", len(b), wireVersion, trivet.ErrCorrupt)
	}
	r := reply{
		code:  b[1],
		crc:   binary.BigEndian.Uint32(b[4:]),
		term:  binary.BigEndian.Uint64(b[8:]),
		epoch: trivet.Epoch(binary.BigEndian.Uint64(b[16:])),
		index: binary.BigEndian.Uint64(b[24:]),
	}
	nodeN := int(binary.BigEndian.Uint16(b[2:]))
	if r.code == codeNotLeader {
		dataN = 0
	} else if nodeN != 0 {
		return reply{}, fmt.Errorf("reply has a node of %d bytes and code %d: %w", nodeN, r.code, trivet.ErrCorrupt)
	}
	if nodeN > trivet.NameBytesMax || len(b) != replyHeaderBytes+nodeN+dataN {
		return reply{}, fmt.Errorf("reply has %d bytes, want %d, %d of node and %d of data: %w",
			len(b), replyHeaderBytes, nodeN, dataN, trivet.ErrCorrupt)
	}
	r.node = trivet.NodeID(b[replyHeaderBytes : replyHeaderBytes+nodeN])
	if dataN > 0 {
		r.data = b[replyHeaderBytes+nodeN:]
	}
	return r, nil
}

// readSum is the checksum of the blocks of a read.
func readSum(id trivet.VolumeID, lba trivet.LBA, p []byte) uint32 {
	var b [16]byte
	binary.BigEndian.PutUint64(b[0:], uint64(id))
	binary.BigEndian.PutUint64(b[8:], uint64(lba))
	return crc32.Update(crc32.Update(0, castagnoli(), b[:]), castagnoli(), p)
}

// RemoteStatus is what a node says of its replica of a volume.
type RemoteStatus struct {
	Replica    trivet.ReplicaID
	Leader     trivet.ReplicaID // "" = unknown
	LeaderNode trivet.NodeID
	IsLeader   bool
	Term       uint64
	Commit     uint64
	Applied    uint64
	Epoch      trivet.Epoch
	SizeBytes  int64
	UsedBytes  int64 // -1 = unknown
	// LastIndex and LastTerm are where its log ends; zero when the node does not say.
	LastIndex, LastTerm uint64
}

// Status reply: version (1), leads (1), then term, commit, applied, epoch, size and used bytes (8 each),
// then replica, leader and leader's node, each after its length in two bytes; then, from newer nodes, last index and
// term (8 each).
const statusHeaderBytes = 2 + 6*8

func (s *RemoteStatus) append(dst []byte) []byte {
	var leads byte
	if s.IsLeader {
		leads = 1
	}
	dst = append(dst, wireVersion, leads)
	for _, n := range []uint64{
		s.Term, s.Commit, s.Applied, uint64(s.Epoch), uint64(s.SizeBytes), uint64(s.UsedBytes),
	} {
		dst = binary.BigEndian.AppendUint64(dst, n)
	}
	dst = appendString(dst, string(s.Replica))
	dst = appendString(dst, string(s.Leader))
	dst = appendString(dst, string(s.LeaderNode))
	return binary.BigEndian.AppendUint64(binary.BigEndian.AppendUint64(dst, s.LastIndex), s.LastTerm)
}

func decodeStatus(b []byte) (RemoteStatus, error) {
	if len(b) < statusHeaderBytes || b[0] != wireVersion || b[1] > 1 {
		return RemoteStatus{}, fmt.Errorf("status of %d bytes: want version %d: %w", len(b), wireVersion, trivet.ErrCorrupt)
	}
	num := func(i int) uint64 { return binary.BigEndian.Uint64(b[2+8*i:]) }
	s := RemoteStatus{
		IsLeader: b[1] == 1, Term: num(0), Commit: num(1), Applied: num(2),
		Epoch: trivet.Epoch(num(3)), SizeBytes: int64(num(4)), UsedBytes: int64(num(5)),
	}
	rest := b[statusHeaderBytes:]
	var names [3]string
	for i := range names {
		if len(rest) < 2 {
			return RemoteStatus{}, fmt.Errorf("status ends before name %d: %w", i, trivet.ErrCorrupt)
		}
		n := int(binary.BigEndian.Uint16(rest))
		if rest = rest[2:]; n > trivet.NameBytesMax || n > len(rest) {
			return RemoteStatus{}, fmt.Errorf("status has a name of %d bytes, %d are left: %w", n, len(rest), trivet.ErrCorrupt)
		}
		names[i], rest = string(rest[:n]), rest[n:]
	}
	if len(rest) == 16 {
		s.LastIndex, s.LastTerm = binary.BigEndian.Uint64(rest), binary.BigEndian.Uint64(rest[8:])
	} else if len(rest) != 0 {
		return RemoteStatus{}, fmt.Errorf("status is followed by %d bytes: %w", len(rest), trivet.ErrCorrupt)
	}
	s.Replica, s.Leader, s.LeaderNode = trivet.ReplicaID(names[0]), trivet.ReplicaID(names[1]), trivet.NodeID(names[2])
	return s, nil
}
