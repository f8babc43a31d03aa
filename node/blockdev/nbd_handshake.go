package blockdev

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"slices"

	"github.com/trivet-csi/trivet"
)

// Limits of a handshake: a client that passes one is cut off (S6).
const (
	nbdNameBytesMax   = 4096 // the protocol's own
	nbdOptionBytesMax = nbdNameBytesMax + 1024
	nbdOptionsMax     = 64
)

// nbdExport is a Device under a name.
type nbdExport struct {
	name     string
	device   trivet.Device
	readOnly bool
}

// is tells whether a client that asks for name means this export. The empty name is the default.
func (e *nbdExport) is(name string) bool { return name == "" || name == e.name }

// flags returns the transmission flags.
func (e *nbdExport) flags(m nbdMode) uint16 {
	flags := uint16(nbdTransmission)
	if e.readOnly {
		flags |= nbdReadOnly
	} else {
		flags |= nbdWritableFlags
	}
	if m != nbdSimple {
		flags |= nbdSendDF
	}
	return flags
}

// nbdHandshake is the server's part of one handshake. It says what was agreed on when negotiate
// returns.
type nbdHandshake struct {
	export *nbdExport
	rw     io.ReadWriter

	// startTLS turns the connection into a TLS one and returns it; nil: TLS is not offered. Then
	// nothing else is allowed before it (FORCEDTLS of the protocol).
	startTLS func() (io.ReadWriter, error)

	// admit reserves the means to serve one more client; nil: always.
	admit func() error

	noZeroes bool
	secure   bool
	mode     nbdMode
	status   bool   // base:allocation was chosen
	statusOf string // for this export's name, as the client spells it
}

// nbdNext is what follows an option.
type nbdNext int

const (
	nbdMore nbdNext = iota
	nbdTransmit
	nbdLeave
)

