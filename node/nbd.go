package node

import (
	"context"
	"crypto/tls"
	"fmt"
	"net"

	"golang.org/x/sync/errgroup"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/node/blockdev"
)

// NBDService says where a volume is served by NBD: at a unix socket or at an address of the network.
type NBDService struct {
	Socket string // path of a unix socket, which is made; empty: Listen
	Listen string // host:port; port 0 takes a free one

	// TLS is what clients have to start first, and it decides who may. REQUIRED with Listen.
	TLS *tls.Config

	// Ready, unless nil, is called once clients can connect, with the export's name and where the server
	// listens; its error ends the service.
	Ready func(export string, at net.Addr) error
}

// ServeNBD serves the volume by NBD until ctx ends; then it returns nil. The export is called like the
// volume. The volume may be staged or attached at the same time: both show the same device. Errors are
// those of Stage; ErrInvalid for a service on the network without TLS.
func (n *Node) ServeNBD(ctx context.Context, id trivet.VolumeID, s NBDService) error {
	device, name, readOnly, err := n.mounts.openNBD(ctx, id)
	if err != nil {
		return err
	}
	defer n.mounts.closeNBD(id)
	ln, err := s.listen(ctx)
	if err != nil {
		return fmt.Errorf("serve %s: %w", id, err)
	}
	group, serving := errgroup.WithContext(ctx)
	group.Go(func() error {
		err := blockdev.ServeNBD(serving, ln, blockdev.NBDConfig{
			Export: name, Device: device, ReadOnly: readOnly, TLS: s.TLS, Logger: n.cfg.Logger,
		})
		if err == nil && ctx.Err() == nil && serving.Err() == nil {
			err = trivet.ErrClosed
		}
		return err
	})
	if s.Ready != nil {
		group.Go(func() error { return s.Ready(name, ln.Addr()) })
	}
	if err := group.Wait(); err != nil && ctx.Err() == nil {
		return fmt.Errorf("serve %s: %w", id, err)
	}
	return nil
}

// listen makes the listener.
func (s *NBDService) listen(ctx context.Context) (net.Listener, error) {
	if s.Socket != "" {
		return blockdev.ListenNBD(ctx, s.Socket)
	}
	if s.TLS == nil {
		return nil, fmt.Errorf("at %s: nothing is served on a network without TLS: %w", s.Listen, trivet.ErrInvalid)
	}
	var lc net.ListenConfig
	ln, err := lc.Listen(ctx, "tcp", s.Listen)
	if err != nil {
		return nil, fmt.Errorf("listen at %s: %w: %w", s.Listen, err, trivet.ErrInvalid)
	}
	return ln, nil
}
