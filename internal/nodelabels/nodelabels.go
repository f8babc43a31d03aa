// Package nodelabels keeps in the catalogue where the nodes stand, as the labels of Kubernetes' nodes say: a label that
// is given, changed or taken away counts within seconds, without a restart. It runs in the CSI controller, in every
// replica, and the one that leads acts.
//
// Two things have to say the same as the labels:
//
//   - the catalogue, by which volumes are placed (PlaceNode). A node's server sees it there and has its kubelet
//     register the driver again, which tells Kubernetes of new topology keys.
//   - the labels topology.csi.trivet.dev/zone and /rack, which the kubelet makes of what the driver tells. It never
//     changes one: where the node has another value, it refuses to register the driver, and no volume is mounted
//     there any more (pkg/volume/csi/nodeinfomanager, updateTopologyLabels). So they are changed here, and first.
//
// A label that a node does not have, and never had since this watches, says nothing: what its server says counts.
package nodelabels

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"google.golang.org/grpc"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/api"
	"github.com/trivet-csi/trivet/internal/kube"
)

// The labels that kubelets make of the segments of the driver (package controller, TopologyZone and TopologyRack).
const (
	labelZone = "topology." + trivet.DriverName + "/zone"
	labelRack = "topology." + trivet.DriverName + "/rack"
)

const (
	roundEvery = 10 * time.Second
	askTimeout = 5 * time.Second
)

// Servers is what is asked of any server of the cluster. An api.AdminClient is one.
type Servers interface {
	ListNodes(ctx context.Context, r *api.ListNodesRequest, opts ...grpc.CallOption) (*api.ListNodesResponse, error)
	PlaceNode(ctx context.Context, r *api.PlaceNodeRequest, opts ...grpc.CallOption) (*api.NodeStatus, error)
}

// Config says what a Controller works with.
type Config struct {
	API     *kube.API        // required
	Servers Servers          // required
	Leads   func() bool      // whether this process acts; required
	Labels  kube.PlaceLabels // an empty one: what the servers say counts
	Logger  *slog.Logger     // nil discards
}

// Validate returns ErrInvalid naming the first field that is missing or wrong.
func (c *Config) Validate() error {
	if c.API == nil || c.Servers == nil || c.Leads == nil {
		return fmt.Errorf("nodelabels: API, Servers or Leads is nil: %w", trivet.ErrInvalid)
	}
	return c.Labels.Validate()
}

// Controller carries labels over. It is used by one goroutine.
type Controller struct {
	cfg Config
	log *slog.Logger
}

// New returns a Controller, or ErrInvalid.
func New(cfg Config) (*Controller, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	return &Controller{cfg: cfg, log: cfg.Logger}, nil
}

// Run looks every ten seconds, while this process leads, until ctx ends.
func (c *Controller) Run(ctx context.Context) {
	tick := time.NewTicker(roundEvery)
	defer tick.Stop()
	for {
		if err := c.Round(ctx); err != nil && ctx.Err() == nil {
			c.log.Warn("labels of nodes: tried again in the next round", "err", err)
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// Round looks once at every node, if this process leads. Run calls it.
func (c *Controller) Round(ctx context.Context) error {
	if !c.cfg.Leads() {
		return nil
	}
	ask, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	list, err := c.cfg.Servers.ListNodes(ask, &api.ListNodesRequest{})
	if err != nil {
		return fmt.Errorf("where do nodes stand: %w", err)
	}
	labels, err := c.cfg.API.NodeLabels(ctx)
	if err != nil {
		return err
	}
	var errs []error
	for _, n := range list.GetNodes() {
		if has, known := labels[n.GetId()]; known {
			errs = append(errs, c.node(ctx, n, has))
		}
	}
	return errors.Join(errs...)
}

// node has one node stand where its labels say.
func (c *Controller) node(ctx context.Context, n *api.Node, labels map[string]string) error {
	zone := wanted(labels, c.cfg.Labels.Zone, n.GetZone(), n.GetZoneSet())
	rack := wanted(labels, c.cfg.Labels.Rack, n.GetRack(), n.GetRackSet())
	change := map[string]*string{}
	correct(change, labels, labelZone, zone)
	correct(change, labels, labelRack, rack)
	if len(change) > 0 {
		if err := c.cfg.API.SetNodeLabels(ctx, n.GetId(), change); err != nil {
			return err
		}
		c.log.Info("a node stood elsewhere: its topology labels are changed", "node", n.GetId(), "zone", zone, "rack", rack)
	}
	r := &api.PlaceNodeRequest{Node: n.GetId()}
	if zone != n.GetZone() {
		r.Zone = &zone
	}
	if rack != n.GetRack() {
		r.Rack = &rack
	}
	if r.Zone == nil && r.Rack == nil {
		return nil
	}
	ask, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	if _, err := c.cfg.Servers.PlaceNode(ask, r); err != nil {
		return fmt.Errorf("place node %s in zone %q, rack %q: %w", n.GetId(), zone, rack, err)
	}
	c.log.Info("a node stands where its labels say", "node", n.GetId(), "zone", zone, "rack", rack)
	return nil
}

// wanted returns what a label says; without it, or with no such label to look at, what is so. A label that was there
// and is gone says that there is none.
func wanted(labels map[string]string, label, now string, set bool) string {
	value, has := labels[label]
	switch {
	case label == "" || !has && !set:
		return now
	case !has:
		return ""
	}
	return value
}

// correct notes what is to become of a label that a kubelet made, if that says something else; nil removes it.
func correct(change map[string]*string, labels map[string]string, label, value string) {
	is, has := labels[label]
	switch {
	case !has || is == value:
	case value == "":
		change[label] = nil
	default:
		change[label] = &value
	}
}
