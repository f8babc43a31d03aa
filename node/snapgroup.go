package node

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller/meta"
	"github.com/trivet-csi/trivet/replication/transport"
)

// How a group of snapshots is made at one point (decision 0033). One node, the coordinator, and each that has a member
// attached for writing, a holder:
//
//	coordinator                      holders
//	wait for the members that nobody may write: their leaders' agents make them
//	Prepare ───────────────────────► write the caches back, while writes go on
//	BeginSnapshotGroup ► catalogue   from here on there is one attempt
//	Prepare ───────────────────────► know of that; write back what came meanwhile
//	Hold ──────────────────────────► hold writes, write back the rest
//	        all hold
//	Freeze ────────────────────────► freeze, and let writes go on at once
//	ReportSnapshotGroup ► catalogue  refused if a volume has changed hands
//
// Whoever froze may let go before the others have frozen: a write that it acknowledges then cannot come before one in
// another member's snapshot, since writes to that one are held until it is frozen.
const (
	// groupHoldMax bounds how long a holder holds writes: then it lets go by itself, and the group fails.
	groupHoldMax = 5 * time.Second
	// groupMakeMax bounds all of it; then the group fails.
	groupMakeMax = 30 * time.Second
	// groupHoldsMax is how often writes are held for a group, each time until a holder fails to.
	groupHoldsMax = 3
	// groupPrepareQuick is a Prepare after which little can be left to write back with writes held; at most
	// groupPreparesMax are tried for that, since a cache may fill as fast as it is written back.
	groupPrepareQuick = 20 * time.Millisecond
	groupPreparesMax  = 3
	// groupLookEvery is how often is looked whether a coordinator has died: nothing in the catalogue changes by that.
	groupLookEvery = time.Second
)

// makeGroups makes groups of snapshots whose coordinator this node is, until ctx ends.
func (m *mounts) makeGroups(ctx context.Context) {
	var running sync.WaitGroup
	defer running.Wait()
	busy := newGroupSet()
	for {
		changed := m.attacher.cat.Changed()
		st := m.attacher.cat.Local()
		groups := st.UnsettledGroups()
		for i := range groups {
			id := groups[i].ID
			if coordinatorOf(st, &groups[i], time.Now()) != m.attacher.node || !busy.add(id) {
				continue
			}
			running.Go(func() {
				m.makeGroup(ctx, id)
				busy.remove(id)
			})
		}
		var look <-chan time.Time
		if len(groups) > 0 {
			look = time.After(groupLookEvery)
		}
		select {
		case <-ctx.Done():
			return
		case <-changed:
		case <-busy.freed:
		case <-look:
		}
	}
}

// groupSet is the groups that are being made here.
type groupSet struct {
	freed chan struct{} // capacity 1: one was removed

	mu sync.Mutex
	in map[trivet.SnapshotGroupID]bool
}

func newGroupSet() *groupSet {
	return &groupSet{freed: make(chan struct{}, 1), in: map[trivet.SnapshotGroupID]bool{}}
}

func (s *groupSet) add(id trivet.SnapshotGroupID) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.in[id] {
		return false
	}
	s.in[id] = true
	return true
}

func (s *groupSet) remove(id trivet.SnapshotGroupID) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.in, id)
	select {
	case s.freed <- struct{}{}:
	default:
	}
}

// coordinatorOf returns the node that makes a group: of those that hold a member for writing, and then of all, the first
// that is alive. Two nodes may differ on that for a moment; BeginSnapshotGroup lets one of them go on. "" = none.
func coordinatorOf(st *meta.State, g *meta.SnapshotGroup, now time.Time) trivet.NodeID {
	if ownerLives(st, g, now) {
		return g.Owner
	}
	var nodes []trivet.NodeID
	for _, m := range g.Members {
		v, _ := st.Volume(m.Volume)
		for _, w := range v.Writers() {
			nodes = append(nodes, w.Node)
		}
	}
	for _, n := range st.Nodes() {
		nodes = append(nodes, n.ID)
	}
	for _, id := range nodes {
		if n, ok := st.Node(id); ok && n.Alive(now) {
			return id
		}
	}
	return ""
}

// ownerLives reports whether the process that has begun to freeze a group is there.
func ownerLives(st *meta.State, g *meta.SnapshotGroup, now time.Time) bool {
	owner, ok := st.Node(g.Owner)
	return ok && owner.Incarnation == g.OwnerIncarnation && owner.Alive(now)
}

// makeGroup makes a group, once, and reports what became of it, until the catalogue knows.
func (m *mounts) makeGroup(ctx context.Context, id trivet.SnapshotGroupID) {
	report := m.tryGroup(ctx, id)
	for retry := freezeRetryMin; report != nil && ctx.Err() == nil; retry = min(2*retry, freezeRetryMax) {
		res, err := propose(ctx, m.attacher.cat, meta.Command{ReportSnapshotGroup: report})
		switch {
		case errors.Is(err, trivet.ErrInvalid): // it is another's by now, or a mistake of ours that no retry cures
			m.log.Error("a group of snapshots is not made", "group", id, "err", err)
			return
		case err == nil:
			if g := res.Group; g != nil {
				m.log.Info("snapshot group", "group", id, "name", g.Name, "state", g.State, "reason", g.Reason, "held", g.Held)
			}
			return
		}
		m.log.Warn("a group of snapshots is not reported yet", "group", id, "err", err)
		select {
		case <-ctx.Done():
		case <-time.After(retry):
		}
	}
}

