package server

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"slices"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/api"
)

// joinTimeout bounds one call to a seed; a seed that adds a member waits for a commit.
const joinTimeout = 10 * time.Second

// resolveTimeout bounds the look-up of one seed's name.
const resolveTimeout = 2 * time.Second

// initCluster gives birth to a cluster on this server.
func (s *Server) initCluster(ctx context.Context) error {
	s.joinMu.Lock()
	defer s.joinMu.Unlock()
	if s.catalogue.Joined() && !s.started() {
		if err := s.catalogue.Open(ctx); err != nil { // nil when it is open
			return err
		}
		return s.becomeMember(ctx) // an earlier try got as far as the birth
	}
	if s.catalogue.Joined() {
		return fmt.Errorf("node %s is a member of cluster %s already: %w", s.cfg.Node, s.cluster, trivet.ErrExists)
	}
	if seed := s.clusterAtSeeds(ctx); seed != "" {
		return fmt.Errorf("the server at %s is a member of cluster %s already, and node %s is about to join it: %w", seed,
			s.cluster, s.cfg.Node, trivet.ErrExists)
	}
	if err := s.catalogue.Bootstrap(ctx); err != nil {
		return err
	}
	return s.becomeMember(ctx)
}

// clusterAtSeeds returns the first seed that is a member of the cluster: a second birth would split it.
func (s *Server) clusterAtSeeds(ctx context.Context) string {
	for _, seed := range s.seeds(ctx) {
		if resp, err := s.askSeed(ctx, seed, ""); err == nil && resp.GetJoined() {
			return seed
		}
	}
	return ""
}

// stayJoined joins the cluster that a seed is a member of, and exchanges addresses with the seeds for
// as long as the server runs.
func (s *Server) stayJoined(ctx context.Context) {
	for {
		pause := addressEvery
		if s.catalogue.Joined() && s.catalogue.Leader() != "" {
			pause = addressRarely
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(pause):
		}
		for _, seed := range s.seeds(ctx) {
			if err := s.meet(ctx, seed); err != nil && ctx.Err() == nil {
				s.log.Debug("seed did not help", "seed", seed, "err", err)
			}
		}
	}
}

// seeds returns the addresses of the configured seeds and every address known from earlier. A seed may
// be a name with many addresses, as that of a headless Service, this server's own among them.
func (s *Server) seeds(ctx context.Context) []string {
	all := slices.Collect(maps.Values(s.book.all()))
	for _, seed := range s.cfg.Seeds {
		all = append(all, resolve(ctx, seed)...)
	}
	slices.Sort(all)
	return slices.DeleteFunc(slices.Compact(all), func(addr string) bool { return addr == s.cfg.Advertise })
}

// resolve returns every address of a seed, or the seed as it is when its name is not known now.
func resolve(ctx context.Context, seed string) []string {
	host, port, err := net.SplitHostPort(seed)
	if err != nil {
		return []string{seed}
	}
	ctx, cancel := context.WithTimeout(ctx, resolveTimeout)
	defer cancel()
	ips, err := net.DefaultResolver.LookupHost(ctx, host)
	if err != nil {
		return []string{seed}
	}
	for i, ip := range ips {
		ips[i] = net.JoinHostPort(ip, port)
	}
	return ips
}

// meet exchanges addresses with one seed and, if it is a member of the cluster and this server is
// not, joins there.
func (s *Server) meet(ctx context.Context, seed string) error {
	resp, err := s.askSeed(ctx, seed, "")
	if err != nil {
		return err
	}
	if err := s.learnFrom(resp); err != nil {
		return err
	}
	if !resp.GetJoined() {
		return nil
	}
	s.joinMu.Lock()
	defer s.joinMu.Unlock()
	return s.joinAt(ctx, seed)
}

// joinAt makes this server a member through the seed, unless it is one. Every step may be repeated: a
// server that died between making its empty replica and being added goes on from there.
func (s *Server) joinAt(ctx context.Context, seed string) error {
	if _, listed := s.catalogue.Roles()[s.cfg.Node]; !listed {
		replica, err := s.openEmpty(ctx)
		if errors.Is(err, trivet.ErrCorrupt) { // what is there can never run again, and the cluster has other members
			if err = s.catalogue.SetAside(); err == nil {
				replica, err = s.openEmpty(ctx)
			}
		}
		if err != nil {
			return err
		}
		resp, err := s.askSeed(ctx, seed, replica)
		if err != nil {
			return err
		}
		if err := s.learnFrom(resp); err != nil {
			return err
		}
		s.log.Info("joined the cluster", "cluster", string(s.cluster), "seed", seed)
	}
	if s.started() {
		return nil
	}
	return s.becomeMember(ctx)
}

// openEmpty opens the member that is to be added, and makes it first if need be.
func (s *Server) openEmpty(ctx context.Context) (trivet.ReplicaID, error) {
	replica, err := s.catalogue.Prepare(ctx)
	if err != nil {
		return "", err
	}
	return replica, s.catalogue.Open(ctx)
}

// started reports whether the server runs as a member.
func (s *Server) started() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.member != nil
}

func (s *Server) learnFrom(resp *api.JoinResponse) error {
	learned := map[trivet.NodeID]string{}
	for node, addr := range resp.GetAddresses() {
		if node != string(s.cfg.Node) {
			learned[trivet.NodeID(node)] = addr
		}
	}
	return s.book.learn(learned)
}

// askSeed tells the server at an address where this one listens and, with a replica, asks it to make
// that replica a member of the meta group.
func (s *Server) askSeed(ctx context.Context, seed string, replica trivet.ReplicaID) (*api.JoinResponse, error) {
	conn, err := grpc.NewClient("passthrough:///"+seed,
		grpc.WithTransportCredentials(credentials.NewTLS(s.creds.ClientConfig("", alpnGRPC))))
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(ctx, joinTimeout)
	defer cancel()
	return api.NewAdminClient(conn).Join(ctx, &api.JoinRequest{
		Node: string(s.cfg.Node), Address: s.cfg.Advertise, MetaReplica: string(replica),
	})
}

// admit answers a Join: it learns the caller's address and adds its replica to the meta group.
func (s *Server) admit(ctx context.Context, r *api.JoinRequest) (*api.JoinResponse, error) {
	node := trivet.NodeID(r.GetNode())
	if _, _, err := net.SplitHostPort(r.GetAddress()); err != nil {
		return nil, fmt.Errorf("admit %s: address %q: want host:port: %w", node, r.GetAddress(), trivet.ErrInvalid)
	}
	if err := s.book.learn(map[trivet.NodeID]string{node: r.GetAddress()}); err != nil {
		return nil, err
	}
	if r.GetMetaReplica() != "" {
		if !s.started() {
			return nil, fmt.Errorf("node %s is not a member of a cluster: %w", s.cfg.Node, trivet.ErrUnavailable)
		}
		if err := s.catalogue.AddMember(ctx, node, trivet.ReplicaID(r.GetMetaReplica())); err != nil {
			return nil, errors.Join(fmt.Errorf("admit %s", node), err)
		}
	}
	known := map[string]string{string(s.cfg.Node): s.cfg.Advertise}
	for n, addr := range s.book.all() {
		known[string(n)] = addr
	}
	return &api.JoinResponse{Joined: s.started(), Addresses: known}, nil
}
