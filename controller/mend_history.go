package controller

import (
	"time"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller/meta"
)

// history is what a mender has seen while it led: what the catalogue, which has no clock, cannot say. A
// new leader begins with an empty one, which makes it patient, never hasty.
type history struct {
	since   time.Time                      // it leads since then
	faulted map[trivet.ReplicaID]time.Time // when each faulted replica was first seen so
	fills   map[trivet.ReplicaID]fillStep  // how far each replica is that joins or is filled
	tried   map[attempt]time.Time          // when a replica was last added there
	held    map[trivet.VolumeID]heldSince  // by whom volumes are held that a replica is to follow
}

// fillStep is what a replica that joins or is filled last did that got it further, and when that was seen.
type fillStep struct {
	state    meta.ReplicaState
	progress uint64
	since    time.Time
}

type attempt struct {
	volume trivet.VolumeID
	node   trivet.NodeID
}

func newHistory(since time.Time) *history {
	return &history{
		since: since, faulted: map[trivet.ReplicaID]time.Time{}, fills: map[trivet.ReplicaID]fillStep{},
		tried: map[attempt]time.Time{}, held: map[trivet.VolumeID]heldSince{},
	}
}

// observe notes which replicas are faulted and how far fills are, and forgets what is over.
func (h *history) observe(s *meta.State, now time.Time) {
	faulted, fills := map[trivet.ReplicaID]time.Time{}, map[trivet.ReplicaID]fillStep{}
	told, held := map[trivet.ReplicaID]uint64{}, map[trivet.VolumeID]heldSince{}
	for _, n := range s.Nodes() {
		for _, f := range n.Fills {
			told[f.Replica] = f.Progress
		}
	}
	for _, v := range s.Volumes() {
		if r := v.Change(); r != nil && r.State != meta.ReplicaLeaving {
			step := fillStep{r.State, told[r.ID], now}
			if seen, ok := h.fills[r.ID]; ok && seen.state == step.state && seen.progress == step.progress {
				step.since = seen.since
			}
			fills[r.ID] = step
		}
		h.observeHolder(&v, held, now)
		for _, r := range v.Replicas {
			if r.State != meta.ReplicaFaulted {
				continue
			}
			faulted[r.ID] = now
			if seen, ok := h.faulted[r.ID]; ok {
				faulted[r.ID] = seen
			}
		}
	}
	h.faulted, h.fills, h.held = faulted, fills, held
	for a, t := range h.tried {
		if now.Sub(t) >= retryAfter {
			delete(h.tried, a)
		}
	}
}
