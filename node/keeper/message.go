package keeper

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"time"

	"golang.org/x/sys/unix"

	"github.com/trivet-csi/trivet"
)

// One packet of a SOCK_SEQPACKET socket is one message, of this length and layout; integers are
// little-endian. A client sends a request and waits for the reply; the reply to opList says how many
// entries follow, each a message. The descriptor of opPut and of the reply to opTake travels beside the
// message (SCM_RIGHTS).
//
// Of a device minor is its kind, connection its number, initFlags and initFlags2 are its tag. The first reply to opList
// has the watchdog's time in away.
//
//	 0 magic "TVKP"    4 version u16     6 op u16        8 status u16   10 flags u16
//	12 minor u32      16 initFlags u32  20 initFlags2 u32  24 maxWrite u32  28 connection u32
//	32 away i64, ns   40 count u32      44 name length u32  48 name, 128 bytes
const (
	messageBytes   = 176
	messageMagic   = 0x504b5654 // "TVKP"
	messageVersion = 1
	nameBytesMax   = trivet.NameBytesMax
)

// Operations of a client.
const (
	opPut     = 1 // keep this descriptor for me, who serves it; the same again replaces it
	opTake    = 2 // give me the descriptor, and nobody else while I am connected
	opRelease = 3 // I do not serve it any more
	opDrop    = 4 // forget it
	opList    = 5
	opWatch   = 6 // I serve this device of the kernel: it has no descriptor
)

// Flags of a message.
const (
	flagAbort   = 1 << 0 // opDrop: end the connection before
	flagServed  = 1 << 1 // of an entry: a server answers for it
	flagClaimed = 1 << 2 // of an entry: a server has taken it
	flagDevice  = 1 << 3 // of an entry: it is a device, with facts of its own
)

// Status of a reply; 0 is success.
var statuses = []error{
	1: trivet.ErrInvalid, 2: trivet.ErrNotFound, 3: trivet.ErrInUse, 4: trivet.ErrNoSpace, 5: trivet.ErrUnavailable,
}

// message is one decoded message.
type message struct {
	op     uint16
	status uint16
	flags  uint16
	facts  Facts
	away   time.Duration
	count  uint32
	name   string
}

// encode writes m to b, which has messageBytes.
func (m *message) encode(b []byte) {
	clear(b)
	le := binary.LittleEndian
	le.PutUint32(b, messageMagic)
	le.PutUint16(b[4:], messageVersion)
	le.PutUint16(b[6:], m.op)
	le.PutUint16(b[8:], m.status)
	le.PutUint16(b[10:], m.flags)
	for i, v := range []uint32{m.facts.Minor, m.facts.Flags, m.facts.Flags2, m.facts.MaxWrite, m.facts.Connection} {
		le.PutUint32(b[12+4*i:], v)
	}
	le.PutUint64(b[32:], uint64(m.away))
	le.PutUint32(b[40:], m.count)
	le.PutUint32(b[44:], uint32(len(m.name)))
	copy(b[48:], m.name)
}

// decode returns ErrInvalid for what no version of this program sends, or only a newer one.
func decode(b []byte) (message, error) {
	if len(b) != messageBytes {
		return message{}, fmt.Errorf("keeper message of %d bytes, want %d: %w", len(b), messageBytes, trivet.ErrInvalid)
	}
	le := binary.LittleEndian
	if magic, version := le.Uint32(b), le.Uint16(b[4:]); magic != messageMagic || version != messageVersion {
		return message{}, fmt.Errorf("keeper message with magic %#x, version %d; want %#x, %d: %w",
			magic, version, messageMagic, messageVersion, trivet.ErrInvalid)
	}
	m := message{
		op: le.Uint16(b[6:]), status: le.Uint16(b[8:]), flags: le.Uint16(b[10:]),
		facts: Facts{
			Minor: le.Uint32(b[12:]), Flags: le.Uint32(b[16:]), Flags2: le.Uint32(b[20:]),
			MaxWrite: le.Uint32(b[24:]), Connection: le.Uint32(b[28:]),
		},
		away: time.Duration(le.Uint64(b[32:])), count: le.Uint32(b[40:]),
	}
	n := le.Uint32(b[44:])
	if n > nameBytesMax {
		return message{}, fmt.Errorf("keeper message with a name of %d bytes, most is %d: %w",
			n, nameBytesMax, trivet.ErrInvalid)
	}
	m.name = string(b[48 : 48+n])
	if m.op != opList || n > 0 {
		if err := trivet.ValidateName(m.name); err != nil {
			return message{}, fmt.Errorf("keeper message: %w", err)
		}
	}
	return m, nil
}

// statusOf is the status that stands for err.
func statusOf(err error) uint16 {
	if err == nil {
		return 0
	}
	for i, s := range statuses {
		if s != nil && errors.Is(err, s) {
			return uint16(i)
		}
	}
	return 5
}

// err is the error that a reply reports.
func (m *message) err() error {
	switch {
	case m.status == 0:
		return nil
	case int(m.status) < len(statuses):
		return fmt.Errorf("keeper: %w", statuses[m.status])
	}
	return fmt.Errorf("keeper: status %d: %w", m.status, trivet.ErrUnavailable)
}

// send sends m, and fd with it unless that is negative.
func send(conn *net.UnixConn, m *message, fd int) error {
	var b [messageBytes]byte
	m.encode(b[:])
	var rights []byte
	if fd >= 0 {
		rights = unix.UnixRights(fd)
	}
	n, _, err := conn.WriteMsgUnix(b[:], rights, nil)
	if err == nil && n != messageBytes {
		err = fmt.Errorf("%d of %d bytes sent: %w", n, messageBytes, trivet.ErrUnavailable)
	}
	return err
}

// receive returns the next message and the descriptor that came with it, -1 if none did. The caller
// closes the descriptor. After ErrInvalid the connection can go on.
func receive(conn *net.UnixConn) (message, int, error) {
	var b [messageBytes + 1]byte
	oob := make([]byte, unix.CmsgSpace(4))
	n, oobN, flags, _, err := conn.ReadMsgUnix(b[:], oob)
	if err != nil {
		return message{}, -1, err
	}
	fd, err := oneRight(oob[:oobN])
	if err == nil && flags&(unix.MSG_CTRUNC|unix.MSG_TRUNC) != 0 {
		err = fmt.Errorf("keeper message was cut (flags %#x): %w", flags, trivet.ErrInvalid)
	}
	var m message
	if err == nil {
		m, err = decode(b[:n])
	}
	if err != nil && fd >= 0 {
		_, fd = unix.Close(fd), -1
	}
	return m, fd, err
}

// oneRight returns the descriptor in a control message, -1 if there is none. More than one are closed
// and refused.
func oneRight(oob []byte) (int, error) {
	if len(oob) == 0 {
		return -1, nil
	}
	controls, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return -1, fmt.Errorf("keeper message: control data: %w: %w", err, trivet.ErrInvalid)
	}
	var fds []int
	for i := range controls {
		got, err := unix.ParseUnixRights(&controls[i])
		if err == nil {
			fds = append(fds, got...)
		}
	}
	switch len(fds) {
	case 0:
		return -1, nil
	case 1:
		return fds[0], nil
	}
	for _, fd := range fds {
		_ = unix.Close(fd) // nothing was written
	}
	return -1, fmt.Errorf("keeper message with %d descriptors, most is 1: %w", len(fds), trivet.ErrInvalid)
}
