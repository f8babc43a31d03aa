package controller

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller/meta"
	"github.com/trivet-csi/trivet/replication/raftgroup"
)

// addMember asks for a replica in the meta group.
type addMember struct {
	Node    trivet.NodeID    `json:"node"`
	Replica trivet.ReplicaID `json:"replica"`
}

func (a addMember) String() string {
	return fmt.Sprintf("add replica %s of %s to the meta group", a.Replica, a.Node)
}

func (a addMember) validate() error {
	if err := trivet.ValidateNodeID(string(a.Node)); err != nil {
		return fmt.Errorf("%s: %w", a, err)
	}
	if err := trivet.ValidateUUID(string(a.Replica)); err != nil {
		return fmt.Errorf("%s: %w", a, err)
	}
	return nil
}

// to adds the learner on the leader, and waits until it is committed.
func (a addMember) to(ctx context.Context, g *raftgroup.Group) error {
	err := g.AddLearner(ctx, raftgroup.Member{Replica: a.Replica, Node: a.Node, Learner: true})
	switch {
	case errors.Is(err, trivet.ErrExists): // on another node: it will not go away by trying again
		return fmt.Errorf("%s: %v: %w", a, err, trivet.ErrInvalid)
	case errors.Is(err, trivet.ErrPending): // another change is under way
		return fmt.Errorf("%s: %v: %w", a, err, trivet.ErrUnavailable)
	}
	return err
}

// addMember lets a node's replica into the meta group, on the leader. ErrInvalid for a node that was forgotten,
// whose process may still be somewhere and ask. One that comes between two looks is removed by nextChange.
func (c *Catalogue) addMember(ctx context.Context, g *raftgroup.Group, a addMember) error {
	if _, err := g.ReadGate(); err != nil { // or Local may be older than what was forgotten
		return err
	}
	if c.Local().Forgotten(a.Node) {
		return fmt.Errorf("%s: node was forgotten; `trivet node forget %s --allow` lets it join anew: %w", a, a.Node,
			trivet.ErrInvalid)
	}
	return a.to(ctx, g)
}

// manage looks after the members while this node leads, until ctx ends.
func (c *Catalogue) manage(ctx context.Context, g *raftgroup.Group, done chan<- struct{}) {
	defer close(done)
	tick := time.NewTicker(c.cfg.Timing.Heartbeat)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
		case <-g.Changed():
		case <-ctx.Done():
			return
		}
		if st := g.Status(); st.IsLeader {
			c.tend(ctx, g, st)
		}
	}
}

// tend makes at most one change of the configuration.
func (c *Catalogue) tend(ctx context.Context, g *raftgroup.Group, st raftgroup.Status) {
	change, ok := nextChange(c.Local(), st.Members, c.cfg.VoterMax, time.Now())
	if !ok {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, max(attemptMin, 4*c.cfg.Timing.Heartbeat))
	defer cancel()
	act := g.Promote
	if change.remove {
		act = g.Remove
	}
	err := act(ctx, change.replica)
	log := c.log.With("node", change.node, "replica", change.replica, "remove", change.remove)
	switch {
	case err == nil:
		log.Info("member of the meta group promoted or removed")
	case errors.Is(err, trivet.ErrPending), errors.Is(err, trivet.ErrNotLeader), ctx.Err() != nil:
		// It lags still, or somebody else leads now: the next round looks again.
	default:
		log.Warn("member of the meta group could not be promoted or removed", "err", err)
	}
}

// memberChange is one step towards the wanted configuration.
type memberChange struct {
	node    trivet.NodeID
	replica trivet.ReplicaID
	remove  bool // otherwise promote
}

// nextChange decides the next step; it is pure. What a forgotten node has goes first.
// A learner is promoted while there are fewer voters
// than voterMax, or in place of a voter of the same node that lost its directory (H10): the new one
// votes before the old one goes, so that the voters never get fewer (I11). Only a learner that the
// catalogue knows as the node's own, on a node that is alive, is promoted.
func nextChange(s *meta.State, members []raftgroup.Member, voterMax int, now time.Time) (memberChange, bool) {
	members = slices.Clone(members)
	slices.SortFunc(members, compareMembers)
	voters := 0
	for _, m := range members {
		if !m.Learner {
			voters++
		}
	}
	for _, m := range members { // one that voted takes no quorum with it: Remove asks whether the others have one
		if s.Forgotten(m.Node) {
			return memberChange{node: m.Node, replica: m.Replica, remove: true}, true
		}
	}
	current := func(m raftgroup.Member) bool {
		n, ok := s.Node(m.Node)
		return ok && n.MetaReplica == m.Replica
	}
	for _, m := range members {
		if current(m) {
			continue
		}
		replaced := slices.ContainsFunc(members, func(other raftgroup.Member) bool {
			return other.Node == m.Node && current(other) && (m.Learner || !other.Learner)
		})
		if replaced {
			return memberChange{node: m.Node, replica: m.Replica, remove: true}, true
		}
	}
	for _, m := range members {
		n, ok := s.Node(m.Node)
		if !m.Learner || !ok || !current(m) || !n.Alive(now) {
			continue
		}
		replaces := slices.ContainsFunc(members, func(other raftgroup.Member) bool {
			return other.Node == m.Node && !other.Learner
		})
		if voters < voterMax || replaces {
			return memberChange{node: m.Node, replica: m.Replica}, true
		}
	}
	return memberChange{}, false
}

func compareMembers(a, b raftgroup.Member) int {
	switch {
	case a.Node < b.Node:
		return -1
	case a.Node > b.Node:
		return 1
	case a.Replica < b.Replica:
		return -1
	case a.Replica > b.Replica:
		return 1
	}
	return 0
}
