package node

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller/meta"
)

// A volume grows from below (H20). The leader's agent commits the size in the group and reports it (grow); the node
// that has the volume attached hears of it from the catalogue, lets requests up to the new end into the data path
// (take), and then tells the kernel (growKernel). What is above a size is never ahead of what is below it, whenever
// one of the two dies. A filesystem is grown last, by whoever asks for it (expand).

// growRetry is the pause before a kernel device that did not grow, or whose volume was busy, is tried again.
const growRetry = 500 * time.Millisecond

// growKernelMax bounds one try of telling the kernel.
const growKernelMax = 30 * time.Second

// grow commits the size that is wanted in the group that r leads, and reports what the group has.
func (w *worker) grow(ctx context.Context, r runningReplica, a action) error {
	err := r.Resize(ctx, a.sizeBytes)
	if err != nil && !errors.Is(err, trivet.ErrOutOfRange) {
		return err
	}
	size := a.sizeBytes
	if err != nil { // it is larger already, which the catalogue has yet to hear
		size = r.Status().SizeBytes
	}
	_, err = propose(ctx, w.agent.cat, meta.Command{ReportSize: &meta.ReportSize{Volume: w.volume, SizeBytes: size}})
	return err
}

// planSize is the work of the leader's node on the size of a volume: the catalogue's follows the group's.
func planSize(v *meta.Volume, r *meta.Replica, l local) []action {
	size := max(v.WantSizeBytes, l.status.SizeBytes)
	if size <= v.SizeBytes || v.Phase == meta.PhaseDeleting {
		return nil
	}
	return []action{{verb: doGrow, disk: r.Disk, id: r.ID, sizeBytes: size}}
}

// take lets the open volume have sizeBytes, and reports whether that is more than before.
func (at *attached) take(sizeBytes int64) (bool, error) {
	if at == nil || at.group == nil || sizeBytes <= at.group.Size() {
		return false, nil
	}
	return true, at.group.SetSize(sizeBytes)
}

// followSizes makes open volumes as large as the catalogue says, and notes whose kernel device has to follow.
func (m *mounts) followSizes() {
	st := m.attacher.cat.Local()
	for id := range m.attacher.paths() {
		v, ok := st.Volume(id)
		if !ok {
			continue
		}
		grown, err := m.attacher.get(id).take(v.SizeBytes)
		switch {
		case err != nil:
			m.log.Error("a volume keeps its old size here", "volume", id, "err", err)
		case grown:
			m.log.Info("volume has grown", "volume", id, "size", v.SizeBytes)
			m.growing.add(id)
		}
	}
}

// growKernels tells the kernel of volumes that have grown, until ctx ends.
func (m *mounts) growKernels(ctx context.Context) {
	for {
		var again <-chan time.Time
		for _, id := range m.growing.list() {
			switch err := m.growOne(ctx, id); {
			case err == nil, errors.Is(err, errors.ErrUnsupported):
				m.growing.done(id)
			default:
				m.log.Debug("a device will be grown", "volume", id, "err", err)
				again = time.After(growRetry)
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-m.growing.poked:
		case <-again:
		}
	}
}

// growOne makes the kernel device of a volume as large as the volume is here. Not shown: nil, for who shows it
// takes the size it has then. ErrPending while something else is done with the volume.
func (m *mounts) growOne(ctx context.Context, id trivet.VolumeID) error {
	unlock, err := m.ops.try(id)
	if err != nil {
		return err
	}
	defer unlock()
	return m.growKernel(ctx, id)
}

// growKernel is growOne for who holds the lock of the volume. A device that cannot grow while it is in use keeps its
// size, which the log says, and has the new one when it is attached anew: errors.ErrUnsupported.
func (m *mounts) growKernel(ctx context.Context, id trivet.VolumeID) error {
	at := m.attacher.get(id)
	if at == nil || at.kernel == nil || at.kernel.Err() != nil {
		return nil // what is dead is discarded
	}
	ctx, cancel := context.WithTimeout(ctx, growKernelMax)
	defer cancel()
	err := at.kernel.Grow(ctx)
	if errors.Is(err, errors.ErrUnsupported) {
		m.log.Warn("a device has its new size when it is attached anew", "volume", id, "device", at.kernel.Path(), "err", err)
	}
	if err != nil {
		return fmt.Errorf("grow %s: %w", id, err)
	}
	return nil
}

// expand makes device and filesystem of a volume at path as large as the volume.
func (m *mounts) expand(ctx context.Context, id trivet.VolumeID, path string, requiredBytes int64) (int64, error) {
	growing := m.growing.has(id) // before as well: growKernels may be done by the time that it is seen to be in the way
	unlock, err := m.ops.try(id)
	if err != nil && (growing || m.growing.has(id)) { // every expansion in use meets growKernels, which is short
		unlock, err = m.ops.wait(ctx, id)
	}
	if err != nil {
		return 0, fmt.Errorf("expand: %w", err)
	}
	defer unlock()
	rec := m.records.get(id)
	i := rec.at(path)
	staged := rec.Staged != nil && rec.Staged.Path == path
	if !staged && (i < 0 || rec.Published[i].Lost) {
		return 0, fmt.Errorf("expand %s: it is not at %q: %w", id, path, trivet.ErrNotFound)
	}
	at := m.attacher.get(id)
	if at == nil || at.path == nil || at.kernel == nil {
		return 0, fmt.Errorf("expand %s: its device is gone: %w", id, trivet.ErrUnavailable)
	}
	st, err := m.attacher.cat.Read(ctx) // the copy here may not have heard of the new size yet
	if err != nil {
		return 0, fmt.Errorf("expand %s: %w", id, err)
	}
	if v, ok := st.Volume(id); ok {
		if _, err := at.take(v.SizeBytes); err != nil {
			return 0, fmt.Errorf("expand %s: %w", id, err)
		}
	}
	size := at.path.Size()
	if size < requiredBytes {
		return 0, fmt.Errorf("expand %s to %d bytes: it has %d, and has to be resized first: %w", id, requiredBytes, size,
			trivet.ErrOutOfRange)
	}
	if err := m.growKernel(ctx, id); err != nil {
		return 0, err
	}
	if rec.Staged == nil || rec.Staged.Block || rec.Staged.ReadOnly || rec.ReadOnly {
		return size, nil
	}
	if err := m.mounter.GrowFilesystem(ctx, at.kernel.Path(), rec.Staged.Path, rec.Staged.FSType); err != nil {
		return 0, fmt.Errorf("expand %s: %w", id, err)
	}
	return size, nil
}
