package blockdev

import (
	"encoding/binary"
	"fmt"
	"math"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/node/keeper"
)

// The part of the FUSE protocol (linux include/uapi/linux/fuse.h, version 7.41) that a
// filesystem of one regular file needs. All integers are in the byte order of the machine.
//
//	request   len u32 | opcode u32 | unique u64 | nodeid u64 | uid, gid, pid u32 | extlen u16 | pad u16 | arguments
//	READ      fh u64 | offset u64 | size u32 | read_flags u32 | lock_owner u64 | flags u32 | pad u32
//	WRITE     fh u64 | offset u64 | size u32 | write_flags u32 | lock_owner u64 | flags u32 | pad u32 | data
//	FALLOCATE fh u64 | offset u64 | length u64 | mode u32 | pad u32
//	SETATTR   valid u32 | ... (88 bytes)
//	INIT      major u32 | minor u32 | max_readahead u32 | flags u32 | flags2 u32 | ...
//	reply     len u32 | -errno i32 | unique u64 | payload
const (
	fuseMajor       = 7
	fuseMinor       = 41
	fuseHeadBytes   = 40 // of a request
	fuseReplyBytes  = 16 // of a reply's header
	fuseIOBytes     = 40 // arguments of READ and WRITE
	fuseWriteHead   = fuseHeadBytes + fuseIOBytes
	fuseRequestMax  = fuseWriteHead + requestBytesMax
	fuseInlineBytes = 256 // enough for each reply without data
)

// Opcodes.
const (
	opForget      = 2
	opGetattr     = 3
	opSetattr     = 4
	opOpen        = 14
	opRead        = 15
	opWrite       = 16
	opStatfs      = 17
	opRelease     = 18
	opFsync       = 20
	opFlush       = 25
	opInit        = 26
	opAccess      = 34
	opInterrupt   = 36
	opDestroy     = 38
	opBatchForget = 42
	opFallocate   = 43
)

// INIT flags that we ask for, if the kernel offers them. ASYNC_DIO is worth a factor of ten.
// WRITEBACK_CACHE must stay off: the kernel would trust its own idea of the size.
const (
	initAsyncRead = 1 << 0
	initBigWrites = 1 << 5
	initAsyncDIO  = 1 << 15
	initMaxPages  = 1 << 22
	initExt       = 1 << 30
	initWanted    = initAsyncRead | initBigWrites | initAsyncDIO | initMaxPages | initExt

	init2HasResend = 1 << (39 - 32) // in flags2

	maxBackground       = 64 // requests in flight before the kernel queues; the default 12 halves reads
	congestionThreshold = 48
)

// Flags of an OPEN reply: no page cache above us (H30), shared lock for direct writes, and no
// flush on close.
const openFlags = 1<<0 | 1<<6 | 1<<5 // DIRECT_IO | PARALLEL_DIRECT_WRITES | NOFLUSH

// FALLOCATE modes: all that the loop driver sends.
const (
	fallocDiscard = 0x03 // PUNCH_HOLE | KEEP_SIZE
	fallocZero    = 0x11 // ZERO_RANGE | KEEP_SIZE
)

// setattrTimes are the bits of a SETATTR that ask for times only; we keep none, so they are
// granted. Everything else (size, mode, owner) is refused.
const setattrTimes = 1<<4 | 1<<5 | 1<<6 | 1<<7 | 1<<8 | 1<<9 | 1<<10 // times, now, fh, lockowner, ctime

const (
	fuseRoot  = 1 // inode number of the one file
	modeFile  = 0o100600
	bsizeStat = trivet.BlockSize // the loop device takes its discard granularity from here
)

// fuseResent is FUSE_UNIQUE_RESEND, a bit of the unique number.
const fuseResent = 1 << 63

// fuseRequest is one decoded request.
type fuseRequest struct {
	op       uint32
	unique   uint64 // echoed in the reply, bit 63 (resent) included
	offBytes int64  // of READ, WRITE and FALLOCATE
	lenBytes int64
	mode     uint32 // of FALLOCATE; the valid bits of SETATTR
	data     []byte // of WRITE; part of the buffer that was decoded

	major, minor, readahead, flags, flags2 uint32 // of INIT
}

// resent reports whether an earlier server has read the request, and not answered it.
func (r *fuseRequest) resent() bool { return r.unique&fuseResent != 0 }

// toDevice reports whether the Device has to answer the request.
func (r *fuseRequest) toDevice() bool { return r.changes() || r.op == opRead || r.op == opFsync }

// changes reports whether the request changes what the Device holds.
func (r *fuseRequest) changes() bool { return r.op == opWrite || r.op == opFallocate }

