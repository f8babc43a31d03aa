package failover

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/internal/kube"
)

const (
	// Taint is the key of the taint, of effect NoSchedule, that a node has from the removal of its pods until it
	// is back.
	Taint = trivet.DriverName + "/failed-over"

	// OptOut is the annotation of a namespace whose pods are not moved: any value but OptIn.
	OptOut = trivet.DriverName + "/failover"

	// OptIn is the value of OptOut that says what is so without it.
	OptIn = "enabled"
)

const (
	// DefaultAfter is longer than the ten seconds, and 4 % of jitter, after which a kubelet renews its Lease
	// (pkg/kubelet/kubelet.go, nodeLeaseRenewIntervalFraction).
	DefaultAfter = 12 * time.Second

	// awayMin is how long a server must have been without its lease, of six seconds, besides: a server that is replaced
	// is back by then, if just then a kubelet is late. It leaves eighteen of the thirty seconds in which a pod is to run
	// elsewhere for the fence, the attachment and the mount.
	awayMin = 6 * time.Second

	// afterPerLease is what After is at least, as a part of the duration of the kubelet's Lease, which it renews
	// after a quarter of it: a site may have set another one than the default of 40 s.
	afterPerLease = 0.3

	// roundEvery is how often nodes are looked at.
	roundEvery = 2 * time.Second

	// gapMax is the longest time between two looks at a node that still counts as watching it.
	gapMax = 10 * time.Second

	// restFor is how long a dead node that holds nothing is not asked for again what it holds.
	restFor = 10 * time.Second
)

// Catalogue is what Trivet knows of its nodes. *Servers is one.
type Catalogue interface {
	// Nodes returns the nodes of the cluster; true for those whose lease has run out.
	Nodes(ctx context.Context) (map[trivet.NodeID]bool, error)

	// Fence takes a volume from a node whose lease has run out, and returns once the fence is committed.
	// ErrInUse: the lease has not run out. Not attached there, or unknown: nil.
	Fence(ctx context.Context, volume string, node trivet.NodeID) error
}

// Config says what a Controller works with.
type Config struct {
	API       *kube.API     // required
	Catalogue Catalogue     // required
	Leads     func() bool   // whether this process acts, or only watches; required
	After     time.Duration // how long a node must be silent; 0 = DefaultAfter
	Logger    *slog.Logger  // nil discards
}

// Validate returns ErrInvalid naming the first field that is missing or wrong.
func (c *Config) Validate() error {
	switch {
	case c.API == nil || c.Catalogue == nil || c.Leads == nil:
		return fmt.Errorf("failover: API, Catalogue or Leads is nil: %w", trivet.ErrInvalid)
	case c.After < 0:
		return fmt.Errorf("failover: After %s is negative: %w", c.After, trivet.ErrInvalid)
	}
	return nil
}

// Controller watches nodes. It is used by one goroutine.
type Controller struct {
	cfg Config
	log *slog.Logger

	silent  map[trivet.NodeID]*silence // of all nodes, as far as they have been watched
	tainted map[string]bool            // nodes with our taint; nil = not known, as this process did not lead
	held    bool                       // most nodes are away, and that has been said
}

// New returns a Controller, or ErrInvalid.
func New(cfg Config) (*Controller, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	if cfg.After == 0 {
		cfg.After = DefaultAfter
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	return &Controller{cfg: cfg, log: cfg.Logger, silent: map[trivet.NodeID]*silence{}}, nil
}

// Run watches, and acts while this process leads, until ctx ends.
func (c *Controller) Run(ctx context.Context) {
	tick := time.NewTicker(roundEvery)
	defer tick.Stop()
	for {
		if err := c.Round(ctx); err != nil && ctx.Err() == nil {
			c.log.Warn("failover: tried again in the next round", "err", err)
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// Round looks once at every node and, if this process leads, does what is to be done for those that
// are dead. Run calls it.
func (c *Controller) Round(ctx context.Context) error {
	nodes, err := c.cfg.Catalogue.Nodes(ctx)
	if err != nil {
		return fmt.Errorf("which nodes are away: %w", err)
	}
	leases, err := c.cfg.API.NodeLeases(ctx)
	if err != nil {
		clear(c.silent) // they may have been heard of without our knowing
		return err
	}
	c.listen(nodes, leases)
	var away []trivet.NodeID
	for _, n := range slices.Sorted(maps.Keys(nodes)) {
		if nodes[n] {
			away = append(away, n)
		}
	}
	var errs []error
	var dead []corpse
	for _, n := range away {
		d, err := c.watch(ctx, n, leases[string(n)])
		errs = append(errs, err)
		if d != nil {
			dead = append(dead, *d)
		}
	}
	if !c.cfg.Leads() {
		c.tainted = nil
		return errors.Join(errs...)
	}
	if c.mostAreAway(len(away), len(nodes)) {
		return errors.Join(errs...)
	}
	for _, d := range dead {
		if c.rests(d.id) {
			continue
		}
		errs = append(errs, c.failOver(ctx, d))
	}
	return errors.Join(append(errs, c.untaint(ctx, nodes))...)
}

// mostAreAway reports whether more than half of the nodes are: then the trouble is rather with what lies between
// them and here, and moving all pods to the few others would make it worse (the node lifecycle controller stops
// evictions in such a case too, pkg/controller/nodelifecycle, "full disruption").
func (c *Controller) mostAreAway(away, all int) bool {
	most := 2*away > all
	if most && !c.held {
		c.log.Warn("failover: more than half of the nodes are away, nothing is moved", "away", away, "nodes", all)
	}
	c.held = most
	return most
}

// untaint takes the taint off nodes that are back.
func (c *Controller) untaint(ctx context.Context, away map[trivet.NodeID]bool) error {
	if c.tainted == nil {
		all, err := c.cfg.API.Nodes(ctx)
		if err != nil {
			return err
		}
		c.tainted = map[string]bool{}
		for i := range all {
			if hasTaint(&all[i], Taint) {
				c.tainted[all[i].Name] = true
			}
		}
	}
	var errs []error
	for _, name := range slices.Sorted(maps.Keys(c.tainted)) {
		if isAway, known := away[trivet.NodeID(name)]; isAway || !known {
			continue
		}
		errs = append(errs, c.untaintNode(ctx, name))
	}
	return errors.Join(errs...)
}

func (c *Controller) untaintNode(ctx context.Context, name string) error {
	n, err := c.cfg.API.Node(ctx, name)
	switch {
	case errors.Is(err, trivet.ErrNotFound):
		delete(c.tainted, name)
		return nil
	case err != nil:
		return err
	case !ready(n):
		return nil
	}
	left := slices.DeleteFunc(slices.Clone(n.Spec.Taints), func(t corev1.Taint) bool { return t.Key == Taint })
	if len(left) < len(n.Spec.Taints) {
		if err := c.cfg.API.SetTaints(ctx, n, left); err != nil {
			return err
		}
		c.log.Info("failover: the node is back", "node", name)
	}
	delete(c.tainted, name)
	return nil
}

func hasTaint(n *corev1.Node, key string) bool {
	return slices.ContainsFunc(n.Spec.Taints, func(t corev1.Taint) bool { return t.Key == key })
}

// ready reports whether Kubernetes takes the node for Ready.
func ready(n *corev1.Node) bool {
	for _, c := range n.Status.Conditions {
		if c.Type == corev1.NodeReady {
			return c.Status == corev1.ConditionTrue
		}
	}
	return false
}
