package node

import (
	"context"
	"fmt"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/cache"
	"github.com/trivet-csi/trivet/controller/meta"
	"github.com/trivet-csi/trivet/replication"
)

// sharedWriter reports whether another node may write beside this one. v is as this node sees it.
func sharedWriter(v *meta.Volume) bool {
	return v.Attached != nil && v.Attached.Mode == meta.MultiNodeMultiWriter
}

// throughOf is the cache of a node that writes beside another, whatever the volume asks for: none. It could not know
// what the other one writes, neither before it answers a read nor before it writes back.
func throughOf() cache.Settings {
	return cache.Settings{Mode: cache.WriteThrough, ReadAheadBytes: cache.ReadAheadMax}
}

// writersOf returns what the fence of v's epoch has to name; zero when it is one writer, whose session begins with it.
func writersOf(v *meta.Volume) replication.Writers {
	w := replication.Writers(v.Writers())
	if w == replication.Alone(v.Epoch) {
		return replication.Writers{}
	}
	return w
}

// renewer is replication.VolumeConfig.Renew for a session of this node, nil for one that nobody writes beside. The
// local copy only moves on, and had the session when the volume was opened: once it has it no more, it is over.
func (a *attacher) renewer(v *meta.Volume, session trivet.Epoch) func(context.Context, trivet.Epoch) (
	trivet.Epoch, error,
) {
	if !sharedWriter(v) {
		return nil
	}
	id := v.ID
	return func(ctx context.Context, fenced trivet.Epoch) (trivet.Epoch, error) {
		for {
			changed := a.cat.Changed()
			v, _ := a.cat.Local().Volume(id)
			held := v.GrantOf(a.node)
			switch {
			case held == nil || held.Session() != session:
				return 0, fmt.Errorf("session of %s since epoch %d is over, volume is at %d: %w", id, session, v.Epoch,
					trivet.ErrFenced)
			case held.Epoch > fenced && v.Usable(a.node, held.Epoch):
				return held.Epoch, nil
			}
			select {
			case <-changed:
			case <-ctx.Done():
				return 0, ctx.Err()
			}
		}
	}
}

// holdsSession reports whether v, as the catalogue has it, still grants node the session that began at an epoch.
func holdsSession(v *meta.Volume, node trivet.NodeID, session trivet.Epoch) bool {
	held := v.GrantOf(node)
	return held != nil && held.Session() == session
}
