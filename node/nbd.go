package node

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/node/blockdev"
)

// ServeNBD serves the volume at a unix socket, which it makes, until ctx ends; then it returns nil.
// The export is called like the volume. ready, unless nil, is called once clients can connect; its
// error ends the service. The volume may be staged or attached at the same time: both show the same
// device. Errors are those of Stage.
func (n *Node) ServeNBD(ctx context.Context, id trivet.VolumeID, socket string, ready func() error) error {
	device, name, err := n.mounts.openNBD(ctx, id)
	if err != nil {
		return err
	}
	defer n.mounts.closeNBD(id)
	group, serving := errgroup.WithContext(ctx)
	group.Go(func() error {
		err := blockdev.ServeNBD(serving, socket, name, device, n.cfg.Logger)
		if err == nil && ctx.Err() == nil && serving.Err() == nil {
			err = trivet.ErrClosed
		}
		return err
	})
	if ready != nil {
		group.Go(func() error {
			if err := awaitSocket(serving, socket); err != nil {
				return nil //nolint:nilerr // the server ended before anybody could connect, and says why
			}
			return ready()
		})
	}
	if err := group.Wait(); err != nil && ctx.Err() == nil {
		return fmt.Errorf("serve %s at %s: %w", id, socket, err)
	}
	return nil
}

// awaitSocket waits until an NBD server answers at a unix socket. It takes its leave as the protocol
// has it (NBD_OPT_ABORT), or the server would log a client that broke off.
func awaitSocket(ctx context.Context, socket string) error {
	const (
		askEvery      = 10 * time.Millisecond
		greetingBytes = 18 // NBDMAGIC, IHAVEOPT, flags
		clientFlags   = 1  // fixed newstyle
		ihaveopt      = 0x49484156454F5054
		optAbort      = 2
	)
	var d net.Dialer
	for {
		conn, err := d.DialContext(ctx, "unix", socket)
		if err == nil {
			defer conn.Close() //nolint:errcheck // said goodbye
			if _, err := io.CopyN(io.Discard, conn, greetingBytes); err != nil {
				return err
			}
			bye := binary.BigEndian.AppendUint32(nil, clientFlags)
			bye = binary.BigEndian.AppendUint64(bye, ihaveopt)
			bye = binary.BigEndian.AppendUint64(bye, optAbort<<32) // and no data
			if _, err := conn.Write(bye); err != nil {
				return err
			}
			_, err = io.Copy(io.Discard, conn) // its answer
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(askEvery):
		}
	}
}
