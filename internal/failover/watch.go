package failover

import (
	"context"
	"errors"
	"time"

	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"

	"github.com/trivet-csi/trivet"
)

// silence is for how long nothing has been heard of a node by way of Kubernetes. It is measured by this process's
// clock alone, between looks at an API server that answers: times that others wrote prove nothing when clocks
// differ, and after an outage of the API server every Lease is old (the node lifecycle controller does the same,
// pkg/controller/nodelifecycle, nodeHealthData).
type silence struct {
	renewed time.Time // of the kubelet's Lease, as last read; only compared for equality
	since   time.Time // nothing has been heard since
	looked  time.Time

	restUntil time.Time // what the node holds is not looked for: there was nothing
}

// corpse is a node that counts as dead.
type corpse struct {
	id     trivet.NodeID
	node   *corev1.Node // nil when Kubernetes does not know the node any more
	reason string
}

// watch looks at a node that is away, and returns it if it counts as dead by now.
func (c *Controller) watch(ctx context.Context, id trivet.NodeID) (*corpse, error) {
	node, lease, err := c.look(ctx, id)
	now := time.Now()
	s := c.silent[id]
	switch {
	case err != nil: // it may have been heard of without our knowing
		delete(c.silent, id)
		return nil, err
	case s == nil:
		c.log.Info("failover: the server of a node has lost its lease", "node", string(id), "after", c.cfg.After.String())
		s = &silence{since: now}
		c.silent[id] = s
	case now.Sub(s.looked) > gapMax:
		s.since = now
	}
	s.looked = now
	if node != nil && hasTaint(node, corev1.TaintNodeOutOfService) {
		return &corpse{id: id, node: node, reason: "it is tainted " + corev1.TaintNodeOutOfService}, nil
	}
	after := c.cfg.After
	if lease != nil {
		after = max(after, time.Duration(float64(leaseSeconds(lease))*afterPerLease*float64(time.Second)))
	}
	if renewed := renewTime(lease); !renewed.Equal(s.renewed) {
		s.renewed = renewed
		if node != nil && ready(node) {
			s.since = now
		}
	}
	if now.Sub(s.since) < after {
		return nil, nil //nolint:nilnil // not dead, or not yet
	}
	reason := "its kubelet does not renew its Lease"
	if node == nil {
		reason = "it is no node of Kubernetes any more"
	} else if !ready(node) {
		reason = "it is not Ready"
	}
	return &corpse{id: id, node: node, reason: reason}, nil
}

// look reads the node and the Lease of its kubelet; nil for what is not there.
func (c *Controller) look(ctx context.Context, id trivet.NodeID) (*corev1.Node, *coordinationv1.Lease, error) {
	node, err := c.cfg.API.Node(ctx, string(id))
	if errors.Is(err, trivet.ErrNotFound) {
		node, err = nil, nil
	}
	if err != nil {
		return nil, nil, err
	}
	lease, err := c.cfg.API.NodeLease(ctx, string(id))
	if errors.Is(err, trivet.ErrNotFound) {
		lease, err = nil, nil
	}
	return node, lease, err
}

func renewTime(l *coordinationv1.Lease) time.Time {
	if l == nil || l.Spec.RenewTime == nil {
		return time.Time{}
	}
	return l.Spec.RenewTime.Time
}

func leaseSeconds(l *coordinationv1.Lease) int32 {
	if l.Spec.LeaseDurationSeconds == nil {
		return 0
	}
	return *l.Spec.LeaseDurationSeconds
}

// rest puts off the next search for what a dead node holds, so that a node which never comes back costs little.
func (c *Controller) rest(id trivet.NodeID) {
	if s := c.silent[id]; s != nil {
		s.restUntil = time.Now().Add(restFor)
	}
}

func (c *Controller) rests(id trivet.NodeID) bool {
	s := c.silent[id]
	return s != nil && time.Now().Before(s.restUntil)
}
