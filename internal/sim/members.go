package sim

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/replication"
	"github.com/trivet-csi/trivet/replication/raftgroup"
)

// Join gives a machine without a replica a new, empty one that waits to be added to the group, and starts
// it. It may be called again until it succeeds; ErrUnavailable while the machine is down.
func (n *Node) Join(ctx context.Context) error {
	if n.ReplicaID() == "" {
		n.setReplica(n.c.nextReplica(), nil, false)
	}
	return n.makeReplica(ctx)
}

// Discard removes a machine's replica. ErrUnavailable while the machine is down.
func (n *Node) Discard(ctx context.Context) error {
	l := n.current()
	if l == nil {
		return fmt.Errorf("discard replica on %s: machine is down: %w", n.id, trivet.ErrUnavailable)
	}
	if n.ReplicaID() == "" {
		return nil
	}
	if err := l.host.DestroyReplica(ctx, n.Spec()); err != nil {
		return err
	}
	if l.isDead() {
		return fmt.Errorf("discard replica on %s: machine went down: %w", n.id, trivet.ErrUnavailable)
	}
	n.setReplica("", nil, false)
	return nil
}

func (c *Cluster) nextReplica() trivet.ReplicaID {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.joined++
	return replicaID(1, c.joined)
}

// isMember is what machines ask about replicas that their group's own configuration does not know.
func (c *Cluster) isMember(_ trivet.VolumeID, id trivet.ReplicaID, node trivet.NodeID) bool {
	return slices.Contains(c.Members(), raftgroup.Member{Replica: id, Node: node})
}

// note adds a replica to Members.
func (c *Cluster) note(m raftgroup.Member) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !slices.Contains(c.members, m) {
		c.members = append(slices.Clone(c.members), m)
	}
}

// strike takes a replica out of Members.
func (c *Cluster) strike(id trivet.ReplicaID) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.members = slices.DeleteFunc(slices.Clone(c.members), func(m raftgroup.Member) bool { return m.Replica == id })
}

// AddLearner adds a machine's replica to the group, asking whoever leads again until it is done.
func (c *Cluster) AddLearner(ctx context.Context, n *Node) error {
	m := raftgroup.Member{Replica: n.ReplicaID(), Node: n.id}
	c.note(m)
	return c.change(ctx, func(r *replication.Replica) error { return r.AddLearner(ctx, m) })
}

// Promote gives a machine's replica a vote, asking again until it has caught up.
func (c *Cluster) Promote(ctx context.Context, n *Node) error {
	id := n.ReplicaID()
	return c.change(ctx, func(r *replication.Replica) error { return r.Promote(ctx, id) })
}

// Remove takes a replica out of the group, asking again until it is done. The machine keeps it.
func (c *Cluster) Remove(ctx context.Context, id trivet.ReplicaID) error {
	if err := c.change(ctx, func(r *replication.Replica) error { return r.Remove(ctx, id) }); err != nil {
		return err
	}
	c.strike(id)
	return nil
}

// change calls f with whoever leads until it gives an answer that is not "ask again" or "later".
func (c *Cluster) change(ctx context.Context, f func(*replication.Replica) error) error {
	for {
		err := c.lead(ctx, f)
		if !errors.Is(err, trivet.ErrPending) {
			return err
		}
		if err := Sleep(ctx, pollEvery); err != nil {
			return fmt.Errorf("%w: %w", err, trivet.ErrPending)
		}
	}
}
