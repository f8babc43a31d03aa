package kube

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/api"
	"github.com/trivet-csi/trivet/internal/pki"
)

const (
	// initClientName and initClientValidity are of the certificate that lives as long as the Job.
	initClientName     = "kube-init"
	initClientValidity = 24 * time.Hour

	// A server that is no member of a cluster does not answer ClusterStatus, it waits to become one.
	askTimeout     = 2 * time.Second
	initTimeout    = 30 * time.Second
	resolveTimeout = 5 * time.Second

	// asksMax bounds how many servers are asked at once.
	asksMax = 64

	alpnGRPC = "h2"
)

// Admins are servers reached by their administration API, with a client certificate that the CA makes
// for it and that exists in memory only.
type Admins struct {
	authority *Authority
	client    *pki.Pair
	names     []string // host:port; a host may have many addresses
}

// NewAdmins returns the servers at names, each host:port, where a host may have many addresses as that
// of a headless Service. It returns ErrInvalid when there is none or one is malformed.
func NewAdmins(a *Authority, names ...string) (*Admins, error) {
	if len(names) == 0 {
		return nil, fmt.Errorf("find servers: no address: %w", trivet.ErrInvalid)
	}
	for _, name := range names {
		if host, _, err := net.SplitHostPort(name); err != nil || host == "" {
			return nil, fmt.Errorf("find servers: address %q: want host:port: %w", name, trivet.ErrInvalid)
		}
	}
	id := pki.Identity{Cluster: a.CA.Cluster(), Role: pki.RoleClient, Name: initClientName}
	client, err := a.CA.Issue(id, a.CA.Within(pki.For(initClientValidity)))
	if err != nil {
		return nil, fmt.Errorf("find servers: %w", err)
	}
	return &Admins{authority: a, client: client, names: slices.Clone(names)}, nil
}

// Ask implements Servers. The error is that of the names, when none of them has an address.
func (s *Admins) Ask(ctx context.Context) ([]Answer, error) {
	addresses, err := s.resolve(ctx)
	if len(addresses) == 0 {
		return nil, err
	}
	answers := make([]Answer, len(addresses))
	slots := make(chan struct{}, asksMax)
	var wg sync.WaitGroup
	for i, address := range addresses {
		slots <- struct{}{}
		wg.Go(func() {
			answers[i] = s.ask(ctx, address)
			<-slots
		})
	}
	wg.Wait()
	return answers, nil
}

// resolve returns the addresses of all names. The error is of the names that have none.
func (s *Admins) resolve(ctx context.Context) ([]string, error) {
	ctx, cancel := context.WithTimeout(ctx, resolveTimeout)
	defer cancel()
	var (
		all  []string
		errs error
	)
	for _, name := range s.names {
		host, port, err := net.SplitHostPort(name)
		if err != nil {
			return nil, err
		}
		ips, err := net.DefaultResolver.LookupHost(ctx, host)
		errs = errors.Join(errs, err)
		for _, ip := range ips {
			all = append(all, net.JoinHostPort(ip, port))
		}
	}
	slices.Sort(all)
	return slices.Compact(all), errs
}

// ask asks the server at an address who it is and whether it is a member of a cluster.
func (s *Admins) ask(ctx context.Context, address string) Answer {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	a := Answer{Address: address}
	err := s.call(address, "", func(admin api.AdminClient) error {
		var far peer.Peer
		_, err := admin.ClusterStatus(ctx, &api.ClusterStatusRequest{}, grpc.Peer(&far))
		a.Node, a.Member = nodeOf(&far), err == nil
		return err
	})
	if err != nil {
		a.Err = errors.New(status.Convert(err).Message()) // it goes into a line with those of all the others
	}
	return a
}

// nodeOf returns the node at the far end, whose certificate the handshake has checked; empty when there
// was none.
func nodeOf(p *peer.Peer) trivet.NodeID {
	info, ok := p.AuthInfo.(credentials.TLSInfo)
	if !ok {
		return ""
	}
	id, err := pki.IdentityOf(info.State)
	if err != nil {
		return ""
	}
	return trivet.NodeID(id.Name)
}

// Init implements Servers.
func (s *Admins) Init(ctx context.Context, address string, node trivet.NodeID) error {
	ctx, cancel := context.WithTimeout(ctx, initTimeout)
	defer cancel()
	err := s.call(address, node, func(admin api.AdminClient) error {
		_, err := admin.InitCluster(ctx, &api.InitClusterRequest{})
		return err
	})
	switch {
	case err == nil:
		return nil
	case status.Code(err) == codes.AlreadyExists:
		return fmt.Errorf("init cluster at %s: %w: %w", address, err, trivet.ErrExists)
	}
	return fmt.Errorf("init cluster at %s: %w: %w", address, err, trivet.ErrUnavailable)
}

// call connects to an address, where node must be, or any when it is empty.
func (s *Admins) call(address string, node trivet.NodeID, fn func(api.AdminClient) error) error {
	cfg, err := s.client.ClientConfig(s.authority.BundlePEM, node, alpnGRPC)
	if err != nil {
		return err
	}
	conn, err := grpc.NewClient("passthrough:///"+address, grpc.WithTransportCredentials(credentials.NewTLS(cfg)))
	if err != nil {
		return fmt.Errorf("connect to %s: %w", address, err)
	}
	defer conn.Close()
	return fn(api.NewAdminClient(conn))
}
