package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"

	"github.com/trivet-csi/trivet/driver"
	"github.com/trivet-csi/trivet/internal/pki"
)

// How soon a server that went silent is noticed, so that the next call goes to another.
const (
	pingEvery   = 10 * time.Second
	pingTimeout = 5 * time.Second
)

func newController(o *options) *cobra.Command {
	var (
		endpoint, logLevel string
		logJSON            bool
		moving             kubeFlags
	)
	cmd := &cobra.Command{
		Use:   "csi-controller --csi unix:///csi/csi.sock",
		Short: "Serve the CSI controller service to sidecars, through any server of the cluster; keeps no state",
		Args:  exactArgs(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			log, err := newLogger(logLevel, logJSON)
			if err != nil {
				return err
			}
			if err := moving.validate(); err != nil {
				return err
			}
			return o.runController(cmd.Context(), endpoint, &moving, log)
		},
	}
	f := cmd.Flags()
	f.StringVar(&endpoint, "csi", "unix:///csi/csi.sock", "serve CSI on this endpoint")
	f.StringVar(&logLevel, "log-level", "info", "debug, info, warn or error")
	f.BoolVar(&logJSON, "log-json", false, "log as JSON")
	moving.flags(cmd)
	return cmd
}

// runController serves until ctx ends, then stops in good order.
func (o *options) runController(ctx context.Context, endpoint string, moving *kubeFlags, log *slog.Logger) error {
	creds, err := pki.Open(o.certs, pki.RoleClient, log)
	if err != nil {
		return fmt.Errorf("%w\n  --certs (or TRIVET_CERTS) names the folder with ca.crt, client.crt and client.key", err)
	}
	conn, err := grpc.NewClient("dns:///"+o.server,
		grpc.WithTransportCredentials(credentials.NewTLS(creds.ClientConfig("", "h2"))),
		grpc.WithDefaultServiceConfig(driver.UpstreamConfig),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{
			Time: pingEvery, Timeout: pingTimeout, PermitWithoutStream: true,
		}))
	if err != nil {
		return fmt.Errorf("servers at %q: %w", o.server, err)
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	wait, err := moving.start(ctx, conn, log)
	if err != nil {
		return errors.Join(err, conn.Close())
	}
	defer wait()
	defer cancel() // before the wait
	p, err := driver.OpenProxy(ctx, driver.ProxyConfig{Endpoint: endpoint, Upstream: conn, Version: version, Logger: log})
	if err != nil {
		return errors.Join(err, conn.Close())
	}
	log.Info("serving", "endpoint", endpoint, "servers", o.server)
	select {
	case <-ctx.Done():
	case <-p.Done():
	}
	return errors.Join(p.Close(), conn.Close())
}
