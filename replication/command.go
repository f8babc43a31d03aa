package replication

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"

	"github.com/trivet-csi/trivet"
)

// A log entry is a batch of requests, which are applied in order. All integers are big endian.
//
//	entry, version 1
//	0         1      2          4             8          16
//	+---------+------+----------+-------------+----------+-----------------+------------------+
//	| version | zero | requestN | dataBytes   | volume   | header x N (48) | data of the      |
//	| 1       |      | 2        | 4           | 8        |                 | writes, in order |
//	+---------+------+----------+-------------+----------+-----------------+------------------+
//
//	header
//	0    1      4        8       16      24      32      40      48
//	+----+------+--------+-------+-------+-------+-------+-------+
//	| op | zero | crc32c | epoch | seq   | low   | lba   | arg   |
//	+----+------+--------+-------+-------+-------+-------+-------+
//
// crc32c covers volume, op, epoch, seq, low, lba, arg and the data. The client computes it when the
// write enters Trivet and nothing recomputes it on the way: it is checked by the leader before it
// proposes and by every replica before it applies (I12, H25).
//
// The data are whole blocks, and stand behind all headers: the log writes them at a multiple of the block size
// (payloadAt, docs/decisions/0021), so that a block can be read in place.
//
// arg is the number of blocks of a write, discard, write-zeroes or scrub, the new size in bytes of a resize, the name
// of a mark, the ID of a snapshot for freeze, drop and roll back, and zero otherwise. seq and low are zero for all but
// the first three: these need no session, because a late copy of one has no effect (DESIGN.md). Freeze, drop and roll
// back are the only request of their entry: the generation of blocks changes between entries, never within one.
//
// The top bit of seq and low is the number of the writer. In a fence of writers they are the sessions of the two
// (Writers).
const (
	entryVersion     = 1
	entryHeaderBytes = 16
	headerBytes      = 48

	// entryDataMax bounds the data of an entry. Beyond it latency grows and throughput does not.
	entryDataMax = 128 << 10
	// entryRequestsMax bounds the requests of an entry; it bites for single blocks and discards only.
	entryRequestsMax = 256
	// entryBytesMax is the size of the largest entry.
	entryBytesMax = entryHeaderBytes + entryRequestsMax*headerBytes + entryDataMax

	lbaMax = trivet.VolumeSizeMax / trivet.BlockSize
)

// opCode says what a request does. Values are part of the format.
type opCode uint8

const (
	opWrite       opCode = 1
	opDiscard     opCode = 2
	opWriteZeroes opCode = 3
	opFence       opCode = 4
	opResize      opCode = 5
	opWipe        opCode = 6
	opFreeze      opCode = 7
	opDrop        opCode = 8
	opRollback    opCode = 9
	opMark        opCode = 16 // a place in the log at which replicas compare what they have (marks.go)
	opScrub       opCode = 20 // a marker: every replica takes a view here (scrub.go)

	opFenceWriters opCode = 24 // a fence that names who may write (writers.go)
)

func (o opCode) String() string {
	switch o {
	case opWrite:
		return "write"
	case opDiscard:
		return "discard"
	case opWriteZeroes:
		return "write zeroes"
	case opFence:
		return "fence"
	case opResize:
		return "resize"
	case opWipe:
		return "wipe"
	case opFreeze:
		return "freeze"
	case opDrop:
		return "drop snapshot"
	case opMark:
		return "mark"
	case opScrub:
		return "scrub"
	case opRollback:
		return "roll back"
	case opFenceWriters:
		return "fence of writers"
	}
	return fmt.Sprintf("op %d", uint8(o))
}

// sessioned reports whether requests of this kind carry a sequence.
func (o opCode) sessioned() bool { return o == opWrite || o == opDiscard || o == opWriteZeroes }

// alone reports whether a request of this kind is the only one of its entry, and of an engine's batch.
func (o opCode) alone() bool { return o == opFreeze || o == opDrop || o == opRollback }

// request is one effect on a volume. Its crc belongs to one volume and never changes once seal set it.
type request struct {
	op    opCode
	epoch trivet.Epoch
	seq   uint64 // of the writer's session, from 1; its number in writerBit
	low   uint64 // lowest sequence that its client had not yet answered; at most seq
	lba   trivet.LBA
	arg   uint64
	crc   uint32
	data  []byte // opWrite only
}

