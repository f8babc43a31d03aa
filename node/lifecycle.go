package node

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/node/blockdev"
)

// attach shows a volume without mounting it.
func (m *mounts) attach(ctx context.Context, id trivet.VolumeID) (string, error) {
	unlock, err := m.ops.try(id)
	if err != nil {
		return "", fmt.Errorf("attach: %w", err)
	}
	defer unlock()
	at, err := m.openHeld(ctx, id)
	if err != nil {
		return "", err
	}
	return m.show(ctx, id, at, false)
}

// show makes the open volume a kernel block device, with an overlay for a replay or without. Epoch and overlay are
// recorded before: by the first a later process knows whether the attachment went on without a break (resume.go), by
// the second with what.
func (m *mounts) show(ctx context.Context, id trivet.VolumeID, at *attached, replay bool) (string, error) {
	rec := m.records.get(id)
	if at.kernel != nil && (at.overlay != nil) != replay {
		err := m.hide(ctx, id)
		if errors.Is(err, trivet.ErrInUse) && replay && rec.Staged != nil {
			return at.kernel.Path(), nil // a version that knew no overlays staged it, and mounted it without a replay
		}
		if err != nil {
			return "", err
		}
		at, rec = m.attacher.get(id), m.records.get(id)
	}
	file := rec.Overlay
	if at.kernel == nil {
		file = ""
		if replay {
			file = m.attacher.overlays.path(id)
		}
	}
	if rec.Epoch != at.epoch || rec.Leaving || rec.Overlay != file {
		rec.Epoch, rec.Leaving, rec.Overlay = at.epoch, false, file
		if err := m.records.put(rec); err != nil {
			return "", fmt.Errorf("attach %s: %w", id, err)
		}
	}
	return m.attacher.showKernel(ctx, id, at, rec.Overlay)
}

// hide removes the kernel device.
func (m *mounts) hide(ctx context.Context, id trivet.VolumeID) error {
	if err := m.attacher.hide(ctx, id); err != nil {
		return err
	}
	rec := m.records.get(id)
	if rec.Epoch == 0 {
		return nil
	}
	rec.noDevice()
	return m.records.put(rec)
}

// openNBD opens a volume, counts one more NBD server on it, and returns its data path, its name and
// whether it is read-only here.
func (m *mounts) openNBD(ctx context.Context, id trivet.VolumeID) (trivet.Device, string, bool, error) {
	unlock, err := m.ops.try(id)
	if err != nil {
		return nil, "", false, fmt.Errorf("serve: %w", err)
	}
	defer unlock()
	at, err := m.openHeld(ctx, id)
	if err != nil {
		return nil, "", false, err
	}
	v, _ := m.attacher.cat.Local().Volume(id) // it was waited for
	m.attacher.useNBD(id, 1)
	held := v.GrantOf(m.attacher.node)
	return at.path, v.Name, held != nil && held.ReadOnly, nil
}

// closeNBD counts an NBD server out. What its clients have written is committed then, flushed or not: the attachment
// may end next.
func (m *mounts) closeNBD(id trivet.VolumeID) {
	//nolint:forbidigo // the server's own context has ended
	ctx, cancel := context.WithTimeout(context.Background(), drainTimeout)
	defer cancel()
	m.attacher.drain(ctx, id, m.attacher.get(id))
	m.attacher.useNBD(id, -1)
}

func (m *mounts) openHeld(ctx context.Context, id trivet.VolumeID) (*attached, error) {
	v, err := m.attacher.holding(ctx, id)
	if err != nil {
		return nil, err
	}
	if err := m.discardDead(ctx, v); err != nil {
		return nil, err
	}
	return m.attacher.open(ctx, v)
}

func (m *mounts) detach(ctx context.Context, id trivet.VolumeID) error {
	unlock, err := m.ops.try(id)
	if err != nil {
		return fmt.Errorf("detach: %w", err)
	}
	defer unlock()
	if rec := m.records.get(id); rec.Staged != nil {
		return fmt.Errorf("detach %s: staged at %s: %w", id, rec.Staged.Path, trivet.ErrInUse)
	}
	return m.hide(ctx, id)
}

