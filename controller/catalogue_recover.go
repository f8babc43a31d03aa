package controller

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller/meta"
	"github.com/trivet-csi/trivet/replication/raftgroup"
	"github.com/trivet-csi/trivet/replication/transport"
)

// askLogEndMax bounds how long a member may take to say where its log ends; after that it counts as lost.
const askLogEndMax = 3 * time.Second

// logEnd is what a member of the meta group says of its log.
type logEnd struct {
	Replica trivet.ReplicaID `json:"replica"`
	Term    uint64           `json:"term"`  // of the last entry before which none is damaged
	Index   uint64           `json:"index"` // of that entry
	Damaged int              `json:"damaged,omitempty"`
	Leader  trivet.NodeID    `json:"leader,omitempty"`
}

// CatalogueRecovery is what Catalogue.Recover did, or would do.
type CatalogueRecovery struct {
	Cluster  trivet.ClusterID
	Survivor Survivor
	Kept     []raftgroup.Member // that live, and become learners; the leader promotes them as ever
	Lost     []raftgroup.Member // that are given up
	Damaged  []trivet.NodeID    // of Kept, and perhaps the survivor, those that do not vote as their logs are damaged
	Dropped  uint64             // entries of the survivor's log, from the first that is damaged on

	again bool // an earlier try got as far as the group itself
}

func (r *CatalogueRecovery) detail() string {
	names := func(ms []raftgroup.Member) string {
		var out []string
		for _, m := range ms {
			out = append(out, string(m.Node))
		}
		return strings.Join(out, ", ")
	}
	dropped := ""
	if r.Dropped > 0 {
		dropped = fmt.Sprintf(", %d damaged and later ones dropped", r.Dropped)
	}
	return fmt.Sprintf("its log ends at entry %d of term %d%s; lost: %s; kept: %s", r.Survivor.Index, r.Survivor.Term,
		dropped, names(r.Lost), names(r.Kept))
}

// Warning says what may be missing of a catalogue that is recovered.
func (r *CatalogueRecovery) Warning() string {
	dropped := ""
	if r.Dropped > 0 {
		dropped = fmt.Sprintf("the last %d entries of its log are given up, as the first of them is damaged; ", r.Dropped)
	}
	return dropped + "what the lost members of the catalogue had acknowledged and had not reached this one is lost: " +
		"volumes, snapshots and attachments of their last moments. No lost node may run with what it had: give it an empty " +
		"catalogue directory before it comes back"
}

// Recover makes this node's member the only voter of the meta group, of which a majority is lost for good (H34), or
// does not vote because of damaged logs that nobody can mend. It gives the lost ones up: they must never run again with
// what they have, for together they would be a second catalogue. Members that live stay, as learners at first; of
// damaged logs, what is behind the first damaged entry does not count. Without accept it only says what it would do. It
// returns once this node leads and the audit has a record.
//
// ErrInvalid: a majority lives, another member has a newer log (the message names its node), or this node is no member;
// ErrUnavailable: a member that lives cannot say where its log ends, or ctx ended first. Again after that: it goes on.
func (c *Catalogue) Recover(ctx context.Context, accept bool) (CatalogueRecovery, error) {
	what := fmt.Sprintf("recover the catalogue on %s", c.cfg.Node)
	g := c.running()
	if g == nil {
		return CatalogueRecovery{}, fmt.Errorf("%s: it is no member of one: %w", what, trivet.ErrInvalid)
	}
	plan, err := c.planRecovery(ctx, g)
	if err != nil || !accept {
		return plan, wrapUnlessNil(what, err)
	}
	if !plan.again {
		c.log.Error("a majority of the catalogue is given up, by an operator's word", "plan", plan.detail())
		if err := c.reopenAlone(plan.Kept); err != nil {
			return plan, fmt.Errorf("%s: %w", what, err)
		}
	}
	kept := []trivet.ReplicaID{plan.Survivor.Replica}
	for _, m := range plan.Kept {
		kept = append(kept, m.Replica)
	}
	_, err = c.Propose(ctx, meta.Command{RecoverCatalogue: &meta.RecoverCatalogue{
		Node: c.cfg.Node, Kept: kept, Detail: plan.detail(),
	}})
	return plan, wrapUnlessNil(what, err)
}

func wrapUnlessNil(what string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s: %w", what, err)
}

