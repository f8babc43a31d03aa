package node

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller/meta"
	"github.com/trivet-csi/trivet/replication"
)

const (
	// scrubEveryDefault is how often everything is read: a sector that has become unreadable unnoticed must be found
	// before another copy of it is lost (hazards H22; design, section 5).
	scrubEveryDefault = 7 * 24 * time.Hour
	// scrubRateMin is the least that a replica is read a second, so that a small volume is soon done and its group rests.
	scrubRateMin = 1 << 20
	// scrubsMax is how many passes, due by the calendar, a node has under way at a time. Those that somebody has asked
	// for come on top.
	scrubsMax = 1
	// scrubLook is how often it is looked which volumes are due.
	scrubLook = time.Minute
	// scrubReport is how often the progress of a pass is recorded in the catalogue at most.
	scrubReport = time.Second
)

// watchScrubs begins passes that are due, and carries out those of which this node has the leader, until ctx ends.
func (a *Agent) watchScrubs(ctx context.Context) error {
	for {
		changed := a.cat.Changed()
		began := time.Now()
		a.carryOutScrubs(ctx)
		a.beginScrubs(ctx)
		look := time.NewTimer(scrubLook)
		rest := time.NewTimer(4 * time.Since(began)) // never more than a fifth of a core, as in dispatch
		select {
		case <-ctx.Done():
		case <-rest.C:
			select {
			case <-ctx.Done():
			case <-changed:
			case <-look.C:
			}
		}
		rest.Stop()
		look.Stop()
		if ctx.Err() != nil {
			return nil //nolint:nilerr // the end of the agent is not a failure
		}
	}
}

// beginScrubs has the catalogue begin the pass that is longest due, of a volume that this node keeps.
func (a *Agent) beginScrubs(ctx context.Context) {
	every := a.cfg.ScrubEvery
	if every <= 0 {
		return
	}
	st, now, running := a.cat.Local(), time.Now(), 0
	var next *meta.Volume
	var oldest time.Time
	for _, v := range st.Volumes() {
		if keeperOf(st, &v, now) != a.cfg.ID {
			continue
		}
		if v.Scrubbing() {
			running++
			continue
		}
		if at := dueAt(&v, every); mayScrub(&v) && !now.Before(at) && (next == nil || at.Before(oldest)) {
			next, oldest = &v, at
		}
	}
	if next == nil || running >= scrubsMax {
		return
	}
	pass := uint64(1)
	if next.Scrub != nil {
		pass = next.Scrub.Pass + 1
	}
	_, err := propose(ctx, a.cat, meta.Command{StartScrub: &meta.StartScrub{
		Volume: next.ID, Pass: pass, RateBytes: max(scrubRateMin, next.SizeBytes/int64(every/time.Second)), Time: now,
	}})
	if err != nil && ctx.Err() == nil && !errors.Is(err, trivet.ErrPending) {
		a.log.Warn("a scrub that is due was not begun", "volume", next.ID, "err", err)
	}
}

// mayScrub reports whether a pass over a volume can begin.
func mayScrub(v *meta.Volume) bool {
	switch v.Phase {
	case meta.PhaseAvailable, meta.PhaseBound, meta.PhaseReleased:
		return v.Change() == nil
	default:
		return false
	}
}

// dueAt returns when the next pass over a volume is due: counted from when the last one began.
func dueAt(v *meta.Volume, every time.Duration) time.Time {
	from := v.Created
	if v.Scrub != nil && v.Scrub.LastStarted.After(from) {
		from = v.Scrub.LastStarted
	}
	return from.Add(every)
}

// keeperOf is the node that looks after the passes over a volume: the first with a Ready replica that is alive. Two
// that see it differently for a moment do no harm, as a pass has a number.
func keeperOf(st *meta.State, v *meta.Volume, now time.Time) trivet.NodeID {
	for _, r := range v.Replicas {
		if n, ok := st.Node(r.Node); ok && r.State == meta.ReplicaReady && n.Alive(now) {
			return r.Node
		}
	}
	return ""
}

// carryOutScrubs starts the passes that are under way and have no goroutine yet. It ends with the pass, or once the
// volume is led from elsewhere.
func (a *Agent) carryOutScrubs(ctx context.Context) {
	st := a.cat.Local()
	for _, v := range st.Volumes() {
		if !v.Scrubbing() || v.ReplicaOn(a.cfg.ID) == nil {
			continue
		}
		a.mu.Lock()
		busy := a.scrubbing[v.ID]
		a.scrubbing[v.ID] = true
		a.mu.Unlock()
		if busy {
			continue
		}
		a.group.Go(func() error {
			a.scrubPass(ctx, v.ID)
			a.mu.Lock()
			defer a.mu.Unlock()
			delete(a.scrubbing, v.ID)
			return nil
		})
	}
}

