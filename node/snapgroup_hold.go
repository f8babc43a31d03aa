package node

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller/meta"
	"github.com/trivet-csi/trivet/replication"
	"github.com/trivet-csi/trivet/replication/transport"
)

// groupHolds are the groups of snapshots for which writes are held on this node.
type groupHolds struct {
	mu   sync.Mutex
	held map[trivet.SnapshotGroupID]*groupHold
	shut bool // the node closes: nothing is held any more
}

// groupHold is the members of a group whose writes are held here.
type groupHold struct {
	group   trivet.SnapshotGroupID
	owner   trivet.NodeID
	attempt uint32
	members []*heldMember
	timer   *time.Timer // lets go of all members
}

// heldMember is a volume whose writes are held.
type heldMember struct {
	meta.GroupMember

	// freeze makes the snapshot, with writes held.
	freeze func(context.Context) (replication.Frozen, error)

	mu      sync.Mutex
	release func() time.Duration // nil: writes go on
}

// let ends the hold. ok: writes were held until now, without a break.
func (h *heldMember) let() (held time.Duration, ok bool) {
	h.mu.Lock()
	release := h.release
	h.release = nil
	h.mu.Unlock()
	if release == nil {
		return 0, false
	}
	return release(), true
}

func letAll(members []*heldMember) (n int) {
	for _, m := range members {
		if m == nil {
			continue
		}
		if _, ok := m.let(); ok {
			n++
		}
	}
	return n
}

// add takes h in, whose writes are held, and lets go of an earlier attempt. over is called at most once, when the time
// is over. ErrInvalid: there is one as late; ErrClosed: the node closes.
func (g *groupHolds) add(h *groupHold, limit time.Duration, over func()) error {
	g.mu.Lock()
	before := g.held[h.group]
	switch {
	case g.shut:
		g.mu.Unlock()
		return fmt.Errorf("hold writes: node closes: %w", trivet.ErrClosed)
	case before != nil && before.owner == h.owner && before.attempt >= h.attempt:
		g.mu.Unlock()
		return fmt.Errorf("hold writes, attempt %d: attempt %d is under way: %w", h.attempt, before.attempt, trivet.ErrInvalid)
	}
	if g.held == nil {
		g.held = map[trivet.SnapshotGroupID]*groupHold{}
	}
	g.held[h.group] = h
	h.timer = time.AfterFunc(limit, over)
	g.mu.Unlock()
	if before != nil {
		g.end(before)
	}
	return nil
}

// find returns what is held for an owner's attempt at a group, or nil.
func (g *groupHolds) find(group trivet.SnapshotGroupID, owner trivet.NodeID, attempt uint32) *groupHold {
	g.mu.Lock()
	defer g.mu.Unlock()
	if h := g.held[group]; h != nil && h.owner == owner && h.attempt == attempt {
		return h
	}
	return nil
}

// end lets writes go on, and returns of how many volumes they were held.
func (g *groupHolds) end(h *groupHold) int {
	g.mu.Lock()
	if g.held[h.group] == h {
		delete(g.held, h.group)
	}
	g.mu.Unlock()
	h.timer.Stop()
	return letAll(h.members)
}

// close lets all writes go on, for good.
func (g *groupHolds) close() {
	g.mu.Lock()
	g.shut = true
	var all []*groupHold
	for _, h := range g.held {
		all = append(all, h)
	}
	g.mu.Unlock()
	for _, h := range all {
		g.end(h)
	}
}

// serveGroups answers KindSnapshotBarrier.
func (m *mounts) serveGroups(n transport.Network) {
	n.Handle(transport.KindSnapshotBarrier, func(ctx context.Context, from trivet.NodeID, in transport.Message) (
		transport.Message, error,
	) {
		msg, err := decodeGroupMessage(in.Body)
		if err != nil {
			return transport.Message{}, err
		}
		frozen, err := m.takeStep(ctx, from, msg)
		if err != nil {
			return transport.Message{}, fmt.Errorf("%s for %s: %w", msg.step, msg.group, err)
		}
		return transport.Message{Body: encodeFrozen(frozen)}, nil
	})
}

func (m *mounts) takeStep(ctx context.Context, from trivet.NodeID, msg groupMessage) ([]meta.FrozenMember, error) {
	switch msg.step {
	case stepPrepare:
		return nil, m.prepareGroup(ctx, msg)
	case stepHold:
		return nil, m.holdGroup(ctx, from, msg)
	case stepFreeze:
		return m.freezeGroup(ctx, from, msg)
	default:
		m.releaseGroup(from, msg)
		return nil, nil
	}
}

// membersHere returns the members that this node has attached for writing.
func (m *mounts) membersHere(st *meta.State, g *meta.SnapshotGroup) ([]meta.GroupMember, error) {
	var out []meta.GroupMember
	for _, member := range g.Members {
		v, _ := st.Volume(member.Volume)
		held := v.GrantOf(m.attacher.node)
		if held == nil || held.ReadOnly {
			continue
		}
		if v.Epoch != member.Epoch || !v.Usable(m.attacher.node, member.Epoch) {
			return nil, fmt.Errorf("%s has epoch %d, not %d: %w", v.ID, v.Epoch, member.Epoch, trivet.ErrFenced)
		}
		out = append(out, member)
	}
	return out, nil
}

