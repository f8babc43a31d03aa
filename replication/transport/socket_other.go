//go:build !linux

package transport

import "net"

// tuneSocket has nothing to set here.
func tuneSocket(net.Conn) {}