// scrubPass carries out the pass over a volume while this node leads it, and waits for leadership while it does not: a
// parked group has to wake up first.
func (a *Agent) scrubPass(ctx context.Context, id trivet.VolumeID) {
	retry := retryMin
	for ctx.Err() == nil {
		changed := a.cat.Changed() // before the look, so that no change is missed
		v, ok := a.cat.Local().Volume(id)
		if !ok || !v.Scrubbing() || v.ReplicaOn(a.cfg.ID) == nil {
			return
		}
		err := a.scrubOn(ctx, &v)
		if err == nil {
			a.awaitPass(ctx, id, v.Scrub.Pass)
			return
		}
		wait := retry
		if errors.Is(err, trivet.ErrNotLeader) {
			wait = pollEvery
		} else if retry = min(2*retry, retryMax); ctx.Err() == nil {
			a.log.Warn("scrub will go on later", "volume", id, "block", v.Scrub.Next, "err", err)
		}
		select {
		case <-ctx.Done():
		case <-changed:
			sleep(ctx, retryMin) // whatever changed, it may be our own report
		case <-time.After(wait):
		}
	}
}

// awaitPass waits until the local copy of the catalogue shows that a pass is over: before, it looks as if something was
// left to do.
func (a *Agent) awaitPass(ctx context.Context, id trivet.VolumeID, pass uint64) {
	for {
		changed := a.cat.Changed()
		v, ok := a.cat.Local().Volume(id)
		if !ok || !v.Scrubbing() || v.Scrub.Pass != pass {
			return
		}
		select {
		case <-ctx.Done():
			return
		case <-changed:
		}
	}
}

func sleep(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}

// scrubOn scrubs ranges from where the pass stands until its end, or until the catalogue has another: nil, or an error.
func (a *Agent) scrubOn(ctx context.Context, v *meta.Volume) error {
	r, ok := a.host.running(v.ID)
	if !ok || !r.Status().IsLeader {
		return fmt.Errorf("scrub %s: led from elsewhere: %w", v.ID, trivet.ErrNotLeader)
	}
	p := progress{a: a, report: meta.ReportScrub{Volume: v.ID, Pass: v.Scrub.Pass, From: v.Scrub.Next}, since: time.Now()}
	p.report.Next = p.report.From
	for {
		got, err := r.ScrubRange(ctx, replication.ScrubOptions{
			From: p.report.Next, RateBytes: v.Scrub.RateBytes, Verify: v.Scrub.Verify,
		})
		if err != nil {
			return errors.Join(err, p.send(ctx))
		}
		if over, err := p.add(ctx, &got); over || err != nil {
			return err
		}
		now, ok := a.cat.Local().Volume(v.ID)
		if !ok || !now.Scrubbing() || now.Scrub.Pass != v.Scrub.Pass {
			return p.send(ctx)
		}
		v = &now
	}
}

// progress gathers what ranges had, so that small ones do not each make an entry of the catalogue.
type progress struct {
	a      *Agent
	report meta.ReportScrub
	since  time.Time // of the last report
}

func (p *progress) add(ctx context.Context, got *replication.ScrubRange) (over bool, err error) {
	r := &p.report
	r.Next, r.Done = got.Next, got.Done
	r.CheckedBytes += got.CheckedBytes
	r.Found, r.Repaired, r.Left = r.Found+got.Found, r.Repaired+got.Repaired, r.Left+got.Left
	for _, f := range got.Findings {
		if len(r.Findings) < findingsMax {
			r.Findings = append(r.Findings, f)
		}
	}
	for _, n := range got.Absent { // of any of them
		if !slices.Contains(r.Absent, n) {
			r.Absent = append(r.Absent, n)
		}
	}
	if got.Done || time.Since(p.since) >= scrubReport || got.Found > 0 {
		return got.Done, p.send(ctx)
	}
	return false, nil
}

// findingsMax is how many findings a report has at most.
const findingsMax = 32

func (p *progress) send(ctx context.Context) error {
	r := p.report
	if !r.Done && r.Next <= r.From {
		return nil
	}
	r.Time = time.Now()
	ctx, cancel := context.WithTimeout(ctx, actionTimeout)
	defer cancel()
	if _, err := propose(ctx, p.a.cat, meta.Command{ReportScrub: &r}); err != nil {
		return err
	}
	p.report = meta.ReportScrub{Volume: r.Volume, Pass: r.Pass, From: r.Next, Next: r.Next}
	p.since = time.Now()
	return nil
}

// scrubTurn is where scrubs of replicas here let the volumes that are attached here go first.
func (n *Node) scrubTurn(ctx context.Context, bytes int64) error {
	release, err := n.mounts.attacher.shared.scheduler.Background(ctx, int(bytes))
	if err != nil {
		return err
	}
	release()
	return nil
}

// Integrity returns what was checked and repaired of the replica of a volume here, and whether one runs.
func (n *Node) Integrity(id trivet.VolumeID) (replication.IntegrityStats, bool) {
	r, ok := n.host.Replica(id)
	if !ok {
		return replication.IntegrityStats{}, false
	}
	return r.Integrity(), true
}
