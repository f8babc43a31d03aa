package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/api"
	"github.com/trivet-csi/trivet/internal/pki"
	"github.com/trivet-csi/trivet/server"
)

// devNodeN is the size of a throw-away cluster: the smallest that survives a death.
const devNodeN = 3

// The logs of a throw-away cluster are small, so that it starts at once and leaves the machine its room.
const (
	devLogLanes        = 2
	devLogSegmentBytes = 16 << 20
)

func newDev(o *options) *cobra.Command {
	var logLevel string
	cmd := &cobra.Command{
		Use:   "dev",
		Short: "Run a throw-away cluster of three nodes in this process; Ctrl-C removes it",
		Args:  exactArgs(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return runDev(cmd, o, logLevel)
		},
	}
	cmd.Flags().StringVar(&logLevel, "log-level", "warn", "debug, info, warn or error")
	return cmd
}

func runDev(cmd *cobra.Command, o *options, logLevel string) (err error) {
	log, err := newLogger(logLevel, false)
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "trivet-dev-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	ctx, cancel := context.WithCancel(cmd.Context())
	defer cancel()

	authority, err := pki.NewCA(trivet.ClusterID(trivet.NewUUID()), pki.For(pki.CAValidity))
	if err != nil {
		return err
	}
	o.certs = filepath.Join(dir, "client")
	if err := issue(authority, o.certs, pki.RoleClient, "dev", pki.LeafValidity); err != nil {
		return err
	}
	var servers []*server.Server
	defer func() {
		for _, s := range servers {
			err = errors.Join(err, s.Close())
		}
	}()
	for i := range devNodeN {
		s, err := startDevNode(ctx, dir, authority, fmt.Sprintf("dev-%c", 'a'+i), servers, func(cfg *server.Config) {
			cfg.Logger = log
			cfg.Fatal = func(err error) {
				log.Error("stopping: going on would risk data", "err", err)
				os.Exit(1)
			}
		})
		if err != nil {
			return err
		}
		servers = append(servers, s)
	}
	o.server = servers[0].Address()
	if err := bearDevCluster(cmd, o); err != nil {
		return err
	}
	fmt.Fprintf(cmd.OutOrStdout(), "three nodes are up; in another shell:\n\n"+
		"export TRIVET_SERVER=%s\nexport TRIVET_CERTS=%s\n\n"+
		"  trivet cluster status\n  trivet volume create db --size 1Gi\n  trivet volume attach db\n\n"+
		"Ctrl-C stops the cluster and removes it.\n", o.server, o.certs)
	<-ctx.Done()
	return nil
}

func startDevNode(ctx context.Context, dir string, authority *pki.CA, name string, peers []*server.Server,
	adjust func(*server.Config),
) (*server.Server, error) {
	home := filepath.Join(dir, name)
	cfg := server.DefaultConfig()
	cfg.Node, cfg.DataDir, cfg.CertsDir = trivet.NodeID(name), filepath.Join(home, "data"), filepath.Join(home, "certs")
	cfg.Listen, cfg.Advertise = "127.0.0.1:0", ""
	cfg.CSI = "unix://" + filepath.Join(home, "csi.sock")
	cfg.LogLanes, cfg.LogSegmentBytes = devLogLanes, devLogSegmentBytes
	for _, p := range peers {
		cfg.Seeds = append(cfg.Seeds, p.Address())
	}
	adjust(&cfg)
	if err := issue(authority, cfg.CertsDir, pki.RoleNode, name, pki.LeafValidity); err != nil {
		return nil, err
	}
	return server.Open(ctx, cfg)
}

// bearDevCluster runs cluster init and waits until every node has joined.
func bearDevCluster(cmd *cobra.Command, o *options) error {
	return o.call(cmd, func(ctx context.Context, c *client) error {
		if _, err := c.InitCluster(ctx, &api.InitClusterRequest{}); err != nil {
			return err
		}
		for {
			resp, err := c.ListNodes(ctx, &api.ListNodesRequest{})
			if err != nil {
				return err
			}
			up := 0
			for _, n := range resp.GetNodes() {
				if n.GetState() == "Up" && n.GetRole() != "Learner" {
					up++
				}
			}
			if up == devNodeN {
				return nil
			}
			select {
			case <-ctx.Done():
				return fmt.Errorf("only %d of %d nodes joined: %w", up, devNodeN, ctx.Err())
			case <-time.After(100 * time.Millisecond):
			}
		}
	})
}