// sum computes the checksum of r as a request to volume id.
func (r *request) sum(id trivet.VolumeID) uint32 {
	var b [49]byte
	binary.BigEndian.PutUint64(b[0:], uint64(id))
	b[8] = byte(r.op)
	binary.BigEndian.PutUint64(b[9:], uint64(r.epoch))
	binary.BigEndian.PutUint64(b[17:], r.seq)
	binary.BigEndian.PutUint64(b[25:], r.low)
	binary.BigEndian.PutUint64(b[33:], uint64(r.lba))
	binary.BigEndian.PutUint64(b[41:], r.arg)
	crc := crc32.Update(0, castagnoli(), b[:])
	return crc32.Update(crc, castagnoli(), r.data)
}

// seal sets the checksum: the request is complete.
func (r *request) seal(id trivet.VolumeID) { r.crc = r.sum(id) }

// verify returns ErrCorrupt unless r is what its client sealed for volume id.
func (r *request) verify(id trivet.VolumeID) error {
	if got := r.sum(id); got != r.crc {
		return fmt.Errorf("%s of block %d of %s (epoch %d, sequence %d): crc32c is %08x, want %08x: %w",
			r.op, r.lba, id, r.epoch, r.seq, got, r.crc, trivet.ErrCorrupt)
	}
	return nil
}

// check returns ErrInvalid unless the fields of r are such as its op may have. It looks at the form
// only; whether the volume has the blocks is for the state machine to say.
func (r *request) check() error {
	switch r.op {
	case opWrite:
		n := len(r.data)
		if n == 0 || n > trivet.AtomicWriteBytes || n%trivet.BlockSize != 0 || r.arg != uint64(n/trivet.BlockSize) {
			return fmt.Errorf("write of %d bytes in %d blocks: want 1 to %d whole blocks: %w",
				n, r.arg, trivet.AtomicWriteBytes/trivet.BlockSize, trivet.ErrInvalid)
		}
	case opDiscard, opWriteZeroes:
		if r.arg == 0 || r.arg > lbaMax {
			return fmt.Errorf("%s of %d blocks: want 1 to %d: %w", r.op, r.arg, int64(lbaMax), trivet.ErrInvalid)
		}
	case opFence, opWipe:
		if r.arg != 0 || r.epoch == 0 {
			return fmt.Errorf("%s with argument %d at epoch %d: %w", r.op, r.arg, r.epoch, trivet.ErrInvalid)
		}
	case opResize:
		if r.arg == 0 || r.arg > trivet.VolumeSizeMax || r.arg%trivet.BlockSize != 0 {
			return fmt.Errorf("resize to %d bytes: want whole blocks, at most %d bytes: %w",
				r.arg, int64(trivet.VolumeSizeMax), trivet.ErrInvalid)
		}
	case opFreeze: // of a volume that was never attached at epoch 0
		if r.arg == 0 {
			return fmt.Errorf("freeze without a snapshot: %w", trivet.ErrInvalid)
		}
	case opDrop:
		if r.arg == 0 || r.epoch != 0 {
			return fmt.Errorf("drop of snapshot %x at epoch %d: %w", r.arg, r.epoch, trivet.ErrInvalid)
		}
	case opMark:
		if r.arg == 0 || r.epoch != 0 {
			return fmt.Errorf("%s %d at epoch %d: %w", r.op, r.arg, r.epoch, trivet.ErrInvalid)
		}
	case opScrub:
		if r.lba >= lbaMax || r.arg == 0 || r.arg > lbaMax-uint64(r.lba) || r.epoch != 0 {
			return fmt.Errorf("scrub of %d blocks from %d at epoch %d: %w", r.arg, r.lba, r.epoch, trivet.ErrInvalid)
		}
	case opRollback:
		if r.arg == 0 || r.epoch == 0 {
			return fmt.Errorf("roll back to snapshot %x at epoch %d: %w", r.arg, r.epoch, trivet.ErrInvalid)
		}
	case opFenceWriters:
		if r.arg != 0 || r.epoch == 0 {
			return fmt.Errorf("%s with argument %d at epoch %d: %w", r.op, r.arg, r.epoch, trivet.ErrInvalid)
		}
		if err := r.writers().check(r.epoch); err != nil {
			return err
		}
	default:
		return fmt.Errorf("%s is unknown: %w", r.op, trivet.ErrInvalid)
	}
	return r.checkCommon()
}

