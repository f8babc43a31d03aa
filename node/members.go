package node

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller/meta"
	"github.com/trivet-csi/trivet/replication/raftgroup"
)

// fillsMax is how many groups a node fills a new replica of at a time, as the one that leads: each reads all of a
// volume from one disk and sends it.
const fillsMax = 2

// read returns the volume as the catalogue has it, read linearizably. A change of a group that was decided on
// a copy that lags could undo a later one: add a learner that was removed, and whose data is gone.
func (w *worker) read(ctx context.Context, a action) (*meta.Volume, error) {
	st, err := w.agent.cat.Read(ctx)
	if err != nil {
		return nil, fmt.Errorf("%s replica %s of %s: %w", a.verb, a.id, w.volume, err)
	}
	v, ok := st.Volume(w.volume)
	if !ok {
		return &meta.Volume{}, nil // the local copy will follow
	}
	return &v, nil
}

// knows reports whether v has the replica on this node, or had it and wants it removed.
func (w *worker) knows(v *meta.Volume, id trivet.ReplicaID) bool {
	is := func(r meta.Replica) bool { return r.ID == id && r.Node == w.agent.cfg.ID }
	return slices.ContainsFunc(v.Replicas, is) || slices.ContainsFunc(v.Retired, is)
}

// join makes an empty replica, which the group's leader then adds, and reports it Filling. One that was made
// before the report got through is found, and one that was lost before it never had a vote.
func (w *worker) join(ctx context.Context, a action) error {
	v, err := w.read(ctx, a)
	if err != nil {
		return err
	}
	r := v.Replica(a.id)
	if r == nil || r.Node != w.agent.cfg.ID || r.State != meta.ReplicaJoining || v.Phase == meta.PhaseDeleting {
		return nil
	}
	if err := w.clear(ctx, v, r); err != nil {
		return err
	}
	s := w.spec(a)
	// It may be given the log from its first entry: then it would let through what the others have refused, had it
	// another size than they had (I13).
	s.SizeBytes = v.Start()
	err = w.agent.host.CreateReplica(ctx, s)
	switch {
	case err == nil:
		w.remember(a)
		return w.report(ctx, a, meta.ReplicaFilling, "")
	case isLoss(err):
		w.log.Error("replica cannot be made", "replica", a.id, "disk", a.disk, "err", err)
		return w.report(ctx, a, meta.ReplicaFaulted, err.Error())
	}
	return err
}

// clear removes from the disk of r what an earlier replica of the volume left there. It removes only what v,
// read linearizably, has given up: a retired one, or a Faulted one that r replaces (H35).
func (w *worker) clear(ctx context.Context, v *meta.Volume, r *meta.Replica) error {
	for _, p := range slices.Clone(w.onDisk) {
		if p.disk != r.Disk || p.id == r.ID {
			continue
		}
		old := v.Replica(p.id)
		retired := slices.ContainsFunc(v.Retired, func(x meta.Replica) bool { return x.ID == p.id })
		if !retired && (old == nil || old.State != meta.ReplicaFaulted || r.Replaces != old.ID) {
			continue // making r will say what is in the way
		}
		w.log.Info("removing the remains of a replica that is replaced", "replica", p.id, "by", r.ID, "disk", p.disk)
		a := action{disk: p.disk, id: p.id}
		if err := w.agent.host.DestroyReplica(ctx, w.spec(a)); err != nil {
			return err
		}
		w.forget(a)
	}
	return nil
}

// retire removes a replica that has left its group. A disk that holds another one of the volume has nothing of
// it any more.
func (w *worker) retire(ctx context.Context, a action) error {
	v, err := w.read(ctx, a)
	if err != nil {
		return err
	}
	if !slices.ContainsFunc(v.Retired, func(r meta.Replica) bool {
		return r.ID == a.id && r.Node == w.agent.cfg.ID && r.Disk == a.disk
	}) {
		return nil // the local copy lagged
	}
	if err := w.agent.host.DestroyReplica(ctx, w.spec(a)); err != nil && !errors.Is(err, trivet.ErrExists) {
		return err
	}
	w.forget(a)
	return w.report(ctx, a, meta.ReplicaRemoved, "")
}

