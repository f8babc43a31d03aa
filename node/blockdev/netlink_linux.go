package blockdev

import (
	"encoding/binary"
	"errors"
	"fmt"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/trivet-csi/trivet"
)

// Generic netlink (kernel document userspace-api/netlink/intro.rst), as much of it as one family of
// requests with short answers needs. Integers are in the machine's byte order.
//
//	nlmsghdr    length u32 | type u16 | flags u16 | sequence u32 | port u32
//	genlmsghdr  command u8 | version u8 | reserved u16
//	attributes  length u16 | type u16 | value, padding to 4 bytes; nested ones are values of others
const (
	genlHeadBytes   = unix.SizeofNlMsghdr + 4
	netlinkBytesMax = 32 << 10 // longest answer: a list of all nbd devices is one message
	netlinkWait     = 30       // seconds until a kernel that does not answer is an error

	nlaTypeMask = 0x3fff // without NLA_F_NESTED and NLA_F_NET_BYTEORDER
)

// genlConn is a connection to one family of the kernel. It is safe for concurrent use; one request is
// under way at a time.
type genlConn struct {
	fd     int
	family uint16
	once   sync.Once // closes fd

	mu  sync.Mutex
	seq uint32
	buf []byte
}

// dialGenl connects to a family by name. ErrUnavailable: the kernel has no such family.
func dialGenl(name string) (*genlConn, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_GENERIC)
	if err != nil {
		return nil, fmt.Errorf("open netlink: %w", err)
	}
	c := &genlConn{fd: fd, family: unix.GENL_ID_CTRL, buf: make([]byte, netlinkBytesMax)}
	if err := c.resolve(name); err != nil {
		return nil, errors.Join(err, unix.Close(fd))
	}
	return c, nil
}

func (c *genlConn) resolve(name string) error {
	if err := unix.Bind(c.fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return fmt.Errorf("bind netlink: %w", err)
	}
	wait := unix.Timeval{Sec: netlinkWait}
	if err := unix.SetsockoptTimeval(c.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &wait); err != nil {
		return fmt.Errorf("set netlink timeout: %w", err)
	}
	answer, err := c.do(unix.CTRL_CMD_GETFAMILY, 1, appendAttr(nil, unix.CTRL_ATTR_FAMILY_NAME, append([]byte(name), 0)))
	if errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("netlink family %s: the kernel does not have it: %w", name, trivet.ErrUnavailable)
	}
	if err != nil {
		return fmt.Errorf("netlink family %s: %w", name, err)
	}
	id, ok := findAttr(answer, unix.CTRL_ATTR_FAMILY_ID)
	if !ok || len(id) < 2 {
		return fmt.Errorf("netlink family %s: answer without its number: %w", name, trivet.ErrCorrupt)
	}
	c.family = binary.NativeEndian.Uint16(id)
	return nil
}

// close may be called again.
func (c *genlConn) close() {
	c.once.Do(func() { _ = unix.Close(c.fd) }) // nothing to lose
}

// do sends one request and returns the attributes of the answer, nil if there is none but the
// acknowledgement. An errno of the kernel is returned as such.
func (c *genlConn) do(command, version uint8, attrs []byte) ([]byte, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.seq++
	b := make([]byte, genlHeadBytes, genlHeadBytes+len(attrs))
	binary.NativeEndian.PutUint32(b, uint32(genlHeadBytes+len(attrs)))
	binary.NativeEndian.PutUint16(b[4:], c.family)
	binary.NativeEndian.PutUint16(b[6:], unix.NLM_F_REQUEST|unix.NLM_F_ACK)
	binary.NativeEndian.PutUint32(b[8:], c.seq)
	b[unix.SizeofNlMsghdr], b[unix.SizeofNlMsghdr+1] = command, version
	if err := unix.Sendto(c.fd, append(b, attrs...), 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return nil, fmt.Errorf("send netlink: %w", err)
	}
	var answer []byte
	for {
		n, from, err := unix.Recvfrom(c.fd, c.buf, 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("receive netlink: %w", err)
		}
		if nl, ok := from.(*unix.SockaddrNetlink); !ok || nl.Pid != 0 { // only the kernel may answer
			continue
		}
		done, found, err := c.parse(c.buf[:n])
		if found != nil {
			answer = append([]byte(nil), found...)
		}
		if done || err != nil {
			return answer, err
		}
	}
}

// parse goes through the messages of one datagram. It is done at the acknowledgement.
func (c *genlConn) parse(b []byte) (done bool, answer []byte, err error) {
	for len(b) >= unix.SizeofNlMsghdr {
		n := binary.NativeEndian.Uint32(b)
		kind, seq := binary.NativeEndian.Uint16(b[4:]), binary.NativeEndian.Uint32(b[8:])
		if n < unix.SizeofNlMsghdr || uint64(n) > uint64(len(b)) {
			return true, nil, fmt.Errorf("netlink message of %d bytes in %d: %w", n, len(b), trivet.ErrCorrupt)
		}
		body := b[unix.SizeofNlMsghdr:n]
		b = b[min(uint32(len(b)), (n+3)&^3):]
		switch {
		case seq != c.seq: // of a request that we gave up on
		case kind == unix.NLMSG_ERROR && len(body) >= 4:
			if errno := -int32(binary.NativeEndian.Uint32(body)); errno != 0 {
				return true, nil, unix.Errno(errno)
			}
			return true, answer, nil
		case kind == c.family && len(body) >= genlHeadBytes-unix.SizeofNlMsghdr:
			answer = body[genlHeadBytes-unix.SizeofNlMsghdr:]
		}
	}
	return false, answer, nil
}

// appendAttr appends one attribute.
func appendAttr(b []byte, kind uint16, value []byte) []byte {
	b = binary.NativeEndian.AppendUint16(b, uint16(unix.SizeofNlAttr+len(value)))
	b = binary.NativeEndian.AppendUint16(b, kind)
	b = append(b, value...)
	return append(b, make([]byte, -len(value)&3)...)
}

func appendAttr32(b []byte, kind uint16, v uint32) []byte {
	return appendAttr(b, kind, binary.NativeEndian.AppendUint32(nil, v))
}

func appendAttr64(b []byte, kind uint16, v uint64) []byte {
	return appendAttr(b, kind, binary.NativeEndian.AppendUint64(nil, v))
}

// findAttr returns the value of the first attribute of a kind.
func findAttr(b []byte, kind uint16) ([]byte, bool) {
	for len(b) >= unix.SizeofNlAttr {
		n := int(binary.NativeEndian.Uint16(b))
		if n < unix.SizeofNlAttr || n > len(b) {
			return nil, false
		}
		if binary.NativeEndian.Uint16(b[2:])&nlaTypeMask == kind {
			return b[unix.SizeofNlAttr:n], true
		}
		b = b[min(len(b), (n+3)&^3):]
	}
	return nil, false
}
