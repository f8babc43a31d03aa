package replication

import (
	"context"
	"fmt"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/replication/raftgroup"
)

// Member returns what the newest configuration of the group says of a replica; false when it is no member.
// A configuration that is not committed yet counts: whether it is, AddLearner, Promote and Remove tell,
// which return once it is.
func (s ReplicaStatus) Member(id trivet.ReplicaID) (raftgroup.Member, bool) {
	for _, m := range s.Members {
		if m.Replica == id {
			return m, true
		}
	}
	return raftgroup.Member{}, false
}

// CaughtUp reports, on the leader, whether a follower or learner is known to have all that is committed.
// It says nothing of a replica that does not lead, nor whether the other still runs.
func (s ReplicaStatus) CaughtUp(id trivet.ReplicaID) bool {
	return s.IsLeader && s.Commit > 0 && (id == s.Leader || s.Match[id] >= s.Commit)
}

// AddLearner adds a replica to the group that gets the log and has no vote; it was made by CreateReplica
// without Members. A member already is success. ErrNotLeader: ask the leader; ErrPending: another change is
// under way; ErrExists: that replica is a member on another node; ErrUnavailable: outcome unknown, ask again.
func (r *Replica) AddLearner(ctx context.Context, m raftgroup.Member) error {
	if err := r.group.AddLearner(ctx, m); err != nil {
		return fmt.Errorf("grow %s: %w", r.spec.Volume, err)
	}
	return nil
}

// Promote gives a learner its vote; a voter is success. ErrPending, and nothing was done, while the learner
// lacks entries that were committed at the call, is silent, is still being filled (such a one does not answer), or
// while its blocks are compared with the leader's, which takes as long as reading both, goes on after the call, and is
// begun by it (I14). ErrCorrupt: it differs from the leader, or cannot read its blocks: it gets no vote, ever;
// remove it. ErrNotFound: it is no member; ErrNotLeader: ask the leader; ErrUnavailable: outcome unknown.
func (r *Replica) Promote(ctx context.Context, id trivet.ReplicaID) error {
	err := r.group.CaughtUp(ctx, id)
	if err == nil {
		st := r.group.Status()
		if m, ok := (ReplicaStatus{Status: st}).Member(id); ok && m.Learner && st.IsLeader {
			err = r.verify(ctx, m, st.Term)
		}
	}
	if err == nil {
		err = r.group.Promote(ctx, id)
	}
	if err != nil {
		return fmt.Errorf("grow %s: %w", r.spec.Volume, err)
	}
	return nil
}

// Remove takes a replica out of the group, learner or voter; no member is success. It may be this one, which
// then leads no more. ErrInvalid: it is the last voter. ErrUnavailable: those that would remain have no
// quorum that answers (I11), or the outcome is unknown: ask again. ErrNotLeader: ask the leader. The data of
// the removed replica stays where it is, and what it still says is refused by the others (H37).
func (r *Replica) Remove(ctx context.Context, id trivet.ReplicaID) error {
	if err := r.group.Remove(ctx, id); err != nil {
		return fmt.Errorf("shrink %s: %w", r.spec.Volume, err)
	}
	return nil
}
