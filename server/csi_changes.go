package server

import (
	"context"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller/meta"
	"github.com/trivet-csi/trivet/driver"
)

// changes is what the CSI driver asks about snapshots, of the catalogue and of whichever node has them.
type changes struct{ s *Server }

// Snapshot implements driver.Changes. ErrUnavailable while this server is no member of a cluster.
func (c changes) Snapshot(ctx context.Context, id trivet.SnapshotID) (meta.Snapshot, error) {
	if _, err := c.s.node(); err != nil {
		return meta.Snapshot{}, err
	}
	return c.s.controller.Snapshot(ctx, id)
}

// Changes implements driver.Changes.
func (c changes) Changes(ctx context.Context, from trivet.SnapshotID, to *meta.Snapshot, off int64,
	send func([]driver.Extent) error,
) error {
	n, err := c.s.node()
	if err != nil {
		return err
	}
	reader, err := n.Snapshots(ctx, to.Volume)
	if err != nil {
		return err
	}
	end := trivet.LBA(to.SizeBytes / trivet.BlockSize)
	for at := trivet.LBA(off / trivet.BlockSize); at < end; {
		runs, next, err := reader.Delta(ctx, from, to.ID, at, int64(end-at))
		if err != nil {
			return err
		}
		extents := make([]driver.Extent, len(runs))
		for i, r := range runs {
			extents[i] = driver.Extent{
				OffsetBytes: int64(r.LBA) * trivet.BlockSize, SizeBytes: r.BlockN * trivet.BlockSize,
			}
		}
		if err := send(extents); err != nil {
			return err
		}
		at = next
	}
	return nil
}
