package node

import (
	"context"
	"fmt"
	"slices"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller/meta"
)

func (m *mounts) publish(ctx context.Context, r PublishRequest) error {
	stagingPath, want, err := checkPublish(r)
	if err != nil {
		return fmt.Errorf("publish %s: %w", r.Volume, err)
	}
	unlock, err := m.ops.try(r.Volume)
	if err != nil {
		return fmt.Errorf("publish %s: %w", r.Volume, err)
	}
	defer unlock()
	if err := m.publishLocked(ctx, r.Volume, stagingPath, want); err != nil {
		return fmt.Errorf("publish %s at %s: %w", r.Volume, want.Path, err)
	}
	return nil
}

func checkPublish(r PublishRequest) (string, *publication, error) {
	if r.Volume == trivet.MetaGroup {
		return "", nil, fmt.Errorf("no volume is named: %w", trivet.ErrInvalid)
	}
	target, err := checkPath("target", r.TargetPath)
	if err != nil {
		return "", nil, err
	}
	if r.StagingPath == "" {
		return "", nil, fmt.Errorf("no staging path is given: %w", ErrNotStaged)
	}
	stagingPath, err := checkPath("staging", r.StagingPath)
	if err != nil {
		return "", nil, err
	}
	p := &publication{Path: target, Block: r.Block, ReadOnly: r.ReadOnly, Mode: r.Mode}
	if r.Block {
		return stagingPath, p, nil
	}
	if _, err := checkFSType(r.FSType); err != nil {
		return "", nil, err
	}
	p.MountFlags = r.MountFlags
	return stagingPath, p, checkMountOptions(r.MountFlags)
}

