package node

import (
	"context"
	"fmt"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/iothrottle"
	"github.com/trivet-csi/trivet/replication"
)

// Limits returns the limits in force on the data path of a volume, and whether one is open here.
func (n *Node) Limits(id trivet.VolumeID) (iothrottle.Limits, bool) {
	at := n.mounts.attacher.get(id)
	if at == nil || at.path == nil {
		return iothrottle.Limits{}, false
	}
	return at.path.throttle.Limits(), true
}

// Scheduler returns how the scheduler that the volumes attached here share is doing.
func (n *Node) Scheduler() iothrottle.SchedulerStats {
	return n.mounts.attacher.shared.scheduler.Stats()
}

// DiskSchedulers returns how those that share out the disks of this node are doing.
func (n *Node) DiskSchedulers() map[trivet.DiskID]iothrottle.SchedulerStats {
	all := make(map[trivet.DiskID]iothrottle.SchedulerStats, len(n.cfg.Disks))
	for _, d := range n.cfg.Disks {
		all[d.ID()] = d.share.scheduler.Stats()
	}
	return all
}

// ReplicaStatus returns how the replica of a volume here is doing, and whether one runs.
func (n *Node) ReplicaStatus(id trivet.VolumeID) (replication.ReplicaStatus, bool) {
	r, ok := n.host.Replica(id)
	if !ok {
		return replication.ReplicaStatus{}, false
	}
	return r.Status(), true
}

// Snapshots returns what reads the snapshots of a volume, from any node. ErrNotFound: the volume is unknown.
func (n *Node) Snapshots(ctx context.Context, id trivet.VolumeID) (*replication.SnapshotReader, error) {
	st, err := n.cfg.Catalogue.Read(ctx)
	if err != nil {
		return nil, fmt.Errorf("snapshots of %s: %w", id, err)
	}
	v, ok := st.Volume(id)
	if !ok {
		return nil, fmt.Errorf("snapshots of %s: %w", id, trivet.ErrNotFound)
	}
	r := &replication.SnapshotReader{Volume: id, Network: n.cfg.Network, Host: n.host}
	for _, m := range mayLead(&v) {
		r.Nodes = append(r.Nodes, m.Node)
	}
	return r, nil
}
