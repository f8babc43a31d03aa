package raftgroup

import (
	"fmt"
	"slices"

	"github.com/hashicorp/raft"

	"github.com/trivet-csi/trivet"
)

// recoverAlone makes this replica the only voter of its group, before the library starts: for a group whose majority
// is lost for good, at the wish of an operator and never by itself (H34). It appends a configuration to the log, in
// a term of its own, as the newest entry; the library takes the newest configuration in the log for the one in force
// (raft api.go: NewRaft), so the replica elects itself and commits all that its log has, what no majority ever
// acknowledged included. What the others had and it had not is lost.
//
// Config.RecoverLearners stay as learners: they have no entry that this log has not, but for such as were never
// committed (the election restriction of Raft, section 5.4.1), so they are filled as any.
//
// It is raft.RecoverCluster without the snapshot that makes, which would have to copy the state (D-row "catch-up
// outside Raft"). Again: no effect. ErrUnavailable: a catch-up was interrupted, and the state is not whole.
func (g *Group) recoverAlone(owing bool) error {
	self := Member{Replica: g.cfg.Replica, Node: g.cfg.Network.net.Local()}
	if owing {
		return fmt.Errorf("recover %s as the only voter: its state is not whole: %w", self.Replica, trivet.ErrUnavailable)
	}
	want := []Member{self}
	for _, m := range g.cfg.RecoverLearners {
		m.Learner = true
		want = append(want, m)
	}
	if slices.Equal(sortedMembers(g.store.latestConfig().members), sortedMembers(want)) {
		return nil
	}
	_, last := g.seglog.bounds()
	index, term := max(last, g.snaps.record().index)+1, g.stable.record().term+1
	if err := g.stable.setTerm(term); err != nil { // first: an entry is never ahead of the term
		return err
	}
	entry := &raft.Log{
		Index: index, Term: term, Type: raft.LogConfiguration,
		Data: raft.EncodeConfiguration(toConfiguration(want)),
	}
	if err := g.store.StoreLogs([]*raft.Log{entry}); err != nil {
		return fmt.Errorf("recover %s as the only voter: %w", self.Replica, err)
	}
	g.log.Error(
		"a majority of the group was given up: this replica is its only voter now, and what it did not have is lost",
		"index", index, "term", term, "learners", len(want)-1)
	return nil
}
