package raftgroup

import (
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/hashicorp/raft"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/engine/segment"
	"github.com/trivet-csi/trivet/replication/transport"
)

// A log with holes (Config.MendLog).
//
// An entry that this replica has acknowledged and cannot read any more is a hole: it must not be forgotten, or a
// majority might elect somebody who never had it (H23). So a replica with holes keeps its log, term and vote as they
// are, and does not run: it votes for nobody, acknowledges, leads and serves nothing. Two things fill a hole, and then
// the library starts with a log that ends where it ended:
//
//   - the same entry of any other member: index and term name it (the Log Matching Property of Raft, section 5.3), so
//     it need not be known to be committed, and nobody has to lead. So members with holes in different places mend
//     each other, and no entry is lost while one of them can read it (Alagappan et al., Protocol-Aware Recovery for
//     Consensus-Based Storage, FAST 2018);
//   - where that was compacted away: a state that covers it (coversHoles), by way of a catch-up's hand-over.

// holes are the entries that are wanted, in order; empty for a replica that may run.
type holes struct {
	mu   sync.Mutex
	list []uint64
}

func (h *holes) all() []uint64 {
	h.mu.Lock()
	defer h.mu.Unlock()
	return slices.Clone(h.list)
}

func (h *holes) set(list []uint64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.list = list
}

func (h *holes) fill(index uint64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.list = slices.DeleteFunc(h.list, func(i uint64) bool { return i == index })
}

// cutAtHole drops the log from its first hole on, for a replica that goes on alone at the wish of an operator: what
// others could have given it is given up (Config.Recover).
func (g *Group) cutAtHole() error {
	applied, _ := g.cfg.Machine.Applied()
	_, last := g.seglog.bounds()
	at := slices.IndexFunc(g.found.holes, func(i uint64) bool { return i > applied })
	if at >= 0 {
		from := g.found.holes[at]
		if err := g.store.DeleteRange(from, last); err != nil {
			return err
		}
		g.log.Error("entries were given up: the first of them is damaged", "first", from, "last", last)
	}
	// What is left are configurations that the state machine has; the one that is to come replaces them.
	g.found.rot = append(g.found.rot, slices.DeleteFunc(g.found.holes, func(i uint64) bool { return i > applied })...)
	slices.Sort(g.found.rot)
	g.found.holes = nil
	return nil
}

// isHoley takes note of what is wanted, and reports whether anything is. What the state machine has is wanted too, as
// the log cannot be cut behind it before it is known who the members are.
func (g *Group) isHoley() bool {
	if len(g.found.holes) == 0 {
		g.holes.set(nil)
		return false
	}
	list := slices.Concat(g.found.rot, g.found.holes)
	slices.Sort(list)
	g.holes.set(list)
	return true
}

// mendLoop fills the holes, and then starts the library. REQUIRES: catch.active.
func (g *Group) mendLoop() {
	want := g.holes.all()
	g.log.Error("entries of the log are damaged: the replica takes no part until it has them from other members",
		"first", want[0], "entries", len(want), "err", g.found.first)
	for failed := 0; ; failed++ {
		err := g.mendRound()
		if err == nil {
			break
		}
		if g.life.Err() != nil || g.guard.failed() != nil {
			return
		}
		if failed&(failed-1) == 0 { // the first, and then ever more rarely
			g.log.Warn("damaged entries of the log are still missing", "entries", len(g.holes.all()), "err", err)
		}
		if !g.restFor(min(g.cfg.Timing.Heartbeat/4<<min(failed, 8), roundWaitMax)) {
			return
		}
	}
	g.log.Warn("the log is mended: the replica takes part again", "entries", len(want))
	g.resume()
}

// restFor waits, or until a leader makes contact; false when the group closes.
func (g *Group) restFor(d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-g.catch.wake:
	case <-g.life.Done():
		return false
	}
	return true
}

// mendRound asks every other member once. nil: the log is whole.
func (g *Group) mendRound() error {
	g.catch.mu.Lock()
	leader := g.catch.leader
	g.catch.mu.Unlock()
	from := g.sources(leader, leader != "")
	errs := []error{errNobody}
	for _, a := range from {
		errs = append(errs, g.askEntries(a))
	}
	if len(g.holes.all()) == 0 {
		return g.checkMended()
	}
	for _, a := range from {
		_, err := g.round(a, g.cfg.Machine.Want())
		if err == nil {
			return g.checkMended()
		}
		errs = append(errs, err)
		if g.guard.failed() != nil {
			break
		}
	}
	return errors.Join(errs...)
}

var errNobody = errors.New("no other member has all of them")

// askEntries fills what it can from one member.
func (g *Group) askEntries(from raft.ServerAddress) error {
	for _, index := range g.holes.all() {
		term, typ, err := g.seglog.TermType(index)
		if err != nil {
			return err
		}
		b, err := g.send(g.life, from, transport.KindLogEntry, entryAsk{index: index, term: term}.encode(),
			g.cfg.Timing.Heartbeat)
		if err != nil {
			return fmt.Errorf("ask %s for entry %d: %w", from, index, err)
		}
		e, err := decodeEntryReply(b)
		if err == nil && e != nil {
			if e.Index != index || e.Term != term || byte(e.Type) != typ {
				err = fmt.Errorf("got entry %d of term %d, type %d, asked for %d of %d, type %d: %w", e.Index, e.Term, e.Type,
					index, term, typ, trivet.ErrInvalid)
			} else {
				err = g.mendEntry(e)
			}
		}
		if err != nil {
			return fmt.Errorf("entry %d of %s: %w", index, from, err)
		}
		if e != nil {
			g.log.Info("damaged entry of the log was mended", "index", index, "term", term, "from", string(from))
			g.holes.fill(index)
		}
	}
	return nil
}

