package server

import (
	"context"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/api"
	"github.com/trivet-csi/trivet/controller/meta"
	"github.com/trivet-csi/trivet/replication"
)

const (
	// usageTimeout bounds a count: some million versions of blocks. When it is over, an older one will do.
	usageTimeout = 2 * time.Second
	usageAge     = time.Minute // of what a list shows
	usageAgeMax  = time.Hour   // of what is shown at all
	usagesAtOnce = 8
)

// usage asks the nodes with a ready replica of v, the leader's first, what its blocks are there for, until one answers;
// nil: none.
func (a *admin) usage(ctx context.Context, v *meta.Volume, age time.Duration) *replication.VolumeUsage {
	var nodes []trivet.NodeID
	for _, r := range v.Replicas {
		switch {
		case r.State != meta.ReplicaReady:
		case r.ID == v.Leader:
			nodes = append([]trivet.NodeID{r.Node}, nodes...)
		default:
			nodes = append(nodes, r.Node)
		}
	}
	u := a.firstUsage(ctx, v.ID, nodes, age, usageTimeout)
	if u == nil {
		u = a.firstUsage(ctx, v.ID, nodes, usageAgeMax, statusTimeout)
	}
	return u
}

func (a *admin) firstUsage(ctx context.Context, id trivet.VolumeID, nodes []trivet.NodeID, age, limit time.Duration,
) *replication.VolumeUsage {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	for _, node := range nodes {
		u, err := replication.QueryUsage(ctx, a.s.network, node, id, age)
		if err == nil {
			return &u
		}
		a.s.log.Debug("a node does not say what a volume's blocks are there for", "volume", id, "node", node, "err", err)
	}
	return nil
}

func usageOf(u *replication.VolumeUsage) *api.VolumeUsage {
	if u == nil {
		return nil
	}
	return &api.VolumeUsage{
		UsedBytes: u.LiveBytes, SnapshotBytes: u.SnapshotBytes, OtherBytes: u.OtherBytes, SharedBytes: u.SharedBytes,
		UniqueBytes: u.UniqueBytes(), Node: string(u.Node), Counted: u.Counted.UTC().Format(time.RFC3339),
	}
}

// addUsages adds the usage of each volume, several at a time.
func (a *admin) addUsages(ctx context.Context, all []meta.Volume, out []*api.Volume) {
	var mu sync.Mutex
	var g errgroup.Group
	g.SetLimit(usagesAtOnce)
	for i := range all {
		g.Go(func() error {
			u := usageOf(a.usage(ctx, &all[i], usageAge))
			mu.Lock()
			defer mu.Unlock()
			out[i].Usage = u
			return nil
		})
	}
	_ = g.Wait() // none returns an error
}
