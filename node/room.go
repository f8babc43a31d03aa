package node

import (
	"fmt"
	"sync/atomic"
	"time"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller/meta"
)

// fullDisks are the disks of living nodes that have no room beside their reserve, as one state of the catalogue has
// them.
type fullDisks struct {
	state *meta.State
	on    map[trivet.DiskID]trivet.NodeID
}

// roomElsewhere returns what a leader asks before each write, beside its own disk: whether a replica of the volume on
// another node has room. A follower cannot refuse what the leader proposes; when its disk is at its end it stops, and
// so do the others on that disk (H26). Nodes tell the catalogue with every renewal of their lease, seconds before,
// which the reserve has room for. While no disk of the cluster is full it costs the comparison of two pointers.
func roomElsewhere(cat Catalogue) func(trivet.VolumeID) error {
	var cached atomic.Pointer[fullDisks]
	return func(id trivet.VolumeID) error {
		st := cat.Local()
		full := cached.Load()
		if full == nil || full.state != st {
			full = &fullDisks{state: st, on: fullOf(st, time.Now())}
			cached.Store(full)
		}
		if len(full.on) == 0 {
			return nil
		}
		v, ok := st.Volume(id)
		if !ok {
			return nil
		}
		for _, r := range v.Replicas {
			if node, is := full.on[r.Disk]; is && r.State == meta.ReplicaReady {
				return fmt.Errorf("disk %s of %s is full: %w", r.Disk, node, trivet.ErrNoSpace)
			}
		}
		return nil
	}
}

// fullOf lists the disks without room. Those of nodes that are down hold nobody up: they catch up, or are replaced.
func fullOf(st *meta.State, now time.Time) map[trivet.DiskID]trivet.NodeID {
	var out map[trivet.DiskID]trivet.NodeID
	for _, n := range st.Nodes() {
		if !n.Alive(now) {
			continue
		}
		for _, d := range n.Disks {
			if d.FreeBytes > 0 || d.SizeBytes == 0 {
				continue
			}
			if out == nil {
				out = make(map[trivet.DiskID]trivet.NodeID)
			}
			out[d.ID] = n.ID
		}
	}
	return out
}