// planRecovery asks every member where its log ends.
func (c *Catalogue) planRecovery(ctx context.Context, g *raftgroup.Group) (CatalogueRecovery, error) {
	st := g.Status()
	plan := CatalogueRecovery{Cluster: c.cfg.Cluster}
	self := raftgroup.Member{Replica: c.Replica(), Node: c.cfg.Node}
	plan.Survivor = Survivor{Replica: self.Replica, Node: self.Node, Term: st.WholeTerm, Index: st.WholeIndex}
	plan.Dropped = st.LastIndex - st.WholeIndex
	if !slices.ContainsFunc(st.Members, func(m raftgroup.Member) bool { return m.Replica == self.Replica }) {
		return plan, fmt.Errorf("it is no member of the group (%d are): %w", len(st.Members), trivet.ErrInvalid)
	}
	ends, err := c.askLogEnds(ctx, st.Members)
	if err != nil {
		return plan, err
	}
	ends[self.Replica] = logEnd{Damaged: st.Damaged}
	voters, living := 0, 0
	slices.SortFunc(st.Members, compareMembers)
	for _, m := range st.Members {
		end, lives := ends[m.Replica]
		if !m.Learner {
			voters++
			if lives && end.Damaged == 0 {
				living++
			}
		}
		if end.Damaged > 0 {
			plan.Damaged = append(plan.Damaged, m.Node)
		}
		switch {
		case m.Replica == self.Replica:
		case !lives:
			plan.Lost = append(plan.Lost, m)
		default:
			plan.Kept = append(plan.Kept, m)
			one := Survivor{Replica: m.Replica, Node: m.Node, Term: end.Term, Index: end.Index}
			if one.newer(plan.Survivor) {
				return plan, fmt.Errorf("the log of %s is newer, it ends at entry %d of term %d (here %d of %d): "+
					"recover it there: %w", m.Node, one.Index, one.Term, plan.Survivor.Index, plan.Survivor.Term, trivet.ErrInvalid)
			}
		}
	}
	plan.again = voters == 1 && st.IsLeader && c.Local().Strays(replicasOf(st.Members))
	if 2*living > voters && !plan.again {
		return plan, fmt.Errorf("%d of its %d voters live, which is a majority: nothing has to be given up: %w",
			living, voters, trivet.ErrInvalid)
	}
	return plan, nil
}

func replicasOf(ms []raftgroup.Member) []trivet.ReplicaID {
	var out []trivet.ReplicaID
	for _, m := range ms {
		out = append(out, m.Replica)
	}
	return out
}

// askLogEnds asks all other members at once. Those that cannot be reached are not in the answer.
func (c *Catalogue) askLogEnds(ctx context.Context, members []raftgroup.Member) (map[trivet.ReplicaID]logEnd, error) {
	ctx, cancel := context.WithTimeout(ctx, askLogEndMax)
	defer cancel()
	var wg sync.WaitGroup
	var mu sync.Mutex
	ends, errs := map[trivet.ReplicaID]logEnd{}, []error(nil)
	for _, m := range members {
		if m.Node == c.cfg.Node {
			continue
		}
		wg.Go(func() {
			end, err := c.askLogEnd(ctx, m.Node)
			mu.Lock()
			defer mu.Unlock()
			var remote *transport.RemoteError // it lives: one that is only starting must not be given up
			away := errors.Is(err, trivet.ErrUnavailable) || errors.Is(err, context.DeadlineExceeded)
			switch {
			case away && !errors.As(err, &remote):
				c.log.Warn("a member of the catalogue does not answer", "node", m.Node, "err", err)
			case err != nil:
				errs = append(errs, fmt.Errorf("node %s lives, but does not say where its log ends: %w", m.Node, err))
			case end.Replica == m.Replica: // else the node has a new one, and this one is lost
				ends[m.Replica] = end
			}
		})
	}
	wg.Wait()
	return ends, errors.Join(errs...)
}

func (c *Catalogue) askLogEnd(ctx context.Context, node trivet.NodeID) (end logEnd, err error) {
	m := transport.Message{Kind: transport.KindMetaRead, Group: trivet.MetaGroup, Body: request{op: opLogEnd}.encode()}
	reply, err := c.cfg.Network.Call(ctx, node, m)
	if err != nil {
		return end, err
	}
	if len(reply.Body) == 0 || reply.Body[0] != wireVersion {
		return end, fmt.Errorf("answer of %d bytes: unknown version: %w", len(reply.Body), trivet.ErrInvalid)
	}
	if err := json.Unmarshal(reply.Body[1:], &end); err != nil {
		return end, fmt.Errorf("answer of %d bytes: %w: %w", len(reply.Body), err, trivet.ErrInvalid)
	}
	return end, nil
}

// serveLogEnd answers askLogEnd, on any member.
func (c *Catalogue) serveLogEnd() (transport.Message, error) {
	g := c.running()
	if g == nil {
		return transport.Message{}, fmt.Errorf("catalogue of %s is not open: %w", c.cfg.Node, trivet.ErrUnavailable)
	}
	st := g.Status()
	b, err := json.Marshal(logEnd{
		Replica: c.Replica(), Term: st.WholeTerm, Index: st.WholeIndex, Damaged: st.Damaged, Leader: st.LeaderNode,
	})
	if err != nil {
		return transport.Message{}, err
	}
	return transport.Message{Body: append([]byte{wireVersion}, b...)}, nil
}

// reopenAlone closes the member and opens it again as the only voter, with learners.
func (c *Catalogue) reopenAlone(learners []raftgroup.Member) error {
	err := c.restart(func(cfg *raftgroup.Config) { cfg.Recover, cfg.RecoverLearners = true, learners })
	if err != nil {
		return fmt.Errorf("open it again as the only voter, restart the server and try again: %w", err)
	}
	return nil
}
