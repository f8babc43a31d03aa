package blockdev

import (
	"encoding/binary"
	"fmt"
	"io"
	"slices"

	"github.com/trivet-csi/trivet"
)

// The fixed newstyle handshake of the NBD protocol (NetworkBlockDevice/nbd doc/proto.md). All
// integers are big endian.
//
//	server    "NBDMAGIC" | "IHAVEOPT" | handshake flags u16
//	client    client flags u32
//	option    "IHAVEOPT" | option u32 | length u32 | data
//	reply     0x3e889045565a9 u64 | option u32 | type u32 | length u32 | data
const (
	nbdMagic       = 0x4e42444d41474943 // "NBDMAGIC"
	nbdOptionMagic = 0x49484156454f5054 // "IHAVEOPT"
	nbdReplyMagic  = 0x3e889045565a9

	nbdFixedNewstyle = 1 << 0
	nbdNoZeroes      = 1 << 1

	nbdOptExportName = 1
	nbdOptAbort      = 2
	nbdOptList       = 3
	nbdOptInfo       = 6
	nbdOptGo         = 7

	nbdRepAck        = 1
	nbdRepServer     = 2
	nbdRepInfo       = 3
	nbdRepErr        = 1 << 31
	nbdRepErrUnsup   = nbdRepErr + 1
	nbdRepErrInvalid = nbdRepErr + 3
	nbdRepErrUnknown = nbdRepErr + 6

	nbdInfoExport    = 0
	nbdInfoName      = 1
	nbdInfoBlockSize = 3

	// nbdTransmission says what the export can do. Several connections may be used as one,
	// because a Flush of the Device covers the writes of all of them.
	nbdTransmission = 1<<0 | 1<<2 | 1<<3 | 1<<5 | 1<<6 | 1<<8 // flags, FLUSH, FUA, TRIM, ZEROES, MULTI_CONN
)

// Limits of a handshake: a client that passes one is cut off (S6).
const (
	nbdNameBytesMax   = 4096 // the protocol's own
	nbdOptionBytesMax = nbdNameBytesMax + 1024
	nbdOptionsMax     = 64
)

// nbdExport is a Device under a name.
type nbdExport struct {
	name   string
	device trivet.Device
}

// negotiate speaks the server's part of the handshake. It returns true if the client now sends
// requests, false if it took its leave. After an error the connection is of no more use.
func (e nbdExport) negotiate(r io.Reader, w io.Writer) (bool, error) {
	hello := binary.BigEndian.AppendUint64(nil, nbdMagic)
	hello = binary.BigEndian.AppendUint64(hello, nbdOptionMagic)
	hello = binary.BigEndian.AppendUint16(hello, nbdFixedNewstyle|nbdNoZeroes)
	if _, err := w.Write(hello); err != nil {
		return false, fmt.Errorf("nbd hello: %w", err)
	}
	var head [16]byte
	if _, err := io.ReadFull(r, head[:4]); err != nil {
		return false, fmt.Errorf("nbd client flags: %w", err)
	}
	flags := binary.BigEndian.Uint32(head[:])
	if flags&^(nbdFixedNewstyle|nbdNoZeroes) != 0 {
		return false, fmt.Errorf("nbd client flags %#x: unknown: %w", flags, trivet.ErrInvalid)
	}
	buf := make([]byte, nbdOptionBytesMax)
	for range nbdOptionsMax {
		if _, err := io.ReadFull(r, head[:]); err != nil {
			return false, fmt.Errorf("nbd option: %w", err)
		}
		option, n := binary.BigEndian.Uint32(head[8:]), binary.BigEndian.Uint32(head[12:])
		if magic := binary.BigEndian.Uint64(head[:]); magic != nbdOptionMagic {
			return false, fmt.Errorf("nbd option: magic %#x: %w", magic, trivet.ErrInvalid)
		}
		if n > nbdOptionBytesMax {
			return false, fmt.Errorf("nbd option %d: %d bytes, most is %d: %w",
				option, n, nbdOptionBytesMax, trivet.ErrInvalid)
		}
		if _, err := io.ReadFull(r, buf[:n]); err != nil {
			return false, fmt.Errorf("nbd option %d: %w", option, err)
		}
		next, err := e.option(w, option, buf[:n], flags&nbdNoZeroes != 0)
		if err != nil || next != nbdMore {
			return next == nbdTransmit, err
		}
	}
	return false, fmt.Errorf("nbd handshake: more than %d options: %w", nbdOptionsMax, trivet.ErrInvalid)
}

// nbdNext is what follows an option.
type nbdNext int