// follow makes the open data paths follow the parameters that the catalogue holds now.
func (m *mounts) follow() {
	st := m.attacher.cat.Local()
	for id, path := range m.attacher.paths() {
		v, ok := st.Volume(id)
		if !ok {
			continue
		}
		if err := path.apply(&v); err != nil {
			m.log.Error("a volume keeps its old settings", "volume", id, "err", err)
		}
	}
}

// sweep closes the groups of attachments that are over. One that is busy is met again at the next
// change of the catalogue.
func (m *mounts) sweep() {
	for _, id := range m.attacher.outdated() {
		unlock, err := m.ops.try(id)
		if err != nil {
			continue
		}
		if err := m.attacher.drop(id); err != nil {
			m.log.Warn("an attachment that is over was not closed cleanly", "volume", id, "err", err)
		}
		unlock()
	}
}

// cleanUp cleans up after a process that is dead. The kernel devices in keep outlived it and stay, with
// their mounts, to be resumed; all others lead nowhere, and so does every mount on them. REQUIRES: the
// lock of the run directory is held.
func (m *mounts) cleanUp(ctx context.Context, left blockdev.Leftovers, keep []string) error {
	for _, id := range m.records.list() {
		if slices.Contains(keep, id.String()) {
			continue
		}
		if err := left.Abort(ctx, id.String()); err != nil { // or the unmounting below could wait for a server
			return err
		}
		rec := m.records.get(id)
		m.log.Warn("a volume was in use when the last process ended; its pods have to be restarted",
			"volume", id, "published", len(rec.Published))
		if err := m.abandon(&rec); err != nil {
			return err
		}
		if err := rec.dropDevice(); err != nil {
			return err
		}
		if err := m.records.put(rec); err != nil {
			return err
		}
	}
	cleaned, err := left.Clean(ctx, keep)
	if err != nil {
		return fmt.Errorf("clean up %s: %w", left.RunDir, err)
	}
	if len(cleaned) > 0 {
		m.log.Info("cleaned up after the last process", "volumes", cleaned)
	}
	return m.attacher.overlays.tidy(keep)
}

// close takes every volume off the machine, or leaves it to the next process.
func (m *mounts) close(ctx context.Context) error {
	m.attacher.mu.Lock()
	ids := make([]trivet.VolumeID, 0, len(m.attacher.held))
	for id := range m.attacher.held {
		ids = append(ids, id)
	}
	m.attacher.mu.Unlock()
	var errs []error
	for _, id := range ids {
		errs = append(errs, m.closeVolume(ctx, id))
	}
	return errors.Join(errs...)
}

func (m *mounts) closeVolume(ctx context.Context, id trivet.VolumeID) error {
	ctx, cancel := context.WithTimeout(ctx, closeTimeout)
	defer cancel()
	unlock, err := m.ops.try(id)
	if err != nil {
		return fmt.Errorf("close: %w", err) // the caller was to stop the driver first
	}
	defer unlock()
	if at := m.attacher.get(id); at != nil && at.kernel == nil && m.records.get(id).Epoch != 0 {
		return m.attacher.drop(id) // was not resumed in time, and is not ours to take away
	}
	if !m.detachOnStop {
		released, err := m.handOver(ctx, id)
		if released || err != nil {
			return err
		}
	}
	rec := m.records.get(id)
	if n := rec.live(); n > 0 {
		m.log.Error("stopping while a volume is in use; its pods get I/O errors and have to be restarted",
			"volume", id, "published", n)
	}
	// The bind mounts go first and lazily, each written back; the staging mount then tells whether a
	// process still holds the filesystem.
	if err := m.abandon(&rec); err != nil {
		return err
	}
	rec.Leaving = rec.Epoch != 0 // if that fails and the keeper has the device after all, the next process ends it
	if err := m.records.put(rec); err != nil {
		return err
	}
	if err := m.hide(ctx, id); err != nil {
		m.log.Error("stopping while a process has the device open", "volume", id, "err", err)
	}
	return m.attacher.drop(id)
}
