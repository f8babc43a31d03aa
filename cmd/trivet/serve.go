package main

import (
	"errors"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/trivet-csi/trivet/api"
)

func newVolumeServe(o *options) *cobra.Command {
	var r api.ServeVolumeRequest
	cmd := &cobra.Command{
		Use:   "serve NAME --socket PATH | --listen HOST:PORT",
		Short: "Attach a volume and serve it by NBD on the server's machine until interrupted",
		Long: "Attach a volume to the server and serve it to NBD clients, on a unix socket or on the network, until\n" +
			"interrupted. On the network there is TLS 1.3 only, and clients prove who they are: by a certificate of\n" +
			"the cluster's CA, or, with --tls-cert, --tls-key and --tls-ca, by one of that CA. Paths are on the\n" +
			"server's machine.",
		Example: "  trivet volume serve db --socket /run/db.sock &\n" +
			"  fio --ioengine=nbd --uri='nbd+unix:///db?socket=/run/db.sock' --name=t --rw=randwrite --bs=4k --size=64m\n" +
			"  trivet volume serve db --listen 0.0.0.0:10809 --tls-cert /etc/nbd/server.crt --tls-key /etc/nbd/server.key \\\n" +
			"    --tls-ca /etc/nbd/ca.crt &\n" +
			"  nbdinfo 'nbds://n1.example/db?tls-certificates=/etc/pki/nbd'",
		Args: exactArgs("NAME"),
		RunE: func(cmd *cobra.Command, args []string) error {
			r.Name = args[0]
			return o.serveVolume(cmd, &r)
		},
	}
	cmd.Flags().StringVar(&r.Socket, "socket", "", "path of a unix socket to make")
	cmd.Flags().StringVar(&r.Listen, "listen", "", "address to listen at, with TLS; port 0 takes a free one")
	cmd.Flags().StringVar(&r.TlsCert, "tls-cert", "", "file with the certificate (default: the node's own)")
	cmd.Flags().StringVar(&r.TlsKey, "tls-key", "", "file with its key")
	cmd.Flags().StringVar(&r.TlsCa, "tls-ca", "", "file with the CA that signs clients' certificates")
	cmd.Flags().BoolVar(&r.ReadOnly, "read-only", false, "attach as one of any number of readers; clients cannot write")
	sharedFlags(cmd, &r.Shared, &r.With)
	cmd.MarkFlagsMutuallyExclusive("read-only", "shared")
	cmd.MarkFlagsOneRequired("socket", "listen")
	cmd.MarkFlagsMutuallyExclusive("socket", "listen")
	cmd.MarkFlagsRequiredTogether("tls-cert", "tls-key", "tls-ca")
	for _, flag := range []string{"tls-cert", "tls-key", "tls-ca"} {
		cmd.MarkFlagsMutuallyExclusive("socket", flag)
	}
	return cmd
}

// sharedFlags are those of an attachment that another node may write beside.
func sharedFlags(cmd *cobra.Command, shared *bool, with *string) {
	cmd.Flags().BoolVar(shared, "shared", false, "attach as one of two nodes that both write")
	cmd.Flags().StringVar(with, "with", "",
		"with --shared: the only node that may be the other (default: whichever comes)")
}

// serveVolume prints the URI of the export and waits until the service ends.
func (o *options) serveVolume(cmd *cobra.Command, r *api.ServeVolumeRequest) error {
	c, err := o.dial(o.server)
	if err != nil {
		return err
	}
	defer c.conn.Close()
	stream, err := c.ServeVolume(cmd.Context(), r)
	if err != nil {
		return err
	}
	for {
		resp, err := stream.Recv()
		if errors.Is(err, io.EOF) || cmd.Context().Err() != nil {
			return nil // interrupted, as intended: the server detaches
		}
		if err != nil {
			return fmt.Errorf("serve %s: %w", r.GetName(), err)
		}
		err = o.show(cmd.OutOrStdout(), map[string]string{"uri": resp.GetUri()},
			table{rows: [][]string{{"serving " + resp.GetUri()}}})
		if err != nil {
			return err
		}
	}
}