func (r *request) checkCommon() error {
	if r.op != opWrite && len(r.data) != 0 {
		return fmt.Errorf("%s carries %d bytes of data: %w", r.op, len(r.data), trivet.ErrInvalid)
	}
	if r.op.sessioned() {
		if r.seq&^writerBit == 0 || r.low&^writerBit == 0 || r.low > r.seq || r.seq>>63 != r.low>>63 || r.lba >= lbaMax {
			return fmt.Errorf("%s of block %d with sequence %d, lowest open %d: %w",
				r.op, r.lba, r.seq, r.low, trivet.ErrInvalid)
		}
		return nil
	}
	if (r.seq != 0 || r.low != 0) && r.op != opFenceWriters || r.lba != 0 && r.op != opScrub {
		return fmt.Errorf("%s of block %d with sequence %d, lowest open %d: want none: %w",
			r.op, r.lba, r.seq, r.low, trivet.ErrInvalid)
	}
	return nil
}

// writers returns what a fence of writers names.
func (r *request) writers() Writers { return Writers{trivet.Epoch(r.seq), trivet.Epoch(r.low)} }

// putHeader writes the header of r to b. REQUIRES: len(b) >= headerBytes.
func (r *request) putHeader(b []byte) {
	clear(b[:8])
	b[0] = byte(r.op)
	binary.BigEndian.PutUint32(b[4:], r.crc)
	binary.BigEndian.PutUint64(b[8:], uint64(r.epoch))
	binary.BigEndian.PutUint64(b[16:], r.seq)
	binary.BigEndian.PutUint64(b[24:], r.low)
	binary.BigEndian.PutUint64(b[32:], uint64(r.lba))
	binary.BigEndian.PutUint64(b[40:], r.arg)
}

// readHeader is the inverse of putHeader and returns how many bytes of data follow. It refuses a
// count that no write may have before anyone uses it.
func (r *request) readHeader(b []byte) (dataBytes int, err error) {
	if b[1]|b[2]|b[3] != 0 {
		return 0, fmt.Errorf("request header has bytes %x where zeroes belong: %w", b[1:4], trivet.ErrCorrupt)
	}
	*r = request{
		op:    opCode(b[0]),
		crc:   binary.BigEndian.Uint32(b[4:]),
		epoch: trivet.Epoch(binary.BigEndian.Uint64(b[8:])),
		seq:   binary.BigEndian.Uint64(b[16:]),
		low:   binary.BigEndian.Uint64(b[24:]),
		lba:   trivet.LBA(binary.BigEndian.Uint64(b[32:])),
		arg:   binary.BigEndian.Uint64(b[40:]),
	}
	if r.op != opWrite {
		return 0, nil
	}
	if r.arg == 0 || r.arg > trivet.AtomicWriteBytes/trivet.BlockSize {
		return 0, fmt.Errorf("write of %d blocks: %w", r.arg, trivet.ErrCorrupt)
	}
	return int(r.arg) * trivet.BlockSize, nil
}

// appendEntry encodes rs as one entry of volume id.
// REQUIRES: 1 to entryRequestsMax sealed requests with at most entryDataMax bytes of data.
func appendEntry(dst []byte, id trivet.VolumeID, rs []request) []byte {
	dataN := 0
	for i := range rs {
		dataN += len(rs[i].data)
	}
	at := len(dst)
	dst = append(dst, make([]byte, entryHeaderBytes+headerBytes*len(rs))...)
	h := dst[at:]
	h[0] = entryVersion
	binary.BigEndian.PutUint16(h[2:], uint16(len(rs)))
	binary.BigEndian.PutUint32(h[4:], uint32(dataN))
	binary.BigEndian.PutUint64(h[8:], uint64(id))
	for i := range rs {
		rs[i].putHeader(h[entryHeaderBytes+headerBytes*i:])
	}
	for i := range rs {
		dst = append(dst, rs[i].data...)
	}
	return dst
}

