package node

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller/meta"
	"github.com/trivet-csi/trivet/replication"
)

const (
	actionTimeout = 30 * time.Second // of one action; it is tried again
	wipeTimeout   = 10 * time.Minute // of a wipe, which is proportional to what was written

	// pollEvery is how often a replica is asked for its status that cannot tell of a change.
	pollEvery = 500 * time.Millisecond

	retryMin = 100 * time.Millisecond
	retryMax = 5 * time.Second
)

// worker makes this node match the catalogue for one volume. It belongs to one goroutine, but for poke
// and seen.
type worker struct {
	agent  *Agent
	volume trivet.VolumeID
	poked  chan struct{} // capacity 1
	log    *slog.Logger
	seen   meta.Revision // of the volume when it was last poked; 0 = unknown; under agent.mu
	scrubs bool          // whether it was being scrubbed then; under agent.mu

	onDisk    []placed
	ignored   map[placed]bool
	lost      map[placed]bool
	restSince time.Time // since when the replica runs although nobody needs it; zero: somebody does
	watching  bool      // something is due once a lease runs out, which nobody tells of
}

// poke makes the worker look again. It never blocks.
func (w *worker) poke() {
	select {
	case w.poked <- struct{}{}:
	default: // it is going to look anyway
	}
}

// run plans and acts until ctx ends or the volume is no more of this node's business.
func (w *worker) run(ctx context.Context) {
	retry := retryMin
	for ctx.Err() == nil {
		changed, running := w.replicaChanged() // before planning, so that no change is missed
		acts, relevant := w.plan()
		w.releaseFill(acts)
		if !relevant {
			return
		}
		var again <-chan time.Time // nil: wait for a change
		if wait := w.restless(acts); wait > 0 {
			again = time.After(wait)
		} else if len(acts) > 0 {
			retry = w.act(ctx, acts, retry)
			again = time.After(retry)
		} else if running && changed == nil || w.watching {
			again = time.After(pollEvery)
		}
		select {
		case <-ctx.Done():
			return
		case <-w.poked:
		case <-changed:
		case <-again:
		}
	}
}

// restless returns how long a replica that could be parked runs on: a volume that moves to another node
// is detached and attached within seconds. 0 when there is anything else to do.
func (w *worker) restless(acts []action) time.Duration {
	if len(acts) != 1 || acts[0].verb != doPark {
		w.restSince = time.Time{}
		return 0
	}
	if w.restSince.IsZero() {
		w.restSince = time.Now()
	}
	return time.Until(w.restSince.Add(w.agent.cfg.ParkAfter))
}

// act runs the actions in order up to the first error, and returns how long to wait before planning
// again if nothing changes until then. Leadership that cannot move, because the node where it is wanted is
// dead, holds up nothing else: that node's replica may be about to be replaced.
func (w *worker) act(ctx context.Context, acts []action, retry time.Duration) time.Duration {
	wait := retryMin
	for _, a := range acts {
		err := w.do(ctx, a)
		switch {
		case err == nil:
			w.log.Debug("reconciled", "do", a.verb, "replica", a.id, "target", a.target, "epoch", a.epoch)
		case ctx.Err() != nil:
			return retry
		case errors.Is(err, trivet.ErrNotLeader):
			return retryMin // leadership moved between plan and action
		case errors.Is(err, trivet.ErrPending):
			w.log.Debug("reconcile waits", "do", a.verb, "replica", a.id, "target", a.target, "err", err)
			return max(wait, pollEvery)
		default:
			w.log.Warn("reconcile will be tried again", "do", a.verb, "replica", a.id, "epoch", a.epoch, "err", err)
			if wait = min(2*retry, retryMax); a.verb != doMove {
				return wait
			}
		}
	}
	return wait
}

// plan gathers what is wanted and what there is. The second result is false when the volume has
// nothing to do with this node (any more).
func (w *worker) plan() ([]action, bool) {
	a := w.agent
	l := local{disks: a.diskSet, onDisk: w.onDisk, ignored: w.ignored, lost: w.lost, awake: a.cfg.ParkAfter < 0}
	r, running := a.host.running(w.volume)
	if l.running = running; running {
		l.status = r.Status()
	}
	st := a.cat.Local()
	v, known := st.Volume(w.volume)
	if !known {
		return plan(a.cfg.ID, nil, l), len(w.onDisk) > 0
	}
	l.avoid = avoid(st, &v, time.Now())
	l.damage = a.damageOf(&v)
	l.copies = copiesOf(st, &v, time.Now())
	l.awake = l.awake || l.copies.busy
	w.watching = w.flatten(&v, &l) || l.copies.waits
	return plan(a.cfg.ID, &v, l), concerns(a.cfg.ID, a.diskSet, &v) || len(w.onDisk) > 0
}

