package server

import (
	"context"
	"fmt"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/api"
	"github.com/trivet-csi/trivet/controller/meta"
	"github.com/trivet-csi/trivet/replication"
)

// DiffSnapshots implements api.AdminServer.
func (a *admin) DiffSnapshots(r *api.DiffSnapshotsRequest, out api.Admin_DiffSnapshotsServer) error {
	ctx := out.Context()
	from, to, err := a.diffed(ctx, r)
	if err != nil {
		return err
	}
	n, err := a.s.node()
	if err != nil {
		return err
	}
	reader, err := n.Snapshots(ctx, to.Volume)
	if err != nil {
		return err
	}
	return diff(ctx, reader, from, &to, trivet.LBA(r.GetOffset()/trivet.BlockSize), func(p *api.DiffPage) error {
		return out.Send(p)
	})
}

// diffed finds what is to be compared; a zero from is nothing.
func (a *admin) diffed(ctx context.Context, r *api.DiffSnapshotsRequest) (
	from trivet.SnapshotID, to meta.Snapshot, err error,
) {
	if to, err = a.findSnapshot(ctx, r.GetTo()); err != nil {
		return 0, to, err
	}
	var base meta.Snapshot
	if r.GetFrom() != "" {
		if base, err = a.findSnapshot(ctx, r.GetFrom()); err != nil {
			return 0, to, err
		}
	}
	switch {
	case to.State != meta.SnapshotReady:
		err = fmt.Errorf("snapshot %q is %s: %w", to.Name, to.State, trivet.ErrInvalid)
	case r.GetOffset() < 0 || r.GetOffset()%trivet.BlockSize != 0:
		err = fmt.Errorf("offset %d: want whole blocks of %d bytes: %w", r.GetOffset(), trivet.BlockSize, trivet.ErrInvalid)
	case base.ID == 0:
	case base.State != meta.SnapshotReady:
		err = fmt.Errorf("snapshot %q is %s: %w", base.Name, base.State, trivet.ErrInvalid)
	case base.Volume != to.Volume:
		err = fmt.Errorf("snapshot %q is of volume %q, %q of %q; only snapshots of one volume can be compared: %w",
			base.Name, base.VolumeName, to.Name, to.VolumeName, trivet.ErrInvalid)
	case base.Generation > to.Generation:
		err = fmt.Errorf("snapshot %q is newer than %q; swap them: %w", base.Name, to.Name, trivet.ErrInvalid)
	}
	return base.ID, to, err
}

// diff sends all extents from block at on.
func diff(ctx context.Context, s *replication.SnapshotReader, from trivet.SnapshotID, to *meta.Snapshot, at trivet.LBA,
	send func(*api.DiffPage) error,
) error {
	for end := trivet.LBA(to.SizeBytes / trivet.BlockSize); at < end; {
		xs, next, err := s.Delta(ctx, from, to.ID, at, int64(end-at))
		if err != nil {
			return err
		}
		page := &api.DiffPage{NextOffset: int64(next) * trivet.BlockSize}
		for _, x := range xs {
			page.Extents = append(page.Extents, &api.Extent{
				Offset: int64(x.LBA) * trivet.BlockSize, SizeBytes: x.BlockN * trivet.BlockSize,
			})
		}
		if err := send(page); err != nil {
			return err
		}
		at = next
	}
	return nil
}
