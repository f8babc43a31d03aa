package main

import (
	"context"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"

	"github.com/trivet-csi/trivet/api"
	"github.com/trivet-csi/trivet/internal/pki"
)

// retryEvery is the pause before a call is repeated that met another operation on the same volume.
const retryEvery = 200 * time.Millisecond

// client is a connection to one server.
type client struct {
	api.AdminClient
	conn *grpc.ClientConn
}

// dial connects to address with the client certificate in --certs. Nothing is sent yet.
func (o *options) dial(address string) (*client, error) {
	creds, err := pki.Open(o.certs, pki.RoleClient, nil)
	if err != nil {
		return nil, fmt.Errorf("%w\n  --certs (or TRIVET_CERTS) names the folder with ca.crt, client.crt and client.key", err)
	}
	conn, err := grpc.NewClient("passthrough:///"+address,
		grpc.WithTransportCredentials(credentials.NewTLS(creds.ClientConfig("", "h2"))))
	if err != nil {
		return nil, fmt.Errorf("connect to %s: %w", address, err)
	}
	return &client{AdminClient: api.NewAdminClient(conn), conn: conn}, nil
}

// call runs fn against --server within --timeout.
func (o *options) call(cmd *cobra.Command, fn func(ctx context.Context, c *client) error) error {
	return o.callAt(cmd, o.server, fn)
}

// callAt runs fn against the server at address within --timeout.
func (o *options) callAt(cmd *cobra.Command, address string, fn func(ctx context.Context, c *client) error) error {
	c, err := o.dial(address)
	if err != nil {
		return err
	}
	defer c.conn.Close()
	ctx, cancel := context.WithTimeout(cmd.Context(), o.timeout)
	defer cancel()
	for {
		err := fn(ctx, c)
		if status.Code(err) != codes.Aborted {
			return err
		}
		// Another operation works on the same volume; every call may be repeated.
		select {
		case <-ctx.Done():
			return err
		case <-time.After(retryEvery):
		}
	}
}

// addressOf returns where a node's server listens; an empty node is the server in --server.
func (o *options) addressOf(cmd *cobra.Command, node string) (string, error) {
	if node == "" {
		return o.server, nil
	}
	address := ""
	err := o.call(cmd, func(ctx context.Context, c *client) error {
		resp, err := c.ListNodes(ctx, &api.ListNodesRequest{})
		if err != nil {
			return err
		}
		var names []string
		for _, n := range resp.GetNodes() {
			names = append(names, n.GetId())
			if n.GetId() == node {
				address = n.GetAddress()
			}
		}
		if address == "" {
			return fmt.Errorf("node %q: not found; the cluster has %s", node, strings.Join(names, ", "))
		}
		return nil
	})
	return address, err
}

func itoa(n int64) string { return strconv.FormatInt(n, 10) }

func utoa(n uint64) string { return strconv.FormatUint(n, 10) }
