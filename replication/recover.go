package replication

import (
	"context"
	"fmt"
)

// RecoverReplica starts a replica as the only voter of its group, for good: for a group whose majority is lost (H34).
// What the log of this replica has is in effect from then on, and what it has not is lost. It must have been decided
// in the catalogue that the other replicas are none any more, or two groups would go by one name. Idempotent; errors
// as of OpenReplica, and ErrUnavailable while it pulls what it missed.
func (h *Host) RecoverReplica(ctx context.Context, s ReplicaSpec) error {
	if err := s.Validate(); err != nil {
		return err
	}
	return h.exclusive(ctx, s.Volume, func() error {
		if r, ok := h.Replica(s.Volume); ok {
			if st := r.Status(); r.spec.Replica == s.Replica && len(st.Members) == 1 && st.Members[0].Replica == s.Replica {
				return nil
			}
			if err := r.close(); err != nil {
				return fmt.Errorf("recover replica %s of %s: stop %s: %w", s.Replica, s.Volume, r.spec.Replica, err)
			}
			h.mu.Lock()
			delete(h.replicas, s.Volume)
			h.mu.Unlock()
		}
		r, err := h.openReplica(ctx, &s, true)
		if err != nil {
			return fmt.Errorf("recover replica %s of %s: %w", s.Replica, s.Volume, err)
		}
		h.mu.Lock()
		h.replicas[s.Volume] = r
		h.mu.Unlock()
		return nil
	})
}
