package raftgroup

import (
	"errors"
	"fmt"

	"github.com/hashicorp/raft"
)

const (
	// trailingMin is the least number of entries that stay in the log behind a snapshot.
	trailingMin = 64
	// lagFactor times SnapshotBytes of log are kept at most behind a snapshot, for followers that lag.
	lagFactor = 3
	// heldFactor times as much are kept at most for those that pull an image, and mean to go on from there:
	// 1 GiB by default. What then is too much costs them another round, which brings only what has changed
	// since.
	heldFactor = 16
	// restEntries and restBytes are how much of the log a replica keeps at most that is going to rest. Who lags by more
	// pulls what has changed.
	restEntries = 16
	restBytes   = 64 << 10
)

// appliedShare of SnapshotBytes are read at the most at a start for nothing.
const appliedShare = 8

// appendedShare of SnapshotBytes is appended before the compactor is woken to look whether it is enough.
const appendedShare = 64

// appended is called after each append to the log.
func (g *Group) appended() {
	if now := g.store.appendedBytes(); now-g.compactSeen.Load() >= g.cfg.SnapshotBytes/appendedShare {
		g.compactSeen.Store(now)
		g.pokeCompact()
	}
	if i := g.running(); i != nil {
		i.t.rests.wake()
	}
}

func (g *Group) pokeCompact() {
	select {
	case g.wakeCompact <- struct{}{}:
	default:
	}
}

// compact records a snapshot and cuts the log whenever enough was written. The library's own
// trigger counts entries, and entries differ in size a thousandfold.
func (g *Group) compact() {
	base := g.store.appendedBytes() - g.seglog.sizeAfter(g.snaps.record().index)
	for {
		select {
		case <-g.wakeCompact:
		case <-g.stop:
			return
		}
		now := g.store.appendedBytes()
		if i := g.running(); i != nil && now-base >= g.cutBytes() && g.snapshot(i, g.trailing(i)) {
			base = now
		}
	}
}

// cutBytes is how much is written from one compaction to the next.
func (g *Group) cutBytes() int64 {
	if g.tight() {
		return min(g.cfg.CutBytes, g.cfg.SnapshotBytes)
	}
	return g.cfg.CutBytes
}

// Rest cuts the log of a replica that is about to be closed for long: to the last few entries, whatever followers
// lack. Each entry costs memory in the disk's log while it is there, and is read when the replica is opened again. It
// does what can be done; a replica that pulls the state, or has nothing new since the last cut, keeps what it has.
func (g *Group) Rest() {
	first, last := g.seglog.bounds()
	if bytes := g.seglog.sizeAfter(0); last < first || last-first < restEntries && bytes <= restBytes {
		return
	}
	keep := uint64(1)
	for keep < restEntries && keep <= last-first && g.seglog.sizeAfter(last-keep-1) <= restBytes {
		keep++
	}
	if i := g.running(); i != nil {
		g.snapshot(i, keep)
	}
}

// snapshot makes the library take one and cut the log to the last keep entries; false when it could not.
func (g *Group) snapshot(i *instance, keep uint64) bool {
	if !i.enter() {
		return false
	}
	defer i.leave()
	rc := i.r.ReloadableConfig()
	rc.TrailingLogs = keep
	err := i.r.ReloadConfig(rc)
	if err == nil {
		err = i.r.Snapshot().Error()
	}
	switch {
	case err == nil:
		first, last := g.seglog.bounds()
		g.log.Info("log compacted", "snapshot", g.snaps.record().index, "first", first, "last", last)
		return true
	case !errors.Is(err, raft.ErrNothingNewToSnapshot) && !errors.Is(err, raft.ErrRaftShutdown):
		g.log.Warn("no snapshot", "err", err)
	}
	return false
}

// trailing returns how many entries to keep behind the snapshot: about SnapshotBytes, and on the
// leader more where a follower has less than that, as sending it the state costs far more.
func (g *Group) trailing(i *instance) uint64 {
	first, last := g.seglog.bounds()
	if last < first {
		return trailingMin
	}
	each := max(g.seglog.sizeAfter(0)/int64(last-first+1), 1)
	keep := uint64(g.cfg.SnapshotBytes / each)
	if i.r.State() == raft.Leader { // some more: the entry before is needed too, and the log grows meanwhile
		match := g.lease.matches(i.r.CurrentTerm())
		for _, m := range g.store.latestConfig().members {
			if m.Replica != g.cfg.Replica {
				keep = max(keep, last-min(match[m.Replica], last)+trailingMin)
			}
		}
	}
	keep = min(keep, uint64(lagFactor*g.cfg.SnapshotBytes/each))
	if from, ok := g.images.heldFrom(); ok { // whoever leads: it may be this replica next
		if g.seglog.sizeAfter(from) <= heldFactor*g.cfg.SnapshotBytes {
			keep = max(keep, last-min(from, last)+trailingMin)
		}
	}
	return max(keep, trailingMin)
}

func (g *Group) tight() bool { return g.cfg.Tight != nil && g.cfg.Tight() }

// leaveApplied has the library begin where the state machine stands, when that is far beyond the last snapshot record:
// it would read every entry in between and hand it to a machine that has it. The log stays as it is, for those that
// lag.
// REQUIRES: the library does not run; checkState has found log and state to belong together.
func (g *Group) leaveApplied() error {
	at := g.snaps.record().index
	applied, term := g.cfg.Machine.Applied()
	if applied <= at || g.seglog.sizeAfter(at)-g.seglog.sizeAfter(applied) < g.cfg.SnapshotBytes/appliedShare {
		return nil
	}
	flushed, err := g.cfg.Machine.Flush() // all of it, as it was read from the disk just now
	if err != nil {
		return fmt.Errorf("leave applied entries: %w", err)
	}
	rec := snapshotRecord{index: applied, term: term, machine: applied, config: g.store.configAt(applied)}
	if flushed != applied || rec.config.index == 0 {
		return nil // the entries will do
	}
	return g.snaps.put(rec)
}