// tryGroup makes a group and returns what is to be reported; nil: nothing, it is not for this node to make, or ctx is over.
func (m *mounts) tryGroup(life context.Context, id trivet.SnapshotGroupID) *meta.ReportSnapshotGroup {
	ctx, cancel := context.WithTimeout(life, groupMakeMax)
	defer cancel()
	c := &groupMaking{mounts: m, id: id}
	frozen, err := c.make(ctx)
	report := &meta.ReportSnapshotGroup{
		Group: id, Node: m.attacher.node, Incarnation: m.attacher.process, State: meta.GroupReady, Frozen: frozen,
	}
	switch {
	case life.Err() != nil || errors.Is(err, errNotOurGroup):
		return nil
	case err != nil:
		text := err.Error()
		report.State, report.Frozen, report.Reason = meta.GroupFailed, nil, text[:min(len(text), groupReasonMax)]
	}
	return report
}

// errNotOurGroup says that another node makes a group, or that nobody has to any more.
var errNotOurGroup = errors.New("group is not for this node to make")

// groupReasonMax bounds the reason that is reported, in bytes; the catalogue takes as much.
const groupReasonMax = 1024

// groupMaking is one making of a group on its coordinator.
type groupMaking struct {
	*mounts

	id      trivet.SnapshotGroupID
	holders []trivet.NodeID // that have members attached for writing
}

// make does all of it, and returns the members that were frozen behind the barrier.
func (c *groupMaking) make(ctx context.Context) ([]meta.FrozenMember, error) {
	if err := c.awaitUnheld(ctx); err != nil {
		return nil, err
	}
	var revision meta.Revision
	if err := c.retry(ctx, func() error { return c.prepare(ctx, c.attacher.cat.Local().Revision()) }); err != nil {
		return nil, err
	}
	if err := c.retry(ctx, func() (err error) { revision, err = c.begin(ctx); return err }); err != nil {
		return nil, err
	}
	for n := uint32(1); ; n++ {
		err := c.hold(ctx, n, revision)
		if err == nil {
			return c.freeze(ctx, n)
		}
		c.letGo(ctx, n)
		if n == groupHoldsMax || ctx.Err() != nil {
			return nil, err
		}
		c.log.Warn("writes are not held for a group of snapshots yet", "group", c.id, "err", err)
	}
}

// retry calls f until it returns nil, an error that is final or none of ours, or ctx ends.
func (c *groupMaking) retry(ctx context.Context, f func() error) error {
	for wait := freezeRetryMin; ; wait = min(2*wait, freezeRetryMax) {
		err := f()
		if err == nil || errors.Is(err, errNotOurGroup) || errors.As(err, new(finalError)) {
			return err
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(wait):
		}
	}
}

// awaitUnheld waits until all members are made that nobody may write, and notes who holds the others.
func (c *groupMaking) awaitUnheld(ctx context.Context) error {
	if err := c.retry(ctx, func() error {
		_, err := c.attacher.cat.Read(ctx) // so that the local copy knows what was so before
		return err
	}); err != nil {
		return err
	}
	for {
		changed := c.attacher.cat.Changed()
		waits, err := c.look(c.attacher.cat.Local())
		if err != nil || waits == 0 {
			return err
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return fmt.Errorf("%s is not made in time (has its volume's group a quorum?): %w", waits, trivet.ErrUnavailable)
		}
	}
}

// look returns a member that nobody may write and that is not made yet; 0: there is none, and the holders are known.
// Its errors are final.
func (c *groupMaking) look(st *meta.State) (waits trivet.SnapshotID, err error) {
	g, ok := st.SnapshotGroup(c.id)
	switch {
	case !ok || g.Settled():
		return 0, errNotOurGroup
	case g.State == meta.GroupFreezing && ownerLives(st, &g, time.Now()) && g.OwnerIncarnation != c.attacher.process:
		return 0, errNotOurGroup
	case g.State == meta.GroupFreezing:
		// It, or an attempt of ours to begin of which we have not heard, may have frozen some.
		return 0, finalError{fmt.Errorf("node %s began to freeze it, and did not end: %w", g.Owner, trivet.ErrUnavailable)}
	}
	c.holders = nil
	for _, m := range g.Members {
		v, _ := st.Volume(m.Volume)
		writers := v.Writers()
		switch s, _ := st.Snapshot(m.Snapshot); {
		case v.Epoch != m.Epoch:
			return 0, finalError{fmt.Errorf("%s was attached, detached or opened anew meanwhile: %w", m.Volume,
				trivet.ErrPending)}
		case len(writers) > 1:
			return 0, finalError{fmt.Errorf("%s has %d writers; groups of such volumes are not made: %w", m.Volume,
				len(writers), trivet.ErrInvalid)}
		case len(writers) == 1 && !slices.Contains(c.holders, writers[0].Node):
			c.holders = append(c.holders, writers[0].Node)
		case len(writers) == 0 && s.State == meta.SnapshotCreating:
			waits = m.Snapshot
		}
	}
	return waits, nil
}

