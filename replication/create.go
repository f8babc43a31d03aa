package replication

import (
	"context"
	"errors"
	"fmt"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/engine"
	"github.com/trivet-csi/trivet/internal/stage"
	"github.com/trivet-csi/trivet/replication/raftgroup"
)

// CreateReplica makes a replica durable: the engine volume first, then the group with its initial
// configuration. It does not start it. It may be called again with the same spec, also after a crash
// at any point. It never makes a second, empty life for a replica that had data: when one half is
// there and the other half, which must have been, is not, it returns ErrCorrupt, and the replica must
// be replaced by one with a new ID (H4, H10). ErrExists: the disk holds another replica of the volume. ErrUnavailable:
// the volume of Base is not on the disk, or has not applied the freeze of the snapshot there yet; try again.
func (h *Host) CreateReplica(ctx context.Context, s ReplicaSpec) error {
	if err := s.Validate(); err != nil {
		return err
	}
	return h.exclusive(ctx, s.Volume, func() error {
		if err := h.createReplica(&s); err != nil {
			return fmt.Errorf("create replica %s of %s: %w", s.Replica, s.Volume, err)
		}
		return nil
	})
}

func (h *Host) createReplica(s *ReplicaSpec) error {
	cfg := h.groupConfig(s)
	exists, err := raftgroup.Exists(cfg)
	if err != nil {
		return groupError(s, err)
	}
	vol, err := s.Disk.Engine.OpenVolume(s.Volume)
	switch {
	case notFound(err) && exists:
		return fmt.Errorf("its group is in %s, its blocks are gone from the engine of disk %s; "+
			"replace it by a replica with a new ID: %w", cfg.Dir, s.Disk.ID, trivet.ErrCorrupt)
	case notFound(err):
		if err := s.createBlocks(); err != nil {
			return err
		}
	case err != nil:
		return err
	case vol.Replica() != s.Replica:
		return fmt.Errorf("disk %s holds replica %s of the volume; destroy that first: %w",
			s.Disk.ID, vol.Replica(), trivet.ErrExists)
	case !exists && hasHistory(vol):
		return lostLog(s, cfg.Dir, vol)
	}
	fs := s.Disk.fs()
	groups := fs.PathDir(cfg.Dir)
	if err := fs.MkdirAll(groups, 0o700); err != nil {
		return fmt.Errorf("make %s: %w", groups, err)
	}
	if err := syncDir(s); err != nil {
		return err
	}
	return raftgroup.Create(cfg, s.Members)
}

func (s *ReplicaSpec) createBlocks() error {
	if s.Base != nil {
		return s.Disk.Engine.CreateClone(s.Volume, s.Replica, s.SizeBytes, *s.Base)
	}
	return s.Disk.Engine.CreateVolume(s.Volume, s.Replica, s.SizeBytes)
}

// syncDir makes the entry of the groups directory durable.
func syncDir(s *ReplicaSpec) error {
	d, err := s.Disk.fs().OpenDir(s.Disk.Dir)
	if err != nil {
		return fmt.Errorf("open %s: %w", s.Disk.Dir, err)
	}
	err = d.Sync()
	if err := errors.Join(err, d.Close()); err != nil {
		return fmt.Errorf("sync %s: %w", s.Disk.Dir, err)
	}
	return nil
}

// hasHistory reports whether a volume shows that its group once ran.
func hasHistory(vol *engine.Volume) bool { return vol.Restoring() || vol.State().AppliedIndex > 0 }

func lostLog(s *ReplicaSpec, dir string, vol *engine.Volume) error {
	return fmt.Errorf("its blocks are on disk %s, applied up to index %d, its log is gone from %s; "+
		"replace it by a replica with a new ID: %w", s.Disk.ID, vol.State().AppliedIndex, dir, trivet.ErrCorrupt)
}

// groupError explains that the group's directory belongs to another replica or is damaged.
func groupError(s *ReplicaSpec, err error) error {
	if errors.Is(err, trivet.ErrInvalid) || errors.Is(err, trivet.ErrExists) {
		return fmt.Errorf("disk %s holds another group; check that the right disk is mounted: %v: %w",
			s.Disk.ID, err, trivet.ErrCorrupt)
	}
	return err
}

// OpenReplica starts a created replica; nil when it runs already. Of s it uses the names only.
// ErrNotFound: it was never created, or its blocks or its log are gone; ErrCorrupt: what is there
// contradicts s or itself. In both cases the message says what to do; the replica does not start,
// and the others go on without it (H4, H10, H11).
func (h *Host) OpenReplica(ctx context.Context, s ReplicaSpec) error {
	if err := s.Validate(); err != nil {
		return err
	}
	return h.exclusive(ctx, s.Volume, func() error {
		if r, ok := h.Replica(s.Volume); ok {
			if r.spec.Replica != s.Replica {
				return fmt.Errorf("open replica %s of %s: replica %s runs here; destroy that first: %w",
					s.Replica, s.Volume, r.spec.Replica, trivet.ErrExists)
			}
			return nil
		}
		r, err := h.openReplica(ctx, &s, false)
		if err != nil {
			return fmt.Errorf("open replica %s of %s: %w", s.Replica, s.Volume, err)
		}
		h.mu.Lock()
		h.replicas[s.Volume] = r
		h.mu.Unlock()
		return nil
	})
}

