package transport

import (
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// wireBufferBytes is what a wire reads at once, and the least that it gathers before it writes while more is queued:
// TLS comes in records of 16 KiB, and a system call for each of them costs more than copying it.
const wireBufferBytes = 64 << 10

// Wrap returns conn as a server should hand it to crypto/tls: a connection of peers then reads and writes several TLS
// records with one system call, and writes on the goroutine that has something to say. Until ServeConn
// takes it, it does what conn does. ServeConn takes other connections, too.
func Wrap(conn net.Conn) net.Conn { return newWire(conn) }

// wire is the connection below TLS. From begin on, what TLS writes is gathered, which never blocks, until flush hands
// it to the kernel. One goroutine reads.
type wire struct {
	net.Conn
	raw syscall.RawConn // nil: no socket, so that every write may block

	gathers atomic.Bool
	limit   time.Duration // for each read, and each piece of a write; set by begin, as is heard
	heard   func()        // called for every read that brought something

	in, ahead []byte // read ahead: the buffer, and what is left in it

	mu  sync.Mutex // held over a flush
	out []byte     // written by TLS, and not yet taken by the kernel
	off int        // of out: it was taken up to here
}

func newWire(conn net.Conn) *wire {
	w := &wire{Conn: conn}
	if c, ok := conn.(syscall.Conn); ok {
		w.raw, _ = c.SyscallConn() // closed already: the next use says so
	}
	return w
}

// begin turns to gathering. REQUIRES: nobody reads or writes.
func (w *wire) begin(limit time.Duration, heard func()) {
	w.limit, w.heard = limit, heard
	w.gathers.Store(true)
}

// Read reads, from begin on with a deadline and ahead.
func (w *wire) Read(b []byte) (int, error) {
	if !w.gathers.Load() {
		return w.Conn.Read(b)
	}
	if len(w.ahead) == 0 {
		if w.in == nil {
			w.in = make([]byte, wireBufferBytes)
		}
		n, err := deadlineConn{w.Conn, w.limit, w.heard}.Read(w.in)
		if w.ahead = w.in[:n]; n == 0 {
			return 0, err
		}
	}
	n := copy(b, w.ahead)
	w.ahead = w.ahead[n:]
	return n, nil
}

// Write gathers what TLS writes; before begin it writes.
func (w *wire) Write(b []byte) (int, error) {
	if !w.gathers.Load() {
		return w.Conn.Write(b)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.out = append(w.out, b...)
	return len(b), nil
}

// gathered returns how much is not written yet, in bytes.
func (w *wire) gathered() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return len(w.out) - w.off
}

// flush writes what was gathered. Without wait it writes what the kernel takes at once.
func (w *wire) flush(wait bool) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.raw != nil && w.off < len(w.out) {
		n, err := writeNow(w.raw, w.out[w.off:])
		if err != nil {
			return err
		}
		w.off += n
	}
	if wait && w.off < len(w.out) {
		n, err := deadlineConn{w.Conn, w.limit, nil}.Write(w.out[w.off:])
		w.off += n
		if err == nil {
			err = w.SetWriteDeadline(time.Time{}) // else the next writeNow would meet it
		}
		if err != nil {
			return err
		}
	}
	if w.off == len(w.out) {
		w.out, w.off = w.out[:0], 0
	}
	return nil
}
