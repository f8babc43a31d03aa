package driver

import (
	"context"
	"fmt"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"

	"github.com/trivet-csi/trivet"
	"github.com/trivet-csi/trivet/controller/meta"
)

// MetadataPrefix begins the full names of the methods of the SnapshotMetadata service.
const MetadataPrefix = servicePrefix + "SnapshotMetadata/"

const (
	// tuplesDefault and tuplesMax are how many ranges a message has when the caller does not say, and at most: at some 24
	// bytes each it stays far below the 4 MiB that gRPC clients accept.
	tuplesDefault = 1024
	tuplesMax     = 8192
)

// Extent is a range of a volume.
type Extent struct{ OffsetBytes, SizeBytes int64 }

// Changes is what the driver needs to tell what snapshots hold. Its methods are safe for concurrent use and return
// errors that wrap the sentinels of package trivet.
type Changes interface {
	// Snapshot returns a snapshot as it is now; ErrNotFound.
	Snapshot(ctx context.Context, id trivet.SnapshotID) (meta.Snapshot, error)
	// Changes calls send with the ranges, whole blocks from the block of offset off on, in order and apart, in which
	// to may show something else than the earlier from, or, with from zero, something at all. It returns nil when
	// all were sent, and the error of send. ErrNotFound: no replica has the snapshots.
	Changes(ctx context.Context, from trivet.SnapshotID, to *meta.Snapshot, off int64, send func([]Extent) error) error
}

// RegisterSnapshotMetadata adds the SnapshotMetadata service to a gRPC server that has InterceptStream among its
// interceptors.
func RegisterSnapshotMetadata(r grpc.ServiceRegistrar, c Changes) {
	csi.RegisterSnapshotMetadataServer(r, &metadataServer{changes: c})
}

// metadataServer serves csi.v1.SnapshotMetadata. A stream that ends without an error has told everything.
type metadataServer struct {
	csi.UnimplementedSnapshotMetadataServer

	changes Changes
}

// GetMetadataAllocated sends the ranges of a snapshot that hold data.
func (s *metadataServer) GetMetadataAllocated(req *csi.GetMetadataAllocatedRequest,
	out csi.SnapshotMetadata_GetMetadataAllocatedServer,
) error {
	ctx := out.Context()
	if err := checkPosition(req.GetStartingOffset(), req.GetMaxResults()); err != nil {
		return err
	}
	to, err := s.frozen(ctx, "snapshot_id", req.GetSnapshotId())
	if err != nil {
		return err
	}
	return s.tell(ctx, 0, &to, req.GetStartingOffset(), req.GetMaxResults(), func(tuples []*csi.BlockMetadata) error {
		return out.Send(&csi.GetMetadataAllocatedResponse{
			BlockMetadataType: csi.BlockMetadataType_VARIABLE_LENGTH, VolumeCapacityBytes: to.SizeBytes,
			BlockMetadata: tuples,
		})
	})
}

// GetMetadataDelta sends the ranges in which a snapshot may show something else than an earlier one of its volume.
func (s *metadataServer) GetMetadataDelta(req *csi.GetMetadataDeltaRequest,
	out csi.SnapshotMetadata_GetMetadataDeltaServer,
) error {
	ctx := out.Context()
	if err := checkPosition(req.GetStartingOffset(), req.GetMaxResults()); err != nil {
		return err
	}
	if req.GetTargetSnapshotId() == "" { // before anything is looked up
		return fmt.Errorf("target_snapshot_id is missing: %w", trivet.ErrInvalid)
	}
	base, err := s.frozen(ctx, "base_snapshot_id", req.GetBaseSnapshotId())
	if err != nil {
		return err
	}
	to, err := s.frozen(ctx, "target_snapshot_id", req.GetTargetSnapshotId())
	switch {
	case err != nil:
		return err
	case base.Volume != to.Volume:
		return fmt.Errorf("snapshot %s is of volume %s, %s of %s; only snapshots of one volume can be compared: %w",
			base.ID, base.Volume, to.ID, to.Volume, trivet.ErrInvalid)
	case base.Generation > to.Generation:
		return fmt.Errorf("base snapshot %s is newer than target snapshot %s: %w", base.ID, to.ID, trivet.ErrInvalid)
	}
	send := func(tuples []*csi.BlockMetadata) error {
		return out.Send(&csi.GetMetadataDeltaResponse{
			BlockMetadataType: csi.BlockMetadataType_VARIABLE_LENGTH, VolumeCapacityBytes: to.SizeBytes,
			BlockMetadata: tuples,
		})
	}
	return s.tell(ctx, base.ID, &to, req.GetStartingOffset(), req.GetMaxResults(), send)
}