// begin makes this process the owner of the group, and returns the revision that says so.
func (c *groupMaking) begin(ctx context.Context) (meta.Revision, error) {
	res, err := propose(ctx, c.attacher.cat, meta.Command{BeginSnapshotGroup: &meta.BeginSnapshotGroup{
		Group: c.id, Node: c.attacher.node, Incarnation: c.attacher.process,
	}})
	switch {
	case errors.Is(err, trivet.ErrInUse):
		return 0, errNotOurGroup
	case err != nil:
		return 0, err
	case res.Group == nil || res.Group.Settled():
		return 0, errNotOurGroup // it was deleted, or failed because a volume has changed hands
	}
	return res.Revision, nil
}

// prepare has all holders write their caches back, once they know of the catalogue's revision.
func (c *groupMaking) prepare(ctx context.Context, revision meta.Revision) error {
	err := c.all(ctx, func(ctx context.Context, node trivet.NodeID) error {
		_, err := c.ask(ctx, node, groupMessage{step: stepPrepare, group: c.id, revision: revision})
		return err
	})
	if err == nil {
		return nil
	}
	if g, ok := c.attacher.cat.Local().SnapshotGroup(c.id); ok && g.State == meta.GroupCreating {
		if _, over := c.look(c.attacher.cat.Local()); over != nil {
			return over
		}
	} else if !ok || g.Settled() {
		return errNotOurGroup
	}
	return err
}

// hold has all holders hold writes, when little is left to be written back.
func (c *groupMaking) hold(ctx context.Context, attempt uint32, revision meta.Revision) error {
	for range groupPreparesMax {
		began := time.Now()
		if err := c.prepare(ctx, revision); err != nil {
			return err
		}
		if time.Since(began) < groupPrepareQuick {
			break
		}
	}
	ctx, cancel := context.WithTimeout(ctx, groupHoldMax)
	defer cancel()
	return c.all(ctx, func(ctx context.Context, node trivet.NodeID) error {
		_, err := c.ask(ctx, node, groupMessage{step: stepHold, group: c.id, attempt: attempt})
		return err
	})
}

// freeze has all holders freeze. REQUIRES: all hold writes, at that attempt. Called once: a member that was frozen
// keeps its point, so that after a failure the group cannot be made any more.
func (c *groupMaking) freeze(ctx context.Context, attempt uint32) ([]meta.FrozenMember, error) {
	ctx, cancel := context.WithTimeout(ctx, groupHoldMax)
	defer cancel()
	var mu sync.Mutex
	var out []meta.FrozenMember
	err := c.all(ctx, func(ctx context.Context, node trivet.NodeID) error {
		frozen, err := c.ask(ctx, node, groupMessage{step: stepFreeze, group: c.id, attempt: attempt})
		mu.Lock()
		defer mu.Unlock()
		out = append(out, frozen...)
		return err
	})
	if err != nil {
		c.letGo(ctx, attempt)
		return nil, err
	}
	slices.SortFunc(out, func(a, b meta.FrozenMember) int { return cmp.Compare(a.Snapshot, b.Snapshot) })
	return out, nil
}

// letGo tells all holders that writes may go on. One that does not hear it lets go by itself, in time.
func (c *groupMaking) letGo(ctx context.Context, attempt uint32) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
	defer cancel()
	_ = c.all(ctx, func(ctx context.Context, node trivet.NodeID) error {
		if _, err := c.ask(ctx, node, groupMessage{step: stepRelease, group: c.id, attempt: attempt}); err != nil {
			c.log.Warn("a holder was not told to let writes go on", "group", c.id, "node", node, "err", err)
		}
		return nil
	})
}

// all calls f for each holder at once. The first error ends the others.
func (c *groupMaking) all(ctx context.Context, f func(context.Context, trivet.NodeID) error) error {
	g, ctx := errgroup.WithContext(ctx)
	for _, node := range c.holders {
		g.Go(func() error {
			if err := f(ctx, node); err != nil {
				return fmt.Errorf("node %s: %w", node, err)
			}
			return nil
		})
	}
	return g.Wait()
}

func (c *groupMaking) ask(ctx context.Context, node trivet.NodeID, msg groupMessage) ([]meta.FrozenMember, error) {
	reply, err := c.attacher.network.Call(ctx, node, transport.Message{
		Kind: transport.KindSnapshotBarrier, Body: msg.encode(),
	})
	if err != nil {
		return nil, err
	}
	return decodeFrozen(reply.Body)
}
