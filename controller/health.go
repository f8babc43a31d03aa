package controller

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller/meta"
)

// The reasons that the catalogue knows of a volume. They stand in the status of claims and in alerts: they never
// change.
const (
	ReasonReplicaFaulted   = "ReplicaFaulted"   // degraded: a copy is lost or damaged
	ReasonDiskAbsent       = "DiskAbsent"       // degraded: the disk of a copy is not on its node
	ReasonNodeDown         = "NodeDown"         // degraded: the node of a copy is down
	ReasonReplicasMissing  = "ReplicasMissing"  // degraded: fewer copies vote than are wanted
	ReasonDiskFull         = "DiskFull"         // degraded: the disk of a copy has no room, writes are refused
	ReasonAttachedNodeDown = "AttachedNodeDown" // degraded: the node that has it attached is down
	ReasonBlocksDiffer     = "BlocksDiffer"     // degraded: a verify found blocks that are to be repaired by a scrub
	ReasonNoQuorum         = "NoQuorum"         // inaccessible: no majority of the copies can answer
	ReasonRecovering       = "Recovering"       // inaccessible: one copy is being made the only one
	ReasonRestoring        = "Restoring"        // inaccessible: it is being brought back to a snapshot
	ReasonVolumeFailed     = "VolumeFailed"     // inaccessible: it needs an operator
	ReasonNoGoodCopy       = "NoGoodCopy"       // data loss: every copy is lost or damaged
	ReasonBlocksLost       = "BlocksLost"       // data loss: a scrub found blocks that no copy has
)

// VolumeHealth is a volume and what is wrong with it, which may be nothing.
type VolumeHealth struct {
	Volume     meta.Volume
	Conditions []trivet.Condition
}

// VolumeHealth returns what is wrong with a volume now; ErrNotFound.
func (c *Controller) VolumeHealth(ctx context.Context, id trivet.VolumeID) (VolumeHealth, error) {
	s, err := c.store.Read(ctx)
	if err != nil {
		return VolumeHealth{}, fmt.Errorf("health of %s: %w", id, err)
	}
	v, err := lookUp(s, id)
	if err != nil {
		return VolumeHealth{}, fmt.Errorf("health of %s: %w", id, err)
	}
	return VolumeHealth{v, newExamination(s, time.Now()).conditions(&v)}, nil
}

// Unhealthy returns the volumes with which something is wrong now, sorted by ID.
func (c *Controller) Unhealthy(ctx context.Context) ([]VolumeHealth, error) {
	s, err := c.store.Read(ctx)
	if err != nil {
		return nil, fmt.Errorf("health of volumes: %w", err)
	}
	e := newExamination(s, time.Now())
	var out []VolumeHealth
	for _, v := range s.Volumes() {
		if found := e.conditions(&v); len(found) > 0 {
			out = append(out, VolumeHealth{v, found})
		}
	}
	return out, nil
}

// examination looks at the volumes of one state of the catalogue.
type examination struct{ pass *mendPass }

func newExamination(s *meta.State, now time.Time) examination {
	return examination{newMendPass(s, newHistory(time.Time{}), mendSettings{}, now)}
}

// conditions returns what is wrong with v. A volume that is being made or deleted has none. What does not follow from
// the catalogue is not told: the volume's group is not asked, so a majority that lives and does not answer is taken
// for one that does.
func (e examination) conditions(v *meta.Volume) []trivet.Condition {
	switch v.Phase {
	case meta.PhaseCreating, meta.PhaseDeleting:
		return nil
	case meta.PhaseAvailable, meta.PhaseBound, meta.PhaseReleased, meta.PhaseRecycling, meta.PhaseFailed,
		meta.PhaseKept, meta.PhaseRestoring:
	}
	out := e.phase(nil, v)
	out = e.copies(out, v)
	return e.blocks(out, v)
}

func note(list []trivet.Condition, s trivet.HealthStatus, reason, format string, args ...any) []trivet.Condition {
	return trivet.AddCondition(list, trivet.Condition{Status: s, Reason: reason, Message: fmt.Sprintf(format, args...)})
}