// avoid returns the nodes with a replica of v that should not lead: cordoned ones, and those whose lease has
// run out.
func avoid(st *meta.State, v *meta.Volume, now time.Time) map[trivet.NodeID]bool {
	out := make(map[trivet.NodeID]bool)
	for _, r := range v.Replicas {
		if n, ok := st.Node(r.Node); !ok || n.Cordoned || !n.Alive(now) {
			out[r.Node] = true
		}
	}
	return out
}

func (w *worker) replicaChanged() (changed <-chan struct{}, running bool) {
	r, running := w.agent.host.running(w.volume)
	if running {
		changed = r.Changed()
	}
	return changed, running
}

// do carries out one action.
func (w *worker) do(ctx context.Context, a action) error {
	limit := actionTimeout
	if a.verb == doWipe {
		limit = wipeTimeout
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	switch a.verb {
	case doCreate:
		return w.create(ctx, a)
	case doOpen, doRevive:
		return w.open(ctx, a)
	case doRecover:
		return w.recover(ctx, a)
	case doPark:
		return w.agent.host.ParkReplica(ctx, w.spec(a))
	case doFault:
		return w.report(ctx, a, meta.ReplicaFaulted, a.reason)
	case doDestroy:
		return w.destroy(ctx, a)
	case doRemoved:
		return w.report(ctx, a, meta.ReplicaRemoved, "")
	case doStray:
		return w.stray(ctx, a)
	case doJoin:
		return w.join(ctx, a)
	case doRetire:
		return w.retire(ctx, a)
	case doLearner, doPromote, doShrink, doEvict:
		return w.change(ctx, a)
	case doFreeze, doDrop:
		return w.snapshot(ctx, a)
	case doFlat:
		_, err := propose(ctx, w.agent.cat, meta.Command{ReportFlattened: &meta.ReportFlattened{
			Volume: w.volume, Replica: a.id,
		}})
		return err
	default:
		return w.lead(ctx, a)
	}
}

// create makes the replica durable and reports it Ready. It decides by a linearizable read: a local
// copy that lags may still show as Creating a replica that was Ready, voted and was wiped since, and
// making that one anew would let it vote twice (H10).
func (w *worker) create(ctx context.Context, a action) error {
	st, err := w.agent.cat.Read(ctx)
	if err != nil {
		return fmt.Errorf("create replica %s of %s: %w", a.id, w.volume, err)
	}
	v, ok := st.Volume(w.volume)
	if !ok {
		return nil // the local copy will follow
	}
	r := v.Replica(a.id)
	if r == nil || r.Node != w.agent.cfg.ID || r.State != meta.ReplicaCreating || v.Phase != meta.PhaseCreating {
		return nil
	}
	s := w.spec(a)
	s.SizeBytes, s.Members, s.Base = v.Start(), membersOf(&v), baseOf(&v)
	err = w.agent.host.CreateReplica(ctx, s)
	switch {
	case err == nil:
		w.remember(a)
		return w.report(ctx, a, meta.ReplicaReady, "")
	case s.Base != nil && errors.Is(err, trivet.ErrUnavailable): // the source's replica here has not the freeze yet
		return fmt.Errorf("%v: %w", err, trivet.ErrPending)
	case isLoss(err):
		w.log.Error("replica cannot be made", "replica", a.id, "disk", a.disk, "err", err)
		return w.report(ctx, a, meta.ReplicaFaulted, err.Error())
	}
	return err
}

// open starts a replica. One whose data is gone is reported and never made anew under its ID (H10);
// one that was only away with its disk is reported Ready once it runs.
func (w *worker) open(ctx context.Context, a action) error {
	v, ok := w.agent.cat.Local().Volume(w.volume)
	if !ok {
		return nil
	}
	err := w.agent.host.OpenReplica(ctx, w.spec(a))
	switch {
	case err == nil && a.verb == doRevive:
		return w.report(ctx, a, meta.ReplicaReady, "")
	case err == nil:
		return nil
	case isLoss(err) && v.Replica(a.id) != nil && v.Replica(a.id).State == meta.ReplicaLeaving:
		w.log.Warn("a replica that leaves its group has no data", "replica", a.id, "disk", a.disk, "err", err)
		w.lost[placed{a.disk, a.id}] = true
		return nil
	case isLoss(err):
		w.log.Error("replica lost its data and is out of service", "replica", a.id, "disk", a.disk, "err", err)
		return w.report(ctx, a, meta.ReplicaFaulted, err.Error())
	}
	return err
}

func (w *worker) destroy(ctx context.Context, a action) error {
	if err := w.agent.host.DestroyReplica(ctx, w.spec(a)); err != nil {
		return err
	}
	w.forget(a)
	return w.report(ctx, a, meta.ReplicaRemoved, "")
}

// stray looks at a replica that the local copy of the catalogue does not place here. It removes it
// only if the catalogue, read linearizably, knew the volume once and has deleted it; whatever else
// it may be, it stays, for it may be the last copy of something (H35).
func (w *worker) stray(ctx context.Context, a action) error {
	st, err := w.agent.cat.Read(ctx)
	if err != nil {
		return fmt.Errorf("look up stray replica %s of %s: %w", a.id, w.volume, err)
	}
	v, known := st.Volume(w.volume)
	if !known && st.Used(w.volume) {
		w.log.Info("removing the replica of a volume that was deleted", "replica", a.id, "disk", a.disk)
		if err := w.agent.host.DestroyReplica(ctx, w.spec(a)); err != nil {
			return err
		}
		w.forget(a)
		return nil
	}
	if known && w.knows(&v, a.id) {
		return nil // the local copy lagged
	}
	w.log.Warn("a replica on disk is not in the catalogue and is left alone", "replica", a.id, "disk", a.disk)
	w.ignored[placed{a.disk, a.id}] = true
	return nil
}

// lead does what only the leader's node may do.
func (w *worker) lead(ctx context.Context, a action) error {
	r, ok := w.agent.host.running(w.volume)
	if !ok {
		return fmt.Errorf("%s %s: replica %s does not run: %w", a.verb, w.volume, a.id, trivet.ErrNotLeader)
	}
	var c meta.Command
	switch a.verb {
	case doFence:
		if err := fence(ctx, r, a); err != nil {
			return err
		}
		c.ReportFence = &meta.ReportFence{Volume: w.volume, Epoch: a.epoch}
	case doWipe:
		if err := r.Wipe(ctx, a.epoch); err != nil {
			return err
		}
		c.ReportWiped = &meta.ReportWiped{Volume: w.volume, Epoch: a.epoch}
	case doBack:
		if err := r.Rollback(ctx, a.epoch, a.snapshot); err != nil {
			return err
		}
		c.ReportRolledBack = &meta.ReportRolledBack{Volume: w.volume, Epoch: a.epoch}
	case doLead:
		c.ReportLeader = &meta.ReportLeader{Volume: w.volume, Replica: a.id, Term: a.term}
	case doMove:
		return r.TransferTo(ctx, a.target)
	case doGrow:
		return w.grow(ctx, r, a)
	default:
		panic("node: no such action: " + string(a.verb))
	}
	_, err := propose(ctx, w.agent.cat, c)
	return err
}

func fence(ctx context.Context, r runningReplica, a action) error {
	if a.writers == (replication.Writers{}) {
		return r.Fence(ctx, a.epoch)
	}
	return r.FenceWriters(ctx, a.epoch, a.writers)
}

func (w *worker) report(ctx context.Context, a action, s meta.ReplicaState, reason string) error {
	_, err := propose(ctx, w.agent.cat, meta.Command{ReportReplica: &meta.ReportReplica{
		Volume: w.volume, Replica: a.id, State: s, Reason: reason,
	}})
	return err
}

// spec names the replica of a.
func (w *worker) spec(a action) replication.ReplicaSpec {
	return replication.ReplicaSpec{Volume: w.volume, Replica: a.id, Disk: w.agent.cfg.Disks[a.disk]}
}

func (w *worker) remember(a action) {
	w.forget(a)
	w.onDisk = append(w.onDisk, placed{a.disk, a.id})
}

func (w *worker) forget(a action) {
	var rest []placed
	for _, p := range w.onDisk {
		if p != (placed{a.disk, a.id}) {
			rest = append(rest, p)
		}
	}
	w.onDisk = rest
}
