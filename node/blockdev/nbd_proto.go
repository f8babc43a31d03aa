package blockdev

import (
	"encoding/binary"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/trivet-csi/trivet"
)

// The NBD protocol, as NetworkBlockDevice/nbd doc/proto.md has it. All integers are big endian.
//
// Handshake (fixed newstyle):
//
//	server    "NBDMAGIC" | "IHAVEOPT" | handshake flags u16
//	client    client flags u32
//	option    "IHAVEOPT" | option u32 | length u32 | data
//	reply     0x3e889045565a9 u64 | option u32 | type u32 | length u32 | data
//
// Transmission, in the compact form and with extended headers:
//
//	request   0x25609513 u32 | flags u16 | command u16 | cookie u64 | offset u64 | length u32 | data of a write
//	          0x21e41c71 u32 | flags u16 | command u16 | cookie u64 | offset u64 | length u64 | data of a write
//	reply     0x67446698 u32 | error u32 | cookie u64 | data of a read
//	chunk     0x668e33ef u32 | flags u16 | type u16 | cookie u64 | length u32 | payload
//	          0x6e8a278c u32 | flags u16 | type u16 | cookie u64 | offset u64 | length u64 | payload
const (
	nbdMagic         = 0x4e42444d41474943 // "NBDMAGIC"
	nbdOptionMagic   = 0x49484156454f5054 // "IHAVEOPT"
	nbdReplyMagic    = 0x3e889045565a9
	nbdRequestMagic  = 0x25609513
	nbdExtendedMagic = 0x21e41c71
	nbdSimpleMagic   = 0x67446698
	nbdChunkMagic    = 0x668e33ef
	nbdExtChunkMagic = 0x6e8a278c

	nbdRequestBytes    = 28
	nbdExtRequestBytes = 32
	nbdSimpleBytes     = 16
	nbdChunkBytes      = 20
	nbdExtChunkBytes   = 32
)

// Flags of the handshake.
const (
	nbdFixedNewstyle = 1 << 0
	nbdNoZeroes      = 1 << 1
)

// Options, and the types of the replies to them.
const (
	nbdOptExportName      = 1
	nbdOptAbort           = 2
	nbdOptList            = 3
	nbdOptStartTLS        = 5
	nbdOptInfo            = 6
	nbdOptGo              = 7
	nbdOptStructuredReply = 8
	nbdOptListMeta        = 9
	nbdOptSetMeta         = 10
	nbdOptExtended        = 11

	nbdRepAck     = 1
	nbdRepServer  = 2
	nbdRepInfo    = 3
	nbdRepMeta    = 4
	nbdRepErr     = 1 << 31
	nbdRepUnsup   = nbdRepErr + 1
	nbdRepPolicy  = nbdRepErr + 2
	nbdRepInvalid = nbdRepErr + 3
	nbdRepTLSReqd = nbdRepErr + 5
	nbdRepUnknown = nbdRepErr + 6
	nbdRepTooBig  = nbdRepErr + 9
	nbdRepExtReqd = nbdRepErr + 10

	nbdInfoExport    = 0
	nbdInfoName      = 1
	nbdInfoBlockSize = 3
)

// Transmission flags: what an export can do. Several connections may be used as one, because a Flush
// of the Device covers the writes of all of them. WriteZeroes costs the same whatever its length, so
// it keeps the promise of FAST_ZERO.
const (
	nbdHasFlags      = 1 << 0
	nbdReadOnly      = 1 << 1
	nbdSendFlush     = 1 << 2
	nbdSendFUA       = 1 << 3
	nbdSendTrim      = 1 << 5
	nbdSendZeroes    = 1 << 6
	nbdSendDF        = 1 << 7 // with structured replies only
	nbdCanMultiConn  = 1 << 8
	nbdSendCache     = 1 << 10
	nbdSendFastZero  = 1 << 11
	nbdTransmission  = nbdHasFlags | nbdSendFlush | nbdCanMultiConn | nbdSendCache
	nbdWritableFlags = nbdSendFUA | nbdSendTrim | nbdSendZeroes | nbdSendFastZero
)

// Commands and their flags.
const (
	nbdCmdRead        = 0
	nbdCmdWrite       = 1
	nbdCmdDisconnect  = 2
	nbdCmdFlush       = 3
	nbdCmdTrim        = 4
	nbdCmdCache       = 5
	nbdCmdWriteZeroes = 6
	nbdCmdBlockStatus = 7

	nbdFlagFUA        = 1 << 0
	nbdFlagNoHole     = 1 << 1
	nbdFlagDF         = 1 << 2
	nbdFlagReqOne     = 1 << 3
	nbdFlagFastZero   = 1 << 4
	nbdFlagPayloadLen = 1 << 5
)

// Types of chunks.
const (
	nbdChunkDone = 1 << 0 // flag: the last one of its request

	nbdChunkNone      = 0
	nbdChunkData      = 1
	nbdChunkHole      = 2
	nbdChunkStatus    = 5
	nbdChunkStatusExt = 6
	nbdChunkError     = 1<<15 + 1
)

const (
	// nbdPayloadMax is the longest read or write, announced as the maximum block size; it is also the
	// protocol's default. A longer write cuts the client off: its payload would have to be skipped.
	nbdPayloadMax = 32 << 20

	// nbdMessageMax bounds the text that goes with an error; the protocol allows 4096.
	nbdMessageMax = 512

	// nbdAllocation is the one metadata context, and nbdAllocationID how its replies name it.
	nbdAllocation   = "base:allocation"
	nbdAllocationID = 1

	nbdStateHole = 1 << 0
	nbdStateZero = 1 << 1
)

