package failover

import (
	"context"
	"errors"
	"maps"
	"time"

	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"

	"github.com/trivet-csi/trivet"
)

// silence is for how long nothing has been heard of a node by way of Kubernetes. It is measured by this process's
// clock alone, between looks at an API server that answers: times that others wrote prove nothing when clocks
// differ, and after an outage of the API server every Lease is old (the node lifecycle controller does the same,
// pkg/controller/nodelifecycle, nodeHealthData). Nodes that are not away are listened to as well, so that one that
// dies has been silent since its kubelet's last word, not since its server was missed.
type silence struct {
	renewed time.Time // of the kubelet's Lease, as last read; only compared for equality
	since   time.Time // nothing has been heard since
	looked  time.Time
	away    time.Time // its server has been away since; zero: it is not

	restUntil time.Time // what the node holds is not looked for: there was nothing
}

// corpse is a node that counts as dead.
type corpse struct {
	id     trivet.NodeID
	node   *corev1.Node // nil when Kubernetes does not know the node any more
	reason string
}

// listen takes note of what was heard of the nodes; true for those that are away.
func (c *Controller) listen(nodes map[trivet.NodeID]bool, leases map[string]*coordinationv1.Lease) {
	maps.DeleteFunc(c.silent, func(id trivet.NodeID, _ *silence) bool { _, known := nodes[id]; return !known })
	now := time.Now()
	for id, away := range nodes {
		s := c.silent[id]
		if s == nil {
			s = &silence{since: now}
			c.silent[id] = s
		} else if now.Sub(s.looked) > gapMax {
			s.since = now
		}
		s.looked = now
		if away {
			continue // watch
		}
		lease := leases[string(id)]
		if renewed := renewTime(lease); lease == nil || !renewed.Equal(s.renewed) || !s.away.IsZero() {
			s.renewed, s.since = renewed, now // one that is back is watched from the beginning
		}
		s.away, s.restUntil = time.Time{}, time.Time{}
	}
}

// watch looks at a node that is away, and returns it if it counts as dead by now. REQUIRES: listen.
func (c *Controller) watch(ctx context.Context, id trivet.NodeID, lease *coordinationv1.Lease) (*corpse, error) {
	s, now := c.silent[id], time.Now()
	if s.away.IsZero() {
		c.log.Info("failover: the server of a node has lost its lease", "node", string(id), "after", c.cfg.After.String())
		s.away = now
	}
	node, err := c.cfg.API.Node(ctx, string(id))
	switch {
	case errors.Is(err, trivet.ErrNotFound):
		node = nil
	case err != nil: // it may have been heard of without our knowing
		delete(c.silent, id)
		return nil, err
	}
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
	if now.Sub(s.since) < after || now.Sub(s.away) < awayMin {
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