const (
	nbdMore nbdNext = iota
	nbdTransmit
	nbdLeave
)

// option answers one option.
func (e nbdExport) option(w io.Writer, option uint32, data []byte, noZeroes bool) (nbdNext, error) {
	switch option {
	case nbdOptExportName: // has no way to say no but to hang up
		if !e.is(string(data)) {
			return nbdLeave, fmt.Errorf("nbd export %.64q: %w", data, trivet.ErrNotFound)
		}
		return nbdTransmit, e.sendOldExport(w, noZeroes)
	case nbdOptAbort:
		return nbdLeave, nbdReply(w, option, nbdRepAck, nil)
	case nbdOptList:
		if len(data) != 0 {
			return nbdMore, nbdReply(w, option, nbdRepErrInvalid, nil)
		}
		entry := binary.BigEndian.AppendUint32(nil, uint32(len(e.name)))
		if err := nbdReply(w, option, nbdRepServer, append(entry, e.name...)); err != nil {
			return nbdLeave, err
		}
		return nbdMore, nbdReply(w, option, nbdRepAck, nil)
	case nbdOptInfo, nbdOptGo:
		return e.info(w, option, data)
	}
	return nbdMore, nbdReply(w, option, nbdRepErrUnsup, nil) // STARTTLS, structured replies, ...
}

// is tells whether a client that asks for name means this export. The empty name is the default.
func (e nbdExport) is(name string) bool { return name == "" || name == e.name }

func (e nbdExport) sendOldExport(w io.Writer, noZeroes bool) error {
	b := binary.BigEndian.AppendUint64(nil, uint64(e.device.Size()))
	b = binary.BigEndian.AppendUint16(b, nbdTransmission)
	if !noZeroes {
		b = append(b, make([]byte, 124)...)
	}
	if _, err := w.Write(b); err != nil {
		return fmt.Errorf("nbd export: %w", err)
	}
	return nil
}

// info answers INFO and GO.
func (e nbdExport) info(w io.Writer, option uint32, data []byte) (nbdNext, error) {
	name, wanted, ok := parseNBDInfo(data)
	if !ok {
		return nbdMore, nbdReply(w, option, nbdRepErrInvalid, nil)
	}
	if !e.is(name) {
		return nbdMore, nbdReply(w, option, nbdRepErrUnknown, nil)
	}
	export := binary.BigEndian.AppendUint16(nil, nbdInfoExport)
	export = binary.BigEndian.AppendUint64(export, uint64(e.device.Size()))
	export = binary.BigEndian.AppendUint16(export, nbdTransmission)
	blocks := binary.BigEndian.AppendUint16(nil, nbdInfoBlockSize)
	for _, n := range []uint32{trivet.BlockSize, trivet.BlockSize, requestBytesMax} { // least, preferred, most
		blocks = binary.BigEndian.AppendUint32(blocks, n)
	}
	infos := [][]byte{export, blocks}
	if slices.Contains(wanted, nbdInfoName) {
		infos = append(infos, append(binary.BigEndian.AppendUint16(nil, nbdInfoName), e.name...))
	}
	for _, info := range infos {
		if err := nbdReply(w, option, nbdRepInfo, info); err != nil {
			return nbdLeave, err
		}
	}
	next := nbdMore
	if option == nbdOptGo {
		next = nbdTransmit
	}
	return next, nbdReply(w, option, nbdRepAck, nil)
}

// parseNBDInfo parses the data of INFO and GO: name length u32, name, count u16, types u16 each.
func parseNBDInfo(data []byte) (name string, wanted []uint16, ok bool) {
	if len(data) < 6 {
		return "", nil, false
	}
	nameN := binary.BigEndian.Uint32(data)
	if data = data[4:]; uint64(nameN) > uint64(len(data)-2) {
		return "", nil, false
	}
	name, data = string(data[:nameN]), data[nameN:]
	n := int(binary.BigEndian.Uint16(data))
	if data = data[2:]; len(data) != 2*n {
		return "", nil, false
	}
	for ; len(data) > 0; data = data[2:] {
		wanted = append(wanted, binary.BigEndian.Uint16(data))
	}
	return name, wanted, true
}

// nbdReply sends one reply to an option.
func nbdReply(w io.Writer, option, kind uint32, data []byte) error {
	b := binary.BigEndian.AppendUint64(nil, nbdReplyMagic)
	for _, v := range []uint32{option, kind, uint32(len(data))} {
		b = binary.BigEndian.AppendUint32(b, v)
	}
	if _, err := w.Write(append(b, data...)); err != nil {
		return fmt.Errorf("nbd reply to option %d: %w", option, err)
	}
	return nil
}
