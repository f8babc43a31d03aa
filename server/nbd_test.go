package server_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
)

// nbdClient is the least of an NBD client: one request at a time, written from the protocol's text
// and not from our server, so that both can be wrong only together.
type nbdClient struct {
	conn   net.Conn
	cookie uint64
}

const (
	nbdRead  = 0
	nbdWrite = 1
	nbdFlush = 3
)

// dialNBD connects by EXPORT_NAME (fixed newstyle).
func dialNBD(ctx context.Context, socket, export string) (*nbdClient, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", socket)
	if err != nil {
		return nil, err
	}
	hello := make([]byte, 18)
	if _, err := io.ReadFull(conn, hello); err != nil {
		conn.Close()
		return nil, err
	}
	if !bytes.HasPrefix(hello, []byte("NBDMAGICIHAVEOPT")) {
		conn.Close()
		return nil, fmt.Errorf("greeting %q", hello)
	}
	request := binary.BigEndian.AppendUint32(nil, 3) // fixed newstyle, no zeroes
	request = append(request, "IHAVEOPT"...)
	request = binary.BigEndian.AppendUint32(request, 1) // NBD_OPT_EXPORT_NAME
	request = binary.BigEndian.AppendUint32(request, uint32(len(export)))
	request = append(request, export...)
	if _, err := conn.Write(request); err != nil {
		conn.Close()
		return nil, err
	}
	if _, err := io.ReadFull(conn, make([]byte, 10)); err != nil { // size and flags
		conn.Close()
		return nil, err
	}
	return &nbdClient{conn: conn}, nil
}

func (c *nbdClient) do(command uint16, off int64, payload, into []byte) error {
	c.cookie++
	n := len(payload) + len(into)
	head := binary.BigEndian.AppendUint32(nil, 0x25609513)
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
	if binary.BigEndian.Uint32(reply) != 0x67446698 || binary.BigEndian.Uint64(reply[8:]) != c.cookie {
		return fmt.Errorf("reply %x to cookie %d", reply, c.cookie)
	}
	if code := binary.BigEndian.Uint32(reply[4:]); code != 0 {
		return fmt.Errorf("nbd error %d", code)
	}
	if len(into) > 0 {
		_, err := io.ReadFull(c.conn, into)
		return err
	}
	return nil
}

func (c *nbdClient) write(p []byte, off int64) error { return c.do(nbdWrite, off, p, nil) }

func (c *nbdClient) read(p []byte, off int64) error { return c.do(nbdRead, off, nil, p) }

func (c *nbdClient) flush() error { return c.do(nbdFlush, 0, nil, nil) }

func (c *nbdClient) close() error {
	if c == nil {
		return errors.New("no connection")
	}
	return c.conn.Close()
}
