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
	"github.com/trivet-csi/trivet/internal/nodelabels"
)

// failoverLease is the Lease by which one of the controllers leads, in all that csi-controller does by itself.
const failoverLease = "trivet-failover"

// kubeFlags are the flags of what csi-controller does on Kubernetes by itself: it moves pods from dead nodes, and
// carries labels of nodes over to the catalogue.
type kubeFlags struct {
	failover  bool
	after     time.Duration
	topology  bool
	labels    kube.PlaceLabels
	namespace string
}

func (f *kubeFlags) flags(cmd *cobra.Command) {
	cmd.Flags().BoolVar(&f.failover, "failover", false,
		"on Kubernetes: fence the volumes of nodes that died and remove their pods, so that they start elsewhere")
	cmd.Flags().DurationVar(&f.after, "failover-after", failover.DefaultAfter,
		"how long Kubernetes must not have heard of a node whose server has lost its lease")
	cmd.Flags().BoolVar(&f.topology, "node-labels", false,
		"on Kubernetes: have nodes stand in the zone and rack that their labels say, as soon as they say it")
	cmd.Flags().StringVar(&f.labels.Zone, "zone-label", "",
		"label of nodes with their zone, for --node-labels; empty: none")
	cmd.Flags().StringVar(&f.labels.Rack, "rack-label", "",
		"label of nodes with their rack, for --node-labels; empty: none")
	cmd.Flags().StringVar(&f.namespace, "namespace", kube.Namespace(),
		"namespace of the Lease by which one of several controllers leads (default: the pod's)")
}

// start runs what the flags ask for until ctx ends; wait returns when it has. Without any it does nothing.
func (f *kubeFlags) start(ctx context.Context, servers grpc.ClientConnInterface, log *slog.Logger,
) (wait func(), err error) {
	if !f.failover && !f.topology {
		return func() {}, nil
	}
	kubeAPI, err := inCluster(f.namespace)
	if err != nil {
		return nil, err
	}
	identity, err := os.Hostname() // the name of the pod
	if err != nil {
		return nil, err
	}
	elector := kube.NewElector(kubeAPI, failoverLease, identity, log.With("component", "failover"))
	admin := api.NewAdminClient(servers)
	run := []func(context.Context){elector.Run}
	if f.failover {
		c, err := failover.New(failover.Config{
			API: kubeAPI, Catalogue: &failover.Servers{Admin: admin}, Leads: elector.Leads, After: f.after,
			Logger: log.With("component", "failover"),
		})
		if err != nil {
			return nil, errors.Join(errors.New("start the failover controller"), err)
		}
		run = append(run, c.Run)
	}
	if f.topology {
		c, err := nodelabels.New(nodelabels.Config{
			API: kubeAPI, Servers: admin, Leads: elector.Leads, Labels: f.labels, Logger: log.With("component", "nodelabels"),
		})
		if err != nil {
			return nil, errors.Join(errors.New("start to carry labels over"), err)
		}
		run = append(run, c.Run)
	}
	var wg sync.WaitGroup
	for _, r := range run {
		wg.Go(func() { r(ctx) })
	}
	return wg.Wait, nil
}

// validate refuses what makes no sense together, and labels that cannot be.
func (f *kubeFlags) validate() error {
	switch {
	case f.failover && f.after <= 0:
		return usageError{fmt.Errorf("--failover-after %s: want more than zero", f.after)}
	case !f.topology && f.labels != (kube.PlaceLabels{}):
		return usageError{errors.New("--zone-label and --rack-label are for --node-labels, which is missing")}
	case (f.failover || f.topology) && f.namespace == "":
		return usageError{errors.New("--namespace is missing: this is not a pod, which knows its own")}
	}
	if err := f.labels.Validate(); err != nil {
		return usageError{fmt.Errorf("--zone-label, --rack-label: %w", err)}
	}
	return nil
}
