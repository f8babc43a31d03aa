package server

import (
	"context"
	"crypto/tls"
	"errors"
	"time"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/replication/transport"
)

// openPeers makes the network of TLS connections between nodes.
func (s *Server) openPeers() error {
	peers, err := transport.NewPeers(transport.Config{
		Local: s.cfg.Node,
		ClientTLS: func(node trivet.NodeID) (*tls.Config, error) {
			return s.creds.ClientConfig(node, transport.ALPN), nil
		},
		PeerNode: s.creds.PeerNode,
		Book:     s.book,
		Logger:   s.log,
		// Who is silent for this long is taken for gone, when a follower's own promise has run out too.
		Limits: transport.Limits{SilentAfter: s.cfg.Timing.Heartbeat},
	})
	if err != nil {
		return err
	}
	s.peers, s.network = peers, peers
	return nil
}

// servePeer serves a connection from another node until it ends.
func (s *Server) servePeer(conn *tls.Conn) {
	if s.peers == nil { // tests give a network of their own; nobody should come this way
		conn.Close()
		return
	}
	if err := s.peers.ServeConn(conn); err != nil {
		s.log.Debug("a connection from another node ended", "remote", conn.RemoteAddr().String(), "err", err)
	}
}

// addressEvery is how often the seeds are asked while the catalogue has no leader, and addressRarely
// how often otherwise: a peer that moved announces itself to them.
const (
	addressEvery  = 500 * time.Millisecond
	addressRarely = 30 * time.Second
)

// learnAddresses copies the addresses of the catalogue into the address book until ctx ends.
func (s *Server) learnAddresses(ctx context.Context) {
	for {
		changed := s.catalogue.Changed()
		learned := map[trivet.NodeID]string{}
		for _, n := range s.catalogue.Local().Nodes() {
			if n.ID != s.cfg.Node {
				learned[n.ID] = n.Address
			}
		}
		if err := s.book.learn(learned); err != nil && !errors.Is(err, context.Canceled) {
			s.log.Warn("addresses not saved; after a restart of the whole cluster the seeds must be right", "err", err)
		}
		select {
		case <-ctx.Done():
			return
		case <-changed:
		}
	}
}
