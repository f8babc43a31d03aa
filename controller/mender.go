package controller

import (
	"context"
	"errors"
	"log/slog"
	"time"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller/meta"
)

const (
	// mendEvery is how often a mender looks without being told of a change: leases run out silently.
	mendEvery = 3 * time.Second

	// mendPause gathers changes, so that each of a hundred reports is not a reason to look at every volume.
	mendPause = 200 * time.Millisecond

	// mendTimeout bounds one proposal. What got no answer is decided anew.
	mendTimeout = 10 * time.Second
)

// Mender keeps volumes at the number of replicas that is wanted, on nodes that are alive and not draining.
// It decides (mend.go) and writes into the catalogue; the agents do. There is one on every node, and the one
// where the meta group leads works: should two believe that for a moment, each of their commands names the
// revision that it was decided on, and one of two is refused.
type Mender struct {
	store Store
	node  trivet.NodeID
	set   mendSettings
	log   *slog.Logger
}

// NewMender returns the mender of a node. A node that is dead, or a disk that is away, for replaceAfter has
// its replicas replaced, and a new replica that makes no progress for as long is given up; 0 =
// DefaultReplaceAfter. A nil log discards.
func NewMender(store Store, node trivet.NodeID, replaceAfter time.Duration, log *slog.Logger) *Mender {
	if replaceAfter == 0 {
		replaceAfter = DefaultReplaceAfter
	}
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	return &Mender{store: store, node: node, set: defaultMendSettings(replaceAfter), log: log}
}

func defaultMendSettings(replaceAfter time.Duration) mendSettings {
	return mendSettings{
		replaceAfter: replaceAfter, perNode: fillsPerNode, perCluster: fillsPerCluster,
		newID: func() trivet.ReplicaID { return trivet.ReplicaID(trivet.NewUUID()) },
	}
}

// Run works until ctx ends. REQUIRES: called once.
func (m *Mender) Run(ctx context.Context) {
	tick := time.NewTicker(mendEvery)
	defer tick.Stop()
	var h *history // nil while another node leads
	var since meta.Revision
	for {
		changed := m.store.Changed()
		switch {
		case m.store.Leader() != m.node:
			h = nil
		case h == nil:
			h = newHistory(time.Now())
			fallthrough
		default:
			since = m.round(ctx, h, since)
		}
		select {
		case <-changed:
			select {
			case <-time.After(mendPause):
			case <-ctx.Done():
			}
		case <-tick.C:
		case <-ctx.Done():
		}
		if ctx.Err() != nil {
			return
		}
	}
}

// round decides once and proposes what was decided. It returns the revision that the local copy must have
// reached before the next decision: one that has not heard of the last commands would count too few fills.
func (m *Mender) round(ctx context.Context, h *history, since meta.Revision) meta.Revision {
	s, now := m.store.Local(), time.Now()
	if s.Revision() < since {
		return since
	}
	h.observe(s, now)
	for _, c := range mend(s, h, m.set, now).commands {
		res, err := m.propose(ctx, c)
		switch {
		case err == nil:
			m.log.Info("a volume's replicas or leader change", "command", c.Op())
			m.note(s, h, c, now)
			since = max(since, res.Revision)
		case errors.Is(err, trivet.ErrUnavailable), errors.Is(err, trivet.ErrClosed):
			return since // not the leader any more, or no quorum
		default:
			m.log.Debug("decided anew: it has changed meanwhile", "command", c.Op(), "err", err)
		}
	}
	return since
}

// note remembers on which node a replica was begun or given up: it is not the first to be tried next.
func (m *Mender) note(s *meta.State, h *history, c meta.Command, now time.Time) {
	if add := c.AddReplica; add != nil {
		h.tried[attempt{add.Volume, add.Replica.Node}] = now
		return
	}
	if c.RemoveReplica == nil {
		return
	}
	v, ok := s.Volume(c.RemoveReplica.Volume)
	if !ok {
		return
	}
	r := v.Replica(c.RemoveReplica.Replica)
	if r != nil && (r.State == meta.ReplicaJoining || r.State == meta.ReplicaFilling) {
		h.tried[attempt{v.ID, r.Node}] = now
		step := h.fills[r.ID]
		m.log.Warn("a replica that was to be filled is given up", "volume", v.ID, "replica", r.ID, "on", r.Node,
			"state", r.State, "since", step.since)
	}
}

func (m *Mender) propose(ctx context.Context, c meta.Command) (meta.Result, error) {
	ctx, cancel := context.WithTimeout(ctx, mendTimeout)
	defer cancel()
	return m.store.Propose(ctx, c)
}
