package node

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller/meta"
)

// optionNoUUID has xfs mount a copy beside its source: both have the same UUID, and it mounts none twice
// (xfs(5), nouuid).
const optionNoUUID = "nouuid"

// mounts stages and publishes volumes. One operation at a time works on a volume.
type mounts struct {
	attacher *attacher
	mounter  Mounter
	records  *records
	log      *slog.Logger

	detachOnStop bool // close leaves nothing to the next process

	ops      keyLock
	growing  *volumeSet // kernel devices that have to take the size of their volume
	statting keyLock    // Stats may hang on a dead device; one call a volume does, and no other kind

	holds     groupHolds
	holdTimes HoldTimes
}

func (m *mounts) stage(ctx context.Context, r StageRequest) error {
	want, err := checkStage(r)
	if err != nil {
		return fmt.Errorf("stage %s: %w", r.Volume, err)
	}
	unlock, err := m.ops.try(r.Volume)
	if err != nil {
		return fmt.Errorf("stage %s: %w", r.Volume, err)
	}
	defer unlock()
	rec := m.records.get(r.Volume)
	if rec.Staged != nil && !rec.Staged.equal(want) {
		return fmt.Errorf("stage %s at %s: staged at %s, or with other options: %w",
			r.Volume, r.StagingPath, rec.Staged.Path, trivet.ErrExists)
	}
	v, err := m.attacher.holding(ctx, r.Volume)
	if err != nil {
		return err
	}
	if err := m.discardDead(ctx, v); err != nil {
		return err
	}
	return m.stageAttached(ctx, v, want)
}

func checkStage(r StageRequest) (*staging, error) {
	if r.Volume == trivet.MetaGroup {
		return nil, fmt.Errorf("no volume is named: %w", trivet.ErrInvalid)
	}
	path, err := checkPath("staging", r.StagingPath)
	if err != nil {
		return nil, err
	}
	if r.Block {
		return &staging{Path: path, Block: true, ReadOnly: r.ReadOnly}, nil
	}
	fsType, err := checkFSType(r.FSType)
	if err != nil {
		return nil, err
	}
	if err := checkMountOptions(r.MountFlags); err != nil {
		return nil, err
	}
	return &staging{Path: path, FSType: fsType, MountFlags: r.MountFlags, ReadOnly: r.ReadOnly}, nil
}

// stageAttached makes the kernel device and mounts it. What fails for good leaves nothing behind:
// the kubelet does not unstage what was never staged.
func (m *mounts) stageAttached(ctx context.Context, v *meta.Volume, want *staging) error {
	at, err := m.attacher.open(ctx, v)
	if err != nil {
		return err
	}
	device, err := m.show(ctx, v.ID, at, v.Attached.ReadOnly && !want.Block)
	if err != nil {
		return err
	}
	rec := m.records.get(v.ID)
	before := rec.clone()
	if rec.Device, err = m.mounter.DeviceNumber(device); err != nil {
		return fmt.Errorf("stage %s: %w", v.ID, err)
	}
	rec.Staged, rec.ReadOnly = want, v.Attached.ReadOnly
	if err := m.records.put(rec); err != nil {
		return fmt.Errorf("stage %s: %w", v.ID, err)
	}
	if want.Block {
		return nil
	}
	if err := m.mountStaging(ctx, device, rec, v.Source != nil); err != nil {
		// With an overlay that is full there is no use in another try: what an earlier one left goes, too.
		if before.Staged == nil || errors.As(err, new(replayError)) && before.live() == 0 {
			before.Staged, before.Device, before.ReadOnly = nil, 0, false
			err = errors.Join(err, m.records.put(before), m.hide(ctx, v.ID))
		}
		return fmt.Errorf("stage %s: %w", v.ID, err)
	}
	return nil
}

// mountStaging mounts the device, and lets the filesystem of a copy, which is as large as that of its source, fill
// the volume: of a volume that was made larger than its source nobody asks for an expansion (CSI, CreateVolume).
func (m *mounts) mountStaging(ctx context.Context, device string, rec record, isCopy bool) error {
	fresh, err := m.mountDevice(ctx, device, rec, isCopy)
	if full := replayed(rec.Volume, m.attacher.get(rec.Volume)); full != nil {
		if rec.live() == 0 {
			err = errors.Join(err, m.unmountOurs(rec.Staged.Path, rec.Device, false))
		}
		return errors.Join(full, err)
	}
	if err != nil || !isCopy || rec.Staged.ReadOnly || rec.ReadOnly || slices.Contains(rec.Staged.MountFlags, "ro") {
		return err
	}
	err = m.mounter.GrowFilesystem(ctx, device, rec.Staged.Path, rec.Staged.FSType)
	if err != nil && fresh {
		err = errors.Join(err, m.mounter.Unmount(rec.Staged.Path, false))
	}
	return err
}

