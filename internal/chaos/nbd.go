package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"time"
)

// nbdConn is the least of an NBD client: one request at a time, written from the protocol's text and not from
// the server of Trivet, so that both can be wrong only together. It is not safe for concurrent use.
type nbdConn struct {
	conn   net.Conn
	cookie uint64
}

const (
	nbdRead  = 0
	nbdWrite = 1
	nbdFlush = 3
	nbdTrim  = 4

	nbdRequestMagic = 0x25609513
	nbdReplyMagic   = 0x67446698
)

// nbdError is an error number in a reply; the connection lives on.
type nbdError uint32

func (e nbdError) Error() string { return fmt.Sprintf("nbd error %d", uint32(e)) }

// dialNBD connects to the default export by EXPORT_NAME (fixed newstyle).
func dialNBD(ctx context.Context, socket string) (_ *nbdConn, err error) {
	const handshakeWait = 5 * time.Second
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", socket)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			conn.Close()
		}
	}()
	if err := conn.SetDeadline(time.Now().Add(handshakeWait)); err != nil {
		return nil, err
	}
	hello := make([]byte, 18)
	if _, err := io.ReadFull(conn, hello); err != nil {
		return nil, fmt.Errorf("nbd greeting: %w", err)
	}
	if !bytes.HasPrefix(hello, []byte("NBDMAGICIHAVEOPT")) {
		return nil, fmt.Errorf("nbd greeting %q", hello)
	}
	request := binary.BigEndian.AppendUint32(nil, 3) // fixed newstyle, no zeroes
	request = append(request, "IHAVEOPT"...)
	request = binary.BigEndian.AppendUint32(request, 1) // NBD_OPT_EXPORT_NAME
	request = binary.BigEndian.AppendUint32(request, 0) // the default export
	if _, err := conn.Write(request); err != nil {
		return nil, fmt.Errorf("nbd option: %w", err)
	}
	if _, err := io.ReadFull(conn, make([]byte, 10)); err != nil { // size and flags
		return nil, fmt.Errorf("nbd export: %w", err)
	}
	return &nbdConn{conn: conn}, nil
}

// do sends one request and waits for its answer, for wait at most. For a write payload is sent; for a read into is
// filled; n is the length in bytes. After an error that is not an nbdError the connection is of no use.
func (c *nbdConn) do(wait time.Duration, command uint16, off int64, n int, payload, into []byte) error {
	if err := c.conn.SetDeadline(time.Now().Add(wait)); err != nil {
		return err
	}
	c.cookie++
	head := binary.BigEndian.AppendUint32(nil, nbdRequestMagic)
	head = binary.BigEndian.AppendUint16(head, 0)
	head = binary.BigEndian.AppendUint16(head, command)
	head = binary.BigEndian.AppendUint64(head, c.cookie)
	head = binary.BigEndian.AppendUint64(head, uint64(off))
	head = binary.BigEndian.AppendUint32(head, uint32(n))
	if _, err := c.conn.Write(append(head, payload...)); err != nil {
		return err
	}
	reply := make([]byte, 16)
	if _, err := io.ReadFull(c.conn, reply); err != nil {
		return err
	}
	if binary.BigEndian.Uint32(reply) != nbdReplyMagic || binary.BigEndian.Uint64(reply[8:]) != c.cookie {
		return fmt.Errorf("nbd reply %x to cookie %d", reply, c.cookie)
	}
	if code := binary.BigEndian.Uint32(reply[4:]); code != 0 {
		return nbdError(code)
	}
	_, err := io.ReadFull(c.conn, into)
	return err
}

func (c *nbdConn) close() { c.conn.Close() }
