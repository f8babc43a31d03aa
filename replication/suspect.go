package replication

import (
	"context"
	"errors"
	"fmt"

	"github.com/trivet-csi/trivet"
)

// suspect is what a group tells of an entry of its log that it cannot read any more (raftgroup.Config.Damaged). The
// replica is closed and opened again, beside everything else: it stops leading, the others go on, and what a restart of
// the process would do for it is done for it alone. It does not block.
func (h *Host) suspect(s ReplicaSpec, cause error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.closed {
		return // it is being closed
	}
	h.reopening.Go(func() {
		if err := h.reopen(s); err != nil {
			h.giveUp(&s, cause, err)
		}
	})
}

// reopen closes a replica, and opens it again as it is on its disk: raftgroup cuts the log behind a damaged entry whose
// effect is durable, and refuses the replica for any other. One that was parked, destroyed or replaced meanwhile is
// left alone.
func (h *Host) reopen(s ReplicaSpec) error {
	ctx := context.Background() //nolint:forbidigo // Close waits, and exclusive ends with it
	return h.exclusive(ctx, s.Volume, func() error {
		r, ok := h.Replica(s.Volume)
		if !ok || r.spec.Replica != s.Replica {
			return nil
		}
		if err := r.close(); err != nil {
			return err
		}
		h.ended(&s)
		next, err := h.openReplica(ctx, &s, false)
		if err != nil {
			return err
		}
		next.repair.goOn(r.repair)
		h.mu.Lock()
		defer h.mu.Unlock()
		h.replicas[s.Volume] = next
		h.log.Warn("a replica was opened again: an entry of its log was damaged", "volume", s.Volume.String(), "replica",
			string(s.Replica))
		return nil
	})
}

// giveUp is for a replica that cannot be opened again. Its damage is told like any other that nobody can repair, and
// the node has it replaced; anything else is for the process to sort out by a restart.
func (h *Host) giveUp(s *ReplicaSpec, cause, err error) {
	if errors.Is(err, trivet.ErrClosed) {
		return
	}
	err = fmt.Errorf("open replica %s of %s again after %w: %w", s.Replica, s.Volume, cause, err)
	vol, volErr := s.Disk.Engine.OpenVolume(s.Volume)
	if volErr != nil || !errors.Is(err, trivet.ErrCorrupt) {
		h.cfg.Fatal(err)
		return
	}
	h.log.Error("a replica is given up: its log is damaged", "err", err)
	vol.ReportDamage(fmt.Sprintf("log of %s: %v", s.Volume, err))
}