// payloadAt returns where the data of the writes begin in an encoded entry; its length when there are none, or b is not
// one. The log keeps them from there on as blocks that can be read in place.
func payloadAt(b []byte) int {
	if len(b) < entryHeaderBytes || b[0] != entryVersion {
		return len(b)
	}
	at := entryHeaderBytes + headerBytes*int(binary.BigEndian.Uint16(b[2:]))
	if at > len(b) || len(b)-at != int(binary.BigEndian.Uint32(b[4:])) {
		return len(b)
	}
	return at
}

// requestsIn returns how many requests an encoded entry has, 0 when it is none.
func requestsIn(b []byte) int {
	if len(b) < entryHeaderBytes || b[0] != entryVersion {
		return 0
	}
	return min(int(binary.BigEndian.Uint16(b[2:])), (len(b)-entryHeaderBytes)/headerBytes)
}

// headerOf returns op and argument of a request of an encoded entry, unverified. REQUIRES: i < requestsIn(b).
func headerOf(b []byte, i int) (op opCode, arg uint64) {
	h := b[entryHeaderBytes+i*headerBytes:]
	return opCode(h[0]), binary.BigEndian.Uint64(h[40:])
}

// standsAlone reports whether an encoded entry is one that needs an engine's batch of its own.
func standsAlone(b []byte) bool {
	return len(b) > entryHeaderBytes && binary.BigEndian.Uint16(b[2:]) == 1 && opCode(b[entryHeaderBytes]).alone()
}

// decodeEntry appends the requests of entry b of volume id to dst and returns them; their data are
// slices of b. Anything but what appendEntry makes of valid sealed requests is ErrCorrupt, a request
// whose bytes changed since its client sealed it included.
func decodeEntry(dst []request, id trivet.VolumeID, b []byte) ([]request, error) {
	if len(b) < entryHeaderBytes || len(b) > entryBytesMax {
		return nil, fmt.Errorf("entry of %s has %d bytes: want %d to %d: %w",
			id, len(b), entryHeaderBytes, entryBytesMax, trivet.ErrCorrupt)
	}
	if b[0] != entryVersion || b[1] != 0 {
		return nil, fmt.Errorf("entry of %s has version %d.%d: this build reads version %d: %w",
			id, b[0], b[1], entryVersion, trivet.ErrCorrupt)
	}
	n := int(binary.BigEndian.Uint16(b[2:]))
	dataN := int(binary.BigEndian.Uint32(b[4:]))
	if got := trivet.VolumeID(binary.BigEndian.Uint64(b[8:])); got != id {
		return nil, fmt.Errorf("entry of %s belongs to %s: %w", id, got, trivet.ErrCorrupt)
	}
	if n == 0 || n > entryRequestsMax || dataN > entryDataMax || len(b) != entryHeaderBytes+headerBytes*n+dataN {
		return nil, fmt.Errorf("entry of %s has %d bytes: header says %d requests with %d bytes of data: %w",
			id, len(b), n, dataN, trivet.ErrCorrupt)
	}
	heads, data := b[entryHeaderBytes:entryHeaderBytes+headerBytes*n], b[entryHeaderBytes+headerBytes*n:]
	for i := range n {
		var r request
		size, err := r.readHeader(heads[headerBytes*i:])
		if err != nil {
			return nil, fmt.Errorf("request %d of an entry of %s: %w", i, id, err)
		}
		if size > len(data) {
			return nil, fmt.Errorf("request %d of an entry of %s: %d bytes of data, %d are left: %w",
				i, id, size, len(data), trivet.ErrCorrupt)
		}
		r.data, data = data[:size:size], data[size:]
		if err := r.verify(id); err != nil {
			return nil, err
		}
		if err := r.check(); err != nil {
			return nil, fmt.Errorf("request %d of an entry of %s: %v: %w", i, id, err, trivet.ErrCorrupt)
		}
		if r.op.alone() && n > 1 {
			return nil, fmt.Errorf("request %d of %d of an entry of %s: %s beside others: %w", i, n, id, r.op,
				trivet.ErrCorrupt)
		}
		dst = append(dst, r)
	}
	if len(data) != 0 {
		return nil, fmt.Errorf("entry of %s: %d bytes follow the last request: %w", id, len(data), trivet.ErrCorrupt)
	}
	return dst, nil
}

func castagnoli() *crc32.Table { return crc32.MakeTable(crc32.Castagnoli) }
