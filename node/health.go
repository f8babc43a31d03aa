package node

import (
	"fmt"
	"time"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller/meta"
)

// The reasons that a node knows of, of a volume and of itself. They stand in the status of pods and nodes, and in
// alerts: they never change.
const (
	ReasonDeviceDead  = "DeviceDead"  // inaccessible: the kernel device of the volume is of no use any more
	ReasonNotServed   = "NotServed"   // inaccessible: it is staged, and no device of it is served yet
	ReasonFenced      = "Fenced"      // inaccessible: another attachment has fenced this node's
	ReasonWritesLost  = "WritesLost"  // data loss: acknowledged writes could not be written back
	ReasonCutOff      = "CutOff"      // inaccessible: the node reaches no majority of the cluster
	ReasonDiskFailed  = "DiskFailed"  // degraded: a disk does not say how full it is
	ReasonDiskDamaged = "DiskDamaged" // degraded: a disk has damage that repair does not mend
	ReasonDiskFull    = "DiskFull"    // degraded: a disk has no room beside its reserve
)

// VolumeHealth returns what is wrong with a volume on this node, as far as the node knows by itself, and whether the
// volume is attached or staged here. It asks nobody and does not wait.
func (n *Node) VolumeHealth(id trivet.VolumeID) (conditions []trivet.Condition, here bool) {
	return n.mounts.health(id)
}

func (m *mounts) health(id trivet.VolumeID) (conditions []trivet.Condition, here bool) {
	a := m.attacher
	at, rec := a.get(id), m.records.get(id)
	if rec.Staged == nil && (at == nil || at.kernel == nil && a.usersNBD(id) == 0) {
		return nil, false
	}
	note := func(status trivet.HealthStatus, reason, format string, args ...any) {
		conditions = trivet.AddCondition(conditions, trivet.Condition{
			Status: status, Reason: reason, Message: fmt.Sprintf(format, args...),
		})
	}
	v, _ := a.cat.Local().Volume(id)
	grant := v.GrantOf(a.node)
	switch {
	case grant == nil:
		note(trivet.HealthInaccessible, ReasonFenced, "it is in use here, but node %s does not hold it any more", a.node)
	case at != nil && at.group != nil && grant.Epoch != at.epoch:
		note(trivet.HealthInaccessible, ReasonFenced, "epoch %d of this attachment was overtaken by %d", at.epoch,
			grant.Epoch)
	case at == nil || at.path == nil || rec.Staged != nil && at.kernel == nil: // resumed, or to be: resume.go
		note(trivet.HealthInaccessible, ReasonNotServed, "it is staged here, and its device is not served yet")
	}
	if err := at.dead(); err != nil {
		note(trivet.HealthInaccessible, ReasonDeviceDead, "%v", err)
	}
	if at != nil && at.path != nil {
		if err := at.path.cache.Lost(); err != nil {
			note(trivet.HealthDataLoss, ReasonWritesLost, "%v", err)
		}
	}
	return conditions, true
}

// StorageHealth returns what is wrong with this node, as far as it may concern every volume used here. A node whose
// lease was not renewed is Inaccessible: its volumes cannot be expected to answer.
func (n *Node) StorageHealth() []trivet.Condition {
	self, _ := n.cfg.Catalogue.Local().Node(n.cfg.ID)
	out := leaseHealth(&self, n.cfg.Incarnation, time.Now())
	for _, d := range n.cfg.Disks {
		u, err := d.Usage()
		var met error
		if all := d.damage.since(0); len(all) > 0 {
			met = all[0]
		}
		out = diskHealth(out, d.dir, u.FreeBytes, met, err)
	}
	return out
}

// leaseHealth says whether the node, as the local copy of the catalogue has it, is part of the cluster.
func leaseHealth(self *meta.Node, incarnation string, now time.Time) []trivet.Condition {
	if self.Incarnation == incarnation && self.Alive(now) {
		return nil
	}
	return []trivet.Condition{{
		Status: trivet.HealthInaccessible, Reason: ReasonCutOff,
		Message: "the lease of this node was not renewed: it reaches no majority of the cluster",
	}}
}

// diskHealth adds what is wrong with a disk: failed is that it does not say how full it is, met what damage it has met.
func diskHealth(out []trivet.Condition, dir string, freeBytes int64, met, failed error) []trivet.Condition {
	c := trivet.Condition{Status: trivet.HealthDegraded}
	switch {
	case failed != nil:
		c.Reason, c.Message = ReasonDiskFailed, failed.Error()
	case met != nil:
		c.Reason, c.Message = ReasonDiskDamaged, fmt.Sprintf("disk %s: %v", dir, met)
	case freeBytes <= 0:
		c.Reason, c.Message = ReasonDiskFull, fmt.Sprintf("disk %s has no room beside its reserve", dir)
	default:
		return out
	}
	return trivet.AddCondition(out, c)
}
