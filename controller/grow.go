package controller

import (
	"context"
	"errors"
	"fmt"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller/meta"
)

// ResizeVolume makes a volume sizeBytes large, rounded up to whole MiB, attached or not, and returns it once its
// group has committed that: every replica has the size then, or will before it applies a later write (H20). The
// node that has it attached grows the device by itself; a filesystem on it is grown afterwards. The size it has: nil.
//
// ErrOutOfRange: it is larger, and never shrinks, or no disk of its replicas is as large. ErrNoSpace: a disk of its
// replicas has no room for what is added. ErrNotFound; ErrInvalid: not in a phase to grow; ErrPending: still being
// created, brought back to a snapshot, or recovered. ErrUnavailable: its group has not committed it yet, and will once
// it has a quorum; the same call waits again.
func (c *Controller) ResizeVolume(ctx context.Context, id trivet.VolumeID, sizeBytes int64) (meta.Volume, error) {
	if sizeBytes <= 0 {
		return meta.Volume{}, fmt.Errorf("resize %s to %d bytes: want more than zero: %w", id, sizeBytes, trivet.ErrInvalid)
	}
	r := CreateRequest{RequiredBytes: sizeBytes}
	size, err := r.size()
	if err != nil {
		return meta.Volume{}, fmt.Errorf("resize %s: %w", id, err)
	}
	return c.grow(ctx, id, size)
}

// ExpandVolume makes a volume at least requiredBytes large and, where limitBytes is not zero, at most that, as CSI
// ControllerExpandVolume wants it: one that is large enough already is returned as it is. Otherwise it is
// ResizeVolume.
func (c *Controller) ExpandVolume(ctx context.Context, id trivet.VolumeID, requiredBytes, limitBytes int64,
) (meta.Volume, error) {
	r := CreateRequest{RequiredBytes: requiredBytes, LimitBytes: limitBytes}
	size, err := r.size()
	if err != nil {
		return meta.Volume{}, fmt.Errorf("expand %s: %w", id, err)
	}
	v, err := c.Volume(ctx, id)
	if err != nil {
		return meta.Volume{}, fmt.Errorf("expand %s: %w", id, err)
	}
	switch {
	case limitBytes > 0 && v.SizeBytes > limitBytes:
		return meta.Volume{}, fmt.Errorf("expand %s to at most %d bytes: it has %d and never shrinks: %w",
			id, limitBytes, v.SizeBytes, trivet.ErrOutOfRange)
	case v.SizeBytes >= size:
		return v, nil
	case v.Growing() && v.WantSizeBytes > size && (limitBytes == 0 || v.WantSizeBytes <= limitBytes):
		size = v.WantSizeBytes // on its way already, to enough; it cannot be made to stop below that
	}
	return c.grow(ctx, id, size)
}

// occupied reports whether something is done with v that has to end first. Otherwise ErrPending of a command that was
// decided on v says that v has changed since.
func occupied(v *meta.Volume) bool {
	return v.Phase == meta.PhaseCreating || v.Phase == meta.PhaseRestoring || v.Recover != ""
}

func (c *Controller) grow(ctx context.Context, id trivet.VolumeID, sizeBytes int64) (meta.Volume, error) {
	unlock, err := c.busy.lock("size of volume " + id.String())
	if err != nil {
		return meta.Volume{}, err
	}
	defer unlock()
	what := fmt.Sprintf("grow %s to %d bytes", id, sizeBytes)
	for {
		s, err := c.store.Read(ctx)
		if err != nil {
			return meta.Volume{}, fmt.Errorf("%s: %w", what, err)
		}
		v, err := lookUp(s, id)
		if err != nil {
			return meta.Volume{}, fmt.Errorf("%s: %w", what, err)
		}
		if err := roomToGrow(s, &v, sizeBytes); err != nil {
			return meta.Volume{}, fmt.Errorf("%s: %w", what, err)
		}
		res, err := c.store.Propose(ctx, meta.Command{GrowVolume: &meta.GrowVolume{
			Volume: id, SizeBytes: sizeBytes, IfRevision: v.Revision,
		}})
		if errors.Is(err, trivet.ErrPending) && !occupied(&v) {
			continue // it has changed since it was read
		}
		if err != nil {
			return meta.Volume{}, err
		}
		err = c.await(ctx, what, res.Revision, func(s *meta.State) (bool, error) {
			v, err = lookUp(s, id)
			return v.SizeBytes >= sizeBytes, err
		})
		return v, err
	}
}

// roomToGrow refuses what the disks of v's replicas could never hold, or not beside what they hold. Volumes are thin,
// so it is a promise as little as the one at creation; it keeps an operator from a size that makes no sense.
func roomToGrow(s *meta.State, v *meta.Volume, sizeBytes int64) error {
	more := sizeBytes - max(v.SizeBytes, v.WantSizeBytes)
	if more <= 0 {
		return nil
	}
	for _, r := range v.Replicas {
		n, ok := s.Node(r.Node)
		if !ok {
			continue
		}
		for _, d := range n.Disks {
			switch {
			case d.ID != r.Disk:
			case sizeBytes > d.SizeBytes:
				return fmt.Errorf("the disk of its replica on %s has %d bytes: %w", r.Node, d.SizeBytes, trivet.ErrOutOfRange)
			case more > d.FreeBytes:
				return fmt.Errorf("the disk of its replica on %s has %d bytes free, %d are added: %w",
					r.Node, d.FreeBytes, more, trivet.ErrNoSpace)
			}
		}
	}
	return nil
}