func (e examination) phase(out []trivet.Condition, v *meta.Volume) []trivet.Condition {
	if v.Phase == meta.PhaseFailed {
		out = note(out, trivet.HealthInaccessible, ReasonVolumeFailed, "volume failed: %s", v.Reason)
	}
	if v.Phase == meta.PhaseRestoring {
		out = note(out, trivet.HealthInaccessible, ReasonRestoring, "volume is being brought back to a snapshot")
	}
	if v.Recover != "" {
		out = note(out, trivet.HealthInaccessible, ReasonRecovering,
			"replica %s is being made the only one, by an operator", v.Recover)
	}
	if node := v.Holder(); node != "" && !e.pass.alive(node) {
		out = note(out, trivet.HealthDegraded, ReasonAttachedNodeDown, "node %s, which has it attached, is down", node)
	}
	return out
}

// copies looks at the replicas. One that is Faulted because its disk is damaged runs on and votes until it is
// replaced or its server starts anew, which the catalogue does not know; one that is Faulted for anything else does
// not.
func (e examination) copies(out []trivet.Condition, v *meta.Volume) []trivet.Condition {
	var voters, answering, good, ready int
	for i := range v.Replicas {
		r := &v.Replicas[i]
		out = e.copyOf(out, r)
		present := e.pass.alive(r.Node) && e.pass.diskOf(r) != nil
		switch r.State {
		case meta.ReplicaReady, meta.ReplicaLeaving:
			voters++
			good++
			if r.State == meta.ReplicaReady {
				ready++
			}
			if present {
				answering++
			}
		case meta.ReplicaFaulted:
			voters++
			if strings.HasPrefix(r.Reason, meta.ReasonDiskAbsent) {
				good++ // it heals when the disk is back
			} else if strings.HasPrefix(r.Reason, meta.ReasonDiskDamaged) && present {
				answering++
			}
		case meta.ReplicaCreating, meta.ReplicaJoining, meta.ReplicaFilling, meta.ReplicaRemoved, meta.ReplicaLeft:
		}
	}
	if ready < v.Want() {
		out = note(out, trivet.HealthDegraded, ReasonReplicasMissing, "%d of %d replicas are ready%s", ready, v.Want(),
			onTheWay(v))
	}
	if 2*answering <= voters {
		out = note(out, trivet.HealthInaccessible, ReasonNoQuorum, "%d of %d replicas can answer, which is no majority",
			answering, voters)
	}
	if good == 0 {
		out = note(out, trivet.HealthDataLoss, ReasonNoGoodCopy, "no replica is left that is not lost or damaged")
	}
	return out
}

// copyOf says what is wrong with one replica.
func (e examination) copyOf(out []trivet.Condition, r *meta.Replica) []trivet.Condition {
	absent := r.State == meta.ReplicaFaulted && strings.HasPrefix(r.Reason, meta.ReasonDiskAbsent)
	switch {
	case r.State == meta.ReplicaJoining || r.State == meta.ReplicaFilling:
		return out // no copy yet
	case r.State == meta.ReplicaFaulted && !absent:
		out = note(out, trivet.HealthDegraded, ReasonReplicaFaulted, "replica on %s: %s", r.Node, r.Reason)
	case !e.pass.alive(r.Node):
	case absent || e.pass.diskOf(r) == nil:
		out = note(out, trivet.HealthDegraded, ReasonDiskAbsent, "disk %s of the replica on %s is not there", r.Disk, r.Node)
	case e.pass.diskOf(r).FreeBytes <= 0 && e.pass.diskOf(r).SizeBytes > 0:
		out = note(out, trivet.HealthDegraded, ReasonDiskFull, "disk %s of the replica on %s has no room", r.Disk, r.Node)
	}
	if !e.pass.alive(r.Node) {
		out = note(out, trivet.HealthDegraded, ReasonNodeDown, "node %s is down", r.Node)
	}
	return out
}

func onTheWay(v *meta.Volume) string {
	if r := v.Change(); r != nil {
		return ": " + changeText(v, r)
	}
	return ""
}

// blocks tells what the newest scrub found.
func (e examination) blocks(out []trivet.Condition, v *meta.Volume) []trivet.Condition {
	switch s := v.Scrub; {
	case s == nil:
	case s.Left > 0 && !s.Verify:
		out = note(out, trivet.HealthDataLoss, ReasonBlocksLost,
			"scrub %d found %d blocks that no replica has as they were written%s", s.Pass, s.Left, firstFinding(s))
	case s.Found > 0 && s.Verify:
		out = note(out, trivet.HealthDegraded, ReasonBlocksDiffer,
			"verify %d found %d blocks that are to be repaired by a scrub%s", s.Pass, s.Found, firstFinding(s))
	}
	return out
}

func firstFinding(s *meta.Scrub) string {
	if len(s.Findings) == 0 {
		return ""
	}
	return ", the first: " + s.Findings[0]
}
