package raftgroup

import (
	"errors"
	"fmt"
	"slices"
	"sync"

	"github.com/hashicorp/raft"
	"golang.org/x/sync/errgroup"

	"github.com/trivet-csi/trivet"
)

// damage is what verify finds in the log of a group.
type damage struct {
	// rot are entries that the state machine has applied. They are of no more use than to followers that lack them,
	// who can pull the state instead: the log has to be cut behind the last one (leaveRot).
	rot []uint64
	// holes are the other ones: each may be the only copy of an acknowledged write, or says who the members are.
	holes []uint64
	first error // that was met
}

// verify reads every entry, so that the library, which panics on damage, meets none when it starts, and a
// replica with damage is found out now and not when a follower happens to need the entry (H23). configs is the index
// of the configuration that the snapshot has. It changes nothing.
func (l *groupLog) verify(applied, configs uint64) (damage, error) {
	var all errgroup.Group
	all.SetLimit(verifyN)
	var mu sync.Mutex
	var found damage
	first, last := l.bounds()
	for index := first; index <= last; index++ {
		all.Go(func() error {
			var e raft.Log
			err := l.read(index, &e)
			if err == nil {
				return nil
			}
			err = fmt.Errorf("verify the log: %w", err)
			if !errors.Is(err, trivet.ErrCorrupt) {
				return err
			}
			_, typ, typErr := l.TermType(index)
			needed := index > applied || typErr != nil || raft.LogType(typ) == raft.LogConfiguration && index > configs
			mu.Lock()
			defer mu.Unlock()
			if needed {
				found.holes = append(found.holes, index)
			} else {
				found.rot = append(found.rot, index)
			}
			if found.first == nil {
				found.first = err
			}
			return nil
		})
	}
	err := all.Wait()
	slices.Sort(found.rot)
	slices.Sort(found.holes)
	return found, err
}

// leaveRot cuts the log behind its last damaged entry, once the state machine has made durable what that did (H1),
// and a snapshot record says so. REQUIRES: the library does not run; checkState has found log and state to belong
// together, and there are no holes.
func (g *Group) leaveRot() error {
	if len(g.found.rot) == 0 {
		return nil
	}
	rotTo := g.found.rot[len(g.found.rot)-1]
	applied, term := g.cfg.Machine.Applied()
	flushed, err := g.cfg.Machine.Flush()
	if err != nil {
		return fmt.Errorf("leave damaged entries: %w", err)
	}
	rec := snapshotRecord{index: applied, term: term, machine: applied, config: g.store.configAt(applied)}
	if flushed != applied || applied < rotTo || rec.config.index == 0 {
		return fmt.Errorf("entry %d is damaged, and the state at %d, durable at %d, cannot stand in for it: %w", rotTo,
			applied, flushed, trivet.ErrCorrupt)
	}
	if g.snaps.record().index < rotTo {
		if err := g.snaps.put(rec); err != nil {
			return err
		}
	}
	if err := g.cutTo(rotTo); err != nil {
		return err
	}
	g.found.rot = nil
	g.log.Warn("entries that were applied are damaged: the log was cut behind them", "last", rotTo, "applied", applied)
	return nil
}

// cutTo drops the entries up to an index that the snapshot record covers.
func (g *Group) cutTo(index uint64) error {
	first, last := g.seglog.bounds()
	if rec := g.snaps.record(); index >= last { // the next one goes on from the snapshot
		return g.store.install(rec.index, rec.config)
	}
	return g.store.DeleteRange(first, index)
}