func (m *mounts) publishLocked(ctx context.Context, id trivet.VolumeID, stagingPath string, want *publication) error {
	rec := m.records.get(id)
	source, err := m.sourceOf(id, &rec, stagingPath, want)
	if err != nil {
		return err
	}
	i := rec.at(want.Path)
	if i >= 0 && !rec.Published[i].Lost && !rec.Published[i].equal(want) {
		return fmt.Errorf("published there with other options: %w", trivet.ErrExists)
	}
	if err := checkSingle(&rec, want); err != nil {
		return err
	}
	done, err := m.clearTarget(&rec, want.Path)
	if err != nil || done {
		return err
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	before := rec.clone()
	if i < 0 {
		rec.Published = append(rec.Published, *want)
	} else {
		rec.Published[i] = *want
	}
	if err := m.records.put(rec); err != nil {
		return err
	}
	readOnly := want.ReadOnly || rec.Staged.ReadOnly || rec.ReadOnly
	if err := m.mounter.Bind(source, want.Path, want.Block, readOnly); err != nil {
		if perr := m.records.put(before); perr != nil {
			m.log.Error("record not taken back", "volume", id, "err", perr)
		}
		return err
	}
	return nil
}

// sourceOf returns what is to be bound: the staging directory or the device node. It returns
// ErrNotStaged unless the volume is staged there, in that form, and alive.
func (m *mounts) sourceOf(id trivet.VolumeID, rec *record, stagingPath string, want *publication) (string, error) {
	at := m.attacher.get(id)
	switch {
	case rec.Staged == nil || rec.Staged.Path != stagingPath:
		return "", fmt.Errorf("not staged at %s: %w", stagingPath, ErrNotStaged)
	case rec.Staged.Block != want.Block:
		return "", fmt.Errorf("staged as block device %t, asked for %t: %w", rec.Staged.Block, want.Block, ErrNotStaged)
	case at == nil || at.kernel == nil:
		return "", fmt.Errorf("staged, but its device is gone: %w", ErrNotStaged)
	case at.dead() != nil:
		return "", fmt.Errorf("staged, but its device is dead (%w): %w", at.dead(), ErrNotStaged)
	case want.Block:
		return at.kernel.Path(), nil
	}
	number, mounted, err := m.mounter.Mounted(stagingPath)
	if err == nil && (!mounted || number != rec.Device) {
		err = fmt.Errorf("the volume is not mounted at %s: %w", stagingPath, ErrNotStaged)
	}
	return stagingPath, err
}

// checkSingle refuses a second target of a volume that is for one consumer: every mode but
// SingleNodeMultiWriter (CSI, NodePublishVolume, "Non MULTI_NODE volume capability"), and those by which nodes write
// beside each other.
func checkSingle(rec *record, want *publication) error {
	single := func(p *publication) bool {
		return p.Mode != meta.SingleNodeMultiWriter && p.Mode != meta.MultiNodeMultiWriter
	}
	for i := range rec.Published {
		p := &rec.Published[i]
		if p.Path != want.Path && !p.Lost && (single(p) || single(want)) {
			return fmt.Errorf("the volume is for one consumer and is published at %s: %w", p.Path, trivet.ErrInUse)
		}
	}
	return nil
}

// clearTarget prepares the target. The first result is true when the volume is mounted there
// already.
func (m *mounts) clearTarget(rec *record, target string) (bool, error) {
	number, mounted, err := m.mounter.Mounted(target)
	if err != nil || !mounted {
		return false, err
	}
	i := rec.at(target)
	switch {
	case i >= 0 && rec.Published[i].Lost:
		return false, m.mounter.Unmount(target, true) // the shade
	case i >= 0 && number == rec.Device:
		return true, nil
	}
	return false, fmt.Errorf("something else is mounted there: %w", trivet.ErrInUse)
}

func (m *mounts) unpublish(_ context.Context, id trivet.VolumeID, target string) error {
	target, err := checkPath("target", target)
	if err != nil {
		return nil //nolint:nilerr // nothing is ever published at such a path
	}
	unlock, err := m.ops.try(id)
	if err != nil {
		return fmt.Errorf("unpublish %s: %w", id, err)
	}
	defer unlock()
	rec := m.records.get(id)
	if i := rec.at(target); i >= 0 {
		lazy := rec.Published[i].Lost || m.attacher.get(id).dead() != nil
		if err := m.mounter.Unmount(target, lazy); err != nil {
			return fmt.Errorf("unpublish %s: %w", id, err)
		}
		rec.Published = slices.Delete(rec.Published, i, i+1)
	} else if err := m.unmountAsked("unpublish", id, target); err != nil {
		return err
	}
	if err := m.mounter.Remove(target); err != nil {
		return fmt.Errorf("unpublish %s: %w", id, err)
	}
	return m.records.put(rec)
}

func (m *mounts) stats(ctx context.Context, id trivet.VolumeID, path string) (VolumeStats, error) {
	rec := m.records.get(id)
	i := rec.at(path)
	staged := rec.Staged != nil && rec.Staged.Path == path
	if !staged && (i < 0 || rec.Published[i].Lost) {
		return VolumeStats{}, fmt.Errorf("stats of %s: it is not at %q: %w", id, path, trivet.ErrNotFound)
	}
	at := m.attacher.get(id)
	if at == nil || at.path == nil {
		return VolumeStats{}, fmt.Errorf("stats of %s: its device is gone: %w", id, trivet.ErrUnavailable)
	}
	if (staged && rec.Staged.Block) || (!staged && rec.Published[i].Block) {
		return VolumeStats{Block: true, TotalBytes: at.path.Size()}, nil
	}
	return m.usage(ctx, id, path)
}

// usage asks the kernel, which may take as long as the volume's group has no leader. The caller
// does not wait longer than ctx; a later one is refused until the earlier answer is there.
func (m *mounts) usage(ctx context.Context, id trivet.VolumeID, path string) (VolumeStats, error) {
	unlock, err := m.statting.try(id)
	if err != nil {
		return VolumeStats{}, fmt.Errorf("stats of %s: %w", id, err)
	}
	type answer struct {
		stats VolumeStats
		err   error
	}
	got := make(chan answer, 1)
	go func() { // ends when the kernel answers, at the latest with the kernel device
		defer unlock()
		s, err := m.mounter.Usage(path)
		got <- answer{s, err}
	}()
	select {
	case a := <-got:
		if a.err != nil {
			return VolumeStats{}, fmt.Errorf("stats of %s: %w", id, a.err)
		}
		return a.stats, nil
	case <-ctx.Done():
		return VolumeStats{}, fmt.Errorf("stats of %s: %w: %w", id, ctx.Err(), trivet.ErrUnavailable)
	}
}