// mountDevice mounts the device where it is to be staged, and reports whether it was not mounted there before.
func (m *mounts) mountDevice(ctx context.Context, device string, rec record, isCopy bool) (fresh bool, err error) {
	number, mounted, err := m.mounter.Mounted(rec.Staged.Path)
	switch {
	case err != nil:
		return false, err
	case mounted && number == rec.Device:
		return false, nil
	case mounted && number == 0: // dead, of a process that left no record
		if err := m.mounter.Unmount(rec.Staged.Path, true); err != nil {
			return false, err
		}
	case mounted: // and what is it that we would hide? (S8)
		return false, fmt.Errorf("another filesystem is mounted at %s: %w", rec.Staged.Path, trivet.ErrInUse)
	}
	options := slices.Clone(rec.Staged.MountFlags)
	if isCopy && rec.Staged.FSType == "xfs" && !slices.Contains(options, optionNoUUID) {
		options = append(options, optionNoUUID)
	}
	if rec.Staged.ReadOnly || rec.ReadOnly {
		options = append(options, "ro")
	}
	if rec.ReadOnly { // a discard gives nothing back, and takes room in the overlay
		options = slices.DeleteFunc(options, func(o string) bool { return o == "discard" })
	}
	return true, m.mounter.FormatAndMount(ctx, device, rec.Staged.Path, rec.Staged.FSType, options)
}

// discardDead removes what is left of an attachment that is of no use any more: fenced by a later
// epoch, or with a dead kernel device (H13, H31). Its mounts go lazily, its data paths for good, and
// staging begins anew.
func (m *mounts) discardDead(ctx context.Context, v *meta.Volume) error {
	at := m.attacher.get(v.ID)
	if at == nil || (!at.stale(v) && at.dead() == nil) {
		return nil
	}
	m.log.Warn("discarding a dead attachment", "volume", v.ID, "epoch", at.epoch, "err", at.dead())
	rec := m.records.get(v.ID)
	if err := m.abandon(&rec); err != nil {
		return err
	}
	if err := m.records.put(rec); err != nil {
		return err
	}
	if err := m.hide(ctx, v.ID); err != nil {
		return err
	}
	if at.stale(v) {
		return m.attacher.drop(v.ID)
	}
	return nil
}

// abandon unmounts everything in rec lazily, and leaves in the place of published filesystems an
// empty read-only one: a container that is started again with such a path would otherwise write to
// the machine's own disk (H31). It changes rec accordingly.
func (m *mounts) abandon(rec *record) error {
	for i := range rec.Published {
		if err := m.abandonPublished(rec, &rec.Published[i]); err != nil {
			return fmt.Errorf("abandon %s: %w", rec.Volume, err)
		}
	}
	if s := rec.Staged; s != nil && !s.Block {
		if err := m.unmountOurs(s.Path, rec.Device, true); err != nil {
			return fmt.Errorf("abandon %s: %w", rec.Volume, err)
		}
	}
	rec.Staged, rec.Device, rec.ReadOnly = nil, 0, false
	return nil
}

func (m *mounts) abandonPublished(rec *record, p *publication) error {
	if p.Lost {
		return nil
	}
	if err := m.unmountOurs(p.Path, rec.Device, true); err != nil {
		return err
	}
	p.Lost = true
	if p.Block {
		return nil
	}
	err := m.mounter.Shade(p.Path)
	if err != nil {
		m.log.Warn("a lost mount is not shaded", "volume", rec.Volume, "target", p.Path, "err", err)
	}
	return nil
}

// unmountOurs unmounts path if the device mounted there is ours, or is so dead that it cannot say.
func (m *mounts) unmountOurs(path string, device uint64, lazy bool) error {
	number, mounted, err := m.mounter.Mounted(path)
	if err != nil || !mounted || (number != device && number != 0) {
		return err
	}
	return m.mounter.Unmount(path, lazy)
}

func (m *mounts) unstage(ctx context.Context, id trivet.VolumeID, path string) error {
	path, err := checkPath("staging", path)
	if err != nil {
		return nil //nolint:nilerr // nothing is ever staged at such a path
	}
	unlock, err := m.ops.try(id)
	if err != nil {
		return fmt.Errorf("unstage %s: %w", id, err)
	}
	defer unlock()
	rec := m.records.get(id)
	if rec.Staged == nil || rec.Staged.Path != path {
		return m.unmountAsked("unstage", id, path)
	}
	if n := rec.live(); n > 0 {
		return fmt.Errorf("unstage %s: published at %s: %w", id, rec.Published[0].Path, trivet.ErrInUse)
	}
	if !rec.Staged.Block {
		if err := m.unmountOurs(path, rec.Device, m.attacher.get(id).dead() != nil); err != nil {
			return fmt.Errorf("unstage %s: %w", id, err)
		}
	}
	if err := m.attacher.hide(ctx, id); err != nil {
		return fmt.Errorf("unstage: %w", err)
	}
	rec.Staged, rec.Device, rec.ReadOnly = nil, 0, false
	rec.noDevice()
	return m.records.put(rec)
}

// unmountAsked unmounts a path that there is no record of: the run directory may have been lost.
func (m *mounts) unmountAsked(op string, id trivet.VolumeID, path string) error {
	_, mounted, err := m.mounter.Mounted(path)
	if err == nil && mounted {
		m.log.Warn("unmounting a path without a record", "volume", id, "path", path)
		err = m.mounter.Unmount(path, false)
	}
	if err != nil {
		return fmt.Errorf("%s %s at %s: %w", op, id, path, err)
	}
	return nil
}
