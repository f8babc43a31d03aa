package controller

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller/meta"
)

// Survivor is a replica that lives, and where its log ends.
type Survivor struct {
	Replica trivet.ReplicaID
	Node    trivet.NodeID
	Term    uint64 // of the last entry
	Index   uint64 // of the last entry
}

// newer reports whether s has the newer log, as an election of Raft would see it (Raft, section 5.4.1).
func (s Survivor) newer(than Survivor) bool {
	return s.Term > than.Term || s.Term == than.Term && s.Index > than.Index
}

// Recovery is what RecoverVolume did, or would do.
type Recovery struct {
	Volume   meta.Volume
	Survivor Survivor
	Lost     []meta.Replica // that are given up
	Since    time.Time      // when the first node of those that are down was last known to live; zero = none is down
}

// liveReplicas returns the replicas of a volume that cannot be counted on at now, and those that can: Ready, or on
// their way out, on a living node that has their disk.
func liveReplicas(s *meta.State, v *meta.Volume, now time.Time) (live, lost []meta.Replica, since time.Time) {
	for _, r := range v.Replicas {
		n, ok := s.Node(r.Node)
		there := false
		for _, d := range n.Disks {
			there = there || d.ID == r.Disk
		}
		if ok && !n.Alive(now) && (since.IsZero() || n.LeaseUntil.Before(since)) {
			since = n.LeaseUntil
		}
		if ok && n.Alive(now) && there && (r.State == meta.ReplicaReady || r.State == meta.ReplicaLeaving) {
			live = append(live, r)
		} else {
			lost = append(lost, r)
		}
	}
	return live, lost, since
}

// RecoverVolume makes the surviving replica with the newest log the only one of a volume of which a majority is lost
// for good (H34), under a new epoch, and gives all others up: they never come back. What the survivor did not have is
// lost. Without accept it only says what it would do. It returns once that is decided and written to the audit; the
// survivor's node carries it out, and the mender adds replicas again.
//
// ask returns where the log of the replica on a node ends; ErrNotFound: it does not run there.
//
// ErrInvalid: a majority lives, so that nothing has to be given up; ErrUnavailable: nothing of it lives, or a
// replica that lives could not be asked.
func (c *Controller) RecoverVolume(ctx context.Context, id trivet.VolumeID, accept bool,
	ask func(ctx context.Context, node trivet.NodeID, id trivet.VolumeID) (term, index uint64, err error),
) (Recovery, error) {
	what := fmt.Sprintf("recover %s", id)
	for {
		s, err := c.store.Read(ctx)
		if err != nil {
			return Recovery{}, fmt.Errorf("%s: %w", what, err)
		}
		v, err := lookUp(s, id)
		if err != nil {
			return Recovery{}, fmt.Errorf("%s: %w", what, err)
		}
		out := Recovery{Volume: v}
		live, lost, since := liveReplicas(s, &v, time.Now())
		switch {
		case 2*len(live) > len(v.Replicas):
			return out, fmt.Errorf("%s: %d of its %d replicas live, which is a majority: %w", what, len(live), len(v.Replicas),
				trivet.ErrInvalid)
		case len(live) == 0:
			return out, fmt.Errorf("%s: none of its %d replicas lives: %w", what, len(v.Replicas), trivet.ErrUnavailable)
		}
		out.Since, out.Lost = since, lost
		for _, r := range live {
			one := Survivor{Replica: r.ID, Node: r.Node}
			if one.Term, one.Index, err = c.askAwake(ctx, &v, r, ask); err != nil {
				return out, fmt.Errorf("%s: ask %s: %w", what, r.Node, err)
			}
			if out.Survivor.Replica == "" || one.newer(out.Survivor) {
				out.Survivor = one
			}
		}
		for _, r := range live {
			if r.ID != out.Survivor.Replica {
				out.Lost = append(out.Lost, r)
			}
		}
		if !accept {
			return out, nil
		}
		now, err := c.store.Read(ctx) // asking may have woken it
		if err != nil {
			return out, fmt.Errorf("%s: %w", what, err)
		}
		if v, err = lookUp(now, id); err != nil {
			return out, fmt.Errorf("%s: %w", what, err)
		}
		res, err := c.store.Propose(ctx, meta.Command{RecoverVolume: &meta.RecoverVolume{
			Volume: id, Replica: out.Survivor.Replica, IfRevision: v.Revision, Detail: out.detail(),
		}})
		if errors.Is(err, trivet.ErrPending) {
			continue
		}
		if err == nil && res.Volume != nil {
			out.Volume = *res.Volume
		}
		return out, err
	}
}

// askAwake asks where a replica's log ends, and wakes it first if it is parked.
func (c *Controller) askAwake(ctx context.Context, v *meta.Volume, r meta.Replica,
	ask func(context.Context, trivet.NodeID, trivet.VolumeID) (uint64, uint64, error),
) (term, index uint64, err error) {
	for woken := false; ; {
		if term, index, err = ask(ctx, r.Node, v.ID); !errors.Is(err, trivet.ErrNotFound) {
			return term, index, err
		}
		if !woken { // a volume whose leadership is wanted elsewhere is awake
			want := &meta.WantLeader{Volume: v.ID, Replica: r.ID}
			if _, err = c.store.Propose(ctx, meta.Command{WantLeader: want}); err != nil {
				return 0, 0, err
			}
			woken = true
		}
		select {
		case <-time.After(recheckEvery / 4):
		case <-ctx.Done():
			return 0, 0, fmt.Errorf("its replica does not start (%v): %w", context.Cause(ctx), trivet.ErrUnavailable)
		}
	}
}

func (r *Recovery) detail() string {
	lost := make([]string, 0, len(r.Lost))
	for _, l := range r.Lost {
		lost = append(lost, string(l.Node))
	}
	text := fmt.Sprintf("its log ends at entry %d of term %d; lost: %s", r.Survivor.Index, r.Survivor.Term,
		strings.Join(lost, ", "))
	if !r.Since.IsZero() {
		text += "; a node of them was last known to live at " + r.Since.UTC().Format(time.RFC3339)
	}
	return text
}

// Warning says what may be missing of a volume that is recovered.
func (r *Recovery) Warning() string {
	text := "what was acknowledged by the lost replicas and had not reached the survivor is lost"
	if r.Since.IsZero() {
		return text + "; none of their nodes is down, so nobody knows how old the survivor's data is"
	}
	return text + ": the group cannot have acknowledged anything without one of them, and the first of their nodes was " +
		"last known to live at " + r.Since.UTC().Format(time.RFC3339)
}