// nbdMode is the form of requests and replies.
type nbdMode int

const (
	nbdSimple nbdMode = iota
	nbdStructured
	nbdExtended // implies structured
)

// requestBytes is the length of a request's header.
func (m nbdMode) requestBytes() int {
	if m == nbdExtended {
		return nbdExtRequestBytes
	}
	return nbdRequestBytes
}

// nbdRequest is one request, or a part of a long one.
type nbdRequest struct {
	flags, command uint16
	cookie         uint64
	offBytes       uint64
	lenBytes       uint64
}

// parseNBDRequest decodes a request's header. An error means that the stream is out of step.
// REQUIRES: len(b) = m.requestBytes().
func parseNBDRequest(m nbdMode, b []byte) (nbdRequest, error) {
	want, n := uint32(nbdRequestMagic), uint64(0)
	if m == nbdExtended {
		want, n = nbdExtendedMagic, binary.BigEndian.Uint64(b[24:])
	} else {
		n = uint64(binary.BigEndian.Uint32(b[24:]))
	}
	if magic := binary.BigEndian.Uint32(b); magic != want {
		return nbdRequest{}, fmt.Errorf("nbd request: magic %#x, want %#x: %w", magic, want, trivet.ErrInvalid)
	}
	return nbdRequest{
		flags:    binary.BigEndian.Uint16(b[4:]),
		command:  binary.BigEndian.Uint16(b[6:]),
		cookie:   binary.BigEndian.Uint64(b[8:]),
		offBytes: binary.BigEndian.Uint64(b[16:]),
		lenBytes: n,
	}, nil
}

// payloadBytes returns how many bytes follow the header of r.
func (r *nbdRequest) payloadBytes(m nbdMode) uint64 {
	if r.command == nbdCmdWrite || m == nbdExtended && r.flags&nbdFlagPayloadLen != 0 {
		return r.lenBytes
	}
	return 0
}

// knownFlags returns the flags that a client may set on a command.
func knownFlags(m nbdMode, command uint16) uint16 {
	known := uint16(nbdFlagFUA) // on every command, with an effect on those that write
	switch command {
	case nbdCmdRead:
		if m != nbdSimple {
			known |= nbdFlagDF
		}
	case nbdCmdWrite:
		if m == nbdExtended {
			known |= nbdFlagPayloadLen
		}
	case nbdCmdWriteZeroes:
		known |= nbdFlagNoHole | nbdFlagFastZero // WriteZeroes never depends on them
	case nbdCmdBlockStatus:
		known |= nbdFlagReqOne
	}
	return known
}

// errNotPermitted is answered to a client that would write to a read-only export.
var errNotPermitted = fmt.Errorf("export is read-only: %w", unix.EPERM)

// errNBDTooBig is answered to a read that may not be cut and is longer than one piece.
var errNBDTooBig = fmt.Errorf("read that may not be fragmented: most is %d bytes: %w", requestBytesMax, unix.EOVERFLOW)

// check says why a request is refused before the Device sees it, or nil.
func (r *nbdRequest) check(m nbdMode, readOnly, status bool, sizeBytes int64) error {
	if r.flags&^knownFlags(m, r.command) != 0 {
		return fmt.Errorf("nbd command %d: flags %#x: %w", r.command, r.flags, trivet.ErrInvalid)
	}
	switch r.command {
	case nbdCmdFlush:
		return nil // has no range
	case nbdCmdWrite, nbdCmdTrim, nbdCmdWriteZeroes:
		if readOnly {
			return errNotPermitted
		}
	case nbdCmdRead:
		if r.lenBytes > nbdPayloadMax {
			return fmt.Errorf("nbd read of %d bytes: most is %d: %w", r.lenBytes, nbdPayloadMax, trivet.ErrInvalid)
		}
		if r.flags&nbdFlagDF != 0 && r.lenBytes > requestBytesMax {
			return errNBDTooBig
		}
	case nbdCmdBlockStatus:
		if !status || r.lenBytes == 0 {
			return fmt.Errorf("nbd block status of %d bytes, context negotiated: %t: %w", r.lenBytes, status, trivet.ErrInvalid)
		}
	case nbdCmdCache:
	default:
		return fmt.Errorf("nbd command %d: %w", r.command, trivet.ErrInvalid)
	}
	return r.checkRange(sizeBytes)
}

// checkRange demands whole blocks within the Device, as announced. Discard alone would align inwards.
func (r *nbdRequest) checkRange(sizeBytes int64) error {
	// What does not fit an int64 becomes negative, which is invalid too.
	err := trivet.CheckRange(int64(r.offBytes), int64(r.lenBytes), sizeBytes) //nolint:gosec // see above
	switch {
	case err == nil:
		return nil
	case errors.Is(err, trivet.ErrOutOfRange) && (r.command == nbdCmdWrite || r.command == nbdCmdWriteZeroes):
		// proto.md, "Error values": a write past the end of the export is ENOSPC, all else EINVAL.
		return fmt.Errorf("nbd command %d: %w: %w", r.command, trivet.ErrNoSpace, err)
	}
	return fmt.Errorf("nbd command %d: %w", r.command, err)
}

// nbdErrno maps an error to an error number that the protocol knows.
func nbdErrno(err error) uint32 {
	for _, e := range []unix.Errno{unix.EPERM, unix.EOVERFLOW} {
		if errors.Is(err, e) {
			return uint32(e)
		}
	}
	errno := toErrno(err)
	if errno != 0 && errno != unix.EINVAL && errno != unix.ENOSPC {
		return uint32(unix.EIO)
	}
	return uint32(errno)
}