// negotiate speaks with the client. It returns true if the client now sends requests, false if it
// took its leave. After an error the connection is of no more use.
func (h *nbdHandshake) negotiate() (bool, error) {
	hello := binary.BigEndian.AppendUint64(nil, nbdMagic)
	hello = binary.BigEndian.AppendUint64(hello, nbdOptionMagic)
	hello = binary.BigEndian.AppendUint16(hello, nbdFixedNewstyle|nbdNoZeroes)
	if _, err := h.rw.Write(hello); err != nil {
		return false, fmt.Errorf("nbd hello: %w", err)
	}
	var head [16]byte
	if _, err := io.ReadFull(h.rw, head[:4]); err != nil {
		return false, fmt.Errorf("nbd client flags: %w", err)
	}
	flags := binary.BigEndian.Uint32(head[:])
	if flags&^(nbdFixedNewstyle|nbdNoZeroes) != 0 {
		return false, fmt.Errorf("nbd client flags %#x: unknown: %w", flags, trivet.ErrInvalid)
	}
	h.noZeroes = flags&nbdNoZeroes != 0
	buf := make([]byte, nbdOptionBytesMax)
	for range nbdOptionsMax {
		if _, err := io.ReadFull(h.rw, head[:]); err != nil {
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
		if _, err := io.ReadFull(h.rw, buf[:n]); err != nil {
			return false, fmt.Errorf("nbd option %d: %w", option, err)
		}
		next, err := h.option(option, buf[:n])
		if err != nil || next != nbdMore {
			return next == nbdTransmit && err == nil, err
		}
	}
	return false, fmt.Errorf("nbd handshake: more than %d options: %w", nbdOptionsMax, trivet.ErrInvalid)
}

// option answers one option.
func (h *nbdHandshake) option(option uint32, data []byte) (nbdNext, error) {
	if h.startTLS != nil && !h.secure && option != nbdOptStartTLS && option != nbdOptAbort {
		if option == nbdOptExportName { // has no way to say no but to hang up
			return nbdLeave, fmt.Errorf("nbd export without tls: %w", trivet.ErrInvalid)
		}
		return nbdMore, h.refuse(option, nbdRepTLSReqd, "start TLS first")
	}
	switch option {
	case nbdOptExportName:
		return h.oldExport(string(data))
	case nbdOptAbort:
		return nbdLeave, h.reply(option, nbdRepAck, nil)
	case nbdOptInfo, nbdOptGo:
		return h.info(option, data)
	case nbdOptListMeta, nbdOptSetMeta:
		return nbdMore, h.meta(option, data)
	case nbdOptList, nbdOptStartTLS, nbdOptStructuredReply, nbdOptExtended:
		if len(data) != 0 {
			return nbdMore, h.refuse(option, nbdRepInvalid, "the option has no data")
		}
	}
	switch option {
	case nbdOptList:
		entry := binary.BigEndian.AppendUint32(nil, uint32(len(h.export.name)))
		if err := h.reply(option, nbdRepServer, append(entry, h.export.name...)); err != nil {
			return nbdLeave, err
		}
		return nbdMore, h.reply(option, nbdRepAck, nil)
	case nbdOptStartTLS:
		return nbdMore, h.secureUp()
	case nbdOptStructuredReply, nbdOptExtended:
		return nbdMore, h.upgrade(option)
	}
	return nbdMore, h.refuse(option, nbdRepUnsup, "unknown option")
}

// secureUp starts TLS. What was agreed on in the open is forgotten: somebody else may have said it.
func (h *nbdHandshake) secureUp() error {
	switch {
	case h.startTLS == nil:
		return h.refuse(nbdOptStartTLS, nbdRepPolicy, "this socket needs no TLS: it is open to its owner only")
	case h.secure:
		return h.refuse(nbdOptStartTLS, nbdRepInvalid, "TLS has been started")
	}
	if err := h.reply(nbdOptStartTLS, nbdRepAck, nil); err != nil {
		return err
	}
	rw, err := h.startTLS()
	if err != nil {
		return fmt.Errorf("nbd start tls: %w", err)
	}
	h.rw, h.secure, h.mode, h.status = rw, true, nbdSimple, false
	return nil
}

// upgrade answers STRUCTURED_REPLY and EXTENDED_HEADERS.
func (h *nbdHandshake) upgrade(option uint32) error {
	want := nbdStructured
	if option == nbdOptExtended {
		want = nbdExtended
	}
	switch {
	case h.mode == want:
		return h.refuse(option, nbdRepInvalid, "negotiated before")
	case h.mode > want:
		return h.refuse(option, nbdRepExtReqd, "extended headers are negotiated")
	}
	h.mode = want
	return h.reply(option, nbdRepAck, nil)
}

func (h *nbdHandshake) oldExport(name string) (nbdNext, error) {
	if !h.export.is(name) {
		return nbdLeave, fmt.Errorf("nbd export %.64q: %w", name, trivet.ErrNotFound)
	}
	if h.mode == nbdExtended {
		return nbdLeave, fmt.Errorf("nbd export by its old option with extended headers: %w", trivet.ErrInvalid)
	}
	if err := h.allow(); err != nil {
		return nbdLeave, err
	}
	h.status = h.status && h.statusOf == name
	b := binary.BigEndian.AppendUint64(nil, uint64(h.export.device.Size()))
	b = binary.BigEndian.AppendUint16(b, h.export.flags(h.mode))
	if !h.noZeroes {
		b = append(b, make([]byte, 124)...)
	}
	if _, err := h.rw.Write(b); err != nil {
		return nbdLeave, fmt.Errorf("nbd export: %w", err)
	}
	return nbdTransmit, nil
}

func (h *nbdHandshake) allow() error {
	if h.admit == nil {
		return nil
	}
	return h.admit()
}

// info answers INFO and GO.
func (h *nbdHandshake) info(option uint32, data []byte) (nbdNext, error) {
	name, wanted, ok := parseNBDInfo(data)
	if !ok {
		return nbdMore, h.refuse(option, nbdRepInvalid, "malformed")
	}
	if !h.export.is(name) {
		return nbdMore, h.refuse(option, nbdRepUnknown, "no such export")
	}
	next := nbdMore
	if option == nbdOptGo {
		if err := h.allow(); err != nil {
			return nbdLeave, errors.Join(err, h.refuse(option, nbdRepPolicy, err.Error()))
		}
		next = nbdTransmit
		h.status = h.status && h.statusOf == name // proto.md: contexts are those of the same export name
	}
	export := binary.BigEndian.AppendUint16(nil, nbdInfoExport)
	export = binary.BigEndian.AppendUint64(export, uint64(h.export.device.Size()))
	export = binary.BigEndian.AppendUint16(export, h.export.flags(h.mode))
	blocks := binary.BigEndian.AppendUint16(nil, nbdInfoBlockSize)
	for _, n := range []uint32{trivet.BlockSize, trivet.BlockSize, nbdPayloadMax} { // least, preferred, most
		blocks = binary.BigEndian.AppendUint32(blocks, n)
	}
	infos := [][]byte{export, blocks}
	if slices.Contains(wanted, nbdInfoName) {
		infos = append(infos, append(binary.BigEndian.AppendUint16(nil, nbdInfoName), h.export.name...))
	}
	for _, info := range infos {
		if err := h.reply(option, nbdRepInfo, info); err != nil {
			return nbdLeave, err
		}
	}
	return next, h.reply(option, nbdRepAck, nil)
}

// meta answers LIST_META_CONTEXT and SET_META_CONTEXT.
func (h *nbdHandshake) meta(option uint32, data []byte) error {
	set := option == nbdOptSetMeta
	if set {
		h.status = false // whatever becomes of this option, it replaces the last one
	}
	if h.mode == nbdSimple {
		return h.refuse(option, nbdRepInvalid, "negotiate structured replies first")
	}
	name, queries, ok := parseNBDMeta(data)
	if !ok {
		return h.refuse(option, nbdRepInvalid, "malformed")
	}
	if !h.export.is(name) {
		return h.refuse(option, nbdRepUnknown, "no such export")
	}
	found := slices.Contains(queries, nbdAllocation)
	if !set { // a list may ask for everything, or for a namespace
		found = found || len(queries) == 0 || slices.Contains(queries, "base:")
	}
	if found {
		id := uint32(0) // has no meaning in a list
		if set {
			id = nbdAllocationID
		}
		if err := h.reply(option, nbdRepMeta, append(binary.BigEndian.AppendUint32(nil, id), nbdAllocation...)); err != nil {
			return err
		}
	}
	if set {
		h.status, h.statusOf = found, name
	}
	return h.reply(option, nbdRepAck, nil)
}

// parseNBDInfo parses the data of INFO and GO: name length u32, name, count u16, types u16 each.
func parseNBDInfo(data []byte) (name string, wanted []uint16, ok bool) {
	name, data, ok = cutNBDString(data)
	if !ok || len(data) < 2 {
		return "", nil, false
	}
	n := int(binary.BigEndian.Uint16(data))
	if data = data[2:]; len(data) != 2*n {
		return "", nil, false
	}
	for ; len(data) > 0; data = data[2:] {
		wanted = append(wanted, binary.BigEndian.Uint16(data))
	}
	return name, wanted, true
}

// parseNBDMeta parses the data of LIST_META_CONTEXT and SET_META_CONTEXT: name length u32, name,
// count u32, and as many queries, each a length u32 and that many bytes.
func parseNBDMeta(data []byte) (name string, queries []string, ok bool) {
	name, data, ok = cutNBDString(data)
	if !ok || len(data) < 4 {
		return "", nil, false
	}
	n := binary.BigEndian.Uint32(data)
	if data = data[4:]; uint64(n)*4 > uint64(len(data)) { // each has a length at least
		return "", nil, false
	}
	for range n {
		var query string
		if query, data, ok = cutNBDString(data); !ok {
			return "", nil, false
		}
		queries = append(queries, query)
	}
	return name, queries, len(data) == 0
}

// cutNBDString cuts a string with its length u32 in front off data.
func cutNBDString(data []byte) (s string, rest []byte, ok bool) {
	if len(data) < 4 {
		return "", nil, false
	}
	n := binary.BigEndian.Uint32(data)
	if data = data[4:]; uint64(n) > uint64(len(data)) || n > nbdNameBytesMax {
		return "", nil, false
	}
	return string(data[:n]), data[n:], true
}

// refuse answers an option with an error and a reason for people.
func (h *nbdHandshake) refuse(option, kind uint32, why string) error {
	return h.reply(option, kind, []byte(why))
}

// reply sends one reply to an option.
func (h *nbdHandshake) reply(option, kind uint32, data []byte) error {
	b := binary.BigEndian.AppendUint64(nil, nbdReplyMagic)
	for _, v := range []uint32{option, kind, uint32(len(data))} {
		b = binary.BigEndian.AppendUint32(b, v)
	}
	if _, err := h.rw.Write(append(b, data...)); err != nil {
		return fmt.Errorf("nbd reply to option %d: %w", option, err)
	}
	return nil
}