// decodeFuse decodes one request as read from the kernel. With ErrInvalid the header was sound
// (unique is set, so the request can be refused); with ErrCorrupt there is no telling what the
// bytes are.
func decodeFuse(b []byte) (fuseRequest, error) {
	if len(b) < fuseHeadBytes {
		return fuseRequest{}, fmt.Errorf("fuse request of %d bytes: shorter than a header: %w", len(b), trivet.ErrCorrupt)
	}
	u32, u64 := binary.NativeEndian.Uint32, binary.NativeEndian.Uint64
	if n := u32(b); int64(n) != int64(len(b)) {
		return fuseRequest{}, fmt.Errorf("fuse request of %d bytes: header says %d: %w", len(b), n, trivet.ErrCorrupt)
	}
	r := fuseRequest{op: u32(b[4:]), unique: u64(b[8:])}
	args := b[fuseHeadBytes:]
	if len(args) < argBytes(r.op) {
		return r, fmt.Errorf("fuse opcode %d: %d bytes of arguments, want %d: %w",
			r.op, len(args), argBytes(r.op), trivet.ErrInvalid)
	}
	off, length := uint64(0), uint64(0)
	switch r.op {
	case opRead, opWrite:
		off, length = u64(args[8:]), uint64(u32(args[16:]))
		if length > requestBytesMax {
			return r, fmt.Errorf("fuse opcode %d: %d bytes, most is %d: %w",
				r.op, length, requestBytesMax, trivet.ErrInvalid)
		}
	case opFallocate:
		off, length, r.mode = u64(args[8:]), u64(args[16:]), u32(args[24:])
	case opSetattr:
		r.mode = u32(args)
	case opInit:
		r.major, r.minor, r.readahead, r.flags = u32(args), u32(args[4:]), u32(args[8:]), u32(args[12:])
		if r.flags&initExt != 0 && len(args) >= 20 {
			r.flags2 = u32(args[16:])
		}
	}
	if off > math.MaxInt64 || length > math.MaxInt64-off {
		return r, fmt.Errorf("fuse opcode %d: %d bytes at %d: %w", r.op, length, off, trivet.ErrInvalid)
	}
	r.offBytes, r.lenBytes = int64(off), int64(length)
	if r.op == opWrite {
		r.data = args[fuseIOBytes:]
		if uint64(len(r.data)) != length {
			return r, fmt.Errorf("fuse write of %d bytes: has %d bytes of data: %w",
				length, len(r.data), trivet.ErrInvalid)
		}
	}
	return r, nil
}

// argBytes is the least length of a request's arguments.
func argBytes(op uint32) int {
	switch op {
	case opRead, opWrite:
		return fuseIOBytes
	case opFallocate:
		return 32
	case opSetattr:
		return 88
	case opInit:
		return 16
	}
	return 0
}

// putFuseHeader writes the header of a reply of n bytes in all to b.
func putFuseHeader(b []byte, n int, errno uint32, unique uint64) {
	binary.NativeEndian.PutUint32(b, uint32(n))
	binary.NativeEndian.PutUint32(b[4:], -errno)
	binary.NativeEndian.PutUint64(b[8:], unique)
}

// The payloads of replies. Each writes to b, which is zero, and returns its length.

func putInit(b []byte, r fuseRequest) int {
	ne := binary.NativeEndian
	ne.PutUint32(b, fuseMajor)
	ne.PutUint32(b[4:], min(r.minor, fuseMinor))
	ne.PutUint32(b[8:], r.readahead)
	ne.PutUint32(b[12:], r.flags&initWanted)
	ne.PutUint16(b[16:], maxBackground)
	ne.PutUint16(b[18:], congestionThreshold)
	ne.PutUint32(b[20:], requestBytesMax) // max_write
	ne.PutUint32(b[24:], 1)               // time granularity in ns
	ne.PutUint16(b[28:], requestBytesMax/4096)
	ne.PutUint32(b[32:], r.flags2&init2HasResend)
	return 64
}

// factsOf reads back what an INIT reply granted.
func factsOf(b []byte) keeper.Facts {
	u32 := binary.NativeEndian.Uint32
	return keeper.Facts{Minor: u32(b[4:]), Flags: u32(b[12:]), Flags2: u32(b[32:]), MaxWrite: u32(b[20:])}
}

// putAttr's zero validity makes the kernel ask for the size each time, so growing just works.
func putAttr(b []byte, sizeBytes int64) int {
	ne := binary.NativeEndian
	attr := b[16:]
	ne.PutUint64(attr, fuseRoot)
	ne.PutUint64(attr[8:], uint64(sizeBytes))
	ne.PutUint64(attr[16:], uint64(sizeBytes)/512)
	ne.PutUint32(attr[60:], modeFile)
	ne.PutUint32(attr[64:], 1) // links
	ne.PutUint32(attr[80:], trivet.BlockSize)
	return 104
}

func putOpen(b []byte) int {
	binary.NativeEndian.PutUint32(b[8:], openFlags)
	return 16
}

func putWritten(b []byte, n int64) int {
	binary.NativeEndian.PutUint32(b, uint32(n))
	return 8
}

func putStatfs(b []byte, sizeBytes int64) int {
	ne := binary.NativeEndian
	ne.PutUint64(b, uint64(sizeBytes)/bsizeStat)
	ne.PutUint64(b[24:], 1) // files
	ne.PutUint32(b[40:], bsizeStat)
	ne.PutUint32(b[44:], 255) // name length
	ne.PutUint32(b[48:], bsizeStat)
	return 80
}
