package transport

import (
	"net"
	"syscall"
)

// unsentBytesMax is how much the kernel takes that it cannot send yet. With its default, megabytes of
// bulk would lie before an urgent frame where the queue cannot reorder them.
const unsentBytesMax = 128 << 10

// tcpNotSentLowat is TCP_NOTSENT_LOWAT (tcp(7)), which package syscall lacks.
const tcpNotSentLowat = 25

// tuneSocket sets what a connection of ours wants. An old kernel that refuses is only slower.
func tuneSocket(conn net.Conn) {
	if w, ok := conn.(*wire); ok {
		conn = w.Conn
	}
	tcp, ok := conn.(*net.TCPConn)
	if !ok {
		return
	}
	raw, err := tcp.SyscallConn()
	if err != nil {
		return // closed already; the next use says so
	}
	_ = raw.Control(func(fd uintptr) {
		_ = syscall.SetsockoptInt(int(fd), syscall.IPPROTO_TCP, tcpNotSentLowat, unsentBytesMax)
	})
}

// writeNow writes what the kernel takes without waiting, which may be nothing.
func writeNow(raw syscall.RawConn, b []byte) (written int, err error) {
	ended := raw.Write(func(fd uintptr) bool {
		for written < len(b) {
			var n int
			switch n, err = syscall.Write(int(fd), b[written:]); {
			case n > 0:
				written += n
			case err == syscall.EINTR: //nolint:errorlint // errno as it is
			default:
				return true
			}
		}
		return true
	})
	if err == syscall.EAGAIN { //nolint:errorlint // errno as it is
		err = nil
	}
	if ended != nil {
		err = ended
	}
	return written, err
}
