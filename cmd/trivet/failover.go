package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"

	"github.com/trivet-csi/trivet/api"
	"github.com/trivet-csi/trivet/internal/failover"
	"github.com/trivet-csi/trivet/internal/kube"
)

// failoverLease is the Lease by which one of the controllers leads.
const failoverLease = "trivet-failover"

// failoverFlags are the flags of the part of csi-controller that moves pods from dead nodes.
type failoverFlags struct {
	on        bool
	after     time.Duration
	namespace string
}

func (f *failoverFlags) flags(cmd *cobra.Command) {
	cmd.Flags().BoolVar(&f.on, "failover", false,
		"on Kubernetes: fence the volumes of nodes that died and remove their pods, so that they start elsewhere")
	cmd.Flags().DurationVar(&f.after, "failover-after", failover.DefaultAfter,
		"how long Kubernetes must not have heard of a node whose server has lost its lease")
	cmd.Flags().StringVar(&f.namespace, "namespace", kube.Namespace(),
		"namespace of the Lease by which one of several controllers leads (default: the pod's)")
}

// start runs the failover controller until ctx ends; wait returns when it has. Without the flag it does nothing.
func (f *failoverFlags) start(ctx context.Context, servers grpc.ClientConnInterface, log *slog.Logger,
) (wait func(), err error) {
	if !f.on {
		return func() {}, nil
	}
	if f.after <= 0 {
		return nil, usageError{fmt.Errorf("--failover-after %s: want more than zero", f.after)}
	}
	kubeAPI, err := inCluster(f.namespace)
	if err != nil {
		return nil, err
	}
	identity, err := os.Hostname() // the name of the pod
	if err != nil {
		return nil, err
	}
	log = log.With("component", "failover")
	elector := kube.NewElector(kubeAPI, failoverLease, identity, log)
	c, err := failover.New(failover.Config{
		API: kubeAPI, Catalogue: &failover.Servers{Admin: api.NewAdminClient(servers)}, Leads: elector.Leads,
		After: f.after, Logger: log,
	})
	if err != nil {
		return nil, errors.Join(errors.New("start the failover controller"), err)
	}
	var wg sync.WaitGroup
	wg.Go(func() { elector.Run(ctx) })
	wg.Go(func() { c.Run(ctx) })
	return wg.Wait, nil
}