// mendEntry puts one entry back. A copy that does not fit, or finds no room, is refused; all else is fatal.
func (g *Group) mendEntry(e *raft.Log) error {
	var refused error
	err := g.guard.run("mend entry", func() error {
		err := g.seglog.mend(e)
		if errors.Is(err, trivet.ErrInvalid) || errors.Is(err, trivet.ErrNoSpace) {
			refused, err = err, nil
		}
		return err
	})
	return errors.Join(err, refused)
}

// checkMended reads the whole log again, and what depends on it, before the library may start.
func (g *Group) checkMended() error {
	rec := g.snaps.record()
	applied, _ := g.cfg.Machine.Applied()
	found, err := g.seglog.verify(applied, rec.config.index)
	if err != nil {
		return err
	}
	if g.found = found; len(found.holes)+len(found.rot) > 0 {
		g.found.holes, g.found.rot = slices.Concat(found.holes, found.rot), nil
		g.isHoley()
		return found.first
	}
	g.holes.set(nil)
	if err := g.store.loadConfigs(rec.config); err != nil {
		return err
	}
	g.fsm.setConfig(g.store.configAt(max(applied, rec.index)))
	g.fsm.setMixed(false)
	return nil
}

// coversHoles returns ErrInvalid for an image that leaves a hole open, and would be pulled in vain. One at or behind
// the last hole closes them all: either this log has its entry, and goes on behind it, or it has another one in its
// place, and nothing from there on was ever committed. One further back does that only in the second case.
func (g *Group) coversHoles(rec snapshotRecord) error {
	want := g.holes.all()
	if len(want) == 0 || rec.index >= want[len(want)-1] {
		return nil
	}
	if term, ok := g.seglog.term(rec.index); ok && term != rec.term {
		return nil
	}
	return fmt.Errorf("it ends at entry %d, entry %d is damaged here: %w", rec.index, want[len(want)-1], trivet.ErrInvalid)
}

// onEntry answers a member that wants an entry of the log. It must be the very one, by its term.
func (g *Group) onEntry(body []byte) ([]byte, error) {
	ask, err := decodeEntryAsk(body)
	if err != nil {
		return nil, err
	}
	if term, ok := g.seglog.term(ask.index); !ok || term != ask.term || slices.Contains(g.holes.all(), ask.index) {
		return encodeEntryReply(nil)
	}
	var e raft.Log
	err = g.seglog.read(ask.index, &e)
	switch {
	case errors.Is(err, raft.ErrLogNotFound): // cut meanwhile
		return encodeEntryReply(nil)
	case errors.Is(err, trivet.ErrClosed):
		return nil, fmt.Errorf("log is closed: %w", trivet.ErrUnavailable)
	case err != nil:
		g.store.met(err)
		return nil, fmt.Errorf("%v: %w", err, trivet.ErrUnavailable)
	case e.Term != ask.term:
		return encodeEntryReply(nil)
	}
	return encodeEntryReply(&e)
}

// met takes note of an entry that cannot be read.
func (s *logStore) met(err error) {
	if errors.Is(err, trivet.ErrCorrupt) && !errors.Is(err, segment.ErrMemory) { // memory is the whole process's
		s.guard.damaged(err)
	} else {
		s.guard.fail(err)
	}
}

// entryAsk names an entry.
type entryAsk struct{ index, term uint64 }

func (a entryAsk) encode() []byte { return sealBody(put64([]byte{wireVersion}, a.index, a.term)) }

func decodeEntryAsk(body []byte) (entryAsk, error) {
	d, err := openBody("ask for an entry", body)
	if err != nil {
		return entryAsk{}, err
	}
	a := entryAsk{index: d.u64(), term: d.u64()}
	return a, d.finish("ask for an entry")
}

// encodeEntryReply: has u8, then of an entry index u64, term u64, type u8, length u32, data. nil: it is not there.
func encodeEntryReply(e *raft.Log) ([]byte, error) {
	if e == nil {
		return sealBody([]byte{wireVersion, 0}), nil
	}
	if err := checkEntry(e); err != nil {
		return nil, err
	}
	b := put64(append(make([]byte, 0, 64+len(e.Data)), wireVersion, 1), e.Index, e.Term)
	b = put32(append(b, byte(e.Type)), uint32(len(e.Data)))
	return sealBody(append(b, e.Data...)), nil
}

// decodeEntryReply returns nil when the entry is not there. Its data share the memory of body.
func decodeEntryReply(body []byte) (*raft.Log, error) {
	d, err := openBody("entry", body)
	if err != nil {
		return nil, err
	}
	switch d.u8() {
	case 0:
		return nil, d.finish("entry")
	case 1:
	default:
		return nil, fmt.Errorf("entry: unknown answer: %w", trivet.ErrInvalid)
	}
	e := &raft.Log{Index: d.u64(), Term: d.u64(), Type: raft.LogType(d.u8())}
	e.Data = d.bytes(int(d.u32()))
	if err := d.finish("entry"); err != nil {
		return nil, err
	}
	return e, checkEntry(e)
}