// change makes one change of the group, of which a.id leads, and reports what has become of a.target.
func (w *worker) change(ctx context.Context, a action) error {
	r, ok := w.agent.host.running(w.volume)
	if !ok {
		return fmt.Errorf("%s %s: replica %s does not run: %w", a.verb, w.volume, a.id, trivet.ErrNotLeader)
	}
	v, err := w.read(ctx, a)
	if err != nil {
		return err
	}
	target := action{id: a.target}
	q := v.Replica(a.target)
	filling := q != nil && q.State == meta.ReplicaFilling
	switch {
	case a.verb == doLearner && filling:
		if !w.takeFill(q.Node) {
			return fmt.Errorf("learner %s of %s: %d groups are being filled from here already: %w",
				a.target, w.volume, fillsMax, trivet.ErrPending)
		}
		return r.AddLearner(ctx, raftgroup.Member{Replica: q.ID, Node: q.Node})
	case a.verb == doPromote && filling:
		w.noteFill(q.Node)
		err := r.Promote(ctx, q.ID)
		if errors.Is(err, trivet.ErrCorrupt) { // it is not what the leader is, and never will be (I14)
			w.log.Error("a new replica differs from its leader and is given up", "replica", q.ID, "on", q.Node, "err", err)
			return w.report(ctx, target, meta.ReplicaFaulted, err.Error())
		}
		if err != nil {
			return err
		}
		return w.report(ctx, target, meta.ReplicaReady, "")
	case a.verb == doShrink && q != nil && q.State == meta.ReplicaLeaving:
		if err := r.Remove(ctx, q.ID); err != nil {
			return err
		}
		return w.report(ctx, target, meta.ReplicaLeft, "")
	case a.verb == doEvict && q == nil && v.ID == w.volume:
		w.log.Warn("removing a learner that the catalogue does not know", "replica", a.target)
		return r.Remove(ctx, a.target)
	}
	return nil // the local copy lagged
}

// takeFill counts this volume among those that are being filled from here, and reports whether there is room
// for it. Fills whose receiver is not alive do not count: they move nothing.
func (w *worker) takeFill(to trivet.NodeID) bool {
	a := w.agent
	st := a.cat.Local()
	a.mu.Lock()
	defer a.mu.Unlock()
	n := 0
	for id, node := range a.fills {
		if r, ok := st.Node(node); ok && id != w.volume && r.Alive(time.Now()) {
			n++
		}
	}
	if n >= fillsMax {
		return false
	}
	a.fills[w.volume] = to
	return true
}

// noteFill counts a fill that is under way already, which another leader may have begun.
func (w *worker) noteFill(to trivet.NodeID) {
	w.agent.mu.Lock()
	defer w.agent.mu.Unlock()
	w.agent.fills[w.volume] = to
}

// releaseFill ends what takeFill began once nothing of it is left to do.
func (w *worker) releaseFill(acts []action) {
	if slices.ContainsFunc(acts, func(a action) bool { return a.verb == doLearner || a.verb == doPromote }) {
		return
	}
	w.agent.mu.Lock()
	defer w.agent.mu.Unlock()
	delete(w.agent.fills, w.volume)
}

// fillsHere tells how far the replicas are that are being filled on this node. Whoever looks after the cluster gives
// up one that makes no progress.
func (a *Agent) fillsHere() []meta.Fill {
	a.mu.Lock()
	ids := slices.Sorted(maps.Keys(a.workers))
	a.mu.Unlock()
	var fills []meta.Fill
	st := a.cat.Local()
	for _, id := range ids {
		v, ok := st.Volume(id)
		if !ok {
			continue
		}
		q := v.Change()
		if q == nil || q.Node != a.cfg.ID || q.State != meta.ReplicaFilling || len(fills) == meta.FillsMax {
			continue
		}
		if r, ok := a.host.running(id); ok {
			if s := r.Status(); s.Replica == q.ID {
				fills = append(fills, meta.Fill{Replica: q.ID, Progress: s.Progress})
			}
		}
	}
	return fills
}