func checkPosition(offset int64, maxResults int32) error {
	switch {
	case maxResults < 0:
		return fmt.Errorf("max_results %d is negative: %w", maxResults, trivet.ErrInvalid)
	case offset < 0:
		return fmt.Errorf("starting_offset %d is negative: %w", offset, trivet.ErrOutOfRange)
	}
	return nil
}

// frozen returns the snapshot that a handle names: ErrInvalid when it is missing or could be nobody's, ErrNotFound
// when it names none, or one that is gone for its users, ErrUnavailable while it is being made.
func (s *metadataServer) frozen(ctx context.Context, field, handle string) (meta.Snapshot, error) {
	if handle == "" {
		return meta.Snapshot{}, fmt.Errorf("%s is missing: %w", field, trivet.ErrInvalid)
	}
	if err := trivet.ValidateName(handle); err != nil {
		return meta.Snapshot{}, fmt.Errorf("%s: %w", field, err)
	}
	id, err := trivet.ParseSnapshotID(handle)
	if err != nil {
		return meta.Snapshot{}, fmt.Errorf("%s: snapshot %q is none of ours: %w", field, handle, trivet.ErrNotFound)
	}
	snap, err := s.changes.Snapshot(ctx, id)
	if err != nil {
		return meta.Snapshot{}, fmt.Errorf("%s: %w", field, err)
	}
	switch {
	case snap.Hidden():
		err = trivet.ErrNotFound
	case snap.State == meta.SnapshotReady:
		return snap, nil
	case snap.State == meta.SnapshotCreating:
		err = trivet.ErrUnavailable
	case snap.State == meta.SnapshotFailed:
		err = errPrecondition
	default:
		err = trivet.ErrNotFound
	}
	return meta.Snapshot{}, fmt.Errorf("%s: snapshot %s is %s: %w", field, id, snap.State, err)
}

// tell sends what changed from an offset on, in messages of at most maxResults ranges (0 = as many as is good).
func (s *metadataServer) tell(ctx context.Context, from trivet.SnapshotID, to *meta.Snapshot, offset int64,
	maxResults int32, send func([]*csi.BlockMetadata) error,
) error {
	if offset > to.SizeBytes {
		return fmt.Errorf("starting_offset %d is beyond the %d bytes of %s: %w", offset, to.SizeBytes, to.ID,
			trivet.ErrOutOfRange)
	}
	if from == to.ID || offset == to.SizeBytes {
		return nil
	}
	p := pager{most: tuplesDefault, send: send}
	if maxResults > 0 {
		p.most = min(int(maxResults), tuplesMax)
	}
	err := s.changes.Changes(ctx, from, to, offset, p.add)
	if absent(err) {
		err = s.missing(ctx, to.ID, err)
	}
	if err != nil {
		return err
	}
	return p.flush()
}

// missing says what it means that no replica has a snapshot that was in the catalogue: it was deleted meanwhile, or
// those that have it do not answer.
func (s *metadataServer) missing(ctx context.Context, id trivet.SnapshotID, err error) error {
	if snap, readErr := s.changes.Snapshot(ctx, id); readErr == nil && snap.State == meta.SnapshotReady {
		return fmt.Errorf("%v: %w", err, trivet.ErrUnavailable)
	}
	return err
}

// pager gathers ranges into messages, and ranges that touch into one. The newest is held back: the next may go on from
// its end.
type pager struct {
	most   int
	send   func([]*csi.BlockMetadata) error
	tuples []*csi.BlockMetadata
}

func (p *pager) add(extents []Extent) error {
	for _, x := range extents {
		if n := len(p.tuples); n > 0 && p.tuples[n-1].GetByteOffset()+p.tuples[n-1].GetSizeBytes() == x.OffsetBytes {
			p.tuples[n-1].SizeBytes += x.SizeBytes
			continue
		}
		if len(p.tuples) == p.most {
			if err := p.flush(); err != nil {
				return err
			}
		}
		p.tuples = append(p.tuples, &csi.BlockMetadata{ByteOffset: x.OffsetBytes, SizeBytes: x.SizeBytes})
	}
	return nil
}

// flush sends what is gathered, if anything.
func (p *pager) flush() error {
	if len(p.tuples) == 0 {
		return nil
	}
	tuples := p.tuples
	p.tuples = nil
	return p.send(tuples)
}