func (h *Host) openReplica(ctx context.Context, s *ReplicaSpec, alone bool) (*Replica, error) {
	cfg := h.groupConfig(s)
	cfg.Recover = alone
	vol, volErr := s.Disk.Engine.OpenVolume(s.Volume)
	if volErr != nil && !notFound(volErr) {
		return nil, volErr
	}
	exists, err := raftgroup.Exists(cfg)
	switch {
	case err != nil:
		return nil, groupError(s, err)
	case volErr != nil && !exists:
		return nil, fmt.Errorf("disk %s has neither blocks nor log of it; create it, "+
			"or replace it by a replica with a new ID if it was ready before: %w", s.Disk.ID, trivet.ErrNotFound)
	case volErr != nil:
		return nil, fmt.Errorf("its log is in %s, its blocks are gone from the engine of disk %s; "+
			"replace it by a replica with a new ID: %w", cfg.Dir, s.Disk.ID, trivet.ErrNotFound)
	case vol.Replica() != s.Replica:
		return nil, fmt.Errorf("disk %s holds replica %s of the volume; check that the right disk is mounted: %w",
			s.Disk.ID, vol.Replica(), trivet.ErrCorrupt)
	case !exists && hasHistory(vol):
		return nil, fmt.Errorf("%v: %w", lostLog(s, cfg.Dir, vol), trivet.ErrNotFound)
	case !exists:
		return nil, fmt.Errorf("its creation on disk %s was not completed; create it again: %w",
			s.Disk.ID, trivet.ErrNotFound)
	}
	m, err := newMachine(s.Volume, s.Disk.Engine, vol)
	if err != nil {
		return nil, err
	}
	m.markers = newMarkers(vol)
	cfg.Machine, cfg.RestedSince = m, h.restedSince(s.Replica)
	cfg.Damaged = func(cause error) { h.suspect(*s, cause) }
	if h.cfg.WrapMachine != nil {
		cfg.Machine = h.cfg.WrapMachine(m)
	}
	cfg.Stages = h.cfg.Stages.Open(s.Volume)
	m.applies = cfg.Stages.Meter(stage.Apply)
	m.marks.background = s.Disk.background()
	group, err := raftgroup.Open(cfg)
	if err != nil {
		cfg.Stages.Close()
		m.marks.close()
		return nil, err
	}
	log := h.log.With("volume", s.Volume.String(), "replica", string(s.Replica))
	// The replica outlives the call that opens it.
	r := startReplica(context.WithoutCancel(ctx), *s, m, group, h.cfg.lease(), log, cfg.Stages)
	r.network = h.cfg.Network
	r.startRepair(h.cfg.Network, h.cfg.ScrubTurn)
	r.roomElsewhere = h.cfg.RoomElsewhere
	return r, nil
}

// ParkReplica stops a replica and keeps everything of it; OpenReplica starts it again. A parked replica
// costs no CPU and hardly any memory: its log is cut first. Idempotent: nil when it does not run. ErrExists:
// another replica of the volume runs here.
func (h *Host) ParkReplica(ctx context.Context, s ReplicaSpec) error {
	return h.exclusive(ctx, s.Volume, func() error {
		r, ok := h.Replica(s.Volume)
		if !ok {
			return nil
		}
		if r.spec.Replica != s.Replica {
			return fmt.Errorf("park replica %s of %s: replica %s runs here: %w", s.Replica, s.Volume, r.spec.Replica,
				trivet.ErrExists)
		}
		r.group.Rest()
		if err := r.close(); err != nil {
			return fmt.Errorf("park replica %s of %s: %w", s.Replica, s.Volume, err)
		}
		h.ended(&s)
		return nil
	})
}

// DestroyReplica stops a replica and removes its log and blocks. Idempotent: nil when there is
// nothing. ErrExists: the disk holds another replica of the volume, which stays (H35).
func (h *Host) DestroyReplica(ctx context.Context, s ReplicaSpec) error {
	if err := s.Validate(); err != nil {
		return err
	}
	return h.exclusive(ctx, s.Volume, func() error {
		if err := h.destroyReplica(&s); err != nil {
			return fmt.Errorf("destroy replica %s of %s: %w", s.Replica, s.Volume, err)
		}
		return nil
	})
}

func (h *Host) destroyReplica(s *ReplicaSpec) error {
	vol, err := s.Disk.Engine.OpenVolume(s.Volume)
	switch {
	case notFound(err):
	case err != nil:
		return err
	case vol.Replica() != s.Replica:
		return fmt.Errorf("disk %s holds replica %s of the volume: %w", s.Disk.ID, vol.Replica(), trivet.ErrExists)
	}
	cfg := h.groupConfig(s)
	if vol == nil { // no blocks to tell whose group it is
		if _, err := raftgroup.Exists(cfg); err != nil {
			return groupError(s, err)
		}
	}
	// Another replica of the volume may run from another disk: it stays.
	if r, ok := h.Replica(s.Volume); ok && r.spec.Replica == s.Replica {
		if err := r.close(); err != nil {
			return err
		}
		h.mu.Lock()
		delete(h.replicas, s.Volume)
		h.mu.Unlock()
	}
	// The group first, with its entries, term and vote in the disk's log: blocks without a log are refused by
	// OpenReplica and CreateReplica, so a crash in between leaves nothing that could vote.
	if err := raftgroup.Destroy(cfg); err != nil {
		return err
	}
	h.mu.Lock()
	delete(h.rested, s.Replica)
	h.mu.Unlock()
	return s.Disk.Engine.DropVolume(s.Volume)
}