// prepareGroup writes back what the caches of a group's volumes here hold, while writes go on, once the local copy of the
// catalogue has the revision: so a hold, which follows, has to ask nobody.
func (m *mounts) prepareGroup(ctx context.Context, msg groupMessage) error {
	cat := m.attacher.cat
	for {
		changed := cat.Changed()
		if cat.Local().Revision() >= msg.revision {
			break
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return fmt.Errorf("catalogue is at revision %d here, not %d: %w", cat.Local().Revision(), msg.revision,
				trivet.ErrUnavailable)
		}
	}
	st := cat.Local()
	g, ok := st.SnapshotGroup(msg.group)
	if !ok || g.Settled() {
		return fmt.Errorf("group is not to be made: %w", trivet.ErrInvalid)
	}
	members, err := m.membersHere(st, &g)
	if err != nil {
		return err
	}
	var all errgroup.Group
	for _, member := range members {
		at := m.attacher.get(member.Volume)
		if at == nil || at.path == nil {
			if err := m.mayFreezeUnopened(member.Volume); err != nil {
				return errors.Join(err, all.Wait())
			}
			continue
		}
		all.Go(func() error { return at.path.cache.Flush(ctx) })
	}
	return all.Wait()
}

// holdGroup holds writes to a group's volumes here, so that all that was acknowledged is below, for its owner and for
// groupHoldMax at most.
func (m *mounts) holdGroup(ctx context.Context, from trivet.NodeID, msg groupMessage) error {
	st := m.attacher.cat.Local()
	g, ok := st.SnapshotGroup(msg.group)
	if !ok || g.State != meta.GroupFreezing || g.Owner != from {
		return fmt.Errorf("group is %q, owned by %q, as known here: %w", g.State, g.Owner, trivet.ErrPending)
	}
	members, err := m.membersHere(st, &g)
	if err != nil {
		return err
	}
	began := time.Now()
	h := &groupHold{group: g.ID, owner: from, attempt: msg.attempt, members: make([]*heldMember, len(members))}
	limited, cancel := context.WithTimeout(ctx, groupHoldMax)
	defer cancel()
	var all errgroup.Group
	for i, member := range members {
		all.Go(func() (err error) {
			v, _ := st.Volume(member.Volume)
			h.members[i], err = m.holdMember(limited, v.As(m.attacher.node), member)
			return err
		})
	}
	err = all.Wait()
	if err == nil {
		err = m.holds.add(h, groupHoldMax-time.Since(began), func() { m.holdIsOver(h) })
	}
	if err != nil {
		letAll(h.members)
		return err
	}
	if ctx.Err() != nil { // whoever asked has given up, and may have said so before we were ready
		m.holds.end(h)
	}
	return ctx.Err()
}

// holdIsOver lets writes go on that nobody froze in time.
func (m *mounts) holdIsOver(h *groupHold) {
	if n := m.holds.end(h); n > 0 {
		m.log.Warn("writes go on that were held for a group of snapshots: it was not frozen in time", "group", h.group,
			"volumes", n, "limit", groupHoldMax)
	}
}

// holdMember holds writes to one volume. Of one that nothing uses here, opening is held.
func (m *mounts) holdMember(ctx context.Context, v meta.Volume, member meta.GroupMember) (*heldMember, error) {
	at := m.attacher.get(v.ID)
	if at == nil || at.path == nil {
		unlock, err := m.lockUnopened(v.ID)
		if err != nil {
			return nil, err
		}
		return &heldMember{
			GroupMember: member,
			release:     func() time.Duration { unlock(); return 0 },
			freeze: func(ctx context.Context) (replication.Frozen, error) {
				return m.freezeByGroup(ctx, &v, member.Snapshot)
			},
		}, nil
	}
	if at.epoch != member.Epoch {
		return nil, fmt.Errorf("hold %s: this process has epoch %d, the group %d: %w", v.ID, at.epoch, member.Epoch,
			trivet.ErrPending)
	}
	release, err := at.path.cache.Hold(ctx)
	if err != nil {
		return nil, err
	}
	return &heldMember{
		GroupMember: member, release: release,
		freeze: func(ctx context.Context) (replication.Frozen, error) { return at.group.Freeze(ctx, member.Snapshot) },
	}, nil
}

// freezeGroup freezes the volumes that an owner has had held here, and lets writes to each go on as soon as it is
// frozen.
func (m *mounts) freezeGroup(ctx context.Context, from trivet.NodeID, msg groupMessage) ([]meta.FrozenMember, error) {
	h := m.holds.find(msg.group, from, msg.attempt)
	if h == nil {
		return nil, fmt.Errorf("writes are not held any more, or never were: %w", trivet.ErrUnavailable)
	}
	defer m.holds.end(h)
	out := make([]meta.FrozenMember, len(h.members))
	var all errgroup.Group
	for i, one := range h.members {
		all.Go(func() (err error) {
			out[i], err = m.freezeMember(ctx, one)
			return err
		})
	}
	return out, all.Wait()
}

func (m *mounts) freezeMember(ctx context.Context, one *heldMember) (meta.FrozenMember, error) {
	f, err := one.freeze(ctx)
	held, ok := one.let()
	switch {
	case err != nil:
		return meta.FrozenMember{}, err
	case !ok:
		return meta.FrozenMember{}, fmt.Errorf("writes to %s went on before it was frozen: %w", one.Volume,
			trivet.ErrUnavailable)
	}
	if held > 0 { // else nothing had the volume open
		m.holdTimes.Group.Observe(held)
	}
	m.log.Info("snapshot made in a group", "volume", one.Volume, "snapshot", one.Snapshot, "generation", f.Generation,
		"held", held)
	return meta.FrozenMember{
		Snapshot: one.Snapshot, Generation: f.Generation, SizeBytes: f.SizeBytes, Held: held,
	}, nil
}

// releaseGroup lets writes go on that an owner has had held and does not freeze. Not held is success.
func (m *mounts) releaseGroup(from trivet.NodeID, msg groupMessage) {
	if h := m.holds.find(msg.group, from, msg.attempt); h != nil {
		m.holds.end(h)
	}
}
