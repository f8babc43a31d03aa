package raftgroup

import (
	"errors"
	"fmt"
	"sync"

	"github.com/hashicorp/raft"
	"golang.org/x/sync/errgroup"

	"github.com/trivet-csi/trivet"
)

// verify reads every entry, so that the library, which panics on damage, meets none when it starts, and a
// replica with damage is refused and not found out when a follower happens to need the entry (H23).
//
// An entry that the state machine has applied is of no more use than to followers that lack it, who can pull the state
// instead. rotTo is the last of those that are damaged, 0 when none is: up to it the log has to be cut (leaveRot). Any
// other damaged entry may be the only copy of an acknowledged write: ErrCorrupt, and nothing is cut.
func (l *groupLog) verify(applied uint64) (rotTo uint64, err error) {
	var all errgroup.Group
	all.SetLimit(verifyN)
	var mu sync.Mutex
	first, last := l.bounds()
	for index := first; index <= last; index++ {
		all.Go(func() error {
			var e raft.Log
			err := l.read(index, &e)
			if err == nil {
				return nil
			}
			if index <= applied && index < last && errors.Is(err, trivet.ErrCorrupt) {
				mu.Lock()
				rotTo = max(rotTo, index)
				mu.Unlock()
				return nil
			}
			return fmt.Errorf("verify the log: %w", err)
		})
	}
	return rotTo, all.Wait()
}

// leaveRot cuts the log behind its last damaged entry, once the state machine has made durable what that did (H1),
// and a snapshot record says so. REQUIRES: the library does not run; checkState has found log and state to belong
// together.
func (g *Group) leaveRot() error {
	if g.rotTo == 0 {
		return nil
	}
	applied, term := g.cfg.Machine.Applied()
	flushed, err := g.cfg.Machine.Flush()
	if err != nil {
		return fmt.Errorf("leave damaged entries: %w", err)
	}
	rec := snapshotRecord{index: applied, term: term, machine: applied, config: g.store.configAt(applied)}
	if flushed != applied || applied < g.rotTo || rec.config.index == 0 {
		return fmt.Errorf("entry %d is damaged, and the state at %d, durable at %d, cannot stand in for it: %w", g.rotTo,
			applied, flushed, trivet.ErrCorrupt)
	}
	if g.snaps.record().index < g.rotTo {
		if err := g.snaps.put(rec); err != nil {
			return err
		}
	}
	first, _ := g.seglog.bounds()
	if err := g.store.DeleteRange(first, g.rotTo); err != nil {
		return err
	}
	g.log.Warn("entries that were applied are damaged: the log was cut behind them", "last", g.rotTo, "applied", applied)
	return nil
}
