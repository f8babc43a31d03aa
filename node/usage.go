package node

import (
	"context"
	"time"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/replication"
)

const (
	// usageEvery is how often the bytes of volumes that lead here are counted, for the metrics.
	usageEvery = time.Minute
	// usageRest is how much longer than a count took is rested after it: counting takes at most a fiftieth of a core.
	usageRest = 50
)

// watchUsage counts what the blocks of the volumes that lead here are there for, until ctx ends. One that nobody has
// written to since is not counted again.
func (n *Node) watchUsage(ctx context.Context) {
	rest := func(d time.Duration) bool {
		select {
		case <-ctx.Done():
			return false
		case <-time.After(d):
			return true
		}
	}
	for rest(usageEvery) {
		leads := map[trivet.VolumeID]bool{}
		for _, v := range n.cfg.Catalogue.Local().Volumes() {
			if r, ok := n.host.Replica(v.ID); !ok || !r.Status().IsLeader {
				continue
			}
			leads[v.ID] = true
			began := time.Now()
			if _, err := n.host.Usage(ctx, v.ID, usageEvery/2); err != nil && ctx.Err() == nil {
				n.log.Debug("bytes of a volume are not counted", "volume", v.ID, "err", err)
			}
			if !rest(usageRest * time.Since(began)) {
				return
			}
		}
		n.host.ForgetUsage(func(id trivet.VolumeID) bool { return leads[id] })
	}
}

// Usage returns what the blocks of a volume that leads here are there for, as counted at most some minutes ago; false:
// it was not counted here.
func (n *Node) Usage(id trivet.VolumeID) (replication.VolumeUsage, bool) {
	return n.host.KnownUsage(id)
}
