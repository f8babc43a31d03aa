package transport

import (
	"bytes"
	"io"
	"net"
	"os"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
)

// countedConn counts its reads and writes.
type countedConn struct {
	net.Conn
	reads, writes atomic.Int64
	deadline      atomic.Pointer[time.Time] // of writes
}

func (c *countedConn) SetWriteDeadline(t time.Time) error {
	c.deadline.Store(&t)
	return c.Conn.SetWriteDeadline(t)
}

func (c *countedConn) Read(b []byte) (int, error) {
	c.reads.Add(1)
	return c.Conn.Read(b)
}

func (c *countedConn) Write(b []byte) (int, error) {
	c.writes.Add(1)
	return c.Conn.Write(b)
}

// sockets returns the two ends of a TCP connection.
func sockets(t *testing.T) (near, far net.Conn) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer l.Close()
	near, err = net.Dial("tcp", l.Addr().String())
	require.NoError(t, err)
	far, err = l.Accept()
	require.NoError(t, err)
	t.Cleanup(func() {
		near.Close()
		far.Close()
	})
	return near, far
}

// What TLS writes in pieces goes in one write, and what comes in one piece is read at once. Until begin everything
// passes as it is: a handshake waits for its answers.
func TestWireGathers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		near, far := net.Pipe()
		counted := &countedConn{Conn: near}
		a, b := newWire(counted), newWire(&countedConn{Conn: far})
		got := make(chan []byte, 1)
		read := func(n int) {
			p := make([]byte, n)
			_, err := io.ReadFull(b, p)
			require.NoError(t, err)
			got <- p
		}
		go read(5)
		_, err := a.Write([]byte("hello"))
		require.NoError(t, err)
		require.Equal(t, "hello", string(<-got))

		heard := 0
		a.begin(time.Second, nil)
		b.begin(time.Second, func() { heard++ })
		part := bytes.Repeat([]byte("x"), 1000)
		for range 40 {
			_, err := a.Write(part)
			require.NoError(t, err)
		}
		require.EqualValues(t, 1, counted.writes.Load(), "nothing is written yet")
		require.Equal(t, 40*len(part), a.gathered())
		require.NoError(t, a.flush(false), "which may not block, and a pipe would")
		require.Equal(t, 40*len(part), a.gathered())
		go func() {
			for range 40 {
				read(len(part))
			}
		}()
		require.NoError(t, a.flush(true))
		for range 40 {
			require.Equal(t, part, <-got)
		}
		require.Zero(t, a.gathered())
		require.EqualValues(t, 2, counted.writes.Load())
		require.True(t, counted.deadline.Load().IsZero(), "or a later write at once would meet it")
		require.Equal(t, 1, heard, "reads of the connection")
		near.Close()
		far.Close()
	})
}

// A far end that does not read holds nobody up who must not wait, and who may wait for the limit only. What it takes
// later is all there, in order.
func TestWireNeverBlocks(t *testing.T) {
	near, far := sockets(t)
	w := newWire(near)
	w.begin(50*time.Millisecond, nil)
	sent := make([]byte, 16<<20)
	for i := range sent {
		sent[i] = byte(i / 7)
	}
	_, err := w.Write(sent)
	require.NoError(t, err)
	require.NoError(t, w.flush(false))
	require.Positive(t, w.gathered(), "the kernel's buffers are smaller")
	require.Less(t, w.gathered(), len(sent), "and it took something")
	require.ErrorIs(t, w.flush(true), os.ErrDeadlineExceeded)

	require.NoError(t, near.SetWriteDeadline(time.Time{})) // a stream would have ended
	w.limit = time.Minute
	got := make(chan []byte, 1)
	go func() {
		b := make([]byte, len(sent))
		_, _ = io.ReadFull(far, b)
		got <- b
	}()
	require.NoError(t, w.flush(true))
	require.NoError(t, w.flush(false), "no deadline is left behind")
	require.Zero(t, w.gathered())
	require.True(t, bytes.Equal(sent, <-got))
}
