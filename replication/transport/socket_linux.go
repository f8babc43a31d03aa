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
